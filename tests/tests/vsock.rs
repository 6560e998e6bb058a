//! Debian's vsock driver against our device, with processes of the host on its UNIX sockets: socat, and this test.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use holdfast_tests::back_ends::shared_ram;
use holdfast_tests::devices::{run, sha256};
use holdfast_tests::http::Api;
use holdfast_tests::shell::{BOOT, Guest};
use holdfast_tests::{Program, add_archive, riscv64_args, socat_archive};
use serde_json::{Value, json};

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

/// One line of an answer.
fn line(stream: &mut impl Read) -> String {
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("an answer");
        answer.extend(byte);
    }
    String::from_utf8_lossy(&answer).into_owned()
}

/// Connects to a port of the guest as Firecracker's and Cloud Hypervisor's users do.
fn connect(socket: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("the VM listens");
    stream.set_read_timeout(Some(Duration::from_secs(240))).expect("a timeout");
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).expect("written");
    let answer = line(&mut stream);
    assert!(answer.starts_with("OK "), "{answer}");
    stream
}

/// A guest with these arguments more, a disk with [`tools`] and perhaps Debian's socat.
fn boot(dir: &Path, more: &[String], with_socat: bool) -> Guest {
    let image = tools(dir);
    let mut args = riscv64_args(2, "");
    args.extend(["--disk".to_owned(), format!("path={},image_type=raw,readonly=on", image.display())]);
    shared_ram(&mut args);
    if with_socat {
        add_archive(&mut args, &socat_archive(), dir);
    }
    args.extend_from_slice(more);
    let mut guest = Guest::boot(&args);
    guest.run("mount -o ro /dev/vda /mnt && dd if=/dev/urandom of=/tmp/a bs=64k count=48 2>/dev/null");
    guest
}

