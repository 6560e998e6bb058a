//! Alarms that a thread fires itself: those of a vCPU, while that runs.
//!
//! They spare a host that is busy the wake-up of another thread, which takes ten times what the alarm does, and takes it from a vCPU.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::VmClock;
use crate::bell::{Bell, Ringing, Rung};
use crate::timers::Callback;

thread_local! {
    static KEPT: RefCell<Option<Arc<OwnAlarms>>> = const { RefCell::new(None) };
}

/// When the bell of a thread rings; virtual nanoseconds, `u64::MAX` if it does not.
const NEVER: u64 = u64::MAX;

#[derive(Default)]
struct Own {
    /// Armed alarms by (deadline, id).
    due: BTreeMap<(u64, u64), Callback>,
    bell: Option<Bell>,
    rings: u64,
}

/// The alarms that one thread armed and fires.
pub struct OwnAlarms {
    clock: Arc<VmClock>,
    own: Mutex<Own>,
}

impl fmt::Debug for OwnAlarms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnAlarms").field("armed", &self.own.lock().due.len()).finish_non_exhaustive()
    }
}

/// The calling thread keeps its alarms while this lives.
#[must_use]
struct Keeping<'a> {
    alarms: &'a OwnAlarms,
    _ringing: Ringing<'a>,
}

impl Drop for Keeping<'_> {
    fn drop(&mut self) {
        KEPT.take();
        let mut own = self.alarms.own.lock();
        own.rings = NEVER;
        if let Some(bell) = &own.bell {
            bell.set(None);
        }
    }
}

impl OwnAlarms {
    /// No alarms yet; their deadlines are on `clock`.
    pub fn new(clock: &Arc<VmClock>) -> Arc<Self> {
        let own = Own { rings: NEVER, ..Own::default() };
        Arc::new(Self { clock: Arc::clone(clock), own: Mutex::new(own) })
    }

    /// Does `work`. Alarms of vCPUs that the calling thread arms meanwhile are kept here, and `target` is rung when one is due:
    /// then the thread is to call [`OwnAlarms::fire_due`]. Where the host has no timer for it alarms are fired by the timer thread.
    pub fn keep_while<T>(self: &Arc<Self>, target: &dyn Rung, work: impl FnOnce() -> T) -> T {
        let _keeping = self.keep(target);
        work()
    }

    fn keep<'a>(self: &'a Arc<Self>, target: &'a dyn Rung) -> Option<Keeping<'a>> {
        let mut own = self.own.lock();
        if !own.bell.as_ref().is_some_and(Bell::is_mine) {
            own.bell = match Bell::new() {
                Ok(bell) => Some(bell),
                Err(error) => {
                    tracing::debug!(%error, "alarms of a vCPU are fired by the timer thread");
                    return None;
                }
            };
        }
        let keeping = Keeping { alarms: self, _ringing: Ringing::start(target) };
        KEPT.set(Some(Arc::clone(self)));
        self.set_bell(&mut own);
        drop(own);
        Some(keeping)
    }

    /// The calling thread's, if it keeps alarms on `clock`.
    pub(crate) fn kept(clock: &Arc<VmClock>) -> Option<Arc<Self>> {
        KEPT.with_borrow(|kept| kept.as_ref().filter(|own| Arc::ptr_eq(&own.clock, clock)).cloned())
    }

    /// Fires what is due, unless the clock stands.
    pub fn fire_due(&self) {
        self.own.lock().rings = NEVER;
        if self.clock.is_running() {
            let now = self.clock.now();
            while let Some(callback) = self.take_due(now) {
                callback();
            }
        }
        self.set_bell(&mut self.own.lock());
    }

    fn take_due(&self, now: u64) -> Option<Callback> {
        let mut own = self.own.lock();
        let first = own.due.first_entry().filter(|e| e.key().0 <= now)?;
        Some(first.remove())
    }

    /// Called on the thread that keeps these.
    pub(crate) fn arm(&self, deadline: u64, id: u64, callback: &Callback) {
        let mut own = self.own.lock();
        own.due.insert((deadline, id), Arc::clone(callback));
        self.set_bell(&mut own);
    }

    /// Called on any thread. The bell may ring for nothing then.
    pub(crate) fn disarm(&self, deadline: u64, id: u64) {
        self.own.lock().due.remove(&(deadline, id));
    }

