//! Our image tool beside QEMU's `qemu-img` (`$QEMU_IMG`, or the one in the path; Debian: qemu-utils).

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

struct Bed(tempfile::TempDir);

fn run(program: &OsString, dir: &Path, args: &[&str]) -> Output {
    Command::new(program)
        .current_dir(dir)
        .args(args)
        .output()
        .expect("qemu-img (Debian: qemu-utils) is needed for this test")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Bed {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("directory"))
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    fn ours(&self, args: &[&str]) -> Output {
        run(&env!("CARGO_BIN_EXE_holdfast-img").into(), self.dir(), args)
    }

    fn theirs(&self, args: &[&str]) -> Output {
        run(&std::env::var_os("QEMU_IMG").unwrap_or_else(|| "qemu-img".into()), self.dir(), args)
    }

    fn ok(&self, ours: bool, args: &[&str]) -> String {
        let out = if ours { self.ours(args) } else { self.theirs(args) };
        assert!(
            out.status.success(),
            "{} {args:?}: {}{}",
            if ours { "ours" } else { "theirs" },
            text(&out.stdout),
            text(&out.stderr)
        );
        text(&out.stdout)
    }

    /// Data with holes, runs and noise.
    fn data(&self, name: &str, size: usize) {
        let mut state = 88_172_645_463_325_252u64;
        let mut noise = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        let bytes: Vec<u8> = (0..size)
            .map(|i| match i >> 16 & 3 {
                0 => 0,
                1 => (i >> 9) as u8,
                2 => noise(),
                _ => {
                    if i >> 12 & 1 == 0 {
                        0
                    } else {
                        0x5a
                    }
                }
            })
            .collect();
        std::fs::write(self.dir().join(name), bytes).expect("data");
    }

    /// Both tools' JSON answers to the same question are the same.
    fn same_json(&self, args: &[&str]) {
        // Whether what is preallocated and not written counts as data the file system says by what of it is in the page cache, and
        // to ask may read ahead.
        let tries = if args.first() == Some(&"map") { 4 } else { 1 };
        let answers: Vec<String> = (0..tries).map_while(|_| self.json_differs(args)).collect();
        assert!(answers.len() < tries, "{}", answers.join("\n"));
    }

    /// How the tools' JSON answers to the same question differ, if they do.
    fn json_differs(&self, args: &[&str]) -> Option<String> {
        let (ours, theirs) = (self.ours(args), self.theirs(args));
        assert_eq!(ours.status.code(), theirs.status.code(), "{args:?}: {}", text(&ours.stderr));
        let parse = |out: &Output| -> Value {
            serde_json::from_slice(&out.stdout)
                .unwrap_or_else(|e| panic!("{args:?}: {e}: {}", text(&out.stdout)))
        };
        let (mut ours, mut theirs) = (parse(&ours), parse(&theirs));
        // Older versions say less: what one does not know is not compared.
        common(&mut ours, &mut theirs);
        let shown = |v: &Value| v.to_string().chars().take(4000).collect::<String>();
        (ours != theirs).then(|| format!("{args:?}\nours: {}\ntheirs: {}", shown(&ours), shown(&theirs)))
    }
}

/// What only newer versions report, and what depends on when it is asked.
const SOMETIMES: [&str; 4] = ["children", "compressed", "actual-size", "detached-header"];

fn common(a: &mut Value, b: &mut Value) {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            for key in SOMETIMES {
                if key == "actual-size" || !a.contains_key(key) || !b.contains_key(key) {
                    a.remove(key);
                    b.remove(key);
                }
            }
            for (key, value) in a.iter_mut() {
                if let Some(other) = b.get_mut(key) {
                    common(value, other);
                }
            }
        }
        (Value::Array(a), Value::Array(b)) => a.iter_mut().zip(b).for_each(|(x, y)| common(x, y)),
        _ => {}
    }
}

const OPTIONS: &[&str] = &[
    "compat=1.1",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=2M",
    "refcount_bits=64",
    "refcount_bits=8,lazy_refcounts=on",
    "compression_type=zstd",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full",
    "preallocation=metadata,extended_l2=on",
];

