//! Sparse extents: grains that a directory and tables lead to.

use std::io::{self, Read, Write};
use std::sync::Arc;

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use parking_lot::Mutex;

use super::MAX_DESCRIPTOR;
use crate::mapped::{MAX_ENTRIES, Place, Run, bad, le16, le32, le64, read_part};
use crate::{BlockError, BlockNode};

pub(super) const SECTOR: u64 = 512;
/// Flag: there is a second grain directory.
const REDUNDANT: u32 = 1 << 1;
/// Flag: entries of 1 are grains of zeroes.
const ZERO_GRAINS: u32 = 1 << 2;
/// Flag: grains are compressed.
const COMPRESSED: u32 = 1 << 16;
/// The directory's place is in the footer.
const IN_FOOTER: u64 = u64::MAX;

#[derive(Debug, Default)]
struct Cached {
    /// The grain table that was read last, by its place.
    table: Option<(u64, Vec<u32>)>,
    /// The grain that was unpacked last, by its place.
    grain: Option<(u64, Arc<Vec<u8>>)>,
    /// The next place for a grain, in bytes; 0 if nothing is written.
    next: u64,
}

/// A sparse extent.
#[derive(Debug)]
pub(super) struct Sparse {
    file: Arc<dyn BlockNode>,
    size: u64,
    /// Bytes of a grain.
    grain: u64,
    /// Entries of a grain table.
    entries: u64,
    directory: Vec<u32>,
    /// The copy of the directory, where there is one.
    redundant: Vec<u32>,
    flags: u32,
    /// First sector of grains.
    overhead: u64,
    /// Where the descriptor is, in bytes, and how long.
    descriptor: (u64, u64),
    cached: Mutex<Cached>,
}

