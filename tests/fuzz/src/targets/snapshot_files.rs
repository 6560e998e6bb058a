//! Snapshot directories that were cut or altered: `config.json`, `state.json` and the file of RAM.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use holdfast_arch::{Arch, CpuState};
use holdfast_config::VmConfig;
use holdfast_device::DeviceState;
use holdfast_memory::GuestMemory;
use holdfast_vmm::snapshot::{SavedVm, SnapshotDir, ram};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

/// RAM in two ranges, as on a PC.
const RANGES: [(u64, usize); 2] = [(0, 0x6000), (0x10_0000, 0x3000)];
const TOTAL: usize = RANGES[0].1 + RANGES[1].1;

/// A directory for one run.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("fuzz-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("a directory");
        Self(path)
    }

    fn snapshot(&self) -> SnapshotDir {
        SnapshotDir::open(&self.0).expect("a directory")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `config.json` and `state.json` as they should be.
static GOOD: OnceLock<[Vec<u8>; 2]> = OnceLock::new();

fn good() -> [Vec<u8>; 2] {
    let dir = Dir::new();
    let mut state = SavedVm::new(Arch::Riscv64, "virt", 7);
    state.ram = RANGES.iter().map(|&(gpa, len)| (gpa, len as u64)).collect();
    state.vcpus = vec![CpuState::Riscv64(Box::default())];
    state.devices = vec![("rtc".into(), DeviceState::new("rtc", 1, &[1, 2]).expect("a state"))];
    dir.snapshot().write(&VmConfig::default(), &state, |_| Ok(0)).expect("written");
    ["config.json", "state.json"].map(|name| fs::read(dir.0.join(name)).expect("written"))
}

/// A copy of a good file with some bytes changed, at its own length or cut.
fn altered(good: &[u8], data: &[u8]) -> Vec<u8> {
    let mut out = good.to_vec();
    for change in data.chunks_exact(4) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % (out.len() + 1);
        match change[2] & 7 {
            0 => out.truncate(at),
            1 => out.insert(at, change[3]),
            2 if at < out.len() => _ = out.remove(at),
            3 => {
                let piece: Vec<u8> = out.iter().skip(at).take(change[3].into()).copied().collect();
                out.extend(piece);
            }
            _ => {
                if let Some(byte) = out.get_mut(at) {
                    *byte = change[3];
                }
            }
        }
        out.truncate(1 << 16);
    }
    out
}

fn json(name: &str, text: &[u8]) {
    let dir = Dir::new();
    fs::write(dir.0.join(name), text).expect("written");
    let snapshot = dir.snapshot();
    if name == "config.json" {
        match snapshot.config() {
            Ok(config) => _ = config.validate(),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    } else if let Ok(state) = snapshot.state() {
        // What was read can be written and read again.
        let text = serde_json::to_vec(&state).expect("serialisable");
        fs::write(dir.0.join(name), text).expect("written");
        let again = snapshot.state().expect("our own output");
        // Numbers with fractions may lose their last digit; there are none here.
        assert_eq!((again.clock, again.ram, again.vcpus), (state.clock, state.ram, state.vcpus));
    }
}

/// RAM comes back as it was saved, or not at all.
fn memory(data: &[u8]) {
    let [cut, data @ ..] = data else { return };
    let ranges = RANGES.map(|(gpa, len)| (GuestAddress(gpa), len));
    let (saved, loaded) = (GuestMemory::from_ranges(&ranges), GuestMemory::from_ranges(&ranges));
    let (saved, loaded) = (saved.expect("RAM"), loaded.expect("RAM"));
    for piece in data.chunks(9) {
        let at = usize::from(piece[0]) << 8;
        let (gpa, len) = RANGES[usize::from(at >= RANGES[0].1)];
        let at = at % RANGES[0].1 % (len - 8);
        saved.write_slice(&piece[1..], GuestAddress(gpa + at as u64)).expect("in RAM");
    }
    let file = TempFile::new().expect("a file").into_file();
    ram::save(&saved, &file).expect("saved");
    let whole = match cut {
        0..=127 => true,
        128..=191 => {
            file.set_len(TOTAL as u64 - 1 - u64::from(cut & 63) * 0x200).expect("cut");
            false
        }
        _ => {
            file.write_all_at(&[1], TOTAL as u64 + u64::from(cut & 63) * 0x200).expect("longer");
            false
        }
    };
    assert_eq!(ram::load(&loaded, &file).is_ok(), whole);
    for (gpa, len) in RANGES {
        let (mut a, mut b) = (vec![0; len], vec![0; len]);
        saved.read_slice(&mut a, GuestAddress(gpa)).expect("in RAM");
        loaded.read_slice(&mut b, GuestAddress(gpa)).expect("in RAM");
        assert!(!whole || a == b, "RAM is as it was");
        assert!(whole || b.iter().all(|byte| *byte == 0), "nothing of a wrong file is taken");
    }
}

/// Runs one input: what is altered, then how.
pub fn run(data: &[u8]) {
    let Some((&what, data)) = data.split_first() else { return };
    let [config, state] = GOOD.get_or_init(good);
    match what % 5 {
        0 => json("config.json", data),
        1 => json("state.json", data),
        2 => json("config.json", &altered(config, data)),
        3 => json("state.json", &altered(state, data)),
        _ => memory(data),
    }
}
