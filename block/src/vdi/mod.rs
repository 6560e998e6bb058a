//! VirtualBox's VDI images, version 1.1, for reading.

use std::io;
use std::sync::Arc;

use crate::mapped::{MAX_ENTRIES, Map, Mapped, Place, Run, bad, le32, le64, read_part};
use crate::{BlockError, BlockNode};

/// The only block size in use.
const BLOCK: u64 = 1 << 20;
/// Entries from here on are blocks without data.
const DISCARDED: u32 = 0xffff_fffe;

#[derive(Debug)]
struct Vdi {
    file: Arc<dyn BlockNode>,
    size: u64,
    data: u64,
    blocks: Vec<u32>,
}

/// Opens an image.
///
/// # Errors
/// [`BlockError::Format`], [`BlockError::Unsupported`] with what is wrong or not known.
pub fn open(file: Arc<dyn BlockNode>) -> Result<Arc<dyn BlockNode>, BlockError> {
    let h = read_part(&*file, 0, 512, "Could not read the VDI header")?;
    if le32(&h, 0x40) != 0xbeda_107f {
        return bad("Image not in VDI format");
    }
    let unsupported = |text: String| Err(BlockError::Unsupported(text));
    let version = le32(&h, 0x44);
    if version != 0x0001_0001 {
        return unsupported(format!(
            "unsupported VDI image (version {}.{})",
            version >> 16,
            version & 0xffff
        ));
    }
    if le32(&h, 0x168) != 512 || u64::from(le32(&h, 0x178)) != BLOCK {
        return unsupported("unsupported VDI image (sector or block size)".into());
    }
    if h.get(0x1a8..0x1c8).is_some_and(|links| links.iter().any(|b| *b != 0)) {
        return unsupported("unsupported VDI image (it builds on another one)".into());
    }
    let (size, count) = (le64(&h, 0x170), u64::from(le32(&h, 0x180)));
    if size > count * BLOCK || count > MAX_ENTRIES {
        return bad(format!("unsupported VDI image (disk of {size} bytes in {count} blocks)"));
    }
    let (map, data) = (u64::from(le32(&h, 0x154)), u64::from(le32(&h, 0x158)));
    if !map.is_multiple_of(512) || !data.is_multiple_of(512) || map < 512 {
        return bad("unsupported VDI image (unaligned block map or data)");
    }
    let table = read_part(&*file, map, count * 4, "Could not read the VDI block map")?;
    let blocks: Vec<u32> = table.chunks_exact(4).map(|e| le32(e, 0)).collect();
    if let Some(n) = blocks.iter().position(|b| *b < DISCARDED && u64::from(*b) >= count) {
        return bad(format!("VDI image is corrupt: block {n} lies beyond the blocks of the image"));
    }
    let vdi = Vdi { file: Arc::clone(&file), size: size.next_multiple_of(512), data, blocks };
    Ok(Mapped::new(file, vdi))
}

impl Map for Vdi {
    fn driver(&self) -> &'static str {
        "vdi"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn locate(&self, offset: u64) -> io::Result<Run> {
        let within = offset % BLOCK;
        let place = match self.blocks.get((offset / BLOCK) as usize) {
            Some(block) if *block < DISCARDED => {
                Place::Data(Arc::clone(&self.file), self.data + u64::from(*block) * BLOCK + within)
            }
            _ => Place::Zero,
        };
        Ok(Run { place, len: BLOCK - within })
    }
}
