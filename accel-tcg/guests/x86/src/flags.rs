//! RFLAGS, and how the status flags are recorded between instructions.
//!
//! Translated code does not compute CF, PF, AF, ZF, SF and OF at every instruction: it records the operation
//! ([`Kind`], width included) with its operands in `cc_op`, `cc_dst`, `cc_src` and `cc_aux`, and whoever wants the flags computes
//! them from there ([`read`]). Two *overlays* say which flags later instructions changed that leave the others alone:
//! INC and DEC (`cc_inc`: all but CF), and rotations and carry changes (`cc_rot`: CF, perhaps OF).
//! [`crate::state::X86::flags`] holds all the other bits.
//!
//! `cc_op` is `kind << 2 | log2 of the size in bytes`, with the overlays above it: see [`inc`] and [`rot`].

use crate::state::X86;

/// Bits of RFLAGS.
pub mod rflags {
    /// Carry.
    pub const CF: u64 = 1;
    /// Always one.
    pub const FIXED: u64 = 2;
    /// Parity.
    pub const PF: u64 = 1 << 2;
    /// Auxiliary carry.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Trap.
    pub const TF: u64 = 1 << 8;
    /// Interrupts enabled.
    pub const IF: u64 = 1 << 9;
    /// Direction.
    pub const DF: u64 = 1 << 10;
    /// Overflow.
    pub const OF: u64 = 1 << 11;
    /// I/O privilege level.
    pub const IOPL: u64 = 3 << 12;
    /// Position of IOPL.
    pub const IOPL_SHIFT: u32 = 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086.
    pub const VM: u64 = 1 << 17;
    /// Alignment check, access control.
    pub const AC: u64 = 1 << 18;
    /// Virtual interrupt flag.
    pub const VIF: u64 = 1 << 19;
    /// Virtual interrupt pending.
    pub const VIP: u64 = 1 << 20;
    /// CPUID is there.
    pub const ID: u64 = 1 << 21;
    /// The six status flags.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// How a record's status flags follow from its operands. Only the low `size` bytes of them count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// `cc_src` holds the status flags in their places.
    Flags = 0,
    /// `cc_dst - cc_src`: the operands of a comparison.
    Cmp = 1,
    /// `cc_dst` is the difference, `cc_src` the subtrahend.
    Sub = 2,
    /// `cc_dst` is the sum, `cc_src` an addend.
    Add = 3,
    /// As `Add`, with the carry-in in `cc_aux`.
    Adc = 4,
    /// As `Sub`, with the borrow-in in `cc_aux`.
    Sbb = 5,
    /// `cc_dst` is the result of AND, OR, XOR: CF, OF and AF are clear.
    Logic = 6,
    /// `cc_dst` was shifted left, `cc_src` is it before the last bit's shift.
    Shl = 7,
    /// The same to the right.
    Shr = 8,
    /// `cc_dst` is the result, CF and OF are bit 0 of `cc_src`.
    Mul = 9,
    /// `cc_dst` is the result, CF is bit 0 of `cc_src`, OF is clear.
    Carry = 10,
}

impl Kind {
    const fn from_index(n: u64) -> Kind {
        match n {
            1 => Kind::Cmp,
            2 => Kind::Sub,
            3 => Kind::Add,
            4 => Kind::Adc,
            5 => Kind::Sbb,
            6 => Kind::Logic,
            7 => Kind::Shl,
            8 => Kind::Shr,
            9 => Kind::Mul,
            10 => Kind::Carry,
            _ => Kind::Flags,
        }
    }

    /// The value of `cc_op` for operands of `1 << log2` bytes, without overlays.
    pub const fn op(self, log2: u32) -> u64 {
        (self as u64) << 2 | (log2 & 3) as u64
    }
}

/// The overlay of INC and DEC in `cc_op`: all status flags but CF follow from `cc_inc`, the result.
pub mod inc {
    /// Bits 8 and 9: log2 of the size.
    pub const SIZE_SHIFT: u32 = 8;
    /// It was INC.
    pub const INC: u64 = 1 << 10;
    /// It was DEC.
    pub const DEC: u64 = 2 << 10;
    /// All of its bits.
    pub const MASK: u64 = 0xf << 8;
}

