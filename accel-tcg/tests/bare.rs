//! Small bare-metal programs against the runtime: what they check cannot be seen from one instruction.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::asm::*;
use common::*;
use holdfast_tcg::{Engine, Stop};

#[test]
fn a_loop_adds_up() {
    let mut p = Asm::new();
    p.li(A0, 0).li(A1, 100_000).label("loop").add(A0, A0, A1).addi(A1, A1, -1).bne(A1, ZERO, "loop").done(A0);
    check(&p, 5_000_050_000);
}

#[test]
fn calls_across_pages_return() {
    let mut p = Asm::new();
    p.li(S0, 0).li(S1, 1000);
    p.label("loop").call("near").call("far").addi(S1, S1, -1).bne(S1, ZERO, "loop").done(S0);
    p.label("near").addi(S0, S0, 1).ret();
    p.org(0x2ffe).label("far").addi(S0, S0, 2).ret();
    check(&p, 3000);
}

#[test]
fn misaligned_accesses_cross_pages() {
    let mut p = Asm::new();
    let at = RAM + 0x1_0ffd;
    p.li(A1, at)
        .li(A2, 0x1122_3344_5566_7788)
        .sd(A2, A1, 0)
        .ld(A0, A1, 0)
        .load(5, A3, A1, 2)
        .add(A0, A0, A3)
        .done(A0);
    check(&p, 0x1122_3344_5566_7788 + 0x5566);
}

/// Calls "victim", which returns an immediate, rewriting it before every call.
fn self_modifying(victim_at: u64, fence: bool) -> Asm {
    let mut p = Asm::new();
    p.li(S0, 0).li(S1, 1).li(S2, 501);
    p.label("loop");
    // t1 = encoding of `addi a0, zero, s1`
    p.slli(T1, S1, 20).li(T2, u64::from(addi(A0, ZERO, 0))).add(T1, T1, T2);
    p.li(T2, RAM + victim_at).sw(T1, T2, 0);
    if fence {
        p.fence_i();
    }
    p.call("victim").add(S0, S0, A0).addi(S1, S1, 1).bne(S1, S2, "loop").done(S0);
    p.org(victim_at).label("victim").addi(A0, ZERO, 0).ret();
    p
}

#[test]
fn code_that_is_rewritten_runs_as_rewritten() {
    check(&self_modifying(0x800, true), 500 * 501 / 2);
    check(&self_modifying(0x3000, true), 500 * 501 / 2);
}

#[test]
fn writes_from_outside_invalidate_code() {
    for engine in ENGINES {
        let mut p = Asm::new();
        p.label("loop").call("victim").beq(A0, ZERO, "loop").done(A0);
        p.org(0x1000).label("victim").addi(A0, ZERO, 0).ret();
        let mut m = Machine::with(engine, 1, &p);
        let memory = m.memory.clone();
        let writer = std::thread::spawn(move || {
            use vm_memory::{Bytes, GuestAddress};
            std::thread::sleep(Duration::from_millis(20));
            memory.write_obj(addi(A0, ZERO, 77), GuestAddress(RAM + 0x1000)).expect("in RAM");
        });
        assert_eq!(m.run(), 77, "{engine:?}");
        writer.join().expect("writer");
    }
}

#[test]
fn data_beside_code_does_not_lose_stores() {
    let mut p = Asm::new();
    p.li(A1, RAM + 0x800).li(A2, 5000).li(A3, 0);
    p.label("loop")
        .sd(A2, A1, 0)
        .ld(A4, A1, 0)
        .add(A3, A3, A4)
        .addi(A2, A2, -1)
        .bne(A2, ZERO, "loop")
        .done(A3);
    check(&p, 5000 * 5001 / 2);
}

