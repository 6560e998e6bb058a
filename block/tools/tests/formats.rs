//! Other programs' formats: ours reads what `qemu-img` writes, and the other way round (Debian: qemu-utils).

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
        self.command(program).args(args).output().expect("qemu-img (Debian: qemu-utils)")
    }

    fn command(&self, program: &str) -> Command {
        let program: std::path::PathBuf = match program {
            "ours" => env!("CARGO_BIN_EXE_holdfast-img").into(),
            // The same program by another name.
            "our-io" => {
                let link = self.dir().join("ours-io");
                let _ = std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_holdfast-img"), &link);
                link
            }
            "their-io" => std::env::var_os("QEMU_IO").unwrap_or_else(|| "qemu-io".into()).into(),
            _ => std::env::var_os("QEMU_IMG").unwrap_or_else(|| "qemu-img".into()).into(),
        };
        let mut command = Command::new(program);
        command.current_dir(self.dir());
        command
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
    ("vdi", ""),
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
        let out = bed.run("ours", &["resize", "-f", format, "x", "+1M"]);
        assert!(!out.status.success(), "{format} {options:?}");
    }
}

/// The numbers of a generator that does not change (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// Writes at random into the image `x` and, alike, into `in.raw`: patterns, zeroes and flushes.
fn scribble(bed: &Bed, format: &str, seed: u64) {
    let mut numbers = Numbers(seed);
    let mut commands: Vec<String> = Vec::new();
    let sectors = 20 * 63 * 16u64;
    for _ in 0..60 {
        let at = numbers.next(sectors);
        let len = (1 + numbers.next(300)).min(sectors - at);
        let (at, len) = (at * 512, len * 512);
        commands.push(match numbers.next(5) {
            0 => format!("write -z {at} {len}"),
            1 => "flush".to_owned(),
            _ => format!("write -P {} {at} {len}", 1 + numbers.next(255)),
        });
    }
    for (format, image) in [(format, "x"), ("raw", "in.raw")] {
        let mut args = vec!["-f", format];
        commands.iter().for_each(|c| args.extend(["-c", c.as_str()]));
        args.push(image);
        bed.ok("our-io", &args);
    }
}

/// What both find of the image `x`: nothing wrong, and the contents of `in.raw`.
fn agree(bed: &Bed, format: &str) {
    for who in ["ours", "theirs"] {
        bed.ok(who, &["compare", "-f", "raw", "-F", format, "in.raw", "x"]);
        if format != "vpc" {
            let check = bed.ok(who, &["check", "-f", format, "x"]);
            assert!(check.contains("No errors were found on the image."), "{check}");
        }
    }
}

#[test]
fn images_of_ours_are_read_by_others_whatever_is_written_to_them() {
    for (n, (format, options)) in IMAGES.iter().enumerate() {
        let bed = Bed::new();
        let with = if options.is_empty() { vec![] } else { vec!["-o", options] };
        bed.ok("ours", &[&["convert", "-O", format][..], &with, &["in.raw", "x"]].concat());
        agree(&bed, format);
        let info = |who: &str| {
            let info = bed.ok(who, &["info", "-f", format, "--output=json", "x"]);
            serde_json::from_str::<serde_json::Value>(&info).expect("JSON")
        };
        let (ours, theirs) = (info("ours"), info("theirs"));
        for key in ["virtual-size", "cluster-size", "format-specific", "format", "dirty-flag"] {
            assert_eq!(ours[key], theirs[key], "{format} {options}");
        }
        if options.contains("streamOptimized") {
            let out = bed.run("our-io", &["-f", format, "-c", "write 0 512", "x"]);
            assert!(text(&out.stderr).contains("written once"), "{}", text(&out.stderr));
            continue;
        }
        scribble(&bed, format, 77 + n as u64);
        agree(&bed, format);
        // The other's image, written by both.
        bed.ok("theirs", &[&["create", "-q", "-f", format][..], &with, &["y", "10321920"]].concat());
        bed.ok("theirs", &["convert", "-n", "-f", format, "-O", format, "x", "y"]);
        std::fs::remove_file(bed.dir().join("x")).expect("ours");
        // Descriptors name their extents, so images of several files are not renamed.
        if !options.contains("Flat") && !options.contains("twoGb") {
            std::fs::rename(bed.dir().join("y"), bed.dir().join("x")).expect("theirs");
            scribble(&bed, format, 99 + n as u64);
            agree(&bed, format);
        }
    }
}

