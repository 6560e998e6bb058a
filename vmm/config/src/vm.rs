//! The root of the tree.

use std::path::PathBuf;

use holdfast_arch::Arch;
use holdfast_block::options::BlockdevOptions;
use holdfast_devices::catalog::DeviceConfig;
use holdfast_devices::catalog::isa_debug_exit::IsaDebugExitConfig;
use holdfast_virtio::balloon::config::BalloonConfig;
use holdfast_virtio::blk::config::DiskConfig;
use holdfast_virtio::console::config::{ConsoleConfig, ConsoleMode};
use holdfast_virtio::net::config::NetConfig;
use holdfast_virtio::rng::config::RngConfig;
use holdfast_virtio::vhost_user::fs::config::FsConfig;
use holdfast_virtio::vhost_user::generic::config::GenericVhostUserConfig;
use holdfast_virtio::vsock::config::VsockConfig;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{
    AccelChoice, ConfigError, ConsolePortConfig, CpusConfig, DebugConsoleConfig, LandlockConfig,
    MachineConfig, MemoryConfig, PflashConfig, PlatformConfig, Problems, SerialConfig, TcgLogConfig,
};

/// What the guest boots from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct PayloadConfig {
    /// Firmware image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    /// Kernel image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
}

impl PayloadConfig {
    /// Whether there is something to boot.
    pub fn is_bootable(&self) -> bool {
        self.kernel.is_some() || self.firmware.is_some()
    }
}

/// Virtual machine configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmConfig {
    /// vCPUs.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// RAM.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What the guest boots from; looked at when the VM boots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<PayloadConfig>,
    /// Block devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskConfig>>,
    /// Nodes of the storage graph, which disks show by their names. Options and defaults are QEMU's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blockdevs: Option<Vec<BlockdevOptions>>,
    /// Network devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<NetConfig>>,
    /// Directories shared by vhost-user back ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs: Option<Vec<FsConfig>>,
    /// Devices of any type by vhost-user back ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generic_vhost_user: Option<Vec<GenericVhostUserConfig>>,
    /// Sockets between the guest and the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Entropy device; always there.
    #[serde(default)]
    pub rng: RngConfig,
    /// Memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// First serial port.
    #[serde(default)]
    pub serial: SerialConfig,
    /// virtio console.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// Further ports of the virtio console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console_ports: Option<Vec<ConsolePortConfig>>,
    /// x86 debug console.
    #[serde(default)]
    pub debug_console: DebugConsoleConfig,
    /// What identifies the platform to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
    /// Let Holdfast open only the paths that this configuration names.
    #[serde(default)]
    pub landlock_enable: bool,
    /// More paths that it may open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub landlock_rules: Option<Vec<LandlockConfig>>,
    /// Name of the VM, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The guest's architecture; the host's by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "arch_schema")]
    pub arch: Option<Arch>,
    /// The machine.
    #[serde(default)]
    pub machine: MachineConfig,
    /// Devices of the board that are added by name, with QEMU's names and keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub board_devices: Option<Vec<DeviceConfig>>,
    /// Contents of the flash banks, first bank first; there are two. On q35 the first ends at 4 GiB and the second
    /// ends where the first begins, as OVMF's code and variables do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pflash: Option<Vec<PflashConfig>>,
    /// Accelerators to try, in order.
    #[serde(default)]
    pub accel: AccelChoice,
    /// List translated code for `perf` in `/tmp/perf-PID.map`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub perf_map: bool,
    /// Log what is translated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcg_log: Option<TcgLogConfig>,
}

fn arch_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    let names: Vec<&str> = Arch::ALL.iter().map(|arch| arch.name()).collect();
    schemars::json_schema!({ "type": "string", "enum": names })
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            cpus: CpusConfig::default(),
            memory: MemoryConfig::default(),
            payload: None,
            disks: None,
            blockdevs: None,
            net: None,
            fs: None,
            generic_vhost_user: None,
            vsock: None,
            rng: RngConfig::default(),
            balloon: None,
            serial: SerialConfig::default(),
            console: ConsoleConfig::default(),
            console_ports: None,
            debug_console: DebugConsoleConfig::default(),
            platform: None,
            landlock_enable: false,
            landlock_rules: None,
            name: None,
            arch: None,
            machine: MachineConfig::default(),
            board_devices: None,
            pflash: None,
            accel: AccelChoice::Auto,
            perf_map: false,
            tcg_log: None,
        }
    }
}

