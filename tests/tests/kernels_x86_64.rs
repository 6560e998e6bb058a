//! Debian's x86 kernels under translation, started by the VMM itself: suites, flavours, boot protocols, numbers of
//! vCPUs, with their own drivers on our devices. Needs root for the tap and e2fsprogs for file systems.

use std::time::Duration;

use holdfast_tests::devices::{NetPeer, check_disk, check_rng, ext4_image};
use holdfast_tests::http::Api;
use holdfast_tests::{Program, debian_guest, x86_64_args, x86_64_guest, x86_args};
use serde_json::json;

/// Generous: the test machine may be busy. Nothing is asserted about speed.
const BOOT: Duration = Duration::from_secs(400);

fn ends_well(vm: &mut Program) -> String {
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    assert!(vm.wait_exit(BOOT).success(), "power-off ends the program with success");
    vm.output()
}

#[test]
fn the_generic_kernel_with_eight_vcpus_has_a_shell_on_the_virtio_console() {
    let mut args = x86_args(8, &debian_guest("x86_64-generic"), "vmlinuz", "holdfast.terminal=hvc0");
    let set = |args: &mut [String], key: &str, value: &str| {
        let at = args.iter().position(|a| a == key).expect("there");
        args[at + 1] = value.into();
    };
    set(&mut args, "--serial", "null");
    set(&mut args, "--console", "tty");
    let mut vm = Program::run(&args);
    vm.wait_for("-amd64 x86_64 8 cpu", BOOT);
    let at = vm.wait_for("# ", BOOT);
    vm.type_in("echo $((6 * 7))-$(nproc)-$(cat /sys/class/tty/hvc0/dev)\n");
    let at = vm.wait_for_after("42-8-229:0", at, BOOT);
    // Every processor works.
    vm.type_in(
        "for n in 0 1 2 3 4 5 6 7; do taskset -c $n sh -c 'head -c 300000 /dev/zero | md5sum' & done >/tmp/sums; wait; \
         echo SUMS-$(sort -u /tmp/sums | wc -l)-$(wc -l </tmp/sums)\n",
    );
    let at = vm.wait_for_after("SUMS-1-8", at, BOOT);
    vm.type_in("echo off; poweroff -f\n");
    vm.wait_for_after("off", at, BOOT);
    assert!(vm.wait_exit(BOOT).success());
}

#[test]
fn debians_drivers_use_disk_network_entropy_and_balloon() {
    let dir = tempfile::tempdir().expect("directory");
    let image = ext4_image(dir.path(), 1_000_000);
    let peer = NetPeer::new(dir.path(), 2_000_000);
    let socket = dir.path().join("api");
    let mut args = x86_64_args(2, "disk,rng,balloon,net");
    for (key, value) in [
        ("--disk", format!("path={},serial=holdfast-1,num_queues=2", image.display())),
        ("--net", NetPeer::option("hftap-test2")),
        ("--balloon", "size=0".to_owned()),
        ("--api-socket", socket.display().to_string()),
    ] {
        args.extend([key.to_owned(), value]);
    }
    let mut vm = Program::run(&args);
    // The tap is there before the guest says a word.
    vm.wait_for("BOOTED", BOOT);
    let server = peer.serve();
    let api = Api::connect(&socket);
    vm.wait_for("BALLOON-READY", BOOT);
    api.put("vm.resize", &json!({ "desired_balloon": 64u64 << 20 }));
    vm.wait_for("BALLOON-FULL", BOOT);
    api.put("vm.resize", &json!({ "desired_balloon": 0 }));
    vm.wait_for("BALLOON-EMPTY", BOOT);
    let output = ends_well(&mut vm);
    server.join().expect("the file was served");
    peer.check(&output);
    check_disk(&output, &image);
    check_rng(&output);
}

#[test]
fn the_kernel_of_the_suite_before_boots() {
    let mut vm = Program::run(&x86_args(2, &debian_guest("x86_64-bookworm"), "vmlinuz", "holdfast.test=rng"));
    vm.wait_for("BOOTED 6.1.", BOOT);
    check_rng(&ends_well(&mut vm));
}

#[test]
fn the_kernel_for_32_bit_processors_boots_and_uses_a_disk() {
    let dir = tempfile::tempdir().expect("directory");
    let image = ext4_image(dir.path(), 500_000);
    let mut args = x86_args(2, &debian_guest("i386"), "vmlinuz", "holdfast.test=disk,rng");
    args.extend(["--disk".to_owned(), format!("path={},serial=holdfast-1", image.display())]);
    let mut vm = Program::run(&args);
    vm.wait_for("-686-pae i686 2 cpu", BOOT);
    let output = ends_well(&mut vm);
    check_disk(&output, &image);
    check_rng(&output);
}

#[test]
fn a_kernel_with_a_pvh_entry_boots() {
    // PVH's start information has the command line and the initramfs, or this would not come far.
    let mut vm = Program::run(&x86_args(2, &x86_64_guest(), "vmlinux", "holdfast.test=boot"));
    vm.wait_for("x86_64 2 cpu", BOOT);
    ends_well(&mut vm);
}