/// The guest sends a file by `command` to port 5000, where socat takes it.
fn send(guest: &mut Guest, dir: &Path, command: &str) {
    let (out, port) = (dir.join("out"), dir.join("v_5000"));
    let _ = std::fs::remove_file(&out);
    let mut socat = Command::new("socat");
    socat.args(["-u", &format!("UNIX-LISTEN:{}", port.display()), &format!("CREATE:{}", out.display())]);
    let mut socat = socat.stdin(Stdio::null()).spawn().expect("socat");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !port.exists() {
        assert!(Instant::now() < deadline, "socat does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    let sums = guest.run(&format!("{command} </tmp/a; sha256sum </tmp/a"));
    assert!(socat.wait().expect("ends").success());
    assert!(sums.contains(&sha256(&out)), "{sums}");
}

/// What is more than the buffers hold at once.
fn much() -> Vec<u8> {
    (0..750_000u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

/// A guest with these arguments more, whose sockets are at `dir/v`.
fn conversation(dir: &Path, more: &[String]) -> Guest {
    let mut guest = boot(dir, more, false);
    let nobody = guest.run("echo x | /mnt/vsock connect 5000 2>&1");
    assert!(nobody.contains("reset"), "{nobody}");
    send(&mut guest, dir, "/mnt/vsock connect 5000");
    // Host to guest and back.
    guest.start("/mnt/vsock echo 1234");
    guest.vm.wait_for("LISTENS", BOOT);
    let mut stream = connect(&dir.join("v"), 1234);
    let mut writer = stream.try_clone().expect("a descriptor");
    let sent = much();
    let copy = sent.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&copy).and_then(|()| writer.shutdown(std::net::Shutdown::Write)).expect("written");
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).expect("all comes back");
    writing.join().expect("written");
    assert!(back == sent, "{} of {} bytes", back.len(), sent.len());
    guest.finish();
    guest
}

/// Runs socat in the guest, which listens on `port` and gives back what it hears, and one here that is to say `sent`.
/// Neither side's end is the other's before all is back: vhost-device-vsock knows no half-closed streams. Nor do both
/// directions fill up: while it has something to read it writes nothing that had to wait.
fn socats(guest: &mut Guest, dir: &Path, port: u32, sent: &[u8]) {
    let from = guest.vm.output().len();
    guest.start(&format!("/usr/bin/socat -d -d VSOCK-LISTEN:{port} PIPE 2>&1"));
    guest.vm.wait_for_after("listening on", from, BOOT);
    let mut socat = Command::new("socat");
    socat.args(["-", &format!("UNIX-CONNECT:{}", dir.join("v").display())]);
    let mut socat = socat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("socat");
    let (mut writer, mut reader) =
        (socat.stdin.take().expect("its input"), socat.stdout.take().expect("its output"));
    writer.write_all(format!("CONNECT {port}\n").as_bytes()).expect("written");
    assert!(line(&mut reader).starts_with("OK "), "a connection");
    for part in sent.chunks(16 << 10) {
        writer.write_all(part).expect("written");
        let mut back = vec![0; part.len()];
        reader.read_exact(&mut back).expect("all comes back");
        assert!(back == part, "other bytes come back");
    }
    drop(writer);
    assert!(socat.wait().expect("ends").success());
    guest.finish();
}

#[test]
fn guest_and_host_connect_to_each_other() {
    let dir = tempfile::tempdir().expect("directory");
    let socket = dir.path().join("v");
    let vsock = ["--vsock".to_owned(), format!("cid=42,socket={}", socket.display())];
    conversation(dir.path(), &vsock).power_off();
    assert!(!socket.exists(), "the socket goes with the VM");
}

#[test]
fn vhost_device_vsock_connects_them_and_may_be_killed() {
    let dir = tempfile::tempdir().expect("directory");
    let (uds, socket) = (dir.path().join("v"), dir.path().join("back-end"));
    let program = holdfast_tests::back_ends_of_others().join("vhost-device-vsock");
    let start = || {
        for left in [&uds, &socket] {
            let _ = std::fs::remove_file(left);
        }
        let vm = format!("guest-cid=42,uds-path={},socket={}", uds.display(), socket.display());
        let child = Command::new(&program).args(["--vm", &vm]).spawn().expect("vhost-device-vsock");
        let deadline = Instant::now() + Duration::from_secs(60);
        while !socket.exists() || !uds.exists() {
            assert!(Instant::now() < deadline, "it does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        child
    };
    let mut first = start();
    let wrong = format!("cid=41,vhost_user=on,socket={}", socket.display());
    let mut args = riscv64_args(1, "");
    shared_ram(&mut args);
    args.extend(["--vsock".to_owned(), wrong]);
    let mut refused = Program::run(&args);
    assert!(!refused.wait_exit(BOOT).success());
    assert!(refused.output().contains("was started for cid 42"), "{}", refused.output());
    let vsock = ["--vsock".to_owned(), format!("cid=42,vhost_user=on,socket={}", socket.display())];
    let mut guest = boot(dir.path(), &vsock, true);
    // It lets the guest find out by itself that nobody is there.
    let nobody = guest.run("echo x | /usr/bin/socat -u STDIN VSOCK-CONNECT:2:5000 2>&1");
    assert!(nobody.contains("reset") || nobody.contains("timed out"), "{nobody}");
    send(&mut guest, dir.path(), "/usr/bin/socat -u STDIN VSOCK-CONNECT:2:5000");
    socats(&mut guest, dir.path(), 1234, &much());
    let stream = greeted(&mut guest, &uds, 1001);
    first.kill().and_then(|()| first.wait()).expect("killed");
    let mut second = start();
    let lost = guest.finish();
    assert!(is_lost(&lost), "{lost}");
    drop(stream);
    drop(greeted(&mut guest, &uds, 1002));
    guest.finish();
    guest.power_off();
    second.kill().and_then(|()| second.wait()).expect("killed");
}

/// What a program hears of a reset: the first where it was waiting, the second where it only asks after it.
fn is_lost(said: &str) -> bool {
    ["Connection reset by peer", "Transport endpoint is not connected"].iter().any(|text| said.contains(text))
}

/// Starts the guest's echo and says something on a connection to it.
fn greeted(guest: &mut Guest, socket: &Path, port: u32) -> UnixStream {
    let from = guest.vm.output().len();
    guest.start(&format!("/mnt/vsock echo {port} 2>&1"));
    guest.vm.wait_for_after("LISTENS", from, BOOT);
    let mut stream = connect(socket, port);
    stream.write_all(b"hello").expect("written");
    let mut back = [0; 5];
    stream.read_exact(&mut back).expect("an echo");
    assert_eq!(&back, b"hello");
    stream
}

#[test]
fn sockets_come_and_go_and_a_restored_guest_hears_that_its_connections_are_lost() {
    let dir = tempfile::tempdir().expect("directory");
    let (socket, image, saved) = (dir.path().join("v"), tools(dir.path()), dir.path().join("saved"));
    std::fs::create_dir(&saved).expect("directory");
    let url = format!("file://{}", saved.display());
    let mut args = riscv64_args(2, "");
    let machine = args.iter_mut().find(|arg| *arg == "virt").expect("the machine");
    *machine = "virt,hotplug_ports=1".to_owned();
    args.extend(["--disk".to_owned(), format!("path={},image_type=raw,readonly=on", image.display())]);
    args.extend(["--api-socket".to_owned(), dir.path().join("a").display().to_string()]);
    let mut guest = Guest::boot(&args);
    let api = Api::connect(&dir.path().join("a"));
    guest.run("mount -o ro /dev/vda /mnt");
    let vsock = json!({ "cid": 42, "socket": socket, "id": "v" });
    let add = |guest: &mut Guest| {
        let added = api.request("PUT", "vm.add-vsock", &vsock);
        assert_eq!(added.status, 200, "{added:?}");
        // Debian's riscv64 kernel has no driver for hot-plug ports.
        guest.run("until ls /sys/bus/virtio/drivers/vmw_vsock_virtio_transport | grep -q virtio; do echo 1 >/sys/bus/pci/rescan; sleep 0.2; done");
    };
    add(&mut guest);
    drop(greeted(&mut guest, &socket, 1000));
    guest.finish();
    guest.run("for d in /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio*; do echo 1 >$(readlink -f $d)/../remove; done");
    api.put("vm.remove-device", &json!({ "id": "v" }));
    assert!(!socket.exists(), "the socket goes with the device");
    add(&mut guest);
    let stream = greeted(&mut guest, &socket, 1001);
    api.put("vm.pause", &Value::Null);
    api.put("vm.snapshot", &json!({ "destination_url": url }));
    guest.vm.kill();
    drop(stream);
    let restored = Program::run(&["--api-socket", dir.path().join("b").to_str().expect("UTF-8")]);
    let api = Api::connect(&dir.path().join("b"));
    api.put("vm.restore", &json!({ "source_url": url }));
    api.put("vm.resume", &Value::Null);
    let mut guest = guest.moved(restored);
    // What the echo reads from the connection that is lost.
    let lost = guest.finish();
    assert!(is_lost(&lost), "{lost}");
    drop(greeted(&mut guest, &socket, 1002));
    guest.finish();
    guest.power_off();
}
