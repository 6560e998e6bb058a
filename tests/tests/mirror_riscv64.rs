//! `blockdev-mirror` as libvirt drives it: a disk goes to an NBD server while the guest writes to it. Needs qemu-utils.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use holdfast_tests::devices::run;
use holdfast_tests::migration::listening;
use holdfast_tests::qmp::Qmp;
use holdfast_tests::shell::{BOOT, Guest};
use holdfast_tests::{Program, printed, riscv64_args};
use serde_json::{Value, json};

const SIZE: u64 = 48 << 20;

/// `qemu-nbd` with a file, which ends with the test.
struct Server(Child, PathBuf);

impl Server {
    fn start(dir: &Path, name: &str, format: &str) -> Self {
        let (image, socket) = (dir.join(name), dir.join(format!("{name}.nbd")));
        run(Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg(SIZE.to_string()));
        let child = Command::new("qemu-nbd")
            .args(["-t", "--shared=8", "--discard=unmap", "-f", format, "-x", "disk", "-k"])
            .args([&socket, &image])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd (Debian: qemu-utils)");
        listening(&socket);
        Self(child, image)
    }

    fn node(&self, name: &str) -> Value {
        nbd_node(name, "disk", &self.1.with_file_name(format!("{}.nbd", self.name())))
    }

    fn name(&self) -> String {
        self.1.file_name().expect("a name").to_string_lossy().into_owned()
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn nbd_node(name: &str, export: &str, socket: &Path) -> Value {
    json!({
        "driver": "nbd", "node-name": name, "export": export, "discard": "unmap",
        "server": { "type": "unix", "path": socket },
    })
}

fn file_node(name: &str, format: &str, path: &Path) -> Value {
    json!({
        "driver": format, "node-name": name, "discard": "unmap",
        "file": { "driver": "file", "filename": path, "discard": "unmap" },
    })
}

/// A guest whose disk `d0` is the node `fmt`, of a new image.
fn source(dir: &Path, format: &str) -> (Guest, Qmp, PathBuf) {
    let image = dir.join(format!("source.{format}"));
    run(Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg(SIZE.to_string()));
    let mut args = riscv64_args(1, "");
    let machine = args.iter_mut().find(|arg| *arg == "virt").expect("the machine's name");
    *machine = "virt,hotplug_ports=1".to_owned();
    let qmp = dir.join("source.qmp");
    args.extend(["--qmp".to_owned(), format!("unix:{}", qmp.display())]);
    args.extend(["--blockdev".to_owned(), file_node("fmt", format, &image).to_string()]);
    args.extend(["--device".to_owned(), "virtio-blk-pci,drive=fmt,id=d0".to_owned()]);
    let mut guest = Guest::boot(&args);
    let qmp = Qmp::connect(&qmp);
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=24 conv=fsync 2>/dev/null");
    (guest, qmp, image)
}

/// Lets the guest write all over its disk until `/tmp/stop` is there; it counts in `/tmp/n`.
fn keep_writing(guest: &mut Guest) {
    guest.run(
        "dd if=/dev/urandom of=/tmp/r bs=64k count=1 2>/dev/null; rm -f /tmp/stop /tmp/ended; echo 0 >/tmp/n; \
         (n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); (echo $n; cat /tmp/r) | dd of=/dev/vda bs=4k \
         seek=$((n * 7919 % 12000)) conv=notrunc,fsync 2>/dev/null || echo BAD >/tmp/bad; echo $n >/tmp/n; done; echo >/tmp/ended) & true",
    );
}

/// Waits until it has written ten times more.
fn goes_on_writing(guest: &mut Guest) {
    let said = guest.run(
        "a=$(cat /tmp/n); until [ $(cat /tmp/n) -gt $((a + 10)) ]; do sleep 0.1; done; ls /tmp/bad 2>/dev/null; echo ON GOES",
    );
    assert!(printed(&said, "ON") == "GOES" && !said.contains("\n/tmp/bad"), "{said}");
}

fn stop_writing(guest: &mut Guest) {
    guest.run("echo >/tmp/stop; until [ -e /tmp/ended ]; do sleep 0.1; done");
}

/// The arguments that libvirt gives.
fn mirror(target: &str) -> Value {
    json!({
        "job-id": "drive-d0", "device": "fmt", "target": target, "sync": "full", "auto-finalize": true,
        "auto-dismiss": false,
    })
}

fn ready(qmp: &mut Qmp) {
    let data = qmp.event("BLOCK_JOB_READY");
    assert_eq!((&data["device"], &data["type"]), (&json!("drive-d0"), &json!("mirror")));
    let shown = qmp.ok("query-block-jobs", json!({}))[0].clone();
    assert_eq!((&shown["ready"], &shown["status"]), (&json!(true), &json!("ready")), "{shown}");
    assert!(shown["len"].as_u64() >= Some(SIZE), "{shown}");
}

/// Waits for the end, which is an event of that name, and forgets the job.
fn ended(qmp: &mut Qmp, event: &str) -> Value {
    let data = qmp.event(event);
    let until = Instant::now() + BOOT;
    while qmp.ok("query-jobs", json!({}))[0]["status"] != "concluded" {
        assert!(Instant::now() < until, "the job does not conclude");
        std::thread::sleep(Duration::from_millis(10));
    }
    qmp.ok("job-dismiss", json!({ "id": "drive-d0" }));
    assert_eq!(qmp.ok("query-block-jobs", json!({})), json!([]));
    data
}

/// A guest that stands has a disk that QEMU's tools find to be the same as its copy.
fn same(source: &Path, copy: &Path, format: &str) {
    let compare = ["compare", "-U", "-f", "raw", "-F", format];
    run(Command::new("qemu-img").args(compare).args([source, copy]));
}

/// A second process, without a VM, that exports a file.
fn export(dir: &Path) -> (Program, Qmp, PathBuf) {
    let (copy, socket) = (dir.join("copy.raw"), dir.join("copy.qmp"));
    std::fs::File::create(&copy).and_then(|f| f.set_len(SIZE)).expect("a file");
    let program = Program::run(&["--qmp".to_owned(), format!("unix:{}", socket.display())]);
    let mut qmp = Qmp::connect(&socket);
    qmp.ok("blockdev-add", file_node("copy", "raw", &copy));
    let addr = json!({ "type": "unix", "data": { "path": dir.join("copy.nbd") } });
    qmp.ok("nbd-server-start", json!({ "addr": addr }));
    qmp.ok("nbd-server-add", json!({ "device": "copy", "name": "disk", "writable": true }));
    (program, qmp, copy)
}

#[test]
fn a_disk_is_copied_while_the_guest_writes() {
    let dir = tempfile::tempdir().expect("directory");
    let dir = dir.path();
    let (mut guest, mut qmp, image) = source(dir, "raw");
    keep_writing(&mut guest);
    let (_other, mut far, copy) = export(dir);
    qmp.ok("blockdev-add", nbd_node("far", "disk", &dir.join("copy.nbd")));
    refused(&mut qmp);
    qmp.ok("blockdev-mirror", mirror("far"));
    in_use(&mut qmp);
    ready(&mut qmp);
    goes_on_writing(&mut guest);
    qmp.ok("stop", json!({}));
    qmp.ok("block-job-cancel", json!({ "device": "drive-d0" }));
    let data = ended(&mut qmp, "BLOCK_JOB_COMPLETED");
    assert!(data.get("error").is_none() && data["len"] == data["offset"], "{data}");
    far.ok("nbd-server-stop", json!({}));
    same(&image, &copy, "raw");
    qmp.ok("blockdev-del", json!({ "node-name": "far" }));
    qmp.ok("cont", json!({}));
    goes_on_writing(&mut guest);
    to_qemu(&mut guest, &mut qmp, (dir, &image));
    broken(&mut guest, &mut qmp, dir);
    // The process ends in order with a job at work.
    let server = Server::start(dir, "last.raw", "raw");
    qmp.ok("blockdev-add", server.node("last"));
    let mut slow = mirror("last");
    slow["speed"] = json!(1 << 20);
    qmp.ok("blockdev-mirror", slow);
    stop_writing(&mut guest);
    guest.power_off();
}

/// What cannot be mirrored, or not so.
fn refused(qmp: &mut Qmp) {
    let with = |key: &str, value: Value| {
        let mut all = mirror("far");
        all[key] = value;
        all
    };
    for (arguments, says) in [
        (with("target", json!("none")), "Cannot find device='none' nor node-name='none'"),
        (with("device", json!("none")), "Cannot find device='none' nor node-name='none'"),
        (with("target", json!("fmt")), "Can't mirror node into itself"),
        (with("job-id", json!("1")), "Invalid job ID '1'"),
        (with("copy-mode", json!("write-blocking")), "'write-blocking' is not supported by this version"),
        (with("on-target-error", json!("stop")), "'on-target-error' other than 'report' is not supported"),
        (with("filter-node-name", json!("f")), "'filter-node-name' is not supported"),
        (with("replaces", json!("far")), "'replaces' of another node than the disk's is not supported"),
        (with("speed", json!(-1)), "Parameter 'speed' expects a non-negative value"),
        (with("nonsense", json!(1)), "Parameter 'nonsense' is unexpected"),
    ] {
        let said = qmp.fails("blockdev-mirror", arguments);
        assert!(said.contains(says), "{said}");
    }
    let answer = qmp.command("block-job-cancel", &json!({ "device": "x" }));
    assert_eq!(answer["error"], json!({ "class": "DeviceNotActive", "desc": "Block job 'x' not found" }));
    assert_eq!(qmp.fails("job-cancel", json!({ "id": "x" })), "Job not found");
    assert_eq!(qmp.ok("query-jobs", json!({})), json!([]));
}

/// What a job uses is not taken away.
fn in_use(qmp: &mut Qmp) {
    let busy = "Node 'fmt' is busy: block device is in use by block job: mirror";
    assert_eq!(qmp.fails("blockdev-mirror", mirror("far")), "Job ID 'drive-d0' already in use");
    assert_eq!(qmp.fails("blockdev-del", json!({ "node-name": "fmt" })), busy);
    assert_eq!(qmp.fails("blockdev-del", json!({ "node-name": "far" })), "Node far is in use");
    assert_eq!(qmp.fails("block_resize", json!({ "node-name": "fmt", "size": 64 << 20 })), busy);
    assert_eq!(qmp.fails("device_del", json!({ "id": "d0" })), busy);
    let reopened = json!({ "options": [file_node("fmt", "raw", Path::new("/none"))] });
    assert_eq!(qmp.fails("blockdev-reopen", reopened), busy);
    let said = qmp.fails("job-dismiss", json!({ "id": "drive-d0" }));
    assert!(said.ends_with("cannot accept command verb 'dismiss'"), "{said}");
}

/// The same to QEMU's server, with a speed, pauses, and a cancellation in the middle before.
fn to_qemu(guest: &mut Guest, qmp: &mut Qmp, (dir, image): (&Path, &Path)) {
    let server = Server::start(dir, "copy.qcow2", "qcow2");
    qmp.ok("blockdev-add", server.node("qemu"));
    let mut slow = mirror("qemu");
    slow["speed"] = json!(2 << 20);
    qmp.ok("blockdev-mirror", slow.clone());
    qmp.ok("block-job-pause", json!({ "device": "drive-d0" }));
    qmp.until_first("query-jobs", "status", "paused");
    let before = qmp.ok("query-jobs", json!({}))[0]["current-progress"].clone();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(qmp.ok("query-jobs", json!({}))[0]["current-progress"], before);
    qmp.ok("block-job-resume", json!({ "device": "drive-d0" }));
    goes_on_writing(guest);
    qmp.ok("block-job-cancel", json!({ "device": "drive-d0", "force": true }));
    let data = ended(qmp, "BLOCK_JOB_CANCELLED");
    assert!(data["offset"].as_u64() < data["len"].as_u64(), "{data}");
    qmp.forget_events();
    qmp.ok("blockdev-mirror", slow);
    qmp.ok("block-job-set-speed", json!({ "device": "drive-d0", "speed": 0 }));
    ready(qmp);
    goes_on_writing(guest);
    qmp.ok("stop", json!({}));
    qmp.ok("block-job-cancel", json!({ "device": "drive-d0" }));
    ended(qmp, "BLOCK_JOB_COMPLETED");
    let words = ["created", "running", "ready", "waiting", "pending", "concluded"];
    assert_eq!(qmp.heard("JOB_STATUS_CHANGE", "status")[..6], words.map(Value::from));
    qmp.ok("blockdev-del", json!({ "node-name": "qemu" }));
    let copy = server.1.clone();
    let mut server = server;
    run(Command::new("kill").args(["-TERM", &server.0.id().to_string()]));
    let _ = server.0.wait();
    same(image, &copy, "qcow2");
    qmp.ok("cont", json!({}));
}

/// The server is gone in the middle, and once when the job is ready: the guest does not notice.
fn broken(guest: &mut Guest, qmp: &mut Qmp, dir: &Path) {
    for (name, speed) in [("lost.raw", 1 << 20), ("gone.raw", 0)] {
        let mut server = Server::start(dir, name, "raw");
        qmp.ok("blockdev-add", server.node("lost"));
        let mut arguments = mirror("lost");
        arguments["speed"] = json!(speed);
        qmp.forget_events();
        qmp.ok("blockdev-mirror", arguments);
        if speed == 0 {
            ready(qmp);
        }
        goes_on_writing(guest);
        server.kill();
        let error = qmp.event("BLOCK_JOB_ERROR");
        assert_eq!(error, json!({ "device": "drive-d0", "operation": "write", "action": "report" }));
        assert_eq!(ended(qmp, "BLOCK_JOB_COMPLETED")["error"], "Input/output error");
        goes_on_writing(guest);
        qmp.ok("blockdev-del", json!({ "node-name": "lost" }));
    }
    assert_eq!(qmp.ok("query-status", json!({}))["status"], "running");
    // One that says nothing any more keeps nobody from ending the job.
    let server = Server::start(dir, "hung.raw", "raw");
    qmp.ok("blockdev-add", server.node("hung"));
    qmp.ok("blockdev-mirror", mirror("hung"));
    ready(qmp);
    run(Command::new("kill").args(["-STOP", &server.0.id().to_string()]));
    goes_on_writing(guest);
    qmp.ok("job-cancel", json!({ "id": "drive-d0" }));
    ended(qmp, "BLOCK_JOB_CANCELLED");
    drop(server);
    qmp.ok("blockdev-del", json!({ "node-name": "hung" }));
    goes_on_writing(guest);
}

#[test]
fn a_disk_goes_over_to_its_copy() {
    let dir = tempfile::tempdir().expect("directory");
    let dir = dir.path();
    let (mut guest, mut qmp, image) = source(dir, "qcow2");
    keep_writing(&mut guest);
    let server = Server::start(dir, "copy.raw", "raw");
    qmp.ok("blockdev-add", server.node("far"));
    qmp.ok("blockdev-mirror", mirror("far"));
    ready(&mut qmp);
    goes_on_writing(&mut guest);
    qmp.ok("job-complete", json!({ "id": "drive-d0" }));
    let data = ended(&mut qmp, "BLOCK_JOB_COMPLETED");
    assert!(data.get("error").is_none(), "{data}");
    assert_eq!(qmp.ok("query-block", json!({}))[0]["inserted"]["node-name"], "far");
    assert_eq!(qmp.fails("blockdev-del", json!({ "node-name": "far" })), "Node far is in use");
    qmp.ok("blockdev-del", json!({ "node-name": "fmt" }));
    let old = std::fs::metadata(&image).and_then(|m| m.modified()).expect("the image");
    goes_on_writing(&mut guest);
    stop_writing(&mut guest);
    let said = guest.run("sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum </dev/vda | sed 's/^/SUM /'");
    let sum = printed(&said, "SUM");
    assert_eq!(std::fs::metadata(&image).and_then(|m| m.modified()).expect("the image"), old);
    // Back again, to a file of this process.
    let back = dir.join("back.qcow2");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&back).arg(SIZE.to_string()));
    qmp.ok("blockdev-add", file_node("back", "qcow2", &back));
    let mut again = mirror("back");
    again["device"] = json!("d0");
    again["granularity"] = json!(4096);
    qmp.ok("blockdev-mirror", again);
    ready(&mut qmp);
    qmp.ok("block-job-complete", json!({ "device": "drive-d0" }));
    ended(&mut qmp, "BLOCK_JOB_COMPLETED");
    let said = guest.run("echo 3 >/proc/sys/vm/drop_caches; sha256sum </dev/vda | sed 's/^/SUM /'");
    assert_eq!(printed(&said, "SUM")[..64], sum[..64]);
    guest.power_off();
    run(Command::new("qemu-img").args(["check", "-q"]).arg(&back));
    run(Command::new("qemu-img")
        .args(["compare", "-U", "-f", "qcow2", "-F", "raw"])
        .args([&back, &server.1]));
    assert_eq!(holdfast_tests::devices::sha256(&server.1), sum[..64]);
}

