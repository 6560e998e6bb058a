//! Debian's own drivers against our devices: a disk with ext4, a network card on a tap, rng, balloon.
//! Needs root for the tap and e2fsprogs for the file system.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use holdfast_tests::devices::{NetPeer, check_disk, check_rng, ext4_image, run};
use holdfast_tests::{Program, printed, riscv64_args};

const BOOT: Duration = Duration::from_secs(240);

/// Puts the virtio devices on `pci` or into `mmio` windows.
fn on(transport: &str, args: &mut [String]) {
    let machine = args.iter_mut().find(|arg| *arg == "virt").expect("the machine's name");
    *machine = format!("virt,virtio={transport}");
}

fn disk_round_trip(options: &str) {
    disk_round_trip_on("pci", options);
}

fn disk_round_trip_on(transport: &str, options: &str) {
    let dir = tempfile::tempdir().expect("directory");
    let image = ext4_image(dir.path(), 3_000_000);
    let mut args = riscv64_args(2, "disk");
    on(transport, &mut args);
    args.extend(["--disk".to_owned(), format!("path={},serial=holdfast-1{options}", image.display())]);
    let mut vm = Program::run(&args);
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    assert!(vm.wait_exit(BOOT).success());
    check_disk(&vm.output(), &image);
}

#[test]
fn a_disk_keeps_what_is_written() {
    disk_round_trip("");
}

#[test]
fn a_disk_with_queues_and_direct_io_keeps_what_is_written() {
    disk_round_trip(",num_queues=2,queue_size=256,direct=on");
}

#[test]
fn a_disk_in_a_virtio_mmio_window_keeps_what_is_written() {
    disk_round_trip_on("mmio", ",num_queues=2");
}

/// Bytes that a file takes on the host.
fn room(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&path.metadata().expect("file")) * 512
}

fn discard_gives_room_back(transport: &str) {
    let dir = tempfile::tempdir().expect("directory");
    let raw = dir.path().join("raw.img");
    let content: Vec<u8> =
        (0..4u32 << 20).flat_map(|i| (i.wrapping_mul(2_654_435_761) | 1).to_le_bytes()).collect();
    std::fs::write(&raw, &content).expect("file");
    let ext4 = ext4_image(dir.path(), 3_000_000);
    let (raw_before, ext4_before) = (room(&raw), room(&ext4));
    let mut args = riscv64_args(1, "discard");
    on(transport, &mut args);
    args.extend(["--disk".to_owned(), format!("path={}", raw.display()), format!("path={}", ext4.display())]);
    let mut vm = Program::run(&args);
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    assert!(vm.wait_exit(BOOT).success());
    let output = vm.output();
    assert_eq!(printed(&output, "LEFT-IN-HOLE"), "0");
    std::fs::write(dir.path().join("head"), &content[3 << 20..4 << 20]).expect("file");
    let head = run(Command::new("sha256sum").arg(dir.path().join("head")));
    assert_eq!(printed(&output, "BEFORE-HOLE-SHA256")[..64], head[..64]);
    let mut expected = content;
    expected[4 << 20..12 << 20].fill(0);
    assert!(std::fs::read(&raw).expect("file") == expected, "only what was discarded is gone");
    assert!(room(&raw) + (8 << 20) <= raw_before, "{} of {raw_before} bytes are left", room(&raw));
    assert!(printed(&output, "FSTRIM").contains("trimmed"), "{output}");
    // The guest's file of 32 MiB has come and gone.
    assert!(room(&ext4) < ext4_before + (8 << 20), "{} after {ext4_before}", room(&ext4));
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(&ext4));
}

#[test]
fn discarded_blocks_go_back_to_the_host_over_pci() {
    discard_gives_room_back("pci");
}

#[test]
fn discarded_blocks_go_back_to_the_host_over_mmio() {
    discard_gives_room_back("mmio");
}

fn named_ports(transport: &str) {
    let dir = tempfile::tempdir().expect("directory");
    let (talk, sink) = (dir.path().join("talk"), dir.path().join("sink"));
    let mut args = riscv64_args(1, "ports");
    on(transport, &mut args);
    args.extend(["--console-port".to_owned(), format!("name=org.holdfast.talk,socket={}", talk.display())]);
    args.extend(["--console-port".to_owned(), format!("name=org.holdfast.sink,file={}", sink.display())]);
    let mut vm = Program::run(&args);
    vm.wait_for("OpenSBI", BOOT);
    let mut stream = std::os::unix::net::UnixStream::connect(&talk).expect("the port's socket");
    stream.set_read_timeout(Some(BOOT)).expect("a timeout");
    let mut heard = [0; 13];
    stream.read_exact(&mut heard).expect("the guest speaks");
    assert_eq!(&heard, b"guest speaks\n");
    stream.write_all(b"host answers\n").expect("the guest listens");
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    assert!(vm.wait_exit(BOOT).success());
    let output = vm.output();
    assert_eq!(printed(&output, "HEARD"), "host answers");
    assert_eq!(printed(&output, "TERMINAL"), "hvc0");
    for name in ["org.holdfast.talk", "org.holdfast.sink"] {
        assert!(output.contains(&format!("PORT {name} vport")), "{output}");
    }
    let sunk = std::fs::read(&sink).expect("the port's file");
    assert_eq!(sunk.len(), (64 << 12) + 4);
    assert!(sunk[..64 << 12].iter().all(|b| *b == b'x') && sunk.ends_with(b"end\n"));
}

#[test]
fn named_console_ports_talk_over_pci() {
    named_ports("pci");
}

#[test]
fn named_console_ports_talk_over_mmio() {
    named_ports("mmio");
}

#[test]
fn a_read_only_disk_cannot_be_written() {
    let dir = tempfile::tempdir().expect("directory");
    let image = ext4_image(dir.path(), 3_000_000);
    let before = run(Command::new("sha256sum").arg(&image));
    let mut args = riscv64_args(1, "disk");
    args.extend(["--disk".to_owned(), format!("path={},readonly=on", image.display())]);
    let mut vm = Program::run(&args);
    vm.wait_for("GUEST-TEST-EXIT", BOOT);
    vm.wait_exit(BOOT);
    assert!(!vm.output().contains("DATA-SHA256"), "{}", vm.output());
    assert_eq!(run(Command::new("sha256sum").arg(&image)), before);
}

#[test]
fn a_network_card_carries_traffic_with_the_host() {
    let dir = tempfile::tempdir().expect("directory");
    let peer = NetPeer::new(dir.path(), 4_000_000);
    let mut args = riscv64_args(2, "net");
    args.extend(["--net".to_owned(), NetPeer::option("hftap-test0")]);
    let mut vm = Program::run(&args);
    vm.wait_for("OpenSBI", BOOT);
    let server = peer.serve();
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    server.join().expect("the file was served");
    peer.check(&vm.output());
    assert!(vm.wait_exit(BOOT).success());
}

#[test]
fn the_entropy_source_serves_hwrng() {
    let mut vm = Program::run(&riscv64_args(1, "rng"));
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    check_rng(&vm.output());
    vm.wait_exit(BOOT);
}
