//! Debian's drivers against devices of back ends that others wrote: virtiofsd.
//!
//! Needs root and virtiofsd: of QEMU's packages (bookworm), of its own (later suites), or named by
//! `HOLDFAST_VIRTIOFSD`. And our own back ends under QEMU, and QEMU's storage daemon behind our disk.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use holdfast_tests::back_ends::{BackEnd, Virtiofsd, shared_ram};
use holdfast_tests::devices::{NetPeer, check_disk, ext4_image, run, sha256};
use holdfast_tests::migration::{LIMIT, Vmm};
use holdfast_tests::pc::{SEABIOS, bios_disk, grub_config};
use holdfast_tests::qmp::Qmp;
use holdfast_tests::shell::Guest;
use holdfast_tests::{Program, printed, q35_args, riscv64_args, riscv64_guest, x86_64_args, x86_64_guest};
use serde_json::json;

const BOOT: Duration = Duration::from_secs(240);

fn shared(mut args: Vec<String>) {
    let dir = tempfile::tempdir().expect("directory");
    let share = dir.path().join("share");
    std::fs::create_dir(&share).expect("directory");
    let content: Vec<u8> =
        (0..1_000_000u32).flat_map(|i| (i.wrapping_mul(2_654_435_761) >> 7).to_le_bytes()).collect();
    std::fs::write(share.join("content"), content).expect("file");
    let sums = run(Command::new("sha256sum").arg("content").current_dir(&share));
    std::fs::write(share.join("SUMS"), sums).expect("file");
    let socket = dir.path().join("fs.sock");
    let _back_end = Virtiofsd::share(&share, &socket);
    shared_ram(&mut args);
    args.extend(["--fs".to_owned(), format!("tag=share,socket={}", socket.display())]);
    let output = finished(&mut Program::run(&args));
    assert!(output.contains("content: OK"), "{output}");
    let data = sha256(&share.join("data"));
    for key in ["DATA-SHA256", "AGAIN-1", "AGAIN-2", "AGAIN-3"] {
        assert_eq!(printed(&output, key)[..64], data, "{key}");
    }
    assert_eq!(printed(&output, "MANY"), "100");
    assert!(!share.join("many").exists());
    assert!(printed(&output, "MISSING").contains("No such file"), "{output}");
}

#[test]
fn a_riscv64_guest_shares_a_directory() {
    shared(riscv64_args(2, "fs"));
}

#[test]
fn an_x86_64_guest_shares_a_directory_and_runs_code_from_it() {
    shared(x86_64_args(2, "fs"));
}

/// QEMU with RAM that others can map, with these devices, running a test of the riscv64 guest.
fn qemu(test: &str, devices: &[String]) -> Program {
    let guest = riscv64_guest();
    let mut command = Command::new("qemu-system-riscv64");
    command.args(["-M", "virt", "-m", "512", "-smp", "2", "-nographic", "-no-reboot"]);
    command.args(["-object", "memory-backend-memfd,id=m,size=512M,share=on", "-numa", "node,memdev=m"]);
    command.arg("-kernel").arg(guest.join("Image")).arg("-initrd").arg(guest.join("initramfs.cpio"));
    command.args(["-append", &format!("console=ttyS0 quiet holdfast.test={test}")]).args(devices);
    Program::spawn(command)
}

fn finished(vm: &mut Program) -> String {
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    assert!(vm.wait_exit(BOOT).success());
    vm.output()
}

#[test]
fn qemu_uses_a_disk_of_ours() {
    let dir = tempfile::tempdir().expect("directory");
    let (image, socket) = (ext4_image(dir.path(), 500_000), dir.path().join("s"));
    let _back_end = BackEnd::disk(&image, &socket);
    let options = [
        "-chardev",
        &format!("socket,id=c,path={}", socket.display()),
        "-device",
        "vhost-user-blk-pci,chardev=c,num-queues=2",
    ];
    let output = finished(&mut qemu("disk", &options.map(str::to_owned)));
    check_disk(&output, &image);
}

