//! Accesses near each other share a TLB probe, but not where they lie in two pages again and again.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use common::case::{DATA_SIZE, END, Image, Processor};
use common::guest::{Machine, SYSTEM};
use holdfast_arch::CpuState;
use holdfast_guest_x86::X86Guest;
use holdfast_tcg_runtime::{Engine, Stop};

/// Where the code is, from the supervisor pages' start.
const CODE: u64 = 0x4_0000;

/// Twice three thousand times, changing itself in between: updates of memory, which load as stores do, and sixteen bytes.
const UPDATES: [u8; 56] = [
    0xba, 2, 0, 0, 0, // mov edx, 2
    0xb9, 0xb8, 0x0b, 0, 0, // again: mov ecx, 3000
    0x83, 0x07, 1, // l: add dword [rdi], 1
    0x83, 0x47, 0x3c, 1, // add dword [rdi+60], 1
    0x83, 0x47, 0x40, 1, // add dword [rdi+64], 1
    0x0f, 0x10, 0x47, 0x10, // movups xmm0, [rdi+16]
    0x0f, 0x11, 0x47, 0x50, // movups [rdi+80], xmm0
    0x80, 0x47, 0x64, 1, // add byte [rdi+100], 1
    0x03, 0x47, 0x40, // add eax, [rdi+64]
    0x83, 0xc0, 1, // add eax, 1
    0xff, 0xc9, // dec ecx
    0x75, 0xdf, // jnz l
    0xff, 0xca, // dec edx
    0x74, 8, // jz end
    0xfe, 0x05, 0xf1, 0xff, 0xff, 0xff, // inc byte [rip-15], which is added to eax
    0xeb, 0xce, // jmp again
    0xcc, // end: int3
];

/// Runs the code on data at an offset from its page's start; gives how many regions were translated without shared probes.
fn run(engine: Engine, data: u64) -> u64 {
    let mut machine = Machine::new(X86Guest::get(), engine);
    machine.vm.unshare_within(u64::MAX);
    // Once through the harness, for a state in long mode.
    let mut image = Image::new();
    image.rip = END;
    machine.run(64, &image, &[0; DATA_SIZE]);
    machine.place(0, &UPDATES);
    let mut state = machine.supervisor_state(CODE, CODE + 0x8000);
    state.gpr[7] = SYSTEM + CODE + data;
    machine.vcpu.import(&CpuState::X86_64(Box::new(state))).expect("fits");
    let stop = machine.vcpu.run();
    assert!(matches!(stop, Ok(Stop::Debug(_))), "{engine:?}: {stop:?}");
    let CpuState::X86_64(state) = machine.vcpu.export() else { panic!("not x86") };
    assert_eq!(state.rip & 0xf_ffff, 0x1_5030, "{engine:?}: the handler of breakpoints");
    assert_eq!(state.gpr[0], (1..=6000).sum::<u64>() + 3000 + 2 * 3000, "{engine:?}");
    let info = machine.vm.info();
    let line = info.lines().find_map(|l| l.strip_prefix("regions translated unshared")).expect("the line");
    line.trim().parse().expect("a number")
}

#[test]
fn updates_across_a_page_end_get_a_probe_each() {
    let unshared = run(Engine::Auto, 0x3000 - 64);
    assert!((1..=16).contains(&unshared), "{unshared}");
    assert_eq!(run(Engine::Interpreter, 0x3000 - 64), 0);
}

#[test]
fn updates_within_a_page_share_theirs() {
    assert_eq!(run(Engine::Auto, 0x3000), 0);
}
