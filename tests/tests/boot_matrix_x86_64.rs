//! Debian's amd64 kernels under translation: suites and flavours, ways to boot, numbers of vCPUs.
//!
//! A few of the combinations that no other test boots are always booted; all of them with `HOLDFAST_BOOT_MATRIX=all`, which takes
//! a quarter of an hour on two cores and prints the table of docs/testing.md.

use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_tests::devices::{check_disk, check_rng, ext4_image};
use holdfast_tests::pc::{SEABIOS, bios_disk, efi_disk, grub_config, ovmf};
use holdfast_tests::{Program, debian_guest, printed, q35_args, x86_64_guest, x86_args};

/// Generous: the test machine may be busy. Nothing is asserted about speed.
const BOOT: Duration = Duration::from_secs(400);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flavour {
    TrixieCloud,
    TrixieGeneric,
    BookwormCloud,
    BookwormGeneric,
}

impl Flavour {
    const ALL: [Self; 4] =
        [Self::TrixieCloud, Self::TrixieGeneric, Self::BookwormCloud, Self::BookwormGeneric];

    fn dir(self) -> PathBuf {
        match self {
            Self::TrixieCloud => x86_64_guest(),
            Self::TrixieGeneric => debian_guest("x86_64-generic"),
            Self::BookwormCloud => debian_guest("x86_64-bookworm-cloud"),
            Self::BookwormGeneric => debian_guest("x86_64-bookworm"),
        }
    }

    /// What the kernel calls itself.
    fn has_name(self, release: &str) -> bool {
        let trixie = matches!(self, Self::TrixieCloud | Self::TrixieGeneric);
        let cloud = matches!(self, Self::TrixieCloud | Self::BookwormCloud);
        release.starts_with(if trixie { "6.12." } else { "6.1." }) && release.contains("-cloud-") == cloud
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    BzImage,
    Pvh,
    SeaBios,
    Ovmf,
}

impl Way {
    const ALL: [Self; 4] = [Self::BzImage, Self::Pvh, Self::SeaBios, Self::Ovmf];
}

/// The arguments for a boot by GRUB, whose prefix is `prefix`, from `disk`, which gets the kernel.
fn by_grub(vcpus: u32, dir: &Path, kernel: &Path, efi: bool) -> Vec<String> {
    let prefix = if efi { "" } else { "$prefix" };
    let config = format!(
        "linux {prefix}/vmlinuz console=ttyS0 quiet holdfast.loader=GRUB holdfast.test=rng,firmware\n\
         initrd {prefix}/initramfs.cpio\nboot\n"
    );
    let file = |name: &'static str| (name, kernel.join(name));
    let files = [("grub.cfg", grub_config(dir, &config)), file("vmlinuz"), file("initramfs.cpio")];
    let mut args = q35_args(vcpus);
    let disk = if efi {
        args.extend(ovmf(dir));
        efi_disk(dir, &files)
    } else {
        args.extend(["--firmware".to_owned(), SEABIOS.to_owned()]);
        bios_disk(dir, &files)
    };
    args.extend(["--disk".to_owned(), format!("path={},image_type=raw", disk.display())]);
    args
}

fn boots(flavour: Flavour, way: Way, vcpus: u32) {
    let dir = tempfile::tempdir().expect("directory");
    let kernel = flavour.dir();
    let direct = |file: &str| x86_args(vcpus, &kernel, file, "holdfast.test=disk,rng,firmware");
    let mut args = match way {
        Way::BzImage => direct("vmlinuz"),
        Way::Pvh => direct("vmlinux"),
        Way::SeaBios => by_grub(vcpus, dir.path(), &kernel, false),
        Way::Ovmf => by_grub(vcpus, dir.path(), &kernel, true),
    };
    let image = matches!(way, Way::BzImage | Way::Pvh).then(|| ext4_image(dir.path(), 100_000));
    if let Some(image) = &image {
        args.extend(["--disk".to_owned(), format!("path={},serial=holdfast-1", image.display())]);
    }
    let mut vm = Program::run(&args);
    vm.wait_for(&format!("x86_64 {vcpus} cpu"), BOOT);
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    assert!(vm.wait_exit(BOOT).success(), "power-off ends the program with success");
    let output = vm.output();
    let name = output.split("BOOTED ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    assert!(flavour.has_name(name), "{flavour:?} is `{name}`");
    let (firmware, loader) = match way {
        Way::BzImage | Way::Pvh => ("bios", ""),
        Way::SeaBios => ("bios", "GRUB"),
        Way::Ovmf => ("efi", "GRUB"),
    };
    assert_eq!(
        (printed(&output, "FIRMWARE").as_str(), printed(&output, "LOADER").as_str()),
        (firmware, loader)
    );
    check_rng(&output);
    if let Some(image) = &image {
        check_disk(&output, image);
    }
}

#[test]
fn combinations_that_no_other_test_boots() {
    boots(Flavour::TrixieGeneric, Way::Ovmf, 8);
    boots(Flavour::BookwormGeneric, Way::SeaBios, 1);
    boots(Flavour::BookwormCloud, Way::Pvh, 8);
}

#[test]
fn all_combinations_if_asked_for() {
    if std::env::var_os("HOLDFAST_BOOT_MATRIX").is_none_or(|v| v != "all") {
        eprintln!("not asked for: HOLDFAST_BOOT_MATRIX=all boots every combination");
        return;
    }
    println!("| kernel | way | vCPUs that booted |\n|---|---|---|");
    for flavour in Flavour::ALL {
        for way in Way::ALL {
            for vcpus in [1, 2, 8] {
                boots(flavour, way, vcpus);
            }
            println!("| {flavour:?} | {way:?} | 1, 2, 8 |");
        }
    }
}
