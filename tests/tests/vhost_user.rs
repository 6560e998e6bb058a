//! Debian's drivers against devices of back ends that others wrote: virtiofsd.
//!
//! Needs root and virtiofsd: of QEMU's packages (bookworm), of its own (later suites), or named by
//! `HOLDFAST_VIRTIOFSD`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use holdfast_tests::devices::{run, sha256};
use holdfast_tests::{Program, printed, riscv64_args, x86_64_args};

const BOOT: Duration = Duration::from_secs(240);

/// A running virtiofsd.
struct Virtiofsd(Child);

impl Virtiofsd {
    /// Shares `dir` on `socket`.
    fn share(dir: &Path, socket: &Path) -> Self {
        let named = std::env::var_os("HOLDFAST_VIRTIOFSD").map(PathBuf::from);
        let known = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"].map(PathBuf::from);
        let program = named.into_iter().chain(known).find(|path| path.exists());
        let program = program.expect("virtiofsd is needed: qemu-system-common or virtiofsd");
        // The one written in C has options of its own.
        let old = program.starts_with("/usr/lib/qemu");
        let mut command = Command::new(program);
        command.arg(format!("--socket-path={}", socket.display()));
        if old {
            command.args(["-o", &format!("source={}", dir.display()), "-o", "cache=auto"]);
        } else {
            command.arg(format!("--shared-dir={}", dir.display()));
        }
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("virtiofsd starts");
        let this = Self(child);
        let deadline = Instant::now() + Duration::from_secs(30);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "virtiofsd does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        this
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn shared(mut args: Vec<String>) {
    let dir = tempfile::tempdir().expect("directory");
    let share = dir.path().join("share");
    std::fs::create_dir(&share).expect("directory");
    let content: Vec<u8> =
        (0..1_000_000u32).flat_map(|i| (i.wrapping_mul(2_654_435_761) >> 7).to_le_bytes()).collect();
    std::fs::write(share.join("content"), content).expect("file");
    let sums = run(Command::new("sha256sum").arg("content").current_dir(&share));
    std::fs::write(share.join("SUMS"), sums).expect("file");
    let socket = dir.path().join("fs.sock");
    let _back_end = Virtiofsd::share(&share, &socket);
    let memory = args.iter_mut().find(|arg| *arg == "size=512M").expect("the size of RAM");
    *memory = "size=512M,shared=on".to_owned();
    args.extend(["--fs".to_owned(), format!("tag=share,socket={}", socket.display())]);
    let mut vm = Program::run(&args);
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    assert!(vm.wait_exit(BOOT).success());
    let output = vm.output();
    assert!(output.contains("content: OK"), "{output}");
    let data = sha256(&share.join("data"));
    for key in ["DATA-SHA256", "AGAIN-1", "AGAIN-2", "AGAIN-3"] {
        assert_eq!(printed(&output, key)[..64], data, "{key}");
    }
    assert_eq!(printed(&output, "MANY"), "100");
    assert!(!share.join("many").exists());
    assert!(printed(&output, "MISSING").contains("No such file"), "{output}");
}

#[test]
fn a_riscv64_guest_shares_a_directory() {
    shared(riscv64_args(2, "fs"));
}

#[test]
fn an_x86_64_guest_shares_a_directory_and_runs_code_from_it() {
    shared(x86_64_args(2, "fs"));
}