#[test]
fn created_images_are_the_same() {
    for options in OPTIONS {
        let bed = Bed::new();
        for size in ["1M", "5000k", "300M"] {
            if options.contains("full") && size == "300M" {
                continue;
            }
            bed.ok(true, &["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", size]);
            bed.ok(false, &["check", "a.qcow2"]);
            for args in [
                ["info", "--output=json", "a.qcow2"],
                ["check", "--output=json", "a.qcow2"],
                ["map", "--output=json", "a.qcow2"],
            ] {
                bed.same_json(&args);
            }
            let ours = bed.ok(true, &["create", "-f", "qcow2", "-o", options, "b.qcow2", size]);
            let theirs = bed.ok(false, &["create", "-f", "qcow2", "-o", options, "b.qcow2", size]);
            assert_eq!(ours, theirs);
            bed.same_json(&["check", "--output=json", "b.qcow2"]);
            let measure = ["measure", "--output=json", "-O", "qcow2", "-o", options, "--size", size];
            bed.same_json(&measure);
        }
    }
}

#[test]
fn conversions_are_equal_both_ways() {
    for options in OPTIONS {
        let bed = Bed::new();
        bed.data("in.raw", (3 << 20) + 512);
        let compressed: &[&str] = if options.contains("preallocation") { &[""] } else { &["", "-c"] };
        for flag in compressed {
            for ours in [true, false] {
                let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
                args.extend(Some(*flag).filter(|f| !f.is_empty()));
                args.extend(["in.raw", "x.qcow2"]);
                bed.ok(ours, &args);
                bed.ok(false, &["check", "x.qcow2"]);
                bed.ok(true, &["check", "x.qcow2"]);
                bed.ok(false, &["compare", "in.raw", "x.qcow2"]);
                bed.ok(true, &["compare", "in.raw", "x.qcow2"]);
                bed.ok(true, &["convert", "-O", "raw", "x.qcow2", "out.raw"]);
                let (a, b) =
                    (std::fs::read(bed.dir().join("in.raw")), std::fs::read(bed.dir().join("out.raw")));
                assert!(a.expect("in") == b.expect("out"), "{options}");
                bed.same_json(&["info", "--output=json", "x.qcow2"]);
                bed.same_json(&["check", "--output=json", "x.qcow2"]);
                bed.same_json(&["map", "--output=json", "x.qcow2"]);
                bed.same_json(&["measure", "--output=json", "-O", "qcow2", "x.qcow2"]);
            }
        }
    }
}

#[test]
fn chains_are_followed_and_changed() {
    let bed = Bed::new();
    bed.data("base.raw", 2 << 20);
    bed.ok(true, &["convert", "-O", "qcow2", "base.raw", "base.qcow2"]);
    bed.ok(true, &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "3M"]);
    bed.ok(true, &["compare", "base.raw", "top.qcow2"]);
    for args in [
        vec!["info", "--output=json", "--backing-chain", "top.qcow2"],
        vec!["map", "--output=json", "top.qcow2"],
        vec!["check", "--output=json", "top.qcow2"],
    ] {
        bed.same_json(&args);
    }
    // Another base, with other contents, and back to none.
    bed.ok(true, &["create", "-q", "-f", "qcow2", "other.qcow2", "2M"]);
    bed.ok(true, &["rebase", "-b", "other.qcow2", "-F", "qcow2", "top.qcow2"]);
    bed.ok(false, &["compare", "base.raw", "top.qcow2"]);
    bed.ok(false, &["check", "top.qcow2"]);
    bed.ok(true, &["commit", "-q", "top.qcow2"]);
    bed.ok(false, &["compare", "base.raw", "other.qcow2"]);
    bed.ok(false, &["check", "other.qcow2"]);
    bed.ok(false, &["check", "top.qcow2"]);
    bed.ok(true, &["rebase", "-b", "", "top.qcow2"]);
    bed.ok(false, &["compare", "base.raw", "top.qcow2"]);
    // A copy that differs from its base.
    bed.ok(true, &["convert", "-O", "qcow2", "-B", "other.qcow2", "-F", "qcow2", "top.qcow2", "delta.qcow2"]);
    bed.ok(false, &["compare", "base.raw", "delta.qcow2"]);
    bed.ok(false, &["check", "delta.qcow2"]);
}

