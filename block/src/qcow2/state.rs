//! The tables of an open image and the order in which they reach the disk.
//!
//! On the disk a refcount is never smaller than the number of references: counts go up before a reference is written, and down
//! only after its removal is durable (until then the clusters wait in `freed`, so nobody reuses them). Data and copied-up data are
//! durable before the L2 entry that points to them, an L2 table before its L1 entry. After a crash there are leaks at worst.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::sync::Arc;

use super::cache::{Room, TableCache};
use super::geometry::{COPIED, Entry, L1_RESERVED, Layout, OFFSET};
use super::header::{Header, be64};
use super::snapshot::Snapshot;
use crate::BlockNode;
use crate::crypto::{CryptFile, SectorCipher};
use crate::node::os_error;

/// Clusters that may wait for a flush before one is made for them.
const MAX_FREED: usize = 4096;

/// The files of an image.
#[derive(Debug, Clone)]
pub(super) struct Files {
    pub(super) file: Arc<dyn BlockNode>,
    /// The external data file.
    pub(super) data: Option<Arc<dyn BlockNode>>,
    /// What decrypts guest clusters, over the file that they are in.
    pub(super) crypt: Option<Arc<dyn BlockNode>>,
    /// What decrypts guest clusters of legacy images, by sectors of the disk.
    pub(super) legacy: Option<Arc<SectorCipher>>,
}

impl Files {
    /// Guest clusters are encrypted with this cipher, by their places.
    pub(super) fn encrypt(&mut self, cipher: SectorCipher) {
        let below = self.data.as_ref().unwrap_or(&self.file);
        self.crypt = Some(CryptFile::new(Arc::clone(below), 0, cipher));
    }

    /// Where guest clusters are.
    pub(super) fn guest(&self) -> &Arc<dyn BlockNode> {
        self.crypt.as_ref().or(self.data.as_ref()).unwrap_or(&self.file)
    }
}

/// The tables.
#[derive(Debug)]
pub(super) struct State {
    pub(super) files: Files,
    pub(super) layout: Layout,
    pub(super) header: Header,
    pub(super) l1: Vec<u64>,
    pub(super) l1_dirty: BTreeSet<usize>,
    pub(super) reftable: Vec<u64>,
    pub(super) reftable_dirty: BTreeSet<usize>,
    pub(super) l2: TableCache,
    pub(super) refblocks: TableCache,
    /// No free cluster is before this one.
    pub(super) first_free: u64,
    /// Where the next compressed cluster goes, or 0.
    pub(super) free_byte: u64,
    /// Runs of clusters (first, number) whose references are gone, but not yet from the disk.
    pub(super) freed: Vec<(u64, u64)>,
    pub(super) snapshots: Vec<Snapshot>,
    /// Bytes of the snapshot table on the disk.
    pub(super) snapshot_table_size: u64,
    /// Clusters of metadata: an allocation that yields one shows that refcounts are wrong.
    pub(super) metadata: HashSet<u64>,
    /// Pass freed clusters on to the file as discards.
    pub(super) discard_freed: bool,
    /// Why nothing more is written, if so.
    pub(super) corrupt: Option<String>,
    pub(super) readonly: bool,
    /// It is another process's for the time being.
    pub(super) inactive: bool,
    pub(super) bitmaps: super::bitmap::Bitmaps,
    /// Hears of damage.
    pub(super) watch: Option<Arc<crate::nodes::NodeWatch>>,
    /// Entries under inspection, kept for its memory.
    pub(super) scratch: Vec<Entry>,
}

pub(super) fn corrupt_error(what: &str) -> io::Error {
    io::Error::other(format!("the qcow2 image is corrupt: {what}"))
}

impl State {
    /// Says that the image is damaged, in its header too, and makes an error of it.
    pub(super) fn mark_corrupt(&mut self, what: String) -> io::Error {
        let error = corrupt_error(&what);
        if self.corrupt.is_none() {
            let path = crate::node::shown(&*self.files.file);
            tracing::error!(path, what, "marking the image as corrupt; it cannot be written any more");
            if let Some(watch) = &self.watch {
                watch.corrupted(&what);
            }
            self.corrupt = Some(what);
            if !self.readonly && self.layout.version >= 3 {
                self.header.incompatible |= super::header::incompatible::CORRUPT;
                if let Err(error) = self.write_header() {
                    tracing::error!(path, %error, "the corrupt bit cannot be set");
                }
            }
        }
        error
    }

    pub(super) fn check_writable(&self) -> io::Result<()> {
        if self.readonly {
            return Err(os_error(libc::EROFS));
        }
        if self.inactive {
            return Err(crate::node::inactive_error());
        }
        match &self.corrupt {
            Some(what) => Err(corrupt_error(what)),
            None => Ok(()),
        }
    }

