//! Floating point of the interpreter: softfp throughout.

use crate::op::{FpCond, FpMode, Inst, NanPolicy, Op, Round};
use crate::types::Type;
use holdfast_softfp::{self as soft, Format, Int, NanRule, Rounding, Tininess, Unit};

fn unit(mode: FpMode, mxcsr: u32) -> Unit {
    let rounding = match mode.round() {
        Round::NearestEven => Rounding::NearestEven,
        Round::Zero => Rounding::Zero,
        Round::Down => Rounding::Down,
        Round::Up => Rounding::Up,
        Round::NearestAway => Rounding::NearestAway,
        Round::Dynamic => match mxcsr >> 13 & 3 {
            0 => Rounding::NearestEven,
            1 => Rounding::Down,
            2 => Rounding::Up,
            _ => Rounding::Zero,
        },
    };
    let nan = match mode.nan() {
        NanPolicy::Canonical => NanRule::Canonical,
        NanPolicy::Host => NanRule::FirstOperand,
    };
    Unit { rounding, nan, tininess: Tininess::AfterRounding, flags: 0 }
}

/// Sticky MXCSR bits (0 invalid, 2 division by zero, 3 overflow, 4 underflow, 5 inexact) of softfp's flags.
fn sticky(flags: u8) -> u32 {
    let bit = |mask: u8, to: u32| u32::from(flags & mask != 0) << to;
    bit(soft::flags::INVALID, 0)
        | bit(soft::flags::DIV_BY_ZERO, 2)
        | bit(soft::flags::OVERFLOW, 3)
        | bit(soft::flags::UNDERFLOW, 4)
        | bit(soft::flags::INEXACT, 5)
}

fn format(ty: Type) -> Format {
    if ty == Type::F32 { Format::F32 } else { Format::F64 }
}

fn int(ty: Type, signed: bool) -> Int {
    match (ty == Type::I32, signed) {
        (true, true) => Int::I32,
        (true, false) => Int::U32,
        (false, true) => Int::I64,
        (false, false) => Int::U64,
    }
}

/// Evaluates a floating-point instruction whose first operand has type `aty`; raises flags in `mxcsr`.
pub(super) fn eval(i: &Inst, aty: Type, [a, b, c]: [u64; 3], mxcsr: &mut u32) -> u64 {
    let from = format(aty);
    let to = format(i.ty);
    // Comparisons keep their condition where the others keep the mode.
    let mode = if i.op == Op::FCmp { FpMode::canonical(Round::Dynamic) } else { i.fp() };
    let mut u = unit(mode, *mxcsr);
    let sign = from.sign_bit();
    let r = match i.op {
        Op::FAdd => u.add(from, a, b),
        Op::FSub => u.sub(from, a, b),
        Op::FMul => u.mul(from, a, b),
        Op::FDiv => u.div(from, a, b),
        Op::FSqrt => u.sqrt(from, a),
        Op::FMulAdd => u.mul_add(from, [a, b, c], mode.neg_product(), mode.neg_addend()),
        Op::FMin => u.min(from, a, b),
        Op::FMax => u.max(from, a, b),
        Op::FSgnj => a & !sign | b & sign,
        Op::FSgnjn => a & !sign | !b & sign,
        Op::FSgnjx => a ^ b & sign,
        Op::FCmp => u64::from(match i.fp_cond() {
            FpCond::Eq => u.equal(from, a, b),
            FpCond::Lt => u.less(from, a, b),
            FpCond::Le => u.less_equal(from, a, b),
        }),
        Op::FClass => u64::from(soft::class(from, a)),
        Op::FCvtFF => u.convert(from, to, a),
        Op::FCvtToS => u.to_int(from, int(i.ty, true), a),
        Op::FCvtToU => u.to_int(from, int(i.ty, false), a),
        Op::FCvtFromS => u.from_int(to, int(aty, true), a),
        Op::FCvtFromU => u.from_int(to, int(aty, false), a),
        Op::FMoveToInt | Op::FMoveFromInt => a,
        Op::FUnbox if a >> 32 == 0xffff_ffff => a & 0xffff_ffff,
        Op::FUnbox => Format::F32.canonical_nan(),
        Op::FBox => a | 0xffff_ffff_0000_0000,
        _ => 0,
    };
    *mxcsr |= sticky(u.flags);
    r
}