#[test]
fn options_and_refusals_are_those_of_others() {
    let bed = Bed::new();
    // Format, options, size; both make it, or both do not. What they say first is the same.
    for (format, options, size) in [
        ("vdi", "static=on", "3M"),
        ("vdi", "static=maybe", "3M"),
        ("vdi", "block_size=2M", "3M"),
        ("vdi", "static=off", "600T"),
        ("vpc", "subformat=fixed", "3M"),
        ("vpc", "subformat=fixed,force_size=on", "3M"),
        ("vpc", "force_size=on", "3T"),
        ("vpc", "subformat=dynamic", "3T"),
        ("vpc", "subformat=other", "3M"),
        ("vhdx", "block_size=3M", "3M"),
        ("vhdx", "block_size=1M,log_size=3M", "3M"),
        ("vhdx", "block_size=512M", "3M"),
        ("vhdx", "subformat=dynamic", "65T"),
        ("vhdx", "subformat=other", "3M"),
        ("vhdx", "block_state_zero=off", "3M"),
        ("vmdk", "adapter_type=lsilogic,compat6=on", "3M"),
        ("vmdk", "adapter_type=other", "3M"),
        ("vmdk", "compat6=on,hwversion=5", "3M"),
        ("vmdk", "hwversion=13,toolsversion=11", "3M"),
        ("vmdk", "subformat=monolithicFlat,zeroed_grain=on", "3M"),
        ("vmdk", "subformat=twoGbMaxExtentSparse", "5G"),
        ("vmdk", "subformat=twoGbMaxExtentFlat", "5G"),
        ("vmdk", "subformat=streamOptimized", "3M"),
        ("vmdk", "subformat=other", "3M"),
    ] {
        let make = |who: &str| {
            let out = bed.run(who, &["create", "-f", format, "-o", options, "new.img", size]);
            let info = out.status.success().then(|| bed.ok("theirs", &["info", "-f", format, "new.img"]));
            let size = info.map(|i| i.lines().find(|l| l.starts_with("virtual size")).map(str::to_owned));
            (out.status.code(), text(&out.stdout), size)
        };
        let (ours, theirs) = (make("ours"), make("theirs"));
        assert_eq!((&ours.0, &ours.2), (&theirs.0, &theirs.2), "{format} {options} {size}");
        if ours.0 == Some(0) {
            assert_eq!(ours.1, theirs.1);
        }
    }
}

#[test]
fn options_have_the_long_names_of_others_too() {
    let bed = Bed::new();
    let options = ["--source-format", "raw", "--target-format", "vdi", "--target-options", "static=off"];
    let more =
        ["--parallel", "2", "--sparse-size", "4k", "--target-cache", "unsafe", "--source-cache", "writeback"];
    bed.ok("ours", &[&["convert"][..], &options[..], &more[..], &["in.raw", "x"]].concat());
    bed.ok("ours", &["compare", "--a-format", "raw", "--b-format", "vdi", "in.raw", "x"]);
    bed.ok("ours", &["measure", "--target-format", "qcow2", "--size", "1M"]);
    bed.ok("ours", &["bench", "--count", "4", "--depth", "2", "--buffer-size", "4k", "--format", "vdi", "x"]);
    let out = bed.run("ours", &["convert", "--skip-broken-bitmaps", "in.raw", "y"]);
    assert!(text(&out.stderr).contains("requires --bitmaps"), "{}", text(&out.stderr));
    let out = bed.run("ours", &["measure", "-O", "vmdk", "--size", "1M"]);
    assert!(text(&out.stderr).contains("does not support size measurement"), "{}", text(&out.stderr));
}

