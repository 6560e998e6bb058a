//! Registers of the RISC-V machine: PLIC, ACLINT, 16550, RTC, syscon, flash, fw_cfg with its DMA.
#![no_main]

use std::sync::OnceLock;

use holdfast_fuzz::{Rig, access_windows};
use holdfast_machines::virt::VirtModule;
use libfuzzer_sys::fuzz_target;

static RIG: OnceLock<Rig> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let rig = RIG.get_or_init(|| Rig::new(&VirtModule));
    rig.reset();
    access_windows(rig, &rig.context.mmio, |name| !name.starts_with("pci"), data);
    rig.check_state();
});
