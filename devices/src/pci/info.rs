//! What monitors show of a function.

use super::{BarKind, Bdf, PciDevice, reg};

/// One BAR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionInfo {
    /// Its index.
    pub bar: u8,
    /// Kind and width.
    pub kind: BarKind,
    /// The address in the register, whether or not it is decoded.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
}

/// One function, as `query-pci` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciInfo {
    /// Where it is.
    pub bdf: Bdf,
    /// The device's id.
    pub name: String,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem Vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Base class and sub-class.
    pub class: u16,
    /// Interrupt Line register.
    pub irq: u8,
    /// Interrupt Pin register: 0 none, 1 INTA#.
    pub irq_pin: u8,
    /// The BARs.
    pub regions: Vec<RegionInfo>,
}

impl PciInfo {
    pub(super) fn of(bdf: Bdf, function: &dyn PciDevice) -> Self {
        let config = function.config();
        let interrupt = config.read_u16(reg::INTERRUPT_LINE).to_le_bytes();
        let regions = config
            .bars()
            .iter()
            .map(|b| RegionInfo { bar: b.index, kind: b.kind, address: config.bar_address(b), size: b.size })
            .collect();
        Self {
            bdf,
            name: function.pci_name().to_owned(),
            vendor: config.read_u16(reg::VENDOR),
            device: config.read_u16(reg::VENDOR + 2),
            subsystem_vendor: config.read_u16(reg::SUBSYSTEM),
            subsystem: config.read_u16(reg::SUBSYSTEM + 2),
            class: config.read_u16(reg::REVISION + 2),
            irq: interrupt[0],
            irq_pin: interrupt[1],
            regions,
        }
    }
}

/// The text for a base class and sub-class (PCI Code and ID Assignment Specification).
pub fn class_name(class: u16) -> &'static str {
    match class {
        0x0000 | 0x00ff => "Unclassified device",
        0x0100 => "SCSI controller",
        0x0101 => "IDE controller",
        0x0106 => "SATA controller",
        0x0108 => "NVMe controller",
        0x0180 => "Storage controller",
        0x0200 => "Ethernet controller",
        0x0280 => "Network controller",
        0x0300 => "VGA controller",
        0x0380 => "Display controller",
        0x0500 => "RAM controller",
        0x0600 => "Host bridge",
        0x0601 => "ISA bridge",
        0x0604 => "PCI bridge",
        0x0700 => "Serial controller",
        0x0780 => "Communication controller",
        0x0900 => "Input device",
        0x0c03 => "USB controller",
        0x0c05 => "SMBus",
        0x1000 => "Encryption controller",
        _ => "Other device",
    }
}
