//! Registers, memory operands and immediates.

use holdfast_tcg_ir::{MemOp, Type, Val};
use iced_x86::{Instruction, OpKind, Register};

use super::Translator;
use crate::key::{CodeSize, Key};
use crate::state::{seg, slot};

/// Size of an operand; the discriminant is log2 of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Size {
    B1 = 0,
    B2 = 1,
    B4 = 2,
    B8 = 3,
}

impl Size {
    /// The size of `bytes`: 1, 2, 4 or 8 (and more).
    pub fn of(bytes: usize) -> Size {
        match bytes {
            0 | 1 => Size::B1,
            2 | 3 => Size::B2,
            4..=7 => Size::B4,
            _ => Size::B8,
        }
    }

    /// Bytes.
    pub const fn bytes(self) -> u32 {
        1 << self as u32
    }

    /// Bits.
    pub const fn bits(self) -> u32 {
        8 << self as u32
    }

    /// The IR type that values of this size are worked on in.
    pub const fn ty(self) -> Type {
        match self {
            Size::B8 => Type::I64,
            _ => Type::I32,
        }
    }

    /// All bits.
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// Zero-extended access.
    const fn mem(self) -> MemOp {
        match self {
            Size::B1 => MemOp::U8,
            Size::B2 => MemOp::U16,
            Size::B4 => MemOp::U32,
            Size::B8 => MemOp::U64,
        }
    }
}

/// A linear address: a value and a displacement.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addr {
    pub base: Val,
    pub disp: i32,
}

/// Number of the general register, and whether it is AH, CH, DH or BH.
fn number(r: Register) -> (usize, bool) {
    match r {
        Register::AH => (0, true),
        Register::CH => (1, true),
        Register::DH => (2, true),
        Register::BH => (3, true),
        // SPL and the like are numbered on from BH.
        _ if r.is_gpr8() => (r.full_register().number(), false),
        _ => (r.number(), false),
    }
}

