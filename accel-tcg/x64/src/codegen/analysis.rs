//! The backward pass: last uses, dead instructions, dead slot writes, and what is fused into its user.

use holdfast_tcg_ir::types::SLOT_INDEXES;
use holdfast_tcg_ir::{Inst, Op, Region, Slot, Type, Val};

const DEAD: u8 = 1;
const ALIAS: u8 = 2;
/// `Select`/`BrCond` takes the operands of the `SetCond` it tests.
const FUSED_COND: u8 = 4;
/// `Add` takes the operand of the shift that makes its second operand.
const FUSED_SHIFT: u8 = 8;
/// The address of a load or store is a table with a small index ([`table`]), whose probe needs the table.
const TABLE: u8 = 16;
/// Largest offset in a table.
const MAX_TABLE: u64 = 1024;

/// Up to four values.
struct Operands {
    vals: [Val; 4],
    len: usize,
}

impl Operands {
    #[inline]
    fn push_if(&mut self, on: bool, v: u32) {
        if on {
            self.vals[self.len & 3] = Val(v);
            self.len += 1;
        }
    }

    #[inline]
    fn list(&self) -> &[Val] {
        &self.vals[..self.len.min(4)]
    }
}

const NO_VALUE: u32 = u32::MAX;

/// What is known of an instruction and its value. A power of two in size, for the many indexes.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Info {
    /// The value that its own is another name of.
    root: u32,
    /// The last instruction that uses it, 0 for none.
    last: u32,
    /// The next load or store at its value as base address; void at or behind the barrier.
    access: u32,
    /// Of a load or store: the next one in the block at the same base address, 0 for none.
    next: u32,
    /// The first of the values whose last use the instruction is; [`NO_VALUE`] for none.
    dies: u32,
    /// The next one of those that the value dies with.
    also: u32,
    flags: u8,
}

impl Info {
    /// Nothing is known of instruction `at`.
    fn new(at: u32) -> Self {
        Self { root: at, last: 0, access: 0, next: 0, dies: NO_VALUE, also: NO_VALUE, flags: 0 }
    }
}

/// Results of the pass, indexed by instruction.
pub(crate) struct Analysis {
    info: Vec<Info>,
    /// The first `todo` are the instructions that something is to be done for, last to first.
    work: Vec<u32>,
    todo: usize,
    /// What `info` begins as, as long as was ever needed.
    fresh: Vec<Info>,
    /// The next instruction that ends what probes may share.
    barrier: u32,
    /// Slot offsets that are overwritten before anything can see them, direct mapped, and the epoch of each entry.
    overwritten: [(u32, u32); SLOT_INDEXES],
    /// Entries of other epochs are void: something that can see slots lies between.
    epoch: u32,
}

impl Default for Analysis {
    fn default() -> Self {
        Self {
            info: Vec::new(),
            work: Vec::new(),
            todo: 0,
            fresh: Vec::new(),
            barrier: 0,
            overwritten: [(0, 0); SLOT_INDEXES],
            epoch: 0,
        }
    }
}

impl Analysis {
    /// Analyses `r`.
    pub(crate) fn run(&mut self, r: &Region) {
        // Epochs go on from region to region; a region has fewer instructions than are left here.
        if self.epoch > u32::MAX / 2 {
            self.overwritten = [(0, 0); SLOT_INDEXES];
            self.epoch = 0;
        }
        self.epoch += 1;
        self.barrier = r.insts.len() as u32;
        self.roots(r);
        self.todo = 0;
        if self.work.len() < r.insts.len() {
            self.work.resize(r.insts.len(), 0);
        }
        for (at, i) in r.insts.iter().enumerate().rev() {
            self.backward(r, at, i);
        }
    }

    fn roots(&mut self, r: &Region) {
        while self.fresh.len() < r.insts.len() {
            self.fresh.push(Info::new(self.fresh.len() as u32));
        }
        self.info.clear();
        self.info.extend_from_slice(self.fresh.get(..r.insts.len()).unwrap_or_default());
        for &at in &r.casts {
            let Some(i) = r.insts.get(at as usize) else { continue };
            let of = self.info.get(i.a as usize).map_or(i.a, |d| d.root);
            // Everything that makes a 32-bit value zeroes the upper half, but for truncations.
            if (i.op == Op::Trunc || of == i.a)
                && let Some(info) = self.info.get_mut(at as usize)
            {
                (info.root, info.flags) = (of, ALIAS);
            }
        }
    }

    /// Something is to be done for instruction `at`.
    #[inline]
    fn note(&mut self, at: usize) {
        if let Some(work) = self.work.get_mut(self.todo) {
            *work = at as u32;
            self.todo += 1;
        }
    }

