//! Bit operations on sign-extended values, which the builder makes on 32 bits, and pairs of shifts, which it makes rotations:
//! against plain arithmetic, since both engines are given what the builder made.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Machine, RAM_SIZE, Rng, random_state, x};
use holdfast_tcg_ir::{Builder, HelperTable, Op, Val};
use holdfast_tcg_x64::HostFeatures;

const OPS: [Op; 3] = [Op::And, Op::Or, Op::Xor];

fn apply(op: Op, a: u64, b: u64) -> u64 {
    match op {
        Op::And => a & b,
        Op::Or => a | b,
        _ => a ^ b,
    }
}

/// `v << n` of 32 bits, sign-extended, and `v >> n` likewise, as RISC-V has them.
fn shifts(b: &mut Builder, v: Val, n: i64, m: i64) -> [Val; 2] {
    let low = b.trunc(v);
    let left = b.shli(low, n);
    let right = b.shrui(low, m);
    [b.sext(left), b.sext(right)]
}

fn extended(v: u32) -> u64 {
    i64::from(v as i32) as u64
}

#[test]
fn extended_values_and_rotations_are_what_arithmetic_says() {
    for features in [HostFeatures::detect(), HostFeatures::baseline()] {
        let mut m = Machine::new(HelperTable::new(), features);
        let mut rng = Rng(7);
        let memory = vec![0; RAM_SIZE];
        for (n, m2) in [(7, 25), (25, 7), (1, 31), (16, 16), (7, 24), (31, 31)] {
            for op in OPS {
                let mut b = Builder::new(&HelperTable::new());
                b.start(0x1000);
                b.insn(0x1000, 4);
                // x3 is in memory, x8 and x9 are pins.
                for (from, to) in [(3, 4), (8, 9)] {
                    let v = b.get(x(from));
                    let [left, right] = shifts(&mut b, v, n, m2);
                    let joined = b.binary(op, left, right);
                    b.set(x(to), joined);
                    let (left64, right64) = (b.shli(v, n + 32), b.shrui(v, m2));
                    let wide = b.binary(op, right64, left64);
                    b.set(x(to + 10), wide);
                }
                let (p, q) = (b.get(x(4)), b.get(x(9)));
                let mixed = b.binary(op, p, q);
                b.set(x(20), mixed);
                b.goto_pc(0x1004);
                let region = b.take();
                if n + m2 == 32 && op != Op::And {
                    assert!(region.insts.iter().filter(|i| i.op == Op::RotL).count() == 4, "{region}");
                }
                let code = m.compile(&region);
                for _ in 0..20 {
                    let state = random_state(&mut rng);
                    let after = m.run_code(code, &state, &memory, 0x1f80).state;
                    let expect = |from: usize| {
                        let v = state.x[from];
                        let (left, right) = (extended((v as u32) << n), extended(v as u32 >> m2));
                        (apply(op, left, right), apply(op, v >> m2, v << (n + 32)))
                    };
                    let (first, second) = (expect(3), expect(8));
                    assert_eq!((after.x[4], after.x[14]), first, "{op:?} {n} {m2}\n{region}");
                    assert_eq!((after.x[9], after.x[19]), second, "{op:?} {n} {m2}\n{region}");
                    assert_eq!(after.x[20], apply(op, first.0, second.0), "{op:?} {n} {m2}\n{region}");
                }
            }
        }
    }
}
