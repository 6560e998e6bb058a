//! PCI configuration space of the PC through ECAM and ports 0xcf8 and 0xcfc, with two devices that have
//! MSI-X, and whatever their BARs then show wherever they then are.

use std::sync::{Arc, OnceLock};

use holdfast_device::{Access, BusDevice};
use holdfast_devices::pci::{Ecam, Windows};
use crate::access::steps;
use crate::rig::Rig;
use holdfast_machines::MachineModule;
use holdfast_machines::q35::Q35Module;
use holdfast_virtio::balloon::{self, config::BalloonConfig};
use holdfast_virtio::rng::{self, config::RngConfig};
use holdfast_virtio::{Slot, plug};

static RIG: OnceLock<Rig> = OnceLock::new();

/// A machine with an entropy source and a balloon on its PCI bus.
pub fn machine(module: &dyn MachineModule) -> Rig {
    let mut rig = Rig::new(module);
    let bus = rig.machine.pci_bus().expect("a PCI bus");
    let slot = |device| Slot::Pci { bus: Arc::clone(&bus), device: Some(device) };
    let rng = rng::build("_rng", &RngConfig::default(), &rig.context).expect("an rng");
    let balloon = balloon::build("_balloon", &BalloonConfig::default(), &rig.context).expect("a balloon");
    rig.devices.push(plug("_rng", rng, slot(1), &rig.context).expect("plugged"));
    rig.devices.push(plug("_balloon", balloon, slot(2), &rig.context).expect("plugged"));
    rig
}

/// Runs one input.
pub fn run(data: &[u8]) {
    run_on(RIG.get_or_init(|| machine(&Q35Module)), data);
}

/// Runs one input on a machine made by [`machine`].
pub fn run_on(rig: &Rig, data: &[u8]) {
    let bus = rig.machine.pci_bus().expect("a PCI bus");
    rig.reset();
    let windows =
        Windows { io: (0xc000, 0x1000), mem32: (0xe000_0000, 1 << 20), mem64: (0x40_0000_0000, 1 << 20) };
    bus.assign_resources(windows).expect("room");
    let ecam = Ecam::new(Arc::clone(&bus));
    for step in steps(data) {
        // Mostly devices that are there: host bridge, rng, balloon, LPC bridge.
        let devfn = [0, 1 << 3, 2 << 3, 0x1f << 3, 1, 0x1f << 3 | 2, 4 << 3, 255][step.window & 7];
        let register = step.offset & 0xfff;
        let offset = u64::from(step.window as u8 >> 7) << 20 | devfn << 12 | register;
        let access = Access { offset, address: offset, vcpu: Some(0) };
        let mut out = [0; 8];
        match step.what {
            0..=4 => ecam.write(access, &step.value[..step.size]),
            5 | 6 => ecam.read(access, &mut out[..step.size]),
            7 => _ = rig.context.pio.write(Some(0), 0xcf8 + (step.offset & 7), &step.value[..step.size]),
            8 | 9 => {
                let address = 1 << 31 | (devfn << 8 | register & 0xfc) as u32;
                rig.context.pio.write(Some(0), 0xcf8, &address.to_le_bytes());
                let size = step.size.min(4);
                rig.context.pio.write(Some(0), 0xcfc + (register & 3), &step.value[..size]);
            }
            10 => _ = rig.context.pio.read(Some(0), 0xcf8 + (step.offset & 7), &mut out[..step.size]),
            _ => {
                let at: Vec<_> = rig.context.mmio.windows();
                let window = &at[(step.window >> 3) % at.len()];
                let address = window.base + step.offset % window.len;
                if step.what & 1 == 0 {
                    rig.context.mmio.read(Some(0), address, &mut out[..step.size]);
                } else {
                    rig.context.mmio.write(Some(0), address, &step.value[..step.size]);
                }
            }
        }
    }
    rig.check_state();
}
