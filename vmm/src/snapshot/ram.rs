//! RAM in a snapshot: one sparse file with the ranges one after the other.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use holdfast_machines::RamRange;
use holdfast_memory::GuestMemory;
use holdfast_threads::{Role, Spawner};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use holdfast_migration::uffd::Userfault;

/// How much is read, tested and written at once, in bytes.
const CHUNK: usize = 256 << 10;

/// Unit of holes in the file, in bytes.
const PAGE: usize = 4096;

/// The ranges of `memory` in file order.
pub fn ranges(memory: &GuestMemory) -> Vec<RamRange> {
    memory.iter().map(|r| RamRange { gpa: r.start_addr().raw_value(), len: r.len() }).collect()
}

/// Writes all of RAM to `file`, leaving holes for pages of zeroes. Returns the bytes written.
///
/// # Errors
/// The host's error (a full disk, for instance).
pub fn save(memory: &GuestMemory, file: &File) -> io::Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let (mut at, mut written) = (0, 0);
    let total: u64 = memory.iter().map(|r| r.len()).sum();
    file.set_len(total)?;
    for region in memory.iter() {
        let mut offset = 0;
        while offset < region.len() {
            let n = CHUNK.min((region.len() - offset) as usize);
            let chunk = &mut buffer[..n];
            region.read_slice(chunk, MemoryRegionAddress(offset)).map_err(io::Error::other)?;
            written += write_sparse(file, at + offset, chunk)?;
            offset += n as u64;
        }
        at += region.len();
    }
    Ok(written)
}

/// Writes the runs of `chunk` that are not pages of zeroes.
fn write_sparse(file: &File, at: u64, chunk: &[u8]) -> io::Result<u64> {
    let mut written = 0;
    let mut start = 0;
    while start < chunk.len() {
        let mut end = start;
        while end < chunk.len() && !is_zero(&chunk[end..(end + PAGE).min(chunk.len())]) {
            end = (end + PAGE).min(chunk.len());
        }
        if end > start {
            file.write_all_at(&chunk[start..end], at + start as u64)?;
            written += (end - start) as u64;
            start = end;
        } else {
            start = (start + PAGE).min(chunk.len());
        }
    }
    Ok(written)
}

fn is_zero(page: &[u8]) -> bool {
    // SAFETY: any bytes are valid u64s; align_to gives only the aligned middle.
    let (head, words, tail) = unsafe { page.align_to::<u64>() };
    head.iter().chain(tail).all(|&b| b == 0) && words.iter().all(|&w| w == 0)
}

/// Reads all of RAM back by copy. RAM must be fresh: holes of the file are skipped.
///
/// # Errors
/// The host's error, or `InvalidData` if the file's length is not RAM's size.
pub fn load(memory: &GuestMemory, file: &File) -> io::Result<()> {
    check_length(memory, file)?;
    load_at(memory, file, 0)
}

/// As [`load`], from a file in which RAM begins at byte `at`.
///
/// # Errors
/// The host's.
pub fn load_at(memory: &GuestMemory, file: &File, mut at: u64) -> io::Result<()> {
    for region in memory.iter() {
        for (start, len) in data_runs(file, at, region.len())? {
            let mut source = file.try_clone()?;
            io::Seek::seek(&mut source, io::SeekFrom::Start(start))?;
            let to = GuestAddress(region.start_addr().raw_value() + (start - at));
            memory.read_exact_volatile_from(to, &mut source, len as usize).map_err(io::Error::other)?;
        }
        at += region.len();
    }
    Ok(())
}

fn check_length(memory: &GuestMemory, file: &File) -> io::Result<()> {
    let expected: u64 = memory.iter().map(|r| r.len()).sum();
    let found = file.metadata()?.len();
    if found == expected {
        return Ok(());
    }
    let text = format!("it holds {found} bytes of RAM, the VM has {expected}");
    Err(io::Error::new(io::ErrorKind::InvalidData, text))
}

