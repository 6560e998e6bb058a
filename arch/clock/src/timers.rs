//! Alarms on guest-virtual time.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::{OwnAlarms, VmClock};
use holdfast_threads::{Role, Spawner};

/// Called on the timer thread, or on that of a vCPU, when an alarm is due. It must be short and must not block.
pub(crate) type Callback = Arc<dyn Fn() + Send + Sync>;

/// What an alarm does, and when it last did.
struct Alarm {
    callback: Callback,
    /// The deadline that fired last; 0 for none.
    fired: u64,
}

/// Alarms in a row that are no further apart than this, in nanoseconds, are taken for a beat.
const BEAT: u64 = 20_000_000;

/// How much later than asked for an alarm may fire for the thread's sake, in nanoseconds; the host's own slack is 50 microseconds.
/// A guest arms its next tick relative to a clock that it read shortly before, so beats are not exact.
const SLACK: u64 = 20_000;

#[derive(Default)]
struct Queue {
    /// Armed alarms by (deadline, id).
    due: BTreeSet<(u64, u64)>,
    /// When alarms that just fired are likely to be due again, by (deadline, id): a guest's tick is armed anew each time, one
    /// beat on. The thread sleeps no longer than that, so that arming them need not wake it.
    expected: BTreeSet<(u64, u64)>,
    /// Until when the thread sleeps at most; 0 while it is awake and will look before it sleeps.
    asleep_until: u64,
    alarms: HashMap<u64, Alarm>,
    next_id: u64,
    stop: bool,
}

impl Queue {
    /// Takes what is due at `now`, if anything is: what is to be called.
    fn take_due(&mut self, now: u64) -> Option<Callback> {
        let (at, id) = self.due.first().copied().filter(|(at, _)| *at <= now)?;
        self.due.remove(&(at, id));
        let alarm = self.alarms.get_mut(&id)?;
        let beat = at.saturating_sub(std::mem::replace(&mut alarm.fired, at));
        if (1..=BEAT).contains(&beat) {
            self.expected.insert((at.saturating_add(beat + SLACK / 2), id));
        }
        Some(Arc::clone(&alarm.callback))
    }

    /// When there will be something to do; none is known if `None`. What was expected before `now` did not come.
    fn next(&mut self, now: u64) -> Option<u64> {
        while self.expected.first().is_some_and(|(at, _)| *at <= now) {
            self.expected.pop_first();
        }
        let due = self.due.first().map(|(at, _)| *at);
        let expected = self.expected.first().map(|(at, _)| *at);
        due.into_iter().chain(expected).min()
    }
}

/// The VM's alarms, fired by one thread. Nothing fires while the clock stands.
pub struct Timers {
    clock: Arc<VmClock>,
    queue: Mutex<Queue>,
    wake: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for Timers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timers").field("armed", &self.queue.lock().due.len()).finish_non_exhaustive()
    }
}

impl Timers {
    /// Starts the timer thread (`timers`) for `clock`.
    ///
    /// # Errors
    /// The host's error if the thread cannot be started.
    pub fn start(clock: Arc<VmClock>, spawner: &dyn Spawner) -> io::Result<Arc<Self>> {
        // Threads of vCPUs, which keep alarms of their own, may not.
        crate::bell::install();
        let timers =
            Arc::new(Self { clock, queue: Mutex::default(), wake: Condvar::new(), thread: Mutex::new(None) });
        let weak = Arc::downgrade(&timers);
        let handle = spawner.spawn("timers", Role::Timer, Box::new(move || fire_loop(&weak)))?;
        *timers.thread.lock() = Some(handle);
        Ok(timers)
    }

    /// The clock these alarms follow.
    pub fn clock(&self) -> &Arc<VmClock> {
        &self.clock
    }

    /// A new, unarmed alarm that calls `callback` on the timer thread.
    pub fn timer(self: &Arc<Self>, callback: impl Fn() + Send + Sync + 'static) -> Timer {
        self.make(Arc::new(callback), None)
    }

    /// The same for a vCPU: if it is armed on a thread that keeps its own alarms ([`OwnAlarms::keep_while`]), that thread
    /// calls `callback`.
    pub fn vcpu_timer(self: &Arc<Self>, callback: impl Fn() + Send + Sync + 'static) -> Timer {
        let callback: Callback = Arc::new(callback);
        self.make(Arc::clone(&callback), Some(callback))
    }

    fn make(self: &Arc<Self>, callback: Callback, own: Option<Callback>) -> Timer {
        let mut q = self.queue.lock();
        let id = q.next_id;
        q.next_id += 1;
        q.alarms.insert(id, Alarm { callback, fired: 0 });
        Timer { id, own, setting: Mutex::default(), timers: Arc::clone(self) }
    }

    /// To be called after the clock was resumed or set, so that the thread looks again.
    pub fn clock_changed(&self) {
        let _q = self.queue.lock();
        self.wake.notify_all();
    }

    /// Ends the timer thread. Alarms armed later never fire.
    pub fn stop(&self) {
        self.queue.lock().stop = true;
        self.wake.notify_all();
        let handle = self.thread.lock().take();
        if let Some(h) = handle
            && h.thread().id() != std::thread::current().id()
        {
            // A timer thread that panicked has already said so.
            let _ = h.join();
        }
    }
}

/// Longest sleep of the thread while nothing is due: it then checks that its owner still lives.
const IDLE: Duration = Duration::from_millis(500);

