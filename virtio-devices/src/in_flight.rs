//! The requests of a queue that are under way, in memory that outlives the process that serves them: the split
//! queues' area of vhost-user's inflight I/O tracking (QEMU's documentation, `interop/vhost-user`).

use std::fs::File;
use std::io;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// Bytes before the descriptors' entries: features, version, number of descriptors, last head, used index.
const HEADER: u64 = 16;
const VERSION_AT: u64 = 8;
const SIZE_AT: u64 = 10;
const LAST_HEAD_AT: u64 = 12;
const USED_AT: u64 = 14;
/// Bytes of a descriptor's entry: whether it is under way, padding, the next one of its batch, a counter.
const ENTRY: u64 = 16;
const COUNTER_AT: u64 = 8;
const ALIGN: u64 = 64;
const VERSION: u16 = 1;

/// An area that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AreaError {
    /// Its file is too short, or its size makes no sense.
    #[error("the area of requests in flight is not whole in its file")]
    Short,
    /// Its file could be shortened under us.
    #[error("the file of the area of requests in flight is not sealed against shrinking (F_SEAL_SHRINK)")]
    Unsealed,
    /// The host's.
    #[error("the area of requests in flight cannot be mapped")]
    Host(#[from] io::Error),
}

/// The area of all queues of a device.
#[derive(Debug, Clone)]
pub struct InFlightArea {
    memory: GuestMemoryMmap<()>,
    queues: u16,
    size: u16,
}

impl InFlightArea {
    fn stride(size: u16) -> u64 {
        (HEADER + ENTRY * u64::from(size)).next_multiple_of(ALIGN)
    }

    /// Bytes for `queues` queues of `size` descriptors.
    pub fn len(queues: u16, size: u16) -> u64 {
        u64::from(queues) * Self::stride(size)
    }

    /// An empty area, in a file that cannot be shortened.
    ///
    /// # Errors
    /// The host's.
    pub fn create(queues: u16, size: u16) -> io::Result<File> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("vhost-user-inflight", flags)?);
        file.set_len(Self::len(queues, size))?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file)
    }

    /// Maps the area of `len` bytes at `offset` of `file`.
    ///
    /// # Errors
    /// [`AreaError`].
    pub fn map(file: File, (offset, len): (u64, u64), queues: u16, size: u16) -> Result<Self, AreaError> {
        let whole = rustix::fs::fstat(&file).map_err(io::Error::from)?.st_size;
        let whole = u64::try_from(whole).unwrap_or(0);
        if len < Self::len(queues, size) || offset.checked_add(len).is_none_or(|end| end > whole) {
            return Err(AreaError::Short);
        }
        let seals = rustix::fs::fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        if !seals.contains(SealFlags::SHRINK) {
            return Err(AreaError::Unsealed);
        }
        let bytes = usize::try_from(len).map_err(|_| AreaError::Short)?;
        let ranges = [(GuestAddress(0), bytes, Some(FileOffset::new(file, offset)))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).map_err(io::Error::other)?;
        Ok(Self { memory, queues, size })
    }

    /// The part of queue `index`, if it has one that is large enough.
    pub fn queue(&self, index: u16, size: u16) -> Option<InFlight> {
        let fits = index < self.queues && size <= self.size;
        let at = u64::from(index) * Self::stride(self.size);
        fits.then(|| InFlight { memory: self.memory.clone(), at, size, counter: 0 })
    }
}

/// The part of one queue.
#[derive(Debug)]
pub struct InFlight {
    memory: GuestMemoryMmap<()>,
    at: u64,
    size: u16,
    counter: u64,
}

impl InFlight {
    // All accesses lie in the area, whose file cannot be shortened: none fails.
    fn get16(&self, offset: u64) -> u16 {
        self.memory.load(GuestAddress(self.at + offset), Ordering::Acquire).map_or(0, u16::from_le)
    }

    fn set16(&self, offset: u64, value: u16) {
        let _ = self.memory.store(value.to_le(), GuestAddress(self.at + offset), Ordering::Release);
    }

    fn entry(&self, head: u16) -> u64 {
        HEADER + ENTRY * u64::from(head)
    }

