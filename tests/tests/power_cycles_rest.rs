//! A VM that is switched off lets go of everything it held: threads, files, memory.

use std::path::Path;

use holdfast_tests::http::Api;
use holdfast_tests::{Program, riscv64_guest, x86_64_guest};
use serde_json::{Value, json};

/// The threads of a program that serves an API and has no VM, as `/proc` abbreviates their names.
const OWN_THREADS: [&str; 4] = ["holdfast", "vmm_signal_hand", "vmm", "http-server"];

fn entries(path: &Path) -> Vec<String> {
    let names = std::fs::read_dir(path).expect("the process lives").filter_map(Result::ok);
    names
        .filter_map(|entry| {
            let path = entry.path();
            let target = std::fs::read_link(&path).ok().map(|target| target.display().to_string());
            target.or_else(|| std::fs::read_to_string(path.join("comm")).ok())
        })
        .collect()
}

#[test]
fn what_a_riscv_vm_holds_goes_with_it() {
    let kernel = riscv64_guest().join("Image");
    cycle(&json!({ "arch": "riscv64", "kernel": kernel }));
}

#[test]
fn what_an_x86_vm_holds_goes_with_it() {
    let kernel = x86_64_guest().join("vmlinuz");
    cycle(&json!({ "arch": "x86_64", "kernel": kernel }));
}

/// Boots and switches off a VM three times in one process.
fn cycle(guest: &Value) {
    let dir = tempfile::tempdir().expect("directory");
    let disk = dir.path().join("disk.img");
    std::fs::File::create(&disk).and_then(|file| file.set_len(8 << 20)).expect("an image");
    let socket = dir.path().join("api");
    let mut program = Program::run(&["--api-socket", socket.to_str().expect("UTF-8")]);
    let api = Api::connect(&socket);
    let config = json!({
        "arch": guest["arch"], "accel": "tcg", "memory": { "size": 256u64 << 20 },
        "payload": { "kernel": guest["kernel"] },
        "disks": [{ "path": disk }], "console": { "mode": "Off" }, "balloon": { "size": 0 },
    });
    let proc = Path::new("/proc").join(program.pid().to_string());
    let held = || (entries(&proc.join("task")), entries(&proc.join("fd")));
    api.put("vm.create", &config);
    // What the first cycle leaves is the program's own; the second and third may add nothing to it.
    let mut first: Option<usize> = None;
    for cycle in 0..3 {
        api.put("vm.boot", &json!(null));
        assert_eq!(api.get("vm.info")["state"], "Running");
        assert!(entries(&proc.join("task")).iter().any(|name| name.trim() == "vcpu0"));
        api.put("vm.shutdown", &json!(null));
        assert_eq!(api.get("vm.info")["state"], "Created");
        // A thread that has been joined may still be listed for a moment, and so may the last request's connection.
        for _ in 0..1000 {
            let (tasks, fds) = held();
            if tasks.len() <= OWN_THREADS.len() && first.is_none_or(|files| fds.len() <= files) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let (tasks, fds) = held();
        let own = |name: &String| OWN_THREADS.contains(&name.trim());
        assert!(tasks.iter().all(own) && tasks.len() <= OWN_THREADS.len(), "threads that stay: {tasks:?}");
        assert!(!fds.iter().any(|name| name.contains("disk.img")), "{fds:?}");
        let files = *first.get_or_insert(fds.len());
        assert!(fds.len() <= files, "files that stay after cycle {cycle}: {fds:?}");
    }
    api.put("vmm.shutdown", &json!(null));
    assert!(program.wait_exit(std::time::Duration::from_secs(60)).success());
}
