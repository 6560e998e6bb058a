//! Random words as code, system instructions and nonsense included, in U-mode and S-mode: translated and interpreted,
//! it has to trap alike, every time, and leave the same state. `HOLDFAST_MONKEY_SEED` varies it,
//! `HOLDFAST_MONKEY_PROGRAM` runs one program only.

mod common;

use std::time::Duration;

use common::{Machine, assemble};
use holdfast_arch::riscv64::State;
use holdfast_decode_gen::Generator;
use holdfast_guest_riscv::decode::{Insn, decode};
use holdfast_tcg_runtime::Engine;
use vm_memory::{Bytes, GuestAddress};

const BASE: u64 = 0x7ff0_0000;
const SIZE: usize = 4 << 20;
const PROGRAM: u64 = 0x8001_0000;
const SLOTS: usize = 64;
const LOG: u64 = 0x8002_0000;
const LOG_SIZE: usize = 0x2000;
const SCRATCH: u64 = 0x8003_0000;
const SCRATCH_SIZE: usize = 0x2000;
const PROGRAMS: u64 = 1500;

struct Random(u64);

impl Random {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.word() % n
    }
}

/// Control may only go forward, and to the start of a slot, so that every program ends. `at`: bytes from the start
/// of the instruction's own slot.
fn goes_on(raw: u32, at: i32) -> bool {
    let fine = |imm: i32| imm > 0 && (at + imm) % 4 == 0;
    match decode(raw).0 {
        Some(Insn::Beq(b) | Insn::Bne(b) | Insn::Blt(b) | Insn::Bge(b) | Insn::Bltu(b) | Insn::Bgeu(b)) => {
            fine(b.imm)
        }
        Some(Insn::Jal(j)) => fine(j.imm),
        // To an address that the program made: perhaps its own.
        Some(Insn::Jalr(_)) => false,
        _ => true,
    }
}

/// The CSRs that code below M-mode can have, but for time.
const CSRS: [u32; 15] =
    [1, 2, 3, 0x100, 0x104, 0x105, 0x106, 0x10a, 0x140, 0x141, 0x142, 0x143, 0x144, 0x180, 0x300];

fn slot(random: &mut Random, encodings: &[(u32, u32)]) -> u32 {
    loop {
        let raw = match random.below(16) {
            0 => random.word() as u32,
            1 | 2 => {
                let csr = CSRS[random.below(CSRS.len() as u64) as usize];
                csr << 20 | (random.word() as u32 & 0xf_ff80) | 0x73
            }
            3 | 4 => {
                // Two compressed ones.
                let pair = random.word() as u32;
                if pair & 3 == 3 {
                    continue;
                }
                pair
            }
            _ => {
                let (mask, value) = encodings[random.below(encodings.len() as u64) as usize];
                random.word() as u32 & !mask | value
            }
        };
        let high = raw >> 16;
        let second_fits = raw & 3 == 3 || high & 3 != 3 && goes_on(high, 2);
        if goes_on(raw, 0) && second_fits {
            return raw;
        }
    }
}

fn start(random: &mut Random, mut state: State) -> State {
    for x in &mut state.x[1..] {
        *x = match random.below(3) {
            0 => random.word(),
            1 => random.below(100),
            _ => SCRATCH + 0x1000 + random.below(0x100) * 8,
        };
    }
    for f in &mut state.f {
        *f = random.word() | if random.below(2) == 0 { 0xffff_ffff_0000_0000 } else { 0 };
    }
    state.pc = PROGRAM;
    state.privilege = (random.word() & 1) as u8;
    let fs = random.below(4) << 13;
    for (csr, value) in [
        (0x300, 0xa_0020_0000 | fs), // TW: nothing waits
        (0x305, 0x8000_0000),
        (0x340, LOG),
        // Handler and log are M-mode's, the program is not written; the rest is open.
        (0x3b0, 0x8000_0000 >> 2 | 0x1ff),
        (0x3b1, LOG >> 2 | 0x7ff),
        (0x3b2, PROGRAM >> 2 | 0x1ff),
        (0x3b3, (1 << 54) - 1),
        (0x3a0, 0x1f1d_1818),
    ] {
        state.csrs.insert(csr, value);
    }
    state
}

