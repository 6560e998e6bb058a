//! Guest RAM: how the host provides it.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

use holdfast_machines::RamRange;
use holdfast_memory::{GuestMemory, GuestRegion, RamTracker};
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress};

/// How RAM is backed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamSpec {
    /// In a memfd that other processes may map (vhost-user).
    pub shared: bool,
    /// From the host's reserved huge pages.
    pub hugepages: bool,
    /// Size of those pages in bytes; `None` for the host's default.
    pub hugepage_size: Option<u64>,
    /// All pages are made present at once.
    pub prefault: bool,
    /// Transparent huge pages are asked for.
    pub thp: bool,
    /// The host may merge equal pages (KSM).
    pub mergeable: bool,
}

/// RAM that the host does not provide.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The page size is impossible.
    #[error("memory: hugepage_size={0} is not a power of two of at least 4096")]
    HugepageSize(u64),
    /// The size does not fit the pages.
    #[error("memory: {len} bytes at {gpa:#x} are not whole huge pages of {page} bytes")]
    Alignment {
        /// Start of the range.
        gpa: u64,
        /// Its length.
        len: u64,
        /// The page size.
        page: u64,
    },
    /// The host refuses.
    #[error("memory: {what} of {len} bytes at {gpa:#x}")]
    Host {
        /// The operation.
        what: &'static str,
        /// Start of the range.
        gpa: u64,
        /// Its length.
        len: u64,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The ranges collide, or are too long to map.
    #[error("memory: {0}")]
    Layout(String),
}

/// The default size of the host's reserved huge pages on x86-64 and riscv64.
const DEFAULT_HUGEPAGE: u64 = 2 << 20;

/// Maps RAM for `ranges`.
///
/// # Errors
/// [`RamError`].
pub fn allocate(ranges: &[RamRange], spec: &RamSpec) -> Result<GuestMemory, RamError> {
    allocate_on(ranges, spec, Vec::new())
}

/// As [`allocate`]; if there are `files`, they are the RAM, a file for each range.
///
/// # Errors
/// [`RamError`], also if their number or lengths are not those of the ranges.
pub fn allocate_on(ranges: &[RamRange], spec: &RamSpec, files: Vec<File>) -> Result<GuestMemory, RamError> {
    if !files.is_empty() && files.len() != ranges.len() {
        let text = format!("{} files came for {} ranges", files.len(), ranges.len());
        return Err(RamError::Layout(text));
    }
    let mut files = files.into_iter();
    let regions: Result<Vec<_>, _> =
        ranges.iter().map(|range| map_range(range, spec, files.next())).collect();
    GuestMemory::from_regions(regions?).map_err(|e| RamError::Layout(e.to_string()))
}

fn map_range(range: &RamRange, spec: &RamSpec, given: Option<File>) -> Result<GuestRegion, RamError> {
    let RamRange { gpa, len } = *range;
    let host = |what, source| RamError::Host { what, gpa, len, source };
    let size = usize::try_from(len).map_err(|_| RamError::Layout(format!("{len} bytes cannot be mapped")))?;
    let mut flags = libc::MAP_NORESERVE;
    let mut builder = MmapRegionBuilder::new_with_bitmap(size, RamTracker::with_len(size))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_hugetlbfs(spec.hugepages);
    if spec.shared || spec.hugepages {
        let page = spec.hugepage_size.unwrap_or(DEFAULT_HUGEPAGE);
        if spec.hugepages {
            check_hugepages(range, page)?;
        }
        let file = match given {
            Some(file) => {
                let found = file.metadata().map_err(|e| host("the size of a file for RAM", e))?.len();
                if found != len || !spec.shared {
                    return Err(RamError::Layout(format!("a file of {found} bytes cannot be RAM of {len}")));
                }
                file
            }
            None => memfd(len, spec.hugepages.then_some(page)).map_err(|e| host("memfd", e))?,
        };
        builder = builder.with_file_offset(FileOffset::new(file, 0));
        flags |= if spec.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    } else {
        flags |= libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    }
    let region = builder
        .with_mmap_flags(flags)
        .build()
        .map_err(|e| host("mapping", io::Error::other(e.to_string())))?;
    advise(&region, spec).map_err(|(what, e)| host(what, e))?;
    GuestRegion::new(region, GuestAddress(gpa))
        .ok_or_else(|| RamError::Layout(format!("{gpa:#x}+{len:#x} wraps")))
}