impl VmConfig {
    /// Reads a `vm.create` body. Fields that nobody knows are ignored, as Cloud Hypervisor does;
    /// fields of its features that Holdfast does not have are refused unless they hold their default.
    ///
    /// # Errors
    /// [`ConfigError`]; it does not [validate](Self::validate).
    pub fn from_json(body: &[u8]) -> Result<Self, ConfigError> {
        let value: serde_json::Value = parse_json(body)?;
        let mut problems = Problems::default();
        crate::unsupported::check_vm(&value, &mut problems);
        problems.into_result()?;
        let mut config: Self = from_value(value)?;
        config.cpus.max_vcpus = config.cpus.max();
        Ok(config)
    }

    /// The guest's architecture, the default resolved.
    pub fn guest_arch(&self) -> Arch {
        self.arch.or(Arch::HOST).unwrap_or(Arch::X86_64)
    }

    /// The machine's name, the default resolved.
    pub fn machine_name(&self) -> &str {
        match (&self.machine.kind, self.guest_arch()) {
            (Some(name), _) => name,
            (None, Arch::X86_64) => "q35",
            (None, _) => "virt",
        }
    }

    /// The devices that are added by name, those of the machine's own options among them.
    pub fn board_devices(&self) -> Vec<DeviceConfig> {
        let exit = self.machine.debug_exit.map(|iobase| IsaDebugExitConfig { iobase, iosize: 4 }.into());
        exit.into_iter().chain(self.board_devices.iter().flatten().cloned()).collect()
    }

    /// What the flash banks hold.
    pub fn pflash(&self) -> &[PflashConfig] {
        self.pflash.as_deref().unwrap_or_default()
    }

    /// All disks.
    pub fn disks(&self) -> &[DiskConfig] {
        self.disks.as_deref().unwrap_or_default()
    }

    /// All nodes of the storage graph that are given by their options.
    pub fn blockdevs(&self) -> &[BlockdevOptions] {
        self.blockdevs.as_deref().unwrap_or_default()
    }

    /// All network devices.
    pub fn net(&self) -> &[NetConfig] {
        self.net.as_deref().unwrap_or_default()
    }

    /// All shared directories.
    pub fn fs(&self) -> &[FsConfig] {
        self.fs.as_deref().unwrap_or_default()
    }

    /// All devices of back ends that are known by their type only.
    pub fn generic_vhost_user(&self) -> &[GenericVhostUserConfig] {
        self.generic_vhost_user.as_deref().unwrap_or_default()
    }

    /// Whether there is a virtio console.
    pub fn has_console(&self) -> bool {
        self.console.mode != ConsoleMode::Off || !self.console_ports().is_empty()
    }

    /// The further ports of the virtio console.
    pub fn console_ports(&self) -> &[ConsolePortConfig] {
        self.console_ports.as_deref().unwrap_or_default()
    }

    /// The machine's UUID, if one is set and [valid](Self::validate).
    pub fn uuid(&self) -> Option<uuid::Uuid> {
        self.platform.as_ref()?.system_uuid.as_ref()?.parse().ok()
    }
}

/// Reads a JSON object into `T`; the error names the field.
///
/// # Errors
/// [`ConfigError::NotJson`], [`ConfigError::Syntax`], or [`ConfigError::Invalid`] for an array.
pub fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, ConfigError> {
    // serde would also read a struct from an array of its fields.
    if body.trim_ascii_start().starts_with(b"[") {
        let mut problems = Problems::default();
        problems.add(".", "is an array; it must be an object");
        return Err(ConfigError::Invalid(problems));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(syntax)?;
    deserializer.end().map_err(|source| ConfigError::NotJson { source })?;
    Ok(value)
}

fn from_value<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, ConfigError> {
    serde_path_to_error::deserialize(value).map_err(syntax)
}

fn syntax(error: serde_path_to_error::Error<serde_json::Error>) -> ConfigError {
    let field = error.path().to_string();
    let source = error.into_inner();
    if source.is_data() { ConfigError::Syntax { field, source } } else { ConfigError::NotJson { source } }
}
