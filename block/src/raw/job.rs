//! One request under way: the system calls it still takes.
//!
//! Both engines run the same [`Job`]s: they ask for the next [`Call`], make it, and report its result.
//! A job goes on after short transfers, passes through an aligned buffer where direct I/O needs it,
//! and falls back when a file system cannot zero or punch a range.

use std::io;

use crate::buffer::AlignedBuffer;
use crate::{Completion, IoVec, Op, Request};

use super::RawImage;

/// Most bytes that pass through a bounce buffer, or are zeroed by writing, in one call.
const CHUNK: usize = 1 << 20;
/// Most buffers in one call (`IOV_MAX`).
const MAX_IOVECS: usize = 1024;

/// A system call to make on the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// `preadv` of [`Job::vectors`] at the offset.
    Read(u64),
    /// `pwritev` of [`Job::vectors`] at the offset.
    Write(u64),
    /// `fdatasync`.
    Sync,
    /// `fallocate`.
    Allocate { mode: libc::c_int, offset: u64, len: u64 },
}

/// How a range is zeroed, in order of preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Zero {
    Range,
    Punch,
    Write,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Job {
    id: u64,
    op: Op,
    offset: u64,
    left: u64,
    buffers: Vec<IoVec>,
    /// The first buffer that is not done.
    first: usize,
    /// Stands in for `buffers` in the call under way.
    bounce: Option<AlignedBuffer>,
    /// The vectors of a call through the bounce buffer.
    bounce_vector: Vec<IoVec>,
    /// Bytes of the bounced window before the wanted ones.
    skip: u64,
    zero: Zero,
    /// One way to zero the range has failed already.
    second_way: bool,
}

