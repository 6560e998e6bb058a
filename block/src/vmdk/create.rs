//! Making images.

use std::sync::Arc;

use super::sparse::SECTOR;
use super::{Access, open};
use crate::foreign::{CreateOptions, VmdkKind, grow, random, write};
use crate::mapped::put;
use crate::node::Preallocation;
use crate::{BlockError, BlockNode};

/// Sectors of a grain.
const GRAIN: u64 = 128;
/// Entries of a grain table.
const ENTRIES: u64 = 512;
/// Where the descriptor is in a sparse extent, and how long it may be, in sectors.
const DESCRIPTOR: (u64, u64) = (1, 20);
/// Largest extent of the kinds that are split.
const SPLIT: u64 = 2 << 30;
/// Largest disk in one sparse extent: what 32-bit sector numbers reach.
const MAX_SPARSE: u64 = (1 << 32) * SECTOR - (1 << 31);

/// Makes another file of the image, by its name beside the image.
pub type NewExtent<'a> = &'a mut dyn FnMut(&str) -> Result<Arc<dyn BlockNode>, BlockError>;

fn bad<T>(text: impl Into<String>) -> Result<T, BlockError> {
    Err(BlockError::Option(text.into()))
}

/// Writes the header and the empty tables of a sparse extent of `size` bytes.
fn sparse_extent(file: &dyn BlockNode, size: u64, options: &CreateOptions) -> Result<(), BlockError> {
    let compressed = options.vmdk == VmdkKind::StreamOptimized;
    if size > MAX_SPARSE {
        return bad("The disk is too large for one VMDK extent: use twoGbMaxExtentSparse");
    }
    let tables = size.div_ceil(GRAIN * SECTOR).div_ceil(ENTRIES);
    let directory = (tables * 4).div_ceil(SECTOR);
    let table = ENTRIES * 4 / SECTOR;
    let redundant = DESCRIPTOR.0 + DESCRIPTOR.1;
    let primary = redundant + directory + tables * table;
    let grains = (primary + directory + tables * table).next_multiple_of(GRAIN);
    let version = if compressed { 3u32 } else { 1 + u32::from(options.zeroed_grain) };
    let flags = 3 | if compressed { 3 << 16 } else { 0 } | if options.zeroed_grain { 4 } else { 0 };
    let mut h = vec![0; SECTOR as usize];
    put(&mut h, 0, b"KDMV");
    put(&mut h, 4, &version.to_le_bytes());
    put(&mut h, 8, &u32::to_le_bytes(flags));
    for (at, value) in [
        (12, size.div_ceil(SECTOR)),
        (20, GRAIN),
        (28, DESCRIPTOR.0),
        (36, DESCRIPTOR.1),
        (48, redundant),
        (56, primary),
        (64, grains),
    ] {
        put(&mut h, at, &u64::to_le_bytes(value));
    }
    put(&mut h, 44, &(ENTRIES as u32).to_le_bytes());
    put(&mut h, 73, b"\n \r\n");
    put(&mut h, 77, &u16::from(compressed).to_le_bytes());
    grow(file, grains * SECTOR, Preallocation::Off)?;
    write(file, 0, &h)?;
    for start in [redundant, primary] {
        let entries = (0..tables).flat_map(|n| ((start + directory + n * table) as u32).to_le_bytes());
        let mut bytes: Vec<u8> = entries.collect();
        bytes.resize((directory * SECTOR) as usize, 0);
        write(file, start * SECTOR, &bytes)?;
    }
    Ok(())
}

/// The text that describes the image. `extents` are its lines.
fn descriptor(size: u64, extents: &str, options: &CreateOptions) -> Result<String, BlockError> {
    let cid = u32::from_le_bytes(random()?);
    let heads = if options.adapter == "ide" { 16 } else { 255 };
    let hardware = match (&options.hwversion, options.compat6) {
        (Some(_), true) => return bad("compat6 cannot be enabled with hwversion set"),
        (Some(version), false) => version.as_str(),
        (None, true) => "6",
        (None, false) => "4",
    };
    Ok(format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid:08x}\nparentCID=ffffffff\ncreateType=\"{}\"\n\n# Extent description\n{extents}\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"{hardware}\"\nddb.geometry.cylinders = \"{}\"\nddb.geometry.heads = \"{heads}\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"{}\"\nddb.toolsVersion = \"{}\"\n",
        options.vmdk.name(),
        size / (63 * heads * SECTOR),
        options.adapter,
        options.toolsversion.as_deref().unwrap_or("2147483647"),
    ))
}

/// Makes an image of a disk of `size` bytes in an empty file, called `name`, and opens it. Other files that it has are made by
/// `extent`.
///
/// # Errors
/// [`BlockError::Option`] for options that do not fit; the host's.
pub fn create(
    file: Arc<dyn BlockNode>,
    name: &str,
    size: u64,
    options: &CreateOptions,
    extent: NewExtent<'_>,
) -> Result<Arc<dyn BlockNode>, BlockError> {
    let kind = options.vmdk;
    if options.zeroed_grain && kind.is_flat() {
        return bad("Flat image can't enable zeroed grain");
    }
    if name.contains(['"', '\n', '\r']) {
        return bad("the name of a VMDK image has no quotes or line breaks");
    }
    if kind.is_one_file() {
        sparse_extent(&*file, size, options)?;
        let line = format!("RW {} SPARSE \"{name}\"\n", size.div_ceil(SECTOR));
        let text = descriptor(size, &line, options)?;
        if text.len() as u64 > DESCRIPTOR.1 * SECTOR {
            return bad("the VMDK descriptor is too long");
        }
        write(&*file, DESCRIPTOR.0 * SECTOR, text.as_bytes())?;
        return open(file, Access::Fill, &mut |_| bad("the image has no other files"));
    }
    let (stem, suffix) = match name.rsplit_once('.') {
        Some((stem, suffix)) if !stem.is_empty() => (stem, format!(".{suffix}")),
        _ => (name, String::new()),
    };
    let mut lines = String::new();
    let mut made: Vec<(String, Arc<dyn BlockNode>)> = Vec::new();
    let mut start = 0;
    while start < size || start == 0 {
        let len = if kind.is_split() { SPLIT.min(size - start) } else { size };
        let flat = kind.is_flat();
        let number = made.len() + 1;
        let part = match (kind.is_split(), flat) {
            (true, true) => format!("{stem}-f{number:03}{suffix}"),
            (true, false) => format!("{stem}-s{number:03}{suffix}"),
            (false, _) => format!("{stem}-flat{suffix}"),
        };
        let node = extent(&part)?;
        let sectors = len.div_ceil(SECTOR);
        if flat {
            grow(&*node, sectors * SECTOR, options.preallocation)?;
            lines += &format!("RW {sectors} FLAT \"{part}\" 0\n");
        } else {
            sparse_extent(&*node, len, options)?;
            lines += &format!("RW {sectors} SPARSE \"{part}\"\n");
        }
        made.push((part, node));
        start += len.max(1);
    }
    write(&*file, 0, descriptor(size, &lines, options)?.as_bytes())?;
    open(file, Access::Fill, &mut |wanted| {
        let found = made.iter().find(|(name, _)| name == wanted);
        found
            .map(|(_, node)| Arc::clone(node))
            .ok_or_else(|| BlockError::Format(format!("no extent '{wanted}'")))
    })
}