#[test]
fn exit_codes_are_the_same() {
    let bed = Bed::new();
    bed.data("a.raw", 1 << 20);
    bed.data("b.raw", (1 << 20) + 512);
    std::fs::write(bed.dir().join("c.raw"), vec![1; 1 << 20]).expect("data");
    bed.ok(true, &["convert", "-O", "qcow2", "a.raw", "leak.qcow2"]);
    bed.ok(true, &["convert", "-O", "qcow2", "a.raw", "corrupt.qcow2"]);
    let patch = |name: &str, at: usize, bytes: &[u8]| {
        let path = bed.dir().join(name);
        let mut image = std::fs::read(&path).expect("image");
        image[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(path, image).expect("image");
    };
    let leak = std::fs::File::options().write(true).open(bed.dir().join("leak.qcow2")).expect("image");
    leak.set_len(120 << 16).expect("longer");
    patch("leak.qcow2", 0x20000 + 200, &[0, 1]);
    patch("corrupt.qcow2", 0x20000 + 12, &[0, 0]);
    let questions: &[&[&str]] = &[
        &["compare", "a.raw", "a.raw"],
        &["compare", "a.raw", "b.raw"],
        &["compare", "-s", "a.raw", "b.raw"],
        &["compare", "a.raw", "c.raw"],
        &["compare", "a.raw", "missing"],
        &["check", "a.raw"],
        &["check", "missing"],
        &["check", "leak.qcow2"],
        &["check", "corrupt.qcow2"],
        &["check", "-r", "leaks", "leak.qcow2"],
        &["check", "leak.qcow2"],
        &["info", "missing"],
        &["info"],
        &["nonsense"],
        &["create", "-f", "qcow2", "x.qcow2"],
        &["create", "-f", "qcow2", "-b", "a.raw", "x.qcow2"],
        &["create", "-f", "qcow2", "-o", "nonsense=1", "x.qcow2", "1M"],
        &["create", "-f", "qcow2", "-o", "cluster_size=3000", "x.qcow2", "1M"],
        &["create", "-f", "qcow2", "-o", "compat=0.10,extended_l2=on", "x.qcow2", "1M"],
        &["resize", "-f", "raw", "c.raw", "5k"],
        &["snapshot", "-d", "nothing", "leak.qcow2"],
        &["measure"],
    ];
    for args in questions {
        let (ours, theirs) = (bed.ours(args), bed.theirs(args));
        assert_eq!(
            ours.status.code(),
            theirs.status.code(),
            "{args:?}\n{}\n{}",
            text(&ours.stderr),
            text(&theirs.stderr)
        );
    }
    bed.ok(true, &["check", "-q", "-r", "all", "corrupt.qcow2"]);
    bed.ok(false, &["check", "corrupt.qcow2"]);
    bed.ok(false, &["compare", "a.raw", "corrupt.qcow2"]);
}

#[test]
fn snapshots_bitmaps_and_resizing() {
    let bed = Bed::new();
    bed.data("a.raw", 1 << 20);
    bed.ok(true, &["convert", "-O", "qcow2", "a.raw", "a.qcow2"]);
    bed.ok(true, &["snapshot", "-c", "first", "a.qcow2"]);
    bed.ok(true, &["resize", "-q", "a.qcow2", "+1M"]);
    bed.ok(false, &["check", "a.qcow2"]);
    bed.same_json(&["info", "--output=json", "a.qcow2"]);
    let (ours, theirs) =
        (bed.ok(true, &["snapshot", "-l", "a.qcow2"]), bed.ok(false, &["snapshot", "-l", "a.qcow2"]));
    // Older versions have other columns.
    if theirs.contains("VM_SIZE") {
        assert_eq!(ours, theirs);
    } else {
        assert!(ours.contains("first") && theirs.contains("first"), "{ours}{theirs}");
    }
    bed.ok(true, &["convert", "-l", "first", "-O", "raw", "a.qcow2", "first.raw"]);
    bed.ok(false, &["compare", "first.raw", "a.raw"]);
    bed.ok(true, &["snapshot", "-d", "first", "a.qcow2"]);
    for args in [["--add", "a.qcow2", "one"], ["--add", "a.qcow2", "two"], ["--remove", "a.qcow2", "one"]] {
        bed.ok(true, &[&["bitmap"], args.as_slice()].concat());
    }
    bed.ok(true, &["bitmap", "--merge", "two", "--add", "a.qcow2", "three"]);
    bed.ok(false, &["check", "a.qcow2"]);
    bed.same_json(&["info", "--output=json", "a.qcow2"]);
    bed.ok(true, &["bitmap", "--remove", "a.qcow2", "two"]);
    bed.ok(true, &["bitmap", "--remove", "a.qcow2", "three"]);
    bed.ok(true, &["resize", "-q", "--shrink", "a.qcow2", "1M"]);
    bed.ok(false, &["check", "a.qcow2"]);
    bed.ok(false, &["compare", "a.raw", "a.qcow2"]);
    bed.ok(true, &["amend", "-o", "lazy_refcounts=on", "a.qcow2"]);
    bed.same_json(&["info", "--output=json", "a.qcow2"]);
    bed.ok(true, &["dd", "-O", "qcow2", "if=a.raw", "of=d.qcow2", "bs=64k", "skip=3"]);
    bed.ok(false, &["dd", "-O", "raw", "if=a.raw", "of=d.raw", "bs=64k", "skip=3"]);
    bed.ok(false, &["compare", "-F", "raw", "d.qcow2", "d.raw"]);
}

#[test]
fn a_second_writer_is_refused() {
    let bed = Bed::new();
    bed.ok(true, &["create", "-q", "-f", "qcow2", "a.qcow2", "64M"]);
    let program = std::env::var_os("QEMU_IO").unwrap_or_else(|| "qemu-io".into());
    let mut holder = Command::new(program)
        .current_dir(bed.dir())
        .arg("a.qcow2")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("qemu-io (Debian: qemu-utils) is needed for this test");
    // Once it answers, it has the image open.
    let mut input = holder.stdin.take().expect("stdin");
    writeln!(input, "length").expect("asked");
    let mut answer = String::new();
    BufReader::new(holder.stdout.take().expect("stdout")).read_line(&mut answer).expect("answered");
    let out = bed.ours(&["resize", "-q", "a.qcow2", "+1M"]);
    let last = text(&out.stderr);
    assert!(!out.status.success());
    assert!(
        last.contains("Failed to get \"write\" lock") && last.contains("Is another process using the image"),
        "{last}"
    );
    bed.ok(true, &["info", "-U", "a.qcow2"]);
    holder.kill().expect("killed");
    holder.wait().expect("gone");
}

#[test]
fn zeroes_are_found_in_writes_where_that_is_asked_for() {
    let bed = Bed::new();
    // The program goes by its name.
    let link = bed.dir().join("holdfast-io");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_holdfast-img"), &link).expect("link");
    let programs = [link.into_os_string(), std::env::var_os("QEMU_IO").unwrap_or_else(|| "qemu-io".into())];
    for how in ["detect-zeroes=off", "detect-zeroes=on", "detect-zeroes=unmap,discard=unmap"] {
        let maps = programs.clone().map(|program| {
            bed.ok(false, &["create", "-q", "-f", "qcow2", "a.qcow2", "8M"]);
            let node = format!("driver=qcow2,file.filename=a.qcow2,{how}");
            for command in ["write -P 7 0 2M", "write -P 0 64k 128k", "write -P 0 3M 64k", "write -P 0 1M 4k"]
            {
                let out = run(&program, bed.dir(), &["--image-opts", "-c", command, &node]);
                assert!(out.status.success(), "{how}: {}{}", text(&out.stdout), text(&out.stderr));
            }
            let map: Value =
                serde_json::from_str(&bed.ok(false, &["map", "--output=json", "a.qcow2"])).expect("a map");
            let kinds = ["start", "length", "zero", "data"];
            map.as_array()
                .expect("extents")
                .iter()
                .map(|e| kinds.map(|k| e[k].to_string()).join(" "))
                .collect::<Vec<_>>()
        });
        assert_eq!(maps[0], maps[1], "{how}");
    }
    let node = "driver=qcow2,file.filename=a.qcow2,detect-zeroes=unmap";
    let out = run(&programs[0], bed.dir(), &["--image-opts", "-c", "read 0 512", node]);
    assert!(
        text(&out.stderr).contains("without setting discard operation to unmap"),
        "{}",
        text(&out.stderr)
    );
}

/// Small numbers from a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len() as u64) as usize]
    }
}

