//! A Linux kernel on KVM, with its own drivers for disk, network, console and entropy on virtio-pci, two vCPUs,
//! switched off through ACPI; and the same guest moved to another process in the middle.
//!
//! The kernel is Debian's where processors have virtualisation. Where KVM interprets, stock kernels do not run: there
//! it comes from `HOLDFAST_KVM_GUEST_DIR`, which holds `vmlinux.xz`. Without that variable there, or with
//! `HOLDFAST_NO_KVM=1`, the tests on KVM have nothing to do and say so.
//! They need root for the tap, and busybox-static for the guest.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use holdfast_tests::counter::{Console, Count, vmm};
use holdfast_tests::devices::{ext4_image, run};
use holdfast_tests::{Program, printed, x86_64_guest};
use serde_json::{Value, json};

/// On an interpreting KVM the kernel alone takes 40 seconds of processor time.
const BOOT: Duration = Duration::from_secs(600);

/// One such guest at a time is enough for any host.
static ONE: Mutex<()> = Mutex::new(());

/// The kernel to test with.
enum Guest {
    /// One with built-in drivers that interpreting KVMs get through, in this directory.
    Small(PathBuf),
    /// Debian's, in this directory.
    Debian(PathBuf),
}

/// What KVM can run here, if it can run anything.
fn guest() -> Option<Guest> {
    if std::env::var_os("HOLDFAST_NO_KVM").is_some_and(|v| v == "1") {
        eprintln!("skipped: needs /dev/kvm, and HOLDFAST_NO_KVM=1 says that there is none");
        return None;
    }
    let cpus = std::fs::read_to_string("/proc/cpuinfo").expect("processors");
    if cpus.split_whitespace().any(|word| matches!(word, "vmx" | "svm")) {
        return Some(Guest::Debian(x86_64_guest()));
    }
    let dir = std::env::var_os("HOLDFAST_KVM_GUEST_DIR");
    if dir.is_none() {
        eprintln!(
            "skipped: KVM interprets here, and HOLDFAST_KVM_GUEST_DIR names no kernel that gets through it"
        );
    }
    dir.map(|dir| Guest::Small(dir.into()))
}

/// The kernel and an initramfs: (kernel, initramfs).
fn payload(guest: &Guest, dir: &Path) -> (PathBuf, PathBuf) {
    let initramfs = dir.join("initramfs.cpio");
    let kernel = match guest {
        Guest::Small(from) => {
            let kernel = dir.join("vmlinux");
            let unpacked = Command::new("xz").arg("-dc").arg(from.join("vmlinux.xz")).output();
            let unpacked = unpacked.expect("xz runs");
            assert!(unpacked.status.success(), "the kernel does not unpack");
            std::fs::write(&kernel, unpacked.stdout).expect("kernel");
            kernel
        }
        Guest::Debian(from) => {
            // Its modules; what follows in the archive replaces its first program.
            std::fs::copy(from.join("initramfs.cpio"), &initramfs).expect("initramfs");
            from.join("vmlinuz")
        }
    };
    let root = dir.join("root");
    for sub in ["bin", "dev", "mnt", "proc", "sys", "tmp"] {
        std::fs::create_dir_all(root.join(sub)).expect("directory");
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|p| Path::new(p).exists());
    std::fs::copy(busybox.expect("busybox-static is installed"), root.join("bin/busybox")).expect("busybox");
    let init = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests/init-kvm");
    std::fs::copy(init, root.join("init")).expect("init");
    // Not compressed: unpacking would run in the guest.
    let pack = format!("find . | cpio -o -H newc -R 0:0 --quiet >>{}", initramfs.display());
    run(Command::new("sh").args(["-c", &pack]).current_dir(&root));
    (kernel, initramfs)
}

