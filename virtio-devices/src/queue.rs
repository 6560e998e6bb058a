//! Virtqueues as devices see them: every chain is checked before a device sees it.
//!
//! Split rings of virtio 1.2 section 2.7. The positions and the ring layout are `virtio-queue`'s; the
//! walk over a chain is ours, because a chain that is wrong anywhere must stop the device rather than
//! end early.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::in_flight::InFlight;
use holdfast_memory::GuestMemory;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

/// Most descriptors in a chain, whatever the queue size: what a guest can make us hold at once.
pub const MAX_CHAIN: usize = 1024;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const DESCRIPTOR_SIZE: u64 = 16;

/// Nonsense in a virtqueue. The device needs a reset after it.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings are not where the driver says, or it claims more buffers than the ring holds.
    #[error("queue {queue}: the rings are invalid")]
    Rings {
        /// The queue.
        queue: u16,
        /// What was found.
        #[source]
        source: virtio_queue::Error,
    },
    /// A chain starts outside the descriptor table.
    #[error("queue {queue}: descriptor {index} is outside its table")]
    Index {
        /// The queue.
        queue: u16,
        /// The descriptor.
        index: u16,
    },
    /// A chain goes round in circles or has more descriptors than fit.
    #[error("queue {queue}: the descriptor chain is too long or a loop")]
    Endless {
        /// The queue.
        queue: u16,
    },
    /// A descriptor is not in RAM, is empty, or makes the chain longer than 4 GiB.
    #[error("queue {queue}: descriptor {addr:#x}+{len:#x} is empty or not in RAM")]
    Range {
        /// The queue.
        queue: u16,
        /// Guest-physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A table of indirect descriptors within another, or of a wrong size.
    #[error("queue {queue}: invalid indirect descriptor")]
    Indirect {
        /// The queue.
        queue: u16,
    },
    /// A device-readable descriptor follows a device-writable one.
    #[error("queue {queue}: a readable descriptor follows a writable one")]
    Order {
        /// The queue.
        queue: u16,
    },
    /// The buffers are too small, or point the wrong way, for what the request says.
    #[error("queue {queue}: the buffers do not fit the request")]
    Short {
        /// The queue.
        queue: u16,
    },
}

/// A range of guest RAM that a descriptor names; checked to be RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First guest-physical address.
    pub addr: GuestAddress,
    /// Length in bytes, not 0.
    pub len: u32,
}

/// One buffer that the driver made available.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The descriptor it starts with: the name under which it is given back.
    pub head: u16,
    /// What the device reads.
    pub readable: Vec<Segment>,
    /// What the device writes.
    pub writable: Vec<Segment>,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

// SAFETY: plain integers without padding; any bytes are a valid value.
unsafe impl ByteValued for Descriptor {}

/// A queue that the driver has set up.
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    memory: GuestMemory,
    kick: Arc<EventFd>,
    /// Chains popped and not given back: never more than there are descriptors.
    outstanding: u16,
    /// Something was given back since the driver was last interrupted.
    pushed: bool,
    /// Where requests under way are noted, if they are to outlive this process.
    in_flight: Option<InFlight>,
    /// Those that a predecessor left, to be served first.
    left: VecDeque<u16>,
    /// The chain taken last, and whether it was one of those.
    last: Option<(u16, bool)>,
}

impl fmt::Debug for VirtQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtQueue")
            .field("index", &self.index)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

impl VirtQueue {
    /// The queue in `state`, if its rings lie in RAM. `kick` becomes readable when the driver
    /// notifies the device.
    ///
    /// # Errors
    /// [`QueueError::Rings`].
    pub fn new(
        index: u16,
        state: QueueState,
        memory: &GuestMemory,
        kick: Arc<EventFd>,
    ) -> Result<Self, QueueError> {
        let wrong = |source| QueueError::Rings { queue: index, source };
        let queue = Queue::try_from(state).map_err(wrong)?;
        if !queue.is_valid(memory) {
            return Err(wrong(virtio_queue::Error::QueueNotReady));
        }
        Ok(Self {
            index,
            queue,
            memory: memory.clone(),
            kick,
            outstanding: 0,
            pushed: false,
            in_flight: None,
            left: VecDeque::new(),
            last: None,
        })
    }