/// What is left behind: registers, log, memory.
fn outcome(machine: &mut Machine, program: &[u8], state: State, what: &str) -> (State, Vec<u8>) {
    let zeroes = vec![0; LOG_SIZE.max(SCRATCH_SIZE)];
    machine.memory.write_slice(program, GuestAddress(PROGRAM)).expect("RAM");
    machine.memory.write_slice(&zeroes[..LOG_SIZE], GuestAddress(LOG)).expect("RAM");
    machine.memory.write_slice(&zeroes[..SCRATCH_SIZE], GuestAddress(SCRATCH)).expect("RAM");
    machine.set_state(state);
    machine.run(Duration::from_secs(20)).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut left = machine.state();
    left.csrs.retain(|csr, _| !matches!(csr, 0xb00 | 0xb02));
    let mut memory = vec![0; LOG_SIZE + SCRATCH_SIZE];
    let (log, scratch) = memory.split_at_mut(LOG_SIZE);
    machine.memory.read_slice(log, GuestAddress(LOG)).expect("RAM");
    machine.memory.read_slice(scratch, GuestAddress(SCRATCH)).expect("RAM");
    (left, memory)
}

/// What is not the same in two states, or nothing.
fn differences(a: &State, b: &State) -> String {
    let mut out = String::new();
    let mut check = |name: String, a: u64, b: u64| {
        if a != b {
            out += &format!("{name}: {a:#x} and {b:#x}\n");
        }
    };
    check("pc".into(), a.pc, b.pc);
    check("privilege".into(), a.privilege.into(), b.privilege.into());
    for i in 0..32 {
        check(format!("x{i}"), a.x[i], b.x[i]);
        check(format!("f{i}"), a.f[i], b.f[i]);
    }
    for (csr, value) in &a.csrs {
        check(format!("csr {csr:#x}"), *value, b.csrs.get(csr).copied().unwrap_or_default());
    }
    if out.is_empty() && a != b { format!("{a:?} and {b:?}") } else { out }
}

#[test]
fn nonsense_traps_alike() {
    let seed = std::env::var("HOLDFAST_MONKEY_SEED").ok().and_then(|v| v.parse().ok()).unwrap_or(1);
    let dir = tempfile::tempdir().expect("a directory");
    let handler = assemble("monkey", dir.path());
    let mut tables = Generator::new();
    tables.table("rv64.dec", include_str!("../isa/rv64.dec")).expect("a table");
    let encodings: Vec<_> = tables.spec().encodings("decode32").map(|e| (e.1 as u32, e.2 as u32)).collect();
    let mut machines = [Engine::Auto, Engine::Interpreter].map(|e| Machine::new(e, BASE, SIZE));
    for machine in &machines {
        machine.load(&handler);
    }
    let reset = machines[0].state();
    let mut traps = 0;
    let only = std::env::var("HOLDFAST_MONKEY_PROGRAM").ok().and_then(|v| v.parse().ok());
    for round in only.map_or(0..PROGRAMS, |n: u64| n..n + 1) {
        let mut random = Random(seed ^ round << 32);
        let mut program: Vec<u8> =
            (0..SLOTS).flat_map(|_| slot(&mut random, &encodings).to_le_bytes()).collect();
        program.extend([0; 8]);
        let state = start(&mut random, reset.clone());
        let words = program.chunks_exact(4).map(|c| u32::from_le_bytes(c.try_into().expect("4 bytes")));
        let listing = words.zip((PROGRAM..).step_by(4));
        let listing =
            listing.map(|(w, pc)| format!("{pc:#x}: {w:08x} {:?}\n", decode(w).0)).collect::<String>();
        let what = format!("program {round} of seed {seed}\n{listing}");
        let [a, b] = &mut machines;
        let a = outcome(a, &program, state.clone(), &what);
        let b = outcome(b, &program, state, &what);
        if let Some(at) = (0..a.1.len()).step_by(8).find(|&i| a.1[i..i + 8] != b.1[i..i + 8]) {
            let entry = at.min(LOG_SIZE) / 40;
            let show = |m: &[u8]| -> Vec<String> {
                let log = &m[entry * 40..entry * 40 + 24];
                log.chunks_exact(8)
                    .map(|c| format!("{:#x}", u64::from_le_bytes(c.try_into().expect("8 bytes"))))
                    .collect()
            };
            panic!("{what}: memory differs at {at:#x}; trap {entry}: {:?} and {:?}", show(&a.1), show(&b.1));
        }
        assert_eq!(differences(&a.0, &b.0), "", "{what}");
        traps += a.1[..LOG_SIZE].chunks_exact(40).filter(|e| e[..32] != [0; 32]).count();
    }
    println!("{traps} traps agree");
    assert!(only.is_some() || traps as u64 > PROGRAMS * 10);
}
