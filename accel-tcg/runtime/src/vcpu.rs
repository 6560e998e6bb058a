//! One translated vCPU: the loop that runs it.

use std::any::Any;
use std::fmt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use holdfast_arch::{CpuModel, CpuState};
use holdfast_clock::{OwnAlarms, Timer, VmClock};
use holdfast_memory::PAGE_SIZE;
use holdfast_tcg_ir::env::exit;

use crate::cpu::Cpu;
use crate::debug::{Debug, Watchpoint};
use crate::engine::VcpuEngine;
use crate::env::EnvBox;
use crate::guest::{Access, AccessKind, Fault, Flush, Guest, Mode};
use crate::phys::{Io, PhysMemory};
use crate::shared::{VcpuShared, request};
use crate::table::{Key, NO_PAGE, Region};
use crate::tlb::{Tlb, count};
use crate::unshare::Retries;
use crate::vm::{RuntimeError, TcgVm};
use crate::wait::Spin;

/// Mode key bit of regions for single step.
pub(crate) const KEY_STEP: u32 = 1 << 31;

thread_local! {
    /// This thread is inside [`TcgVcpu::run`].
    pub(crate) static IN_RUN: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Why the vCPU's run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// [`VcpuShared::request`] with `KICK`.
    Kicked,
    /// The guest shut itself down by a fault.
    Shutdown,
    /// A breakpoint or single step; guest-virtual program counter.
    Debug(u64),
    /// The instruction before this guest-virtual program counter hit this watchpoint.
    Watch(u64, Watchpoint),
}

/// Everything of a vCPU but its `Env`.
pub(crate) struct VcpuCore {
    pub shared: Arc<VcpuShared>,
    pub vm: Arc<TcgVm>,
    pub guest: &'static dyn Guest,
    pub io: Arc<dyn Io>,
    pub phys: Arc<PhysMemory>,
    pub clock: Arc<VmClock>,
    pub timer: Timer,
    /// Alarms that were armed on this vCPU's thread.
    pub alarms: Arc<OwnAlarms>,
    /// What the timer was last set to.
    pub deadline: Option<u64>,
    pub tlb: Tlb,
    pub mode: Mode,
    pub key: u32,
    pub hot_side: usize,
    pub halted: bool,
    pub pending_fault: Option<Fault>,
    pub stop: Option<Stop>,
    /// The direct jump that led here: (region, link).
    pub from: Option<(u32, u32)>,
    pub engine: VcpuEngine,
    pub debug: Debug,
    /// The guest's spin hints.
    pub spin: Spin,
    /// The instruction at this pc stores to code or is watched: it is to be the only one of its region.
    pub alone: Option<u64>,
    /// The pc of the store of translated code under way.
    pub storing: Option<u64>,
    /// The access under way is not done: its instruction is run again, alone.
    pub again: bool,
    /// The instruction that runs next is to be the only one of its region.
    pub redo: bool,
    /// Translations were taken out by stores of this vCPU.
    pub code_hit: bool,
    /// What is translated does not run now: no address but that of its first page is known.
    pub ahead: bool,
    /// The vCPU has been out of its epoch in the middle of a translation: it has to pass a safe point before it runs
    /// code again, for others took it as past one.
    pub away: bool,
    /// What shared probes that cross pages cost.
    pub retries: Retries,
    /// Translations begun.
    pub translations: u32,
    /// When the last timed translation ended, and the thread's CPU time then, in nanoseconds.
    pub(crate) timed: (u64, u64),
    /// Why no code could be made.
    pub failure: Option<RuntimeError>,
    pub model: CpuModel,
    pub controller: Option<Arc<dyn Any + Send + Sync>>,
}

impl fmt::Debug for VcpuCore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuCore")
            .field("shared", &self.shared)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

/// What the loop does next.
enum Next {
    /// Enter this region.
    Enter(*const Region),
    /// Look again.
    Again,
    /// Return.
    Stop(Stop),
}

