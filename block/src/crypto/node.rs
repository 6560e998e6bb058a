//! A node whose bytes are encrypted in the node below.

use std::io;
use std::sync::Arc;

use super::{SECTOR, SectorCipher};
use crate::BlockNode;
use crate::node::{Extent, Preallocation, os_error};
use crate::ranges::Ranges;

/// Most bytes that are encrypted at a time.
const CHUNK: usize = 1 << 20;

/// Bytes of a file from `base` on, encrypted sector by sector; sectors are counted from there.
#[derive(Debug)]
pub struct CryptFile {
    file: Arc<dyn BlockNode>,
    base: u64,
    cipher: SectorCipher,
    /// Who writes a part of a sector has the sector for itself.
    ranges: Arc<Ranges>,
}

impl CryptFile {
    /// What is encrypted in `file` from `base` on.
    pub fn new(file: Arc<dyn BlockNode>, base: u64, cipher: SectorCipher) -> Arc<Self> {
        Arc::new(Self { file, base, cipher, ranges: Arc::default() })
    }

    fn place(&self, offset: u64, len: u64) -> io::Result<u64> {
        let at = self
            .base
            .checked_add(offset)
            .filter(|a| a.checked_add(len).is_some_and(|e| e <= i64::MAX as u64));
        at.ok_or_else(|| os_error(libc::EFBIG))
    }

    /// Reads whole sectors.
    fn read_sectors(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_at(self.place(offset, buf.len() as u64)?, buf)?;
        self.cipher.decrypt(offset / SECTOR as u64, buf);
        Ok(())
    }

    fn write_aligned(&self, mut offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut sealed = Vec::with_capacity(buf.len().min(CHUNK));
        for part in buf.chunks(CHUNK) {
            sealed.clear();
            sealed.extend_from_slice(part);
            self.cipher.encrypt(offset / SECTOR as u64, &mut sealed);
            self.file.write_at(self.place(offset, part.len() as u64)?, &sealed)?;
            offset += part.len() as u64;
        }
        Ok(())
    }
}

/// The whole sectors around a range.
pub(crate) fn window(offset: u64, len: usize) -> (u64, usize) {
    let sector = SECTOR as u64;
    let start = offset - offset % sector;
    (start, ((offset - start) as usize + len).next_multiple_of(SECTOR))
}

impl BlockNode for CryptFile {
    fn driver(&self) -> &'static str {
        "luks"
    }

    fn size(&self) -> u64 {
        self.file.size().saturating_sub(self.base)
    }

    fn is_readonly(&self) -> bool {
        self.file.is_readonly()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.place(offset, buf.len() as u64)?;
        let (start, len) = window(offset, buf.len());
        if start == offset && len == buf.len() {
            return self.read_sectors(offset, buf);
        }
        let mut at = offset;
        for part in buf.chunks_mut(CHUNK) {
            let (start, len) = window(at, part.len());
            let mut whole = vec![0; len];
            self.read_sectors(start, &mut whole)?;
            let skip = (at - start) as usize;
            part.copy_from_slice(whole.get(skip..skip + part.len()).unwrap_or_default());
            at += part.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.place(offset, buf.len() as u64)?;
        let (start, len) = window(offset, buf.len());
        let aligned = start == offset && len == buf.len();
        let _guard = self.ranges.lock(start, start + len as u64, !aligned);
        if aligned {
            return self.write_aligned(offset, buf);
        }
        let mut at = offset;
        for part in buf.chunks(CHUNK) {
            let (start, len) = window(at, part.len());
            let mut whole = vec![0; len];
            self.read_sectors(start, &mut whole)?;
            let skip = (at - start) as usize;
            if let Some(place) = whole.get_mut(skip..skip + part.len()) {
                place.copy_from_slice(part);
            }
            self.write_aligned(start, &whole)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    /// Kept: which sectors are in use is not told to the host.
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, mut offset: u64, mut len: u64, _unmap: bool) -> io::Result<()> {
        let zeroes = vec![0; len.min(CHUNK as u64) as usize];
        while len != 0 {
            let n = len.min(CHUNK as u64);
            self.write_at(offset, zeroes.get(..n as usize).unwrap_or_default())?;
            offset += n;
            len -= n;
        }
        Ok(())
    }

    fn status(&self, _offset: u64, len: u64) -> io::Result<Extent> {
        Ok(Extent { len, allocated: true, data: true, zero: false, compressed: false, offset: None })
    }

    fn truncate(&self, size: u64, preallocation: Preallocation) -> io::Result<()> {
        self.file.truncate(self.place(size, 0)?, preallocation)
    }

    fn file(&self) -> Option<Arc<dyn BlockNode>> {
        Some(Arc::clone(&self.file))
    }

    fn grows_by_zeroes(&self) -> bool {
        false
    }

    fn refresh_size(&self) -> io::Result<()> {
        self.file.refresh_size()
    }
}