impl Sparse {
    pub(super) fn open(file: Arc<dyn BlockNode>) -> Result<Self, BlockError> {
        let what = "Could not read the VMDK header";
        let mut h = read_part(&*file, 0, SECTOR, what)?;
        let descriptor = (le64(&h, 28), le64(&h, 36));
        if le64(&h, 56) == IN_FOOTER {
            // The file ends with a marker, the footer and the end-of-stream marker.
            let Some(at) = file.size().checked_sub(2 * SECTOR) else {
                return bad("VMDK image without its footer");
            };
            h = read_part(&*file, at, SECTOR, what)?;
        }
        if !h.starts_with(b"KDMV") {
            return bad("VMDK extent without its header or footer");
        }
        let (version, flags) = (le32(&h, 4), le32(&h, 8));
        if !(1..=3).contains(&version) {
            return Err(BlockError::Unsupported(format!("Unsupported VMDK version {version}")));
        }
        if flags & COMPRESSED != 0 && le16(&h, 77) != 1 {
            return Err(BlockError::Unsupported("VMDK compression is not deflate".into()));
        }
        let (capacity, grain) = (le64(&h, 12), le64(&h, 20));
        let entries = u64::from(le32(&h, 44));
        if !grain.is_power_of_two() || !(8..=4096).contains(&grain) || !(1..=4096).contains(&entries) {
            return bad(format!("VMDK extent with grains of {grain} sectors, {entries} in a table"));
        }
        if capacity > 1 << 42 {
            return bad(format!("VMDK extent of {capacity} sectors is too large"));
        }
        let count = capacity.div_ceil(grain * entries);
        if count > MAX_ENTRIES {
            return bad("VMDK grain directory is too large");
        }
        let directory = |sector: u64| {
            let at = sector.checked_mul(SECTOR);
            let at = at.ok_or_else(|| BlockError::Format("VMDK grain directory beyond the end".into()))?;
            let bytes = read_part(&*file, at, count * 4, "Could not read the VMDK grain directory")?;
            Ok::<Vec<u32>, BlockError>(bytes.chunks_exact(4).map(|e| le32(e, 0)).collect())
        };
        let redundant =
            if flags & REDUNDANT != 0 && le64(&h, 48) != 0 { directory(le64(&h, 48))? } else { vec![] };
        Ok(Self {
            directory: directory(le64(&h, 56))?,
            redundant,
            file,
            size: capacity * SECTOR,
            grain: grain * SECTOR,
            entries,
            flags,
            overhead: le64(&h, 64),
            descriptor,
            cached: Mutex::default(),
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The descriptor in the extent and where it starts in the file, if there is one.
    pub(super) fn descriptor(&self) -> Result<Option<(String, u64)>, BlockError> {
        let (at, len) = self.descriptor;
        if at == 0 || len == 0 {
            return Ok(None);
        }
        let place =
            at.checked_mul(SECTOR).zip(len.checked_mul(SECTOR)).filter(|(_, len)| *len <= MAX_DESCRIPTOR);
        let Some((at, len)) = place else { return bad("VMDK descriptor is too long") };
        let bytes = read_part(&*self.file, at, len, "Could not read the VMDK descriptor")?;
        Ok(Some((String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned(), at)))
    }

    pub(super) fn file(&self) -> &Arc<dyn BlockNode> {
        &self.file
    }

    pub(super) fn grain(&self) -> u64 {
        self.grain
    }

    pub(super) fn is_compressed(&self) -> bool {
        self.flags & COMPRESSED != 0
    }

    /// Looks at all tables, so that grains can be added behind what is there.
    ///
    /// # Errors
    /// [`BlockError::Format`] if grains overlap each other or the tables.
    pub(super) fn prepare_to_write(&self) -> Result<(), BlockError> {
        let mut next = self.overhead.saturating_mul(SECTOR).max(self.file.size());
        // By places; grains that are not at multiples of their size are not told apart.
        let mut used = vec![0u64; (self.file.size() / self.grain / 64 + 1).min(MAX_ENTRIES * 16) as usize];
        for table in self.directory.iter().chain(&self.redundant) {
            if *table == 0 {
                return Err(BlockError::Unsupported(
                    "VMDK images without all their grain tables are not written".into(),
                ));
            }
        }
        for table in &self.directory {
            let at = u64::from(*table) * SECTOR;
            let bytes = read_part(&*self.file, at, self.entries * 4, "Could not read a VMDK grain table")?;
            for sector in bytes.chunks_exact(4).map(|e| u64::from(le32(e, 0))) {
                if sector == 0 || (sector == 1 && self.flags & ZERO_GRAINS != 0) {
                    continue;
                }
                let place = sector * SECTOR;
                if sector < self.overhead {
                    return bad("VMDK image is corrupt: a grain lies over its tables");
                }
                next = next.max(place + self.grain);
                let index = place / self.grain;
                if let (true, Some(bits)) =
                    (place.is_multiple_of(self.grain), used.get_mut((index / 64) as usize))
                {
                    if *bits & 1 << (index % 64) != 0 {
                        return bad("VMDK image is corrupt: two grains share a place");
                    }
                    *bits |= 1 << (index % 64);
                }
            }
        }
        let unit = if self.is_compressed() { SECTOR } else { self.grain };
        self.cached.lock().next = next.next_multiple_of(unit);
        Ok(())
    }

    /// Changes the entry of a grain, in both tables.
    fn set_entry(&self, cached: &mut Cached, grain: u64, sector: u32) -> io::Result<()> {
        let (table, within) = ((grain / self.entries) as usize, grain % self.entries);
        for directory in [&self.redundant, &self.directory] {
            if let Some(at) = directory.get(table).filter(|t| **t != 0) {
                self.file.write_at(u64::from(*at) * SECTOR + within * 4, &sector.to_le_bytes())?;
            }
        }
        let at = self.directory.get(table).map(|t| u64::from(*t) * SECTOR);
        if let Some((_, entries)) = cached.table.as_mut().filter(|(place, _)| Some(*place) == at)
            && let Some(entry) = entries.get_mut(within as usize)
        {
            *entry = sector;
        }
        Ok(())
    }

    /// The sector of the next `len` bytes at the end of the file.
    fn room(&self, cached: &Cached, len: u64) -> io::Result<u32> {
        let full = || io::Error::other("the VMDK extent has no room for more grains");
        if cached.next == 0 {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        let sector = u32::try_from(cached.next / SECTOR).map_err(|_| full())?;
        let there = self.file.size();
        if there > cached.next {
            self.file.write_zeroes(cached.next, len.min(there - cached.next), false)?;
        }
        if there < cached.next + len {
            crate::mapped::grow(&*self.file, cached.next.max(there), cached.next + len)?;
        }
        Ok(sector)
    }

    /// Gives the grain at `offset` a place, if it has none.
    pub(super) fn allocate(&self, offset: u64) -> io::Result<()> {
        if self.is_compressed() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "streamOptimized VMDK images take compressed data only",
            ));
        }
        let grain = offset / self.grain;
        let mut cached = self.cached.lock();
        let sector = self.entry_of(&mut cached, grain)?;
        if sector != 0 && !(sector == 1 && self.flags & ZERO_GRAINS != 0) {
            return Ok(());
        }
        let sector = self.room(&cached, self.grain)?;
        self.set_entry(&mut cached, grain, sector)?;
        cached.next += self.grain;
        Ok(())
    }

    /// Makes the grain at `offset` one of zeroes, if the extent has those. What it had is lost.
    pub(super) fn forget(&self, offset: u64) -> io::Result<bool> {
        if self.flags & ZERO_GRAINS == 0 || self.is_compressed() {
            return Ok(false);
        }
        self.set_entry(&mut self.cached.lock(), offset / self.grain, 1)?;
        Ok(true)
    }

    /// Stores a grain compressed, at the end, with its marker: sector of the disk and length.
    pub(super) fn pack(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut whole = data.to_vec();
        whole.resize(self.grain as usize, 0);
        let mut encoder = ZlibEncoder::new(vec![0; 12], Compression::default());
        encoder.write_all(&whole)?;
        let mut packed = encoder.finish()?;
        let len = (packed.len() - 12) as u32;
        crate::mapped::put(&mut packed, 0, &(offset / SECTOR).to_le_bytes());
        crate::mapped::put(&mut packed, 8, &len.to_le_bytes());
        packed.resize(packed.len().next_multiple_of(SECTOR as usize), 0);
        let grain = offset / self.grain;
        let mut cached = self.cached.lock();
        if self.entry_of(&mut cached, grain)? != 0 {
            return Err(io::Error::other("compressed VMDK grains are written once"));
        }
        let sector = self.room(&cached, packed.len() as u64)?;
        self.file.write_at(cached.next, &packed)?;
        self.set_entry(&mut cached, grain, sector)?;
        cached.next += packed.len() as u64;
        Ok(())
    }

    /// The sector of a grain; 0 if there is none.
    fn entry(&self, grain: u64) -> io::Result<u32> {
        self.entry_of(&mut self.cached.lock(), grain)
    }

    fn entry_of(&self, cached: &mut Cached, grain: u64) -> io::Result<u32> {
        let table = self.directory.get((grain / self.entries) as usize).copied().unwrap_or(0);
        if table == 0 {
            return Ok(0);
        }
        let at = u64::from(table) * SECTOR;
        if cached.table.as_ref().is_none_or(|(place, _)| *place != at) {
            let mut bytes = vec![0; self.entries as usize * 4];
            self.file.read_at(at, &mut bytes)?;
            cached.table = Some((at, bytes.chunks_exact(4).map(|e| le32(e, 0)).collect()));
        }
        let entries = cached.table.as_ref().map(|(_, t)| t.as_slice()).unwrap_or_default();
        Ok(entries.get((grain % self.entries) as usize).copied().unwrap_or(0))
    }

    pub(super) fn locate(&self, offset: u64) -> io::Result<Run> {
        let within = offset % self.grain;
        let sector = self.entry(offset / self.grain)?;
        let place = match sector {
            0 => Place::Zero,
            1 if self.flags & ZERO_GRAINS != 0 => Place::Zero,
            _ if self.flags & COMPRESSED != 0 => Place::Packed { unit: u64::from(sector), skip: within },
            _ => Place::Data(Arc::clone(&self.file), u64::from(sector) * SECTOR + within),
        };
        Ok(Run { place, len: self.grain - within })
    }

    /// Places of grains that lie beyond the end of the file.
    pub(super) fn faults(&self, out: &mut Vec<String>) -> io::Result<()> {
        let end = self.file.size();
        for grain in 0..self.size.div_ceil(self.grain) {
            let sector = self.entry(grain)?;
            let zero = sector == 0 || (sector == 1 && self.flags & ZERO_GRAINS != 0);
            if !zero && u64::from(sector) * SECTOR >= end {
                out.push(format!("ERROR: cluster offset after file size: sector {sector}"));
            }
        }
        Ok(())
    }

    /// The grain at a sector.
    pub(super) fn unpack(&self, sector: u64) -> io::Result<Arc<Vec<u8>>> {
        if let Some((_, grain)) = self.cached.lock().grain.as_ref().filter(|(at, _)| *at == sector) {
            return Ok(Arc::clone(grain));
        }
        let corrupt = |text: &str| io::Error::other(format!("the VMDK image is corrupt: {text}"));
        let mut head = [0; 12];
        self.file.read_at(sector * SECTOR, &mut head)?;
        let len = u64::from(le32(&head, 8));
        if len == 0 || len > 2 * self.grain + SECTOR {
            return Err(corrupt("a compressed grain of an impossible length"));
        }
        let mut packed = vec![0; len as usize];
        self.file.read_at(sector * SECTOR + 12, &mut packed)?;
        let mut grain = Vec::with_capacity(self.grain as usize);
        let unpacked = ZlibDecoder::new(packed.as_slice()).take(self.grain + 1).read_to_end(&mut grain);
        unpacked.map_err(|_| corrupt("a compressed grain cannot be unpacked"))?;
        if grain.len() as u64 > self.grain {
            return Err(corrupt("a compressed grain is too long"));
        }
        // The disk's last grain may be shorter.
        grain.resize(self.grain as usize, 0);
        let grain = Arc::new(grain);
        self.cached.lock().grain = Some((sector, Arc::clone(&grain)));
        Ok(grain)
    }
}
