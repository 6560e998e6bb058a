//! Builds regions.

use crate::fold;
use crate::helper::{Effects, HelperId, HelperTable};
use crate::op::{Cond, FenceKind, FpCond, FpMode, Inst, MemOp, Op, RmwKind};
use crate::region::{JumpHint, Label, LabelInfo, Region};
use crate::types::{Slot, Type, Val};
use crate::vec::{HostCode, VecInsn};

/// Slots whose current value the builder remembers.
const KNOWN: usize = crate::types::SLOT_INDEXES;

/// Builds one [`Region`] from its start to its end. Folds constants, simplifies identities and forwards slots to
/// their readers as it goes, so front ends write the plain semantics.
///
/// Keep one builder per translating thread and [`Builder::start`] it again for every region.
#[derive(Debug, Default)]
pub struct Builder {
    region: Region,
    pc: u64,
    max_pc: u64,
    min_pc: u64,
    /// Where this extended basic block begins. What tables say of values from before it is void.
    block: u32,
    /// Added to the index of a value in the tables, so that what they say of earlier regions' values is void, too.
    base: u32,
    /// The value of a slot, direct mapped by [`Slot::index`].
    known: Vec<(u32, u32)>,
    effects: Vec<(Effects, Type)>,
    /// Sums and shifts, direct mapped.
    computed: [Computed; COMPUTED],
    /// Sign extensions: (operand, result), direct mapped.
    extended: [(u32, u32); 8],
    /// Zero extensions likewise.
    extended_u: [(u32, u32); 8],
    /// Truncations likewise.
    truncated: [(u32, u32); 8],
}

/// Entries of the table of sums and shifts.
const COMPUTED: usize = 16;
/// How many instructions later a sum or shift is still worth reusing rather than computing again: what lives longer
/// takes registers from others.
const REUSE: u32 = 32;

/// A sum or shift: what it is of, and the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Computed {
    op: Option<Op>,
    wide: bool,
    a: u32,
    /// The constant, or the value's index.
    b: (bool, u64),
    value: u32,
}

impl Builder {
    /// A builder for guests that use `helpers`.
    pub fn new(helpers: &HelperTable) -> Self {
        let mut effects = Vec::with_capacity(helpers.len());
        for i in 0..helpers.len() {
            if let Some(h) = helpers.get(HelperId(i as u32)) {
                effects.push((h.effects, h.ret));
            }
        }
        Self { region: Region::new(), known: vec![(u32::MAX, 0); KNOWN], effects, ..Self::default() }
    }

    /// Begins a region at `entry_pc`.
    pub fn start(&mut self, entry_pc: u64) {
        self.base += self.region.insts.len() as u32 + 1;
        if self.base > u32::MAX / 2 {
            self.forget_all();
        }
        self.block = self.base;
        self.region.reset(entry_pc);
        (self.pc, self.min_pc, self.max_pc) = (entry_pc, entry_pc, entry_pc);
    }

    /// Empties the tables.
    #[cold]
    fn forget_all(&mut self) {
        self.base = 1;
        self.known.fill((u32::MAX, 0));
        self.extended = [(u32::MAX, 0); 8];
        self.extended_u = [(u32::MAX, 0); 8];
        self.truncated = [(u32::MAX, 0); 8];
        self.computed = [Computed::default(); COMPUTED];
    }

    /// The region built so far; complete after a terminator.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Takes the region out (tests); [`Builder::start`] makes a new one.
    pub fn take(&mut self) -> Region {
        self.base += self.region.insts.len() as u32;
        std::mem::take(&mut self.region)
    }

    /// The guest pc of the instruction being translated.
    #[inline]
    pub fn pc(&self) -> u64 {
        self.pc
    }

