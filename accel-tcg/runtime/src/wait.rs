//! Waiting for another vCPU that may need the host's CPU to get on.
//!
//! A wait that only spins keeps it from that CPU for a time slice. One that yields does worse on a busy host: Linux takes a whole
//! slice from who calls `sched_yield`, so that two vCPUs which wait for each other get hardly any time at all. So a wait
//! spins for as long as others usually take, and then sleeps for moments, which costs no share of the CPU.

use std::time::Duration;

/// How long a wait spins, in nanoseconds.
const PATIENCE: u64 = 20_000;
/// Spin hints of one wait follow each other within this, in nanoseconds.
const GAP: u64 = 5_000;
/// How long a wait sleeps before it looks again.
pub(crate) const DOZE: Duration = Duration::from_micros(20);
/// Looks of a wait of the runtime's own between sleeps.
const LOOKS: u32 = 1_000;

/// The wait that a guest's spin hints make.
#[derive(Debug, Default)]
pub(crate) struct Spin {
    since: u64,
    last: u64,
}

impl Spin {
    /// The guest gave a hint at `now`, in nanoseconds; true if its vCPU had better sleep for [`DOZE`].
    pub fn hint(&mut self, now: u64) -> bool {
        if now.saturating_sub(self.last) > GAP {
            self.since = now;
        }
        self.last = now;
        now.saturating_sub(self.since) > PATIENCE
    }

    /// The vCPU slept until `now` and spins again.
    pub fn slept(&mut self, now: u64) {
        *self = Self { since: now, last: now };
    }
}

/// Waits until `done`, which takes another thread moments.
pub(crate) fn until(done: impl Fn() -> bool) {
    loop {
        for _ in 0..LOOKS {
            if done() {
                return;
            }
            std::hint::spin_loop();
        }
        // Who unparks this thread for something else only makes it look earlier.
        std::thread::park_timeout(DOZE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_long_wait_sleeps() {
        let mut spin = Spin::default();
        let long = (0..).map(|n| 1_000_000 + n * 100).take_while(|at| !spin.hint(*at)).count() as u64;
        assert_eq!(long, PATIENCE / 100 + 1);
        spin.slept(2_000_000);
        assert!(!spin.hint(2_000_100), "it spins again first");
        // Short waits, with work in between.
        for wait in 0..1000 {
            let start = 3_000_000 + wait * (PATIENCE / 2 + 2 * GAP);
            for at in (start..start + PATIENCE / 2).step_by(100) {
                assert!(!spin.hint(at));
            }
        }
    }

    #[test]
    fn any_request_ends_a_doze() {
        let env = crate::env::EnvBox::new(8).expect("memory");
        let shared = crate::shared::VcpuShared::new(0, env);
        let sleeper = std::sync::Arc::clone(&shared);
        // It would outlast every test run.
        let thread = std::thread::spawn(move || sleeper.doze(Duration::from_secs(100_000)));
        shared.request(crate::shared::request::WORK);
        thread.join().expect("it ends");
    }
}