/// Start of the page behind that of `pc`.
fn next_page(pc: u64) -> u64 {
    (pc & !(PAGE_SIZE - 1)).wrapping_add(PAGE_SIZE)
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
            let owner = (*holdfast_tcg_ir::env::header(env)).owner.load(Ordering::Relaxed);
            &mut *ptr::with_exposed_provenance_mut::<Self>(owner as usize)
        }
    }

    pub fn set_deadline(&mut self, deadline: Option<u64>) {
        if self.deadline == deadline && deadline.is_none_or(|at| at > self.clock.now()) {
            return;
        }
        self.deadline = deadline;
        match deadline {
            Some(at) if at <= self.clock.now() => {
                self.timer.disarm();
                self.shared.request(request::INTERRUPT);
            }
            Some(at) => self.timer.arm(at),
            None => self.timer.disarm(),
        }
    }

    pub fn update_mode(&mut self) {
        let guest = self.guest;
        let mode = guest.mode(&mut Cpu::new(self));
        self.set_mode(mode);
    }

    #[inline]
    pub fn set_mode(&mut self, mode: Mode) {
        // Field by field, as it was written: one load of all of it would wait for the stores.
        self.mode.key = mode.key;
        self.mode.fetch_idx = mode.fetch_idx;
        self.mode.space = mode.space;
        self.key = mode.key | if self.debug.single_step { KEY_STEP } else { 0 };
        self.tlb.set_mode(self.shared.env(), mode, self.key, &self.shared.counts.tlb);
        debug_assert!(self.mode_is_right());
    }

    #[inline]
    pub fn change_mode(&mut self, changed: u32) {
        self.mode.key ^= changed;
        self.key ^= changed;
        self.tlb.set_key(self.shared.env(), self.key);
        debug_assert!(self.mode_is_right());
    }

    /// The guest would say the same.
    fn mode_is_right(&mut self) -> bool {
        let guest = self.guest;
        guest.mode(&mut Cpu::new(self)) == self.mode
    }

    pub fn flush(&mut self, what: Flush) {
        self.tlb.flush(self.shared.env(), what, &self.shared.counts.tlb);
    }

    pub fn flush_others(&mut self, what: Flush) {
        self.vm.flush_others(self.shared.index(), what);
    }

    fn raise(&mut self, fault: &Fault) {
        count(&self.shared.counts.faults);
        let guest = self.guest;
        let pc = self.shared.env().pc();
        guest.raise(&mut Cpu::new(self), fault);
        if let Some(log) = self.vm.log.get() {
            log.event(self.shared.index(), pc, Some(fault), self.shared.env().pc());
        }
        self.update_mode();
    }

    fn take_interrupt(&mut self) {
        if self.holds_interrupts() {
            self.shared.request(request::INTERRUPT);
            return self.update_mode();
        }
        self.take_any_interrupt();
    }

    /// As [`VcpuCore::take_interrupt`], for one that ended a wait, whatever the debugger says.
    fn take_any_interrupt(&mut self) {
        let guest = self.guest;
        let pc = self.shared.env().pc();
        if guest.take_interrupt(&mut Cpu::new(self)) {
            if let Some(log) = self.vm.log.get() {
                log.event(self.shared.index(), pc, None, self.shared.env().pc());
            }
            count(&self.shared.counts.interrupts);
            self.halted = false;
            self.from = None;
        }
        self.update_mode();
    }

    /// Takes over new mappings, with an empty TLB.
    pub(crate) fn remap(&mut self) {
        let shared = Arc::clone(&self.shared);
        self.phys = self.vm.phys();
        self.hot_side = self.vm.hot_side.load(Ordering::SeqCst);
        let _entering = shared.tlb_lock.lock();
        self.tlb.reset(shared.env(), &shared.counts.tlb);
    }

    /// Forgets regions that were taken out.
    fn forget_killed(&mut self) {
        let shared = Arc::clone(&self.shared);
        match shared.take_killed() {
            Some(killed) => self.tlb.forget_regions(shared.env(), &killed, &shared.counts.tlb),
            None => self.tlb.forget_links(shared.env(), &shared.counts.tlb),
        }
    }

    /// Serves what other threads asked for. Holds no region.
    fn serve(&mut self) -> Option<Stop> {
        let mut what = self.shared.take_requests();
        while what & request::ALARM != 0 {
            self.alarms.fire_due();
            what = what & !request::ALARM | self.shared.take_requests();
        }
        let shared = Arc::clone(&self.shared);
        if what & request::REMAP != 0 {
            self.remap();
        }
        if what & request::INVALIDATE != 0 {
            self.forget_killed();
            self.from = None;
        }
        if what & request::WORK != 0 {
            for flush in shared.take_flushes() {
                self.flush(flush);
            }
        }
        if what & request::KICK != 0 {
            // Whatever else was asked is looked at in the next run.
            shared.request(what & request::INTERRUPT);
            return Some(Stop::Kicked);
        }
        if what & request::INTERRUPT != 0 {
            self.take_interrupt();
        }
        None
    }

    /// A safe point: requests, interrupts, sleep.
    fn safe_point(&mut self) -> Option<Stop> {
        let index = self.shared.index();
        loop {
            self.vm.regions.epochs.enter(index);
            if (self.shared.requested() || self.shared.env().exit_request().load(Ordering::Relaxed) != 0)
                && let Some(stop) = self.serve()
            {
                return Some(stop);
            }
            if let Some(stop) = self.stop.take() {
                return Some(stop);
            }
            if !self.halted {
                return None;
            }
            let guest = self.guest;
            if guest.wakes(&mut Cpu::new(self)) {
                self.halted = false;
                self.take_any_interrupt();
                continue;
            }
            count(&self.shared.counts.sleeps);
            self.vm.regions.epochs.leave(index);
            self.shared.sleep();
        }
    }

    /// Guest-physical address of the code at `pc`.
    pub(crate) fn fetch(&mut self, pc: u64) -> Result<u64, Fault> {
        let idx = self.mode.fetch_idx;
        if let Some(entry) = self.tlb.code(pc, idx) {
            return Ok(entry.gpa | pc & (PAGE_SIZE - 1));
        }
        let guest = self.guest;
        let size = guest.spec().insn_align;
        let access = Access { gva: pc, size, kind: AccessKind::Fetch, mmu_idx: idx };
        let t = guest.fill(&mut Cpu::new(self), &access)?;
        if t.cacheable {
            self.tlb.set_code(pc, idx, &t);
        }
        Ok(t.gpa)
    }

    /// True if the second page of `region`, if it has one, is still mapped where it was.
    fn second_fits(&mut self, region: &Region) -> Result<bool, Fault> {
        if region.second == NO_PAGE {
            return Ok(true);
        }
        Ok(self.fetch(next_page(region.key.pc))? / PAGE_SIZE == region.second)
    }

    /// Makes `region` known to indirect jumps and guarded links.
    fn remember(&mut self, region: &Region) {
        self.shared.recent.note(region.id);
        if !region.chain || region.entry() == 0 {
            return;
        }
        let (env, pc, idx) = (self.shared.env(), region.key.pc, self.mode.fetch_idx);
        let two = region.second != NO_PAGE;
        let Some(first) = self.tlb.code(pc, idx) else { return };
        let global = first.global && (!two || self.tlb.code(next_page(pc), idx).is_some_and(|e| e.global));
        self.tlb.remember_branch(env, pc, region.entry(), (two, global));
        // The filter of flushes that the line above feeds covers the mapping id too.
        self.tlb.set_page_id(env, pc, region.page_id);
    }

    /// For indirect jumps in translated code: the code at `pc`, 0 if there is none yet.
    pub(crate) fn lookup(&mut self, pc: u64) -> u64 {
        count(&self.shared.counts.lookups);
        if self.key & KEY_STEP != 0 || self.shared.requested() {
            return 0;
        }
        let Ok(phys) = self.fetch(pc) else { return 0 };
        // SAFETY: this thread entered an epoch before it entered translated code.
        let Some(region) = (unsafe { self.vm.regions.find(&Key { phys, pc, mode: self.key }) }) else {
            return 0;
        };
        if !region.chain || !matches!(self.second_fits(region), Ok(true)) {
            return 0;
        }
        self.remember(region);
        region.entry()
    }

    fn next(&mut self) -> Next {
        if let Some(stop) = self.safe_point() {
            return Next::Stop(stop);
        }
        let pc = self.shared.env().pc();
        if !self.debug.breakpoints.is_empty() && self.breaks(pc) {
            return Next::Stop(Stop::Debug(pc));
        }
        match self.region_at(pc) {
            Ok(Some(region)) => Next::Enter(region),
            Ok(None) => Next::Again,
            Err(fault) => {
                self.from = None;
                self.raise(&fault);
                if self.debug.single_step {
                    Next::Stop(Stop::Debug(self.shared.env().pc()))
                } else {
                    Next::Again
                }
            }
        }
    }

    /// The region to enter at `pc`; `None` to start over.
    fn region_at(&mut self, pc: u64) -> Result<Option<*const Region>, Fault> {
        let from = self.from.take();
        let phys = self.fetch(pc)?;
        if self.key & KEY_STEP != 0 || std::mem::take(&mut self.redo) {
            self.alone = Some(pc);
        } else if self.alone != Some(pc) {
            self.alone = None;
        }
        let mode = if self.alone.is_some() { self.key | KEY_STEP } else { self.key };
        let key = Key { phys, pc, mode };
        // SAFETY: `safe_point` entered an epoch and nothing has left it since.
        let region = match unsafe { self.vm.regions.find(&key) } {
            Some(region) => region,
            None => match self.translate(key)? {
                // SAFETY: published regions live until every vCPU has passed a safe point.
                Some(region) => unsafe { &*region },
                None => return Ok(None),
            },
        };
        if !self.second_fits(region)? {
            // Mapped elsewhere by now: this translation serves nobody here.
            self.vm.code_written(region.key.phys, 1);
            return Ok(None);
        }
        self.remember(region);
        if let Some((source, link)) = from
            && self.vm.regions.link(source, link, region)
        {
            count(&self.shared.counts.links);
        }
        Ok(Some(region))
    }

    /// Acts on why translated code was left.
    fn left(&mut self, code: u32) -> Result<(), RuntimeError> {
        match code {
            exit::POLL | exit::LOOKUP | exit::NONE => {}
            exit::LINK => {
                let arg = self.shared.env().exit_arg();
                self.from = Some(((arg >> 32) as u32, arg as u32));
            }
            exit::FAULT => match self.pending_fault.take() {
                Some(fault) => self.raise(&fault),
                None => return Err(RuntimeError::Exit { code, pc: self.shared.env().pc() }),
            },
            exit::HALT => {
                self.halted = true;
                self.update_mode();
            }
            exit::RESUME => self.take_interrupt(),
            code => return Err(RuntimeError::Exit { code, pc: self.shared.env().pc() }),
        }
        Ok(())
    }
}

