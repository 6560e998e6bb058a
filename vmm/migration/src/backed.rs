//! What the host has memory for. RAM that it has none for is zeroes, and need not be looked at.

use std::fs::File;
use std::os::unix::fs::FileExt;

use holdfast_memory::{GuestMemory, GuestRegion, PAGE_SIZE, Tracked};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::pages::Run;

/// A page is in memory, or has been swapped out: bits of an entry of `/proc/PID/pagemap` (Linux, admin-guide/mm/pagemap).
const KNOWN: u64 = 1 << 63 | 1 << 62;

/// Bytes of such an entry.
const ENTRY: usize = 8;

/// Pages that one question is about at most: the bits of the answer.
pub(crate) const AT_ONCE: u64 = 64;

/// The same where all of RAM is asked for.
const MANY: u64 = 8192;

/// Whom to ask.
#[derive(Debug)]
pub(crate) struct Backed(Option<File>);

impl Backed {
    /// This process. Where the host does not tell, everything counts as backed.
    pub(crate) fn new() -> Self {
        Self(File::open("/proc/self/pagemap").ok())
    }

    /// Whether the host knows anything of the pages of `region` from number `first` on, as many as have room in `entries`.
    fn known<'a>(
        &self,
        region: &GuestRegion,
        first: u64,
        entries: &'a mut [u8],
    ) -> Option<impl Iterator<Item = bool> + use<'a>> {
        // Shared RAM may be others' as well, or be swapped out unseen.
        let own = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
        let file = self.0.as_ref().filter(|_| region.flags() & own == own)?;
        let start = region.get_host_address(MemoryRegionAddress(0)).ok()? as u64 / PAGE_SIZE;
        file.read_exact_at(entries, (start + first) * ENTRY as u64).ok()?;
        Some(entries.as_chunks::<ENTRY>().0.iter().map(|entry| u64::from_ne_bytes(*entry) & KNOWN != 0))
    }

    /// Marks in the logs of `memory`, which are on, the pages that may hold something: the others are zeroes until they are written,
    /// which their logs tell.
    pub(crate) fn mark(&self, memory: &GuestMemory) {
        let mut buffer = vec![0; MANY as usize * ENTRY];
        for region in memory.iter() {
            let (tracker, pages) = (region.bitmap_tracker(), region.len() / PAGE_SIZE);
            for first in (0..pages).step_by(MANY as usize) {
                let count = (pages - first).min(MANY);
                let Some(entries) = buffer.get_mut(..count as usize * ENTRY) else { continue };
                match self.known(region, first, entries) {
                    Some(known) => {
                        let there = (first..).zip(known).filter(|(_, known)| *known);
                        there.for_each(|(page, _)| tracker.set_dirty(page));
                    }
                    None => (first..first + count).for_each(|page| tracker.set_dirty(page)),
                }
            }
        }
    }
}

/// Pages of which a [`Window`] knows.
const WIDTH: u64 = 8 * AT_ONCE;

/// What [`Backed`] says of neighbouring pages, asked for together: for one that goes through RAM in order.
#[derive(Debug)]
pub(crate) struct Window {
    backed: Backed,
    /// The guest-physical address of the first.
    start: u64,
    /// How many there are.
    pages: u64,
    bits: [u64; (WIDTH / AT_ONCE) as usize],
}

impl Default for Window {
    fn default() -> Self {
        Self { backed: Backed::new(), start: 0, pages: 0, bits: Default::default() }
    }
}

impl Window {
    /// Which of the pages of `run`, of which the first [`AT_ONCE`] are looked at, may hold something other than zeroes; bit 0 is the first.
    /// What is written after the last [`Window::forget`] may not be told. All of them where that is not known, as for RAM in a file, which others may have mapped too.
    pub(crate) fn pages(&mut self, memory: &GuestMemory, run: Run) -> u64 {
        let count = (run.len / PAGE_SIZE).min(AT_ONCE);
        if !self.knows(run.gpa, count) && !self.look(memory, run) {
            return u64::MAX;
        }
        let first = (run.gpa - self.start) / PAGE_SIZE;
        let word = |n: u64| self.bits.get(n as usize).copied().unwrap_or(u64::MAX);
        let (index, shift) = (first / 64, first % 64);
        let behind = if shift == 0 { 0 } else { word(index + 1) << (64 - shift) };
        word(index) >> shift | behind
    }

