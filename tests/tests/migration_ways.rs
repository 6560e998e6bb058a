//! The ways that a running VM can go: TLS by QMP's objects, a file by QMP, within Landlock's limits, post-copy into huge pages.

use std::path::Path;

use holdfast_tests::Program;
use holdfast_tests::migration::{Vmm, migrate, soon};
use holdfast_tests::qmp::Qmp;
use holdfast_tests::small::{Counter, config, options};
use holdfast_tests::tls::certificates;
use serde_json::{Value, json};

/// A process with the small guest of `dir`, driven by QMP; `more` options.
fn process(dir: &Path, name: &str, more: &[&str]) -> (Program, Qmp) {
    let socket = dir.join(name);
    let mut args = options(dir, "tcg");
    args.extend(["--qmp".to_owned(), format!("unix:{}", socket.display())]);
    args.extend(more.iter().map(|&option| option.to_owned()));
    let program = Program::run(&args);
    (program, Qmp::connect(&socket))
}

fn on(capability: &str) -> Value {
    json!({ "capabilities": [{ "capability": capability, "state": true }] })
}

#[test]
fn tls_by_objects_takes_who_has_the_right_keys_and_nobody_else() {
    let dir = tempfile::tempdir().expect("directory");
    // An address of this machine that nobody else uses meanwhile, so that the port can be a fixed one.
    let pid = std::process::id();
    let uri =
        format!("tcp:127.{}.{}.{}:7443", ((pid >> 16) & 0x3f) | 0x40, (pid >> 8) & 0xff, (pid & 0xff) | 1);
    let object = |id: &str, keys: &str, endpoint: &str| {
        let keys = dir.path().join(keys).display().to_string();
        json!({ "qom-type": "tls-creds-x509", "id": id, "endpoint": endpoint, "dir": keys })
    };
    for keys in ["keys", "others"] {
        std::fs::create_dir(dir.path().join(keys)).expect("directory");
        certificates(&dir.path().join(keys), "vm.example");
    }
    let (first, mut here) = process(dir.path(), "a", &[]);
    let counter = Counter(dir.path().join("console"));
    counter.goes_on(2);
    let (_second, mut there) = process(dir.path(), "b", &["--incoming", "defer"]);
    there.ok("object-add", object("server", "keys", "server"));
    there.ok("migrate-set-parameters", json!({ "tls-creds": "server" }));
    here.ok("object-add", object("good", "keys", "client"));
    here.ok("object-add", object("bad", "others", "client"));
    let cases = [("", "vm.example"), ("bad", "vm.example"), ("good", "other.example")];
    for (creds, host) in cases {
        soon(&mut there, "migrate-incoming", &json!({ "uri": uri, "exit-on-error": false }));
        here.ok("migrate-set-parameters", json!({ "tls-creds": creds, "tls-hostname": host }));
        let (status, error) = migrate(&mut here, &uri);
        assert_eq!(status, "failed", "{creds} {host}");
        assert!(!error.is_empty(), "it says why");
        assert_eq!(here.ok("query-status", json!({}))["status"], "running");
        there.until("query-migrate", "status", "failed");
        counter.goes_on(1);
    }
    soon(&mut there, "migrate-incoming", &json!({ "uri": uri, "exit-on-error": false }));
    here.ok("migrate-set-parameters", json!({ "tls-creds": "good", "tls-hostname": "vm.example" }));
    assert_eq!(migrate(&mut here, &uri), ("completed".to_owned(), String::new()));
    there.until("query-status", "status", "running");
    drop(first);
    counter.goes_on(2);
}

#[test]
fn a_vm_goes_into_a_file_over_qmp_and_comes_out_by_incoming() {
    let dir = tempfile::tempdir().expect("directory");
    let uri = format!("file:{}", dir.path().join("vm").display());
    let (first, mut here) = process(dir.path(), "a", &[]);
    let counter = Counter(dir.path().join("console"));
    counter.goes_on(2);
    here.ok("migrate-set-capabilities", on("mapped-ram"));
    let socket = json!({ "uri": format!("unix:{}", dir.path().join("m").display()) });
    assert!(here.fails("migrate", socket).contains("requires seekable transport"));
    assert_eq!(migrate(&mut here, &uri), ("completed".to_owned(), String::new()));
    assert_eq!(here.ok("query-status", json!({}))["status"], "postmigrate");
    drop(first);
    let before = counter.counted();
    let (_second, mut there) = process(dir.path(), "b", &["--incoming", &uri]);
    there.until("query-status", "status", "running");
    counter.goes_on(2);
    assert!(counter.counted() >= before + 2);
}

