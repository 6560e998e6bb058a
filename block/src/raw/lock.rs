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
    /// The bytes by which QEMU's programs tell each other what they do and do not share.
    Qemu,
    /// Nothing: whoever else uses it may change it at any time.
    None,
}

/// Permissions of QEMU's protocol: the byte `PERMISSION + n` is locked by users of permission `n`, and `SHARED + n` by those
/// who do not bear others using it.
mod qemu {
    pub(super) const PERMISSION: i64 = 100;
    pub(super) const SHARED: i64 = 200;
    pub(super) const CONSISTENT_READ: i64 = 0;
    pub(super) const WRITE: i64 = 1;
    pub(super) const RESIZE: i64 = 3;
}

/// Sets (`Some`) or only probes (`None` of `kind`) one byte's lock. True if nobody else holds it against us.
fn byte(file: &File, command: libc::c_int, kind: libc::c_int, at: i64) -> io::Result<bool> {
    let mut lock = flock(kind, LockRange::Full, 0);
    lock.l_start = at;
    lock.l_len = 1;
    // SAFETY: `lock` is a valid flock that the call may overwrite.
    if unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) } == 0 {
        return Ok(command != libc::F_OFD_GETLK || lock.l_type == libc::F_UNLCK as libc::c_short);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

fn lock_as_qemu(file: &File, readonly: bool) -> io::Result<Option<&'static str>> {
    use qemu::{CONSISTENT_READ, PERMISSION, RESIZE, SHARED, WRITE};
    let used: &[i64] = if readonly { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE, RESIZE] };
    // Writers and readers alike bear no other writer, and nobody who changes the size.
    let unshared = [WRITE, RESIZE];
    for n in used {
        byte(file, libc::F_OFD_SETLK, libc::F_RDLCK, PERMISSION + n)?;
    }
    for n in unshared {
        byte(file, libc::F_OFD_SETLK, libc::F_RDLCK, SHARED + n)?;
    }
    let name = |n| match n {
        CONSISTENT_READ => "consistent read",
        WRITE => "write",
        _ => "resize",
    };
    for n in used {
        if !byte(file, libc::F_OFD_GETLK, libc::F_WRLCK, SHARED + n)? {
            return Ok(Some(name(*n)));
        }
    }
    for n in unshared {
        if !byte(file, libc::F_OFD_GETLK, libc::F_WRLCK, PERMISSION + n)? {
            return Ok(Some(if n == WRITE { "shared \"write\"" } else { "shared \"resize\"" }));
        }
    }
    Ok(None)
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
        LockRange::Full | LockRange::Qemu | LockRange::None => 0,
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
    if range == LockRange::None {
        return Ok(());
    }
    if range == LockRange::Qemu {
        return match lock_as_qemu(file, readonly) {
            Ok(None) => Ok(()),
            Ok(Some(held)) => {
                let lock = held
                    .strip_prefix("shared ")
                    .map_or_else(|| format!("\"{held}\""), |s| format!("shared {s}"));
                Err(BlockError::QemuLocked { path: path.to_owned(), lock })
            }
            Err(source) => {
                tracing::warn!(path = %path.display(), error = %source, "the image cannot be locked");
                Ok(())
            }
        };
    }
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

/// Lets go of all locks of this open file.
pub(super) fn unlock(file: &File) -> io::Result<()> {
    let request = flock(libc::F_UNLCK, LockRange::Full, 0);
    // SAFETY: `request` is a valid flock, only read by the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &request) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // A file system without locks had none.
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS) => Ok(()),
        _ => Err(error),
    }
}
