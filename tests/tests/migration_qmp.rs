//! Migration as QMP drives it: parameters, capabilities, states, events, post-copy and its recovery.

use std::path::Path;
use std::process::Command;

use holdfast_tests::Program;
use holdfast_tests::devices::run;
use holdfast_tests::http::Api;
use holdfast_tests::migration::{Console, LIMIT, config, listening, soon};
use holdfast_tests::qmp::Qmp;
use serde_json::{Value, json};

struct Vmm {
    program: Program,
    qmp: Qmp,
}

fn vmm(dir: &Path, name: &str, options: &[&str]) -> Vmm {
    let qmp = dir.join(format!("{name}.qmp"));
    let api = dir.join(name);
    let address = format!("unix:{}", qmp.display());
    let mut args = vec!["--qmp", &address, "--api-socket", api.to_str().expect("UTF-8")];
    args.extend(options);
    let program = Program::run(&args);
    let qmp = Qmp::connect(&qmp);
    let incoming = options.iter().skip_while(|o| **o != "--incoming").nth(1);
    if let Some(socket) = incoming.and_then(|uri| uri.strip_prefix("unix:")) {
        listening(Path::new(socket));
    }
    Vmm { program, qmp }
}

/// A guest that runs `test`, in a process `a`.
fn source(dir: &Path, test: &str) -> (Vmm, Console) {
    let console = Console(dir.join("console"));
    let first = vmm(dir, "a", &[]);
    let api = Api::connect(&dir.join("a"));
    api.put("vm.create", &config(&console.0, test));
    api.put("vm.boot", &Value::Null);
    console.goes_on(1);
    (first, console)
}

fn on(capabilities: &[&str]) -> Value {
    let all: Vec<Value> = capabilities.iter().map(|c| json!({ "capability": c, "state": true })).collect();
    json!({ "capabilities": all })
}

#[test]
fn states_events_and_refusals() {
    let dir = tempfile::tempdir().expect("directory");
    let (mut first, console) = source(dir.path(), "mover");
    let uri = format!("unix:{}", dir.path().join("m").display());
    let qmp = &mut first.qmp;
    assert_eq!(qmp.ok("query-migrate", json!({})), json!({}));
    assert_eq!(qmp.ok("query-migrate-parameters", json!({}))["max-bandwidth"], 128 << 20);
    for (command, arguments, says) in [
        ("migrate", json!({}), "Parameter 'uri' is missing"),
        ("migrate", json!({ "uri": "rdma:x:1" }), "`rdma:` is not supported"),
        ("migrate", json!({ "uri": uri, "resume": true }), "no paused migration"),
        ("migrate-set-parameters", json!({ "max-cpu-throttle": 100 }), "expects an integer in the range"),
        ("migrate-set-parameters", json!({ "xbzrle-cache-size": 1 }), "'xbzrle-cache-size' is unexpected"),
        ("migrate-set-capabilities", on(&["xbzrle"]), "Capability 'xbzrle' is not supported"),
        ("migrate-start-postcopy", json!({}), "Enable postcopy"),
        ("migrate-pause", json!({}), "migrate-pause is currently only supported"),
        ("migrate-recover", json!({ "uri": uri }), "only be run when postcopy is paused"),
        ("migrate-continue", json!({ "state": "pre-switchover" }), "not in expected state"),
    ] {
        let said = qmp.fails(command, arguments);
        assert!(said.contains(says), "{command}: {said}");
    }
    // A destination that waits, and a migration that waits for its last step, cancelled there.
    qmp.ok("migrate-set-capabilities", on(&["events", "pause-before-switchover"]));
    qmp.ok("migrate-set-parameters", json!({ "max-bandwidth": 0, "downtime-limit": 60_000 }));
    let mut second = vmm(dir.path(), "b", &["--incoming", "defer"]);
    assert_eq!(second.qmp.ok("query-status", json!({}))["status"], "inmigrate");
    second.qmp.ok("migrate-incoming", json!({ "uri": uri, "exit-on-error": false }));
    qmp.ok("migrate", json!({ "uri": uri }));
    qmp.until("query-migrate", "status", "pre-switchover");
    assert!(qmp.fails("migrate", json!({ "uri": uri })).contains("migration process in progress"));
    qmp.ok("migrate_cancel", json!({}));
    qmp.until("query-migrate", "status", "cancelled");
    assert_eq!(qmp.ok("query-status", json!({}))["status"], "running");
    console.goes_on(2);
    second.qmp.until("query-migrate", "status", "failed");
    // Once more, to the end.
    soon(&mut second.qmp, "migrate-incoming", &json!({ "uri": uri }));
    listening(&dir.path().join("m"));
    soon(qmp, "migrate", &json!({ "uri": uri }));
    qmp.until("query-migrate", "status", "pre-switchover");
    qmp.ok("migrate-continue", json!({ "state": "pre-switchover" }));
    let done = qmp.until("query-migrate", "status", "completed");
    assert!(done["ram"]["transferred"].as_u64() > Some(1 << 20) && done["downtime"].is_u64(), "{done}");
    assert_eq!(qmp.ok("query-status", json!({}))["status"], "postmigrate");
    second.qmp.until("query-status", "status", "running");
    console.goes_on(2);
    // What the guest ran at the source was translated before it ran here.
    let jit = second.qmp.ok("human-monitor-command", json!({ "command-line": "info jit" }));
    let ahead =
        jit.as_str().and_then(|text| text.lines().find_map(|l| l.strip_prefix("regions translated ahead")));
    assert!(ahead.is_some_and(|n| n.trim().parse::<u64>().is_ok_and(|n| n > 100)), "{jit}");
    // The event may come a moment after the status.
    while qmp.heard("MIGRATION", "status").last() != Some(&"completed".into()) {
        qmp.ok("query-status", json!({}));
    }
    let states = qmp.heard("MIGRATION", "status");
    let last = ["setup", "active", "pre-switchover", "device", "completed"];
    assert_eq!(states[states.len() - 5..], last.map(Value::from));
    assert_eq!(qmp.heard("MIGRATION_PASS", "pass")[0], 1);
    drop(first.program);
}

