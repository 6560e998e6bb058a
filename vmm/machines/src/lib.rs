//! Machines: what is where, who interrupts whom, and how the guest is started.
//!
//! A [`MachineModule`] first lays out RAM (a pure function of the request), then, once RAM and the
//! accelerator's VM exist, builds its platform devices. The resulting [`Machine`] takes virtio
//! devices on its PCI bus or its virtio-mmio slots, loads firmware and kernel at every power-on,
//! and says how each vCPU starts.

mod flash;
pub mod q35;
pub mod virt;

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;

use holdfast_accel::{IrqChip, Vm};
use holdfast_arch::{Arch, CpuModel, CpuState};
use holdfast_device::{BuildContext, BuildError, Device};
use holdfast_devices::catalog::DeviceConfig;
use holdfast_devices::pci::{PciBus, RootPort};

/// What the guest boots from. Paths are opened by [`Machine::load`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Payload {
    /// Kernel image.
    pub kernel: Option<PathBuf>,
    /// Firmware image.
    pub firmware: Option<PathBuf>,
    /// Initial RAM disk.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Contents of the flash banks, by bank.
    pub flash: Vec<FlashImage>,
}

/// What a flash bank holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FlashImage {
    /// The file, of exactly the bank's size.
    pub path: PathBuf,
    /// The guest cannot write it.
    pub readonly: bool,
}

/// CPU topology: the product is the number of vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Threads in a core.
    pub threads: u32,
    /// Cores in a die.
    pub cores: u32,
    /// Dies in a package.
    pub dies: u32,
    /// Packages.
    pub packages: u32,
}

/// What a machine is to be.
#[derive(Debug, Clone)]
pub struct MachineRequest {
    /// vCPUs present at boot.
    pub boot_vcpus: u32,
    /// vCPUs that may ever be present.
    pub max_vcpus: u32,
    /// Their arrangement, if the user gave one.
    pub topology: Option<Topology>,
    /// Bytes of RAM.
    pub ram_size: u64,
    /// What it boots from.
    pub payload: Payload,
    /// The CPU shown to the guest.
    pub cpu: CpuModel,
    /// Where the x86 interrupt controllers live.
    pub irqchip: IrqChip,
    /// Machine UUID for SMBIOS.
    pub uuid: Option<[u8; 16]>,
    /// Where the x86 debug console listens, if anywhere.
    pub debug_console_port: Option<u16>,
    /// Hot-plug ports on the PCI bus.
    pub hotplug_ports: u8,
    /// Devices that are added by name.
    pub board: Vec<DeviceConfig>,
    /// Connected to the first serial port; `None`: the port exists and its output is dropped.
    pub serial: Option<Arc<dyn holdfast_devices::chardev::CharBackend>>,
    /// Connected to the debug console, likewise.
    pub debug_console: Option<Arc<dyn holdfast_devices::chardev::CharBackend>>,
}

impl MachineRequest {
    /// The least that can be asked for: one vCPU, `ram_size` bytes of RAM, and nothing to boot.
    pub fn new(cpu: CpuModel, ram_size: u64) -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
            topology: None,
            ram_size,
            payload: Payload::default(),
            cpu,
            irqchip: IrqChip::default(),
            uuid: None,
            debug_console_port: None,
            hotplug_ports: 0,
            board: Vec::new(),
            serial: None,
            debug_console: None,
        }
    }
}