fn fire_loop(weak: &Weak<Timers>) {
    while let Some(timers) = weak.upgrade() {
        let mut q = timers.queue.lock();
        if q.stop {
            return;
        }
        if !timers.clock.is_running() {
            timers.wake.wait_for(&mut q, IDLE);
            continue;
        }
        let now = timers.clock.now();
        if let Some(callback) = q.take_due(now) {
            drop(q);
            callback();
            continue;
        }
        let at = q.next(now).unwrap_or(u64::MAX);
        q.asleep_until = at;
        timers.wake.wait_for(&mut q, Duration::from_nanos(at.saturating_sub(now)).min(IDLE));
        q.asleep_until = 0;
    }
}

/// What an alarm is set to.
#[derive(Default)]
struct Setting {
    /// The last deadline, whether or not it has fired since.
    deadline: Option<u64>,
    /// Whose it is, if not the timer thread's.
    kept: Option<Arc<OwnAlarms>>,
}

/// One alarm. Dropping it disarms it.
pub struct Timer {
    id: u64,
    /// What a thread that keeps its own alarms calls.
    own: Option<Callback>,
    setting: Mutex<Setting>,
    timers: Arc<Timers>,
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer").field("deadline", &self.setting.lock().deadline).finish_non_exhaustive()
    }
}

impl Timer {
    /// Fires once at `deadline` (virtual nanoseconds), in place of any earlier setting. A deadline
    /// in the past fires at once.
    pub fn arm(&self, deadline: u64) {
        let mut setting = self.setting.lock();
        self.forget(&mut setting);
        setting.deadline = Some(deadline);
        if let Some(callback) = &self.own
            && let Some(own) = OwnAlarms::kept(&self.timers.clock)
        {
            own.arm(deadline, self.id, callback);
            setting.kept = Some(own);
            return;
        }
        let mut q = self.timers.queue.lock();
        q.due.insert((deadline, self.id));
        if deadline.saturating_add(SLACK) < q.asleep_until {
            // Until it has looked it is as good as awake.
            q.asleep_until = 0;
            self.timers.wake.notify_all();
        }
    }

    /// Forgets the setting. A callback that is running already is not waited for.
    pub fn disarm(&self) {
        self.forget(&mut self.setting.lock());
    }

    fn forget(&self, setting: &mut Setting) {
        let kept = setting.kept.take();
        let Some(old) = setting.deadline.take() else { return };
        match kept {
            Some(own) => own.disarm(old, self.id),
            None => drop(self.timers.queue.lock().due.remove(&(old, self.id))),
        }
    }

    /// The last deadline armed, whether or not it has fired since.
    pub fn deadline(&self) -> Option<u64> {
        self.setting.lock().deadline
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.disarm();
        self.timers.queue.lock().alarms.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    use holdfast_threads::PlainSpawner;

    #[test]
    fn a_beat_is_awaited_and_what_is_no_beat_is_not() {
        let mut q = Queue::default();
        let alarms = [(0, 4_000_000), (1, BEAT + 1)];
        for (id, beat) in alarms {
            q.alarms.insert(id, Alarm { callback: Arc::new(|| ()), fired: 0 });
            for n in 6..8 {
                q.due.insert((beat * n, id));
                assert!(q.take_due(beat * n - 1).is_none());
                assert!(q.take_due(beat * n).is_some());
            }
        }
        // The first alarm's next beat, once; then nothing: the second one's are too far apart to wake up for.
        let (id, beat) = alarms[0];
        let expected = beat * 8 + SLACK / 2;
        assert_eq!(q.expected.iter().copied().collect::<Vec<_>>(), [(expected, id)]);
        assert_eq!(q.next(beat * 7), Some(expected));
        q.due.insert((beat * 8 - 1, 1));
        assert_eq!(q.next(beat * 7), Some(beat * 8 - 1));
        q.due.clear();
        assert_eq!(q.next(expected), None);
    }

    #[test]
    fn an_alarm_armed_for_earlier_than_the_beat_fires_in_time() {
        let clock = VmClock::stopped_at(0);
        let timers = Timers::start(Arc::clone(&clock), &PlainSpawner).expect("thread");
        let (tx, rx) = mpsc::channel();
        let fired_at = Arc::clone(&clock);
        let alarm = timers.timer(move || tx.send(fired_at.now()).expect("receiver"));
        clock.resume();
        timers.clock_changed();
        // A beat of 15 ms, then half of one.
        let mut at = clock.now();
        for step in [15_000_000, 15_000_000, 15_000_000, 7_000_000, 15_000_000] {
            at += step;
            alarm.arm(at);
            assert!(rx.recv_timeout(Duration::from_secs(20)).expect("fires") >= at);
        }
        timers.stop();
    }

    #[test]
    fn fires_in_order_and_only_while_running() {
        let clock = VmClock::stopped_at(0);
        let timers = Timers::start(Arc::clone(&clock), &PlainSpawner).expect("thread");
        let (tx, rx) = mpsc::channel();
        let tx2 = tx.clone();
        let late = timers.timer(move || tx.send(2).expect("receiver"));
        let early = timers.timer(move || tx2.send(1).expect("receiver"));
        late.arm(2_000_000);
        early.arm(1_000_000);
        assert!(rx.recv_timeout(Duration::from_millis(50)).is_err());
        clock.resume();
        timers.clock_changed();
        assert_eq!(rx.recv(), Ok(1));
        assert_eq!(rx.recv(), Ok(2));
        late.arm(u64::MAX - 1);
        late.disarm();
        timers.stop();
    }
}
