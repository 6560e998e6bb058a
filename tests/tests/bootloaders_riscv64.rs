//! Debian's bootloaders for riscv64 behind OpenSBI: U-Boot as the payload, UEFI in flash.

use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use holdfast_tests::{Program, riscv64_guest};

const BOOT: Duration = Duration::from_secs(240);

/// First sector, and number of sectors, of the one partition of the disk.
const PARTITION: (u32, u32) = (2048, 240_000);

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A disk with an MBR and one ext4 partition that holds `tree`.
fn disk(dir: &Path, tree: &Path) -> std::path::PathBuf {
    let image = dir.join("disk.img");
    let mut file = std::fs::File::create(&image).expect("file");
    file.set_len(u64::from(PARTITION.0 + PARTITION.1) * 512).expect("a sparse file");
    let offset = format!("offset={}", u64::from(PARTITION.0) * 512);
    let blocks = format!("{}k", PARTITION.1 / 2);
    run(Command::new("mkfs.ext4").args(["-q", "-E", &offset, "-d"]).arg(tree).arg(&image).arg(blocks));
    // A bootable partition of type 0x83; addresses by cylinder are not used by anyone.
    let mut entry = vec![0x80, 0, 2, 0, 0x83, 0, 2, 0];
    entry.extend(PARTITION.0.to_le_bytes());
    entry.extend(PARTITION.1.to_le_bytes());
    file.seek(SeekFrom::Start(446)).expect("seek");
    file.write_all(&entry).expect("the entry");
    file.seek(SeekFrom::Start(510)).expect("seek");
    file.write_all(&[0x55, 0xaa]).expect("the signature");
    image
}

fn arguments(more: &[&str]) -> Vec<String> {
    let common = ["--arch", "riscv64", "--accel", "tcg", "--memory", "size=512M", "--serial", "tty"];
    common.iter().chain(&["--console", "off"]).chain(more).map(|s| (*s).to_owned()).collect()
}

#[test]
fn u_boot_boots_debians_kernel_from_a_virtio_disk() {
    let dir = tempfile::tempdir().expect("directory");
    let guest = riscv64_guest();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("extlinux")).expect("directory");
    for name in ["Image", "initramfs.cpio"] {
        std::fs::copy(guest.join(name), tree.join(name)).expect("copied");
    }
    let entry = "default debian\nlabel debian\n  kernel /Image\n  initrd /initramfs.cpio\n  \
                 append console=ttyS0 quiet holdfast.test=boot\n";
    std::fs::write(tree.join("extlinux/extlinux.conf"), entry).expect("written");
    let (u_boot, image) = (guest.join("u-boot.bin"), disk(dir.path(), &tree));
    let (kernel, path) = (u_boot.display().to_string(), format!("path={}", image.display()));
    let mut vm = Program::run(&arguments(&["--kernel", &kernel, "--disk", &path]));
    let at = vm.wait_for("U-Boot 20", BOOT);
    let at = vm.wait_for_after("Hit any key to stop autoboot", at, BOOT);
    // The prompt first, then the same way that the timeout would have gone.
    vm.type_in("\n");
    let at = vm.wait_for_after("=> ", at, BOOT);
    vm.type_in("virtio info\n");
    let at = vm.wait_for_after("Device 0: ", at, BOOT);
    vm.type_in("boot\n");
    let at = vm.wait_for_after("Starting kernel", at, BOOT);
    vm.wait_for_after("GUEST-TEST-EXIT 0", at, BOOT);
    assert!(vm.wait_exit(BOOT).success());
}

#[test]
fn uefi_in_flash_reaches_its_shell_and_keeps_its_variables() {
    let dir = tempfile::tempdir().expect("directory");
    let guest = riscv64_guest();
    let (code, vars) = (guest.join("RISCV_VIRT_CODE.fd"), dir.path().join("vars"));
    std::fs::copy(guest.join("RISCV_VIRT_VARS.fd"), &vars).expect("copied");
    let fresh = std::fs::read(&vars).expect("variables");
    let banks = [format!("path={},readonly=on", code.display()), format!("path={}", vars.display())];
    let mut vm = Program::run(&arguments(&["--pflash", &banks[0], "--pflash", &banks[1]]));
    let at = vm.wait_for("UEFI Interactive Shell", BOOT);
    let at = vm.wait_for_after("Shell> ", at, BOOT);
    vm.type_in("setvar HoldfastTest -guid 5f1b2d3c-0a1b-4c2d-8e3f-102030405060 -bs -rt -nv =L\"kept\"\r");
    let at = vm.wait_for_after("Shell> ", at, BOOT);
    vm.type_in("reset\r");
    let at = vm.wait_for_after("UEFI Interactive Shell", at, BOOT);
    let at = vm.wait_for_after("Shell> ", at, BOOT);
    vm.type_in("setvar HoldfastTest -guid 5f1b2d3c-0a1b-4c2d-8e3f-102030405060\r");
    // "kept" in UTF-16, as the shell dumps it.
    let at = vm.wait_for_after("6B 00 65 00 70 00 74 00", at, BOOT);
    vm.wait_for_after("Shell> ", at, BOOT);
    vm.type_in("reset -s\r");
    assert!(vm.wait_exit(BOOT).success(), "UEFI switches the machine off");
    assert!(std::fs::read(&vars).expect("variables") != fresh, "the file holds the variable");
}