#[test]
fn processes_that_landlock_limits_send_and_receive_where_they_may() {
    let (dir, outside) = (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
    let rule = format!("path={},access=rw", dir.path().display());
    let limits = ["--landlock", "--landlock-rules", rule.as_str()];
    let first = Vmm::start(dir.path(), "a", &limits);
    first.api.put("vm.create", &config(dir.path(), "tcg"));
    first.api.put("vm.boot", &Value::Null);
    let counter = Counter(dir.path().join("console"));
    counter.goes_on(2);
    let second = Vmm::start(dir.path(), "b", &limits);
    let refused = "Landlock keeps this process";
    for scheme in ["unix", "file"] {
        let url = format!("{scheme}:{}", outside.path().join("m").display());
        let sent = first.api.request("PUT", "vm.send-migration", &json!({ "destination_url": url }));
        assert!(sent.status == 500 && sent.body.contains(refused), "{scheme}: {sent:?}");
        let came = second.api.request("PUT", "vm.receive-migration", &json!({ "receiver_url": url }));
        assert!(came.status == 500 && came.body.contains(refused), "{scheme}: {came:?}");
    }
    counter.goes_on(1);
    let url = format!("unix:{}", dir.path().join("m").display());
    let came = second.receive(json!({ "receiver_url": url }));
    let sent = first.send(&json!({ "destination_url": url, "downtime_ms": 500 }));
    assert!(sent.status < 300, "{sent:?}");
    let came = came.join().expect("the thread");
    assert!(came.status < 300, "{came:?}");
    counter.goes_on(2);
}

/// Huge pages of the host's that are kept for a test.
struct HugePages(u64);

impl HugePages {
    const COUNT: &str = "/proc/sys/vm/nr_hugepages";

    fn number(path: &str) -> u64 {
        std::fs::read_to_string(path).ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0)
    }

    /// `more` of 2 MiB than there are, if the host has them.
    fn reserve(more: u64) -> Option<Self> {
        let before = Self::number(Self::COUNT);
        let this = Self(more);
        // Memory that is in pieces is put together first; a host that cannot do so says in the end that it has too few.
        let _ = std::fs::write("/proc/sys/vm/drop_caches", "1");
        let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
        std::fs::write(Self::COUNT, (before + more).to_string()).ok()?;
        (Self::number(Self::COUNT) >= before + more).then_some(this)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let left = Self::number(Self::COUNT).saturating_sub(self.0);
        // The host keeps them if it must.
        let _ = std::fs::write(Self::COUNT, left.to_string());
    }
}

#[test]
fn pages_follow_a_guest_into_huge_pages() {
    let Some(_pages) = HugePages::reserve(72) else {
        eprintln!("skipped: needs 72 huge pages of 2 MiB, and this host does not give them");
        return;
    };
    for shared in [false, true] {
        let dir = tempfile::tempdir().expect("directory");
        let mut config = config(dir.path(), "tcg");
        config["memory"] = json!({ "size": 64u64 << 20, "hugepages": true, "shared": shared });
        let first = Vmm::start(dir.path(), "a", &[]);
        first.api.put("vm.create", &config);
        first.api.put("vm.boot", &Value::Null);
        let counter = Counter(dir.path().join("console"));
        counter.goes_on(2);
        let second = Vmm::start(dir.path(), "b", &[]);
        let url = format!("unix:{}", dir.path().join("m").display());
        let came = second.receive(json!({ "receiver_url": url }));
        let sent = first.send(&json!({ "destination_url": url, "memory_mode": "Postcopy" }));
        assert!(sent.status < 300, "shared={shared}: {sent:?}");
        let came = came.join().expect("the thread");
        assert!(came.status < 300, "shared={shared}: {came:?}");
        drop(first);
        counter.goes_on(3);
        assert_eq!(second.state(), "Running");
    }
}
