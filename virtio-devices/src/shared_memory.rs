//! Memory that a device shows to its driver beside RAM (virtio 1.2 section 2.10), in a BAR of its own.
//!
//! Files are mapped into it, piece by piece, on a back end's request. Where there is none, reads give zeroes and writes
//! go nowhere, as in any BAR. Descriptors cannot name it: queues work on RAM.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, OnceLock};

use holdfast_device::MemoryWindows;
use holdfast_memory::{GuestRegion, PAGE_SIZE};
use parking_lot::Mutex;
use rustix::fs::FileType;
use serde::{Deserialize, Serialize};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::transport::vhost_user::bus_error::{self, Watched};

/// Pieces that may be mapped at once: each takes a memory slot of the accelerator.
const MAX_PARTS: usize = 256;
/// Bytes of all regions together.
const MAX_LEN: u64 = 1 << 36;
/// What regions are aligned to: a huge page.
const ALIGN: u64 = 2 << 20;

/// A region as the driver finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedRegion {
    /// Its number, by which the type of the device gives it a meaning.
    pub id: u8,
    /// Where in the BAR it begins.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// Where in a region something is to be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The region's number.
    pub id: u8,
    /// Offset in the region in bytes, a multiple of the page size.
    pub offset: u64,
    /// Length in bytes, a multiple of the page size.
    pub len: u64,
}

/// A file in the guest's sight.
#[derive(Debug)]
struct Part {
    /// Before the mapping that it watches.
    _watched: Watched,
    region: Arc<GuestRegion>,
    writable: bool,
}

#[derive(Debug, Default)]
struct State {
    /// Where the BAR is, if it is anywhere.
    base: Option<u64>,
    /// By the offset in the BAR.
    parts: BTreeMap<u64, Part>,
}

/// All regions of one device.
#[derive(Debug)]
pub struct SharedMemory {
    windows: Arc<dyn MemoryWindows>,
    /// Rung when a file that is mapped was shortened.
    alarm: Arc<EventFd>,
    /// Fixed when the first back end has said it.
    layout: OnceLock<Vec<SharedRegion>>,
    state: Mutex<State>,
}

fn wrong(what: &'static str) -> io::Error {
    tracing::debug!(what, "a request for shared memory is refused");
    rustix::io::Errno::INVAL.into()
}

/// The regions for sizes by number, of which 0 is none.
fn lay_out(sizes: &[u64]) -> Result<Vec<SharedRegion>, String> {
    let (mut regions, mut end) = (Vec::new(), 0_u64);
    for (id, len) in sizes.iter().copied().enumerate().filter(|(_, len)| *len != 0) {
        let id = u8::try_from(id).map_err(|_| "there are more than 256 regions".to_owned())?;
        if !len.is_multiple_of(PAGE_SIZE) || len > MAX_LEN {
            return Err(format!(
                "region {id} has {len:#x} bytes: no whole number of pages, or more than {MAX_LEN:#x}"
            ));
        }
        let offset = end.next_multiple_of(ALIGN);
        end = offset + len;
        if end > MAX_LEN {
            return Err(format!("the regions are longer than {MAX_LEN:#x} bytes together"));
        }
        regions.push(SharedRegion { id, offset, len });
    }
    Ok(regions)
}

impl SharedMemory {
    /// Nothing yet. What is mapped is shown by `windows`.
    ///
    /// # Errors
    /// The host's.
    pub fn new(windows: &Arc<dyn MemoryWindows>) -> io::Result<Arc<Self>> {
        bus_error::catch()?;
        let alarm = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let windows = Arc::clone(windows);
        Ok(Arc::new(Self { windows, alarm, layout: OnceLock::new(), state: Mutex::default() }))
    }

    /// A back end has regions of these sizes, by their numbers; 0 is none.
    ///
    /// # Errors
    /// What is wrong with them, or that its predecessor had others.
    pub(crate) fn agree(&self, sizes: &[u64]) -> Result<(), String> {
        let regions = lay_out(sizes)?;
        if self.layout.get_or_init(|| regions.clone()) != &regions {
            return Err("it has others than its predecessor".to_owned());
        }
        Ok(())
    }

    /// The regions, in the order of their numbers.
    pub fn regions(&self) -> &[SharedRegion] {
        self.layout.get().map_or(&[], Vec::as_slice)
    }

    /// The size of the BAR that holds them, a power of two; `None` if there are none.
    pub fn bar_len(&self) -> Option<u64> {
        let last = self.regions().last()?;
        Some((last.offset + last.len).next_power_of_two())
    }

    /// Whether files are mapped.
    pub fn is_used(&self) -> bool {
        !self.state.lock().parts.is_empty()
    }

