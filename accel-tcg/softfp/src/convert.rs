//! Conversions between formats and to and from integers.

use crate::arith::{Kind, Unpacked};
use crate::round::{Rest, split};
use crate::{Format, NanRule, Unit, flags};

/// An integer type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Int {
    /// Bits, 32 or 64.
    pub bits: u32,
    /// Two's complement.
    pub signed: bool,
}

impl Int {
    /// `i32`.
    pub const I32: Self = Self { bits: 32, signed: true };
    /// `u32`.
    pub const U32: Self = Self { bits: 32, signed: false };
    /// `i64`.
    pub const I64: Self = Self { bits: 64, signed: true };
    /// `u64`.
    pub const U64: Self = Self { bits: 64, signed: false };

    fn max(self) -> u128 {
        (1u128 << (self.bits - u32::from(self.signed))) - 1
    }

    /// The magnitude of the smallest value.
    fn min_magnitude(self) -> u128 {
        if self.signed { 1u128 << (self.bits - 1) } else { 0 }
    }

    fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits)
    }
}

impl Unit {
    /// Converts between formats.
    pub fn convert(&mut self, from: Format, to: Format, a: u64) -> u64 {
        if from.is_nan(a) {
            return self.convert_nan(from, to, a);
        }
        self.pack(to, Unpacked::new(from, a))
    }

    fn convert_nan(&mut self, from: Format, to: Format, a: u64) -> u64 {
        if from.is_signalling(a) {
            self.raise(flags::INVALID);
        }
        if self.nan == NanRule::Canonical {
            return to.canonical_nan();
        }
        let sign = if a & from.sign_bit() != 0 { to.sign_bit() } else { 0 };
        let fraction = a & from.fraction_mask();
        let (wide, narrow) = (from.fraction_bits(), to.fraction_bits());
        let payload = if wide >= narrow { fraction >> (wide - narrow) } else { fraction << (narrow - wide) };
        sign | to.canonical_nan() | payload
    }

    /// Converts to an integer, in the low bits of the result. Out of range it is the nearest value of
    /// `to`, a NaN is the largest; both are invalid and not inexact.
    pub fn to_int(&mut self, f: Format, to: Int, a: u64) -> u64 {
        let saturate = |this: &mut Self, negative: bool| {
            this.raise(flags::INVALID);
            let value = if negative { to.min_magnitude().wrapping_neg() } else { to.max() };
            value as u64 & to.mask()
        };
        if f.is_nan(a) {
            return saturate(self, false);
        }
        let value = Unpacked::new(f, a);
        let (exp, sig) = match value.kind {
            Kind::Zero => return 0,
            Kind::Infinite => return saturate(self, value.negative),
            Kind::Finite { exp, sig } => (exp, sig),
        };
        if exp + sig.ilog2() as i32 > 64 {
            return saturate(self, value.negative);
        }
        let (mut whole, rest) = split(sig, -exp);
        if self.rounds_up(value.negative, whole & 1 != 0, rest) {
            whole += 1;
        }
        let limit = if value.negative { to.min_magnitude() } else { to.max() };
        if whole > limit {
            return saturate(self, value.negative);
        }
        if rest != Rest::None {
            self.raise(flags::INEXACT);
        }
        let bits = if value.negative { whole.wrapping_neg() } else { whole };
        bits as u64 & to.mask()
    }

    /// Converts from an integer in the low bits of `a`.
    pub fn from_int(&mut self, f: Format, from: Int, a: u64) -> u64 {
        let a = a & from.mask();
        let negative = from.signed && a >> (from.bits - 1) & 1 != 0;
        let magnitude = if negative { a.wrapping_neg() & from.mask() } else { a };
        if magnitude == 0 {
            return 0;
        }
        self.round(f, negative, 0, (u128::from(magnitude), false))
    }
}
