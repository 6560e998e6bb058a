//! Persistent dirty bitmaps (qcow2 specification, "Bitmaps extension").
//!
//! Bitmaps are kept in memory. Before the first write their entries on the disk are marked as in use, so that a crash makes them
//! known to be inconsistent; [`super::Qcow2::close`] stores them.

use std::io;

use super::Qcow2;
use super::geometry::OFFSET;
use super::header::{AUTOCLEAR_BITMAPS, BitmapsExtension, Header, be16, be32, be64};
use super::state::State;
use crate::{BlockError, BlockNode};

const IN_USE: u32 = 1;
const AUTO: u32 = 2;
const EXTRA_COMPATIBLE: u32 = 4;
/// The only type that there is.
const TYPE_DIRTY: u8 = 1;
/// Bytes of a directory entry before its extra data.
const ENTRY: usize = 24;
const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY: u64 = MAX_BITMAPS as u64 * (ENTRY as u64 + 1023);
/// Most bytes of one bitmap in memory.
const MAX_BYTES: u64 = 512 << 20;
/// Longest name in bytes.
pub const MAX_NAME: usize = 1023;

/// A bitmap.
#[derive(Debug, Clone)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Writes set bits in it.
    pub enabled: bool,
    /// It was not closed properly and cannot be trusted.
    pub inconsistent: bool,
    /// Bytes of the disk for a bit: 2 to this.
    pub granularity_bits: u32,
    /// A bit per granule, the lowest first. Empty if inconsistent.
    pub bits: Vec<u8>,
    extra: Vec<u8>,
    flags: u32,
    table_offset: u64,
    table_entries: u32,
}

/// The bitmaps of an image.
#[derive(Debug, Default)]
pub(super) struct Bitmaps {
    pub(super) list: Vec<Bitmap>,
    /// Their entries on the disk say that they are in use.
    marked: bool,
    /// There is something to store.
    changed: bool,
}

fn bad(text: impl Into<String>) -> BlockError {
    BlockError::Format(format!("Invalid bitmap directory: {}", text.into()))
}

impl Bitmap {
    fn bytes_for(size: u64, granularity_bits: u32) -> u64 {
        size.div_ceil(1 << granularity_bits).div_ceil(8)
    }

    /// Sets or clears the bits of a range of the disk.
    pub fn mark(&mut self, offset: u64, len: u64, set: bool) {
        if len == 0 {
            return;
        }
        for n in (offset >> self.granularity_bits)..=((offset + len - 1) >> self.granularity_bits) {
            if let Some(byte) = self.bits.get_mut((n / 8) as usize) {
                if set {
                    *byte |= 1 << (n % 8);
                } else {
                    *byte &= !(1 << (n % 8));
                }
            }
        }
    }

    /// True if granule `n` is dirty.
    pub fn is_set(&self, n: u64) -> bool {
        self.bits.get((n / 8) as usize).is_some_and(|b| b >> (n % 8) & 1 != 0)
    }

    fn read(b: &[u8]) -> Result<(Self, usize), BlockError> {
        if b.len() < ENTRY {
            return Err(bad("it ends within an entry"));
        }
        let (flags, kind) = (be32(b, 12), b.get(16).copied().unwrap_or(0));
        let granularity_bits = u32::from(b.get(17).copied().unwrap_or(0));
        let (name_len, extra_len) = (usize::from(be16(b, 18)), be32(b, 20) as usize);
        let total = (ENTRY + extra_len + name_len).next_multiple_of(8);
        let extra = b.get(ENTRY..ENTRY + extra_len).ok_or_else(|| bad("extra data too long"))?;
        let name =
            b.get(ENTRY + extra_len..ENTRY + extra_len + name_len).ok_or_else(|| bad("name too long"))?;
        if kind != TYPE_DIRTY || !(9..=31).contains(&granularity_bits) || name_len == 0 || name_len > MAX_NAME
        {
            return Err(bad("an entry cannot be right"));
        }
        let usable = flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) == 0
            && (extra_len == 0 || flags & EXTRA_COMPATIBLE != 0);
        let bitmap = Self {
            name: String::from_utf8_lossy(name).into_owned(),
            enabled: flags & AUTO != 0,
            inconsistent: flags & IN_USE != 0 || !usable,
            granularity_bits,
            bits: Vec::new(),
            extra: extra.to_vec(),
            flags,
            table_offset: be64(b, 0),
            table_entries: be32(b, 8),
        };
        Ok((bitmap, total))
    }

    fn load(&mut self, file: &dyn BlockNode, header: &Header) -> Result<(), BlockError> {
        let cluster = header.cluster_size();
        let bytes = Self::bytes_for(header.size, self.granularity_bits);
        let name = &self.name;
        if bytes > MAX_BYTES || u64::from(self.table_entries) != bytes.div_ceil(cluster) {
            return Err(BlockError::Format(format!("Bitmap '{name}' doesn't satisfy the constraints")));
        }
        let fail = |source| BlockError::Host {
            path: file.path().unwrap_or_default(),
            what: "Could not read bitmap",
            source,
        };
        let table =
            super::read_table(file, self.table_offset, u64::from(self.table_entries)).map_err(fail)?;
        self.bits = vec![0; bytes as usize];
        for (entry, part) in table.iter().zip(self.bits.chunks_mut(cluster as usize)) {
            match entry & OFFSET {
                0 if entry & 1 != 0 => part.fill(0xff),
                0 => {}
                offset => file.read_at(offset, part).map_err(fail)?,
            }
        }
        Ok(())
    }

    fn entry(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&self.table_offset.to_be_bytes());
        out.extend_from_slice(&self.table_entries.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&[TYPE_DIRTY, self.granularity_bits as u8]);
        out.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&(self.extra.len() as u32).to_be_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(self.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }
}