    /// Notes requests under way in `area`, and serves those first that are noted there. The queue stands behind all
    /// that were taken, whatever its state says.
    #[must_use]
    pub fn with_in_flight(mut self, mut area: InFlight) -> Self {
        let used = self.queue.next_used();
        self.left = area.left(used).into();
        let taken = u16::try_from(self.left.len()).unwrap_or(u16::MAX);
        self.queue.set_next_avail(used.wrapping_add(taken));
        self.in_flight = Some(area);
        if !self.left.is_empty() {
            self.kick_again();
        }
        self
    }

    /// Its number on the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The number of its descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Positions and layout, for saving.
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Guest RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Written by the driver's notifications.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    fn rings(&self, source: virtio_queue::Error) -> QueueError {
        QueueError::Rings { queue: self.index, source }
    }

    /// Takes the next available chain.
    ///
    /// # Errors
    /// [`QueueError`] if anything about it is wrong. The device must then ask for a reset.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        if let Some(head) = self.left.pop_front() {
            self.last = Some((head, true));
            return self.again(head).map(Some);
        }
        let available = self.queue.avail_idx(&self.memory, Ordering::Acquire).map_err(|e| self.rings(e))?;
        let next = self.queue.next_avail();
        let waiting = (available - Wrapping(next)).0;
        if waiting == 0 {
            return Ok(None);
        }
        let size = self.queue.size();
        // A driver that makes descriptors available again before it got them back could make us hold
        // any number of requests.
        if waiting > size || self.outstanding >= size {
            return Err(self.rings(virtio_queue::Error::InvalidAvailRingIndex));
        }
        let slot = u64::from(next % size.max(1));
        let at = self.queue.avail_ring().wrapping_add(4 + 2 * slot);
        let head = self.memory.load::<u16>(GuestAddress(at), Ordering::Relaxed);
        let head = u16::from_le(head.map_err(|e| self.rings(virtio_queue::Error::GuestMemory(e)))?);
        let chain = self.walk(head)?;
        self.queue.set_next_avail(next.wrapping_add(1));
        self.outstanding += 1;
        self.last = Some((head, false));
        if let Some(area) = &mut self.in_flight {
            area.begin(head);
        }
        Ok(Some(chain))
    }

    /// The largest number of descriptors that the device allows.
    pub fn max_size(&self) -> u16 {
        self.queue.max_size()
    }

    /// Walks a chain once more that was popped before and not given back, perhaps by the queue's predecessor.
    ///
    /// # Errors
    /// As [`VirtQueue::pop`].
    pub fn again(&mut self, head: u16) -> Result<Chain, QueueError> {
        if self.outstanding >= self.queue.size() {
            return Err(self.rings(virtio_queue::Error::InvalidAvailRingIndex));
        }
        let chain = self.walk(head)?;
        self.outstanding += 1;
        Ok(chain)
    }

    /// `count` chains that were popped are nobody's any more; each is walked [again](Self::again) before it is given back.
    pub fn forget(&mut self, count: usize) {
        self.outstanding = self.outstanding.saturating_sub(u16::try_from(count).unwrap_or(u16::MAX));
    }

    /// Gives the chain taken last back to the driver's side, to be popped again.
    pub fn undo_pop(&mut self) {
        self.outstanding = self.outstanding.saturating_sub(1);
        if let Some((head, true)) = self.last {
            self.left.push_front(head);
            return;
        }
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
        if let (Some(area), Some((head, _))) = (&self.in_flight, self.last) {
            area.undo(head);
        }
    }

    fn walk(&self, head: u16) -> Result<Chain, QueueError> {
        let queue = self.index;
        let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
        let (mut table, mut table_len) = (self.queue.desc_table(), u32::from(self.queue.size()));
        let (mut index, mut indirect, mut total) = (head, false, 0u32);
        let mut steps = 0;
        loop {
            if u32::from(index) >= table_len {
                return Err(QueueError::Index { queue, index });
            }
            // The table lies in RAM or the read fails; wrapping cannot reach other RAM unseen.
            let at = table.wrapping_add(u64::from(index) * DESCRIPTOR_SIZE);
            let d: Descriptor = self.memory.read_obj(GuestAddress(at)).map_err(|_| QueueError::Range {
                queue,
                addr: at,
                len: DESCRIPTOR_SIZE as u32,
            })?;
            let (addr, len) = (u64::from_le(d.addr), u32::from_le(d.len));
            let (flags, next) = (u16::from_le(d.flags), u16::from_le(d.next));
            if flags & F_INDIRECT != 0 {
                let entries = len / DESCRIPTOR_SIZE as u32;
                let whole = len % DESCRIPTOR_SIZE as u32 == 0 && (1..=u32::from(u16::MAX)).contains(&entries);
                if indirect || flags & F_NEXT != 0 || !whole {
                    return Err(QueueError::Indirect { queue });
                }
                (table, table_len, index, indirect) = (addr, entries, 0, true);
                continue;
            }
            steps += 1;
            if steps > MAX_CHAIN || steps > table_len as usize + usize::from(self.queue.size()) {
                return Err(QueueError::Endless { queue });
            }
            let in_ram = len != 0 && self.memory.check_range(GuestAddress(addr), len as usize);
            let sum = total.checked_add(len).filter(|_| in_ram);
            total = sum.ok_or(QueueError::Range { queue, addr, len })?;
            let segment = Segment { addr: GuestAddress(addr), len };
            if flags & F_WRITE != 0 {
                chain.writable.push(segment);
            } else if chain.writable.is_empty() {
                chain.readable.push(segment);
            } else {
                return Err(QueueError::Order { queue });
            }
            if flags & F_NEXT == 0 {
                return Ok(chain);
            }
            index = next;
        }
    }

    /// Gives a chain back, with `written` bytes in its writable part.
    ///
    /// # Errors
    /// [`QueueError::Rings`].
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.outstanding = self.outstanding.saturating_sub(1);
        self.pushed = true;
        if let Some(area) = &self.in_flight {
            area.finishing(head);
        }
        self.queue.add_used(&self.memory, head, written).map_err(|e| self.rings(e))?;
        if let Some(area) = &self.in_flight {
            area.finished(head, self.queue.next_used());
        }
        Ok(())
    }

    /// True if the driver wants to be interrupted for what was given back since the last call.
    ///
    /// # Errors
    /// [`QueueError::Rings`].
    pub fn wants_interrupt(&mut self) -> Result<bool, QueueError> {
        if !std::mem::take(&mut self.pushed) {
            return Ok(false);
        }
        if !self.queue.needs_notification(&self.memory).map_err(|e| self.rings(e))? {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            return Ok(true);
        }
        let flags = self.memory.load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed);
        let flags = flags.map_err(|e| self.rings(virtio_queue::Error::GuestMemory(e)))?;
        Ok(u16::from_le(flags) & AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Makes [`VirtQueue::kick`] readable, for a device that leaves chains for later so that a driver
    /// that never stops cannot keep its worker from other events.
    pub fn kick_again(&self) {
        // A full counter is readable as well.
        let _ = self.kick.write(1);
    }

    /// Asks the driver not to notify while its chains are being looked at anyway.
    ///
    /// # Errors
    /// [`QueueError::Rings`].
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification(&self.memory).map_err(|e| self.rings(e))
    }

    /// Asks the driver to notify from now on. True if chains became available meanwhile: they must
    /// be looked at, for nothing will be heard of them.
    ///
    /// # Errors
    /// [`QueueError::Rings`].
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(&self.memory).map_err(|e| self.rings(e))
    }

    /// A reader of the chain's readable part.
    pub fn reader<'a>(&'a self, chain: &'a Chain) -> Reader<'a> {
        Reader { memory: &self.memory, queue: self.index, segments: &chain.readable, skip: 0 }
    }

    /// A writer to the chain's writable part.
    pub fn writer<'a>(&'a self, chain: &'a Chain) -> Writer<'a> {
        Writer { memory: &self.memory, queue: self.index, segments: &chain.writable, skip: 0, written: 0 }
    }
}