    /// Makes the bell ring when the first alarm is due, or earlier: one that rings for nothing costs less than setting it each time.
    fn set_bell(&self, own: &mut Own) {
        let Some((&(at, _), bell)) = own.due.first_key_value().map(|(k, _)| k).zip(own.bell.as_ref()) else {
            return;
        };
        if at < own.rings {
            bell.set(Some(at.saturating_sub(self.clock.now())));
            own.rings = at;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Timers;
    use holdfast_threads::PlainSpawner;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Default)]
    struct Count(AtomicU32);

    impl Rung for Count {
        fn ring(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Waits for the next ring as a busy thread does.
    fn rings(count: &Count) {
        while count.0.swap(0, Ordering::SeqCst) == 0 {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn alarms_of_a_thread_are_fired_by_it() {
        let clock = VmClock::stopped_at(0);
        let timers = Timers::start(Arc::clone(&clock), &PlainSpawner).expect("thread");
        let own = OwnAlarms::new(&clock);
        let fired = Arc::new(Mutex::new(Vec::new()));
        let alarm = |n: u32| {
            let (fired, me) = (Arc::clone(&fired), std::thread::current().id());
            timers.vcpu_timer(move || fired.lock().push((n, std::thread::current().id() == me)))
        };
        let (first, second, never) = (alarm(1), alarm(2), alarm(3));
        clock.resume();
        let count = Count::default();
        let keeping = own.keep(&count).expect("a timer");
        // Armed in the wrong order: the bell is set anew for the earlier one.
        second.arm(clock.now() + 40_000_000);
        first.arm(clock.now() + 10_000_000);
        never.arm(clock.now() + 20_000_000);
        never.disarm();
        while fired.lock().len() < 2 {
            rings(&count);
            own.fire_due();
        }
        assert_eq!(*fired.lock(), [(1, true), (2, true)]);
        // What is due already rings at once.
        first.arm(0);
        rings(&count);
        own.fire_due();
        assert_eq!(fired.lock().len(), 3);
        drop(keeping);
        // Without it the timer thread fires.
        second.arm(0);
        while fired.lock().len() < 4 {
            std::thread::yield_now();
        }
        assert_eq!(fired.lock()[2..], [(1, true), (2, false)]);
        timers.stop();
    }

    /// An alarm on a clock that stands, and how often it fired.
    fn rig() -> (Arc<VmClock>, Arc<Timers>, Arc<OwnAlarms>, Arc<Count>, crate::Timer) {
        let clock = VmClock::stopped_at(0);
        let timers = Timers::start(Arc::clone(&clock), &PlainSpawner).expect("thread");
        let (own, fired) = (OwnAlarms::new(&clock), Arc::new(Count::default()));
        let counter = Arc::clone(&fired);
        let alarm = timers.vcpu_timer(move || counter.ring());
        (clock, timers, own, fired, alarm)
    }

    #[test]
    fn nothing_fires_while_the_clock_stands_or_somebody_disarmed_it() {
        let (clock, timers, own, fired, alarm) = rig();
        let count = Count::default();
        let keeping = own.keep(&count).expect("a timer");
        alarm.arm(0);
        own.fire_due();
        assert_eq!(fired.0.load(Ordering::SeqCst), 0, "the clock stands");
        drop(keeping);
        clock.resume();
        // It stays with the thread that armed it, and is due as soon as that goes on.
        let keeping = own.keep(&count).expect("a timer");
        rings(&count);
        own.fire_due();
        assert_eq!(fired.0.load(Ordering::SeqCst), 1);
        alarm.arm(clock.now() + 1_000_000);
        std::thread::scope(|scope| drop(scope.spawn(|| alarm.disarm()).join()));
        rings(&count);
        own.fire_due();
        assert_eq!(fired.0.load(Ordering::SeqCst), 1, "it rang for nothing");
        // Armed by somebody else it is the timer thread's.
        std::thread::scope(|scope| drop(scope.spawn(|| alarm.arm(0)).join()));
        while fired.0.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        assert_eq!(own.own.lock().due.len(), 0);
        drop(keeping);
        timers.stop();
    }

    #[test]
    fn another_thread_gets_a_bell_of_its_own() {
        let (clock, timers, own, fired, alarm) = rig();
        clock.resume();
        let count = Count::default();
        let keeping = own.keep(&count).expect("a timer");
        alarm.arm(clock.now() + 30_000_000);
        drop(keeping);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _keeping = own.keep(&count).expect("a timer");
                rings(&count);
                own.fire_due();
            });
        });
        assert_eq!(fired.0.load(Ordering::SeqCst), 1);
        timers.stop();
    }
}