/// The runs of `[at, at + len)` in `file` that are not holes, as (offset, length).
fn data_runs(file: &File, at: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
    use std::os::fd::AsRawFd;
    let seek = |from: u64, whence| {
        // SAFETY: lseek on a descriptor that `file` keeps open.
        let r = unsafe { libc::lseek(file.as_raw_fd(), from as i64, whence) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as u64) }
    };
    let (mut runs, mut pos, end) = (Vec::new(), at, at + len);
    while pos < end {
        let start = match seek(pos, libc::SEEK_DATA) {
            Ok(start) if start < end => start,
            Ok(_) => break,
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => break,
            Err(e) => return Err(e),
        };
        let stop = seek(start, libc::SEEK_HOLE)?.min(end);
        runs.push((start, stop - start));
        pos = stop;
    }
    Ok(runs)
}

/// Serves RAM from a snapshot's file as the guest touches it, and fills the rest meanwhile.
#[derive(Debug)]
pub struct DemandPager {
    stop: Arc<AtomicBool>,
    filled: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

/// A range of RAM in the pager's view.
#[derive(Debug, Clone, Copy)]
struct Mapped {
    hva: u64,
    len: u64,
    file_at: u64,
}

impl DemandPager {
    /// Starts paging `memory`, which must be fresh, from `file`: a thread answers faults; if
    /// `prefetch`, another brings in everything in order.
    ///
    /// # Errors
    /// The host's error, for instance if userfaultfd is not permitted.
    pub fn start(
        memory: &GuestMemory,
        file: File,
        prefetch: bool,
        spawner: &dyn Spawner,
    ) -> io::Result<Self> {
        check_length(memory, &file)?;
        Self::start_at(memory, (file, 0), prefetch, spawner)
    }

    /// As [`DemandPager::start`], from a file in which RAM begins at the byte given.
    ///
    /// # Errors
    /// The host's.
    pub fn start_at(
        memory: &GuestMemory,
        (file, mut file_at): (File, u64),
        prefetch: bool,
        spawner: &dyn Spawner,
    ) -> io::Result<Self> {
        let uffd = Arc::new(Userfault::open()?);
        let mut mapped = Vec::new();
        for region in memory.iter() {
            let hva = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)? as u64;
            uffd.register(hva, region.len())?;
            mapped.push(Mapped { hva, len: region.len(), file_at });
            file_at += region.len();
        }
        let file = Arc::new(file);
        let stop = Arc::new(AtomicBool::new(false));
        let filled = Arc::new(AtomicU64::new(0));
        let mut pager = Self { stop: Arc::clone(&stop), filled: Arc::clone(&filled), threads: Vec::new() };
        let (faults, pages, ranges, halt) =
            (Arc::clone(&uffd), Arc::clone(&file), mapped.clone(), Arc::clone(&stop));
        let body = move || {
            if let Err(error) = serve_faults(&faults, &pages, &ranges, &halt) {
                tracing::error!(%error, "guest RAM can no longer be brought in from the snapshot");
            }
        };
        pager.threads.push(spawner.spawn("uffd", Role::Migration, Box::new(body))?);
        if prefetch {
            let body = move || {
                if let Err(error) = fill_all(&uffd, &file, &mapped, &stop, &filled) {
                    tracing::error!(%error, "prefetching guest RAM from the snapshot stopped");
                }
            };
            pager.threads.push(spawner.spawn("uffd-prefetch", Role::Migration, Box::new(body))?);
        }
        Ok(pager)
    }

    /// Bytes prefetched so far.
    pub fn filled(&self) -> u64 {
        self.filled.load(Ordering::Relaxed)
    }
}

