//! The one config tree.
//!
//! [`VmConfig`] is what a VM is made from, whoever asks: REST bodies, command-line options and QMP
//! arguments all become this. Names, defaults and JSON shapes are Cloud Hypervisor's where it has the
//! field. Schemas (for OpenAPI, `--help` and introspection) are derived from the same structs.
//!
//! Two schema extensions carry what only the command line needs: `x-cli` is the sub-key's short name
//! (`boot` for `boot_vcpus`) and `x-positional` marks the key that a bare first word sets.

mod console;
mod cpus;
mod error;
mod ids;
mod machine;
mod memory;
mod migration;
mod platform;
mod requests;
mod tcg_log;
mod unsupported;
mod validate;
mod vm;

pub use console::{ConsolePortConfig, DebugConsoleConfig, SerialConfig};
pub use cpus::{CpuAffinity, CpuTopology, CpusConfig};
pub use error::{ConfigError, Problem, Problems};
pub use holdfast_block::options::BlockdevOptions;
pub use holdfast_devices::catalog::{self, DeviceConfig};
pub use holdfast_virtio::balloon::config::BalloonConfig;
pub use holdfast_virtio::blk::back_end::BlkBackEndConfig;
pub use holdfast_virtio::blk::config::DiskConfig;
pub use holdfast_virtio::console::config::{ConsoleConfig, ConsoleMode};
pub use holdfast_virtio::net::back_end::NetBackEndConfig;
pub use holdfast_virtio::net::config::{MacAddr, NetConfig, VhostMode};
pub use holdfast_virtio::rng::config::RngConfig;
pub use holdfast_virtio::vhost_user::fs::config::FsConfig;
pub use holdfast_virtio::vhost_user::generic::config::GenericVhostUserConfig;
pub use holdfast_virtio::vsock::config::VsockConfig;
pub use ids::IdAllocator;
pub use machine::{
    AccelChoice, AccelKind, IrqChipMode, MachineConfig, PflashConfig, UnknownAccel, VirtioTransport,
};
pub use memory::MemoryConfig;
pub use migration::{
    MigrationMode, ReceiveMigrationData, RecoverMigrationData, SendMigrationData, TimeoutStrategy,
};
pub use platform::{LandlockAccess, LandlockConfig, PlatformConfig};
pub use requests::{
    MemoryRestoreMode, PciDeviceInfo, RestoreConfig, RestoredNet, VmRemoveDevice, VmResize, VmSnapshotConfig,
};
pub use tcg_log::TcgLogConfig;
pub use unsupported::{Cli, UNSUPPORTED_OPTIONS, unsupported_cli_key};
pub use validate::{
    check_id, validate_disk, validate_fs, validate_generic_vhost_user, validate_net, validate_vsock,
};
pub use vm::{PayloadConfig, VmConfig, parse_json};
