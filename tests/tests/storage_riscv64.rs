//! The storage graph of a running VM, driven over QMP, with Debian's own drivers on the other side. Needs root for a small
//! file system, and qemu-utils.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast_tests::devices::{run, sha256};
use holdfast_tests::qmp::Qmp;
use holdfast_tests::riscv64_args;
use holdfast_tests::shell::Guest;
use holdfast_tests::tls::certificates;
use serde_json::json;

fn qcow2(path: &Path, size: &str) {
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(path).arg(size));
}

fn args(dir: &Path, more: &[&str]) -> (Vec<String>, PathBuf) {
    let socket = dir.join("qmp");
    let mut args = riscv64_args(1, "");
    let machine = args.iter_mut().find(|arg| *arg == "virt").expect("the machine's name");
    *machine = "virt,hotplug_ports=2".to_owned();
    args.extend(["--qmp".to_owned(), format!("unix:{}", socket.display())]);
    args.extend(more.iter().map(|arg| (*arg).to_owned()));
    (args, socket)
}

#[test]
fn nodes_come_and_go_and_change_under_a_running_guest() {
    let dir = tempfile::tempdir().expect("directory");
    let image = dir.path().join("a.qcow2");
    qcow2(&image, "64M");
    let node = json!({
        "driver": "qcow2", "node-name": "fmt", "discard": "unmap",
        "file": { "driver": "file", "node-name": "file0", "filename": image },
    });
    let bad = damaged_image(dir.path());
    let (args, socket) = args(
        dir.path(),
        &[
            "--blockdev",
            &node.to_string(),
            "--device",
            "virtio-blk-pci,drive=fmt,id=d0,serial=first",
            "--blockdev",
            &bad.to_string(),
            "--device",
            "virtio-blk-pci,drive=bad,id=d2,serial=bad",
        ],
    );
    let mut guest = Guest::boot(&args);
    let mut qmp = Qmp::connect(&socket);
    assert!(guest.run("cat /sys/block/vda/serial").contains("first"));
    guest.run("dd if=/dev/urandom of=/tmp/a bs=64k count=16 2>/dev/null");
    guest.run("dd if=/tmp/a of=/dev/vda bs=64k conv=fsync 2>/dev/null");
    shown(&mut qmp, &image);
    resized_and_reopened(&mut guest, &mut qmp);
    watched_and_throttled(&mut guest, &mut qmp);
    exported(&mut guest, &mut qmp, dir.path());
    damaged(&mut guest, &mut qmp);
    assert_eq!(qmp.fails("blockdev-del", json!({ "node-name": "fmt" })), "Node fmt is in use");
    guest.power_off();
    run(Command::new("qemu-img").args(["check", "-q"]).arg(&image));
}

fn shown(qmp: &mut Qmp, image: &Path) {
    let block = qmp.ok("query-block", json!({}));
    let inserted = &block[0]["inserted"];
    assert_eq!((&block[0]["device"], &block[0]["io-status"]), (&json!("d0"), &json!("ok")));
    assert_eq!(
        (&inserted["node-name"], &inserted["drv"], &inserted["ro"]),
        (&json!("fmt"), &json!("qcow2"), &json!(false))
    );
    assert_eq!(inserted["image"]["virtual-size"], 64 << 20);
    assert_eq!(inserted["file"], json!(image));
    let nodes = qmp.ok("query-named-block-nodes", json!({}));
    let names: Vec<_> = nodes.as_array().expect("nodes").iter().map(|n| n["node-name"].clone()).collect();
    assert_eq!(names, ["bad", "badfile", "base", "basefile", "file0", "fmt"]);
    let stats = &qmp.ok("query-blockstats", json!({}))[0]["stats"];
    assert!(stats["wr_bytes"].as_u64().expect("bytes") >= 1 << 20, "{stats}");
    assert!(stats["flush_operations"].as_u64().expect("flushes") >= 1, "{stats}");
    assert!(stats["wr_highest_offset"].as_u64().expect("offset") >= 1 << 20, "{stats}");
    let again = json!({ "driver": "raw", "node-name": "fmt", "file": "file0" });
    assert_eq!(
        qmp.fails("blockdev-add", again),
        "Permission conflict on node 'file0': permissions 'write' are both \
        required by node 'fmt' (uses node 'file0' as 'file' child) and unshared by node 'fmt' (uses node 'file0' as 'file' child)."
    );
    let device = json!({ "driver": "virtio-blk-pci", "drive": "fmt", "id": "d1" });
    assert!(qmp.fails("device_add", device).contains("uses node 'fmt' as 'root' child"));
}