/// Adds our disk behind `socket`.
fn with_disk(args: &mut Vec<String>, socket: &Path) {
    shared_ram(args);
    args.extend(["--disk".to_owned(), format!("vhost_user=on,socket={},num_queues=2", socket.display())]);
}

#[test]
fn an_x86_64_guest_mounts_a_disk_of_ours() {
    let dir = tempfile::tempdir().expect("directory");
    let (image, socket) = (ext4_image(dir.path(), 500_000), dir.path().join("s"));
    let _back_end = BackEnd::disk(&image, &socket);
    let mut args = x86_64_args(2, "disk");
    with_disk(&mut args, &socket);
    check_disk(&finished(&mut Program::run(&args)), &image);
}

#[test]
fn seabios_and_grub_boot_a_kernel_from_a_disk_of_qemus_daemon() {
    let (dir, guest) = (tempfile::tempdir().expect("directory"), x86_64_guest());
    let commands =
        "linux $prefix/vmlinuz console=ttyS0 quiet holdfast.loader=GRUB holdfast.test=boot,firmware
initrd $prefix/initramfs.cpio
boot
";
    let mut files = vec![("grub.cfg", grub_config(dir.path(), commands))];
    files.extend(["vmlinuz", "initramfs.cpio"].map(|name| (name, guest.join(name))));
    let (image, socket) = (bios_disk(dir.path(), &files), dir.path().join("s"));
    let _back_end = BackEnd::daemon(&image, &socket);
    let mut args = q35_args(2);
    with_disk(&mut args, &socket);
    args.extend(["--firmware", SEABIOS].map(str::to_owned));
    let output = finished(&mut Program::run(&args));
    assert_eq!((printed(&output, "FIRMWARE"), printed(&output, "LOADER")), ("bios".into(), "GRUB".into()));
}

#[test]
fn a_tap_of_ours_serves_our_card() {
    const TAP: &str = "hftapvu0";
    let dir = tempfile::tempdir().expect("directory");
    let (peer, socket) = (NetPeer::new(dir.path(), 300_000), dir.path().join("s"));
    let keys = format!("socket={},tap={TAP},ip=192.168.77.1,mask=255.255.255.0,mtu=1400", socket.display());
    let _back_end = BackEnd::net(&keys, &socket);
    let mut args = riscv64_args(1, "net");
    shared_ram(&mut args);
    let net = format!("vhost_user=on,socket={},mac=52:54:00:12:34:56,mtu=1400", socket.display());
    args.extend(["--net".to_owned(), net]);
    let mut vm = Program::run(&args);
    // The tap is there before the card is.
    vm.wait_for("OpenSBI", BOOT);
    let served = peer.serve();
    let output = finished(&mut vm);
    served.join().expect("served");
    peer.check(&output);
}

#[test]
fn a_tap_of_ours_serves_qemus_card() {
    const TAP: &str = "hftapvu2";
    let dir = tempfile::tempdir().expect("directory");
    let (peer, socket) = (NetPeer::new(dir.path(), 300_000), dir.path().join("s"));
    let keys = format!("socket={},tap={TAP},ip=192.168.77.1,mask=255.255.255.0,mtu=1400", socket.display());
    let _back_end = BackEnd::net(&keys, &socket);
    let options = [
        "-chardev",
        &format!("socket,id=c,path={}", socket.display()),
        "-netdev",
        "vhost-user,id=n,chardev=c",
        "-device",
        // Boot ROMs are a package of their own.
        "virtio-net-pci,netdev=n,mac=52:54:00:12:34:56,host_mtu=1400,romfile=",
    ];
    let mut vm = qemu("net", &options.map(str::to_owned));
    // The tap is there before the card is.
    vm.wait_for("OpenSBI", BOOT);
    let served = peer.serve();
    let output = finished(&mut vm);
    served.join().expect("served");
    peer.check(&output);
}

