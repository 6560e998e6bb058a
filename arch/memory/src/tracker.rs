//! What is known about each page of a RAM region.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use crate::PAGE_SIZE;

/// Is told when bytes that were translated change.
pub trait CodeObserver: Send + Sync {
    /// `len` bytes at guest-physical `gpa` were written by something other than a vCPU's own store.
    fn code_written(&self, gpa: u64, len: u64);
}

/// Dirty and code bits of one RAM region, a bit a page. Clones share the bits.
#[derive(Clone, Default)]
pub struct RamTracker(Arc<Inner>);

#[derive(Default)]
struct Inner {
    pages: u64,
    logging: AtomicBool,
    dirty: Box<[AtomicU64]>,
    code: Box<[AtomicU64]>,
    observer: OnceLock<(u64, Arc<dyn CodeObserver>)>,
}

impl fmt::Debug for RamTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamTracker").field("pages", &self.0.pages).field("logging", &self.logging()).finish()
    }
}

fn bits(pages: u64) -> Box<[AtomicU64]> {
    (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

impl RamTracker {
    /// Number of pages tracked.
    pub fn pages(&self) -> u64 {
        self.0.pages
    }

    /// True while writes are being logged.
    #[inline]
    pub fn logging(&self) -> bool {
        self.0.logging.load(Ordering::Relaxed)
    }

    /// Starts logging with a clean slate.
    pub fn start_log(&self) {
        for word in &self.0.dirty {
            word.store(0, Ordering::Relaxed);
        }
        self.0.logging.store(true, Ordering::SeqCst);
    }

    /// Stops logging.
    pub fn stop_log(&self) {
        self.0.logging.store(false, Ordering::SeqCst);
    }

    /// Takes the dirty bits (bit n of word m: page `64 * m + n`) and clears them.
    pub fn take_dirty(&self) -> Vec<u64> {
        self.0.dirty.iter().map(|w| w.swap(0, Ordering::AcqRel)).collect()
    }

    /// Marks one page dirty, whether or not logging is on.
    #[inline]
    pub fn set_dirty(&self, page: u64) {
        if let Some(word) = self.0.dirty.get((page / 64) as usize) {
            word.fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }

    /// True if the page was written since the bits were last taken.
    #[inline]
    pub fn is_dirty(&self, page: u64) -> bool {
        self.0
            .dirty
            .get((page / 64) as usize)
            .is_some_and(|w| w.load(Ordering::Acquire) >> (page % 64) & 1 != 0)
    }

    /// Says that bytes of `page` have been translated: writes to it will be reported. To be called
    /// before the bytes are read.
    pub fn set_code(&self, page: u64) {
        if let Some(word) = self.0.code.get((page / 64) as usize) {
            word.fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }

    /// Says that nothing of `page` is translated any more.
    pub fn clear_code(&self, page: u64) {
        if let Some(word) = self.0.code.get((page / 64) as usize) {
            word.fetch_and(!(1 << (page % 64)), Ordering::SeqCst);
        }
    }

    /// True if bytes of `page` have been translated.
    #[inline]
    pub fn is_code(&self, page: u64) -> bool {
        self.0
            .code
            .get((page / 64) as usize)
            .is_some_and(|w| w.load(Ordering::SeqCst) >> (page % 64) & 1 != 0)
    }

    /// Reports those of `count` pages from page `first` on of which bytes have been translated: what they hold is gone.
    pub fn forget_code(&self, first: u64, count: u64) {
        for page in (first..first.saturating_add(count).min(self.0.pages)).filter(|page| self.is_code(*page))
        {
            if let Some((base, observer)) = self.0.observer.get() {
                observer.code_written(base + page * PAGE_SIZE, PAGE_SIZE);
            }
        }
    }

    /// Registers the one observer; `base` is the region's guest-physical start. A second call is
    /// ignored.
    pub fn observe_code(&self, base: u64, observer: Arc<dyn CodeObserver>) {
        let _ = self.0.observer.set((base, observer));
    }
}

impl<'a> WithBitmapSlice<'a> for RamTracker {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for RamTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let first = offset as u64 / PAGE_SIZE;
        let last = (offset as u64).saturating_add(len as u64 - 1) / PAGE_SIZE;
        let last = last.min(self.0.pages.saturating_sub(1));
        let logging = self.logging();
        let mut code = false;
        for page in first..=last {
            if logging {
                self.set_dirty(page);
            }
            code |= self.is_code(page);
        }
        if code && let Some((base, observer)) = self.0.observer.get() {
            observer.code_written(base + offset as u64, len as u64);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_dirty(offset as u64 / PAGE_SIZE)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for RamTracker {
    fn with_len(len: usize) -> Self {
        let pages = (len as u64).div_ceil(PAGE_SIZE);
        Self(Arc::new(Inner { pages, dirty: bits(pages), code: bits(pages), ..Inner::default() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use vm_memory::{Bytes, GuestAddress};

    #[derive(Default)]
    struct Seen(Mutex<Vec<(u64, u64)>>);
    impl CodeObserver for Seen {
        fn code_written(&self, gpa: u64, len: u64) {
            self.0.lock().push((gpa, len));
        }
    }

    #[test]
    fn a_write_through_vm_memory_marks_dirty_and_reports_code() {
        let mem = crate::GuestMemory::from_ranges(&[(GuestAddress(0x8000_0000), 0x4000)]).expect("RAM");
        let seen = Arc::new(Seen::default());
        crate::observe_code(&mem, &(Arc::clone(&seen) as Arc<dyn CodeObserver>));
        let (tracker, offset) = crate::tracker_at(&mem, 0x8000_1000).expect("in RAM");
        assert_eq!(offset, 0x1000);
        mem.write_obj(1u32, GuestAddress(0x8000_1000)).expect("write");
        assert!(!tracker.is_dirty(1), "nothing is logged before it is asked for");
        tracker.start_log();
        tracker.set_code(2);
        mem.write_slice(&[1; 8], GuestAddress(0x8000_1ffc)).expect("write");
        assert_eq!(tracker.take_dirty(), [0b110]);
        assert_eq!(tracker.take_dirty(), [0]);
        assert_eq!(*seen.0.lock(), [(0x8000_1ffc, 8)]);
        seen.0.lock().clear();
        tracker.forget_code(0, 2);
        tracker.forget_code(1, u64::MAX);
        assert_eq!(*seen.0.lock(), [(0x8000_2000, 0x1000)]);
    }
}
