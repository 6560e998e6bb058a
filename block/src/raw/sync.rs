//! An open file as a node: blocking access, growth, holes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::RawImage;
use crate::buffer::AlignedBuffer;
use crate::node::{Extent, Preallocation, os_error};
use crate::{BlockError, BlockNode};

/// Most bytes that pass through a bounce buffer or are written as zeroes in one call.
const CHUNK: u64 = 1 << 20;

fn fallocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    loop {
        // SAFETY: no memory is passed.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL))
}

/// Reads as much as there is; the rest becomes zeroes.
fn read_all(file: &File, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
    while !buf.is_empty() {
        match file.read_at(buf, offset) {
            Ok(0) => {
                buf.fill(0);
                return Ok(());
            }
            Ok(n) => {
                offset += n as u64;
                buf = buf.get_mut(n..).unwrap_or_default();
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl RawImage {
    fn check(&self, offset: u64, len: u64) -> io::Result<u64> {
        let end = offset.checked_add(len).filter(|end| *end <= i64::MAX as u64);
        end.ok_or_else(|| os_error(libc::EFBIG))
    }

    fn grown(&self, end: u64) {
        if !self.is_device {
            self.size.fetch_max(end, Ordering::AcqRel);
        }
    }

    fn aligned(&self, offset: u64, buf: &[u8]) -> bool {
        let a = self.align;
        offset.is_multiple_of(a.offset)
            && (buf.len() as u64).is_multiple_of(a.offset)
            && (buf.as_ptr() as usize).is_multiple_of(a.memory)
    }

    /// Direct I/O through a buffer; a part of a block is read before it is written.
    fn bounce(&self, offset: u64, len: u64) -> io::Result<(AlignedBuffer, u64, usize)> {
        let start = offset - offset % self.align.offset;
        let window = (offset - start + len).next_multiple_of(self.align.offset);
        let buffer =
            AlignedBuffer::new(window as usize, self.align.memory).ok_or_else(|| os_error(libc::ENOMEM))?;
        Ok((buffer, start, (offset - start) as usize))
    }

    fn write_direct(&self, mut offset: u64, mut buf: &[u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let n = buf.len().min(CHUNK as usize);
            let (now, rest) = buf.split_at(n);
            let whole =
                offset.is_multiple_of(self.align.offset) && (n as u64).is_multiple_of(self.align.offset);
            // Two writers of one block must not undo each other's.
            let _guard = (!whole).then(|| self.unaligned.lock());
            let (mut bounce, start, skip) = self.bounce(offset, n as u64)?;
            if !whole {
                read_all(&self.file, start, bounce.as_mut_slice())?;
            }
            if let Some(place) = bounce.as_mut_slice().get_mut(skip..skip + n) {
                place.copy_from_slice(now);
            }
            self.file.write_all_at(bounce.as_slice(), start)?;
            offset += n as u64;
            buf = rest;
        }
        Ok(())
    }

    /// Has the host copy bytes of another file, which it may do by sharing them. False if these two files it does not copy so;
    /// then some of it may be copied.
    ///
    /// # Errors
    /// The host's; `EROFS` if the image is not written.
    pub fn copy_from(&self, offset: u64, from: &Self, from_offset: u64, len: u64) -> io::Result<bool> {
        if self.options.readonly {
            return Err(os_error(libc::EROFS));
        }
        let end = self.check(offset, len)?;
        let (mut to_at, mut from_at) = (offset as i64, self.check(from_offset, 0)? as i64);
        while (to_at as u64) < end {
            let left = (end - to_at as u64) as usize;
            let (from_fd, to_fd) = (from.file.as_raw_fd(), self.file.as_raw_fd());
            // SAFETY: the two offsets are valid for the call, and both files are kept open.
            let n = unsafe { libc::copy_file_range(from_fd, &mut from_at, to_fd, &mut to_at, left, 0) };
            match n {
                // The source ends, or the file system says nothing of it.
                0 => return Ok(false),
                1.. => self.grown(to_at as u64),
                _ => {
                    let error = io::Error::last_os_error();
                    match error.raw_os_error() {
                        Some(libc::EINTR) => {}
                        Some(libc::EXDEV | libc::EBADF | libc::ETXTBSY) => return Ok(false),
                        _ if unsupported(&error) => return Ok(false),
                        _ => return Err(error),
                    }
                }
            }
        }
        self.note_write(end);
        Ok(true)
    }

    /// Has the file system share bytes of another file with this one, which takes neither time nor space. False if it cannot:
    /// then nothing has changed.
    ///
    /// # Errors
    /// The host's; `EROFS` if the image is not written.
    pub fn share_from(&self, offset: u64, from: &Self, from_offset: u64, len: u64) -> io::Result<bool> {
        /// `struct file_clone_range` of linux/fs.h.
        #[repr(C)]
        struct Range {
            from_fd: i64,
            from_offset: u64,
            len: u64,
            offset: u64,
        }
        /// `FICLONERANGE`: `_IOW(0x94, 13, struct file_clone_range)`.
        const FICLONERANGE: libc::Ioctl = 0x4020_940d;
        self.check_writable()?;
        let end = self.check(offset, len)?;
        self.check(from_offset, len)?;
        if self.is_device || from.is_device || len == 0 {
            return Ok(false);
        }
        let range = Range { from_fd: i64::from(from.file.as_raw_fd()), from_offset, len, offset };
        // SAFETY: FICLONERANGE reads one `file_clone_range`, which `range` is, and both files are kept open.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), FICLONERANGE, &range) } != 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::ENOSPC | libc::EDQUOT | libc::EIO) => Err(error),
                _ => Ok(false),
            };
        }
        self.grown(end);
        self.note_write(end);
        Ok(true)
    }

    fn zero_by_writing(&self, mut offset: u64, len: u64) -> io::Result<()> {
        let zeroes = vec![0; len.min(CHUNK) as usize];
        let end = offset + len;
        while offset < end {
            let n = (end - offset).min(CHUNK) as usize;
            self.write_at(offset, zeroes.get(..n).unwrap_or(&zeroes))?;
            offset += n as u64;
        }
        Ok(())
    }

    /// Where the next byte of that kind is (`SEEK_DATA` or `SEEK_HOLE`); `None` past the last.
    fn seek(&self, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
        // SAFETY: no memory is passed.
        let at = unsafe { libc::lseek(self.file.as_raw_fd(), offset as i64, whence) };
        if at >= 0 {
            return Ok(Some(at as u64));
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(error) }
    }

    fn preallocate(&self, from: u64, to: u64, how: Preallocation) -> io::Result<()> {
        match how {
            Preallocation::Falloc if to > from => fallocate(&self.file, 0, from, to - from),
            Preallocation::Full if to > from => {
                self.zero_by_writing(from, to - from)?;
                self.flush()
            }
            Preallocation::Metadata => {
                Err(io::Error::new(io::ErrorKind::Unsupported, "Unsupported preallocation mode 'metadata'"))
            }
            _ => Ok(()),
        }
    }
}

impl BlockNode for RawImage {
    fn driver(&self) -> &'static str {
        if self.is_device { "host_device" } else { "file" }
    }

    fn size(&self) -> u64 {
        RawImage::size(self)
    }

    fn is_readonly(&self) -> bool {
        self.options.readonly
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        if self.aligned(offset, buf) {
            return read_all(&self.file, offset, buf);
        }
        let mut at = offset;
        for part in buf.chunks_mut(CHUNK as usize) {
            let (mut bounce, start, skip) = self.bounce(at, part.len() as u64)?;
            read_all(&self.file, start, bounce.as_mut_slice())?;
            if let Some(from) = bounce.as_slice().get(skip..skip + part.len()) {
                part.copy_from_slice(from);
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let end = self.check(offset, buf.len() as u64)?;
        self.check_writable()?;
        self.note_write(end);
        if self.aligned(offset, buf) {
            self.file.write_all_at(buf, offset)?;
            self.grown(end);
        } else {
            self.write_direct(offset, buf)?;
            self.grown(end.next_multiple_of(self.align.offset));
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let given_up = !self.active.load(Ordering::Acquire);
        if self.options.readonly || self.options.no_flush || given_up {
            return Ok(());
        }
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        self.check_writable()?;
        if !self.options.sparse || len == 0 {
            return Ok(());
        }
        match fallocate(&self.file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len) {
            Err(e) if !unsupported(&e) => Err(e),
            _ => Ok(()),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let end = self.check(offset, len)?;
        self.check_writable()?;
        if len == 0 {
            return Ok(());
        }
        // Who writes a part of a block reads it first, and must not write back what was there before.
        let blocks = self.align.offset;
        let part = !offset.is_multiple_of(blocks) || !len.is_multiple_of(blocks);
        let guard = part.then(|| self.unaligned.lock());
        let size = RawImage::size(self);
        if !self.is_device && offset >= size && unmap {
            drop(guard);
            // The last byte alone. A new length (`ftruncate`) would cut off what others write behind `end` at this moment.
            return self.write_at(end - 1, &[0]);
        }
        let first = if unmap && self.options.sparse && end <= size {
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE
        } else {
            libc::FALLOC_FL_ZERO_RANGE
        };
        match fallocate(&self.file, first, offset, len) {
            Ok(()) => self.grown(end),
            Err(e) if unsupported(&e) => {
                drop(guard);
                self.zero_by_writing(offset, len)?;
            }
            Err(e) => return Err(e),
        }
        Ok(())
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        let size = RawImage::size(self);
        let len = len.min(size.saturating_sub(offset));
        let at = Some(offset);
        let all = Extent { len, allocated: true, data: true, zero: false, compressed: false, offset: at };
        if self.is_device || len == 0 {
            return Ok(all);
        }
        let Ok(data) = self.seek(offset, libc::SEEK_DATA) else { return Ok(all) };
        match data {
            Some(data) if data <= offset => {
                let hole = self.seek(offset, libc::SEEK_HOLE).ok().flatten().unwrap_or(size);
                Ok(Extent { len: len.min(hole.saturating_sub(offset)).max(1), ..all })
            }
            next => {
                let len = next.map_or(len, |d| len.min(d - offset));
                Ok(Extent { len, data: false, zero: true, ..all })
            }
        }
    }

    fn truncate(&self, size: u64, preallocation: Preallocation) -> io::Result<()> {
        self.check_writable()?;
        let old = RawImage::size(self);
        if self.is_device {
            if size > old {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "Cannot grow device files"));
            }
            return Ok(());
        }
        if size < old && preallocation != Preallocation::Off {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "Preallocation can't be used for shrinking files",
            ));
        }
        self.check(size, 0)?;
        if preallocation != Preallocation::Falloc {
            self.file.set_len(size)?;
        }
        let grown = self.preallocate(old, size, preallocation);
        if grown.is_err() {
            self.file.set_len(old)?;
        }
        self.size.store(if grown.is_ok() { size } else { old }, Ordering::Release);
        grown
    }

    fn path(&self) -> Option<PathBuf> {
        Some(self.options.path.clone())
    }

    fn disk_usage(&self) -> u64 {
        self.file.metadata().map_or(0, |m| m.blocks() * 512)
    }

    fn refresh_size(&self) -> io::Result<()> {
        self.look_at_size().map(drop)
    }

    fn inactivate(&self) -> io::Result<()> {
        self.give_up()
    }

    fn activate(&self) -> Result<(), BlockError> {
        self.take()
    }

    fn whole_file(self: Arc<Self>) -> Option<Arc<RawImage>> {
        Some(self)
    }

    fn as_file(self: Arc<Self>) -> Option<Arc<RawImage>> {
        Some(self)
    }
}
