//! Accesses that share a TLB probe, in one page and in two, and the same with a probe each.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Machine, RAM, RAM_SIZE, Rng, random_state, x};
use holdfast_tcg_ir::{Builder, HelperTable, MemOp, Region, Type};
use holdfast_tcg_x64::HostFeatures;

/// Stores and loads off the address in a pin, 0 to 72 bytes from it; the last ones are an update of what one of them stored.
fn region() -> Region {
    let mut b = Builder::new(&HelperTable::new());
    b.start(0x1000);
    b.insn(0x1000, 4);
    let (base, value) = (b.get(x(8)), b.get(x(9)));
    b.store(MemOp::U64, base, 0, value);
    b.store(MemOp::U32, base, 64, value);
    let loads = [(MemOp::U64, 64), (MemOp::U32, 4), (MemOp::U16, 66), (MemOp::U8, 63)];
    let sum = loads.into_iter().fold(value, |sum, (mem, at)| {
        let v = b.load(Type::I64, mem, base, at);
        b.add(sum, v)
    });
    b.set(x(10), sum);
    let old = b.load(Type::I64, MemOp::U64, base, 0);
    let new = b.add(old, sum);
    b.store(MemOp::U64, base, 0, new);
    b.goto_pc(0x1004);
    b.take()
}

/// How often the runtime is asked with all pages in the TLB, which the stubs may look up so many times before it is.
fn asked(share: bool, base: u64, retries: i32) -> u64 {
    let mut m = Machine::new(HelperTable::new(), HostFeatures::detect());
    let memory = vec![0; RAM_SIZE];
    let mut state = random_state(&mut Rng(1));
    state.x[8] = base;
    let region = region();
    m.translator.share_probes(share);
    m.retries = i32::MAX;
    // Twice: a page is read before it is written, or is not.
    for _ in 0..2 {
        m.both(&region, &state, &memory, 0x1f80);
    }
    m.retries = retries;
    let code = m.compile(&region);
    let before = m.ram.slow_calls;
    m.run_code(code, &state, &memory, 0x1f80);
    m.ram.slow_calls - before
}

#[test]
fn the_runtime_is_asked_when_so_many_accesses_failed_by_a_shared_probe_only() {
    let (within, across) = (RAM + 0x2000, RAM + 0x2000 - 64);
    for share in [false, true] {
        assert_eq!(asked(share, within, 0), 0, "no probe fails");
    }
    assert_eq!(asked(true, across, i32::MAX), 0, "the stubs make all eight accesses");
    assert_eq!(asked(true, across, 9), 0);
    assert_eq!(asked(true, across, 8), 1);
    assert_eq!(asked(true, across, 6), 3, "every further one");
    assert_eq!(asked(false, across, 0), 0, "each has a probe of its own");
}
