//! The VM under a debugger.
//!
//! While one is attached and the guest stands because of it, the VM's state is `debug`. Breakpoints are the debugger's
//! and live in the vCPUs; they are changed only while all of them stand.

use std::sync::Arc;

use holdfast_accel::{DebugControl, Watchpoint};
use holdfast_arch::CpuState;
use vm_memory::{Bytes, GuestAddress};

use super::{Manager, Run, Stage, query};
use crate::control::{
    ControlError, DebugEvent, DebugListener, DebugTarget, DebugWhy, ErrorKind, Event, MemoryWrite,
};
use crate::vm::Vm;
use crate::vm::vcpus::{DebugStop, VcpuError};

/// The debugger.
#[derive(Debug)]
pub(super) struct Debugger {
    listener: DebugListener,
    /// What each vCPU was told.
    applied: Vec<DebugControl>,
    /// Watchpoints that were hit while the VM was stopping for another vCPU.
    pending: Vec<(u32, Watchpoint)>,
    /// The guest goes on when the debugger leaves.
    resume: bool,
}

fn failed(error: VcpuError) -> ControlError {
    ControlError::failed("A vCPU cannot be debugged", error)
}

fn not_attached() -> ControlError {
    ControlError::new(ErrorKind::Failed, "No debugger is attached")
}

impl Manager {
    /// Tells the debugger, if there is one.
    fn tell(&self, event: DebugEvent) {
        if let Some(debugger) = &self.debugger {
            debugger.listener.tell(event);
        }
    }

    /// The VM was stopped by somebody else.
    pub(super) fn tell_stopped(&self) {
        self.tell(DebugEvent::Stopped { vcpu: 0, why: DebugWhy::Paused });
    }

    /// There is no guest any more that could be debugged.
    pub(super) fn end_debugging(&mut self, status: u8) {
        self.tell(DebugEvent::Ended(status));
        self.debugger = None;
    }

    /// Fails while a debugger decides whether the guest runs.
    pub(super) fn not_debugged(&self) -> Result<(), ControlError> {
        if self.debugger.is_some() {
            return Err(ControlError::new(ErrorKind::Failed, "The VM is stopped for its debugger"));
        }
        Ok(())
    }

    /// Stops the guest and says so everywhere.
    fn stop_for_debugger(&mut self, vm: &Vm) -> Result<(), ControlError> {
        self.events.publish(Event::Pausing);
        vm.pause().map_err(|e| ControlError::failed("The VM could not be stopped", e))?;
        self.set_run(Run::Debug);
        self.events.publish(Event::Paused);
        Ok(())
    }

    pub(super) fn attach_debugger(&mut self, listener: DebugListener) -> Result<DebugTarget, ControlError> {
        self.idle()?;
        // Whoever asks is to wait until there is one.
        let vm = Arc::clone(self.built().map_err(|_| ControlError::not_created())?);
        vm.accel().can_debug().map_err(|e| ControlError::failed("The VM cannot be debugged", e))?;
        if self.debugger.is_some() {
            return Err(ControlError::new(ErrorKind::Conflict, "The VM has a debugger already"));
        }
        let Stage::Built { run, .. } = self.stage else { return Err(ControlError::not_running()) };
        match run {
            Run::Running => self.stop_for_debugger(&vm)?,
            Run::Paused | Run::IoError => self.set_run(Run::Debug),
            // There may be something to be learnt of a guest that is over.
            Run::Debug | Run::Off | Run::Failed | Run::Panicked | Run::Moved { .. } => {}
        }
        let vcpus = vm.vcpus().len();
        self.debugger = Some(Debugger {
            listener,
            applied: vec![DebugControl::default(); vcpus],
            pending: Vec::new(),
            resume: matches!(run, Run::Running | Run::Debug),
        });
        Ok(DebugTarget { arch: vm.arch(), vcpus: vcpus as u32, scarce: vm.accel().accel() == "kvm" })
    }

    pub(super) fn stop_debugged(&mut self) -> Result<(), ControlError> {
        self.idle()?;
        let vm = Arc::clone(self.built()?);
        match self.stage {
            Stage::Built { run: Run::Running, .. } => self.stop_for_debugger(&vm),
            _ => Ok(()),
        }
    }

    /// Tells vCPUs what the debugger wants of them; `None` leaves one as it is.
    pub(super) fn set_debug(&mut self, controls: &[Option<DebugControl>]) -> Result<(), ControlError> {
        let vm = Arc::clone(self.built()?);
        let debugger = self.debugger.as_mut().ok_or_else(not_attached)?;
        if matches!(self.stage, Stage::Built { run: Run::Running, .. }) {
            return Err(ControlError::new(ErrorKind::Failed, "The guest runs"));
        }
        for (index, (control, applied)) in controls.iter().zip(&mut debugger.applied).enumerate() {
            if let Some(control) = control.as_ref().filter(|c| *c != applied) {
                vm.vcpus().set_debug(index, control.clone()).map_err(failed)?;
                applied.clone_from(control);
            }
        }
        Ok(())
    }

