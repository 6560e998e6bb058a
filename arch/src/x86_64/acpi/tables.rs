//! The tables other than the DSDT.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, facs::FACS};

use super::{ACPI_DISABLE, ACPI_ENABLE, AcpiConfig, CMOS_CENTURY, OEM_ID, OEM_REVISION, OEM_TABLE};

/// Bytes of a table header.
const HEADER: u32 = 36;

pub(super) fn bytes(item: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    item.to_aml_bytes(&mut out);
    out
}

/// Overwrites bytes of a table; what lies outside is dropped.
pub(super) fn put(table: &mut [u8], at: usize, value: &[u8]) {
    if let Some(slot) = table.get_mut(at..at + value.len()) {
        slot.copy_from_slice(value);
    }
}

pub(super) fn sdt(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(signature, HEADER, revision, OEM_ID, OEM_TABLE, OEM_REVISION);
    table.append_slice(body);
    table
}

pub(super) fn facs() -> Vec<u8> {
    bytes(&FACS::new())
}

fn port(address: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, address.into())
}

/// Fixed ACPI description table, pointers still zero (ACPI 6.5 section 5.2.9).
pub(super) fn fadt(pm_base: u16) -> Vec<u8> {
    let mut t = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    t.sci_int = 9.into();
    t.smi_cmd = 0xb2.into();
    (t.acpi_enable, t.acpi_disable) = (ACPI_ENABLE, ACPI_DISABLE);
    let at = |offset: u16| pm_base.saturating_add(offset);
    t.pm1a_evt_blk = u32::from(at(0)).into();
    t.pm1a_cnt_blk = u32::from(at(4)).into();
    t.pm_tmr_blk = u32::from(at(8)).into();
    t.gpe0_blk = u32::from(at(0x20)).into();
    (t.pm1_evt_len, t.pm1_cnt_len, t.pm_tmr_len, t.gpe0_blk_len) = (4, 2, 4, 16);
    t.x_pm1a_evt_blk = port(at(0), 32, AccessSize::WordAccess);
    t.x_pm1a_cnt_blk = port(at(4), 16, AccessSize::WordAccess);
    t.x_pm_tmr_blk = port(at(8), 32, AccessSize::DwordAccess);
    t.x_gpe0_blk = port(at(0x20), 128, AccessSize::ByteAccess);
    // Above these, C2 and C3 do not exist.
    (t.p_lvl2_lat, t.p_lvl3_lat) = (0xfff.into(), 0xfff.into());
    t.century = CMOS_CENTURY;
    // Legacy devices, an i8042, and no VGA.
    t.iapc_boot_arch = 0x7.into();
    t.reset_reg = port(0xcf9, 8, AccessSize::ByteAccess);
    t.reset_value = 0x0f;
    bytes(&t.finalize())
}

/// Multiple APIC description table (section 5.2.12).
pub(super) fn madt(config: &AcpiConfig) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(0xfee0_0000u32.to_le_bytes());
    // PCAT_COMPAT: there is a pair of 8259s.
    body.extend(1u32.to_le_bytes());
    for (uid, apic_id) in config.apic_ids.iter().enumerate() {
        body.extend([0, 8, uid as u8, *apic_id, 1, 0, 0, 0]);
    }
    body.extend([1, 12, 0, 0]);
    body.extend(config.ioapic.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    // The timer is on input 2; the SCI is level triggered and active high.
    for (irq, gsi, flags) in [(0u8, 2u32, 0u16), (9, 9, 0xd)] {
        body.extend([2, 10, 0, irq]);
        body.extend(gsi.to_le_bytes());
        body.extend(flags.to_le_bytes());
    }
    // NMI on LINT1 of every processor.
    body.extend([4, 6, 0xff, 0, 0, 1]);
    sdt(*b"APIC", 4, &body).as_slice().to_vec()
}

/// PCI Express memory-mapped configuration (PCI Firmware 3.2 section 4.1.2).
pub(super) fn mcfg((base, len): (u64, u64)) -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(base.to_le_bytes());
    let last_bus = (len >> 20).clamp(1, 256) - 1;
    body.extend([0, 0, 0, last_bus as u8, 0, 0, 0, 0]);
    sdt(*b"MCFG", 1, &body).as_slice().to_vec()
}

/// HPET description table (IA-PC HPET 1.0a section 3.2.4).
pub(super) fn hpet(base: u64) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(0x8086_a201u32.to_le_bytes());
    body.extend(bytes(&GAS::new(AddressSpace::SystemMemory, 0, 0, AccessSize::Undefined, base)));
    body.extend([0, 0, 0, 0]);
    sdt(*b"HPET", 1, &body).as_slice().to_vec()
}

/// RSDT or XSDT: pointers of `size` bytes, still offsets.
pub(super) fn root(signature: [u8; 4], size: usize, offsets: &[u32]) -> Vec<u8> {
    let body: Vec<u8> = offsets
        .iter()
        .flat_map(|o| u64::from(*o).to_le_bytes().into_iter().take(size).collect::<Vec<_>>())
        .collect();
    sdt(signature, 1, &body).as_slice().to_vec()
}

/// Root system description pointer, checksums still to be made (section 5.2.5.3).
pub(super) fn rsdp(oem: [u8; 6], rsdt: u32, xsdt: u32) -> Vec<u8> {
    let mut t = b"RSD PTR \0".to_vec();
    t.extend(oem);
    t.push(2);
    t.extend(rsdt.to_le_bytes());
    t.extend(36u32.to_le_bytes());
    t.extend(u64::from(xsdt).to_le_bytes());
    t.extend([0; 4]);
    t
}