/// What makes a VM like that of [`source`], but for `other` options instead of those of the same name.
fn like_the_source<'a>(console: &'a str, other: &[&'a str]) -> Vec<String> {
    let guest = holdfast_tests::riscv64_guest();
    let (kernel, initramfs) = (guest.join("Image"), guest.join("initramfs.cpio"));
    let serial = format!("file={console}");
    let usual = [
        ("--arch", "riscv64"),
        ("--accel", "tcg"),
        ("--cpus", "boot=2"),
        ("--memory", "size=256M"),
        ("--kernel", kernel.to_str().expect("UTF-8")),
        ("--initramfs", initramfs.to_str().expect("UTF-8")),
        ("--serial", &serial),
        ("--console", "off"),
    ];
    let other: Vec<_> = other.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    let kept = usual.iter().filter(|(name, _)| !other.iter().any(|(o, _)| o == name));
    kept.chain(&other).flat_map(|(name, value)| [(*name).to_owned(), (*value).to_owned()]).collect()
}

#[test]
fn what_differs_is_named_before_the_guest_stops() {
    let dir = tempfile::tempdir().expect("directory");
    let (mut first, console) = source(dir.path(), "counter");
    let uri = format!("unix:{}", dir.path().join("m").display());
    let serial = console.0.to_str().expect("UTF-8");
    first.qmp.ok("migrate-set-capabilities", on(&["events"]));
    let hotplug: &[&str] = &["--machine", "virt,hotplug_ports=1"];
    for (n, (other, says)) in [
        (["--cpus", "boot=3"].as_slice(), "the number of vCPUs is 2 at the source, 3 here"),
        (&["--memory", "size=512M"], "RAM is 0x10000000 bytes at 0x80000000 at the source, 0x20000000"),
        (&["--rng", "src=/dev/zero,id=extra"], "device `extra` (virtio-rng) is not at the source"),
        (hotplug, "is not here"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut options = vec!["--incoming".to_owned(), uri.clone()];
        options.extend(like_the_source(serial, other));
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let mut second = vmm(dir.path(), &format!("b{n}"), &options);
        soon(&mut first.qmp, "migrate", &json!({ "uri": uri }));
        let failed = first.qmp.until("query-migrate", "status", "failed");
        let error = failed["error-desc"].as_str().unwrap_or_default();
        assert!(error.contains("the destination gave up") && error.contains(says), "{other:?}: {error}");
        // `-incoming` on the command line ends with its migration.
        assert!(!second.program.wait_exit(LIMIT).success());
    }
    assert!(!first.qmp.heard("MIGRATION", "status").contains(&"device".into()), "the guest never stood");
    assert!(first.qmp.heard("STOP", "status").is_empty());
    console.goes_on(2);
    // What is alike is taken.
    let mut options = vec!["--incoming".to_owned(), uri.clone()];
    options.extend(like_the_source(serial, &[]));
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let mut second = vmm(dir.path(), "like", &options);
    soon(&mut first.qmp, "migrate", &json!({ "uri": uri }));
    second.qmp.until("query-status", "status", "running");
    console.goes_on(2);
}

#[test]
fn disks_go_along_to_other_storage() {
    let dir = tempfile::tempdir().expect("directory");
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("there")).expect("directory");
    for (name, format) in [("raw", "raw"), ("qcow2", "qcow2")] {
        run(Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(at(name)).arg("64M"));
    }
    let console = Console(at("console"));
    let mut first = vmm(dir.path(), "a", &[]);
    let api = Api::connect(&at("a"));
    let mut config = config(&console.0, "mover");
    config["disks"] = json!([{ "path": at("raw"), "image_type": "Raw" }, { "path": at("qcow2") }]);
    api.put("vm.create", &config);
    api.put("vm.boot", &Value::Null);
    let disks = ["vda", "vdb"];
    console.disks_go_on(&disks, 1);
    let uri = format!("unix:{}", at("m").display());
    let serial = console.0.display().to_string();
    // Its images are not there yet.
    let disk = [
        format!("path={},image_type=raw", at("there/raw").display()),
        format!("path={}", at("there/qcow2").display()),
    ];
    let mut options = vec!["--incoming".to_owned(), uri.clone()];
    options.extend(like_the_source(&serial, &[]));
    options.extend(["--disk".to_owned(), disk[0].clone(), disk[1].clone()]);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let mut second = vmm(dir.path(), "b", &options);
    first.qmp.ok("migrate-set-parameters", json!({ "max-bandwidth": 0, "downtime-limit": 2000 }));
    first.qmp.ok("migrate", json!({ "uri": uri, "blk": true }));
    first.qmp.until("query-migrate", "status", "completed");
    second.qmp.until("query-status", "status", "running");
    drop(first);
    for name in ["raw", "qcow2"] {
        std::fs::remove_file(at(name)).expect("nobody needs it");
    }
    console.disks_go_on(&disks, 2);
    console.sum_is_good();
    drop(second);
    run(Command::new("qemu-img").args(["check", "-q"]).arg(at("there/qcow2")));
}

