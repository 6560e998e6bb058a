//! What the end-to-end tests share: the program under test, guests, and talking to both.

pub mod back_ends;
pub mod counter;
pub mod dbus;
pub mod devices;
pub mod http;
pub mod lab;
pub mod migration;
pub mod pc;
pub mod qmp;
pub mod relay;
pub mod shell;
pub mod small;
pub mod tls;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// The program under test: `HOLDFAST_BIN`, or the newest build in the target directory.
///
/// # Panics
/// If there is none.
pub fn holdfast() -> PathBuf {
    if let Some(path) = std::env::var_os("HOLDFAST_BIN") {
        return path.into();
    }
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    let built = ["release", "debug"].map(|profile| target.join(profile).join("holdfast"));
    let newest =
        built.into_iter().filter(|p| p.exists()).max_by_key(|p| p.metadata().and_then(|m| m.modified()).ok());
    newest.expect("build the program first (cargo build --release), or set HOLDFAST_BIN")
}

/// Runs `guests/fetch-NAME`, which prints a directory; `variable` names another one.
fn fetched(variable: &str, script: &str, guest: &[&str]) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests").join(script);
    let output =
        Command::new(&script).args(guest).stderr(Stdio::inherit()).output().expect("the script runs");
    assert!(output.status.success(), "{} {guest:?} fails", script.display());
    String::from_utf8(output.stdout).expect("a path").trim().into()
}

/// The directory with Debian's riscv64 `Image` and `initramfs.cpio`, fetched if it is missing.
///
/// # Panics
/// If it cannot be fetched.
pub fn riscv64_guest() -> PathBuf {
    fetched("HOLDFAST_RISCV64_GUEST", "fetch-riscv64", &[])
}

/// The directory with Debian's amd64 `vmlinuz`, `vmlinux` and `initramfs.cpio`, fetched if it is missing.
///
/// # Panics
/// If it cannot be fetched.
pub fn x86_64_guest() -> PathBuf {
    fetched("HOLDFAST_X86_64_GUEST", "fetch-x86_64", &[])
}

/// Writes the amd64 guest's initramfs to `to`, with `program` of this machine behind it, more `files` in the root directory
/// and the script `init`, of this folder, as `/test-init`.
///
/// # Panics
/// If the program is not installed, or the file cannot be written.
pub fn x86_64_initramfs(to: &Path, init: &str, program: &str, files: &[PathBuf]) {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let more = to.with_extension("more");
    let mut pack = Command::new(here.join("guests/pack"));
    let status = pack.arg(&more).arg(here.join(init)).arg(program).args(files).status().expect("a script");
    assert!(status.success(), "{program} cannot be packed");
    let mut all = std::fs::read(x86_64_guest().join("initramfs.cpio")).expect("the guest's initramfs");
    all.extend(std::fs::read(more).expect("packed"));
    std::fs::write(to, all).expect("written");
}

/// The directory with `vmlinuz` and `initramfs.cpio` of another x86 guest of `fetch-debian`: `x86_64-generic`,
/// `x86_64-bookworm`, `x86_64-bookworm-cloud` or `i386`; the first three have a `vmlinux` too.
///
/// # Panics
/// If it cannot be fetched.
pub fn debian_guest(name: &str) -> PathBuf {
    let variable = format!("HOLDFAST_{}_GUEST", name.to_uppercase().replace('-', "_"));
    fetched(&variable, "fetch-debian", &[name])
}

/// The file to put behind the riscv64 guest's initramfs, so that it has Debian's fio, e2fsck and mke2fs in /usr/bin.
///
/// # Panics
/// If it cannot be fetched.
pub fn fio_archive() -> PathBuf {
    fetched("HOLDFAST_FIO_GUEST", "fetch-fio", &[]).join("fio.cpio")
}

/// As [`fio_archive`], for Debian's socat.
///
/// # Panics
/// If it cannot be fetched.
pub fn socat_archive() -> PathBuf {
    fetched("HOLDFAST_SOCAT_GUEST", "fetch-programs", &["socat"]).join("socat.cpio")
}

