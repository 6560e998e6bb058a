//! AVX-512: random instructions with all registers, by the host's processor and by ours. Where the host has no AVX-512
//! there is nothing to compare with, and guests are not offered it.
//!
//! `HOLDFAST_FUZZ_INSNS` and the others are as in `differential.rs`.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use common::campaign::{Limits, Report, run_of};
use common::case::{
    Case, DATA, DATA_RW, DATA_SIZE, End, OPMASK, Processor, Role, XSAVE_SIZE, ZMM_HIGH, ZMM_UPPER, patterns,
};
use common::compare::{differences, listing};
use common::generate::Generator;
use common::guest::Machine;
use common::host::{Host, has_avx512};
use common::random::Random;
use common::templates::{Templates, head_bytes};
use holdfast_arch::CpuState;
use holdfast_guest_x86::X86Guest;
use holdfast_tcg_runtime::Engine;
use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// AVX-512's own, and what works on the registers that it has widened.
fn concerned(code: Code) -> bool {
    let vector = |f: &CpuidFeature| {
        let name = format!("{f:?}");
        ["AVX", "FMA", "F16C", "SSE", "AES", "VAES", "PCLMULQDQ", "VPCLMULQDQ", "GFNI"]
            .iter()
            .any(|p| name.starts_with(p))
    };
    code.encoding() == EncodingKind::EVEX || code.cpuid_features().iter().any(vector)
}

fn generator(seed: u64) -> Generator {
    Generator::wide(seed, concerned)
}

fn limits(insns: u64) -> Limits {
    Limits {
        insns: setting("HOLDFAST_FUZZ_INSNS", insns),
        kinds: setting("HOLDFAST_FUZZ_KINDS", 40) as usize,
    }
}

fn finish(report: &Report) {
    let (insns, codes) = (report.insns, report.codes);
    println!("{insns} instructions of {codes} codes");
    assert!(report.kinds.is_empty(), "{}", report.mismatches());
    assert!(report.never.is_empty(), "never run to their end: {:#?}", report.never);
    let some = std::env::var_os("HOLDFAST_FUZZ_ONLY").is_some();
    assert!(some || codes > 3000, "only {codes} codes");
}

fn machine(engine: Engine) -> Machine {
    Machine::wide(X86Guest::get(), engine)
}

#[test]
fn translated_code_agrees_with_the_host() {
    if !has_avx512() {
        eprintln!("this host has no AVX-512");
        return;
    }
    let (mut host, mut ours) = (Host::new(), machine(Engine::Auto));
    ours.set_end_page(&host.end_page());
    let seed = setting("HOLDFAST_FUZZ_SEED", 2);
    finish(&run_of(generator(seed), seed, limits(30_000), (&mut host, &mut ours)));
}

#[test]
fn interpreter_agrees_with_translated_code() {
    if !has_avx512() {
        eprintln!("this host has no AVX-512");
        return;
    }
    let (mut a, mut b) = (machine(Engine::Auto), machine(Engine::Interpreter));
    let seed = setting("HOLDFAST_FUZZ_SEED", 3);
    finish(&run_of(generator(seed), seed, limits(15_000), (&mut a, &mut b)));
}

/// Where a memory operand begins, below the end of all data: some of it is there.
const BEFORE_END: [u64; 7] = [1, 2, 4, 8, 16, 24, 48];
/// What the mask is.
const MASKS: [u64; 9] = [0, 1, 2, 3, u64::MAX << 1, 0xf, 0x55, 0xff, 0x8000_8000_8000_8080];
/// Builds without optimisation go through half of each.
const STEP: usize = if cfg!(debug_assertions) { 2 } else { 1 };

/// Every instruction with a memory operand at RSI, under K1, with and without zeroing.
fn masked_accesses() -> Vec<Vec<u8>> {
    let templates = Templates::new(64, true);
    let mut all = Vec::new();
    for code in templates.codes.iter().filter(|c| c.encoding() == EncodingKind::EVEX) {
        for template in templates.of(*code).iter().filter(|t| t.memory && t.rms >> 6 & 1 != 0) {
            all.extend([0x01, 0x81].into_iter().filter_map(|masked| {
                let mut bytes = head_bytes(64, template.head, template.opcode);
                bytes[3] |= masked;
                let reg = (0..8).find(|r| template.regs >> r & 1 != 0).unwrap_or(0);
                bytes.extend([reg << 3 | 6, 0x21]); // [rsi], and an immediate
                let insn = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
                bytes.truncate(insn.len());
                (!insn.is_invalid() && insn.code() == *code).then_some(bytes)
            }));
        }
    }
    all
}

