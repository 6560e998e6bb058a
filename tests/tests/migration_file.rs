//! A VM is stored in one file while it works, and goes on from there in another process, page by page.

use std::path::Path;
use std::process::Command;

use holdfast_tests::devices::run;
use holdfast_tests::migration::{Console, LIMIT, Vmm, config};
use serde_json::{Value, json};

/// A small file system of its own, which is gone at the end.
struct Mount(std::path::PathBuf);

impl Mount {
    fn tmpfs(at: &Path, size: &str) -> Self {
        std::fs::create_dir(at).expect("directory");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(at));
        Self(at.to_owned())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // It goes with the machine at the latest.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_vm_is_stored_in_a_file_and_goes_on_from_there() {
    let dir = tempfile::tempdir().expect("directory");
    let disk = dir.path().join("disk");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("16M"));
    let console = Console(dir.path().join("console"));
    let mut first = Vmm::start(dir.path(), "a", &[]);
    let mut config = config(&console.0, "mover");
    config["disks"] = json!([{ "path": disk }]);
    first.api.put("vm.create", &config);
    first.api.put("vm.boot", &Value::Null);
    console.disks_go_on(&["vda"], 1);
    // No room: the VM goes on, and nothing is left of the file.
    let small = Mount::tmpfs(&dir.path().join("small"), "4m");
    let full = small.0.join("vm");
    let answer = first.send(&json!({ "destination_url": format!("file:{}", full.display()) }));
    assert!(answer.status == 500 && answer.body.contains("No space left on device"), "{answer:?}");
    assert!(answer.body.contains("cannot write") && !full.exists(), "{answer:?}");
    assert_eq!(first.state(), "Running");
    console.disks_go_on(&["vda"], 1);
    // Into a file by two threads, past the page cache where the file system can do that.
    let path = dir.path().join("vm");
    let url = format!("file:{}", path.display());
    let mut send = json!({
        "destination_url": url, "connections": 2, "downtime_ms": 2000, "timeout_s": 30, "timeout_strategy": "Ignore",
        "direct_io": true,
    });
    let mut sent = first.send(&send);
    if sent.status == 500 && sent.body.contains("Invalid argument") {
        send["direct_io"] = false.into();
        sent = first.send(&send);
    }
    assert_eq!(sent.status, 204, "{sent:?}");
    assert!(first.program.wait_exit(LIMIT).success(), "the source has ended");
    let before = console.counted();
    let metadata = std::fs::metadata(&path).expect("file");
    let taken = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
    assert!(metadata.len() > 256 << 20 && taken < 200 << 20, "{taken} bytes for a VM that uses less");
    // A file that is not whole, or was altered, is refused.
    let second = Vmm::start(dir.path(), "b", &[]);
    let broken = dir.path().join("broken");
    for (at, says) in [(20, "header is damaged"), (4100, "plan or state is damaged")] {
        let head: Vec<u8> = std::fs::read(&path).expect("file").into_iter().take(1 << 20).collect();
        let mut bytes = head;
        bytes[at] ^= 1;
        std::fs::write(&broken, bytes).expect("file");
        let file = std::fs::OpenOptions::new().write(true).open(&broken).expect("file");
        file.set_len(metadata.len()).expect("length");
        let answer = second.api.request(
            "PUT",
            "vm.receive-migration",
            &json!({ "receiver_url": format!("file:{}", broken.display()) }),
        );
        assert!(answer.status == 500 && answer.body.contains(says), "{answer:?}");
    }
    let received = second.api.request("PUT", "vm.receive-migration", &json!({ "receiver_url": url }));
    assert_eq!((received.status, second.state().as_str()), (204, "Running"), "{received:?}");
    console.disks_go_on(&["vda"], 2);
    console.goes_on(2);
    assert!(console.counted() > before);
    console.sum_is_good();
    drop(second);
    run(Command::new("qemu-img").args(["check", "-q"]).arg(&disk));
}
