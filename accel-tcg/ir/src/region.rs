//! Regions: the unit of translation.

use crate::op::Inst;
use crate::types::{Slot, Type, Val};
use crate::vec::{HostCode, VecInsn};

/// What the back end must know about a guest architecture.
#[derive(Clone, Copy, Debug)]
pub struct GuestSpec {
    /// For messages.
    pub name: &'static str,
    /// Slots kept in host registers across all translated code, hottest first; `I64` only. The back end uses at
    /// most [`GuestSpec::MAX_PINS`] of them.
    pub pins: &'static [Slot],
    /// The low bits of a pc that are always zero (1 for RISC-V, 0 for x86, 2 for A64).
    pub pc_shift: u32,
    /// Log2 of the page size that decides whether a jump stays on its page.
    pub page_bits: u32,
}

impl GuestSpec {
    /// Most pinned slots that any back end takes.
    pub const MAX_PINS: usize = 8;
}

/// A jump target within a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Label(pub u32);

/// What kind of indirect jump it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
#[repr(u8)]
pub enum JumpHint {
    /// Any.
    #[default]
    Jump,
    /// A call; the return address follows the guest instruction.
    Call,
    /// A return.
    Return,
}

impl JumpHint {
    /// The hint with discriminant `n`.
    #[inline]
    pub const fn from_index(n: u16) -> JumpHint {
        match n {
            1 => JumpHint::Call,
            2 => JumpHint::Return,
            _ => JumpHint::Jump,
        }
    }
}

/// What is known of a label.
#[derive(Clone, Copy, Debug, Default)]
pub struct LabelInfo {
    /// Guest pc there, for the exit poll.
    pub pc: Option<u64>,
    /// Index of its [`crate::Op::Label`] once bound.
    pub at: Option<u32>,
    /// Whether some branch jumps backward to it.
    pub backward: bool,
    /// How many branches jump to it.
    pub refs: u32,
}

/// One translated unit: one entry, straight code and jumps within it. Reuse it: [`Region::reset`] keeps the memory.
#[derive(Clone, Debug, Default)]
pub struct Region {
    /// Guest pc of the entry.
    pub entry_pc: u64,
    /// Guest bytes covered, from the lowest to behind the highest instruction; for invalidation and statistics.
    pub guest_len: u32,
    /// Guest instructions in it.
    pub guest_insns: u32,
    /// The instructions.
    pub insts: Vec<Inst>,
    /// The [`crate::Op::Trunc`] and [`crate::Op::ZExt`] among them, by rising index.
    pub casts: Vec<u32>,
    /// Arguments of [`crate::Op::Call`].
    pub args: Vec<Val>,
    /// The labels.
    pub labels: Vec<LabelInfo>,
    /// Templates of [`crate::Op::Vec`] and [`crate::Op::VecFp`].
    pub vecs: Vec<VecInsn>,
    /// Code of [`crate::Op::Host`].
    pub hosts: Vec<HostCode>,
    /// Bytes of that code.
    pub host_bytes: Vec<u8>,
}

impl Region {
    /// An empty region.
    pub fn new() -> Self {
        Self::default()
    }

    /// Empties it for a new entry pc and keeps its memory.
    pub fn reset(&mut self, entry_pc: u64) {
        self.entry_pc = entry_pc;
        self.guest_len = 0;
        self.guest_insns = 0;
        self.insts.clear();
        self.casts.clear();
        self.args.clear();
        self.labels.clear();
        self.vecs.clear();
        self.hosts.clear();
        self.host_bytes.clear();
    }

    /// The instruction that defines `v`.
    #[inline]
    pub fn def(&self, v: Val) -> &Inst {
        &self.insts[v.index()]
    }

    /// The type of `v`; of instructions without a result it is what they work on.
    #[inline]
    pub fn ty(&self, v: Val) -> Type {
        self.def(v).ty
    }

    /// The arguments of a call instruction.
    #[inline]
    pub fn call_args(&self, i: &Inst) -> &[Val] {
        self.args.get(i.b as usize..(i.b as usize).saturating_add(i.c as usize)).unwrap_or(&[])
    }

    /// The template of a vector instruction.
    #[inline]
    pub fn vec(&self, i: &Inst) -> Option<&VecInsn> {
        self.vecs.get(usize::from(i.aux))
    }

    /// The code of an [`crate::Op::Host`] and what it writes.
    pub fn host(&self, i: &Inst) -> Option<(&[u8], &HostCode)> {
        let h = self.hosts.get(i.a as usize)?;
        let bytes = self.host_bytes.get(h.at as usize..(h.at as usize).checked_add(h.len as usize)?)?;
        Some((bytes, h))
    }

    /// Whether `pc` is on the same page (of `1 << page_bits` bytes) as the entry.
    #[inline]
    pub fn same_page(&self, pc: u64, page_bits: u32) -> bool {
        (self.entry_pc ^ pc) >> page_bits == 0
    }
}
