//! Raw images: the bytes of the disk in a file or block device.

mod job;
mod lock;
mod pool;
mod sync;
#[cfg(test)]
mod tests;
mod uring;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use holdfast_threads::Spawner;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::nodes::NodeWatch;
use crate::{BlockBackend, BlockError, BlockQueue, Geometry, SECTOR};
pub use lock::LockRange;
use pool::{Pool, PoolQueue};
use uring::UringQueue;

/// How to open a raw image.
#[derive(Debug, Clone)]
pub struct RawOptions {
    /// The image.
    pub path: PathBuf,
    /// Make it, or empty it, first.
    pub create: bool,
    /// Open it for reading only.
    pub readonly: bool,
    /// Bypass the page cache.
    pub direct: bool,
    /// Give discarded and zeroed ranges back to the host.
    pub sparse: bool,
    /// Use io_uring if the host has it.
    pub io_uring: bool,
    /// What to lock.
    pub lock: LockRange,
    /// Another process still has it: it is neither locked nor written until it is activated.
    pub inactive: bool,
    /// Answer flushes without making anything durable (`cache.no-flush`).
    pub no_flush: bool,
    /// Name of the threads of the fallback engine (the device's id).
    pub name: String,
}

impl RawOptions {
    /// The usual options for `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            create: false,
            readonly: false,
            direct: false,
            sparse: true,
            io_uring: true,
            lock: LockRange::Bytes,
            inactive: false,
            no_flush: false,
            name: "block".to_owned(),
        }
    }
}

/// An open raw image.
#[derive(Debug)]
pub struct RawImage {
    pub(crate) file: File,
    options: RawOptions,
    size: AtomicU64,
    is_device: bool,
    align: Alignment,
    /// Threads of the fallback engine, once a queue has asked for it.
    pool: OnceLock<Arc<Pool>>,
    uring: bool,
    spawner: Arc<dyn Spawner>,
    /// Held while part of a block is read, changed and written.
    unaligned: parking_lot::Mutex<()>,
    /// Hears of writes.
    watch: parking_lot::RwLock<Vec<Arc<NodeWatch>>>,
    /// It is ours to write.
    active: AtomicBool,
}

/// What direct I/O asks of a request; all 1 for buffered I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of addresses in memory.
    pub(crate) memory: usize,
    /// Of offsets and lengths on the disk.
    pub(crate) offset: u64,
}

