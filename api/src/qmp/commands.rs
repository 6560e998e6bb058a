//! The commands, in one table.

use std::pin::Pin;

use holdfast_vmm::control::{
    self as ops, AnnounceParameters, ChardevInfo, ControlHandle, CpuInfoFast, ErrorKind, KvmInfo,
    MachineInfo, MigrationCapabilityStatus, MigrationInfo, MigrationParameters, Origin, PciInfo, RunState,
};
use holdfast_vmm::storage::jobs::mirror::MirrorOptions;
use holdfast_vmm::storage::jobs::{BlockJobInfo, JobInfo};
use holdfast_vmm::storage::shown::{BlockDeviceInfo, BlockExportInfo, BlockInfo, BlockStats};
use holdfast_vmm::storage::{BlockIoThrottle, ExportOptions, HistogramSet, ServerOptions};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::request::QmpError;
use super::{block, devices, hmp, jobs, migration, schema};
use crate::call;

/// No arguments, or nothing to return.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
pub(super) struct Empty {}

/// A version number of QEMU.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct VersionTriple {
    major: i64,
    minor: i64,
    micro: i64,
}

/// Version of the protocol's model, and of Holdfast.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct VersionInfo {
    qemu: VersionTriple,
    package: String,
}

/// Name of a command.
#[derive(Debug, Serialize, JsonSchema)]
struct CommandInfo {
    name: String,
}

/// Run state.
#[derive(Debug, Serialize, JsonSchema)]
struct StatusInfo {
    running: bool,
    status: RunState,
}

/// Name of the VM.
#[derive(Debug, Serialize, JsonSchema)]
struct NameInfo {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
}

/// UUID of the VM.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
struct UuidInfo {
    uuid: String,
}

/// Arguments of `qmp_capabilities`.
#[derive(Debug, Deserialize, JsonSchema)]
struct Capabilities {
    #[serde(default)]
    enable: Option<Vec<Capability>>,
}

/// What a client can enable.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Capability {
    /// Out-of-band execution.
    Oob,
}

/// Arguments of `human-monitor-command`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct HumanMonitor {
    command_line: String,
    #[serde(default)]
    cpu_index: Option<u32>,
}

type SchemaOf = fn(&mut SchemaGenerator) -> Schema;
type Running = Pin<Box<dyn Future<Output = Result<Value, QmpError>> + Send>>;

/// A command.
pub(super) struct Command {
    pub(super) name: &'static str,
    pub(super) arguments: SchemaOf,
    pub(super) returns: SchemaOf,
    run: fn(ControlHandle, Map<String, Value>) -> Running,
}

macro_rules! commands {
    ($($name:literal => $function:path: $arguments:ty => $returns:ty;)*) => {
        /// All commands.
        pub(super) static COMMANDS: &[Command] = &[$(
            Command {
                name: $name,
                arguments: |generator| generator.subschema_for::<$arguments>(),
                returns: |generator| generator.subschema_for::<$returns>(),
                run: |handle, arguments| Box::pin(async move {
                    let arguments: $arguments = read(arguments)?;
                    let returns: $returns = $function(handle, arguments).await?;
                    serde_json::to_value(returns).map_err(|error| QmpError::generic(error.to_string()))
                }),
            },
        )*];
    };
}

