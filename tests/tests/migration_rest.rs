//! A VM moves from process to process over REST while it works, and stays where it is if that fails.

use std::path::Path;
use std::process::{Command, Stdio};

use holdfast_tests::devices::run;
use holdfast_tests::holdfast;
use holdfast_tests::migration::{Console, LIMIT, Vmm, config};
use serde_json::{Value, json};

/// A running guest in one process, and a second process.
fn pair(dir: &Path, test: &str, shared: bool) -> (Vmm, Vmm, Console) {
    let console = Console(dir.join("console"));
    let (first, second) = (Vmm::start(dir, "a", &[]), Vmm::start(dir, "b", &[]));
    let mut config = config(&console.0, test);
    config["memory"]["shared"] = shared.into();
    first.api.put("vm.create", &config);
    first.api.put("vm.boot", &Value::Null);
    console.goes_on(1);
    (first, second, console)
}

/// An address on the loopback network that no other process uses.
fn loopback(n: u32) -> String {
    let pid = std::process::id();
    format!("tcp:127.{}.{}.{}:7711", (pid >> 8) % 250 + 1, pid % 256, n)
}

#[test]
fn a_busy_guest_moves_there_and_back() {
    let dir = tempfile::tempdir().expect("directory");
    let (mut first, second, console) = pair(dir.path(), "mover", false);
    let unix = format!("unix:{}", dir.path().join("m").display());
    let received = second.receive(json!({ "receiver_url": unix }));
    let sent =
        first.send(&json!({ "destination_url": unix, "downtime_ms": 2000, "timeout_s": 30, "timeout_strategy": "Ignore" }));
    assert_eq!(sent.status, 204, "{sent:?}");
    assert_eq!(received.join().expect("an answer").status, 204);
    assert_eq!(second.state(), "Running");
    assert!(first.program.wait_exit(holdfast_tests::migration::LIMIT).success(), "the source has ended");
    console.goes_on(2);
    // And back, over several TCP connections, compressed, with the source kept.
    let third = Vmm::start(dir.path(), "c", &[]);
    let tcp = loopback(1);
    let received = third.receive(json!({ "receiver_url": tcp }));
    let sent = second.send(&json!({
        "destination_url": tcp, "connections": 3, "zstd_level": 1, "preserve_source": true,
        "auto_converge": true, "downtime_ms": 2000, "timeout_s": 30, "timeout_strategy": "Ignore",
    }));
    assert_eq!(sent.status, 204, "{sent:?}");
    assert_eq!(received.join().expect("an answer").status, 204);
    assert_eq!((second.state().as_str(), third.state().as_str()), ("Paused", "Running"));
    console.goes_on(2);
    console.sum_is_good();
}

#[test]
fn disks_go_along_even_those_that_were_plugged_in() {
    let dir = tempfile::tempdir().expect("directory");
    let at = |name: &str| dir.path().join(name);
    for (name, format) in [("raw", "raw"), ("qcow2", "qcow2"), ("hot", "qcow2")] {
        run(Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(at(name)).arg("64M"));
    }
    run(Command::new("qemu-img").args(["bitmap", "--add"]).arg(at("qcow2")).arg("map"));
    let console = Console(at("console"));
    let vmms: Vec<Vmm> = ["a", "b", "c"].iter().map(|name| Vmm::start(dir.path(), name, &[])).collect();
    let mut config = config(&console.0, "mover");
    config["memory"]["shared"] = true.into();
    config["machine"] = json!({ "type": "virt", "hotplug_ports": 1 });
    config["disks"] = json!([{ "path": at("raw"), "image_type": "Raw" }, { "path": at("qcow2") }]);
    vmms[0].api.put("vm.create", &config);
    vmms[0].api.put("vm.boot", &Value::Null);
    let added = vmms[0].api.request(
        "PUT",
        "vm.add-disk",
        &json!({ "path": at("hot"), "id": "hot", "serial": "hot" }),
    );
    assert_eq!(added.status, 200, "{added:?}");
    let disks = ["vda", "vdb"];
    console.disks_go_on(&disks, 2);
    // By the network, then by the file descriptors of RAM.
    for (from, to, body) in [(0, 1, json!({ "downtime_ms": 2000 })), (1, 2, json!({ "local": true }))] {
        let url = format!("unix:{}", at("m").display());
        let received = vmms[to].receive(json!({ "receiver_url": url }));
        let mut body = body;
        body["destination_url"] = url.into();
        body["preserve_source"] = true.into();
        body["timeout_s"] = 60.into();
        body["timeout_strategy"] = "Ignore".into();
        let sent = vmms[from].send(&body);
        assert_eq!(sent.status, 204, "{sent:?}");
        assert_eq!(received.join().expect("an answer").status, 204);
        assert_eq!(vmms[to].state(), "Running");
        if from == 0 {
            // The images are the destination's: the guest cannot be run twice.
            let again = vmms[0].api.request("PUT", "vm.resume", &Value::Null);
            assert!(again.status == 500 && again.body.contains("is in use"), "{again:?}");
            let ids = vmms[1].api.get("vm.info")["config"]["disks"].clone();
            assert_eq!(ids[2]["id"], "hot", "{ids}");
        }
        console.disks_go_on(&disks, 2);
        console.goes_on(2);
    }
    console.sum_is_good();
    vmms[2].api.put("vm.shutdown", &Value::Null);
    for image in ["qcow2", "hot"] {
        run(Command::new("qemu-img").args(["check", "-q"]).arg(at(image)));
    }
    let info = run(Command::new("qemu-img").arg("info").arg(at("qcow2")));
    assert!(info.contains("name: map") && !info.contains("in-use"), "{info}");
}

