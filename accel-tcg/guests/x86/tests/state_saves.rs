//! Instructions that store whole states: FXSAVE, FNSAVE, FNSTENV, XSAVE, XSAVEC, XSAVEOPT, by the host's processor and by
//! ours. Not compared are pointers of the x87 unit, which AMD's processors store only with an exception, and MXCSR_MASK.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use common::case::{Case, DATA, DATA_SIZE, End, Processor, Role};
use common::compare::differences;
use common::guest::Machine;
use common::host::Host;
use common::random::Random;
use holdfast_guest_x86::X86Guest;
use holdfast_tcg_runtime::Engine;

/// An instruction that stores to [RBX].
struct Store {
    name: &'static str,
    code: &'static [u8],
    /// Bytes that are not compared: from, to.
    open: &'static [(usize, usize)],
}

const FX: &[(usize, usize)] = &[(6, 24), (28, 32)];

const STORES: [Store; 12] = [
    Store { name: "fxsave", code: &[0x0f, 0xae, 0x03], open: FX },
    Store { name: "fxsave64", code: &[0x48, 0x0f, 0xae, 0x03], open: FX },
    Store { name: "fnsave", code: &[0xdd, 0x33], open: &[(12, 28)] },
    Store { name: "fnsave, short", code: &[0x66, 0xdd, 0x33], open: &[(6, 14)] },
    Store { name: "fnstenv", code: &[0xd9, 0x33], open: &[(12, 28)] },
    Store { name: "fnstenv, short", code: &[0x66, 0xd9, 0x33], open: &[(6, 14)] },
    Store { name: "xsave", code: &[0x0f, 0xae, 0x23], open: FX },
    Store { name: "xsave64", code: &[0x48, 0x0f, 0xae, 0x23], open: FX },
    Store { name: "xsaveopt", code: &[0x0f, 0xae, 0x33], open: FX },
    Store { name: "xsavec", code: &[0x0f, 0xc7, 0x23], open: FX },
    Store { name: "xsavec64", code: &[0x48, 0x0f, 0xc7, 0x23], open: FX },
    Store { name: "fxsave; fxrstor", code: &[0x0f, 0xae, 0x03, 0x0f, 0xae, 0x0b], open: FX },
];

/// Runs of each.
const RUNS: u64 = 60;

fn stores_alike(engine: Engine) {
    let (mut host, mut ours) = (Host::new(), Machine::new(X86Guest::get(), engine));
    let mut random = Random::new(0x5a7e);
    for store in &STORES {
        for run in 0..RUNS {
            let bits = if run % 4 == 3 && store.code[0] != 0x48 { 32 } else { 64 };
            let roles = [Role::Any; 16];
            let case =
                Case { bits, at: 0x40, code: store.code.to_vec(), roles, seed: random.next(), wide: false };
            let mut image = case.image();
            // Any components that are on; alignment is not what is looked at.
            (image.gpr[0], image.gpr[2]) = (random.below(8), 0);
            image.gpr[3] = DATA + 64 * random.below(0x30);
            image.rflags &= !(1 << 18);
            // Headers of XSAVE areas keep what they held.
            let data = [0; DATA_SIZE];
            host.place(case.at, &case.bytes());
            ours.place(case.at, &case.bytes());
            let (left, right) = (host.run(bits, &image, &data), ours.run(bits, &image, &data));
            let what =
                format!("{} in {bits}-bit code, {engine:?}, run {run}, rax {}", store.name, image.gpr[0]);
            assert_eq!(left.end, End::Done, "{what}");
            assert_eq!(right.end, End::Done, "{what}");
            assert_eq!(differences(bits, &left.image, &right.image), Vec::<String>::new(), "{what}");
            let area = (image.gpr[3] - DATA) as usize;
            for (at, (a, b)) in host.data().iter().zip(ours.data()).enumerate() {
                let open =
                    at >= area && store.open.iter().any(|(from, to)| (*from..*to).contains(&(at - area)));
                assert!(open || a == b, "{what}: byte {:#x}: {a:02x} and {b:02x}", at.wrapping_sub(area));
            }
        }
    }
}

#[test]
fn translated_code_stores_what_the_host_stores() {
    stores_alike(Engine::Auto);
}

#[test]
fn the_interpreter_stores_what_the_host_stores() {
    stores_alike(Engine::Interpreter);
}