/// What libvirt does with a VM whose storage is not shared.
#[test]
fn a_vm_migrates_with_its_disk_mirrored() {
    let dir = tempfile::tempdir().expect("directory");
    let dir = dir.path();
    let (mut guest, mut qmp, image) = source(dir, "qcow2");
    let (copy, monitor) = (dir.join("copy.qcow2"), dir.join("there.qmp"));
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&copy).arg(SIZE.to_string()));
    let mut args = riscv64_args(1, "");
    let machine = args.iter_mut().find(|arg| *arg == "virt").expect("the machine's name");
    *machine = "virt,hotplug_ports=1".to_owned();
    args.extend(["--incoming", "defer", "--qmp"].map(str::to_owned));
    args.push(format!("unix:{}", monitor.display()));
    args.extend(["--blockdev".to_owned(), file_node("fmt", "qcow2", &copy).to_string()]);
    args.extend(["--device".to_owned(), "virtio-blk-pci,drive=fmt,id=d0".to_owned()]);
    let second = Program::run(&args);
    let mut there = Qmp::connect(&monitor);
    let addr = json!({ "type": "unix", "data": { "path": dir.join("nbd") } });
    there.ok("nbd-server-start", json!({ "addr": addr }));
    let export =
        json!({ "type": "nbd", "id": "e", "node-name": "fmt", "name": "drive-d0", "writable": true });
    there.ok("block-export-add", export);
    let uri = format!("unix:{}", dir.join("m").display());
    there.ok("migrate-incoming", json!({ "uri": uri }));
    keep_writing(&mut guest);
    qmp.ok("blockdev-add", nbd_node("far", "drive-d0", &dir.join("nbd")));
    qmp.ok("blockdev-mirror", mirror("far"));
    ready(&mut qmp);
    let waits = json!([{ "capability": "pause-before-switchover", "state": true }]);
    qmp.ok("migrate-set-capabilities", json!({ "capabilities": waits }));
    qmp.ok("migrate-set-parameters", json!({ "max-bandwidth": 0, "downtime-limit": 60_000 }));
    goes_on_writing(&mut guest);
    qmp.ok("migrate", json!({ "uri": uri }));
    qmp.until("query-migrate", "status", "pre-switchover");
    qmp.ok("block-job-cancel", json!({ "device": "drive-d0" }));
    let data = ended(&mut qmp, "BLOCK_JOB_COMPLETED");
    assert!(data.get("error").is_none(), "{data}");
    qmp.ok("blockdev-del", json!({ "node-name": "far" }));
    qmp.ok("migrate-continue", json!({ "state": "pre-switchover" }));
    qmp.until("query-migrate", "status", "completed");
    there.until("query-status", "status", "running");
    there.ok("nbd-server-stop", json!({}));
    qmp.ok("quit", json!({}));
    assert!(guest.vm.wait_exit(BOOT).success(), "{}", guest.vm.output());
    let mut guest = guest.moved(second);
    goes_on_writing(&mut guest);
    stop_writing(&mut guest);
    // What it had in memory is what it finds on the disk.
    let said = guest.run("sha256sum </dev/vda | sed 's/^/WARM /'; echo 3 >/proc/sys/vm/drop_caches; sha256sum </dev/vda | sed 's/^/COLD /'");
    assert_eq!(printed(&said, "WARM")[..64], printed(&said, "COLD")[..64], "{said}");
    guest.power_off();
    run(Command::new("qemu-img").args(["check", "-q"]).arg(&image));
    run(Command::new("qemu-img").args(["check", "-q"]).arg(&copy));
}

