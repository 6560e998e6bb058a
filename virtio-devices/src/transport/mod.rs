//! Transports: how the driver finds and operates a device.
//!
//! [`mmio`] and [`pci`] differ in registers and interrupts; what happens behind them is the same.

pub(crate) mod common;
pub mod mmio;
pub mod pci;
#[cfg(test)]
mod pci_tests;
pub mod vhost_user;