#[test]
fn pages_follow_the_guest_even_when_the_connection_breaks() {
    let dir = tempfile::tempdir().expect("directory");
    let (mut first, console) = source(dir.path(), "mover");
    let uri = format!("unix:{}", dir.path().join("m").display());
    let mut second = vmm(dir.path(), "b", &["--incoming", &uri]);
    let qmp = &mut first.qmp;
    qmp.ok("migrate-set-capabilities", on(&["postcopy-ram", "events"]));
    // So slow that all would take minutes: the guest goes on only because its pages are urgent.
    qmp.ok("migrate-set-parameters", json!({ "max-bandwidth": 512 << 10 }));
    qmp.ok("migrate", json!({ "uri": uri }));
    qmp.until("query-migrate", "status", "active");
    qmp.ok("migrate-start-postcopy", json!({}));
    qmp.until("query-migrate", "status", "postcopy-active");
    second.qmp.until("query-status", "status", "running");
    console.goes_on(2);
    qmp.ok("migrate-pause", json!({}));
    qmp.until("query-migrate", "status", "postcopy-paused");
    second.qmp.until("query-migrate", "status", "postcopy-paused");
    let again = format!("unix:{}", dir.path().join("again").display());
    second.qmp.ok("migrate-recover", json!({ "uri": again }));
    qmp.ok("migrate", json!({ "uri": again, "resume": true }));
    qmp.until("query-migrate", "status", "postcopy-active");
    // It breaks once more, and REST mends it.
    let [source, destination] = ["a", "b"].map(|name| Api::connect(&dir.path().join(name)));
    let status = |api: &Api| api.get("vm.migration-progress")["status"].as_str().map(str::to_owned);
    source.put("vm.pause-migration", &Value::Null);
    for api in [&source, &destination] {
        let deadline = std::time::Instant::now() + LIMIT;
        while status(api).as_deref() != Some("postcopy-paused") {
            assert!(std::time::Instant::now() < deadline, "{:?}", status(api));
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
    let neither = source.request("PUT", "vm.recover-migration", &json!({}));
    assert!(neither.status == 400 && neither.body.contains("`destination_url` at the source"), "{neither:?}");
    let last = format!("unix:{}", dir.path().join("last").display());
    destination.put("vm.recover-migration", &json!({ "receiver_url": last }));
    qmp.ok("migrate-set-parameters", json!({ "max-bandwidth": 0 }));
    source.put("vm.recover-migration", &json!({ "destination_url": last }));
    let done = qmp.until("query-migrate", "status", "completed");
    assert!(done["ram"]["postcopy-requests"].as_u64() > Some(0), "{done}");
    let came = second.qmp.until("query-migrate", "status", "completed");
    let waited: Vec<u64> = serde_json::from_value(came["postcopy-latency-dist"].clone()).expect("numbers");
    // Each page that was asked for came, and has been counted; by now nobody waits.
    assert_eq!(waited.len(), 24, "{came}");
    assert!(waited.iter().sum::<u64>() > 0 && came["postcopy-latency"].as_u64() > Some(0), "{came}");
    assert_eq!(qmp.ok("query-status", json!({}))["status"], "postmigrate");
    let states = qmp.heard("MIGRATION", "status");
    for state in ["postcopy-active", "postcopy-paused", "postcopy-recover"] {
        assert!(states.contains(&state.into()), "{states:?}");
    }
    drop(first);
    // Without the source nothing is missing.
    console.goes_on(2);
    console.sum_is_good();
}

#[test]
fn streams_of_released_versions_are_taken() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let mut played = 0;
    for version in std::fs::read_dir(golden).expect("the golden files").flatten() {
        let Ok(stream) = std::fs::read(version.path().join("stream")) else { continue };
        played += 1;
        let dir = tempfile::tempdir().expect("directory");
        let at = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(at("firmware"), b"never read").expect("file");
        let (serial, uri) = (format!("file={}", at("console")), format!("unix:{}", at("m")));
        let (firmware, mut second);
        firmware = at("firmware");
        second = vmm(
            dir.path(),
            "b",
            &[
                ["--arch", "riscv64"],
                ["--machine", "virt,hotplug_ports=0"],
                ["--accel", "tcg"],
                ["--cpus", "boot=1"],
                ["--memory", "size=16M"],
                ["--firmware", &firmware],
                ["--serial", &serial],
                ["--console", "off"],
                ["--incoming", &uri],
            ]
            .concat(),
        );
        let deadline = std::time::Instant::now() + LIMIT;
        let mut socket = loop {
            match std::os::unix::net::UnixStream::connect(at("m")) {
                Ok(socket) => break socket,
                Err(error) => assert!(std::time::Instant::now() < deadline, "it does not listen: {error}"),
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        };
        let mut answers = socket.try_clone().expect("descriptor");
        // What it answers is read to its end, so that it never waits.
        let heard = std::thread::spawn(move || std::io::copy(&mut answers, &mut std::io::sink()));
        std::io::Write::write_all(&mut socket, &stream).expect("it reads");
        second.qmp.until("query-status", "status", "running");
        heard.join().expect("the thread").expect("answers");
        // The guest counts on from where it was, in hexadecimal.
        let counts = || -> Vec<u64> {
            let text = std::fs::read_to_string(at("console")).unwrap_or_default();
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            // The first line may have begun in the old process.
            let lines = whole.lines().skip(1).map(|l| l.trim().strip_prefix('T').expect("a count"));
            lines.map(|hex| u64::from_str_radix(hex, 16).expect("a number")).collect()
        };
        while counts().len() < 3 {
            assert!(std::time::Instant::now() < deadline, "the guest does not count");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let counts = counts();
        assert!(counts[0] > 2, "the guest began anew: {counts:?}");
        assert!(counts.windows(2).all(|w| w[1] == w[0] + 1), "{counts:?}");
    }
    assert!(played > 0, "there is no golden stream");
}
