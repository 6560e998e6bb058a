//! The backward pass: last uses, dead instructions, dead slot writes, and what is fused into its user.

use holdfast_tcg_ir::{Inst, Op, Region, Type, Val};

const DEAD: u8 = 1;
const ALIAS: u8 = 2;
/// `Select`/`BrCond` takes the operands of the `SetCond` it tests.
const FUSED_COND: u8 = 4;
/// `Add` takes the operand of the shift that makes its second operand.
const FUSED_SHIFT: u8 = 8;

/// Results of the pass, indexed by instruction.
pub(crate) struct Analysis {
    root: Vec<u32>,
    last: Vec<u32>,
    uses: Vec<u32>,
    flags: Vec<u8>,
    /// Slot offsets that are overwritten before anything can see them; direct mapped.
    overwritten: [u32; 64],
}

impl Default for Analysis {
    fn default() -> Self {
        let (root, last, uses, flags) = Default::default();
        Self { root, last, uses, flags, overwritten: [u32::MAX; 64] }
    }
}

impl Analysis {
    /// Analyses `r`.
    pub(crate) fn run(&mut self, r: &Region) {
        let n = r.insts.len();
        self.root.clear();
        self.last.clear();
        self.last.resize(n, 0);
        self.uses.clear();
        self.uses.resize(n, 0);
        self.flags.clear();
        self.flags.resize(n, 0);
        self.overwritten = [u32::MAX; 64];
        self.roots(r);
        for (at, i) in r.insts.iter().enumerate().rev() {
            self.backward(r, at, i);
        }
    }

    fn roots(&mut self, r: &Region) {
        for (at, i) in r.insts.iter().enumerate() {
            let root = match i.op {
                Op::Trunc => self.root[i.a as usize],
                // Everything that makes a 32-bit value zeroes the upper half, but for truncations.
                Op::ZExt if self.root[i.a as usize] == i.a => i.a,
                _ => at as u32,
            };
            if root != at as u32 {
                self.flags[at] |= ALIAS;
            }
            self.root.push(root);
        }
    }

    fn backward(&mut self, r: &Region, at: usize, i: &Inst) {
        if self.flags[at] & ALIAS != 0 {
            return;
        }
        if !i.op.has_effect() && self.uses[at] == 0 {
            self.flags[at] |= DEAD;
            return;
        }
        match i.op {
            Op::SetSlot => {
                let o = &mut self.overwritten[(i.a / 8) as usize % 64];
                if *o == i.a {
                    self.flags[at] |= DEAD;
                    return;
                }
                *o = i.a;
            }
            Op::GetSlot => {
                let o = &mut self.overwritten[(i.a / 8) as usize % 64];
                if *o == i.a {
                    *o = u32::MAX;
                }
            }
            Op::Load | Op::Store | Op::AtomicRmw | Op::AtomicCas | Op::Call | Op::Label | Op::BrCond => {
                self.overwritten = [u32::MAX; 64];
            }
            _ if i.op.is_terminator() => self.overwritten = [u32::MAX; 64],
            _ => {}
        }
        self.fuse(r, at, i);
        for v in self.effective_uses(r, at, i) {
            self.mark(v, at);
        }
        if i.op == Op::Call {
            for &v in r.call_args(i) {
                self.mark(v, at);
            }
        }
    }

    fn fuse(&mut self, r: &Region, at: usize, i: &Inst) {
        let cond = match i.op {
            Op::Select => i.a,
            Op::BrCond if i.cond() as u8 <= 1 && is_zero(r, i.b) => i.a,
            Op::Add if is_small_shift(r, i.b, i.ty) && !is_const(r, i.a) => {
                self.flags[at] |= FUSED_SHIFT;
                return;
            }
            _ => return,
        };
        if r.insts[cond as usize].op == Op::SetCond {
            self.flags[at] |= FUSED_COND;
        }
    }

    fn effective_uses(&self, r: &Region, at: usize, i: &Inst) -> impl Iterator<Item = Val> + use<> {
        let f = self.flags[at];
        // What a fused operand is replaced by.
        let (skip_a, skip_b) =
            (f & FUSED_COND != 0, f & (FUSED_SHIFT | FUSED_COND) != 0 && i.op != Op::Select);
        let extra = self.fused_uses(r, at as u32);
        let i = *i;
        let own = (0..3u32).filter(move |n| i.op.operands() & 1 << n != 0);
        let own = own.filter(move |n| !(*n == 0 && skip_a || *n == 1 && skip_b));
        own.map(move |n| Val([i.a, i.b, i.c][n as usize & 3])).chain(extra)
    }

    /// The values that instruction `at` uses through a fused operand.
    pub(crate) fn fused_uses(&self, r: &Region, at: u32) -> impl Iterator<Item = Val> + use<> {
        let i = &r.insts[at as usize];
        let f = self.flags[at as usize];
        let (a, b) = if f & FUSED_COND != 0 {
            let d = r.insts[i.a as usize];
            (Some(d.a), Some(d.b))
        } else if f & FUSED_SHIFT != 0 {
            (Some(r.insts[i.b as usize].a), None)
        } else {
            (None, None)
        };
        a.into_iter().chain(b).map(Val)
    }

    fn mark(&mut self, v: Val, at: usize) {
        let v = self.root[v.index()] as usize;
        self.uses[v] += 1;
        if self.last[v] == 0 {
            self.last[v] = at as u32;
        }
    }

    /// The value that `v` is another name of.
    #[inline]
    pub(crate) fn root(&self, v: Val) -> Val {
        Val(self.root[v.index()])
    }

    /// Index of the last instruction that uses root `v`; 0 for none.
    #[inline]
    pub(crate) fn last_use(&self, v: Val) -> u32 {
        self.last[v.index()]
    }

    #[inline]
    pub(crate) fn is_dead(&self, at: u32) -> bool {
        self.flags.get(at as usize).is_some_and(|f| f & DEAD != 0)
    }

    /// Makes the instruction dead: its work is done.
    pub(crate) fn kill(&mut self, at: u32) {
        self.flags[at as usize] |= DEAD;
    }

    #[inline]
    pub(crate) fn is_alias(&self, at: u32) -> bool {
        self.flags[at as usize] & ALIAS != 0
    }

    #[inline]
    pub(crate) fn cond_fused(&self, at: u32) -> bool {
        self.flags[at as usize] & FUSED_COND != 0
    }

    #[inline]
    pub(crate) fn shift_fused(&self, at: u32) -> bool {
        self.flags[at as usize] & FUSED_SHIFT != 0
    }
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
