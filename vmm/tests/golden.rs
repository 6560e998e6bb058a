//! Golden snapshots (`tests/golden/VERSION/NAME`) still load, and nothing in them gets lost or changes.
//!
//! A snapshot whose `migrated.json` exists was written by a version whose state differs from today's: that file
//! holds what it must become. `HOLDFAST_GOLDEN=migrate` writes it, for review beside the change that made it
//! necessary. Needs root, for a tap device.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use holdfast_accel::AccelError;
use holdfast_config::VmConfig;
use holdfast_device::{SystemEvent, SystemSink};
use holdfast_threads::PlainSpawner;
use holdfast_vmm::control::EventBus;
use holdfast_vmm::snapshot::SavedVm;
use holdfast_vmm::vm::vcpus::{DebugStop, VcpuEvents};
use holdfast_vmm::vm::{Host, Vm};
use serde_json::Value;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// What to do about a difference.
const ADVICE: &str = "\nThe state of a saved VM must survive changes of the code. Give new fields a serde default, raise \
    the version where old data must be converted, and convert it in `restore`. If the differences above are what the \
    conversion is meant to give, run this test with HOLDFAST_GOLDEN=migrate and commit migrated.json. If the machine \
    has a new device, run tests/golden/make as well.";

#[derive(Debug)]
struct Deaf;

impl SystemSink for Deaf {
    fn request(&self, _event: SystemEvent) {}
}

impl VcpuEvents for Deaf {
    fn vcpu_failed(&self, _index: u32, _error: AccelError) {}
    fn vcpu_debug(&self, _index: u32, _stop: DebugStop) {}
}

fn host() -> Host {
    Host {
        spawner: PlainSpawner::shared(),
        system: Arc::new(Deaf),
        vcpu_events: Arc::new(Deaf),
        events: EventBus::default(),
        quit: Arc::new(|| {}),
        tap_fds: Default::default(),
        incoming: false,
        ram_files: Vec::new(),
        storage: holdfast_vmm::storage::Storage::detached(PlainSpawner::shared()),
        accelerator: Some(Arc::new(holdfast_accel_still::Still)),
    }
}

/// The golden snapshots: all directories with a `state.json`.
fn goldens() -> Vec<PathBuf> {
    let list = |dir: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_dir()).collect()
    };
    let versions = list(&Path::new(ROOT).join("tests/golden"));
    versions.iter().flat_map(|v| list(v)).filter(|dir| dir.join("state.json").exists()).collect()
}

