//! The backward pass: last uses, dead instructions, dead slot writes, and what is fused into its user.

use holdfast_tcg_ir::types::SLOT_INDEXES;
use holdfast_tcg_ir::{Inst, Op, Region, Slot, Type, Val};

const DEAD: u32 = 1 << 27;
const ALIAS: u32 = 1 << 28;
/// `Select`/`BrCond` takes the operands of the `SetCond` it tests.
const FUSED_COND: u32 = 1 << 29;
/// `Add` takes the operand of the shift that makes its second operand.
const FUSED_SHIFT: u32 = 1 << 30;
/// The address of a load or store is a table with a small index ([`table`]), whose probe needs the table.
const TABLE: u32 = 1 << 31;
/// Largest offset in a table.
const MAX_TABLE: u64 = 1024;

/// The part of [`Info::next`] that is an index; flags are above.
const NEXT: u32 = (1 << 27) - 1;

/// What is known of an instruction and its value. A power of two in size, for the many indexes.
#[derive(Clone, Copy)]
#[repr(align(16))]
struct Info {
    /// The value that its own is another name of.
    root: u32,
    /// The last instruction that uses it, 0 for none.
    last: u32,
    /// The next load or store at its value as base address; void at or behind the barrier.
    access: u32,
    /// Of a load or store: the next one in the block at the same base address, 0 for none; and the flags of all.
    next: u32,
}

impl Info {
    /// Nothing is known of instruction `at`.
    fn new(at: u32) -> Self {
        Self { root: at, last: 0, access: 0, next: 0 }
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
    /// Some vector slot is read.
    vectors: bool,
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
            vectors: false,
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
        self.vectors = false;
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
                (info.root, info.next) = (of, ALIAS);
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

    #[inline]
    fn backward(&mut self, r: &Region, at: usize, i: &Inst) {
        if i.op == Op::InsnStart {
            return self.note(at);
        }
        let Some(info) = self.info.get_mut(at) else { return };
        if info.next & ALIAS != 0 {
            return;
        }
        if (info.last == 0) & !i.op.has_effect() {
            info.next |= DEAD;
            return;
        }
        match i.op {
            Op::Const | Op::Nop => return,
            Op::SetSlot => {
                let o = &mut self.overwritten[Slot::new(i.a, i.ty).index()];
                if *o == (i.a, self.epoch) {
                    info.next |= DEAD;
                    return;
                }
                *o = (i.a, self.epoch);
                self.mark(i.b, at);
                return self.note(at);
            }
            Op::GetSlot => {
                let o = &mut self.overwritten[Slot::new(i.a, i.ty).index()];
                if o.0 == i.a {
                    *o = (0, 0);
                }
                self.vectors |= i.ty.in_vector();
                return self.note(at);
            }
            Op::Load | Op::Store => {
                self.epoch += 1;
                self.chain(r, at, i);
            }
            Op::AtomicRmw | Op::AtomicCas => self.epoch += 1,
            Op::BrCond | Op::Select | Op::Add => {
                self.epoch += u32::from(i.op == Op::BrCond);
                if self.fuse(r, at, i) {
                    return self.note(at);
                }
            }
            Op::Call => {
                self.bar(at);
                for &v in r.call_args(i) {
                    self.mark(v.0, at);
                }
            }
            Op::Host
            | Op::Label
            | Op::Br
            | Op::GotoPc
            | Op::GotoReg
            | Op::Exit
            | Op::ExitReg
            | Op::ExitAsIs => {
                self.bar(at);
            }
            _ => {}
        }
        self.note(at);
        let mask = i.op.operands();
        if mask & 0b001 != 0 {
            self.mark(i.a, at);
            // What has a second operand or none.
            if mask & 0b010 != 0 {
                self.mark(i.b, at);
            }
            if mask & 0b100 != 0 {
                self.mark(i.c, at);
            }
        } else if mask != 0 {
            self.mark(i.b, at);
        }
    }

    /// Nothing is known of slots and pages across instruction `at`.
    fn bar(&mut self, at: usize) {
        self.epoch += 1;
        self.barrier = at as u32;
    }

    /// Puts a load or store before the next one at the same base address.
    fn chain(&mut self, r: &Region, at: usize, i: &Inst) {
        let root = self.root(Val(i.a));
        let base = &mut self.info[root.index()];
        let next = if base.access < self.barrier { base.access } else { 0 };
        base.access = at as u32;
        self.info[at].next |= next & NEXT;
        if let Some((base, _)) = table(r, i.a) {
            self.info[at].next |= TABLE;
            self.mark(base.0, at);
        }
    }

    /// The next load or store of the block with the same base address as the load or store at `at`.
    #[inline]
    pub(crate) fn next_access(&self, at: u32) -> Option<u32> {
        self.info.get(at as usize).map(|i| i.next & NEXT).filter(|n| *n != 0)
    }

    /// Has an instruction take the operands of one that it uses, where it can; marks them, and the others, then.
    fn fuse(&mut self, r: &Region, at: usize, i: &Inst) -> bool {
        if i.op == Op::Add {
            if !is_small_shift(r, i.b, i.ty) || is_const(r, i.a) {
                return false;
            }
            self.info[at].next |= FUSED_SHIFT;
            self.mark(i.a, at);
            self.mark(r.insts[i.b as usize].a, at);
            return true;
        }
        let d = &r.insts[i.a as usize];
        if d.op != Op::SetCond || i.op == Op::BrCond && !(i.cond() as u8 <= 1 && is_zero(r, i.b)) {
            return false;
        }
        self.info[at].next |= FUSED_COND;
        self.mark(d.a, at);
        self.mark(d.b, at);
        if i.op == Op::Select {
            self.mark(i.b, at);
            self.mark(i.c, at);
        }
        true
    }

    /// Instruction `at` uses value `v`.
    #[inline]
    fn mark(&mut self, v: u32, at: usize) {
        let Some(root) = self.info.get(v as usize).map(|i| i.root) else { return };
        if let Some(value) = self.info.get_mut(root as usize) {
            value.last = if value.last == 0 { at as u32 } else { value.last };
        }
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

    /// Whether some vector slot is read.
    pub(crate) fn has_vectors(&self) -> bool {
        self.vectors
    }

    #[inline]
    pub(crate) fn is_dead(&self, at: u32) -> bool {
        self.info.get(at as usize).is_some_and(|i| i.next & DEAD != 0)
    }

    /// The instructions that something is to be done for, last to first, unless they have become dead since.
    #[inline]
    pub(crate) fn work(&self) -> &[u32] {
        self.work.get(..self.todo).unwrap_or_default()
    }

    /// Makes the instruction dead: its work is done.
    pub(crate) fn kill(&mut self, at: u32) {
        self.info[at as usize].next |= DEAD;
    }

    #[inline]
    pub(crate) fn is_alias(&self, at: u32) -> bool {
        self.info[at as usize].next & ALIAS != 0
    }

    #[inline]
    pub(crate) fn cond_fused(&self, at: u32) -> bool {
        self.info[at as usize].next & FUSED_COND != 0
    }

    /// The table that the load or store at `at` is from, and the largest offset in it.
    pub(crate) fn table(&self, r: &Region, at: u32) -> Option<(Val, u64)> {
        let wanted = self.info.get(at as usize).is_some_and(|i| i.next & TABLE != 0);
        if wanted { table(r, r.insts.get(at as usize)?.a) } else { None }
    }

    #[inline]
    pub(crate) fn shift_fused(&self, at: u32) -> bool {
        self.info[at as usize].next & FUSED_SHIFT != 0
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