/// A translated vCPU. It is made on any thread and then lives on one.
pub struct TcgVcpu {
    core: Box<VcpuCore>,
}

impl fmt::Debug for TcgVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.core.fmt(f)
    }
}

impl TcgVcpu {
    /// Makes vCPU `index` in its reset state.
    ///
    /// # Errors
    /// [`RuntimeError`].
    pub fn new(vm: &Arc<TcgVm>, index: u32, model: &CpuModel) -> Result<Self, RuntimeError> {
        let spec = vm.guest.spec();
        let env = EnvBox::new(spec.state_size).map_err(|e| RuntimeError::Memory("a vCPU", e))?;
        let shared = VcpuShared::new(index, env);
        vm.add_vcpu(&shared)?;
        let waker = Arc::downgrade(&shared);
        let timer = vm.timers.vcpu_timer(move || {
            if let Some(shared) = waker.upgrade() {
                shared.request(request::INTERRUPT);
            }
        });
        let core = Box::new(VcpuCore {
            engine: vm.engine.vcpu(vm.guest)?,
            guest: vm.guest,
            io: Arc::clone(&vm.io),
            phys: vm.phys(),
            clock: Arc::clone(&vm.clock),
            timer,
            alarms: OwnAlarms::new(&vm.clock),
            deadline: None,
            tlb: Tlb::new(spec.ir.pc_shift),
            mode: Mode::default(),
            key: 0,
            hot_side: vm.hot_side.load(Ordering::SeqCst),
            halted: false,
            pending_fault: None,
            stop: None,
            from: None,
            debug: Debug::default(),
            spin: Spin::default(),
            alone: None,
            storing: None,
            again: false,
            redo: false,
            code_hit: false,
            ahead: false,
            away: false,
            retries: Retries::default(),
            translations: 0,
            timed: (0, 0),
            failure: None,
            model: model.clone(),
            controller: vm.controllers.get(index as usize).cloned(),
            vm: Arc::clone(vm),
            shared,
        });
        let mut this = Self { core };
        let owner = ptr::from_mut(&mut *this.core).expose_provenance() as u64;
        this.core.shared.env().set_owner(owner);
        // Mappings may have changed since they were read above.
        this.core.shared.request(request::REMAP);
        this.reset()?;
        Ok(this)
    }