impl Translator<'_> {
    // ---- registers ----

    /// All 64 bits of a general register by number.
    pub(super) fn gpr(&mut self, n: usize) -> Val {
        self.b.get(slot::gpr(n))
    }

    /// Sets all 64 bits.
    pub(super) fn set_gpr(&mut self, n: usize, v: Val) {
        self.b.set(slot::gpr(n), v);
    }

    /// The low `size` of a general register; above is garbage up to the type's width.
    pub(super) fn gpr_low(&mut self, n: usize, size: Size) -> Val {
        let v = self.gpr(n);
        if size == Size::B8 { v } else { self.b.trunc(v) }
    }

    /// Sets the low `size` of a general register to a value of its type; 32 bits zero the upper half.
    pub(super) fn set_gpr_low(&mut self, n: usize, size: Size, v: Val) {
        let v = match size {
            Size::B8 => v,
            Size::B4 => self.b.zext(v),
            Size::B2 | Size::B1 => {
                let mask = if size == Size::B2 { 0xffff } else { 0xff };
                let old = self.gpr(n);
                let old = self.b.andi(old, !mask);
                let low = self.zero_extended(size, v);
                let low = self.b.zext(low);
                self.b.or(old, low)
            }
        };
        self.set_gpr(n, v);
    }

    /// Number of the 64-bit register that an operand is part of.
    pub(super) fn whole_register(&self, r: Register) -> usize {
        number(r).0
    }

    /// Reads a register operand.
    pub(super) fn read_reg(&mut self, r: Register) -> Val {
        let (n, high) = number(r);
        let v = self.gpr(n);
        if high {
            let v = self.b.shrui(v, 8);
            return self.b.trunc(v);
        }
        if r.size() == 8 { v } else { self.b.trunc(v) }
    }

    /// Writes a register operand with a value of its size's type.
    pub(super) fn write_reg(&mut self, r: Register, v: Val) {
        let (n, high) = number(r);
        if !high {
            return self.set_gpr_low(n, Size::of(r.size()), v);
        }
        let old = self.gpr(n);
        let old = self.b.andi(old, !0xff00);
        let byte = self.zero_extended(Size::B1, v);
        let byte = self.b.zext(byte);
        let byte = self.b.shli(byte, 8);
        let v = self.b.or(old, byte);
        self.set_gpr(n, v);
    }

    /// `v` with everything above `size` zero, within its type.
    pub(super) fn zero_extended(&mut self, size: Size, v: Val) -> Val {
        if size >= Size::B4 {
            return v;
        }
        if let Some(c) = self.b.as_const(v) {
            return self.b.constant(Type::I32, c & size.mask());
        }
        let d = *self.b.region().def(v);
        if d.op == holdfast_tcg_ir::Op::Load && !d.mem().is_signed() && d.mem().log2() <= size as u32 {
            return v;
        }
        if size == Size::B1 { self.b.ext8u(v) } else { self.b.ext16u(v) }
    }

    /// `v` with the sign of its `size` above it, within its type.
    pub(super) fn sign_extended(&mut self, size: Size, v: Val) -> Val {
        match size {
            Size::B1 => self.b.ext8s(v),
            Size::B2 => self.b.ext16s(v),
            _ => v,
        }
    }

    /// A value of `from`'s type zero-extended to `I64`.
    pub(super) fn to64(&mut self, from: Size, v: Val) -> Val {
        if from == Size::B8 {
            return v;
        }
        let v = self.zero_extended(from, v);
        self.b.zext(v)
    }

    /// A value of `from`'s type sign-extended to `I64`.
    pub(super) fn to64_signed(&mut self, from: Size, v: Val) -> Val {
        if from == Size::B8 {
            return v;
        }
        let v = self.sign_extended(from, v);
        self.b.sext(v)
    }

    /// The low part of an `I64` in `size`'s type.
    pub(super) fn narrow(&mut self, size: Size, v: Val) -> Val {
        if size == Size::B8 { v } else { self.b.trunc(v) }
    }

    /// A constant of `size`'s type.
    pub(super) fn imm(&mut self, size: Size, value: u64) -> Val {
        self.b.constant(size.ty(), value & size.mask())
    }

    // ---- operands ----

    /// Size of operand `n`, a register or memory.
    pub(super) fn op_size(&self, insn: &Instruction, n: u32) -> Size {
        match insn.op_kind(n) {
            OpKind::Register => Size::of(insn.op_register(n).size()),
            _ => Size::of(insn.memory_size().size()),
        }
    }

    /// Reads operand `n` as a value of `size`.
    pub(super) fn read_op(&mut self, insn: &Instruction, n: u32, size: Size) -> Val {
        match insn.op_kind(n) {
            OpKind::Register => self.read_reg(insn.op_register(n)),
            OpKind::Memory => {
                let at = self.address(insn, size.bytes(), false);
                self.load(size, at)
            }
            _ => {
                let value = insn.try_immediate(n).unwrap_or(0);
                self.imm(size, value)
            }
        }
    }

    /// Writes operand `n`, a register or memory.
    pub(super) fn write_op(&mut self, insn: &Instruction, n: u32, size: Size, v: Val) {
        if insn.op_kind(n) == OpKind::Register {
            return self.write_reg(insn.op_register(n), v);
        }
        let at = self.address(insn, size.bytes(), true);
        self.store(size, at, v);
    }

    /// Replaces operand 0, a register or memory, by `f` of it.
    pub(super) fn modify(&mut self, insn: &Instruction, size: Size, f: impl FnOnce(&mut Self, Val) -> Val) {
        if insn.op_kind(0) == OpKind::Register {
            let r = insn.op_register(0);
            let old = self.read_reg(r);
            let new = f(self, old);
            return self.write_reg(r, new);
        }
        let at = self.address(insn, size.bytes(), true);
        let old = self.load_for_update(size, at);
        let new = f(self, old);
        self.store(size, at, new);
    }

    // ---- memory ----

    /// How data is accessed.
    fn access(&self, size: Size) -> MemOp {
        let mem = size.mem().mmu(self.key.mmu_idx());
        if self.key.contains(Key::ALIGN) { mem.aligned() } else { mem }
    }

    /// Loads, zero-extended in the size's type.
    pub(super) fn load(&mut self, size: Size, at: Addr) -> Val {
        self.b.load(size.ty(), self.access(size), at.base, at.disp)
    }

    /// Loads what is stored to next: it faults as a store, and both share a probe.
    pub(super) fn load_for_update(&mut self, size: Size, at: Addr) -> Val {
        let mem = self.access(size).for_update();
        self.b.load(size.ty(), mem, at.base, at.disp)
    }

    /// Loads sign-extended to `to`'s type.
    pub(super) fn load_signed(&mut self, size: Size, to: Size, at: Addr) -> Val {
        let mut mem = self.access(size);
        if size < Size::B8 {
            mem.0 |= MemOp::S8.0;
        }
        self.b.load(to.ty(), mem, at.base, at.disp)
    }

    /// Stores.
    pub(super) fn store(&mut self, size: Size, at: Addr, v: Val) {
        let mem = self.access(size);
        self.b.store(mem, at.base, at.disp, v);
    }

    /// For atomic instructions: how, and the whole address as one value.
    pub(super) fn atomic_at(&mut self, size: Size, at: Addr) -> (MemOp, Val) {
        let mem = self.access(size);
        (mem, self.whole(at))
    }

    /// The address as one value.
    pub(super) fn whole(&mut self, at: Addr) -> Val {
        self.b.addi(at.base, i64::from(at.disp))
    }

    /// Bits of the memory operand's address.
    pub(super) fn address_bits(&self, insn: &Instruction) -> u32 {
        let base = insn.memory_base();
        let r = if base == Register::None { insn.memory_index() } else { base };
        match r {
            Register::None => insn.memory_displ_size() * 8,
            Register::RIP => 64,
            Register::EIP => 32,
            _ if r.is_vector_register() => {
                if self.size == CodeSize::Bits64 {
                    64
                } else {
                    32
                }
            }
            _ => r.size() as u32 * 8,
        }
    }

    /// The effective address without segment: a value and what is to be added to it. Vector indexes are left out.
    fn effective(&mut self, insn: &Instruction) -> Addr {
        let bits = self.address_bits(insn);
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let disp = insn.memory_displacement64();
        if matches!(base, Register::RIP | Register::EIP) {
            return Addr { base: self.b.iconst(disp as i64), disp: 0 };
        }
        let index = if index == Register::None || index.is_vector_register() {
            None
        } else {
            let v = self.gpr(index.number());
            Some(self.b.shli(v, i64::from(insn.memory_index_scale().trailing_zeros())))
        };
        let base = (base != Register::None).then(|| self.gpr(base.number()));
        let sum = match (base, index) {
            (Some(base), Some(index)) => self.b.add(base, index),
            (Some(v), None) | (None, Some(v)) => v,
            (None, None) => {
                let at = if bits == 64 { disp } else { disp & u64::MAX >> (64 - bits) };
                return Addr { base: self.b.iconst(at as i64), disp: 0 };
            }
        };
        match (bits, i32::try_from(disp as i64)) {
            (64, Ok(disp)) => Addr { base: sum, disp },
            (64, Err(_)) => Addr { base: self.b.addi(sum, disp as i64), disp: 0 },
            (32, _) => {
                let low = self.b.trunc(sum);
                let low = self.b.addi(low, i64::from(disp as i32));
                Addr { base: self.b.zext(low), disp: 0 }
            }
            _ => {
                let sum = self.b.addi(sum, i64::from(disp as i16));
                Addr { base: self.b.andi(sum, 0xffff), disp: 0 }
            }
        }
    }

    /// The offset in its segment of the memory operand, as LEA gives it (`I64`).
    pub(super) fn offset(&mut self, insn: &Instruction) -> Val {
        let at = self.effective(insn);
        self.whole(at)
    }

    /// The linear address of the memory operand, of `bytes` bytes, checked against its segment.
    pub(super) fn address(&mut self, insn: &Instruction, bytes: u32, write: bool) -> Addr {
        let at = self.effective(insn);
        self.linear(segment(insn.memory_segment()), at, bytes, write)
    }

    /// The linear address of offset `at` in segment register `s`, of `bytes` bytes, checked against the segment.
    pub(super) fn linear(&mut self, s: usize, at: Addr, bytes: u32, write: bool) -> Addr {
        if self.size == CodeSize::Bits64 {
            if s != seg::FS && s != seg::GS {
                return at;
            }
            let base = self.b.get(slot::seg_base(s));
            return Addr { base: self.b.add(at.base, base), disp: at.disp };
        }
        if self.key.contains(Key::DATA_FLAT) && matches!(s, seg::ES | seg::SS | seg::DS) {
            return at;
        }
        let offset = self.whole(at);
        let how = self.b.iconst(s as i64 | i64::from(bytes) << 8 | i64::from(write) << 24);
        let base = self.b.call(self.ids.int.segment, &[how, offset]);
        Addr { base, disp: 0 }
    }
}

/// The index of a segment register; DS for none.
pub(crate) fn segment(r: Register) -> usize {
    match r {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}