/// Creates `g.qcow2` with options, contents, snapshots and bitmaps that the numbers say. Returns how.
fn generate(bed: &Bed, random: &mut Random) -> String {
    let old = random.below(6) == 0;
    let mut options =
        vec![format!("cluster_size={}", random.one(&["512", "4k", "16k", "64k", "256k", "2M"]))];
    let mut data_file = false;
    if old {
        options.push("compat=0.10".to_owned());
    } else {
        data_file = random.below(8) == 0;
        if random.below(4) == 0 && !options[0].ends_with("512") && !options[0].ends_with("4k") {
            options.push("extended_l2=on".to_owned());
        }
        let refcounts = if random.below(2) == 0 { "16" } else { random.one(&["1", "2", "8", "32", "64"]) };
        options.push(format!("refcount_bits={refcounts}"));
        options.push(format!("lazy_refcounts={}", random.one(&["on", "off"])));
        options.push(format!("compression_type={}", random.one(&["zlib", "zstd"])));
    }
    let wide = !options.iter().any(|o| o == "refcount_bits=1");
    let backed = !data_file && random.below(3) == 0;
    if data_file {
        options.push("data_file=g.data".to_owned());
        options.push(format!("data_file_raw={}", random.one(&["on", "off"])));
    } else if backed {
        let format = random.one(&["raw", "qcow2"]);
        options.push(format!("backing_file=base.{format},backing_fmt={format}"));
    } else {
        options.push(format!("preallocation={}", random.one(&["off", "off", "off", "metadata", "falloc"])));
    }
    let options = options.join(",");
    let size = (random.below(6 << 20) + 600_000) / 512 * 512;
    bed.ok(
        random.below(2) == 0,
        &["create", "-q", "-f", "qcow2", "-o", &options, "g.qcow2", &size.to_string()],
    );
    let mut done = format!("{options} {size}");
    let mut io: Vec<String> = Vec::new();
    for _ in 0..random.below(9) {
        let at = random.below(size / 512) * 512;
        let len = ((random.below(800) + 1) * 512).min(size - at);
        let kinds = ["write -P 7", "write -P 0", "write -z", "write -zu", "discard", "write -P 9"];
        io.push(format!("{} {at} {len}", random.one(if old { &kinds[..2] } else { &kinds })));
    }
    if !io.is_empty() {
        done += &format!(" {io:?}");
        let program = std::env::var_os("QEMU_IO").unwrap_or_else(|| "qemu-io".into());
        let mut args = vec!["-f", "qcow2", "-d", "unmap"];
        io.iter().for_each(|command| args.extend(["-c", command]));
        let out = run(&program, bed.dir(), &[&args[..], &["g.qcow2"]].concat());
        assert!(out.status.success(), "{done}: {}", text(&out.stderr));
    }
    if wide && !data_file && random.below(4) == 0 {
        bed.ok(random.below(2) == 0, &["snapshot", "-c", "then", "g.qcow2"]);
        done += " snapshot";
    }
    if !old && random.below(4) == 0 {
        bed.ok(random.below(2) == 0, &["bitmap", "--add", "g.qcow2", "b"]);
        done += " bitmap";
    }
    done
}

