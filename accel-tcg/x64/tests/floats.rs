//! Every floating-point instruction over special values, in every rounding mode: results and flags of translated code
//! against the interpreter, which uses softfp.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Machine, RAM_SIZE, SPECIAL32, SPECIAL64, State, f, random_state, x};
use holdfast_tcg_ir::{Builder, FpCond, FpMode, HelperTable, Op, Region, Round, Type, Val};
use holdfast_tcg_x64::HostFeatures;

const MODES: [Round; 6] =
    [Round::Dynamic, Round::NearestEven, Round::Zero, Round::Down, Round::Up, Round::NearestAway];

/// f0, f1, f2 in; f3 or x1 out.
fn region(make: &dyn Fn(&mut Builder, [Val; 3]) -> Val, single: bool) -> Region {
    let mut b = Builder::new(&HelperTable::new());
    b.start(0x1000);
    b.insn(0x1000, 4);
    let ops = [0, 1, 2].map(|n| {
        let v = b.get(f(n));
        if single { b.funbox(v) } else { v }
    });
    let r = make(&mut b, ops);
    match b.ty(r) {
        Type::F64 => b.set(f(3), r),
        Type::F32 => {
            let v = b.fbox(r);
            b.set(f(3), v);
        }
        Type::I64 => b.set(x(1), r),
        _ => {
            let v = b.sext(r);
            b.set(x(1), v);
        }
    }
    b.goto_pc(0x1004);
    b.take()
}

fn check(name: &str, features: HostFeatures, binary: bool, make: &dyn Fn(&mut Builder, [Val; 3]) -> Val) {
    let mut m = Machine::new(HelperTable::new(), features);
    let mut rng = common::Rng(42);
    let base = random_state(&mut rng);
    let memory = vec![0; RAM_SIZE];
    for single in [false, true] {
        let r = region(make, single);
        let code = m.compile(&r);
        let values: Vec<u64> = if single {
            SPECIAL32
                .iter()
                .map(|v| 0xffff_ffff_0000_0000 | u64::from(*v))
                .chain([1.5f64.to_bits()])
                .collect()
        } else {
            SPECIAL64.to_vec()
        };
        for &a in &values {
            for &b in if binary { &values[..] } else { &values[..1] } {
                for rc in 0..4u32 {
                    let c = values[((a ^ b.rotate_left(3)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32)
                        as usize
                        % values.len()];
                    let mut s: State = base;
                    (s.f[0], s.f[1], s.f[2]) = (a, b, c);
                    let mxcsr = 0x1f80 | rc << 13;
                    let want = m.interpret(&r, &s, &memory, mxcsr);
                    let got = m.run_code(code, &s, &memory, mxcsr);
                    assert_eq!(
                        (got.state, got.mxcsr),
                        (want.state, want.mxcsr),
                        "{name} single {single} rc {rc} {a:#x} {b:#x} {c:#x}\n{}",
                        m.disassemble()
                    );
                }
            }
        }
    }
}

fn both(name: &str, binary: bool, make: &dyn Fn(&mut Builder, [Val; 3]) -> Val) {
    check(name, HostFeatures::detect(), binary, make);
    check(name, HostFeatures::baseline(), binary, make);
}

#[test]
fn arithmetic() {
    for mode in MODES.map(FpMode::canonical) {
        for op in [Op::FAdd, Op::FSub, Op::FMul, Op::FDiv] {
            both(&format!("{op:?} {mode:?}"), true, &|b, [p, q, _]| b.fbinary(op, mode, p, q));
        }
        both(&format!("sqrt {mode:?}"), false, &|b, [p, ..]| b.fsqrt(mode, p));
    }
}

#[test]
fn fused() {
    for mode in MODES.map(FpMode::canonical) {
        for n in 0..4 {
            let mode = mode.negate_product(n & 1 != 0).negate_addend(n & 2 != 0);
            both(&format!("fma {mode:?}"), true, &|b, [p, q, r]| b.fmuladd(mode, p, q, r));
        }
    }
}

#[test]
fn comparisons_and_signs() {
    let mode = FpMode::canonical(Round::Dynamic);
    for op in [Op::FMin, Op::FMax] {
        both(&format!("{op:?}"), true, &|b, [p, q, _]| b.fbinary(op, mode, p, q));
    }
    for op in [Op::FSgnj, Op::FSgnjn, Op::FSgnjx] {
        both(&format!("{op:?}"), true, &|b, [p, q, _]| b.fsgn(op, p, q));
        both(&format!("{op:?} same"), false, &|b, [p, ..]| b.fsgn(op, p, p));
    }
    for cc in [FpCond::Eq, FpCond::Lt, FpCond::Le] {
        both(&format!("{cc:?}"), true, &|b, [p, q, _]| b.fcmp(cc, p, q));
    }
    both("class", false, &|b, [p, ..]| b.fclass(p));
}

#[test]
fn conversions() {
    for mode in MODES.map(FpMode::canonical) {
        for op in [Op::FCvtToS, Op::FCvtToU] {
            for ty in [Type::I32, Type::I64] {
                both(&format!("{op:?} {ty} {mode:?}"), false, &|b, [p, ..]| b.fcvt(op, mode, ty, p));
            }
        }
        for op in [Op::FCvtFromS, Op::FCvtFromU] {
            for to in [Type::F32, Type::F64] {
                both(&format!("{op:?} {to} {mode:?}"), false, &|b, [p, ..]| {
                    let v = b.fbits(p);
                    b.fcvt(op, mode, to, v)
                });
            }
        }
        both(&format!("cvtff {mode:?}"), false, &|b, [p, ..]| {
            let to = if b.ty(p) == Type::F32 { Type::F64 } else { Type::F32 };
            b.fcvt(Op::FCvtFF, mode, to, p)
        });
    }
}