#[test]
fn faults_reach_the_handler_with_exact_state() {
    let mut p = Asm::new();
    p.li(T0, RAM + 0x400).csrw(MTVEC, T0).li(A1, NOTHING + 8).li(A0, 1);
    p.label("access").load(3, A0, A1, 0).done(A0);
    p.org(0x400).csrr(A2, MCAUSE).csrr(A3, MTVAL).csrr(A4, MEPC);
    p.li(T1, LOG).sd(A2, T1, 0).sd(A3, T1, 0).sd(A4, T1, 0).sd(A0, T1, 0).ld(A0, T1, 0).done(A0);
    for engine in ENGINES {
        let mut m = Machine::with(engine, 1, &p);
        assert_eq!(m.run(), 4, "{engine:?}");
        assert_eq!(*m.io.log.lock(), [5, NOTHING + 8, p.at("access"), 1], "{engine:?}");
    }
}

/// Sv39 in S-mode: RAM mapped to itself by a gigapage, and one 4 KiB page at `VA` that is remapped.
const VA: u64 = 0x4000_0000;
const ROOT: u64 = RAM + 0x10_0000;
const MID: u64 = ROOT + 0x1000;
const LEAF: u64 = ROOT + 0x2000;

fn tables(m: &Machine, page: u64, flags: u64) {
    m.write(ROOT + 8 * (RAM >> 30), RAM >> 2 | 0xcf);
    m.write(ROOT + 8 * (VA >> 30), MID >> 2 | 1);
    m.write(MID, LEAF >> 2 | 1);
    m.write(LEAF, page >> 2 | flags);
}

/// Enters S-mode at the label `s`, with traps going to M-mode at `trap`.
fn enter_s(p: &mut Asm, s: u64, trap: u64) {
    p.li(T0, u64::MAX >> 10).csrw(PMPADDR0, T0).li(T0, 0x1f).csrw(PMPCFG0, T0);
    p.li(T0, RAM + trap).csrw(MTVEC, T0).li(T0, 8 << 60 | ROOT >> 12).csrw(SATP, T0);
    p.li(T0, RAM + s).csrw(MEPC, T0).li(T0, 1 << 11).csrw(MSTATUS, T0).mret();
}

#[test]
fn a_remapped_code_page_runs_the_new_code() {
    let mut p = Asm::new();
    enter_s(&mut p, 0x200, 0x800);
    p.org(0x200).li(S0, 0).li(S1, 300).li(S2, VA).li(S3, LEAF);
    p.li(S4, (RAM + 0x4000) >> 2 | 0xcb).li(A5, ((RAM + 0x4000) ^ (RAM + 0x5000)) >> 2);
    p.label("loop").jalr(RA, S2, 0).add(S0, S0, A0).xor(S4, S4, A5).sd(S4, S3, 0).sfence(S2, ZERO);
    p.addi(S1, S1, -1).bne(S1, ZERO, "loop").ebreak();
    p.org(0x800).csrr(A2, MCAUSE).slli(A2, A2, 32).add(S0, S0, A2).done(S0);
    p.org(0x4000).addi(A0, ZERO, 1).ret();
    p.org(0x5000).addi(A0, ZERO, 2).ret();
    for engine in ENGINES {
        let mut m = Machine::with(engine, 1, &p);
        tables(&m, RAM + 0x4000, 0xcb);
        assert_eq!(m.run(), 3 << 32 | 450, "{engine:?}");
    }
}

#[test]
fn page_faults_are_precise_and_resume() {
    let mut p = Asm::new();
    enter_s(&mut p, 0x200, 0x800);
    p.org(0x200).li(S0, 0).li(S1, VA).li(A0, 42).label("store").sd(A0, S1, 16).ld(S0, S1, 16).ebreak();
    // The handler maps the page on a store page fault and ends on a breakpoint.
    p.org(0x800).csrr(A2, MCAUSE).csrr(A3, MTVAL).csrr(A4, MEPC).li(T0, 3).beq(A2, T0, "end");
    p.li(T1, LOG).sd(A2, T1, 0).sd(A3, T1, 0).sd(A4, T1, 0);
    p.li(T0, LEAF).li(T1, (RAM + 0x6000) >> 2 | 0xc7).sd(T1, T0, 0).sfence(ZERO, ZERO).mret();
    p.label("end").done(S0);
    for engine in ENGINES {
        let mut m = Machine::with(engine, 1, &p);
        tables(&m, 0, 0);
        assert_eq!(m.run(), 42, "{engine:?}");
        assert_eq!(*m.io.log.lock(), [15, VA + 16, p.at("store")], "{engine:?}");
        assert_eq!(m.read(RAM + 0x6010), 42);
    }
}