    /// Where `place` is in the BAR.
    fn in_bar(&self, place: Place) -> io::Result<u64> {
        let Place { id, offset, len } = place;
        let region = self.regions().iter().find(|region| region.id == id);
        let region = region.ok_or_else(|| wrong("there is no such region"))?;
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) || !offset.is_multiple_of(PAGE_SIZE) {
            return Err(wrong("it is no whole number of pages"));
        }
        if offset.checked_add(len).is_none_or(|end| end > region.len) {
            return Err(wrong("it is outside of its region"));
        }
        Ok(region.offset + offset)
    }

    /// Maps `file` from `start` on.
    ///
    /// # Errors
    /// `EINVAL` if it is not within a region and a multiple of the page size, if something is mapped there, if the file
    /// is shorter or may not be mapped so; `ENOSPC` if too much is mapped.
    pub(crate) fn map(&self, place: Place, (file, start): (File, u64), writable: bool) -> io::Result<()> {
        let at = self.in_bar(place)?;
        if !start.is_multiple_of(PAGE_SIZE) {
            return Err(wrong("the file's part does not begin at a page"));
        }
        let mut state = self.state.lock();
        let before = state.parts.range(..at + place.len).next_back();
        if before.is_some_and(|(offset, part)| offset + part.region.len() > at) {
            return Err(wrong("something is mapped there"));
        }
        let full = || io::Error::from(rustix::io::Errno::NOSPC);
        if state.parts.len() >= MAX_PARTS {
            return Err(full());
        }
        // Back ends' threads may not ask in the standard library's way (`statx`).
        let data = rustix::fs::fstat(&file)?;
        let file_len = u64::try_from(data.st_size).unwrap_or_default();
        let is_file = FileType::from_raw_mode(data.st_mode).is_file();
        if !is_file || start.checked_add(place.len).is_none_or(|end| end > file_len) {
            return Err(wrong("the file is shorter, or of no length"));
        }
        let len = usize::try_from(place.len).map_err(|_| wrong("it is longer than the address space"))?;
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let mapping =
            MmapRegion::build(Some(FileOffset::new(file, start)), len, protection, libc::MAP_SHARED)
                .map_err(|_| wrong("the file cannot be mapped so"))?;
        let watched = Watched::new(mapping.as_ptr() as usize, len, &self.alarm).ok_or_else(full)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(0)).ok_or_else(|| wrong("it is too long"))?;
        let part = Part { _watched: watched, region: Arc::new(region), writable };
        if let Some(base) = state.base {
            self.windows.show(base + at, &part.region, writable)?;
        }
        state.parts.insert(at, part);
        Ok(())
    }

    /// Takes away what [`SharedMemory::map`] has mapped at this very place.
    ///
    /// # Errors
    /// `EINVAL` if nothing is mapped there, or something else.
    pub(crate) fn unmap(&self, place: Place) -> io::Result<()> {
        let at = self.in_bar(place)?;
        let mut state = self.state.lock();
        if state.parts.get(&at).is_none_or(|part| part.region.len() != place.len) {
            return Err(wrong("no such thing is mapped there"));
        }
        if let Some(base) = state.base {
            self.windows.hide(base + at);
        }
        state.parts.remove(&at);
        Ok(())
    }

    /// Takes everything away.
    pub(crate) fn clear(&self) {
        let mut state = self.state.lock();
        for at in std::mem::take(&mut state.parts).into_keys() {
            if let Some(base) = state.base {
                self.windows.hide(base + at);
            }
        }
    }

    /// The BAR is decoded at `base` from now on, or nowhere.
    pub(crate) fn move_to(&self, base: Option<u64>) {
        let mut state = self.state.lock();
        let old = std::mem::replace(&mut state.base, base);
        for (at, part) in &state.parts {
            if let Some(old) = old {
                self.windows.hide(old + at);
            }
            if let Some(new) = base
                && let Err(error) = self.windows.show(new + at, &part.region, part.writable)
            {
                tracing::error!(%error, "a device's shared memory cannot be shown at {new:#x}");
            }
        }
    }

    /// Whether a file that is mapped was shortened since this was last asked: the guest sees zeroes in its place.
    pub(crate) fn was_shortened(&self) -> bool {
        self.alarm.read().is_ok()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Shown;
    use std::io::Write;
    use vm_memory::{Bytes, MemoryRegionAddress};

    fn file(len: u64) -> File {
        let mut file = tempfile::tempfile().expect("file");
        file.set_len(len).and_then(|()| file.write_all(b"of the host")).expect("written");
        file
    }

    fn shared() -> (Arc<SharedMemory>, Arc<Shown>) {
        let shown = Arc::new(Shown::default());
        let windows: Arc<dyn MemoryWindows> = Arc::clone(&shown) as _;
        let shared = SharedMemory::new(&windows).expect("an eventfd");
        shared.agree(&[0, 0x4000, 0x30_0000]).expect("regions");
        (shared, shown)
    }

    #[test]
    fn regions_are_laid_out_and_stay() {
        let (shared, _) = shared();
        let region = |id, offset, len| SharedRegion { id, offset, len };
        assert_eq!(shared.regions(), [region(1, 0, 0x4000), region(2, 2 << 20, 0x30_0000)]);
        assert_eq!(shared.bar_len(), Some(8 << 20));
        shared.agree(&[0, 0x4000, 0x30_0000, 0]).expect("the same");
        assert!(shared.agree(&[]).is_err() && shared.agree(&[0x4000]).is_err());
        for bad in [&[1][..], &[MAX_LEN + 0x1000], &[MAX_LEN, 0x1000], &[!0xfff]] {
            assert!(lay_out(bad).is_err(), "{bad:x?}");
        }
    }

    #[test]
    fn what_is_mapped_is_shown_where_the_bar_is() {
        let (shared, shown) = shared();
        let place = Place { id: 2, offset: 0x1000, len: 0x2000 };
        shared.map(place, (file(0x3000), 0), true).expect("mapped");
        assert!(shown.list().is_empty() && shared.is_used());
        shared.move_to(Some(0x1_0000_0000));
        let at = 0x1_0000_0000 + (2 << 20) + 0x1000;
        assert_eq!(shown.list(), [(at, 0x2000, true)]);
        shared.map(Place { id: 1, offset: 0, len: 0x1000 }, (file(0x2000), 0x1000), false).expect("mapped");
        assert_eq!(shown.list(), [(0x1_0000_0000, 0x1000, false), (at, 0x2000, true)]);
        let mut text = [0; 11];
        let region = shown.region(at).expect("shown");
        region.read_slice(&mut text, MemoryRegionAddress(0)).expect("read");
        assert_eq!(&text, b"of the host");
        shared.move_to(Some(0x2_0000_0000));
        assert_eq!(shown.list()[0], (0x2_0000_0000, 0x1000, false));
        shared.unmap(place).expect("unmapped");
        assert_eq!(shown.list().len(), 1);
        shared.clear();
        assert!(shown.list().is_empty() && !shared.is_used());
    }

    #[test]
    fn hostile_requests_are_refused() {
        let (shared, shown) = shared();
        shared.move_to(Some(0));
        let good = Place { id: 1, offset: 0x1000, len: 0x2000 };
        shared.map(good, (file(0x2000), 0), true).expect("mapped");
        let bad = [
            Place { id: 0, ..good },
            Place { id: 9, ..good },
            Place { offset: 0x4000, len: 0x1000, ..good },
            Place { offset: 0x3000, len: 0x2000, ..good },
            Place { offset: !0xfff, ..good },
            Place { offset: 0x3000, len: 0x800, ..good },
            Place { offset: 0x3800, len: 0x1000, ..good },
            Place { offset: 0x3000, len: 0, ..good },
            // What is there already: the same, its beginning, its end, all around it.
            good,
            Place { offset: 0, ..good },
            Place { offset: 0x2000, ..good },
            Place { offset: 0, len: 0x4000, ..good },
        ];
        for place in bad {
            let error = shared.map(place, (file(0x10_0000), 0), true).expect_err("refused");
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{place:?}");
            assert!(place == good || shared.unmap(place).is_err(), "{place:?}");
        }
        let free = Place { offset: 0x3000, len: 0x1000, ..good };
        assert!(shared.map(free, (file(0x800), 0), true).is_err(), "the file is shorter");
        assert!(shared.map(free, (file(0x4000), 0x4000), true).is_err(), "it ends there");
        assert!(shared.map(free, (file(0x4000), 0x800), true).is_err(), "no page begins there");
        assert!(shared.map(free, (file(0x4000), !0xfff), true).is_err(), "nor there");
        let null = File::open("/dev/null").expect("a file");
        assert!(shared.map(free, (null, 0), false).is_err(), "it has no contents");
        assert_eq!(shown.list(), [(0x1000, 0x2000, true)]);
    }

    #[test]
    fn a_file_that_is_shortened_reads_as_zeroes() {
        let (shared, shown) = shared();
        shared.move_to(Some(0));
        let long = file(0x1000);
        let place = Place { id: 1, offset: 0, len: 0x1000 };
        shared.map(place, (long.try_clone().expect("a descriptor"), 0), true).expect("mapped");
        assert!(!shared.was_shortened());
        long.set_len(0).expect("shorter");
        let region = shown.region(0).expect("shown");
        assert_eq!(region.read_obj::<u64>(MemoryRegionAddress(0)).expect("read"), 0);
        assert!(shared.was_shortened() && !shared.was_shortened());
    }
}
