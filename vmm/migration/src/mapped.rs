//! A VM in one file, with a place of its own for each page of RAM.
//!
//! | at | what |
//! |---|---|
//! | 0 | the header: magic, versions, places of the rest, checksums; written last, so a file that is not whole has none |
//! | 4096 | the [`Plan`], JSON |
//! | a multiple of 1 MiB | RAM, the ranges of the plan one after the other; pages of zeroes are holes |
//! | behind it | the state |
//!
//! A page that changes while the file is written is written again, to the same place. So the file is no larger than the VM, is
//! written by several threads and past the page cache if wanted, and is read page by page as the guest touches them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, Ordering::Relaxed};

use holdfast_memory::{GuestMemory, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use crate::checksum::checksum;
use crate::control::Control;
use crate::frame::{Kind, OLDEST, VERSION, check_version};
use crate::lanes::{Limiter, Sink};
use crate::pages::{CHUNK, Run, is_zero};
use crate::{MigrationError, Plan};

const MAGIC: [u8; 8] = *b"HFMAPPED";
/// Where the plan is.
const PLAN_AT: u64 = 4096;
/// RAM begins at a multiple of this.
const RAM_ALIGN: u64 = 1 << 20;
/// Bytes of the header, its checksum included.
const HEADER: usize = 88;

fn sum(data: &[u8]) -> u64 {
    checksum(&[0; 16], data)
}

/// What the header says, in bytes from the start of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Places {
    plan_len: u64,
    plan_sum: u64,
    ram_at: u64,
    ram_len: u64,
    state_at: u64,
    state_len: u64,
    state_sum: u64,
}

impl Places {
    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let versions = [VERSION.to_le_bytes(), OLDEST.to_le_bytes()].concat();
        let numbers = [
            self.plan_len,
            self.plan_sum,
            self.ram_at,
            self.ram_len,
            self.state_at,
            self.state_len,
            self.state_sum,
        ];
        let numbers = numbers.iter().flat_map(|n| n.to_le_bytes());
        let all = MAGIC.into_iter().chain(versions).chain([0; 4]).chain(numbers);
        for (to, from) in bytes.iter_mut().zip(all) {
            *to = from;
        }
        let sum = sum(&bytes[..HEADER - 8]);
        bytes[HEADER - 8..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER]) -> Result<Self, MigrationError> {
        let wrong = |text: &str| Err(MigrationError::Protocol(text.to_owned()));
        if bytes[..8] != MAGIC {
            return wrong("the file holds no VM, or one that was not stored to its end");
        }
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let (theirs, theirs_oldest) = (short(8), short(10));
        check_version(theirs, theirs_oldest)?;
        let long =
            |n: usize| bytes[16 + 8 * n..].iter().take(8).rev().fold(0, |all, b| all << 8 | u64::from(*b));
        if sum(&bytes[..HEADER - 8]) != long((HEADER - 24) / 8) {
            return wrong("the file's header is damaged");
        }
        Ok(Self {
            plan_len: long(0),
            plan_sum: long(1),
            ram_at: long(2),
            ram_len: long(3),
            state_at: long(4),
            state_len: long(5),
            state_sum: long(6),
        })
    }
}

/// A file that a VM is being stored in.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    /// It was not there before.
    made: bool,
    file: File,
    direct: bool,
    ranges: Vec<(u64, u64)>,
    places: Places,
    /// Pages may have been written before: one of zeroes has to be as well.
    again: AtomicBool,
}

