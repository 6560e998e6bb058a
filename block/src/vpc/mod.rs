//! Virtual PC's VHD images, fixed and dynamic ("Virtual Hard Disk Image Format Specification" 1.0).

mod create;

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

pub use create::create;

use crate::mapped::{MAX_ENTRIES, Map, Mapped, Place, Run, bad, be32, be64, read_part};
use crate::{BlockError, BlockNode};

const FOOTER: u64 = 512;
/// Largest geometry: such a disk's size is not what the geometry says.
const MAX_GEOMETRY: u64 = 65535 * 16 * 255;
/// Programs that mean the size and not the geometry.
const EXACT: [&[u8; 4]; 5] = [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS"];

#[derive(Debug)]
struct Vpc {
    file: Arc<dyn BlockNode>,
    size: u64,
    /// Bytes of a block; the whole disk's if the image is fixed.
    block: u64,
    /// Bytes of the sector bitmap before each block.
    bitmap: u64,
    /// Where blocks are; none if the image is fixed.
    dynamic: Option<Dynamic>,
}

#[derive(Debug)]
struct Dynamic {
    /// Where the block table is in the file.
    at: u64,
    /// The footer, which lies behind the last block.
    footer: Vec<u8>,
    table: Mutex<Table>,
}

#[derive(Debug)]
struct Table {
    /// First sectors of blocks.
    blocks: Vec<u32>,
    /// The next place for a block, in bytes.
    next: u64,
}

/// Puts the checksum of a footer or header into it.
fn set_checksum(b: &mut [u8], at: usize) {
    if let Some(field) = b.get_mut(at..at + 4) {
        field.fill(0);
    }
    let sum = !b.iter().fold(0u32, |sum, b| sum.wrapping_add(u32::from(*b)));
    crate::mapped::put(b, at, &sum.to_be_bytes());
}

/// The one's complement of the sum of all bytes but the checksum's own.
fn checksum(b: &[u8], at: usize) -> bool {
    let own = be32(b, at);
    let field = at..at + 4;
    let sum = b.iter().enumerate().filter(|(n, _)| !field.contains(n));
    !sum.fold(0u32, |sum, (_, b)| sum.wrapping_add(u32::from(*b))) == own
}

fn footer(file: &dyn BlockNode) -> Result<Vec<u8>, BlockError> {
    let first = read_part(file, 0, FOOTER, "Could not read the VHD footer")?;
    if first.starts_with(b"conectix") {
        return Ok(first);
    }
    let Some(at) = file.size().checked_sub(FOOTER) else { return bad("invalid VPC image") };
    let last = read_part(file, at, FOOTER, "Could not read the VHD footer")?;
    if last.starts_with(b"conectix") { Ok(last) } else { bad("invalid VPC image") }
}

/// Opens an image.
///
/// # Errors
/// [`BlockError::Format`], [`BlockError::Unsupported`] with what is wrong or not known.
pub fn open(file: Arc<dyn BlockNode>, readonly: bool) -> Result<Arc<dyn BlockNode>, BlockError> {
    let f = footer(&*file)?;
    if !checksum(&f, 64) {
        return bad("the VHD footer's checksum does not match");
    }
    let byte = |at: usize| f.get(at).copied().map_or(0, u64::from);
    let geometry = (byte(56) << 8 | byte(57)) * byte(58) * byte(59);
    let exact = EXACT.iter().any(|app| f.get(28..32) == Some(app.as_slice()));
    let current = be64(&f, 48);
    let size = if exact || geometry == MAX_GEOMETRY { current - current % 512 } else { geometry * 512 };
    let kind = be32(&f, 60);
    if size > 2040 << 30 {
        return bad(format!("VHD image of {size} bytes is too large"));
    }
    let (block, dynamic) = match kind {
        2 => (size.max(512), None),
        3 => {
            let (block, dynamic) = dynamic(&*file, &f, size)?;
            (block, Some(dynamic))
        }
        4 => {
            return Err(BlockError::Unsupported(
                "differencing VHD images are not supported by this version".into(),
            ));
        }
        other => return bad(format!("VHD image of the unknown type {other}")),
    };
    let bitmap = if dynamic.is_some() { bitmap_size(block) } else { 0 };
    if let Some(dynamic) = dynamic.as_ref().filter(|_| !readonly) {
        check_writable(&dynamic.table.lock().blocks, dynamic.at, block)?;
    }
    Ok(Mapped::new(Arc::clone(&file), Vpc { file, size, block, bitmap, dynamic }, readonly))
}

/// Bytes of the bitmap before a block.
fn bitmap_size(block: u64) -> u64 {
    (block / 512 / 8).next_multiple_of(512)
}

/// Refuses to write where one write would change two blocks, or the table.
fn check_writable(blocks: &[u32], table: u64, block: u64) -> Result<(), BlockError> {
    let whole = block + bitmap_size(block);
    let mut starts: Vec<u64> =
        blocks.iter().filter(|b| **b != u32::MAX).map(|b| u64::from(*b) * 512).collect();
    starts.sort_unstable();
    let table_end = table + blocks.len() as u64 * 4;
    let overlap = starts.windows(2).any(|w| matches!(w, [a, b] if b - a < whole));
    if overlap || starts.iter().any(|s| *s < FOOTER + 1024 || (*s < table_end && *s + whole > table)) {
        return bad("VHD image is corrupt: its blocks overlap");
    }
    Ok(())
}

fn dynamic(file: &dyn BlockNode, footer: &[u8], size: u64) -> Result<(u64, Dynamic), BlockError> {
    let at = be64(footer, 16);
    let h = read_part(file, at, 1024, "Could not read the VHD header")?;
    if !h.starts_with(b"cxsparse") || !checksum(&h, 36) {
        return bad("invalid VHD dynamic disk header");
    }
    let (block, count) = (u64::from(be32(&h, 32)), u64::from(be32(&h, 28)));
    if !block.is_power_of_two() || !(512..=256 << 20).contains(&block) {
        return bad(format!("invalid VHD block size {block}"));
    }
    if count > MAX_ENTRIES || count * block < size {
        return bad(format!("VHD block table of {count} entries is too large, or too small for the disk"));
    }
    let at = be64(&h, 16);
    let table = read_part(file, at, count * 4, "Could not read the VHD block table")?;
    let blocks: Vec<u32> = table.chunks_exact(4).map(|e| be32(e, 0)).collect();
    let ends = blocks.iter().filter(|b| **b != u32::MAX);
    let ends = ends.map(|b| u64::from(*b) * 512 + bitmap_size(block) + block).max().unwrap_or(0);
    let next = ends.max((at + count * 4).next_multiple_of(512));
    let table = Mutex::new(Table { blocks, next });
    Ok((block, Dynamic { at, footer: footer.to_vec(), table }))
}

impl Map for Vpc {
    fn driver(&self) -> &'static str {
        "vpc"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn locate(&self, offset: u64) -> io::Result<Run> {
        let within = offset % self.block;
        let data = |at| Place::Data(Arc::clone(&self.file), at);
        let place = match &self.dynamic {
            None => data(offset),
            Some(dynamic) => match dynamic.table.lock().blocks.get((offset / self.block) as usize) {
                Some(sector) if *sector != u32::MAX => data(u64::from(*sector) * 512 + self.bitmap + within),
                _ => Place::Zero,
            },
        };
        Ok(Run { place, len: self.block - within })
    }

    fn allocate(&self, offset: u64) -> io::Result<()> {
        let Some(dynamic) = &self.dynamic else { return Ok(()) };
        let n = (offset / self.block) as usize;
        let mut table = dynamic.table.lock();
        let at = table.next;
        let end = at + self.bitmap + self.block;
        let sector = u32::try_from(at / 512).ok().filter(|s| *s != u32::MAX);
        match (table.blocks.get_mut(n), sector) {
            (Some(entry), _) if *entry != u32::MAX => return Ok(()),
            (Some(entry), Some(sector)) => {
                // The bitmap, of sectors that have data: all. It lies where the footer was; the footer's copy at the
                // start of the file holds until the new one is written.
                let there = self.file.size();
                if there > at {
                    self.file.write_zeroes(at, (there - at).min(end - at), false)?;
                }
                if there < end {
                    crate::mapped::grow(&*self.file, at.max(there), end)?;
                }
                self.file.write_at(end, &dynamic.footer)?;
                self.file.write_at(at, &vec![0xff; self.bitmap as usize])?;
                self.file.write_at(dynamic.at + n as u64 * 4, &sector.to_be_bytes())?;
                *entry = sector;
            }
            _ => return Err(io::Error::other("the VHD image has no room for more blocks")),
        }
        table.next = end;
        Ok(())
    }

    fn unit(&self) -> Option<u64> {
        self.dynamic.as_ref().map(|_| self.block)
    }
}
