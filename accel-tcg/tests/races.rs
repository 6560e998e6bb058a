//! What only shows when vCPUs run in parallel: page tables changed under another vCPU, accessed and dirty bits set
//! beside software's updates, code translated by several vCPUs while one of them rewrites it.

mod common;

use common::asm::*;
use common::*;
use holdfast_tcg::Engine;

/// Page tables: RAM mapped to itself, and one page at `VA`.
const VA: u64 = 0x4000_0000;
const ROOT: u64 = RAM + 0x10_0000;
const MID: u64 = ROOT + 0x1000;
const LEAF: u64 = ROOT + 0x2000;
/// Where the vCPUs talk: +0 the round that is asked for, +64 the round that was answered.
const TALK: u64 = RAM + 0x8000;
/// Pages that are mapped at `VA` in turn.
const PAGES: u64 = RAM + 0x20_0000;
/// What a test that found something wrong ends with.
const WRONG: u64 = 0xbad;
const AMO_ADD: u32 = 0;
const AMO_AND: u32 = 12;
/// Dirty.
const D: u64 = 1 << 7;

fn rounds(engine: Engine) -> u64 {
    if engine == Engine::Interpreter { 2_000 } else { 20_000 }
}

/// Both vCPUs enter S-mode at 0x200 with the hart id in a0. `ebreak` ends the test with s0; any other exception too,
/// with its cause in the upper half.
fn in_s_mode() -> Asm {
    let mut p = Asm::new();
    p.li(T0, u64::MAX >> 10).csrw(PMPADDR0, T0).li(T0, 0x1f).csrw(PMPCFG0, T0);
    p.li(T0, RAM + 0x100).csrw(MTVEC, T0).li(T0, 8 << 60 | ROOT >> 12).csrw(SATP, T0);
    p.li(T0, RAM + 0x200).csrw(MEPC, T0).li(T0, 1 << 11).csrw(MSTATUS, T0).mret();
    p.org(0x100).csrr(A2, MCAUSE).addi(A2, A2, -3).slli(A2, A2, 32).add(S0, S0, A2).done(S0);
    p.org(0x200).li(A1, TALK).li(S2, VA).li(S3, LEAF);
    p
}

fn run_s(engine: Engine, p: &Asm) -> u64 {
    let mut m = Machine::with(engine, 2, p);
    m.write(ROOT + 8 * (RAM >> 30), RAM >> 2 | 0xcf);
    m.write(ROOT + 8 * (VA >> 30), MID >> 2 | 1);
    m.write(MID, LEAF >> 2 | 1);
    m.write(LEAF, PAGES >> 2 | 0xc7);
    for n in 0..64 {
        m.write(PAGES + n * 0x1000, n);
    }
    m.run()
}

/// vCPU 0 maps another page, says so, and waits for the answer. vCPU 1 uses the page all the time, fences when it
/// is told, and must then read from and write to the new one.
#[test]
fn a_remapped_page_is_the_new_one_after_a_remote_fence() {
    for engine in ENGINES {
        for whole in [false, true] {
            let n = rounds(engine);
            let mut p = in_s_mode();
            p.li(S0, 0).li(S1, 1).li(S4, n + 1).bne(A0, ZERO, "user");
            p.label("map").w(63 << 20 | S1 << 15 | 7 << 12 | T2 << 7 | 0x13); // andi t2, s1, 63
            p.slli(A2, T2, 10).li(T0, PAGES >> 2 | 0xc7).add(A2, A2, T0).sd(A2, S3, 0);
            // fence rw, rw; then the question, and its answer
            p.w(0x0330_000f).sd(S1, A1, 0).label("answer").ld(T1, A1, 64).bne(T1, S1, "answer");
            p.slli(T2, T2, 12).li(T0, PAGES).add(T2, T2, T0).ld(A3, T2, 8).bne(A3, S1, "wrong");
            p.addi(S1, S1, 1).bne(S1, S4, "map").li(S0, n).ebreak();
            p.label("user").ld(A3, S2, 0).sd(A3, S2, 16).ld(T1, A1, 0).bne(T1, S1, "user");
            p.sfence(if whole { ZERO } else { S2 }, ZERO);
            p.w(63 << 20 | S1 << 15 | 7 << 12 | T2 << 7 | 0x13);
            p.ld(A3, S2, 0).bne(A3, T2, "wrong").sd(S1, S2, 8).sd(S1, A1, 64).addi(S1, S1, 1).j("user");
            p.label("wrong").li(S0, WRONG).ebreak();
            assert_eq!(run_s(engine, &p), n, "{engine:?}, everything is flushed: {whole}");
        }
    }
}