/// As [`fio_archive`] for the x86_64 guest: Debian's cryptsetup, e2fsck and mke2fs, and the modules of dm-crypt in
/// /lib/modules/crypt, whose `order` says in which order they are loaded.
///
/// # Panics
/// If it cannot be fetched.
pub fn cryptsetup_archive() -> PathBuf {
    fetched("HOLDFAST_CRYPTSETUP_GUEST", "fetch-programs", &["cryptsetup"]).join("cryptsetup.cpio")
}

/// As [`fio_archive`] for the x86_64 guest: the modules of taps, vhost-net and vhost-vsock in /lib/modules/vhost, whose `order` says
/// in which order they are loaded.
///
/// # Panics
/// If it cannot be fetched.
pub fn vhost_archive() -> PathBuf {
    fetched("HOLDFAST_VHOST_GUEST", "fetch-vhost", &[]).join("vhost.cpio")
}

/// Puts an archive behind the initramfs that `args` boot; both together go to a file in `dir`.
///
/// # Panics
/// If there is no initramfs, or files cannot be read or written.
pub fn add_archive(args: &mut [String], archive: &Path, dir: &Path) {
    let at = args.iter().position(|arg| arg == "--initramfs").expect("an initramfs") + 1;
    let mut bytes = std::fs::read(&args[at]).expect("initramfs");
    bytes.extend(std::fs::read(archive).expect("archive"));
    let both = dir.join("initramfs.cpio");
    std::fs::write(&both, bytes).expect("written");
    args[at] = both.display().to_string();
}

/// The directory with virtiofsd 1.14, vhost-device-vsock and fsx, built if they are missing, which takes three minutes.
///
/// # Panics
/// If they cannot be built.
pub fn back_ends_of_others() -> PathBuf {
    fetched("HOLDFAST_BACK_ENDS", "fetch-back-ends", &[])
}

/// Arguments of a q35 under translation, with the first serial port on the program's standard streams and nothing to boot.
pub fn q35_args(vcpus: u32) -> Vec<String> {
    let args = [
        ["--arch", "x86_64"],
        ["--machine", "q35"],
        ["--accel", "tcg"],
        ["--cpus", &format!("boot={vcpus}")],
        ["--memory", "size=512M"],
        ["--serial", "tty"],
        ["--console", "off"],
    ];
    args.into_iter().flatten().map(str::to_owned).collect()
}

/// Arguments that boot the kernel `kernel` of the x86 guest in `dir`; `options` go to its command line.
pub fn x86_args(vcpus: u32, dir: &Path, kernel: &str, options: &str) -> Vec<String> {
    let mut args = q35_args(vcpus);
    let payload = [
        ["--kernel", &dir.join(kernel).display().to_string()],
        ["--initramfs", &dir.join("initramfs.cpio").display().to_string()],
        ["--cmdline", &format!("console=ttyS0 quiet {options}")],
    ];
    args.extend(payload.into_iter().flatten().map(str::to_owned));
    args
}

/// As [`riscv64_args`] for the x86_64 guest.
pub fn x86_64_args(vcpus: u32, test: &str) -> Vec<String> {
    let test = if test.is_empty() { String::new() } else { format!("holdfast.test={test}") };
    x86_args(vcpus, &x86_64_guest(), "vmlinuz", &test)
}

/// The value that the guest printed after `key`.
///
/// # Panics
/// If the guest printed no line that starts with `key`.
pub fn printed(output: &str, key: &str) -> String {
    let line = output.lines().find_map(|l| l.trim().strip_prefix(key));
    line.unwrap_or_else(|| panic!("the guest printed no {key}:\n{output}")).trim().to_owned()
}

/// Arguments that boot the riscv64 guest under translation with its console on the program's
/// standard output. `test` is what the guest's init is to run; empty for a shell.
pub fn riscv64_args(vcpus: u32, test: &str) -> Vec<String> {
    let guest = riscv64_guest();
    let test = if test.is_empty() { String::new() } else { format!(" holdfast.test={test}") };
    let args = [
        ["--arch", "riscv64"],
        ["--machine", "virt"],
        ["--accel", "tcg"],
        ["--cpus", &format!("boot={vcpus}")],
        ["--memory", "size=512M"],
        ["--kernel", &format!("{}/Image", guest.display())],
        ["--initramfs", &format!("{}/initramfs.cpio", guest.display())],
        ["--cmdline", &format!("console=ttyS0 quiet{test}")],
        ["--serial", "tty"],
        ["--console", "off"],
    ];
    args.into_iter().flatten().map(str::to_owned).collect()
}

