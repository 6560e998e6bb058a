//! `holdfast run`: from options to a configuration.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use clap::ArgMatches;
use clap::parser::ValueSource;
use holdfast_config::catalog::{self, DeviceConfig, DeviceKind};
use holdfast_config::{
    self as config, BlockdevOptions, ConsoleConfig, CpusConfig, DebugConsoleConfig, DiskConfig,
    LandlockConfig, MachineConfig, MemoryConfig, NetConfig, PayloadConfig, PflashConfig, PlatformConfig,
    RestoreConfig, RngConfig, SerialConfig, VmConfig,
};
use holdfast_keyval::Key;
use holdfast_virtio::blk::config::QemuBlk;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use super::{CliError, SeccompMode};

/// A path, or a file descriptor that was inherited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A path.
    Path(PathBuf),
    /// An inherited file descriptor.
    Fd(RawFd),
}

/// Where QMP is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QmpAddress {
    /// A UNIX socket.
    Unix(PathBuf),
    /// A TCP socket: host and port.
    Tcp(String, u16),
}

impl FromStr for QmpAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        const WRONG: &str = "must be unix:PATH or tcp:HOST:PORT";
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        let (host, port) = text.strip_prefix("tcp:").and_then(|rest| rest.rsplit_once(':')).ok_or(WRONG)?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let port = port.parse().map_err(|_| WRONG)?;
        if host.is_empty() { Err(WRONG) } else { Ok(Self::Tcp(host.to_owned(), port)) }
    }
}

/// What `holdfast run` was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RunOptions {
    /// A VM to create and boot at once.
    pub config: Option<Box<VmConfig>>,
    /// A snapshot to restore at once.
    pub restore: Option<RestoreConfig>,
    /// Where a VM that migrates here is waited for (`defer`: QMP will say).
    pub incoming: Option<String>,
    /// Where REST is served.
    pub api_socket: Option<Endpoint>,
    /// Where QMP is served.
    pub qmp: Option<QmpAddress>,
    /// Where debuggers connect.
    pub gdb: Option<QmpAddress>,
    /// The guest stands until a debugger lets it run.
    pub gdb_wait: bool,
    /// Where events are written.
    pub event_monitor: Option<Endpoint>,
    /// Where the log is written.
    pub log_file: Option<PathBuf>,
    /// How much is logged: 0 warnings, 1 information, 2 debugging, 3 tracing.
    pub verbosity: u8,
    /// The whole process opens only what the VM's config names, and this (`--landlock`, `--landlock-rules`).
    pub landlock: Option<Vec<LandlockConfig>>,
    /// System-call filters.
    pub seccomp: SeccompMode,
    /// The process stays when the guest has switched itself off.
    pub no_shutdown: bool,
    /// Secrets and the like that other options name.
    pub objects: ObjectTexts,
}

/// What `--object` says. It may be secret.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct ObjectTexts(pub Vec<String>);

impl std::fmt::Debug for ObjectTexts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ObjectTexts({})", self.0.len())
    }
}

/// Options that describe a VM, and so need something that boots it.
const DESCRIBES_VM: &[&str] = &[
    "initramfs",
    "cmdline",
    "name",
    "arch",
    "machine",
    "accel",
    "perf-map",
    "tcg-log",
    "cpus",
    "memory",
    "platform",
    "disk",
    "blockdev",
    "net",
    "fs",
    "generic-vhost-user",
    "vsock",
    "device",
    "rng",
    "balloon",
    "serial",
    "console",
    "console-port",
    "debug-console",
];

