//! `holdfast ctl`: the client, with `ch-remote`'s verbs.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Arg, ArgMatches, Command};
use holdfast_config::{
    DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, ReceiveMigrationData, RecoverMigrationData,
    RestoreConfig, RestoredNet, SendMigrationData, VmConfig, VmRemoveDevice, VmResize, VmSnapshotConfig,
    VsockConfig,
};
use holdfast_keyval::parse_size;
use schemars::JsonSchema;
use serde::Deserialize;

use super::CliError;
use super::options::long_help;
use super::run::read_keys;

/// A request to a running Holdfast.
#[derive(Debug, PartialEq, Eq)]
pub struct Ctl {
    /// Its API socket.
    pub socket: PathBuf,
    /// Endpoint: `vm.boot`.
    pub endpoint: &'static str,
    /// It is asked with GET, not PUT.
    pub get: bool,
    /// JSON body.
    pub body: Option<String>,
    /// File descriptors that go with it. They were inherited.
    pub fds: Vec<RawFd>,
    /// How far the migration has come is shown until the answer is there.
    pub progress: bool,
}

/// Verbs without arguments: verb, endpoint, GET, text.
const PLAIN: &[(&str, &str, bool, &str)] = &[
    ("ping", "vmm.ping", true, "Check that Holdfast is there"),
    ("info", "vm.info", true, "Print configuration and state of the VM"),
    ("counters", "vm.counters", true, "Print the devices' counters"),
    ("boot", "vm.boot", false, "Boot the VM"),
    ("delete", "vm.delete", false, "Delete the VM"),
    ("pause", "vm.pause", false, "Pause the VM"),
    ("resume", "vm.resume", false, "Resume the VM"),
    ("reboot", "vm.reboot", false, "Reboot the VM"),
    ("shutdown", "vm.shutdown", false, "Switch the VM off"),
    ("power-button", "vm.power-button", false, "Press the VM's power button"),
    ("nmi", "vm.nmi", false, "Inject a non-maskable interrupt"),
    (
        "migration-progress",
        "vm.migration-progress",
        true,
        "Print where the migration is, or how the last one ended",
    ),
    ("cancel-migration", "vm.cancel-migration", false, "Cancel the migration: the VM goes on here"),
    ("pause-migration", "vm.pause-migration", false, "Interrupt a post-copy migration"),
    ("shutdown-vmm", "vmm.shutdown", false, "End Holdfast"),
];

/// Verbs of `ch-remote` for features that Holdfast does not have.
const UNSUPPORTED: &[&str] =
    &["add-device", "add-pmem", "add-user-device", "add-vdpa", "coredump", "resize-disk", "resize-zone"];

/// `restore`'s keys: like the request's, but the network devices name their file descriptors.
#[derive(Debug, Deserialize, JsonSchema)]
struct CtlRestore {
    /// `file://` and the absolute path of the snapshot's directory.
    #[schemars(extend("x-positional" = true))]
    source_url: String,
    /// Accelerators to try instead of those of the saved VM.
    #[serde(default)]
    accel: Option<holdfast_config::AccelChoice>,
    /// Populate all of RAM before the VM runs.
    #[serde(default)]
    prefault: bool,
    /// How guest RAM comes back.
    #[serde(default)]
    memory_restore_mode: holdfast_config::MemoryRestoreMode,
    /// Inherited tap file descriptors of network devices.
    #[serde(default)]
    net_fds: Option<Vec<NetFds>>,
    /// Run at once.
    #[serde(default)]
    resume: bool,
}

/// A network device and its tap file descriptors.
#[derive(Debug, Deserialize, JsonSchema)]
struct NetFds {
    /// Identifier of the network device.
    id: String,
    /// Its file descriptors.
    fds: Vec<RawFd>,
}

