//! Software floating point: IEEE 754 binary32 and binary64 with all rounding modes, exact flags and
//! per-guest rules for NaNs and tininess.
//!
//! It is the oracle for what the back ends emit, what the IR interpreter computes with, and what serves
//! the modes that the host's unit does not have. Values are raw bits in a `u64` (binary32 in the low half).

mod arith;
mod convert;
mod round;

use arith::Unpacked;
pub use convert::Int;

/// A format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// binary32.
    F32,
    /// binary64.
    F64,
}

impl Format {
    /// Bits of the significand, the hidden one included.
    const fn precision(self) -> i32 {
        match self {
            Self::F32 => 24,
            Self::F64 => 53,
        }
    }

    /// Exponent of the smallest normal number.
    const fn emin(self) -> i32 {
        match self {
            Self::F32 => -126,
            Self::F64 => -1022,
        }
    }

    /// Exponent of the largest number.
    const fn emax(self) -> i32 {
        1 - self.emin()
    }

    const fn fraction_bits(self) -> u32 {
        self.precision() as u32 - 1
    }

    const fn fraction_mask(self) -> u64 {
        (1 << self.fraction_bits()) - 1
    }

    /// The sign bit.
    pub const fn sign_bit(self) -> u64 {
        match self {
            Self::F32 => 1 << 31,
            Self::F64 => 1 << 63,
        }
    }

    /// Positive infinity.
    pub const fn infinity(self) -> u64 {
        self.sign_bit() - (1 << self.fraction_bits())
    }

    /// The bit that tells quiet from signalling NaNs.
    pub const fn quiet_bit(self) -> u64 {
        1 << (self.fraction_bits() - 1)
    }

    /// The positive quiet NaN without payload.
    pub const fn canonical_nan(self) -> u64 {
        self.infinity() | self.quiet_bit()
    }

    /// All bits of a value.
    pub const fn mask(self) -> u64 {
        self.sign_bit() | (self.sign_bit() - 1)
    }

    /// True for NaNs of both kinds.
    pub const fn is_nan(self, a: u64) -> bool {
        a & (self.sign_bit() - 1) > self.infinity()
    }

    /// True for signalling NaNs.
    pub const fn is_signalling(self, a: u64) -> bool {
        self.is_nan(a) && a & self.quiet_bit() == 0
    }
}

/// Rounding modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// To nearest, ties to even.
    NearestEven,
    /// Toward zero.
    Zero,
    /// Toward minus infinity.
    Down,
    /// Toward plus infinity.
    Up,
    /// To nearest, ties away from zero.
    NearestAway,
}

impl Rounding {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::NearestEven, Self::Zero, Self::Down, Self::Up, Self::NearestAway];
}

/// What a NaN result is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NanRule {
    /// The positive canonical quiet NaN, always (RISC-V).
    Canonical,
    /// The first NaN operand, made quiet; the negative canonical one if no operand is a NaN (SSE).
    FirstOperand,
}

/// When a result counts as tiny.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tininess {
    /// If it is after rounding to the format's precision with an unbounded exponent (x86, RISC-V).
    AfterRounding,
    /// If it is before rounding (Arm, POWER).
    BeforeRounding,
}

/// Exception flags, in the order of RISC-V's `fflags`.
pub mod flags {
    /// The result was rounded.
    pub const INEXACT: u8 = 1;
    /// The result is tiny and inexact.
    pub const UNDERFLOW: u8 = 2;
    /// The result is too large.
    pub const OVERFLOW: u8 = 4;
    /// A finite number was divided by zero.
    pub const DIV_BY_ZERO: u8 = 8;
    /// No result makes sense.
    pub const INVALID: u8 = 16;
}

/// The unit: modes, rules, and the flags that operations accrue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unit {
    /// Rounding mode.
    pub rounding: Rounding,
    /// NaN rule.
    pub nan: NanRule,
    /// Tininess rule.
    pub tininess: Tininess,
    /// Accrued [`flags`].
    pub flags: u8,
}

impl Unit {
    /// A unit by RISC-V's rules.
    pub fn riscv(rounding: Rounding) -> Self {
        Self { rounding, nan: NanRule::Canonical, tininess: Tininess::AfterRounding, flags: 0 }
    }

    /// A unit by the rules of x86's SSE.
    pub fn sse(rounding: Rounding) -> Self {
        Self { nan: NanRule::FirstOperand, ..Self::riscv(rounding) }
    }

    fn raise(&mut self, what: u8) {
        self.flags |= what;
    }

    /// The NaN for an invalid operation without NaN operands.
    fn invalid(&mut self, f: Format) -> u64 {
        self.raise(flags::INVALID);
        match self.nan {
            NanRule::Canonical => f.canonical_nan(),
            NanRule::FirstOperand => f.canonical_nan() | f.sign_bit(),
        }
    }

    /// The result if an operand is a NaN.
    fn propagate(&mut self, f: Format, operands: &[u64]) -> Option<u64> {
        let first = operands.iter().copied().find(|a| f.is_nan(*a))?;
        if operands.iter().any(|a| f.is_signalling(*a)) {
            self.raise(flags::INVALID);
        }
        Some(match self.nan {
            NanRule::Canonical => f.canonical_nan(),
            NanRule::FirstOperand => first & f.mask() | f.quiet_bit(),
        })
    }