commands! {
    "qmp_capabilities" => capabilities: Capabilities => Empty;
    "query-version" => query_version: Empty => VersionInfo;
    "query-commands" => query_commands: Empty => Vec<CommandInfo>;
    "query-qmp-schema" => query_schema: Empty => Vec<schema::SchemaInfo>;
    "query-status" => query_status: Empty => StatusInfo;
    "query-name" => query_name: Empty => NameInfo;
    "query-uuid" => query_uuid: Empty => UuidInfo;
    "query-kvm" => query_kvm: Empty => KvmInfo;
    "query-cpus-fast" => query_cpus: Empty => Vec<CpuInfoFast>;
    "query-machines" => query_machines: Empty => Vec<MachineInfo>;
    "query-chardev" => query_chardev: Empty => Vec<ChardevInfo>;
    "query-block" => block::query_block: Empty => block::Shown<Vec<BlockInfo>>;
    "query-blockstats" => block::query_blockstats: block::Stats => block::Shown<Vec<BlockStats>>;
    "query-named-block-nodes" => block::named_nodes: block::Flat => block::Shown<Vec<BlockDeviceInfo>>;
    "blockdev-add" => block::blockdev_add: block::Options => Empty;
    "blockdev-del" => block::blockdev_del: block::NodeName => Empty;
    "blockdev-reopen" => block::blockdev_reopen: block::Reopen => Empty;
    "block_resize" => block::block_resize: block::Resize => Empty;
    "block_set_io_throttle" => block::set_throttle: BlockIoThrottle => Empty;
    "block-latency-histogram-set" => block::set_histogram: HistogramSet => Empty;
    "block-set-write-threshold" => block::set_threshold: block::Threshold => Empty;
    "object-add" => block::object_add: block::Object => Empty;
    "object-del" => block::object_del: block::Id => Empty;
    "qom-get" => block::qom_get: block::QomGet => block::Any;
    "qom-set" => block::qom_set: block::QomSet => Empty;
    "nbd-server-start" => block::nbd_start: ServerOptions => Empty;
    "nbd-server-stop" => block::nbd_stop: Empty => Empty;
    "nbd-server-add" => block::nbd_add: block::ServerAdd => Empty;
    "nbd-server-remove" => block::nbd_remove: block::ServerRemove => Empty;
    "block-export-add" => block::export_add: ExportOptions => Empty;
    "block-export-del" => block::export_del: block::ExportDel => Empty;
    "query-block-exports" => block::query_exports: Empty => block::Shown<Vec<BlockExportInfo>>;
    "blockdev-mirror" => jobs::mirror: MirrorOptions => Empty;
    "query-jobs" => jobs::query: Empty => block::Shown<Vec<JobInfo>>;
    "query-block-jobs" => jobs::query_block: Empty => block::Shown<Vec<BlockJobInfo>>;
    "job-cancel" => jobs::cancel: block::Id => Empty;
    "job-pause" => jobs::pause: block::Id => Empty;
    "job-resume" => jobs::resume: block::Id => Empty;
    "job-complete" => jobs::complete: block::Id => Empty;
    "job-finalize" => jobs::finalize: block::Id => Empty;
    "job-dismiss" => jobs::dismiss: block::Id => Empty;
    "block-job-cancel" => jobs::block_cancel: jobs::Cancel => Empty;
    "block-job-pause" => jobs::block_pause: jobs::Device => Empty;
    "block-job-resume" => jobs::block_resume: jobs::Device => Empty;
    "block-job-set-speed" => jobs::block_set_speed: jobs::SetSpeed => Empty;
    "block-job-complete" => jobs::block_complete: jobs::Device => Empty;
    "block-job-finalize" => jobs::block_finalize: block::Id => Empty;
    "block-job-dismiss" => jobs::block_dismiss: block::Id => Empty;
    "device_add" => devices::add: devices::DeviceAdd => Empty;
    "device_del" => devices::del: block::Id => Empty;
    "chardev-add" => devices::chardev_add: devices::ChardevAdd => devices::ChardevReturn;
    "chardev-remove" => devices::chardev_remove: block::Id => Empty;
    "netdev_add" => devices::netdev_add: devices::NetdevAdd => Empty;
    "netdev_del" => devices::netdev_del: block::Id => Empty;
    "query-pci" => query_pci: Empty => Vec<PciInfo>;
    "stop" => stop: Empty => Empty;
    "cont" => cont: Empty => Empty;
    "system_reset" => system_reset: Empty => Empty;
    "system_powerdown" => system_powerdown: Empty => Empty;
    "inject-nmi" => inject_nmi: Empty => Empty;
    "quit" => quit: Empty => Empty;
    "migrate" => migration::migrate: migration::Migrate => Empty;
    "migrate-incoming" => migration::incoming: migration::Incoming => Empty;
    "migrate_cancel" => migration::cancel: Empty => Empty;
    "migrate-pause" => migration::pause: Empty => Empty;
    "migrate-recover" => migration::recover: migration::Recover => Empty;
    "migrate-start-postcopy" => migration::start_postcopy: Empty => Empty;
    "migrate-continue" => migration::go_on: migration::Continue => Empty;
    "query-migrate" => migration::query: Empty => MigrationInfo;
    "migrate-set-parameters" => migration::set_parameters: MigrationParameters => Empty;
    "query-migrate-parameters" => migration::query_parameters: Empty => MigrationParameters;
    "migrate-set-capabilities" => migration::set_capabilities: migration::SetCapabilities => Empty;
    "query-migrate-capabilities" => migration::query_capabilities: Empty => Vec<MigrationCapabilityStatus>;
    "announce-self" => migration::announce: AnnounceParameters => Empty;
    "human-monitor-command" => human_monitor: HumanMonitor => String;
}

