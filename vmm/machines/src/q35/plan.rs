//! What is where in a q35: pure functions of the request.

use holdfast_accel::IrqChip;
use holdfast_arch::x86_64::CpuTopology;
use holdfast_arch::x86_64::acpi::AcpiConfig;
use holdfast_arch::x86_64::boot::{self, MapEntry};
use holdfast_arch::x86_64::smbios::SmbiosConfig;
use holdfast_arch::{Arch, CpuModel};
use holdfast_devices::pci::Windows;
use holdfast_devices::x86::{ECAM_WINDOW, HPET_BASE, IOAPIC_BASE, PM_BASE, pirq_of};

use crate::{MachineError, MachineRequest, RamRange};

/// The machine's name.
pub const NAME: &str = "q35";
/// Most vCPUs: 8-bit APIC ids, of which 255 addresses all.
pub const MAX_VCPUS: u32 = 255;

/// RAM ends here below 4 GiB at the latest: the PCI configuration window follows.
const LOW_RAM_MAX: u64 = ECAM_WINDOW.0;
/// When there is more RAM than fits below, only this much stays there, so that both parts are
/// aligned for huge pages.
const LOW_RAM_SPLIT: u64 = 0x8000_0000;
const HIGH_RAM: u64 = 1 << 32;
/// Least RAM: firmware and boot parameters need the first megabytes.
const LEAST_RAM: u64 = 4 << 20;

/// Memory for 32-bit BARs: from behind the configuration window to the IOAPIC.
const MEM32: (u64, u64) = (ECAM_WINDOW.0 + ECAM_WINDOW.1, IOAPIC_BASE - ECAM_WINDOW.0 - ECAM_WINDOW.1);
/// Length of the window for 64-bit BARs; it begins behind RAM at a multiple of [`MEM64_ALIGN`].
const MEM64_LEN: u64 = 32 << 30;
const MEM64_ALIGN: u64 = 8 << 30;
/// Ports for BARs: above the ISA devices' and the power management block.
const IO: (u64, u64) = (0x1000, 0xf000);

/// Four pages that KVM needs for itself on processors that cannot run real mode.
pub const TSS: (u64, u64) = (0xfeff_c000, 0x4000);

/// The layout of one machine.
#[derive(Debug, Clone)]
pub struct Plan {
    /// RAM from address 0 on, and from 4 GiB on if there is so much.
    pub ram: Vec<RamRange>,
    /// vCPUs present at boot.
    pub boot_vcpus: u32,
    /// How they are arranged, for APIC ids.
    pub topology: CpuTopology,
    /// There is an HPET. Not when the interval timer is in the kernel: it could not be silenced then.
    pub hpet: bool,
    /// Hot-plug ports.
    pub ports: u8,
}

fn refuse(reason: String) -> MachineError {
    MachineError::Request { machine: NAME, reason }
}

impl Plan {
    /// Plans the machine.
    ///
    /// # Errors
    /// [`MachineError::Request`] naming what cannot be.
    pub fn new(request: &MachineRequest) -> Result<Self, MachineError> {
        let size = request.ram_size;
        if size < LEAST_RAM || !size.is_multiple_of(4096) {
            return Err(refuse(format!("{size} bytes of RAM; a multiple of 4 KiB from 4 MiB on would do")));
        }
        if request.boot_vcpus == 0 || request.max_vcpus > MAX_VCPUS {
            return Err(refuse(format!("{} vCPUs; 1 to {MAX_VCPUS} would do", request.max_vcpus)));
        }
        if request.max_vcpus > request.boot_vcpus {
            let (max, boot) = (request.max_vcpus, request.boot_vcpus);
            return Err(refuse(format!(
                "max={max} vCPUs with boot={boot}: vCPUs cannot be added later; use max={boot}"
            )));
        }
        let CpuModel::X86_64(model) = &request.cpu else {
            return Err(refuse(format!("a CPU that is not {}", Arch::X86_64)));
        };
        let topology = model.topology.unwrap_or_else(|| CpuTopology::flat(request.boot_vcpus));
        if topology.apic_id(request.boot_vcpus - 1) >= MAX_VCPUS {
            return Err(refuse(
                "a topology whose APIC ids reach 255; fewer packages, dies or cores would do".into(),
            ));
        }
        let low = if size > LOW_RAM_MAX { LOW_RAM_SPLIT } else { size };
        let mut ram = vec![RamRange { gpa: 0, len: low }];
        if size > low {
            ram.push(RamRange { gpa: HIGH_RAM, len: size - low });
        }
        Ok(Self {
            ram,
            boot_vcpus: request.boot_vcpus,
            topology,
            hpet: request.irqchip != IrqChip::On,
            ports: request.hotplug_ports,
        })
    }

    /// Bytes of RAM below and above 4 GiB.
    pub fn ram_split(&self) -> (u64, u64) {
        let len = |n: usize| self.ram.get(n).map_or(0, |r| r.len);
        (len(0), len(1))
    }

    fn ram_pairs(&self) -> Vec<(u64, u64)> {
        self.ram.iter().map(|r| (r.gpa, r.len)).collect()
    }

    fn mem64(&self) -> (u64, u64) {
        let end = HIGH_RAM + self.ram_split().1;
        (end.next_multiple_of(MEM64_ALIGN), MEM64_LEN)
    }

    /// Where PCI BARs go when there is no firmware to place them.
    pub fn windows(&self) -> Windows {
        Windows { io: IO, mem32: MEM32, mem64: self.mem64() }
    }

    /// Reserved ranges that firmware does not find out about by itself.
    pub fn reserved(&self) -> [(u64, u64); 1] {
        [TSS]
    }

    /// The memory map for a kernel that starts without firmware.
    pub fn memory_map(&self) -> Vec<MapEntry> {
        boot::memory_map(&self.ram_pairs(), &[ECAM_WINDOW, TSS])
    }

    /// What the ACPI tables describe.
    pub fn acpi(&self) -> AcpiConfig {
        AcpiConfig {
            apic_ids: (0..self.boot_vcpus).map(|n| self.topology.apic_id(n) as u8).collect(),
            pm_base: PM_BASE,
            ecam: ECAM_WINDOW,
            mem32: MEM32,
            mem64: self.mem64(),
            ioapic: IOAPIC_BASE as u32,
            hpet: self.hpet.then_some(HPET_BASE),
            pirq_of,
            fw_cfg: true,
            hotplug: self.ports != 0,
        }
    }

    /// What the SMBIOS tables describe.
    pub fn smbios(&self, request: &MachineRequest) -> SmbiosConfig {
        let per_package = self.topology.per_package();
        let leaf1 = match &request.cpu {
            CpuModel::X86_64(model) => model.entries.iter().find(|e| e.function == 1).map(|e| e.regs),
            CpuModel::Riscv64(_) => None,
        };
        let [eax, _, _, edx] = leaf1.unwrap_or_default();
        SmbiosConfig {
            uuid: request.uuid,
            product: NAME,
            sockets: self.boot_vcpus.div_ceil(per_package.max(1)),
            cores: self.topology.cores.max(1) * self.topology.dies.max(1),
            threads: per_package,
            processor_id: [eax, edx],
            ram: self.ram_pairs(),
        }
    }
}
