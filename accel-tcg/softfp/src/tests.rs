//! The host's own unit is the oracle, flags included; what it lacks is checked on cases worked out by hand.

use super::*;

/// Interesting and random values.
struct Values(u64);

impl Values {
    fn word(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn next(&mut self, f: Format) -> u64 {
        let r = self.word();
        let one = match f {
            Format::F32 => 0x3f80_0000,
            Format::F64 => 0x3ff0_0000_0000_0000,
        };
        let special = [
            0,
            1,
            f.fraction_mask(),
            f.fraction_mask() + 1,
            f.infinity() - 1,
            f.infinity(),
            f.canonical_nan(),
            f.infinity() | 5,
            one,
            one + 1,
            one - 1,
        ];
        let sign = if r & 1 != 0 { f.sign_bit() } else { 0 };
        let v = match r >> 1 & 7 {
            0 => special[(r >> 8) as usize % special.len()],
            // Close to each other in exponent, so that sums cancel.
            1 | 2 => one.wrapping_add((self.word() & f.fraction_mask()) << (r >> 8 & 1)),
            // Around the smallest normal number.
            3 => self.word() & (f.fraction_mask() << 1 | 1),
            // Few significant bits: exact results and ties.
            4 => one
                .wrapping_add((r >> 16 & 7) << (f.fraction_bits() - 3))
                .wrapping_add((r >> 24 & 63) << f.fraction_bits()),
            _ => self.word(),
        };
        v & (f.sign_bit() - 1) | sign
    }
}

#[cfg(target_arch = "x86_64")]
mod host {
    use super::*;
    use std::arch::asm;

    fn control(r: Rounding) -> u32 {
        0x1f80
            | match r {
                Rounding::Zero => 3 << 13,
                Rounding::Down => 1 << 13,
                Rounding::Up => 2 << 13,
                _ => 0,
            }
    }

    fn flags_of(mxcsr: u32) -> u8 {
        [0x20, 0x10, 8, 4, 1]
            .iter()
            .enumerate()
            .fold(0, |v, (i, f)| if mxcsr & f != 0 { v | 1 << i } else { v })
    }

    macro_rules! op {
        ($name:ident, $insn:literal) => {
            pub fn $name(r: Rounding, a: u64, b: u64) -> (u64, u8) {
                let (mut control, mut old, mut out) = (control(r), 0u32, 0u64);
                // SAFETY: MXCSR is saved, set with all exceptions masked, and restored; registers only.
                unsafe {
                    asm!("stmxcsr [{old}]", "ldmxcsr [{control}]", "movq xmm0, {a}", "movq xmm1, {b}", $insn,
                         "movq {out}, xmm0", "stmxcsr [{control}]", "ldmxcsr [{old}]",
                         old = in(reg) &raw mut old, control = in(reg) &raw mut control, a = in(reg) a, b = in(reg) b,
                         out = inout(reg) out, out("xmm0") _, out("xmm1") _);
                }
                (out, flags_of(control))
            }
        };
    }
    op!(add32, "addss xmm0, xmm1");
    op!(add64, "addsd xmm0, xmm1");
    op!(sub32, "subss xmm0, xmm1");
    op!(sub64, "subsd xmm0, xmm1");
    op!(mul32, "mulss xmm0, xmm1");
    op!(mul64, "mulsd xmm0, xmm1");
    op!(div32, "divss xmm0, xmm1");
    op!(div64, "divsd xmm0, xmm1");
    op!(sqrt32, "sqrtss xmm0, xmm0");
    op!(sqrt64, "sqrtsd xmm0, xmm0");
    op!(narrow, "cvtsd2ss xmm0, xmm0");
    op!(widen, "cvtss2sd xmm0, xmm0");

    pub fn fma64(r: Rounding, [a, b, c]: [u64; 3]) -> (u64, u8) {
        let (mut control, mut old, mut out) = (control(r), 0u32, a);
        // SAFETY: as above; the caller checked for FMA.
        unsafe {
            asm!("stmxcsr [{old}]", "ldmxcsr [{control}]", "movq xmm0, {out}", "movq xmm1, {b}", "movq xmm2, {c}",
                 "vfmadd213sd xmm0, xmm1, xmm2", "movq {out}, xmm0", "stmxcsr [{control}]", "ldmxcsr [{old}]",
                 old = in(reg) &raw mut old, control = in(reg) &raw mut control, b = in(reg) b, c = in(reg) c,
                 out = inout(reg) out, out("xmm0") _, out("xmm1") _, out("xmm2") _);
        }
        (out, flags_of(control))
    }

    const HOST_ROUNDINGS: [Rounding; 4] =
        [Rounding::NearestEven, Rounding::Zero, Rounding::Down, Rounding::Up];

