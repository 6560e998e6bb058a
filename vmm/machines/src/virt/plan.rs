//! What is where on `virt`: a pure description from which devices, wiring and device tree all follow. The
//! memory map is that of QEMU's machine of the same name, so firmware built for it works here.

use holdfast_arch::CpuModel;
use holdfast_arch::riscv64::IsaModel;

use crate::{MachineError, MachineRequest, RamRange};

/// The machine's name.
pub const NAME: &str = "virt";
/// The most harts.
pub const MAX_HARTS: u32 = 64;

/// A window in guest-physical address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
}

const fn window(base: u64, len: u64) -> Window {
    Window { base, len }
}

/// Reset ROM.
pub const ROM: Window = window(0x1000, 0xf000);
/// Test finisher: power-off and reboot.
pub const SYSCON: Window = window(0x10_0000, 0x1000);
/// Goldfish real-time clock.
pub const RTC: Window = window(0x10_1000, 0x1000);
/// ACLINT in CLINT layout.
pub const ACLINT: Window = window(0x200_0000, 0x1_0000);
/// PCI's port space.
pub const PCI_IO: Window = window(0x300_0000, 0x1_0000);
/// PLIC.
pub const PLIC: Window = window(0xc00_0000, 0x60_0000);
/// 16550.
pub const UART: Window = window(0x1000_0000, 0x100);
/// First virtio-mmio slot; the others follow.
pub const VIRTIO: Window = window(0x1000_1000, 0x1000);
/// fw_cfg.
pub const FW_CFG: Window = window(0x1010_0000, 0x18);
/// Both flash banks, half each.
pub const FLASH: Window = window(0x2000_0000, 0x400_0000);
/// PCI Express configuration space.
pub const PCI_ECAM: Window = window(0x3000_0000, 0x1000_0000);
/// PCI memory below 4 GiB.
pub const PCI_MMIO: Window = window(0x4000_0000, 0x4000_0000);
/// RAM.
pub const RAM_BASE: u64 = 0x8000_0000;

/// Number of virtio-mmio slots.
pub const VIRTIO_SLOTS: u32 = 8;
/// PLIC source of the first virtio-mmio slot.
pub const VIRTIO_IRQ: u32 = 1;
/// PLIC source of the 16550.
pub const UART_IRQ: u32 = 10;
/// PLIC source of the real-time clock.
pub const RTC_IRQ: u32 = 11;
/// PLIC source of the first of PCI's four wires.
pub const PCI_IRQ: u32 = 32;
/// Number of PCI wires.
pub const PCI_WIRES: u32 = 4;
/// The highest PLIC source.
pub const PLIC_SOURCES: u32 = 96;

/// Size of the PCI window above RAM, and its alignment.
const PCI_HIGH: u64 = 16 << 30;
/// RAM must leave room for PCI within 48-bit guest-physical addresses.
const MAX_RAM: u64 = 1 << 46;
/// Firmware, a kernel and a device tree need this much.
const MIN_RAM: u64 = 16 << 20;

/// The window of flash bank 0 or 1.
pub const fn flash_bank(index: u64) -> Window {
    window(FLASH.base + index * (FLASH.len / 2), FLASH.len / 2)
}

/// The wire (0 to 3) that pin 0 (INTA#) to 3 (INTD#) of a PCI device goes to.
pub fn pci_wire(device: u8, pin: u8) -> usize {
    (usize::from(device) + usize::from(pin)) % PCI_WIRES as usize
}

/// The machine, decided.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Number of harts; ids from 0.
    pub harts: u32,
    /// Harts in a core.
    pub threads: u32,
    /// Cores in a cluster.
    pub cores: u32,
    /// What each hart is.
    pub isa: IsaModel,
    /// The one run of RAM.
    pub ram: RamRange,
    /// PCI memory above RAM.
    pub pci_high: Window,
    /// virtio-mmio slots in use, from the first.
    pub virtio_slots: u32,
}

impl Plan {
    /// Decides, or says what cannot be.
    ///
    /// # Errors
    /// [`MachineError::Request`].
    pub fn new(request: &MachineRequest) -> Result<Self, MachineError> {
        let refuse = |reason: String| Err(MachineError::Request { machine: NAME, reason });
        let CpuModel::Riscv64(isa) = &request.cpu else {
            return refuse("the CPU model is not a RISC-V one".into());
        };
        let harts = request.boot_vcpus;
        if harts == 0 || harts > MAX_HARTS {
            return refuse(format!("{harts} vCPUs; 1 to {MAX_HARTS} are possible"));
        }
        if request.max_vcpus > harts {
            return refuse(format!(
                "at most {} vCPUs with {harts} at boot; vCPUs cannot be added later, so both must be equal",
                request.max_vcpus
            ));
        }
        let size = request.ram_size;
        if !(MIN_RAM..=MAX_RAM).contains(&size) || !size.is_multiple_of(4096) {
            return refuse(format!("{size} bytes of RAM; 16 MiB to 64 TiB in whole pages are possible"));
        }
        if request.debug_console.is_some() || request.debug_console_port.is_some() {
            return refuse("there is no debug console; use the serial port".into());
        }
        let (threads, cores) = match request.topology {
            None => (1, harts),
            Some(t) => {
                let product = [t.cores, t.dies, t.packages]
                    .iter()
                    .try_fold(t.threads, |product, &n| product.checked_mul(n));
                if product != Some(harts) {
                    return refuse(format!("the CPU topology does not multiply to {harts} vCPUs"));
                }
                (t.threads, t.cores)
            }
        };
        if isa.timebase_hz == 0 || u32::try_from(isa.timebase_hz).is_err() {
            return refuse(format!("a time base of {} Hz; 1 to 4294967295 are possible", isa.timebase_hz));
        }
        let ram = RamRange { gpa: RAM_BASE, len: size };
        let high = (ram.gpa + ram.len).next_multiple_of(PCI_HIGH);
        let pci_high = window(high, PCI_HIGH);
        Ok(Self { harts, threads, cores, isa: isa.clone(), ram, pci_high, virtio_slots: 0 })
    }

    /// The window and the PLIC source of virtio-mmio slot `index`.
    pub fn virtio_slot(index: u32) -> (Window, u32) {
        (window(VIRTIO.base + u64::from(index) * VIRTIO.len, VIRTIO.len), VIRTIO_IRQ + index)
    }
}
