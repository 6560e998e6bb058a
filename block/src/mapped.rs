//! Images of other programs' formats: a map from the disk to places in files.
//!
//! Reads and writes go to the places; what has none is made room for by the format, [`Map::allocate`]. Room is new space at
//! the end of the file, which reads as zeroes, so it does not matter in which order data and the entry that leads to it
//! reach the disk.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use crate::facts::ImageInfoSpecific;
use crate::node::{Extent, Plan, Preallocation, os_error};
use crate::ranges::Ranges;
use crate::raw::RawImage;
use crate::{BlockError, BlockNode, Op};

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

    /// Called before anything is written: the first call may have to say so in the image.
    fn begin(&self) -> io::Result<()> {
        Ok(())
    }

    /// Makes room for the unit that holds `offset`, if it has none: after that it has a place in a file, where there are zeroes.
    fn allocate(&self, _offset: u64) -> io::Result<()> {
        Err(os_error(libc::EROFS))
    }

    /// Makes the whole unit at `offset` zeroes without writing them, if the format can say that. True if it did.
    fn forget(&self, _offset: u64) -> io::Result<bool> {
        Ok(false)
    }

    /// Stores a unit compressed.
    fn pack(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "Compression not supported for this file format"))
    }

    /// Size of the units that [`Map::pack`] takes, if it is there.
    fn packed_unit(&self) -> Option<u64> {
        None
    }

    /// Size of the units in which space is given out, if it is.
    fn unit(&self) -> Option<u64> {
        None
    }

    /// Makes the map durable with all that was written.
    fn flush(&self, file: &dyn BlockNode) -> io::Result<()> {
        file.flush()
    }

    /// Called once, when an image that may have been written is let go.
    fn close(&self) -> io::Result<()> {
        Ok(())
    }

    /// What `info` says of the format.
    fn specific(&self) -> Option<ImageInfoSpecific> {
        None
    }

    /// Faults of the image, one text for each; `None` if the format has no check.
    fn check(&self) -> Option<io::Result<Vec<String>>> {
        None
    }
}

/// An image that is read and written through a map.
#[derive(Debug)]
pub(crate) struct Mapped<M: Map> {
    file: Arc<dyn BlockNode>,
    map: M,
    readonly: bool,
    ranges: Arc<Ranges>,
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

/// Makes a file longer, which nobody else does now: bytes `from` to `to`, where it ends at `from` at most, are zeroes then.
pub(crate) fn grow(file: &dyn BlockNode, from: u64, to: u64) -> io::Result<()> {
    file.truncate(to, Preallocation::Off)?;
    if file.grows_by_zeroes() { Ok(()) } else { file.write_zeroes(from, to - from, false) }
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

/// Big-endian and little-endian fields into a buffer that has room for them.
pub(crate) fn put(b: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = b.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

impl<M: Map> Mapped<M> {
    pub(crate) fn new(file: Arc<dyn BlockNode>, map: M, readonly: bool) -> Arc<Self> {
        Arc::new(Self { file, map, readonly, ranges: Arc::default() })
    }

    fn run(&self, offset: u64) -> io::Result<Run> {
        let mut run = self.map.locate(offset)?;
        run.len = run.len.clamp(1, self.map.size() - offset);
        Ok(run)
    }

    fn inside(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).ok_or_else(|| os_error(libc::EINVAL))?;
        if end > self.map.size() { Err(os_error(libc::EIO)) } else { Ok(()) }
    }

    fn writable(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.readonly {
            return Err(os_error(libc::EROFS));
        }
        self.inside(offset, len)?;
        self.map.begin()
    }
}

impl<M: Map> Drop for Mapped<M> {
    fn drop(&mut self) {
        if self.readonly {
            return;
        }
        if let Err(error) = self.map.close() {
            tracing::error!(path = crate::node::shown(&*self.file), %error, "closing the image failed");
        }
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
        self.readonly
    }

    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        self.inside(offset, buf.len() as u64)?;
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

    fn write_at(&self, mut offset: u64, mut buf: &[u8]) -> io::Result<()> {
        self.writable(offset, buf.len() as u64)?;
        while !buf.is_empty() {
            let mut run = self.run(offset)?;
            if !matches!(run.place, Place::Data(..)) {
                self.map.allocate(offset)?;
                run = self.run(offset)?;
            }
            let Place::Data(file, at) = run.place else {
                return Err(io::Error::other("the image gives no room to write"));
            };
            let n = run.len.min(buf.len() as u64) as usize;
            let (now, rest) = buf.split_at(n);
            file.write_at(at, now)?;
            offset += n as u64;
            buf = rest;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        if self.readonly { Ok(()) } else { self.map.flush(&*self.file) }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // None of these formats gives blocks back.
        self.writable(offset, len)
    }

    fn write_zeroes(&self, mut offset: u64, mut len: u64, unmap: bool) -> io::Result<()> {
        self.writable(offset, len)?;
        while len != 0 {
            let run = self.run(offset)?;
            let n = run.len.min(len);
            if let Place::Data(file, at) = run.place {
                let whole = self.map.unit().is_some_and(|u| offset.is_multiple_of(u) && n == u);
                if !(whole && unmap && self.map.forget(offset)?) {
                    file.write_zeroes(at, n, false)?;
                }
            } else if matches!(run.place, Place::Packed { .. }) {
                return Err(io::Error::other("compressed data is not written over in this format"));
            }
            offset += n;
            len -= n;
        }
        Ok(())
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
        Err(io::Error::new(io::ErrorKind::Unsupported, "Image format driver does not support resize"))
    }

    fn file(&self) -> Option<Arc<dyn BlockNode>> {
        Some(Arc::clone(&self.file))
    }

    fn plan(&self, op: Op, offset: u64, len: u64) -> Option<Plan> {
        if !matches!(op, Op::Read | Op::Write) || (op == Op::Write && self.readonly) {
            return None;
        }
        self.inside(offset, len).ok()?;
        if op == Op::Write {
            self.map.begin().ok()?;
        }
        let run = self.run(offset).ok().filter(|r| r.len >= len)?;
        match run.place {
            Place::Zero if op == Op::Read => Some(Plan::Zeroes),
            Place::Data(file, at)
                if Arc::ptr_eq(&file, &self.file) && at.checked_add(len)? <= file.size() =>
            {
                Some(Plan::File(at, self.ranges.lock(0, 0, false)))
            }
            _ => None,
        }
    }

    fn data_file(&self) -> Option<Arc<RawImage>> {
        Arc::clone(&self.file).as_file()
    }

    fn inactivate(&self) -> io::Result<()> {
        self.can_inactivate()
    }

    fn can_inactivate(&self) -> io::Result<()> {
        if self.readonly {
            return Ok(());
        }
        let text = format!("images of the format '{}' that are written do not migrate", self.map.driver());
        Err(io::Error::new(io::ErrorKind::Unsupported, text))
    }

    fn write_compressed(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.writable(offset, data.len() as u64)?;
        self.map.pack(offset, data)
    }

    fn compressed_unit(&self) -> Option<u64> {
        self.map.packed_unit()
    }

    fn cluster_size(&self) -> Option<u64> {
        self.map.unit()
    }

    fn format_specific(&self) -> Option<ImageInfoSpecific> {
        self.map.specific()
    }

    fn faults(&self) -> Option<io::Result<Vec<String>>> {
        self.map.check()
    }
}