/// An image whose second megabyte's table is not where a table can be, over a raw one.
fn damaged_image(dir: &Path) -> serde_json::Value {
    let (image, base) = (dir.join("bad.qcow2"), dir.join("base.img"));
    run(Command::new("qemu-img").args(["create", "-q", "-f", "raw"]).arg(&base).arg("64M"));
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"])
        .arg(&image)
        .arg("64M"));
    let mut bytes = std::fs::read(&image).expect("image");
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().expect("eight bytes")) as usize;
    // Each entry of the L1 table is for 2 MiB.
    bytes[l1 + 8 * 8..l1 + 9 * 8].copy_from_slice(&0x8000_0000_0003_0200u64.to_be_bytes());
    std::fs::write(&image, bytes).expect("written");
    json!({
        "driver": "qcow2", "node-name": "bad",
        "file": { "driver": "file", "node-name": "badfile", "filename": image },
        "backing": {
            "driver": "raw", "node-name": "base",
            "file": { "driver": "file", "node-name": "basefile", "filename": base },
        },
    })
}

fn damaged(guest: &mut Guest, qmp: &mut Qmp) {
    let node = |qmp: &mut Qmp, flat: bool| {
        let all = qmp.ok("query-named-block-nodes", json!({ "flat": flat }));
        all.as_array().expect("nodes").iter().find(|n| n["node-name"] == "bad").expect("it is there").clone()
    };
    let shown = node(qmp, false);
    assert_eq!(shown["image"]["backing-image"]["format"], "raw", "{shown}");
    assert_eq!(shown["backing_file_depth"], 1);
    assert!(node(qmp, true)["image"].get("backing-image").is_none());
    let stats = qmp.ok("query-blockstats", json!({}));
    let disk = stats.as_array().expect("disks").iter().find(|d| d["device"] == "d2").expect("the disk");
    assert_eq!(
        (&disk["parent"]["node-name"], &disk["backing"]["node-name"]),
        (&json!("badfile"), &json!("base"))
    );
    let stats = qmp.ok("query-blockstats", json!({ "query-nodes": true }));
    let of = |name: &str| stats.as_array().expect("nodes").iter().find(|n| n["node-name"] == name).cloned();
    let fmt = of("fmt").expect("there");
    assert_eq!(fmt["parent"]["node-name"], "file0");
    assert!(fmt["stats"]["wr_highest_offset"].as_u64().expect("offset") >= 1 << 20, "{fmt}");
    assert!(of("bad").expect("there").get("backing").is_none());
    qmp.forget_events();
    let disk = "$(for d in /sys/block/vd?; do [ \"$(cat $d/serial)\" = bad ] && echo /dev/${d##*/}; done)";
    let said = guest.run(&format!("dd if={disk} of=/dev/null bs=4k count=1 skip=4096; echo READ $?"));
    assert!(said.contains("\nREAD 1"), "{said}");
    let data = qmp.event("BLOCK_IMAGE_CORRUPTED");
    assert_eq!((&data["node-name"], &data["fatal"]), (&json!("bad"), &json!(true)), "{data}");
    assert!(data["msg"].as_str().expect("text").contains("unaligned"), "{data}");
    assert_eq!(node(qmp, true)["image"]["format-specific"]["data"]["corrupt"], true);
    let said = guest.run(&format!("dd if=/dev/zero of={disk} bs=4k count=1 conv=fsync; echo WROTE $?"));
    assert!(said.contains("\nWROTE 1"), "nothing is written to a damaged image: {said}");
}

