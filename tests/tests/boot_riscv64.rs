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