pub(super) fn read(matches: &ArgMatches) -> Result<RunOptions, CliError> {
    let given = |name: &str| matches.value_source(name) == Some(ValueSource::CommandLine);
    if let Some(option) = config::UNSUPPORTED_OPTIONS.iter().find(|option| given(option.name)) {
        return Err(CliError::UnsupportedOption { option: option.name.to_owned() });
    }
    let restore: Option<RestoreConfig> = keyval(matches, "restore")?;
    let boots = given("kernel") || given("firmware") || given("pflash");
    let described = DESCRIBES_VM.iter().find(|name| given(name));
    if let (Some(name), false) = (described, boots) {
        let reason = if restore.is_some() {
            "a restored VM has its own"
        } else {
            "nothing boots: give --kernel, --firmware or --pflash"
        };
        return Err(CliError::Together(format!("--{name} describes a VM, but {reason}")));
    }
    if boots && restore.is_some() {
        return Err(CliError::Together(
            "--restore brings a VM of its own; leave --kernel, --firmware and --pflash out".into(),
        ));
    }
    let api_socket = endpoint(matches, "api-socket", true)?;
    let qmp = parsed::<QmpAddress>(matches, "qmp")?;
    let incoming = incoming(matches, restore.is_some())?;
    if !boots && restore.is_none() && incoming.is_none() && api_socket.is_none() && qmp.is_none() {
        let reason =
            "nothing to do: give --kernel or --firmware to boot, --restore, or --api-socket to be told later";
        return Err(CliError::Together(reason.into()));
    }
    let gdb = gdb_address(matches)?;
    let gdb_wait = matches.get_flag("gdb-wait");
    if gdb_wait && gdb.is_none() {
        return Err(CliError::Together(
            "--gdb-wait waits for a debugger; say with --gdb where it connects".into(),
        ));
    }
    if gdb_wait && restore.is_some() {
        return Err(CliError::Together(
            "--gdb-wait is for VMs that boot; a VM that is restored without resume=on waits anyway".into(),
        ));
    }
    let mut config = if boots { Some(Box::new(vm_config(matches)?)) } else { None };
    if let (Some(config), Some(_)) = (&mut config, &api_socket) {
        config.machine.expect_hot_plug();
    }
    Ok(RunOptions {
        config,
        restore,
        incoming,
        api_socket,
        qmp,
        gdb,
        gdb_wait,
        event_monitor: endpoint(matches, "event-monitor", false)?,
        log_file: text(matches, "log-file").map(PathBuf::from),
        verbosity: matches.get_count("verbose"),
        landlock: landlock(matches)?,
        seccomp: seccomp(matches)?,
        no_shutdown: matches.get_flag("no-shutdown"),
        objects: ObjectTexts(matches.get_many::<String>("object").into_iter().flatten().cloned().collect()),
    })
}

