//! Memory whose file another process may shorten: RAM of a front end, what a back end shows to the guest.
//!
//! What lies behind a file's new end cannot be touched any more: the kernel sends `SIGBUS`. The handler puts memory
//! without contents in the place of the whole region, so that whoever was about to use it goes on, and rings the
//! connection's alarm, at which the connection ends.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicUsize, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Regions of one connection's tables, the old and the new one at once, with room for more; or all that a few devices
/// have in their shared memory.
const SLOTS: usize = 16 * super::memory::MAX_REGIONS;

const FREE: u8 = 0;
const TAKEN: u8 = 1;
const WATCHED: u8 = 2;

/// A region as the handler sees it.
struct Slot {
    state: AtomicU8,
    start: AtomicUsize,
    len: AtomicUsize,
    alarm: AtomicI32,
}

static SLOT_TABLE: [Slot; SLOTS] = [const {
    Slot {
        state: AtomicU8::new(FREE),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        alarm: AtomicI32::new(-1),
    }
}; SLOTS];

impl Slot {
    /// Replaces the region if `address` is in it. Only what a signal handler may do.
    fn replace(&self, address: usize) -> bool {
        if self.state.load(Ordering::Acquire) != WATCHED {
            return false;
        }
        let (start, len) = (self.start.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed));
        if address.checked_sub(start).is_none_or(|offset| offset >= len) {
            return false;
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the range is one mapping that the guest sees, which stays there for as long as it is in the table, and is only
        // used through volatile accesses and system calls.
        let mapped = unsafe { libc::mmap(start as *mut _, len, access, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return false;
        }
        let one = 1u64.to_ne_bytes();
        // SAFETY: the bytes outlive the call; a full counter rings as well.
        unsafe { libc::write(self.alarm.load(Ordering::Relaxed), one.as_ptr().cast(), one.len()) };
        true
    }
}

extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the place of this thread's `errno`.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: it is a valid place of this thread's alone.
    let before = unsafe { *errno };
    // SAFETY: the kernel gives a handler with SA_SIGINFO what describes the signal.
    let address = unsafe { (*info).si_addr() } as usize;
    if !SLOT_TABLE.iter().any(|slot| slot.replace(address)) {
        // Some other memory: there is no going on.
        // SAFETY: ends the process.
        unsafe { libc::abort() };
    }
    // SAFETY: as above.
    unsafe { *errno = before };
}

/// Catches bus errors from now on.
///
/// # Errors
/// The host's.
pub(crate) fn catch() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        // SAFETY: plain data of which zero is a valid value.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: the handler does only what handlers may do; the old one is not asked for.
        if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } != 0 {
            result = Err(io::Error::last_os_error());
        }
    });
    result
}

/// A region that is watched until this is dropped. It has to be dropped before the mapping is.
#[derive(Debug)]
pub(crate) struct Watched {
    slot: usize,
    /// Open for as long as the handler may ring it.
    _alarm: Arc<EventFd>,
}

impl Watched {
    /// Watches `len` bytes at `start`. `None`: too many regions are watched.
    pub(crate) fn new(start: usize, len: usize, alarm: &Arc<EventFd>) -> Option<Self> {
        let free = |slot: &Slot| {
            slot.state.compare_exchange(FREE, TAKEN, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let (number, slot) = SLOT_TABLE.iter().enumerate().find(|(_, slot)| free(slot))?;
        slot.start.store(start, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        slot.alarm.store(alarm.as_raw_fd(), Ordering::Relaxed);
        slot.state.store(WATCHED, Ordering::Release);
        Some(Self { slot: number, _alarm: Arc::clone(alarm) })
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(slot) = SLOT_TABLE.get(self.slot) {
            slot.state.store(FREE, Ordering::Release);
        }
    }
}