    fn is_under_way(&self, head: u16) -> bool {
        let at = GuestAddress(self.at + self.entry(head));
        self.memory.load::<u8>(at, Ordering::Acquire).is_ok_and(|byte| byte != 0)
    }

    fn set_under_way(&self, head: u16, on: bool) {
        let at = GuestAddress(self.at + self.entry(head));
        let _ = self.memory.store(u8::from(on), at, Ordering::Release);
    }

    /// What a predecessor left, in the order in which it was begun; `used` is where the used ring stands.
    pub(crate) fn left(&mut self, used: u16) -> Vec<u16> {
        if self.get16(VERSION_AT) != VERSION {
            self.set16(SIZE_AT, self.size);
            self.set16(USED_AT, used);
            self.set16(VERSION_AT, VERSION);
            return Vec::new();
        }
        if self.get16(USED_AT) != used {
            // It died between giving a request back and noting that.
            let last = self.get16(LAST_HEAD_AT);
            if last < self.size {
                self.set_under_way(last, false);
            }
            self.set16(USED_AT, used);
        }
        let mut left: Vec<(u64, u16)> = Vec::new();
        for head in 0..self.size {
            if !self.is_under_way(head) {
                continue;
            }
            let at = GuestAddress(self.at + self.entry(head) + COUNTER_AT);
            let counter = self.memory.load::<u64>(at, Ordering::Relaxed).map_or(0, u64::from_le);
            self.counter = self.counter.max(counter.wrapping_add(1));
            left.push((counter, head));
        }
        left.sort_unstable();
        left.into_iter().map(|(_, head)| head).collect()
    }

    /// A request is taken.
    pub(crate) fn begin(&mut self, head: u16) {
        let at = GuestAddress(self.at + self.entry(head) + COUNTER_AT);
        let _ = self.memory.store(self.counter.to_le(), at, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.set_under_way(head, true);
    }

    /// A request that was taken goes back unseen.
    pub(crate) fn undo(&self, head: u16) {
        self.set_under_way(head, false);
    }

    /// A request is about to be given back.
    pub(crate) fn finishing(&self, head: u16) {
        self.set16(LAST_HEAD_AT, head);
        fence(Ordering::SeqCst);
    }

    /// It was given back; `used` is where the used ring stands now.
    pub(crate) fn finished(&self, head: u16, used: u16) {
        fence(Ordering::SeqCst);
        self.set_under_way(head, false);
        fence(Ordering::SeqCst);
        self.set16(USED_AT, used);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area() -> (File, InFlightArea) {
        let file = InFlightArea::create(2, 8).expect("memfd");
        let copy = file.try_clone().expect("a descriptor");
        let area = InFlightArea::map(copy, (0, InFlightArea::len(2, 8)), 2, 8).expect("maps");
        (file, area)
    }

    #[test]
    fn what_was_not_finished_is_found_in_order() {
        let (_file, area) = area();
        let mut first = area.queue(1, 8).expect("a part");
        assert!(first.left(65_535).is_empty());
        for head in [5, 2, 7, 0] {
            first.begin(head);
        }
        first.finishing(2);
        first.finished(2, 0);
        first.undo(0);
        assert_eq!(area.queue(1, 8).expect("a part").left(0), [5, 7]);
        // Given back, but not noted.
        first.finishing(5);
        assert_eq!(area.queue(1, 8).expect("a part").left(1), [7]);
        assert!(area.queue(0, 8).expect("a part").left(0).is_empty(), "the other queue has none");
        assert!(area.queue(2, 8).is_none() && area.queue(0, 16).is_none());
    }

    #[test]
    fn areas_that_could_vanish_are_refused() {
        let (file, _) = area();
        let long = InFlightArea::map(file.try_clone().expect("fd"), (0, 1 << 20), 2, 8).expect_err("long");
        assert!(matches!(long, AreaError::Short));
        let many = InFlightArea::map(file, (0, 64), 2, 8).expect_err("too many queues for it");
        assert!(matches!(many, AreaError::Short));
        let open = tempfile::tempfile().expect("file");
        open.set_len(4096).expect("grows");
        assert!(matches!(InFlightArea::map(open, (0, 4096), 2, 8), Err(AreaError::Unsealed)));
    }
}
