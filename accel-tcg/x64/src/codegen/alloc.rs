//! Registers, homes and spill slots of values.

mod calls;

use super::Cx;
use crate::asm::{Mem, Reg, Rm, Xmm};
use crate::stubs::{PIN_REGS, SPILLS, TEMPS};
use crate::{CodegenError, asm::Alu};
use holdfast_tcg_ir::types::SLOT_INDEXES;
use holdfast_tcg_ir::{Inst, Op, Slot, Type, Val};

const NONE: u8 = 0xff;
const NO_VALUE: u32 = u32::MAX;
const NO_HOME: u32 = u32::MAX;
/// In place of a value: the register holds the TLB addend of a [`Page`].
const PAGE: u32 = u32::MAX - 1;
/// Vector registers that values may live in.
const XMM_VALUES: u8 = 14;
/// Scratch vector register.
pub(crate) const XT0: Xmm = Xmm(14);

/// Where a value is.
#[derive(Clone, Copy)]
struct Place {
    /// General register 0-15 or vector register 16-31.
    reg: u8,
    spill: u8,
    home: u32,
}

/// A host page that a probe has found, good for further accesses to `base + lo .. base + hi` in this block. The register
/// holds the addend, or 0 after any slow path, which may have changed the TLB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Page {
    pub(crate) base: Val,
    pub(crate) mmu_idx: usize,
    /// Found in the write array, so good for loads too.
    pub(crate) write: bool,
    pub(crate) lo: i32,
    pub(crate) hi: i32,
    pub(crate) reg: Reg,
    /// The last instruction that will use it.
    pub(crate) last: u32,
}

const NOWHERE: Place = Place { reg: NONE, spill: NONE, home: NO_HOME };

/// The allocator's state.
pub(crate) struct Alloc {
    places: Vec<Place>,
    /// The value in each register (for a pin: the value that the slot has).
    occ: [u32; 32],
    /// The registers that have one, as a bit mask; some may be dead.
    used: u32,
    /// The last instruction that needs what is in each register, 0 for none; of pins nothing is said.
    needed: [u32; 32],
    /// Registers that the current instruction needs, as a bit mask.
    pub(crate) locked: u32,
    /// The carriers of the loop at hand, as a bit mask.
    pub(crate) reserved: u32,
    /// Values homed in unpinned slots, direct mapped by [`Slot::index`]: (offset, value).
    homes: [(u32, u32); SLOT_INDEXES],
    spills: u64,
    /// The values in them; some may be dead.
    spilled: [u32; SPILLS],
    /// Pages found in this block.
    pages: [Option<Page>; 3],
    /// Their registers, as a bit mask.
    page_regs: u32,
}

impl Default for Alloc {
    fn default() -> Self {
        Self {
            places: Vec::new(),
            occ: [NO_VALUE; 32],
            used: 0,
            needed: [0; 32],
            locked: 0,
            reserved: 0,
            homes: [(NO_HOME, 0); SLOT_INDEXES],
            spills: 0,
            spilled: [0; SPILLS],
            pages: [None; 3],
            page_regs: 0,
        }
    }
}

impl Alloc {
    pub(crate) fn start(&mut self, n: usize) {
        self.places.clear();
        self.places.resize(n, NOWHERE);
        self.homes = [(NO_HOME, 0); SLOT_INDEXES];
        self.forget_all();
    }

    /// Values are dead: at labels. Homes of dead values do no harm.
    pub(crate) fn forget_all(&mut self) {
        self.occ = [NO_VALUE; 32];
        self.needed = [0; 32];
        (self.used, self.locked) = (0, 0);
        self.spills = 0;
        self.pages = [None; 3];
        self.page_regs = 0;
    }

    /// Register `reg` has value `v`, which instruction `needed` uses last.
    #[inline]
    fn occupy(&mut self, reg: u8, v: u32, needed: u32) {
        self.occ[usize::from(reg & 31)] = v;
        self.needed[usize::from(reg & 31)] = needed;
        self.used |= 1 << (reg & 31);
    }

