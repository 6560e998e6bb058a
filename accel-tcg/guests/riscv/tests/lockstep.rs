//! Random instructions, run here and by Debian's `qemu-riscv64`: registers, `fcsr` and memory have to agree.
//!
//! A program has many sequences of random user-level instructions, each run from several register states with
//! special floating-point values. It runs as a Linux program under `qemu-riscv64` and bare here. The seed is fixed;
//! `HOLDFAST_LOCKSTEP_SEED` and `HOLDFAST_LOCKSTEP_INSNS` vary it and the number of instructions.

mod common;
mod lockstep_gen;

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::Machine;
use holdfast_guest_riscv::decode::decode;
use holdfast_tcg_runtime::{Engine, Stop};
use lockstep_gen::{BASE, DUMP_WORDS, Program, RAM_SIZE, STATES};
use vm_memory::{Bytes, GuestAddress};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// What the program writes when run by `qemu-riscv64`.
fn by_qemu(program: &Program) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("program");
    std::fs::write(&path, program.elf()).expect("written");
    let made = Command::new("chmod").arg("+x").arg(&path).status().expect("chmod");
    assert!(made.success());
    let out = Command::new("qemu-riscv64")
        .args(["-cpu", "rv64"])
        .arg(&path)
        .stderr(Stdio::inherit())
        .output()
        .expect("qemu-riscv64, of Debian's package `qemu-user`");
    assert!(out.status.success(), "qemu-riscv64: {} (seed {:#x})", out.status, program.seed);
    out.stdout
}

/// The same, run here.
fn by_us(program: &Program, engine: Engine) -> Vec<u8> {
    let mut machine = Machine::new(engine, BASE, RAM_SIZE);
    let entry = machine.load(&program.elf());
    let mut state = machine.state();
    state.pc = entry;
    state.privilege = 0;
    state.csrs.insert(0x300, 0xa_0000_2000); // FS on
    state.csrs.insert(0x3b0, (1 << 54) - 1);
    state.csrs.insert(0x3a0, 0x1f); // PMP open
    machine.set_state(state);
    machine.vcpu.set_debug(false, &[program.end]);
    let stop = machine.run_to(Duration::from_secs(600)).unwrap_or_else(|e| panic!("{engine:?}: {e}"));
    if stop != Stop::Debug(program.end) {
        panic!("{engine:?}: stopped by {stop:?}\n{}", machine.vcpu.describe());
    }
    let mut out = vec![0; program.output_len];
    machine.memory.read_slice(&mut out, GuestAddress(program.output)).expect("in RAM");
    out
}

fn name_of(word: usize) -> String {
    match word {
        0 => "fcsr".into(),
        1..32 => format!("x{word}"),
        _ => format!("f{}", word - 32),
    }
}

/// Panics with the first difference, and the sequence it is in.
fn compare(program: &Program, a: &[u8], b: &[u8], names: [&str; 2]) {
    assert_eq!(a.len(), b.len());
    let words = |bytes: &[u8]| -> Vec<u64> {
        bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().expect("8 bytes"))).collect()
    };
    let (a, b) = (words(a), words(b));
    let Some(first) = (0..a.len()).find(|i| a[*i] != b[*i]) else { return };
    let run = first / DUMP_WORDS;
    let mut text = format!("{names:?} differ, seed {:#x}: ", program.seed);
    if run >= program.sequences.len() * STATES {
        panic!("{text}memory differs at {:#x}", first * 8);
    }
    let (sequence, state) = (run / STATES, run % STATES);
    text += &format!("sequence {sequence}, state {state}\n");
    for at in run * DUMP_WORDS..(run + 1) * DUMP_WORDS {
        if a[at] != b[at] {
            let name = name_of(at % DUMP_WORDS);
            let before = program.initial(run, at % DUMP_WORDS);
            text += &format!("  {name:>5}: {:016x} and {:016x}, before {before:016x}\n", a[at], b[at]);
        }
    }
    for &(pc, raw) in &program.sequences[sequence] {
        text += &format!("  {pc:#x}: {raw:08x} {:?}\n", decode(raw).0);
    }
    text += "before:\n";
    for word in 0..DUMP_WORDS {
        text += &format!("  {:>5} {:016x}", name_of(word), program.initial(run, word));
    }
    panic!("{text}");
}

/// Runs programs of `insns` instructions in all; each by `qemu-riscv64` and by both engines.
#[test]
fn translator_interpreter_and_qemu_agree() {
    let seed = setting("HOLDFAST_LOCKSTEP_SEED", 0x5eed);
    let insns = setting("HOLDFAST_LOCKSTEP_INSNS", 1_000_000);
    let mut executed = 0;
    let mut seen: BTreeMap<&'static str, u64> = BTreeMap::new();
    for round in 0.. {
        let program = Program::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round);
        let interpreted = by_us(&program, Engine::Interpreter);
        compare(&program, &by_us(&program, Engine::Auto), &interpreted, ["translated", "interpreted"]);
        compare(&program, &interpreted, &by_qemu(&program), ["ours", "qemu's"]);
        for (_, raw) in program.sequences.iter().flatten() {
            if let Some(insn) = decode(*raw).0 {
                *seen.entry(insn.name()).or_default() += 1;
            }
        }
        executed += program.insns() * STATES as u64;
        if executed >= insns {
            break;
        }
    }
    println!("{executed} instructions of {} kinds agree", seen.len());
    assert!(seen.len() > 150, "only {} kinds: {seen:?}", seen.len());
}