    fn backward(&mut self, r: &Region, at: usize, i: &Inst) {
        if i.op == Op::InsnStart {
            return self.note(at);
        }
        let info = &mut self.info[at];
        if info.flags & ALIAS != 0 {
            return;
        }
        if info.last == 0 && !i.op.has_effect() {
            info.flags |= DEAD;
            return;
        }
        match i.op {
            Op::Const => return,
            Op::SetSlot => {
                let o = &mut self.overwritten[Slot::new(i.a, i.ty).index()];
                if *o == (i.a, self.epoch) {
                    info.flags |= DEAD;
                    return;
                }
                *o = (i.a, self.epoch);
                self.note(at);
                self.mark(Val(i.b), at);
                return;
            }
            Op::Nop => return,
            _ => self.note(at),
        }
        match i.op {
            Op::GetSlot => {
                let o = &mut self.overwritten[Slot::new(i.a, i.ty).index()];
                if o.0 == i.a {
                    *o = (0, 0);
                }
                return;
            }
            Op::Load | Op::Store => {
                self.epoch += 1;
                self.chain(at, i);
                if let Some((base, _)) = table(r, i.a) {
                    self.info[at].flags |= TABLE;
                    self.mark(base, at);
                }
            }
            Op::AtomicRmw | Op::AtomicCas | Op::BrCond => self.epoch += 1,
            Op::Call | Op::Host | Op::Label => {
                self.epoch += 1;
                self.barrier = at as u32;
            }
            _ if i.op.is_terminator() => {
                self.epoch += 1;
                self.barrier = at as u32;
            }
            _ => {}
        }
        self.fuse(r, at, i);
        if self.info[at].flags & (FUSED_COND | FUSED_SHIFT) != 0 {
            for &v in self.operands(r, at as u32).list() {
                self.mark(v, at);
            }
            return;
        }
        let mask = i.op.operands();
        if mask & 1 != 0 {
            self.mark(Val(i.a), at);
        }
        if mask & 2 != 0 {
            self.mark(Val(i.b), at);
        }
        if mask & 4 != 0 {
            self.mark(Val(i.c), at);
        }
        if i.op == Op::Call {
            for &v in r.call_args(i) {
                self.mark(v, at);
            }
        }
    }

    /// Puts a load or store before the next one at the same base address.
    fn chain(&mut self, at: usize, i: &Inst) {
        let root = self.root(Val(i.a));
        let base = &mut self.info[root.index()];
        let next = if base.access < self.barrier { base.access } else { 0 };
        base.access = at as u32;
        self.info[at].next = next;
    }

    /// The next load or store of the block with the same base address as the load or store at `at`.
    #[inline]
    pub(crate) fn next_access(&self, at: u32) -> Option<u32> {
        self.info.get(at as usize).map(|i| i.next).filter(|n| *n != 0)
    }

    fn fuse(&mut self, r: &Region, at: usize, i: &Inst) {
        let cond = match i.op {
            Op::Select => i.a,
            Op::BrCond if i.cond() as u8 <= 1 && is_zero(r, i.b) => i.a,
            Op::Add if is_small_shift(r, i.b, i.ty) && !is_const(r, i.a) => {
                self.info[at].flags |= FUSED_SHIFT;
                return;
            }
            _ => return,
        };
        if r.insts[cond as usize].op == Op::SetCond {
            self.info[at].flags |= FUSED_COND;
        }
    }

    /// The values that instruction `at` uses, those of fused operands in place of the operands. Call arguments are not
    /// among them.
    #[inline]
    fn operands(&self, r: &Region, at: u32) -> Operands {
        let i = &r.insts[at as usize];
        let f = self.info[at as usize].flags;
        let mut o = Operands { vals: [Val(0); 4], len: 0 };
        let mask = i.op.operands();
        if f & (FUSED_COND | FUSED_SHIFT) == 0 {
            o.push_if(mask & 1 != 0, i.a);
            o.push_if(mask & 2 != 0, i.b);
            o.push_if(mask & 4 != 0, i.c);
        } else if f & FUSED_COND != 0 {
            let d = &r.insts[i.a as usize];
            o.push_if(true, d.a);
            o.push_if(true, d.b);
            o.push_if(i.op == Op::Select, i.b);
            o.push_if(i.op == Op::Select, i.c);
        } else {
            o.push_if(true, i.a);
            o.push_if(true, r.insts[i.b as usize].a);
        }
        o
    }

