//! Other programs' formats, as `qemu-img` writes them (Debian: qemu-utils).

use std::path::Path;
use std::process::{Command, Output};

struct Bed(tempfile::TempDir);

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Bed {
    fn new() -> Self {
        let bed = Self(tempfile::tempdir().expect("directory"));
        // Data at the start, in the middle and at the end, with holes between; a size that CHS geometries hit.
        let mut data = vec![0; 20 * 63 * 16 * 512];
        let len = data.len();
        for (start, count) in [(0, 70_000), (3 << 20, 200_000), (len - 3000, 3000)] {
            for (n, b) in data[start..start + count].iter_mut().enumerate() {
                *b = (n as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0];
            }
        }
        std::fs::write(bed.dir().join("in.raw"), data).expect("data");
        bed
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    fn run(&self, program: &str, args: &[&str]) -> Output {
        let program = match program {
            "ours" => env!("CARGO_BIN_EXE_holdfast-img").into(),
            _ => std::env::var_os("QEMU_IMG").unwrap_or_else(|| "qemu-img".into()),
        };
        Command::new(program)
            .current_dir(self.dir())
            .args(args)
            .output()
            .expect("qemu-img (Debian: qemu-utils)")
    }

    fn ok(&self, program: &str, args: &[&str]) -> String {
        let out = self.run(program, args);
        assert!(out.status.success(), "{program} {args:?}: {}{}", text(&out.stdout), text(&out.stderr));
        text(&out.stdout)
    }
}

const IMAGES: &[(&str, &str)] = &[
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vpc", "subformat=dynamic"),
    ("vpc", "subformat=dynamic,force_size=on"),
    ("vpc", "subformat=fixed"),
    ("vhdx", "subformat=dynamic"),
    ("vhdx", "subformat=fixed"),
    ("vhdx", "subformat=dynamic,block_size=1M"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=twoGbMaxExtentFlat"),
    ("vmdk", "subformat=streamOptimized"),
];

#[test]
fn images_of_others_are_read() {
    for (format, options) in IMAGES {
        let bed = Bed::new();
        let options = if options.is_empty() { vec![] } else { vec!["-o", options] };
        bed.ok("theirs", &[&["convert", "-O", format][..], &options, &["in.raw", "x"]].concat());
        bed.ok("ours", &["compare", "-f", "raw", "-F", format, "in.raw", "x"]);
        bed.ok("ours", &["convert", "-f", format, "-O", "qcow2", "x", "x.qcow2"]);
        bed.ok("theirs", &["compare", "-f", "raw", "-F", "qcow2", "in.raw", "x.qcow2"]);
        let size = |who: &str| {
            let info = bed.ok(who, &["info", "-f", format, "--output=json", "x"]);
            serde_json::from_str::<serde_json::Value>(&info).expect("JSON")["virtual-size"].clone()
        };
        assert_eq!(size("ours"), size("theirs"), "{format} {options:?}");
        // Fixed VHDs have nothing at their start to be known by.
        if options != ["-o", "subformat=fixed"] || *format == "vhdx" {
            assert!(bed.ok("ours", &["info", "x"]).contains(&format!("file format: {format}")));
        }
        // They are read, not written or made.
        let out = bed.run("ours", &["resize", "-f", format, "x", "+1M"]);
        assert!(!out.status.success() && text(&out.stderr).contains(format), "{}", text(&out.stderr));
        let out = bed.run("ours", &["convert", "-O", format, "in.raw", "y"]);
        assert!(!out.status.success() && text(&out.stderr).contains(format), "{}", text(&out.stderr));
    }
}

#[test]
fn damaged_images_are_refused() {
    for (format, patches) in [
        ("vdi", &[(0x44usize, 0u8), (0x180, 0xff), (0x178, 1), (0x154, 1)][..]),
        ("vpc", &[(512 + 20, 1), (512 + 28, 0xff), (60, 9)]),
        ("vmdk", &[(4, 9), (20, 3), (45, 0x7f), (63, 0x7f)]),
        ("vhdx", &[(0, 0)]),
    ] {
        let bed = Bed::new();
        bed.ok("theirs", &["convert", "-O", format, "in.raw", "x"]);
        let image = std::fs::read(bed.dir().join("x")).expect("image");
        for (at, value) in patches {
            let mut bytes = image.clone();
            assert_ne!(bytes[*at], *value);
            bytes[*at] = *value;
            std::fs::write(bed.dir().join("y"), bytes).expect("image");
            let out = bed.run("ours", &["convert", "-f", format, "-O", "raw", "y", "z"]);
            assert_eq!(out.status.code(), Some(1), "{format} at {at}: {}", text(&out.stderr));
        }
        // Cut off anywhere, it is an error or zeroes, and nothing worse.
        for part in 1..8 {
            std::fs::write(bed.dir().join("y"), &image[..image.len() * part / 8]).expect("image");
            let out = bed.run("ours", &["convert", "-f", format, "-O", "raw", "y", "z"]);
            assert!(out.status.code().is_some_and(|c| c < 2), "{format}: {}", text(&out.stderr));
        }
    }
}
