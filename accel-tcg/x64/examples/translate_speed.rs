//! Measures how long building and compiling a typical block takes, and what its code looks like.
#![allow(clippy::unwrap_used, reason = "a measurement")]

use holdfast_tcg_ir::env::SlowPaths;
use holdfast_tcg_ir::helper::HelperRet;
use holdfast_tcg_ir::{Builder, Cond, GuestSpec, HelperTable, MemOp, Slot, Type};
use holdfast_tcg_x64::{Target, Translator};
use std::time::Instant;

unsafe extern "C" fn load(_: *mut u8, _: u64, _: u32, _: u64) -> HelperRet {
    HelperRet::ok(0)
}
unsafe extern "C" fn store(_: *mut u8, _: u64, _: u32, _: u64, _: u64) -> HelperRet {
    HelperRet::ok(0)
}
unsafe extern "C" fn cas(_: *mut u8, _: u64, _: u32, _: u64, _: u64, _: u64) -> HelperRet {
    HelperRet::ok(0)
}
unsafe extern "C" fn lookup(_: *mut u8, _: u64) -> u64 {
    0
}

const fn x(n: usize) -> Slot {
    Slot::i64(n * 8)
}
const PINS: [Slot; 8] = [x(10), x(15), x(14), x(2), x(8), x(11), x(13), x(12)];

/// A function's entry: frame, saved registers, a few computations, a field access, a branch.
fn block(b: &mut Builder, pc: u64) {
    b.start(pc);
    let mut at = pc;
    let mut step = |b: &mut Builder| {
        b.insn(at, 4);
        at += 4;
    };
    step(b);
    let sp = b.get(x(2));
    let sp = b.addi(sp, -32);
    b.set(x(2), sp);
    for (n, d) in [(1, 24), (8, 16), (9, 8)] {
        step(b);
        let (sp, v) = (b.get(x(2)), b.get(x(n)));
        b.store(MemOp::U64, sp, d, v);
    }
    step(b);
    let v = b.get(x(10));
    b.set(x(8), v);
    step(b);
    let a0 = b.get(x(10));
    let v = b.load(Type::I64, MemOp::S32, a0, 12);
    b.set(x(15), v);
    step(b);
    let a5 = b.get(x(15));
    let v = b.trunc(a5);
    let v = b.addi(v, 1);
    let v = b.sext(v);
    b.set(x(15), v);
    step(b);
    let (a0, a5) = (b.get(x(10)), b.get(x(15)));
    b.store(MemOp::U32, a0, 12, a5);
    step(b);
    let v = b.load(Type::I64, MemOp::U64, a0, 0);
    b.set(x(14), v);
    step(b);
    let l = b.label();
    let (p, q) = (b.get(x(14)), b.get(x(15)));
    b.brcond(Cond::Eq, p, q, l);
    b.goto_pc(at);
    b.bind(l);
    b.goto_pc(pc + 0x2000);
}

fn main() {
    let helpers = HelperTable::new();
    let spec = GuestSpec { name: "speed", pins: &PINS, pc_shift: 1, page_bits: 12 };
    let slow = SlowPaths { load, store, rmw: store, cas, lookup };
    let mut t = Translator::new(spec, helpers.clone(), slow).unwrap();
    let mut out = vec![0u8; 1 << 20];
    let exec = out.as_ptr() as u64 & !0xfff;
    let stubs = t.stubs(&mut out, exec).unwrap();
    let mut b = Builder::new(&helpers);
    let at = stubs.len;
    let (mut build, mut all) = (u128::MAX, u128::MAX);
    // Rounds shorter than a time slice, so that the best of them was not interrupted.
    const N: u64 = 50;
    for _ in 0..2000 {
        let start = Instant::now();
        for n in 0..N {
            block(&mut b, 0xffff_ffff_8000_0000 + n * 64);
        }
        build = build.min(start.elapsed().as_nanos());
        let start = Instant::now();
        for n in 0..N {
            block(&mut b, 0xffff_ffff_8000_0000 + n * 64);
            t.compile(
                &stubs,
                b.region(),
                Target { out: &mut out[at..], exec: exec + at as u64, region_id: 0 },
            )
            .unwrap();
        }
        all = all.min(start.elapsed().as_nanos());
    }
    let c = t
        .compile(&stubs, b.region(), Target { out: &mut out[at..], exec: exec + at as u64, region_id: 0 })
        .unwrap();
    println!("{} guest instructions, {} IR instructions", b.region().guest_insns, b.region().insts.len());
    println!("hot {} bytes, all {} bytes", c.hot_len, c.len);
    println!("build {} ns, build and compile {} ns per block", build / u128::from(N), all / u128::from(N));
    if std::env::args().any(|a| a == "-d") {
        print!("{}", stubs.disassemble(t.bytes(), exec + at as u64));
    }
}
