//! What x86 guests need around their vCPUs: local APICs.

use std::any::Any;
use std::sync::{Arc, OnceLock, Weak};

use holdfast_accel::AccelError;
use holdfast_clock::Timers;
use holdfast_device::Bus;
use holdfast_devices::x86::{Lapic, LapicBus, LapicState};
use holdfast_tcg::TcgVm;
use holdfast_tcg::x86::{ApicHandle, ApicState, LocalApic, Signals};

use crate::unsupported;

/// The local APICs of a VM, and the VM whose vCPUs they wake.
#[derive(Debug)]
pub struct Apics {
    pub bus: Arc<LapicBus>,
    vm: Arc<OnceLock<Weak<TcgVm>>>,
}

impl Apics {
    /// APICs for `vcpus` vCPUs, on the memory bus.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if something else is where they have to be.
    pub fn new(vcpus: u32, timers: &Arc<Timers>, mmio: &Arc<Bus>) -> Result<Self, AccelError> {
        let vm: Arc<OnceLock<Weak<TcgVm>>> = Arc::default();
        let target = Arc::clone(&vm);
        let waker = Arc::new(move |index| {
            if let Some(vm) = target.get().and_then(Weak::upgrade) {
                vm.interrupt(index);
            }
        });
        let ids: Vec<u32> = (0..vcpus).collect();
        let bus = LapicBus::new(&ids, timers, waker);
        bus.connect_memory(mmio).map_err(|e| unsupported(format!("a memory bus on which {e}")))?;
        Ok(Self { bus, vm })
    }

    /// What the vCPUs get.
    pub fn controllers(&self, vcpus: u32) -> Vec<Arc<dyn Any + Send + Sync>> {
        let apics = (0..vcpus).filter_map(|index| self.bus.apic(index).cloned());
        apics.map(|apic| Arc::new(ApicHandle(Arc::new(Apic(apic)))) as Arc<dyn Any + Send + Sync>).collect()
    }

    /// Tells the APICs whose vCPUs they wake.
    pub fn connect(&self, vm: &Arc<TcgVm>) {
        let _ = self.vm.set(Arc::downgrade(vm));
    }
}

/// An APIC as its processor sees it.
#[derive(Debug)]
struct Apic(Arc<Lapic>);

impl LocalApic for Apic {
    fn id(&self) -> u32 {
        self.0.id()
    }

    fn has_interrupt(&self) -> bool {
        self.0.has_interrupt()
    }

    fn acknowledge(&self) -> Option<u8> {
        self.0.acknowledge()
    }

    fn has_signal(&self) -> bool {
        self.0.has_signal()
    }

    fn take_signals(&self) -> Signals {
        let s = self.0.take_signals();
        Signals { init: s.init, nmi: s.nmi, sipi: s.sipi }
    }

    fn raise_nmi(&self) {
        self.0.raise_nmi();
    }

    fn cr8(&self) -> u8 {
        self.0.cr8()
    }

    fn set_cr8(&self, value: u8) {
        self.0.set_cr8(value);
    }

    fn base(&self) -> u64 {
        self.0.base()
    }

    fn set_base(&self, value: u64, bits: u64) -> bool {
        self.0.set_base(value, bits)
    }

    fn read_msr(&self, register: u32) -> Option<u64> {
        self.0.read_msr(register)
    }

    fn write_msr(&self, register: u32, value: u64) -> bool {
        self.0.write_msr(register, value)
    }

    fn send_ipi(&self, id: u32, icr: u32) -> bool {
        self.0.send_ipi(id, icr)
    }

    fn tsc_deadline(&self) -> u64 {
        self.0.tsc_deadline()
    }

    fn set_tsc_deadline(&self, value: u64, at: u64) {
        self.0.set_tsc_deadline(value, at);
    }

    fn reset(&self, init: bool) {
        self.0.reset(init);
    }

    fn set_ferr(&self, level: bool) -> bool {
        self.0.set_ferr(level)
    }

    fn save(&self) -> ApicState {
        let LapicState { base, registers, tsc_deadline } = self.0.save();
        ApicState { base, registers, tsc_deadline }
    }

    fn load(&self, state: &ApicState, deadline_at: u64) -> Result<(), String> {
        let ApicState { base, registers, tsc_deadline } = state.clone();
        self.0.load(&LapicState { base, registers, tsc_deadline }, deadline_at)
    }
}
