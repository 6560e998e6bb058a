//! Two vCPUs: code that one writes and the other runs, and atomics that no alignment protects.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::case::DATA;
use common::guest::{DATA_AT, Machine, SYSTEM};
use holdfast_arch::CpuState;
use holdfast_guest_x86::X86Guest;
use holdfast_tcg_runtime::{Engine, Stop, TcgVcpu, request};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

/// Offsets in the supervisor's 2 MiB.
const CODE: [u64; 2] = [0xa_0000, 0xb_0000];
const STACK: [u64; 2] = [0xc_1000, 0xc_3000];
/// A function that is rewritten while it runs.
const VICTIM: u64 = 0xd_0000;
/// Where the vCPUs talk: +0 the round asked for, +64 the round answered, +128 who is there.
const TALK: u64 = SYSTEM + 0xe_0000;
/// Two pages that are not neighbours in RAM.
const PAGES: u64 = DATA + 0x1_0000;

type Step = Result<(), IcedError>;

fn rounds(engine: Engine) -> u64 {
    if engine == Engine::Interpreter { 1_000 } else { 10_000 }
}

/// Assembles what ends by INT3.
fn program(at: u64, body: impl FnOnce(&mut CodeAssembler) -> Step) -> Vec<u8> {
    let make = || {
        let mut a = CodeAssembler::new(64)?;
        a.mov(r15, TALK)?;
        body(&mut a)?;
        a.int3()?;
        a.assemble(SYSTEM + at)
    };
    make().expect("assembles")
}

/// Waits until both are there.
fn meet(a: &mut CodeAssembler) -> Step {
    let mut wait = a.create_label();
    a.lock().inc(dword_ptr(r15 + 128))?;
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(dword_ptr(r15 + 128), 2)?;
    a.jb(wait)
}

/// RAX at the INT3.
fn run_one(vcpu: &mut TcgVcpu) -> Result<u64, String> {
    let stop = vcpu.run();
    let CpuState::X86_64(state) = vcpu.export() else { return Err("not x86".into()) };
    match stop {
        Ok(Stop::Debug(at)) if at & 0xfff == 0x30 => Ok(state.gpr[0]),
        other => Err(format!("{other:?}, RIP {:#x}, CR2 {:#x}", state.rip, state.cr[1])),
    }
}

/// Runs a program on each of two vCPUs; what they leave in RAX, and the memory.
fn run(engine: Engine, programs: &[Vec<u8>; 2]) -> ([u64; 2], Machine) {
    let mut machine = Machine::with_vcpus(X86Guest::get(), engine, 2);
    machine.map(PAGES, DATA_AT + 0x1000);
    machine.map(PAGES + 0x1000, DATA_AT);
    for (at, code) in [(CODE[0], &programs[0][..]), (CODE[1], &programs[1]), (VICTIM, &RETURNS)] {
        machine.memory.write_slice(code, GuestAddress(at)).expect("in RAM");
    }
    let states = [0, 1].map(|n| CpuState::X86_64(Box::new(machine.supervisor_state(CODE[n], STACK[n]))));
    let vcpus = [&mut machine.vcpu, &mut machine.others[0]];
    let shared = vcpus.each_ref().map(|v| Arc::clone(v.shared()));
    let mut left = [0; 2];
    let mut failed = String::new();
    std::thread::scope(|scope| {
        let (sender, results) = std::sync::mpsc::channel();
        for (n, (vcpu, state)) in vcpus.into_iter().zip(states).enumerate() {
            vcpu.import(&state).expect("fits");
            let sender = sender.clone();
            scope.spawn(move || sender.send((n, run_one(vcpu))));
        }
        for _ in 0..2 {
            // The other may wait for ever for one that failed.
            let limit = Duration::from_secs(if failed.is_empty() { 300 } else { 5 });
            match results.recv_timeout(limit) {
                Ok((n, Ok(value))) => left[n] = value,
                Ok((n, Err(e))) => failed += &format!("vCPU {n}: {e}\n"),
                Err(_) => {
                    failed += "a vCPU does not end\n";
                    shared.iter().for_each(|s| s.request(request::KICK));
                }
            }
        }
    });
    assert!(failed.is_empty(), "{engine:?}: {failed}");
    (left, machine)
}

