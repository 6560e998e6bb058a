//! VirtualBox's VDI images, version 1.1.

mod create;

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

pub use create::create;

use crate::mapped::{MAX_ENTRIES, Map, Mapped, Place, Run, bad, le32, le64, read_part};
use crate::{BlockError, BlockNode};

/// The only block size in use.
const BLOCK: u64 = 1 << 20;
/// Entries from here on are blocks without data.
const DISCARDED: u32 = 0xffff_fffe;
/// A block that was never written.
const UNALLOCATED: u32 = u32::MAX;
/// Where the header counts the blocks that have data.
const ALLOCATED_FIELD: u64 = 0x184;

/// What changes as blocks are written.
#[derive(Debug)]
struct Table {
    blocks: Vec<u32>,
    /// The next place for a block.
    next: u32,
}

#[derive(Debug)]
struct Vdi {
    file: Arc<dyn BlockNode>,
    size: u64,
    /// Where the block map and the blocks start in the file.
    map: u64,
    data: u64,
    /// Blocks with data, as the header says.
    counted: u32,
    table: Mutex<Table>,
}

/// Opens an image.
///
/// # Errors
/// [`BlockError::Format`], [`BlockError::Unsupported`] with what is wrong or not known.
pub fn open(file: Arc<dyn BlockNode>, readonly: bool) -> Result<Arc<dyn BlockNode>, BlockError> {
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
    if !readonly {
        check_writable(&blocks, map + count * 4, data)?;
    }
    let counted = le32(&h, ALLOCATED_FIELD as usize);
    let highest = blocks.iter().filter(|b| **b < DISCARDED).max().map_or(0, |b| b + 1);
    let table = Mutex::new(Table { blocks, next: highest.max(counted) });
    let size = size.next_multiple_of(512);
    let vdi = Vdi { file: Arc::clone(&file), size, map, data, counted, table };
    Ok(Mapped::new(file, vdi, readonly))
}

/// Refuses to write where one write would change two blocks, or the map.
fn check_writable(blocks: &[u32], map_end: u64, data: u64) -> Result<(), BlockError> {
    if data < map_end {
        return bad("VDI image is corrupt: its blocks overlap its block map");
    }
    let mut used = vec![false; blocks.len()];
    for (n, block) in blocks.iter().enumerate().filter(|(_, b)| **b < DISCARDED) {
        match used.get_mut(*block as usize) {
            Some(used) if !*used => *used = true,
            _ => return bad(format!("VDI image is corrupt: block {n} shares its place with another one")),
        }
    }
    Ok(())
}

impl Vdi {
    fn place(&self, block: u32, within: u64) -> Place {
        Place::Data(Arc::clone(&self.file), self.data + u64::from(block) * BLOCK + within)
    }
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
        let place = match self.table.lock().blocks.get((offset / BLOCK) as usize) {
            Some(block) if *block < DISCARDED => self.place(*block, within),
            _ => Place::Zero,
        };
        Ok(Run { place, len: BLOCK - within })
    }

    fn allocate(&self, offset: u64) -> io::Result<()> {
        let n = (offset / BLOCK) as usize;
        let mut table = self.table.lock();
        let (count, next) = (table.blocks.len(), table.next);
        match table.blocks.get_mut(n) {
            Some(block) if *block < DISCARDED => return Ok(()),
            Some(block) if (next as usize) < count => {
                let at = self.data + u64::from(next) * BLOCK;
                if self.file.size() > at {
                    // A block that was given out before a crash.
                    self.file.write_zeroes(at, BLOCK, false)?;
                } else {
                    crate::mapped::grow(&*self.file, at, at + BLOCK)?;
                }
                self.file.write_at(ALLOCATED_FIELD, &(next + 1).to_le_bytes())?;
                self.file.write_at(self.map + n as u64 * 4, &next.to_le_bytes())?;
                *block = next;
            }
            _ => return Err(io::Error::other("the VDI image is corrupt: it has no room for all its blocks")),
        }
        table.next = next + 1;
        Ok(())
    }

    fn unit(&self) -> Option<u64> {
        Some(BLOCK)
    }

    fn check(&self) -> Option<io::Result<Vec<String>>> {
        let table = self.table.lock();
        let mut used = vec![false; table.blocks.len()];
        let mut faults = Vec::new();
        let mut count = 0;
        for (n, block) in table.blocks.iter().enumerate().filter(|(_, b)| **b < DISCARDED) {
            count += 1;
            match used.get_mut(*block as usize) {
                Some(used) if !*used => *used = true,
                _ => faults.push(format!("ERROR: block index {n} also used by {block}")),
            }
        }
        if count != self.counted && table.next == self.counted {
            let counted = self.counted;
            faults.push(format!("ERROR: allocated blocks mismatch, is {count}, should be {counted}"));
        }
        Some(Ok(faults))
    }
}