    /// Register `reg` has no value.
    #[inline]
    fn vacate(&mut self, reg: u8) {
        self.occ[usize::from(reg & 31)] = NO_VALUE;
        self.needed[usize::from(reg & 31)] = 0;
        self.used &= !(1 << (reg & 31));
    }

    /// The temporaries whose values instruction `at` or a later one needs, as a bit mask.
    #[inline]
    fn busy_temps(&self, at: u32) -> u32 {
        TEMPS.iter().fold(0, |mask, t| {
            let r = usize::from(t.0 & 31);
            mask | u32::from(self.needed[r] >= at) << r
        })
    }

    /// The same of vector registers.
    fn busy_xmms(&self, at: u32) -> u32 {
        let values = 16..16 + usize::from(XMM_VALUES);
        values
            .filter(|r| self.used >> r & 1 != 0 && self.needed[*r & 31] >= at)
            .fold(0, |mask, r| mask | 1 << r)
    }

    /// Forgets the page in register `reg`, if there is one, and empties the register.
    pub(crate) fn drop_page(&mut self, reg: Reg) {
        if self.page_regs >> reg.0 & 1 == 0 {
            return;
        }
        for p in &mut self.pages {
            if p.is_some_and(|p| p.reg == reg) {
                *p = None;
            }
        }
        self.page_regs &= !(1 << reg.0);
        if self.occ[usize::from(reg.0)] == PAGE {
            self.vacate(reg.0);
        }
    }

    /// Remembers a page whose addend is in `page.reg`, a temporary that nothing else uses.
    pub(crate) fn add_page(&mut self, page: Page) {
        // The oldest goes when there is no room.
        if self.pages.iter().all(|p| p.is_some())
            && let Some(old) = self.pages[0]
        {
            self.drop_page(old.reg);
            self.pages.rotate_left(1);
        }
        if let Some(p) = self.pages.iter_mut().find(|p| p.is_none()) {
            *p = Some(page);
            self.page_regs |= 1 << page.reg.0;
            self.occupy(page.reg.0, PAGE, u32::MAX);
        }
    }

    /// The pages remembered.
    pub(crate) fn pages(&self) -> impl Iterator<Item = Page> + '_ {
        self.pages.iter().flatten().copied()
    }

    /// The registers with their addends, as a bit mask.
    pub(crate) fn page_regs(&self) -> u32 {
        self.page_regs
    }

    /// Whether any vector register holds a value that instruction `at` or a later one needs.
    pub(crate) fn xmm_in_use(&self, at: u32) -> bool {
        self.reserved != 0 || self.used >> 16 != 0 && self.busy_xmms(at) != 0
    }

    #[inline]
    fn lock(&mut self, reg: u8) {
        self.locked |= 1 << reg;
    }
}

/// The registers of pins, as a mask.
const PINS: u32 = {
    let (mut mask, mut n) = (0, 0);
    while n < PIN_REGS.len() {
        mask |= 1 << PIN_REGS[n].0;
        n += 1;
    }
    mask
};

/// The temporaries, as a mask.
const TEMP_MASK: u32 = {
    let (mut mask, mut n) = (0, 0);
    while n < TEMPS.len() {
        mask |= 1 << TEMPS[n].0;
        n += 1;
    }
    mask
};

/// The vector registers that values may live in, as a mask.
const XMM_MASK: u32 = ((1 << XMM_VALUES) - 1) << 16;

#[inline]
fn is_pin(reg: u8) -> bool {
    reg < 16 && PINS >> reg & 1 != 0
}

/// The bits of a spilled value in [`Alloc::spills`].
fn spill_bits(n: u8, wide: bool) -> u64 {
    (if wide { 3 } else { 1 }) << (n & 63)
}

/// The first free spill slot, or two slots, by the bit mask of those taken.
fn free_spill(taken: u64, wide: bool) -> Option<usize> {
    let taken = if wide { taken | taken >> 1 | 1 << (SPILLS - 1) } else { taken };
    let n = taken.trailing_ones() as usize;
    (n < SPILLS).then_some(n)
}

/// Spill slot `n`.
fn spill_mem(n: u8) -> Mem {
    Mem::base(Reg::RSP, i32::from(n) * 8)
}