/// Every vCPU does `each` 20,000 times on the counter at a1; the last one ends the test.
fn contended(each: impl Fn(&mut Asm), vcpus: u64) -> Asm {
    let mut p = Asm::new();
    p.li(A1, RAM + 0x8000).li(A2, 20_000).li(A3, 1);
    p.label("loop");
    each(&mut p);
    p.addi(A2, A2, -1).bne(A2, ZERO, "loop");
    p.addi(A4, A1, 64).amo(0, A5, A4, A3, 3).li(T0, vcpus - 1).bne(A5, T0, "wait").ld(A0, A1, 0).done(A0);
    p.label("wait").j("wait");
    p
}

#[test]
fn atomics_of_parallel_vcpus_lose_nothing() {
    let add = contended(
        |p| {
            p.amo(0, ZERO, A1, A3, 3);
        },
        2,
    );
    let reserve = contended(
        |p| {
            p.label("again")
                .amo(2, A4, A1, ZERO, 3)
                .addi(A4, A4, 1)
                .amo(3, A5, A1, A4, 3)
                .bne(A5, ZERO, "again");
        },
        2,
    );
    for engine in ENGINES {
        assert_eq!(Machine::with(engine, 2, &add).run(), 40_000, "{engine:?}");
        assert_eq!(Machine::with(engine, 2, &reserve).run(), 40_000, "{engine:?}");
    }
}

