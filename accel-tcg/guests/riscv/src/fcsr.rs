//! `fcsr` as the host's MXCSR has it.

/// MXCSR with all exceptions masked.
const MASKED: u32 = 0x1f80;

/// MXCSR's flags, by the position of their counterpart in `fflags`: inexact, underflow, overflow, divide by
/// zero, invalid.
const FLAGS: [u32; 5] = [0x20, 0x10, 0x08, 0x04, 0x01];

/// MXCSR's rounding control for `frm`; what it cannot express is emitted statically and left at nearest.
fn rounding(frm: u64) -> u32 {
    match frm {
        1 => 3 << 13,
        2 => 1 << 13,
        3 => 2 << 13,
        _ => 0,
    }
}

/// The MXCSR that stands for `frm` and `fflags`.
pub fn to_mxcsr(frm: u64, fflags: u64) -> u32 {
    let flags = FLAGS.iter().enumerate().filter(|(i, _)| fflags >> i & 1 != 0).fold(0, |m, (_, f)| m | f);
    MASKED | rounding(frm) | flags
}

/// The `fflags` in an MXCSR.
pub fn fflags(mxcsr: u32) -> u64 {
    FLAGS.iter().enumerate().filter(|(_, f)| mxcsr & *f != 0).fold(0, |v, (i, _)| v | 1 << i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_go_there_and_back() {
        for flags in 0..32 {
            assert_eq!(fflags(to_mxcsr(0, flags)), flags);
        }
        assert_eq!(to_mxcsr(0, 0), 0x1f80);
        assert_eq!(to_mxcsr(1, 0x10), 0x7f81, "toward zero, invalid");
        assert_eq!(to_mxcsr(3, 0), 0x5f80, "up");
    }
}