/// Where a VM that migrates here comes in.
fn incoming(matches: &ArgMatches, restored: bool) -> Result<Option<String>, CliError> {
    let Some(value) = text(matches, "incoming") else { return Ok(None) };
    if restored {
        return Err(CliError::Together("--restore and --incoming each bring a VM; give one of them".into()));
    }
    if value != "defer" {
        value.parse::<holdfast_vmm::MigrationAddress>().map_err(|error| CliError::Text {
            option: "incoming".to_owned(),
            value: value.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok(Some(value.to_owned()))
}

/// Where debuggers connect: as QMP, or as Cloud Hypervisor has it.
fn gdb_address(matches: &ArgMatches) -> Result<Option<QmpAddress>, CliError> {
    match text(matches, "gdb").and_then(|value| value.strip_prefix("path=")).filter(|path| !path.is_empty()) {
        Some(path) => Ok(Some(QmpAddress::Unix(path.into()))),
        None => parsed(matches, "gdb"),
    }
}

pub(super) fn landlock(matches: &ArgMatches) -> Result<Option<Vec<LandlockConfig>>, CliError> {
    let rules = keyvals::<LandlockConfig>(matches, "landlock-rules")?;
    match (matches.get_flag("landlock"), rules) {
        (false, Some(_)) => {
            Err(CliError::Together("--landlock-rules add to --landlock; give it as well".into()))
        }
        (false, None) => Ok(None),
        (true, rules) => {
            let rules = rules.unwrap_or_default();
            let config = VmConfig { landlock_rules: Some(rules.clone()), ..VmConfig::default() };
            config.validate().map_err(CliError::Config)?;
            Ok(Some(rules))
        }
    }
}

fn vm_config(matches: &ArgMatches) -> Result<VmConfig, CliError> {
    let payload = PayloadConfig {
        firmware: text(matches, "firmware").map(PathBuf::from),
        kernel: text(matches, "kernel").map(PathBuf::from),
        cmdline: text(matches, "cmdline").map(str::to_owned),
        initramfs: text(matches, "initramfs").map(PathBuf::from),
    };
    let mut cpus: CpusConfig = keyval(matches, "cpus")?.unwrap_or_default();
    cpus.max_vcpus = cpus.max();
    let config = VmConfig {
        cpus,
        memory: keyval::<MemoryConfig>(matches, "memory")?.unwrap_or_default(),
        payload: Some(payload),
        disks: disks(matches)?,
        blockdevs: blockdevs(matches)?,
        net: keyvals::<NetConfig>(matches, "net")?,
        fs: keyvals::<config::FsConfig>(matches, "fs")?,
        generic_vhost_user: keyvals::<config::GenericVhostUserConfig>(matches, "generic-vhost-user")?,
        vsock: keyval::<config::VsockConfig>(matches, "vsock")?,
        rng: keyval::<RngConfig>(matches, "rng")?.unwrap_or_default(),
        balloon: keyval(matches, "balloon")?,
        serial: console::<SerialConfig>(matches, "serial")?.unwrap_or_default(),
        console: console::<ConsoleConfig>(matches, "console")?.unwrap_or_default(),
        console_ports: consoles(matches, "console-port")?,
        debug_console: console::<DebugConsoleConfig>(matches, "debug-console")?.unwrap_or_default(),
        platform: keyval::<PlatformConfig>(matches, "platform")?,
        landlock_enable: matches.get_flag("landlock"),
        landlock_rules: keyvals::<LandlockConfig>(matches, "landlock-rules")?,
        name: text(matches, "name").map(str::to_owned),
        arch: parsed(matches, "arch")?,
        machine: keyval::<MachineConfig>(matches, "machine")?.unwrap_or_default(),
        accel: parsed(matches, "accel")?.unwrap_or_default(),
        perf_map: matches.get_flag("perf-map"),
        board_devices: devices(matches)?,
        tcg_log: keyval(matches, "tcg-log")?,
        pflash: keyvals::<PflashConfig>(matches, "pflash")?,
    };
    config.validate_for_boot().map_err(CliError::Config)?;
    Ok(config)
}

pub(super) fn text<'a>(matches: &'a ArgMatches, name: &str) -> Option<&'a str> {
    matches.get_one::<String>(name).map(String::as_str)
}

fn parsed<T: FromStr<Err: ToString>>(matches: &ArgMatches, name: &str) -> Result<Option<T>, CliError> {
    let parse = |value: &str| {
        value.parse::<T>().map_err(|reason| CliError::Text {
            option: name.to_owned(),
            value: value.to_owned(),
            reason: reason.to_string(),
        })
    };
    text(matches, name).map(parse).transpose()
}

/// Reads `value` of `--option` into `T`.
pub(super) fn read_keys<T: DeserializeOwned + JsonSchema>(option: &str, value: &str) -> Result<T, CliError> {
    let wrong = |source| CliError::Value { option: option.to_owned(), source };
    for (key, _) in holdfast_keyval::pairs(value).map_err(wrong)? {
        if config::unsupported_cli_key(option, &key) {
            return Err(CliError::UnsupportedKey { option: option.to_owned(), key });
        }
    }
    holdfast_keyval::from_str(value).map_err(wrong)
}

fn keyval<T: DeserializeOwned + JsonSchema>(matches: &ArgMatches, name: &str) -> Result<Option<T>, CliError> {
    text(matches, name).map(|value| read_keys(name, value)).transpose()
}

fn keyvals<T: DeserializeOwned + JsonSchema>(
    matches: &ArgMatches,
    name: &str,
) -> Result<Option<Vec<T>>, CliError> {
    let Some(values) = matches.get_many::<String>(name) else { return Ok(None) };
    values.map(|value| read_keys(name, value)).collect::<Result<_, _>>().map(Some)
}

/// Reads the keys behind the name of a device.
struct DeviceReader<'a>(&'a str);

