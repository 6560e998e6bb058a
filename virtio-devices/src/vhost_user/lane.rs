//! A queue of the guest and the ring of ours through which a back end serves it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_memory::{GuestMemory, tracker_at};
use vm_memory::bitmap::Bitmap;
use vmm_sys_util::eventfd::EventFd;

use super::ring::{RelayRing, RingError};
use crate::device::Interrupt;
use crate::queue::{Chain, HandlerError, VirtQueue};

/// Both sides of one queue.
#[derive(Debug)]
pub(crate) struct Lane {
    /// The guest's.
    pub(crate) queue: VirtQueue,
    /// The back end's.
    pub(crate) ring: RelayRing,
}

impl From<RingError> for HandlerError {
    fn from(error: RingError) -> Self {
        Self::Host { what: "the back end breaks the rules", source: io::Error::other(error) }
    }
}

/// Marks what the back end may have written.
fn mark(memory: &GuestMemory, chain: &Chain) {
    for segment in &chain.writable {
        let (mut at, mut left) = (segment.addr.0, u64::from(segment.len));
        while left != 0 {
            // The chain was checked to lie in RAM; it may go on in the next region.
            let Some((tracker, offset)) = tracker_at(memory, at) else { return };
            let room = (tracker.pages() * holdfast_memory::PAGE_SIZE).saturating_sub(offset).max(1);
            let n = left.min(room);
            tracker.mark_dirty(offset as usize, n as usize);
            (at, left) = (at.wrapping_add(n), left - n);
        }
    }
}

impl Lane {
    /// Gives waiting chains to the back end, rings `kick` if it wants to hear of them, and counts them.
    pub(crate) fn forward(&mut self, kick: &EventFd, requests: &AtomicU64) -> Result<(), HandlerError> {
        let mut submitted = false;
        'full: loop {
            while let Some(chain) = self.queue.pop()? {
                if !self.ring.fits(&chain) {
                    // Goes on when the back end has given something back.
                    self.queue.undo_pop();
                    if self.ring.is_idle() {
                        let error = io::Error::other("a chain has more descriptors than the back end's ring");
                        return Err(HandlerError::Host { what: "cannot pass a request on", source: error });
                    }
                    break 'full;
                }
                self.ring.submit(chain)?;
                requests.fetch_add(1, Ordering::Relaxed);
                submitted = true;
            }
            if !self.queue.enable_kicks()? {
                break;
            }
        }
        if submitted && self.ring.wants_kick()? {
            // A full counter rings as well.
            let _ = kick.write(1);
        }
        Ok(())
    }

    /// Gives finished chains back to the guest.
    pub(crate) fn complete(
        &mut self,
        memory: &GuestMemory,
        interrupt: &dyn Interrupt,
    ) -> Result<(), HandlerError> {
        while let Some((chain, len)) = self.ring.collect()? {
            mark(memory, &chain);
            let room = crate::queue::total_len(&chain.writable);
            self.queue.push(chain.head, u32::try_from(room).map_or(len, |room| len.min(room)))?;
        }
        if self.queue.wants_interrupt()? {
            interrupt.queue(self.queue.index());
        }
        Ok(())
    }
}
