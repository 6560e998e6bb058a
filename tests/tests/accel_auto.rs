//! `--accel auto` for an x86-64 guest: what it chooses, and the one line of the log that says why.
//!
//! Where KVM is missing or not permitted is made by namespaces, which needs root.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use holdfast_tests::Program;

const LONG: Duration = Duration::from_secs(120);

/// A guest that switches itself off at once.
fn guest(dir: &Path) -> PathBuf {
    let source = dir.join("guest.S");
    let text = "\
        .section .note.Xen, \"a\", @note\n.long 4, 8, 18\n.asciz \"Xen\"\n.quad _start\n\
        .text\n.code32\n.globl _start\n_start: movw $0x604, %dx\nmovw $0x2000, %ax\noutw %ax, %dx\n0: jmp 0b\n";
    std::fs::write(&source, text).expect("source");
    let elf = dir.join("guest.elf");
    let mut gcc = Command::new("gcc");
    gcc.args(["-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x100000", "-Wl,--build-id=none", "-o"]);
    let output = gcc.arg(&elf).arg(&source).output().expect("gcc runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    elf
}

/// Runs the guest by `wrapper`, a shell script that ends in `exec "$@"`; gives the log's line.
fn chosen(wrapper: &str, accel: &str) -> String {
    let dir = tempfile::tempdir().expect("directory");
    let elf = guest(dir.path());
    let mut command = Command::new("sh");
    command.args(["-c", wrapper, "sh"]).arg(holdfast_tests::holdfast()).args(["run", "--arch", "x86_64"]);
    command.args(["--accel", accel, "--memory", "size=64M", "--serial", "null", "--console", "off", "-v"]);
    command.arg("--kernel").arg(&elf).arg("--log-file").arg(dir.path().join("log"));
    let mut vm = Program::spawn(command);
    let status = vm.wait_exit(LONG);
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
    assert!(status.success(), "{}\n{log}", vm.output());
    let lines: Vec<_> = log.lines().filter(|l| l.contains("accelerator ")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    lines[0].to_owned()
}

/// `/dev` with what a program needs but KVM.
const NO_KVM: &str = "exec unshare -m sh -c 'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && \
    mknod /dev/zero c 1 5 && mknod /dev/urandom c 1 9 && mknod /dev/random c 1 8 && exec \"$@\"' sh \"$@\"";

#[test]
fn translates_where_there_is_no_kvm() {
    let line = chosen(NO_KVM, "auto");
    assert!(line.contains("accelerator tcg") && line.contains("/dev/kvm does not exist"), "{line}");
}

#[test]
fn translates_where_kvm_is_forbidden() {
    // A node of no driver's, which nobody but root may open; the program keeps no right to open it all the same.
    let wrapper = NO_KVM.replace(
        "exec \"$@\"'",
        "mknod -m 600 /dev/kvm c 10 232 && \
        chown 1 /dev/kvm && exec setpriv --bounding-set -all --inh-caps -all \"$@\"'",
    );
    let line = chosen(&wrapper, "auto");
    assert!(line.contains("accelerator tcg") && line.contains("no permission to open /dev/kvm"), "{line}");
}

#[test]
fn translates_where_kvm_is_something_else() {
    let wrapper = NO_KVM.replace("exec \"$@\"'", "ln /dev/null /dev/kvm && exec \"$@\"'");
    let line = chosen(&wrapper, "auto");
    assert!(line.contains("accelerator tcg") && line.contains("/dev/kvm"), "{line}");
}

#[test]
fn prefers_kvm_only_with_hardware_behind_it() {
    let flags = std::fs::read_to_string("/proc/cpuinfo").expect("/proc/cpuinfo");
    let hardware = flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm"));
    let usable = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let line = chosen("exec \"$@\"", "auto");
    match (usable, hardware) {
        (true, true) => {
            assert!(line.contains("accelerator kvm") && line.contains("the host's speed"), "{line}")
        }
        (true, false) => {
            assert!(line.contains("accelerator tcg") && line.contains("interprets"), "{line}");
            // What is asked for is used all the same, and said.
            let line = chosen("exec \"$@\"", "kvm:tcg");
            assert!(line.contains("accelerator kvm") && line.contains("as asked"), "{line}");
        }
        (false, _) => assert!(line.contains("accelerator tcg") && line.contains("/dev/kvm"), "{line}"),
    }
}
