//! A vCPU as its guest architecture sees it.

use std::any::Any;
use std::sync::Arc;

use holdfast_tcg_ir::env::exit;
use holdfast_tcg_ir::helper::HelperRet;
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

use crate::guest::{Access, AccessKind, Fault, Flush, Mode};
use crate::phys::PhysMemory;
use crate::vcpu::VcpuCore;
use crate::wait::DOZE;

/// Access to one vCPU, given to [`crate::Guest`] methods and to helpers called from translated code.
#[derive(Debug)]
pub struct Cpu<'a> {
    pub(crate) core: &'a mut VcpuCore,
}

impl<'a> Cpu<'a> {
    #[inline]
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

    /// The pc of the instruction whose `goto_reg` was the last that had to be looked up. If the pc at hand cannot be fetched
    /// from, it is the one that went there, or the code ran on into it.
    pub fn branch_pc(&self) -> u64 {
        self.core.shared.env().branch_pc()
    }

    /// Guest-physical memory, for page walks.
    #[inline]
    pub fn phys(&self) -> Arc<PhysMemory> {
        Arc::clone(&self.core.phys)
    }

    /// [`Cpu::state`] and [`Cpu::phys`] at once.
    #[inline]
    pub fn state_and_phys<T: FromBytes + IntoBytes + KnownLayout>(&mut self) -> (&mut T, &PhysMemory) {
        (self.core.shared.env().state(), &self.core.phys)
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

    /// Has the instruction at the pc be the only one of its region, the next time it is run. For helpers that leave with
    /// [`exit::POLL`].
    pub fn run_alone(&mut self) {
        self.core.redo = true;
    }

    /// True if translated code is asked to leave: helpers that run for long return early then.
    pub fn exit_requested(&self) -> bool {
        self.core.shared.env().exit_request().load(std::sync::atomic::Ordering::Relaxed) != 0
    }

    /// True if stores of this vCPU took out translations since this was last asked: a helper that stores much leaves
    /// the region then ([`crate::GuestSpec::precise_code`]).
    #[inline]
    pub fn take_code_hit(&mut self) -> bool {
        std::mem::take(&mut self.core.code_hit)
    }

    /// The guest says that it spins. If it has for long, the vCPU sleeps for a moment, or until something is asked of
    /// it: the one that it waits for may need the host's CPU.
    pub fn spins(&mut self) {
        std::hint::spin_loop();
        if self.core.spin.hint(self.core.clock.now()) {
            self.core.shared.doze(DOZE);
            self.core.spin.slept(self.core.clock.now());
        }
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

    /// As [`Cpu::mode_changed`], for a guest that knows what [`crate::Guest::mode`] would say.
    #[inline]
    pub fn set_mode(&mut self, mode: Mode) {
        self.core.set_mode(mode);
    }

    /// The bits of [`Mode::key`] that are set in `changed` are others now, and nothing else of the mode is.
    #[inline]
    pub fn change_mode(&mut self, changed: u32) {
        self.core.change_mode(changed);
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

    /// The guest's floating-point rounding mode and sticky flags as the host's MXCSR has them. Valid in
    /// helpers with `Effects::USES_FP` and outside translated code.
    pub fn mxcsr(&self) -> u32 {
        self.core.shared.env().mxcsr()
    }

    /// Sets them; all exceptions stay masked.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.core.shared.env().set_mxcsr(value & 0xffc0 | 0x1f80 | value & 0x3f);
    }

    /// Loads `size` bytes (1, 2, 4 or 8; other sizes below 8 byte by byte) at a guest-virtual address, little-endian and
    /// zero-extended, as the guest would with `mmu_idx`. Helpers that call this need
    /// [`holdfast_tcg_ir::Effects::MAY_FLUSH`], as for all of the accesses below: devices may change mappings.
    ///
    /// # Errors
    /// The guest's exception.
    #[inline]
    pub fn load(&mut self, va: u64, size: u8, mmu_idx: u8) -> Result<u64, Fault> {
        self.core.helper_load(va, size, mmu_idx)
    }

    /// Stores the low `size` bytes (1, 2, 4 or 8) of `value` at a guest-virtual address. Nothing is written if any byte
    /// faults.
    ///
    /// # Errors
    /// The guest's exception.
    #[inline]
    pub fn store(&mut self, va: u64, size: u8, mmu_idx: u8, value: u64) -> Result<(), Fault> {
        self.core.helper_store(va, size, mmu_idx, value)
    }

    /// Host memory behind `len` bytes at a guest-virtual address, for bulk copies: valid for that access until the
    /// helper returns or makes another access to a device. `None` if it is a device, ROM or code to be written, or
    /// the range leaves the page: then it has to go through [`Cpu::load`] and [`Cpu::store`].
    ///
    /// # Errors
    /// The guest's exception.
    pub fn host_range(
        &mut self,
        va: u64,
        len: u64,
        kind: AccessKind,
        mmu_idx: u8,
    ) -> Result<Option<*mut u8>, Fault> {
        if len == 0 || va % holdfast_memory::PAGE_SIZE + len > holdfast_memory::PAGE_SIZE {
            return Ok(None);
        }
        self.core.host_range(&Access { gva: va, size: 1, kind, mmu_idx })
    }

    /// Host memory behind the rest of the page of a guest-virtual address, as for [`Cpu::host_range`], if the TLB has the page at
    /// hand. `None` says nothing of the address.
    #[inline]
    pub fn host_at_hand(&self, va: u64, write: bool, mmu_idx: u8) -> Option<*mut u8> {
        self.core.host_at_hand(va, write, mmu_idx)
    }

    /// Reads an I/O port: 1, 2 or 4 bytes; all ones if nothing is there.
    pub fn port_read(&mut self, port: u16, size: u8) -> u32 {
        self.core.port_read(port, size)
    }

    /// Writes an I/O port: 1, 2 or 4 bytes.
    pub fn port_write(&mut self, port: u16, size: u8, value: u32) {
        self.core.port_write(port, size, value);
    }

    /// The interrupt controller of this vCPU as [`crate::VmParts::controllers`] has it: the guest architecture knows
    /// its type.
    #[inline]
    pub fn controller(&self) -> Option<&Arc<dyn Any + Send + Sync>> {
        self.core.controller.as_ref()
    }

    /// Ends the VM's run: the vCPU can do no more (x86 triple fault).
    pub fn shut_down(&mut self) {
        self.core.stop = Some(crate::vcpu::Stop::Shutdown);
    }
}

/// Why a helper leaves the region instead of returning a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// An exception at the instruction that called it.
    Fault(Fault),
    /// One of [`holdfast_tcg_ir::env::exit`]'s codes. [`Cpu::set_pc`] says where to go on; it is the pc of the
    /// instruction itself otherwise.
    Exit(u32),
}

impl From<Fault> for Leave {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// What a helper that may fault gives.
pub type HelperResult = Result<u64, Leave>;

/// Runs `body` on the vCPU that `env` belongs to. For [`plain_helper!`] only.
///
/// # Safety
/// `env` is the environment pointer that translated code or the interpreter passed to a helper.
#[doc(hidden)]
#[inline]
pub unsafe fn enter_plain(env: *mut u8, body: impl FnOnce(&mut Cpu<'_>) -> u64) -> u64 {
    // SAFETY: by this function's contract; the vCPU's thread uses its core through no other reference while
    // translated code runs.
    let core = unsafe { VcpuCore::from_env(env) };
    body(&mut Cpu::new(core))
}

/// As [`enter_plain`] for helpers that may fault.
///
/// # Safety
/// As for [`enter_plain`].
#[doc(hidden)]
#[inline]
pub unsafe fn enter_faulting(env: *mut u8, body: impl FnOnce(&mut Cpu<'_>) -> HelperResult) -> HelperRet {
    // SAFETY: as in `enter_plain`.
    let core = unsafe { VcpuCore::from_env(env) };
    match body(&mut Cpu::new(core)) {
        Ok(value) => HelperRet::ok(value),
        Err(Leave::Exit(code)) => HelperRet::exit(code),
        // A watched access: the instruction is run again, alone.
        Err(Leave::Fault(_)) if std::mem::take(&mut core.again) => {
            core.redo = true;
            HelperRet::exit(exit::POLL)
        }
        Err(Leave::Fault(fault)) => {
            core.pending_fault = Some(fault);
            HelperRet::exit(exit::FAULT)
        }
    }
}

/// `plain_helper!(name, function)`: the C function `name` for a `HelperTable`, from a
/// `fn(&mut Cpu<'_>, args: [u64; 5]) -> u64`.
#[macro_export]
macro_rules! plain_helper {
    ($name:ident, $function:path) => {
        unsafe extern "C" fn $name(env: *mut u8, a: u64, b: u64, c: u64, d: u64, e: u64) -> u64 {
            // SAFETY: called by translated code or the interpreter, with their environment pointer.
            unsafe { $crate::enter_plain(env, |cpu| $function(cpu, [a, b, c, d, e])) }
        }
    };
}

/// `faulting_helper!(name, function)`: the C function `name` for a `HelperTable`, from a
/// `fn(&mut Cpu<'_>, args: [u64; 5]) -> HelperResult`.
#[macro_export]
macro_rules! faulting_helper {
    ($name:ident, $function:path) => {
        unsafe extern "C" fn $name(
            env: *mut u8,
            a: u64,
            b: u64,
            c: u64,
            d: u64,
            e: u64,
        ) -> $crate::ir::helper::HelperRet {
            // SAFETY: called by translated code or the interpreter, with their environment pointer.
            unsafe { $crate::enter_faulting(env, |cpu| $function(cpu, [a, b, c, d, e])) }
        }
    };
}
