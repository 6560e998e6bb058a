//! What operations answer. JSON shapes are Cloud Hypervisor's and QEMU's.

use std::collections::BTreeMap;

use holdfast_config::VmConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// State of a VM, in Cloud Hypervisor's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VmState {
    /// It has a configuration and is off.
    Created,
    /// vCPUs run.
    Running,
    /// It was switched off. Holdfast, like Cloud Hypervisor, says `Created` instead.
    Shutdown,
    /// vCPUs are stopped.
    Paused,
    /// A debugger has stopped it.
    BreakPoint,
}

/// A node of the device tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceNode {
    /// Identifier of the device.
    pub id: String,
    /// Address ranges and interrupts that it takes.
    pub resources: Vec<serde_json::Value>,
    /// Identifiers of the devices behind it.
    pub children: Vec<String>,
    /// Segment, bus, device and function.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_bdf: Option<String>,
}

/// Virtual Machine information.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmInfo {
    /// Its configuration, identifiers and pseudo-terminals filled in.
    pub config: VmConfig,
    /// Its state.
    pub state: VmState,
    /// Bytes of RAM less what the balloon holds.
    pub memory_actual_size: u64,
    /// All devices by identifier, once booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_tree: Option<BTreeMap<String, DeviceNode>>,
}

/// Counters: device identifier, counter name, value.
pub type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// Run state as QEMU names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// It has not been started.
    Prelaunch,
    /// vCPUs run.
    Running,
    /// Somebody paused it.
    Paused,
    /// A debugger has stopped it.
    Debug,
    /// The guest switched itself off.
    Shutdown,
    /// It is being restored.
    RestoreVm,
    /// It is being saved.
    SaveVm,
    /// A disk's request failed and waits.
    IoError,
    /// The guest panicked.
    GuestPanicked,
    /// The accelerator cannot go on.
    InternalError,
    /// It waits for, or takes over, a VM that comes from elsewhere.
    Inmigrate,
    /// It stands for the last part of its migration.
    FinishMigrate,
    /// It has moved elsewhere.
    Postmigrate,
}

/// Information about KVM support.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KvmInfo {
    /// The VM runs on KVM.
    pub enabled: bool,
    /// The host has KVM.
    pub present: bool,
}

/// Where a vCPU sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CpuInstanceProperties {
    /// Package.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_id: Option<u32>,
    /// Die in the package.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub die_id: Option<u32>,
    /// Core in the die.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub core_id: Option<u32>,
    /// Thread in the core.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread_id: Option<u32>,
}

/// A vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CpuInfoFast {
    /// Index.
    pub cpu_index: u32,
    /// Path in QEMU's object tree: `/machine/unattached/device[0]`.
    pub qom_path: String,
    /// Host thread identifier.
    pub thread_id: i32,
    /// Where it sits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub props: Option<CpuInstanceProperties>,
    /// Architecture: `x86_64`, `riscv64`.
    pub target: String,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MachineInfo {
    /// The name that `--machine` takes.
    pub name: String,
    /// Another name of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// It is what the guest's architecture gets by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_default: Option<bool>,
    /// The most vCPUs that it takes.
    pub cpu_max: u32,
    /// vCPUs can be added while it runs.
    pub hotpluggable_cpus: bool,
    /// It knows NUMA distances.
    pub numa_mem_supported: bool,
    /// It will go away.
    pub deprecated: bool,
    /// Its default CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_cpu_type: Option<String>,
    /// It can take ACPI tables.
    pub acpi: bool,
}

/// A character back end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ChardevInfo {
    /// Its name: `serial0`, `console0`.
    pub label: String,
    /// Where the bytes go: `pty:/dev/pts/3`, `stdio`.
    pub filename: String,
    /// A front end is connected.
    pub frontend_open: bool,
}

/// A base address register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PciMemoryRegion {
    /// Register number.
    pub bar: i64,
    /// `io` or `memory`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Where the guest has put it; -1 if nowhere.
    pub address: i64,
    /// Bytes.
    pub size: i64,
    /// Reads have no side effects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefetch: Option<bool>,
    /// It takes 64-bit addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_type_64: Option<bool>,
}

/// Class of a PCI device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PciDeviceClass {
    /// In words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desc: Option<String>,
    /// Class and subclass.
    pub class: i64,
}

/// Identity of a PCI device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PciDeviceId {
    /// Device.
    pub device: i64,
    /// Vendor.
    pub vendor: i64,
    /// Subsystem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<i64>,
    /// Subsystem vendor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem_vendor: Option<i64>,
}

/// A PCI device as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PciDevice {
    /// Bus.
    pub bus: i64,
    /// Device.
    pub slot: i64,
    /// Function.
    pub function: i64,
    /// Class.
    pub class_info: PciDeviceClass,
    /// Identity.
    pub id: PciDeviceId,
    /// Interrupt line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub irq: Option<i64>,
    /// Interrupt pin; 0 for none.
    pub irq_pin: i64,
    /// Identifier.
    pub qdev_id: String,
    /// Base address registers.
    pub regions: Vec<PciMemoryRegion>,
}

/// A PCI bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PciInfo {
    /// Number.
    pub bus: i64,
    /// Its devices.
    pub devices: Vec<PciDevice>,
}
