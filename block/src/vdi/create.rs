//! Making images.

use std::sync::Arc;

use super::{ALLOCATED_FIELD, BLOCK, UNALLOCATED};
use crate::foreign::{CreateOptions, random, write};
use crate::mapped::put;
use crate::node::Preallocation;
use crate::{BlockError, BlockNode};

/// Most blocks of an image, as other programs limit them.
const MAX_BLOCKS: u64 = 0x1fff_ffff;

/// Makes an image of a disk of `size` bytes, dynamic or static, in an empty file.
///
/// # Errors
/// [`BlockError::Option`] if it cannot be so large; the host's.
pub fn create(file: &Arc<dyn BlockNode>, size: u64, options: &CreateOptions) -> Result<(), BlockError> {
    let count = size.div_ceil(BLOCK);
    if size > MAX_BLOCKS * BLOCK {
        return Err(BlockError::Option(format!(
            "Unsupported VDI image size (size is 0x{size:x}, max supported is 0x{:x})",
            MAX_BLOCKS * BLOCK
        )));
    }
    let map = (count * 4).next_multiple_of(512);
    let data = 512 + map;
    let (Ok(count32), Ok(data32)) = (u32::try_from(count), u32::try_from(data)) else {
        return Err(BlockError::Option("Unsupported VDI image size".into()));
    };
    let mut h = vec![0; 512];
    put(&mut h, 0, b"<<< Holdfast Virtual Disk Image >>>\n");
    put(&mut h, 0x40, &0xbeda_107fu32.to_le_bytes());
    put(&mut h, 0x44, &0x0001_0001u32.to_le_bytes());
    put(&mut h, 0x48, &0x180u32.to_le_bytes());
    put(&mut h, 0x4c, &(1 + u32::from(options.fixed)).to_le_bytes());
    put(&mut h, 0x154, &512u32.to_le_bytes());
    put(&mut h, 0x158, &data32.to_le_bytes());
    put(&mut h, 0x168, &512u32.to_le_bytes());
    put(&mut h, 0x170, &size.to_le_bytes());
    put(&mut h, 0x178, &(BLOCK as u32).to_le_bytes());
    put(&mut h, 0x180, &count32.to_le_bytes());
    if options.fixed {
        put(&mut h, ALLOCATED_FIELD as usize, &count32.to_le_bytes());
    }
    put(&mut h, 0x188, &random::<16>()?);
    put(&mut h, 0x198, &random::<16>()?);
    write(&**file, 0, &h)?;
    // In parts: the map of a large disk is large.
    let mut table = Vec::new();
    for n in 0..count32 {
        table.extend_from_slice(&if options.fixed { n } else { UNALLOCATED }.to_le_bytes());
        if table.len() == 1 << 20 || n + 1 == count32 {
            write(&**file, 512 + u64::from(n + 1) * 4 - table.len() as u64, &table)?;
            table.clear();
        }
    }
    let end = if options.fixed { data + count * BLOCK } else { data };
    crate::foreign::grow(&**file, end, if options.fixed { options.preallocation } else { Preallocation::Off })
}
