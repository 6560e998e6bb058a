//! What can be seen and changed of a migration while it is under way.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use holdfast_clock::host_monotonic;
use parking_lot::{Mutex, RwLock};

use crate::{Address, Listener, MigrationError, Stream};

/// How long a pass goes on when post-copy is asked for.
const GRACE: Duration = Duration::from_millis(100);

/// Where a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// Connecting, comparing.
    #[default]
    Setup,
    /// RAM is sent while the guest runs.
    Active,
    /// Waits for somebody to say that the guest may stop.
    PreSwitchover,
    /// The guest stands; the rest is sent.
    Device,
    /// The guest runs at the target, and pages follow.
    PostcopyActive,
    /// So it does, but the connection is lost.
    PostcopyPaused,
    /// Connected again, not yet going on.
    PostcopyRecover,
    /// Somebody cancelled it, and it has not ended yet.
    Cancelling,
    /// Somebody cancelled it.
    Cancelled,
    /// It failed.
    Failed,
    /// It is done.
    Completed,
}

/// What happens when time is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimeoutStrategy {
    /// The guest goes on at the source.
    #[default]
    Cancel,
    /// The guest stops for as long as the rest takes.
    Ignore,
}

/// What can be changed while a migration is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    /// Bytes a second of all connections together; 0 for as many as there can be.
    pub bandwidth: u64,
    /// How long the guest may stand.
    pub downtime: Duration,
    /// How long all may take; `None` for ever.
    pub timeout: Option<Duration>,
    /// What happens then.
    pub strategy: TimeoutStrategy,
    /// vCPUs are slowed if they write faster than RAM can be sent.
    pub auto_converge: bool,
    /// By how many percent at first.
    pub throttle_initial: u8,
    /// By how many more each time.
    pub throttle_increment: u8,
    /// By how many at most; up to 99.
    pub throttle_max: u8,
    /// zstd's level, if RAM is compressed.
    pub zstd: Option<i32>,
    /// The guest is not stopped before somebody says so.
    pub pause_before_switchover: bool,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            bandwidth: 0,
            downtime: Duration::from_millis(300),
            timeout: None,
            strategy: TimeoutStrategy::Cancel,
            auto_converge: false,
            throttle_initial: 20,
            throttle_increment: 10,
            throttle_max: 99,
            zstd: None,
            pause_before_switchover: false,
        }
    }
}

/// Figures of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Bytes of RAM in all.
    pub total: u64,
    /// Bytes that are still to be sent, as far as is known.
    pub remaining: u64,
    /// Bytes on the wire.
    pub transferred: u64,
    /// Pages sent with their contents.
    pub normal: u64,
    /// Pages sent as zeroes.
    pub zero: u64,
    /// Passes over RAM, the first included.
    pub passes: u64,
    /// Pages a second that the guest wrote in the last pass.
    pub dirty_rate: u64,
    /// Bytes a second that the last pass sent.
    pub rate: u64,
    /// Percent by which vCPUs are slowed.
    pub throttle: u64,
    /// How long the guest would stand if it were stopped now, in milliseconds.
    pub expected_downtime: u64,
    /// How long it stood, in milliseconds.
    pub downtime: u64,
    /// How long the whole has taken so far, in milliseconds.
    pub elapsed: u64,
    /// How long connecting and comparing took, in milliseconds.
    pub setup: u64,
    /// Pages that the guest waited for.
    pub requests: u64,
    /// How long it waited for them at this end, which only the destination knows.
    pub latency: Latency,
}

/// How many doublings a [`Latency`] tells apart.
pub const LATENCY_BUCKETS: usize = 24;

/// How long pages that were touched before they were there took to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Latency {
    /// Number `n` counts those that took from 2^n to 2^(n+1) microseconds; the first also what was faster, the last what was slower.
    pub buckets: [u64; LATENCY_BUCKETS],
    /// All times together, in nanoseconds.
    pub sum: u64,
    /// The longest, in nanoseconds.
    pub longest: u64,
}

impl Latency {
    /// How many there were.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The mean, in nanoseconds.
    pub fn mean(&self) -> Option<u64> {
        self.sum.checked_div(self.count())
    }

    /// A page took this long, in nanoseconds.
    pub(crate) fn add(&mut self, took: u64) {
        let bucket = (took / 1000).checked_ilog2().unwrap_or(0) as usize;
        if let Some(count) = self.buckets.get_mut(bucket.min(LATENCY_BUCKETS - 1)) {
            *count += 1;
        }
        self.sum += took;
        self.longest = self.longest.max(took);
    }
}

