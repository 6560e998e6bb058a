//! A vCPU that waits.

use std::sync::Arc;

use holdfast_accel::{AccelError, DebugControl, Exit, Kicker, Vcpu};
use holdfast_arch::CpuState;
use parking_lot::{Condvar, Mutex};

#[derive(Debug, Default)]
struct Kicked(Mutex<bool>, Condvar);

impl Kicker for Kicked {
    fn kick(&self) {
        *self.0.lock() = true;
        self.1.notify_all();
    }
}

/// Holds a state, and sleeps until it is kicked.
#[derive(Debug)]
pub(crate) struct StillVcpu {
    state: CpuState,
    kicked: Arc<Kicked>,
}

impl StillVcpu {
    pub(crate) fn new(state: CpuState) -> Self {
        Self { state, kicked: Arc::default() }
    }
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