    /// `a + b`
    pub fn add(&mut self, f: Format, a: u64, b: u64) -> u64 {
        if let Some(nan) = self.propagate(f, &[a, b]) {
            return nan;
        }
        self.sum(f, Unpacked::new(f, a), Unpacked::new(f, b))
    }

    /// `a - b`
    pub fn sub(&mut self, f: Format, a: u64, b: u64) -> u64 {
        if let Some(nan) = self.propagate(f, &[a, b]) {
            return nan;
        }
        self.sum(f, Unpacked::new(f, a), Unpacked::new(f, b ^ f.sign_bit()))
    }

    /// `a * b`
    pub fn mul(&mut self, f: Format, a: u64, b: u64) -> u64 {
        if let Some(nan) = self.propagate(f, &[a, b]) {
            return nan;
        }
        match Unpacked::new(f, a).times(Unpacked::new(f, b)) {
            Some(product) => self.pack(f, product),
            None => self.invalid(f),
        }
    }

    /// `±(a * b) ± c`, rounded once. Infinity times zero is invalid even if `c` is a quiet NaN under
    /// [`NanRule::Canonical`], and not under [`NanRule::FirstOperand`].
    pub fn mul_add(
        &mut self,
        f: Format,
        [a, b, c]: [u64; 3],
        negate_product: bool,
        negate_addend: bool,
    ) -> u64 {
        let sign = |on: bool| if on { f.sign_bit() } else { 0 };
        let product = if f.is_nan(a) || f.is_nan(b) {
            None
        } else {
            Some(Unpacked::new(f, a ^ sign(negate_product)).times(Unpacked::new(f, b)))
        };
        if product == Some(None) && self.nan == NanRule::Canonical {
            self.raise(flags::INVALID);
        }
        if let Some(nan) = self.propagate(f, &[a, b, c]) {
            return nan;
        }
        match product.flatten() {
            Some(product) => self.sum(f, product, Unpacked::new(f, c ^ sign(negate_addend))),
            None => self.invalid(f),
        }
    }

    /// IEEE 754-2019 `minimumNumber`: a NaN loses against a number, and -0 is less than +0.
    pub fn min(&mut self, f: Format, a: u64, b: u64) -> u64 {
        self.select(f, a, b, true)
    }

    /// IEEE 754-2019 `maximumNumber`.
    pub fn max(&mut self, f: Format, a: u64, b: u64) -> u64 {
        self.select(f, a, b, false)
    }

    fn select(&mut self, f: Format, a: u64, b: u64, smaller: bool) -> u64 {
        if f.is_signalling(a) || f.is_signalling(b) {
            self.raise(flags::INVALID);
        }
        match (f.is_nan(a), f.is_nan(b)) {
            (true, true) => match self.nan {
                NanRule::Canonical => f.canonical_nan(),
                NanRule::FirstOperand => a & f.mask() | f.quiet_bit(),
            },
            (true, false) => b & f.mask(),
            (false, true) => a & f.mask(),
            (false, false) => {
                let less = arith::order(f, a) < arith::order(f, b);
                (if less == smaller { a } else { b }) & f.mask()
            }
        }
    }

    /// `a == b`; only signalling NaNs are invalid.
    pub fn equal(&mut self, f: Format, a: u64, b: u64) -> bool {
        if f.is_signalling(a) || f.is_signalling(b) {
            self.raise(flags::INVALID);
        }
        arith::compare(f, a, b) == Some(std::cmp::Ordering::Equal)
    }

    /// `a < b`; any NaN is invalid.
    pub fn less(&mut self, f: Format, a: u64, b: u64) -> bool {
        if f.is_nan(a) || f.is_nan(b) {
            self.raise(flags::INVALID);
        }
        arith::compare(f, a, b) == Some(std::cmp::Ordering::Less)
    }

    /// `a <= b`; any NaN is invalid.
    pub fn less_equal(&mut self, f: Format, a: u64, b: u64) -> bool {
        if f.is_nan(a) || f.is_nan(b) {
            self.raise(flags::INVALID);
        }
        arith::compare(f, a, b).is_some_and(std::cmp::Ordering::is_le)
    }
}

/// The class of a value as a bit: 0 -inf, 1 -normal, 2 -subnormal, 3 -0, 4 +0, 5 +subnormal, 6 +normal,
/// 7 +inf, 8 signalling NaN, 9 quiet NaN.
pub fn class(f: Format, a: u64) -> u32 {
    if f.is_nan(a) {
        return if f.is_signalling(a) { 1 << 8 } else { 1 << 9 };
    }
    let magnitude = a & (f.sign_bit() - 1);
    let kind = if magnitude == 0 {
        4
    } else if magnitude == f.infinity() {
        7
    } else if magnitude <= f.fraction_mask() {
        5
    } else {
        6
    };
    1 << if a & f.sign_bit() != 0 { 7 - kind } else { kind }
}

#[cfg(test)]
mod tests;
