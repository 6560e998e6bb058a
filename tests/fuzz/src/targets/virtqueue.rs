//! Drivers that break the rules: rings, descriptors and registers of virtio devices behind virtio-mmio.

use std::sync::{Arc, Mutex, OnceLock};

use holdfast_device::BuildContext;
use holdfast_virtio::VirtioDevice;
use holdfast_virtio::balloon::{self, config::BalloonConfig};
use holdfast_virtio::blk::{self, config::DiskConfig};
use holdfast_virtio::rng::{self, config::RngConfig};
use vmm_sys_util::tempfile::TempFile;

use crate::access::{Step, steps};
use crate::driver::{Board, Driver, RAM, RAM_SIZE, SIZE};

static DRIVERS: OnceLock<Mutex<Vec<Driver>>> = OnceLock::new();

/// An entropy source, a balloon and a disk of 64 KiB.
pub fn devices(context: &BuildContext) -> [Arc<dyn VirtioDevice>; 3] {
    let disk = TempFile::new().expect("a file");
    std::fs::write(disk.as_path(), vec![7; 1 << 16]).expect("a disk");
    let config = DiskConfig { path: Some(disk.as_path().to_owned()), ..DiskConfig::default() };
    let balloon = BalloonConfig {
        size: 1 << 19,
        free_page_reporting: true,
        deflate_on_oom: true,
        ..Default::default()
    };
    [
        rng::build("_rng", &RngConfig::default(), context).expect("an rng"),
        balloon::build("_balloon", &balloon, context).expect("a balloon"),
        blk::build("_disk", &config, context).expect("a disk"),
    ]
}

fn build() -> Mutex<Vec<Driver>> {
    let mut board = Board::default();
    Mutex::new(devices(&board.context).into_iter().map(|device| board.plug_mmio(device)).collect())
}

fn step(driver: &Driver, step: Step) {
    let queue = step.window as u64 % driver.queues;
    let ring = driver.ring(queue);
    // The chance of an address in RAM by luck is small.
    let address = RAM + (step.offset << 4) % RAM_SIZE;
    let desc = ring + 16 * (u64::from(step.value[7]) % u64::from(SIZE));
    match step.what {
        0..=5 => {
            let len = u32::from(u16::from_le_bytes([step.value[0], step.value[1]]));
            let next = u16::from(step.value[3] % 18);
            driver.descriptor(desc, (address, len), u16::from(step.value[2] & 7), next);
        }
        6 => driver.poke(desc + (step.offset & 8), &step.value),
        7 | 8 => driver.poke(address, &step.value),
        9..=12 => {
            driver.publish(queue, u16::from(step.value[0] % 17));
            driver.kick(queue);
        }
        13 => driver.poke(ring + 0x400 + step.offset % 0x40, &step.value[..step.size]),
        14 => driver.write(step.offset % 0x200, &step.value[..step.size]),
        _ => driver.read(step.offset % 0x200, &mut [0; 8][..step.size]),
    }
}

/// Runs one input: which device, features, then steps.
pub fn run(data: &[u8]) {
    let [which, features, data @ ..] = data else { return };
    let mut drivers = DRIVERS.get_or_init(build).lock().expect("no run has failed");
    let n = usize::from(*which) % drivers.len();
    let driver = &mut drivers[n];
    // All features that are offered, or fewer: event indexes and indirect descriptors change most.
    driver.start(if features & 1 == 0 { u64::MAX } else { u64::from(*features) << 24 });
    for one in steps(data).take(64) {
        step(driver, one);
    }
    driver.check();
}
