//! A link between two hosts that is slow and loses packets, for kernels without netem: a TAP device on each, and a thread that moves
//! frames between the two.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The longest frame that fits.
const FRAME: usize = 65_536;
/// Frames that wait at most; what comes meanwhile is lost, as in a switch.
const WAITING: usize = 4096;

/// Makes the TAP device `name` in the network namespace of this thread.
///
/// # Panics
/// If the host refuses.
pub fn tap(name: &str) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open("/dev/net/tun").expect("TUN");
    // SAFETY: all zeroes is a value of this plain struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the request is the struct that this ioctl takes.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(rc, 0, "{name}: {}", std::io::Error::last_os_error());
    file
}

/// What is on its way: when it arrives, at which end, the frame.
type Flight = VecDeque<(Instant, usize, Vec<u8>)>;

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub struct Relay {
    over: Arc<AtomicBool>,
    lost: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Moves frames between `ends`: each takes `delay`, and one of `loss` is lost.
    pub fn start(ends: [File; 2], delay: Duration, loss: u64) -> Self {
        let (over, lost) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ended, dropped) = (Arc::clone(&over), Arc::clone(&lost));
        let body = move || {
            let (mut flight, mut frame, mut random) = (Flight::new(), vec![0; FRAME], 1_u64);
            while !ended.load(Ordering::Acquire) {
                wait(&ends, &flight);
                for (n, end) in ends.iter().enumerate() {
                    let mut end = end;
                    // An interface that is down gives errors: nothing comes from there.
                    while let Ok(len) = end.read(&mut frame) {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        if (random >> 33).is_multiple_of(loss) || flight.len() >= WAITING {
                            dropped.fetch_add(1, Ordering::Relaxed);
                            continue;
                        }
                        flight.push_back((Instant::now() + delay, 1 - n, frame[..len].to_vec()));
                    }
                }
                while flight.front().is_some_and(|(due, ..)| *due <= Instant::now()) {
                    if let Some((_, to, frame)) = flight.pop_front() {
                        // What an end does not take is lost.
                        let _ = (&ends[to]).write(&frame);
                    }
                }
            }
        };
        Self { over, lost, thread: Some(std::thread::spawn(body)) }
    }

    /// How many frames were lost so far.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// Waits until a frame comes, or the next one is due.
fn wait(ends: &[File; 2], flight: &Flight) {
    let due = flight.front().map(|(due, ..)| due.saturating_duration_since(Instant::now()));
    let time = due.unwrap_or(Duration::from_millis(50));
    let time = libc::timespec { tv_sec: 0, tv_nsec: i64::from(time.subsec_nanos()) };
    let mut polls =
        ends.each_ref().map(|end| libc::pollfd { fd: end.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    // SAFETY: two valid pollfds and a time; no signal mask.
    unsafe { libc::ppoll(polls.as_mut_ptr(), 2, &raw const time, std::ptr::null()) };
    if polls.iter().any(|poll| poll.revents & libc::POLLERR != 0) {
        // An end that is down is always ready, with an error.
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
    }
}
