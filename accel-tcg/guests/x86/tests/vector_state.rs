//! FXSAVE, XSAVE and what restores them: memory and registers as the host has them.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use common::case::{CODE, Case, DATA, DATA_SIZE, END, End, Processor, Role};
use common::guest::Machine;
use common::host::Host;
use holdfast_arch::CpuState;
use holdfast_guest_x86::X86Guest;
use holdfast_tcg_runtime::Engine;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Saves to [`DATA`] and, if `restore`, loads it back over other values.
fn code(extended: bool, restore: bool) -> Vec<u8> {
    let build = || -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        a.mov(rdi, DATA)?;
        a.mov(eax, 7)?;
        a.xor(edx, edx)?;
        if extended {
            a.xsave64(ptr(rdi))?
        } else {
            a.fxsave64(ptr(rdi))?
        }
        if restore {
            a.fninit()?;
            for x in [xmm0, xmm5, xmm15] {
                a.pcmpeqd(x, x)?;
            }
            if extended { a.xrstor64(ptr(rdi))? } else { a.fxrstor64(ptr(rdi))? }
        }
        a.mov(r14, END)?;
        a.jmp(r14)?;
        a.assemble(CODE)
    };
    build().expect("code")
}

/// What processors do alike: no pointers and opcodes of x87, which some keep only after exceptions.
fn comparable(data: &[u8]) -> Vec<u8> {
    let mut data = data[..832].to_vec();
    data[6..24].fill(0);
    data[28..32].fill(0); // MXCSR_MASK: AMD has a bit more
    data
}

#[test]
fn saved_state_is_the_hosts() {
    let mut host = Host::new();
    let mut ours = Machine::new(X86Guest::get(), Engine::Auto);
    let mut data = [0u8; DATA_SIZE];
    for seed in 1..200u64 {
        let case = Case { bits: 64, at: 0, code: Vec::new(), roles: [Role::Small; 16], seed, wide: false };
        // The header has to be zero where it is not written.
        data[..1024].fill(0);
        for (extended, restore) in [(false, false), (false, true), (true, false), (true, true)] {
            let code = code(extended, restore);
            let mut image = case.image();
            image.rflags = 0x202;
            image.xsave[512] = 7;
            let what = format!("seed {seed}, extended {extended}, restore {restore}");
            let run = |on: &mut dyn Processor| {
                on.place(0, &code);
                let outcome = on.run(64, &image, &data);
                assert_eq!(outcome.end, End::Done, "{what}");
                (comparable(on.data()), outcome.image)
            };
            let (want, got) = (run(&mut host), run(&mut ours));
            if let Some(at) = want.0.iter().zip(&got.0).position(|(a, b)| a != b) {
                panic!("{what}: byte {at} is {:#x}, the host's {:#x}", got.0[at], want.0[at]);
            }
            // Registers, but for the area's header and pointers.
            let registers = |x: &[u8]| [&x[..6], &x[24..28], &x[32..416], &x[576..]].concat();
            let (want, got) = (registers(&want.1.xsave), registers(&got.1.xsave));
            let differs = want.iter().zip(&got).position(|(a, b)| a != b);
            assert!(differs.is_none(), "{what}: registers differ at {differs:?}");
        }
    }
}

/// A KVM may hand out components of its host's registers that the guest has no bits for in XCR0.
#[test]
fn components_that_the_guest_cannot_have_are_left_out() {
    let mut machine = Machine::new(X86Guest::get(), Engine::Auto);
    let CpuState::X86_64(mut state) = machine.vcpu.export() else { panic!("not x86") };
    let before = state.xsave[512];
    state.xsave[512] |= 0x80;
    machine.vcpu.import(&CpuState::X86_64(state.clone())).expect("what the guest has fits");
    let CpuState::X86_64(after) = machine.vcpu.export() else { panic!("not x86") };
    assert_eq!(after.xsave[512], before);
    state.xcr0 |= 0x80;
    let refused = machine.vcpu.import(&CpuState::X86_64(state)).expect_err("there is no such component");
    assert!(format!("{refused:?}").contains("XCR0 bits 0x80"), "{refused:?}");
}

/// What loads MXCSR goes on under it, also where it has gone on under another one before.
#[test]
fn exceptions_are_unmasked_from_the_next_instruction_on() {
    let loads: [(&str, &[u8]); 3] = [
        ("ldmxcsr", &[0x0f, 0xae, 0x56, 0x18]), // [rsi + 24]
        ("fxrstor64", &[0x48, 0x0f, 0xae, 0x0e]),
        ("xrstor64", &[0x48, 0x0f, 0xae, 0x2e]),
    ];
    for engine in [Engine::Auto, Engine::Interpreter] {
        let mut ours = Machine::new(X86Guest::get(), engine);
        for (name, load) in loads {
            let mut code = load.to_vec();
            code.extend([0xf2, 0x0f, 0x5e, 0xc1]); // divsd xmm0, xmm1
            let case = Case { bits: 64, at: 0, code, roles: [Role::Small; 16], seed: 1, wide: false };
            ours.place(0, &case.bytes());
            let mut image = case.image();
            (image.rflags, image.gpr[0], image.gpr[2], image.gpr[6]) = (0x202, 2, 0, DATA);
            image.put(24, &0x1f80u32.to_le_bytes());
            let mut run = |mxcsr: u32| {
                let mut data = [0u8; DATA_SIZE];
                data[..2].copy_from_slice(&0x37fu16.to_le_bytes());
                data[24..28].copy_from_slice(&mxcsr.to_le_bytes());
                data[160..168].copy_from_slice(&1f64.to_le_bytes());
                data[512] = 2;
                image.put(160, &1f64.to_le_bytes());
                image.put(176, &0f64.to_le_bytes());
                ours.run(64, &image, &data).end
            };
            for _ in 0..10 {
                assert_eq!(run(0x1f80), End::Done, "{name}, {engine:?}");
            }
            let trapped = End::Fault { vector: 19, error: 0, address: 0 };
            assert_eq!(run(0x1d80), trapped, "{name}, {engine:?}: division by zero is not masked");
            assert_eq!(run(0x1f80), End::Done, "{name}, {engine:?}");
        }
    }
}
