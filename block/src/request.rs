//! Requests and completions.

use std::io;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Fills the buffers from the disk.
    Read,
    /// Writes the buffers to the disk.
    Write,
    /// Makes completed writes durable.
    Flush,
    /// Says that the contents of a range are not needed any more. Advisory.
    Discard,
    /// Makes a range read as zeroes.
    WriteZeroes {
        /// The range may be given back to the host.
        unmap: bool,
    },
}

/// A request to a disk.
#[derive(Debug, Clone)]
pub struct Request {
    /// Comes back with the completion.
    pub id: u64,
    /// What to do.
    pub op: Op,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes, for requests without buffers. For reads and writes the buffers' lengths count.
    pub len: u64,
    /// Where data goes to or comes from, in order.
    pub buffers: Vec<IoVec>,
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    /// The request's.
    pub id: u64,
    /// Success means that the whole request was done.
    pub result: io::Result<()>,
}

/// A range of host memory that a request reads or fills.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct IoVec(pub(crate) libc::iovec);

// SAFETY: the constructor's contract makes the range valid from any thread until the request is done.
unsafe impl Send for IoVec {}

impl IoVec {
    /// The range of `len` bytes at `base`.
    ///
    /// # Safety
    /// The range must be valid for reads and writes, from any thread, until the completion of every
    /// request it is used in has been reaped or the request's queue has been dropped. Others (a
    /// guest) may change it meanwhile: its contents are never trusted.
    pub unsafe fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: base.cast(), iov_len: len })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    pub(crate) fn address(&self) -> usize {
        self.0.iov_base as usize
    }
}

impl std::fmt::Debug for IoVec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoVec({:p}, {})", self.0.iov_base, self.0.iov_len)
    }
}
