//! The programs of `asm/`, written from the specification, on both engines.
//!
//! All but those that drive pins (`rv64irq`, `smp`) also end well as `-bios none -kernel` of QEMU 7.2's `virt`, except
//! where that is wrong: the cause of misaligned AMOs, bit 0 of `mepc`, `ctzw` of a low word of zero, and fetches by S-mode
//! from a U page that a load with SUM has brought into its TLB; and but for the first half of `rv64si`'s test 35, for its timer
//! interrupt is there only some time after `time` has been seen to have reached `stimecmp`.

mod common;

use std::time::Duration;

use common::{Machine, assemble};
use holdfast_tcg_runtime::Engine;

fn run(name: &str) {
    let dir = tempfile::tempdir().expect("a directory");
    let elf = assemble(name, dir.path());
    for engine in [Engine::Interpreter, Engine::Auto] {
        let mut machine = Machine::new(engine, 0x7ff0_0000, 4 << 20);
        let entry = machine.load(&elf);
        machine.set_pc(entry);
        match machine.run(Duration::from_secs(60)) {
            Ok(0x5555) => {}
            Ok(code) => {
                let trap = if code >> 31 & 1 != 0 { " by an unexpected trap" } else { "" };
                let number = code >> 16 & 0x7fff;
                let registers = machine.vcpu.describe();
                panic!("{name}, {engine:?}: test {number} failed{trap}\n{registers}");
            }
            Err(why) => panic!("{name}, {engine:?}: {why}"),
        }
    }
}

macro_rules! programs {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                run(stringify!($name));
            }
        )*
    };
}

programs! { rv64ui rv64ctl rv64um rv64ua rv64uc rv64fd rv64zba rv64zbb rv64zbs rv64mi rv64si rv64irq }