    #[inline]
    fn mark(&mut self, v: Val, at: usize) {
        let root = self.info[v.index()].root;
        if self.info[root as usize].last == 0 {
            let also = std::mem::replace(&mut self.info[at].dies, root);
            let value = &mut self.info[root as usize];
            (value.last, value.also) = (at as u32, also);
        }
    }

    /// The first of the values whose last use the instruction is, and whether nobody reads its own.
    #[inline]
    pub(crate) fn ends(&self, at: u32) -> (Option<Val>, bool) {
        let Some(info) = self.info.get(at as usize) else { return (None, false) };
        ((info.dies != NO_VALUE).then_some(Val(info.dies)), info.last == 0)
    }

    /// The next one of the values that `v` dies with.
    #[inline]
    pub(crate) fn dying_too(&self, v: Val) -> Option<Val> {
        self.info.get(v.index()).map(|i| Val(i.also)).filter(|v| v.0 != NO_VALUE)
    }

    /// The value that `v` is another name of.
    #[inline]
    pub(crate) fn root(&self, v: Val) -> Val {
        Val(self.info[v.index()].root)
    }

    /// Index of the last instruction that uses root `v`; 0 for none.
    #[inline]
    pub(crate) fn last_use(&self, v: Val) -> u32 {
        self.info[v.index()].last
    }

    #[inline]
    pub(crate) fn is_dead(&self, at: u32) -> bool {
        self.info.get(at as usize).is_some_and(|i| i.flags & DEAD != 0)
    }

    /// The instructions that something is to be done for, last to first, unless they have become dead since.
    #[inline]
    pub(crate) fn work(&self) -> &[u32] {
        self.work.get(..self.todo).unwrap_or_default()
    }

    /// Makes the instruction dead: its work is done.
    pub(crate) fn kill(&mut self, at: u32) {
        self.info[at as usize].flags |= DEAD;
    }

    #[inline]
    pub(crate) fn is_alias(&self, at: u32) -> bool {
        self.info[at as usize].flags & ALIAS != 0
    }

    #[inline]
    pub(crate) fn cond_fused(&self, at: u32) -> bool {
        self.info[at as usize].flags & FUSED_COND != 0
    }

    /// The table that the load or store at `at` is from, and the largest offset in it.
    pub(crate) fn table(&self, r: &Region, at: u32) -> Option<(Val, u64)> {
        let wanted = self.info.get(at as usize).is_some_and(|i| i.flags & TABLE != 0);
        if wanted { table(r, r.insts.get(at as usize)?.a) } else { None }
    }

    #[inline]
    pub(crate) fn shift_fused(&self, at: u32) -> bool {
        self.info[at as usize].flags & FUSED_SHIFT != 0
    }
}

/// If address `v` is a value and a small offset, those; the value is no constant.
fn table(r: &Region, v: u32) -> Option<(Val, u64)> {
    let d = &r.insts[v as usize];
    if d.op != Op::Add || d.ty != Type::I64 {
        return None;
    }
    let (base, max) = match bound(r, d.b, 0) {
        Some(max) => (d.a, max),
        None => (d.b, bound(r, d.a, 0)?),
    };
    (!is_const(r, base)).then_some((Val(base), max))
}

/// The largest value that `v` can have, if that is small.
pub(crate) fn bound(r: &Region, v: u32, depth: u32) -> Option<u64> {
    let d = &r.insts[v as usize];
    if depth > 4 {
        return None;
    }
    let of = |v: u32| bound(r, v, depth + 1);
    let max = match d.op {
        Op::Const => d.imm(),
        Op::Ext8U => 255,
        Op::Load if d.mem().log2() == 0 && !d.mem().is_signed() => 255,
        Op::ZExt | Op::SExt | Op::Trunc => of(d.a)?,
        Op::And => of(d.b).or_else(|| of(d.a))?,
        Op::Shl => {
            let by = &r.insts[d.b as usize];
            if by.op != Op::Const || by.imm() > 4 {
                return None;
            }
            of(d.a)? << by.imm()
        }
        _ => return None,
    };
    (max <= MAX_TABLE).then_some(max)
}

fn is_const(r: &Region, v: u32) -> bool {
    r.insts[v as usize].op == Op::Const
}

fn is_zero(r: &Region, v: u32) -> bool {
    let d = &r.insts[v as usize];
    d.op == Op::Const && d.imm() == 0
}

fn is_small_shift(r: &Region, v: u32, ty: Type) -> bool {
    let d = &r.insts[v as usize];
    if d.op != Op::Shl || d.ty != ty || is_const(r, d.a) {
        return false;
    }
    let n = &r.insts[d.b as usize];
    n.op == Op::Const && (1..=3).contains(&n.imm())
}
