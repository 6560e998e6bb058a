//! Operations that are made of others.

use crate::builder::Builder;
use crate::types::Val;

impl Builder {
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
}
