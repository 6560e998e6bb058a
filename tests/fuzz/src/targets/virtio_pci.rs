//! Block device, entropy source and balloon, mostly behind PCI with MSI-X: requests that are nearly right.

use std::sync::{Mutex, OnceLock};

use crate::driver::{Board, Driver};
use crate::program::{self, Alone};
use crate::targets::virtqueue::devices;

static DRIVERS: OnceLock<Mutex<Vec<Driver>>> = OnceLock::new();

fn build() -> Mutex<Vec<Driver>> {
    let mut board = Board::default();
    let mut drivers: Vec<_> = devices(&board.context).into_iter().map(|d| board.plug_pci(d)).collect();
    drivers.extend(devices(&board.context).into_iter().map(|d| board.plug_mmio(d)));
    Mutex::new(drivers)
}

/// Runs one input: which device, features, then a program.
pub fn run(data: &[u8]) {
    let [which, features, data @ ..] = data else { return };
    let mut drivers = DRIVERS.get_or_init(build).lock().expect("no run has failed");
    let n = usize::from(*which) % drivers.len();
    let features = if features & 1 == 0 { u64::MAX - u64::from(features >> 1 & 1) } else { u64::from(*features) << 24 };
    program::run(&mut drivers[n], &Alone, features, data);
}
