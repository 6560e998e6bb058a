//! Guest-physical memory as a vCPU sees it: RAM, ROM windows, and everything else on the bus.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use holdfast_memory::{GuestMemory, GuestRegion, PAGE_SIZE, RamTracker, Tracked};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// Serves accesses that hit neither RAM nor ROM. Sizes are 1, 2, 4 or 8 bytes; data is the value as
/// the guest's own byte order on the bus, little-endian.
pub trait Io: Send + Sync + Debug {
    /// A read by `vcpu`; `None` if nothing is there.
    fn read(&self, vcpu: u32, gpa: u64, size: u8) -> Option<u64>;
    /// A write by `vcpu`; false if nothing is there.
    fn write(&self, vcpu: u32, gpa: u64, size: u8, value: u64) -> bool;
    /// A read of an I/O port by `vcpu`: 1, 2 or 4 bytes; `None` if nothing is there.
    fn port_read(&self, _vcpu: u32, _port: u16, _size: u8) -> Option<u32> {
        None
    }
    /// A write of an I/O port by `vcpu`; false if nothing is there.
    fn port_write(&self, _vcpu: u32, _port: u16, _size: u8, _value: u32) -> bool {
        false
    }
}

/// One run of host-mapped guest memory.
#[derive(Debug, Clone)]
pub struct RamBlock {
    /// Guest-physical start, page aligned.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Host address of the first byte.
    pub host: *mut u8,
    /// Dirty and code bits.
    pub tracker: RamTracker,
    /// Pages that some vCPU may write without being noticed.
    pub hot: Arc<HotPages>,
    /// ROM: reads and fetches only.
    pub rom: bool,
}

/// The pages of a block that vCPUs have write entries for in their TLBs, or had since the set was last
/// taken. Two sets take turns, so that taking one loses nothing: see [`HotPages::take`].
#[derive(Debug)]
pub struct HotPages([Box<[AtomicU64]>; 2]);

impl HotPages {
    fn new(pages: u64) -> Arc<Self> {
        let bits = || (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self([bits(), bits()]))
    }