impl Bitmaps {
    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Reads all bitmaps that can be trusted to be consistent.
    pub(super) fn read(file: &dyn BlockNode, header: &Header) -> Result<Self, BlockError> {
        let mut all = Self::default();
        let Some(extension) = header.bitmaps.filter(|_| header.autoclear & AUTOCLEAR_BITMAPS != 0) else {
            return Ok(all);
        };
        if extension.directory_size > MAX_DIRECTORY
            || extension.count > MAX_BITMAPS
            || extension.directory_offset > OFFSET
        {
            return Err(bad("it is too large"));
        }
        let mut bytes = vec![0; extension.directory_size as usize];
        file.read_at(extension.directory_offset, &mut bytes).map_err(|source| BlockError::Host {
            path: file.path().unwrap_or_default(),
            what: "Could not read bitmap directory",
            source,
        })?;
        let mut rest = bytes.as_slice();
        for _ in 0..extension.count {
            let (mut bitmap, used) = Bitmap::read(rest)?;
            if !bitmap.inconsistent {
                bitmap.load(file, header)?;
            }
            all.list.push(bitmap);
            rest = rest.get(used..).unwrap_or_default();
        }
        Ok(all)
    }

    /// What bitmaps take in the image: runs of bytes.
    pub(super) fn runs(&self, file: &dyn BlockNode, header: &Header) -> io::Result<Vec<(u64, u64)>> {
        let mut out = Vec::new();
        let Some(extension) = header.bitmaps.filter(|_| header.autoclear & AUTOCLEAR_BITMAPS != 0) else {
            return Ok(out);
        };
        out.push((extension.directory_offset, extension.directory_size));
        for bitmap in self.list.iter().filter(|b| b.table_offset != 0) {
            let entries = u64::from(bitmap.table_entries);
            out.push((bitmap.table_offset, entries * 8));
            let table = super::read_table(file, bitmap.table_offset, entries.min(1 << 20))?;
            out.extend(
                table.iter().map(|e| e & OFFSET).filter(|o| *o != 0).map(|o| (o, header.cluster_size())),
            );
        }
        Ok(out)
    }
}

impl State {
    fn directory(&self) -> Vec<u8> {
        self.bitmaps.list.iter().flat_map(Bitmap::entry).collect()
    }

    /// Says on the disk that all bitmaps are in use.
    fn mark_bitmaps(&mut self) -> io::Result<()> {
        if self.bitmaps.marked || self.bitmaps.list.is_empty() {
            return Ok(());
        }
        for bitmap in &mut self.bitmaps.list {
            bitmap.flags |= IN_USE;
        }
        let bytes = self.directory();
        if let Some(extension) = self.header.bitmaps
            && bytes.len() as u64 == extension.directory_size
        {
            self.files.file.write_at(extension.directory_offset, &bytes)?;
            self.files.file.flush()?;
        }
        self.bitmaps.marked = true;
        self.bitmaps.changed = true;
        Ok(())
    }