/// A migration does not give disks up that a job still copies.
#[test]
fn a_vm_does_not_leave_a_mirror_behind() {
    let dir = tempfile::tempdir().expect("directory");
    let dir = dir.path();
    let (mut guest, mut qmp, _) = source(dir, "raw");
    let (_other, _far, _) = export(dir);
    qmp.ok("blockdev-add", nbd_node("far", "disk", &dir.join("copy.nbd")));
    keep_writing(&mut guest);
    qmp.ok("blockdev-mirror", mirror("far"));
    ready(&mut qmp);
    let uri = format!("unix:{}", dir.join("m").display());
    let monitor = dir.join("there.qmp");
    let _second = Program::run(&["--incoming", "defer", "--qmp", &format!("unix:{}", monitor.display())]);
    let mut there = Qmp::connect(&monitor);
    there.ok("migrate-incoming", json!({ "uri": uri, "exit-on-error": false }));
    qmp.ok("migrate", json!({ "uri": uri }));
    let failed = qmp.until("query-migrate", "status", "failed");
    assert!(failed["error-desc"].as_str().is_some_and(|e| e.contains("block job 'drive-d0'")), "{failed}");
    goes_on_writing(&mut guest);
    // The mirror goes on, too.
    qmp.ok("block-job-cancel", json!({ "device": "drive-d0" }));
    ended(&mut qmp, "BLOCK_JOB_COMPLETED");
    stop_writing(&mut guest);
    guest.power_off();
}

