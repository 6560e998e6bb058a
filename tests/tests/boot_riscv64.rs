//! Debian's riscv64 kernel under translation: 1, 2 and 8 vCPUs, the shell, the terminal.

use std::time::Duration;

use holdfast_tests::{Program, riscv64_args};

/// Generous: the test machine may be busy. Nothing is asserted about speed.
const BOOT: Duration = Duration::from_secs(240);

fn boots_with(vcpus: u32) {
    let mut vm = Program::run(&riscv64_args(vcpus, "boot"));
    vm.wait_for(&format!("riscv64 {vcpus} cpu"), BOOT);
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    assert!(vm.wait_exit(BOOT).success(), "power-off ends the program with success");
}

#[test]
fn one_vcpu() {
    boots_with(1);
}

#[test]
fn two_vcpus() {
    boots_with(2);
}

#[test]
fn eight_vcpus() {
    boots_with(8);
}

#[test]
fn a_guest_that_switches_off_at_once_ends_the_program() {
    // lui t0, 0x100; lui t1, 0x5; addi t1, t1, 0x555; sw t1, 0(t0): the test finisher; j .
    let code = [0x0010_02b7u32, 0x0000_5337, 0x5553_0313, 0x0062_a023, 0x0000_006f];
    let file = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(file.path(), code.map(u32::to_le_bytes).as_flattened()).expect("written");
    let firmware = file.path().to_str().expect("UTF-8");
    let common = ["--arch", "riscv64", "--accel", "tcg", "--memory", "size=32M", "--console", "off"];
    let args: Vec<_> = common.into_iter().chain(["--firmware", firmware]).collect();
    for _ in 0..5 {
        assert!(Program::run(&args).wait_exit(BOOT).success());
    }
}

#[test]
fn the_shell_answers_and_ctrl_a_x_quits() {
    let mut vm = Program::run(&riscv64_args(2, ""));
    vm.wait_for("BOOTED", BOOT);
    let at = vm.wait_for("# ", BOOT);
    vm.type_in("echo $((6 * 7))-$(uname -m)\n");
    let at = vm.wait_for_after("42-riscv64", at, BOOT);
    vm.type_in("dd if=/dev/zero bs=1k count=64 2>/dev/null | sha256sum\n");
    vm.wait_for_after("de2f256064a0af797747c2b97505dc0b9f3df0de4f489eac731c23ae9ca9cc31", at, BOOT);
    vm.type_in("\u{1}x");
    assert!(vm.wait_exit(BOOT).success());
}