impl Cx<'_> {
    /// The constant that `v` is.
    #[inline]
    pub(crate) fn konst(&self, v: Val) -> Option<u64> {
        let d = self.r.def(self.st.an.root(v));
        (d.op == Op::Const).then(|| d.imm())
    }

    /// `v` as an immediate of an instruction of the given width.
    pub(crate) fn imm32(&self, v: Val, w: bool) -> Option<i32> {
        let c = self.konst(v)?;
        if w { i32::try_from(c as i64).ok() } else { Some(c as i32) }
    }

    /// Whether `v` is used after the current instruction.
    #[inline]
    pub(crate) fn lives_on(&self, v: Val) -> bool {
        self.st.an.last_use(self.st.an.root(v)) > self.at
    }

    /// The general register that holds `v` now.
    #[inline]
    pub(crate) fn reg_of(&self, v: Val) -> Option<Reg> {
        let p = self.st.al.places[self.st.an.root(v).index()];
        (p.reg < 16).then_some(Reg(p.reg))
    }

    fn xmm_of(&self, v: Val) -> Option<Xmm> {
        let p = self.st.al.places[self.st.an.root(v).index()];
        (16..32).contains(&p.reg).then(|| Xmm(p.reg - 16))
    }

    /// The register that is given away when none is free: one that need not be stored, if there is, then one whose value is
    /// used latest.
    #[cold]
    fn victim(&mut self, temps: impl Iterator<Item = u8>) -> u8 {
        let al = &self.st.al;
        let cost = |r: u8| {
            let v = Val(al.occ[usize::from(r)]);
            if v.0 == PAGE {
                return (true, u32::MAX);
            }
            let p = al.places[v.index()];
            let cheap = p.spill != NONE || p.home != NO_HOME || self.konst(v).is_some();
            (cheap, self.st.an.last_use(v))
        };
        let victim = temps.filter(|r| (al.locked | al.reserved) >> *r & 1 == 0).max_by_key(|r| cost(*r));
        let Some(r) = victim else {
            self.error = Some(CodegenError::TooLong(self.r.insts.len()));
            return 0;
        };
        self.evict(r);
        r
    }

    /// A free temporary, locked until the end of the instruction.
    pub(crate) fn temp(&mut self) -> Reg {
        // RDI, RSI, RDX, RCX, RAX: the one of the highest number that is free.
        let free = TEMP_MASK & !(self.st.al.locked | self.st.al.busy_temps(self.at));
        let r = match free.checked_ilog2() {
            Some(r) => r as u8,
            None => self.victim(TEMPS.iter().rev().map(|r| r.0)),
        };
        self.st.al.lock(r);
        Reg(r)
    }

    /// A free vector register, locked.
    pub(crate) fn xtemp(&mut self) -> Xmm {
        let kept = self.st.al.locked | self.st.al.reserved;
        let free = XMM_MASK & !(kept | self.st.al.busy_xmms(self.at));
        let r = if free != 0 { free.trailing_zeros() as u8 } else { self.victim(16..16 + XMM_VALUES) };
        self.st.al.lock(r);
        Xmm(r.wrapping_sub(16) & 15)
    }

    /// Makes sure the value of register `r` survives somewhere else, and empties it.
    fn evict(&mut self, r: u8) {
        let v = self.st.al.occ[usize::from(r)];
        if v == NO_VALUE {
            return;
        }
        if v == PAGE {
            return self.st.al.drop_page(Reg(r));
        }
        let live = self.st.an.last_use(Val(v)) >= self.at;
        let p = self.st.al.places[v as usize];
        if live && p.spill == NONE && p.home == NO_HOME && self.konst(Val(v)).is_none() {
            self.spill(Val(v));
        }
        self.st.al.places[v as usize].reg = NONE;
        self.st.al.vacate(r);
    }

    /// Stores root `v` from its register to a spill slot.
    fn spill(&mut self, v: Val) {
        // A vector takes two slots next to each other.
        let wide = self.r.ty(v) == Type::V128;
        let mut n = free_spill(self.st.al.spills, wide);
        if n.is_none() {
            self.reclaim_spills();
            n = free_spill(self.st.al.spills, wide);
        }
        let Some(n) = n else {
            self.error = Some(CodegenError::TooLong(self.r.insts.len()));
            return;
        };
        self.st.al.spills |= spill_bits(n as u8, wide);
        for slot in self.st.al.spilled.iter_mut().skip(n).take(if wide { 2 } else { 1 }) {
            *slot = v.0;
        }
        let p = &mut self.st.al.places[v.index()];
        p.spill = n as u8;
        let reg = p.reg;
        if wide {
            self.st.asm.movups_store(spill_mem(n as u8), Xmm(reg.wrapping_sub(16) & 15));
        } else if reg < 16 {
            self.st.asm.store(3, spill_mem(n as u8), Reg(reg));
        } else {
            self.st.asm.fstore(true, spill_mem(n as u8), Xmm(reg.wrapping_sub(16) & 15));
        }
    }

    /// Frees the spill slots of values that are dead.
    #[cold]
    fn reclaim_spills(&mut self) {
        let al = &mut self.st.al;
        for (n, v) in al.spilled.iter().enumerate() {
            if self.st.an.last_use(Val(*v)) < self.at {
                al.spills &= !(1 << n);
            }
        }
    }

    /// Takes temporary `r` for a fixed use: its value moves away. Locks it.
    pub(crate) fn take(&mut self, r: Reg) {
        let v = self.st.al.occ[usize::from(r.0)];
        self.st.al.lock(r.0);
        if v == NO_VALUE {
            return;
        }
        if v == PAGE {
            return self.st.al.drop_page(r);
        }
        let al = &self.st.al;
        let free = TEMP_MASK & !(al.locked | al.busy_temps(self.at));
        let other = (free != 0).then(|| Reg(free.trailing_zeros() as u8));
        match other {
            Some(t) if self.st.an.last_use(Val(v)) >= self.at && self.konst(Val(v)).is_none() => {
                self.st.asm.mov(true, t, r);
                self.st.al.vacate(r.0);
                self.bind(Val(v), t.0);
            }
            _ => self.evict(r.0),
        }
    }

    fn bind(&mut self, v: Val, reg: u8) {
        self.st.al.places[v.index()].reg = reg;
        // What the current instruction defines is not to be overwritten by it, even if nobody reads it.
        let needed = self.st.an.last_use(v).max(self.at);
        self.st.al.occupy(reg, v.0, needed);
    }

    /// `v` in a general register, which is locked. Do not write it.
    pub(crate) fn gpr(&mut self, v: Val) -> Reg {
        let v = self.st.an.root(v);
        if let Some(r) = self.reg_of(v) {
            self.st.al.lock(r.0);
            return r;
        }
        let t = self.temp();
        self.load_into(t, v);
        self.bind(v, t.0);
        t
    }

    /// Emits the move of root `v` (not in a general register) to `d`.
    fn load_into(&mut self, d: Reg, v: Val) {
        let p = self.st.al.places[v.index()];
        if let Some(c) = self.konst(v) {
            self.st.asm.mov_imm(d, c);
        } else if p.reg != NONE {
            self.st.asm.mov_from_xmm(self.r.ty(v).bytes() == 8, d, Xmm(p.reg - 16));
        } else if p.home != NO_HOME {
            self.st.asm.mov(self.r.ty(v).bytes() == 8, d, Mem::env(p.home as i32));
        } else {
            debug_assert!(p.spill != NONE, "v{} has no place at {}:\n{}", v.0, self.at, self.r);
            self.st.asm.mov(self.r.ty(v) != Type::F32, d, spill_mem(p.spill));
        }
    }

    /// Copies `v` to general register `d` (locked by the caller), without changing where `v` lives.
    pub(crate) fn copy_to(&mut self, d: Reg, v: Val) {
        let v = self.st.an.root(v);
        match self.reg_of(v) {
            Some(r) if r == d => {}
            Some(r) => self.st.asm.mov(true, d, r),
            None => self.load_into(d, v),
        }
    }

    /// `v` as a register or memory operand of `bytes` (4 or 8). A register is locked.
    pub(crate) fn rm(&mut self, v: Val, bytes: u32) -> Rm {
        let v = self.st.an.root(v);
        if self.reg_of(v).is_none()
            && self.xmm_of(v).is_none()
            && self.konst(v).is_none()
            && self.st.an.last_use(v) == self.at
        {
            let p = self.st.al.places[v.index()];
            if p.home != NO_HOME && self.r.ty(v).bytes() >= bytes {
                return Mem::env(p.home as i32).into();
            }
            if p.home == NO_HOME && p.spill != NONE {
                return spill_mem(p.spill).into();
            }
        }
        self.gpr(v).into()
    }

    /// A vector value as a register, locked.
    pub(crate) fn xmm(&mut self, v: Val) -> Xmm {
        let v = self.st.an.root(v);
        if let Some(x) = self.xmm_of(v) {
            self.st.al.lock(x.0 + 16);
            return x;
        }
        let d = self.xtemp();
        self.load_xmm(d, v);
        self.bind(v, d.0 + 16);
        d
    }

    fn load_xmm(&mut self, d: Xmm, v: Val) {
        let double = self.r.ty(v).bytes() >= 8;
        let p = self.st.al.places[v.index()];
        match self.konst(v) {
            Some(0) => self.st.asm.sse(0, 0x57, d, d),
            Some(c) => {
                let t = self.temp();
                self.st.asm.mov_imm(t, c);
                self.st.asm.mov_to_xmm(double, d, t);
            }
            None if self.r.ty(v) == Type::V128 => {
                let home = p.home != NO_HOME;
                let m = if home { Mem::env(p.home as i32) } else { spill_mem(p.spill & 63) };
                self.st.asm.movups(d, m);
            }
            None if p.home != NO_HOME => self.st.asm.fload(double, d, Mem::env(p.home as i32)),
            None => self.st.asm.fload(true, d, spill_mem(p.spill & 63)),
        }
    }

    /// Copies vector value `v` to `d` without changing where it lives.
    pub(crate) fn copy_to_xmm(&mut self, d: Xmm, v: Val) {
        let v = self.st.an.root(v);
        match self.xmm_of(v) {
            Some(x) => self.st.asm.movaps(d, x),
            None => self.load_xmm(d, v),
        }
    }

    /// Vector value `v` as a register or memory operand (of its own size).
    pub(crate) fn xrm(&mut self, v: Val) -> Rm {
        let v = self.st.an.root(v);
        if self.xmm_of(v).is_none() && self.konst(v).is_none() && self.st.an.last_use(v) == self.at {
            let p = self.st.al.places[v.index()];
            if p.home != NO_HOME {
                return Mem::env(p.home as i32).into();
            }
        }
        self.xmm(v).into()
    }

    /// The unpinned slot that holds `v` while no register does.
    pub(crate) fn home_only(&self, v: Val) -> Option<Mem> {
        let p = self.st.al.places[self.st.an.root(v).index()];
        (p.reg == NONE && p.home != NO_HOME).then(|| Mem::env(p.home as i32))
    }

    // ---- results ----

    /// The pin that the current result should be computed into: the slot that one of the next instructions sets to it,
    /// when nothing in between can see the slot and the old value is not needed any more.
    pub(crate) fn hinted(&self) -> Option<Reg> {
        let mut me = self.at;
        let first = self.at as usize + 1;
        for at in first..first + 6 {
            let i = self.r.insts.get(at)?;
            let n = at as u32;
            match i.op {
                _ if self.st.an.is_dead(n) || self.st.an.is_alias(n) => {}
                Op::Const => {}
                Op::SetSlot if self.st.an.root(Val(i.b)).0 == me => {
                    let p = self.pin_of(i.a)?;
                    let old = self.st.al.occ[usize::from(p.0)];
                    let free = old == NO_VALUE || !self.lives_on(Val(old)) || old == me;
                    return free.then_some(p);
                }
                Op::SExt if self.st.an.root(Val(i.a)).0 == me && self.st.an.last_use(Val(me)) == n => me = n,
                _ => return None,
            }
        }
        None
    }

    /// Register for the result of the current instruction, to be computed from scratch (operands that die do not share
    /// it unless `reuse` says which may). Locked and bound by [`Cx::define`].
    pub(crate) fn dest(&mut self, reuse: Option<Val>) -> Reg {
        if let Some(p) = self.hinted() {
            self.st.al.lock(p.0);
            return p;
        }
        if let Some(v) = reuse.map(|v| self.st.an.root(v))
            && !self.lives_on(v)
            && let Some(r) = self.reg_of(v)
            && !is_pin(r.0)
        {
            self.st.al.lock(r.0);
            return r;
        }
        self.temp()
    }

    /// Records that the current instruction's result is in `d`.
    pub(crate) fn define(&mut self, d: Reg) {
        self.define_any(d.0);
    }

    fn define_any(&mut self, d: u8) {
        let old = self.st.al.occ[usize::from(d)];
        if old != NO_VALUE && old != self.at {
            self.st.al.places[old as usize].reg = NONE;
        }
        self.bind(Val(self.at), d);
    }

    /// Register for a vector result; may take over that of the dying operand `reuse`.
    pub(crate) fn xdest(&mut self, reuse: Option<Val>) -> Xmm {
        if let Some(v) = reuse.map(|v| self.st.an.root(v))
            && !self.lives_on(v)
            && let Some(x) = self.xmm_of(v)
            && (self.st.al.reserved >> (x.0 + 16) & 1 == 0 || self.carried_next(x))
        {
            self.st.al.lock(x.0 + 16);
            return x;
        }
        self.xtemp()
    }

    /// Records that the current result is in vector register `d`.
    pub(crate) fn xdefine(&mut self, d: Xmm) {
        self.define_any(d.0 + 16);
    }

    // ---- slots ----

    pub(crate) fn get_slot(&mut self, i: &Inst) {
        let me = Val(self.at);
        match self.pin_of(i.a) {
            Some(p) => {
                // Another name for a value the pin already has (the builder forwards, so only after collisions).
                let old = self.st.al.occ[usize::from(p.0)];
                if old != NO_VALUE && self.lives_on(Val(old)) {
                    let t = self.temp();
                    self.st.asm.mov(true, t, p);
                    self.bind(me, t.0);
                } else {
                    self.define(p);
                }
            }
            None => {
                let slot = Slot::new(i.a, i.ty);
                self.set_home(slot, me);
                if let Some(x) = self.carrier(slot) {
                    self.leave_carrier(x);
                    self.bind(me, x.0 + 16);
                }
            }
        }
    }

    /// What is in carrier `x` moves elsewhere if it is needed.
    fn leave_carrier(&mut self, x: Xmm) {
        let old = self.st.al.occ[usize::from(x.0 + 16)];
        let here = self.st.al.places.get(old as usize).is_some_and(|p| p.reg == x.0 + 16);
        if !here {
            return;
        }
        let place = self.st.al.places[old as usize];
        if self.lives_on(Val(old))
            && place.home == NO_HOME
            && place.spill == NONE
            && self.konst(Val(old)).is_none()
        {
            let t = self.xtemp();
            self.st.asm.movaps(t, x);
            self.bind(Val(old), t.0 + 16);
        } else {
            self.st.al.places[old as usize].reg = NONE;
        }
        self.st.al.vacate(x.0 + 16);
    }

    /// The slot in memory of carrier `x` has been set to root `v`.
    fn carry(&mut self, x: Xmm, v: Val) {
        if self.xmm_of(v) == Some(x) {
            return;
        }
        self.leave_carrier(x);
        self.copy_to_xmm(x, v);
        if self.konst(v).is_none() {
            if let Some(t) = self.xmm_of(v) {
                self.st.al.vacate(t.0 + 16);
            }
            self.bind(v, x.0 + 16);
        }
    }

    /// Before a slot in memory is overwritten: its value moves elsewhere if needed.
    pub(crate) fn claim_slot(&mut self, slot: Slot) {
        let (o, old) = self.st.al.homes[slot.index()];
        if o != NO_HOME {
            self.lose_home(Val(old));
        }
    }

    /// The current value has been stored to the slot.
    pub(crate) fn settle_slot(&mut self, slot: Slot) {
        self.set_home(slot, Val(self.at));
        if self.carrier(slot).is_some() {
            self.load_carriers();
        }
    }

    /// The slot in memory holds no value known (after [`Cx::claim_slot`]).
    pub(crate) fn forget_home(&mut self, slot: Slot) {
        self.st.al.homes[slot.index()] = (NO_HOME, 0);
    }

    /// The slot in memory now holds `v`.
    fn set_home(&mut self, slot: Slot, v: Val) {
        let (n, offset) = (slot.index(), slot.offset);
        let (o, old) = self.st.al.homes[n];
        if o != NO_HOME && old != v.0 {
            // The one before loses its home (when it is of another slot, only because of the direct mapping).
            self.lose_home(Val(old));
        }
        self.st.al.homes[n] = (offset, v.0);
        self.st.al.places[v.index()].home = offset;
    }

    /// Gives `v` another place before its home goes.
    fn lose_home(&mut self, v: Val) {
        let p = self.st.al.places[v.index()];
        if p.home == NO_HOME {
            return;
        }
        if p.reg == NONE && p.spill == NONE && self.lives_on(v) && self.konst(v).is_none() {
            if self.r.ty(v).in_vector() {
                self.xmm(v);
            } else {
                self.gpr(v);
            }
        }
        self.st.al.places[v.index()].home = NO_HOME;
    }

    pub(crate) fn set_slot(&mut self, i: &Inst) {
        let v = self.st.an.root(Val(i.b));
        if let Some(p) = self.pin_of(i.a) {
            return self.set_pin(p, v);
        }
        let slot = Slot::new(i.a, i.ty);
        // What the slot held must move before the store.
        if self.st.al.homes[slot.index()].1 != v.0 {
            self.claim_slot(slot);
        }
        let m = Mem::env(i.a as i32);
        let log2 = i.ty.bytes().trailing_zeros();
        if i.ty == Type::V128 {
            let x = self.xmm(v);
            self.st.asm.movups_store(m, x);
        } else if i.ty.is_float() {
            self.set_float_slot(i, v, m);
        } else if let Some(imm) = self.imm32(v, log2 == 3) {
            self.st.asm.store_imm(log2, m, imm);
        } else {
            let r = self.gpr(v);
            self.st.asm.store(log2, m, r);
        }
        // An alias has its root's bits only in its own width.
        if self.r.ty(v).bytes() == i.ty.bytes() {
            self.set_home(slot, v);
        } else {
            self.forget_home(slot);
        }
        if let Some(x) = self.carrier(slot) {
            self.carry(x, v);
        }
    }

    fn set_pin(&mut self, p: Reg, v: Val) {
        if self.reg_of(v) == Some(p) {
            return;
        }
        let old = self.st.al.occ[usize::from(p.0)];
        if old != NO_VALUE {
            let o = Val(old);
            let place = self.st.al.places[o.index()];
            if self.lives_on(o) && place.home == NO_HOME && place.spill == NONE && self.konst(o).is_none() {
                let t = self.temp();
                self.st.asm.mov(true, t, p);
                self.bind(o, t.0);
            } else {
                self.st.al.places[o.index()].reg = NONE;
            }
            self.st.al.vacate(p.0);
        }
        match self.konst(v) {
            Some(0) => self.st.asm.alu(Alu::Xor, false, p, p),
            _ => self.copy_to(p, v),
        }
        // The pin is the better place: it costs no temporary.
        if self.konst(v).is_none() {
            if let Some(t) = self.reg_of(v) {
                if is_pin(t.0) {
                    return;
                }
                self.st.al.vacate(t.0);
            }
            self.bind(v, p.0);
        }
    }

    /// Type of the root of `v`.
    pub(crate) fn root_ty(&self, v: Val) -> Type {
        self.r.ty(self.st.an.root(v))
    }
}
