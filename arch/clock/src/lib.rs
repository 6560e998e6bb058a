//! Time and chance come from here.
//!
//! Devices and vCPUs read time from a [`VmClock`] and set alarms on its [`Timers`]; they never ask
//! `std::time`. So pausing, snapshot and replay hold for every device without its help.

mod bell;
mod own;
mod random;
mod timers;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use bell::Rung;
pub use own::OwnAlarms;
pub use random::{HostRandom, RandomError, RandomSource};
pub use timers::{Timer, Timers};

/// Marks a running clock in [`VmClock::frozen`].
const RUNNING: u64 = u64::MAX;

/// Guest-virtual time: nanoseconds that the guest has been running, since it first started.
///
/// It stands still while the VM is paused and carries on from the saved value after a restore.
#[derive(Debug)]
pub struct VmClock {
    /// Added (wrapping) to the host's monotonic clock to give virtual time while running.
    offset: AtomicU64,
    /// The virtual time at which the clock stands, or [`RUNNING`].
    frozen: AtomicU64,
}

impl VmClock {
    /// A clock that stands at `now` nanoseconds.
    pub fn stopped_at(now: u64) -> Arc<Self> {
        Arc::new(Self { offset: AtomicU64::new(0), frozen: AtomicU64::new(now) })
    }

    /// Guest-virtual nanoseconds.
    pub fn now(&self) -> u64 {
        match self.frozen.load(Ordering::Acquire) {
            RUNNING => host_monotonic().wrapping_add(self.offset.load(Ordering::Relaxed)),
            at => at,
        }
    }

    /// True while virtual time passes.
    pub fn is_running(&self) -> bool {
        self.frozen.load(Ordering::Acquire) == RUNNING
    }

    /// Lets time pass from where it stands. Nothing happens if it already does.
    pub fn resume(&self) {
        let at = self.frozen.load(Ordering::Acquire);
        if at != RUNNING {
            self.offset.store(at.wrapping_sub(host_monotonic()), Ordering::Relaxed);
            self.frozen.store(RUNNING, Ordering::Release);
        }
    }

    /// Stops time. Nothing happens if it stands already.
    pub fn pause(&self) {
        let now = self.now();
        self.frozen.store(now, Ordering::Release);
    }

    /// Sets a stopped clock, for restore.
    pub fn set(&self, now: u64) {
        self.frozen.store(now, Ordering::Release);
    }
}

/// The host's monotonic clock in nanoseconds. Only for measuring how long the host took.
pub fn host_monotonic() -> u64 {
    clock_gettime(libc::CLOCK_MONOTONIC)
}

/// The CPU time that the calling thread has used, in nanoseconds. Only for measuring.
pub fn thread_cpu_time() -> u64 {
    clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Wall-clock time of the host: nanoseconds since 1970-01-01 UTC.
pub fn host_realtime() -> u64 {
    clock_gettime(libc::CLOCK_REALTIME)
}

fn clock_gettime(id: libc::clockid_t) -> u64 {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `ts` is a valid timespec for the call to fill in; both clock ids always exist on Linux.
    unsafe { libc::clock_gettime(id, &mut ts) };
    (ts.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(ts.tv_nsec as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_stands_while_paused_and_goes_on_from_there() {
        let clock = VmClock::stopped_at(5_000);
        assert_eq!(clock.now(), 5_000);
        clock.resume();
        let a = clock.now();
        assert!(a >= 5_000);
        clock.pause();
        let b = clock.now();
        assert!(b >= a);
        assert_eq!(clock.now(), b);
        clock.resume();
        assert!(clock.now() >= b);
    }
}