fn check_hugepages(range: &RamRange, page: u64) -> Result<(), RamError> {
    if !page.is_power_of_two() || page < 4096 {
        return Err(RamError::HugepageSize(page));
    }
    if !range.len.is_multiple_of(page) {
        return Err(RamError::Alignment { gpa: range.gpa, len: range.len, page });
    }
    Ok(())
}

fn memfd(len: u64, hugepage: Option<u64>) -> io::Result<File> {
    let mut flags = libc::MFD_CLOEXEC;
    if let Some(page) = hugepage {
        flags |= libc::MFD_HUGETLB | (page.trailing_zeros() << libc::MFD_HUGE_SHIFT);
    }
    // SAFETY: the name is a NUL-terminated literal and the flags are valid for memfd_create.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just created and is owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    Ok(file)
}

fn advise(
    region: &vm_memory::MmapRegion<RamTracker>,
    spec: &RamSpec,
) -> Result<(), (&'static str, io::Error)> {
    let advice = [
        (spec.thp && !spec.hugepages, libc::MADV_HUGEPAGE, "transparent huge pages"),
        (spec.mergeable, libc::MADV_MERGEABLE, "merging equal pages"),
        (spec.prefault, libc::MADV_POPULATE_WRITE, "making all pages present"),
        (true, libc::MADV_DONTFORK, "keeping RAM from child processes"),
    ];
    for (wanted, advice, what) in advice {
        if !wanted {
            continue;
        }
        // SAFETY: the range is the mapping that `region` owns; these kinds of advice keep its contents.
        let rc = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
        if rc != 0 {
            let error = io::Error::last_os_error();
            // A host kernel without transparent huge pages is slower, not wrong.
            if advice == libc::MADV_HUGEPAGE {
                tracing::info!(%error, "no transparent huge pages for guest RAM");
                continue;
            }
            return Err((what, error));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    const SPEC: RamSpec = RamSpec {
        shared: false,
        hugepages: false,
        hugepage_size: None,
        prefault: false,
        thp: true,
        mergeable: false,
    };

    #[test]
    fn private_and_shared_ram_hold_what_is_written() {
        for shared in [false, true] {
            let ranges = [RamRange { gpa: 0, len: 1 << 20 }, RamRange { gpa: 1 << 32, len: 1 << 20 }];
            let memory = allocate(&ranges, &RamSpec { shared, prefault: shared, ..SPEC }).expect("RAM");
            memory.write_obj(0x1234_5678_u32, GuestAddress((1 << 32) + 0x1000)).expect("in RAM");
            assert_eq!(
                memory.read_obj::<u32>(GuestAddress((1 << 32) + 0x1000)).expect("in RAM"),
                0x1234_5678
            );
            assert_eq!(memory.iter().next().expect("a region").file_offset().is_some(), shared);
        }
    }

    #[test]
    fn impossible_huge_pages_are_refused_by_name() {
        let range = [RamRange { gpa: 0, len: 3 << 20 }];
        let odd = RamSpec { hugepages: true, hugepage_size: Some(3000), ..SPEC };
        assert!(matches!(allocate(&range, &odd), Err(RamError::HugepageSize(3000))));
        let part = RamSpec { hugepages: true, ..SPEC };
        assert!(matches!(allocate(&range, &part), Err(RamError::Alignment { page: 0x20_0000, .. })));
    }
}
