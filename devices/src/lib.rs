//! Platform devices: interrupt controllers, PCI, timers, serial, fw_cfg, flash.

pub mod catalog;
pub mod chardev;
pub mod flash;
pub mod fw_cfg;
pub mod goldfish_rtc;
pub mod pci;
pub mod riscv;
pub mod serial;
pub mod syscon;
pub mod x86;
