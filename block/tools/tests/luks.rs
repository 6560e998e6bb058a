//! Encrypted images beside `qemu-img`'s and `cryptsetup`'s (Debian: qemu-utils, cryptsetup-bin).

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

struct Bed(tempfile::TempDir);

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Bed {
    fn new() -> Self {
        let bed = Self(tempfile::tempdir().expect("directory"));
        let data: Vec<u8> =
            (0..300 << 10).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        std::fs::write(bed.0.path().join("in.raw"), data).expect("data");
        std::fs::write(bed.0.path().join("key"), "letmein").expect("key");
        std::fs::write(bed.0.path().join("key2"), "another").expect("key");
        bed
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    fn run(&self, program: &str, args: &[&str]) -> Output {
        let program = match program {
            "ours" => env!("CARGO_BIN_EXE_holdfast-img").into(),
            "theirs" => std::env::var_os("QEMU_IMG").unwrap_or_else(|| "qemu-img".into()),
            other => other.into(),
        };
        let out = Command::new(&program).current_dir(self.dir()).args(args).output();
        out.unwrap_or_else(|e| panic!("{}: {e} (Debian: qemu-utils, cryptsetup-bin)", program.display()))
    }

    fn ok(&self, program: &str, args: &[&str]) -> String {
        let mut out = self.run(program, args);
        // QEMU's tools time a hash to choose LUKS's iterations, and give up where the clock of CPU time stood still.
        let unlucky =
            |out: &Output| !out.status.success() && text(&out.stderr).contains("accurate CPU usage");
        for _ in 0..20 {
            if program == "ours" || !unlucky(&out) {
                break;
            }
            out = self.run(program, args);
        }
        assert!(out.status.success(), "{program} {args:?}: {}{}", text(&out.stdout), text(&out.stderr));
        text(&out.stdout)
    }
}

const SECRET: &str = "secret,id=s,file=key";

/// Ciphers, modes and hashes that both tools know.
const VOLUMES: &[&str] = &[
    "cipher-alg=aes-256",
    "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha1",
    "cipher-alg=aes-192,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha512",
    "cipher-alg=serpent-256,cipher-mode=xts,ivgen-alg=plain64",
    "cipher-alg=twofish-256,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha512",
    "cipher-alg=twofish-128,cipher-mode=ctr,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    "cipher-alg=cast5-128,cipher-mode=cbc,ivgen-alg=plain64",
];

#[test]
fn volumes_are_read_by_both_tools() {
    let bed = Bed::new();
    let opened = "driver=luks,key-secret=s,file.filename=x.luks";
    for (n, options) in VOLUMES.iter().enumerate() {
        let options = format!("key-secret=s,iter-time=10,{options}");
        for (maker, reader) in [("ours", "theirs"), ("theirs", "ours")] {
            let convert = [
                "convert", "--object", SECRET, "-f", "raw", "-O", "luks", "-o", &options, "in.raw", "x.luks",
            ];
            bed.ok(maker, &convert);
            let image_opts = ["--object", SECRET, "--image-opts", "driver=raw,file.filename=in.raw", opened];
            bed.ok(reader, &[&["compare"], image_opts.as_slice()].concat());
            let info = |who: &str| -> Value {
                let mut info: Value =
                    serde_json::from_str(&bed.ok(who, &["info", "--output=json", "x.luks"])).expect("JSON");
                info.as_object_mut().expect("object").retain(|k, _| k != "children" && k != "actual-size");
                // QEMU says so since 9.0.
                info["format-specific"]["data"].as_object_mut().expect("object").remove("detached-header");
                info
            };
            assert_eq!(info("ours"), info("theirs"), "{options}");
            // Without help of the kernel it opens AES of 128 and 256 bits only.
            if n < 2 {
                bed.ok("cryptsetup", &["open", "--test-passphrase", "--key-file", "key", "x.luks"]);
                let dump = bed.ok("cryptsetup", &["luksDump", "x.luks"]);
                assert!(
                    dump.contains("LUKS header information") && dump.contains("Key Slot 0: ENABLED"),
                    "{dump}"
                );
            }
        }
    }
    let size = |who| bed.ok(who, &["measure", "--output=json", "-O", "luks", "--size", "10M"]);
    let (ours, theirs): (Value, Value) = (
        serde_json::from_str(&size("ours")).expect("JSON"),
        serde_json::from_str(&bed.ok(
            "theirs",
            &[
                "measure",
                "--output=json",
                "-O",
                "luks",
                "--object",
                SECRET,
                "-o",
                "key-secret=s",
                "--size",
                "10M",
            ],
        ))
        .expect("JSON"),
    );
    assert_eq!(ours, theirs);
}

#[test]
fn key_slots_are_changed_by_both() {
    let bed = Bed::new();
    let second = "secret,id=t,file=key2";
    let opened = "driver=luks,key-secret=s,file.filename=x.luks";
    let amend = |who: &str, options: &str| {
        bed.run(
            who,
            &["amend", "--object", SECRET, "--object", second, "-o", options, "--image-opts", opened],
        )
    };
    let opens = |key: &str| {
        bed.run("cryptsetup", &["open", "--test-passphrase", "--key-file", key, "x.luks"]).status.success()
    };
    bed.ok(
        "cryptsetup",
        &[
            "luksFormat",
            "--type",
            "luks1",
            "-q",
            "--pbkdf-force-iterations",
            "1000",
            "--key-file",
            "key",
            "in.raw",
        ],
    );
    std::fs::rename(bed.dir().join("in.raw"), bed.dir().join("x.luks")).err();
    // What cryptsetup made is opened here, and the other way round after each change.
    let out = amend("ours", "state=active,new-secret=t,iter-time=10");
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(opens("key") && opens("key2"));
    let out = amend("ours", "state=inactive,old-secret=s");
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(!opens("key") && opens("key2"));
    let out = amend("ours", "state=inactive,keyslot=1");
    assert!(!out.status.success() && text(&out.stderr).contains("Invalid password"), "{}", text(&out.stderr));
    let opened = "driver=luks,key-secret=t,file.filename=x.luks";
    let out = bed.run(
        "ours",
        &["amend", "--object", second, "-o", "state=inactive,keyslot=1", "--image-opts", opened],
    );
    assert!(text(&out.stderr).contains("only active keyslot"), "{}", text(&out.stderr));
}

#[test]
fn detached_headers() {
    let bed = Bed::new();
    bed.ok(
        "ours",
        &[
            "create",
            "-q",
            "--object",
            SECRET,
            "-f",
            "luks",
            "-o",
            "key-secret=s,iter-time=10,detached-header=on",
            "head",
        ],
    );
    std::fs::write(bed.dir().join("body"), vec![0; 300 << 10]).expect("body");
    let opened = "driver=luks,key-secret=s,file.filename=body,header.filename=head";
    let image_opts = [
        "--object",
        SECRET,
        "--target-image-opts",
        "--image-opts",
        "driver=raw,file.filename=in.raw",
        opened,
    ];
    bed.ok("ours", &[&["convert", "-n"], image_opts.as_slice()].concat());
    bed.ok(
        "ours",
        &["compare", "--object", SECRET, "--image-opts", "driver=raw,file.filename=in.raw", opened],
    );
    let body = std::fs::read(bed.dir().join("body")).expect("body");
    assert!(body != std::fs::read(bed.dir().join("in.raw")).expect("data") && body.iter().any(|b| *b != 0));
    bed.ok("cryptsetup", &["open", "--test-passphrase", "--key-file", "key", "--header", "head", "body"]);
}

#[test]
fn encrypted_qcow2() {
    let bed = Bed::new();
    let opened = "driver=qcow2,encrypt.key-secret=s,file.filename=x.qcow2";
    for options in ["", ",cluster_size=4k,compat=0.10", ",extended_l2=on,preallocation=metadata"] {
        let options = format!("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10{options}");
        for (maker, reader) in [("ours", "theirs"), ("theirs", "ours")] {
            bed.ok(
                maker,
                &[
                    "convert", "--object", SECRET, "-f", "raw", "-O", "qcow2", "-o", &options, "in.raw",
                    "x.qcow2",
                ],
            );
            let image_opts = ["--object", SECRET, "--image-opts", "driver=raw,file.filename=in.raw", opened];
            bed.ok(reader, &["check", "--object", SECRET, "--image-opts", opened]);
            bed.ok(reader, &[&["compare"], image_opts.as_slice()].concat());
            let info = |who: &str| -> Value {
                let info = bed.ok(who, &["info", "--output=json", "x.qcow2"]);
                let mut specific =
                    serde_json::from_str::<Value>(&info).expect("JSON")["format-specific"].clone();
                let encrypt = specific["data"]["encrypt"].as_object_mut().expect("object");
                // QEMU says so since 9.0.
                encrypt.remove("detached-header");
                specific
            };
            assert_eq!(info("ours"), info("theirs"));
        }
        bed.ok("ours", &["snapshot", "--object", SECRET, "-c", "one", "--image-opts", opened]);
        bed.ok("theirs", &["check", "--object", SECRET, "--image-opts", opened]);
    }
    let measure = |who| {
        bed.ok(
            who,
            &[
                "measure",
                "--output=json",
                "--object",
                SECRET,
                "-O",
                "qcow2",
                "-o",
                "encrypt.format=luks,encrypt.key-secret=s",
                "--size",
                "100M",
            ],
        )
    };
    assert_eq!(measure("ours"), measure("theirs"));
    // Without the password, and with another.
    let fails = |object: &str, opened: &str| {
        let out = bed.run("ours", &["map", "--object", object, "--image-opts", opened]);
        assert!(!out.status.success());
        text(&out.stderr)
    };
    assert!(fails(SECRET, "driver=qcow2,file.filename=x.qcow2").contains("'encrypt.key-secret' is required"));
    assert!(fails("secret,id=s,data=wrong", opened).contains("Invalid password, cannot unlock any keyslot"));
    let second = "secret,id=t,file=key2";
    bed.ok(
        "ours",
        &[
            "amend",
            "--object",
            SECRET,
            "--object",
            second,
            "-o",
            "encrypt.state=active,encrypt.new-secret=t,encrypt.iter-time=10",
            "--image-opts",
            opened,
        ],
    );
    let with_second = "driver=qcow2,encrypt.key-secret=t,file.filename=x.qcow2";
    bed.ok("theirs", &["map", "--output=json", "--object", second, "--image-opts", with_second]);
}

#[test]
fn legacy_encryption_is_read_to_be_converted_and_not_written() {
    let bed = Bed::new();
    std::fs::write(bed.dir().join("key"), "a password longer than a key").expect("key");
    let options = "encrypt.format=aes,encrypt.key-secret=s,cluster_size=4k";
    bed.ok("theirs", &["convert", "--object", SECRET, "-O", "qcow2", "-o", options, "in.raw", "old"]);
    let image = "driver=qcow2,encrypt.key-secret=s,file.filename=old";
    bed.ok("ours", &["convert", "--object", SECRET, "--image-opts", image, "-O", "raw", "out.raw"]);
    bed.ok("theirs", &["compare", "-f", "raw", "-F", "raw", "in.raw", "out.raw"]);
    let said = |args: &[&str]| {
        let out = bed.run("ours", args);
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        text(&out.stderr)
    };
    assert!(said(&["convert", "-f", "qcow2", "-O", "raw", "old", "no"]).contains("encrypt.key-secret"));
    let change = ["resize", "--object", SECRET, "--image-opts", image, "+1M"];
    assert!(said(&change).contains("for reading only"), "{}", said(&change));
    let new = ["create", "-f", "qcow2", "-o", options, "new", "1M", "--object", SECRET];
    assert!(said(&new).contains("not made any more"));
}
