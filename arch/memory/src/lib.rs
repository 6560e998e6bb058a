//! Guest RAM behind one door.
//!
//! Apart from the vCPUs' own fast paths, every write to guest RAM (DMA, virtqueues, loaders, restore,
//! gdb) goes through [`GuestMemory`], whose regions carry a [`RamTracker`]. The tracker marks dirty
//! pages for migration and tells the translator when bytes change that it has translated. Devices
//! use the ordinary `vm-memory` traits and know nothing of either.

mod tracker;

use std::sync::Arc;

pub use tracker::{CodeObserver, RamTracker};

/// The tracked page size in bytes: dirty bits and code bits stand for this much RAM.
pub const PAGE_SIZE: u64 = 4096;

/// All of a VM's RAM, as `vm-memory` sees it. Cheap to clone: regions are shared.
pub type GuestMemory = vm_memory::GuestMemoryMmap<RamTracker>;

/// One contiguous run of guest RAM.
pub type GuestRegion = vm_memory::GuestRegionMmap<RamTracker>;

/// The tracker of the region that holds `gpa`, and the offset of `gpa` in that region.
pub fn tracker_at(memory: &GuestMemory, gpa: u64) -> Option<(RamTracker, u64)> {
    use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
    let region = memory.find_region(GuestAddress(gpa))?;
    Some((region.bitmap_tracker(), gpa - region.start_addr().raw_value()))
}

/// Access to a region's tracker.
pub trait Tracked {
    /// The tracker of this region.
    fn bitmap_tracker(&self) -> RamTracker;
}

impl Tracked for GuestRegion {
    fn bitmap_tracker(&self) -> RamTracker {
        use std::ops::Deref;
        self.deref().bitmap().clone()
    }
}

/// Tells every region of `memory` whom to call when translated bytes change.
pub fn observe_code(memory: &GuestMemory, observer: &Arc<dyn CodeObserver>) {
    use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
    for region in memory.iter() {
        region.bitmap_tracker().observe_code(region.start_addr().raw_value(), Arc::clone(observer));
    }
}
