//! The program from outside: client verbs against a server, event monitor, generated texts.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use holdfast_api::cli::{Endpoint, RunOptions};
use holdfast_api::monitor::{self, EventMonitor};
use holdfast_api::process;
use holdfast_config::{PayloadConfig, VmConfig};
use holdfast_threads::PlainSpawner;
use holdfast_vmm::control::{Event, EventBus};
use serde_json::{Value, json};

const HOLDFAST: &str = env!("CARGO_BIN_EXE_holdfast");

fn holdfast(arguments: &[&str]) -> Output {
    Command::new(HOLDFAST).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn ctl(socket: &Path, verb: &[&str]) -> Result<String, String> {
    let mut arguments = vec!["ctl", "--api-socket", socket.to_str().unwrap()];
    arguments.extend(verb);
    let output = holdfast(&arguments);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn wait_for(socket: &Path) {
    for _ in 0..500 {
        if std::os::unix::net::UnixStream::connect(socket).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("nobody listens at {}", socket.display());
}

fn bootable() -> VmConfig {
    let payload = Some(PayloadConfig { kernel: Some("/k".into()), ..PayloadConfig::default() });
    VmConfig { payload, ..VmConfig::default() }
}

#[test]
fn ctl_drives_a_whole_process() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api");
    let events = directory.path().join("events");
    let options = RunOptions {
        config: Some(Box::new(bootable())),
        api_socket: Some(Endpoint::Path(socket.clone())),
        event_monitor: Some(Endpoint::Path(events.clone())),
        ..RunOptions::default()
    };
    let ended = std::thread::spawn(move || {
        process::run(options, &PlainSpawner::shared(), &process::Unconfined, |inbox| {
            common::FakeManager::default().serve(&inbox)
        })
        .unwrap()
    });
    wait_for(&socket);
    let go = |verb: &[&str]| ctl(&socket, verb).unwrap();
    assert!(go(&["ping"]).contains("54.0.0"));
    while serde_json::from_str::<Value>(&go(&["info"])).unwrap()["state"] != "Running" {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(go(&["pause"]), "");
    assert!(
        ctl(&socket, &["pause"])
            .unwrap_err()
            .contains("status 500: Error from API: The VM could not be paused")
    );
    assert!(go(&["add-disk", "path=/d,id=mine"]).contains("\"id\":\"mine\""));
    assert_eq!(go(&["snapshot", "file:///tmp/x"]), "");
    assert_eq!(go(&["resume"]), "");
    assert_eq!(go(&["delete"]), "");
    let config = directory.path().join("vm.json");
    std::fs::write(&config, json!({ "payload": { "kernel": "/k" } }).to_string()).unwrap();
    assert_eq!(go(&["create", config.to_str().unwrap()]), "");
    let file = tempfile::tempfile().unwrap();
    // SAFETY: dup gives the child a copy that survives exec.
    let fd = unsafe { libc::dup(file.as_raw_fd()) };
    assert_eq!(go(&["add-net", &format!("id=n,fd={fd}")]), "");
    assert_eq!(go(&["boot"]), "");
    let counters: Value = serde_json::from_str(&go(&["counters"])).unwrap();
    let inodes: Vec<u64> = counters["n"].as_object().unwrap().values().filter_map(Value::as_u64).collect();
    assert_eq!(inodes, [common::inode(&file)]);
    assert_eq!(go(&["shutdown-vmm"]), "");
    assert_eq!(ended.join().unwrap(), 0);
    assert!(!socket.exists());
    let written = std::fs::read_to_string(events).unwrap();
    let names: Vec<String> = written
        .split("\n\n")
        .filter(|text| !text.is_empty())
        .map(|text| serde_json::from_str::<Value>(text).unwrap()["event"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names[..5], ["starting", "booting", "booted", "pausing", "paused"]);
    assert_eq!(names.last().unwrap(), "shutdown");
    assert!(ctl(&socket, &["ping"]).unwrap_err().contains("cannot connect to the API socket"));
}

#[test]
fn the_event_monitor_writes_cloud_hypervisors_text_to_a_fifo() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the name is a C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let reader = std::thread::spawn({
        let path = path.clone();
        move || {
            let mut text = String::new();
            std::fs::File::open(path).unwrap().read_to_string(&mut text).unwrap();
            text
        }
    });
    let file = monitor::open(&Endpoint::Path(path)).unwrap();
    let bus = EventBus::new();
    let monitor = EventMonitor::start(&PlainSpawner, &bus, file).unwrap();
    bus.publish(Event::Booted);
    bus.publish(Event::PowerButton);
    bus.publish(Event::DeviceActivated { id: "_disk0".to_owned() });
    monitor.stop();
    drop(bus);
    let text = reader.join().unwrap();
    let (first, rest) = text.split_once("\n\n").unwrap();
    let mut lines = first.lines();
    assert_eq!(lines.next(), Some("{"));
    assert_eq!(lines.next(), Some("  \"timestamp\": {"));
    assert!(
        first.ends_with("  \"source\": \"vm\",\n  \"event\": \"booted\",\n  \"properties\": null\n}"),
        "{first}"
    );
    let second: Value = serde_json::from_str(rest).unwrap();
    assert_eq!(second["source"], "virtio-device");
    assert_eq!(second["properties"], json!({ "id": "_disk0" }));
}

#[test]
fn a_reader_that_goes_ends_the_monitor_only() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the name is a C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let reader = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    let bus = EventBus::new();
    let file = monitor::open(&Endpoint::Path(path)).unwrap();
    let monitor = EventMonitor::start(&PlainSpawner, &bus, file).unwrap();
    drop(reader);
    for _ in 0..3 {
        bus.publish(Event::Booted);
        std::thread::sleep(Duration::from_millis(20));
    }
    monitor.stop();
}

#[test]
fn texts_are_generated() {
    let openapi = holdfast(&["openapi"]);
    let document: Value = serde_json::from_slice(&openapi.stdout).unwrap();
    assert_eq!(document["openapi"], "3.0.3");
    let directory = tempfile::tempdir().unwrap();
    let man = holdfast(&["man", directory.path().to_str().unwrap()]);
    assert!(man.status.success());
    let page = std::fs::read_to_string(directory.path().join("holdfast-run.1")).unwrap();
    assert!(page.contains("hugepage_size") && page.contains("readonly"), "{page}");
    for shell in ["bash", "zsh", "fish"] {
        let script = String::from_utf8(holdfast(&["completions", shell]).stdout).unwrap();
        assert!(script.contains("event-monitor"), "{shell}: {script}");
    }
}

#[test]
fn errors_end_it_with_a_message() {
    let refused = holdfast(&["run", "--kernel", "/k", "--console", "off", "--disk", "path=/x,readonly=2"]);
    assert_eq!(refused.status.code(), Some(2));
    let text = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(text, "holdfast: --disk: key `readonly`, value `2`: must be `on` or `off`\n");
    let missing =
        ["run", "--arch", "riscv64", "--accel", "tcg", "--kernel", "/nonexistent", "--console", "off"];
    let failed = holdfast(&missing);
    assert_eq!(failed.status.code(), Some(1));
    assert!(String::from_utf8(failed.stderr).unwrap().contains("/nonexistent"));
    let usage = holdfast(&["run", "--frobnicate"]);
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8(usage.stderr).unwrap().contains("--frobnicate"));
}

/// Runs the program on a listening socket that it inherits, as libvirt starts it.
fn on_inherited_socket(directory: &Path) -> (std::process::Child, std::path::PathBuf) {
    let socket = directory.join("inherited");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    // SAFETY: dup gives the child a copy that survives exec.
    let fd = unsafe { libc::dup(listener.as_raw_fd()) };
    let events = directory.join("events");
    let child = Command::new(HOLDFAST)
        .args(["run", "--api-socket", &format!("fd={fd}")])
        .args(["--event-monitor", &format!("path={}", events.display())])
        .spawn()
        .unwrap();
    // SAFETY: the copy is ours, and nothing else uses it.
    unsafe { libc::close(fd) };
    (child, socket)
}

#[test]
fn it_serves_a_socket_that_it_inherits() {
    let directory = tempfile::tempdir().unwrap();
    let (mut child, socket) = on_inherited_socket(directory.path());
    assert!(ctl(&socket, &["ping"]).unwrap().contains(&format!("\"pid\":{}", child.id())));
    assert_eq!(ctl(&socket, &["shutdown-vmm"]).unwrap(), "");
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(socket.exists(), "whoever made the socket takes it away");
}

#[test]
fn a_signal_ends_it_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let (mut child, socket) = on_inherited_socket(directory.path());
    assert!(ctl(&socket, &["ping"]).is_ok());
    // SAFETY: the child has not been waited for, so the number is still its.
    assert_eq!(unsafe { libc::kill(child.id().cast_signed(), libc::SIGTERM) }, 0);
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}");
    let events = std::fs::read_to_string(directory.path().join("events")).unwrap();
    assert!(events.contains("\"event\": \"shutdown\""), "{events}");
}
