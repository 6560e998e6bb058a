//! What firmware reads through fw_cfg.

use holdfast_arch::x86_64::acpi::{self, loader};
use holdfast_arch::x86_64::smbios;
use holdfast_device::BuildError;
use holdfast_devices::fw_cfg::FwCfg;
use holdfast_devices::pci::PciBus;

use super::plan::Plan;
use crate::MachineRequest;

/// Items with fixed keys (the architecture's own have bit 15 set).
mod key {
    pub const UUID: u16 = 0x02;
    pub const RAM_SIZE: u16 = 0x03;
    pub const NO_GRAPHIC: u16 = 0x04;
    pub const NB_CPUS: u16 = 0x05;
    pub const BOOT_MENU: u16 = 0x0e;
    pub const MAX_CPUS: u16 = 0x0f;
    /// The timer's interrupt is on IOAPIC input 2.
    pub const IRQ0_OVERRIDE: u16 = 0x8002;
}

/// The order in which to boot from devices, as Open Firmware paths.
pub const BOOT_ORDER: &str = "bootorder";

/// Sleep states S0 to S5: bit 7 says that it exists, the rest is its `SLP_TYP`. Neither S3 nor S4 do.
const SYSTEM_STATES: [u8; 6] = [0x80, 0, 0, 0x01, 0x02, 0x80];

/// Fills the directory.
pub fn fill(fw: &FwCfg, plan: &Plan, request: &MachineRequest) -> Result<(), BuildError> {
    fw.add_item(key::UUID, request.uuid.unwrap_or_default().to_vec());
    fw.add_item(key::RAM_SIZE, request.ram_size.to_le_bytes().to_vec());
    fw.add_item(key::NO_GRAPHIC, 1u16.to_le_bytes().to_vec());
    fw.add_item(key::NB_CPUS, (request.boot_vcpus as u16).to_le_bytes().to_vec());
    // Firmware takes this for the number of APIC ids, which may have gaps.
    let ids = plan.topology.apic_id(request.boot_vcpus.saturating_sub(1)) + 1;
    fw.add_item(key::MAX_CPUS, (ids as u16).to_le_bytes().to_vec());
    // Without a menu firmware does not wait for a key either.
    fw.add_item(key::BOOT_MENU, 0u16.to_le_bytes().to_vec());
    fw.add_item(key::IRQ0_OVERRIDE, 1u32.to_le_bytes().to_vec());

    let tables = acpi::build(&plan.acpi());
    let smbios = smbios::build(&plan.smbios(request));
    let mut files = vec![
        ("etc/e820", e820(plan)),
        ("etc/system-states", SYSTEM_STATES.to_vec()),
        (loader::LOADER, tables.script()),
        (loader::RSDP, tables.rsdp),
        (loader::TABLES, tables.tables),
        (smbios::ANCHOR, smbios.anchor),
        (smbios::TABLES, smbios.tables),
        (BOOT_ORDER, Vec::new()),
    ];
    if request.serial.is_some() {
        // There is no display: firmware's console goes to the first serial port.
        files.push(("etc/sercon-port", 0x3f8u16.to_le_bytes().to_vec()));
    }
    for (name, data) in files {
        fw.add_file(name, data)
            .map_err(|e| BuildError::Config { id: "fw_cfg".into(), reason: e.to_string() })?;
    }
    Ok(())
}

/// Address, length, kind: RAM, then what is reserved besides firmware's own.
fn e820(plan: &Plan) -> Vec<u8> {
    let ram = plan.ram.iter().map(|r| (r.gpa, r.len, 1u32));
    let reserved = plan.reserved().into_iter().map(|(base, len)| (base, len, 2));
    let mut out = Vec::new();
    for (base, len, kind) in ram.chain(reserved) {
        out.extend(base.to_le_bytes());
        out.extend(len.to_le_bytes());
        out.extend(kind.to_le_bytes());
    }
    out
}

/// Disks first, then network cards, each in the order of their addresses.
pub fn boot_order(pci: &PciBus) -> Vec<u8> {
    let mut found: Vec<_> = pci
        .info()
        .into_iter()
        .filter_map(|f| {
            let rank = match f.class >> 8 {
                0x01 => 0,
                0x02 => 1,
                _ => return None,
            };
            Some((rank, f.bdf))
        })
        .collect();
    found.sort();
    let mut out = String::new();
    for (rank, bdf) in found {
        let unit = match bdf.function() {
            0 => format!("{:x}", bdf.device()),
            function => format!("{:x},{function:x}", bdf.device()),
        };
        let path = match rank {
            0 => format!("/pci@i0cf8/scsi@{unit}/disk@0,0\n"),
            _ => format!("/pci@i0cf8/ethernet@{unit}/ethernet-phy@0\n"),
        };
        out.push_str(&path);
    }
    if out.is_empty() {
        return Vec::new();
    }
    let mut out = out.into_bytes();
    // The file is a C string.
    out.push(0);
    out
}
