//! Giving RAM back to the host.

use holdfast_memory::{GuestMemory, PAGE_SIZE};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::dma;
use crate::queue::Segment;

/// Gives the whole pages of `len` bytes at `gpa` back to the host: they read as zeroes afterwards.
/// Returns the bytes given back; what is not RAM, or what the host does not take, is left alone.
pub(super) fn release(memory: &GuestMemory, gpa: u64, len: u64) -> u64 {
    let Some(start) = gpa.checked_next_multiple_of(PAGE_SIZE) else { return 0 };
    let Some(end) = gpa.checked_add(len).map(|e| e & !(PAGE_SIZE - 1)) else { return 0 };
    let (mut at, mut released) = (start, 0);
    while at < end {
        let Some(region) = memory.find_region(GuestAddress(at)) else { break };
        let offset = at - region.start_addr().raw_value();
        let n = (end - at).min(region.len() - offset) & !(PAGE_SIZE - 1);
        if n == 0 {
            break;
        }
        if release_in(region, offset, n) {
            released += n;
            // The pages' contents have changed.
            let mut done = 0;
            while done < n {
                let part = (n - done).min(1 << 30);
                let addr = GuestAddress(at + done);
                dma::mark_written(memory, &[Segment { addr, len: part as u32 }]);
                done += part;
            }
        }
        at += n;
    }
    released
}

fn release_in(region: &holdfast_memory::GuestRegion, offset: u64, len: u64) -> bool {
    let rc = match region.file_offset().filter(|_| region.flags() & libc::MAP_SHARED != 0) {
        Some(file) => {
            let fd = std::os::fd::AsRawFd::as_raw_fd(file.file());
            let at = (file.start() + offset) as libc::off_t;
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: no memory is passed; the range lies in the region's part of its file.
            unsafe { libc::fallocate(fd, mode, at, len as libc::off_t) }
        }
        None => {
            let base = region.as_ptr().wrapping_add(offset as usize);
            // SAFETY: the range lies in the region's mapping, whose contents belong to the guest; it has
            // asked for them to be dropped. No references into guest RAM exist.
            unsafe { libc::madvise(base.cast(), len as usize, libc::MADV_DONTNEED) }
        }
    };
    if rc != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(offset, len, %error, "the host does not take pages back");
    }
    rc == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;
    use vm_memory::{Bytes, FileOffset};

    fn shared() -> GuestMemory {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"ram".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: the descriptor is new.
        let file = unsafe { std::fs::File::from_raw_fd(fd) };
        file.set_len(0x20000).expect("sized");
        let range = (GuestAddress(0x10000), 0x10000, Some(FileOffset::new(file, 0x8000)));
        GuestMemory::from_ranges_with_files(&[range]).expect("RAM")
    }

    #[test]
    fn released_pages_read_as_zeroes_and_their_neighbours_stay() {
        let private = GuestMemory::from_ranges(&[(GuestAddress(0x10000), 0x10000)]).expect("RAM");
        for memory in [private, shared()] {
            memory.write_slice(&[7; 0x10000], GuestAddress(0x10000)).expect("in RAM");
            let (tracker, _) = holdfast_memory::tracker_at(&memory, 0x10000).expect("in RAM");
            tracker.start_log();
            assert_eq!(release(&memory, 0x11800, 0x2000), 0x1000, "whole pages only");
            assert_eq!(tracker.take_dirty(), [0b100]);
            let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).expect("in RAM");
            assert_eq!([byte(0x11fff), byte(0x12000), byte(0x12fff), byte(0x13000)], [7, 0, 0, 7]);
            assert_eq!(release(&memory, 0x1f000, u64::MAX - 0x1f000), 0x1000, "RAM's end");
            assert_eq!(release(&memory, 0, 0x1000), 0);
            assert_eq!(release(&memory, u64::MAX, u64::MAX), 0);
        }
    }
}
