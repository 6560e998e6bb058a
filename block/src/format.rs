//! Raw disks within files, and which format a file is of.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::node::{Extent, Plan, Preallocation, os_error};
use crate::options::Driver;
use crate::ranges::Ranges;
use crate::raw::RawImage;
use crate::{BlockError, BlockNode, Op};

/// Bytes from the start of a file by which its format is known.
pub const PROBE: usize = 2048;

/// A raw disk: a file, or a part of one.
#[derive(Debug)]
pub struct RawFormat {
    file: Arc<dyn BlockNode>,
    offset: u64,
    /// Set if the options say so; otherwise it is the file's.
    fixed: Option<u64>,
    size: AtomicU64,
    readonly: bool,
    ranges: Arc<Ranges>,
}

impl RawFormat {
    /// The disk from `offset` on, `size` bytes or as many as there are.
    ///
    /// # Errors
    /// [`BlockError::Option`] if the file is smaller.
    pub fn new(
        file: Arc<dyn BlockNode>,
        offset: u64,
        size: Option<u64>,
        readonly: bool,
    ) -> Result<Arc<Self>, BlockError> {
        let there = file.size();
        let rest = there.checked_sub(offset).ok_or_else(|| {
            BlockError::Option(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({there})"
            ))
        })?;
        if size.is_some_and(|s| s > rest) {
            let text = format!(
                "The sum of offset ({offset}) and size has to be smaller or equal to the actual size of the containing file ({there})"
            );
            return Err(BlockError::Option(text));
        }
        // Sizes of raw disks are in sectors; what is missing reads as zeroes.
        let now = size.unwrap_or(rest).next_multiple_of(512);
        Ok(Arc::new(Self {
            file,
            offset,
            fixed: size,
            size: AtomicU64::new(now),
            readonly,
            ranges: Arc::default(),
        }))
    }

    fn place(&self, offset: u64, len: u64) -> io::Result<u64> {
        let end = offset.checked_add(len).ok_or_else(|| os_error(libc::EINVAL))?;
        if end > self.size.load(Ordering::Acquire) {
            return Err(os_error(libc::EIO));
        }
        Ok(offset + self.offset)
    }

    fn writable(&self, offset: u64, len: u64) -> io::Result<u64> {
        if self.readonly { Err(os_error(libc::EROFS)) } else { self.place(offset, len) }
    }
}

impl BlockNode for RawFormat {
    fn driver(&self) -> &'static str {
        "raw"
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn is_readonly(&self) -> bool {
        self.readonly
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_at(self.place(offset, buf.len() as u64)?, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.file.write_at(self.writable(offset, buf.len() as u64)?, buf)
    }

    fn flush(&self) -> io::Result<()> {
        if self.readonly { Ok(()) } else { self.file.flush() }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(self.writable(offset, len)?, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.file.write_zeroes(self.writable(offset, len)?, len, unmap)
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        let len = len.min(self.size().saturating_sub(offset));
        let at = self.place(offset, len)?;
        let extent = self.file.status(at, len)?;
        if extent.len == 0 && len != 0 {
            // The part of the last sector that is not there.
            return Ok(Extent {
                len,
                allocated: true,
                data: false,
                zero: true,
                compressed: false,
                offset: Some(at),
            });
        }
        // A file's end within a sector hides nothing: the rest of the sector belongs to it.
        let end = self.file.size();
        let reaches_end = at + extent.len == end && !end.is_multiple_of(512);
        let more = if reaches_end { (len - extent.len).min(511) } else { 0 };
        Ok(Extent { len: extent.len + more, ..extent })
    }

    fn truncate(&self, size: u64, preallocation: Preallocation) -> io::Result<()> {
        if self.readonly {
            return Err(os_error(libc::EROFS));
        }
        if self.fixed.is_some() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "Cannot resize fixed-size raw disks"));
        }
        let end = size.checked_add(self.offset).ok_or_else(|| os_error(libc::EFBIG))?;
        self.file.truncate(end, preallocation)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn file(&self) -> Option<Arc<dyn BlockNode>> {
        Some(Arc::clone(&self.file))
    }

    fn plan(&self, op: Op, offset: u64, len: u64) -> Option<Plan> {
        match op {
            Op::Flush => Some(Plan::Flush),
            Op::Read | Op::Write => {
                let at = if op == Op::Write { self.writable(offset, len) } else { self.place(offset, len) }
                    .ok()?;
                if at.checked_add(len)? > self.file.size() {
                    return None;
                }
                Some(Plan::File(at, self.ranges.lock(0, 0, false)))
            }
            _ => None,
        }
    }

    fn data_file(&self) -> Option<Arc<RawImage>> {
        Arc::clone(&self.file).as_file()
    }

    fn whole_file(self: Arc<Self>) -> Option<Arc<RawImage>> {
        let whole = self.offset == 0 && self.fixed.is_none();
        whole.then(|| Arc::clone(&self.file).whole_file()).flatten()
    }

    fn refresh_size(&self) -> io::Result<()> {
        self.file.refresh_size()?;
        if self.fixed.is_none() {
            let size = self.file.size().saturating_sub(self.offset);
            self.size.store(size.next_multiple_of(512), Ordering::Release);
        }
        Ok(())
    }
}

/// The format of a file with these first bytes.
///
/// # Errors
/// [`BlockError::Unsupported`] with the name of a format that is recognised but cannot be read.
pub fn probe(first: &[u8]) -> Result<Driver, BlockError> {
    let starts = |magic: &[u8]| first.starts_with(magic);
    let at = |offset: usize, magic: &[u8]| first.get(offset..offset + magic.len()) == Some(magic);
    if starts(b"QFI\xfb") && (at(4, &[0, 0, 0, 2]) || at(4, &[0, 0, 0, 3])) {
        return Ok(Driver::Qcow2);
    }
    if starts(b"LUKS\xba\xbe\0\x01") {
        return Ok(Driver::Luks);
    }
    let read = [
        (Driver::Vmdk, starts(b"KDMV") || starts(b"COWD") || starts(b"# Disk DescriptorFile")),
        (Driver::Vhdx, starts(b"vhdxfile")),
        (Driver::Vpc, starts(b"conectix")),
        (Driver::Vdi, at(0x40, &0xbeda_107fu32.to_le_bytes())),
    ];
    if let Some((driver, _)) = read.iter().find(|(_, found)| *found) {
        return Ok(*driver);
    }
    let foreign = [
        ("qcow", starts(b"QFI\xfb\0\0\0\x01")),
        ("qed", starts(b"QED\0")),
        ("parallels", starts(b"WithoutFreeSpace") || starts(b"WithouFreSpacExt")),
    ];
    match foreign.iter().find(|(_, found)| *found) {
        Some((name, _)) => Err(BlockError::Unsupported(format!(
            "the image's format is '{name}', which is not supported; name the format if it is another one"
        ))),
        None => Ok(Driver::Raw),
    }
}