    #[test]
    fn arithmetic_is_the_hosts_with_its_flags() {
        let mut values = Values(0x1234_5678_9abc_def1);
        type Native = fn(Rounding, u64, u64) -> (u64, u8);
        type Soft = fn(&mut Unit, Format, u64, u64) -> u64;
        let table: [(Native, Native, Soft); 5] = [
            (add32, add64, Unit::add),
            (sub32, sub64, Unit::sub),
            (mul32, mul64, Unit::mul),
            (div32, div64, Unit::div),
            (sqrt32, sqrt64, |u, f, a, _| u.sqrt(f, a)),
        ];
        for round in 0..60_000 {
            for (op, (op32, op64, soft)) in table.iter().enumerate() {
                let r = HOST_ROUNDINGS[round % 4];
                for (f, native) in [(Format::F32, op32), (Format::F64, op64)] {
                    let (a, b) = (values.next(f), values.next(f));
                    let mut unit = Unit::sse(r);
                    let got = (soft(&mut unit, f, a, b), unit.flags);
                    let (value, flags) = native(r, a, b);
                    assert_eq!(got, (value & f.mask(), flags), "op {op} {f:?} {r:?} {a:#x} {b:#x}");
                }
            }
        }
    }

    #[test]
    fn fused_multiply_add_and_resizing_are_the_hosts() {
        let mut values = Values(77);
        let fma = std::arch::is_x86_feature_detected!("fma");
        for round in 0..200_000 {
            let r = HOST_ROUNDINGS[round % 4];
            let abc = [values.next(Format::F64), values.next(Format::F64), values.next(Format::F64)];
            let mut unit = Unit::sse(r);
            // The order of operands decides only which NaN wins: left out.
            if fma && abc.iter().filter(|v| Format::F64.is_nan(**v)).count() == 0 {
                let got = (unit.mul_add(Format::F64, abc, false, false), unit.flags);
                assert_eq!(got, fma64(r, abc), "{r:?} {abc:#x?}");
            }
            let mut unit = Unit::sse(r);
            let got = (unit.convert(Format::F64, Format::F32, abc[0]), unit.flags);
            let want = narrow(r, abc[0], 0);
            assert_eq!(got, (want.0 & 0xffff_ffff, want.1), "{r:?} {:#x}", abc[0]);
            let a = values.next(Format::F32);
            let mut unit = Unit::sse(r);
            assert_eq!((unit.convert(Format::F32, Format::F64, a), unit.flags), widen(r, a, 0), "{a:#x}");
        }
    }
}

#[test]
fn a_product_and_its_addend_cancel_exactly() {
    let f = Format::F64;
    let mut values = Values(5);
    for _ in 0..50_000 {
        let (a, b) = (values.next(f), values.next(f));
        let mut unit = Unit::riscv(Rounding::NearestEven);
        let p = unit.mul(f, a, b);
        if class(f, p) & 0b0100_0010 == 0 || f64::from_bits(p).abs() < 1e-200 {
            continue;
        }
        // a * b - round(a * b) is representable: nothing may be raised, and adding it back is exact.
        let mut exact = Unit::riscv(Rounding::NearestEven);
        let error = exact.mul_add(f, [a, b, p], false, true);
        assert_eq!(exact.flags, 0, "{a:#x} {b:#x}");
        assert_eq!(f64::from_bits(error), f64::from_bits(a).mul_add(f64::from_bits(b), -f64::from_bits(p)));
    }
}

#[test]
fn ties_away_from_zero() {
    let f = Format::F32;
    let bits = |v: f32| u64::from(v.to_bits());
    let mut unit = Unit::riscv(Rounding::NearestAway);
    let half_ulp = bits(f32::EPSILON / 2.0);
    assert_eq!(unit.add(f, bits(1.0), half_ulp), bits(1.0 + f32::EPSILON));
    assert_eq!(unit.add(f, bits(-1.0), half_ulp | f.sign_bit()), bits(-1.0 - f32::EPSILON));
    assert_eq!(unit.flags, flags::INEXACT);
    assert_eq!(unit.to_int(f, Int::I32, bits(2.5)), 3);
    assert_eq!(unit.to_int(f, Int::I32, bits(-2.5)), u64::from(-3i32 as u32));
    assert_eq!(unit.to_int(f, Int::U32, bits(-0.25)), 0);
    assert_eq!(unit.to_int(f, Int::U64, bits(0.5)), 1);
}

#[test]
fn tininess_is_judged_as_asked() {
    // Just below the smallest normal number, rounding up to it.
    let f = Format::F32;
    let (a, b) = (0x0080_0000, 0x3f7f_ffff); // emin * (1 - 2^-24): exactly half-way to the top
    for (rule, tiny) in [(Tininess::AfterRounding, true), (Tininess::BeforeRounding, true)] {
        let mut unit = Unit { tininess: rule, ..Unit::riscv(Rounding::NearestEven) };
        assert_eq!(unit.mul(f, a, b), 0x0080_0000);
        assert_eq!(unit.flags & flags::UNDERFLOW != 0, tiny, "{rule:?}");
    }
    // emin * (1 - 2^-26): with an unbounded exponent it rounds up to emin, so it is tiny only before.
    let wide = f64::from(f32::MIN_POSITIVE) * (1.0 - f64::EPSILON * 2f64.powi(26));
    for (rule, tiny) in [(Tininess::AfterRounding, false), (Tininess::BeforeRounding, true)] {
        let mut unit = Unit { tininess: rule, ..Unit::riscv(Rounding::NearestEven) };
        assert_eq!(unit.convert(Format::F64, f, wide.to_bits()), 0x0080_0000);
        assert_eq!(unit.flags & flags::UNDERFLOW != 0, tiny, "{rule:?}");
    }
}

#[test]
fn integers_saturate_and_round() {
    let bits = |v: f64| v.to_bits();
    let f = Format::F64;
    let go = |r, to, v: f64| {
        let mut unit = Unit::riscv(r);
        (unit.to_int(f, to, bits(v)), unit.flags)
    };
    use Rounding::{Down, NearestEven, Up, Zero};
    assert_eq!(go(Zero, Int::I32, 2_147_483_647.5), (0x7fff_ffff, flags::INEXACT));
    assert_eq!(go(Up, Int::I32, 2_147_483_647.5), (0x7fff_ffff, flags::INVALID));
    assert_eq!(go(Zero, Int::I32, -2_147_483_648.5), (0x8000_0000, flags::INEXACT));
    assert_eq!(go(Down, Int::I32, -2_147_483_648.5), (0x8000_0000, flags::INVALID));
    assert_eq!(go(NearestEven, Int::U32, -0.5), (0, flags::INEXACT));
    assert_eq!(go(Down, Int::U32, -0.5), (0, flags::INVALID));
    assert_eq!(go(Zero, Int::U64, f64::NAN), (u64::MAX, flags::INVALID));
    assert_eq!(go(Zero, Int::I64, f64::NEG_INFINITY), (1 << 63, flags::INVALID));
    assert_eq!(go(Zero, Int::I64, -9_223_372_036_854_775_808.0), (1 << 63, 0));
    assert_eq!(go(Zero, Int::U64, 1.8446744073709552e19), (u64::MAX, flags::INVALID));
    assert_eq!(go(NearestEven, Int::I64, 2.5), (2, flags::INEXACT));
    let mut unit = Unit::riscv(Up);
    assert_eq!(f64::from_bits(unit.from_int(f, Int::U64, u64::MAX)), 18_446_744_073_709_551_616.0);
    assert_eq!(unit.flags, flags::INEXACT);
    assert_eq!(f64::from_bits(unit.from_int(f, Int::I32, 0xffff_ffff)), -1.0);
    let mut values = Values(9);
    for _ in 0..20_000 {
        let v = values.word() >> (values.word() & 63);
        let mut unit = Unit::riscv(NearestEven);
        assert_eq!(unit.from_int(f, Int::I64, v), (v as i64 as f64).to_bits());
        assert_eq!(unit.from_int(f, Int::U64, v), (v as f64).to_bits());
        assert_eq!(unit.from_int(Format::F32, Int::U64, v), u64::from((v as f32).to_bits()));
        let x = values.next(f);
        let mut unit = Unit::riscv(Zero);
        if !f.is_nan(x) {
            assert_eq!(unit.to_int(f, Int::I64, x), f64::from_bits(x) as i64 as u64);
            assert_eq!(unit.to_int(f, Int::U32, x), u64::from(f64::from_bits(x) as u32));
        }
    }
}

#[test]
fn nans_zeros_and_comparisons() {
    let f = Format::F32;
    let (snan, qnan, neg0) = (0x7f80_0001, 0xffc0_0123, 0x8000_0000);
    let one = u64::from(1f32.to_bits());
    let mut u = Unit::riscv(Rounding::NearestEven);
    assert_eq!((u.min(f, snan, one), u.flags), (one, flags::INVALID));
    u.flags = 0;
    assert_eq!((u.max(f, qnan, qnan), u.flags), (f.canonical_nan(), 0));
    assert_eq!((u.min(f, 0, neg0), u.max(f, neg0, 0)), (neg0, 0));
    assert!(u.equal(f, 0, neg0) && !u.equal(f, qnan, qnan) && u.flags == 0);
    assert!(!u.less(f, qnan, one) && u.flags == flags::INVALID);
    u.flags = 0;
    assert!(u.less_equal(f, neg0, 0) && !u.less(f, neg0, 0) && u.less(f, neg0 | 1, 0) && u.flags == 0);
    let inf = f.infinity();
    assert_eq!(u.mul_add(f, [inf, 0, qnan], false, false), f.canonical_nan());
    assert_eq!(u.flags, flags::INVALID, "even with a quiet addend");
    let mut sse = Unit::sse(Rounding::NearestEven);
    assert_eq!((sse.mul_add(f, [inf, 0, qnan], false, false), sse.flags), (qnan, 0));
    assert_eq!((sse.add(f, snan, qnan), sse.flags), (snan | f.quiet_bit(), flags::INVALID));
    let classes = [inf | 1 << 31, 0xbf80_0000, neg0 | 1, neg0, 0, 1, one, inf, snan, qnan];
    for (i, v) in classes.into_iter().enumerate() {
        assert_eq!(class(f, v), 1 << i);
    }
}
