//! Debian's stress-ng on eight vCPUs under translation, every result verified.
//!
//! `HOLDFAST_STRESS_SECONDS` is how long it runs in the guest; `HOLDFAST_STRESS_VCPUS` on how many vCPUs.

use std::time::Duration;

use holdfast_tests::{Program, printed, x86_64_args, x86_64_initramfs};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[test]
fn stress_ng_verifies_everything() {
    let (seconds, vcpus) = (setting("HOLDFAST_STRESS_SECONDS", 15), setting("HOLDFAST_STRESS_VCPUS", 8));
    let dir = tempfile::tempdir().expect("a directory");
    let initramfs_at = dir.path().join("initramfs.cpio");
    x86_64_initramfs(&initramfs_at, "stress/init", "stress-ng", &[]);
    let mut args = x86_64_args(vcpus as u32, "");
    for (key, value) in [
        ("--memory", "size=1G".to_string()),
        ("--initramfs", initramfs_at.display().to_string()),
        ("--cmdline", format!("console=ttyS0 quiet rdinit=/test-init stress.seconds={seconds}")),
    ] {
        let at = args.iter().position(|a| a == key).expect("there");
        args[at + 1] = value;
    }
    // Nothing is asserted about speed: eight vCPUs share the host's few CPUs with whatever else it does.
    let limit = Duration::from_secs(600 + 4 * seconds);
    let mut vm = Program::run(&args);
    vm.wait_for(&format!("{vcpus} cpu"), limit);
    vm.wait_for("COMPLAINTS", limit);
    assert!(vm.wait_exit(limit).success(), "power-off ends the program with success");
    let output = vm.output();
    println!("{output}");
    assert_eq!(printed(&output, "STRESS-NG-EXIT"), "0", "{output}");
    assert_eq!(printed(&output, "COMPLAINTS"), "0", "{output}");
    assert!(output.contains("successful run completed"), "{output}");
    for cpu in 0..vcpus {
        let ticks = printed(&output, &format!("TICKS cpu {cpu} "));
        assert!(!ticks.starts_with("0,"), "CPU {cpu} woke nobody:\n{output}");
    }
}
