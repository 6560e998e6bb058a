//! A vCPU behind [`holdfast_accel::Vcpu`].

use std::sync::Arc;

use holdfast_accel::{AccelError, CodePlace, DebugControl, Exit, Kicker, Vcpu, WatchKind, Watchpoint};
use holdfast_arch::CpuState;
use holdfast_devices::x86::Lapic;
use holdfast_tcg::{Stop, TcgVcpu, VcpuShared, request};

use crate::{explain, unsupported};

/// A translated vCPU.
#[derive(Debug)]
pub struct TcgVcpuHandle {
    vcpu: TcgVcpu,
    /// Of x86 guests.
    apic: Option<Arc<Lapic>>,
}

/// Interrupts a run.
#[derive(Debug)]
struct TcgKicker(Arc<VcpuShared>);

impl Kicker for TcgKicker {
    fn kick(&self) {
        self.0.request(request::KICK);
    }
}

impl TcgVcpuHandle {
    /// Around `vcpu`.
    pub fn new(vcpu: TcgVcpu, apic: Option<Arc<Lapic>>) -> Self {
        Self { vcpu, apic }
    }

    fn index(&self) -> u32 {
        self.vcpu.shared().index()
    }
}

fn wanted(w: &Watchpoint) -> holdfast_tcg::Watchpoint {
    let kind = match w.kind {
        WatchKind::Read => holdfast_tcg::WatchKind::Read,
        WatchKind::Write => holdfast_tcg::WatchKind::Write,
        WatchKind::Access => holdfast_tcg::WatchKind::Access,
    };
    holdfast_tcg::Watchpoint { address: w.address, len: w.len, kind }
}

fn reported(w: holdfast_tcg::Watchpoint) -> Watchpoint {
    let kind = match w.kind {
        holdfast_tcg::WatchKind::Read => WatchKind::Read,
        holdfast_tcg::WatchKind::Write => WatchKind::Write,
        holdfast_tcg::WatchKind::Access => WatchKind::Access,
    };
    Watchpoint { address: w.address, len: w.len, kind }
}

impl Vcpu for TcgVcpuHandle {
    fn run(&mut self) -> Result<Exit, AccelError> {
        match self.vcpu.run() {
            Ok(Stop::Kicked) => Ok(Exit::Kicked),
            Ok(Stop::Shutdown) => Ok(Exit::Shutdown),
            Ok(Stop::Debug(pc)) => Ok(Exit::Debug(pc)),
            Ok(Stop::Watch(pc, hit)) => Ok(Exit::Watch(pc, reported(hit))),
            Err(e) => {
                tracing::error!(vcpu = self.index(), "{e}\n{}", self.vcpu.describe());
                Err(explain(Some(self.index()), e))
            }
        }
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::new(TcgKicker(Arc::clone(self.vcpu.shared())))
    }

    fn state(&mut self) -> Result<CpuState, AccelError> {
        Ok(self.vcpu.export())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), AccelError> {
        let index = self.index();
        self.vcpu.import(state).map_err(|e| explain(Some(index), e))
    }

    fn reset(&mut self) -> Result<(), AccelError> {
        let index = self.index();
        self.vcpu.reset().map_err(|e| explain(Some(index), e))
    }

    fn inject_nmi(&mut self) -> Result<(), AccelError> {
        let apic =
            self.apic.as_ref().ok_or_else(|| unsupported("a non-maskable interrupt for this guest"))?;
        apic.raise_nmi();
        Ok(())
    }

    fn set_debug(&mut self, control: &DebugControl) -> Result<(), AccelError> {
        self.vcpu.hold_interrupts(control.hold_interrupts);
        self.vcpu.set_debug(control.single_step, &control.breakpoints);
        let watched: Vec<_> = control.watchpoints.iter().map(wanted).collect();
        self.vcpu.set_watchpoints(&watched);
        Ok(())
    }

    fn rearm_breakpoint(&mut self) {
        self.vcpu.rearm_breakpoint();
    }

    fn translate_ahead(&mut self, places: &[CodePlace], go_on: &dyn Fn() -> bool) {
        let place =
            |place: &CodePlace| holdfast_tcg::CodePlace { gpa: place.gpa, pc: place.pc, mode: place.mode };
        let places: Vec<_> = places.iter().map(place).collect();
        self.vcpu.translate_ahead(&places, go_on);
    }

    fn translate(&mut self, gva: u64) -> Result<Option<u64>, AccelError> {
        Ok(self.vcpu.probe(gva))
    }
}
