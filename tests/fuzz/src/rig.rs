//! Machines without an accelerator.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;

use holdfast_accel::{AccelError, IrqChip, RomWindow, Vcpu, Vm};
use holdfast_arch::{Arch, CpuModel};
use holdfast_clock::{HostRandom, Timers, VmClock};
use holdfast_device::{
    BuildContext, Bus, CpuLines, Device, ExtInt, IoEvents, IrqSink, MsiController, MsiMessage, MsiVector,
    SystemEvent, SystemSink,
};
use holdfast_devices::catalog::DeviceConfig;
use holdfast_devices::catalog::{isa_debug_exit, pc_testdev, pci_testdev};
use holdfast_machines::{Machine, MachineContext, MachineModule, MachineRequest, Payload};
use holdfast_memory::GuestMemory;
use holdfast_threads::PlainSpawner;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// Takes whatever a machine tells its VM, and forgets it.
#[derive(Debug, Default)]
pub struct Sink;

impl CpuLines for Sink {
    fn set_cpu_pin(&self, _vcpu: u32, _pin: u32, _level: bool) {}
}
impl IrqSink for Sink {
    fn set_level(&self, _pin: u32, _level: bool) {}
}
impl SystemSink for Sink {
    fn request(&self, _event: SystemEvent) {}
}
impl MsiController for Sink {
    fn send(&self, _message: MsiMessage) -> io::Result<()> {
        Ok(())
    }
    fn vector(self: Arc<Self>) -> io::Result<Box<dyn MsiVector>> {
        Ok(Box::new(Vector::default()))
    }
}

/// A vector that keeps what comes while it is masked.
#[derive(Debug, Default)]
struct Vector(Mutex<(bool, bool)>);

impl MsiVector for Vector {
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut state = self.0.lock().expect("not poisoned");
        *state = (message.is_some(), state.1 && message.is_none());
        Ok(())
    }
    fn trigger(&self) -> io::Result<()> {
        let mut state = self.0.lock().expect("not poisoned");
        state.1 |= !state.0;
        Ok(())
    }
    fn eventfd(&self) -> Option<&EventFd> {
        None
    }
    fn pending(&self) -> bool {
        self.0.lock().expect("not poisoned").1
    }
}

type Events = (Arc<dyn IoEvents>, Arc<dyn IoEvents>);

impl Vm for Sink {
    fn accel(&self) -> &'static str {
        "none"
    }
    fn create_vcpu(&self, _index: u32, _model: &CpuModel) -> Result<Box<dyn Vcpu>, AccelError> {
        Err(AccelError::Unsupported { accel: "none", what: "a vCPU".into() })
    }
    fn map_rom(&self, _rom: &RomWindow) -> Result<(), AccelError> {
        Ok(())
    }
    fn unmap_rom(&self, _gpa: u64) -> Result<(), AccelError> {
        Ok(())
    }
    fn cpu_lines(&self) -> Arc<dyn CpuLines> {
        Arc::new(Self)
    }
    fn msi(&self) -> Option<Arc<dyn MsiController>> {
        Some(Arc::new(Self))
    }
    fn kernel_irq_sink(&self) -> Option<Arc<dyn IrqSink>> {
        None
    }
    fn io_events(&self) -> Option<Events> {
        None
    }
    fn connect_ext_int(&self, _source: Arc<dyn ExtInt>) {}
    fn connect_eoi(&self, _receiver: Arc<dyn Fn(u8) + Send + Sync>) {}
    fn start_dirty_log(&self) -> Result<(), AccelError> {
        Ok(())
    }
    fn sync_dirty_log(&self) -> Result<(), AccelError> {
        Ok(())
    }
    fn stop_dirty_log(&self) -> Result<(), AccelError> {
        Ok(())
    }
    fn save(&self) -> Result<serde_json::Value, AccelError> {
        Ok(serde_json::Value::Null)
    }
    fn restore(&self, _state: &serde_json::Value) -> Result<(), AccelError> {
        Ok(())
    }
}

/// What devices are built on, with RAM of these ranges (address, length).
pub fn context(ram: &[(u64, u64)]) -> BuildContext {
    let ranges: Vec<_> = ram.iter().map(|&(gpa, len)| (GuestAddress(gpa), len as usize)).collect();
    let clock = VmClock::stopped_at(0);
    let spawner = PlainSpawner::shared();
    BuildContext {
        memory: GuestMemory::from_ranges(&ranges).expect("RAM"),
        mmio: Bus::new("mmio"),
        pio: Bus::new("pio"),
        timers: Timers::start(Arc::clone(&clock), &*spawner).expect("a timer thread"),
        clock,
        random: Arc::new(HostRandom),
        spawner,
        system: Arc::new(Sink),
        msi: Some(Arc::new(Sink)),
    }
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
            topology: None,
            ram_size: 64 << 20,
            payload: Payload { kernel: Some(PathBuf::from("unread")), ..Payload::default() },
            cpu: module.default_cpu(),
            irqchip: IrqChip::Split,
            uuid: None,
            debug_console_port: pc.then_some(0x402),
            hotplug_ports: 0,
            board: board(pc),
            serial: None,
            debug_console: None,
        };
        let ram = module.ram_layout(&request).expect("a layout");
        let context = context(&ram.iter().map(|r| (r.gpa, r.len)).collect::<Vec<_>>());
        let parts = MachineContext { build: context.clone(), vm: Arc::new(Sink) };
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
