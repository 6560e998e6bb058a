//! Divisions of 128 bits, rotations through carry, bit deposits, CRC32 and decimal adjustments.

use holdfast_tcg_runtime::{Cpu, HelperResult};

use crate::flags::{self, rflags};
use crate::state::X86;
use crate::system::fault;
use crate::system::regs::vector;

/// (high, low, divisor): the unsigned quotient.
pub(crate) fn div64(_: &mut Cpu<'_>, [high, low, divisor, ..]: [u64; 5]) -> HelperResult {
    if high >= divisor {
        return Err(fault::plain(vector::DE).into());
    }
    if high == 0 {
        return Ok(low / divisor);
    }
    let n = u128::from(high) << 64 | u128::from(low);
    Ok((n / u128::from(divisor)) as u64)
}

/// (high, low, divisor): the signed quotient.
pub(crate) fn idiv64(_: &mut Cpu<'_>, [high, low, divisor, ..]: [u64; 5]) -> HelperResult {
    let n = (u128::from(high) << 64 | u128::from(low)) as i128;
    let quotient = n.checked_div(i128::from(divisor as i64));
    match quotient.and_then(|q| i64::try_from(q).ok()) {
        Some(q) => Ok(q as u64),
        None => Err(fault::plain(vector::DE).into()),
    }
}

/// A rotation: (kind | log2 size << 4, value, count) with kinds ROL, ROR, RCL, RCR; the result and its CF.
fn rotated(how: u64, value: u64, count: u64, carry: bool) -> (u64, bool) {
    let bits = 8u64 << (how >> 4 & 3);
    let mask = u64::MAX >> (64 - bits);
    let v = value & mask;
    let wide = |v: u64| u128::from(v);
    match how & 3 {
        0 => {
            let n = count % bits;
            let both = wide(v) << n;
            let r = (both | both >> bits) as u64 & mask;
            (r, r & 1 != 0)
        }
        1 => {
            let n = count % bits;
            let r = (wide(v) >> n | wide(v) << (bits - n)) as u64 & mask;
            (r, r >> (bits - 1) & 1 != 0)
        }
        kind => {
            // The carry is one more bit, above the others.
            let all = bits + 1;
            let n = count % all;
            let n = if kind == 2 || n == 0 { n } else { all - n };
            let v = wide(v) | wide(u64::from(carry)) << bits;
            let r = (v << n | v >> (all - n)) & ((1 << all) - 1);
            (r as u64 & mask, r >> bits & 1 != 0)
        }
    }
}

fn carry_of(s: &X86) -> bool {
    flags::status(s) & rflags::CF != 0
}

/// (kind | log2 size << 4, value, count): the result.
pub(crate) fn rotate(cpu: &mut Cpu<'_>, [how, value, count, ..]: [u64; 5]) -> u64 {
    rotated(how, value, count, carry_of(cpu.state())).0
}

/// The same: the status flags after it.
pub(crate) fn rotate_flags(cpu: &mut Cpu<'_>, [how, value, count, ..]: [u64; 5]) -> u64 {
    let old = flags::status(cpu.state());
    if count == 0 {
        return old;
    }
    let bits = 8u64 << (how >> 4 & 3);
    let (r, carry) = rotated(how, value, count, old & rflags::CF != 0);
    let (top, next) = (r >> (bits - 1) & 1 != 0, r >> (bits - 2) & 1 != 0);
    // To the left the highest bit with the carry, to the right the two highest bits.
    let overflow = if how & 1 == 0 { top != carry } else { top != next };
    let mut new = old & !(rflags::CF | rflags::OF);
    if carry {
        new |= rflags::CF;
    }
    if overflow {
        new |= rflags::OF;
    }
    new
}

/// (value, mask): the low bits of `value` at the places of `mask`.
pub(crate) fn pdep(_: &mut Cpu<'_>, [value, mut mask, ..]: [u64; 5]) -> u64 {
    let (mut result, mut value) = (0, value);
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if value & 1 != 0 {
            result |= lowest;
        }
        value >>= 1;
        mask &= mask - 1;
    }
    result
}