fn resized_and_reopened(guest: &mut Guest, qmp: &mut Qmp) {
    qmp.ok("block_resize", json!({ "device": "d0", "size": 96 << 20 }));
    guest.wait_for("/sys/block/vda/size", Some("196608"));
    // Under I/O: what was written before and after is there.
    guest.start("for i in $(seq 1 40); do dd if=/tmp/a of=/dev/vda bs=64k seek=$((i * 16)) conv=notrunc,fsync 2>/dev/null; done");
    for size in [1 << 20, 2 << 20, 3 << 20] {
        let options = json!({
            "driver": "qcow2", "node-name": "fmt", "discard": "unmap", "file": "file0", "l2-cache-size": size,
        });
        qmp.ok("blockdev-reopen", json!({ "options": [options] }));
    }
    guest.finish();
    let sums = guest.run("echo 3 >/proc/sys/vm/drop_caches; for i in 0 1 20 40; do dd if=/dev/vda bs=1M skip=$i count=1 2>/dev/null | sha256sum; done | sort -u | wc -l; sha256sum </tmp/a");
    assert_eq!(
        sums.lines().map(str::trim).find(|l| l.chars().all(|c| c.is_ascii_digit()) && !l.is_empty()),
        Some("1"),
        "{sums}"
    );
    let read_only = json!({ "driver": "qcow2", "node-name": "fmt", "file": "file0", "read-only": true });
    assert!(qmp.fails("blockdev-reopen", json!({ "options": [read_only] })).contains("read-only"));
}

fn watched_and_throttled(guest: &mut Guest, qmp: &mut Qmp) {
    qmp.ok("block-set-write-threshold", json!({ "node-name": "fmt", "write-threshold": 80 << 20 }));
    guest.run("dd if=/tmp/a of=/dev/vda bs=64k seek=1279 count=2 conv=notrunc,fsync 2>/dev/null");
    let data = qmp.event("BLOCK_WRITE_THRESHOLD");
    assert_eq!((&data["node-name"], &data["write-threshold"]), (&json!("fmt"), &json!(80 << 20)));
    assert!(data["amount-exceeded"].as_u64().expect("bytes") > 0);
    let boundaries = json!([1_000, 1_000_000_000_000u64]);
    qmp.ok("block-latency-histogram-set", json!({ "id": "d0", "boundaries": boundaries }));
    let mut rates =
        json!({ "id": "d0", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 20, "iops_rd": 0, "iops_wr": 0 });
    qmp.ok("block_set_io_throttle", rates.clone());
    let inserted = qmp.ok("query-block", json!({}))[0]["inserted"].clone();
    assert_eq!((&inserted["iops"], &inserted["group"]), (&json!(20), &json!("d0")));
    // Twenty operations a second and a tenth of a second's worth at once: 60 take more than 2 seconds, however fast the guest.
    guest.run("echo 3 >/proc/sys/vm/drop_caches");
    let begun = Instant::now();
    guest.run("for i in $(seq 1 60); do dd if=/dev/vda of=/dev/null bs=4k count=1 skip=$((i * 400)) 2>/dev/null; done");
    assert!(begun.elapsed() > Duration::from_secs(2), "{:?}", begun.elapsed());
    rates["iops"] = json!(0);
    qmp.ok("block_set_io_throttle", rates);
    let stats = qmp.ok("query-blockstats", json!({}))[0]["stats"].clone();
    let bins = stats["rd_latency_histogram"]["bins"].as_array().expect("bins").clone();
    let counted: u64 = bins.iter().map(|b| b.as_u64().expect("a number")).sum();
    assert!(counted >= 60 && bins.len() == 3, "{stats}");
}

