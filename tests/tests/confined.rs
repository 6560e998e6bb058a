//! Landlock around the whole program: what a VM's config names can be opened, and nothing else.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use holdfast_tests::devices::run;
use holdfast_tests::http::Api;
use holdfast_tests::{Program, riscv64_args, riscv64_guest};
use serde_json::{Value, json};

const BOOT: Duration = Duration::from_secs(240);

fn config(serial: &Path, disk: Option<&Path>, landlock: bool) -> Value {
    let guest = riscv64_guest();
    let mut config = json!({
        "arch": "riscv64",
        "accel": "tcg",
        "cpus": { "boot_vcpus": 1, "max_vcpus": 1 },
        "memory": { "size": 256u64 << 20 },
        "payload": { "kernel": guest.join("Image") },
        "serial": { "mode": "File", "file": serial },
        "console": { "mode": "Off" },
        "landlock_enable": landlock,
    });
    if let Some(path) = disk {
        config["disks"] = json!([{ "path": path }]);
    }
    config
}

fn wait_in(file: &Path, text: &str) {
    let deadline = std::time::Instant::now() + BOOT;
    loop {
        let seen = String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned();
        if seen.contains(text) {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "`{text}` did not come:\n{seen}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn disk_in(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("disk");
    std::fs::write(&path, vec![0; 1 << 20]).expect("file");
    path
}

fn refused(api: &Api, route: &str, body: &Value, path: &Path) {
    let response = api.request("PUT", route, body);
    assert_eq!(response.status, 500, "{response:?}");
    let named = format!("`{}` is not among them for writing", path.display());
    assert!(response.body.contains("Landlock keeps this process"), "{response:?}");
    assert!(response.body.contains(&named), "{response:?}");
    assert!(response.body.contains("--landlock-rules"), "{response:?}");
}

#[test]
fn rules_at_the_start_hold_for_vms_that_are_made_later() {
    let (inside, outside) =
        (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
    let (good, bad) = (disk_in(inside.path()), disk_in(outside.path()));
    let socket = inside.path().join("api");
    let rules = [(riscv64_guest(), "r"), (inside.path().to_owned(), "rw")]
        .map(|(path, access)| format!("path={},access={access}", path.display()));
    let mut program = Program::run(&[
        "--landlock",
        "--landlock-rules",
        &rules[0],
        "--landlock-rules",
        &rules[1],
        "--api-socket",
        socket.to_str().expect("UTF-8"),
    ]);
    let api = Api::connect(&socket);
    let console = inside.path().join("console");
    refused(&api, "vm.create", &config(&console, Some(&bad), false), &bad);
    api.put("vm.create", &config(&console, Some(&good), false));
    refused(&api, "vm.add-disk", &json!({ "path": bad }), &bad);
    api.put("vm.boot", &Value::Null);
    wait_in(&console, "OpenSBI");
    api.put("vm.pause", &Value::Null);
    let away = json!({ "destination_url": format!("file://{}", outside.path().display()) });
    refused(&api, "vm.snapshot", &away, outside.path());
    let here = json!({ "destination_url": format!("file://{}", inside.path().display()) });
    api.put("vm.snapshot", &here);
    api.put("vmm.shutdown", &Value::Null);
    assert!(program.wait_exit(BOOT).success());
    assert!(!socket.exists(), "the API thread may remove its socket");
}

#[test]
fn the_first_vm_that_asks_for_landlock_decides_for_the_process() {
    let (inside, outside) =
        (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
    let (good, bad) = (disk_in(inside.path()), disk_in(outside.path()));
    let socket = inside.path().join("api");
    let mut program = Program::run(&["--api-socket", socket.to_str().expect("UTF-8")]);
    let api = Api::connect(&socket);
    let console = inside.path().join("console");
    // Before it boots, nothing is decided.
    api.put("vm.create", &config(&console, Some(&bad), true));
    api.put("vm.delete", &Value::Null);
    api.put("vm.create", &config(&console, Some(&good), true));
    api.put("vm.boot", &Value::Null);
    wait_in(&console, "OpenSBI");
    api.put("vm.delete", &Value::Null);
    refused(&api, "vm.create", &config(&console, Some(&bad), false), &bad);
    // The same VM once more is within reach.
    std::fs::remove_file(&console).expect("the console's file");
    api.put("vm.create", &config(&console, Some(&good), true));
    api.put("vm.boot", &Value::Null);
    wait_in(&console, "OpenSBI");
    api.put("vmm.shutdown", &Value::Null);
    assert!(program.wait_exit(BOOT).success());
}

#[test]
fn files_that_images_name_are_in_reach() {
    let dir = tempfile::tempdir().expect("directory");
    let path = |name: &str| dir.path().join(name);
    let make = |args: &[&str]| {
        run(Command::new("qemu-img").current_dir(dir.path()).args(["create", "-q", "-f"]).args(args));
    };
    make(&["vmdk", "-o", "subformat=twoGbMaxExtentFlat", "disk.vmdk", "4M"]);
    make(&["qcow2", "base.qcow2", "4M"]);
    make(&["qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
    let (socket, console) = (path("api"), path("console"));
    let mut program = Program::run(&["--api-socket", socket.to_str().expect("UTF-8")]);
    let api = Api::connect(&socket);
    let mut config = config(&console, None, true);
    let disks = ["disk.vmdk", "top.qcow2"].map(|name| json!({ "path": path(name), "backing_files": true }));
    config["disks"] = json!(disks);
    api.put("vm.create", &config);
    api.put("vm.boot", &Value::Null);
    wait_in(&console, "OpenSBI");
    api.put("vmm.shutdown", &Value::Null);
    assert!(program.wait_exit(BOOT).success());
}

#[test]
fn a_vm_from_the_command_line_runs_in_a_limited_process() {
    let mut args = riscv64_args(2, "boot");
    args.push("--landlock".to_owned());
    let mut vm = Program::run(&args);
    vm.wait_for("GUEST-TEST-EXIT 0", BOOT);
    assert!(vm.wait_exit(BOOT).success());
}

#[test]
fn rules_without_landlock_are_refused() {
    let mut program =
        Program::run(&["--landlock-rules", "path=/,access=r", "--api-socket", "/nonexistent/api"]);
    assert_eq!(program.wait_exit(BOOT).code(), Some(2));
}
