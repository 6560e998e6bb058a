//! Registers of the PC: PIC, PIT, CMOS, i8042, ACPI PM, serial, fw_cfg on ports; IOAPIC and HPET in memory.

use std::sync::OnceLock;

use crate::access::access_windows;
use crate::rig::Rig;
use holdfast_machines::q35::Q35Module;

static RIG: OnceLock<Rig> = OnceLock::new();

/// Runs one input.
pub fn run(data: &[u8]) {
    let rig = RIG.get_or_init(|| Rig::new(&Q35Module));
    let Some((&bus, data)) = data.split_first() else { return };
    rig.reset();
    // Firmware's first step, without which ACPI PM is nowhere: its base and enable bit in the LPC bridge.
    let lpc = |offset, value: u32| {
        let pci = rig.machine.pci_bus().expect("a PCI bus");
        pci.write_config(0, 0x1f << 3, offset, &value.to_le_bytes());
    };
    lpc(0x40, 0x601);
    lpc(0x44, 0x80);
    if bus & 3 == 0 {
        access_windows(rig, &rig.context.mmio, |name| !name.starts_with("pci"), data);
    } else {
        access_windows(rig, &rig.context.pio, |name| !name.starts_with("pci"), data);
    }
    rig.check_state();
}
