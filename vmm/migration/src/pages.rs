//! Which pages of RAM are still to be sent.

use std::io;
use std::os::fd::AsRawFd;

use holdfast_memory::{GuestMemory, GuestRegion, PAGE_SIZE, Tracked};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// Unit in which pages are given to connections, in bytes.
pub const CHUNK: u64 = 256 << 10;

const CHUNK_PAGES: u64 = CHUNK / PAGE_SIZE;

/// A set of pages of a VM's RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    regions: Vec<Region>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Region {
    gpa: u64,
    pages: u64,
    bits: Vec<u64>,
}

/// Adjacent pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes, whole pages.
    pub len: u64,
}

/// The guest-physical start and length of each range of RAM, in bytes.
pub fn ranges(memory: &GuestMemory) -> Vec<(u64, u64)> {
    memory.iter().map(|r| (r.start_addr().raw_value(), r.len())).collect()
}

/// The size of the host's pages behind `region`, in bytes.
pub fn host_page(region: &GuestRegion) -> u64 {
    const HUGETLBFS: u64 = 0x9584_58f6;
    let Some(file) = region.file_offset() else { return PAGE_SIZE };
    // SAFETY: all zeroes is a value of this plain struct.
    let mut info: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the struct is as long as the kernel wants it.
    let rc = unsafe { libc::fstatfs(file.file().as_raw_fd(), &raw mut info) };
    let size = u64::try_from(info.f_bsize).unwrap_or(PAGE_SIZE);
    if rc == 0 && info.f_type as u64 == HUGETLBFS && size.is_power_of_two() {
        size.max(PAGE_SIZE)
    } else {
        PAGE_SIZE
    }
}

/// [`host_page`] of each range of RAM.
pub fn host_pages(memory: &GuestMemory) -> impl Iterator<Item = u64> + '_ {
    memory.iter().map(host_page)
}

impl PageSet {
    /// No page of RAM with these `ranges` (start and length in bytes).
    pub fn empty(ranges: &[(u64, u64)]) -> Self {
        let region = |&(gpa, len): &(u64, u64)| {
            let pages = len / PAGE_SIZE;
            Region { gpa, pages, bits: vec![0; pages.div_ceil(64) as usize] }
        };
        Self { regions: ranges.iter().map(region).collect() }
    }

    /// All pages.
    pub fn full(ranges: &[(u64, u64)]) -> Self {
        let mut set = Self::empty(ranges);
        for region in &mut set.regions {
            region.bits.fill(u64::MAX);
            let rest = region.pages % 64;
            if let (Some(last), true) = (region.bits.last_mut(), rest != 0) {
                *last = (1 << rest) - 1;
            }
        }
        set
    }

    /// Adds the pages that were written since their logs were last taken, and clears the logs.
    pub fn take_dirty(&mut self, memory: &GuestMemory) {
        for (region, ram) in self.regions.iter_mut().zip(memory.iter()) {
            for (word, dirty) in region.bits.iter_mut().zip(ram.bitmap_tracker().take_dirty()) {
                *word |= dirty;
            }
        }
    }

    /// Adds what lies in the same `unit` of its range, in bytes, as a page that is there.
    pub fn widen(&mut self, unit: u64) {
        let words = (unit / PAGE_SIZE / 64) as usize;
        if words == 0 {
            return;
        }
        for region in &mut self.regions {
            let whole = region.pages as usize / 64;
            for words in region.bits.chunks_mut(words).filter(|words| words.iter().any(|word| *word != 0)) {
                words.fill(u64::MAX);
            }
            let rest = region.pages % 64;
            if let (Some(last), true) = (region.bits.get_mut(whole), rest != 0) {
                *last &= (1 << rest) - 1;
            }
        }
    }

    /// How many pages there are.
    pub fn count(&self) -> u64 {
        let ones = |r: &Region| r.bits.iter().map(|w| u64::from(w.count_ones())).sum::<u64>();
        self.regions.iter().map(ones).sum()
    }

    /// Whether the page at `gpa` is there.
    pub fn contains(&self, gpa: u64) -> bool {
        let Some((region, page)) = self.place(gpa) else { return false };
        self.regions[region].bits.get((page / 64) as usize).is_some_and(|w| w >> (page % 64) & 1 != 0)
    }