/// The total length of `segments` in bytes.
pub fn total_len(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.len)).sum()
}

/// The part of `segments` from byte `skip`, at most `len` bytes of it.
pub fn slice_of(segments: &[Segment], skip: u64, len: u64) -> Vec<Segment> {
    let (mut skip, mut left) = (skip, len);
    let mut out = Vec::with_capacity(segments.len());
    for s in segments {
        let drop = skip.min(u64::from(s.len));
        skip -= drop;
        let take = (u64::from(s.len) - drop).min(left);
        left -= take;
        if take != 0 {
            // In range: the segment was checked not to wrap.
            out.push(Segment { addr: GuestAddress(s.addr.0.wrapping_add(drop)), len: take as u32 });
        }
    }
    out
}

/// Reads a chain's readable part from front to back.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    memory: &'a GuestMemory,
    queue: u16,
    segments: &'a [Segment],
    skip: u32,
}

impl Reader<'_> {
    /// Bytes left.
    pub fn remaining(&self) -> u64 {
        total_len(self.segments) - u64::from(self.skip)
    }

    /// Fills `buf`.
    ///
    /// # Errors
    /// [`QueueError::Short`] if fewer bytes are left.
    pub fn read(&mut self, buf: &mut [u8]) -> Result<(), QueueError> {
        let mut buf = buf;
        while !buf.is_empty() {
            let (at, n) = step(&mut self.segments, &mut self.skip, buf.len())
                .ok_or(QueueError::Short { queue: self.queue })?;
            let (now, rest) = std::mem::take(&mut buf).split_at_mut(n);
            self.memory.read_slice(now, at).map_err(|_| QueueError::Short { queue: self.queue })?;
            buf = rest;
        }
        Ok(())
    }

    /// Reads one object of plain bytes.
    ///
    /// # Errors
    /// [`QueueError::Short`] if fewer bytes are left.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Result<T, QueueError> {
        let mut value = T::default();
        self.read(value.as_mut_slice())?;
        Ok(value)
    }
}