/// RSI and K1 of every run.
fn partial_operands() -> Vec<(u64, u64)> {
    let ends = [DATA + DATA_RW as u64, DATA + DATA_SIZE as u64];
    let starts = BEFORE_END.into_iter().step_by(STEP).flat_map(|before| ends.map(|end| end - before));
    starts.flat_map(|at| MASKS.into_iter().step_by(STEP).map(move |mask| (at, mask))).collect()
}

/// The memory operands of every instruction, half of it in a page that is not there: whatever the mask hides on the host is
/// hidden from our guests.
#[test]
fn masks_hide_the_faults_that_they_hide_on_the_host() {
    if !has_avx512() {
        eprintln!("this host has no AVX-512");
        return;
    }
    let (mut host, mut ours) = (Host::new(), machine(Engine::Auto));
    ours.set_end_page(&host.end_page());
    let data = patterns()[4];
    let (all, operands) = (masked_accesses(), partial_operands());
    assert!(all.len() > 2000, "only {} instructions", all.len());
    let mut bad = Vec::new();
    for code in all {
        let case = Case { bits: 64, at: 0x80, code, roles: [Role::Any; 16], seed: 9, wide: true };
        host.place(case.at, &case.bytes());
        ours.place(case.at, &case.bytes());
        let mut image = case.image();
        image.rflags = 0x202;
        image.put(24, &0x1f80u32.to_le_bytes());
        let differs = operands.iter().find_map(|(at, mask)| {
            image.gpr[6] = *at;
            image.put(OPMASK + 8, &mask.to_le_bytes());
            let (left, right) = (host.run(64, &image, &data), ours.run(64, &image, &data));
            let same = left.end == right.end
                && differences(64, &left.image, &right.image).is_empty()
                && host.data() == ours.data();
            (!same).then(|| format!("at {at:#x} under {mask:#x}: {:x?} and {:x?}", left.end, right.end))
        });
        bad.extend(differs.map(|differs| format!("{}{differs}", listing(&case))));
    }
    assert!(bad.is_empty(), "{} differ: {bad:#?}", bad.len());
}

/// XSAVEC stores what the host stores; XSAVE stores it where CPUID says, and both are loaded back.
#[test]
fn the_registers_are_saved_and_restored() {
    if !has_avx512() {
        eprintln!("this host has no AVX-512");
        return;
    }
    let (mut host, mut ours) = (Host::new(), machine(Engine::Auto));
    let mut random = Random::new(0x512);
    let data = [0; DATA_SIZE];
    for run in 0..200 {
        let case = |code: &[u8]| Case {
            bits: 64,
            at: 0x40,
            code: code.to_vec(),
            roles: [Role::Any; 16],
            seed: 77 + run,
            wide: true,
        };
        let mut image = case(&[]).image();
        // SSE and up: what x87 pointers are differs. Any of the components, of which some are in their initial state.
        (image.gpr[0], image.gpr[2], image.gpr[3]) =
            (random.next() & 0xe6, 0, DATA + 64 * random.below(0x40));
        image.rflags = 0x202;
        image.put(512, &(3 | random.next() & 0xe4).to_le_bytes());
        let go = |on: &mut dyn Processor, code: &[u8]| {
            let case = case(code);
            on.place(case.at, &case.bytes());
            let outcome = on.run(64, &image, &data);
            assert_eq!(outcome.end, End::Done, "run {run} on {}", on.name());
            (outcome.image, on.data().to_vec())
        };
        // xsavec64 [rbx], which has no room for what a host's processor has between the components.
        let compact = [0x48, 0x0f, 0xc7, 0x23];
        let (want, got) = (go(&mut host, &compact), go(&mut ours, &compact));
        let area = (image.gpr[3] - DATA) as usize;
        let mask = area + 28..area + 32; // MXCSR_MASK
        let differs = want.1.iter().zip(&got.1).enumerate().find(|(n, (a, b))| !mask.contains(n) && a != b);
        assert!(differs.is_none(), "run {run}, rax {:#x}: {differs:x?}", image.gpr[0]);
        // Stored, cleared and loaded: xsave64 [rbx]; vzeroall; kxorq k1, k1, k1; vpxorq zmm20, zmm20, zmm20; xrstor64 [rbx]
        for save in [&compact[..], &[0x48, 0x0f, 0xae, 0x23]] {
            let mut code = save.to_vec();
            code.extend([0xc5, 0xfc, 0x77, 0xc4, 0xe1, 0xf4, 0x47, 0xc9]);
            code.extend([0x62, 0xa1, 0xdd, 0x40, 0xef, 0xe4, 0x48, 0x0f, 0xae, 0x2b]);
            let (want, got) = (go(&mut host, &code), go(&mut ours, &code));
            assert_eq!(
                differences(64, &want.0, &got.0),
                Vec::<String>::new(),
                "run {run}, rax {:#x}",
                image.gpr[0]
            );
        }
        // Where CPUID says that they are.
        let standard = go(&mut ours, &[0x48, 0x0f, 0xae, 0x23]).1;
        let parts = [(5, OPMASK, ZMM_HIGH), (6, ZMM_HIGH, ZMM_UPPER), (7, ZMM_UPPER, XSAVE_SIZE)];
        for (bit, from, to) in parts {
            if image.gpr[0] & u64::from(image.get::<1>(512)[0]) >> bit & 1 != 0 {
                assert_eq!(
                    standard[area + from..area + to],
                    image.xsave[from..to],
                    "run {run}, component {bit}"
                );
            }
        }
    }
}

