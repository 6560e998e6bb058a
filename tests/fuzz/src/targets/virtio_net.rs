//! The network device: both directions and the control queue, with frames from the host between.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, OnceLock};

use holdfast_net::{HEADER_LEN, MAX_FRAME, Offloads, PacketBackend, PacketQueue};
use holdfast_virtio::net::{Net, config::NetConfig};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::driver::{Board, Driver};
use crate::program::{self, Peer};

/// Most frames that wait: an interface drops what nobody takes.
const BACKLOG: usize = 32;

#[derive(Debug)]
struct Queue {
    ready: EventFd,
    frames: Mutex<VecDeque<Vec<u8>>>,
}

impl PacketQueue for Queue {
    fn fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }

    fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        let frame = self.frames.lock().expect("no run has failed").pop_front();
        let frame = frame.ok_or(io::ErrorKind::WouldBlock)?;
        let n = frame.len().min(buf.len());
        buf[..n].copy_from_slice(&frame[..n]);
        Ok(n)
    }

    unsafe fn send(&self, parts: &[libc::iovec]) -> io::Result<usize> {
        let (mut len, mut sum) = (0, 0u8);
        for part in parts {
            // SAFETY: the caller vouches for the parts.
            let bytes = unsafe { std::slice::from_raw_parts(part.iov_base.cast::<u8>(), part.iov_len) };
            // All bytes are looked at: a part that is no RAM ends here.
            sum = bytes.iter().fold(sum, |sum, byte| sum.wrapping_add(*byte));
            len += bytes.len();
        }
        assert!((HEADER_LEN..=MAX_FRAME).contains(&len), "a frame of {len} bytes");
        match sum & 7 {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            1 => Err(io::ErrorKind::InvalidInput.into()),
            _ => Ok(len),
        }
    }
}

#[derive(Debug)]
struct Interface(Vec<Arc<Queue>>);

impl Interface {
    fn new(queues: usize) -> Arc<Self> {
        let queue = || Queue { ready: EventFd::new(EFD_NONBLOCK).expect("eventfd"), frames: Mutex::default() };
        Arc::new(Self((0..queues).map(|_| Arc::new(queue())).collect()))
    }
}

impl PacketBackend for Interface {
    fn name(&self) -> &str {
        "fuzz"
    }
    fn queues(&self) -> Vec<Arc<dyn PacketQueue>> {
        self.0.iter().map(|q| Arc::clone(q) as Arc<dyn PacketQueue>).collect()
    }
    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }
    fn enable_queues(&self, count: usize) -> io::Result<()> {
        assert!((1..=self.0.len()).contains(&count), "{count} queues");
        Ok(())
    }
    fn mtu(&self) -> Option<u16> {
        Some(1400)
    }
}

impl Peer for Interface {
    fn arrive(&self, bytes: &[u8]) {
        let Some((&which, bytes)) = bytes.split_first() else { return };
        let queue = &self.0[usize::from(which) % self.0.len()];
        let mut frame = vec![0; HEADER_LEN];
        frame.extend(bytes);
        // Some are large.
        if which & 0x40 != 0 {
            frame.resize((usize::from(which) << 9).min(MAX_FRAME), which);
        }
        let mut frames = queue.frames.lock().expect("no run has failed");
        if frames.len() < BACKLOG {
            frames.push_back(frame);
        }
        drop(frames);
        queue.ready.write(1).expect("signalled");
    }
}

type Rig = Vec<(Driver, Arc<Interface>)>;

static RIG: OnceLock<Mutex<Rig>> = OnceLock::new();

fn build() -> Mutex<Rig> {
    let mut board = Board::default();
    let mut all = Rig::new();
    for (n, pairs) in [(0, 1), (1, 2), (2, 1), (3, 2)] {
        let interface = Interface::new(usize::from(pairs));
        let mac = Some("12:34:56:78:9a:bc".parse().expect("a MAC"));
        let config = NetConfig { num_queues: 2 * pairs, mac, ..NetConfig::default() };
        let backend = Arc::clone(&interface) as Arc<dyn PacketBackend>;
        let net = Net::new(&format!("_net{n}"), &config, backend, &board.context).expect("a network device");
        let driver = if n < 2 { board.plug_pci(net) } else { board.plug_mmio(net) };
        all.push((driver, interface));
    }
    Mutex::new(all)
}

/// Runs one input: which device, features, then a program.
pub fn run(data: &[u8]) {
    let [which, features, data @ ..] = data else { return };
    let mut rig = RIG.get_or_init(build).lock().expect("no run has failed");
    let n = usize::from(*which) % rig.len();
    let (driver, interface) = &mut rig[n];
    let features = if features & 1 == 0 { u64::MAX } else { u64::from(*features) << 15 };
    program::run(driver, &**interface, features, data);
    interface.0.iter().for_each(|queue| queue.frames.lock().expect("no run has failed").clear());
}