/// Runs `command`.
pub(super) async fn run(
    handle: ControlHandle,
    command: &str,
    arguments: Map<String, Value>,
) -> Result<Value, QmpError> {
    let found = COMMANDS.iter().find(|other| other.name == command);
    let missing = || QmpError::not_found(format!("The command {command} has not been found"));
    let found = found.ok_or_else(missing)?;
    (found.run)(handle, arguments).await
}

/// Why `command` is not run out of band.
pub(super) fn refuse_out_of_band(command: &str) -> QmpError {
    if COMMANDS.iter().any(|other| other.name == command) {
        return QmpError::generic(format!("The command {command} does not support OOB"));
    }
    QmpError::not_found(format!("The command {command} has not been found"))
}

/// Reads arguments with QEMU's words for what is wrong.
fn read<T: DeserializeOwned + JsonSchema>(arguments: Map<String, Value>) -> Result<T, QmpError> {
    let known = holdfast_keyval::keys::<T>();
    // Of an object whose keys depend on its type none are known here.
    let unknown = |name: &&String| !known.is_empty() && !known.iter().any(|key| key.json_name == **name);
    let empty = T::schema_name() == "Empty";
    let first = arguments.keys().find(|name| unknown(name) || (empty && known.is_empty()));
    if let Some(name) = first {
        return Err(QmpError::generic(format!("Parameter '{name}' is unexpected")));
    }
    let missing = known.iter().find(|key| key.required && !arguments.contains_key(&key.json_name));
    if let Some(key) = missing {
        return Err(QmpError::generic(format!("Parameter '{}' is missing", key.json_name)));
    }
    serde_path_to_error::deserialize(Value::Object(arguments)).map_err(|error| {
        let name = error.path().to_string();
        QmpError::generic(format!("Invalid parameter type for '{name}': {}", error.into_inner()))
    })
}

/// The version that is announced: the model of the protocol is QEMU 10.0's.
pub(super) fn version() -> impl Serialize {
    version_info()
}