impl RawImage {
    /// Opens and locks an image.
    ///
    /// # Errors
    /// [`BlockError`] naming the image and what is wrong.
    pub fn open(options: RawOptions, spawner: Arc<dyn Spawner>) -> Result<Arc<Self>, BlockError> {
        let path = options.path.as_path();
        let fail = |source| BlockError::Open { path: path.to_owned(), source };
        let mut flags = libc::O_CLOEXEC;
        if options.create {
            create(path).map_err(fail)?;
        }
        if options.direct {
            flags |= libc::O_DIRECT;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(!options.readonly)
            .custom_flags(flags)
            .open(path)
            .map_err(fail)?;
        let kind = file.metadata().map_err(fail)?.file_type();
        let is_device = kind.is_block_device();
        if !is_device && !kind.is_file() {
            return Err(BlockError::Kind { path: path.to_owned() });
        }
        let size = size_of(&file, is_device).map_err(fail)?;
        let active = options.readonly || !options.inactive;
        if active {
            lock::lock(&file, path, options.readonly, options.lock, size)?;
        }
        // Emptied only once it is known that nobody else uses it.
        let size = if options.create && !is_device {
            if size != 0 {
                file.set_len(0).map_err(fail)?;
                // ext4 writes a file that was emptied to the disk at its next close, in case somebody replaces its contents so.
                // Whoever wants that flushes; this is a close while there is nothing to write.
                drop(File::open(path));
            }
            0
        } else {
            size
        };
        let align = if options.direct { direct_alignment(&file, is_device) } else { Alignment::NONE };
        let uring = options.io_uring && uring::available();
        tracing::debug!(path = %path.display(), size, uring, ?align, "raw image opened");
        let size = AtomicU64::new(size);
        let pool = OnceLock::new();
        Ok(Arc::new(Self {
            file,
            options,
            size,
            is_device,
            align,
            pool,
            uring,
            spawner,
            unaligned: parking_lot::Mutex::new(()),
            watch: parking_lot::RwLock::default(),
            active: AtomicBool::new(active),
        }))
    }

    fn host_error(&self, what: &'static str, source: io::Error) -> BlockError {
        BlockError::Host { path: self.path().to_owned(), what, source }
    }

    /// The image's path.
    pub fn path(&self) -> &Path {
        &self.options.path
    }

    /// Name of its threads.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// Device and inode: the same for all names of a file.
    pub fn identity(&self) -> (u64, u64) {
        use std::os::unix::fs::MetadataExt;
        self.file.metadata().map_or((0, 0), |m| (m.dev(), m.ino()))
    }

    /// Lets a node hear of writes.
    pub(crate) fn watch(&self, watch: Arc<NodeWatch>) {
        let mut all = self.watch.write();
        if !all.iter().any(|w| Arc::ptr_eq(w, &watch)) {
            all.push(watch);
        }
    }

    /// A write ends at `end`.
    pub(crate) fn note_write(&self, end: u64) {
        for watch in self.watch.read().iter() {
            watch.wrote(end);
        }
    }

    /// Writes all that there is and lets go of the locks, unless it is only read.
    fn give_up(&self) -> io::Result<()> {
        if self.options.readonly || !self.active.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        if !self.options.no_flush {
            self.file.sync_data()?;
        }
        lock::unlock(&self.file)
    }

    /// Locks it again and forgets what was known of it.
    fn take(&self) -> Result<(), BlockError> {
        if self.active.load(Ordering::Acquire) {
            return Ok(());
        }
        let size =
            size_of(&self.file, self.is_device).map_err(|e| self.host_error("cannot get its size", e))?;
        lock::lock(&self.file, self.path(), self.options.readonly, self.options.lock, size)?;
        // On file systems of networks, pages may have been read before the other host's writes. Advice: it is in vain where
        // there is nothing to be dropped.
        // SAFETY: no memory is passed.
        unsafe { libc::posix_fadvise(self.file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        self.size.store(size, Ordering::Release);
        self.active.store(true, Ordering::Release);
        Ok(())
    }

    /// Fails if it is only read, or another process's for the time being.
    fn check_writable(&self) -> io::Result<()> {
        if self.options.readonly {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        if self.active.load(Ordering::Acquire) { Ok(()) } else { Err(crate::node::inactive_error()) }
    }

    pub(crate) fn alignment(&self) -> Alignment {
        self.align
    }

    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Asks the host how long it is. True if that was not known.
    fn look_at_size(&self) -> io::Result<bool> {
        loop {
            let known = self.size();
            let size = size_of(&self.file, self.is_device)?;
            // Not over what a writer has found out meanwhile, whose write the host had not seen yet.
            if self.size.compare_exchange(known, size, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return Ok(known != size);
            }
        }
    }

    fn pool(&self) -> io::Result<Arc<Pool>> {
        if let Some(pool) = self.pool.get() {
            return Ok(Arc::clone(pool));
        }
        let pool = Pool::start(&self.options.name, &*self.spawner)?;
        Ok(Arc::clone(self.pool.get_or_init(|| pool)))
    }
}

impl BlockBackend for RawImage {
    fn geometry(&self) -> Geometry {
        let logical = u32::try_from(self.align.offset).unwrap_or(512).max(SECTOR as u32);
        Geometry {
            size: self.size(),
            logical_block: logical,
            physical_block: logical.max(4096),
            can_discard: self.options.sparse && !self.options.readonly,
        }
    }

    fn is_readonly(&self) -> bool {
        self.options.readonly
    }

    fn queue(self: Arc<Self>, depth: u16) -> Result<Box<dyn BlockQueue>, BlockError> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let event = event.map_err(|e| self.host_error("cannot make an eventfd", e))?;
        self.queue_on(depth, event)
    }

    fn refresh(&self) -> Result<bool, BlockError> {
        self.look_at_size().map_err(|e| self.host_error("cannot get its size", e))
    }

    fn engine(&self) -> &'static str {
        if self.uring { "io_uring" } else { "threads" }
    }
}

impl RawImage {
    /// As [`BlockBackend::queue`], signalling an eventfd that the caller has, and may signal itself.
    pub(crate) fn queue_on(
        self: Arc<Self>,
        depth: u16,
        event: EventFd,
    ) -> Result<Box<dyn BlockQueue>, BlockError> {
        if self.uring {
            let copy = event.try_clone().map_err(|e| self.host_error("cannot make an eventfd", e))?;
            match UringQueue::new(Arc::clone(&self), depth, copy) {
                Ok(queue) => return Ok(Box::new(queue)),
                Err(error) => {
                    tracing::warn!(path = %self.path().display(), %error, "no io_uring: using threads");
                }
            }
        }
        let pool = self.pool().map_err(|e| self.host_error("cannot start I/O threads", e))?;
        Ok(Box::new(PoolQueue::new(self, pool, event)))
    }
}

#[cfg(test)]
impl RawImage {
    /// An image whose every request must be aligned to 4096 bytes, without needing a disk that is so.
    pub(crate) fn demanding(options: RawOptions) -> Result<Arc<Self>, BlockError> {
        let mut disk = Self::open(options, holdfast_threads::PlainSpawner::shared())?;
        if let Some(disk) = Arc::get_mut(&mut disk) {
            disk.align = Alignment::SAFE;
        }
        Ok(disk)
    }
}

fn create(path: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o644).open(path).map(|_| ())
}

fn size_of(file: &File, is_device: bool) -> io::Result<u64> {
    if !is_device {
        return Ok(file.metadata()?.len());
    }
    /// `_IOR(0x12, 114, size_t)` of linux/fs.h.
    const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 stores one u64, for which `size` has room.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(size)
}

impl Alignment {
    const NONE: Self = Self { memory: 1, offset: 1 };
    /// Fits every device whose logical blocks are no larger than a page.
    const SAFE: Self = Self { memory: 4096, offset: 4096 };
}

/// What direct I/O on `file` needs: `statx` knows on Linux 6.1 and later, block devices always do.
fn direct_alignment(file: &File, is_device: bool) -> Alignment {
    /// `STATX_DIOALIGN` of linux/stat.h.
    const STATX_DIOALIGN: u32 = 0x2000;
    /// `_IO(0x12, 104)` of linux/fs.h.
    const BLKSSZGET: libc::Ioctl = 0x1268;
    // SAFETY: all-zero bytes are a valid `statx`.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string, allowed with AT_EMPTY_PATH; `stat` has room for the answer.
    let rc = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, STATX_DIOALIGN, &mut stat)
    };
    if rc == 0 && stat.stx_mask & STATX_DIOALIGN != 0 && stat.stx_dio_offset_align != 0 {
        let memory = stat.stx_dio_mem_align.max(1).next_power_of_two() as usize;
        return Alignment { memory, offset: u64::from(stat.stx_dio_offset_align.next_power_of_two()) };
    }
    if is_device {
        let mut block: libc::c_int = 0;
        // SAFETY: BLKSSZGET stores one int, for which `block` has room.
        let rc = unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &mut block) };
        if rc == 0 && block >= 512 && (block as u32).is_power_of_two() {
            return Alignment { memory: block as usize, offset: block as u64 };
        }
    }
    Alignment::SAFE
}
