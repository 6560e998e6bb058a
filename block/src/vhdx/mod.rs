//! Hyper-V's VHDX images ([MS-VHDX]), for reading.

use std::io;
use std::sync::Arc;

use crate::mapped::{MAX_ENTRIES, Map, Mapped, Place, Run, bad, le16, le32, le64, read_part};
use crate::{BlockError, BlockNode};

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGIONS: [u64; 2] = [192 << 10, 256 << 10];
/// Most entries of the region and metadata tables.
const MAX_TABLE: u32 = 2047;

const BAT: u128 = guid(0x2dc2_7766, 0xf623, 0x4200, 0x9d64_115e_9bfd_4a08);
const METADATA: u128 = guid(0x8b7c_a206, 0x4790, 0x4b9a, 0xb8fe_575f_050f_886e);
const FILE_PARAMETERS: u128 = guid(0xcaa1_6737, 0xfa36, 0x4d43, 0xb3b6_33f0_aa44_e76b);
const DISK_SIZE: u128 = guid(0x2fa5_4224, 0xcd1b, 0x4876, 0xb211_5dbe_d83b_f4b8);
const LOGICAL_SECTOR: u128 = guid(0x8141_bf1d, 0xa96f, 0x4709, 0xba47_f233_a8fa_ab5f);

/// A GUID as a little-endian number of its bytes on the disk.
const fn guid(a: u32, b: u16, c: u16, d: u64) -> u128 {
    a as u128 | (b as u128) << 32 | (c as u128) << 48 | (d.swap_bytes() as u128) << 64
}

fn guid_at(b: &[u8], at: usize) -> u128 {
    u128::from(le64(b, at)) | u128::from(le64(b, at + 8)) << 64
}

/// CRC-32C (Castagnoli).
fn crc32c(b: &[u8]) -> u32 {
    let step = |crc: u32, byte: u8| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    };
    !b.iter().fold(!0, |crc, byte| step(crc, *byte))
}

/// True if a structure with its checksum at byte 4 is whole.
fn whole(b: &[u8]) -> bool {
    let mut copy = b.to_vec();
    if let Some(field) = copy.get_mut(4..8) {
        field.fill(0);
    }
    crc32c(&copy) == le32(b, 4)
}

#[derive(Debug)]
struct Vhdx {
    file: Arc<dyn BlockNode>,
    size: u64,
    block: u64,
    /// Blocks between two entries of sector bitmaps.
    ratio: u64,
    table: Vec<u64>,
}

/// Opens an image.
///
/// # Errors
/// [`BlockError::Format`], [`BlockError::Unsupported`] with what is wrong or not known.
pub fn open(file: Arc<dyn BlockNode>) -> Result<Arc<dyn BlockNode>, BlockError> {
    if read_part(&*file, 0, 512, "Could not read the VHDX file identifier")?.get(..8) != Some(b"vhdxfile") {
        return bad("Image not in VHDX format");
    }
    check_header(&*file)?;
    let regions = regions(&*file)?;
    let region = |id: u128, what: &str| {
        let found = regions.iter().find(|(guid, ..)| *guid == id).map(|(_, at, len)| (*at, *len));
        found.ok_or_else(|| BlockError::Format(format!("VHDX image without a region for {what}")))
    };
    let (at, len) = region(METADATA, "metadata")?;
    let meta = metadata(&*file, at, len)?;
    let ratio = (meta.sector << 23) / meta.block;
    let blocks = meta.size.div_ceil(meta.block);
    let entries = blocks + blocks.saturating_sub(1) / ratio;
    let (at, len) = region(BAT, "the block allocation table")?;
    if entries > MAX_ENTRIES || entries * 8 > len {
        return bad("VHDX block allocation table is too large, or too small for the disk");
    }
    let bytes = read_part(&*file, at, entries * 8, "Could not read the VHDX block allocation table")?;
    let table = bytes.chunks_exact(8).map(|e| le64(e, 0)).collect();
    let map = Vhdx { file: Arc::clone(&file), size: meta.size, block: meta.block, ratio, table };
    Ok(Mapped::new(file, map))
}