    /// Lets the vCPUs run that `controls` has something for.
    pub(super) fn run_debugged(&mut self, controls: &[Option<DebugControl>]) -> Result<(), ControlError> {
        self.idle()?;
        let vm = Arc::clone(self.built()?);
        if !matches!(self.stage, Stage::Built { run: Run::Debug | Run::Paused, .. }) {
            return Err(ControlError::new(ErrorKind::Failed, "The guest runs, or never will again"));
        }
        self.set_debug(controls)?;
        let debugger = self.debugger.as_mut().ok_or_else(not_attached)?;
        if let Some((vcpu, watchpoint)) = debugger.pending.pop() {
            self.tell(DebugEvent::Stopped { vcpu, why: DebugWhy::Watch(watchpoint) });
            return Ok(());
        }
        self.events.publish(Event::Resuming);
        let which: Vec<bool> = controls.iter().map(Option::is_some).collect();
        vm.resume_some(&which).map_err(|e| ControlError::failed("The VM could not be resumed", e))?;
        self.set_run(Run::Running);
        self.events.publish(Event::Resumed);
        Ok(())
    }

    pub(super) fn detach_debugger(&mut self) -> Result<(), ControlError> {
        let Some(debugger) = self.debugger.take() else { return Ok(()) };
        let Stage::Built { vm, run } = &self.stage else { return Ok(()) };
        let (vm, run) = (Arc::clone(vm), *run);
        let running = run == Run::Running;
        if running {
            vm.pause().map_err(|e| ControlError::failed("The VM could not be stopped", e))?;
        }
        for (index, _) in debugger.applied.iter().enumerate().filter(|(_, a)| **a != DebugControl::default())
        {
            vm.vcpus().set_debug(index, DebugControl::default()).map_err(failed)?;
        }
        if running {
            return vm.resume().map_err(|e| ControlError::failed("The VM could not be resumed", e));
        }
        if run == Run::Debug {
            self.set_run(Run::Paused);
            if debugger.resume {
                return self.resume_vm();
            }
        }
        Ok(())
    }

    /// vCPU `index` stopped.
    pub(super) fn vcpu_stopped(&mut self, index: u32, stop: DebugStop) {
        let Stage::Built { vm, run } = &self.stage else { return };
        let (vm, running) = (Arc::clone(vm), *run == Run::Running);
        let result = match &mut self.debugger {
            // It has left meanwhile.
            None if running => vm.vcpus().run_one(index as usize).map_err(failed),
            None => Ok(()),
            Some(debugger) if running => {
                let control = debugger.applied.get(index as usize);
                let why = match stop {
                    DebugStop::Watch(watchpoint) => DebugWhy::Watch(watchpoint),
                    DebugStop::At(pc) if control.is_some_and(|c| c.breakpoints.contains(&pc)) => {
                        DebugWhy::Breakpoint(pc)
                    }
                    DebugStop::At(_) => DebugWhy::Step,
                };
                let stopped = self.stop_for_debugger(&vm);
                self.tell(DebugEvent::Stopped { vcpu: index, why });
                stopped
            }
            // One stop is reported at a time. A breakpoint is met again; a watchpoint would not be.
            Some(debugger) => match stop {
                DebugStop::At(_) => vm.vcpus().rearm_breakpoint(index as usize).map_err(failed),
                DebugStop::Watch(watchpoint) => {
                    debugger.pending.push((index, watchpoint));
                    Ok(())
                }
            },
        };
        if let Err(error) = result {
            tracing::error!(index, "{}", error.describe());
        }
    }

    fn standing(&self) -> Result<&Arc<Vm>, ControlError> {
        self.idle()?;
        match &self.stage {
            Stage::Built { run: Run::Running, .. } => {
                Err(ControlError::new(ErrorKind::Failed, "The guest runs"))
            }
            _ => self.built(),
        }
    }

    pub(super) fn vcpu_state(&self, vcpu: u32) -> Result<CpuState, ControlError> {
        self.standing()?.vcpus().state(vcpu as usize).map_err(failed)
    }

    pub(super) fn set_vcpu_state(&self, vcpu: u32, state: CpuState) -> Result<(), ControlError> {
        self.standing()?.vcpus().set_state(vcpu as usize, state).map_err(failed)
    }

    pub(super) fn write(&self, write: &MemoryWrite) -> Result<(), ControlError> {
        let vm = self.standing()?;
        for (gpa, range) in query::places(vm, write.vcpu, write.address, write.data.len())? {
            let cannot = |_| query::cannot_access(write.address);
            vm.memory().write_slice(&write.data[range], GuestAddress(gpa)).map_err(cannot)?;
        }
        Ok(())
    }
}