fn read(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Builds the VM of a golden snapshot, with empty files where its config names files.
fn build(golden: &Path, dir: &Path) -> Vm {
    // A tap that was just closed is busy for a moment.
    static TAPS: AtomicU32 = AtomicU32::new(0);
    let tap = format!("hfgold-{}", TAPS.fetch_add(1, Ordering::Relaxed));
    for (name, size) in [("disk", 1 << 20), ("kernel", 4096), ("initramfs", 4096), ("firmware", 256 << 10)] {
        let file = std::fs::File::create(dir.join(name)).expect("a file");
        file.set_len(size).expect("a sparse file");
    }
    let text = read(&golden.join("config.json")).to_string();
    let text = text.replace("@DIR@", &dir.display().to_string()).replace("hfgolden0", &tap);
    let config = VmConfig::from_json(text.as_bytes()).expect("the golden config is valid");
    Vm::build(config, host()).unwrap_or_else(|e| panic!("{}: {e:?}", golden.display()))
}

/// What the calendar clock catches up with when it is saved: it keeps the host's time.
const FOLLOWS_WALL_TIME: [&str; 3] = [
    "[mc146818][1].data.cmos[12]: was",
    "[mc146818][1].data.noticed: was",
    "[mc146818][1].data.periodic: was",
];

/// Where `a` and `b` differ, by path.
fn differences(path: &str, a: Option<&Value>, b: Option<&Value>, found: &mut Vec<String>) {
    match (a, b) {
        (Some(a), Some(b)) if a == b => {}
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            keys.iter().for_each(|k| differences(&format!("{path}.{k}"), a.get(*k), b.get(*k), found));
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) => {
            for i in 0..a.len().max(b.len()) {
                // Devices and vCPUs are told by their names.
                let name = a.get(i).or(b.get(i)).and_then(|x| x.get(0)).and_then(Value::as_str);
                let step = name.map_or_else(|| i.to_string(), str::to_owned);
                differences(&format!("{path}[{step}]"), a.get(i), b.get(i), found);
            }
        }
        (Some(a), Some(b)) => {
            let text = format!("{path}: was {a}, is {b}");
            if !FOLLOWS_WALL_TIME.iter().any(|field| text.contains(field)) {
                found.push(text);
            }
        }
        (Some(a), None) => found.push(format!("{path}: was {a}, is gone")),
        (None, Some(b)) => found.push(format!("{path}: is new, {b}")),
        (None, None) => {}
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let cause = error.source().map(|cause| format!(": {}", chain(cause)));
    format!("{error}{}", cause.unwrap_or_default())
}

/// Restores the snapshot into a new VM and saves that; the differences between the two.
fn round_trip(golden: &Path) -> Result<(), String> {
    let at = golden.display();
    let state = read(&golden.join("state.json"));
    let saved: SavedVm =
        serde_json::from_value(state.clone()).map_err(|e| format!("{at} does not parse any more: {e}"))?;
    let dir = tempfile::tempdir().expect("directory");
    let vm = build(golden, dir.path());
    vm.restore(&saved).map_err(|e| format!("{at} cannot be restored any more: {}{ADVICE}", chain(&e)))?;
    let now = serde_json::to_value(vm.save().expect("saved")).expect("JSON");
    let migrated = golden.join("migrated.json");
    if std::env::var_os("HOLDFAST_GOLDEN").is_some_and(|v| v == "migrate") && now != state {
        std::fs::write(&migrated, format!("{now:#}\n")).expect("migrated.json is written");
    }
    let expected = if migrated.exists() { read(&migrated) } else { state };
    let mut found = Vec::new();
    differences("", Some(&expected), Some(&now), &mut found);
    let list = found.iter().take(20).cloned().collect::<Vec<_>>().join("\n  ");
    if found.is_empty() { Ok(()) } else { Err(format!("{at} came back changed:\n  {list}{ADVICE}")) }
}

#[test]
fn golden_snapshots_come_back_as_they_were() {
    let goldens = goldens();
    assert!(goldens.len() >= 3, "only {goldens:?} are there");
    let failures: Vec<_> = goldens.iter().filter_map(|golden| round_trip(golden).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

/// The kinds of state in the sources, by the names that their modules give them.
fn kinds_in_sources(dir: &Path, kinds: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(dir).expect("a source directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            kinds_in_sources(&path, kinds);
        } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
            let text = std::fs::read_to_string(&path).expect("a source file");
            let text = text.split("#[cfg(test)]").next().unwrap_or_default();
            if !text.contains("DeviceState::new(") && !text.contains("fn restore(") {
                continue;
            }
            let named = |line: &str| {
                let value = line.strip_prefix("const ")?.split_once(": &str = \"")?.1;
                let name = line.strip_prefix("const ")?.split(':').next()?;
                ["KIND", "CONSOLE", "EXIT"].contains(&name).then(|| value.trim_end_matches("\";").to_owned())
            };
            kinds.extend(text.lines().filter_map(named));
            let literal = |part: &str| Some(part.strip_prefix('"')?.split('"').next()?.to_owned());
            kinds.extend(text.split("DeviceState::new(").skip(1).filter_map(literal));
        }
    }
}

#[test]
fn every_kind_of_device_is_in_a_golden_snapshot() {
    let mut kinds = BTreeSet::new();
    for folder in ["devices/src", "virtio-devices/src"] {
        kinds_in_sources(&Path::new(ROOT).join(folder), &mut kinds);
    }
    assert!(kinds.len() > 20, "only {kinds:?} were found");
    let mut golden = BTreeSet::new();
    for dir in goldens() {
        for device in read(&dir.join("state.json"))["devices"].as_array().expect("devices") {
            golden.insert(device[1]["kind"].as_str().expect("a kind").to_owned());
        }
    }
    let missing: Vec<_> = kinds.difference(&golden).collect();
    assert!(missing.is_empty(), "no golden snapshot has {missing:?}; extend tests/golden/make");
}

#[test]
fn changes_without_a_migration_are_noticed() {
    let golden = goldens().into_iter().find(|g| g.ends_with("virt")).expect("virt");
    let spoil = |change: &dyn Fn(&mut Value)| {
        let dir = tempfile::tempdir().expect("directory");
        let mut state = read(&golden.join("state.json"));
        change(&mut state);
        std::fs::copy(golden.join("config.json"), dir.path().join("config.json")).expect("copied");
        std::fs::write(dir.path().join("state.json"), state.to_string()).expect("written");
        round_trip(dir.path()).expect_err("noticed")
    };
    let section = |state: &mut Value, id: &str, with: &dyn Fn(&mut Value)| {
        let devices = state["devices"].as_array_mut().expect("devices");
        with(devices.iter_mut().find(|d| d[0] == id).map(|d| &mut d[1]).expect("the device"));
    };
    // As if this version had an older number than the one that wrote the snapshot, or the other way round.
    let newer = spoil(&|s| section(s, "serial", &|d| d["version"] = 2.into()));
    assert!(newer.contains("`serial-16550` state version 2 is newer than 1"), "{newer}");
    let older = spoil(&|s| section(s, "serial", &|d| d["version"] = 0.into()));
    assert!(older.contains(".devices[serial][1].version: was 0, is 1"), "{older}");
    // As if a field had been dropped, added, or renamed.
    let dropped = spoil(&|s| section(s, "rtc", &|d| d["data"]["lost"] = 1.into()));
    assert!(dropped.contains(".devices[rtc][1].data.lost: was 1, is gone"), "{dropped}");
    let renamed = spoil(&|s| {
        section(s, "aclint", &|d| {
            d["data"].as_object_mut().expect("an object").remove("mtimecmp").expect("a field");
        });
    });
    assert!(renamed.contains("`riscv-aclint` state is invalid"), "{renamed}");
    assert!(renamed.contains("HOLDFAST_GOLDEN=migrate"), "it says what to do");
}
