//! The log of written pages that a front end keeps while it moves its VM.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_memory::{GuestMemory, PAGE_SIZE, Tracked};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
    VolatileMemory,
};
use vmm_sys_util::eventfd::EventFd;

use super::bus_error::Watched;

/// A log that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum LogError {
    #[error("the log of written pages is not whole in its file, or its length is odd")]
    Short,
    #[error("the log of written pages cannot be mapped")]
    Map(#[source] std::io::Error),
}

/// One bit for each page from guest-physical address 0 on.
#[derive(Debug)]
pub(super) struct DirtyLog {
    // Goes before the mapping does.
    _watched: Watched,
    memory: GuestMemoryMmap<()>,
    words: u64,
}

const WORD: u64 = size_of::<u64>() as u64;
/// Pages that a word stands for.
const PAGES: u64 = u64::BITS as u64;

impl DirtyLog {
    pub(super) fn map(file: File, offset: u64, len: u64, alarm: &Arc<EventFd>) -> Result<Self, LogError> {
        let whole = rustix::fs::fstat(&file).map_err(|e| LogError::Map(e.into()))?.st_size;
        let whole = u64::try_from(whole).unwrap_or(0);
        let fits = offset.checked_add(len).is_some_and(|end| end <= whole);
        let bytes = usize::try_from(len).ok().filter(|_| fits && len != 0 && len.is_multiple_of(WORD));
        let bytes = bytes.ok_or(LogError::Short)?;
        let ranges = [(GuestAddress(0), bytes, Some(FileOffset::new(file, offset)))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges);
        let memory: GuestMemoryMmap<()> = memory.map_err(|e| LogError::Map(std::io::Error::other(e)))?;
        let host =
            memory.iter().next().and_then(|region| region.get_host_address(MemoryRegionAddress(0)).ok());
        let watched = host.and_then(|at| Watched::new(at as usize, bytes, alarm)).ok_or(LogError::Short)?;
        Ok(Self { _watched: watched, memory, words: len / WORD })
    }

    /// Sets the bits of `word`, the pages from number `64 * index` on. Pages behind the log's end are nobody's.
    fn set(&self, index: u64, word: u64) {
        if word == 0 || index >= self.words {
            return;
        }
        let Some(region) = self.memory.iter().next() else { return };
        let Ok(slice) = region.get_slice(MemoryRegionAddress(index * WORD), WORD as usize) else { return };
        // The front end takes bits away at the same time.
        if let Ok(place) = slice.get_atomic_ref::<AtomicU64>(0) {
            place.fetch_or(word.to_le(), Ordering::SeqCst);
        }
    }

    /// Notes all pages that were written since the last time.
    pub(super) fn take(&self, ram: &GuestMemory) {
        for region in ram.iter() {
            let first = region.start_addr().0 / PAGE_SIZE;
            let (index, shift) = (first / PAGES, first % PAGES);
            for (n, word) in (0..).zip(region.bitmap_tracker().take_dirty()) {
                self.set(index + n, word << shift);
                if shift != 0 {
                    self.set(index + n + 1, word >> (PAGES - shift));
                }
            }
        }
    }
}
