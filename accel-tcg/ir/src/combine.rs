//! Operations that are made of others, and others that are one.

use crate::builder::Builder;
use crate::op::{MemOp, Op};
use crate::types::Val;

impl Builder {
    /// Stores the low bytes of `value`'s bits, an `F64` that may hold an `F32` in a box, to `addr + disp`: from where they are, for a
    /// box is written by its halves, and what reads it whole right behind waits until both are in the cache.
    pub fn store_float(&mut self, mem: MemOp, addr: Val, disp: i32, value: Val) {
        let d = *self.region().def(value);
        let value = match (d.op, mem.bytes()) {
            (Op::FBox, 4) => Val(d.a),
            (Op::Const | Op::FMoveFromInt, _) => self.fbits(value),
            (_, 8) => value,
            _ => self.fbits(value),
        };
        self.store(mem, addr, disp, value);
    }

    /// `a | !b`
    pub fn orn(&mut self, a: Val, b: Val) -> Val {
        let n = self.not(b);
        self.or(a, n)
    }

    /// `!(a ^ b)`
    pub fn xnor(&mut self, a: Val, b: Val) -> Val {
        let x = self.xor(a, b);
        self.not(x)
    }

    /// `(a << n) + b`
    pub fn shadd(&mut self, a: Val, n: i64, b: Val) -> Val {
        let s = self.shli(a, n);
        self.add(s, b)
    }

    /// Every non-zero byte of an `I64` becomes 0xff.
    pub fn orc_b(&mut self, a: Val) -> Val {
        // Bit 7 of each byte: set when any bit of it is.
        let m = self.iconst(0x7f7f_7f7f_7f7f_7f7f);
        let low = self.and(a, m);
        let carry = self.add(low, m);
        let any = self.or(carry, a);
        let bit = self.andn(any, m);
        // 0x80 -> 0xff: (bit << 1) - (bit >> 7), borrow-free because each byte's part is independent.
        let down = self.shrui(bit, 7);
        let up = self.shli(bit, 1);
        self.sub(up, down)
    }

    /// `And`, `Or` and `Xor` of sign-extended `I32`s is the extension of the same on `I32`: as chains of 32-bit operations on
    /// 64-bit registers are written, only what the last one gives is extended. Two shifts of one value that make a rotation
    /// together are one.
    pub(crate) fn narrow(&mut self, op: Op, a: Val, b: Val) -> Option<Val> {
        if !matches!(op, Op::And | Op::Or | Op::Xor) {
            return None;
        }
        let (x, y) = (*self.region().def(a), *self.region().def(b));
        if x.op == Op::SExt && y.op == Op::SExt {
            let v = self.binary(op, Val(x.a), Val(y.a));
            return Some(self.sext(v));
        }
        self.rotation(op, a, b)
    }

    /// Whether two values are known to be equal.
    fn same(&self, a: u32, b: u32) -> bool {
        let (x, y) = (self.region().def(Val(a)), self.region().def(Val(b)));
        a == b || x.op == Op::Trunc && y.op == Op::Trunc && x.a == y.a
    }

    fn rotation(&mut self, op: Op, a: Val, b: Val) -> Option<Val> {
        let (x, y) = (*self.region().def(a), *self.region().def(b));
        let (left, right) = if x.op == Op::Shl { (x, y) } else { (y, x) };
        if op == Op::And || left.op != Op::Shl || right.op != Op::ShrU || !self.same(left.a, right.a) {
            return None;
        }
        let (n, m) = (self.as_const(Val(left.b))?, self.as_const(Val(right.b))?);
        let whole = u64::from(self.ty(a).bits());
        (n != 0 && m != 0 && n.checked_add(m) == Some(whole))
            .then(|| self.binary(Op::RotL, Val(left.a), Val(left.b)))
    }
}