    /// Writes the header's cluster.
    pub(super) fn write_header(&mut self) -> io::Result<()> {
        let mut bytes = self.header.to_bytes().map_err(io::Error::other)?;
        // What a longer old header leaves behind must not be read as an extension.
        bytes.resize(bytes.len().next_multiple_of(512).min(self.layout.cluster() as usize), 0);
        self.files.file.write_at(0, &bytes)
    }

    // ---- L2 ----

    fn load_l2(&mut self, offset: u64) -> io::Result<usize> {
        if let Some(at) = self.l2.find(offset) {
            return Ok(at);
        }
        let at = match self.l2.room() {
            Room::Slot(at) => at,
            Room::WriteBack => {
                self.flush_tables()?;
                match self.l2.room() {
                    Room::Slot(at) => at,
                    Room::WriteBack => return Err(os_error(libc::EIO)),
                }
            }
        };
        self.l2.load(at, offset, &*self.files.file)?;
        Ok(at)
    }

    fn l1_index(&self, offset: u64) -> usize {
        (offset / self.layout.l2_coverage()) as usize
    }

    /// The L2 table of a guest offset, if there is one.
    fn l2_table(&mut self, offset: u64) -> io::Result<Option<u64>> {
        let index = self.l1_index(offset);
        let entry = self.l1.get(index).copied().unwrap_or(0);
        let table = entry & OFFSET;
        if table == 0 {
            return Ok(None);
        }
        if !table.is_multiple_of(self.layout.cluster()) || entry & L1_RESERVED != 0 {
            return Err(
                self.mark_corrupt(format!("L2 table offset {table:#x} unaligned (L1 index: {index:#x})"))
            );
        }
        Ok(Some(table))
    }

    /// Slice and byte in it of the entry of a guest offset, in the table at `table`.
    pub(super) fn entry_place(&self, table: u64, offset: u64) -> (u64, usize) {
        let n = (offset >> self.layout.cluster_bits) % self.layout.l2_entries();
        let byte = n * self.layout.entry();
        let slice = self.l2.slice();
        (table + byte - byte % slice, (byte % slice) as usize)
    }

    /// Entries from guest offset `offset` (of a cluster) on: as many as are in its slice, at most `max`. Without a table: one
    /// empty entry, which holds to the end of what the table would cover.
    pub(super) fn entries(&mut self, offset: u64, max: usize, out: &mut Vec<Entry>) -> io::Result<bool> {
        out.clear();
        let Some(table) = self.l2_table(offset)? else {
            return Ok(false);
        };
        let (slice, at) = self.entry_place(table, offset);
        let slot = self.load_l2(slice)?;
        let step = self.layout.entry() as usize;
        let extended = self.layout.extended;
        let rest = self.l2.data(slot).get(at..).unwrap_or_default();
        out.extend(
            rest.chunks_exact(step)
                .take(max)
                .map(|e| Entry { l2: be64(e, 0), bitmap: if extended { be64(e, 8) } else { 0 } }),
        );
        Ok(true)
    }

    /// Changes the entry of a guest offset, whose table can be written.
    pub(super) fn set_entry(&mut self, offset: u64, entry: Entry) -> io::Result<()> {
        let Some(table) = self.l2_table(offset)? else {
            return Err(os_error(libc::EIO));
        };
        let (slice, at) = self.entry_place(table, offset);
        let slot = self.load_l2(slice)?;
        let extended = self.layout.extended;
        let data = self.l2.change(slot);
        if let Some(place) = data.get_mut(at..at + 8) {
            place.copy_from_slice(&entry.l2.to_be_bytes());
        }
        if let (true, Some(place)) = (extended, data.get_mut(at + 8..at + 16)) {
            place.copy_from_slice(&entry.bitmap.to_be_bytes());
        }
        Ok(())
    }

    /// Makes the L2 table of a guest offset one that can be written: new, or a copy of a shared one.
    pub(super) fn own_l2(&mut self, offset: u64) -> io::Result<()> {
        let index = self.l1_index(offset);
        let Some(&entry) = self.l1.get(index) else {
            return Err(os_error(libc::EINVAL));
        };
        if entry & COPIED != 0 && entry & OFFSET != 0 {
            return self.l2_table(offset).map(drop);
        }
        let old = self.l2_table(offset)?;
        let cluster = self.layout.cluster();
        let mut contents = vec![0; cluster as usize];
        if let Some(old) = old {
            // Shared tables are never dirty in the cache.
            self.files.file.read_at(old, &mut contents)?;
        }
        let new = self.allocate(1)?.0;
        self.l2.forget(new, new + cluster);
        self.files.file.write_at(new, &contents)?;
        self.metadata.insert(new >> self.layout.cluster_bits);
        if let Some(slot) = self.l1.get_mut(index) {
            *slot = new | COPIED;
        }
        self.l1_dirty.insert(index);
        if let Some(old) = old {
            self.free(old, cluster);
        }
        Ok(())
    }

