//! Code that is translated before it runs, because it ran elsewhere.

mod common;

use std::sync::Arc;

use common::asm::*;
use common::*;
use holdfast_arch::{Arch, CpuModel, riscv64, x86_64};
use holdfast_clock::{Timers, VmClock};
use holdfast_memory::GuestMemory;
use holdfast_tcg::{CodePlace, Engine, TcgVcpu, TcgVm, VmParts};
use holdfast_threads::PlainSpawner;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// A loop with calls within its page and to two others.
fn program() -> Asm {
    let mut p = Asm::new();
    p.li(S0, 0).li(S1, 1000);
    p.label("loop").call("near").call("far").call("victim").add(S0, S0, A0).addi(S1, S1, -1);
    p.bne(S1, ZERO, "loop").done(S0);
    p.label("near").addi(S0, S0, 1).ret();
    p.org(0x2000).label("far").addi(S0, S0, 2).ret();
    p.org(0x3000).label("victim").addi(A0, ZERO, 3).ret();
    p
}

/// What of the program runs, as another machine has seen it.
fn places(engine: Engine) -> Vec<CodePlace> {
    let mut m = Machine::with(engine, 1, &program());
    m.vm.note_running_code();
    assert_eq!(m.run(), 6000);
    m.vm.running_code(100)
}

fn info(vm: &TcgVm, line: &str) -> u64 {
    let text = vm.info();
    let value =
        text.lines().find_map(|l| l.strip_prefix(line)).unwrap_or_else(|| panic!("no `{line}` in {text}"));
    value.trim().parse().expect("a number")
}

#[test]
fn what_ran_elsewhere_is_there_before_it_runs() {
    for engine in ENGINES {
        let places = places(engine);
        for name in ["loop", "near", "far", "victim"] {
            let pc = program().at(name);
            assert!(
                places.iter().any(|p| p.pc == pc && p.gpa == pc),
                "{engine:?}: {name} is not in {places:x?}"
            );
        }
        let mut m = Machine::with(engine, 1, &program());
        // None of it if nobody wants it to go on, all of it once.
        assert_eq!(m.vcpus[0].translate_ahead(&places, &|| false), 0);
        assert_eq!(m.vcpus[0].translate_ahead(&places, &|| true), places.len(), "{engine:?}");
        assert_eq!(m.vcpus[0].translate_ahead(&places, &|| true), 0);
        assert_eq!(info(&m.vm, "regions translated ahead"), places.len() as u64);
        let before = info(&m.vm, "regions translated ");
        assert_eq!(m.run(), 6000);
        // The way in is not part of what ran last in a loop of a thousand rounds, or is, by how it was entered.
        let more = info(&m.vm, "regions translated ") - before;
        assert!(more <= 1, "{engine:?}: {more} translations were made anew");
    }
}

#[test]
fn no_more_than_is_asked_for() {
    let mut m = Machine::with(Engine::Auto, 1, &program());
    m.run();
    // Everything the vCPU knew is forgotten: nothing has run since.
    m.vm.note_running_code();
    assert_eq!(m.vm.running_code(100), []);
    let all = places(Engine::Auto);
    let mut m = Machine::with(Engine::Auto, 1, &program());
    m.vm.note_running_code();
    m.run();
    assert_eq!(m.vm.running_code(2), all[..2]);
}

#[test]
fn what_is_written_behind_it_counts() {
    let victim = GuestAddress(program().at("victim"));
    for engine in ENGINES {
        let places = places(engine);
        let mut m = Machine::with(engine, 1, &program());
        assert!(m.vcpus[0].translate_ahead(&places, &|| true) > 0);
        m.memory.write_obj(addi(A0, ZERO, 4), victim).expect("in RAM");
        assert_eq!(m.run(), 7000, "{engine:?}");

        // Pages that are taken away come again by a way that nobody is told of.
        let mut m = Machine::with(engine, 1, &program());
        assert!(m.vcpus[0].translate_ahead(&places, &|| true) > 0);
        let (tracker, offset) = holdfast_memory::tracker_at(&m.memory, victim.0).expect("RAM");
        tracker.forget_code(offset / 4096, 1);
        let host = m.memory.get_host_address(victim).expect("RAM");
        // SAFETY: the word is in RAM, and nothing runs.
        unsafe { host.cast::<u32>().write_volatile(addi(A0, ZERO, 5)) };
        assert_eq!(m.run(), 8000, "{engine:?}");
    }
}

/// A vCPU over RAM that is full of nonsense.
fn nonsense(arch: Arch, model: &CpuModel) -> (TcgVcpu, GuestMemory) {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(RAM), RAM_LEN)]).expect("RAM");
    let mut seed = 0x1234_5678_9abc_def1_u64;
    let mut bytes = vec![0; RAM_LEN];
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&next(&mut seed).to_le_bytes());
    }
    memory.write_slice(&bytes, GuestAddress(RAM)).expect("in RAM");
    let clock = VmClock::stopped_at(0);
    let timers = Timers::start(Arc::clone(&clock), &PlainSpawner).expect("timers");
    let vm = TcgVm::new(VmParts {
        guest: holdfast_tcg::guest(arch).expect("guest"),
        memory: memory.clone(),
        io: Arc::new(TestIo::default()),
        clock,
        timers,
        vcpus: 1,
        code_cache: 0,
        engine: Engine::Auto,
        controllers: Vec::new(),
    })
    .expect("VM");
    (TcgVcpu::new(&vm, 0, model).expect("vCPU"), memory)
}

fn next(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

#[test]
fn places_that_make_no_sense_do_no_harm() {
    let x86 = x86_64::CpuidModel { name: "max".into(), ..x86_64::CpuidModel::default() };
    let models = [
        (Arch::Riscv64, CpuModel::Riscv64(riscv64::IsaModel::default())),
        (Arch::X86_64, CpuModel::X86_64(x86)),
    ];
    for (arch, model) in models {
        let (mut vcpu, _memory) = nonsense(arch, &model);
        let mut seed = 0x9e37_79b9_7f4a_7c15;
        let mut place = || {
            let (pc, gpa, mode) = (next(&mut seed), next(&mut seed), next(&mut seed));
            let gpa = match gpa % 16 {
                // Nowhere, behind the end of RAM, elsewhere in its page, and where it may be.
                0 => gpa,
                1 => RAM + RAM_LEN as u64 - 1 + gpa % 3,
                2 => RAM + (gpa >> 8) % RAM_LEN as u64,
                _ => RAM + (gpa >> 8) % RAM_LEN as u64 / 4096 * 4096 + pc % 4096,
            };
            CodePlace { gpa, pc, mode: (mode >> 8) as u32 >> (mode % 32) }
        };
        let places: Vec<_> = (0..20_000).map(|_| place()).collect();
        let made = vcpu.translate_ahead(&places, &|| true);
        assert!((5_000..20_000).contains(&made), "{arch:?}: {made}");
    }
}