/// A verb whose one argument is `key=value,...`: its name, what it does, what the argument is, and the keys.
type Keyed = (&'static str, &'static str, &'static str, fn() -> Vec<holdfast_keyval::Key>);

fn keyed() -> [Keyed; 10] {
    use holdfast_keyval::keys;
    [
        ("add-disk", "Add a disk", "The disk", keys::<DiskConfig>),
        ("add-net", "Add a network device", "The network device", keys::<NetConfig>),
        ("add-fs", "Add a directory shared by a vhost-user back end", "The file system", keys::<FsConfig>),
        (
            "add-generic-vhost-user",
            "Add a device of a vhost-user back end",
            "The device",
            keys::<GenericVhostUserConfig>,
        ),
        ("add-vsock", "Add sockets between the guest and the host", "The sockets", keys::<VsockConfig>),
        ("restore", "Restore a VM from a snapshot", "What is restored, and how", keys::<CtlRestore>),
        (
            "migrate",
            "Move the VM elsewhere, with a progress bar",
            "Where it goes, and how",
            keys::<SendMigrationData>,
        ),
        (
            "recover-migration",
            "Go on with an interrupted post-copy migration",
            "Where, at the destination first",
            keys::<RecoverMigrationData>,
        ),
        ("send-migration", "Move the VM elsewhere", "Where it goes, and how", keys::<SendMigrationData>),
        (
            "receive-migration",
            "Take a VM over from elsewhere",
            "Where it comes in",
            keys::<ReceiveMigrationData>,
        ),
    ]
}

pub(super) fn command(verbose: bool) -> Command {
    let text = |name: &'static str, help: &'static str| Arg::new(name).required(true).help(help);
    let option = |name: &'static str, value, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help)
    };
    let mut command = Command::new("ctl")
        .about("Control a running Holdfast")
        .subcommand_required(true)
        .arg(option("api-socket", "PATH", "Its API socket").required(true))
        .subcommand(
            Command::new("create")
                .about("Create a VM; nothing boots yet")
                .arg(Arg::new("config").default_value("-").help("JSON file; - for standard input")),
        )
        .subcommand(Command::new("remove-device").about("Remove a device").arg(text("id", "Its identifier")))
        .subcommand(
            Command::new("resize")
                .about("Resize the VM")
                .arg(option("balloon", "SIZE", "New size of the balloon"))
                .arg(option("cpus", "N", "New number of vCPUs"))
                .arg(option("memory", "SIZE", "New size of RAM")),
        )
        .subcommand(
            Command::new("snapshot")
                .about("Save a paused VM")
                .arg(text("url", "file:// and the absolute path of a directory")),
        );
    for (verb, about, help, keys) in keyed() {
        let arg = text("keys", help).value_name("key=value,...");
        let arg = if verbose { arg.long_help(long_help(help, &keys())) } else { arg };
        command = command.subcommand(Command::new(verb).about(about).arg(arg));
    }
    for (verb, _, _, about) in PLAIN {
        command = command.subcommand(Command::new(*verb).about(*about));
    }
    for verb in UNSUPPORTED {
        let rest = Arg::new("rest").num_args(0..).allow_hyphen_values(true);
        command = command.subcommand(Command::new(*verb).arg(rest).hide(true));
    }
    command
}

pub(super) fn read(matches: &ArgMatches) -> Result<Ctl, CliError> {
    let socket = matches.get_one::<String>("api-socket").map(PathBuf::from).unwrap_or_default();
    let Some((verb, arguments)) = matches.subcommand() else {
        return Err(CliError::Together("no verb; `holdfast ctl --help` lists them".into()));
    };
    if let Some((_, endpoint, get, _)) = PLAIN.iter().find(|(name, ..)| *name == verb) {
        return Ok(Ctl { socket, endpoint, get: *get, body: None, fds: Vec::new(), progress: false });
    }
    let (endpoint, body, fds) = request(verb, arguments)?;
    Ok(Ctl { socket, endpoint, get: false, body: Some(body), fds, progress: verb == "migrate" })
}