/// A state goes to another vCPU and on from there, as it does in a migration; one that has no AVX-512 refuses it.
#[test]
fn the_registers_move_along() {
    if !has_avx512() {
        eprintln!("this host has no AVX-512");
        return;
    }
    let (mut from, mut to) = (machine(Engine::Auto), machine(Engine::Auto));
    let case = Case { bits: 64, at: 0, code: vec![0x90], roles: [Role::Any; 16], seed: 5, wide: true };
    from.place(case.at, &case.bytes());
    let mut image = case.image();
    image.rflags = 0x202;
    from.run(64, &image, &[0; DATA_SIZE]);
    let state = from.vcpu.export();
    let CpuState::X86_64(exported) = &state else { panic!("not x86") };
    assert!(exported.xsave[OPMASK..XSAVE_SIZE] == image.xsave[OPMASK..], "not what it was given");
    to.vcpu.import(&state).expect("the same processor");
    let CpuState::X86_64(arrived) = to.vcpu.export() else { panic!("not x86") };
    assert!(arrived.xsave == exported.xsave, "the XSAVE areas differ");
    let mut without = Machine::new(X86Guest::get(), Engine::Auto);
    let refused = without.vcpu.import(&state).expect_err("it has no such registers");
    assert!(format!("{refused:?}").contains("XCR0 bits 0xe0"), "{refused:?}");
}

/// A guest that was not offered it gets #UD, whatever the host has.
#[test]
fn without_its_state_there_is_none() {
    let mut ours = Machine::new(X86Guest::get(), Engine::Auto);
    let codes: [&[u8]; 4] = [
        &[0x62, 0xf1, 0x7d, 0x48, 0xfe, 0xc1], // vpaddd zmm0, zmm0, zmm1
        &[0x62, 0xf1, 0x7e, 0x08, 0x6f, 0x06], // vmovdqu32 xmm0, [rsi]
        &[0xc5, 0xf8, 0x92, 0xc8],             // kmovw k1, eax
        &[0xc4, 0xe1, 0xf8, 0x98, 0xc9],       // kortestq k1, k1
    ];
    for code in codes {
        let case =
            Case { bits: 64, at: 0, code: code.to_vec(), roles: [Role::Any; 16], seed: 1, wide: false };
        ours.place(case.at, &case.bytes());
        let outcome = ours.run(64, &case.image(), &[0; DATA_SIZE]);
        assert_eq!(outcome.end, End::Fault { vector: 6, error: 0, address: 0 }, "{}", listing(&case));
    }
}