macro_rules! counters {
    ($($name:ident),*) => {
        /// The figures as they are counted.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)*
        }

        impl Counters {
            fn read(&self) -> Statistics {
                Statistics { $($name: self.$name.load(Ordering::Relaxed),)* ..Statistics::default() }
            }
        }
    };
}

counters!(
    total,
    remaining,
    transferred,
    normal,
    zero,
    passes,
    dirty_rate,
    rate,
    throttle,
    expected_downtime,
    downtime,
    setup,
    requests
);

/// A migration under way, or one that has ended.
#[derive(Debug)]
pub struct Control {
    parameters: RwLock<Parameters>,
    pub(crate) counters: Counters,
    phase: Mutex<Phase>,
    started: u64,
    ended: AtomicU64,
    cancelled: AtomicBool,
    /// The target may run the guest: there is no way back.
    committed: AtomicBool,
    postcopy: AtomicBool,
    hybrid: AtomicBool,
    /// When post-copy was asked for; host monotonic nanoseconds.
    asked: AtomicU64,
    go_on: AtomicBool,
    sockets: Mutex<Vec<OwnedFd>>,
    way_back: Mutex<Option<Address>>,
    listener: Mutex<Option<Listener>>,
    error: Mutex<Option<String>>,
    pub(crate) latency: Mutex<Latency>,
}

impl Control {
    /// A migration that begins now.
    pub fn new(parameters: Parameters) -> Self {
        Self {
            parameters: RwLock::new(parameters),
            counters: Counters::default(),
            phase: Mutex::default(),
            started: host_monotonic(),
            ended: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            committed: AtomicBool::new(false),
            postcopy: AtomicBool::new(false),
            hybrid: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            go_on: AtomicBool::new(false),
            sockets: Mutex::default(),
            way_back: Mutex::default(),
            listener: Mutex::default(),
            error: Mutex::default(),
            latency: Mutex::default(),
        }
    }

    /// Its parameters.
    pub fn parameters(&self) -> Parameters {
        *self.parameters.read()
    }

    /// Changes them; they hold from the next pass on, the bandwidth at once.
    pub fn set_parameters(&self, parameters: Parameters) {
        *self.parameters.write() = parameters;
    }

    /// Its figures.
    pub fn statistics(&self) -> Statistics {
        let end = match self.ended.load(Ordering::Relaxed) {
            0 => host_monotonic(),
            at => at,
        };
        let elapsed = end.saturating_sub(self.started) / 1_000_000;
        Statistics { elapsed, latency: *self.latency.lock(), ..self.counters.read() }
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        *self.phase.lock()
    }

    /// Notes where it is. True if that is news.
    pub fn enter(&self, phase: Phase) -> bool {
        let mut now = self.phase.lock();
        if matches!(phase, Phase::Completed | Phase::Failed | Phase::Cancelled) {
            self.ended.store(host_monotonic(), Ordering::Relaxed);
        }
        std::mem::replace(&mut *now, phase) != phase
    }

    /// Why it failed.
    pub fn error(&self) -> Option<String> {
        self.error.lock().clone()
    }

    /// Notes why it failed.
    pub fn set_error(&self, text: String) {
        *self.error.lock() = Some(text);
    }

    /// How long it has taken.
    pub(crate) fn elapsed(&self) -> Duration {
        Duration::from_nanos(host_monotonic().saturating_sub(self.started))
    }

    /// Cancels it: connections break, and the guest goes on at the source. False if it is too late.
    pub fn cancel(&self) -> bool {
        // Who commits takes the same lock, so the two cannot pass each other.
        let sockets = self.sockets.lock();
        if self.committed.load(Ordering::Acquire) {
            return false;
        }
        self.cancelled.store(true, Ordering::Release);
        for socket in sockets.iter() {
            // SAFETY: shutdown on a socket that `sockets` keeps open.
            unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
        }
        true
    }

    /// Breaks the connections of a migration that goes on in post-copy, as a lost network would.
    pub fn break_connections(&self) {
        for socket in self.sockets.lock().iter() {
            // SAFETY: as in `cancel`.
            unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
        }
    }

    /// Breaks one of them.
    pub(crate) fn break_connection(stream: &Stream) {
        // SAFETY: shutdown on a socket that `stream` keeps open.
        unsafe { libc::shutdown(stream.as_fd().as_raw_fd(), libc::SHUT_RDWR) };
    }

    /// As [`Control::break_connections`], but what was written to `main` still arrives.
    pub(crate) fn break_connections_after(&self, main: &Stream) {
        // SAFETY: shutdown on a socket that `main` keeps open.
        unsafe { libc::shutdown(main.as_fd().as_raw_fd(), libc::SHUT_WR) };
        self.stop_reading();
    }