#[derive(Debug, Default)]
struct Seen {
    bytes: Vec<u8>,
    /// How many of its two streams have ended. What it says at last may be on either.
    ended: u8,
}

/// A running program whose output is collected.
#[derive(Debug)]
pub struct Program {
    child: Child,
    stdin: Option<ChildStdin>,
    seen: Arc<(Mutex<Seen>, Condvar)>,
}

impl Program {
    /// Starts `holdfast run` with `args`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn run<S: AsRef<str>>(args: &[S]) -> Self {
        let mut command = Command::new(holdfast());
        command.arg("run").args(args.iter().map(AsRef::as_ref));
        Self::spawn(command)
    }

    /// Starts `command` with its standard streams connected.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn spawn(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let seen = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
        let out = child.stdout.take().expect("piped");
        let err = child.stderr.take().expect("piped");
        collect(out, Arc::clone(&seen));
        collect(err, Arc::clone(&seen));
        let stdin = child.stdin.take();
        Self { child, stdin, seen }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All output so far.
    ///
    /// # Panics
    /// If a collecting thread panicked.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.seen.0.lock().expect("not poisoned").bytes).into_owned()
    }

    /// Waits until the output after byte `from` contains `text`; returns the offset after it.
    ///
    /// # Panics
    /// If the program ends or `limit` passes first; the message shows the output.
    pub fn wait_for_after(&self, text: &str, from: usize, limit: Duration) -> usize {
        let deadline = Instant::now() + limit;
        let (lock, changed) = &*self.seen;
        let mut seen = lock.lock().expect("not poisoned");
        loop {
            let at =
                seen.bytes.get(from..).and_then(|b| b.windows(text.len()).position(|w| w == text.as_bytes()));
            if let Some(at) = at {
                return from + at + text.len();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                seen.ended < 2 && !left.is_zero(),
                "`{text}` did not come; the output ends:\n{}",
                tail(&String::from_utf8_lossy(&seen.bytes))
            );
            seen = changed.wait_timeout(seen, left).expect("not poisoned").0;
        }
    }

    /// [`Program::wait_for_after`] from the start of the output.
    pub fn wait_for(&self, text: &str, limit: Duration) -> usize {
        self.wait_for_after(text, 0, limit)
    }

    /// Types `text`.
    ///
    /// # Panics
    /// If the program no longer reads.
    pub fn type_in(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("standard input is open");
        stdin.write_all(text.as_bytes()).expect("the program reads");
        stdin.flush().expect("the program reads");
    }

    /// Waits for the program to end.
    ///
    /// # Panics
    /// If `limit` passes first.
    pub fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end; the output ends:\n{}", tail(&self.output()));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Says what it is at, for a test that fails: what it said last, how it ended or what each of its threads waits in.
    fn describe(&mut self) {
        let pid = self.pid();
        eprintln!("process {pid} ({:?}) said last:\n{}", self.child.try_wait(), tail(&self.output()));
        for thread in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            // The number of a system call with its arguments, or `running`; the kernel's function that it waits in.
            let [name, syscall, place] = ["comm", "syscall", "wchan"].map(|file| {
                let text = std::fs::read_to_string(thread.path().join(file)).unwrap_or_default();
                text.trim().to_owned()
            });
            eprintln!("  {name}: {syscall} {place}");
        }
    }

    /// Kills it outright.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.describe();
        }
        self.kill();
    }
}

fn tail(text: &str) -> &str {
    let start = text.len().saturating_sub(3000);
    let start = (start..text.len()).find(|&i| text.is_char_boundary(i)).unwrap_or(text.len());
    &text[start..]
}

fn collect(mut from: impl Read + Send + 'static, seen: Arc<(Mutex<Seen>, Condvar)>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            let n = from.read(&mut buffer).unwrap_or(0);
            let (lock, changed) = &*seen;
            let mut seen = lock.lock().expect("not poisoned");
            seen.bytes.extend_from_slice(&buffer[..n]);
            seen.ended += u8::from(n == 0);
            changed.notify_all();
            if n == 0 {
                return;
            }
        }
    });
}
