//! Random user-level instructions, run by the host's processor and by ours.
//!
//! `HOLDFAST_FUZZ_INSNS` and `HOLDFAST_FUZZ_SEED` set how many instructions and where to start;
//! `HOLDFAST_FUZZ_KINDS` after how many kinds of mismatches to end.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use common::campaign::{Limits, Report, run};

use common::case::{Case, DATA_SIZE, End, Image, Outcome, Processor, patterns};
use common::compare::compare;
use common::guest::Machine;
use common::host::Host;
use holdfast_guest_x86::X86Guest;
use holdfast_tcg_runtime::Engine;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn limits(insns: u64) -> Limits {
    Limits {
        insns: setting("HOLDFAST_FUZZ_INSNS", insns),
        kinds: setting("HOLDFAST_FUZZ_KINDS", 40) as usize,
    }
}

/// Panics if anything differed, or if a code was never run to its end without a reason.
fn finish(report: &Report) {
    let (insns, codes, refused) = (report.insns, report.codes, report.refused);
    println!("{insns} instructions of {codes} codes, {refused} of which always raise an exception");
    assert!(report.kinds.is_empty(), "{}", report.mismatches());
    assert!(report.never.is_empty(), "never run to their end: {:#?}", report.never);
    assert!(report.wrong.is_empty(), "said to raise an exception always: {:#?}", report.wrong);
    let some = std::env::var_os("HOLDFAST_FUZZ_ONLY").is_some();
    assert!(some || codes > 3700 && refused < 90, "only {codes} codes, {refused} refused");
}

/// The host, the second time.
struct Again<'a>(&'a std::cell::RefCell<Host>, Vec<u8>);

impl Processor for Again<'_> {
    fn name(&self) -> &'static str {
        "host"
    }

    fn place(&mut self, at: usize, code: &[u8]) {
        self.0.borrow_mut().place(at, code);
    }

    fn run(&mut self, bits: u32, image: &Image, data: &[u8; DATA_SIZE]) -> Outcome {
        let outcome = self.0.borrow_mut().run(bits, image, data);
        self.1 = self.0.borrow().data().to_vec();
        outcome
    }

    fn data(&self) -> &[u8] {
        &self.1
    }
}

/// The harness itself: what the host does is the same every time, and nearly everything can be run.
#[test]
fn host_agrees_with_itself() {
    let host = std::cell::RefCell::new(Host::new());
    let (mut a, mut b) = (Again(&host, Vec::new()), Again(&host, Vec::new()));
    finish(&run(setting("HOLDFAST_FUZZ_SEED", 1), limits(10_000), &mut a, &mut b));
}

fn machine(engine: Engine) -> Machine {
    Machine::new(X86Guest::get(), engine)
}

/// Translated code does what the host does.
#[test]
fn translated_code_agrees_with_the_host() {
    let (mut host, mut ours) = (Host::new(), machine(Engine::Auto));
    ours.set_end_page(&host.end_page());
    finish(&run(setting("HOLDFAST_FUZZ_SEED", 2), limits(30_000), &mut host, &mut ours));
}

/// The IR interpreter does what translated code does.
#[test]
fn interpreter_agrees_with_translated_code() {
    let (mut a, mut b) = (machine(Engine::Auto), machine(Engine::Interpreter));
    finish(&run(setting("HOLDFAST_FUZZ_SEED", 3), limits(15_000), &mut a, &mut b));
}

/// Past mismatches.
#[test]
fn corpus_agrees_with_the_host() {
    let (mut host, mut ours) = (Host::new(), machine(Engine::Auto));
    ours.set_end_page(&host.end_page());
    let mut interpreted = machine(Engine::Interpreter);
    interpreted.set_end_page(&host.end_page());
    let patterns = patterns();
    let mut bad = String::new();
    let mut count = 0;
    for line in include_str!("corpus.txt").lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let case = Case::parse(line).unwrap_or_else(|| panic!("corpus: {line}"));
        for ours in [&mut ours, &mut interpreted] {
            host.place(case.at, &case.bytes());
            ours.place(case.at, &case.bytes());
            if let (_, Some(m)) = compare(&case, &mut host, ours, &patterns[case.pattern()]) {
                bad += &format!("{} {line}\n    {}\n", ours.name(), m.text);
                if std::env::var_os("HOLDFAST_FUZZ_STATE").is_some() {
                    let image = case.image();
                    let end = host.run(case.bits, &image, &patterns[case.pattern()]).end;
                    bad += &format!(
                        "    {:x?} rflags {:#x} mxcsr {:02x?} {end:x?}\n",
                        image.gpr,
                        image.rflags,
                        image.get::<4>(24)
                    );
                }
            }
            count += 1;
        }
    }
    println!("{count} cases");
    assert!(bad.is_empty(), "{bad}");
}

/// Known instructions do what the manual says, so that agreement means something.
#[test]
fn host_runs_known_code() {
    let mut host = Host::new();
    let mut go = |bits: u32, code: &[u8]| {
        let case = Case {
            bits,
            at: 0x10,
            code: code.to_vec(),
            roles: [common::case::Role::Small; 16],
            seed: 3,
            wide: false,
        };
        host.place(case.at, &case.bytes());
        let image = case.image();
        (image.clone(), host.run(bits, &image, &[0; DATA_SIZE]))
    };
    let (before, after) = go(64, &[0x48, 0x01, 0xd8]); // add rax, rbx
    assert_eq!(after.end, End::Done);
    assert_eq!(after.image.gpr[0], before.gpr[0].wrapping_add(before.gpr[3]));
    let (before, after) = go(32, &[0x41]); // inc ecx
    assert_eq!(after.end, End::Done);
    assert_eq!(after.image.gpr[1] as u32, (before.gpr[1] as u32).wrapping_add(1));
    for bits in [64, 32] {
        let (before, after) = go(bits, &[0x90, 0x0f, 0x0b]); // nop; ud2
        assert_eq!(after.end, End::Fault { vector: 6, error: 0, address: 0 });
        assert_eq!(after.image.rip, before.rip + 1);
        let (_, after) = go(bits, &[0xa1, 0, 0, 0, 0, 0, 0, 0, 0]); // mov eax, [0]
        assert_eq!(after.end, End::Fault { vector: 14, error: 4, address: 0 });
    }
}
