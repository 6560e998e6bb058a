//! PCI: root bus, configuration space, BARs, INTx and MSI-X (PCI Local Bus 3.0, PCI Express base 4.0).
//!
//! A device takes a [`PciSlot`] from the [`PciBus`], builds its [`PciConfig`] with a
//! [`ConfigBuilder`], and is plugged in with [`PciBus::plug`]. From then on the guest reaches its
//! configuration space through the front ends [`Ecam`] and [`ConfigPorts`], and the bus attaches its
//! BARs to the memory and port buses as the guest enables, moves and disables them.

mod bdf;
mod bus;
mod config;
mod front;
mod info;
mod intx;
mod msix;
mod port;

pub use bdf::{Bdf, BdfError};
pub use bus::{PciBus, PciBusSpec, PciDevice, PciSlot, Windows};
pub use config::{BarKind, ConfigBuilder, Identity, PciConfig, PciConfigState, cap, command, reg};
pub use front::{ConfigPorts, Ecam, IoWindow};
pub use info::{PciInfo, RegionInfo, class_name};
pub use intx::Intx;
pub use msix::{Msix, MsixState};
pub use port::{Removal, RootPort};

/// A PCI device that cannot be built or plugged in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// The wanted slot is taken.
    #[error("PCI device {device:#04x} function {function} is taken")]
    SlotTaken {
        /// Device number.
        device: u8,
        /// Function number.
        function: u8,
    },
    /// The wanted slot does not exist.
    #[error(
        "PCI device {device:#04x} function {function} does not exist; devices are 0 to 31, functions 0 to 7"
    )]
    NoSuchSlot {
        /// Device number.
        device: u8,
        /// Function number.
        function: u8,
    },
    /// All slots are taken.
    #[error("all 32 PCI device numbers are taken")]
    Full,
    /// A BAR is malformed.
    #[error("BAR {bar}: {reason}")]
    Bar {
        /// Its index.
        bar: u8,
        /// What is wrong.
        reason: &'static str,
    },
    /// The capability list is full.
    #[error("no room for a capability of {len} bytes")]
    Capabilities {
        /// The capability's length.
        len: usize,
    },
    /// A BAR cannot be given an address.
    #[error("no room for BAR {bar} ({size:#x} bytes) of PCI device {bdf}")]
    NoRoom {
        /// The device.
        bdf: Bdf,
        /// The BAR.
        bar: u8,
        /// Its size in bytes.
        size: u64,
    },
}

#[cfg(test)]
mod tests;