fn request(verb: &str, arguments: &ArgMatches) -> Result<(&'static str, String, Vec<RawFd>), CliError> {
    let argument = |name: &str| arguments.get_one::<String>(name).map(String::as_str);
    match verb {
        "create" => Ok(("vm.create", config_file(argument("config").unwrap_or("-"))?, Vec::new())),
        "add-disk" => {
            let disk: DiskConfig = read_keys("disk", argument("keys").unwrap_or_default())?;
            Ok(("vm.add-disk", json(&disk)?, Vec::new()))
        }
        "add-net" => {
            let mut net: NetConfig = read_keys("net", argument("keys").unwrap_or_default())?;
            // Numbers mean nothing to the other process: the descriptors travel beside the body.
            let fds = net.fds.take().unwrap_or_default();
            Ok(("vm.add-net", json(&net)?, fds))
        }
        "add-fs" => {
            let fs: FsConfig = read_keys("fs", argument("keys").unwrap_or_default())?;
            Ok(("vm.add-fs", json(&fs)?, Vec::new()))
        }
        "add-generic-vhost-user" => {
            let device: GenericVhostUserConfig =
                read_keys("generic-vhost-user", argument("keys").unwrap_or_default())?;
            Ok(("vm.add-generic-vhost-user", json(&device)?, Vec::new()))
        }
        "add-vsock" => {
            let vsock: VsockConfig = read_keys("vsock", argument("keys").unwrap_or_default())?;
            Ok(("vm.add-vsock", json(&vsock)?, Vec::new()))
        }
        "remove-device" => {
            let device = VmRemoveDevice { id: argument("id").unwrap_or_default().to_owned() };
            Ok(("vm.remove-device", json(&device)?, Vec::new()))
        }
        "resize" => Ok(("vm.resize", json(&resize(arguments)?)?, Vec::new())),
        "snapshot" => {
            let snapshot =
                VmSnapshotConfig { destination_url: argument("url").unwrap_or_default().to_owned() };
            Ok(("vm.snapshot", json(&snapshot)?, Vec::new()))
        }
        "restore" => {
            let (restore, fds) = restore(argument("keys").unwrap_or_default())?;
            Ok(("vm.restore", json(&restore)?, fds))
        }
        "recover-migration" => {
            let data: RecoverMigrationData = read_keys(verb, argument("keys").unwrap_or_default())?;
            Ok(("vm.recover-migration", json(&data)?, Vec::new()))
        }
        "migrate" | "send-migration" => {
            let data: SendMigrationData = read_keys(verb, argument("keys").unwrap_or_default())?;
            data.check().map_err(CliError::Together)?;
            Ok(("vm.send-migration", json(&data)?, Vec::new()))
        }
        "receive-migration" => {
            let keys = argument("keys").unwrap_or_default();
            let data: ReceiveMigrationData = read_keys("receive-migration", keys)?;
            Ok(("vm.receive-migration", json(&data)?, Vec::new()))
        }
        _ => Err(CliError::Together(format!("ctl {verb} is not supported by this version of Holdfast"))),
    }
}

fn restore(keys: &str) -> Result<(RestoreConfig, Vec<RawFd>), CliError> {
    let given: CtlRestore = read_keys("restore", keys)?;
    let nets = given.net_fds.unwrap_or_default();
    let restored =
        nets.iter().map(|net| RestoredNet { id: net.id.clone(), num_fds: net.fds.len() }).collect();
    let restore = RestoreConfig {
        accel: given.accel,
        source_url: given.source_url,
        prefault: given.prefault,
        memory_restore_mode: given.memory_restore_mode,
        net_fds: if nets.is_empty() { None } else { Some(restored) },
        resume: given.resume,
    };
    Ok((restore, nets.into_iter().flat_map(|net| net.fds).collect()))
}

fn resize(arguments: &ArgMatches) -> Result<VmResize, CliError> {
    let size = |name: &str| {
        let value = arguments.get_one::<String>(name);
        let wrong =
            |value: &str, reason| CliError::Text { option: name.to_owned(), value: value.to_owned(), reason };
        value.map(|value| parse_size(value).map_err(|reason| wrong(value, reason))).transpose()
    };
    let vcpus = size("cpus")?;
    let desired_vcpus = vcpus.map(u32::try_from).transpose().map_err(|_| CliError::Text {
        option: "cpus".to_owned(),
        value: vcpus.unwrap_or_default().to_string(),
        reason: "is too large".to_owned(),
    })?;
    let resize = VmResize { desired_vcpus, desired_ram: size("memory")?, desired_balloon: size("balloon")? };
    if resize == VmResize::default() {
        return Err(CliError::Together("resize needs --balloon, --cpus or --memory".into()));
    }
    Ok(resize)
}

fn config_file(path: &str) -> Result<String, CliError> {
    let read =
        if path == "-" { std::io::read_to_string(std::io::stdin()) } else { std::fs::read_to_string(path) };
    let wrong =
        |reason: String| CliError::Text { option: "config".to_owned(), value: path.to_owned(), reason };
    let text = read.map_err(|error| wrong(error.to_string()))?;
    // Checked here as well, so that the message is about the file.
    VmConfig::from_json(text.as_bytes()).map_err(CliError::Config)?;
    Ok(text)
}

fn json<T: serde::Serialize>(value: &T) -> Result<String, CliError> {
    serde_json::to_string(value).map_err(|error| CliError::Together(error.to_string()))
}