fn check_header(file: &dyn BlockNode) -> Result<(), BlockError> {
    let mut best: Option<(u64, Vec<u8>)> = None;
    for at in HEADERS {
        let h = read_part(file, at, 4096, "Could not read the VHDX header")?;
        if h.starts_with(b"head") && whole(&h) && best.as_ref().is_none_or(|(n, _)| *n < le64(&h, 8)) {
            best = Some((le64(&h, 8), h));
        }
    }
    let Some((_, h)) = best else { return bad("No valid VHDX header found") };
    if le16(&h, 66) != 1 {
        return Err(BlockError::Unsupported(format!("VHDX version {} is not supported", le16(&h, 66))));
    }
    if guid_at(&h, 48) != 0 {
        return Err(BlockError::Unsupported(
            "the VHDX image has a log that must be replayed, which this version cannot do: open it once with the program that wrote it"
                .into(),
        ));
    }
    Ok(())
}

/// Regions: GUID, offset, length.
type Regions = Vec<(u128, u64, u64)>;

fn regions(file: &dyn BlockNode) -> Result<Regions, BlockError> {
    for at in REGIONS {
        let t = read_part(file, at, 64 << 10, "Could not read the VHDX region table")?;
        let count = le32(&t, 8);
        if !t.starts_with(b"regi") || !whole(&t) || count > MAX_TABLE {
            continue;
        }
        let mut out = Vec::new();
        for n in 0..count as usize {
            let e = t.get(16 + n * 32..).unwrap_or_default();
            let (id, required) = (guid_at(e, 0), le32(e, 28) & 1 != 0);
            if required && id != BAT && id != METADATA {
                return Err(BlockError::Unsupported(
                    "VHDX image with a required region that is not known".into(),
                ));
            }
            out.push((id, le64(e, 16), u64::from(le32(e, 24))));
        }
        return Ok(out);
    }
    bad("No valid VHDX region table found")
}

struct Metadata {
    size: u64,
    block: u64,
    sector: u64,
}

fn metadata(file: &dyn BlockNode, at: u64, len: u64) -> Result<Metadata, BlockError> {
    let what = "Could not read the VHDX metadata";
    let t = read_part(file, at, 64 << 10, what)?;
    let count = le16(&t, 10);
    if !t.starts_with(b"metadata") || u32::from(count) > MAX_TABLE {
        return bad("VHDX metadata table is corrupt");
    }
    let mut items = Vec::new();
    for n in 0..usize::from(count) {
        let e = t.get(32 + n * 32..).unwrap_or_default();
        let (id, offset) = (guid_at(e, 0), u64::from(le32(e, 16)));
        let known = [FILE_PARAMETERS, DISK_SIZE, LOGICAL_SECTOR].contains(&id);
        if known && offset + 8 <= len {
            let place = at
                .checked_add(offset)
                .ok_or_else(|| BlockError::Format("VHDX metadata is corrupt".into()))?;
            items.push((id, read_part(file, place, 8, what)?));
        }
    }
    let item = |id: u128| {
        let found = items.iter().find(|(i, _)| *i == id).map(|(_, b)| b.as_slice());
        found.ok_or_else(|| BlockError::Format("VHDX metadata is incomplete".into()))
    };
    let parameters = item(FILE_PARAMETERS)?;
    let (block, flags) = (u64::from(le32(parameters, 0)), le32(parameters, 4));
    if flags & 2 != 0 {
        return Err(BlockError::Unsupported(
            "differencing VHDX images are not supported by this version".into(),
        ));
    }
    let (size, sector) = (le64(item(DISK_SIZE)?, 0), u64::from(le32(item(LOGICAL_SECTOR)?, 0)));
    if !block.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block) || ![512, 4096].contains(&sector) {
        return bad(format!("VHDX image with blocks of {block} bytes and sectors of {sector}"));
    }
    if size > 64 << 40 || !size.is_multiple_of(sector) {
        return bad(format!("VHDX disk of {size} bytes"));
    }
    Ok(Metadata { size, block, sector })
}

impl Map for Vhdx {
    fn driver(&self) -> &'static str {
        "vhdx"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn locate(&self, offset: u64) -> io::Result<Run> {
        let (block, within) = (offset / self.block, offset % self.block);
        let entry = self.table.get((block + block / self.ratio) as usize).copied().unwrap_or(0);
        let place = match entry & 7 {
            0..=3 => Place::Zero,
            6 => Place::Data(Arc::clone(&self.file), (entry & !0xf_ffff) + within),
            other => {
                return Err(io::Error::other(format!(
                    "the VHDX image is corrupt: block {block} is of state {other}"
                )));
            }
        };
        Ok(Run { place, len: self.block - within })
    }
}
