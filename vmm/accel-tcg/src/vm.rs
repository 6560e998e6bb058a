//! The VM behind [`holdfast_accel::Vm`].

use std::sync::Arc;

use holdfast_accel::{AccelError, RomWindow, Vcpu, Vm};
use holdfast_arch::CpuModel;
use holdfast_device::{CpuLines, ExtInt, IoEvents, IrqSink, MsiController};
use holdfast_tcg::{TcgVcpu, TcgVm};

use crate::vcpu::TcgVcpuHandle;
use crate::{NAME, explain};

/// A translated VM.
#[derive(Debug)]
pub struct TcgVmHandle {
    vm: Arc<TcgVm>,
    lines: Arc<Lines>,
}

/// The vCPUs' interrupt pins.
#[derive(Debug)]
struct Lines(Arc<TcgVm>);

impl CpuLines for Lines {
    fn set_cpu_pin(&self, vcpu: u32, pin: u32, level: bool) {
        self.0.set_pin(vcpu, pin, level);
    }
}

impl TcgVmHandle {
    /// Around `vm`.
    pub fn new(vm: Arc<TcgVm>) -> Self {
        let lines = Arc::new(Lines(Arc::clone(&vm)));
        Self { vm, lines }
    }
}

impl Vm for TcgVmHandle {
    fn accel(&self) -> &'static str {
        NAME
    }

    fn create_vcpu(&self, index: u32, model: &CpuModel) -> Result<Box<dyn Vcpu>, AccelError> {
        let vcpu = TcgVcpu::new(&self.vm, index, model).map_err(|e| explain(Some(index), e))?;
        Ok(Box::new(TcgVcpuHandle::new(vcpu)))
    }

    fn map_rom(&self, rom: &RomWindow) -> Result<(), AccelError> {
        self.vm.map_rom(rom.gpa, &rom.region).map_err(|e| explain(None, e))
    }

    fn unmap_rom(&self, gpa: u64) -> Result<(), AccelError> {
        self.vm.unmap_rom(gpa).map_err(|e| explain(None, e))
    }

    fn cpu_lines(&self) -> Arc<dyn CpuLines> {
        Arc::clone(&self.lines) as Arc<dyn CpuLines>
    }

    fn msi(&self) -> Option<Arc<dyn MsiController>> {
        None
    }

    fn kernel_irq_sink(&self) -> Option<Arc<dyn IrqSink>> {
        None
    }

    fn io_events(&self) -> Option<(Arc<dyn IoEvents>, Arc<dyn IoEvents>)> {
        None
    }

    fn connect_ext_int(&self, _source: Arc<dyn ExtInt>) {
        tracing::warn!("external interrupts of 8259s go to x86 vCPUs only; there are none in this VM");
    }

    fn connect_eoi(&self, _receiver: Arc<dyn Fn(u8) + Send + Sync>) {
        tracing::warn!("EOI broadcasts come from x86 vCPUs only; there are none in this VM");
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

    fn jit_info(&self) -> Option<String> {
        Some(self.vm.info())
    }
}