/// Writes a chain's writable part from front to back.
#[derive(Debug)]
pub struct Writer<'a> {
    memory: &'a GuestMemory,
    queue: u16,
    segments: &'a [Segment],
    skip: u32,
    written: u32,
}

impl Writer<'_> {
    /// Bytes of room left.
    pub fn remaining(&self) -> u64 {
        total_len(self.segments) - u64::from(self.skip)
    }

    /// Bytes written so far.
    pub fn written(&self) -> u32 {
        self.written
    }

    /// Writes all of `buf`.
    ///
    /// # Errors
    /// [`QueueError::Short`] if there is less room.
    pub fn write(&mut self, buf: &[u8]) -> Result<(), QueueError> {
        let mut buf = buf;
        while !buf.is_empty() {
            let (at, n) = step(&mut self.segments, &mut self.skip, buf.len())
                .ok_or(QueueError::Short { queue: self.queue })?;
            let (now, rest) = buf.split_at(n);
            self.memory.write_slice(now, at).map_err(|_| QueueError::Short { queue: self.queue })?;
            // A chain is shorter than 4 GiB.
            self.written += n as u32;
            buf = rest;
        }
        Ok(())
    }
}

/// The next run of at most `want` bytes: moves past it and says where it is.
fn step(segments: &mut &[Segment], skip: &mut u32, want: usize) -> Option<(GuestAddress, usize)> {
    let first = segments.first()?;
    let left = first.len - *skip;
    let n = left.min(u32::try_from(want).unwrap_or(u32::MAX));
    let at = GuestAddress(first.addr.0.wrapping_add(u64::from(*skip)));
    *skip += n;
    if *skip == first.len {
        *segments = segments.get(1..).unwrap_or(&[]);
        *skip = 0;
    }
    Some((at, n as usize))
}

/// What ends a device's worker until the driver resets the device.
#[derive(Debug, thiserror::Error)]
pub enum HandlerError {
    /// The driver broke the rules.
    #[error("the driver broke the rules")]
    Queue(#[from] QueueError),
    /// The host does not do what the device needs.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}
