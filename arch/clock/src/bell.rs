//! A timer of the host that interrupts the thread that set it.

use std::cell::Cell;
use std::io;
use std::sync::Once;

/// What a timer of the host tells the thread that set it.
pub trait Rung: Send + Sync {
    /// Called in a signal handler, on the thread that set the timer, wherever that is at: it may do nothing but work on atomics.
    fn ring(&self);
}

thread_local! {
    /// What bells of this thread ring. Constant at first and without a destructor, so the handler may read it.
    static TARGET: Cell<Option<&'static dyn Rung>> = const { Cell::new(None) };
}

/// The signal of all bells. The one before it kicks vCPUs out of KVM.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 2
}

extern "C" fn on_signal(_: libc::c_int) {
    if let Some(target) = TARGET.get() {
        target.ring();
    }
}

/// Installs the handler of the process, once. To be called where `rt_sigaction` is still permitted.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: all-zero is a valid sigaction; what matters is filled in.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: `action` is valid, and its handler works on atomics only. Where it cannot be installed no bell can be made either.
        unsafe { libc::sigaction(signal(), &raw const action, std::ptr::null_mut()) };
    });
}

/// A timer that rings on the thread that made it.
#[derive(Debug)]
pub(crate) struct Bell {
    /// As timer_create(2) gives it.
    timer: usize,
    /// The thread.
    thread: libc::pid_t,
}

fn this_thread() -> libc::pid_t {
    // SAFETY: takes nothing and always succeeds.
    unsafe { libc::gettid() }
}

impl Bell {
    /// For the calling thread, whose mask lets the signal through from here on. [`install`] has been called before.
    ///
    /// # Errors
    /// The host's error, for instance when there may be no more timers (`RLIMIT_SIGPENDING`).
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: all-zero is a valid sigevent; what matters is filled in.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal();
        let thread = this_thread();
        event.sigev_notify_thread_id = thread;
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both point to values of the right types; the thread is one of this process.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let this = Self { timer: timer.expose_provenance(), thread };
        // SAFETY: a zeroed set is filled in before it is used; the mask is the calling thread's.
        let failed = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal());
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut())
        };
        if failed != 0 { Err(io::Error::from_raw_os_error(failed)) } else { Ok(this) }
    }

    /// Whether it belongs to the calling thread.
    pub(crate) fn is_mine(&self) -> bool {
        self.thread == this_thread()
    }

    /// Rings once, in so many nanoseconds (0 is as 1), in place of what was set before; `None`: not at all.
    pub(crate) fn set(&self, delay: Option<u64>) {
        let time = |ns: u64| libc::timespec {
            tv_sec: (ns / 1_000_000_000).min(i64::MAX as u64) as i64,
            tv_nsec: (ns % 1_000_000_000) as i64,
        };
        let value = time(delay.map_or(0, |ns| ns.max(1)));
        let setting = libc::itimerspec { it_interval: time(0), it_value: value };
        let timer = std::ptr::with_exposed_provenance_mut(self.timer);
        // SAFETY: the timer exists until this is dropped; a valid time cannot be refused.
        unsafe { libc::timer_settime(timer, 0, &raw const setting, std::ptr::null_mut()) };
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        // SAFETY: the timer is deleted once, here.
        unsafe { libc::timer_delete(std::ptr::with_exposed_provenance_mut(self.timer)) };
    }
}

/// Bells of the calling thread ring `target` while this lives.
pub(crate) struct Ringing<'a> {
    _target: &'a dyn Rung,
}

impl<'a> Ringing<'a> {
    pub(crate) fn start(target: &'a dyn Rung) -> Self {
        // SAFETY: the reference is taken out again before `'a` ends, when this is dropped. Guards do not leave this crate, which
        // forgets none.
        let forever = unsafe { std::mem::transmute::<&'a dyn Rung, &'static dyn Rung>(target) };
        TARGET.set(Some(forever));
        Self { _target: target }
    }
}

impl Drop for Ringing<'_> {
    fn drop(&mut self) {
        TARGET.set(None);
    }
}
