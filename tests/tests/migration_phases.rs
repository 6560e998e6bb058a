//! A migration that ends in any of its phases, in any way, leaves the VM where it can run, and nowhere else.

use std::io::copy;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use holdfast_tests::Program;
use holdfast_tests::http::Api;
use holdfast_tests::migration::{Console, config};
use holdfast_tests::qmp::Qmp;
use serde_json::{Value, json};

/// A network that can be cut.
struct Wire(Arc<Mutex<Vec<UnixStream>>>);

impl Wire {
    /// Passes what comes to `from` on to `to`.
    fn new(from: &Path, to: &Path) -> Self {
        let listener = UnixListener::bind(from).expect("socket");
        let (ends, to) = (Arc::<Mutex<Vec<UnixStream>>>::default(), to.to_owned());
        let kept = Arc::clone(&ends);
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = UnixStream::connect(&to) else { continue };
                let pairs = [(&near, &far), (&far, &near)];
                for (from, to) in pairs.map(|(a, b)| (a.try_clone(), b.try_clone())) {
                    let (mut from, mut to) = (from.expect("descriptor"), to.expect("descriptor"));
                    std::thread::spawn(move || {
                        // A side that is gone ends it for both.
                        let _ = copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
                kept.lock().expect("ends").extend([near, far]);
            }
        });
        Self(ends)
    }

    fn cut(&self) {
        for end in self.0.lock().expect("ends").drain(..) {
            // It may be gone already.
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Cancelled,
    DestinationKilled,
    NetworkCut,
    SourceKilled,
}

/// A process that waits for a VM at `socket`.
fn destination(dir: &Path, n: usize, socket: &Path) -> (Program, Qmp) {
    let qmp = dir.join(format!("b{n}.qmp"));
    let (monitor, uri) = (format!("unix:{}", qmp.display()), format!("unix:{}", socket.display()));
    let program = Program::run(&["--qmp", &monitor, "--incoming", "defer"]);
    let mut qmp = Qmp::connect(&qmp);
    qmp.ok("migrate-incoming", json!({ "uri": uri, "exit-on-error": false }));
    (program, qmp)
}

#[test]
fn in_every_phase_the_vm_is_left_where_it_can_run() {
    let dir = tempfile::tempdir().expect("directory");
    let disk = dir.path().join("disk");
    std::fs::File::create(&disk).and_then(|f| f.set_len(8 << 20)).expect("file");
    let console = Console(dir.path().join("console"));
    let qmp = dir.path().join("a.qmp");
    let (monitor, socket) = (format!("unix:{}", qmp.display()), dir.path().join("a"));
    let mut first = Program::run(&["--qmp", &monitor, "--api-socket", socket.to_str().expect("UTF-8")]);
    let mut qmp = Qmp::connect(&qmp);
    let api = Api::connect(&socket);
    let mut config = config(&console.0, "counter");
    config["disks"] = json!([{ "path": disk, "image_type": "Raw" }]);
    config["memory"]["size"] = (128u64 << 20).into();
    api.put("vm.create", &config);
    api.put("vm.boot", &Value::Null);
    console.goes_on(1);
    let on = |name: &str, state: bool| json!({ "capabilities": [{ "capability": name, "state": state }] });
    let phases = ["active", "pre-switchover"];
    let ends = [End::Cancelled, End::DestinationKilled, End::NetworkCut];
    let mut cases: Vec<_> = phases.iter().flat_map(|phase| ends.map(|end| (*phase, end))).collect();
    // The last one: the VM is gone with its process, and nobody else has it.
    cases.push(("pre-switchover", End::SourceKilled));
    for (n, (phase, end)) in cases.into_iter().enumerate() {
        let (inner, outer) = (dir.path().join(format!("m{n}")), dir.path().join(format!("w{n}")));
        let (mut program, mut there) = destination(dir.path(), n, &inner);
        let wire = Wire::new(&outer, &inner);
        qmp.ok("migrate-set-capabilities", on("pause-before-switchover", phase == "pre-switchover"));
        let bandwidth = if phase == "active" { 256 << 10 } else { 0 };
        qmp.ok("migrate-set-parameters", json!({ "max-bandwidth": bandwidth, "downtime-limit": 5000 }));
        qmp.ok("migrate", json!({ "uri": format!("unix:{}", outer.display()) }));
        qmp.until("query-migrate", "status", phase);
        // The destination has been heard of.
        there.until("query-migrate", "status", "active");
        match end {
            End::Cancelled => {
                qmp.ok("migrate_cancel", json!({}));
                qmp.until("query-migrate", "status", "cancelled");
            }
            End::DestinationKilled => {
                program.kill();
                if phase == "pre-switchover" {
                    // Noticed at the latest when it is to go over.
                    qmp.command("migrate-continue", &json!({ "state": phase }));
                }
                qmp.until("query-migrate", "status", "failed");
            }
            End::NetworkCut => {
                wire.cut();
                if phase == "pre-switchover" {
                    qmp.command("migrate-continue", &json!({ "state": phase }));
                }
                qmp.until("query-migrate", "status", "failed");
            }
            End::SourceKilled => first.kill(),
        }
        if end != End::DestinationKilled {
            there.until("query-migrate", "status", "failed");
            assert_eq!(there.ok("query-status", json!({}))["status"], "inmigrate", "{phase} {end:?}");
        }
        if end == End::SourceKilled {
            let count = console.counted();
            std::thread::sleep(std::time::Duration::from_secs(1));
            assert_eq!(console.counted(), count, "nobody runs the guest");
            return;
        }
        qmp.until("query-status", "status", "running");
        console.goes_on(1);
        // The source's job may be cleared away a moment after its status.
        let deadline = std::time::Instant::now() + holdfast_tests::migration::LIMIT;
        while qmp.command("migrate-set-capabilities", &on("events", false)).get("return").is_none() {
            assert!(std::time::Instant::now() < deadline, "the migration does not end");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}
