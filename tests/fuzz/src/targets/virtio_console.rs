//! The console: ports, control messages and input from the host.

use std::sync::{Arc, Mutex, OnceLock};

use holdfast_devices::chardev::{CharBackend, CharReceiver};
use holdfast_virtio::console::{Console, PortArgs};

use crate::driver::{Board, Driver};
use crate::program::{self, Peer};

#[derive(Debug, Default)]
struct Line(Mutex<Option<Arc<dyn CharReceiver>>>);

impl CharBackend for Line {
    fn send(&self, data: &[u8]) {
        assert!(data.len() <= 1 << 20);
    }
    fn connect(&self, receiver: Arc<dyn CharReceiver>) {
        *self.0.lock().expect("no run has failed") = Some(receiver);
    }
    fn receiver_ready(&self) {}
    fn label(&self) -> String {
        "fuzz".into()
    }
}

#[derive(Debug)]
struct Outside {
    lines: Vec<Arc<Line>>,
    console: Arc<Console>,
}

impl Peer for Outside {
    fn arrive(&self, bytes: &[u8]) {
        let Some((&which, bytes)) = bytes.split_first() else { return };
        if which & 0x80 != 0 {
            self.console.resize(which.into(), bytes.len() as u16);
        }
        let line = &self.lines[usize::from(which) % self.lines.len()];
        let receiver = line.0.lock().expect("no run has failed").clone();
        if let Some(receiver) = receiver {
            let n = receiver.capacity().min(bytes.len());
            receiver.receive(&bytes[..n]);
        }
    }
}

static RIG: OnceLock<Mutex<Vec<(Driver, Outside)>>> = OnceLock::new();

fn build() -> Mutex<Vec<(Driver, Outside)>> {
    let mut board = Board::default();
    let mut all = Vec::new();
    for (n, ports) in [(0, 1), (1, 3), (2, 1), (3, 3)] {
        let lines: Vec<_> = (0..ports).map(|_| Arc::new(Line::default())).collect();
        let args = lines.iter().enumerate().map(|(n, line)| PortArgs {
            name: (n > 0).then(|| format!("port{n}")),
            is_console: n == 0,
            backend: Arc::clone(line) as Arc<dyn CharBackend>,
        });
        let console = Console::new(&format!("_console{n}"), args.collect(), &board.context).expect("a console");
        let device = Arc::clone(&console) as Arc<dyn holdfast_virtio::VirtioDevice>;
        let driver = if n < 2 { board.plug_pci(device) } else { board.plug_mmio(device) };
        all.push((driver, Outside { lines, console }));
    }
    Mutex::new(all)
}

/// Runs one input: which device, features, then a program.
pub fn run(data: &[u8]) {
    let [which, features, data @ ..] = data else { return };
    let mut rig = RIG.get_or_init(build).lock().expect("no run has failed");
    let n = usize::from(*which) % rig.len();
    let (driver, outside) = &mut rig[n];
    // Mostly with all features: several ports need one.
    let features = if features & 3 != 1 { u64::MAX } else { u64::from(*features) << 24 };
    program::run(driver, outside, features, data);
}