    // ---- the order of writes ----

    /// Makes data durable that was written so far.
    pub(super) fn barrier(&mut self) -> io::Result<()> {
        if let Some(data) = &self.files.data {
            data.flush()?;
        }
        self.files.file.flush()
    }

    pub(super) fn is_clean(&self) -> bool {
        !self.l2.is_dirty()
            && !self.refblocks.is_dirty()
            && self.l1_dirty.is_empty()
            && self.reftable_dirty.is_empty()
            && self.freed.is_empty()
    }

    /// Writes table entries that changed, in 512-byte sectors.
    fn write_table(
        file: &dyn BlockNode,
        offset: u64,
        table: &[u64],
        dirty: &BTreeSet<usize>,
    ) -> io::Result<()> {
        let mut sectors: Vec<usize> = dirty.iter().map(|i| i / 64).collect();
        sectors.dedup();
        for sector in sectors {
            let part = table.get(sector * 64..((sector + 1) * 64).min(table.len())).unwrap_or_default();
            let bytes: Vec<u8> = part.iter().flat_map(|e| e.to_be_bytes()).collect();
            file.write_at(offset + sector as u64 * 512, &bytes)?;
        }
        Ok(())
    }

    /// Brings all tables to the disk, in order. What they say is durable after the next barrier.
    pub(super) fn flush_tables(&mut self) -> io::Result<()> {
        if self.readonly || self.corrupt.is_some() {
            return Ok(());
        }
        let file = Arc::clone(&self.files.file);
        self.refblocks.write_back(&*file)?;
        if !self.reftable_dirty.is_empty() {
            self.barrier()?;
            Self::write_table(&*file, self.header.reftable_offset, &self.reftable, &self.reftable_dirty)?;
            self.reftable_dirty.clear();
        }
        if self.l2.is_dirty() || !self.l1_dirty.is_empty() {
            self.barrier()?;
            let tables = self.l2.is_dirty();
            self.l2.write_back(&*file)?;
            if !self.l1_dirty.is_empty() {
                if tables {
                    self.barrier()?;
                }
                Self::write_table(&*file, self.header.l1_offset, &self.l1, &self.l1_dirty)?;
                self.l1_dirty.clear();
            }
        }
        if !self.freed.is_empty() {
            self.barrier()?;
            self.release()?;
        }
        Ok(())
    }

    /// Takes down the counts of clusters whose references are gone from the disk.
    fn release(&mut self) -> io::Result<()> {
        let bits = self.layout.cluster_bits;
        for (first, count) in std::mem::take(&mut self.freed) {
            let mut runs: Vec<(u64, u64)> = Vec::new();
            for cluster in first..first + count {
                let old = self.refcount(cluster)?;
                if old == 0 {
                    let at = cluster << bits;
                    return Err(
                        self.mark_corrupt(format!("the cluster at {at:#x} is freed, but its refcount is 0"))
                    );
                }
                self.set_refcount(cluster, old - 1)?;
                if old == 1 {
                    self.metadata.remove(&cluster);
                    if self.free_byte >> bits == cluster {
                        self.free_byte = 0;
                    }
                    match runs.last_mut() {
                        Some((start, n)) if *start + *n == cluster => *n += 1,
                        _ => runs.push((cluster, 1)),
                    }
                }
            }
            for (first, count) in runs.into_iter().filter(|_| self.discard_freed) {
                // Advice; a file that cannot take it keeps the space.
                let _ = self.files.file.discard(first << bits, count << bits);
            }
        }
        Ok(())
    }

    /// Everything that was done so far becomes durable.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.flush_tables()?;
        // Counts that went down after the tables were written.
        self.refblocks.write_back(&*Arc::clone(&self.files.file))?;
        self.barrier()
    }

    /// A range of clusters of the image file is not referred to any more.
    pub(super) fn free(&mut self, offset: u64, len: u64) {
        let bits = self.layout.cluster_bits;
        let first = offset >> bits;
        let count = ((offset + len - 1) >> bits) - first + 1;
        match self.freed.last_mut() {
            Some((start, n)) if *start + *n == first => *n += count,
            _ => self.freed.push((first, count)),
        }
    }

    /// Flushes if so much waits to be freed that it is worth it.
    pub(super) fn free_pressure(&mut self) -> io::Result<()> {
        if self.freed.len() > MAX_FREED { self.flush_tables() } else { Ok(()) }
    }

    /// What an entry refers to is not referred to any more. Nothing is to be done in an external data file.
    pub(super) fn free_entry(&mut self, entry: Entry) {
        if entry.l2 & super::geometry::COMPRESSED != 0 {
            let (offset, len) = self.layout.compressed_range(entry.l2);
            self.free(offset, len);
        } else if let (Some(host), false) = (self.layout.host(entry), self.layout.data_file) {
            self.free(host, self.layout.cluster());
        }
    }
}