/// The overlay of rotations and carry changes in `cc_op`: CF, and OF if [`rot::OF`] is set, follow from `cc_rot`.
pub mod rot {
    /// Bits 12 and 13: log2 of the size.
    pub const SIZE_SHIFT: u32 = 12;
    /// CF is bit 0 of `cc_rot`, OF is not touched.
    pub const CARRY: u64 = 1 << 14;
    /// `cc_rot` is the result of ROL.
    pub const ROL: u64 = 2 << 14;
    /// `cc_rot` is the result of ROR.
    pub const ROR: u64 = 3 << 14;
    /// The kind.
    pub const KIND: u64 = 3 << 14;
    /// OF is the rotation's: no INC or DEC came later.
    pub const OF: u64 = 1 << 16;
    /// All of its bits.
    pub const MASK: u64 = 0x1f << 12;
}

const fn bit(on: bool, flag: u64) -> u64 {
    if on { flag } else { 0 }
}

/// SF, ZF and PF of a result.
const fn szp(d: u64, sign: u64) -> u64 {
    bit(d == 0, rflags::ZF)
        | bit(d & sign != 0, rflags::SF)
        | bit((d as u8).count_ones().is_multiple_of(2), rflags::PF)
}

/// OF and AF of `lhs + s = d` (`add`) or `lhs - s = d`.
const fn overflow(add: bool, lhs: u64, s: u64, d: u64, sign: u64) -> u64 {
    let same = if add { !(lhs ^ s) } else { lhs ^ s };
    bit(same & (lhs ^ d) & sign != 0, rflags::OF) | (lhs ^ s ^ d) & rflags::AF
}

/// The status flags of a record without overlays.
pub const fn base(op: u64, dst: u64, src: u64, aux: u64) -> u64 {
    let bits = 8u32 << (op & 3);
    let (mask, sign) = (u64::MAX >> (64 - bits), 1u64 << (bits - 1));
    let (d, s) = (dst & mask, src & mask);
    match Kind::from_index(op >> 2 & 0x3f) {
        Kind::Flags => src & rflags::STATUS,
        Kind::Cmp => {
            let r = d.wrapping_sub(s) & mask;
            szp(r, sign) | bit(d < s, rflags::CF) | overflow(false, d, s, r, sign)
        }
        Kind::Sub => {
            let l = d.wrapping_add(s) & mask;
            szp(d, sign) | bit(l < s, rflags::CF) | overflow(false, l, s, d, sign)
        }
        Kind::Add => {
            let l = d.wrapping_sub(s) & mask;
            szp(d, sign) | bit(d < s, rflags::CF) | overflow(true, l, s, d, sign)
        }
        Kind::Adc => {
            let c = aux & 1;
            let l = d.wrapping_sub(s).wrapping_sub(c) & mask;
            szp(d, sign) | bit(d < s || c == 1 && d == s, rflags::CF) | overflow(true, l, s, d, sign)
        }
        Kind::Sbb => {
            let c = aux & 1;
            let l = d.wrapping_add(s).wrapping_add(c) & mask;
            szp(d, sign) | bit(l < s || c == 1 && l == s, rflags::CF) | overflow(false, l, s, d, sign)
        }
        Kind::Logic => szp(d, sign),
        Kind::Shl => szp(d, sign) | bit(s & sign != 0, rflags::CF) | bit((s ^ d) & sign != 0, rflags::OF),
        Kind::Shr => szp(d, sign) | bit(s & 1 != 0, rflags::CF) | bit((s ^ d) & sign != 0, rflags::OF),
        Kind::Mul => szp(d, sign) | bit(s & 1 != 0, rflags::CF | rflags::OF),
        Kind::Carry => szp(d, sign) | bit(s & 1 != 0, rflags::CF),
    }
}

/// The status flags that overlays leave of `flags`.
const fn overlay(mut flags: u64, op: u64, inc_value: u64, rot_value: u64) -> u64 {
    if op & inc::MASK != 0 {
        let bits = 8u32 << (op >> inc::SIZE_SHIFT & 3);
        let (mask, sign) = (u64::MAX >> (64 - bits), 1u64 << (bits - 1));
        let d = inc_value & mask;
        let (of, af) =
            if op & inc::INC != 0 { (d == sign, d & 15 == 0) } else { (d == sign - 1, d & 15 == 15) };
        flags = flags & rflags::CF | szp(d, sign) | bit(of, rflags::OF) | bit(af, rflags::AF);
    }
    if op & rot::KIND != 0 {
        let top = (8u32 << (op >> rot::SIZE_SHIFT & 3)) - 1;
        let (low, high) = (rot_value & 1 != 0, rot_value >> top & 1 != 0);
        let (cf, of) = match op & rot::KIND {
            rot::CARRY => (low, false),
            rot::ROL => (low, low != high),
            _ => (high, high != (rot_value >> (top - 1) & 1 != 0)),
        };
        flags = flags & !rflags::CF | bit(cf, rflags::CF);
        if op & rot::OF != 0 {
            flags = flags & !rflags::OF | bit(of, rflags::OF);
        }
    }
    flags
}