impl MappedFile {
    /// Makes or empties `path`, which only its owner may read: it will hold what the guest's RAM does.
    pub(crate) fn create(
        path: &Path,
        plan: &[u8],
        ranges: Vec<(u64, u64)>,
        direct: bool,
    ) -> Result<Self, MigrationError> {
        let made = !path.exists();
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
        let fail = |what| {
            let path = path.to_owned();
            move |source| MigrationError::File { what, path, source }
        };
        let file = file.map_err(fail("cannot make"))?;
        if !file.metadata().map_err(fail("cannot look at"))?.is_file() {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file");
            return Err(fail("cannot store a VM in")(source));
        }
        let ram_len = ranges.iter().map(|r| r.1).sum();
        let ram_at = (PLAN_AT + plan.len() as u64).next_multiple_of(RAM_ALIGN);
        let places = Places {
            plan_len: plan.len() as u64,
            plan_sum: sum(plan),
            ram_at,
            ram_len,
            state_at: ram_at + ram_len,
            state_len: 0,
            state_sum: 0,
        };
        let this =
            Self { path: path.to_owned(), made, file, direct, ranges, places, again: AtomicBool::new(false) };
        let begun = this.file.set_len(0).and_then(|()| this.file.set_len(places.state_at));
        let begun = begun.and_then(|()| this.file.write_all_at(plan, PLAN_AT));
        if let Err(source) = begun {
            this.discard();
            return Err(this.failed("cannot write")(source));
        }
        Ok(this)
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> MigrationError + use<> {
        let path = self.path.clone();
        move |source| MigrationError::File { what, path, source }
    }

    /// From now on pages may come that were written before.
    fn written_before(&self) {
        self.again.store(true, Ordering::Release);
    }

    /// Another way for pages into the file.
    pub(crate) fn writer(
        self: &Arc<Self>,
        memory: GuestMemory,
        control: Arc<Control>,
        limiter: Arc<Limiter>,
    ) -> Result<Writer, MigrationError> {
        let mut options = OpenOptions::new();
        options.write(true);
        if self.direct {
            options.custom_flags(libc::O_DIRECT);
        }
        let file = options.open(&self.path).map_err(self.failed("cannot open"))?;
        // Direct I/O needs memory that is aligned.
        let buffer = vec![0; (CHUNK + PAGE_SIZE) as usize];
        Ok(Writer { mapped: Arc::clone(self), file, memory, control, limiter, buffer })
    }

    /// Where the page at `gpa` belongs.
    fn place(&self, run: Run) -> Option<u64> {
        let mut at = self.places.ram_at;
        for (start, len) in &self.ranges {
            if (*start..start + len).contains(&run.gpa) {
                return Some(at + (run.gpa - start));
            }
            at += len;
        }
        None
    }

    /// Writes the state, then, when all else is on the disk, the header.
    pub(crate) fn finish(&self, state: &[u8]) -> Result<(), MigrationError> {
        let places = Places { state_len: state.len() as u64, state_sum: sum(state), ..self.places };
        let written = self.file.write_all_at(state, places.state_at);
        let written = written.and_then(|()| self.file.sync_all());
        let written = written.and_then(|()| self.file.write_all_at(&places.encode(), 0));
        written.and_then(|()| self.file.sync_all()).map_err(self.failed("cannot write"))
    }

    /// Takes it away, or empties it if it was there before: nobody could use it.
    pub(crate) fn discard(&self) {
        let gone = if self.made { std::fs::remove_file(&self.path) } else { self.file.set_len(0) };
        if let Err(error) = gone {
            tracing::warn!(path = %self.path.display(), %error, "what is left of a VM's file stays");
        }
    }
}

/// Writes pages to their places.
pub(crate) struct Writer {
    mapped: Arc<MappedFile>,
    file: File,
    memory: GuestMemory,
    control: Arc<Control>,
    limiter: Arc<Limiter>,
    buffer: Vec<u8>,
}

impl Writer {
    fn store(&self, at: u64, pages: &[u8], zero: bool) -> Result<(), MigrationError> {
        let count = pages.len() as u64 / PAGE_SIZE;
        let counters = &self.control.counters;
        if zero {
            counters.zero.fetch_add(count, Relaxed);
            if self.mapped.again.load(Ordering::Acquire) {
                self.clear(at, pages)?;
            }
            return Ok(());
        }
        self.limiter.admit(pages.len() as u64, &self.control)?;
        self.file.write_all_at(pages, at).map_err(self.mapped.failed("cannot write"))?;
        counters.normal.fetch_add(count, Relaxed);
        counters.transferred.fetch_add(pages.len() as u64, Relaxed);
        Ok(())
    }

    /// Makes a hole, or writes `zeroes` where there are none.
    fn clear(&self, at: u64, zeroes: &[u8]) -> Result<(), MigrationError> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is passed.
        if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at as i64, zeroes.len() as i64) } == 0 {
            return Ok(());
        }
        self.file.write_all_at(zeroes, at).map_err(self.mapped.failed("cannot write"))
    }
}

impl Sink for Writer {
    fn send(&mut self, run: Run) -> Result<(), MigrationError> {
        let outside = || MigrationError::Protocol("a page that is not within RAM".into());
        let at = self.mapped.place(run).ok_or_else(outside)?;
        let skip = self.buffer.as_ptr().align_offset(PAGE_SIZE as usize);
        let len = run.len as usize;
        let pages = self.buffer.get_mut(skip..skip + len).ok_or_else(outside)?;
        let read = self.memory.read_slice(pages, GuestAddress(run.gpa));
        read.map_err(|e| MigrationError::vm("RAM cannot be read", e))?;
        let pages = self.buffer.get(skip..skip + len).ok_or_else(outside)?;
        let (mut start, mut zero) = (0, None);
        for (n, page) in pages.chunks(PAGE_SIZE as usize).enumerate() {
            let (here, is) = (n * PAGE_SIZE as usize, is_zero(page));
            if zero.is_some_and(|before| before != is) {
                self.store(at + start as u64, pages.get(start..here).unwrap_or_default(), !is)?;
                start = here;
            }
            zero = Some(is);
        }
        self.store(at + start as u64, pages.get(start..).unwrap_or_default(), zero.unwrap_or(true))
    }