/// A guest whose disk is killed again and again while it writes; `start` starts the back end.
fn killed(image: &Path, socket: &Path, start: &dyn Fn() -> BackEnd, grow: Option<&dyn Fn()>) {
    let back_end = start();
    let mut args = riscv64_args(2, "");
    with_disk(&mut args, socket);
    let mut guest = Guest::boot(&args);
    let _back_end = written_while_killed(&mut guest, image, back_end, start);
    if let Some(grow) = grow {
        grow();
        guest.wait_for("/sys/block/vda/size", Some("196608"));
    }
    guest.power_off();
}

/// Nothing is lost that `guest` writes while its back end is killed; returns the last one.
fn written_while_killed(
    guest: &mut Guest,
    image: &Path,
    mut back_end: BackEnd,
    start: &dyn Fn() -> BackEnd,
) -> BackEnd {
    guest.run("dd if=/dev/urandom of=/tmp/a bs=64k count=16 2>/dev/null");
    guest.start("for i in $(seq 0 39); do dd if=/tmp/a of=/dev/vda bs=64k seek=$((i * 16)) conv=notrunc,fsync 2>/dev/null; done");
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(700));
        drop(back_end);
        back_end = start();
    }
    guest.finish();
    let sums = guest.run("echo 3 >/proc/sys/vm/drop_caches; for i in $(seq 0 39); do dd if=/dev/vda bs=1M skip=$i count=1 2>/dev/null | sha256sum; done | sort -u | wc -l; sha256sum </tmp/a");
    assert!(sums.lines().any(|line| line.trim() == "1"), "{sums}");
    let bytes = std::fs::read(image).expect("the image");
    assert!(bytes[..40 << 20].chunks(1 << 20).all(|part| *part == bytes[..1 << 20]), "all parts are alike");
    back_end
}

#[test]
fn a_disk_of_ours_that_is_killed_under_qemu_goes_on_where_it_was() {
    let dir = tempfile::tempdir().expect("directory");
    let (image, socket) = (empty_image(dir.path()), dir.path().join("s"));
    let start = || BackEnd::disk(&image, &socket);
    let back_end = start();
    let options = [
        "-chardev",
        &format!("socket,id=c,path={},reconnect=1", socket.display()),
        "-device",
        "vhost-user-blk-pci,chardev=c,num-queues=2",
    ];
    let mut guest = Guest::of(qemu("", &options.map(str::to_owned)));
    let _back_end = written_while_killed(&mut guest, &image, back_end, &start);
    guest.power_off();
}

fn empty_image(dir: &Path) -> PathBuf {
    let image = dir.join("image");
    std::fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("file");
    image
}

#[test]
fn a_disk_of_qemus_daemon_that_is_killed_comes_again() {
    let dir = tempfile::tempdir().expect("directory");
    let (image, socket) = (empty_image(dir.path()), dir.path().join("s"));
    let start = || BackEnd::daemon(&image, &socket);
    // Before QEMU 8.1 it says nothing of new sizes.
    killed(&image, &socket, &start, None);
}

#[test]
fn a_disk_of_ours_that_is_killed_comes_again_and_grows() {
    let dir = tempfile::tempdir().expect("directory");
    let (image, socket) = (empty_image(dir.path()), dir.path().join("s"));
    let last = std::cell::Cell::new(0);
    let start = || {
        let back_end = BackEnd::disk(&image, &socket);
        last.set(back_end.pid());
        back_end
    };
    let grow = || {
        std::fs::File::options()
            .write(true)
            .open(&image)
            .and_then(|file| file.set_len(96 << 20))
            .expect("grows");
        run(Command::new("kill").args(["-HUP", &last.get().to_string()]));
    };
    killed(&image, &socket, &start, Some(&grow));
}

/// A disk of 24 MiB of bytes that nobody guesses.
fn random_image(dir: &Path, name: &str) -> PathBuf {
    let (image, mut bytes) = (dir.join(name), Vec::new());
    let random = std::fs::File::open("/dev/urandom").expect("the host has it");
    std::io::Read::read_to_end(&mut std::io::Read::take(random, 24 << 20), &mut bytes).expect("read");
    std::fs::write(&image, bytes).expect("written");
    image
}