/// A run of guest-physical RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// First address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A machine that cannot be planned, built or loaded.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The request cannot be met.
    #[error("machine `{machine}`: {reason}")]
    Request {
        /// The machine.
        machine: &'static str,
        /// What cannot be and what would be right.
        reason: String,
    },
    /// A device could not be built.
    #[error("machine `{machine}` cannot be built")]
    Build {
        /// The machine.
        machine: &'static str,
        /// Which device, and why.
        #[source]
        source: BuildError,
    },
    /// The firmware, kernel or initramfs cannot be loaded.
    #[error("cannot load {what} `{path}`: {reason}")]
    Load {
        /// `kernel`, `firmware` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// What a machine is built in.
#[derive(Debug, Clone)]
pub struct MachineContext {
    /// Buses, clocks, RAM and the rest that devices see.
    pub build: BuildContext,
    /// The accelerator's VM.
    pub vm: Arc<dyn Vm>,
}

/// Where a virtio device can be plugged.
#[derive(Debug, Clone)]
pub enum VirtioSlot {
    /// A PCI root bus; the transport takes a free device number.
    Pci(Arc<holdfast_devices::pci::PciBus>),
    /// The place behind a hot-plug port of that bus.
    Port(Arc<holdfast_devices::pci::PciBus>, Arc<RootPort>),
    /// A virtio-mmio window and its interrupt.
    Mmio {
        /// First address.
        base: u64,
        /// Its wire.
        irq: holdfast_device::IrqLine,
    },
}

/// A kind of machine.
pub trait MachineModule: Send + Sync + Debug {
    /// The name that `--machine` takes.
    fn name(&self) -> &'static str;
    /// One line for `--machine help` and `query-machines`.
    fn description(&self) -> &'static str;
    /// Its guests' architecture.
    fn arch(&self) -> Arch;
    /// The most vCPUs that it can have.
    fn max_vcpus(&self) -> u32;
    /// The CPU it shows when the user names none.
    fn default_cpu(&self) -> CpuModel;

    /// Lays out RAM.
    ///
    /// # Errors
    /// [`MachineError::Request`] naming what does not fit.
    fn ram_layout(&self, request: &MachineRequest) -> Result<Vec<RamRange>, MachineError>;

    /// Guest-physical base of four pages that an x86 accelerator may use for itself.
    fn x86_tss_base(&self) -> Option<u64> {
        None
    }

    /// Builds the platform devices and wires them.
    ///
    /// # Errors
    /// [`MachineError`].
    fn build(
        &self,
        request: MachineRequest,
        context: MachineContext,
    ) -> Result<Box<dyn Machine>, MachineError>;
}

/// A machine with its platform devices, before or while it runs.
pub trait Machine: Send + Sync + Debug {
    /// The platform devices, in the order in which they are saved.
    fn devices(&self) -> Vec<Arc<dyn Device>>;

    /// The PCI root bus for virtio-pci, if there is one.
    fn pci_bus(&self) -> Option<Arc<holdfast_devices::pci::PciBus>>;

    /// Its hot-plug ports.
    fn ports(&self) -> Vec<Arc<RootPort>> {
        Vec::new()
    }

    /// The next free virtio-mmio slot, if there is one.
    fn take_mmio_slot(&self) -> Option<VirtioSlot>;

    /// Writes firmware, kernel, device tree and tables to RAM and ROM: at power-on and after every
    /// reset, once all devices are plugged in.
    ///
    /// # Errors
    /// [`MachineError::Load`].
    fn load(&self) -> Result<(), MachineError>;

    /// The state in which vCPU `index` starts after [`Machine::load`], given its reset state.
    fn start_state(&self, index: u32, reset: CpuState) -> CpuState;

    /// Presses the power button. False if the machine has none: then it gets a virtio device for one.
    fn power_button(&self) -> bool;

    /// Whether [`Machine::power_button`] does something.
    fn has_power_button(&self) -> bool;
}

/// The most hot-plug ports.
pub const MAX_PORTS: u8 = 8;
/// The device number of the first hot-plug port on the root bus; the others follow.
const FIRST_PORT: u8 = 0x10;

/// Makes `count` hot-plug ports `hp0`, `hp1`, ...
fn hotplug_ports(
    count: u8,
    bus: &Arc<PciBus>,
    build: &BuildContext,
) -> Result<Vec<Arc<RootPort>>, BuildError> {
    let port = |n: u8| RootPort::build(&format!("hp{n}"), (bus, FIRST_PORT + n, n + 1), build);
    (0..count.min(MAX_PORTS)).map(port).collect()
}

/// All machines.
pub fn registry() -> &'static [&'static dyn MachineModule] {
    &[&q35::Q35Module, &virt::VirtModule]
}
