//! Memory for translated code: mapped once writable and once executable.
//!
//! It is cut into segments. A vCPU fills one segment at a time; when none is free the oldest full one
//! is evicted. A segment is used again only when every vCPU has passed a safe point since (see
//! [`crate::epoch`]), so no vCPU runs freed code.

use std::collections::VecDeque;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_tcg_x64::LinkSite;
use parking_lot::Mutex;

/// Smallest size of a segment in bytes. One region always fits in.
const MIN_SEGMENT: usize = 128 << 10;
/// Largest size of a segment in bytes.
const MAX_SEGMENT: usize = 2 << 20;
/// Smallest cache: two segments for each vCPU and some to age.
pub const MIN_CACHE: usize = 4 * MIN_SEGMENT;
/// Largest cache: jumps within it have 32-bit displacements.
pub const MAX_CACHE: usize = 1 << 30;
/// Cache size when none is asked for.
pub const DEFAULT_CACHE: usize = 64 << 20;

/// Number of a segment.
pub type SegmentId = u32;

#[derive(Debug, Default)]
struct Segments {
    free: Vec<SegmentId>,
    /// Filled, oldest first. The segments that vCPUs are filling are in no list.
    used: VecDeque<SegmentId>,
    /// Evicted, with the epoch that every vCPU has to have passed.
    retired: Vec<(SegmentId, u64)>,
}

/// What [`CodeCache::acquire`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acquired {
    /// An empty segment.
    Segment(SegmentId),
    /// None is free: evict this one (it is no longer in use then), retire it, and come back.
    Evict(SegmentId),
    /// None is free and all are retired: wait for the other vCPUs' safe points.
    Wait,
}

/// The code cache of one VM.
#[derive(Debug)]
pub struct CodeCache {
    rw: *mut u8,
    rx: *mut u8,
    len: usize,
    segment: usize,
    state: Mutex<Segments>,
    used_bytes: AtomicU64,
    evictions: AtomicU64,
}

// SAFETY: the mappings are plain memory; segments have one writer at a time and code is published by
// atomic stores.
unsafe impl Send for CodeCache {}
// SAFETY: as above.
unsafe impl Sync for CodeCache {}

/// Maps the same `len` bytes of fresh memory twice: writable, and executable. They belong to no file that has a name, or
/// profilers would look there for symbols.
fn map_twice(len: usize) -> io::Result<(*mut u8, *mut u8)> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let rx = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, -1, 0) };
    if rx == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // An old size of 0 leaves the mapping and makes another of the same pages (mremap(2)).
    // SAFETY: the mapping is shared and whole; the new one is put where the kernel finds room.
    let rw = unsafe { libc::mremap(rx, 0, len, libc::MREMAP_MAYMOVE) };
    let done = rw != libc::MAP_FAILED && {
        // SAFETY: a mapping that was just made and that nobody uses yet.
        unsafe { libc::mprotect(rw, len, libc::PROT_READ | libc::PROT_WRITE) == 0 }
    };
    if !done {
        let error = io::Error::last_os_error();
        // SAFETY: what was mapped above.
        unsafe {
            libc::munmap(rx, len);
            if rw != libc::MAP_FAILED {
                libc::munmap(rw, len);
            }
        }
        return Err(error);
    }
    Ok((rw.cast(), rx.cast()))
}

