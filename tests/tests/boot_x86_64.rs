//! Debian's amd64 kernel under translation: 1 and 2 vCPUs, CPU models, the shell.

use std::time::Duration;

use holdfast_tests::{Program, x86_64_args};

/// Generous: the test machine may be busy. Nothing is asserted about speed.
const BOOT: Duration = Duration::from_secs(240);

fn boots_with(vcpus: u32) {
    let mut vm = Program::run(&x86_64_args(vcpus, "boot"));
    vm.wait_for(&format!("x86_64 {vcpus} cpu"), BOOT);
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
fn an_older_processor() {
    let mut args = x86_64_args(1, "");
    let cpus = args.iter().position(|a| a == "boot=1").expect("there");
    args[cpus] = "boot=1,profile=Nehalem".into();
    let mut vm = Program::run(&args);
    let at = vm.wait_for("# ", BOOT);
    vm.type_in("echo N$(grep -c Nehalem /proc/cpuinfo) A$(grep -cw avx /proc/cpuinfo)\n");
    vm.wait_for_after("N1 A0", at, BOOT);
}

/// Boots with a CPU model, where `command` is to print `answer` in the shell.
fn ask(profile: &str, command: &str, answer: &str) {
    let mut args = x86_64_args(1, "");
    let cpus = args.iter().position(|a| a == "boot=1").expect("there");
    args[cpus] = format!("boot=1,profile={profile}");
    let mut vm = Program::run(&args);
    let at = vm.wait_for("# ", BOOT);
    vm.type_in(&format!("echo A$({command})\n"));
    vm.wait_for_after(&format!("A{answer}"), at, BOOT);
}

/// With five levels of page tables: Linux takes data of its own for out of reach where CPUID's linear addresses are too short.
#[test]
fn all_that_translation_offers() {
    ask("max", "grep -o -w -e la57 -e '57 bits virtual' /proc/cpuinfo", "la57 57 bits virtual");
}

/// Linux drops what does not fit together, all of XSAVE and AVX for a wrong size, and says so.
#[test]
fn models_have_in_linux_what_their_names_promise() {
    let models = [
        ("qemu64", ["pni", "cx16", "lahf_lm"]),
        ("Nehalem", ["sse4_2", "popcnt", "x2apic"]),
        ("Skylake-Server", ["avx2", "pku", "xsavec"]),
        ("EPYC", ["avx2", "sha_ni", "xsavec"]),
        ("host", ["avx2", "sha_ni", "xsaves"]),
    ];
    // The host's processor runs these.
    let here = std::fs::read_to_string("/proc/cpuinfo").expect("Linux");
    let there = |f: &&str| !["pni", "sse4_2", "avx2", "sha_ni"].contains(f) || here.contains(*f);
    for (model, flags) in models {
        let flags = flags.into_iter().filter(there).collect::<Vec<_>>().join(" ");
        let pattern = flags.replace(' ', "|");
        let found = format!("grep -m1 ^flags /proc/cpuinfo | tr ' ' '\\n' | grep -xE '{pattern}' | sort");
        let mut want: Vec<_> = flags.split(' ').collect();
        want.sort_unstable();
        let command = format!("{found}; dmesg | grep -c -e consistency -e WARNING:.CPU");
        ask(model, &command, &format!("{} 0", want.join(" ")));
    }
}

#[test]
fn the_shell_answers_and_ctrl_a_x_quits() {
    let mut vm = Program::run(&x86_64_args(2, ""));
    vm.wait_for("BOOTED", BOOT);
    let at = vm.wait_for("# ", BOOT);
    vm.type_in("echo $((6 * 7))-$(uname -m)\n");
    let at = vm.wait_for_after("42-x86_64", at, BOOT);
    vm.type_in("dd if=/dev/zero bs=1k count=64 2>/dev/null | sha256sum\n");
    let at = vm.wait_for_after("de2f256064a0af797747c2b97505dc0b9f3df0de4f489eac731c23ae9ca9cc31", at, BOOT);
    vm.type_in("awk 'BEGIN { printf \"%.10f\\n\", 2.5 * 1.5 + 1 / 3 }'\n");
    vm.wait_for_after("4.0833333333", at, BOOT);
    vm.type_in("\u{1}x");
    assert!(vm.wait_exit(BOOT).success());
}
