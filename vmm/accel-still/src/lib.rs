//! An accelerator whose vCPUs hold a state and run nothing.
//!
//! VMs of any architecture can be built on it on any host, which is what tests of machines, of the VM's life and of
//! snapshots want, and machines whose guest is a fuzzer. Its VM remembers what devices tell it, if that is wished for.

mod told;
mod vcpu;

use std::fmt;
use std::sync::Arc;

use holdfast_accel::{AccelError, Accelerator, IrqChip, RomWindow, Vcpu, Vm, VmSpec};
use holdfast_arch::{Arch, CpuModel, CpuState};
use holdfast_clock::{HostRandom, Timers, VmClock};
use holdfast_device::{
    BuildContext, Bus, CpuLines, ExtInt, IoEvents, IrqSink, MsiController, MsiMessage, SystemSink,
};
use holdfast_memory::{GuestMemory, GuestRegion};
use holdfast_threads::PlainSpawner;
use parking_lot::Mutex;
use serde_json::Value;
use vm_memory::GuestAddress;

pub use told::Told;

use vcpu::StillVcpu;

/// The accelerator.
#[derive(Debug, Clone, Copy, Default)]
pub struct Still;

impl Accelerator for Still {
    fn name(&self) -> &'static str {
        "still"
    }
    fn probe(&self, _arch: Arch) -> Result<(), AccelError> {
        Ok(())
    }
    fn create_vm(&self, spec: VmSpec) -> Result<Arc<dyn Vm>, AccelError> {
        Ok(StillVm::new(spec.arch, spec.irqchip, Told::forgetful()))
    }
}

type Eoi = Arc<dyn Fn(u8) + Send + Sync>;

/// Its VM.
pub struct StillVm {
    arch: Arch,
    irqchip: IrqChip,
    told: Arc<Told>,
    roms: Mutex<Vec<RomWindow>>,
    ext_int: Mutex<Option<Arc<dyn ExtInt>>>,
    eoi: Mutex<Option<Eoi>>,
    platform: Mutex<Value>,
}

impl fmt::Debug for StillVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StillVm").field("arch", &self.arch).finish_non_exhaustive()
    }
}

impl StillVm {
    /// A VM that tells `told` what it is told.
    pub fn new(arch: Arch, irqchip: IrqChip, told: Told) -> Arc<Self> {
        Arc::new(Self {
            arch,
            irqchip,
            told: Arc::new(told),
            roms: Mutex::default(),
            ext_int: Mutex::default(),
            eoi: Mutex::default(),
            platform: Mutex::default(),
        })
    }

    /// What it was told.
    pub fn told(&self) -> &Told {
        &self.told
    }

    /// The ROM windows that are mapped, in the order of their mapping.
    pub fn roms(&self) -> Vec<RomWindow> {
        self.roms.lock().clone()
    }

    /// The source of external interrupts, once one is connected.
    pub fn ext_int(&self) -> Option<Arc<dyn ExtInt>> {
        self.ext_int.lock().clone()
    }

    /// Broadcasts the end of interrupt `vector`. Says whether anyone listens.
    pub fn eoi(&self, vector: u8) -> bool {
        let receiver = self.eoi.lock().clone();
        receiver.map(|receiver| receiver(vector)).is_some()
    }

    /// What devices of this VM are built on, with RAM of these ranges (address and length in bytes) and a clock
    /// that is stopped at 0. The caller stops the timers.
    ///
    /// # Panics
    /// If the host has no such RAM, or no thread for the timers.
    pub fn context(&self, ram: &[(u64, u64)]) -> BuildContext {
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
            system: Arc::clone(&self.told) as Arc<dyn SystemSink>,
            msi: self.msi(),
            windows: None,
        }
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
        Ok(Box::new(StillVcpu::new(state)))
    }
    fn map_rom(&self, rom: &RomWindow) -> Result<(), AccelError> {
        self.roms.lock().push(rom.clone());
        Ok(())
    }
    fn unmap_rom(&self, gpa: u64) -> Result<(), AccelError> {
        self.roms.lock().retain(|rom| rom.gpa != gpa);
        Ok(())
    }
    fn map_shared(&self, gpa: u64, region: &Arc<GuestRegion>, _writable: bool) -> Result<(), AccelError> {
        self.map_rom(&RomWindow { gpa, region: Arc::clone(region) })
    }
    fn unmap_shared(&self, gpa: u64) -> Result<(), AccelError> {
        self.unmap_rom(gpa)
    }
    fn cpu_lines(&self) -> Arc<dyn CpuLines> {
        Arc::clone(&self.told) as Arc<dyn CpuLines>
    }
    fn msi(&self) -> Option<Arc<dyn MsiController>> {
        (self.arch == Arch::X86_64).then(|| Arc::clone(&self.told) as Arc<dyn MsiController>)
    }
    fn kernel_irq_sink(&self) -> Option<Arc<dyn IrqSink>> {
        (self.irqchip == IrqChip::On).then(|| Arc::clone(&self.told) as Arc<dyn IrqSink>)
    }
    fn io_events(&self) -> Option<(Arc<dyn IoEvents>, Arc<dyn IoEvents>)> {
        None
    }
    fn connect_ext_int(&self, source: Arc<dyn ExtInt>) {
        *self.ext_int.lock() = Some(source);
    }
    fn connect_eoi(&self, receiver: Eoi) {
        *self.eoi.lock() = Some(receiver);
    }
    fn ioapic_routes_changed(&self, routes: &[Option<MsiMessage>; 24]) {
        self.told.routed(routes.iter().flatten().count());
    }
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