/// Commands, each with what the job becomes then: a status, `gone`, or nothing that is waited for.
fn conversation() -> Vec<(&'static str, Value, &'static str)> {
    let mirror = |more: Value| {
        let mut all = json!({ "job-id": "j", "device": "A", "target": "B", "sync": "full" });
        all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        all
    };
    let (id, device) = (json!({ "id": "j" }), json!({ "device": "j" }));
    let kept = json!({ "auto-dismiss": false });
    vec![
        ("blockdev-mirror", mirror(json!({ "target": "C" })), ""),
        ("blockdev-mirror", mirror(json!({ "target": "A" })), ""),
        ("blockdev-mirror", mirror(json!({ "job-id": "1x" })), ""),
        ("blockdev-mirror", mirror(json!({ "sync": "incremental" })), ""),
        ("blockdev-mirror", mirror(json!({ "granularity": 7 })), ""),
        ("blockdev-mirror", mirror(json!({ "granularity": 1000 })), ""),
        ("job-pause", id.clone(), ""),
        ("block-job-pause", device.clone(), ""),
        ("block-job-dismiss", id.clone(), ""),
        ("blockdev-mirror", mirror(json!({})), "ready"),
        ("query-block-jobs", json!({}), ""),
        ("blockdev-del", json!({ "node-name": "A" }), ""),
        ("blockdev-del", json!({ "node-name": "B" }), ""),
        ("job-finalize", id.clone(), ""),
        ("block-job-dismiss", id.clone(), ""),
        ("block-job-set-speed", json!({ "device": "j", "speed": -1 }), ""),
        ("job-resume", id.clone(), ""),
        ("job-pause", id.clone(), "standby"),
        ("query-block-jobs", json!({}), ""),
        ("block-job-pause", device.clone(), ""),
        ("job-complete", id.clone(), ""),
        ("block-job-resume", device.clone(), "gone"),
        ("blockdev-mirror", mirror(kept.clone()), "ready"),
        ("block-job-cancel", device.clone(), "concluded"),
        ("query-jobs", json!({}), ""),
        ("block-job-cancel", device.clone(), ""),
        ("job-dismiss", id.clone(), "gone"),
        ("blockdev-mirror", mirror(kept), "ready"),
        ("job-cancel", id.clone(), "concluded"),
        ("block-job-dismiss", id.clone(), "gone"),
        ("blockdev-mirror", mirror(json!({ "auto-finalize": false })), "ready"),
        ("block-job-complete", device.clone(), "pending"),
        ("job-complete", id.clone(), ""),
        ("job-finalize", id, "gone"),
        ("blockdev-mirror", mirror(json!({ "auto-finalize": false })), "ready"),
        ("block-job-cancel", device.clone(), "pending"),
        ("block-job-cancel", device, "gone"),
    ]
}

