//! The part of a vCPU that other threads touch.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::env::EnvBox;

/// Reasons to leave translated code, in [`VcpuShared::requests`].
pub mod request {
    /// A pin changed, a timer is due, or the guest asked: look for interrupts.
    pub const INTERRUPT: u32 = 1;
    /// `run` has to return to its caller.
    pub const KICK: u32 = 2;
    /// There is work in the mailbox (flushes that another vCPU asked for).
    pub const WORK: u32 = 4;
    /// A region was invalidated: forget cached pointers to it.
    pub const INVALIDATE: u32 = 8;
    /// RAM or ROM mappings, dirty logging or debug settings changed: start over with an empty TLB.
    pub const REMAP: u32 = 16;
    /// The guest is waiting for an interrupt; set by the vCPU itself.
    pub const HALT: u32 = 32;
}

/// Requests to, and pins of, one vCPU. Shared by all threads.
pub struct VcpuShared {
    index: u32,
    pins: AtomicU64,
    requests: AtomicU32,
    env: EnvBox,
    asleep: Mutex<bool>,
    wake: Condvar,
}

impl fmt::Debug for VcpuShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuShared")
            .field("index", &self.index)
            .field("pins", &self.pins())
            .field("requests", &self.requests.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

impl VcpuShared {
    /// For vCPU `index`, which owns `env`.
    pub fn new(index: u32, env: EnvBox) -> Arc<Self> {
        Arc::new(Self {
            index,
            pins: AtomicU64::new(0),
            requests: AtomicU32::new(0),
            env,
            asleep: Mutex::new(false),
            wake: Condvar::new(),
        })
    }

    /// The vCPU's number.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The vCPU's `Env`.
    pub fn env(&self) -> &EnvBox {
        &self.env
    }

    /// The levels of the interrupt pins, a bit each.
    #[inline]
    pub fn pins(&self) -> u64 {
        self.pins.load(Ordering::Acquire)
    }

    /// Sets pin `pin` (0 to 63; others do not exist).
    pub fn set_pin(&self, pin: u32, level: bool) {
        if pin >= 64 {
            return;
        }
        let bit = 1 << pin;
        let old = if level {
            self.pins.fetch_or(bit, Ordering::AcqRel)
        } else {
            self.pins.fetch_and(!bit, Ordering::AcqRel)
        };
        if level && old & bit == 0 {
            self.request(request::INTERRUPT);
        }
    }

    /// Adds to the requests and makes the vCPU look at them at its next safe point.
    pub fn request(&self, what: u32) {
        self.requests.fetch_or(what, Ordering::SeqCst);
        self.env.exit_request().store(1, Ordering::SeqCst);
        let asleep = self.asleep.lock();
        if *asleep {
            self.wake.notify_all();
        }
    }

    /// Takes all requests.
    pub fn take_requests(&self) -> u32 {
        self.env.exit_request().store(0, Ordering::SeqCst);
        self.requests.swap(0, Ordering::SeqCst)
    }

    /// True while there are requests.
    pub fn requested(&self) -> bool {
        self.requests.load(Ordering::SeqCst) != 0
    }

    /// Sleeps until there is a request, or for `limit` if given.
    pub fn sleep(&self, limit: Option<Duration>) {
        let mut asleep = self.asleep.lock();
        *asleep = true;
        if !self.requested() {
            match limit {
                Some(limit) => drop(self.wake.wait_for(&mut asleep, limit)),
                None => self.wake.wait(&mut asleep),
            }
        }
        *asleep = false;
    }
}
