//! What PCs start with, under translation: SeaBIOS with GRUB, OVMF with GRUB, iPXE from a network, memtest86+, and a
//! whole Debian system that the power button ends. Needs root for taps, network namespaces and the system.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use holdfast_tests::devices::run;
use holdfast_tests::http::Api;
use holdfast_tests::pc::{
    SEABIOS, bios_disk, debian_system, efi_disk, grub_config, ovmf, ovmf_variables, pc_parts,
};
use holdfast_tests::{Program, holdfast, printed, q35_args, x86_64_guest, x86_args};
use serde_json::Value;

/// Generous: the test machine may be busy. Nothing is asserted about speed.
const BOOT: Duration = Duration::from_secs(400);
const LINUX: &str =
    "linux $prefix/vmlinuz console=ttyS0 quiet holdfast.loader=GRUB holdfast.test=boot,firmware
initrd $prefix/initramfs.cpio
boot
";

fn kernel_files(config: PathBuf) -> [(&'static str, PathBuf); 3] {
    let guest = x86_64_guest();
    let file = |name: &'static str| (name, guest.join(name));
    [("grub.cfg", config), file("vmlinuz"), file("initramfs.cpio")]
}

fn with(args: &mut Vec<String>, key: &str, value: String) {
    args.extend([key.to_owned(), value]);
}

/// The kernel comes up with `vcpus`, says what started it, and switches the machine off.
fn started_by(vm: &mut Program, vcpus: u32, firmware: &str, loader: &str) {
    // What loaders say themselves comes with cursor movements in the middle.
    vm.wait_for(&format!("x86_64 {vcpus} cpu"), BOOT);
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    assert!(vm.wait_exit(BOOT).success(), "power-off ends the program with success");
    let output = vm.output();
    assert_eq!((printed(&output, "FIRMWARE"), printed(&output, "LOADER")), (firmware.into(), loader.into()));
}

#[test]
fn seabios_and_grub_boot_a_kernel_from_a_disk() {
    let dir = tempfile::tempdir().expect("directory");
    let disk = bios_disk(dir.path(), &kernel_files(grub_config(dir.path(), LINUX)));
    let mut args = q35_args(2);
    with(&mut args, "--firmware", SEABIOS.to_owned());
    with(&mut args, "--disk", format!("path={},image_type=raw", disk.display()));
    let mut vm = Program::run(&args);
    started_by(&mut vm, 2, "bios", "GRUB");
}

#[test]
fn ovmf_and_grub_boot_a_kernel_from_an_efi_system_partition() {
    let dir = tempfile::tempdir().expect("directory");
    let disk = efi_disk(dir.path(), &kernel_files(grub_config(dir.path(), &LINUX.replace("$prefix", ""))));
    let mut args = q35_args(2);
    args.extend(ovmf(dir.path()));
    with(&mut args, "--disk", format!("path={},image_type=raw", disk.display()));
    let mut vm = Program::run(&args);
    started_by(&mut vm, 2, "efi", "GRUB");
    // The variables went to their file: OVMF has made boot entries.
    let name: Vec<u8> = "Boot0000".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let vars = std::fs::read(ovmf_variables(dir.path())).expect("readable");
    assert!(vars.windows(name.len()).any(|w| w == name), "no boot entry was stored");
}

#[test]
fn memtest86_finds_no_error() {
    let mut args = q35_args(2);
    let memory = args.iter_mut().find(|a| *a == "size=512M").expect("there");
    *memory = "size=32M".to_owned();
    with(&mut args, "--kernel", pc_parts().join("memtest86+x64.bin").display().to_string());
    with(&mut args, "--cmdline", "console=ttyS0,115200".to_owned());
    let vm = Program::run(&args);
    // It shows where it is every two seconds. The last test of a pass takes minutes; the ten before it have then ended.
    vm.wait_for("#10 [Bit fade", BOOT);
    let output = vm.output();
    let counts = output.split("Errors:").skip(1).filter_map(|rest| rest.trim_start().split_once(' '));
    let counts: Vec<_> = counts.map(|(count, _)| count).collect();
    assert!(!counts.is_empty() && counts.iter().all(|count| *count == "0"), "{output}");
    assert!(!output.contains("ailed"), "{output}");
}

/// A program that is killed in the end.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// dnsmasq in the network namespace of process `pid`, with leases and files for what boots from `tap`.
fn boot_server(pid: u32, tap: &str, root: &Path) -> Daemon {
    let deadline = Instant::now() + BOOT;
    let seen = || {
        let mut ip = Command::new("nsenter");
        ip.args(["-t", &pid.to_string(), "-n", "ip", "-o", "-4", "addr", "show", "dev", tap]);
        ip.output().is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("192.168.79.1"))
    };
    while !seen() {
        assert!(Instant::now() < deadline, "the tap never came up");
        std::thread::sleep(Duration::from_millis(50));
    }
    let child = Command::new("nsenter")
        .args(["-t", &pid.to_string(), "-n", "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0"])
        .args(["--user=root", "--bind-interfaces", "--dhcp-range=192.168.79.10,192.168.79.20,1h"])
        .args(["--dhcp-boot=boot.ipxe", "--enable-tftp"])
        .arg(format!("--interface={tap}"))
        .arg(format!("--tftp-root={}", root.display()))
        .arg(format!("--dhcp-leasefile={}", root.join("leases").display()))
        .arg(format!("--pid-file={}", root.join("pid").display()))
        .spawn();
    Daemon(child.expect("dnsmasq runs: Debian's dnsmasq-base"))
}

