//! Seeds, past findings and pseudo-random inputs through every fuzz target, so that neither the targets nor
//! what they once found can rot. The same inputs in every run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use holdfast_fuzz::targets::TARGETS;

/// Panics of all threads: a device's thread that dies ends no test by itself.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            usual(info);
        }));
    });
}

/// Steele, Lea and Flood's SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn bytes(&mut self) -> Vec<u8> {
        let len = self.below(768);
        (0..len).map(|_| self.next() as u8).collect()
    }

    /// `seed` with some bytes changed, cut or doubled.
    fn mutate(&mut self, seed: &[u8]) -> Vec<u8> {
        let mut out = seed.to_vec();
        for _ in 0..1 + self.below(8) {
            let at = self.below(out.len());
            match (self.below(8), out.get_mut(at)) {
                (0, _) => out.truncate(at),
                (1, _) => out.extend_from_within(at..),
                (2, Some(byte)) => *byte ^= 1 << self.below(8),
                (_, Some(byte)) => *byte = self.next() as u8,
                (_, None) => {}
            }
        }
        out
    }
}

/// Says which input it was, if the target panics.
struct Saying<'a>(&'a str, &'a str);

impl Drop for Saying<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("target {}, input {}", self.0, self.1);
        }
    }
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn files(target: &str) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for kind in ["seeds", "regressions"] {
        for entry in std::fs::read_dir(folder(kind).join(target)).into_iter().flatten().flatten() {
            let bytes = std::fs::read(entry.path()).expect("readable");
            found.push((entry.path().display().to_string(), bytes));
        }
    }
    found.sort();
    found
}

fn replay(target: &str, random: usize) {
    count_panics();
    let run = TARGETS.iter().find(|(name, _)| *name == target).expect("a target").1;
    let one = |label: &str, bytes: &[u8]| {
        let saying = Saying(target, label);
        let before = PANICS.load(Ordering::SeqCst);
        run(bytes);
        assert_eq!(PANICS.load(Ordering::SeqCst), before, "no thread panics");
        drop(saying);
    };
    let files = files(target);
    files.iter().for_each(|(label, bytes)| one(label, bytes));
    one("of no bytes", &[]);
    let mut source = Random(0);
    for n in 0..random {
        let bytes = match files.get(source.below(files.len())) {
            Some((_, seed)) if n % 2 == 0 => source.mutate(seed),
            _ => source.bytes(),
        };
        one(&format!("number {n}"), &bytes);
    }
}

macro_rules! replay {
    ($($name:ident: $random:literal),* $(,)?) => {
        $(#[test]
        fn $name() {
            replay(stringify!($name), $random);
        })*

        const REPLAYED: &[&str] = &[$(stringify!($name)),*];
    };
}

replay! {
    acpi_tables: 200,
    dbus_bus: 300,
    device_state: 300,
    disk_image: 400,
    fdt_tree: 500,
    flash_commands: 200,
    fw_cfg: 1000,
    kernel_load: 100,
    mmio_registers: 200,
    multiboot: 200,
    nbd_client: 200,
    migration_stream: 300,
    nbd_server: 300,
    options: 2000,
    pci_config: 200,
    pci_config_virt: 200,
    pio_registers: 200,
    qmp_lines: 2000,
    rest_body: 2000,
    riscv_decode: 200,
    snapshot_files: 500,
    virtio_console: 300,
    virtio_net: 300,
    virtio_pci: 300,
    virtqueue: 300,
}

#[test]
fn every_target_is_fuzzed_and_replayed() {
    let targets: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let replayed: BTreeSet<_> = REPLAYED.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(targets, replayed);
    let manifest = std::fs::read_to_string(folder("libfuzzer/Cargo.toml")).expect("a manifest");
    for name in &targets {
        let program = folder("libfuzzer/fuzz_targets").join(format!("{name}.rs"));
        let text = std::fs::read_to_string(program).expect("a program for each target");
        assert!(text.contains(&format!("targets::{name}::run(data)")), "{name}");
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is built");
    }
    for kind in ["libfuzzer/fuzz_targets", "seeds", "regressions"] {
        for entry in std::fs::read_dir(folder(kind)).expect("a folder").flatten() {
            let name = entry.file_name().to_string_lossy().trim_end_matches(".rs").to_owned();
            assert!(targets.contains(&name), "{kind}/{name} belongs to no target");
        }
    }
}