fn version_info() -> VersionInfo {
    VersionInfo {
        qemu: VersionTriple { major: 10, minor: 0, micro: 0 },
        package: concat!("Holdfast ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}

pub(super) type Reply<T> = Result<T, QmpError>;

// Negotiation is done before commands run; the entry is for `query-commands` and the schema.
async fn capabilities(_: ControlHandle, arguments: Capabilities) -> Reply<Empty> {
    drop(arguments.enable);
    Ok(Empty {})
}

async fn query_version(_: ControlHandle, _: Empty) -> Reply<VersionInfo> {
    Ok(version_info())
}

async fn query_commands(_: ControlHandle, _: Empty) -> Reply<Vec<CommandInfo>> {
    Ok(COMMANDS.iter().map(|command| CommandInfo { name: command.name.to_owned() }).collect())
}

async fn query_schema(_: ControlHandle, _: Empty) -> Reply<Vec<schema::SchemaInfo>> {
    Ok(schema::document())
}

async fn state(handle: &ControlHandle) -> Reply<RunState> {
    Ok(call(handle, ops::QueryStatus).await?)
}

async fn query_status(handle: ControlHandle, _: Empty) -> Reply<StatusInfo> {
    let status = state(&handle).await?;
    Ok(StatusInfo { running: status == RunState::Running, status })
}

async fn config(handle: &ControlHandle) -> Reply<Option<holdfast_config::VmConfig>> {
    match call(handle, ops::Info).await {
        Ok(info) => Ok(Some(info.config)),
        Err(error) if error.kind() == ErrorKind::NotCreated => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn query_name(handle: ControlHandle, _: Empty) -> Reply<NameInfo> {
    Ok(NameInfo { name: config(&handle).await?.and_then(|config| config.name) })
}

async fn query_uuid(handle: ControlHandle, _: Empty) -> Reply<UuidInfo> {
    let uuid = config(&handle).await?.and_then(|config| config.uuid());
    Ok(UuidInfo { uuid: uuid.unwrap_or_default().to_string() })
}

async fn query_kvm(handle: ControlHandle, _: Empty) -> Reply<KvmInfo> {
    Ok(call(&handle, ops::QueryKvm).await?)
}

async fn query_cpus(handle: ControlHandle, _: Empty) -> Reply<Vec<CpuInfoFast>> {
    Ok(call(&handle, ops::QueryCpus).await?)
}

async fn query_machines(handle: ControlHandle, _: Empty) -> Reply<Vec<MachineInfo>> {
    Ok(call(&handle, ops::QueryMachines).await?)
}

async fn query_chardev(handle: ControlHandle, _: Empty) -> Reply<Vec<ChardevInfo>> {
    Ok(call(&handle, ops::QueryChardev).await?)
}

async fn query_pci(handle: ControlHandle, _: Empty) -> Reply<Vec<PciInfo>> {
    Ok(call(&handle, ops::QueryPci).await?)
}

async fn stop(handle: ControlHandle, _: Empty) -> Reply<Empty> {
    // QEMU's `stop` of a VM that does not run is no error.
    if state(&handle).await? == RunState::Running {
        call(&handle, ops::Pause).await?;
    }
    Ok(Empty {})
}

async fn cont(handle: ControlHandle, _: Empty) -> Reply<Empty> {
    match state(&handle).await? {
        RunState::Running => {}
        // As after `qemu -S`: a VM that was created starts.
        RunState::Prelaunch => call(&handle, ops::Boot).await?,
        _ => call(&handle, ops::Resume).await?,
    }
    Ok(Empty {})
}

async fn system_reset(handle: ControlHandle, _: Empty) -> Reply<Empty> {
    call(&handle, ops::Reboot).await?;
    Ok(Empty {})
}

async fn system_powerdown(handle: ControlHandle, _: Empty) -> Reply<Empty> {
    call(&handle, ops::PowerButton).await?;
    Ok(Empty {})
}

async fn inject_nmi(handle: ControlHandle, _: Empty) -> Reply<Empty> {
    call(&handle, ops::Nmi).await?;
    Ok(Empty {})
}

async fn quit(handle: ControlHandle, _: Empty) -> Reply<Empty> {
    call(&handle, ops::VmmShutdown(Origin::HostQuit)).await?;
    Ok(Empty {})
}

async fn human_monitor(handle: ControlHandle, arguments: HumanMonitor) -> Reply<String> {
    Ok(hmp::run(&handle, &arguments.command_line, arguments.cpu_index).await)
}
