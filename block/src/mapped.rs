//! Images of other programs' formats, for reading: a map from the disk to places in files.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use crate::node::{Extent, Preallocation, os_error};
use crate::{BlockError, BlockNode};

/// Most entries of a table that is kept in memory.
pub(crate) const MAX_ENTRIES: u64 = 4 << 20;

/// Where bytes of the disk are.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// In a file, from this offset on.
    Data(Arc<dyn BlockNode>, u64),
    /// They are zero.
    Zero,
    /// In a compressed unit, from this byte of it on.
    Packed {
        /// Which unit, for [`Map::unpack`].
        unit: u64,
        /// The first byte.
        skip: u64,
    },
}

/// The start of a range of the disk.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) place: Place,
    /// Bytes, at least 1.
    pub(crate) len: u64,
}

/// What a format knows.
pub(crate) trait Map: Send + Sync + Debug {
    /// Name of the driver.
    fn driver(&self) -> &'static str;

    /// Size of the disk in bytes.
    fn size(&self) -> u64;

    /// Where the byte at `offset` is, which is within the disk.
    fn locate(&self, offset: u64) -> io::Result<Run>;

    /// The contents of a compressed unit.
    fn unpack(&self, _unit: u64) -> io::Result<Arc<Vec<u8>>> {
        Err(os_error(libc::EIO))
    }
}

/// An image that is read through a map.
#[derive(Debug)]
pub(crate) struct Mapped<M> {
    file: Arc<dyn BlockNode>,
    map: M,
}

pub(crate) fn bad<T>(text: impl Into<String>) -> Result<T, BlockError> {
    Err(BlockError::Format(text.into()))
}

/// Reads a part of a file that has to be there.
pub(crate) fn read_part(
    file: &dyn BlockNode,
    offset: u64,
    len: u64,
    what: &'static str,
) -> Result<Vec<u8>, BlockError> {
    let end = offset.checked_add(len).filter(|e| *e <= file.size().next_multiple_of(512));
    if end.is_none() || len > MAX_ENTRIES * 8 {
        return bad(format!("{what}: it lies beyond the end of the file, or is too large"));
    }
    let mut bytes = vec![0; len as usize];
    let read = file.read_at(offset, &mut bytes);
    read.map_err(|source| BlockError::Host { path: file.path().unwrap_or_default(), what, source })?;
    Ok(bytes)
}

/// Little-endian fields out of a buffer; what is not there is 0.
pub(crate) fn le16(b: &[u8], at: usize) -> u16 {
    b.get(at..at + 2).and_then(|s| s.try_into().ok()).map_or(0, u16::from_le_bytes)
}

pub(crate) fn le32(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|s| s.try_into().ok()).map_or(0, u32::from_le_bytes)
}

pub(crate) fn le64(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|s| s.try_into().ok()).map_or(0, u64::from_le_bytes)
}

pub(crate) fn be32(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|s| s.try_into().ok()).map_or(0, u32::from_be_bytes)
}

pub(crate) fn be64(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|s| s.try_into().ok()).map_or(0, u64::from_be_bytes)
}

impl<M: Map> Mapped<M> {
    pub(crate) fn new(file: Arc<dyn BlockNode>, map: M) -> Arc<Self> {
        Arc::new(Self { file, map })
    }

    fn run(&self, offset: u64) -> io::Result<Run> {
        let mut run = self.map.locate(offset)?;
        run.len = run.len.clamp(1, self.map.size() - offset);
        Ok(run)
    }
}

impl<M: Map> BlockNode for Mapped<M> {
    fn driver(&self) -> &'static str {
        self.map.driver()
    }

    fn size(&self) -> u64 {
        self.map.size()
    }

    fn is_readonly(&self) -> bool {
        true
    }

    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).ok_or_else(|| os_error(libc::EINVAL))?;
        if end > self.map.size() {
            return Err(os_error(libc::EIO));
        }
        while !buf.is_empty() {
            let run = self.run(offset)?;
            let n = run.len.min(buf.len() as u64);
            let (now, rest) = buf.split_at_mut(n as usize);
            match run.place {
                Place::Data(file, at) => file.read_at(at, now)?,
                Place::Zero => now.fill(0),
                Place::Packed { unit, skip } => {
                    let data = self.map.unpack(unit)?;
                    let from = data.get(skip as usize..(skip + n) as usize);
                    now.copy_from_slice(from.ok_or_else(|| os_error(libc::EIO))?);
                }
            }
            offset += n;
            buf = rest;
        }
        Ok(())
    }

    fn write_at(&self, _offset: u64, _buf: &[u8]) -> io::Result<()> {
        Err(os_error(libc::EROFS))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(os_error(libc::EROFS))
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        Err(os_error(libc::EROFS))
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        let len = len.min(self.map.size().saturating_sub(offset));
        let mut known: Option<Extent> = None;
        let mut at = offset;
        while at < offset + len {
            let run = self.run(at)?;
            let n = run.len.min(offset + len - at);
            let (data, packed, place) = match run.place {
                Place::Data(_, place) => (true, false, Some(place)),
                Place::Zero => (false, false, None),
                Place::Packed { .. } => (true, true, None),
            };
            let now =
                Extent { len: n, allocated: true, data, zero: !data, compressed: packed, offset: place };
            match &mut known {
                None => known = Some(now),
                Some(k)
                    if k.data == data && k.compressed == packed && k.offset.map(|o| o + k.len) == place =>
                {
                    k.len += n;
                }
                Some(_) => break,
            }
            at += n;
        }
        let nothing =
            Extent { len: 0, allocated: true, data: false, zero: true, compressed: false, offset: None };
        Ok(known.unwrap_or(nothing))
    }

    fn truncate(&self, _size: u64, _preallocation: Preallocation) -> io::Result<()> {
        Err(os_error(libc::EROFS))
    }

    fn file(&self) -> Option<Arc<dyn BlockNode>> {
        Some(Arc::clone(&self.file))
    }
}