    fn place(&self, gpa: u64) -> Option<(usize, u64)> {
        let inside = |r: &Region| gpa >= r.gpa && (gpa - r.gpa) / PAGE_SIZE < r.pages;
        let index = self.regions.iter().position(inside)?;
        Some((index, (gpa - self.regions[index].gpa) / PAGE_SIZE))
    }

    /// Whether all of `run` is RAM.
    pub fn covers(&self, run: Run) -> bool {
        let Some((index, first)) = self.place(run.gpa) else { return false };
        self.regions.get(index).is_some_and(|r| run.len / PAGE_SIZE <= r.pages - first)
    }

    /// Adds or takes out the pages of `run`. False if it is not within RAM.
    pub fn set(&mut self, run: Run, there: bool) -> bool {
        let Some((index, first)) = self.place(run.gpa) else { return false };
        let region = &mut self.regions[index];
        let pages = run.len / PAGE_SIZE;
        if pages > region.pages - first {
            return false;
        }
        for page in first..first + pages {
            if let Some(word) = region.bits.get_mut((page / 64) as usize) {
                if there {
                    *word |= 1 << (page % 64);
                } else {
                    *word &= !(1 << (page % 64));
                }
            }
        }
        true
    }

    /// The first run at or behind `gpa`, or, if there is none, the first of all.
    pub fn next_from(&self, gpa: u64) -> Option<Run> {
        let behind = self.regions.iter().filter(|r| r.gpa + r.pages * PAGE_SIZE > gpa);
        let next = |r| RunsOf { region: r, next: gpa.saturating_sub(r.gpa) / PAGE_SIZE }.next();
        behind.map(next).find_map(|run| run).or_else(|| self.runs().next())
    }

    /// The pages of `run` that are there, as runs.
    pub fn within(&self, run: Run) -> Vec<Run> {
        let Some((index, first)) = self.place(run.gpa) else { return Vec::new() };
        let end = run.gpa.saturating_add(run.len);
        let runs = self.regions.get(index).into_iter().flat_map(|region| RunsOf { region, next: first });
        let cut = |found: Run| Run { len: found.len.min(end - found.gpa), ..found };
        runs.take_while(|found| found.gpa < end).map(cut).collect()
    }

    /// The pages in order, in as few runs as there can be; none crosses a range of RAM.
    pub fn joined(&self) -> Vec<Run> {
        let mut all: Vec<Run> = Vec::new();
        for region in &self.regions {
            let begin = all.len();
            for run in (RunsOf { region, next: 0 }) {
                match all.get_mut(begin..).and_then(<[Run]>::last_mut) {
                    Some(last) if last.gpa + last.len == run.gpa => last.len += run.len,
                    _ => all.push(run),
                }
            }
        }
        all
    }

    /// The pages in order, as runs that do not cross [`CHUNK`]s.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.regions.iter().flat_map(|region| RunsOf { region, next: 0 })
    }
}

struct RunsOf<'a> {
    region: &'a Region,
    next: u64,
}

impl RunsOf<'_> {
    fn is_set(&self, page: u64) -> bool {
        self.region.bits.get((page / 64) as usize).is_some_and(|w| w >> (page % 64) & 1 != 0)
    }
}

impl Iterator for RunsOf<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        while self.next < self.region.pages && !self.is_set(self.next) {
            // Empty words are passed over whole.
            let empty =
                self.next.is_multiple_of(64) && self.region.bits.get((self.next / 64) as usize) == Some(&0);
            self.next += if empty { 64 } else { 1 };
        }
        if self.next >= self.region.pages {
            return None;
        }
        let start = self.next;
        let end = ((start / CHUNK_PAGES + 1) * CHUNK_PAGES).min(self.region.pages);
        while self.next < end && self.is_set(self.next) {
            self.next += 1;
        }
        Some(Run { gpa: self.region.gpa + start * PAGE_SIZE, len: (self.next - start) * PAGE_SIZE })
    }
}

/// Starts or ends the log of writes that come through guest memory's door.
pub fn log_writes(memory: &GuestMemory, on: bool) {
    for region in memory.iter() {
        let tracker = region.bitmap_tracker();
        if on {
            tracker.start_log();
        } else {
            tracker.stop_log();
        }
    }
}

