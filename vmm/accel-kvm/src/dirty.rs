//! Which pages of RAM the vCPUs wrote.

use std::sync::Arc;

use holdfast_accel::AccelError;
use holdfast_memory::PAGE_SIZE;
use kvm_ioctls::VmFd;
use parking_lot::Mutex;

use crate::host;
use crate::slots::Slots;
use crate::sys::{self, RingMap};

/// One vCPU's ring and where we are in it.
#[derive(Debug)]
pub struct Ring {
    state: Mutex<(RingMap, u32)>,
}

impl Ring {
    /// Wraps a freshly mapped ring.
    pub fn new(map: RingMap) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new((map, 0)) })
    }

    /// Marks what the ring holds in the trackers of `slots`. Returns the number of entries taken.
    pub fn collect(&self, slots: &Slots) -> u32 {
        let mut state = self.state.lock();
        let (map, next) = &mut *state;
        let mut taken = 0;
        while let Some((slot, page)) = map.take(*next) {
            // The upper half of the slot number is the address space, of which there is one.
            if let Some(ram) = slots.ram.get((slot & 0xffff) as usize) {
                ram.tracker.set_dirty(page);
            }
            *next = next.wrapping_add(1);
            taken += 1;
        }
        if taken >= map.entries() {
            // KVM keeps some entries free to be able to stop the vCPU in time. If it has used those too, entries
            // may have been overwritten: every page may have been written.
            tracing::warn!("a dirty ring of {taken} entries ran over; all RAM counts as written");
            for ram in &slots.ram {
                (0..ram.pages).for_each(|page| ram.tracker.set_dirty(page));
            }
        }
        taken
    }
}

/// Takes the kernel's bitmaps into the trackers; `manual`: pages are protected again by us.
pub fn collect_bitmaps(vm: &VmFd, slots: &Slots, manual: bool) -> Result<(), AccelError> {
    for ram in &slots.ram {
        let bytes = (ram.pages * PAGE_SIZE) as usize;
        let mut bitmap = vm
            .get_dirty_log(ram.id, bytes)
            .map_err(|e| host("cannot read the dirty log", crate::io_error(e)))?;
        if bitmap.iter().all(|w| *w == 0) {
            continue;
        }
        if manual {
            sys::clear_dirty_log(vm, ram.id, ram.pages, &mut bitmap)
                .map_err(|e| host("cannot clear the dirty log", e))?;
        }
        for (at, word) in (0u64..).zip(&bitmap) {
            let mut word = *word;
            while word != 0 {
                ram.tracker.set_dirty(at * 64 + u64::from(word.trailing_zeros()));
                word &= word - 1;
            }
        }
    }
    Ok(())
}
