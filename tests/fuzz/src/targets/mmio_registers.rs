//! Registers of the RISC-V machine: PLIC, ACLINT, 16550, RTC, syscon, flash, fw_cfg with its DMA.

use std::sync::OnceLock;

use crate::access::access_windows;
use crate::rig::Rig;
use holdfast_machines::virt::VirtModule;

static RIG: OnceLock<Rig> = OnceLock::new();

/// Runs one input.
pub fn run(data: &[u8]) {
    let rig = RIG.get_or_init(|| Rig::new(&VirtModule));
    rig.reset();
    access_windows(rig, &rig.context.mmio, |name| !name.starts_with("pci"), data);
    rig.check_state();
}
