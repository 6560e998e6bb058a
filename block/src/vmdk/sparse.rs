//! Sparse extents: grains that a directory and tables lead to.

use std::io::{self, Read};
use std::sync::Arc;

use flate2::read::ZlibDecoder;
use parking_lot::Mutex;

use super::MAX_DESCRIPTOR;
use crate::mapped::{MAX_ENTRIES, Place, Run, bad, le16, le32, le64, read_part};
use crate::{BlockError, BlockNode};

const SECTOR: u64 = 512;
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
    flags: u32,
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
        let at = le64(&h, 56).checked_mul(SECTOR);
        let at = at.ok_or_else(|| BlockError::Format("VMDK grain directory beyond the end".into()))?;
        let bytes = read_part(&*file, at, count * 4, "Could not read the VMDK grain directory")?;
        Ok(Self {
            file,
            size: capacity * SECTOR,
            grain: grain * SECTOR,
            entries,
            directory: bytes.chunks_exact(4).map(|e| le32(e, 0)).collect(),
            flags,
            descriptor,
            cached: Mutex::default(),
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The descriptor in the extent, if there is one.
    pub(super) fn descriptor(&self) -> Result<Option<String>, BlockError> {
        let (at, len) = self.descriptor;
        if at == 0 || len == 0 {
            return Ok(None);
        }
        let place =
            at.checked_mul(SECTOR).zip(len.checked_mul(SECTOR)).filter(|(_, len)| *len <= MAX_DESCRIPTOR);
        let Some((at, len)) = place else { return bad("VMDK descriptor is too long") };
        let bytes = read_part(&*self.file, at, len, "Could not read the VMDK descriptor")?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// The sector of a grain; 0 if there is none.
    fn entry(&self, grain: u64) -> io::Result<u32> {
        let table = self.directory.get((grain / self.entries) as usize).copied().unwrap_or(0);
        if table == 0 {
            return Ok(0);
        }
        let at = u64::from(table) * SECTOR;
        let mut cached = self.cached.lock();
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
