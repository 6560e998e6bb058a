//! Hyper-V's VHDX images ([MS-VHDX]).
//!
//! The block allocation table is in memory. What changes of it is written by a flush: through the log, so that a crash leaves
//! the table as one flush or the next left it.

mod create;
mod header;
mod log;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

pub use create::create;

use crate::mapped::{MAX_ENTRIES, Map, Mapped, Place, Run, bad, le16, le32, le64, read_part};
use crate::{BlockError, BlockNode};
use header::{Header, guid_at, whole};
use log::{Log, MAX_PAGES, PAGE, Replay};

const REGIONS: [u64; 2] = [192 << 10, 256 << 10];
/// Most entries of the region and metadata tables.
const MAX_TABLE: u32 = 2047;

const BAT: u128 = guid(0x2dc2_7766, 0xf623, 0x4200, 0x9d64_115e_9bfd_4a08);
const METADATA: u128 = guid(0x8b7c_a206, 0x4790, 0x4b9a, 0xb8fe_575f_050f_886e);
const FILE_PARAMETERS: u128 = guid(0xcaa1_6737, 0xfa36, 0x4d43, 0xb3b6_33f0_aa44_e76b);
const DISK_SIZE: u128 = guid(0x2fa5_4224, 0xcd1b, 0x4876, 0xb211_5dbe_d83b_f4b8);
const LOGICAL_SECTOR: u128 = guid(0x8141_bf1d, 0xa96f, 0x4709, 0xba47_f233_a8fa_ab5f);
const PHYSICAL_SECTOR: u128 = guid(0xcda3_48c7, 0x445d, 0x4471, 0x9cc9_e988_5251_c556);
const PAGE83: u128 = guid(0xbeca_12ab, 0xb2e6, 0x4523, 0x93ef_c309_e000_c746);

/// States of blocks, the low bits of entries: reads as zeroes, and is in the file.
const ZERO: u64 = 2;
const PRESENT: u64 = 6;
/// The bits of an entry that are a place.
const PLACE: u64 = !0xf_ffff;

/// A GUID as a little-endian number of its bytes on the disk.
const fn guid(a: u32, b: u16, c: u16, d: u64) -> u128 {
    a as u128 | (b as u128) << 32 | (c as u128) << 48 | (d.swap_bytes() as u128) << 64
}

/// What an image is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading. An image whose log has to be replayed is refused.
    Read,
    /// Reading and writing. The log is replayed if it has to be.
    Write,
}

#[derive(Debug)]
struct Table {
    entries: Vec<u64>,
    /// Pages of the table that differ from the file's, by their numbers.
    dirty: BTreeSet<u64>,
    /// The next place for a block.
    next: u64,
    header: Header,
    /// The log, once something was written to it.
    log: Option<Log>,
    /// It has been told that the contents change.
    begun: bool,
}

#[derive(Debug)]
struct Vhdx {
    file: Arc<dyn BlockNode>,
    size: u64,
    block: u64,
    /// Blocks between two entries of sector bitmaps.
    ratio: u64,
    /// Where the table is in the file.
    bat: u64,
    table: Mutex<Table>,
}

/// Opens an image.
///
/// # Errors
/// [`BlockError::Format`], [`BlockError::Unsupported`] with what is wrong or not known.
pub fn open(file: Arc<dyn BlockNode>, access: Access) -> Result<Arc<dyn BlockNode>, BlockError> {
    if read_part(&*file, 0, 512, "Could not read the VHDX file identifier")?.get(..8) != Some(b"vhdxfile") {
        return bad("Image not in VHDX format");
    }
    let mut header = Header::read(&*file)?;
    replay(&*file, &mut header, access)?;
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
    let (bat, bat_len) = region(BAT, "the block allocation table")?;
    if entries > MAX_ENTRIES || entries * 8 > bat_len {
        return bad("VHDX block allocation table is too large, or too small for the disk");
    }
    let bytes = read_part(&*file, bat, entries * 8, "Could not read the VHDX block allocation table")?;
    let entries: Vec<u64> = bytes.chunks_exact(8).map(|e| le64(e, 0)).collect();
    let mut next = 0;
    if access == Access::Write {
        let mib = |n: u64| n.is_multiple_of(1 << 20) && n != 0;
        if ![bat, bat_len, header.log.0, header.log.1].into_iter().all(mib) {
            return bad("VHDX image whose regions are not in units of 1 MiB");
        }
        let reserved = [(0, 1 << 20), header.log, (at, len), (bat, bat_len)];
        next = check_table(&entries, ratio, meta.block, &reserved)?;
        next = next.max(file.size()).next_multiple_of(1 << 20);
    }
    let table = Table { entries, dirty: BTreeSet::new(), next, header, log: None, begun: false };
    let table = Mutex::new(table);
    let map = Vhdx { file: Arc::clone(&file), size: meta.size, block: meta.block, ratio, bat, table };
    Ok(Mapped::new(file, map, access == Access::Read))
}

/// Replays the log if there is one that counts.
fn replay(file: &dyn BlockNode, header: &mut Header, access: Access) -> Result<(), BlockError> {
    if header.log_guid == 0 {
        return Ok(());
    }
    let found = Replay::find(file, header.log, header.log_guid)?;
    if access == Access::Read {
        return match found {
            None => Ok(()),
            Some(_) => {
                let path = crate::node::shown(file);
                Err(BlockError::Unsupported(format!(
                    "VHDX image file '{path}' opened read-only, but contains a log that needs to be replayed\nTo replay the log, run:\nqemu-img check -r all '{path}'"
                )))
            }
        };
    }
    if let Some(found) = found {
        tracing::info!(path = crate::node::shown(file), "replaying the log of a VHDX image");
        found.run(file)?;
    }
    header.log_guid = 0;
    header.store(file).map_err(crate::foreign::host(file, "Could not write the VHDX header"))
}

