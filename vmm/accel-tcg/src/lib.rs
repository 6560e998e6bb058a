//! Translation behind the accelerator traits.
//!
//! All interrupt controllers are in user space: devices drive the vCPUs' pins. MMIO is served on the VM's
//! memory bus from the vCPU's thread.

mod bus;
mod vcpu;
mod vm;
mod x86;

use std::io;
use std::sync::Arc;

use holdfast_accel::{AccelError, Accelerator, IrqChip, Vm, VmSpec};
use holdfast_arch::Arch;
use holdfast_tcg::{Engine, RuntimeError, TcgVm, VmParts};

use bus::BusIo;
use vm::TcgVmHandle;
use x86::Apics;

/// The accelerator's name in options, messages and states.
const NAME: &str = "tcg";

/// Translation.
#[derive(Debug, Clone, Copy, Default)]
pub struct TcgAccelerator {
    engine: Engine,
}

impl TcgAccelerator {
    /// Translation by `engine`.
    pub fn new(engine: Engine) -> Self {
        Self { engine }
    }
}

fn unsupported(what: impl Into<String>) -> AccelError {
    AccelError::Unsupported { accel: NAME, what: what.into() }
}

/// What the runtime said, as the traits say it.
fn explain(vcpu: Option<u32>, e: RuntimeError) -> AccelError {
    match e {
        RuntimeError::Memory(what, source) => {
            AccelError::Host { accel: NAME, what: format!("no memory for {what}"), source }
        }
        RuntimeError::State(reason) => AccelError::State { accel: NAME, reason },
        RuntimeError::Exit { .. } => AccelError::Guest {
            accel: NAME,
            vcpu: vcpu.unwrap_or_default(),
            reason: format!("{e}; this is a bug of the translator, please report it"),
        },
        RuntimeError::Codegen(source) => AccelError::Host {
            accel: NAME,
            what: "no code can be generated for this host".into(),
            source: io::Error::other(source),
        },
        e => unsupported(e.to_string()),
    }
}

impl Accelerator for TcgAccelerator {
    fn name(&self) -> &'static str {
        NAME
    }

    fn probe(&self, arch: Arch) -> Result<(), AccelError> {
        holdfast_tcg::guest(arch).map(|_| ()).map_err(|e| AccelError::Unavailable {
            accel: NAME,
            reason: e.to_string(),
            remedy: "use `--accel kvm` on a host of that architecture".into(),
        })
    }

    fn create_vm(&self, spec: VmSpec) -> Result<Arc<dyn Vm>, AccelError> {
        self.probe(spec.arch)?;
        if spec.arch == Arch::X86_64 && spec.irqchip == IrqChip::On {
            return Err(unsupported("`kernel_irqchip=on` (use `split` or `off`)"));
        }
        let guest = holdfast_tcg::guest(spec.arch).map_err(|e| unsupported(e.to_string()))?;
        let apics = match spec.arch {
            Arch::X86_64 => Some(Apics::new(spec.vcpus, &spec.timers, &spec.mmio)?),
            Arch::Riscv64 => None,
        };
        let controllers = apics.as_ref().map(|a| a.controllers(spec.vcpus)).unwrap_or_default();
        let parts = VmParts {
            guest,
            memory: spec.memory,
            io: Arc::new(BusIo::new(spec.mmio, spec.pio)),
            clock: spec.clock,
            timers: spec.timers,
            vcpus: spec.vcpus,
            code_cache: spec.code_cache,
            engine: self.engine,
            controllers,
        };
        let vm = TcgVm::new(parts).map_err(|e| explain(None, e))?;
        if let Some(apics) = &apics {
            apics.connect(&vm);
        }
        Ok(Arc::new(TcgVmHandle::new(vm, apics.map(|a| a.bus), spec.vcpus)))
    }
}