/// (value, mask): the bits of `value` at the places of `mask`, moved together.
pub(crate) fn pext(_: &mut Cpu<'_>, [value, mut mask, ..]: [u64; 5]) -> u64 {
    let (mut result, mut at) = (0, 0);
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if value & lowest != 0 {
            result |= 1 << at;
        }
        at += 1;
        mask &= mask - 1;
    }
    result
}

/// The table of the reflected Castagnoli polynomial.
const CRC: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut n = 0;
    while n < 256 {
        let mut c = n as u32;
        let mut k = 0;
        while k < 8 {
            c = if c & 1 != 0 { c >> 1 ^ 0x82f6_3b78 } else { c >> 1 };
            k += 1;
        }
        table[n] = c;
        n += 1;
    }
    table
};

/// (crc, data, log2 of the data's size)
pub(crate) fn crc32(_: &mut Cpu<'_>, [crc, data, log2, ..]: [u64; 5]) -> u64 {
    let mut c = crc as u32;
    for byte in data.to_le_bytes().into_iter().take(1 << (log2 & 3)) {
        c = c >> 8 ^ CRC[usize::from(c as u8 ^ byte)];
    }
    u64::from(c)
}

/// (kind, base): AAA, AAS, DAA, DAS, AAM, AAD (SDM volume 2).
pub(crate) fn decimal(cpu: &mut Cpu<'_>, [kind, base, ..]: [u64; 5]) -> HelperResult {
    let s = cpu.state::<X86>();
    let old = flags::status(s);
    let ax = s.gpr[0] as u16;
    let (al, ah) = (ax as u8, (ax >> 8) as u8);
    let (af, cf) = (old & rflags::AF != 0, old & rflags::CF != 0);
    let adjust = al & 15 > 9 || af;
    let (ax, carry, auxiliary) = match kind {
        0 | 1 => {
            let ax = match (adjust, kind) {
                (false, _) => ax,
                (true, 0) => ax.wrapping_add(0x106),
                _ => ax.wrapping_sub(6).wrapping_sub(0x100),
            };
            (ax & 0xff0f, adjust, adjust)
        }
        2 | 3 => {
            let high = al > 0x99 || cf;
            let by = if adjust { 6 } else { 0 } + if high { 0x60 } else { 0 };
            let low = if kind == 2 { al.wrapping_add(by) } else { al.wrapping_sub(by) };
            let borrowed = kind == 3 && adjust && al < 6;
            (u16::from(low) | u16::from(ah) << 8, high || borrowed, adjust)
        }
        4 => {
            let base = base as u8;
            let (Some(q), Some(r)) = (al.checked_div(base), al.checked_rem(base)) else {
                return Err(fault::plain(vector::DE).into());
            };
            (u16::from(r) | u16::from(q) << 8, false, false)
        }
        _ => (u16::from(al.wrapping_add(ah.wrapping_mul(base as u8))), false, false),
    };
    s.gpr[0] = s.gpr[0] & !0xffff | u64::from(ax);
    let mut new = flags::base(flags::Kind::Logic.op(0), u64::from(ax), 0, 0);
    if carry {
        new |= rflags::CF;
    }
    if auxiliary {
        new |= rflags::AF;
    }
    flags::set_status(s, new);
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotations_through_carry_go_around() {
        for bits in 0..4u64 {
            let width = 8u64 << bits;
            for count in 0..width {
                let (left, carry) = rotated(2 | bits << 4, 0x8123_4567_89ab_cdef, count, true);
                let (back, again) = rotated(3 | bits << 4, left, count, carry);
                assert_eq!(back, 0x8123_4567_89ab_cdef & u64::MAX >> (64 - width));
                assert!(again);
            }
        }
        assert_eq!(rotated(2, 0x80, 1, false), (0, true));
        assert_eq!(rotated(3, 1, 1, true), (0x80, true));
        assert_eq!(rotated(0x31, 1, 1, false), (1 << 63, true));
        assert_eq!(rotated(0x30, 1 << 63, 1, false), (1, true));
    }

    #[test]
    fn the_check_value_of_crc32c() {
        let mut crc = u32::MAX;
        for byte in b"123456789" {
            crc = crc >> 8 ^ CRC[usize::from(crc as u8 ^ byte)];
        }
        assert_eq!(!crc, 0xe306_9283);
    }
}