fn exported(guest: &mut Guest, qmp: &mut Qmp, dir: &Path) {
    let socket = dir.join("nbd");
    let export = json!({ "type": "nbd", "id": "e0", "node-name": "fmt", "name": "disk" });
    assert_eq!(qmp.fails("block-export-add", export.clone()), "NBD server not running");
    qmp.ok("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": socket } } }));
    qmp.ok("block-export-add", export.clone());
    assert!(qmp.fails("block-export-add", export).contains("'e0' is already in use"));
    let writable =
        json!({ "type": "nbd", "id": "e1", "node-name": "fmt", "name": "other", "writable": true });
    assert!(qmp.fails("block-export-add", writable).contains("Permission conflict on node 'fmt'"));
    let exports = qmp.ok("query-block-exports", json!({}));
    assert_eq!(exports, json!([{ "id": "e0", "type": "nbd", "node-name": "fmt", "shutting-down": false }]));
    let copy = dir.join("copy");
    let url = format!("nbd+unix:///disk?socket={}", socket.display());
    run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "raw", &url]).arg(&copy));
    let bytes = std::fs::read(&copy).expect("the copy");
    assert_eq!(bytes.len(), 96 << 20);
    std::fs::write(dir.join("head"), &bytes[..1 << 20]).expect("written");
    let sum = run(Command::new("sha256sum").arg(dir.join("head")));
    assert!(guest.run("sha256sum </tmp/a").contains(&sum[..64]), "what the guest wrote is what clients read");
    qmp.ok("block-export-del", json!({ "id": "e0", "mode": "hard" }));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED")["id"], "e0");
    qmp.ok("nbd-server-stop", json!({}));
    assert_eq!(qmp.fails("nbd-server-stop", json!({})), "NBD server not running");
}

#[test]
fn a_disk_is_plugged_in_and_out() {
    let dir = tempfile::tempdir().expect("directory");
    let image = dir.path().join("b.img");
    std::fs::File::create(&image).and_then(|f| f.set_len(32 << 20)).expect("file");
    let (args, socket) = args(dir.path(), &[]);
    let mut guest = Guest::boot(&args);
    let mut qmp = Qmp::connect(&socket);
    assert!(!guest.run("ls /sys/block").contains("vda"));
    for round in ["one", "two"] {
        let node =
            json!({ "driver": "raw", "node-name": "n0", "file": { "driver": "file", "filename": image } });
        qmp.ok("blockdev-add", node);
        qmp.ok(
            "device_add",
            json!({ "driver": "virtio-blk-pci", "drive": "n0", "id": "hot", "serial": round }),
        );
        // Debian's riscv64 kernel has no driver for the hot plug of its ports: it is told to look.
        guest.run("echo 1 >/sys/bus/pci/rescan");
        guest.wait_for("/sys/block/vda/serial", Some(round));
        guest.run(&format!(
            "echo written in round {round} | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null"
        ));
        guest.run("echo 1 >$(readlink -f /sys/block/vda/device/../remove)");
        guest.wait_for("/sys/block/vda", None);
        qmp.ok("device_del", json!({ "id": "hot" }));
        assert_eq!(qmp.event("DEVICE_DELETED")["device"], "hot");
        qmp.ok("blockdev-del", json!({ "node-name": "n0" }));
        let text = format!("written in round {round}");
        assert!(std::fs::read(&image).expect("file").starts_with(text.as_bytes()));
    }
    assert!(qmp.fails("device_del", json!({ "id": "hot" })).contains("not found"));
    only_some_clients(&mut qmp, dir.path(), &image);
    legacy_encryption(&mut qmp, dir.path());
    formats_that_stay(&mut qmp, dir.path());
    from_the_web(&mut guest, &mut qmp, dir.path());
    guest.power_off();
}

