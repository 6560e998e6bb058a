//! A VM's life over REST: made, booted, paused, saved, restored in another process, ended.

use std::path::Path;
use std::time::{Duration, Instant};

use holdfast_tests::counter::{Console, Count, vmm};
use holdfast_tests::http::Api;
use holdfast_tests::{Program, riscv64_args, riscv64_guest};
use serde_json::{Value, json};

const BOOT: Duration = Duration::from_secs(240);

fn config(serial: &Path, test: &str) -> Value {
    let guest = riscv64_guest();
    json!({
        "arch": "riscv64",
        "accel": "tcg",
        "cpus": { "boot_vcpus": 2, "max_vcpus": 2 },
        "memory": { "size": 512u64 << 20 },
        "payload": {
            "kernel": guest.join("Image"),
            "initramfs": guest.join("initramfs.cpio"),
            "cmdline": format!("console=ttyS0 quiet holdfast.test={test}"),
        },
        "serial": { "mode": "File", "file": serial },
        "console": { "mode": "Off" },
        "balloon": { "size": 0 },
    })
}

fn state(api: &Api) -> String {
    api.get("vm.info")["state"].as_str().expect("a state").to_owned()
}

#[test]
fn every_state_is_reached_and_reported() {
    let dir = tempfile::tempdir().expect("directory");
    let (mut program, api) = vmm(dir.path());
    assert_eq!(api.request("GET", "vm.info", &Value::Null).status, 404);
    let console = Console::new(dir.path().join("console"));
    api.put("vm.create", &config(console.file(), "counter"));
    assert_eq!(state(&api), "Created");
    api.put("vm.boot", &Value::Null);
    assert_eq!(state(&api), "Running");
    console.wait_for(&program, "COUNT 3 ", BOOT);
    api.put("vm.pause", &Value::Null);
    assert_eq!(state(&api), "Paused");
    let standing = console.text();
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(console.text(), standing, "a paused guest says nothing");
    api.put("vm.resume", &Value::Null);
    Count::NONE.goes_on_with(&Count::all(&console.wait_for(&program, "COUNT 5 ", BOOT)));
    api.put("vm.resize", &json!({ "desired_balloon": 64u64 << 20 }));
    let deadline = std::time::Instant::now() + BOOT;
    while api.get("vm.info")["memory_actual_size"] != json!((512u64 - 64) << 20) {
        assert!(std::time::Instant::now() < deadline, "the balloon never filled");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(api.get("vm.counters").is_object());
    api.put("vm.shutdown", &Value::Null);
    assert_eq!(state(&api), "Created");
    api.put("vm.delete", &Value::Null);
    api.put("vmm.shutdown", &Value::Null);
    assert!(program.wait_exit(BOOT).success());
}

fn snapshot_and_restore(mode: &str, prefault: bool) {
    let dir = tempfile::tempdir().expect("directory");
    let saved = dir.path().join("saved");
    std::fs::create_dir(&saved).expect("directory");
    let url = format!("file://{}", saved.display());
    let mut console = Console::new(dir.path().join("console"));
    let (mut first, api) = vmm(dir.path());
    api.put("vm.create", &config(console.file(), "counter"));
    api.put("vm.boot", &Value::Null);
    console.wait_for(&first, "COUNT 3 ", BOOT);
    let mut running = Instant::now();
    api.put("vm.pause", &Value::Null);
    let mut ran = running.elapsed();
    api.put("vm.snapshot", &json!({ "destination_url": url }));
    // The guest may have been paused in the middle of a line, whose end is for the next process to write.
    let before = Count::all(&console.text());
    first.kill();
    console.is_begun_anew();
    // RAM that the guest never touched takes no room.
    use std::os::unix::fs::MetadataExt;
    let ram = std::fs::metadata(saved.join("memory-ranges")).expect("RAM");
    assert!(ram.len() == 512 << 20 && ram.blocks() * 512 < ram.len(), "the file is sparse");

    std::fs::remove_file(dir.path().join("api")).expect("the dead process's socket");
    let (second, api) = vmm(dir.path());
    // Longer than what the clock may be out by.
    std::thread::sleep(Duration::from_millis(1500));
    api.put("vm.restore", &json!({ "source_url": url, "memory_restore_mode": mode, "prefault": prefault }));
    if prefault {
        // All of RAM is there before the guest runs, what it never touched included.
        let status = std::fs::read_to_string(format!("/proc/{}/status", second.pid())).expect("status");
        let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("VmRSS").trim();
        let rss: u64 = rss.trim_end_matches(" kB").trim().parse().expect("a number");
        assert!(rss > 512 << 10, "only {rss} KiB are resident");
    }
    assert_eq!(state(&api), "Paused");
    running = Instant::now();
    api.put("vm.resume", &Value::Null);
    let last = before.last().expect("it counted");
    console.wait_for(&second, &format!("COUNT {} ", last.number + 1), BOOT);
    ran += running.elapsed();
    let wanted = format!("COUNT {} ", last.number + 4);
    let mut after = Count::all(&console.wait_for(&second, &wanted, BOOT));
    after.retain(|count| count.number > last.number);
    last.goes_on_with(&after);
    let next = after.first().expect("it goes on");
    last.clock_goes_on(next, ran, Duration::from_millis(900));
    api.put("vmm.shutdown", &Value::Null);
}

#[test]
fn a_snapshot_goes_on_in_another_process_by_copy() {
    snapshot_and_restore("Copy", false);
}

#[test]
fn a_snapshot_goes_on_in_another_process_on_demand() {
    snapshot_and_restore("OnDemand", false);
}

#[test]
fn a_snapshot_goes_on_with_all_of_its_ram_present() {
    snapshot_and_restore("Copy", true);
}

#[test]
fn prefaulting_and_paging_on_demand_exclude_each_other() {
    let dir = tempfile::tempdir().expect("directory");
    let saved = dir.path().join("saved");
    std::fs::create_dir(&saved).expect("directory");
    let url = format!("file://{}", saved.display());
    let (_program, api) = vmm(dir.path());
    api.put("vm.create", &config(&dir.path().join("console"), "counter"));
    api.put("vm.boot", &Value::Null);
    api.put("vm.pause", &Value::Null);
    api.put("vm.snapshot", &json!({ "destination_url": url }));
    api.put("vm.delete", &Value::Null);
    let body = json!({ "source_url": url, "memory_restore_mode": "OnDemand", "prefault": true });
    let refused = api.request("PUT", "vm.restore", &body);
    assert_eq!(refused.status, 500);
    assert!(refused.body.contains("exclude each other"), "{}", refused.body);
}

#[test]
fn the_power_button_of_virt_is_one_that_guests_know() {
    let dir = tempfile::tempdir().expect("directory");
    let console = Console::new(dir.path().join("console"));
    let (mut program, api) = vmm(dir.path());
    api.put("vm.create", &config(console.file(), "button"));
    api.put("vm.boot", &Value::Null);
    // Until its driver listens, the guest has no button, and that is said.
    let deaf = api.request("PUT", "vm.power-button", &Value::Null);
    assert_eq!(deaf.status, 500);
    assert!(deaf.body.contains("virtio_input and evdev"), "{}", deaf.body);
    let text = console.wait_for(&program, "READY", BOOT);
    assert!(text.contains("Power Button"), "{text}");
    api.put("vm.power-button", &Value::Null);
    console.wait_for(&program, "POWER-BUTTON", BOOT);
    assert!(program.wait_exit(BOOT).success(), "the guest switched itself off");
}

#[test]
fn a_vm_from_the_command_line_is_the_one_rest_sees() {
    let dir = tempfile::tempdir().expect("directory");
    let socket = dir.path().join("api");
    let mut args = riscv64_args(1, "");
    args.extend(["--api-socket".to_owned(), socket.display().to_string()]);
    let program = Program::run(&args);
    program.wait_for("BOOTED", BOOT);
    let api = Api::connect(&socket);
    let info = api.get("vm.info");
    assert_eq!(info["state"], "Running");
    assert_eq!(info["config"]["cpus"]["boot_vcpus"], 1);
    let from = program.output().len();
    api.put("vm.reboot", &Value::Null);
    program.wait_for_after("BOOTED", from, BOOT);
}