fn cmdline(test: &str) -> String {
    // The guest kernel of interpreting KVMs saves no AVX state, and such KVMs cannot set the time-stamp counter.
    format!(
        "console=ttyS0 panic=-1 quiet clocksource=kvm-clock holdfast.test={test} \
         GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2"
    )
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
fn needs_kvm_linux_drives_disk_network_console_and_entropy_with_two_vcpus() {
    if let Some(guest) = guest() {
        drives_devices(&guest, "kvm");
    }
}

/// The same with the kernel that hosts with virtualisation in hardware test with, wherever there is none.
#[test]
fn debians_linux_passes_the_same_test_under_translation() {
    drives_devices(&Guest::Debian(x86_64_guest()), "tcg");
}

fn drives_devices(guest: &Guest, accel: &str) {
    let _one = ONE.lock();
    let dir = tempfile::tempdir().expect("directory");
    let (kernel, initramfs) = payload(guest, dir.path());
    let image = ext4_image(dir.path(), 70_000);
    let content: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(2_246_822_519) >> 13) as u8).collect();
    std::fs::write(dir.path().join("file"), &content).expect("file");
    let sum = run(Command::new("sha256sum").arg(dir.path().join("file")));
    let console = dir.path().join("hvc0");
    let path = |p: &Path| p.to_str().expect("UTF-8").to_owned();
    let args = [
        ["--machine", "type=q35"].map(str::to_owned),
        ["--accel", accel].map(str::to_owned),
        ["--cpus", "boot=2"].map(str::to_owned),
        ["--memory", "size=256M"].map(str::to_owned),
        ["--kernel".to_owned(), path(&kernel)],
        ["--initramfs".to_owned(), path(&initramfs)],
        ["--cmdline".to_owned(), cmdline("devices")],
        ["--disk".to_owned(), format!("path={}", path(&image))],
        ["--net".to_owned(), "tap=hftap-kvm0,ip=192.168.78.1,mask=255.255.255.0".to_owned()],
        ["--rng", "src=/dev/urandom"].map(str::to_owned),
        ["--serial", "tty"].map(str::to_owned),
        ["--console".to_owned(), format!("file={}", path(&console))],
    ];
    let mut vm = Program::run(args.as_flattened());
    vm.wait_for("BOOTED 2 cpu", BOOT);
    let listener = TcpListener::bind("192.168.78.1:8378").expect("the tap has its address");
    let server = serve_once(listener, content);
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    assert!(vm.wait_exit(BOOT).success(), "{}", vm.output());
    server.join().expect("the file was served");
    let output = vm.output();
    assert!(printed(&output, "RNG ").starts_with("virtio_rng"), "{output}");
    assert_eq!(printed(&output, "RNG-BYTES"), "64");
    assert!(output.contains("/mnt/content: OK"), "{output}");
    assert!(output.contains("3 packets received") || output.contains(" 0% packet loss"), "{output}");
    assert_eq!(printed(&output, "FILE-SHA256")[..64], sum[..64]);
    assert!(std::fs::read_to_string(&console).expect("console").contains("hello from hvc0"));
    // What the guest wrote is what the host finds, in a file system without errors.
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(&image));
    let data = dir.path().join("data");
    run(Command::new("debugfs").arg("-R").arg(format!("dump /data {}", data.display())).arg(&image));
    assert_eq!(run(Command::new("sha256sum").arg(&data))[..64], printed(&output, "DATA-SHA256")[..64]);
}

/// Takes out of a snapshot what the guest was shown by CPUID. An interpreting KVM says that it lacks what every CPU
/// model has, so nothing would be let in, and shows its guests the hardware's features all the same.
fn forget_cpuid(saved: &Path) {
    let file = saved.join("state.json");
    let mut state: Value =
        serde_json::from_slice(&std::fs::read(&file).expect("the state")).expect("the state is JSON");
    for vcpu in state["vcpus"].as_array_mut().expect("vCPUs") {
        let shown = vcpu.as_object_mut().and_then(|vcpu| vcpu.remove("cpuid"));
        assert!(shown.is_some(), "the state says what the guest was shown");
    }
    std::fs::write(&file, state.to_string()).expect("the state");
}

