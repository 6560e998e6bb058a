//! Debian's own drivers against our devices: a disk with ext4, a network card on a tap, rng, balloon.
//! Needs root for the tap and e2fsprogs for the file system.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use holdfast_tests::{Program, riscv64_args};

const BOOT: Duration = Duration::from_secs(240);

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A value that the guest printed after `key`.
fn printed(output: &str, key: &str) -> String {
    let line = output.lines().find_map(|l| l.trim().strip_prefix(key));
    line.unwrap_or_else(|| panic!("the guest printed no {key}:\n{output}")).trim().to_owned()
}

/// An ext4 image of 64 MiB with a file and its checksum.
fn ext4_image(dir: &Path) -> std::path::PathBuf {
    let tree = dir.join("tree");
    std::fs::create_dir(&tree).expect("directory");
    let content: Vec<u8> =
        (0..3_000_000u32).flat_map(|i| (i.wrapping_mul(2_654_435_761) >> 7).to_le_bytes()).collect();
    std::fs::write(tree.join("content"), content).expect("file");
    let sums = run(Command::new("sha256sum").arg("content").current_dir(&tree));
    std::fs::write(tree.join("SUMS"), sums.replace("content", "/mnt/content")).expect("file");
    let image = dir.join("disk.img");
    run(Command::new("mkfs.ext4").args(["-q", "-d"]).arg(&tree).arg(&image).arg("64M"));
    image
}

fn disk_round_trip(options: &str) {
    let dir = tempfile::tempdir().expect("directory");
    let image = ext4_image(dir.path());
    let mut args = riscv64_args(2, "disk");
    args.extend(["--disk".to_owned(), format!("path={},serial=holdfast-1{options}", image.display())]);
    let mut vm = Program::run(&args);
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    assert!(vm.wait_exit(BOOT).success());
    let output = vm.output();
    assert!(output.contains("/mnt/content: OK"), "{output}");
    // The kernel gives the serial number without a newline.
    assert!(printed(&output, "SERIAL").starts_with("holdfast-1"), "{output}");
    let in_guest = printed(&output, "DATA-SHA256");
    assert_eq!(printed(&output, "COPY-SHA256")[..64], in_guest[..64]);
    // What the guest wrote is what the host finds, in a file system without errors.
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(&image));
    let data = dir.path().join("data");
    run(Command::new("debugfs").arg("-R").arg(format!("dump /data {}", data.display())).arg(&image));
    assert_eq!(run(Command::new("sha256sum").arg(&data))[..64], in_guest[..64]);
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
fn a_read_only_disk_cannot_be_written() {
    let dir = tempfile::tempdir().expect("directory");
    let image = ext4_image(dir.path());
    let before = run(Command::new("sha256sum").arg(&image));
    let mut args = riscv64_args(1, "disk");
    args.extend(["--disk".to_owned(), format!("path={},readonly=on", image.display())]);
    let mut vm = Program::run(&args);
    vm.wait_for("GUEST-TEST-EXIT", BOOT);
    vm.wait_exit(BOOT);
    assert!(!vm.output().contains("DATA-SHA256"), "{}", vm.output());
    assert_eq!(run(Command::new("sha256sum").arg(&image)), before);
}

/// Serves one GET with `content`.
fn serve_once(listener: TcpListener, content: Vec<u8>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the guest connects");
        let mut request = [0; 1024];
        let n = stream.read(&mut request).expect("a request");
        assert!(request[..n].starts_with(b"GET /file "));
        let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", content.len());
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&content)).expect("the guest reads");
    })
}

#[test]
fn a_network_card_carries_traffic_with_the_host() {
    let dir = tempfile::tempdir().expect("directory");
    let content: Vec<u8> = (0..4_000_000u32).map(|i| (i.wrapping_mul(2_246_822_519) >> 13) as u8).collect();
    std::fs::write(dir.path().join("file"), &content).expect("file");
    let sum = run(Command::new("sha256sum").arg(dir.path().join("file")));
    let tap = "hftap-test0";
    let mut args = riscv64_args(2, "net");
    let net = format!("tap={tap},ip=192.168.77.1,mask=255.255.255.0,mac=52:54:00:12:34:56,mtu=1400");
    args.extend(["--net".to_owned(), net]);
    let mut vm = Program::run(&args);
    vm.wait_for("OpenSBI", BOOT);
    let listener = TcpListener::bind("192.168.77.1:8377").expect("the tap has its address");
    let server = serve_once(listener, content);
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    server.join().expect("the file was served");
    let output = vm.output();
    assert!(output.contains("3 packets received") || output.contains("0% packet loss"), "{output}");
    assert_eq!(printed(&output, "FILE-SHA256")[..64], sum[..64]);
    assert_eq!(printed(&output, "MAC"), "52:54:00:12:34:56");
    assert_eq!(printed(&output, "MTU"), "1400");
    assert!(vm.wait_exit(BOOT).success());
}

#[test]
fn the_entropy_source_serves_hwrng() {
    let mut vm = Program::run(&riscv64_args(1, "rng"));
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    let output = vm.output();
    assert!(printed(&output, "RNG").starts_with("virtio_rng"), "{output}");
    assert!(output.lines().any(|l| l.trim() == "64"), "{output}");
    vm.wait_exit(BOOT);
}