    fn knows(&self, gpa: u64, count: u64) -> bool {
        gpa.checked_sub(self.start).is_some_and(|offset| offset / PAGE_SIZE + count <= self.pages)
    }

    /// Asks about the pages from `run` on.
    fn look(&mut self, memory: &GuestMemory, run: Run) -> bool {
        self.forget();
        let Some(region) = memory.find_region(GuestAddress(run.gpa)) else { return false };
        let first = (run.gpa - region.start_addr().raw_value()) / PAGE_SIZE;
        let count = WIDTH.min((region.len() / PAGE_SIZE).saturating_sub(first));
        let mut entries = [0; WIDTH as usize * ENTRY];
        let entries = entries.get_mut(..count as usize * ENTRY);
        let Some(known) = entries.and_then(|entries| self.backed.known(region, first, entries)) else {
            return false;
        };
        let mut bits = [0; (WIDTH / AT_ONCE) as usize];
        for (n, known) in known.enumerate() {
            if let Some(word) = bits.get_mut(n / 64) {
                *word |= u64::from(known) << (n % 64);
            }
        }
        (self.start, self.pages, self.bits) = (run.gpa, count, bits);
        run.len / PAGE_SIZE <= count
    }

    /// What is asked for next is looked for anew.
    pub(crate) fn forget(&mut self) {
        self.pages = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::log_writes;
    use vm_memory::Bytes;

    const BASE: u64 = 0x8000_0000;

    #[test]
    fn only_what_was_never_written_is_left_out() {
        let len = 100 * PAGE_SIZE;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(BASE), len as usize)]).expect("RAM");
        for page in [1, 63, 70] {
            memory.write_obj(7_u8, GuestAddress(BASE + page * PAGE_SIZE)).expect("RAM");
        }
        let all = Run { gpa: BASE, len };
        let mut backed = Window::default();
        if backed.backed.0.is_some() {
            let fresh = GuestMemory::from_ranges(&[(GuestAddress(BASE), len as usize)]).expect("RAM");
            assert_eq!(backed.pages(&fresh, all), 0);
            fresh.write_obj(7_u8, GuestAddress(BASE + 80 * PAGE_SIZE)).expect("RAM");
            let late = Run { gpa: BASE + 70 * PAGE_SIZE, len: 30 * PAGE_SIZE };
            assert_eq!(backed.pages(&fresh, late), 0, "the log of writes has it");
            backed.forget();
            assert_ne!(backed.pages(&fresh, late) & 1 << 10, 0);
            let fresh = GuestMemory::from_ranges(&[(GuestAddress(BASE), len as usize)]).expect("RAM");
            backed.forget();
            log_writes(&fresh, true);
            Backed::new().mark(&fresh);
            let (tracker, _) = holdfast_memory::tracker_at(&fresh, BASE).expect("RAM");
            assert!(!(0..100).any(|page| tracker.is_dirty(page)));
        }
        backed.forget();
        let there = backed.pages(&memory, all);
        assert_eq!(there & (1 << 1 | 1 << 63), 1 << 1 | 1 << 63, "{there:#x}");
        let end = Run { gpa: BASE + 64 * PAGE_SIZE, len: 36 * PAGE_SIZE };
        assert_ne!(backed.pages(&memory, end) & 1 << 6, 0);
        let across = Run { gpa: BASE + 10 * PAGE_SIZE, len: 64 * PAGE_SIZE };
        let there = backed.pages(&memory, across);
        assert_eq!(there & (1 << 53 | 1 << 60), 1 << 53 | 1 << 60, "{there:#x}");
        // Where nobody tells, and outside of RAM.
        assert_eq!(Window { backed: Backed(None), ..Window::default() }.pages(&memory, all), u64::MAX);
        assert_eq!(backed.pages(&memory, Run { gpa: 0, len: PAGE_SIZE }), u64::MAX);

        log_writes(&memory, true);
        Backed::new().mark(&memory);
        let (tracker, _) = holdfast_memory::tracker_at(&memory, BASE).expect("RAM");
        assert!([1, 63, 70].into_iter().all(|page| tracker.is_dirty(page)));
        log_writes(&memory, true);
        Backed(None).mark(&memory);
        assert!((0..100).all(|page| tracker.is_dirty(page)));
    }
}
