//! The options of `holdfast run`, in one table.

use clap::{Arg, ArgAction, Command};
use holdfast_config as config;
use holdfast_keyval::Key;

/// What an option's value is.
pub(super) enum Shape {
    /// There is none.
    Flag,
    /// There is none; giving it again means more.
    Count,
    /// One text.
    Text(&'static str),
    /// One key=value text.
    Keys(fn() -> Vec<Key>),
    /// Several texts.
    Several(&'static str),
    /// Several key=value texts.
    Many(fn() -> Vec<Key>),
}

/// One option.
pub(super) struct Opt {
    pub name: &'static str,
    pub short: Option<char>,
    pub shape: Shape,
    pub help: &'static str,
    pub heading: &'static str,
}

const fn opt(name: &'static str, shape: Shape, heading: &'static str, help: &'static str) -> Opt {
    Opt { name, short: None, shape, help, heading }
}

const BOOT: &str = "What boots";
const MACHINE: &str = "The machine";
const DEVICES: &str = "Devices";
const CONSOLES: &str = "Consoles";
const CONTROL: &str = "Control";
const SAFETY: &str = "Hardening";

/// All options of `holdfast run`.
pub(super) const OPTIONS: &[Opt] = &[
    opt("kernel", Shape::Text("PATH"), BOOT, "Kernel image"),
    opt("firmware", Shape::Text("PATH"), BOOT, "Firmware image"),
    opt(
        "pflash",
        Shape::Many(holdfast_keyval::keys::<config::PflashConfig>),
        BOOT,
        "Contents of a flash bank, first bank first",
    ),
    opt("initramfs", Shape::Text("PATH"), BOOT, "Initial RAM disk"),
    opt("cmdline", Shape::Text("TEXT"), BOOT, "Kernel command line"),
    opt(
        "restore",
        Shape::Keys(holdfast_keyval::keys::<config::RestoreConfig>),
        BOOT,
        "Restore a VM from a snapshot",
    ),
    opt(
        "incoming",
        Shape::Text("tcp:HOST:PORT|unix:PATH|fd:N|defer"),
        BOOT,
        "Wait for a VM that migrates here; with defer, for QMP's migrate-incoming",
    ),
    opt("name", Shape::Text("NAME"), MACHINE, "Name of the VM, for people"),
    opt(
        "arch",
        Shape::Text("ARCH"),
        MACHINE,
        "Architecture of the guest: x86_64 or riscv64 [default: the host's]",
    ),
    opt(
        "machine",
        Shape::Keys(holdfast_keyval::keys::<config::MachineConfig>),
        MACHINE,
        "Machine: q35 for x86_64, virt for riscv64",
    ),
    opt(
        "accel",
        Shape::Text("ACCEL"),
        MACHINE,
        "Accelerators to try in order: kvm, tcg, auto, kvm:tcg [default: auto]",
    ),
    opt("perf-map", Shape::Flag, MACHINE, "List translated code for perf in /tmp/perf-PID.map"),
    opt(
        "tcg-log",
        Shape::Keys(holdfast_keyval::keys::<config::TcgLogConfig>),
        MACHINE,
        "Log translated code: guest=on, ir=on, host=on, int=on, to file=PATH",
    ),
    opt("cpus", Shape::Keys(holdfast_keyval::keys::<config::CpusConfig>), MACHINE, "vCPUs, as N or keys"),
    opt(
        "memory",
        Shape::Keys(holdfast_keyval::keys::<config::MemoryConfig>),
        MACHINE,
        "Guest RAM [default: 512M]",
    ),
    opt(
        "platform",
        Shape::Keys(holdfast_keyval::keys::<config::PlatformConfig>),
        MACHINE,
        "What identifies the platform to the guest",
    ),
    opt("disk", Shape::Many(holdfast_keyval::keys::<config::DiskConfig>), DEVICES, "Block device"),
    opt(
        "blockdev",
        Shape::Many(holdfast_keyval::keys::<config::BlockdevOptions>),
        DEVICES,
        "Node of the storage graph, as key=value (file.filename=PATH) or JSON, which --disk node=NAME shows",
    ),
    opt(
        "object",
        Shape::Several("TYPE,id=ID,..."),
        DEVICES,
        "Object that other options name (secret, tls-creds-x509, throttle-group, authz-*), or dbus-vmstate",
    ),
    opt("net", Shape::Many(holdfast_keyval::keys::<config::NetConfig>), DEVICES, "Network device"),
    opt(
        "device",
        Shape::Many(super::run::device_keys),
        DEVICES,
        "Device that is added by name: NAME or NAME,key=value",
    ),
    opt(
        "fs",
        Shape::Many(holdfast_keyval::keys::<config::FsConfig>),
        DEVICES,
        "Directory shared by a vhost-user back end (virtiofsd)",
    ),
    opt(
        "generic-vhost-user",
        Shape::Many(holdfast_keyval::keys::<config::GenericVhostUserConfig>),
        DEVICES,
        "Device of any type by a vhost-user back end",
    ),
    opt(
        "vsock",
        Shape::Keys(holdfast_keyval::keys::<config::VsockConfig>),
        DEVICES,
        "Sockets between the guest and the host, on UNIX sockets of the host",
    ),
    opt("rng", Shape::Keys(holdfast_keyval::keys::<config::RngConfig>), DEVICES, "Entropy device"),
    opt("balloon", Shape::Keys(holdfast_keyval::keys::<config::BalloonConfig>), DEVICES, "Memory balloon"),
    opt(
        "serial",
        Shape::Keys(holdfast_keyval::keys::<config::SerialConfig>),
        CONSOLES,
        "Serial port: off, null, tty, pty, file=PATH or socket=PATH [default: null]",
    ),
    opt(
        "console",
        Shape::Keys(holdfast_keyval::keys::<config::ConsoleConfig>),
        CONSOLES,
        "virtio console: off, null, tty, pty or file=PATH [default: tty]",
    ),
    opt(
        "console-port",
        Shape::Many(holdfast_keyval::keys::<config::ConsolePortConfig>),
        CONSOLES,
        "Named port of the virtio console: name=NAME and file=PATH, socket=PATH, mode=pty or mode=null",
    ),
    opt(
        "debug-console",
        Shape::Keys(holdfast_keyval::keys::<config::DebugConsoleConfig>),
        CONSOLES,
        "x86 debug console: off, tty, pty or file=PATH, and iobase=PORT [default: off]",
    ),
    opt("api-socket", Shape::Text("path=PATH|fd=N|PATH"), CONTROL, "Serve the REST API on a UNIX socket"),
    opt("qmp", Shape::Text("unix:PATH|tcp:HOST:PORT"), CONTROL, "Serve QMP"),
    opt("gdb", Shape::Text("unix:PATH|tcp:HOST:PORT"), CONTROL, "Let gdb debug the guest"),
    opt("gdb-wait", Shape::Flag, CONTROL, "Let the guest wait for gdb before its first instruction"),
    opt("event-monitor", Shape::Text("path=PATH|fd=N"), CONTROL, "Write events to a file or FIFO"),
    opt("log-file", Shape::Text("PATH"), CONTROL, "Write the log to a file [default: standard error]"),
    Opt {
        name: "verbose",
        short: Some('v'),
        shape: Shape::Count,
        help: "Log more: -v for information, -vv for debugging, -vvv for tracing",
        heading: CONTROL,
    },
    opt("no-shutdown", Shape::Flag, CONTROL, "Stay when the guest has switched itself off"),
    opt(
        "seccomp",
        Shape::Text("true|false|log|errno"),
        SAFETY,
        "What happens on a system call that is not allowed: true kills, errno refuses, log logs [default: true]",
    ),
    opt("landlock", Shape::Flag, SAFETY, "Let Holdfast open only the paths that the options name"),
    opt(
        "landlock-rules",
        Shape::Many(holdfast_keyval::keys::<config::LandlockConfig>),
        SAFETY,
        "More paths that it may open",
    ),
];

/// The `run` command. `verbose` adds the sub-keys to the long help.
pub(super) fn run_command(name: &'static str, verbose: bool) -> Command {
    let mut command = Command::new(name).about("Run a virtual machine");
    for opt in OPTIONS {
        command = command.arg(argument(opt, verbose));
    }
    for unsupported in config::UNSUPPORTED_OPTIONS {
        let action = if unsupported.takes_value { ArgAction::Append } else { ArgAction::SetTrue };
        let arg = Arg::new(unsupported.name).long(unsupported.name).action(action).hide(true);
        // Values may be missing or several: the option is refused either way.
        let arg = if unsupported.takes_value { arg.num_args(0..) } else { arg };
        command = command.arg(arg);
    }
    command
}

/// Options of `holdfast run` that another command has too.
pub(super) fn shared(names: &[&str], verbose: bool) -> Vec<Arg> {
    OPTIONS.iter().filter(|opt| names.contains(&opt.name)).map(|opt| argument(opt, verbose)).collect()
}

fn argument(opt: &Opt, verbose: bool) -> Arg {
    let mut arg = Arg::new(opt.name).long(opt.name).help(opt.help).help_heading(opt.heading);
    if let Some(short) = opt.short {
        arg = arg.short(short);
    }
    let keys = |arg: Arg, keys: fn() -> Vec<Key>| {
        if verbose { arg.long_help(long_help(opt.help, &keys())) } else { arg }
    };
    match opt.shape {
        Shape::Flag => arg.action(ArgAction::SetTrue),
        Shape::Count => arg.action(ArgAction::Count),
        Shape::Text(name) => arg.value_name(name).allow_hyphen_values(opt.name == "cmdline"),
        Shape::Several(name) => arg.value_name(name).action(ArgAction::Append).num_args(1..),
        Shape::Keys(list) => keys(arg.value_name("key=value,..."), list),
        Shape::Many(list) => {
            keys(arg.value_name("key=value,...").action(ArgAction::Append).num_args(1..), list)
        }
    }
}

/// Width of the lines of a key's description: with clap's indentation they fit a terminal of 80 columns.
const HELP_WIDTH: usize = 62;

/// The help of an option with its sub-keys.
pub(super) fn long_help(help: &str, keys: &[Key]) -> String {
    let mut text = format!("{help}\n");
    for key in keys {
        let default = match &key.default {
            Some(default) => format!(" [default: {default}]"),
            None if key.required && !key.positional => " (required)".to_owned(),
            None => String::new(),
        };
        text += "\n  ";
        text += &key.name;
        if !key.value.is_empty() {
            text += &format!("={}", key.value);
        }
        let mut column = HELP_WIDTH;
        for word in format!("{}{default}", key.description).split(' ') {
            if column + word.len() >= HELP_WIDTH {
                text += "\n     ";
                column = 0;
            }
            text.push(' ');
            text += word;
            column += word.len() + 1;
        }
    }
    text
}