/// vCPU 1 writes a page all the time. vCPU 0 clears the dirty bit and has it fenced, again and again: what is written
/// after a fence must be dirty by the time that it can be seen.
#[test]
fn a_page_is_dirty_before_its_new_contents_are_seen() {
    for engine in ENGINES {
        let n = rounds(engine);
        let mut p = in_s_mode();
        p.li(S0, 0).li(S1, 0).li(S4, n).bne(A0, ZERO, "writer");
        p.li(A4, PAGES).li(SP, !D).ld(A5, A4, 0);
        p.label("harvest").addi(S1, S1, 1).li(T2, 40).label("delay").addi(T2, T2, -1).bne(T2, ZERO, "delay");
        p.ld(A3, A4, 0).amo(AMO_AND, T1, S3, SP, 3).beq(A3, A5, "same");
        p.w((D as u32) << 20 | T1 << 15 | 7 << 12 | T1 << 7 | 0x13).beq(T1, ZERO, "wrong"); // andi t1, t1, D
        p.label("same").sd(S1, A1, 0).label("answer").ld(T1, A1, 64).bne(T1, S1, "answer").ld(A5, A4, 0);
        p.bne(S1, S4, "harvest").li(S0, n).ebreak();
        p.label("writer").addi(A2, A2, 1).sd(A2, S2, 0).ld(T1, A1, 0).beq(T1, S1, "writer");
        p.addi(S1, T1, 0).sfence(S2, ZERO).sd(S1, A1, 64).j("writer");
        p.label("wrong").li(S0, WRONG).ebreak();
        assert_eq!(run_s(engine, &p), n, "{engine:?}");
    }
}

/// Pages of code, each run by all vCPUs at once for the first time, while one of them, which could write it without
/// being noticed so far, rewrites it.
fn rewritten_at_once(vcpus: u64, pages: u64) -> Asm {
    const CODE: u64 = RAM + 0x40_0000;
    let mut p = Asm::new();
    p.li(A1, TALK).li(A3, 1).li(S0, 0).li(S1, 0).li(S2, pages).li(S3, CODE).li(S4, vcpus).addi(SP, A0, 0);
    p.label("page").bne(S1, SP, "enter").li(T1, 0x800).add(T1, T1, S3).sd(S1, T1, 0);
    p.label("enter").call("barrier").jalr(RA, S3, 0).bne(S1, SP, "leave");
    p.li(T1, u64::from(addi(A0, ZERO, 2))).sw(T1, S3, 0).fence_i().jalr(RA, S3, 0);
    p.li(T1, 2).bne(A0, T1, "wrong").add(SP, SP, S4);
    p.label("leave").call("barrier").fence_i().jalr(RA, S3, 0).li(T1, 2).bne(A0, T1, "wrong");
    p.li(T1, 0x1000).add(S3, S3, T1).addi(S1, S1, 1).bne(S1, S2, "page").call("barrier").done(S1);
    p.label("barrier").add(S0, S0, S4).amo(AMO_ADD, ZERO, A1, A3, 3).label("spin").ld(T1, A1, 0);
    // pause; bltu t1, s0
    p.w(0x0100_000f).branch(6, T1, S0, "spin").ret();
    p.label("wrong").li(T1, WRONG).done(T1);
    p
}

#[test]
fn a_store_to_code_is_noticed_whoever_translates_it_first() {
    for engine in ENGINES {
        for vcpus in [2, 4] {
            let pages = if engine == Engine::Interpreter { 30 } else { 200 };
            let mut m = Machine::with(engine, vcpus, &rewritten_at_once(u64::from(vcpus), pages));
            let mut victim = Asm::new();
            victim.addi(A0, ZERO, 1).ret();
            for n in 0..pages {
                m.load(RAM + 0x40_0000 + n * 0x1000, &victim);
            }
            assert_eq!(m.run(), pages, "{engine:?}, {vcpus} vCPUs\n{}", m.vm.info());
        }
    }
}
