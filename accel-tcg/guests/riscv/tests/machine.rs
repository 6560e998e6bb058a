//! Harts beyond single instructions: several at once, saved and restored, stepped.

mod common;

use std::time::Duration;

use common::{Machine, assemble};
use holdfast_arch::CpuState;
use holdfast_tcg_runtime::{Engine, Stop};
use vm_memory::{Bytes, GuestAddress};

const BASE: u64 = 0x7ff0_0000;
const SIZE: usize = 4 << 20;
const LIMIT: Duration = Duration::from_secs(120);

fn program(name: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    assemble(name, dir.path())
}

#[test]
fn harts_count_together() {
    let elf = program("smp");
    for engine in [Engine::Interpreter, Engine::Auto] {
        let harts = 3;
        let mut machine = Machine::with_vcpus(engine, BASE, SIZE, harts);
        let entry = machine.load(&elf);
        let start = |state: CpuState, hart: u64| {
            let CpuState::Riscv64(mut state) = state else { panic!("not RISC-V") };
            state.pc = entry;
            (state.x[10], state.x[11]) = (hart, u64::from(harts));
            CpuState::Riscv64(state)
        };
        let state = start(machine.vcpu.export(), 0);
        machine.vcpu.import(&state).expect("fits");
        let others: Vec<_> = std::mem::take(&mut machine.others)
            .into_iter()
            .zip(1..)
            .map(|(mut vcpu, hart)| {
                let state = start(vcpu.export(), hart);
                vcpu.import(&state).expect("fits");
                // The exit register kicks all of them.
                std::thread::spawn(move || vcpu.run().map(|_| ()).map_err(|e| e.to_string()))
            })
            .collect();
        let code = machine.run(LIMIT).unwrap_or_else(|e| panic!("{engine:?}: {e}"));
        assert_eq!(code, 0x5555, "{engine:?}");
        for other in others {
            other.join().expect("a vCPU").expect("runs");
        }
    }
}

#[test]
fn a_hart_goes_on_elsewhere() {
    let elf = program("rv64ctl");
    let mut here = Machine::new(Engine::Auto, BASE, SIZE);
    let entry = here.load(&elf);
    here.set_pc(entry);
    // Some way into the program, then over to the other engine and back, ever again.
    let mut engines = [Engine::Interpreter, Engine::Auto].into_iter().cycle();
    let mut moves = 0;
    loop {
        here.vcpu.set_debug(true, &[]);
        let mut code = None;
        for _ in 0..997 {
            match here.run_to(LIMIT).unwrap_or_else(|e| panic!("{e}")) {
                Stop::Debug(_) => {}
                Stop::Kicked => {
                    code = Some(here.exit_code());
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        if let Some(code) = code {
            assert_eq!(code, 0x5555, "{}", here.vcpu.describe());
            break;
        }
        if moves == 20 {
            here.vcpu.set_debug(false, &[]);
            assert_eq!(here.run(LIMIT), Ok(0x5555));
            break;
        }
        let state = here.state();
        let there = Machine::new(engines.next().expect("endless"), BASE, SIZE);
        let mut ram = vec![0; SIZE];
        here.memory.read_slice(&mut ram, GuestAddress(BASE)).expect("RAM");
        there.memory.write_slice(&ram, GuestAddress(BASE)).expect("RAM");
        here = there;
        here.set_state(state.clone());
        let mut again = here.state();
        // Time has gone on.
        for counter in [0xb00, 0xb02] {
            again.csrs.insert(counter, state.csrs[&counter]);
        }
        // A reservation does not survive: SC fails.
        again.reservation = state.reservation;
        assert_eq!(again, state);
        moves += 1;
    }
    assert!(moves > 10);
}

#[test]
fn single_steps_go_instruction_by_instruction() {
    let mut machine = Machine::new(Engine::Auto, BASE, SIZE);
    let code: [u32; 4] = [0x0010_0093, 0x0010_8093, 0xfe00_9ee3, 0]; // li ra, 1; loop: addi ra, ra, 1; bnez ra, loop
    for (at, word) in (BASE..).step_by(4).zip(code) {
        machine.memory.write_obj(word, GuestAddress(at)).expect("RAM");
    }
    machine.set_pc(BASE);
    machine.vcpu.set_debug(true, &[]);
    let pcs: Vec<u64> = (0..6)
        .map(|_| match machine.run_to(LIMIT) {
            Ok(Stop::Debug(pc)) => pc - BASE,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(pcs, [4, 8, 4, 8, 4, 8]);
    assert_eq!(machine.state().x[1], 4);
}

#[test]
fn states_that_do_not_fit_are_refused() {
    let mut machine = Machine::new(Engine::Auto, BASE, SIZE);
    let good = machine.state();
    let mut refused = |change: &dyn Fn(&mut holdfast_arch::riscv64::State), why: &str| {
        let mut state = good.clone();
        change(&mut state);
        let error =
            machine.vcpu.import(&CpuState::Riscv64(Box::new(state))).expect_err("refused").to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(&|s| s.pc = 1, "odd");
    refused(&|s| s.privilege = 2, "no privilege level 2");
    refused(
        &|s| {
            s.csrs.insert(0x7a0, 0);
        },
        "CSR 0x7a0 is not one",
    );
    refused(
        &|s| {
            s.csrs.insert(0x180, 11 << 60);
        },
        "CSR 0x180 cannot hold",
    );
    refused(
        &|s| {
            s.csrs.insert(0x301, 0);
        },
        "CSR 0x301 cannot hold",
    );
    assert!(machine.vcpu.import(&CpuState::X86_64(Box::default())).is_err());
}