fn os_error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl Job {
    pub(super) fn new(request: Request) -> Self {
        let data = matches!(request.op, Op::Read | Op::Write);
        let left = if data { request.buffers.iter().map(|b| b.len() as u64).sum() } else { request.len };
        let zero = match request.op {
            Op::WriteZeroes { unmap: true } | Op::Discard => Zero::Punch,
            _ => Zero::Range,
        };
        Self {
            id: request.id,
            op: request.op,
            offset: request.offset,
            left,
            buffers: request.buffers,
            first: 0,
            bounce: None,
            bounce_vector: Vec::new(),
            skip: 0,
            zero,
            second_way: false,
        }
    }

    pub(super) fn complete(&self, result: io::Result<()>) -> Completion {
        Completion { id: self.id, result }
    }

    /// Checks the request against the image and says which call comes first.
    pub(super) fn begin(&mut self, image: &RawImage) -> io::Result<Option<Call>> {
        if self.op != Op::Flush {
            if self.op != Op::Read && image.options.readonly {
                return Err(os_error(libc::EROFS));
            }
            let end = self.offset.checked_add(self.left).ok_or_else(|| os_error(libc::EINVAL))?;
            if end > image.size() {
                return Err(os_error(libc::EINVAL));
            }
            if self.left == 0 || (self.op == Op::Discard && !image.options.sparse) {
                return Ok(None);
            }
            if !image.options.sparse {
                self.zero = Zero::Range;
            }
            if matches!(self.op, Op::Write | Op::WriteZeroes { .. }) {
                image.note_write(end);
            }
        }
        self.call(image).map(Some)
    }

    /// Takes the result of the last call (bytes, or a negated error) and says which comes next.
    pub(super) fn advance(&mut self, image: &RawImage, result: i64) -> io::Result<Option<Call>> {
        if result < 0 {
            return self.failed(image, i32::try_from(-result).unwrap_or(libc::EIO));
        }
        match self.op {
            Op::Read | Op::Write => {
                let done = self.account(result as u64)?;
                self.consume(done);
            }
            Op::WriteZeroes { .. } if self.zero == Zero::Write => {
                let done = (result as u64).min(self.left);
                if done == 0 {
                    return Err(os_error(libc::EIO));
                }
                self.offset += done;
                self.left -= done;
            }
            _ => return Ok(None),
        }
        if self.left == 0 { Ok(None) } else { self.call(image).map(Some) }
    }

    fn failed(&mut self, image: &RawImage, code: i32) -> io::Result<Option<Call>> {
        let unsupported = matches!(code, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL);
        match self.op {
            _ if matches!(code, libc::EINTR | libc::EAGAIN) => self.call(image).map(Some),
            // A discard is advice: where it cannot be taken, nothing is lost.
            Op::Discard if unsupported => Ok(None),
            Op::WriteZeroes { unmap } if unsupported && self.zero != Zero::Write => {
                // Each of the two ways is tried once; zeroes can always be written.
                self.zero = match self.zero {
                    Zero::Range if image.options.sparse && !self.second_way => Zero::Punch,
                    Zero::Punch if unmap && !self.second_way => Zero::Range,
                    _ => Zero::Write,
                };
                self.second_way = true;
                self.call(image).map(Some)
            }
            _ => Err(os_error(code)),
        }
    }

    /// The bytes of the request that a transfer of `n` bytes has done.
    fn account(&mut self, n: u64) -> io::Result<u64> {
        let Some(bounce) = &self.bounce else {
            // The end of the file: it is shorter than it was.
            return if n == 0 { Err(os_error(libc::EIO)) } else { Ok(n.min(self.left)) };
        };
        let wanted = self.bounce_vector.first().map_or(0, |v| v.len() as u64).saturating_sub(self.skip);
        let done = n.saturating_sub(self.skip).min(wanted).min(self.left);
        if done == 0 {
            return Err(os_error(libc::EIO));
        }
        if self.op == Op::Read {
            bounce.scatter(self.skip as usize, done as usize, self.buffers.get(self.first..).unwrap_or(&[]));
        }
        Ok(done)
    }

    /// Moves past `n` bytes of the buffers.
    fn consume(&mut self, n: u64) {
        self.offset += n;
        self.left -= n;
        let mut n = n as usize;
        while let Some(v) = self.buffers.get_mut(self.first) {
            if n < v.len() {
                // SAFETY: the rest of a valid range is a valid range for as long.
                *v = unsafe { IoVec::new(v.0.iov_base.cast::<u8>().add(n), v.len() - n) };
                break;
            }
            n -= v.len();
            self.first += 1;
        }
    }

    /// The call that goes on from where the job stands.
    fn call(&mut self, image: &RawImage) -> io::Result<Call> {
        let align = image.alignment();
        match self.op {
            Op::Flush => Ok(Call::Sync),
            Op::Discard => Ok(self.allocate(libc::FALLOC_FL_PUNCH_HOLE)),
            Op::WriteZeroes { .. } => match self.zero {
                Zero::Range => Ok(self.allocate(libc::FALLOC_FL_ZERO_RANGE)),
                Zero::Punch => Ok(self.allocate(libc::FALLOC_FL_PUNCH_HOLE)),
                Zero::Write => {
                    let len = (CHUNK as u64).min(self.left) as usize;
                    self.use_bounce(len, align.memory)?;
                    Ok(Call::Write(self.offset))
                }
            },
            Op::Read => {
                self.bounce_read(align)?;
                Ok(Call::Read(self.offset - self.skip))
            }
            Op::Write => {
                self.bounce_write(align)?;
                Ok(Call::Write(self.offset))
            }
        }
    }

    fn allocate(&self, mode: libc::c_int) -> Call {
        Call::Allocate { mode: mode | libc::FALLOC_FL_KEEP_SIZE, offset: self.offset, len: self.left }
    }

    fn on_disk_aligned(&self, align: super::Alignment) -> bool {
        (self.offset | self.left) & (align.offset - 1) == 0
    }

    fn in_memory_aligned(&self, align: super::Alignment) -> bool {
        // Lengths within a transfer must be multiples of the disk's alignment as well.
        let mask = (align.memory - 1) | (align.offset as usize - 1);
        let rest = self.buffers.get(self.first..).unwrap_or(&[]);
        rest.iter().all(|v| v.address() & (align.memory - 1) == 0 && v.len() & mask == 0)
    }

    fn use_bounce(&mut self, len: usize, align: usize) -> io::Result<()> {
        if self.bounce.as_ref().is_none_or(|b| b.len() < len) {
            self.bounce = Some(AlignedBuffer::new(len, align).ok_or_else(|| os_error(libc::ENOMEM))?);
        }
        if let Some(bounce) = &self.bounce {
            self.bounce_vector = vec![bounce.iovec(len)];
        }
        Ok(())
    }

    fn bounce_read(&mut self, align: super::Alignment) -> io::Result<()> {
        self.skip = 0;
        if self.on_disk_aligned(align) && self.in_memory_aligned(align) {
            self.bounce = None;
            return Ok(());
        }
        let wanted = self.left.min(CHUNK as u64);
        self.skip = self.offset & (align.offset - 1);
        let len = (self.skip + wanted).next_multiple_of(align.offset);
        self.use_bounce(len as usize, align.memory)
    }

    fn bounce_write(&mut self, align: super::Alignment) -> io::Result<()> {
        if !self.on_disk_aligned(align) {
            // The guest was told the block size; half a block would need a read first and could race.
            return Err(os_error(libc::EINVAL));
        }
        if self.in_memory_aligned(align) {
            self.bounce = None;
            return Ok(());
        }
        let len = self.left.min(CHUNK as u64) as usize;
        self.use_bounce(len, align.memory)?;
        let from = self.buffers.get(self.first..).unwrap_or(&[]);
        if let Some(bounce) = &mut self.bounce {
            bounce.gather(len, from);
        }
        Ok(())
    }

    /// The buffers of the call under way. They stay in place until the next [`Job::advance`].
    pub(super) fn vectors(&self) -> &[IoVec] {
        let direct = self.buffers.get(self.first..).unwrap_or(&[]);
        let all = if self.bounce.is_some() { self.bounce_vector.as_slice() } else { direct };
        all.get(..MAX_IOVECS).unwrap_or(all)
    }
}