#[test]
fn a_hundred_images_are_shown_alike() {
    std::thread::scope(|s| {
        for half in 0..2u64 {
            s.spawn(move || {
                let bed = Bed::new();
                bed.data("base.raw", 1 << 20);
                bed.ok(false, &["convert", "-O", "qcow2", "base.raw", "base.qcow2"]);
                let mut random = Random(0x1dea + half);
                for n in 0..50 {
                    let how = generate(&bed, &mut random);
                    println!("image {half}.{n}: {how}");
                    for args in [
                        vec!["info", "--output=json", "g.qcow2"],
                        vec!["check", "--output=json", "g.qcow2"],
                        vec!["map", "--output=json", "g.qcow2"],
                        vec!["measure", "--output=json", "-O", random.one(&["qcow2", "raw"]), "g.qcow2"],
                    ] {
                        bed.same_json(&args);
                    }
                    for file in ["g.qcow2", "g.data"] {
                        let _ = std::fs::remove_file(bed.dir().join(file));
                    }
                }
            });
        }
    });
}

#[test]
fn the_host_copies_where_it_can() {
    let bed = Bed::new();
    bed.data("a.raw", 3 << 20);
    bed.ok(false, &["convert", "-O", "qcow2", "a.raw", "base.qcow2"]);
    bed.ok(false, &["convert", "-c", "-O", "qcow2", "a.raw", "packed.qcow2"]);
    bed.ok(false, &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "4M"]);
    let program = std::env::var_os("QEMU_IO").unwrap_or_else(|| "qemu-io".into());
    let writes =
        ["-c", "write -P 3 1000k 300k", "-c", "write -z 0 64k", "-c", "write -P 4 3500k 5k", "top.qcow2"];
    assert!(run(&program, bed.dir(), &writes).status.success());
    for source in ["a.raw", "base.qcow2", "packed.qcow2", "top.qcow2"] {
        for format in ["raw", "qcow2"] {
            bed.ok(true, &["convert", "-C", "-O", format, source, "out"]);
            bed.ok(false, &["compare", "-F", format, source, "out"]);
        }
    }
    for args in [
        &["convert", "-C", "-c", "-O", "qcow2", "a.raw", "out"][..],
        &["convert", "-C", "-S", "4k", "-O", "raw", "a.raw", "out"],
        &["convert", "-C", "--salvage", "-O", "raw", "a.raw", "out"],
    ] {
        let (ours, theirs) = (bed.ours(args), bed.theirs(args));
        assert_eq!(ours.status.code(), theirs.status.code(), "{args:?}");
        let said = |out: &Output| text(&out.stderr).split_once(": ").map(|(_, said)| said.to_owned());
        assert_eq!(said(&ours), said(&theirs), "{args:?}");
    }
}