    /// How many IR instructions there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.region.insts.len()
    }

    /// Whether there is nothing yet.
    pub fn is_empty(&self) -> bool {
        self.region.insts.is_empty()
    }

    /// Whether the last instruction is a terminator, so that code can go on only at a label.
    #[inline]
    pub fn terminated(&self) -> bool {
        self.region.insts.last().is_some_and(|i| i.op.is_terminator())
    }

    /// Begins the guest instruction of `len` bytes at `pc`.
    pub fn insn(&mut self, pc: u64, len: u32) {
        self.pc = pc;
        self.min_pc = self.min_pc.min(pc);
        self.max_pc = self.max_pc.max(pc.wrapping_add(u64::from(len)));
        self.region.guest_len = self.max_pc.wrapping_sub(self.min_pc) as u32;
        self.region.guest_insns += 1;
        self.push(Inst::with_imm(Op::InsnStart, Type::Void, 0, pc));
    }

    fn new_block(&mut self) {
        self.block = self.base + self.region.insts.len() as u32;
    }

    #[inline]
    fn push(&mut self, i: Inst) -> Val {
        let v = Val(self.region.insts.len() as u32);
        self.region.insts.push(i);
        v
    }

    #[inline]
    fn push_op(&mut self, op: Op, ty: Type, aux: u16, abc: (u32, u32, u32)) -> Val {
        self.push(Inst::new(op, ty, aux, abc))
    }

    /// The type of a value.
    #[inline]
    pub fn ty(&self, v: Val) -> Type {
        self.region.ty(v)
    }

    /// The constant that `v` is, if it is one (32-bit ones zero-extended).
    #[inline]
    pub fn as_const(&self, v: Val) -> Option<u64> {
        let i = self.region.def(v);
        (i.op == Op::Const).then(|| i.imm())
    }

    // ---- constants and slots ----

    /// A 64-bit constant.
    #[inline]
    pub fn iconst(&mut self, v: i64) -> Val {
        self.constant(Type::I64, v as u64)
    }

    /// A 32-bit constant.
    #[inline]
    pub fn iconst32(&mut self, v: i32) -> Val {
        self.constant(Type::I32, u64::from(v as u32))
    }

    /// A constant of any type from its bits; those of a vector above the low 64 are zero.
    pub fn constant(&mut self, ty: Type, bits: u64) -> Val {
        let bits = if ty.bytes() == 4 { bits & 0xffff_ffff } else { bits };
        self.push(Inst::with_imm(Op::Const, ty, 0, bits))
    }

    fn known_at(&mut self, slot: Slot) -> &mut (u32, u32) {
        let n = slot.index();
        &mut self.known[n]
    }

    /// Reads a slot.
    pub fn get(&mut self, slot: Slot) -> Val {
        if let Some(v) = self.known(slot) {
            return v;
        }
        let v = self.push_op(Op::GetSlot, slot.ty, 0, (slot.offset, 0, 0));
        *self.known_at(slot) = (slot.offset, self.base + v.0);
        v
    }

    /// The value that a slot is known to have here.
    pub fn known(&self, slot: Slot) -> Option<Val> {
        let &(offset, v) = self.known.get(slot.index())?;
        if offset != slot.offset || v < self.block {
            return None;
        }
        let v = Val(v - self.base);
        (self.ty(v) == slot.ty).then_some(v)
    }

    /// Writes a slot. `v` must have the slot's type.
    pub fn set(&mut self, slot: Slot, v: Val) {
        debug_assert_eq!(self.ty(v), slot.ty);
        let known = *self.known_at(slot);
        if known.0 == slot.offset && known.1 >= self.block {
            let old = Val(known.1 - self.base);
            if old == v {
                return;
            }
            if let (Some(old), Some(new)) = (self.as_const(old), self.as_const(v))
                && old == new
            {
                return;
            }
        }
        self.push_op(Op::SetSlot, slot.ty, 0, (slot.offset, v.0, 0));
        *self.known_at(slot) = (slot.offset, self.base + v.0);
    }

    /// Forgets what value a slot has: a helper that is not said to write slots may have written this one, which is
    /// not pinned.
    pub fn forget(&mut self, slot: Slot) {
        let known = self.known_at(slot);
        if known.0 == slot.offset {
            *known = (u32::MAX, 0);
        }
    }

    // ---- integers ----

    /// Any two-operand integer instruction on equal types.
    pub fn binary(&mut self, op: Op, a: Val, b: Val) -> Val {
        debug_assert!(op.is_int_binary() && self.ty(a) == self.ty(b) && self.ty(a).is_int());
        let ty = self.ty(a);
        if let Some(v) = self.extension(op, a, b).or_else(|| self.narrow(op, a, b)) {
            return v;
        }
        match fold::binary(op, ty, (a, self.as_const(a)), (b, self.as_const(b))) {
            fold::Folded::Const(c) => self.constant(ty, c),
            fold::Folded::Val(v) => v,
            fold::Folded::Neg(v) => self.unary(Op::Neg, v),
            fold::Folded::Op(op @ (Op::Add | Op::Shl), a, b) => self.address_part(op, ty, a, b),
            fold::Folded::Op(op, a, b) => self.push_op(op, ty, 0, (a.0, b.0, 0)),
        }
    }

    /// A sum or shift to the left, which addresses are made of: the value there is already, if it was computed lately, so that
    /// the back end sees that accesses are to one address.
    fn address_part(&mut self, op: Op, ty: Type, a: Val, b: Val) -> Val {
        let key = match self.as_const(b) {
            Some(c) => (true, c),
            None => (false, u64::from(b.0)),
        };
        let n = (a.0 ^ key.1 as u32 ^ op as u32) as usize % COMPUTED;
        let Some(known) = self.computed.get(n).copied() else { return a };
        let next = self.region.insts.len() as u32;
        let same =
            known.op == Some(op) && known.wide == (ty == Type::I64) && known.a == a.0 && known.b == key;
        if same && known.value >= self.block && self.base + next - known.value <= REUSE {
            return Val(known.value - self.base);
        }
        let v = self.push_op(op, ty, 0, (a.0, b.0, 0));
        if let Some(c) = self.computed.get_mut(n) {
            *c = Computed { op: Some(op), wide: ty == Type::I64, a: a.0, b: key, value: self.base + v.0 };
        }
        v
    }

    /// A shift to the left and back by the same constant is an extension, when it keeps 8, 16 or 32 bits of an `I64`.
    fn extension(&mut self, op: Op, a: Val, b: Val) -> Option<Val> {
        if op != Op::ShrU && op != Op::ShrS || self.ty(a) != Type::I64 {
            return None;
        }
        let n = self.as_const(b)?;
        let d = *self.region.def(a);
        if d.op != Op::Shl || self.as_const(Val(d.b)) != Some(n) {
            return None;
        }
        let x = Val(d.a);
        match (n, op) {
            (32, Op::ShrS) => {
                let t = self.trunc(x);
                Some(self.sext(t))
            }
            (32, _) => Some(self.binary_imm(Op::And, x, 0xffff_ffff)),
            (48, Op::ShrS) => Some(self.unary(Op::Ext16S, x)),
            (48, _) => Some(self.unary(Op::Ext16U, x)),
            (56, Op::ShrS) => Some(self.unary(Op::Ext8S, x)),
            (56, _) => Some(self.unary(Op::Ext8U, x)),
            _ => None,
        }
    }

    /// Any two-operand integer instruction with a constant second operand.
    pub fn binary_imm(&mut self, op: Op, a: Val, imm: i64) -> Val {
        let c = self.constant(self.ty(a), imm as u64);
        self.binary(op, a, c)
    }

    /// Any one-operand integer instruction within a type.
    pub fn unary(&mut self, op: Op, a: Val) -> Val {
        debug_assert!(op.is_int_unary() && self.ty(a).is_int());
        let ty = self.ty(a);
        match self.as_const(a) {
            Some(x) => self.constant(ty, fold::eval_unary(op, ty, x)),
            None => self.push_op(op, ty, 0, (a.0, 0, 0)),
        }
    }

    /// `I32` to `I64` with sign.
    pub fn sext(&mut self, a: Val) -> Val {
        if let Some(x) = self.as_const(a) {
            return self.iconst(i64::from(x as i32));
        }
        let d = *self.region.def(a);
        if d.op == Op::Trunc {
            // Of something that is sign-extended already.
            let wide = self.region.def(Val(d.a));
            if wide.op == Op::Load && wide.mem().is_signed() && wide.mem().bytes() <= 4 {
                return Val(d.a);
            }
        }
        // The same extension again.
        let n = a.index() % self.extended.len().max(1);
        match self.extended.get(n) {
            Some(&(of, v)) if of == a.0 && v >= self.block => return Val(v - self.base),
            _ => {}
        }
        let v = self.push_op(Op::SExt, Type::I64, 0, (a.0, 0, 0));
        if let Some(e) = self.extended.get_mut(n) {
            *e = (a.0, self.base + v.0);
        }
        v
    }

    /// `I32` to `I64` with zeroes.
    pub fn zext(&mut self, a: Val) -> Val {
        if let Some(x) = self.as_const(a) {
            return self.constant(Type::I64, x & 0xffff_ffff);
        }
        // The same extension again.
        let n = a.index() % self.extended_u.len().max(1);
        match self.extended_u.get(n) {
            Some(&(of, v)) if of == a.0 && v >= self.block => return Val(v - self.base),
            _ => {}
        }
        let v = self.push_op(Op::ZExt, Type::I64, 0, (a.0, 0, 0));
        self.region.casts.push(v.0);
        if let Some(e) = self.extended_u.get_mut(n) {
            *e = (a.0, self.base + v.0);
        }
        v
    }

    /// `I64` to `I32`.
    pub fn trunc(&mut self, a: Val) -> Val {
        let d = *self.region.def(a);
        match d.op {
            Op::Const => return self.constant(Type::I32, d.imm()),
            Op::SExt | Op::ZExt => return Val(d.a),
            _ => {}
        }
        // The same low half again.
        let n = a.index() % self.truncated.len().max(1);
        match self.truncated.get(n) {
            Some(&(of, v)) if of == a.0 && v >= self.block => return Val(v - self.base),
            _ => {}
        }
        let v = self.push_op(Op::Trunc, Type::I32, 0, (a.0, 0, 0));
        self.region.casts.push(v.0);
        if let Some(t) = self.truncated.get_mut(n) {
            *t = (a.0, self.base + v.0);
        }
        v
    }

    /// Whether `a cc b`, if that is known now: a branch on it would fold.
    pub fn known_cond(&mut self, cc: Cond, a: Val, b: Val) -> Option<bool> {
        let (cc, a, b) = self.order(cc, a, b);
        fold::cond(cc, self.ty(a), (a, self.as_const(a)), (b, self.as_const(b)))
    }

    /// `I64` 1 when `a cc b`, else 0.
    pub fn setcond(&mut self, cc: Cond, a: Val, b: Val) -> Val {
        debug_assert_eq!(self.ty(a), self.ty(b));
        let (cc, a, b) = self.order(cc, a, b);
        match fold::cond(cc, self.ty(a), (a, self.as_const(a)), (b, self.as_const(b))) {
            Some(x) => self.iconst(i64::from(x)),
            None => self.push_op(Op::SetCond, Type::I64, cc as u16, (a.0, b.0, 0)),
        }
    }

    /// `c != 0 ? t : f`.
    pub fn select(&mut self, c: Val, t: Val, f: Val) -> Val {
        debug_assert_eq!(self.ty(t), self.ty(f));
        match self.as_const(c) {
            Some(x) => [f, t][usize::from(x != 0)],
            None if t == f => t,
            None => self.push_op(Op::Select, self.ty(t), 0, (c.0, t.0, f.0)),
        }
    }

    /// `a cc b ? t : f`.
    pub fn movcond(&mut self, cc: Cond, ab: (Val, Val), t: Val, f: Val) -> Val {
        let c = self.setcond(cc, ab.0, ab.1);
        self.select(c, t, f)
    }

    /// Constants go to the right.
    fn order(&self, cc: Cond, a: Val, b: Val) -> (Cond, Val, Val) {
        if self.as_const(a).is_some() && self.as_const(b).is_none() {
            (cc.swapped(), b, a)
        } else {
            (cc, a, b)
        }
    }

    /// Bits `pos..pos + len`, zero-extended.
    pub fn extract_u(&mut self, a: Val, pos: u32, len: u32) -> Val {
        let w = self.ty(a).bits();
        let t = self.binary_imm(Op::Shl, a, i64::from(w - pos - len));
        self.binary_imm(Op::ShrU, t, i64::from(w - len))
    }

    /// Bits `pos..pos + len`, sign-extended.
    pub fn extract_s(&mut self, a: Val, pos: u32, len: u32) -> Val {
        let w = self.ty(a).bits();
        let t = self.binary_imm(Op::Shl, a, i64::from(w - pos - len));
        self.binary_imm(Op::ShrS, t, i64::from(w - len))
    }

    // ---- memory ----

    /// Loads from `addr + disp`; `ty` is `I64` or `I32` (at most as wide) for integers, `F32`/`F64` for equal sizes, `V128`
    /// for 4, 8 (the rest is zero) and 16 bytes.
    pub fn load(&mut self, ty: Type, mem: MemOp, addr: Val, disp: i32) -> Val {
        let (a, d) = self.fold_addr(addr, disp);
        self.push_op(Op::Load, ty, mem.0, (a.0, 0, d as u32))
    }

    /// Stores the low bytes of `value` to `addr + disp`.
    pub fn store(&mut self, mem: MemOp, addr: Val, disp: i32, value: Val) {
        let (a, d) = self.fold_addr(addr, disp);
        self.push_op(Op::Store, self.ty(value), mem.0, (a.0, value.0, d as u32));
    }

    fn fold_addr(&mut self, addr: Val, disp: i32) -> (Val, i32) {
        let (mut addr, mut disp) = (addr, disp);
        // Through chains, as pushes make them: then all of them have one base.
        loop {
            let i = *self.region.def(addr);
            if i.op == Op::Add
                && let Some(c) = self.as_const(Val(i.b))
                && let Ok(c) = i32::try_from(c as i64)
                && let Some(d) = disp.checked_add(c)
            {
                (addr, disp) = (Val(i.a), d);
            } else {
                return (addr, disp);
            }
        }
    }

    /// Atomic read-modify-write; yields the old value in `v`'s type. 1 to 8 bytes.
    pub fn atomic_rmw(&mut self, kind: RmwKind, mem: MemOp, addr: Val, v: Val) -> Val {
        let aux = mem.0 | (kind as u16) << MemOp::BITS;
        self.push_op(Op::AtomicRmw, self.ty(v), aux, (addr.0, v.0, 0))
    }

    /// Atomic compare and swap; yields the old value, extended as `mem` says, in `expected`'s type. The comparison is of
    /// the low bytes.
    pub fn atomic_cas(&mut self, mem: MemOp, addr: Val, expected: Val, new: Val) -> Val {
        self.push_op(Op::AtomicCas, self.ty(expected), mem.0, (addr.0, expected.0, new.0))
    }

    /// Memory barrier.
    pub fn fence(&mut self, kind: FenceKind) {
        self.push_op(Op::Fence, Type::Void, kind as u16, (0, 0, 0));
    }

    // ---- floating point ----

    /// `FAdd`, `FSub`, `FMul`, `FDiv`, `FMin` or `FMax` on equal types.
    pub fn fbinary(&mut self, op: Op, mode: FpMode, a: Val, b: Val) -> Val {
        debug_assert_eq!(self.ty(a), self.ty(b));
        self.push_op(op, self.ty(a), mode.0, (a.0, b.0, 0))
    }

    /// Square root.
    pub fn fsqrt(&mut self, mode: FpMode, a: Val) -> Val {
        self.push_op(Op::FSqrt, self.ty(a), mode.0, (a.0, 0, 0))
    }

    /// Fused `±(a * b) ± c`.
    pub fn fmuladd(&mut self, mode: FpMode, a: Val, b: Val, c: Val) -> Val {
        self.push_op(Op::FMulAdd, self.ty(a), mode.0, (a.0, b.0, c.0))
    }

    /// `FSgnj`, `FSgnjn` or `FSgnjx`.
    pub fn fsgn(&mut self, op: Op, a: Val, b: Val) -> Val {
        if op == Op::FSgnj && a == b {
            return a;
        }
        self.push_op(op, self.ty(a), 0, (a.0, b.0, 0))
    }

    /// `I64` 1 when `a cc b`.
    pub fn fcmp(&mut self, cc: FpCond, a: Val, b: Val) -> Val {
        self.push_op(Op::FCmp, Type::I64, cc as u16, (a.0, b.0, 0))
    }

    /// Class mask.
    pub fn fclass(&mut self, a: Val) -> Val {
        self.push_op(Op::FClass, Type::I64, 0, (a.0, 0, 0))
    }

    /// `FCvtFF`, `FCvtToS`, `FCvtToU`, `FCvtFromS` or `FCvtFromU` to type `to`.
    pub fn fcvt(&mut self, op: Op, mode: FpMode, to: Type, a: Val) -> Val {
        self.push_op(op, to, mode.0, (a.0, 0, 0))
    }

    /// Raw bits of a float.
    pub fn fbits(&mut self, a: Val) -> Val {
        let d = *self.region.def(a);
        let ty = if d.ty == Type::F32 { Type::I32 } else { Type::I64 };
        match d.op {
            Op::Const => self.constant(ty, d.imm()),
            Op::FMoveFromInt => Val(d.a),
            _ => self.push_op(Op::FMoveToInt, ty, 0, (a.0, 0, 0)),
        }
    }

    /// The float with the bits of `a`.
    pub fn ffrom_bits(&mut self, a: Val) -> Val {
        let d = *self.region.def(a);
        let ty = if d.ty == Type::I32 { Type::F32 } else { Type::F64 };
        match d.op {
            Op::Const => self.constant(ty, d.imm()),
            Op::FMoveToInt => Val(d.a),
            _ => self.push_op(Op::FMoveFromInt, ty, 0, (a.0, 0, 0)),
        }
    }

    /// NaN-boxed `F64` to `F32`.
    pub fn funbox(&mut self, a: Val) -> Val {
        let d = *self.region.def(a);
        if d.op == Op::FBox { Val(d.a) } else { self.push_op(Op::FUnbox, Type::F32, 0, (a.0, 0, 0)) }
    }

    /// `F32` to NaN-boxed `F64`.
    pub fn fbox(&mut self, a: Val) -> Val {
        self.push_op(Op::FBox, Type::F64, 0, (a.0, 0, 0))
    }

    // ---- vectors ----

    /// A vector instruction with a result of type `ty` on one to three operands. `fp`: it raises floating-point flags.
    pub fn vec(&mut self, insn: VecInsn, fp: bool, ty: Type, args: &[Val]) -> Val {
        let Some(&first) = args.first() else { return self.constant(ty, 0) };
        let n = self.region.vecs.iter().rposition(|v| *v == insn).unwrap_or_else(|| {
            self.region.vecs.push(insn);
            self.region.vecs.len() - 1
        });
        let at = |n: usize| args.get(n).unwrap_or(&first).0;
        let op = if fp { Op::VecFp } else { Op::Vec };
        self.push_op(op, ty, n as u16, (first.0, at(1), at(2)))
    }

    /// Runs host code (see [`HostCode`]) that writes the slots `writes`, at most [`HostCode::MAX_WRITES`].
    pub fn host(&mut self, code: &[u8], writes: &[Slot]) {
        debug_assert!(writes.len() <= HostCode::MAX_WRITES);
        let mut h = HostCode {
            at: self.region.host_bytes.len() as u32,
            len: code.len() as u32,
            ..HostCode::default()
        };
        for (to, slot) in h.writes.iter_mut().zip(writes) {
            *to = Some(*slot);
            *self.known_at(*slot) = (u32::MAX, 0);
        }
        self.region.host_bytes.extend_from_slice(code);
        self.region.hosts.push(h);
        let n = self.region.hosts.len() as u32 - 1;
        self.push_op(Op::Host, Type::Void, 0, (n, 0, 0));
    }

    // ---- calls ----

    /// Calls a helper. The result is to be used only when the helper has one.
    pub fn call(&mut self, id: HelperId, args: &[Val]) -> Val {
        let (effects, ret) = self.effects.get(id.0 as usize).copied().unwrap_or((Effects::ALL, Type::Void));
        let at = self.region.args.len() as u32;
        self.region.args.extend_from_slice(args);
        let v = self.push_op(Op::Call, ret, 0, (id.0, at, args.len() as u32));
        if effects.contains(Effects::WRITES_SLOTS) {
            self.known.fill((u32::MAX, 0));
        }
        v
    }

    // ---- control ----

    /// A new label without a guest pc: only forward branches may target it.
    pub fn label(&mut self) -> Label {
        self.region.labels.push(LabelInfo::default());
        Label(self.region.labels.len() as u32 - 1)
    }

    /// A new label that stands for guest pc `pc`.
    pub fn label_at(&mut self, pc: u64) -> Label {
        self.region.labels.push(LabelInfo { pc: Some(pc), ..LabelInfo::default() });
        Label(self.region.labels.len() as u32 - 1)
    }

    /// Places the label here. Values defined before are dead after it.
    pub fn bind(&mut self, l: Label) {
        let v = self.push_op(Op::Label, Type::Void, 0, (l.0, 0, 0));
        if let Some(i) = self.region.labels.get_mut(l.0 as usize) {
            i.at = Some(v.0);
        }
        self.new_block();
    }

    fn refer(&mut self, l: Label) {
        if let Some(i) = self.region.labels.get_mut(l.0 as usize) {
            i.refs += 1;
            i.backward |= i.at.is_some();
        }
    }

    /// Jumps to `l`.
    pub fn br(&mut self, l: Label) {
        self.refer(l);
        self.push_op(Op::Br, Type::Void, 0, (l.0, 0, 0));
    }

    /// Jumps to `l` when `a cc b`.
    pub fn brcond(&mut self, cc: Cond, a: Val, b: Val, l: Label) {
        let (cc, a, b) = self.order(cc, a, b);
        match fold::cond(cc, self.ty(a), (a, self.as_const(a)), (b, self.as_const(b))) {
            Some(true) => {
                self.br(l);
                // What follows up to the next label is dead; a fresh label keeps blocks well formed.
                let dead = self.label();
                self.bind(dead);
            }
            Some(false) => {}
            None => {
                self.refer(l);
                self.push_op(Op::BrCond, self.ty(a), cc as u16, (a.0, b.0, l.0));
            }
        }
    }

    /// Jumps to `l` when the integer `v` is not 0.
    pub fn brnz(&mut self, v: Val, l: Label) {
        let z = self.constant(self.ty(v), 0);
        self.brcond(Cond::Ne, v, z, l);
    }

    /// Ends with a jump to the constant guest pc.
    pub fn goto_pc(&mut self, pc: u64) {
        self.push(Inst::with_imm(Op::GotoPc, Type::Void, 0, pc));
    }

    /// Ends with a jump to the guest pc in `pc`: looked up under the mode that holds then, never linked. So a constant
    /// stays an indirect jump here; where the mode is the same and links may be made, use [`Builder::goto_pc`].
    pub fn goto_reg(&mut self, pc: Val, hint: JumpHint) {
        self.push_op(Op::GotoReg, Type::Void, hint as u16, (pc.0, 0, 0));
    }

    /// Leaves with `code` at guest pc `pc`.
    pub fn exit(&mut self, code: u32, pc: u64) {
        self.push(Inst::with_imm(Op::Exit, Type::Void, code, pc));
    }

    /// Leaves with `code` at the guest pc in `pc`.
    pub fn exit_reg(&mut self, code: u32, pc: Val) {
        self.push_op(Op::ExitReg, Type::Void, 0, (code, pc.0, 0));
    }

    /// Leaves with `code`; a helper has set the pc.
    pub fn exit_as_is(&mut self, code: u32) {
        self.push_op(Op::ExitAsIs, Type::Void, 0, (code, 0, 0));
    }
}