    /// Nothing more is read from the connections, and threads that wait to read are unblocked; what is said still arrives.
    pub(crate) fn stop_reading(&self) {
        for socket in self.sockets.lock().iter() {
            // SAFETY: as in `cancel`.
            unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RD) };
        }
    }

    /// At the source: an interrupted migration goes on at `address`.
    pub fn go_on_at(&self, address: Address) {
        *self.way_back.lock() = Some(address);
    }

    pub(crate) fn take_way_back(&self) -> Option<Address> {
        self.way_back.lock().take()
    }

    /// At the target: an interrupted migration goes on with who comes in here.
    pub fn go_on_from(&self, listener: Listener) {
        *self.listener.lock() = Some(listener);
    }

    pub(crate) fn take_listener(&self) -> Option<Listener> {
        self.listener.lock().take()
    }

    /// Connections that broke need no breaking.
    pub(crate) fn forget_connections(&self) {
        self.sockets.lock().clear();
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// From here on it cannot be cancelled.
    pub(crate) fn commit(&self) -> Result<(), MigrationError> {
        let _sockets = self.sockets.lock();
        if self.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        self.committed.store(true, Ordering::Release);
        Ok(())
    }

    /// Asks for post-copy: the guest goes over soon, and pages follow. A pass that is under way goes on for a moment: what it still
    /// sends need not be waited for by the guest.
    pub fn start_postcopy(&self) {
        self.asked.store(host_monotonic(), Ordering::Release);
        self.postcopy.store(true, Ordering::Release);
    }

    /// The same before any RAM is sent.
    pub fn start_postcopy_at_once(&self) {
        self.postcopy.store(true, Ordering::Release);
    }

    /// Whether a pass ends for the sake of post-copy.
    pub(crate) fn postcopy_is_due(&self) -> bool {
        let moment = GRACE.as_nanos() as u64;
        self.wants_postcopy() && host_monotonic().saturating_sub(self.asked.load(Ordering::Acquire)) >= moment
    }

    /// Asks for post-copy once one pass is done, if what is left then takes longer than the guest may stand.
    pub fn start_postcopy_if_slow(&self) {
        self.hybrid.store(true, Ordering::Release);
    }

    pub(crate) fn is_hybrid(&self) -> bool {
        self.hybrid.load(Ordering::Acquire)
    }

    /// Whether somebody asked for it.
    pub fn wants_postcopy(&self) -> bool {
        self.postcopy.load(Ordering::Acquire)
    }

    /// Lets a migration that waits in [`Phase::PreSwitchover`] go on.
    pub fn switch_over(&self) {
        self.go_on.store(true, Ordering::Release);
    }

    pub(crate) fn may_switch_over(&self) -> bool {
        self.go_on.load(Ordering::Acquire)
    }

    /// Keeps a duplicate of a connection, by which it can be broken.
    pub(crate) fn watch(&self, socket: OwnedFd) -> Result<(), MigrationError> {
        let mut sockets = self.sockets.lock();
        if self.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        sockets.push(socket);
        Ok(())
    }

    /// Fails if somebody cancelled it.
    pub(crate) fn check(&self) -> Result<(), MigrationError> {
        if self.is_cancelled() { Err(MigrationError::Cancelled) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_counted_by_doublings() {
        let mut latency = Latency::default();
        assert_eq!(latency.mean(), None);
        for took in [0, 999, 1000, 1999, 2000, 1_500_000, u64::from(u32::MAX) * 1_000_000] {
            latency.add(took);
        }
        assert_eq!((latency.buckets[0], latency.buckets[1], latency.buckets[10]), (4, 1, 1));
        assert_eq!((latency.buckets[LATENCY_BUCKETS - 1], latency.count()), (1, 7));
        assert_eq!(latency.longest, u64::from(u32::MAX) * 1_000_000);
    }

    #[test]
    fn what_is_committed_cannot_be_cancelled() {
        let control = Control::new(Parameters::default());
        control.commit().expect("nobody cancelled");
        assert!(!control.cancel() && !control.is_cancelled());
        let control = Control::new(Parameters::default());
        assert!(control.cancel());
        assert!(matches!(control.commit(), Err(MigrationError::Cancelled)));
        assert!(control.enter(Phase::Cancelled) && !control.enter(Phase::Cancelled));
        let elapsed = control.statistics().elapsed;
        assert_eq!(control.statistics().elapsed, elapsed, "time stands when it has ended");
    }
}
