//! The driver's side of a split ring (virtio 1.2 section 2.7) in memory shared with a back end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;

use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestRegionMmap,
};

use crate::queue::Chain;

/// Memory that holds rings.
pub(crate) type RingMemory = GuestMemoryMmap<()>;

/// Where the back end finds the rings among the guest's addresses: above all RAM.
const BASE: u64 = 1 << 46;
/// Room for one ring of [`crate::config::MAX_QUEUE_SIZE`] descriptors.
const STRIDE: u64 = 0x1_0000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
/// In the used ring's flags: the back end does not want to be notified.
const USED_F_NO_NOTIFY: u16 = 1;

/// What a back end did wrong, or the host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RingError {
    #[error("the ring's memory")]
    Memory(#[from] GuestMemoryError),
    #[error("the back end gives back {used} chains of ring {queue} and holds {held}")]
    Count { queue: u16, used: u16, held: usize },
    #[error("the back end gives back chain {id} of ring {queue}, which it does not hold")]
    Chain { queue: u16, id: u32 },
}

/// The memory of all rings of a device.
#[derive(Debug, Clone)]
pub(crate) struct SharedRings {
    memory: RingMemory,
}

impl SharedRings {
    pub(crate) fn new(queues: usize) -> io::Result<Self> {
        let len = queues.max(1) * STRIDE as usize;
        let fd = rustix::fs::memfd_create("vhost-user-rings", rustix::fs::MemfdFlags::CLOEXEC)?;
        let file = File::from(fd);
        file.set_len(len as u64)?;
        let ranges = [(GuestAddress(BASE), len, Some(FileOffset::new(file, 0)))];
        let memory = RingMemory::from_ranges_with_files(ranges).map_err(io::Error::other)?;
        Ok(Self { memory })
    }

    fn region(&self) -> Option<&GuestRegionMmap<()>> {
        self.memory.find_region(GuestAddress(BASE))
    }

    /// How the back end maps them.
    pub(crate) fn info(&self) -> Option<VhostUserMemoryRegionInfo> {
        VhostUserMemoryRegionInfo::from_guest_region(self.region()?).ok()
    }

    /// The memory itself.
    pub(crate) fn memory(&self) -> &RingMemory {
        &self.memory
    }

    /// Where the ring of `queue` with `size` descriptors lies among the guest's addresses.
    pub(crate) fn place(&self, queue: u16, size: u16) -> VringConfigData {
        let at = BASE + STRIDE * u64::from(queue);
        VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: at,
            used_ring_addr: at + USED,
            avail_ring_addr: at + AVAIL,
            log_addr: None,
        }
    }

    /// The addresses of the descriptors, the available and the used ring of `queue` in this process.
    pub(crate) fn addresses(&self, queue: u16) -> Option<(u64, u64, u64)> {
        let at = self.region()?.as_ptr() as u64 + STRIDE * u64::from(queue);
        Some((at, at + AVAIL, at + USED))
    }
}

#[derive(Debug)]
struct Held {
    chain: Chain,
    descriptors: Vec<u16>,
    /// How many were submitted before it.
    order: u64,
}

/// One ring.
#[derive(Debug)]
pub(crate) struct RelayRing {
    memory: RingMemory,
    queue: u16,
    size: u16,
    free: Vec<u16>,
    /// What the back end has, by the number of the first descriptor.
    held: BTreeMap<u16, Held>,
    submitted: u64,
    available: u16,
    used: u16,
}

