//! ACPI tables of a Q35 PC (ACPI 6.5), and the two ways in which they reach the guest: placed in RAM
//! for kernels that start directly, or as files with a linker script for firmware (see [`loader`]).

mod dsdt;
pub mod loader;
mod tables;

use loader::{LinkedTables, Pointer, TABLES};

/// What the tables describe. All addresses are guest-physical.
#[derive(Debug, Clone)]
pub struct AcpiConfig {
    /// APIC IDs of the vCPUs present at boot.
    pub apic_ids: Vec<u8>,
    /// I/O base of the ICH9 power management block.
    pub pm_base: u16,
    /// PCI configuration window: base and length; one bus for each MiB.
    pub ecam: (u64, u64),
    /// Memory for 32-bit BARs: base and length.
    pub mem32: (u64, u64),
    /// Memory for 64-bit BARs: base and length.
    pub mem64: (u64, u64),
    /// IOAPIC registers.
    pub ioapic: u32,
    /// HPET registers, if there is one.
    pub hpet: Option<u64>,
    /// Which PCI interrupt line (0: A to 7: H) pin 0 to 3 of a device on the root bus drives.
    pub pirq_of: fn(device: u8, pin: u8) -> usize,
    /// There is a fw_cfg device at port 0x510.
    pub fw_cfg: bool,
    /// There are hot-plug ports, which the guest may drive itself.
    pub hotplug: bool,
}

const OEM_ID: [u8; 6] = *b"HLDFST";
const OEM_TABLE: [u8; 8] = *b"HOLDFAST";
const OEM_REVISION: u32 = 1;

/// Value for the SMI command port that switches ACPI mode on.
pub const ACPI_ENABLE: u8 = 2;
/// Value for the SMI command port that switches ACPI mode off.
pub const ACPI_DISABLE: u8 = 3;
/// `SLP_TYP` of soft off. Firmware relies on 0.
pub const SLEEP_TYPE_S5: u8 = 0;
/// CMOS register of the century.
pub const CMOS_CENTURY: u8 = 0x32;

/// Makes all tables, with pointers still relative to the table file.
pub fn build(config: &AcpiConfig) -> LinkedTables {
    let mut linked = LinkedTables::default();
    let facs = linked.add_raw(&tables::facs(), 64);
    let dsdt = linked.add(dsdt::dsdt(config).as_slice());
    let mut fadt = tables::fadt(config.pm_base);
    for (at, target) in [(36, facs), (40, dsdt)] {
        tables::put(&mut fadt, at, &target.to_le_bytes());
    }
    tables::put(&mut fadt, 140, &u64::from(dsdt).to_le_bytes());
    let fadt = linked.add(&fadt);
    for (at, size) in [(36, 4), (40, 4), (140, 8)] {
        linked.point(Pointer { file: TABLES, at: fadt + at, size });
    }
    let mut roots = vec![fadt, linked.add(&tables::madt(config)), linked.add(&tables::mcfg(config.ecam))];
    if let Some(hpet) = config.hpet {
        roots.push(linked.add(&tables::hpet(hpet)));
    }
    let rsdt = linked.add(&tables::root(*b"RSDT", 4, &roots));
    let xsdt = linked.add(&tables::root(*b"XSDT", 8, &roots));
    for (n, _) in roots.iter().enumerate() {
        let n = n as u32;
        linked.point(Pointer { file: TABLES, at: rsdt + 36 + 4 * n, size: 4 });
        linked.point(Pointer { file: TABLES, at: xsdt + 36 + 8 * n, size: 8 });
    }
    linked.set_rsdp(tables::rsdp(OEM_ID, rsdt, xsdt));
    linked
}

#[cfg(test)]
mod tests;
