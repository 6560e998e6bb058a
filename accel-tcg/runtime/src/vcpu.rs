//! One translated vCPU.

use std::sync::Arc;

use holdfast_clock::{Timer, VmClock};

use crate::guest::{Fault, Flush, Guest, Mode};
use crate::phys::PhysMemory;
use crate::shared::VcpuShared;

/// Why the vCPU's run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// [`VcpuShared::request`] with `KICK`.
    Kicked,
    /// The guest shut itself down by a fault.
    Shutdown,
    /// A breakpoint or single step; guest-virtual program counter.
    Debug(u64),
}

/// Everything of a vCPU but its `Env`.
#[derive(Debug)]
pub(crate) struct VcpuCore {
    pub shared: Arc<VcpuShared>,
    pub guest: Arc<dyn Guest>,
    pub phys: Arc<PhysMemory>,
    pub clock: Arc<VmClock>,
    pub timer: Timer,
    pub mode: Mode,
    pub halted: bool,
    pub pending_fault: Option<Fault>,
    pub stop: Option<Stop>,
}

impl VcpuCore {
    /// The vCPU whose environment this is.
    ///
    /// # Safety
    /// `env` is the environment pointer of a vCPU whose thread is the caller, and no other reference to its
    /// core is in use.
    #[inline]
    pub unsafe fn from_env<'a>(env: *mut u8) -> &'a mut Self {
        // SAFETY: the owner is set before any translated code runs and stays valid while it does.
        unsafe {
            let owner = (*holdfast_tcg_ir::env::header(env)).owner.load(std::sync::atomic::Ordering::Relaxed);
            &mut *std::ptr::with_exposed_provenance_mut::<Self>(owner as usize)
        }
    }

    pub fn set_deadline(&mut self, deadline: Option<u64>) {
        match deadline {
            Some(at) => self.timer.arm(at),
            None => self.timer.disarm(),
        }
    }

    pub fn update_mode(&mut self) {
        let guest = Arc::clone(&self.guest);
        self.mode = guest.mode(&mut crate::cpu::Cpu::new(self));
    }

    pub fn flush(&mut self, _what: Flush) {}

    pub fn flush_others(&mut self, _what: Flush) {}
}
