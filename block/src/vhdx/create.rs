//! Making images.

use std::sync::Arc;

use super::header::{Header, seal};
use super::{
    BAT, DISK_SIZE, FILE_PARAMETERS, LOGICAL_SECTOR, METADATA, PAGE83, PHYSICAL_SECTOR, PRESENT, REGIONS,
    ZERO,
};
use crate::foreign::{CreateOptions, grow, host, random, write};
use crate::mapped::put;
use crate::node::Preallocation;
use crate::{BlockError, BlockNode};

const MIB: u64 = 1 << 20;
const MAX_SIZE: u64 = 64 << 40;
const SECTOR: u64 = 512;
/// Flag of metadata: it is about the disk and not the file.
const IS_DISK: u32 = 2;
/// Flag of metadata and regions: who does not know it does not open the file.
const REQUIRED: u32 = 4;

fn bad<T>(text: impl Into<String>) -> Result<T, BlockError> {
    Err(BlockError::Option(text.into()))
}

/// The block size for a disk.
fn block_size(size: u64, wanted: u64) -> Result<u64, BlockError> {
    let block = match wanted {
        0 if size > 32 << 40 => 64 * MIB,
        0 if size > 100 << 30 => 32 * MIB,
        0 if size > 1 << 30 => 16 * MIB,
        0 => 8 * MIB,
        n => n.checked_next_multiple_of(MIB).unwrap_or(n).min(256 * MIB),
    };
    if block.is_power_of_two() { Ok(block) } else { bad("Block size must be a power of two") }
}

fn region_table(bat: (u64, u64), metadata: u64) -> Vec<u8> {
    let mut t = vec![0; 64 << 10];
    put(&mut t, 0, b"regi");
    put(&mut t, 8, &2u32.to_le_bytes());
    for (n, (id, at, len)) in [(BAT, bat.0, bat.1), (METADATA, metadata, MIB)].into_iter().enumerate() {
        let e = 16 + n * 32;
        put(&mut t, e, &id.to_le_bytes());
        put(&mut t, e + 16, &at.to_le_bytes());
        put(&mut t, e + 24, &(len as u32).to_le_bytes());
        put(&mut t, e + 28, &1u32.to_le_bytes());
    }
    seal(&mut t);
    t
}

fn metadata(size: u64, block: u64, fixed: bool) -> Result<Vec<u8>, BlockError> {
    let mut m = vec![0; (64 << 10) + 4096];
    put(&mut m, 0, b"metadata");
    let mut parameters = [0; 8];
    put(&mut parameters, 0, &(block as u32).to_le_bytes());
    put(&mut parameters, 4, &u32::from(fixed).to_le_bytes());
    let items: [(u128, u32, Vec<u8>); 5] = [
        (FILE_PARAMETERS, REQUIRED, parameters.to_vec()),
        (DISK_SIZE, REQUIRED | IS_DISK, size.to_le_bytes().to_vec()),
        (PAGE83, REQUIRED | IS_DISK, random::<16>()?.to_vec()),
        (LOGICAL_SECTOR, REQUIRED | IS_DISK, (SECTOR as u32).to_le_bytes().to_vec()),
        (PHYSICAL_SECTOR, REQUIRED | IS_DISK, (SECTOR as u32).to_le_bytes().to_vec()),
    ];
    put(&mut m, 10, &(items.len() as u16).to_le_bytes());
    let mut at = 64 << 10;
    for (n, (id, flags, value)) in items.iter().enumerate() {
        let e = 32 + n * 32;
        put(&mut m, e, &id.to_le_bytes());
        put(&mut m, e + 16, &(at as u32).to_le_bytes());
        put(&mut m, e + 20, &(value.len() as u32).to_le_bytes());
        put(&mut m, e + 24, &flags.to_le_bytes());
        put(&mut m, at, value);
        at += value.len();
    }
    Ok(m)
}

/// Makes an image of a disk of `size` bytes in an empty file.
///
/// # Errors
/// [`BlockError::Option`] for what cannot be; the host's.
pub fn create(file: &Arc<dyn BlockNode>, size: u64, options: &CreateOptions) -> Result<(), BlockError> {
    if size > MAX_SIZE {
        return bad("Image size too large; max of 64TB");
    }
    let log = options.log_size.checked_next_multiple_of(MIB).unwrap_or(u64::MAX).max(MIB);
    if log > 1 << 31 {
        return bad("Log size must be at most 2 GiB");
    }
    let block = block_size(size, options.block_size)?;
    let ratio = (SECTOR << 23) / block;
    let blocks = size.div_ceil(block);
    let entries = blocks + blocks.saturating_sub(1) / ratio;
    if entries > crate::mapped::MAX_ENTRIES {
        return bad("the block size is too small for so large a disk");
    }
    let meta = MIB + log;
    let bat = (meta + MIB, (entries * 8).next_multiple_of(MIB).max(MIB));
    let data = bat.0 + bat.1;
    let mut id = vec![0; 64 << 10];
    put(&mut id, 0, b"vhdxfile");
    let creator: Vec<u8> =
        concat!("Holdfast ", env!("CARGO_PKG_VERSION")).encode_utf16().flat_map(u16::to_le_bytes).collect();
    put(&mut id, 8, &creator);
    grow(&**file, data, Preallocation::Off)?;
    write(&**file, 0, &id)?;
    let table = region_table(bat, meta);
    REGIONS.iter().try_for_each(|at| write(&**file, *at, &table))?;
    write(&**file, meta, &metadata(size, block, options.fixed)?)?;
    let empty = if options.block_state_zero { ZERO } else { 0 };
    let mut bytes = Vec::with_capacity(entries as usize * 8);
    for n in 0..entries {
        let (group, within) = (n / (ratio + 1), n % (ratio + 1));
        let entry = match (within == ratio, options.fixed) {
            // Of sector bitmaps there are none.
            (true, _) => 0,
            (false, true) => (data + (group * ratio + within) * block) | PRESENT,
            (false, false) => empty,
        };
        bytes.extend_from_slice(&entry.to_le_bytes());
    }
    write(&**file, bat.0, &bytes)?;
    if options.fixed {
        grow(&**file, data + blocks * block, options.preallocation)?;
    }
    let mut header = Header::new((MIB, log), [random()?, random()?]);
    header.store(&**file).map_err(host(&**file, "could not write the new image"))
}
