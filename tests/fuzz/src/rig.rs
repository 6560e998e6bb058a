//! Machines without an accelerator.

use std::path::PathBuf;
use std::sync::Arc;

use holdfast_accel::IrqChip;
use holdfast_accel_still::{StillVm, Told};
use holdfast_arch::Arch;
use holdfast_device::{BuildContext, Device};
use holdfast_devices::catalog::DeviceConfig;
use holdfast_devices::catalog::{isa_debug_exit, pc_testdev, pci_testdev};
use holdfast_machines::{Machine, MachineContext, MachineModule, MachineRequest, Payload};

/// What devices alone are built on, with RAM of these ranges (address, length).
pub fn context(ram: &[(u64, u64)]) -> BuildContext {
    StillVm::new(Arch::X86_64, IrqChip::Split, Told::forgetful()).context(ram)
}

/// A machine whose guest is the fuzzer.
#[derive(Debug)]
pub struct Rig {
    /// The machine.
    pub machine: Box<dyn Machine>,
    /// Its buses, RAM and time.
    pub context: BuildContext,
    /// What is reset, saved and restored.
    pub devices: Vec<Arc<dyn Device>>,
}

/// All devices that are added by name.
fn board(pc: bool) -> Vec<DeviceConfig> {
    let pci = pci_testdev::PciTestdevConfig { addr: Some(30) }.into();
    if !pc {
        return vec![pci];
    }
    let exit = isa_debug_exit::IsaDebugExitConfig { iobase: 0xf4, iosize: 4 };
    vec![exit.into(), pc_testdev::PcTestdevConfig {}.into(), pci]
}

impl Rig {
    /// Builds a machine with 64 MiB of RAM and two vCPUs.
    pub fn new(module: &dyn MachineModule) -> Self {
        let pc = module.arch() == Arch::X86_64;
        let request = MachineRequest {
            boot_vcpus: 2,
            max_vcpus: 2,
            payload: Payload { kernel: Some(PathBuf::from("unread")), ..Payload::default() },
            irqchip: IrqChip::Split,
            debug_console_port: pc.then_some(0x402),
            board: board(pc),
            ..MachineRequest::new(module.default_cpu(), 64 << 20)
        };
        let ram = module.ram_layout(&request).expect("a layout");
        let vm = StillVm::new(module.arch(), request.irqchip, Told::forgetful());
        let context = vm.context(&ram.iter().map(|r| (r.gpa, r.len)).collect::<Vec<_>>());
        let parts = MachineContext { build: context.clone(), vm };
        let machine = module.build(request, parts).expect("a machine");
        let devices = machine.devices();
        Self { machine, context, devices }
    }

    /// Lets time pass at once.
    pub fn advance(&self, nanoseconds: u64) {
        self.context.clock.pause();
        self.context.clock.set(self.context.clock.now() + nanoseconds);
        self.context.clock.resume();
        self.context.timers.clock_changed();
    }

    /// Power-on, at time 0.
    pub fn reset(&self) {
        self.context.clock.pause();
        self.context.clock.set(0);
        self.devices.iter().for_each(|device| device.reset());
        self.context.clock.resume();
        self.context.timers.clock_changed();
    }

    /// Whatever the guest did, every device can be saved, and takes its own state back as it was.
    pub fn check_state(&self) {
        self.context.clock.pause();
        // Flash has too much state to be saved a thousand times a second.
        for device in self.devices.iter().filter(|device| !device.id().starts_with("flash")) {
            device.pause();
            let state = device.save().expect("every state can be saved");
            device.restore(&state).expect("a device takes its own state");
            device.resume();
        }
    }
}
