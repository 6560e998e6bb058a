//! Guest RAM as host memory ranges, for system calls that move data themselves.

use holdfast_block::IoVec;
use holdfast_memory::GuestMemory;
use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

use crate::queue::Segment;

/// The host memory behind `segments`, in order; `None` if any of it is not RAM. The ranges are valid
/// while `memory` (or a clone of it) is kept; guests may change their contents at any time.
pub fn vectors(memory: &GuestMemory, segments: &[Segment]) -> Option<Vec<libc::iovec>> {
    let mut out = Vec::with_capacity(segments.len());
    for s in segments {
        for slice in memory.get_slices(s.addr, s.len as usize) {
            let slice = slice.ok()?;
            out.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
        }
    }
    Some(out)
}

/// [`vectors`] for requests that outlive the call.
///
/// # Safety
/// `memory` (or a clone of it) must be kept until the requests that use the ranges are done.
pub unsafe fn iovecs(memory: &GuestMemory, segments: &[Segment]) -> Option<Vec<IoVec>> {
    let vectors = vectors(memory, segments)?;
    // SAFETY: the ranges are mapped RAM of `memory`, which the caller keeps.
    Some(vectors.into_iter().map(|v| unsafe { IoVec::new(v.iov_base.cast(), v.iov_len) }).collect())
}

/// Reports that `segments` were written by other means than `vm-memory`: dirty tracking and
/// translated code depend on it. To be called after the write.
pub fn mark_written(memory: &GuestMemory, segments: &[Segment]) {
    for s in segments {
        for slice in memory.get_slices(s.addr, s.len as usize).flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}
