//! Alarms on guest-virtual time.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::VmClock;
use holdfast_threads::{Role, Spawner};

/// Called on the timer thread when an alarm is due. It must be short and must not block.
type Callback = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct Queue {
    /// Armed alarms by (deadline, id).
    due: BTreeSet<(u64, u64)>,
    callbacks: std::collections::HashMap<u64, Callback>,
    next_id: u64,
    stop: bool,
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
        let mut q = self.queue.lock();
        let id = q.next_id;
        q.next_id += 1;
        q.callbacks.insert(id, Arc::new(callback));
        Timer { id, deadline: Mutex::new(None), timers: Arc::clone(self) }
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
        let now = timers.clock.now();
        let running = timers.clock.is_running();
        match q.due.first().copied() {
            Some((at, id)) if running && at <= now => {
                q.due.remove(&(at, id));
                let callback = q.callbacks.get(&id).cloned();
                drop(q);
                if let Some(callback) = callback {
                    callback();
                }
            }
            Some((at, _)) if running => {
                timers.wake.wait_for(&mut q, Duration::from_nanos(at - now).min(IDLE));
            }
            _ => {
                timers.wake.wait_for(&mut q, IDLE);
            }
        }
    }
}

/// One alarm. Dropping it disarms it.
pub struct Timer {
    id: u64,
    deadline: Mutex<Option<u64>>,
    timers: Arc<Timers>,
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer").field("deadline", &*self.deadline.lock()).finish_non_exhaustive()
    }
}

impl Timer {
    /// Fires once at `deadline` (virtual nanoseconds), in place of any earlier setting. A deadline
    /// in the past fires at once.
    pub fn arm(&self, deadline: u64) {
        let mut mine = self.deadline.lock();
        let mut q = self.timers.queue.lock();
        if let Some(old) = mine.replace(deadline) {
            q.due.remove(&(old, self.id));
        }
        q.due.insert((deadline, self.id));
        if q.due.first() == Some(&(deadline, self.id)) {
            self.timers.wake.notify_all();
        }
    }

    /// Forgets the setting. A callback that is running already is not waited for.
    pub fn disarm(&self) {
        let mut mine = self.deadline.lock();
        if let Some(old) = mine.take() {
            self.timers.queue.lock().due.remove(&(old, self.id));
        }
    }

    /// The last deadline armed, whether or not it has fired since.
    pub fn deadline(&self) -> Option<u64> {
        *self.deadline.lock()
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.disarm();
        self.timers.queue.lock().callbacks.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    use holdfast_threads::PlainSpawner;

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