impl catalog::Visitor for DeviceReader<'_> {
    type Out = Result<DeviceConfig, holdfast_keyval::Error>;

    fn visit<K: DeviceKind>(&mut self) -> Self::Out {
        holdfast_keyval::from_str::<K>(self.0).map(Into::into)
    }
}

/// Lists the keys of a kind of device, each behind the device's name.
struct DeviceKeys;

impl catalog::Visitor for DeviceKeys {
    type Out = Vec<Key>;

    fn visit<K: DeviceKind>(&mut self) -> Vec<Key> {
        let name = Key {
            name: K::NAME.to_owned(),
            json_name: "driver".to_owned(),
            value: String::new(),
            default: None,
            description: K::SUMMARY.to_owned(),
            required: false,
            positional: true,
        };
        let keys = holdfast_keyval::keys::<K>().into_iter();
        std::iter::once(name)
            .chain(keys.map(|k| Key { name: format!("{},{}", K::NAME, k.name), ..k }))
            .collect()
    }
}

/// The keys of all devices that can be added by name.
pub(super) fn device_keys() -> Vec<Key> {
    catalog::NAMES.iter().filter_map(|name| catalog::visit(name, &mut DeviceKeys)).flatten().collect()
}

/// Devices that are added by name.
fn devices(matches: &ArgMatches) -> Result<Option<Vec<DeviceConfig>>, CliError> {
    let Some(values) = matches.get_many::<String>("device") else { return Ok(None) };
    let board = values.filter(|value| qemu_disk(value).is_none());
    let all: Vec<DeviceConfig> = board.map(|value| device(value)).collect::<Result<_, _>>()?;
    Ok(Some(all).filter(|all| !all.is_empty()))
}

/// What follows the name in `virtio-blk-pci,...`.
fn qemu_disk(value: &str) -> Option<(&str, &str)> {
    let (name, keys) = value.split_once(',').unwrap_or((value, ""));
    QemuBlk::DRIVERS.contains(&name).then_some((name, keys))
}

/// The disks of `--disk`, then those of `--device virtio-blk-pci`.
fn disks(matches: &ArgMatches) -> Result<Option<Vec<DiskConfig>>, CliError> {
    let mut all = keyvals::<DiskConfig>(matches, "disk")?.unwrap_or_default();
    for (name, keys) in
        matches.get_many::<String>("device").into_iter().flatten().filter_map(|value| qemu_disk(value))
    {
        let option = format!("device {name}");
        let disk: QemuBlk = holdfast_keyval::from_str(&format!("driver={name},{keys}"))
            .map_err(|source| CliError::Value { option: option.clone(), source })?;
        let wrong = |reason| CliError::Text { option, value: keys.to_owned(), reason };
        all.push(disk.into_disk().map_err(wrong)?);
    }
    Ok(Some(all).filter(|all| !all.is_empty()))
}

/// The nodes of `--blockdev`.
pub(super) fn blockdevs(matches: &ArgMatches) -> Result<Option<Vec<BlockdevOptions>>, CliError> {
    let Some(values) = matches.get_many::<String>("blockdev") else { return Ok(None) };
    let read = |value: &String| {
        let options = match value.starts_with('{') {
            true => BlockdevOptions::from_json(value),
            false => BlockdevOptions::from_pairs(value),
        };
        options.map_err(|error| CliError::Text {
            option: "blockdev".to_owned(),
            value: value.clone(),
            reason: error.to_string(),
        })
    };
    values.map(read).collect::<Result<_, _>>().map(Some)
}

