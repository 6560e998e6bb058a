//! A vCPU as its guest architecture sees it.

use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes, KnownLayout};

use crate::guest::{Fault, Flush};
use crate::phys::PhysMemory;
use crate::vcpu::VcpuCore;

/// Access to one vCPU, given to [`crate::Guest`] methods and to helpers called from translated code.
#[derive(Debug)]
pub struct Cpu<'a> {
    pub(crate) core: &'a mut VcpuCore,
}

impl<'a> Cpu<'a> {
    pub(crate) fn new(core: &'a mut VcpuCore) -> Self {
        Self { core }
    }

    /// The vCPU's number.
    pub fn index(&self) -> u32 {
        self.core.shared.index()
    }

    /// The guest's own state: slots and everything else that is architectural. `T` is the `#[repr(C)]`
    /// type whose size the guest gave as [`crate::GuestSpec::state_size`].
    ///
    /// # Panics
    /// If `T` is larger than that: a bug of the guest crate.
    #[inline]
    pub fn state<T: FromBytes + IntoBytes + KnownLayout>(&mut self) -> &mut T {
        self.core.shared.env().state()
    }

    /// The program counter.
    #[inline]
    pub fn pc(&self) -> u64 {
        self.core.shared.env().pc()
    }

    /// Sets the program counter.
    #[inline]
    pub fn set_pc(&mut self, pc: u64) {
        self.core.shared.env().set_pc(pc);
    }

    /// Guest-physical memory, for page walks.
    #[inline]
    pub fn phys(&self) -> Arc<PhysMemory> {
        Arc::clone(&self.core.phys)
    }

    /// The interrupt pins' levels, a bit each.
    #[inline]
    pub fn pins(&self) -> u64 {
        self.core.shared.pins()
    }

    /// Guest-virtual time in nanoseconds.
    #[inline]
    pub fn now(&self) -> u64 {
        self.core.clock.now()
    }

    /// Asks that [`crate::Guest::take_interrupt`] be called at `deadline` (guest-virtual
    /// nanoseconds) and a waiting vCPU be woken then; `None`: no longer. Replaces any earlier one.
    pub fn set_deadline(&mut self, deadline: Option<u64>) {
        self.core.set_deadline(deadline);
    }

    /// Asks that interrupts be looked at before long: a mask or enable changed.
    pub fn request_exit(&mut self) {
        self.core.shared.request(crate::shared::request::INTERRUPT);
    }

    /// The guest waits for an interrupt: the vCPU sleeps, once the region ends, until [`crate::Guest::wakes`].
    pub fn set_halted(&mut self, halted: bool) {
        self.core.halted = halted;
        if halted {
            self.core.shared.request(crate::shared::request::HALT);
        }
    }

    /// True while the vCPU waits for an interrupt.
    pub fn halted(&self) -> bool {
        self.core.halted
    }

    /// The modes changed (privilege, address space, FP enable): looks at [`crate::Guest::mode`] again.
    /// The region has to end behind the instruction that changed them.
    pub fn mode_changed(&mut self) {
        self.core.update_mode();
    }

    /// Forgets TLB entries of this vCPU.
    pub fn flush(&mut self, what: Flush) {
        self.core.flush(what);
    }

    /// Forgets TLB entries of all other vCPUs too; they have when their next safe point is past. For
    /// architectures that broadcast invalidation.
    pub fn flush_others(&mut self, what: Flush) {
        self.core.flush_others(what);
    }

    /// Fails the helper that is running: the runtime then raises `fault` at the instruction's pc.
    pub fn fail(&mut self, fault: Fault) {
        self.core.pending_fault = Some(fault);
    }

    /// Ends the VM's run: the vCPU can do no more (x86 triple fault).
    pub fn shut_down(&mut self) {
        self.core.stop = Some(crate::vcpu::Stop::Shutdown);
    }
}
