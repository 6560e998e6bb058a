//! Making images.

use std::sync::Arc;

use super::{FOOTER, MAX_GEOMETRY, set_checksum};
use crate::foreign::{CreateOptions, grow, random, write};
use crate::mapped::put;
use crate::node::Preallocation;
use crate::{BlockError, BlockNode};

/// Bytes of a block.
const BLOCK: u64 = 2 << 20;
/// Where the dynamic header and the block table are.
const HEADER: u64 = 512;
const TABLE: u64 = 1536;
/// Largest disk: 2040 GiB.
const MAX_SIZE: u64 = 2040 << 30;
/// Seconds from the UNIX epoch to that of the format, the start of 2000.
const EPOCH: u64 = 946_684_800;

/// Cylinders, heads and sectors of a disk ("CHS Calculation" of the specification).
fn geometry(sectors: u64) -> (u64, u64, u64) {
    if sectors >= 65535 * 16 * 63 {
        return (sectors / 255 / 16, 16, 255);
    }
    let mut per_track = 17;
    let mut tracks = sectors / per_track;
    let mut heads = tracks.div_ceil(1024).max(4);
    if tracks >= heads * 1024 || heads > 16 {
        (per_track, heads) = (31, 16);
        tracks = sectors / per_track;
    }
    if tracks >= heads * 1024 {
        (per_track, heads) = (63, 16);
        tracks = sectors / per_track;
    }
    (tracks / heads, heads, per_track)
}

/// The geometry of a disk and its sectors, which are at least those asked for.
fn settle(size: u64, exact: bool) -> Result<((u64, u64, u64), u64), BlockError> {
    let too_large = || {
        BlockError::Option(
            "The requested image size is too large for the VHD format: at most 2040 GiB".into(),
        )
    };
    let wanted = size.div_ceil(512);
    let mut chs = (65535, 16, 255);
    if !exact {
        let least = wanted.min(MAX_GEOMETRY);
        for more in 0.. {
            chs = geometry((least + more).min(MAX_GEOMETRY));
            if chs.0 * chs.1 * chs.2 >= least {
                break;
            }
        }
    }
    let sectors = chs.0 * chs.1 * chs.2;
    let sectors = if sectors == MAX_GEOMETRY { wanted } else { sectors };
    if sectors * 512 > MAX_SIZE { Err(too_large()) } else { Ok((chs, sectors)) }
}

/// Makes an image of a disk of `size` bytes in an empty file. Without `force_size` the disk is as large as the next geometry.
///
/// # Errors
/// [`BlockError::Option`] if it cannot be so large; the host's.
pub fn create(file: &Arc<dyn BlockNode>, size: u64, options: &CreateOptions) -> Result<(), BlockError> {
    let ((cylinders, heads, per_track), sectors) = settle(size, options.force_size)?;
    let bytes = sectors * 512;
    let now = (holdfast_clock::host_realtime() / 1_000_000_000).saturating_sub(EPOCH);
    let mut f = vec![0; FOOTER as usize];
    put(&mut f, 0, b"conectix");
    put(&mut f, 8, &2u32.to_be_bytes());
    put(&mut f, 12, &0x0001_0000u32.to_be_bytes());
    put(&mut f, 16, &if options.fixed { u64::MAX } else { HEADER }.to_be_bytes());
    put(&mut f, 24, &(now as u32).to_be_bytes());
    // By this name programs know whether the size or the geometry counts.
    put(&mut f, 28, if options.force_size { b"qem2" } else { b"qemu" });
    put(&mut f, 32, &0x0005_0003u32.to_be_bytes());
    put(&mut f, 36, b"Wi2k");
    put(&mut f, 40, &bytes.to_be_bytes());
    put(&mut f, 48, &bytes.to_be_bytes());
    put(&mut f, 56, &(cylinders as u16).to_be_bytes());
    put(&mut f, 58, &[heads as u8, per_track as u8]);
    put(&mut f, 60, &if options.fixed { 2u32 } else { 3 }.to_be_bytes());
    put(&mut f, 68, &random::<16>()?);
    set_checksum(&mut f, 64);
    if options.fixed {
        grow(&**file, bytes, options.preallocation)?;
        grow(&**file, bytes + FOOTER, Preallocation::Off)?;
        return write(&**file, bytes, &f);
    }
    let count = bytes.div_ceil(BLOCK);
    let mut h = vec![0; 1024];
    put(&mut h, 0, b"cxsparse");
    put(&mut h, 8, &u64::MAX.to_be_bytes());
    put(&mut h, 16, &TABLE.to_be_bytes());
    put(&mut h, 24, &0x0001_0000u32.to_be_bytes());
    put(&mut h, 28, &(count as u32).to_be_bytes());
    put(&mut h, 32, &(BLOCK as u32).to_be_bytes());
    set_checksum(&mut h, 36);
    let table = vec![0xff; (count as usize * 4).next_multiple_of(512)];
    write(&**file, 0, &f)?;
    write(&**file, HEADER, &h)?;
    write(&**file, TABLE, &table)?;
    write(&**file, TABLE + table.len() as u64, &f)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometries_hold_what_is_asked_for() {
        for size in [512, 1 << 20, 33 << 20, 504 << 20, 100 << 30, 127 << 30, 300 << 30, MAX_SIZE] {
            let (_, sectors) = settle(size, false).expect("a geometry");
            assert!(sectors * 512 >= size, "{size}");
            assert_eq!(settle(size, true).expect("a size").1, size / 512);
        }
        assert!(settle(MAX_SIZE + 512, false).is_err());
        // 2 GiB, as the specification's algorithm has it.
        assert_eq!(geometry(4 << 20), (4161, 16, 63));
    }
}
