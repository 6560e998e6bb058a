//! AVX-512 under translation: OpenSSL's code for it in a guest computes what it computes on this machine without.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use holdfast_tests::{Program, printed, x86_64_args, x86_64_initramfs};

const BOOT: Duration = Duration::from_secs(300);
const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const IV: &str = "000102030405060708090a0b";
/// OpenSSL takes this machine for one with nothing but SSE2.
const PLAIN: (&str, &str) = ("OPENSSL_ia32cap", "~0x0:~0x0");

fn openssl(dir: &Path, args: &str) -> Vec<u8> {
    let output = Command::new("openssl")
        .args(args.split_whitespace())
        .env(PLAIN.0, PLAIN.1)
        .current_dir(dir)
        .output()
        .expect("openssl is needed for this test");
    assert!(output.status.success(), "openssl {args}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The SHA-256 of what `openssl ARGS` gives.
fn sum(dir: &Path, args: &str) -> String {
    std::fs::write(dir.join("given"), openssl(dir, args)).expect("written");
    let sum = openssl(dir, "dgst -sha256 -r given");
    String::from_utf8_lossy(&sum).chars().take(64).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

/// A guest with this CPU model; what it printed.
fn guest(dir: &Path, profile: &str) -> String {
    let initramfs = dir.join("initramfs.cpio");
    x86_64_initramfs(&initramfs, "crypto/init", "openssl", &["data", "key.pem", "cms"].map(|f| dir.join(f)));
    let mut args = x86_64_args(1, "");
    for (key, value) in [
        ("--cpus", format!("boot=1,profile={profile}")),
        ("--initramfs", initramfs.display().to_string()),
        ("--cmdline", "console=ttyS0 quiet rdinit=/test-init".into()),
    ] {
        let at = args.iter().position(|a| a == key).expect("there");
        args[at + 1] = value;
    }
    let mut vm = Program::run(&args);
    vm.wait_for("FINISHED", BOOT);
    assert!(vm.wait_exit(BOOT).success(), "power-off ends the program with success");
    vm.output()
}

#[test]
fn openssl_computes_in_a_guest_what_it_computes_here() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    let data: String = (1..100_000).map(|n| format!("{n}\n")).collect();
    std::fs::write(dir.join("data"), data).expect("written");
    openssl(dir, "genrsa -out key.pem 2048");
    openssl(dir, "req -x509 -key key.pem -subj /CN=guest -out certificate.pem");
    openssl(dir, "cms -encrypt -binary -aes-256-gcm -in data -outform DER -out cms certificate.pem");
    let want = [
        ("CHACHA20", sum(dir, &format!("enc -chacha20 -K {KEY} -iv 00000000{IV} -in data"))),
        ("POLY1305", text(&openssl(dir, &format!("mac -macopt hexkey:{KEY} -in data poly1305")))),
        (
            "GMAC",
            text(&openssl(
                dir,
                &format!("mac -cipher AES-256-GCM -macopt hexkey:{KEY} -macopt hexiv:{IV} -in data GMAC"),
            )),
        ),
        ("RSA", sum(dir, "dgst -sha256 -sign key.pem data")),
        ("CMS", text(&openssl(dir, "dgst -sha256 -r data")).chars().take(64).collect()),
    ];
    let has = std::fs::read_to_string("/proc/cpuinfo").expect("Linux").contains("avx512vl");
    for (profile, wide) in [("max", has), ("Skylake-Server", has), ("\"max,-avx512f\"", false)] {
        let output = guest(dir, profile);
        let flags = printed(&output, "FLAGS");
        assert_eq!(flags.contains("avx512f"), wide, "{profile}: {flags}");
        assert_eq!(flags.contains("avx512vl"), wide, "{profile}: {flags}");
        for (what, want) in &want {
            assert_eq!(&printed(&output, what), want, "{what} with {profile}");
        }
    }
}
