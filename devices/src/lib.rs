//! Platform devices: interrupt controllers, PCI, timers, serial, fw_cfg, flash.

pub mod chardev;
pub mod pci;
pub mod x86;
