//! Drivers that break the rules: rings, descriptors and registers of virtio devices behind virtio-mmio.
#![no_main]

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use holdfast_device::{BuildContext, Device, IrqLine};
use holdfast_fuzz::{Step, context, steps};
use holdfast_virtio::balloon::{self, config::BalloonConfig};
use holdfast_virtio::blk::{self, config::DiskConfig};
use holdfast_virtio::rng::{self, config::RngConfig};
use holdfast_virtio::transport::mmio::WINDOW;
use holdfast_virtio::{Slot, VirtioDevice, plug};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 0x8000_0000;
const RAM_SIZE: u64 = 1 << 20;
const BASE: u64 = 0x1000_0000;
/// Bytes between the rings of two queues: descriptors, avail ring at 0x400, used ring at 0x800.
const STRIDE: u64 = 0x1000;
/// Descriptors of a queue.
const SIZE: u32 = 16;

struct Rig {
    context: BuildContext,
    devices: Vec<(Arc<dyn Device>, u64)>,
}

static RIG: OnceLock<Rig> = OnceLock::new();

fn build() -> Rig {
    let context = context(&[(RAM, RAM_SIZE)]);
    let path = std::env::temp_dir().join(format!("fuzz-disk-{}", std::process::id()));
    std::fs::write(&path, vec![7; 1 << 16]).expect("a disk");
    let disk = DiskConfig { path: Some(path.clone()), ..DiskConfig::default() };
    let balloon = BalloonConfig {
        size: 1 << 19,
        free_page_reporting: true,
        deflate_on_oom: true,
        ..Default::default()
    };
    let devices: [Arc<dyn VirtioDevice>; 3] = [
        rng::build("_rng", &RngConfig::default(), &context).expect("an rng"),
        balloon::build("_balloon", &balloon, &context).expect("a balloon"),
        blk::build("_disk", &disk, &context).expect("a disk"),
    ];
    std::fs::remove_file(path).expect("removed");
    let devices = devices.into_iter().enumerate().map(|(n, device)| {
        let queues = device.queue_sizes().len() as u64;
        let slot = Slot::Mmio { base: BASE + WINDOW * n as u64, irq: IrqLine::unconnected() };
        (plug(&format!("_dev{n}"), device, slot, &context).expect("plugged"), queues)
    });
    Rig { devices: devices.collect(), context }
}

impl Rig {
    fn set(&self, base: u64, register: u64, value: u32) {
        self.context.mmio.write(Some(0), base + register, &value.to_le_bytes());
    }

    fn get(&self, base: u64, register: u64) -> u32 {
        let mut data = [0; 4];
        self.context.mmio.read(Some(0), base + register, &mut data);
        u32::from_le_bytes(data)
    }

    fn start(&self, base: u64, queues: u64, features: u32) {
        self.context.memory.write_slice(&[0; 0x8000], GuestAddress(RAM)).expect("RAM");
        [0, 1, 3].into_iter().for_each(|status| self.set(base, 0x70, status));
        for (half, wanted) in [(0, features), (1, 1)] {
            self.set(base, 0x14, half);
            let offered = self.get(base, 0x10);
            self.set(base, 0x24, half);
            self.set(base, 0x20, wanted & offered);
        }
        self.set(base, 0x70, 11);
        for queue in 0..queues {
            self.set(base, 0x30, queue as u32);
            self.set(base, 0x38, SIZE);
            for (register, at) in [(0x80, 0), (0x90, 0x400), (0xa0, 0x800)] {
                self.set(base, register, (RAM + STRIDE * queue + at) as u32);
            }
            self.set(base, 0x44, 1);
        }
        self.set(base, 0x70, 15);
    }

    /// Notifies, and lets the device's thread come to it.
    fn kick(&self, base: u64, queue: u64) {
        self.set(base, 0x50, queue as u32);
        let ring =
            |at| self.context.memory.read_obj::<u16>(GuestAddress(RAM + STRIDE * queue + at)).unwrap_or(0);
        let start = Instant::now();
        while ring(0x402) != ring(0x802) && start.elapsed() < Duration::from_micros(200) {
            std::thread::yield_now();
        }
    }

    fn step(&self, base: u64, queues: u64, step: Step) {
        let queue = step.window as u64 % queues;
        let ring = RAM + STRIDE * queue;
        // The chance of an address in RAM by luck is small.
        let address = RAM + (step.offset << 4) % RAM_SIZE;
        let poke = |at: u64, bytes: &[u8]| {
            // What lies outside RAM cannot be written by a driver either.
            let _ = self.context.memory.write_slice(bytes, GuestAddress(at));
        };
        let desc = ring + 16 * (u64::from(step.value[7]) % u64::from(SIZE));
        match step.what {
            0..=5 => {
                poke(desc, &address.to_le_bytes());
                poke(desc + 8, &u32::from(u16::from_le_bytes([step.value[0], step.value[1]])).to_le_bytes());
                poke(desc + 12, &[step.value[2] & 7, 0, step.value[3] % 18, 0]);
            }
            6 => poke(desc + (step.offset & 8), &step.value),
            7 | 8 => poke(address, &step.value),
            9..=12 => {
                let at = ring + 0x400;
                let index: u16 = self.context.memory.read_obj(GuestAddress(at + 2)).expect("RAM");
                poke(at + 4 + 2 * u64::from(index % SIZE as u16), &[step.value[0] % 17, 0]);
                poke(at + 2, &index.wrapping_add(1).to_le_bytes());
                self.kick(base, queue);
            }
            13 => poke(ring + 0x400 + step.offset % 0x40, &step.value[..step.size]),
            14 => _ = self.context.mmio.write(Some(0), base + step.offset % 0x200, &step.value[..step.size]),
            _ => _ = self.context.mmio.read(Some(0), base + step.offset % 0x200, &mut [0; 8][..step.size]),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let [which, features, data @ ..] = data else { return };
    let rig = RIG.get_or_init(build);
    let n = usize::from(*which) % rig.devices.len();
    let (device, queues) = &rig.devices[n];
    let base = BASE + WINDOW * n as u64;
    // All features that are offered, or fewer: event indexes and indirect descriptors change most.
    rig.start(base, *queues, if features & 1 == 0 { u32::MAX } else { u32::from(*features) << 24 });
    for step in steps(data).take(64) {
        rig.step(base, *queues, step);
    }
    device.pause();
    let state = device.save().expect("every state can be saved");
    device.restore(&state).expect("a device takes its own state");
    device.resume();
    rig.set(base, 0x70, 0);
    assert_eq!(rig.get(base, 0x70), 0, "it can be reset");
});
