//! The part of a vCPU that other threads touch.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use holdfast_clock::Rung;
use parking_lot::Mutex;

use holdfast_tcg_ir::env::{MMU_MODES, TLB_SLOW};

use crate::env::EnvBox;
use crate::futex;
use crate::guest::Flush;
use crate::recent::Recent;
use crate::regions::Killed;
use crate::tlb::TlbCounts;

/// What one vCPU counted.
#[derive(Debug, Default)]
pub struct VcpuCounts {
    /// The TLB's part.
    pub tlb: TlbCounts,
    /// Accesses to the bus.
    pub mmio: AtomicU64,
    /// Stores to pages with code.
    pub code_stores: AtomicU64,
    /// Times translated code was entered.
    pub entries: AtomicU64,
    /// Indirect jumps that the inline cache did not know.
    pub lookups: AtomicU64,
    /// Direct jumps that were linked.
    pub links: AtomicU64,
    /// Exceptions.
    pub faults: AtomicU64,
    /// Interrupts.
    pub interrupts: AtomicU64,
    /// Times the vCPU slept.
    pub sleeps: AtomicU64,
}

/// Reasons to leave translated code, in `VcpuShared::requests`.
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
    /// An alarm that the vCPU fires itself may be due.
    pub const ALARM: u32 = 64;
}

/// Requests that a sleeping vCPU wakes up for; it looks at the others when it wakes anyway.
const AWAKENING: u32 = request::INTERRUPT | request::KICK | request::ALARM;

/// Regions that a vCPU is told of one by one before it is told to forget all it has cached.
const KILLED: usize = 1024;

/// Requests to, and pins of, one vCPU. Shared by all threads.
pub struct VcpuShared {
    index: u32,
    pins: AtomicU64,
    requests: AtomicU32,
    env: EnvBox,
    /// Held while a write entry is made or cleared.
    pub(crate) tlb_lock: Mutex<()>,
    /// MMU indexes that may have write entries, a bit each.
    tlb_used: AtomicU32,
    /// Regions to forget; `None`: too many to list.
    killed: Mutex<Option<Vec<Killed>>>,
    flushes: Mutex<Vec<Flush>>,
    pub(crate) counts: VcpuCounts,
    /// What it ran lately.
    pub(crate) recent: Recent,
    /// It sleeps, or is about to, until `requests` changes.
    asleep: AtomicBool,
    /// Asleep in the middle of translated code: any request ends that.
    dozing: AtomicBool,
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
            tlb_lock: Mutex::new(()),
            tlb_used: AtomicU32::new(0),
            killed: Mutex::new(Some(Vec::new())),
            flushes: Mutex::default(),
            counts: VcpuCounts::default(),
            recent: Recent::new(),
            asleep: AtomicBool::new(false),
            dozing: AtomicBool::new(false),
        })
    }

    /// The vCPU's number.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The vCPU's `Env`.
    #[inline]
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
        // Who is about to sleep says so and then looks: one of both sees the other.
        let wakes = what & AWAKENING != 0 || self.dozing.load(Ordering::SeqCst);
        if wakes && self.asleep.load(Ordering::SeqCst) {
            futex::wake(&self.requests);
        }
    }

    /// Makes the vCPU forget regions that are no more.
    pub(crate) fn forget(&self, killed: &[Killed]) {
        let mut mine = self.killed.lock();
        match &mut *mine {
            Some(list) if list.len() + killed.len() <= KILLED => list.extend_from_slice(killed),
            _ => *mine = None,
        }
        drop(mine);
        self.request(request::INVALIDATE);
    }

    /// Makes the vCPU forget all regions and mapping ids.
    pub(crate) fn forget_everything(&self) {
        *self.killed.lock() = None;
        self.request(request::INVALIDATE);
    }

    pub(crate) fn take_killed(&self) -> Option<Vec<Killed>> {
        self.killed.lock().replace(Vec::new())
    }

    /// Makes the vCPU flush its TLB at its next safe point.
    pub(crate) fn post_flush(&self, what: Flush) {
        self.flushes.lock().push(what);
        self.request(request::WORK);
    }

    pub(crate) fn take_flushes(&self) -> Vec<Flush> {
        std::mem::take(&mut *self.flushes.lock())
    }

    pub(crate) fn set_tlb_used(&self, used: u8) {
        self.tlb_used.store(u32::from(used), Ordering::Relaxed);
    }

    /// Clears the write entries that lead to the host page at `host`. True if there were any: then a store may be under
    /// way that passed its probe before.
    pub(crate) fn clear_write_entries(&self, host: u64) -> bool {
        let mut cleared = false;
        let _clearing = self.tlb_lock.lock();
        let used = self.tlb_used.load(Ordering::Relaxed);
        for idx in (0..MMU_MODES as u8).filter(|i| used >> i & 1 != 0) {
            // All of them are looked at for each page that code is found in, so what nearly none passes comes first.
            for [tag, addend] in self.env.write_entries(idx) {
                let t = tag.load(Ordering::Relaxed);
                let leads_there = (t & !0xfff).wrapping_add(addend.load(Ordering::Relaxed)) == host;
                if leads_there && t != 0 && t & TLB_SLOW == 0 {
                    tag.store(0, Ordering::SeqCst);
                    cleared = true;
                }
            }
        }
        cleared
    }

    /// Takes all requests.
    pub fn take_requests(&self) -> u32 {
        self.env.exit_request().store(0, Ordering::SeqCst);
        self.requests.swap(0, Ordering::SeqCst)
    }

    /// Takes one request, if it was made.
    pub(crate) fn take_request(&self, what: u32) -> bool {
        self.requests.load(Ordering::Relaxed) & what != 0
            && self.requests.fetch_and(!what, Ordering::SeqCst) & what != 0
    }

    /// True while there are requests.
    pub fn requested(&self) -> bool {
        self.requests.load(Ordering::SeqCst) != 0
    }

    /// Sleeps for `limit`, or until there is a request of any kind.
    pub(crate) fn doze(&self, limit: Duration) {
        self.dozing.store(true, Ordering::SeqCst);
        self.asleep.store(true, Ordering::SeqCst);
        // A signal may end it early.
        futex::wait(&self.requests, 0, Some(limit));
        self.asleep.store(false, Ordering::SeqCst);
        self.dozing.store(false, Ordering::SeqCst);
    }

    /// Sleeps until there is a request that it wakes up for.
    pub fn sleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        loop {
            let requests = self.requests.load(Ordering::SeqCst);
            if requests & AWAKENING != 0 {
                break;
            }
            // An alarm's signal ends it too.
            futex::wait(&self.requests, requests, None);
        }
        self.asleep.store(false, Ordering::SeqCst);
    }
}

impl Rung for VcpuShared {
    fn ring(&self) {
        // The vCPU's own thread: it does not sleep while this runs, and looks before it goes on to.
        self.requests.fetch_or(request::ALARM, Ordering::SeqCst);
        self.env.exit_request().store(1, Ordering::SeqCst);
    }
}
