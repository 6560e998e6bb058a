//! The backward pass: last uses, dead instructions, dead slot writes, and what is fused into its user.

use holdfast_tcg_ir::types::SLOT_INDEXES;
use holdfast_tcg_ir::{Inst, Op, Region, Slot, Type, Val};

const DEAD: u8 = 1;
const ALIAS: u8 = 2;
/// `Select`/`BrCond` takes the operands of the `SetCond` it tests.
const FUSED_COND: u8 = 4;
/// `Add` takes the operand of the shift that makes its second operand.
const FUSED_SHIFT: u8 = 8;

/// Up to four values.
pub(crate) struct Operands {
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
    pub(crate) fn list(&self) -> &[Val] {
        &self.vals[..self.len.min(4)]
    }
}

/// Results of the pass, indexed by instruction.
pub(crate) struct Analysis {
    root: Vec<u32>,
    last: Vec<u32>,
    uses: Vec<u32>,
    flags: Vec<u8>,
    /// Slot offsets that are overwritten before anything can see them, direct mapped, and the epoch of each entry.
    overwritten: [(u32, u32); SLOT_INDEXES],
    /// Entries of other epochs are void: something that can see slots lies between.
    epoch: u32,
}

impl Default for Analysis {
    fn default() -> Self {
        let (root, last, uses, flags) = Default::default();
        Self { root, last, uses, flags, overwritten: [(0, 0); SLOT_INDEXES], epoch: 0 }
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
        self.overwritten = [(0, 0); SLOT_INDEXES];
        self.epoch = 1;
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
                let o = &mut self.overwritten[Slot::new(i.a, i.ty).index()];
                if *o == (i.a, self.epoch) {
                    self.flags[at] |= DEAD;
                    return;
                }
                *o = (i.a, self.epoch);
            }
            Op::GetSlot => {
                let o = &mut self.overwritten[Slot::new(i.a, i.ty).index()];
                if o.0 == i.a {
                    *o = (0, 0);
                }
            }
            Op::Load
            | Op::Store
            | Op::AtomicRmw
            | Op::AtomicCas
            | Op::Call
            | Op::Host
            | Op::Label
            | Op::BrCond => {
                self.epoch += 1;
            }
            _ if i.op.is_terminator() => self.epoch += 1,
            _ => {}
        }
        self.fuse(r, at, i);
        for &v in self.operands(r, at as u32).list() {
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

    /// The values that instruction `at` uses, those of fused operands in place of the operands. Call arguments are not
    /// among them.
    #[inline]
    pub(crate) fn operands(&self, r: &Region, at: u32) -> Operands {
        let i = &r.insts[at as usize];
        let f = self.flags[at as usize];
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