/// Where blocks end. Refused are blocks that overlap each other, or what is reserved.
fn check_table(entries: &[u64], ratio: u64, block: u64, reserved: &[(u64, u64)]) -> Result<u64, BlockError> {
    let payload = entries.iter().enumerate().filter(|(n, _)| *n as u64 % (ratio + 1) != ratio);
    let present = payload.filter(|(_, e)| **e & 7 == PRESENT);
    let mut starts: Vec<u64> = present.map(|(_, e)| e & PLACE).collect();
    starts.sort_unstable();
    let overlap = starts.windows(2).any(|w| matches!(w, [a, b] if b - a < block));
    let taken = |s: &u64| {
        let end = s.saturating_add(block);
        reserved.iter().any(|(at, len)| *s < at.saturating_add(*len) && *at < end)
    };
    if overlap || starts.iter().any(taken) {
        return bad("VHDX image is corrupt: its blocks overlap");
    }
    Ok(starts.last().map_or(0, |s| s.saturating_add(block)))
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
        let entry = self.table.lock().entries.get(self.index(block)).copied().unwrap_or(0);
        let place = match entry & 7 {
            0..=3 => Place::Zero,
            PRESENT => Place::Data(Arc::clone(&self.file), (entry & PLACE) + within),
            other => {
                return Err(io::Error::other(format!(
                    "the VHDX image is corrupt: block {block} is of state {other}"
                )));
            }
        };
        Ok(Run { place, len: self.block - within })
    }

    fn begin(&self) -> io::Result<()> {
        let mut table = self.table.lock();
        if !table.begun {
            let guid = || crate::foreign::random().map_err(io::Error::other);
            table.header.touch([guid()?, guid()?]);
            table.header.store(&*self.file)?;
            table.begun = true;
        }
        Ok(())
    }

    fn allocate(&self, offset: u64) -> io::Result<()> {
        let index = self.index(offset / self.block);
        let mut table = self.table.lock();
        let at = table.next;
        match table.entries.get_mut(index) {
            Some(entry) if *entry & 7 == PRESENT => return Ok(()),
            Some(entry) if *entry & 7 <= 3 => {
                // The file ends at or before `at`, so this is new space, which reads as zeroes.
                crate::mapped::grow(&*self.file, at, at + self.block)?;
                *entry = at | PRESENT;
            }
            _ => return Err(io::Error::other("the VHDX image is corrupt: it has no such block")),
        }
        table.next = at + self.block;
        table.dirty.insert(index as u64 * 8 / PAGE);
        if table.dirty.len() >= MAX_PAGES { self.store(&mut table) } else { Ok(()) }
    }

    fn unit(&self) -> Option<u64> {
        Some(self.block)
    }

    fn flush(&self, file: &dyn BlockNode) -> io::Result<()> {
        let mut table = self.table.lock();
        if table.dirty.is_empty() {
            drop(table);
            return file.flush();
        }
        self.store(&mut table)
    }

    fn close(&self) -> io::Result<()> {
        let mut table = self.table.lock();
        if !table.dirty.is_empty() {
            self.store(&mut table)?;
        }
        if table.log.take().is_some() {
            self.file.flush()?;
            table.header.log_guid = 0;
            table.header.store(&*self.file)?;
        }
        Ok(())
    }

    fn check(&self) -> Option<io::Result<Vec<String>>> {
        let table = self.table.lock();
        let checked = check_table(&table.entries, self.ratio, self.block, &[(0, 1 << 20)]);
        Some(Ok(checked.err().map(|e| e.to_string()).into_iter().collect()))
    }
}

impl Vhdx {
    /// The entry of a block: those of sector bitmaps lie between.
    fn index(&self, block: u64) -> usize {
        (block + block / self.ratio) as usize
    }

    /// A page of the table as it is to be.
    fn page(&self, entries: &[u64], number: u64) -> Vec<u8> {
        let first = (number * PAGE / 8) as usize;
        let mut page: Vec<u8> =
            entries.iter().skip(first).take(PAGE as usize / 8).flat_map(|e| e.to_le_bytes()).collect();
        page.resize(PAGE as usize, 0);
        page
    }

    /// Writes what has changed of the table, durably: data first, then the log, then in place.
    fn store(&self, table: &mut Table) -> io::Result<()> {
        let numbers: Vec<u64> = table.dirty.iter().copied().collect();
        for some in numbers.chunks(MAX_PAGES) {
            let pages: Vec<(u64, Vec<u8>)> =
                some.iter().map(|n| (self.bat + n * PAGE, self.page(&table.entries, *n))).collect();
            // The data, and what the log's last entry said.
            self.file.flush()?;
            let log = match &mut table.log {
                Some(log) => log,
                None => {
                    let guid =
                        u128::from_le_bytes(crate::foreign::random().map_err(io::Error::other)?).max(1);
                    table.log.insert(Log::new(table.header.log, guid))
                }
            };
            log.append(&*self.file, &pages)?;
            self.file.flush()?;
            if table.header.log_guid != log.guid() {
                // Only now: a header that names a log without entries would be of no use.
                table.header.log_guid = log.guid();
                table.header.store(&*self.file)?;
            }
            for (at, page) in &pages {
                self.file.write_at(*at, page)?;
            }
            table.dirty.retain(|n| !some.contains(n));
        }
        Ok(())
    }
}
