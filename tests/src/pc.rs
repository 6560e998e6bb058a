//! Disks that firmware of PCs boots.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::devices::run;
use crate::fetched;

const SECTOR: u64 = 512;
/// Where the only partition begins, in sectors: 1 MiB.
const START: u64 = 2048;

/// Debian: seabios.
pub const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";

/// The directory with OVMF, memtest86+, iPXE and GRUB for UEFI, fetched if it is missing.
///
/// # Panics
/// If it cannot be fetched.
pub fn pc_parts() -> PathBuf {
    fetched("HOLDFAST_PC_PARTS", "fetch-pc", &[])
}

/// The directory with `root.ext4`, a Debian system with systemd, made if it is missing.
///
/// # Panics
/// If it cannot be made.
pub fn debian_system() -> PathBuf {
    fetched("HOLDFAST_DEBIAN_SYSTEM", "fetch-system", &[])
}

/// An empty disk of `len` bytes with the partition table that `script` describes to sfdisk.
fn partitioned(path: &Path, len: u64, script: &str) {
    let file = std::fs::File::create(path).expect("writable");
    file.set_len(len).expect("size");
    let mut sfdisk = Command::new("sfdisk")
        .args(["-q", "--no-reread", "--no-tell-kernel"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .expect("sfdisk runs: Debian's fdisk");
    std::io::Write::write_all(&mut sfdisk.stdin.take().expect("piped"), script.as_bytes()).expect("it reads");
    assert!(sfdisk.wait().expect("our child").success(), "sfdisk fails");
}

/// Writes `bytes` into the file at `at`.
fn write_at(path: &Path, at: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).expect("writable");
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).expect("writable");
}

/// A disk with an MBR, GRUB before the first partition, and an ext4 partition with the files (name, source), among
/// which there should be `grub.cfg`: all of them are in `/boot/grub`.
///
/// # Panics
/// If it cannot be made: grub-common, grub-pc-bin, fdisk and e2fsprogs are needed.
pub fn bios_disk(dir: &Path, files: &[(&str, PathBuf)]) -> PathBuf {
    let disk = dir.join("bios.img");
    partitioned(&disk, 96 << 20, &format!("label: dos\nstart={START}, type=83, bootable\n"));
    let tree = dir.join("bios-tree");
    let grub = tree.join("boot/grub");
    std::fs::create_dir_all(&grub).expect("directory");
    for (name, source) in files {
        std::fs::copy(source, grub.join(name)).unwrap_or_else(|e| panic!("{}: {e}", source.display()));
    }
    run(Command::new("mkfs.ext4")
        .args(["-q", "-E", &format!("offset={}", START * SECTOR), "-d"])
        .arg(&tree)
        .arg(&disk)
        .arg("90M"));
    let core = dir.join("core.img");
    run(Command::new("grub-mkimage")
        .args(["-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub", "-o"])
        .arg(&core)
        .args(["biosdisk", "part_msdos", "ext2", "normal", "configfile", "linux", "linux16", "echo"]));
    let core = std::fs::read(core).expect("GRUB's core");
    assert!(core.len() as u64 <= (START - 1) * SECTOR, "GRUB's core fits before the partition");
    let boot = std::fs::read("/usr/lib/grub/i386-pc/boot.img").expect("grub-pc-bin is installed");
    // The boot sector's code ends where the partition table begins. It loads what follows it.
    write_at(&disk, 0, &boot[..440]);
    write_at(&disk, SECTOR, &core);
    disk
}

/// A disk with a GPT whose EFI system partition holds GRUB as the loader of removable media, and the files (name,
/// source) in its root, among which there should be `grub.cfg`.
///
/// # Panics
/// If it cannot be made: grub-common, fdisk, dosfstools and mtools are needed.
pub fn efi_disk(dir: &Path, files: &[(&str, PathBuf)]) -> PathBuf {
    let disk = dir.join("efi.img");
    partitioned(&disk, 96 << 20, &format!("label: gpt\nstart={START}, size=180224, type=uefi\n"));
    let system = dir.join("esp.img");
    std::fs::File::create(&system).and_then(|f| f.set_len(180_224 * SECTOR)).expect("writable");
    run(Command::new("mkfs.vfat").args(["-F", "32", "-n", "EFI"]).arg(&system));
    let loader = dir.join("bootx64.efi");
    run(Command::new("grub-mkimage")
        .args(["-O", "x86_64-efi", "-p", "/", "-d"])
        .arg(pc_parts().join("grub-efi"))
        .arg("-o")
        .arg(&loader)
        .args(["part_gpt", "fat", "normal", "configfile", "linux", "echo"]));
    run(Command::new("mmd").arg("-i").arg(&system).args(["::EFI", "::EFI/BOOT"]));
    let loader = ("EFI/BOOT/BOOTX64.EFI", loader);
    for (name, source) in files.iter().chain([&loader]) {
        run(Command::new("mcopy").arg("-i").arg(&system).arg(source).arg(format!("::{name}")));
    }
    write_at(&disk, START * SECTOR, &std::fs::read(system).expect("readable"));
    disk
}

/// A GRUB configuration that runs `commands` at once.
///
/// # Panics
/// If `dir` cannot be written.
pub fn grub_config(dir: &Path, commands: &str) -> PathBuf {
    let path = dir.join("grub.cfg");
    std::fs::write(&path, commands).expect("writable");
    path
}

/// Where the variables of [`ovmf`] are kept in its directory.
pub fn ovmf_variables(dir: &Path) -> PathBuf {
    dir.join("vars.fd")
}

/// Arguments that start OVMF, with variables of its own in `dir`.
///
/// # Panics
/// If it cannot be fetched, or `dir` cannot be written.
pub fn ovmf(dir: &Path) -> [String; 4] {
    let vars = ovmf_variables(dir);
    std::fs::copy(pc_parts().join("OVMF_VARS_4M.fd"), &vars).expect("OVMF's variables");
    let code = pc_parts().join("OVMF_CODE_4M.fd");
    let flash = || "--pflash".to_owned();
    [flash(), format!("path={},readonly=on", code.display()), flash(), format!("path={}", vars.display())]
}