    /// What other threads use of it.
    pub fn shared(&self) -> &Arc<VcpuShared> {
        &self.core.shared
    }

    /// Runs guest code until something needs the caller.
    ///
    /// # Errors
    /// [`RuntimeError::Exit`] if translated code left in a way that nobody knows: a bug.
    pub fn run(&mut self) -> Result<Stop, RuntimeError> {
        IN_RUN.set(true);
        let (alarms, shared) = (Arc::clone(&self.core.alarms), Arc::clone(&self.core.shared));
        let result = alarms.keep_while(&*shared, || self.run_inner());
        IN_RUN.set(false);
        self.core.vm.regions.epochs.leave(self.core.shared.index());
        result
    }

    fn run_inner(&mut self) -> Result<Stop, RuntimeError> {
        let env = self.core.shared.env().ptr();
        loop {
            let region = match self.core.next() {
                Next::Enter(region) => region,
                Next::Again => match self.core.failure.take() {
                    Some(e) => return Err(e),
                    None => continue,
                },
                Next::Stop(stop) => {
                    if let Stop::Debug(pc) = stop {
                        self.core.debug.passed = Some(pc);
                    }
                    return Ok(stop);
                }
            };
            count(&self.core.shared.counts.entries);
            let stepping = self.core.debug.single_step;
            self.core.debug.in_code = true;
            // SAFETY: the region is alive for this epoch; helpers and slow paths reach the core through its
            // owner pointer, while this function uses it through `self` only before and after.
            let code = unsafe { VcpuEngine::enter(&raw mut self.core.engine, env, region) };
            self.core.debug.in_code = false;
            self.core.left(code)?;
            if let Some(hit) = self.core.debug.hit.take() {
                return Ok(Stop::Watch(self.core.shared.env().pc(), hit));
            }
            if stepping {
                return Ok(Stop::Debug(self.core.shared.env().pc()));
            }
        }
    }