/// An NBD server in the VM's process lets in those clients only whose certificates an object names.
fn only_some_clients(qmp: &mut Qmp, dir: &Path, image: &Path) {
    let (pki, socket) = (dir.join("pki"), dir.join("guarded"));
    std::fs::create_dir(&pki).expect("directory");
    certificates(&pki, "vm.example");
    let creds = json!({ "qom-type": "tls-creds-x509", "id": "t", "endpoint": "server", "verify-peer": true, "dir": pki });
    qmp.ok("object-add", creds);
    qmp.ok("blockdev-add", json!({ "driver": "file", "node-name": "shown", "filename": image }));
    for (name, enters) in [("CN=somebody.else", false), ("CN=vm.example", true)] {
        qmp.ok("object-add", json!({ "qom-type": "authz-simple", "id": "z", "identity": name }));
        let address = json!({ "type": "unix", "path": socket });
        qmp.ok("nbd-server-start", json!({ "addr": address, "tls-creds": "t", "tls-authz": "z" }));
        qmp.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "shown" }));
        let client = Command::new("qemu-img")
            .args(["info", "--object"])
            .arg(format!("tls-creds-x509,id=c,endpoint=client,dir={}", pki.display()))
            .arg("--image-opts")
            .arg(format!(
                "driver=nbd,server.type=unix,server.path={},export=shown,tls-creds=c,tls-hostname=vm.example",
                socket.display()
            ))
            .output()
            .expect("qemu-img");
        assert_eq!(client.status.success(), enters, "{name}: {client:?}");
        qmp.ok("nbd-server-stop", json!({}));
        qmp.ok("object-del", json!({ "id": "z" }));
    }
    qmp.ok("blockdev-del", json!({ "node-name": "shown" }));
}

/// A VM does not open images with QEMU's first encryption, and says what to do.
fn legacy_encryption(qmp: &mut Qmp, dir: &Path) {
    let image = dir.join("old.qcow2");
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=old"])
        .args(["-o", "encrypt.format=aes,encrypt.key-secret=s"])
        .arg(&image)
        .arg("1M"));
    qmp.ok("object-add", json!({ "qom-type": "secret", "id": "s", "data": "old" }));
    let said = qmp.fails(
        "blockdev-add",
        json!({
            "driver": "qcow2", "node-name": "old", "encrypt": { "format": "aes", "key-secret": "s" },
            "file": { "driver": "file", "filename": image },
        }),
    );
    assert!(said.contains("no longer supported") && said.contains("'qemu-img convert'"), "{said}");
}

/// Images of other programs' formats that are written keep the VM where it is, and the refusal names them.
fn formats_that_stay(qmp: &mut Qmp, dir: &Path) {
    let image = dir.join("a.vdi");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "vdi"]).arg(&image).arg("1M"));
    let file = json!({ "driver": "file", "filename": image });
    qmp.ok("blockdev-add", json!({ "driver": "vdi", "node-name": "foreign", "file": file }));
    let said = qmp.fails("migrate", json!({ "uri": format!("unix:{}", dir.join("away").display()) }));
    assert!(said.contains("'foreign'") && said.contains("'vdi'"), "{said}");
    qmp.ok("blockdev-del", json!({ "node-name": "foreign" }));
}

/// Gives out ranges of `data` until the test ends. Returns its port.
fn web_server(data: Arc<Vec<u8>>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("port");
    let port = listener.local_addr().expect("address").port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let data = Arc::clone(&data);
            std::thread::spawn(move || answer(&stream, &data));
        }
    });
    port
}

