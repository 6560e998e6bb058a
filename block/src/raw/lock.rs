//! Locks against a second user: open-file-description locks, released when the image is closed.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::BlockError;

/// What is locked of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockRange {
    /// The bytes it has when it is opened.
    Bytes,
    /// The whole file, however it grows.
    Full,
}

fn flock(kind: libc::c_int, range: LockRange, size: u64) -> libc::flock {
    // SAFETY: all-zero bytes are a valid `flock`.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = 0;
    // Length 0 means up to the end, wherever that is.
    lock.l_len = match range {
        LockRange::Bytes => i64::try_from(size).unwrap_or(0),
        LockRange::Full => 0,
    };
    lock
}

/// Locks `file` for reading or writing.
pub(super) fn lock(
    file: &File,
    path: &Path,
    readonly: bool,
    range: LockRange,
    size: u64,
) -> Result<(), BlockError> {
    let kind = if readonly { libc::F_RDLCK } else { libc::F_WRLCK };
    let request = flock(kind, range, size);
    // SAFETY: `request` is a valid flock, only read by the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &request) } == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    match source.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => {
            let mut holder = flock(kind, range, size);
            // SAFETY: `holder` is a valid flock that the call may overwrite.
            let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut holder) };
            let reading = rc == 0 && holder.l_type == libc::F_RDLCK as libc::c_short;
            let how = if reading { "for reading" } else { "for writing" };
            Err(BlockError::Locked { path: path.to_owned(), how })
        }
        // File systems without locks: nothing to be had.
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS) => {
            tracing::warn!(path = %path.display(), error = %source, "the image cannot be locked");
            Ok(())
        }
        _ => Err(BlockError::Host { path: path.to_owned(), what: "cannot be locked", source }),
    }
}