#[test]
fn a_guest_goes_to_another_process_with_its_ram() {
    let dir = tempfile::tempdir().expect("directory");
    let (first, second, console) = pair(dir.path(), "mover", true);
    let url = format!("unix:{}", dir.path().join("m").display());
    let received = second.receive(json!({ "receiver_url": url }));
    let sent = first.send(&json!({ "destination_url": url, "local": true, "preserve_source": true }));
    assert_eq!(sent.status, 204, "{sent:?}");
    assert_eq!(received.join().expect("an answer").status, 204);
    assert_eq!((first.state().as_str(), second.state().as_str()), ("Paused", "Running"));
    console.goes_on(2);
    let resumed = first.api.request("PUT", "vm.resume", &Value::Null);
    assert!(resumed.status == 500 && resumed.body.contains("together with its RAM"), "{resumed:?}");
}

#[test]
fn whatever_fails_the_guest_stays() {
    let dir = tempfile::tempdir().expect("directory");
    let (first, mut second, console) = pair(dir.path(), "counter", false);
    let url = format!("unix:{}", dir.path().join("m").display());
    // Nobody there, and what makes no sense.
    for (body, status, says) in [
        (json!({ "destination_url": "unix:/nonexistent/m" }), 500, "cannot connect to `unix:/nonexistent/m`"),
        (json!({ "destination_url": "exec:cat" }), 400, "`exec:` is not supported"),
        (json!({ "destination_url": url, "connections": 200 }), 400, "`connections` is 200"),
        (json!({ "destination_url": url, "colour": 1 }), 400, "colour"),
        (json!({ "destination_url": "tcp:127.0.0.1:1", "local": true }), 400, "begins with unix:"),
    ] {
        let answer = first.api.request("PUT", "vm.send-migration", &body);
        assert!(answer.status == status && answer.body.contains(says), "{body}: {answer:?}");
        assert_eq!(first.state(), "Running");
    }
    // RAM that is not shared cannot be handed over.
    let received = second.receive(json!({ "receiver_url": url }));
    let local = first.send(&json!({ "destination_url": url, "local": true }));
    assert!(local.status == 500 && local.body.contains("memory.shared=on"), "{local:?}");
    assert!(!received.is_finished(), "the destination has not been bothered");
    // A time that is over before RAM is there; slow, so that it is.
    let body = json!({ "destination_url": url, "bandwidth": 1 << 20, "timeout_s": 1 });
    let slow = first.send(&body);
    assert!(slow.status == 500 && slow.body.contains("within 1 seconds"), "{slow:?}");
    assert_eq!(received.join().expect("an answer").status, 500);
    assert_eq!((first.state().as_str(), second.state().as_str()), ("Running", ""));
    console.goes_on(2);
    // Cancelled, by who watches it on the command line.
    let received = second.receive(json!({ "receiver_url": url }));
    let socket = dir.path().join("a").display().to_string();
    let ctl = |more: &[&str]| {
        let mut command = Command::new(holdfast());
        command.args(["ctl", "--api-socket", &socket]).args(more);
        command
    };
    let keys = format!("destination_url={url},bandwidth=1M");
    let migrate = ctl(&["migrate", &keys]).stderr(Stdio::piped()).spawn().expect("it starts");
    let progress = || first.api.get("vm.migration-progress");
    let deadline = std::time::Instant::now() + LIMIT;
    while progress()["ram"]["transferred"].as_u64().unwrap_or(0) == 0 || progress()["status"] != "active" {
        assert!(std::time::Instant::now() < deadline, "{}", progress());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    // Long enough for a line to have been written.
    std::thread::sleep(std::time::Duration::from_secs(1));
    run(&mut ctl(&["cancel-migration"]));
    let ended = migrate.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success() && said.contains(" %  active, pass 1, "), "{said}");
    assert!(said.contains("the migration was cancelled"), "{said}");
    assert_eq!(progress()["status"], "cancelled");
    assert_eq!(received.join().expect("an answer").status, 500);
    assert_eq!(first.state(), "Running");
    // The destination is killed in the middle.
    let received = second.receive(json!({ "receiver_url": url }));
    let api = first.api.clone();
    let send = json!({ "destination_url": url, "bandwidth": 4 << 20 });
    let sent = std::thread::spawn(move || api.request("PUT", "vm.send-migration", &send));
    // Meanwhile everything else is answered, and nothing else is begun.
    let nowhere = json!({ "destination_url": "file:///nonexistent" });
    while first.api.request("PUT", "vm.snapshot", &nowhere).status != 429 {
        assert!(!sent.is_finished(), "it is slow");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(first.state(), "Running");
    assert_eq!(first.api.request("PUT", "vm.pause", &Value::Null).status, 429);
    second.program.kill();
    let sent = sent.join().expect("an answer");
    assert_eq!(sent.status, 500, "{sent:?}");
    drop(received);
    assert_eq!(first.state(), "Running");
    console.goes_on(2);
}