    /// Notes in set `side` that `page` of the block can be written from now on.
    #[inline]
    pub fn set(&self, side: usize, page: u64) {
        if let Some(word) = self.0[side & 1].get((page / 64) as usize)
            && word.load(Ordering::Relaxed) >> (page % 64) & 1 == 0
        {
            word.fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }

    /// True if `page` is in either set.
    #[inline]
    pub fn is_hot(&self, page: u64) -> bool {
        let at = |set: &[AtomicU64]| {
            set.get((page / 64) as usize).is_some_and(|w| w.load(Ordering::SeqCst) >> (page % 64) & 1 != 0)
        };
        at(&self.0[0]) || at(&self.0[1])
    }

    /// Empties set `side`, which no vCPU uses any more, and calls `each` with its pages.
    pub fn take(&self, side: usize, mut each: impl FnMut(u64)) {
        for (n, word) in self.0[side & 1].iter().enumerate() {
            let mut bits = word.swap(0, Ordering::SeqCst);
            while bits != 0 {
                each(n as u64 * 64 + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
    }
}

// SAFETY: the mapping is shared guest memory that lives as long as the `PhysMemory` that holds its
// `GuestMemory`; all access goes through atomics or raw copies that tolerate races.
unsafe impl Send for RamBlock {}
// SAFETY: as above.
unsafe impl Sync for RamBlock {}

/// RAM of a VM with direct host addresses.
#[derive(Debug)]
pub struct PhysMemory {
    blocks: Vec<RamBlock>,
    /// Keeps the mappings alive.
    _memory: GuestMemory,
    /// What is shown beside RAM: ROM, and memory of devices.
    windows: Vec<(u64, Arc<GuestRegion>)>,
}

/// A host address found for a guest-physical one.
#[derive(Debug, Clone, Copy)]
pub struct HostRef<'a> {
    /// Host address of the byte.
    pub host: *mut u8,
    /// The block it lies in.
    pub block: &'a RamBlock,
    /// Offset in the block.
    pub offset: u64,
}

impl PhysMemory {
    /// All of `memory`.
    pub fn new(memory: &GuestMemory) -> Self {
        let blocks = memory.iter().map(|r| block(r.start_addr().raw_value(), r, false)).collect();
        Self { blocks, _memory: memory.clone(), windows: Vec::new() }.sorted()
    }

    /// The same with a window more. Reads and fetches come from it; writes too if it is `writable`, else they go to the bus.
    pub fn with_window(&self, gpa: u64, region: &Arc<GuestRegion>, writable: bool) -> Self {
        let mut new = self.without_window(gpa);
        new.blocks.push(block(gpa, region, !writable));
        new.windows.push((gpa, Arc::clone(region)));
        new.sorted()
    }

    /// The same without the window that starts at `gpa`.
    pub fn without_window(&self, gpa: u64) -> Self {
        let gone = |at: u64| at == gpa && self.has_window(gpa);
        let blocks = self.blocks.iter().filter(|b| !gone(b.gpa)).cloned().collect();
        let windows = self.windows.iter().filter(|(at, _)| !gone(*at)).cloned().collect();
        Self { blocks, _memory: self._memory.clone(), windows }
    }

    /// True if a window starts at `gpa`.
    pub fn has_window(&self, gpa: u64) -> bool {
        self.windows.iter().any(|(at, _)| *at == gpa)
    }

    fn sorted(mut self) -> Self {
        // The largest first: it is found at once.
        self.blocks.sort_by_key(|b| std::cmp::Reverse(b.len));
        self
    }

    /// All blocks.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// The host address of `len` bytes at `gpa`, if they lie in one block.
    #[inline]
    pub fn find(&self, gpa: u64, len: u64) -> Option<HostRef<'_>> {
        self.blocks.iter().find_map(|block| {
            let offset = gpa.wrapping_sub(block.gpa);
            let fits = offset < block.len && block.len - offset >= len;
            // SAFETY: `offset` lies inside the block's mapping.
            fits.then(|| HostRef { host: unsafe { block.host.add(offset as usize) }, block, offset })
        })
    }

    fn word64(&self, gpa: u64) -> Option<(&AtomicU64, HostRef<'_>)> {
        let found = self.find(gpa, 8).filter(|f| f.host.addr().is_multiple_of(8))?;
        // SAFETY: eight aligned bytes inside a live mapping; guest memory is only ever shared as atomics.
        Some((unsafe { AtomicU64::from_ptr(found.host.cast()) }, found))
    }

    fn word32(&self, gpa: u64) -> Option<(&AtomicU32, HostRef<'_>)> {
        let found = self.find(gpa, 4).filter(|f| f.host.addr().is_multiple_of(4))?;
        // SAFETY: four aligned bytes inside a live mapping, as above.
        Some((unsafe { AtomicU32::from_ptr(found.host.cast()) }, found))
    }

    /// An aligned 8-byte little-endian read of RAM or ROM; `None` elsewhere. For page walks.
    #[inline]
    pub fn read_u64(&self, gpa: u64) -> Option<u64> {
        Some(u64::from_le(self.word64(gpa)?.0.load(Ordering::Acquire)))
    }

    /// An aligned 4-byte little-endian read of RAM or ROM; `None` elsewhere.
    #[inline]
    pub fn read_u32(&self, gpa: u64) -> Option<u32> {
        Some(u32::from_le(self.word32(gpa)?.0.load(Ordering::Acquire)))
    }

    /// Replaces an aligned 8-byte little-endian value in RAM if it is still `old`: `Ok` if it was,
    /// `Err` with what is there now. `None` outside RAM. Accessed and dirty bits are set with this.
    pub fn cas_u64(&self, gpa: u64, old: u64, new: u64) -> Option<Result<(), u64>> {
        let (word, at) = self.word64(gpa).filter(|(_, f)| !f.block.rom)?;
        let done = word.compare_exchange(old.to_le(), new.to_le(), Ordering::AcqRel, Ordering::Acquire);
        if done.is_ok() {
            at.block.tracker.mark_dirty(at.offset as usize, 8);
        }
        Some(done.map(|_| ()).map_err(u64::from_le))
    }

    /// As [`PhysMemory::cas_u64`] for four bytes.
    pub fn cas_u32(&self, gpa: u64, old: u32, new: u32) -> Option<Result<(), u32>> {
        let (word, at) = self.word32(gpa).filter(|(_, f)| !f.block.rom)?;
        let done = word.compare_exchange(old.to_le(), new.to_le(), Ordering::AcqRel, Ordering::Acquire);
        if done.is_ok() {
            at.block.tracker.mark_dirty(at.offset as usize, 4);
        }
        Some(done.map(|_| ()).map_err(u32::from_le))
    }
}

fn block(gpa: u64, region: &GuestRegion, rom: bool) -> RamBlock {
    // The last bytes of a region that is no whole number of pages are left to the bus.
    let len = region.len() & !(PAGE_SIZE - 1);
    let hot = HotPages::new(len / PAGE_SIZE);
    RamBlock { gpa, len, host: region.as_ptr(), tracker: region.bitmap_tracker(), hot, rom }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn finds_ram_and_refuses_the_rest() {
        let mem =
            GuestMemory::from_ranges(&[(GuestAddress(0x1000), 0x1000), (GuestAddress(0x8000_0000), 0x4000)])
                .expect("RAM");
        mem.write_obj(0x1122_3344_5566_7788_u64, GuestAddress(0x8000_3ff8)).expect("write");
        let phys = PhysMemory::new(&mem);
        assert_eq!(phys.read_u64(0x8000_3ff8), Some(0x1122_3344_5566_7788));
        assert_eq!(phys.read_u64(0x8000_4000), None);
        assert_eq!(phys.read_u64(u64::MAX - 7), None);
        assert_eq!(phys.cas_u64(0x8000_3ff8, 1, 2), Some(Err(0x1122_3344_5566_7788)));
        let (tracker, _) = holdfast_memory::tracker_at(&mem, 0x8000_3ff8).expect("RAM");
        tracker.start_log();
        assert_eq!(phys.cas_u64(0x8000_3ff8, 0x1122_3344_5566_7788, 2), Some(Ok(())));
        assert!(tracker.is_dirty(3));
    }
}