#[test]
fn bench_writes_and_flushes_as_the_other_does() {
    let bed = Bed::new();
    for format in ["raw", "qcow2"] {
        let images = [format!("ours.{format}"), format!("theirs.{format}")];
        // The last: some requests find a cluster allocated by the one before, others have to allocate it.
        let variants = [
            &["-c", "61", "-s", "48k"][..],
            &["-c", "61", "-s", "48k", "--flush-interval", "16"],
            &["-c", "61", "-s", "48k", "--flush-interval", "16", "--no-drain"],
            &["-c", "200", "-s", "12k"],
        ];
        for more in variants {
            let mut said = Vec::new();
            for (image, ours) in images.iter().zip([true, false]) {
                bed.ok(false, &["create", "-q", "-f", format, image, "3M"]);
                let base = ["bench", "-w", "-f", format, "-d", "8", "--pattern", "65"];
                let out = bed.ok(ours, &[&base[..], more, &[image]].concat());
                said.push(out.split("Run completed").next().unwrap_or_default().to_owned());
            }
            assert_eq!(said[0], said[1], "{format} {more:?}");
            bed.ok(false, &["compare", "-f", format, "-F", format, &images[0], &images[1]]);
            // Reads go another way.
            bed.ok(true, &["bench", "-q", "-f", format, "-d", "8", "-c", "61", "-s", "48k", &images[0]]);
        }
    }
    let refusals = [&["-d", "1", "--flush-interval", "8"][..], &["-w", "-d", "8", "--flush-interval", "4"]];
    for more in refusals {
        let args = [&["bench", "-f", "raw"][..], more, &["ours.raw"]].concat();
        let (ours, theirs) = (bed.ours(&args), bed.theirs(&args));
        let words = |out: &Output| text(&out.stderr).split_once(": ").map(|(_, words)| words.to_owned());
        assert_eq!((ours.status.code(), words(&ours)), (theirs.status.code(), words(&theirs)));
    }
}

