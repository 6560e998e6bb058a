//! Instructions.

use crate::traits::{EFFECT, OPERANDS, TRAITS};
use crate::types::{Type, Val};

/// What an instruction does. Operands are named by [`Inst`]'s fields `a`, `b`, `c`; `aux` holds small attributes.
///
/// Integer instructions work on the width of the instruction's type. All of them are total: no operand values
/// are undefined, so the interpreter and the back end agree everywhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum Op {
    /// Nothing; what passes leave behind.
    Nop,
    /// Start of the guest instruction at pc [`Inst::imm`]. Faults of what follows report that pc.
    InsnStart,
    /// The constant [`Inst::imm`] (raw bits for floats).
    Const,
    /// Reads the slot at offset `a`.
    GetSlot,
    /// Writes value `b` to the slot at offset `a`; the type is the slot's.
    SetSlot,

    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a & b`
    And,
    /// `a | b`
    Or,
    /// `a ^ b`
    Xor,
    /// `a & !b`
    Andn,
    /// `a << (b mod width)`
    Shl,
    /// Logical `a >> (b mod width)`
    ShrU,
    /// Arithmetic `a >> (b mod width)`
    ShrS,
    /// Rotate left by `b mod width`.
    RotL,
    /// Rotate right by `b mod width`.
    RotR,
    /// Low half of the product.
    Mul,
    /// High half of the signed product.
    MulHS,
    /// High half of the unsigned product.
    MulHU,
    /// High half of signed `a` times unsigned `b`.
    MulHSU,
    /// Signed quotient; `b == 0` gives -1 and `MIN / -1` gives `MIN`.
    DivS,
    /// Unsigned quotient; `b == 0` gives all ones.
    DivU,
    /// Signed remainder; `b == 0` gives `a` and `MIN % -1` gives 0.
    RemS,
    /// Unsigned remainder; `b == 0` gives `a`.
    RemU,
    /// Signed minimum.
    MinS,
    /// Signed maximum.
    MaxS,
    /// Unsigned minimum.
    MinU,
    /// Unsigned maximum.
    MaxU,
    /// `-a`
    Neg,
    /// `!a`
    Not,
    /// Leading zero bits; the width for 0.
    Clz,
    /// Trailing zero bits; the width for 0.
    Ctz,
    /// One bits.
    Popcnt,
    /// Byte swap.
    Bswap,
    /// Sign-extends the low 8 bits.
    Ext8S,
    /// Sign-extends the low 16 bits.
    Ext16S,
    /// Zero-extends the low 8 bits.
    Ext8U,
    /// Zero-extends the low 16 bits.
    Ext16U,
    /// `I32` to `I64` with sign.
    SExt,
    /// `I32` to `I64` with zeroes.
    ZExt,
    /// `I64` to `I32`: the low half.
    Trunc,
    /// `I64` 1 when `a cc b` ([`Inst::cond`]), else 0. The operands have one integer type.
    SetCond,
    /// `a != 0 ? b : c`; `a` is an integer of either width.
    Select,

    /// Loads from guest address `a + disp` (`disp` is `c` as `i32`) as [`Inst::mem`] says; the result type says what
    /// it is extended to. May fault.
    Load,
    /// Stores value `b` to guest address `a + disp` (`c`). May fault.
    Store,
    /// Atomic read-modify-write of `a` (no displacement) with operand `b`, kind in [`Inst::rmw`]; yields the old
    /// value, extended as [`Inst::mem`] says. Sequentially consistent. May fault.
    AtomicRmw,
    /// Atomic compare and swap at `a`: if memory equals `b` it becomes `c`. Yields the old value, extended as
    /// [`Inst::mem`] says. Sequentially consistent. May fault (as a store) even when the comparison fails.
    AtomicCas,
    /// Memory barrier, [`FenceKind`] in `aux`.
    Fence,

    /// Floating-point `a + b`.
    FAdd,
    /// `a - b`
    FSub,
    /// `a * b`
    FMul,
    /// `a / b`
    FDiv,
    /// Square root of `a`.
    FSqrt,
    /// Fused `±(a * b) ± c`; the signs are in [`FpMode`].
    FMulAdd,
    /// IEEE 754-2019 `minimumNumber`: a NaN loses against a number, -0 < +0; a signalling NaN raises invalid.
    FMin,
    /// IEEE 754-2019 `maximumNumber`.
    FMax,
    /// `a` with the sign of `b`; raises nothing.
    FSgnj,
    /// `a` with the opposite of `b`'s sign.
    FSgnjn,
    /// `a` with the exclusive or of both signs.
    FSgnjx,
    /// `I64` 1 when `a cc b` ([`FpCond`]), else 0 (also when unordered).
    FCmp,
    /// Class mask, RISC-V `fclass` numbering: bit 0 -inf, 1 -normal, 2 -subnormal, 3 -0, 4 +0, 5 +subnormal,
    /// 6 +normal, 7 +inf, 8 signalling NaN, 9 quiet NaN. `I64`.
    FClass,
    /// Converts between `F32` and `F64`.
    FCvtFF,
    /// Float to signed integer of the result type; saturates and raises invalid when out of range, NaN gives the maximum.
    FCvtToS,
    /// Float to unsigned integer likewise; negative gives 0 with invalid, NaN the maximum.
    FCvtToU,
    /// Signed integer `a` to float.
    FCvtFromS,
    /// Unsigned integer `a` to float.
    FCvtFromU,
    /// The raw bits of a float as an integer of its size.
    FMoveToInt,
    /// An integer's bits as the float of its size.
    FMoveFromInt,
    /// NaN-boxed `F64` to `F32`: the low half when the upper half is all ones, else the canonical NaN.
    FUnbox,
    /// `F32` to `F64`, upper half all ones.
    FBox,

    /// Calls helper `a`; its arguments are `c` entries of [`crate::Region::args`] from `b` on.
    Call,

    /// Vector instruction [`crate::Region::vecs`]`[aux]` on `a`, `b` and `c` (operands that it does not have repeat `a`).
    Vec,
    /// The same for floating-point instructions, which raise sticky flags.
    VecFp,
    /// Runs host code [`crate::Region::hosts`]`[a]`.
    Host,

    /// Begins label `a`. Ends the extended basic block.
    Label,
    /// Jumps to label `a`.
    Br,
    /// Jumps to label `c` when `a cc b`; else falls through.
    BrCond,
    /// Goes on at the constant guest pc [`Inst::imm`].
    GotoPc,
    /// Goes on at the guest pc in value `a`; `aux` is a [`crate::JumpHint`].
    GotoReg,
    /// Leaves translated code with exit code `a`; the guest pc is [`Inst::imm`].
    Exit,
    /// Leaves with exit code `a`; the guest pc is value `b`.
    ExitReg,
    /// Leaves with exit code `a`; a helper has already set [`crate::env::EnvHeader::pc`].
    ExitAsIs,
}

impl Op {
    /// Whether it unconditionally ends the block.
    #[inline]
    pub const fn is_terminator(self) -> bool {
        matches!(self, Op::Br | Op::GotoPc | Op::GotoReg | Op::Exit | Op::ExitReg | Op::ExitAsIs)
    }

    /// Two-operand integer arithmetic.
    #[inline]
    pub const fn is_int_binary(self) -> bool {
        (self as u8) >= (Op::Add as u8) && (self as u8) <= (Op::MaxU as u8)
    }

    /// One-operand integer arithmetic within one type.
    #[inline]
    pub const fn is_int_unary(self) -> bool {
        (self as u8) >= (Op::Neg as u8) && (self as u8) <= (Op::Ext16U as u8)
    }

    /// Whether dropping it is wrong even when its result is unused. Floating-point arithmetic raises flags.
    #[inline]
    pub const fn has_effect(self) -> bool {
        TRAITS[self as usize] & EFFECT != 0
    }

    /// How many of `a`, `b`, `c` are values, as a bit mask (bit 0 is `a`). Call arguments are not counted.
    #[inline]
    pub const fn operands(self) -> u8 {
        TRAITS[self as usize] & OPERANDS
    }
}

/// One instruction, 16 bytes. What the fields mean depends on [`Op`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Inst {
    /// What it does.
    pub op: Op,
    /// Type of the result (of the value, for [`Op::SetSlot`] and [`Op::Store`]).
    pub ty: Type,
    /// Small attributes.
    pub aux: u16,
    /// First operand.
    pub a: u32,
    /// Second operand, or the low half of the immediate.
    pub b: u32,
    /// Third operand, or the high half of the immediate.
    pub c: u32,
}

impl Inst {
    /// An instruction with plain fields.
    #[inline]
    pub const fn new(op: Op, ty: Type, aux: u16, abc: (u32, u32, u32)) -> Self {
        Self { op, ty, aux, a: abc.0, b: abc.1, c: abc.2 }
    }

    /// An instruction with a 64-bit immediate in `b` and `c`.
    #[inline]
    pub const fn with_imm(op: Op, ty: Type, a: u32, imm: u64) -> Self {
        Self { op, ty, aux: 0, a, b: imm as u32, c: (imm >> 32) as u32 }
    }

    /// The immediate in `b` and `c`.
    #[inline]
    pub const fn imm(&self) -> u64 {
        self.b as u64 | (self.c as u64) << 32
    }

    /// Displacement of a load or store.
    #[inline]
    pub const fn disp(&self) -> i32 {
        self.c as i32
    }

    /// Condition of [`Op::SetCond`] and [`Op::BrCond`].
    #[inline]
    pub const fn cond(&self) -> Cond {
        Cond::from_index(self.aux)
    }

    /// Condition of [`Op::FCmp`].
    #[inline]
    pub const fn fp_cond(&self) -> FpCond {
        match self.aux & 3 {
            0 => FpCond::Eq,
            1 => FpCond::Lt,
            _ => FpCond::Le,
        }
    }

    /// How a memory instruction accesses.
    #[inline]
    pub const fn mem(&self) -> MemOp {
        MemOp(self.aux & MemOp::MASK)
    }

    /// As [`Inst::mem`] for an [`Op::Load`], with [`MemOp::FOR_UPDATE`].
    #[inline]
    pub const fn load_mem(&self) -> MemOp {
        MemOp(self.aux & (MemOp::MASK | MemOp::FOR_UPDATE))
    }

    /// Kind of an [`Op::AtomicRmw`].
    #[inline]
    pub const fn rmw(&self) -> RmwKind {
        RmwKind::from_index(self.aux >> MemOp::BITS)
    }

    /// Rounding and NaN rules of a floating-point instruction.
    #[inline]
    pub const fn fp(&self) -> FpMode {
        FpMode(self.aux)
    }

    /// The values it uses among `a`, `b`, `c`.
    #[inline]
    pub fn uses(&self) -> impl Iterator<Item = Val> + use<> {
        let mask = self.op.operands();
        let abc = [self.a, self.b, self.c];
        (0..3usize).filter(move |i| mask & 1 << i != 0).map(move |i| Val(abc[i & 3]))
    }
}

/// Integer conditions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum Cond {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Signed less.
    LtS,
    /// Signed greater or equal.
    GeS,
    /// Unsigned less.
    LtU,
    /// Unsigned greater or equal.
    GeU,
    /// Signed less or equal.
    LeS,
    /// Signed greater.
    GtS,
    /// Unsigned less or equal.
    LeU,
    /// Unsigned greater.
    GtU,
}

impl Cond {
    /// The condition with discriminant `n`.
    #[inline]
    pub const fn from_index(n: u16) -> Cond {
        match n {
            0 => Cond::Eq,
            1 => Cond::Ne,
            2 => Cond::LtS,
            3 => Cond::GeS,
            4 => Cond::LtU,
            5 => Cond::GeU,
            6 => Cond::LeS,
            7 => Cond::GtS,
            8 => Cond::LeU,
            _ => Cond::GtU,
        }
    }

    /// True exactly when `self` is false.
    #[inline]
    pub const fn inverse(self) -> Cond {
        match self {
            Cond::Eq => Cond::Ne,
            Cond::Ne => Cond::Eq,
            Cond::LtS => Cond::GeS,
            Cond::GeS => Cond::LtS,
            Cond::LtU => Cond::GeU,
            Cond::GeU => Cond::LtU,
            Cond::LeS => Cond::GtS,
            Cond::GtS => Cond::LeS,
            Cond::LeU => Cond::GtU,
            Cond::GtU => Cond::LeU,
        }
    }

    /// The condition with the operands exchanged.
    #[inline]
    pub const fn swapped(self) -> Cond {
        match self {
            Cond::Eq | Cond::Ne => self,
            Cond::LtS => Cond::GtS,
            Cond::GeS => Cond::LeS,
            Cond::LtU => Cond::GtU,
            Cond::GeU => Cond::LeU,
            Cond::LeS => Cond::GeS,
            Cond::GtS => Cond::LtS,
            Cond::LeU => Cond::GeU,
            Cond::GtU => Cond::LtU,
        }
    }

    /// Evaluates on 64-bit operands (sign- or zero-extended alike for 32-bit ones: use [`Cond::eval32`] there).
    #[inline]
    pub const fn eval64(self, a: u64, b: u64) -> bool {
        match self {
            Cond::Eq => a == b,
            Cond::Ne => a != b,
            Cond::LtS => (a as i64) < b as i64,
            Cond::GeS => a as i64 >= b as i64,
            Cond::LtU => a < b,
            Cond::GeU => a >= b,
            Cond::LeS => a as i64 <= b as i64,
            Cond::GtS => a as i64 > b as i64,
            Cond::LeU => a <= b,
            Cond::GtU => a > b,
        }
    }

    /// Evaluates on the low 32 bits.
    #[inline]
    pub const fn eval32(self, a: u64, b: u64) -> bool {
        self.eval64(a as i32 as i64 as u64, b as i32 as i64 as u64)
    }
}

/// Floating-point conditions. All are false when unordered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum FpCond {
    /// Equal; only signalling NaNs raise invalid.
    Eq,
    /// Less; any NaN raises invalid.
    Lt,
    /// Less or equal; any NaN raises invalid.
    Le,
}

/// Rounding modes. The discriminants are those of RISC-V's `rm` field.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum Round {
    /// To nearest, ties to even.
    NearestEven = 0,
    /// Toward zero.
    Zero = 1,
    /// Toward minus infinity.
    Down = 2,
    /// Toward plus infinity.
    Up = 3,
    /// To nearest, ties away from zero. The host cannot do it: softfp.
    NearestAway = 4,
    /// The mode in the guest's MXCSR. A guest mode that MXCSR cannot express must be part of the translation key
    /// and be emitted as a static mode.
    Dynamic = 7,
}

/// What happens to NaN results.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum NanPolicy {
    /// As x86 does: the first NaN operand, made quiet; the default NaN is negative.
    Host,
    /// Every NaN result is the positive canonical quiet NaN (RISC-V).
    Canonical,
}

/// Attributes of a floating-point instruction, packed in [`Inst::aux`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct FpMode(pub u16);

impl FpMode {
    /// RISC-V rules, rounding as given.
    #[inline]
    pub const fn canonical(round: Round) -> Self {
        FpMode(round as u16 | 1 << 3)
    }

    /// x86 rules, rounding as given.
    #[inline]
    pub const fn host(round: Round) -> Self {
        FpMode(round as u16)
    }

    /// With the product of [`Op::FMulAdd`] negated.
    #[inline]
    pub const fn negate_product(self, on: bool) -> Self {
        FpMode(self.0 & !0x40 | (on as u16) << 6)
    }

    /// With the addend of [`Op::FMulAdd`] negated.
    #[inline]
    pub const fn negate_addend(self, on: bool) -> Self {
        FpMode(self.0 & !0x80 | (on as u16) << 7)
    }

    /// Rounding mode.
    #[inline]
    pub const fn round(self) -> Round {
        match self.0 & 7 {
            0 => Round::NearestEven,
            1 => Round::Zero,
            2 => Round::Down,
            3 => Round::Up,
            4 => Round::NearestAway,
            _ => Round::Dynamic,
        }
    }

    /// NaN rule.
    #[inline]
    pub const fn nan(self) -> NanPolicy {
        if self.0 & 8 != 0 { NanPolicy::Canonical } else { NanPolicy::Host }
    }

    /// Whether the product is negated.
    #[inline]
    pub const fn neg_product(self) -> bool {
        self.0 & 0x40 != 0
    }

    /// Whether the addend is negated.
    #[inline]
    pub const fn neg_addend(self) -> bool {
        self.0 & 0x80 != 0
    }
}

/// How memory is accessed, packed: bits 0-2 log2 of the size in bytes, 3 sign-extend, 4 big-endian, 5 must be
/// naturally aligned (the slow path raises the guest's misaligned fault), 6-9 MMU index.
///
/// The same bits reach the slow-path functions as their `desc` argument.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct MemOp(pub u16);

impl MemOp {
    /// Bits used.
    pub const BITS: u16 = 10;
    /// Mask of the bits used.
    pub const MASK: u16 = (1 << Self::BITS) - 1;
    /// Set in the attributes of an [`Op::Load`] whose location is stored to next: it probes, and faults, as a store.
    pub const FOR_UPDATE: u16 = 1 << Self::BITS;
    /// One byte, zero-extended, little-endian, any alignment, MMU index 0.
    pub const U8: MemOp = MemOp(0);
    /// Two bytes.
    pub const U16: MemOp = MemOp(1);
    /// Four bytes.
    pub const U32: MemOp = MemOp(2);
    /// Eight bytes.
    pub const U64: MemOp = MemOp(3);
    /// Sixteen bytes ([`Type::V128`]).
    pub const V128: MemOp = MemOp(4);
    /// One byte, sign-extended.
    pub const S8: MemOp = MemOp(8);
    /// Two bytes, sign-extended.
    pub const S16: MemOp = MemOp(9);
    /// Four bytes, sign-extended.
    pub const S32: MemOp = MemOp(10);

    /// The same access, big-endian.
    #[inline]
    pub const fn big_endian(self) -> Self {
        MemOp(self.0 | 0x10)
    }

    /// The same access, faulting when misaligned.
    #[inline]
    pub const fn aligned(self) -> Self {
        MemOp(self.0 | 0x20)
    }

    /// The same load, of a location that is stored to next.
    #[inline]
    pub const fn for_update(self) -> Self {
        MemOp(self.0 | Self::FOR_UPDATE)
    }

    /// Whether a load is of a location that is stored to next.
    #[inline]
    pub const fn is_for_update(self) -> bool {
        self.0 & Self::FOR_UPDATE != 0
    }

    /// The same access through MMU index `i` (less than [`crate::env::MMU_MODES`]).
    #[inline]
    pub const fn mmu(self, i: u8) -> Self {
        MemOp(self.0 & !0x3c0 | (i as u16 & 15) << 6)
    }

    /// Size in bytes.
    #[inline]
    pub const fn bytes(self) -> u32 {
        1 << (self.0 & 7)
    }

    /// Log2 of the size.
    #[inline]
    pub const fn log2(self) -> u32 {
        self.0 as u32 & 7
    }

    /// Whether a load sign-extends.
    #[inline]
    pub const fn is_signed(self) -> bool {
        self.0 & 8 != 0
    }

    /// Whether it is big-endian.
    #[inline]
    pub const fn is_big_endian(self) -> bool {
        self.0 & 0x10 != 0
    }

    /// Whether it must be aligned.
    #[inline]
    pub const fn is_aligned(self) -> bool {
        self.0 & 0x20 != 0
    }

    /// MMU index.
    #[inline]
    pub const fn mmu_idx(self) -> usize {
        (self.0 >> 6 & 15) as usize
    }
}

/// Atomic read-modify-write kinds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum RmwKind {
    /// Exchange.
    Swap,
    /// Add.
    Add,
    /// And.
    And,
    /// Or.
    Or,
    /// Exclusive or.
    Xor,
    /// Signed minimum.
    MinS,
    /// Signed maximum.
    MaxS,
    /// Unsigned minimum.
    MinU,
    /// Unsigned maximum.
    MaxU,
}

impl RmwKind {
    /// The kind with discriminant `n`.
    #[inline]
    pub const fn from_index(n: u16) -> RmwKind {
        match n {
            0 => RmwKind::Swap,
            1 => RmwKind::Add,
            2 => RmwKind::And,
            3 => RmwKind::Or,
            4 => RmwKind::Xor,
            5 => RmwKind::MinS,
            6 => RmwKind::MaxS,
            7 => RmwKind::MinU,
            _ => RmwKind::MaxU,
        }
    }

    /// The new value for `old` and operand `x`, both `bytes` wide in the low bits.
    #[inline]
    pub const fn apply(self, old: u64, x: u64, bytes: u32) -> u64 {
        let sh = 64 - bytes * 8;
        let (so, sx) = (((old << sh) as i64) >> sh, ((x << sh) as i64) >> sh);
        let (uo, ux) = (old << sh >> sh, x << sh >> sh);
        let r = match self {
            RmwKind::Swap => x,
            RmwKind::Add => old.wrapping_add(x),
            RmwKind::And => old & x,
            RmwKind::Or => old | x,
            RmwKind::Xor => old ^ x,
            RmwKind::MinS => (if so < sx { so } else { sx }) as u64,
            RmwKind::MaxS => (if so > sx { so } else { sx }) as u64,
            RmwKind::MinU => {
                if uo < ux {
                    uo
                } else {
                    ux
                }
            }
            RmwKind::MaxU => {
                if uo > ux {
                    uo
                } else {
                    ux
                }
            }
        };
        r << sh >> sh
    }
}

/// Barriers. On a host with x86's ordering only [`FenceKind::Full`] costs an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum FenceKind {
    /// Orders everything, stores before later loads included.
    Full,
    /// Orders all but stores before later loads.
    AcquireRelease,
}
