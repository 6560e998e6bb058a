//! The API clients of other projects, unmodified: qemu.qmp and schemathesis, in a virtual environment
//! that the script makes.

use std::path::Path;
use std::process::Command;

use holdfast_tests::{holdfast, riscv64_guest};

fn runs(client: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/run");
    let mut command = Command::new(script);
    command.arg(client).env("HOLDFAST_BIN", holdfast()).env("HOLDFAST_RISCV64_GUEST", riscv64_guest());
    let output = command.output().expect("the script starts");
    assert!(
        output.status.success(),
        "{client}:\n{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn qemu_qmp_drives_a_whole_life() {
    runs("qmp");
}

#[test]
fn the_qmp_schema_is_part_of_qemus() {
    runs("schema");
}

#[test]
fn schemathesis_finds_nothing() {
    runs("rest");
}