/// The six status flags.
pub fn status(s: &X86) -> u64 {
    overlay(base(s.cc_op, s.cc_dst, s.cc_src, s.cc_aux), s.cc_op, s.cc_inc, s.cc_rot)
}

/// Sets the six status flags.
pub fn set_status(s: &mut X86, flags: u64) {
    s.cc_op = Kind::Flags.op(0);
    s.cc_src = flags & rflags::STATUS;
}

/// RFLAGS.
pub fn read(s: &X86) -> u64 {
    s.flags & !rflags::STATUS | rflags::FIXED | status(s)
}

/// Sets RFLAGS: all of it, unchecked.
pub fn write(s: &mut X86, flags: u64) {
    set_status(s, flags);
    s.flags = flags & !rflags::STATUS | rflags::FIXED;
}

/// Whether condition `code` (the low four bits of Jcc's opcode; SDM volume 1, appendix B) holds.
pub const fn holds(code: u8, flags: u64) -> bool {
    let less = (flags & rflags::SF != 0) != (flags & rflags::OF != 0);
    let on = match code >> 1 & 7 {
        0 => flags & rflags::OF != 0,
        1 => flags & rflags::CF != 0,
        2 => flags & rflags::ZF != 0,
        3 => flags & (rflags::CF | rflags::ZF) != 0,
        4 => flags & rflags::SF != 0,
        5 => flags & rflags::PF != 0,
        6 => less,
        _ => less || flags & rflags::ZF != 0,
    };
    on != (code & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The carry out of and overflow of 8-bit operations, from wide arithmetic.
    #[test]
    fn eight_bit_additions_and_subtractions() {
        for a in 0..=255u64 {
            for b in 0..=255u64 {
                for c in 0..2u64 {
                    let sum = base(Kind::Adc.op(0), a + b + c, b, c);
                    let (sa, sb) = (a as i8 as i64, b as i8 as i64);
                    assert_eq!(sum & rflags::CF != 0, a + b + c > 255);
                    assert_eq!(sum & rflags::OF != 0, !(-128..128).contains(&(sa + sb + c as i64)));
                    assert_eq!(sum & rflags::AF != 0, (a & 15) + (b & 15) + c > 15);
                    let difference = base(Kind::Sbb.op(0), a.wrapping_sub(b).wrapping_sub(c), b, c);
                    assert_eq!(difference & rflags::CF != 0, a < b + c);
                    assert_eq!(difference & rflags::OF != 0, !(-128..128).contains(&(sa - sb - c as i64)));
                    assert_eq!(difference & rflags::AF != 0, (a & 15) < (b & 15) + c);
                    assert_eq!(difference & rflags::ZF != 0, (a as u8) == (b + c) as u8);
                }
                assert_eq!(base(Kind::Add.op(0), a + b, b, 0), base(Kind::Adc.op(0), a + b, b, 0));
                let r = a.wrapping_sub(b);
                assert_eq!(base(Kind::Sub.op(0), r, b, 0), base(Kind::Cmp.op(0), a, b, 0));
                assert_eq!(base(Kind::Sub.op(0), r, b, 0), base(Kind::Sbb.op(0), r, b, 0));
            }
        }
    }

    #[test]
    fn overlays_leave_the_others_alone() {
        // CMP 1, 2 sets CF and SF; INC to 0x80 sets OF and keeps CF; CLC clears it.
        let flags = base(Kind::Cmp.op(0), 1, 2, 0);
        assert_ne!(flags & rflags::CF, 0);
        let op = Kind::Cmp.op(0) | inc::INC;
        let after = overlay(flags, op, 0x80, 0);
        assert_eq!(after & (rflags::CF | rflags::OF | rflags::ZF), rflags::CF | rflags::OF);
        assert_eq!(overlay(flags, op | rot::CARRY, 0x80, 0) & rflags::CF, 0);
        let rol = overlay(flags, op | rot::ROL | rot::OF, 0x80, 0x81);
        assert_eq!(rol & (rflags::CF | rflags::OF), rflags::CF);
    }

    #[test]
    fn conditions_are_pairs() {
        for flags in 0..0x1000 {
            for code in (0..16).step_by(2) {
                assert_ne!(holds(code, flags), holds(code + 1, flags));
            }
        }
        assert!(holds(6, rflags::CF) && holds(6, rflags::ZF) && !holds(6, rflags::SF));
        assert!(holds(14, rflags::OF) && !holds(12, rflags::OF | rflags::SF));
    }
}