#[test]
fn images_become_version_2_again() {
    let bed = Bed::new();
    bed.data("a.raw", 3 << 20);
    bed.ok(false, &["convert", "-O", "qcow2", "a.raw", "base.qcow2"]);
    let io = std::env::var_os("QEMU_IO").unwrap_or_else(|| "qemu-io".into());
    for backed in [false, true] {
        let back: &[&str] = if backed { &["-b", "base.qcow2", "-F", "qcow2"] } else { &[] };
        bed.ok(false, &[&["create", "-q", "-f", "qcow2"][..], back, &["v3.qcow2", "4100k"]].concat());
        let load =
            ["write -P 3 1000k 300k", "write -z 0 128k", "write -z 1024k 64k", "write -z -u 4032k 68k"];
        let mut args: Vec<&str> = load.iter().flat_map(|c| ["-c", c]).collect();
        args.push("v3.qcow2");
        assert!(run(&io, bed.dir(), &args).status.success());
        std::fs::copy(bed.dir().join("v3.qcow2"), bed.dir().join("v2.qcow2")).expect("copied");
        bed.ok(true, &["amend", "-f", "qcow2", "-o", "compat=0.10,lazy_refcounts=off", "v2.qcow2"]);
        bed.ok(false, &["check", "-q", "v2.qcow2"]);
        bed.ok(false, &["compare", "v2.qcow2", "v3.qcow2"]);
        assert!(bed.ok(false, &["info", "v2.qcow2"]).contains("compat: 0.10"));
        // It is written as a version 2 image is.
        assert!(run(&io, bed.dir(), &["-c", "write -P 9 0 70k", "v2.qcow2"]).status.success());
        bed.ok(true, &["snapshot", "-c", "one", "v2.qcow2"]);
        bed.ok(false, &["check", "-q", "v2.qcow2"]);
        bed.ok(true, &["amend", "-f", "qcow2", "-o", "compat=1.1", "v2.qcow2"]);
        bed.ok(true, &["amend", "-f", "qcow2", "-o", "compat=v2", "v2.qcow2"]);
        bed.ok(false, &["check", "-q", "v2.qcow2"]);
    }
    for (options, snapshots) in
        [("refcount_bits=8", false), ("extended_l2=on", false), ("lazy_refcounts=on", true)]
    {
        bed.ok(false, &["create", "-q", "-f", "qcow2", "-o", options, "no.qcow2", "1M"]);
        if snapshots {
            bed.ok(false, &["snapshot", "-c", "one", "no.qcow2"]);
            bed.ok(false, &["resize", "-q", "no.qcow2", "2M"]);
        }
        let args = ["amend", "-f", "qcow2", "-o", "compat=0.10", "no.qcow2"];
        let (ours, theirs) = (bed.ours(&args), bed.theirs(&args));
        assert_eq!(ours.status.code(), theirs.status.code(), "{options}: {}", text(&theirs.stderr));
        assert!(bed.ok(false, &["info", "no.qcow2"]).contains("compat: 1.1"));
        bed.ok(false, &["check", "-q", "no.qcow2"]);
    }
}

#[test]
fn a_rate_limits_what_is_written() {
    let bed = Bed::new();
    std::fs::write(bed.dir().join("a.raw"), vec![7; 4 << 20]).expect("data");
    let begun = std::time::Instant::now();
    bed.ok(true, &["convert", "-f", "raw", "-O", "qcow2", "-r", "4M", "a.raw", "out.qcow2"]);
    // A part of it may go in a burst, the rest may not.
    assert!(begun.elapsed() > std::time::Duration::from_millis(300), "{:?}", begun.elapsed());
    bed.ok(false, &["compare", "-f", "raw", "-F", "qcow2", "a.raw", "out.qcow2"]);
    bed.ok(true, &["convert", "-f", "raw", "-O", "raw", "-r", "0", "a.raw", "out.raw"]);
    bed.ok(true, &["create", "-q", "-f", "qcow2", "-b", "out.qcow2", "-F", "qcow2", "top.qcow2"]);
    bed.ok(true, &["commit", "-q", "-r", "1G", "top.qcow2"]);
    let args = ["convert", "-f", "raw", "-r", "fast", "a.raw", "out.raw"];
    let (ours, theirs) = (bed.ours(&args), bed.theirs(&args));
    assert_eq!(ours.status.code(), theirs.status.code());
}

#[test]
fn images_that_are_their_own_backing_files_are_refused() {
    let bed = Bed::new();
    for name in ["a.qcow2", "b.qcow2", "c.qcow2"] {
        bed.ok(false, &["create", "-q", "-f", "qcow2", name, "1M"]);
    }
    for (image, backing) in [("a.qcow2", "a.qcow2"), ("b.qcow2", "c.qcow2"), ("c.qcow2", "b.qcow2")] {
        bed.ok(false, &["rebase", "-u", "-b", backing, "-F", "qcow2", image]);
    }
    for image in ["a.qcow2", "b.qcow2"] {
        let out = bed.ours(&["convert", "-O", "raw", image, "out.raw"]);
        assert_eq!(out.status.code(), Some(1));
        assert!(text(&out.stderr).contains("refer to each other in a circle"), "{}", text(&out.stderr));
    }
}

#[test]
fn native_aio_without_direct_io_is_refused_as_by_others() {
    let bed = Bed::new();
    bed.data("a.raw", 1 << 20);
    let args = ["info", "--image-opts", "driver=raw,file.driver=file,file.filename=a.raw,file.aio=native"];
    let reason = "aio=native was specified, but it requires cache.direct=on, which was not specified.";
    for out in [bed.ours(&args), bed.theirs(&args)] {
        assert_eq!(out.status.code(), Some(1));
        assert!(text(&out.stderr).contains(reason), "{}", text(&out.stderr));
    }
}