    /// Back to the reset state.
    ///
    /// # Errors
    /// [`RuntimeError::Model`].
    pub fn reset(&mut self) -> Result<(), RuntimeError> {
        let core = &mut *self.core;
        core.halted = false;
        core.pending_fault = None;
        core.stop = None;
        core.from = None;
        core.set_deadline(None);
        let (guest, model) = (core.guest, core.model.clone());
        guest.reset(&mut Cpu::new(core), &model).map_err(RuntimeError::Model)?;
        self.state_changed();
        Ok(())
    }

    fn state_changed(&mut self) {
        self.core.update_mode();
        self.core.flush(Flush::All);
        self.core.shared.request(request::INTERRUPT);
    }

    /// The architectural state.
    pub fn export(&mut self) -> CpuState {
        let guest = self.core.guest;
        guest.export(&mut Cpu::new(&mut self.core))
    }

    /// Replaces the architectural state.
    ///
    /// # Errors
    /// [`RuntimeError::State`].
    pub fn import(&mut self, state: &CpuState) -> Result<(), RuntimeError> {
        let core = &mut *self.core;
        core.pending_fault = None;
        core.from = None;
        // A breakpoint under the new pc counts again.
        core.debug.passed = None;
        let guest = core.guest;
        guest.import(&mut Cpu::new(core), state).map_err(RuntimeError::State)?;
        self.state_changed();
        Ok(())
    }

    /// Text of all registers.
    pub fn describe(&mut self) -> String {
        let guest = self.core.guest;
        guest.describe(&mut Cpu::new(&mut self.core))
    }

    /// Guest-virtual to guest-physical for a debugger.
    pub fn probe(&mut self, gva: u64) -> Option<u64> {
        let guest = self.core.guest;
        guest.probe(&mut Cpu::new(&mut self.core), gva)
    }

    pub(crate) fn core(&mut self) -> &mut VcpuCore {
        &mut self.core
    }
}
