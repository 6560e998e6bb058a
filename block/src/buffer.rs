//! Memory that requests pass through: the only place that copies by pointer.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fmt;
use std::ptr::NonNull;

use crate::IoVec;

/// Zeroed memory of a given alignment, for direct I/O.
pub(crate) struct AlignedBuffer {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its memory; nothing else points into it.
unsafe impl Send for AlignedBuffer {}
// SAFETY: shared references only yield the address and copy out of memory that is not written then.
unsafe impl Sync for AlignedBuffer {}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuffer({})", self.layout.size())
    }
}

impl AlignedBuffer {
    /// `len` (not 0) bytes at a multiple of `align` (a power of two); `None` if there is no memory.
    pub(crate) fn new(len: usize, align: usize) -> Option<Self> {
        let layout = Layout::from_size_align(len, align).ok().filter(|l| l.size() != 0)?;
        // SAFETY: the layout has a size other than zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { base, layout })
    }

    pub(crate) fn len(&self) -> usize {
        self.layout.size()
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `base` points to `size` initialised bytes that nobody writes while `self` is shared.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.layout.size()) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.layout.size()) }
    }

    /// The first `len` bytes as a request's buffer, at most all of them.
    pub(crate) fn iovec(&self, len: usize) -> IoVec {
        // SAFETY: the memory lives as long as `self`, which its user keeps beside the request.
        unsafe { IoVec::new(self.base.as_ptr(), len.min(self.len())) }
    }

    /// Copies `len` bytes at `from` of this buffer to the start of `to`.
    pub(crate) fn scatter(&self, from: usize, len: usize, to: &[IoVec]) {
        let mut at = from.min(self.len());
        let mut left = len.min(self.len() - at);
        for v in to {
            let n = left.min(v.len());
            // SAFETY: `at + n` is at most the buffer's length; `v` is valid for `n <= v.len()` bytes by
            // the contract of `IoVec::new`, and is no part of this buffer.
            unsafe { std::ptr::copy_nonoverlapping(self.base.as_ptr().add(at), v.0.iov_base.cast(), n) };
            at += n;
            left -= n;
        }
    }

    /// Copies the first `len` bytes of `from` into this buffer.
    pub(crate) fn gather(&mut self, len: usize, from: &[IoVec]) {
        let mut at = 0;
        let mut left = len.min(self.len());
        for v in from {
            let n = left.min(v.len());
            // SAFETY: as in `scatter`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(v.0.iov_base.cast(), self.base.as_ptr().add(at), n) };
            at += n;
            left -= n;
        }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout and freed only here.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

/// The `len` bytes of `vectors` from byte `skip` on.
pub(crate) fn part(vectors: &[IoVec], mut skip: usize, mut len: usize) -> Vec<IoVec> {
    let mut out = Vec::new();
    for v in vectors {
        if skip >= v.len() {
            skip -= v.len();
            continue;
        }
        let n = (v.len() - skip).min(len);
        if n == 0 {
            break;
        }
        // SAFETY: a part of a valid range is a valid range for as long.
        out.push(unsafe { IoVec::new(v.0.iov_base.cast::<u8>().add(skip), n) });
        skip = 0;
        len -= n;
    }
    out
}

/// Fills all ranges with zeroes.
pub(crate) fn zero(vectors: &[IoVec]) {
    for v in vectors {
        // SAFETY: valid for writes by the contract of `IoVec::new`.
        unsafe { std::ptr::write_bytes(v.0.iov_base.cast::<u8>(), 0, v.len()) };
    }
}
