//! Debian's vsock driver against our device, with processes of the host on its UNIX sockets: socat, and this test.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use holdfast_tests::back_ends::shared_ram;
use holdfast_tests::devices::{run, sha256};
use holdfast_tests::http::Api;
use holdfast_tests::shell::Guest;
use holdfast_tests::{Program, riscv64_args};
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

/// A guest with these arguments more, whose sockets are at `dir/v`.
fn conversation(dir: &Path, more: &[String]) -> Guest {
    let (socket, image) = (dir.join("v"), tools(dir));
    let mut args = riscv64_args(2, "");
    args.extend(["--disk".to_owned(), format!("path={},image_type=raw,readonly=on", image.display())]);
    shared_ram(&mut args);
    args.extend_from_slice(more);
    let mut guest = Guest::boot(&args);
    guest.run("mount -o ro /dev/vda /mnt && dd if=/dev/urandom of=/tmp/a bs=64k count=48 2>/dev/null");
    let nobody = guest.run("echo x | /mnt/vsock connect 5000 2>&1");
    // vhost-device-vsock lets the guest find out by itself.
    assert!(nobody.contains("reset") || nobody.contains("timed out"), "{nobody}");
    // Guest to host: socat takes a file.
    let (out, port) = (dir.join("out"), dir.join("v_5000"));
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
    guest
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
#[ignore = "builds vhost-device-vsock, which takes minutes"]
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
    assert!(!refused.wait_exit(holdfast_tests::shell::BOOT).success());
    assert!(refused.output().contains("was started for cid 42"), "{}", refused.output());
    let vsock = ["--vsock".to_owned(), format!("cid=42,vhost_user=on,socket={}", socket.display())];
    let mut guest = conversation(dir.path(), &vsock);
    let stream = greeted(&mut guest, &uds, 1001);
    first.kill().and_then(|()| first.wait()).expect("killed");
    let mut second = start();
    let lost = guest.finish();
    assert!(lost.contains("Connection reset by peer"), "{lost}");
    drop(stream);
    drop(greeted(&mut guest, &uds, 1002));
    guest.finish();
    guest.power_off();
    second.kill().and_then(|()| second.wait()).expect("killed");
}

/// Starts the guest's echo and says something on a connection to it.
fn greeted(guest: &mut Guest, socket: &Path, port: u32) -> UnixStream {
    let from = guest.vm.output().len();
    guest.start(&format!("/mnt/vsock echo {port} 2>&1"));
    guest.vm.wait_for_after("LISTENS", from, holdfast_tests::shell::BOOT);
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
    assert!(lost.contains("Connection reset by peer"), "{lost}");
    drop(greeted(&mut guest, &socket, 1002));
    guest.finish();
    guest.power_off();
}