impl Drop for DemandPager {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// How long the fault thread waits before it looks whether it should stop, in milliseconds.
const FAULT_POLL_MS: i32 = 100;

fn serve_faults(uffd: &Userfault, file: &File, ranges: &[Mapped], stop: &AtomicBool) -> io::Result<()> {
    let mut page = [0; PAGE];
    while !stop.load(Ordering::Acquire) {
        let Some(hva) = uffd.next_fault(FAULT_POLL_MS)? else { continue };
        let Some(range) = ranges.iter().find(|r| hva >= r.hva && hva - r.hva < r.len) else { continue };
        file.read_exact_at(&mut page, range.file_at + (hva - range.hva))?;
        uffd.fill(hva, &page)?;
    }
    Ok(())
}

fn fill_all(
    uffd: &Userfault,
    file: &File,
    ranges: &[Mapped],
    stop: &AtomicBool,
    filled: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    for range in ranges {
        for (start, len) in data_runs(file, range.file_at, range.len)? {
            let mut done = 0;
            while done < len {
                if stop.load(Ordering::Acquire) {
                    return Ok(());
                }
                let n = CHUNK.min((len - done) as usize);
                file.read_exact_at(&mut buffer[..n], start + done)?;
                uffd.fill(range.hva + (start + done - range.file_at), &buffer[..n])?;
                done += n as u64;
                filled.fetch_add(n as u64, Ordering::Relaxed);
            }
        }
        // All that is left of the range is zero, which is what an unregistered page reads as.
        uffd.unregister(range.hva, range.len)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{RamSpec, allocate};
    use holdfast_threads::PlainSpawner;

    const SPEC: RamSpec = RamSpec {
        shared: false,
        hugepages: false,
        hugepage_size: None,
        prefault: false,
        thp: false,
        mergeable: false,
    };

    fn fresh() -> GuestMemory {
        let ranges = [RamRange { gpa: 0x1000, len: 1 << 20 }, RamRange { gpa: 1 << 30, len: 2 << 20 }];
        allocate(&ranges, &SPEC).expect("RAM")
    }

    fn saved() -> (GuestMemory, File) {
        let memory = fresh();
        for (i, at) in
            [0x1000u64, 0x5ff8, (1 << 30) + (1 << 20), (1 << 30) + (2 << 20) - 8].into_iter().enumerate()
        {
            memory.write_obj(0x1111_1111_1111_1111 * (i as u64 + 1), GuestAddress(at)).expect("in RAM");
        }
        let file = tempfile::tempfile().expect("file");
        let written = save(&memory, &file).expect("save");
        assert_eq!(written, 4 * 4096, "only the pages with something in them are written");
        (memory, file)
    }

    fn same(a: &GuestMemory, b: &GuestMemory) {
        for range in ranges(a) {
            let (mut x, mut y) = (vec![0; range.len as usize], vec![0; range.len as usize]);
            a.read_slice(&mut x, GuestAddress(range.gpa)).expect("in RAM");
            b.read_slice(&mut y, GuestAddress(range.gpa)).expect("in RAM");
            assert!(x == y, "RAM at {:#x} differs", range.gpa);
        }
    }

    #[test]
    fn ram_comes_back_by_copy() {
        let (memory, file) = saved();
        let restored = fresh();
        load(&restored, &file).expect("load");
        same(&memory, &restored);
    }

    #[test]
    fn ram_comes_back_on_demand_with_and_without_prefetch() {
        for prefetch in [false, true] {
            let (memory, file) = saved();
            let restored = fresh();
            let pager = DemandPager::start(&restored, file, prefetch, &PlainSpawner)
                .expect("userfaultfd (needs root)");
            same(&memory, &restored);
            drop(pager);
            same(&memory, &restored);
        }
    }

    #[test]
    fn a_cut_file_is_refused() {
        let (_, file) = saved();
        file.set_len(4096).expect("truncate");
        assert_eq!(load(&fresh(), &file).expect_err("too short").kind(), io::ErrorKind::InvalidData);
        assert!(DemandPager::start(&fresh(), file, false, &PlainSpawner).is_err());
    }
}