/// `nop; nop; nop; mov eax, 0; ret`, the immediate aligned.
const RETURNS: [u8; 9] = [0x90, 0x90, 0x90, 0xb8, 0, 0, 0, 0, 0xc3];

/// One vCPU rewrites a function and says so; the other runs a serialising instruction and must run the new one.
#[test]
fn code_written_by_another_vcpu_is_what_runs_next() {
    for engine in [Engine::Auto, Engine::Interpreter] {
        // Each round waits for the other twice, which takes its time where there are few CPUs.
        let n = 200;
        let writer = program(CODE[0], |a| {
            let (mut next, mut answer) = (a.create_label(), a.create_label());
            a.mov(r8, SYSTEM + VICTIM + 4)?;
            a.xor(ebx, ebx)?;
            a.set_label(&mut next)?;
            a.inc(ebx)?;
            a.mov(dword_ptr(r8), ebx)?;
            a.mov(dword_ptr(r15), ebx)?;
            a.set_label(&mut answer)?;
            a.pause()?;
            a.cmp(dword_ptr(r15 + 64), ebx)?;
            a.jne(answer)?;
            a.cmp(ebx, n as i32)?;
            a.jne(next)?;
            a.mov(eax, ebx)
        });
        let runner = program(CODE[1], |a| {
            let (mut next, mut wait, mut end) = (a.create_label(), a.create_label(), a.create_label());
            a.mov(r8, SYSTEM + VICTIM)?;
            a.xor(esi, esi)?;
            a.set_label(&mut next)?;
            a.nop()?;
            // It stays in the old code until the new one is there.
            a.set_label(&mut wait)?;
            a.call(r8)?;
            a.mov(edi, dword_ptr(r15))?;
            a.cmp(edi, esi)?;
            a.je(wait)?;
            a.inc(esi)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.call(r8)?;
            a.cmp(eax, esi)?;
            a.jne(end)?;
            a.mov(dword_ptr(r15 + 64), esi)?;
            a.cmp(esi, n as i32)?;
            a.jne(next)?;
            a.set_label(&mut end)
        });
        let (left, _) = run(engine, &[writer, runner]);
        assert_eq!(left, [n, n], "{engine:?}");
    }
}

/// Without any serialisation the other vCPU runs the old code or the new, and the old never again after the new.
#[test]
fn code_never_goes_back_to_what_it_was() {
    for engine in [Engine::Auto, Engine::Interpreter] {
        let n = 5 * rounds(engine);
        let writer = program(CODE[0], |a| {
            let mut next = a.create_label();
            a.mov(r8, SYSTEM + VICTIM + 4)?;
            a.xor(ebx, ebx)?;
            meet(a)?;
            a.set_label(&mut next)?;
            a.inc(ebx)?;
            a.mov(dword_ptr(r8), ebx)?;
            a.cmp(ebx, n as i32)?;
            a.jne(next)?;
            a.mov(eax, ebx)
        });
        let runner = program(CODE[1], |a| {
            let (mut next, mut back) = (a.create_label(), a.create_label());
            a.mov(r8, SYSTEM + VICTIM)?;
            a.xor(esi, esi)?;
            meet(a)?;
            a.set_label(&mut next)?;
            a.call(r8)?;
            a.cmp(eax, esi)?;
            a.jb(back)?;
            a.mov(esi, eax)?;
            a.cmp(eax, n as i32)?;
            a.jne(next)?;
            a.set_label(&mut back)
        });
        let (left, _) = run(engine, &[writer, runner]);
        assert_eq!(left, [n, n], "{engine:?}");
    }
}

/// Where an operand of `size` bytes is put: over the end of a page, over the end of a cache line, within one.
fn places(size: u64) -> impl Iterator<Item = u64> {
    [PAGES + 0x1000 - size / 2, PAGES + 0x1000 - 1, PAGES + 0x240 - size / 2, PAGES + 0x301].into_iter()
}

fn counter(at: u64, n: u64, step: impl Fn(&mut CodeAssembler) -> Step) -> [Vec<u8>; 2] {
    CODE.map(|code| {
        program(code, |a| {
            let mut next = a.create_label();
            a.mov(r8, at)?;
            a.mov(ebp, n as u32)?;
            meet(a)?;
            a.set_label(&mut next)?;
            step(a)?;
            a.dec(ebp)?;
            a.jne(next)
        })
    })
}