    /// Makes sure that bitmaps can follow the disk to another size. From here on until they are stored the image says that they are
    /// in use, so that none is read with the wrong size.
    pub(super) fn bitmaps_before_resize(&mut self, size: u64) -> io::Result<()> {
        for bitmap in &self.bitmaps.list {
            if bitmap.inconsistent {
                let text = format!("Bitmap '{}' is inconsistent and cannot be used", bitmap.name);
                return Err(invalid(text));
            }
            if Bitmap::bytes_for(size, bitmap.granularity_bits) > MAX_BYTES {
                let text = format!("Bitmap '{}' would be too large for the new size", bitmap.name);
                return Err(invalid(text));
            }
        }
        self.mark_bitmaps()
    }

    /// Gives bitmaps the size of the disk; what is new is clean.
    pub(super) fn resize_bitmaps(&mut self, size: u64) {
        for bitmap in &mut self.bitmaps.list {
            let granules = size.div_ceil(1 << bitmap.granularity_bits);
            bitmap.bits.resize(granules.div_ceil(8) as usize, 0);
            if let (Some(last), rest @ 1..) = (bitmap.bits.last_mut(), granules % 8) {
                *last &= (1 << rest) - 1;
            }
            self.bitmaps.changed = true;
        }
    }

    pub(super) fn note_write(&mut self, offset: u64, len: u64) -> io::Result<()> {
        if self.bitmaps.list.is_empty() {
            return Ok(());
        }
        self.check_writable()?;
        self.mark_bitmaps()?;
        for bitmap in self.bitmaps.list.iter_mut().filter(|b| b.enabled && !b.inconsistent) {
            bitmap.mark(offset, len, true);
        }
        Ok(())
    }

    fn store_one(&mut self, n: usize) -> io::Result<()> {
        let cluster = self.layout.cluster() as usize;
        let Some(bitmap) = self.bitmaps.list.get(n) else { return Ok(()) };
        let bits = bitmap.bits.clone();
        let mut table = Vec::new();
        for part in bits.chunks(cluster) {
            if crate::node::is_zero(part) {
                table.push(0u64);
            } else {
                let at = self.allocate(1)?.0;
                let mut whole = part.to_vec();
                whole.resize(cluster, 0);
                self.files.file.write_at(at, &whole)?;
                table.push(at);
            }
        }
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        let at = self.allocate_run((bytes.len().max(1)).div_ceil(cluster) as u64)?;
        self.files.file.write_at(at, &bytes)?;
        if let Some(bitmap) = self.bitmaps.list.get_mut(n) {
            bitmap.table_offset = at;
            bitmap.table_entries = table.len() as u32;
            bitmap.flags = if bitmap.enabled { AUTO } else { 0 } | (bitmap.flags & EXTRA_COMPATIBLE);
        }
        Ok(())
    }