macro_rules! binaries {
    ($($(#[$doc:meta])* $name:ident $name_imm:ident $op:ident)*) => {
        impl Builder {
            $(
                $(#[$doc])*
                #[inline]
                pub fn $name(&mut self, a: Val, b: Val) -> Val {
                    self.binary(Op::$op, a, b)
                }
                /// The same with a constant second operand.
                #[inline]
                pub fn $name_imm(&mut self, a: Val, b: i64) -> Val {
                    self.binary_imm(Op::$op, a, b)
                }
            )*
        }
    };
}

binaries! {
    /// `a + b`
    add addi Add
    /// `a - b`
    sub subi Sub
    /// `a & b`
    and andi And
    /// `a | b`
    or ori Or
    /// `a ^ b`
    xor xori Xor
    /// `a & !b`
    andn andni Andn
    /// `a << b`
    shl shli Shl
    /// Logical shift right.
    shru shrui ShrU
    /// Arithmetic shift right.
    shrs shrsi ShrS
    /// Rotate left.
    rotl rotli RotL
    /// Rotate right.
    rotr rotri RotR
    /// Low half of the product.
    mul muli Mul
    /// High half of the signed product.
    mulhs mulhsi MulHS
    /// High half of the unsigned product.
    mulhu mulhui MulHU
    /// High half of signed times unsigned.
    mulhsu mulhsui MulHSU
    /// Signed quotient.
    divs divsi DivS
    /// Unsigned quotient.
    divu divui DivU
    /// Signed remainder.
    rems remsi RemS
    /// Unsigned remainder.
    remu remui RemU
    /// Signed minimum.
    mins minsi MinS
    /// Signed maximum.
    maxs maxsi MaxS
    /// Unsigned minimum.
    minu minui MinU
    /// Unsigned maximum.
    maxu maxui MaxU
}

macro_rules! unaries {
    ($($(#[$doc:meta])* $name:ident $op:ident)*) => {
        impl Builder {
            $(
                $(#[$doc])*
                #[inline]
                pub fn $name(&mut self, a: Val) -> Val {
                    self.unary(Op::$op, a)
                }
            )*
        }
    };
}

unaries! {
    /// `-a`
    neg Neg
    /// `!a`
    not Not
    /// Leading zeroes.
    clz Clz
    /// Trailing zeroes.
    ctz Ctz
    /// One bits.
    popcnt Popcnt
    /// Byte swap.
    bswap Bswap
    /// Sign-extends the low 8 bits.
    ext8s Ext8S
    /// Sign-extends the low 16 bits.
    ext16s Ext16S
    /// Zero-extends the low 8 bits.
    ext8u Ext8U
    /// Zero-extends the low 16 bits.
    ext16u Ext16U
}
