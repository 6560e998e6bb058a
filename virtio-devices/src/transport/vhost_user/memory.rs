//! The guest's RAM as its front end shares it.

use std::fs::File;
use std::sync::Arc;

use super::bus_error::Watched;
use holdfast_memory::{GuestMemory, GuestRegion, RamTracker};
use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserSingleMemoryRegion};
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

/// Most regions that a front end may add one by one.
pub(super) const MAX_REGIONS: usize = 64;

/// A memory table that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    #[error("a region of {len:#x} bytes at {gpa:#x} is not whole in its file of {file:#x} bytes")]
    File { gpa: u64, len: u64, file: u64 },
    #[error("a region of {len:#x} bytes at {gpa:#x} cannot be mapped")]
    Map { gpa: u64, len: u64, source: std::io::Error },
    #[error("the regions overlap or there are too many")]
    Layout,
    #[error("there is no region of {len:#x} bytes at {gpa:#x}")]
    Missing { gpa: u64, len: u64 },
}

/// Where a region is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    gpa: u64,
    len: u64,
    /// Its address in the front end.
    user: u64,
    /// Where in the file it begins.
    offset: u64,
}

impl From<&VhostUserMemoryRegion> for Range {
    fn from(region: &VhostUserMemoryRegion) -> Self {
        Self {
            gpa: region.guest_phys_addr,
            len: region.memory_size,
            user: region.user_addr,
            offset: region.mmap_offset,
        }
    }
}

impl From<&VhostUserSingleMemoryRegion> for Range {
    fn from(region: &VhostUserSingleMemoryRegion) -> Self {
        Self {
            gpa: region.guest_phys_addr,
            len: region.memory_size,
            user: region.user_addr,
            offset: region.mmap_offset,
        }
    }
}

/// A region, which is watched for as long as it is mapped.
#[derive(Debug, Clone)]
struct Part {
    range: Range,
    // Goes before the mapping does.
    _watched: Arc<Watched>,
    region: Arc<GuestRegion>,
}

/// All regions.
#[derive(Debug, Default)]
pub(super) struct SharedRam {
    parts: Vec<Part>,
    memory: GuestMemory,
}

impl SharedRam {
    /// RAM made of `ranges`.
    pub(super) fn new(
        ranges: impl Iterator<Item = (Range, File)>,
        alarm: &Arc<EventFd>,
    ) -> Result<Self, MemoryError> {
        let mut parts = Vec::new();
        for (range, file) in ranges {
            parts.push(map(range, file, alarm)?);
        }
        Self::of(parts)
    }

    fn of(mut parts: Vec<Part>) -> Result<Self, MemoryError> {
        if parts.len() > MAX_REGIONS {
            return Err(MemoryError::Layout);
        }
        parts.sort_by_key(|part| part.range.gpa);
        let regions: Vec<_> = parts.iter().map(|part| Arc::clone(&part.region)).collect();
        let memory = match regions.is_empty() {
            true => GuestMemory::new(),
            false => GuestMemory::from_arc_regions(regions).map_err(|_| MemoryError::Layout)?,
        };
        Ok(Self { parts, memory })
    }

    /// This RAM and one region more.
    pub(super) fn with(&self, range: Range, file: File, alarm: &Arc<EventFd>) -> Result<Self, MemoryError> {
        let mut parts = self.parts.clone();
        parts.push(map(range, file, alarm)?);
        Self::of(parts)
    }

    /// This RAM without a region.
    pub(super) fn without(&self, range: Range) -> Result<Self, MemoryError> {
        let mut parts = self.parts.clone();
        let same = |r: &Range| (r.gpa, r.len, r.user) == (range.gpa, range.len, range.user);
        let at = parts.iter().position(|part| same(&part.range));
        let at = at.ok_or(MemoryError::Missing { gpa: range.gpa, len: range.len })?;
        parts.remove(at);
        Self::of(parts)
    }

    /// What devices work on.
    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(super) fn is_empty(&self) -> bool {
        self.memory.num_regions() == 0
    }

    /// The guest-physical address of an address in the front end.
    pub(super) fn guest_address(&self, user: u64) -> Option<u64> {
        self.parts.iter().map(|part| &part.range).find_map(|range| {
            let offset = user.checked_sub(range.user).filter(|offset| *offset < range.len)?;
            range.gpa.checked_add(offset)
        })
    }
}

fn map(range: Range, file: File, alarm: &Arc<EventFd>) -> Result<Part, MemoryError> {
    let Range { gpa, len, offset, .. } = range;
    let failed = |source| MemoryError::Map { gpa, len, source };
    // What lies behind a file's end cannot be touched. (A front end that shortens the file later loses its connection.)
    let size = rustix::fs::fstat(&file).map_err(|e| failed(e.into()))?.st_size;
    let size = u64::try_from(size).unwrap_or(0);
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(MemoryError::File { gpa, len, file: size });
    }
    let bytes = usize::try_from(len).map_err(|_| MemoryError::Layout)?;
    let region = MmapRegionBuilder::new_with_bitmap(bytes, RamTracker::with_len(bytes))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file, offset))
        .build()
        .map_err(|e| failed(std::io::Error::other(e.to_string())))?;
    let watched = Watched::new(region.as_ptr() as usize, bytes, alarm).ok_or(MemoryError::Layout)?;
    let region = GuestRegion::new(region, GuestAddress(gpa)).ok_or(MemoryError::Layout)?;
    Ok(Part { range, _watched: Arc::new(watched), region: Arc::new(region) })
}
