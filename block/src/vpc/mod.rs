//! Virtual PC's VHD images, fixed and dynamic ("Virtual Hard Disk Image Format Specification" 1.0), for reading.

use std::io;
use std::sync::Arc;

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
    /// First sectors of blocks; none if the image is fixed.
    table: Option<Vec<u32>>,
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
pub fn open(file: Arc<dyn BlockNode>) -> Result<Arc<dyn BlockNode>, BlockError> {
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
    let (block, table) = match kind {
        2 => (size.max(512), None),
        3 => {
            let (block, table) = dynamic(&*file, be64(&f, 16), size)?;
            (block, Some(table))
        }
        4 => {
            return Err(BlockError::Unsupported(
                "differencing VHD images are not supported by this version".into(),
            ));
        }
        other => return bad(format!("VHD image of the unknown type {other}")),
    };
    let bitmap = if table.is_some() { (block / 512 / 8).next_multiple_of(512) } else { 0 };
    Ok(Mapped::new(Arc::clone(&file), Vpc { file, size, block, bitmap, table }))
}

fn dynamic(file: &dyn BlockNode, at: u64, size: u64) -> Result<(u64, Vec<u32>), BlockError> {
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
    let table = read_part(file, be64(&h, 16), count * 4, "Could not read the VHD block table")?;
    Ok((block, table.chunks_exact(4).map(|e| be32(e, 0)).collect()))
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
        let place = match &self.table {
            None => data(offset),
            Some(table) => match table.get((offset / self.block) as usize) {
                Some(sector) if *sector != u32::MAX => data(u64::from(*sector) * 512 + self.bitmap + within),
                _ => Place::Zero,
            },
        };
        Ok(Run { place, len: self.block - within })
    }
}
