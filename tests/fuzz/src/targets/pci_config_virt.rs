//! PCI configuration space of the RISC-V machine, as [`pci_config`](super::pci_config) does with the PC's.

use std::sync::OnceLock;

use holdfast_machines::virt::VirtModule;

use super::pci_config::{machine, run_on};
use crate::rig::Rig;

static RIG: OnceLock<Rig> = OnceLock::new();

/// Runs one input.
pub fn run(data: &[u8]) {
    run_on(RIG.get_or_init(|| machine(&VirtModule)), data);
}