impl RelayRing {
    /// An empty ring of `size` descriptors.
    pub(crate) fn new(shared: &SharedRings, queue: u16, size: u16) -> Result<Self, RingError> {
        let memory = shared.memory.clone();
        memory.write_slice(&vec![0; STRIDE as usize], GuestAddress(BASE + STRIDE * u64::from(queue)))?;
        let free = (0..size).rev().collect();
        Ok(Self { memory, queue, size, free, held: BTreeMap::new(), submitted: 0, available: 0, used: 0 })
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    fn at(&self, offset: u64) -> GuestAddress {
        GuestAddress(BASE + STRIDE * u64::from(self.queue) + offset)
    }

    /// Whether there are descriptors for `chain`.
    pub(crate) fn fits(&self, chain: &Chain) -> bool {
        chain.readable.len() + chain.writable.len() <= self.free.len()
    }

    /// Takes the chains away from a back end that does not look at the ring any more: their heads in the guest's
    /// ring, in the order in which they were submitted. The ring is of no further use.
    pub(crate) fn take_back(&mut self) -> Vec<u16> {
        let mut held: Vec<Held> = std::mem::take(&mut self.held).into_values().collect();
        held.sort_unstable_by_key(|held| held.order);
        held.into_iter().map(|held| held.chain.head).collect()
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.held.is_empty()
    }

    /// Gives `chain`, which [fits](Self::fits), to the back end.
    pub(crate) fn submit(&mut self, chain: Chain) -> Result<(), RingError> {
        let segments: Vec<_> = chain
            .readable
            .iter()
            .map(|segment| (segment, 0))
            .chain(chain.writable.iter().map(|segment| (segment, F_WRITE)))
            .collect();
        let first = self.free.len().saturating_sub(segments.len());
        let descriptors: Vec<u16> = self.free.split_off(first);
        for (n, (segment, flags)) in segments.iter().enumerate() {
            let Some(&index) = descriptors.get(n) else { break };
            let next = descriptors.get(n + 1);
            let flags = flags | if next.is_some() { F_NEXT } else { 0 };
            let mut bytes = [0; 16];
            let (addr, rest) = bytes.split_at_mut(8);
            addr.copy_from_slice(&segment.addr.0.to_le_bytes());
            let tail =
                u64::from(segment.len) | u64::from(flags) << 32 | u64::from(next.copied().unwrap_or(0)) << 48;
            rest.copy_from_slice(&tail.to_le_bytes());
            self.memory.write_slice(&bytes, self.at(16 * u64::from(index)))?;
        }
        let Some(&head) = descriptors.first() else { return Ok(()) };
        let slot = AVAIL + 4 + 2 * u64::from(self.available % self.size.max(1));
        self.memory.store(head.to_le(), self.at(slot), Ordering::Relaxed)?;
        self.available = self.available.wrapping_add(1);
        self.memory.store(self.available.to_le(), self.at(AVAIL + 2), Ordering::Release)?;
        self.held.insert(head, Held { chain, descriptors, order: self.submitted });
        self.submitted += 1;
        Ok(())
    }

    /// Whether the back end wants to hear of what was submitted.
    pub(crate) fn wants_kick(&self) -> Result<bool, RingError> {
        std::sync::atomic::fence(Ordering::SeqCst);
        let flags: u16 = self.memory.load(self.at(USED), Ordering::Relaxed)?;
        Ok(u16::from_le(flags) & USED_F_NO_NOTIFY == 0)
    }

    /// The next chain that the back end has finished, and how many bytes it says it wrote.
    pub(crate) fn collect(&mut self) -> Result<Option<(Chain, u32)>, RingError> {
        let index: u16 = self.memory.load(self.at(USED + 2), Ordering::Acquire)?;
        let waiting = u16::from_le(index).wrapping_sub(self.used);
        if waiting == 0 {
            return Ok(None);
        }
        if usize::from(waiting) > self.held.len() {
            return Err(RingError::Count { queue: self.queue, used: waiting, held: self.held.len() });
        }
        let slot = USED + 4 + 8 * u64::from(self.used % self.size.max(1));
        let id = u32::from_le(self.memory.load(self.at(slot), Ordering::Relaxed)?);
        let len = u32::from_le(self.memory.load(self.at(slot + 4), Ordering::Relaxed)?);
        let held = u16::try_from(id).ok().and_then(|head| self.held.remove(&head));
        let held = held.ok_or(RingError::Chain { queue: self.queue, id })?;
        self.used = self.used.wrapping_add(1);
        self.free.extend(held.descriptors.into_iter().rev());
        Ok(Some((held.chain, len)))
    }
}
