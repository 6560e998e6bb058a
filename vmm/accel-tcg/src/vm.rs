//! The VM behind [`holdfast_accel::Vm`].

use std::sync::Arc;

use holdfast_accel::{AccelError, CodeLog, CodePlace, RomWindow, Vcpu, Vm};
use holdfast_arch::CpuModel;
use holdfast_arch::x86_64::CpuTopology;
use holdfast_device::{CpuLines, ExtInt, FpuErrors, IoEvents, IrqSink, MsiController};
use holdfast_devices::x86::LapicBus;
use holdfast_memory::GuestRegion;
use holdfast_tcg::{LogOptions, TcgVcpu, TcgVm, TraceLog};

use crate::vcpu::TcgVcpuHandle;
use crate::{NAME, explain};

/// A translated VM.
#[derive(Debug)]
pub struct TcgVmHandle {
    vm: Arc<TcgVm>,
    lines: Arc<Lines>,
    /// Of x86 guests.
    apics: Option<Arc<LapicBus>>,
    vcpus: u32,
}

/// The vCPUs' interrupt pins.
#[derive(Debug)]
struct Lines {
    vm: Arc<TcgVm>,
    apics: Option<Arc<LapicBus>>,
}

impl CpuLines for Lines {
    fn set_cpu_pin(&self, vcpu: u32, pin: u32, level: bool) {
        match &self.apics {
            Some(apics) => apics.set_pin(vcpu, pin, level),
            None => self.vm.set_pin(vcpu, pin, level),
        }
    }
}

impl TcgVmHandle {
    /// Around `vm` of `vcpus` vCPUs, which have `apics` if it is an x86 guest.
    pub fn new(vm: Arc<TcgVm>, apics: Option<Arc<LapicBus>>, vcpus: u32) -> Self {
        let lines = Arc::new(Lines { vm: Arc::clone(&vm), apics: apics.clone() });
        Self { vm, lines, apics, vcpus }
    }

    /// The model with the arrangement of vCPUs that it leaves open; the APIC id goes to the APIC.
    fn place(&self, index: u32, model: &CpuModel) -> CpuModel {
        let mut model = model.clone();
        if let CpuModel::X86_64(x86) = &mut model {
            let topology = *x86.topology.get_or_insert_with(|| CpuTopology::flat(self.vcpus));
            if let Some(apic) = self.apics.as_ref().and_then(|a| a.apic(index)) {
                apic.set_id(topology.apic_id(index));
            }
        }
        model
    }
}

impl Vm for TcgVmHandle {
    fn accel(&self) -> &'static str {
        NAME
    }

    fn create_vcpu(&self, index: u32, model: &CpuModel) -> Result<Box<dyn Vcpu>, AccelError> {
        let model = self.place(index, model);
        let vcpu = TcgVcpu::new(&self.vm, index, &model).map_err(|e| explain(Some(index), e))?;
        let apic = self.apics.as_ref().and_then(|a| a.apic(index)).cloned();
        Ok(Box::new(TcgVcpuHandle::new(vcpu, apic)))
    }

    fn map_rom(&self, rom: &RomWindow) -> Result<(), AccelError> {
        self.vm.map_rom(rom.gpa, &rom.region).map_err(|e| explain(None, e))
    }

    fn unmap_rom(&self, gpa: u64) -> Result<(), AccelError> {
        self.vm.unmap_rom(gpa).map_err(|e| explain(None, e))
    }

    fn map_shared(&self, gpa: u64, region: &Arc<GuestRegion>, writable: bool) -> Result<(), AccelError> {
        self.vm.map_shared(gpa, region, writable).map_err(|e| explain(None, e))
    }

    fn unmap_shared(&self, gpa: u64) -> Result<(), AccelError> {
        self.vm.unmap_shared(gpa).map_err(|e| explain(None, e))
    }

    fn cpu_lines(&self) -> Arc<dyn CpuLines> {
        Arc::clone(&self.lines) as Arc<dyn CpuLines>
    }

    fn msi(&self) -> Option<Arc<dyn MsiController>> {
        self.apics.clone().map(|a| a as Arc<dyn MsiController>)
    }

    fn kernel_irq_sink(&self) -> Option<Arc<dyn IrqSink>> {
        None
    }

    fn io_events(&self) -> Option<(Arc<dyn IoEvents>, Arc<dyn IoEvents>)> {
        None
    }

    fn connect_ext_int(&self, source: Arc<dyn ExtInt>) {
        if !self.apics.as_ref().is_some_and(|a| a.connect_ext_int(source)) {
            tracing::warn!("a source of external interrupts is ignored: there is one, or this is no x86 VM");
        }
    }

    fn connect_fpu_errors(&self, sink: Arc<dyn FpuErrors>) {
        if !self.apics.as_ref().is_some_and(|a| a.connect_fpu_errors(sink)) {
            tracing::warn!("a receiver of x87 errors is ignored: there is one, or this is no x86 VM");
        }
    }

    fn connect_eoi(&self, receiver: Arc<dyn Fn(u8) + Send + Sync>) {
        if !self.apics.as_ref().is_some_and(|a| a.connect_eoi(receiver)) {
            tracing::warn!("a receiver of EOI broadcasts is ignored: there is one, or this is no x86 VM");
        }
    }

    fn start_dirty_log(&self) -> Result<(), AccelError> {
        self.vm.start_dirty_log();
        Ok(())
    }

    fn sync_dirty_log(&self) -> Result<(), AccelError> {
        self.vm.sync_dirty_log();
        Ok(())
    }

    fn stop_dirty_log(&self) -> Result<(), AccelError> {
        // Which pages can be written is noted anyway; nothing has to be undone.
        Ok(())
    }

    fn save(&self) -> Result<serde_json::Value, AccelError> {
        // Everything that a guest can see is in the vCPUs' states and the devices'.
        Ok(serde_json::json!({}))
    }

    fn restore(&self, _state: &serde_json::Value) -> Result<(), AccelError> {
        Ok(())
    }

    fn start_perf_map(&self) -> Result<(), AccelError> {
        self.vm.start_perf_map().map_err(|source| AccelError::Host {
            accel: NAME,
            what: "no perf map can be written".into(),
            source,
        })
    }

    fn start_code_log(&self, file: std::fs::File, what: &CodeLog) -> Result<(), AccelError> {
        let CodeLog { guest, ir, host, interrupts, filter, limit } = *what;
        self.vm.start_log(TraceLog::new(file, LogOptions { guest, ir, host, interrupts, filter, limit }));
        Ok(())
    }

    fn note_running_code(&self) {
        self.vm.note_running_code();
    }

    fn running_code(&self, most: usize) -> Vec<CodePlace> {
        let place =
            |place: holdfast_tcg::CodePlace| CodePlace { gpa: place.gpa, pc: place.pc, mode: place.mode };
        self.vm.running_code(most).into_iter().map(place).collect()
    }

    fn jit_info(&self) -> Option<String> {
        Some(self.vm.info())
    }
}
