//! Rounding.

use crate::{Format, Rounding, Tininess, Unit, flags};

impl Unit {
    /// Whether a magnitude whose last kept bit is `odd` goes up, given how the rest compares with half a
    /// unit of that bit.
    pub(crate) fn rounds_up(&self, negative: bool, odd: bool, rest: Rest) -> bool {
        match self.rounding {
            Rounding::NearestEven => rest == Rest::More || rest == Rest::Half && odd,
            Rounding::NearestAway => matches!(rest, Rest::Half | Rest::More),
            Rounding::Zero => false,
            Rounding::Down => negative && rest != Rest::None,
            Rounding::Up => !negative && rest != Rest::None,
        }
    }

    /// Rounds `(sig + s) * 2^exp` to the format, with `0 < s < 1` if the flag is set and 0 else. `sig`
    /// is not 0 and below `2^126`.
    pub(crate) fn round(&mut self, f: Format, negative: bool, exp: i32, (sig, sticky): (u128, bool)) -> u64 {
        // Two more bits make what is sticky a part of the number without disturbing half-way cases.
        let (sig, exp) = (sig << 2 | u128::from(sticky), exp - 2);
        let precision = f.precision();
        let top = exp + sig.ilog2() as i32;
        let unit = (top - (precision - 1)).max(f.emin() - (precision - 1));
        let (mut kept, rest) = split(sig, unit - exp);
        if self.rounds_up(negative, kept & 1 != 0, rest) {
            kept += 1;
        }
        let sign = if negative { f.sign_bit() } else { 0 };
        let mut unit = unit;
        if kept >> precision != 0 {
            kept >>= 1;
            unit += 1;
        }
        if unit + precision - 1 > f.emax() {
            return sign | self.overflow(f, negative);
        }
        if rest != Rest::None {
            self.raise(flags::INEXACT);
            if self.tiny(f, negative, top, exp, sig) {
                self.raise(flags::UNDERFLOW);
            }
        }
        let hidden = 1u128 << (precision - 1);
        if kept < hidden {
            return sign | kept as u64;
        }
        let biased = (unit + precision - 1 - f.emin() + 1) as u64;
        sign | biased << f.fraction_bits() | (kept - hidden) as u64
    }

    fn tiny(&self, f: Format, negative: bool, top: i32, exp: i32, sig: u128) -> bool {
        if top >= f.emin() {
            return false;
        }
        if self.tininess == Tininess::BeforeRounding || top < f.emin() - 1 {
            return true;
        }
        // With an unbounded exponent it may round up to the smallest normal number.
        let (kept, rest) = split(sig, top - (f.precision() - 1) - exp);
        let up = self.rounds_up(negative, kept & 1 != 0, rest);
        (kept + u128::from(up)) >> f.precision() == 0
    }

    fn overflow(&mut self, f: Format, negative: bool) -> u64 {
        self.raise(flags::OVERFLOW | flags::INEXACT);
        let to_infinity = match self.rounding {
            Rounding::NearestEven | Rounding::NearestAway => true,
            Rounding::Zero => false,
            Rounding::Down => negative,
            Rounding::Up => !negative,
        };
        if to_infinity { f.infinity() } else { f.infinity() - 1 }
    }
}

/// What is cut off, compared with half a unit of the last bit that is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rest {
    None,
    Less,
    Half,
    More,
}

/// `sig / 2^by`: the integer part and what is left. A negative `by` multiplies.
pub(crate) fn split(sig: u128, by: i32) -> (u128, Rest) {
    if by <= 0 {
        return (sig << by.unsigned_abs().min(127), Rest::None);
    }
    if by > 127 {
        let rest = if sig == 0 { Rest::None } else { Rest::Less };
        return (0, rest);
    }
    let rest = sig & ((1 << by) - 1);
    let half = 1u128 << (by - 1);
    let rest = match rest.cmp(&half) {
        _ if rest == 0 => Rest::None,
        std::cmp::Ordering::Less => Rest::Less,
        std::cmp::Ordering::Equal => Rest::Half,
        std::cmp::Ordering::Greater => Rest::More,
    };
    (sig >> by, rest)
}