impl CodeCache {
    /// A cache of about `bytes` (0: the default), at least two segments for each of `vcpus`.
    ///
    /// # Errors
    /// The host's error if the memory cannot be mapped.
    pub fn new(bytes: usize, vcpus: usize) -> io::Result<Self> {
        let wanted = if bytes == 0 { DEFAULT_CACHE } else { bytes };
        let needed = MIN_SEGMENT * (2 * vcpus + 2);
        let wanted = wanted.max(needed).clamp(MIN_CACHE, MAX_CACHE);
        let segment = (wanted / 32).next_power_of_two().clamp(MIN_SEGMENT, MAX_SEGMENT);
        let segment = if wanted / segment < 2 * vcpus + 2 { MIN_SEGMENT } else { segment };
        let count = wanted / segment;
        let len = count * segment;
        let (rw, rx) = map_twice(len)?;
        // Translated code is spread over the cache: huge pages spare the host's instruction TLB.
        // SAFETY: advice on our own mapping; failure does not matter.
        unsafe { libc::madvise(rx.cast(), len, libc::MADV_HUGEPAGE) };
        let state = Segments { free: (1..count as u32).rev().collect(), ..Segments::default() };
        Ok(Self {
            rw,
            rx,
            len,
            segment,
            state: Mutex::new(state),
            used_bytes: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
        })
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of one segment.
    pub fn segment_len(&self) -> usize {
        self.segment
    }

    /// Host address at which `offset` is executed.
    pub fn exec_addr(&self, offset: usize) -> *const u8 {
        debug_assert!(offset <= self.len);
        self.rx.wrapping_add(offset)
    }

    /// Offset of a host code address, if it lies in the cache.
    pub fn offset_of(&self, exec: *const u8) -> Option<usize> {
        let offset = exec.addr().wrapping_sub(self.rx.addr());
        (offset < self.len).then_some(offset)
    }

    /// Offset of the first byte of `segment`. Segment 0 holds the stubs and is never evicted.
    pub fn start_of(&self, segment: SegmentId) -> usize {
        segment as usize * self.segment
    }

    /// Patches `site` of the region whose code is at `offset` to jump to code `distance` bytes from there.
    /// One thread at a time patches a region's sites; others may execute them.
    pub fn link(&self, site: &LinkSite, offset: usize, distance: i64, mapping_id: u32) -> bool {
        // SAFETY: the site lies in a region's code, which lies in the mapping; the caller serialises.
        offset < self.len && unsafe { site.link(self.rw.add(offset), distance, mapping_id) }
    }

    /// Sends `site`'s jump through the indirect-branch cache. As for [`CodeCache::link`].
    pub fn defer(&self, site: &LinkSite, offset: usize) -> bool {
        // SAFETY: as in `link`.
        offset < self.len && unsafe { site.defer(self.rw.add(offset)) }
    }

    /// Takes a link away. As for [`CodeCache::link`].
    pub fn unlink(&self, site: &LinkSite, offset: usize) {
        if offset < self.len {
            // SAFETY: as in `link`.
            unsafe { site.unlink(self.rw.add(offset)) };
        }
    }

    /// The writable bytes of a part that the caller owns: in a segment that it acquired, executed by nobody
    /// yet.
    #[allow(clippy::mut_from_ref, reason = "segments have one owner, who writes each byte of it once")]
    pub(crate) fn writable(&self, offset: usize, len: usize) -> &mut [u8] {
        let len = len.min(self.len.saturating_sub(offset));
        // SAFETY: in bounds; disjoint parts belong to different owners.
        unsafe { std::slice::from_raw_parts_mut(self.rw.add(offset.min(self.len)), len) }
    }

    /// Has the pages of a part that is about to be written mapped at once: one by one, as they are written, each would be an
    /// exception.
    pub(crate) fn prepare(&self, offset: usize, len: usize) {
        let len = len.min(self.len.saturating_sub(offset));
        // SAFETY: advice on our own mapping, in bounds; where the kernel does not know it, pages come one by one.
        unsafe { libc::madvise(self.rw.add(offset.min(self.len)).cast(), len, libc::MADV_POPULATE_WRITE) };
    }

    /// Looks for an empty segment. `passed` is the epoch that every vCPU has passed.
    pub fn acquire(&self, passed: u64) -> Acquired {
        let mut s = self.state.lock();
        let s = &mut *s;
        s.retired.retain(|&(id, epoch)| {
            let waits = epoch >= passed;
            if !waits {
                s.free.push(id);
            }
            waits
        });
        if let Some(id) = s.free.pop() {
            return Acquired::Segment(id);
        }
        // Enough is on its way already: evicting more would only lose code.
        if s.retired.len() > s.used.len() / 4 {
            return Acquired::Wait;
        }
        match s.used.pop_front() {
            Some(id) => Acquired::Evict(id),
            None => Acquired::Wait,
        }
    }

    /// The owner has filled `segment`: from now on it may be evicted.
    pub fn filled(&self, segment: SegmentId, bytes: usize) {
        // What was written through this mapping counts as memory of the process a second time; links that are patched bring
        // pages back, so all of it goes. Where others are writing, it comes back too.
        // SAFETY: our own mapping, and a shared one: what it holds stays in the other.
        unsafe { libc::madvise(self.rw.cast(), self.len, libc::MADV_DONTNEED) };
        self.used_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.state.lock().used.push_back(segment);
    }

    /// Hands back an evicted segment; `epoch` is the one in which the last pointer to it was removed.
    pub fn retire(&self, segment: SegmentId, epoch: u64) {
        self.evictions.fetch_add(1, Ordering::Relaxed);
        self.state.lock().retired.push((segment, epoch));
    }

    /// Code bytes written so far, evictions so far.
    pub fn counters(&self) -> (u64, u64) {
        (self.used_bytes.load(Ordering::Relaxed), self.evictions.load(Ordering::Relaxed))
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        // SAFETY: both were mapped in `new` with this length and no vCPU is left to run code.
        unsafe {
            libc::munmap(self.rw.cast(), self.len);
            libc::munmap(self.rx.cast(), self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_written_through_one_mapping_shows_in_the_other() {
        let cache = CodeCache::new(MIN_CACHE, 1).expect("mapping");
        cache.writable(64, 16).fill(0xc3);
        // SAFETY: mapped and readable.
        assert_eq!(unsafe { cache.exec_addr(64).read() }, 0xc3);
        assert_eq!(cache.writable(cache.len() - 4, 5).len(), 4);
    }

    #[test]
    fn segments_come_back_only_when_their_epoch_has_passed() {
        let cache = CodeCache::new(MIN_CACHE, 1).expect("mapping");
        let mut mine = Vec::new();
        let oldest = loop {
            match cache.acquire(1) {
                Acquired::Segment(id) => {
                    cache.filled(id, 1);
                    mine.push(id);
                }
                Acquired::Evict(id) => break id,
                Acquired::Wait => unreachable!("nothing is retired"),
            }
        };
        assert_eq!(mine.first(), Some(&oldest));
        cache.retire(oldest, 5);
        assert_eq!(cache.acquire(5), Acquired::Wait);
        assert_eq!(cache.acquire(6), Acquired::Segment(oldest));
    }
}