/// One device: `NAME` or `NAME,key=value`.
fn device(value: &str) -> Result<DeviceConfig, CliError> {
    let (name, keys) = value.split_once(',').unwrap_or((value, ""));
    if name.starts_with("path=") {
        // Cloud Hypervisor's spelling of a host's PCI device.
        return Err(CliError::UnsupportedKey { option: "device".to_owned(), key: "path".to_owned() });
    }
    let unknown = || CliError::Text {
        option: "device".to_owned(),
        value: value.to_owned(),
        reason: format!("there is no device `{name}`; there are {}", catalog::NAMES.join(", ")),
    };
    let read = catalog::visit(name, &mut DeviceReader(keys)).ok_or_else(unknown)?;
    read.map_err(|source| CliError::Value { option: format!("device {name}"), source })
}

/// Consoles of an option that is given several times.
fn consoles<T: DeserializeOwned + JsonSchema>(
    matches: &ArgMatches,
    name: &str,
) -> Result<Option<Vec<T>>, CliError> {
    let Some(values) = matches.get_many::<String>(name) else { return Ok(None) };
    values.map(|value| console_value(name, value)).collect::<Result<_, _>>().map(Some)
}

/// Consoles: `file=` and `socket=` alone say the mode, too.
fn console<T: DeserializeOwned + JsonSchema>(
    matches: &ArgMatches,
    name: &str,
) -> Result<Option<T>, CliError> {
    text(matches, name).map(|value| console_value(name, value)).transpose()
}

/// One console's value.
fn console_value<T: DeserializeOwned + JsonSchema>(name: &str, value: &str) -> Result<T, CliError> {
    let wrong = |source| CliError::Value { option: name.to_owned(), source };
    let pairs = holdfast_keyval::pairs(value).map_err(wrong)?;
    let has_mode = pairs.iter().any(|(key, value)| value.is_none() || key == "mode");
    let implied = pairs.iter().find_map(|(key, _)| match key.as_str() {
        "file" | "socket" if !has_mode => Some(key.as_str()),
        _ => None,
    });
    match implied {
        Some(mode) => read_keys(name, &format!("mode={mode},{value}")),
        None => read_keys(name, value),
    }
}

fn endpoint(matches: &ArgMatches, name: &str, bare: bool) -> Result<Option<Endpoint>, CliError> {
    let Some(value) = text(matches, name) else { return Ok(None) };
    let wrong = |reason: &str| CliError::Text {
        option: name.to_owned(),
        value: value.to_owned(),
        reason: reason.to_owned(),
    };
    if let Some(path) = value.strip_prefix("path=").filter(|path| !path.is_empty()) {
        return Ok(Some(Endpoint::Path(path.into())));
    }
    if let Some(fd) = value.strip_prefix("fd=") {
        let fd: RawFd =
            fd.parse().map_err(|_| wrong("fd= takes the number of an inherited file descriptor"))?;
        return if fd > 2 { Ok(Some(Endpoint::Fd(fd))) } else { Err(wrong("fd= takes a number above 2")) };
    }
    if bare && !value.is_empty() && !value.contains('=') {
        return Ok(Some(Endpoint::Path(value.into())));
    }
    Err(wrong("must be path=PATH or fd=N"))
}

pub(super) fn seccomp(matches: &ArgMatches) -> Result<SeccompMode, CliError> {
    match text(matches, "seccomp") {
        None | Some("true") => Ok(SeccompMode::Kill),
        Some("false") => Ok(SeccompMode::Off),
        Some("log") => Ok(SeccompMode::Log),
        Some("errno") => Ok(SeccompMode::Errno),
        Some(other) => Err(CliError::Text {
            option: "seccomp".to_owned(),
            value: other.to_owned(),
            reason: "must be true, false, log or errno".to_owned(),
        }),
    }
}