/// Linux counts on accelerator `from`, is saved, and goes on counting on `to` in another process.
fn moves(from: &str, to: &str, profile: Option<&str>, options: &str) {
    let Some(guest) = guest() else { return };
    let _one = ONE.lock();
    let dir = tempfile::tempdir().expect("directory");
    let (kernel, initramfs) = payload(&guest, dir.path());
    let (saved, disk) = (dir.path().join("saved"), dir.path().join("disk"));
    let mut console = Console::new(dir.path().join("console"));
    std::fs::create_dir(&saved).expect("directory");
    std::fs::write(&disk, vec![0; 1 << 20]).expect("disk");
    let url = format!("file://{}", saved.display());
    let config = json!({
        "arch": "x86_64",
        "accel": from,
        "cpus": { "boot_vcpus": 2, "max_vcpus": 2, "profile": profile },
        "memory": { "size": 256u64 << 20 },
        "payload": { "kernel": kernel, "initramfs": initramfs, "cmdline": format!("{} {options}", cmdline("counter")) },
        "disks": [{ "path": disk }],
        "serial": { "mode": "File", "file": console.file() },
        "console": { "mode": "Off" },
    });
    let (mut first, api) = vmm(dir.path());
    api.put("vm.create", &config);
    api.put("vm.boot", &Value::Null);
    console.wait_for(&first, "COUNT 5 ", BOOT);
    let mut running = Instant::now();
    api.put("vm.pause", &Value::Null);
    let mut ran = running.elapsed();
    api.put("vm.snapshot", &json!({ "destination_url": url }));
    // The guest may have been paused in the middle of a line, whose end is for the next process to write.
    let before = Count::all(&console.text());
    first.kill();
    console.is_begun_anew();

    let flags = std::fs::read_to_string("/proc/cpuinfo").expect("/proc/cpuinfo");
    if from == "tcg" && to == "kvm" && !flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm")) {
        forget_cpuid(&saved);
    }
    std::fs::remove_file(dir.path().join("api")).expect("the dead process's socket");
    let (second, api) = vmm(dir.path());
    std::thread::sleep(Duration::from_secs(4));
    let restored = api.request("PUT", "vm.restore", &json!({ "source_url": url, "accel": to }));
    if from == "tcg"
        && restored.body.contains("its TSC runs at")
        && restored.body.contains("cannot be scaled")
    {
        // Said by name, and right: the guest would see its time-stamp counter run at another rate.
        eprintln!("refused, since this KVM cannot scale the time-stamp counter");
        api.put("vmm.shutdown", &Value::Null);
        return;
    }
    assert!((200..300).contains(&restored.status), "{restored:?}");
    running = Instant::now();
    api.put("vm.resume", &Value::Null);
    let last = before.last().expect("it counted");
    console.wait_for(&second, &format!("COUNT {} ", last.number + 1), BOOT);
    ran += running.elapsed();
    let wanted = format!("COUNT {} ", last.number + 5);
    let mut after = Count::all(&console.wait_for(&second, &wanted, BOOT));
    after.retain(|count| count.number > last.number);
    last.goes_on_with(&after);
    // An interpreter needs most of a second from one line to the next.
    let next = after.first().expect("it goes on");
    last.clock_goes_on(next, ran, Duration::from_secs(3));
    api.put("vm.pause", &Value::Null);
    let disk = std::fs::read_to_string(&disk).expect("disk");
    let on_disk: u64 = disk.split('\n').next().and_then(|n| n.parse().ok()).expect("a number on the disk");
    let counted = last.number;
    assert!(on_disk + 1 >= counted, "{on_disk} on the disk, {counted} counted before the snapshot");
    api.put("vmm.shutdown", &Value::Null);
}

#[test]
fn needs_kvm_a_snapshot_of_linux_goes_on_in_another_process() {
    moves("kvm", "kvm", None, "");
}

/// What a guest has to leave alone to be movable: KVM's paravirtual features, and (since an interpreting KVM cannot set
/// it) the time-stamp counter.
const MOVABLE: &str = "nopv notsc clocksource=acpi_pm";

#[test]
fn needs_kvm_linux_moves_from_translation_to_kvm() {
    moves("tcg", "kvm", Some("qemu64"), MOVABLE);
}

#[test]
fn needs_kvm_linux_moves_from_kvm_to_translation() {
    moves("kvm", "tcg", Some("qemu64"), MOVABLE);
}