#[test]
fn ipxe_boots_a_kernel_from_the_network() {
    let dir = tempfile::tempdir().expect("directory");
    let root = dir.path().join("tftp");
    std::fs::create_dir(&root).expect("directory");
    let guest = x86_64_guest();
    for name in ["vmlinuz", "initramfs.cpio"] {
        std::fs::copy(guest.join(name), root.join(name)).expect("the guest");
    }
    let script = "#!ipxe\n\
        kernel vmlinuz console=ttyS0 quiet initrd=initramfs.cpio holdfast.loader=iPXE holdfast.test=firmware\n\
        initrd initramfs.cpio\nboot\n";
    std::fs::write(root.join("boot.ipxe"), script).expect("writable");
    // iPXE is a program for the BIOS.
    let config = "linux16 $prefix/ipxe.lkrn\nboot\n";
    let files = [("grub.cfg", grub_config(dir.path(), config)), ("ipxe.lkrn", pc_parts().join("ipxe.lkrn"))];
    let disk = bios_disk(dir.path(), &files);
    let mut args = q35_args(1);
    with(&mut args, "--firmware", SEABIOS.to_owned());
    with(&mut args, "--disk", format!("path={},image_type=raw", disk.display()));
    with(&mut args, "--net", "tap=hftap-pxe,ip=192.168.79.1,mask=255.255.255.0".to_owned());
    // A network of its own: nobody else answers there, and nobody else is answered.
    let mut command = Command::new("unshare");
    command.arg("-n").arg(holdfast()).arg("run").args(&args);
    let mut vm = Program::spawn(command);
    let _server = boot_server(vm.pid(), "hftap-pxe", &root);
    started_by(&mut vm, 1, "bios", "iPXE");
}

/// A disk with a repository of one package, `holdfast-hello`, whose program greets.
fn repository(dir: &Path) -> PathBuf {
    let package = dir.join("package");
    std::fs::create_dir_all(package.join("DEBIAN")).expect("directory");
    std::fs::create_dir_all(package.join("usr/bin")).expect("directory");
    let control = "Package: holdfast-hello\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n\
        Depends: libc6\nDescription: greets\n";
    std::fs::write(package.join("DEBIAN/control"), control).expect("writable");
    let program = package.join("usr/bin/holdfast-hello");
    std::fs::write(&program, "#!/bin/sh\necho GREETING $((6 * 7))\n").expect("writable");
    run(Command::new("chmod").arg("755").arg(&program));
    let tree = dir.join("repository");
    std::fs::create_dir(&tree).expect("directory");
    let file = tree.join("holdfast-hello.deb");
    run(Command::new("dpkg-deb").args(["--root-owner-group", "-b"]).arg(&package).arg(&file));
    let (size, sum) = (file.metadata().expect("there").len(), holdfast_tests::devices::sha256(&file));
    let index = format!("{control}Filename: ./holdfast-hello.deb\nSize: {size}\nSHA256: {sum}\n");
    std::fs::write(tree.join("Packages"), index).expect("writable");
    let image = dir.join("repository.img");
    run(Command::new("mkfs.ext4").args(["-q", "-d"]).arg(&tree).arg(&image).arg("8M"));
    image
}

#[test]
fn a_debian_system_comes_up_installs_a_package_and_obeys_the_power_button() {
    let dir = tempfile::tempdir().expect("directory");
    let root = dir.path().join("root.ext4");
    run(Command::new("cp").arg("--sparse=always").arg(debian_system().join("root.ext4")).arg(&root));
    let socket = dir.path().join("api");
    // `systemd.show_status` is off: what the tests say stays in one piece.
    let options =
        "holdfast.root=/dev/vda systemd.show_status=0 systemd.mask=systemd-networkd-wait-online.service";
    let mut args = x86_args(2, &x86_64_guest(), "vmlinuz", options);
    with(&mut args, "--disk", format!("path={}", root.display()));
    args.push(format!("path={},readonly=on", repository(dir.path()).display()));
    with(&mut args, "--api-socket", socket.display().to_string());
    let mut vm = Program::run(&args);
    vm.wait_for("WAITING-FOR-THE-BUTTON", BOOT);
    let output = vm.output();
    assert_eq!(printed(&output, "MULTI-USER"), "active", "{output}");
    assert_eq!(printed(&output, "SYSTEM-STATE"), "running", "{output}");
    assert_eq!(printed(&output, "LOGIND"), "active", "{output}");
    assert_eq!(printed(&output, "INSTALL-STATUS"), "0", "{output}");
    assert_eq!(printed(&output, "GREETING"), "42", "{output}");
    assert_eq!(printed(&output, "PACKAGE"), "install ok installed 1.0", "{output}");
    Api::connect(&socket).put("vm.power-button", &Value::Null);
    assert!(vm.wait_exit(BOOT).success(), "the system switched the machine off");
    // It unmounted its disk: no journal to replay.
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(&root));
    let features = run(Command::new("dumpe2fs").arg("-h").arg(&root));
    assert!(!features.contains("needs_recovery"), "the system did not unmount its root");
}