/// What is at `at` of [`PAGES`] in the end.
fn found(machine: &Machine, at: u64) -> u64 {
    let mut bytes = [0u8; 8];
    for (n, byte) in (0u64..).zip(&mut bytes) {
        // The pages are the other way round in RAM.
        let offset = (at + n - PAGES) ^ 0x1000;
        *byte = machine.memory.read_obj(GuestAddress(DATA_AT + offset)).expect("in RAM");
    }
    u64::from_le_bytes(bytes)
}

/// Nothing that either adds is lost, wherever the operand is.
#[test]
fn atomics_of_any_alignment_lose_nothing() {
    type Adds = fn(&mut CodeAssembler) -> Step;
    let ways: [(&str, u64, Adds); 5] = [
        ("lock inc, 8 bytes", 8, |a| a.lock().inc(qword_ptr(r8))),
        ("lock add, 2 bytes", 2, |a| a.lock().add(word_ptr(r8), 1)),
        ("lock xadd, 4 bytes", 4, |a| {
            a.mov(eax, 1)?;
            a.lock().xadd(dword_ptr(r8), eax)
        }),
        ("lock cmpxchg, 8 bytes", 8, |a| {
            let mut again = a.create_label();
            a.mov(rax, qword_ptr(r8))?;
            a.set_label(&mut again)?;
            a.lea(rdx, qword_ptr(rax + 1))?;
            a.lock().cmpxchg(qword_ptr(r8), rdx)?;
            a.jne(again)
        }),
        ("lock cmpxchg8b", 8, |a| {
            let mut again = a.create_label();
            a.mov(eax, dword_ptr(r8))?;
            a.mov(edx, dword_ptr(r8 + 4))?;
            a.set_label(&mut again)?;
            a.mov(ebx, eax)?;
            a.mov(ecx, edx)?;
            a.add(ebx, 1)?;
            a.adc(ecx, 0)?;
            a.lock().cmpxchg8b(qword_ptr(r8))?;
            a.jne(again)
        }),
    ];
    for engine in [Engine::Auto, Engine::Interpreter] {
        let n = rounds(engine);
        for (name, size, step) in ways {
            for at in places(size) {
                let (_, machine) = run(engine, &counter(at, n, step));
                let mask = u64::MAX >> (64 - 8 * size);
                assert_eq!(found(&machine, at) & mask, (2 * n) & mask, "{name} at {at:#x}, {engine:?}");
            }
        }
    }
}

/// XCHG takes and leaves whole values: both vCPUs exchange patterns and find only such.
#[test]
fn exchanges_across_pages_do_not_tear() {
    for engine in [Engine::Auto, Engine::Interpreter] {
        let n = rounds(engine);
        for at in places(8) {
            let programs = CODE.map(|code| {
                let pattern = if code == CODE[0] { u64::MAX } else { 0x5555_5555_5555_5555 };
                program(code, |a| {
                    let (mut next, mut good, mut end) =
                        (a.create_label(), a.create_label(), a.create_label());
                    a.mov(r8, at)?;
                    a.mov(r9, 0x5555_5555_5555_5555u64)?;
                    a.mov(r10, pattern)?;
                    a.mov(ebp, n as u32)?;
                    meet(a)?;
                    a.set_label(&mut next)?;
                    a.mov(rax, r10)?;
                    a.xchg(qword_ptr(r8), rax)?;
                    // One of the patterns, or 0 at first.
                    a.cmp(rax, r9)?;
                    a.je(good)?;
                    a.lea(rdx, qword_ptr(rax + 1))?;
                    a.cmp(rdx, 1)?;
                    a.ja(end)?;
                    a.set_label(&mut good)?;
                    a.dec(ebp)?;
                    a.jne(next)?;
                    a.xor(eax, eax)?;
                    a.set_label(&mut end)
                })
            });
            let (left, _) = run(engine, &programs);
            assert_eq!(left, [0, 0], "{engine:?} at {at:#x}");
        }
    }
}