    /// Stores all bitmaps anew if any has changed.
    pub(super) fn store_bitmaps(&mut self) -> io::Result<()> {
        if !self.bitmaps.changed {
            return Ok(());
        }
        self.check_writable()?;
        let cluster = self.layout.cluster();
        let file = std::sync::Arc::clone(&self.files.file);
        let before = Bitmaps { list: std::mem::take(&mut self.bitmaps.list), ..Bitmaps::default() };
        let runs = before.runs(&*file, &self.header);
        self.bitmaps.list = before.list;
        let mut old = runs?;
        for n in 0..self.bitmaps.list.len() {
            let Some(bitmap) = self.bitmaps.list.get(n) else { break };
            if bitmap.inconsistent {
                // It stays where it is.
                let entries = u64::from(bitmap.table_entries);
                let kept = bitmap.table_offset;
                let table = super::read_table(&*file, kept, entries.min(1 << 20))?;
                old.retain(|(o, _)| *o != kept && !table.iter().any(|e| e & OFFSET == *o));
            } else {
                self.store_one(n)?;
            }
        }
        self.header.bitmaps = None;
        self.header.autoclear &= !AUTOCLEAR_BITMAPS;
        if !self.bitmaps.list.is_empty() {
            let bytes = self.directory();
            let at = self.allocate_run((bytes.len() as u64).div_ceil(cluster))?;
            file.write_at(at, &bytes)?;
            self.header.bitmaps = Some(BitmapsExtension {
                count: self.bitmaps.list.len() as u32,
                directory_size: bytes.len() as u64,
                directory_offset: at,
            });
            self.header.autoclear |= AUTOCLEAR_BITMAPS;
        }
        self.flush()?;
        self.write_header()?;
        for (offset, len) in old {
            self.free(offset, len.max(1));
        }
        self.flush()?;
        self.bitmaps.marked = false;
        self.bitmaps.changed = false;
        Ok(())
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

impl Qcow2 {
    /// All bitmaps, as they are now.
    pub fn bitmaps(&self) -> Vec<Bitmap> {
        self.state.lock().bitmaps.list.clone()
    }

    /// The flags of the bitmaps on the disk, for showing: in use, auto.
    pub fn bitmap_flags(bitmap: &Bitmap) -> Vec<&'static str> {
        let mut out = Vec::new();
        if bitmap.flags & IN_USE != 0 {
            out.push("in-use");
        }
        if bitmap.flags & AUTO != 0 {
            out.push("auto");
        }
        out
    }

    /// Adds an empty bitmap.
    ///
    /// # Errors
    /// `InvalidInput` with what cannot be; the host's.
    pub fn add_bitmap(&self, name: &str, granularity: u64, enabled: bool) -> io::Result<()> {
        let mut state = self.state.lock();
        state.check_writable()?;
        if state.layout.version < 3 {
            return Err(invalid("Cannot store dirty bitmaps in qcow2 v2 files".into()));
        }
        if state.bitmaps.list.iter().any(|b| b.name == name) {
            return Err(invalid(format!("Bitmap already exists: {name}")));
        }
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(invalid(format!("Bitmap name '{name}' is empty or longer than {MAX_NAME} bytes")));
        }
        if !granularity.is_power_of_two() {
            return Err(invalid("Granularity must be power of 2".into()));
        }
        if !(1 << 9..=1 << 31).contains(&granularity) {
            return Err(invalid("Granularity must be between 512 bytes and 2 GiB".into()));
        }
        let granularity_bits = granularity.trailing_zeros();
        let bytes = Bitmap::bytes_for(state.header.size, granularity_bits);
        if bytes > MAX_BYTES {
            return Err(invalid(format!("Bitmap '{name}' would be too large: use a coarser granularity")));
        }
        state.mark_bitmaps()?;
        state.bitmaps.list.push(Bitmap {
            name: name.to_owned(),
            enabled,
            inconsistent: false,
            granularity_bits,
            bits: vec![0; bytes as usize],
            extra: Vec::new(),
            flags: 0,
            table_offset: 0,
            table_entries: 0,
        });
        state.bitmaps.changed = true;
        Ok(())
    }

    /// Removes a bitmap, even an inconsistent one.
    ///
    /// # Errors
    /// `NotFound`; the host's.
    pub fn remove_bitmap(&self, name: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        state.check_writable()?;
        let at = find(&state, name)?;
        let removed = state.bitmaps.list.remove(at);
        let file = std::sync::Arc::clone(&state.files.file);
        let one = Bitmaps { list: vec![removed], ..Bitmaps::default() };
        let runs = one.runs(&*file, &state.header)?;
        // The directory is freed when the rest is stored.
        for (offset, len) in runs.into_iter().skip(1) {
            state.free(offset, len.max(1));
        }
        state.bitmaps.changed = true;
        // The entry has to be gone before the space is.
        let freed = std::mem::take(&mut state.freed);
        state.store_bitmaps()?;
        state.freed.extend(freed);
        state.flush()
    }

    /// Changes a bitmap that is consistent.
    ///
    /// # Errors
    /// `NotFound`, `InvalidInput`; the host's.
    pub fn change_bitmap(&self, name: &str, change: impl FnOnce(&mut Bitmap)) -> io::Result<()> {
        let mut state = self.state.lock();
        state.check_writable()?;
        let at = find(&state, name)?;
        if state.bitmaps.list.get(at).is_some_and(|b| b.inconsistent) {
            return Err(invalid(format!("Bitmap '{name}' is inconsistent and cannot be used")));
        }
        state.mark_bitmaps()?;
        if let Some(bitmap) = state.bitmaps.list.get_mut(at) {
            change(bitmap);
        }
        state.bitmaps.changed = true;
        Ok(())
    }
}

fn find(state: &State, name: &str) -> io::Result<usize> {
    let at = state.bitmaps.list.iter().position(|b| b.name == name);
    at.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("Dirty bitmap '{name}' not found")))
}