#[test]
fn images_whose_blocks_overlap_are_not_written() {
    let patch = |bed: &Bed, at: usize, bytes: &[u8]| {
        let mut image = std::fs::read(bed.dir().join("x")).expect("image");
        image[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(bed.dir().join("y"), image).expect("image");
    };
    // The second entry of each table leads where the first one does, or over the tables.
    for (format, at, entry) in [
        ("vdi", 0x204, &[0u8, 0, 0, 0][..]),
        ("vpc", 1540, &[0, 0, 0, 4]),
        ("vpc", 1540, &[0, 0, 0, 0]),
        ("vmdk", (38 + 1) * 512 + 4, &[0x80, 0, 0, 0]),
        ("vmdk", (38 + 1) * 512 + 4, &[2, 0, 0, 0]),
        ("vhdx", (3 << 20) + 8, &[6, 0, 0x10, 0, 0, 0, 0, 0]),
    ] {
        let bed = Bed::new();
        bed.ok("ours", &["convert", "-O", format, "in.raw", "x"]);
        let at = if format == "vmdk" { primary_table(&bed) + 4 } else { at };
        patch(&bed, at, entry);
        let out = bed.run("our-io", &["-f", format, "-c", "write 0 512", "y"]);
        let said = text(&out.stderr) + &text(&out.stdout);
        assert!(!out.status.success() && said.contains("corrupt"), "{format}: {said}");
    }
}

/// Where the first grain table of the image `x` is: the first entry of the directory.
fn primary_table(bed: &Bed) -> usize {
    let image = std::fs::read(bed.dir().join("x")).expect("image");
    let number = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().expect("four bytes")) as usize;
    number(number(56) * 512) * 512
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

/// A new VHDX image `x` with small blocks, and a raw one `y` that is to be as `x` is.
fn empty_vhdx(bed: &Bed) {
    bed.ok("ours", &["create", "-q", "-f", "vhdx", "-o", "block_size=1M", "x", "32M"]);
    bed.ok("ours", &["create", "-q", "-f", "raw", "y", "32M"]);
}

/// Who only reads refuses the image for its log, and says how it is replayed.
fn has_a_log(bed: &Bed) {
    for who in ["ours", "theirs"] {
        let out = bed.run(who, &["convert", "-f", "vhdx", "-O", "raw", "x", "z"]);
        assert!(
            text(&out.stderr).contains("contains a log that needs to be replayed"),
            "{who}: {}",
            text(&out.stderr)
        );
    }
}

/// CRC-32C of a header of VHDX, into its second word.
fn seal(b: &mut [u8]) {
    b[4..8].fill(0);
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    };
    let sum = !b.iter().fold(!0, step);
    b[4..8].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn ours_replays_a_log_of_theirs() {
    let bed = Bed::new();
    empty_vhdx(&bed);
    let writes = ["-c", "write -P 5 3M 64k", "-c", "write -P 6 20M 64k"];
    bed.ok("our-io", &[&["-f", "raw"][..], &writes[..], &["y"]].concat());
    bed.ok("their-io", &[&["-f", "vhdx"][..], &writes[..], &["x"]].concat());
    // They let go of the log as soon as the table is written. What a crash before that leaves is made of what is still there:
    // the last entry, the headers that name it, and a table without the block that it brings.
    let mut image = std::fs::read(bed.dir().join("x")).expect("image");
    let (log, bat) = (1 << 20, 3 << 20);
    let mut entries = (log..2 << 20).step_by(4096).filter(|at| image[*at..].starts_with(b"loge"));
    let entry = entries.next_back().expect("their log");
    assert!(image[entry + 64..].starts_with(b"desc"));
    let guid = image[entry + 32..entry + 48].to_vec();
    for header in [64 << 10, 128 << 10] {
        image[header + 48..header + 64].copy_from_slice(&guid);
        seal(&mut image[header..header + 4096]);
    }
    assert_eq!(image[bat + 20 * 8] & 7, 6);
    image[bat + 20 * 8..bat + 21 * 8].copy_from_slice(&2u64.to_le_bytes());
    std::fs::write(bed.dir().join("x"), image).expect("image");
    has_a_log(&bed);
    bed.ok("ours", &["check", "-f", "vhdx", "-r", "all", "x"]);
    for who in ["ours", "theirs"] {
        bed.ok(who, &["compare", "-f", "raw", "-F", "vhdx", "y", "x"]);
        bed.ok(who, &["check", "-f", "vhdx", "x"]);
    }
}

#[test]
fn theirs_replays_the_log_that_a_crash_of_ours_leaves() {
    use std::io::{BufRead, BufReader};
    let bed = Bed::new();
    empty_vhdx(&bed);
    let writes = ["-c", "write -P 5 3M 64k", "-c", "write -P 6 20M 64k"];
    bed.ok("our-io", &[&["-f", "raw"][..], &writes[..], &["y"]].concat());
    let mut child = bed
        .command("our-io")
        .args(
            [
                &["-f", "vhdx"][..],
                &writes[..],
                &["-c", "flush", "-c", "read 0 512", "-c", "sleep 3600000", "x"],
            ]
            .concat(),
        )
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("ours");
    let out = BufReader::new(child.stdout.take().expect("stdout"));
    // It reads once it has flushed.
    assert!(out.lines().map_while(Result::ok).any(|line| line.starts_with("read 512/512")));
    child.kill().expect("kill");
    child.wait().expect("its end");
    has_a_log(&bed);
    bed.ok("theirs", &["check", "-f", "vhdx", "-r", "all", "x"]);
    for who in ["ours", "theirs"] {
        bed.ok(who, &["compare", "-f", "raw", "-F", "vhdx", "y", "x"]);
        bed.ok(who, &["check", "-f", "vhdx", "x"]);
    }
}

/// A block device that is a file, until it is let go.
struct Loop(String);

impl Loop {
    /// None where the host has no such devices.
    fn of(file: &Path) -> Option<Self> {
        let out = Command::new("losetup").args(["-f", "--show"]).arg(file).output().ok()?;
        out.status.success().then(|| Self(text(&out.stdout).trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// What was on a device before does not show through an image that is copied there.
#[test]
fn a_device_is_as_good_as_a_file() {
    let bed = Bed::new();
    let file = bed.dir().join("device");
    std::fs::File::create(&file).and_then(|file| file.set_len(24 << 20)).expect("file");
    let Some(device) = Loop::of(&file) else {
        eprintln!("there are no loop devices here");
        return;
    };
    let device = device.0.as_str();
    bed.ok("theirs", &["convert", "-O", "qcow2", "in.raw", "in.qcow2"]);
    for (driver, options) in
        [("raw", ""), ("qcow2", ""), ("qcow2", "preallocation=metadata"), ("vdi", ""), ("vdi", "static=on")]
    {
        for command in ["convert", "dd"] {
            if command == "dd" && !options.is_empty() {
                continue;
            }
            std::fs::write(device, vec![0xa5; 24 << 20]).expect("noise");
            let (from, to) = ("if=in.qcow2", format!("of={device}"));
            let args = match command {
                "dd" => vec!["dd", "-O", driver, "bs=64k", from, &to],
                _ if options.is_empty() => vec!["convert", "-O", driver, "in.qcow2", device],
                _ => vec!["convert", "-O", driver, "-o", options, "in.qcow2", device],
            };
            bed.ok("ours", &args);
            if driver == "raw" {
                let (found, wanted) = (std::fs::read(device), std::fs::read(bed.dir().join("in.raw")));
                let (found, wanted) = (found.expect("device"), wanted.expect("file"));
                assert!(found.starts_with(&wanted), "{command}");
            } else {
                bed.ok("theirs", &["compare", "-f", "raw", "-F", driver, "in.raw", device]);
            }
        }
    }
}

/// A person who watches is told how far long work is, others are not.
#[test]
fn who_watches_sees_how_far_it_is() {
    let bed = Bed::new();
    let convert = "convert -r 4M -S 0 -f raw -O raw in.raw out.raw";
    let program = env!("CARGO_BIN_EXE_holdfast-img");
    // A terminal; then none.
    let seen = |command: String| {
        let out =
            Command::new("script").args(["-qec", &command, "/dev/null"]).current_dir(bed.dir()).output();
        let out = out.expect("script (Debian: bsdutils)");
        assert!(out.status.success(), "{command}: {}", text(&out.stdout));
        text(&out.stdout)
    };
    assert!(seen(format!("{program} {convert}")).contains("/100%)"));
    assert_eq!(seen(format!("{program} {convert} 2>log")), "");
    assert_eq!(std::fs::read(bed.dir().join("log")).expect("log"), b"");
}
