//! What PCs start with, under translation: SeaBIOS with GRUB, OVMF with GRUB, memtest86+.

use std::path::PathBuf;
use std::time::Duration;

use holdfast_tests::pc::{bios_disk, efi_disk, grub_config, pc_parts};
use holdfast_tests::{Program, printed, q35_args, x86_64_guest};

/// Generous: the test machine may be busy. Nothing is asserted about speed.
const BOOT: Duration = Duration::from_secs(400);
/// Debian: seabios.
const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";

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
    let vars = dir.path().join("vars.fd");
    std::fs::copy(pc_parts().join("OVMF_VARS_4M.fd"), &vars).expect("OVMF's variables");
    let mut args = q35_args(2);
    with(&mut args, "--pflash", format!("path={},readonly=on", pc_parts().join("OVMF_CODE_4M.fd").display()));
    with(&mut args, "--pflash", format!("path={}", vars.display()));
    with(&mut args, "--disk", format!("path={},image_type=raw", disk.display()));
    let mut vm = Program::run(&args);
    started_by(&mut vm, 2, "efi", "GRUB");
    // The variables went to their file: OVMF has made boot entries.
    let name: Vec<u8> = "Boot0000".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let vars = std::fs::read(&vars).expect("readable");
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