/// What is said with the command it answers, and an event's name with its data.
type Said<T> = Vec<(T, Value)>;

/// Answers and, for themselves, events.
fn talk(qmp: &mut Qmp, dir: &Path) -> (Said<String>, Said<Value>) {
    for name in ["A", "B"] {
        let image = dir.join(name);
        std::fs::write(&image, vec![name.as_bytes()[0]; 1 << 20]).expect("a file");
        qmp.ok("blockdev-add", file_node(name, "raw", &image));
    }
    let mut answers = Vec::new();
    for (command, arguments, then) in conversation() {
        let mut answer = qmp.command(command, &arguments);
        if let Some(first) = answer.pointer_mut("/return/0").and_then(Value::as_object_mut) {
            // QEMU 7.2 does not say it.
            first.remove("actively-synced");
        }
        answers.push((format!("{command} {arguments}"), answer));
        let until = Instant::now() + BOOT;
        while !then.is_empty() {
            let jobs = qmp.ok("query-jobs", json!({}));
            if jobs[0]["status"].as_str().unwrap_or("gone") == then {
                break;
            }
            assert!(Instant::now() < until, "{command} {arguments}: {jobs} is not {then}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let events = qmp.events.iter().map(|e| (e["event"].clone(), e["data"].clone())).collect();
    assert!(std::fs::read(dir.join("B")).expect("a file") == vec![b'A'; 1 << 20]);
    (answers, events)
}

#[test]
fn jobs_speak_as_those_of_qemu_do() {
    let dir = tempfile::tempdir().expect("directory");
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    [&ours, &theirs].iter().for_each(|dir| std::fs::create_dir(dir).expect("directory"));
    let monitor = theirs.join("qmp");
    let chardev = format!("socket,id=m,server=on,wait=off,path={}", monitor.display());
    let up = theirs.join("pid");
    let mut daemon = Command::new("qemu-storage-daemon")
        .args(["--chardev", &chardev, "--monitor", "m", "--pidfile"])
        .arg(&up)
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-storage-daemon (Debian: qemu-utils)");
    let until = Instant::now() + BOOT;
    // It greets twice who comes before that.
    while std::fs::read(&up).map_or(0, |pid| pid.len()) == 0 {
        assert!(Instant::now() < until, "qemu-storage-daemon does not come up");
        std::thread::sleep(Duration::from_millis(20));
    }
    let expected = talk(&mut Qmp::connect(&monitor), &theirs);
    let _ = daemon.kill().and_then(|()| daemon.wait());
    let monitor = ours.join("qmp");
    let _program = Program::run(&["--qmp".to_owned(), format!("unix:{}", monitor.display())]);
    let got = talk(&mut Qmp::connect(&monitor), &ours);
    got.0.iter().zip(&expected.0).for_each(|(ours, theirs)| assert_eq!(ours, theirs));
    assert_eq!(got.1, expected.1);
}
