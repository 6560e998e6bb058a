//! Constant folding and identities of the builder. The evaluators also serve the interpreter.

use crate::op::{Cond, Op};
use crate::types::{Type, Val};

/// What an instruction folds to.
pub(crate) enum Folded {
    /// A constant.
    Const(u64),
    /// An existing value.
    Val(Val),
    /// The negation of a value.
    Neg(Val),
    /// An instruction, perhaps with its operands exchanged.
    Op(Op, Val, Val),
}

/// Value, and its bits when constant.
type Opnd = (Val, Option<u64>);

fn commutes(op: Op) -> bool {
    use Op::*;
    matches!(op, Add | And | Or | Xor | Mul | MulHS | MulHU | MinS | MaxS | MinU | MaxU)
}

/// Folds `a op b`.
pub(crate) fn binary(op: Op, ty: Type, a: Opnd, b: Opnd) -> Folded {
    if let (Some(x), Some(y)) = (a.1, b.1) {
        return Folded::Const(eval_binary(op, ty, x, y));
    }
    if op == Op::Sub && a.1 == Some(0) {
        return Folded::Neg(b.0);
    }
    let (a, b) = if a.1.is_some() && commutes(op) { (b, a) } else { (a, b) };
    let ones = if ty == Type::I32 { 0xffff_ffff } else { u64::MAX };
    let w = u64::from(ty.bits());
    match (op, b.1) {
        (Op::Add | Op::Sub | Op::Or | Op::Xor | Op::Andn, Some(0)) => Folded::Val(a.0),
        (Op::Shl | Op::ShrU | Op::ShrS | Op::RotL | Op::RotR, Some(n)) if n & (w - 1) == 0 => {
            Folded::Val(a.0)
        }
        (Op::And | Op::Mul, Some(0)) => Folded::Const(0),
        (Op::And, Some(n)) if n == ones => Folded::Val(a.0),
        (Op::Mul, Some(1)) => Folded::Val(a.0),
        (Op::Xor | Op::Sub, None) if a.0 == b.0 => Folded::Const(0),
        (Op::And | Op::Or | Op::MinS | Op::MinU | Op::MaxS | Op::MaxU, None) if a.0 == b.0 => {
            Folded::Val(a.0)
        }
        _ => Folded::Op(op, a.0, b.0),
    }
}

/// Folds a comparison.
pub(crate) fn cond(cc: Cond, ty: Type, a: Opnd, b: Opnd) -> Option<bool> {
    if a.0 == b.0 {
        return Some(cc.eval64(0, 0));
    }
    match (a.1, b.1) {
        (Some(x), Some(y)) => Some(if ty == Type::I32 { cc.eval32(x, y) } else { cc.eval64(x, y) }),
        (None, Some(0)) if cc == Cond::LtU => Some(false),
        (None, Some(0)) if cc == Cond::GeU => Some(true),
        _ => None,
    }
}

/// Evaluates a two-operand integer instruction. Upper halves of 32-bit operands are ignored, of the result zero.
pub(crate) fn eval_binary(op: Op, ty: Type, x: u64, y: u64) -> u64 {
    if ty == Type::I32 { u64::from(eval32(op, x as u32, y as u32)) } else { eval64(op, x, y) }
}

macro_rules! evaluator {
    ($name:ident, $u:ty, $s:ty, $wide_u:ty, $wide_s:ty) => {
        fn $name(op: Op, x: $u, y: $u) -> $u {
            let (sx, sy) = (x as $s, y as $s);
            let n = y as u32;
            match op {
                Op::Add => x.wrapping_add(y),
                Op::Sub => x.wrapping_sub(y),
                Op::And => x & y,
                Op::Or => x | y,
                Op::Xor => x ^ y,
                Op::Andn => x & !y,
                Op::Shl => x.wrapping_shl(n),
                Op::ShrU => x.wrapping_shr(n),
                Op::ShrS => sx.wrapping_shr(n) as $u,
                Op::RotL => x.rotate_left(n & (<$u>::BITS - 1)),
                Op::RotR => x.rotate_right(n & (<$u>::BITS - 1)),
                Op::Mul => x.wrapping_mul(y),
                Op::MulHS => ((sx as $wide_s * sy as $wide_s) >> <$u>::BITS) as $u,
                Op::MulHU => ((x as $wide_u * y as $wide_u) >> <$u>::BITS) as $u,
                Op::MulHSU => ((sx as $wide_s).wrapping_mul(y as $wide_s) >> <$u>::BITS) as $u,
                Op::DivS if y == 0 => <$u>::MAX,
                Op::DivS => sx.wrapping_div(sy) as $u,
                Op::DivU => x.checked_div(y).unwrap_or(<$u>::MAX),
                Op::RemS if y == 0 => x,
                Op::RemS => sx.wrapping_rem(sy) as $u,
                Op::RemU => x.checked_rem(y).unwrap_or(x),
                Op::MinS => sx.min(sy) as $u,
                Op::MaxS => sx.max(sy) as $u,
                Op::MinU => x.min(y),
                Op::MaxU => x.max(y),
                _ => 0,
            }
        }
    };
}

evaluator!(eval32, u32, i32, u64, i64);
evaluator!(eval64, u64, i64, u128, i128);

/// Evaluates a one-operand integer instruction.
pub(crate) fn eval_unary(op: Op, ty: Type, x: u64) -> u64 {
    let wide = ty != Type::I32;
    let r = match op {
        Op::Neg => x.wrapping_neg(),
        Op::Not => !x,
        Op::Clz if wide => u64::from(x.leading_zeros()),
        Op::Clz => u64::from((x as u32).leading_zeros()),
        Op::Ctz if wide => u64::from(x.trailing_zeros()),
        Op::Ctz => u64::from((x as u32).trailing_zeros()),
        Op::Popcnt if wide => u64::from(x.count_ones()),
        Op::Popcnt => u64::from((x as u32).count_ones()),
        Op::Bswap if wide => x.swap_bytes(),
        Op::Bswap => u64::from((x as u32).swap_bytes()),
        Op::Ext8S => x as i8 as u64,
        Op::Ext16S => x as i16 as u64,
        Op::Ext8U => x & 0xff,
        Op::Ext16U => x & 0xffff,
        _ => 0,
    };
    if wide { r } else { r & 0xffff_ffff }
}