/// Harts other than the first sleep in the reset ROM until their software interrupt (pin 3) is raised, where that is
/// asked for.
#[test]
fn the_reset_rom_keeps_the_other_harts_asleep() {
    use holdfast_arch::riscv64::boot::{DynamicInfo, OtherHarts, reset_rom};
    use vm_memory::{Bytes, GuestAddress};
    // The firmware: hart 0 logs its a1 and a2 and goes to sleep, any other logs a 1 and ends the test.
    let mut p = Asm::new();
    p.li(T1, LOG).bne(A0, ZERO, "other").sd(A1, T1, 0).sd(A2, T1, 0).label("end").wfi().j("end");
    p.label("other").sd(A0, T1, 0).csrr(A0, MIE).done(A0);
    for engine in ENGINES {
        for others in [OtherHarts::Enter, OtherHarts::WaitForMsip] {
            let mut m = Machine::new(engine, 2, 0);
            m.load(RAM + 0x1000, &p);
            let rom = reset_rom(RAM + 0x1000, 0x1234, DynamicInfo { next_addr: 0, boot_hart: 0 }, others);
            m.memory.write_slice(&rom, GuestAddress(RAM)).expect("in RAM");
            let (vm, io) = (Arc::clone(&m.vm), Arc::clone(&m.io));
            let device = (others == OtherHarts::WaitForMsip).then(|| {
                std::thread::spawn(move || {
                    while io.log.lock().len() < 2 {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    std::thread::sleep(Duration::from_millis(30));
                    vm.set_pin(1, 3, true);
                })
            });
            assert_eq!(m.run(), 0, "{engine:?}: no interrupt is enabled");
            if let Some(device) = device {
                device.join().expect("device");
                assert_eq!(*m.io.log.lock(), [0x1234, RAM + 0x48, 1], "{engine:?}: hart 1 comes last");
            }
        }
    }
}

/// vCPU 0 rewrites a function and says so; vCPU 1 waits for that, fences, calls it and answers.
#[test]
fn another_vcpus_new_code_runs_after_a_fence() {
    let mut p = Asm::new();
    let rounds = 200;
    p.li(S1, 1)
        .li(S2, rounds + 1)
        .li(A1, RAM + 0x8000)
        .li(S3, RAM + 0x3000)
        .li(S0, 0)
        .bne(A0, ZERO, "reader");
    p.label("write").slli(T1, S1, 20).li(T2, u64::from(addi(A0, ZERO, 0))).add(T1, T1, T2).sw(T1, S3, 0);
    // fence w,w orders the code before the flag on every host
    p.w(0x0110_000f).sd(S1, A1, 0).label("answer").ld(T1, A1, 64).bne(T1, S1, "answer");
    p.addi(S1, S1, 1).bne(S1, S2, "write").ld(A0, A1, 128).done(A0);
    p.label("reader").label("flag").ld(T1, A1, 0).bne(T1, S1, "flag").fence_i();
    p.jalr(RA, S3, 0).add(S0, S0, A0).sd(S0, A1, 128).sd(S1, A1, 64).addi(S1, S1, 1).bne(S1, S2, "flag");
    p.label("end").j("end");
    p.org(0x3000).addi(A0, ZERO, 0).ret();
    for engine in ENGINES {
        assert_eq!(Machine::with(engine, 2, &p).run(), rounds * (rounds + 1) / 2, "{engine:?}");
    }
}

/// A chain of functions, each on its own place, that jump to the next; run `rounds` times.
fn long_chain(functions: u64, rounds: u64) -> Asm {
    let mut p = Asm::new();
    p.li(S0, 0).li(S1, rounds);
    p.label("loop").li(T0, RAM + 0x1000).jalr(RA, T0, 0).addi(S1, S1, -1).bne(S1, ZERO, "loop").done(S0);
    for n in 0..functions {
        p.org(0x1000 + n * 64);
        for _ in 0..8 {
            p.addi(S0, S0, 1);
        }
        if n + 1 < functions {
            // jal zero, to the next
            let d = (0x1000 + (n + 1) * 64 - p.here()) as u32;
            p.w((d >> 1 & 0x3ff) << 21 | (d >> 11 & 1) << 20 | (d >> 12 & 0xff) << 12 | 0x6f);
        } else {
            p.ret();
        }
    }
    p
}

#[test]
fn a_cache_much_too_small_evicts_and_goes_on() {
    let p = long_chain(12_000, 3);
    for vcpus in [1, 2] {
        let mut m = Machine::new(Engine::Auto, vcpus, 1);
        m.load(RAM, &p);
        assert_eq!(m.run(), 12_000 * 3 * 8);
        let info = m.vm.info();
        assert!(!info.contains("regions evicted             0"), "{info}");
    }
}

#[test]
fn a_sleeping_vcpu_wakes_by_its_pin() {
    let mut p = Asm::new();
    p.li(T0, RAM + 0x400).csrw(MTVEC, T0).li(T0, 1 << 7).csrw(MIE, T0).li(T0, 8).csrs(MSTATUS, T0);
    p.li(T1, LOG).sd(ZERO, T1, 0).label("sleep").wfi().j("sleep");
    p.org(0x400).csrr(A0, MCAUSE).done(A0);
    for engine in ENGINES {
        let mut m = Machine::with(engine, 1, &p);
        let (vm, io) = (Arc::clone(&m.vm), Arc::clone(&m.io));
        let device = std::thread::spawn(move || {
            while io.log.lock().is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(5));
            vm.set_pin(0, 7, true);
        });
        assert_eq!(m.run(), 1 << 63 | 7, "{engine:?}");
        device.join().expect("device");
    }
}

#[test]
fn state_moves_to_another_vm_in_the_middle_of_a_loop() {
    // Long enough that it is not over before the kick, whatever else the host does.
    const N: u64 = 400_000_000;
    let mut p = Asm::new();
    p.li(A0, 0).li(A1, N).label("loop").add(A0, A0, A1).addi(A1, A1, -1).bne(A1, ZERO, "loop").done(A0);
    for engine in ENGINES {
        let mut m = Machine::with(engine, 1, &p);
        let shared = Arc::clone(m.vcpus[0].shared());
        let kicker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(3));
            shared.request(holdfast_tcg::request::KICK);
        });
        assert_eq!(m.vcpus[0].run().expect("run"), Stop::Kicked);
        kicker.join().expect("kicker");
        let state = m.vcpus[0].export();
        let mut other = Machine::with(Engine::Auto, 1, &p);
        other.vcpus[0].import(&state).expect("state");
        assert_eq!(other.run(), N * (N + 1) / 2, "{engine:?}");
    }
}

