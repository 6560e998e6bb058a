//! A guest that counts, in one process and then in another.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::counter::Count;
use crate::http::{Api, Response};
use crate::qmp::Qmp;
use crate::{Program, riscv64_guest, x86_64_guest};

/// How long a guest may take for anything.
pub const LIMIT: Duration = Duration::from_secs(240);

/// A process that has a VM, or is to get one.
#[derive(Debug)]
pub struct Vmm {
    /// The process.
    pub program: Program,
    /// Its REST API.
    pub api: Api,
}

impl Vmm {
    /// Starts one whose API is at `dir/name`; `options` go to its command line.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(dir: &Path, name: &str, options: &[&str]) -> Self {
        let socket = dir.join(name);
        let mut args = vec!["--api-socket", socket.to_str().expect("UTF-8")];
        args.extend(options);
        let program = Program::run(&args);
        Self { program, api: Api::connect(&socket) }
    }

    /// `Running`, `Paused`; empty without a VM.
    pub fn state(&self) -> String {
        let info = self.api.request("GET", "vm.info", &Value::Null);
        if info.status != 200 {
            return String::new();
        }
        info.json()["state"].as_str().unwrap_or_default().to_owned()
    }

    /// Waits at `url` for a VM, on a thread that returns the answer. Returns when a UNIX socket is there.
    ///
    /// # Panics
    /// If the socket never appears.
    pub fn receive(&self, body: Value) -> JoinHandle<Response> {
        let api = self.api.clone();
        let url = body["receiver_url"].as_str().unwrap_or_default().to_owned();
        let answer = std::thread::spawn(move || api.request("PUT", "vm.receive-migration", &body));
        let deadline = Instant::now() + LIMIT;
        while let Some(path) = url.strip_prefix("unix:")
            && !Path::new(path).exists()
        {
            assert!(Instant::now() < deadline && !answer.is_finished(), "nobody listens at {url}");
            std::thread::sleep(Duration::from_millis(5));
        }
        answer
    }

    /// Sends the VM, again if nobody listens yet.
    ///
    /// # Panics
    /// If nobody ever listens.
    pub fn send(&self, body: &Value) -> Response {
        let deadline = Instant::now() + LIMIT;
        loop {
            let answer = self.api.request("PUT", "vm.send-migration", body);
            if !answer.body.contains("cannot connect to") || Instant::now() > deadline {
                return answer;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Waits until a process listens at a UNIX socket. Looks without connecting, which would be a peer's first word.
///
/// # Panics
/// If nobody ever listens there.
pub fn listening(socket: &Path) {
    let deadline = Instant::now() + LIMIT;
    // Address, users, protocol, flags (`__SO_ACCEPTCON` of a listener), type, state, inode, path.
    let there = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(3) == Some(&"00010000") && fields.get(7).is_some_and(|path| Path::new(path) == socket)
    };
    while !std::fs::read_to_string("/proc/net/unix").expect("readable").lines().any(there) {
        assert!(Instant::now() < deadline, "nobody listens at {}", socket.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a command that is refused until the last migration has been cleared away.
///
/// # Panics
/// If it is refused for ever.
pub fn soon(qmp: &mut Qmp, command: &str, arguments: &Value) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = qmp.command(command, arguments);
        if answer.get("return").is_some() {
            return;
        }
        assert!(Instant::now() < deadline, "{command}: {answer}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Migrates by QMP; returns the status at the end, and why it failed.
///
/// # Panics
/// If it does not end.
pub fn migrate(qmp: &mut Qmp, uri: &str) -> (String, String) {
    let deadline = Instant::now() + LIMIT;
    soon(qmp, "migrate", &json!({ "uri": uri }));
    loop {
        let info = qmp.ok("query-migrate", json!({}));
        let text = |key: &str| info[key].as_str().unwrap_or_default().to_owned();
        if matches!(text("status").as_str(), "completed" | "failed") {
            return (text("status"), text("error-desc"));
        }
        assert!(Instant::now() < deadline, "{info}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A riscv64 VM that runs `test` and writes to the file `console`.
pub fn config(console: &Path, test: &str) -> Value {
    let payload = json!({
        "kernel": riscv64_guest().join("Image"),
        "initramfs": riscv64_guest().join("initramfs.cpio"),
    });
    config_of("riscv64", payload, console, test)
}

/// The same for a PC with Debian's amd64 kernel.
pub fn pc_config(console: &Path, test: &str) -> Value {
    let payload = json!({
        "kernel": x86_64_guest().join("vmlinuz"),
        "initramfs": x86_64_guest().join("initramfs.cpio"),
    });
    // The kernel measures the TSC against the interval timer and believes the shortest time; if its vCPU rests meanwhile, on a busy
    // host, its clock then runs far too fast. Under translation the TSC counts nanoseconds.
    config_of("x86_64", payload, console, &format!("{test} tsc_early_khz=1000000"))
}

fn config_of(arch: &str, mut payload: Value, console: &Path, test: &str) -> Value {
    payload["cmdline"] = format!("console=ttyS0 quiet holdfast.test={test}").into();
    json!({
        "arch": arch,
        "accel": "tcg",
        "cpus": { "boot_vcpus": 2, "max_vcpus": 2 },
        "memory": { "size": 256u64 << 20 },
        "payload": payload,
        "serial": { "mode": "File", "file": console },
        "console": { "mode": "Off" },
    })
}

/// What the guest writes, to a file that both processes have open.
#[derive(Debug, Clone)]
pub struct Console(pub PathBuf);

impl Console {
    /// All of it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.0).unwrap_or_default()).into_owned()
    }

    /// Waits until it has counted `more` numbers further than now.
    ///
    /// # Panics
    /// If it does not, or a number or checksum is wrong.
    pub fn goes_on(&self, more: u64) {
        let want = self.counted() + more;
        let deadline = Instant::now() + LIMIT;
        while self.counted() < want {
            assert!(Instant::now() < deadline, "it does not count up to {want}:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the checksum of the guest's memory has been found right.
    ///
    /// # Panics
    /// If it never is, or was wrong once.
    pub fn sum_is_good(&self) {
        let deadline = Instant::now() + LIMIT;
        while !self.text().contains("SUM GOOD") {
            assert!(Instant::now() < deadline, "memory is never summed up:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(!self.text().contains("SUM BAD"), "memory got lost:\n{}", self.text());
    }

    /// Waits until each of the disks has been written and verified `more` times further than now.
    ///
    /// # Panics
    /// If it is not, or something was lost.
    pub fn disks_go_on(&self, disks: &[&str], more: usize) {
        let done = |text: &str, disk: &str| text.matches(&format!("DISK GOOD {disk} ")).count();
        let text = self.text();
        let want: Vec<_> = disks.iter().map(|disk| done(&text, disk) + more).collect();
        let deadline = Instant::now() + LIMIT;
        loop {
            let text = self.text();
            assert!(!text.contains("DISK BAD"), "a disk lost something:\n{text}");
            if disks.iter().zip(&want).all(|(disk, want)| done(&text, disk) >= *want) {
                return;
            }
            assert!(Instant::now() < deadline, "{disks:?} do not come to {want:?}:\n{text}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What the guest's clock showed when it last counted, in seconds since it started; 0 before that.
    pub fn clock(&self) -> f64 {
        Count::all(&self.text()).last().map_or(0.0, |count| count.uptime)
    }

    /// The last number, all checked.
    ///
    /// # Panics
    /// If a number is missing or its checksum is wrong, or memory got lost.
    pub fn counted(&self) -> u64 {
        let text = self.text();
        assert!(!text.contains("SUM BAD"), "memory got lost:\n{text}");
        let counts = Count::all(&text);
        Count::NONE.goes_on_with(&counts);
        assert!(counts.is_sorted_by_key(|count| count.uptime), "the clock went back:\n{text}");
        counts.last().map_or(0, |count| count.number)
    }
}
