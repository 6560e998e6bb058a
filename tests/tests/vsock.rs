//! Debian's vsock driver against our device, with processes of the host on its UNIX sockets: socat, and this test.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use holdfast_tests::devices::{run, sha256};
use holdfast_tests::riscv64_args;
use holdfast_tests::shell::Guest;

/// A disk with the guest's side of the conversation.
fn tools(dir: &Path) -> std::path::PathBuf {
    let (tree, image) = (dir.join("tree"), dir.join("tools.img"));
    std::fs::create_dir(&tree).expect("directory");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests/vsock.c");
    run(Command::new("riscv64-linux-gnu-gcc")
        .args(["-static", "-O2", "-o"])
        .arg(tree.join("vsock"))
        .arg(source));
    run(Command::new("mkfs.ext4").args(["-q", "-d"]).arg(&tree).arg(&image).arg("16M"));
    image
}

/// Connects to a port of the guest as Firecracker's and Cloud Hypervisor's users do.
fn connect(socket: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("the VM listens");
    stream.set_read_timeout(Some(Duration::from_secs(240))).expect("a timeout");
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).expect("written");
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("an answer");
        answer.extend(byte);
    }
    assert!(answer.starts_with(b"OK "), "{}", String::from_utf8_lossy(&answer));
    stream
}

#[test]
fn guest_and_host_connect_to_each_other() {
    let dir = tempfile::tempdir().expect("directory");
    let (socket, image) = (dir.path().join("v"), tools(dir.path()));
    let mut args = riscv64_args(2, "");
    args.extend(["--disk".to_owned(), format!("path={},image_type=raw,readonly=on", image.display())]);
    args.extend(["--vsock".to_owned(), format!("cid=42,socket={}", socket.display())]);
    let mut guest = Guest::boot(&args);
    guest.run("mount -o ro /dev/vda /mnt && dd if=/dev/urandom of=/tmp/a bs=64k count=48 2>/dev/null");
    assert!(guest.run("echo x | /mnt/vsock connect 5000 2>&1").contains("reset"), "nobody listens there");
    // Guest to host: socat takes a file.
    let (out, port) = (dir.path().join("out"), dir.path().join("v_5000"));
    let mut socat = Command::new("socat");
    socat.args(["-u", &format!("UNIX-LISTEN:{}", port.display()), &format!("CREATE:{}", out.display())]);
    let mut socat = socat.stdin(Stdio::null()).spawn().expect("socat");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !port.exists() {
        assert!(Instant::now() < deadline, "socat does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    let sums = guest.run("/mnt/vsock connect 5000 </tmp/a; sha256sum </tmp/a");
    assert!(socat.wait().expect("ends").success());
    assert!(sums.contains(&sha256(&out)), "{sums}");
    // Host to guest and back, more than the buffers hold at once.
    guest.start("/mnt/vsock echo 1234");
    guest.vm.wait_for("LISTENS", holdfast_tests::shell::BOOT);
    let mut stream = connect(&socket, 1234);
    let mut writer = stream.try_clone().expect("a descriptor");
    let sent: Vec<u8> = (0..750_000u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let copy = sent.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&copy).and_then(|()| writer.shutdown(std::net::Shutdown::Write)).expect("written");
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).expect("all comes back");
    writing.join().expect("written");
    assert!(back == sent, "{} of {} bytes", back.len(), sent.len());
    guest.finish();
    guest.power_off();
    assert!(!socket.exists(), "the socket goes with the VM");
}