#[test]
fn single_step_and_breakpoints_stop_where_they_should() {
    let mut p = Asm::new();
    p.li(A0, 0).label("loop").addi(A0, A0, 1).addi(A0, A0, 2).j("loop");
    for engine in ENGINES {
        let mut m = Machine::with(engine, 1, &p);
        let at = p.at("loop");
        m.vcpus[0].set_debug(false, &[at + 4]);
        for n in 0..3 {
            assert_eq!(m.vcpus[0].run().expect("run"), Stop::Debug(at + 4), "{engine:?}");
            assert_eq!(m.x(0, 10), 3 * n + 1);
        }
        m.vcpus[0].set_debug(true, &[]);
        for (pc, a0) in [(at + 8, 9), (at, 9), (at + 4, 10)] {
            assert_eq!(m.vcpus[0].run().expect("run"), Stop::Debug(pc), "{engine:?}");
            assert_eq!((m.pc(0), m.x(0, 10)), (pc, a0));
        }
    }
}

#[test]
fn the_dirty_log_is_exact() {
    let mut p = Asm::new();
    p.li(A1, RAM + 0x10_0000).li(A2, RAM + 0x20_0000).li(T1, LOG).sd(A0, A1, 0);
    p.sd(ZERO, T1, 0).label("first").ld(A3, T1, 0).li(A4, 2).bne(A3, A4, "first");
    p.sd(A0, A2, 8).ld(A5, A1, 0).sd(ZERO, T1, 0).done(A0);
    for engine in ENGINES {
        let mut m = Machine::with(engine, 1, &p);
        let (tracker, _) = holdfast_memory::tracker_at(&m.memory, RAM).expect("RAM");
        tracker.start_log();
        m.vm.start_dirty_log();
        let (vm, io, log) = (Arc::clone(&m.vm), Arc::clone(&m.io), tracker.clone());
        let migration = std::thread::spawn(move || {
            while io.log.lock().is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
            vm.sync_dirty_log();
            let first = log.take_dirty();
            io.log.lock().push(1);
            first
        });
        m.run();
        let first = migration.join().expect("migration");
        m.vm.sync_dirty_log();
        let second = tracker.take_dirty();
        let pages = |bits: &[u64]| {
            (0..bits.len() * 64).filter(|n| bits[n / 64] >> (n % 64) & 1 != 0).collect::<Vec<_>>()
        };
        assert_eq!(pages(&first), [0x100], "{engine:?}");
        assert_eq!(pages(&second), [0x200], "{engine:?}");
    }
}

#[test]
fn the_done_value_is_the_last_one() {
    let mut p = Asm::new();
    p.li(A0, 7).done(A0);
    let mut m = Machine::with(Engine::Auto, 1, &p);
    assert_eq!(m.run(), 7);
    assert!(m.io.done.load(Ordering::SeqCst));
}

#[test]
fn translated_code_is_listed_for_perf_and_counted() {
    let mut p = Asm::new();
    p.li(A0, 7).done(A0);
    let mut m = Machine::with(Engine::Auto, 1, &p);
    m.vm.start_perf_map().expect("a file in /tmp");
    assert_eq!(m.run(), 7);
    let path = format!("/tmp/perf-{}.map", std::process::id());
    let list = std::fs::read_to_string(&path).expect("the file");
    std::fs::remove_file(&path).expect("removed");
    let line = list.lines().find(|l| l.contains(&format!(" riscv64_{RAM:x}_"))).expect("the first block");
    let mut words = line.split(' ').map(|w| u64::from_str_radix(w, 16));
    assert!(words.next().is_some_and(|w| w.is_ok()) && words.next().is_some_and(|w| w.is_ok_and(|n| n > 0)));
    let info = m.vm.info();
    let figure = |name: &str| {
        let line = info.lines().find(|l| l.starts_with(name)).expect("the line");
        line[28..].split(' ').next().and_then(|n| n.parse::<u64>().ok()).expect("a number")
    };
    assert!(figure("regions translated") >= 1 && figure("guest bytes translated") >= 8, "{info}");
    assert!(figure("host bytes generated") > figure("guest bytes translated"), "{info}");
    Machine::with(Engine::Interpreter, 1, &p).vm.start_perf_map().expect_err("there is no code to list");
}