/// Whether `page` is all zeroes.
pub fn is_zero(page: &[u8]) -> bool {
    // In lines: the compiler takes several words at once then.
    let (lines, rest) = page.as_chunks::<64>();
    let empty =
        |line: &[u8; 64]| line.as_chunks::<8>().0.iter().fold(0, |all, w| all | u64::from_ne_bytes(*w)) == 0;
    lines.iter().all(empty) && rest.iter().all(|b| *b == 0)
}

/// Reads a list of runs as `Missing` and `Request` frames carry it.
///
/// # Errors
/// `InvalidData` if it is none, or a run is no whole pages.
pub fn decode_runs(bytes: &[u8]) -> io::Result<Vec<Run>> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "a list of pages that is none");
    let (items, rest) = bytes.as_chunks::<16>();
    if !rest.is_empty() {
        return Err(wrong());
    }
    let long = |half: &[u8]| half.iter().rev().fold(0, |all, b| all << 8 | u64::from(*b));
    let run = |item: &[u8; 16]| {
        let run = Run { gpa: long(&item[..8]), len: long(&item[8..]) };
        let whole = run.gpa.is_multiple_of(PAGE_SIZE) && run.len.is_multiple_of(PAGE_SIZE) && run.len > 0;
        if whole { Ok(run) } else { Err(wrong()) }
    };
    items.iter().map(run).collect()
}

/// Writes one.
pub fn encode_runs(runs: impl IntoIterator<Item = Run>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for run in runs {
        bytes.extend_from_slice(&run.gpa.to_le_bytes());
        bytes.extend_from_slice(&run.len.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: [(u64, u64); 2] = [(0x1000, 0x3000), (1 << 32, 70 * PAGE_SIZE)];

    #[test]
    fn runs_are_whole_and_within_chunks() {
        let full = PageSet::full(&RAM);
        assert_eq!(full.count(), 73);
        let runs: Vec<_> = full.runs().collect();
        assert_eq!(runs[0], Run { gpa: 0x1000, len: 0x3000 });
        assert_eq!(runs[1], Run { gpa: 1 << 32, len: 64 * PAGE_SIZE });
        assert_eq!(runs[2], Run { gpa: (1 << 32) + 64 * PAGE_SIZE, len: 6 * PAGE_SIZE });
        assert_eq!(runs.len(), 3);
        assert_eq!(full.joined().iter().map(|run| run.len / PAGE_SIZE).collect::<Vec<_>>(), [3, 70]);
        let mut some = PageSet::empty(&RAM);
        assert!(some.set(Run { gpa: (1 << 32) + 65 * PAGE_SIZE, len: PAGE_SIZE }, true));
        assert!(some.contains((1 << 32) + 65 * PAGE_SIZE + 5) && !some.contains(0x1000));
        assert!(!some.set(Run { gpa: 0x3000, len: 2 * PAGE_SIZE }, true), "beyond the range");
        assert_eq!(some.runs().collect::<Vec<_>>().len(), 1);
        assert_eq!(decode_runs(&encode_runs(full.runs())).expect("ours"), runs);
        let mut wide = some.clone();
        wide.widen(PAGE_SIZE);
        assert_eq!(wide, some);
        wide.widen(64 * PAGE_SIZE);
        assert_eq!(
            wide.runs().collect::<Vec<_>>(),
            [Run { gpa: (1 << 32) + 64 * PAGE_SIZE, len: 6 * PAGE_SIZE }]
        );
        wide.widen(128 * PAGE_SIZE);
        assert_eq!(wide.count(), 70);
        let page = |n: u64| (1 << 32) + n * PAGE_SIZE;
        assert_eq!(full.next_from(page(3)), Some(Run { gpa: page(3), len: 61 * PAGE_SIZE }));
        assert_eq!(full.next_from(page(70)).map(|run| run.gpa), Some(0x1000), "from the start again");
        assert_eq!(full.next_from(0x4000).map(|run| run.gpa), Some(page(0)), "between ranges");
        let window = Run { gpa: page(60), len: 8 * PAGE_SIZE };
        assert_eq!(full.within(window).iter().map(|run| run.len / PAGE_SIZE).collect::<Vec<_>>(), [4, 4]);
        assert_eq!(some.within(window), [Run { gpa: page(65), len: PAGE_SIZE }]);
        assert_eq!(some.within(Run { gpa: page(66), len: PAGE_SIZE }), []);
        decode_runs(&[0; 15]).expect_err("cut");
        decode_runs(&[1; 16]).expect_err("no whole pages");
    }
}
