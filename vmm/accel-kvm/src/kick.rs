//! Getting a vCPU out of `KVM_RUN` from another thread.
//!
//! `immediate_exit` is set first and the signal sent second: a vCPU thread that has not entered yet finds
//! the byte, one that has is interrupted, and one in between has the signal pending. So the handler has
//! nothing to do and is trivially async-signal-safe.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use holdfast_accel::Kicker;
use parking_lot::Mutex;
use vmm_sys_util::signal;

use crate::sys::{self, ImmediateExit};

/// The signal that interrupts `KVM_RUN`. Every thread may have it pending; its handler does nothing.
pub fn kick_signal() -> i32 {
    signal::SIGRTMIN() + 1
}

extern "C" fn nothing(_signal: i32, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {}

/// Installs the empty handler once per process.
pub fn install_handler() -> io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    DONE.get_or_init(|| signal::register_signal_handler(kick_signal(), nothing).map_err(|e| e.errno()))
        .map_err(io::Error::from_raw_os_error)
}

#[derive(Debug)]
struct Target {
    exit: ImmediateExit,
    tid: Option<i32>,
}

/// What other threads know of a vCPU.
#[derive(Debug, Default)]
pub struct VcpuHandle {
    target: Mutex<Option<Target>>,
    kicked: AtomicBool,
    nmi: AtomicBool,
    lint1: AtomicBool,
}

impl VcpuHandle {
    /// A handle for the vCPU whose `immediate_exit` byte is `exit`.
    pub fn new(exit: ImmediateExit) -> Self {
        Self { target: Mutex::new(Some(Target { exit, tid: None })), ..Self::default() }
    }

    /// The calling thread is the one that runs the vCPU.
    pub fn adopt_thread(&self) -> io::Result<()> {
        let tid = sys::gettid();
        if let Some(target) = self.target.lock().as_mut()
            && target.tid != Some(tid)
        {
            match signal::unblock_signal(kick_signal()) {
                Ok(()) => target.tid = Some(tid),
                Err(e) => return Err(io::Error::other(e.to_string())),
            }
        }
        Ok(())
    }

    /// The vCPU is about to be destroyed: nobody may touch its mapping any more.
    pub fn retire(&self) {
        *self.target.lock() = None;
    }

    /// Makes the vCPU leave `KVM_RUN` and look at its requests.
    pub fn wake(&self) {
        if let Some(target) = self.target.lock().as_ref() {
            target.exit.store(1);
            if let Some(tid) = target.tid
                && tid != sys::gettid()
            {
                sys::tgkill(tid, kick_signal());
            }
        }
    }

    /// Calls `body` with `immediate_exit` clear and nobody able to set it. `body` must not wake this vCPU.
    pub fn undisturbed<T>(&self, body: impl FnOnce() -> T) -> T {
        let target = self.target.lock();
        if let Some(target) = target.as_ref() {
            target.exit.store(0);
        }
        let result = body();
        if let Some(target) = target.as_ref()
            && self.is_kicked()
        {
            target.exit.store(1);
        }
        result
    }

    /// Sets `immediate_exit` for the vCPU's own thread.
    pub fn set_immediate_exit(&self, value: u8) {
        if let Some(target) = self.target.lock().as_ref() {
            target.exit.store(value);
        }
    }

    /// True if a kick waits to be reported.
    pub fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    /// Takes the kick.
    pub fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Asks for an NMI by the LINT1 pin.
    pub fn set_lint1(&self, level: bool) {
        if level && !self.lint1.swap(level, Ordering::SeqCst) {
            self.nmi.store(true, Ordering::SeqCst);
            self.wake();
        } else if !level {
            self.lint1.store(false, Ordering::SeqCst);
        }
    }

    /// Takes the request for an NMI.
    pub fn take_nmi(&self) -> bool {
        self.nmi.swap(false, Ordering::SeqCst)
    }
}

impl Kicker for VcpuHandle {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.wake();
    }
}
