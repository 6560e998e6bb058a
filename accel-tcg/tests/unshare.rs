//! Accesses near each other share a TLB probe, but not where they lie in two pages again and again.

mod common;

use common::asm::*;
use common::*;
use holdfast_tcg::Engine;

/// Times the accesses are made in a round.
const TIMES: u64 = 2000;
/// Where the function with the accesses is.
const WORK: u64 = 0x1000;
/// The array whose middle is the end of a page.
const ACROSS: u64 = RAM + 0x1_0f80;
/// The same, all of it in one page.
const WITHIN: u64 = RAM + 0x1_0e00;

/// One access off the array's start.
#[derive(Clone, Copy)]
enum Access {
    /// The function of the instruction (bits 0 and 1: size, bit 2: zero-extended) and the displacement; adds it to the sum.
    Load(u32, i32),
    /// Of the sum.
    Store(u32, i32),
}
use Access::{Load, Store};

/// All sizes and extensions, in both pages where there are two; none of them crosses from one to the other.
const ACCESSES: [Access; 20] = [
    Store(3, 0),
    Load(0, 3),
    Load(4, 130),
    Store(2, 128),
    Load(2, 124),
    Load(6, 128),
    Store(1, 0x72),
    Load(1, 0x72),
    Load(5, 0x80),
    Store(0, 0x7f),
    Store(0, 0x80),
    Load(3, 0x78),
    Load(3, 0x80),
    Store(3, 0xf8),
    Load(2, 0xf8),
    Load(0, 0xff),
    Store(2, 0x40),
    Load(6, 0x40),
    Load(5, 0x7e),
    Load(3, 0),
];

/// What is added to the sum after the accesses, at first.
const ADDED: u64 = 5;

/// Makes the accesses for some rounds, and before each but the first changes the constant that is added.
fn program(array: u64, rounds: u64) -> Asm {
    let mut p = Asm::new();
    p.li(S0, 0).li(S3, rounds).li(S4, ADDED).li(A1, array).li(A0, 0);
    p.label("round").li(S1, TIMES).label("loop").call("work").addi(S1, S1, -1).bne(S1, ZERO, "loop");
    p.addi(S3, S3, -1).beq(S3, ZERO, "end").addi(S4, S4, 1);
    p.slli(T1, S4, 20).li(T2, u64::from(addi(A0, A0, 0))).add(T1, T1, T2);
    p.li(T2, RAM + WORK).sw(T1, T2, 0).fence_i().j("round");
    p.label("end").done(A0);
    p.org(WORK).label("work").w(addi(A0, A0, ADDED as i32));
    for access in ACCESSES {
        match access {
            Load(function, at) => p.load(function, A2, A1, at).add(A0, A0, A2),
            Store(function, at) => p.store(function, A0, A1, at),
        };
    }
    p.ret();
    p
}

/// The sum that the program ends with.
fn expected(rounds: u64) -> u64 {
    let (mut sum, mut array) = (0_u64, [0_u8; 256]);
    for n in 0..rounds * TIMES {
        sum = sum.wrapping_add(ADDED + n / TIMES);
        for access in ACCESSES {
            let (Load(function, at) | Store(function, at)) = access;
            let bytes = &mut array[at as usize..][..1 << (function & 3)];
            if matches!(access, Store(..)) {
                bytes.copy_from_slice(&sum.to_le_bytes()[..bytes.len()]);
                continue;
            }
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            let unused = 64 - 8 * bytes.len() as u32;
            let high = u64::from_le_bytes(word) << unused;
            let value = if function & 4 == 0 { (high as i64 >> unused) as u64 } else { high >> unused };
            sum = sum.wrapping_add(value);
        }
    }
    sum
}

/// Runs the program; gives how many regions were translated without shared probes, and in all.
fn run(engine: Engine, array: u64, rounds: u64, within: u64) -> [u64; 2] {
    let mut m = Machine::with(engine, 1, &program(array, rounds));
    m.vm.unshare_within(within);
    assert_eq!(m.run(), expected(rounds), "{engine:?}");
    let info = m.vm.info();
    ["regions translated unshared", "regions translated"].map(|name| {
        let name = format!("{name:<28}");
        let line = info.lines().find_map(|l| l.strip_prefix(&name)).expect("the line");
        line.parse().expect("a number")
    })
}

#[test]
fn what_crosses_a_page_again_and_again_is_translated_with_a_probe_each() {
    let [_, usual] = run(Engine::Auto, ACROSS, 1, 0);
    let [unshared, all] = run(Engine::Auto, ACROSS, 1, u64::MAX);
    // The function is one region, or two of which one is for calls of it.
    assert!((1..=4).contains(&unshared), "{unshared}");
    assert!(all <= usual + 8, "{all} regions for {usual}");
}

#[test]
fn code_without_shared_probes_can_be_changed() {
    let [unshared, _] = run(Engine::Auto, ACROSS, 4, u64::MAX);
    assert!((1..=16).contains(&unshared), "{unshared}");
}

#[test]
fn nothing_is_translated_anew_where_that_is_of_no_use() {
    for (array, within) in [(WITHIN, u64::MAX), (ACROSS, 0)] {
        let [unshared, _] = run(Engine::Auto, array, 2, within);
        assert_eq!(unshared, 0, "{array:#x}");
    }
    let [unshared, _] = run(Engine::Interpreter, ACROSS, 2, u64::MAX);
    assert_eq!(unshared, 0, "an interpreter has no probes");
}