fn answer(mut stream: &TcpStream, data: &[u8]) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let headers: Vec<String> = lines.take_while(|l| !l.is_empty()).map(|l| l.to_ascii_lowercase()).collect();
    let range = headers.iter().find_map(|l| l.strip_prefix("range: bytes=")?.split_once('-'));
    let (status, part, more) = match range {
        Some((from, to)) if first.starts_with("GET ") => {
            let from: usize = from.parse().unwrap_or(0);
            let to = to.parse().unwrap_or(usize::MAX).min(data.len() - 1);
            let range = format!("Content-Range: bytes {from}-{to}/{}\r\n", data.len());
            ("206 Partial Content", data.get(from..=to).unwrap_or_default(), range)
        }
        _ => ("200 OK", data, String::new()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nAccept-Ranges: bytes\r\nContent-Length: {}\r\n{more}Connection: close\r\n\r\n",
        part.len()
    );
    // Clients that have heard enough go.
    let _ = stream.write_all(head.as_bytes());
    if !first.starts_with("HEAD ") {
        let _ = stream.write_all(part);
    }
}

/// A disk whose bytes a web server has.
fn from_the_web(guest: &mut Guest, qmp: &mut Qmp, dir: &Path) {
    let data: Vec<u8> = (0..3u32 << 20).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    std::fs::write(dir.join("web"), &data).expect("written");
    let port = web_server(Arc::new(data));
    let url = format!("http://127.0.0.1:{port}/disk");
    qmp.ok(
        "blockdev-add",
        json!({
            "driver": "raw", "node-name": "web", "read-only": true,
            "file": { "driver": "http", "url": url, "read-only": true },
        }),
    );
    qmp.ok("device_add", json!({ "driver": "virtio-blk-pci", "drive": "web", "id": "web", "serial": "web" }));
    guest.run("echo 1 >/sys/bus/pci/rescan");
    guest.wait_for("/sys/block/vda/serial", Some("web"));
    assert!(guest.run("cat /sys/block/vda/ro").contains('1'));
    assert!(guest.run("sha256sum </dev/vda").contains(&sha256(&dir.join("web"))));
}

/// A file system of a few megabytes, which goes when this does.
struct Small(tempfile::TempDir);

impl Small {
    fn new(size: &str) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "small"])
            .arg(dir.path()));
        Self(dir)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // It may be in use still, if the test has failed.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_host_disk_stops_the_guest_and_nothing_is_lost() {
    let small = Small::new("8M");
    let dir = tempfile::tempdir().expect("directory");
    let image = small.0.path().join("c.qcow2");
    qcow2(&image, "32M");
    let (args, socket) =
        args(dir.path(), &["--disk", &format!("path={},image_type=qcow2,id=d0", image.display())]);
    let mut guest = Guest::boot(&args);
    let mut qmp = Qmp::connect(&socket);
    guest.run("dd if=/dev/urandom of=/tmp/a bs=64k count=192 2>/dev/null");
    guest.start("dd if=/tmp/a of=/dev/vda bs=64k conv=fsync 2>/dev/null");
    let data = qmp.event("BLOCK_IO_ERROR");
    assert_eq!((&data["operation"], &data["action"]), (&json!("write"), &json!("stop")), "{data}");
    assert_eq!((&data["nospace"], &data["node-name"]), (&json!(true), &json!("d0")), "{data}");
    qmp.event("STOP");
    let status = qmp.ok("query-status", json!({}));
    assert_eq!(status, json!({ "running": false, "status": "io-error" }));
    assert_eq!(qmp.ok("query-block", json!({}))[0]["io-status"], "nospace");
    qmp.forget_events();
    // There is still no room: it stops again.
    qmp.ok("cont", json!({}));
    qmp.event("BLOCK_IO_ERROR");
    qmp.event("STOP");
    run(Command::new("mount").args(["-o", "remount,size=64M"]).arg(small.0.path()));
    qmp.ok("cont", json!({}));
    guest.finish();
    let sums = guest.run("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda bs=64k count=192 2>/dev/null | cmp - /tmp/a && echo SAME");
    assert!(sums.contains("\nSAME") || sums.trim_end().ends_with("SAME"), "{sums}");
    assert!(guest.run("dmesg | grep -c 'I/O error'").contains("\n0"), "the guest has seen no error");
    guest.power_off();
    run(Command::new("qemu-img").args(["check", "-q"]).arg(&image));
}