/// Waits until pass `number` over RAM is over, or nothing was left to send: until it is told to go the guest runs here in
/// either case, and what it writes is noted. Returns the number of the pass under way.
fn passed(qmp: &mut Qmp, number: u64) -> u64 {
    let deadline = Instant::now() + LIMIT;
    loop {
        let info = qmp.ok("query-migrate", json!({}));
        let passes = info["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
        let status = info["status"].as_str().unwrap_or_default();
        if passes > number || status == "pre-switchover" {
            return passes;
        }
        assert!(matches!(status, "setup" | "active"), "it goes on: {info}");
        assert!(Instant::now() < deadline, "pass {number} is not over: {info}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn pages_that_qemus_daemon_writes_between_passes_arrive() {
    let dir = tempfile::tempdir().expect("directory");
    let at = |name: &str| dir.path().join(name);
    // The other host's disk has other contents: what the guest reads of this one there, it has brought along in RAM.
    let images = ["here", "there"].map(|name| random_image(dir.path(), name));
    let sums = images.each_ref().map(|image| sha256(image));
    let first = BackEnd::daemon(&images[0], &at("s"));
    let mut args = riscv64_args(2, "");
    with_disk(&mut args, &at("s"));
    // The kernel would write zeroes to each page before the back end is told of it.
    args.iter_mut()
        .filter(|arg| arg.starts_with("console="))
        .for_each(|arg| arg.push_str(" init_on_alloc=0"));
    args.extend(["--qmp".to_owned(), format!("unix:{}", at("qmp").display())]);
    let mut guest = Guest::boot(&args);
    let mut qmp = Qmp::connect(&at("qmp"));
    let dirt = "while :; do dd if=/dev/zero of=/tmp/dirt bs=64k count=128 conv=notrunc 2>/dev/null; done";
    // While one has it open the kernel keeps what was read.
    guest.run(&format!("exec 3</dev/vda; ({dirt}) & echo $! >/tmp/dirtier"));
    let _second = BackEnd::daemon(&images[1], &at("t"));
    std::fs::rename(at("t"), at("s")).expect("renamed");
    let target = Vmm::start(dir.path(), "b", &[]);
    let uri = format!("unix:{}", at("m").display());
    let received = target.receive(json!({ "receiver_url": uri }));
    // On a host that lets the guest run there is always something left to send; on another one it waits to be told to go.
    let wait = json!([{ "capability": "pause-before-switchover", "state": true }]);
    qmp.ok("migrate-set-capabilities", json!({ "capabilities": wait }));
    qmp.ok("migrate-set-parameters", json!({ "max-bandwidth": 32 << 20, "downtime-limit": 0 }));
    qmp.ok("migrate", json!({ "uri": uri }));
    passed(&mut qmp, 2);
    let read = guest.run("grep pgpgin /proc/vmstat; cat /dev/vda >/dev/null; grep pgpgin /proc/vmstat");
    let kib: Vec<u64> = read.lines().filter_map(|l| l.trim().strip_prefix("pgpgin ")?.parse().ok()).collect();
    assert!(matches!(kib[..], [before, after] if after - before > 20 << 10), "nothing was cached: {read}");
    // A pass that began before that, and a whole one.
    let now = passed(&mut qmp, 0);
    passed(&mut qmp, now + 1);
    qmp.ok("migrate-set-parameters", json!({ "max-bandwidth": 0, "downtime-limit": 60_000 }));
    qmp.until("query-migrate", "status", "pre-switchover");
    qmp.ok("migrate-continue", json!({ "state": "pre-switchover" }));
    assert_eq!(received.join().expect("an answer").status, 204);
    qmp.until("query-migrate", "status", "completed");
    drop(first);
    let mut guest = guest.moved(target.program);
    let seen = guest.run("kill $(cat /tmp/dirtier); sha256sum </dev/vda");
    assert!(seen.contains(&sums[0]), "{} became {seen}", sums[0]);
    // It was not read anew.
    let anew = guest.run("echo 3 >/proc/sys/vm/drop_caches; sha256sum </dev/vda");
    assert!(anew.contains(&sums[1]), "{} became {anew}", sums[1]);
    guest.power_off();
}
