//! Code that changes itself: what a store changed is what runs next.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use common::case::{DATA_SIZE, END, Image, Processor};
use common::guest::Machine;
use holdfast_arch::CpuState;
use holdfast_guest_x86::X86Guest;
use holdfast_tcg_runtime::{Engine, Stop};

/// Where the harness has supervisor pages, which are writable and executable, and code in them.
const SUPERVISOR: u64 = 0xffff_a234_0004_0000;

/// Runs code in ring 0 until its INT3: RAX.
fn run(engine: Engine, code: &[u8]) -> u64 {
    let mut machine = Machine::new(X86Guest::get(), engine);
    // Once through the harness, for a state in long mode.
    let mut image = Image::new();
    image.rip = END;
    machine.run(64, &image, &[0; DATA_SIZE]);
    machine.place(0, code);
    let CpuState::X86_64(mut state) = machine.vcpu.export() else { panic!("not x86") };
    (state.rip, state.gpr) = (SUPERVISOR, [0; 16]);
    state.gpr[4] = SUPERVISOR + 0x8000;
    state.rflags = 2;
    state.segments[1].selector = 0x10;
    state.segments[1].attributes = 0xa09b;
    (state.segments[2].selector, state.segments[2].attributes) = (0x18, 0xc093);
    machine.vcpu.import(&CpuState::X86_64(state)).expect("fits");
    let stop = machine.vcpu.run();
    assert!(matches!(stop, Ok(Stop::Debug(at)) if at == 0xffff_a234_0001_5030), "{engine:?}: {stop:?}");
    let CpuState::X86_64(state) = machine.vcpu.export() else { panic!("not x86") };
    state.gpr[0]
}

fn check(code: &[u8], expected: u64) {
    for engine in [Engine::Auto, Engine::Interpreter] {
        assert_eq!(run(engine, code), expected, "{engine:?}");
    }
}

#[test]
fn the_next_instruction_is_what_was_stored() {
    // mov byte [rip+1], 2; mov eax, 1; int3
    check(&[0xc6, 0x05, 1, 0, 0, 0, 2, 0xb8, 1, 0, 0, 0, 0xcc], 2);
    // The same by an atomic: mov cl, 3; xchg [rip+1], cl; mov eax, 1; int3
    check(&[0xb1, 3, 0x86, 0x0d, 1, 0, 0, 0, 0xb8, 1, 0, 0, 0, 0xcc], 3);
}

#[test]
fn a_loop_changes_its_body() {
    // mov ecx, 100; l: add byte [rip+imm of the ADD], 1; add eax, 0; dec ecx; jnz l; int3
    let code = [
        0xb9, 100, 0, 0, 0, // mov ecx, 100
        0x80, 0x05, 2, 0, 0, 0, 1, // add byte [rip+2], 1
        0x83, 0xc0, 0, // add eax, 0
        0xff, 0xc9, // dec ecx
        0x75, 0xf2, // jnz
        0xcc,
    ];
    // The operand is sign-extended: 1 to 100.
    check(&code, 5050);
}

#[test]
fn a_string_store_changes_what_follows() {
    // lea rdi, [rip+9]; mov al, 7; mov ecx, 1; rep stosb; mov eax, 1; int3
    let code = [
        0x48, 0x8d, 0x3d, 10, 0, 0, 0, // lea rdi, [rip+10]
        0xb0, 7, // mov al, 7
        0xb9, 1, 0, 0, 0, // mov ecx, 1
        0xf3, 0xaa, // rep stosb
        0xb8, 1, 0, 0, 0, // mov eax, 1
        0xcc,
    ];
    check(&code, 7);
}
