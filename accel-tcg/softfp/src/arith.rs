//! The arithmetic operations.

use std::cmp::Ordering;

use crate::{Format, Unit, flags};

/// A value that is no NaN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Zero,
    /// `sig * 2^exp`, `sig` not 0 and below `2^107`.
    Finite {
        exp: i32,
        sig: u128,
    },
    Infinite,
}

/// A value that is no NaN, with its sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unpacked {
    pub negative: bool,
    pub kind: Kind,
}

/// Where sums put the most significant bit of the larger operand: room for a carry and the two bits that
/// rounding appends.
const TOP: u32 = 123;

impl Unpacked {
    /// The value of `a`, which is no NaN. A finite one has `sig` of exactly the format's precision.
    pub fn new(f: Format, a: u64) -> Self {
        let negative = a & f.sign_bit() != 0;
        let fraction = a & f.fraction_mask();
        let biased = ((a & f.infinity()) >> f.fraction_bits()) as i32;
        let lowest = f.emin() - f.fraction_bits() as i32;
        let kind = if a & (f.sign_bit() - 1) == f.infinity() {
            Kind::Infinite
        } else if biased != 0 {
            Kind::Finite { exp: lowest + biased - 1, sig: u128::from(fraction | 1 << f.fraction_bits()) }
        } else if fraction == 0 {
            Kind::Zero
        } else {
            let shift = f.fraction_bits() - fraction.ilog2();
            Kind::Finite { exp: lowest - shift as i32, sig: u128::from(fraction << shift) }
        };
        Self { negative, kind }
    }

    /// The exact product; `None` for infinity times zero.
    pub fn times(self, other: Self) -> Option<Self> {
        let kind = match (self.kind, other.kind) {
            (Kind::Infinite, Kind::Zero) | (Kind::Zero, Kind::Infinite) => return None,
            (Kind::Infinite, _) | (_, Kind::Infinite) => Kind::Infinite,
            (Kind::Zero, _) | (_, Kind::Zero) => Kind::Zero,
            (Kind::Finite { exp: ea, sig: sa }, Kind::Finite { exp: eb, sig: sb }) => {
                Kind::Finite { exp: ea + eb, sig: sa * sb }
            }
        };
        Some(Self { negative: self.negative != other.negative, kind })
    }
}

/// Shifts right and says whether ones were lost.
fn shift_sticky(sig: u128, by: u32) -> (u128, bool) {
    if by == 0 {
        (sig, false)
    } else if by > 127 {
        (0, sig != 0)
    } else {
        (sig >> by, sig << (128 - by) != 0)
    }
}

impl Unit {
    /// Rounds and packs a value.
    pub(crate) fn pack(&mut self, f: Format, a: Unpacked) -> u64 {
        let sign = if a.negative { f.sign_bit() } else { 0 };
        match a.kind {
            Kind::Zero => sign,
            Kind::Infinite => sign | f.infinity(),
            Kind::Finite { exp, sig } => self.round(f, a.negative, exp, (sig, false)),
        }
    }

    /// `a + b`, rounded.
    pub(crate) fn sum(&mut self, f: Format, a: Unpacked, b: Unpacked) -> u64 {
        let ((ea, sa), (eb, sb)) = match (a.kind, b.kind) {
            (Kind::Infinite, Kind::Infinite) if a.negative != b.negative => return self.invalid(f),
            (Kind::Infinite, _) => return self.pack(f, a),
            (_, Kind::Infinite) => return self.pack(f, b),
            (Kind::Zero, Kind::Zero) if a.negative == b.negative => return self.pack(f, a),
            (Kind::Zero, Kind::Zero) => return self.zero_sum(f),
            (Kind::Zero, _) => return self.pack(f, b),
            (_, Kind::Zero) => return self.pack(f, a),
            (Kind::Finite { exp: ea, sig: sa }, Kind::Finite { exp: eb, sig: sb }) => ((ea, sa), (eb, sb)),
        };
        let (top_a, top_b) = (ea + sa.ilog2() as i32, eb + sb.ilog2() as i32);
        let (big, e_big, small, e_small, negative) =
            if top_a >= top_b { (sa, ea, sb, eb, a.negative) } else { (sb, eb, sa, ea, b.negative) };
        let up = TOP - big.ilog2();
        let (big, exp) = (big << up, e_big - up as i32);
        let (small, lost) = if e_small >= exp {
            (small << (e_small - exp), false)
        } else {
            shift_sticky(small, (exp - e_small) as u32)
        };
        if a.negative == b.negative {
            return self.round(f, negative, exp, (big + small, lost));
        }
        match big.cmp(&small) {
            Ordering::Equal if !lost => self.zero_sum(f),
            // What was lost makes the difference a little smaller.
            Ordering::Greater => self.round(f, negative, exp, (big - small - u128::from(lost), lost)),
            // Only if both have the same highest bit: then nothing was lost.
            _ => self.round(f, !negative, exp, (small - big, lost)),
        }
    }

    /// The zero that a sum of opposite values is.
    fn zero_sum(&self, f: Format) -> u64 {
        if self.rounding == crate::Rounding::Down { f.sign_bit() } else { 0 }
    }

    /// `a / b`
    pub fn div(&mut self, f: Format, a: u64, b: u64) -> u64 {
        if let Some(nan) = self.propagate(f, &[a, b]) {
            return nan;
        }
        let (a, b) = (Unpacked::new(f, a), Unpacked::new(f, b));
        let negative = a.negative != b.negative;
        let sign = if negative { f.sign_bit() } else { 0 };
        match (a.kind, b.kind) {
            (Kind::Infinite, Kind::Infinite) | (Kind::Zero, Kind::Zero) => self.invalid(f),
            (Kind::Infinite, _) => sign | f.infinity(),
            (Kind::Zero, _) | (_, Kind::Infinite) => sign,
            (_, Kind::Zero) => {
                self.raise(flags::DIV_BY_ZERO);
                sign | f.infinity()
            }
            (Kind::Finite { exp: ea, sig: sa }, Kind::Finite { exp: eb, sig: sb }) => {
                let wide = sa << 64;
                self.round(f, negative, ea - eb - 64, (wide / sb, wide % sb != 0))
            }
        }
    }

    /// The square root of `a`.
    pub fn sqrt(&mut self, f: Format, a: u64) -> u64 {
        if let Some(nan) = self.propagate(f, &[a]) {
            return nan;
        }
        let value = Unpacked::new(f, a);
        match value.kind {
            Kind::Zero => a & f.mask(),
            _ if value.negative => self.invalid(f),
            Kind::Infinite => f.infinity(),
            Kind::Finite { exp, sig } => {
                // Of at least 118 bits, so that the root has more than any format; with an even exponent.
                let up = 70 + (exp & 1) as u32;
                let (sig, exp) = (sig << up, exp - up as i32);
                let root = sig.isqrt();
                self.round(f, false, exp / 2, (root, root * root != sig))
            }
        }
    }
}

/// A key that orders values that are no NaN, -0 before +0.
pub(crate) fn order(f: Format, a: u64) -> i64 {
    let magnitude = (a & (f.sign_bit() - 1)) as i64;
    if a & f.sign_bit() != 0 { -1 - magnitude } else { magnitude }
}

/// How `a` compares to `b`; `None` if unordered.
pub(crate) fn compare(f: Format, a: u64, b: u64) -> Option<Ordering> {
    if f.is_nan(a) || f.is_nan(b) {
        return None;
    }
    if (a | b) & (f.sign_bit() - 1) == 0 {
        return Some(Ordering::Equal);
    }
    Some(order(f, a).cmp(&order(f, b)))
}
