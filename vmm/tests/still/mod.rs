//! An accelerator whose vCPUs hold a state and run nothing: VMs of any architecture can be built on any host.

use std::io;
use std::sync::Arc;

use holdfast_accel::{AccelError, Accelerator, DebugControl, Exit, Kicker, RomWindow, Vcpu, Vm, VmSpec};
use holdfast_arch::{Arch, CpuModel, CpuState};
use holdfast_device::{CpuLines, ExtInt, IoEvents, IrqSink, MsiController, MsiMessage, MsiVector};
use parking_lot::{Condvar, Mutex};
use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

/// The accelerator.
#[derive(Debug)]
pub struct Still;

impl Accelerator for Still {
    fn name(&self) -> &'static str {
        "still"
    }
    fn probe(&self, _arch: Arch) -> Result<(), AccelError> {
        Ok(())
    }
    fn create_vm(&self, spec: VmSpec) -> Result<Arc<dyn Vm>, AccelError> {
        Ok(Arc::new(StillVm { arch: spec.arch, platform: Mutex::default() }))
    }
}

#[derive(Debug)]
struct StillVm {
    arch: Arch,
    platform: Mutex<Value>,
}

/// Interrupts end here.
#[derive(Debug)]
struct Sink;

impl CpuLines for Sink {
    fn set_cpu_pin(&self, _vcpu: u32, _pin: u32, _level: bool) {}
}

impl MsiController for Sink {
    fn send(&self, _message: MsiMessage) -> io::Result<()> {
        Ok(())
    }
    fn vector(self: Arc<Self>) -> io::Result<Box<dyn MsiVector>> {
        Ok(Box::new(Vector::default()))
    }
}

/// A vector that keeps what is triggered while it is masked.
#[derive(Debug, Default)]
struct Vector(Mutex<(Option<MsiMessage>, bool)>);

impl MsiVector for Vector {
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut vector = self.0.lock();
        vector.0 = message;
        vector.1 &= message.is_none();
        Ok(())
    }
    fn trigger(&self) -> io::Result<()> {
        let mut vector = self.0.lock();
        vector.1 = vector.0.is_none();
        Ok(())
    }
    fn eventfd(&self) -> Option<&EventFd> {
        None
    }
    fn pending(&self) -> bool {
        self.0.lock().1
    }
}

impl Vm for StillVm {
    fn accel(&self) -> &'static str {
        "still"
    }
    fn create_vcpu(&self, _index: u32, _model: &CpuModel) -> Result<Box<dyn Vcpu>, AccelError> {
        let state = match self.arch {
            Arch::X86_64 => CpuState::X86_64(Box::default()),
            Arch::Riscv64 => CpuState::Riscv64(Box::default()),
        };
        Ok(Box::new(StillVcpu { state, kicked: Arc::default() }))
    }
    fn map_rom(&self, _rom: &RomWindow) -> Result<(), AccelError> {
        Ok(())
    }
    fn unmap_rom(&self, _gpa: u64) -> Result<(), AccelError> {
        Ok(())
    }
    fn cpu_lines(&self) -> Arc<dyn CpuLines> {
        Arc::new(Sink)
    }
    fn msi(&self) -> Option<Arc<dyn MsiController>> {
        (self.arch == Arch::X86_64).then(|| Arc::new(Sink) as Arc<dyn MsiController>)
    }
    fn kernel_irq_sink(&self) -> Option<Arc<dyn IrqSink>> {
        None
    }
    fn io_events(&self) -> Option<(Arc<dyn IoEvents>, Arc<dyn IoEvents>)> {
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
    fn save(&self) -> Result<Value, AccelError> {
        Ok(self.platform.lock().clone())
    }
    fn restore(&self, state: &Value) -> Result<(), AccelError> {
        *self.platform.lock() = state.clone();
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Kicked(Mutex<bool>, Condvar);

impl Kicker for Kicked {
    fn kick(&self) {
        *self.0.lock() = true;
        self.1.notify_all();
    }
}

#[derive(Debug)]
struct StillVcpu {
    state: CpuState,
    kicked: Arc<Kicked>,
}

impl Vcpu for StillVcpu {
    fn run(&mut self) -> Result<Exit, AccelError> {
        let mut kicked = self.kicked.0.lock();
        self.kicked.1.wait_while(&mut kicked, |kicked| !*kicked);
        *kicked = false;
        Ok(Exit::Kicked)
    }
    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::clone(&self.kicked) as Arc<dyn Kicker>
    }
    fn state(&mut self) -> Result<CpuState, AccelError> {
        Ok(self.state.clone())
    }
    fn set_state(&mut self, state: &CpuState) -> Result<(), AccelError> {
        self.state = state.clone();
        Ok(())
    }
    fn reset(&mut self) -> Result<(), AccelError> {
        Ok(())
    }
    fn inject_nmi(&mut self) -> Result<(), AccelError> {
        Err(AccelError::Unsupported { accel: "still", what: "an NMI".into() })
    }
    fn set_debug(&mut self, _control: &DebugControl) -> Result<(), AccelError> {
        Ok(())
    }
    fn translate(&mut self, _gva: u64) -> Result<Option<u64>, AccelError> {
        Ok(None)
    }
}