    fn flush(&mut self) -> Result<(), MigrationError> {
        Ok(())
    }

    /// A pass is over: what the next brings was written before.
    fn settle(&mut self) -> Result<(), MigrationError> {
        self.mapped.written_before();
        Ok(())
    }

    fn end(&mut self) -> Result<(), MigrationError> {
        Ok(())
    }
}

/// A VM that was stored in a file.
#[derive(Debug)]
pub struct Mapped {
    /// What the VM must be like.
    pub plan: Plan,
    /// Everything but RAM.
    pub state: Vec<u8>,
    /// The file.
    pub file: File,
    /// Where RAM begins in it, in bytes.
    pub ram_at: u64,
}

impl Mapped {
    /// Opens a file that a VM was stored in.
    ///
    /// # Errors
    /// [`MigrationError`]: it cannot be read, is another version's, or damaged.
    pub fn open(path: &Path) -> Result<Self, MigrationError> {
        let fail = |what| {
            let path = path.to_owned();
            move |source| MigrationError::File { what, path, source }
        };
        let wrong = |text: &str| MigrationError::Protocol(text.to_owned());
        let file = File::open(path).map_err(fail("cannot open"))?;
        let mut header = [0; HEADER];
        match file.read_exact_at(&mut header, 0) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => header.fill(0),
            other => other.map_err(fail("cannot read"))?,
        }
        let places = Places::decode(&header)?;
        let Places { plan_len, ram_at, ram_len, state_at, state_len, .. } = places;
        let ordered = plan_len <= Kind::Hello.limit() as u64
            && state_len <= Kind::State.limit() as u64
            && ram_at >= PLAN_AT + plan_len
            && ram_at.is_multiple_of(RAM_ALIGN)
            && ram_at.checked_add(ram_len) == Some(state_at);
        let length = file.metadata().map_err(fail("cannot look at"))?.len();
        if !ordered || state_at.checked_add(state_len).is_none_or(|end| end > length) {
            return Err(wrong("the file's header makes no sense, or the file was cut"));
        }
        let read = |at, len, expected| {
            let mut bytes = vec![0; len as usize];
            file.read_exact_at(&mut bytes, at).map_err(fail("cannot read"))?;
            if sum(&bytes) == expected {
                Ok(bytes)
            } else {
                Err(wrong("the file's plan or state is damaged"))
            }
        };
        let plan = read(PLAN_AT, plan_len, places.plan_sum)?;
        let state = read(state_at, state_len, places.state_sum)?;
        let plan: Plan = serde_json::from_slice(&plan)
            .map_err(|e| MigrationError::Protocol(format!("the plan does not parse: {e}")))?;
        if plan.ram.iter().try_fold(0, |all: u64, r| all.checked_add(r.1)) != Some(ram_len) {
            return Err(wrong("the plan's RAM is not as large as the file's"));
        }
        Ok(Self { plan, state, file, ram_at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Parameters;

    /// What a page held in one pass must not come back if it is zeroes in the next, whether its neighbours are or not.
    #[test]
    fn a_page_that_became_zero_is_zero_in_the_file() {
        const PAGES: u64 = 4;
        let ram = (0x8000_0000, PAGES * PAGE_SIZE);
        let memory = GuestMemory::from_ranges(&[(GuestAddress(ram.0), ram.1 as usize)]).expect("RAM");
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("vm");
        let mapped = Arc::new(MappedFile::create(&path, b"{}", vec![ram], false).expect("a file"));
        let control = Arc::new(Control::new(Parameters::default()));
        let mut writer = mapped.writer(memory.clone(), control, Arc::default()).expect("a writer");
        let all = Run { gpa: ram.0, len: ram.1 };
        let mut model = vec![7; ram.1 as usize];
        memory.write_slice(&model, GuestAddress(ram.0)).expect("written");
        writer.send(all).expect("the first pass");
        writer.settle().expect("it is over");
        model[PAGE_SIZE as usize..2 * PAGE_SIZE as usize].fill(0);
        memory.write_slice(&model, GuestAddress(ram.0)).expect("written");
        writer.send(all).expect("the second pass");
        writer.end().expect("the last");
        let found = std::fs::read(&path).expect("reads");
        let at = mapped.places.ram_at as usize;
        assert!(found[at..at + model.len()] == model);
    }
}
