//! Changes of many refcounts and flags that reach the disk as one: what snapshots need.
//!
//! The copied flags of active tables have to fit the refcounts, and the two are in different sectors. So nothing that is in use is
//! changed in place: refcount blocks, L2 tables, the L1 table and the snapshot table are written anew to clusters that the old
//! refcounts call free, and one write of the header makes them the image's. Until then the disk has the old image, whole;
//! from then on the new one, without leaks.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use super::geometry::{REFTABLE_RESERVED, get_refcount};
use super::header::{Header, MAX_REFTABLE_BYTES};
use super::state::State;
use crate::node::os_error;

/// Runs of freed clusters that are remembered for discarding, which is advice.
const MAX_GONE: usize = 65_536;

/// The tables as they will be.
pub(super) struct Shadow<'a> {
    pub(super) state: &'a mut State,
    /// The refcount table that is on the disk.
    old_reftable: Vec<u64>,
    /// Refcount blocks (by index) that are new, so that they may be changed.
    moved: HashSet<usize>,
    /// Clusters that are taken for new blocks, but not yet counted.
    taken: Vec<u64>,
    /// Runs of bytes of the old image that the new one does not have.
    dropped: Vec<(u64, u64)>,
    /// Runs of clusters (first, number) that nothing refers to any more.
    gone: Vec<(u64, u64)>,
    /// No cluster before this one is free in both images.
    next: u64,
}

impl<'a> Shadow<'a> {
    /// Runs `change`, which ends with [`Shadow::commit`]. If it fails, tables in memory are what they are on the disk.
    pub(super) fn run<T>(
        state: &'a mut State,
        change: impl FnOnce(&mut Shadow<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        state.flush()?;
        state.free_byte = 0;
        let old_reftable = state.reftable.clone();
        let mut shadow = Shadow {
            next: state.first_free.max(1),
            old_reftable,
            moved: HashSet::new(),
            taken: Vec::new(),
            dropped: Vec::new(),
            gone: Vec::new(),
            state,
        };
        let result = change(&mut shadow);
        if result.is_err() {
            let old = std::mem::take(&mut shadow.old_reftable);
            shadow.state.reftable = old;
            shadow.state.refblocks.reset();
            shadow.state.l2.clear();
        }
        result
    }

    fn bits(&self) -> u32 {
        self.state.layout.cluster_bits
    }

    fn old_refcount(&mut self, cluster: u64) -> io::Result<u64> {
        let index = (cluster / self.state.layout.refblock_entries()) as usize;
        let block = self.old_reftable.get(index).map_or(0, |e| e & !REFTABLE_RESERVED);
        if block == 0 {
            return Ok(0);
        }
        let (slice, n) = self.state.refcount_place(block, cluster);
        let slot = self.state.load_refblock(slice)?;
        Ok(get_refcount(self.state.refblocks.data(slot), self.state.layout.refcount_order, n))
    }

    /// True if a cluster is used by neither image.
    fn is_free(&mut self, cluster: u64) -> io::Result<bool> {
        if self.taken.contains(&cluster)
            || self.state.refcount(cluster)? != 0
            || self.old_refcount(cluster)? != 0
        {
            return Ok(false);
        }
        if self.state.metadata.contains(&cluster) {
            let at = cluster << self.bits();
            let what = format!("metadata at {at:#x} has a refcount of 0 and would be overwritten");
            return Err(self.state.mark_corrupt(what));
        }
        Ok(true)
    }

    /// The first of `count` free clusters in a run.
    fn find(&mut self, count: u64) -> io::Result<u64> {
        let (mut start, mut len) = (self.next, 0);
        while len < count {
            if self.is_free(start + len)? {
                len += 1;
            } else {
                (start, len) = (start + len + 1, 0);
            }
        }
        if (start + count) << self.bits() > i64::MAX as u64 - (1 << 40) {
            return Err(os_error(libc::EFBIG));
        }
        if count == 1 {
            self.next = start + 1;
        }
        Ok(start)
    }

    /// Puts a refcount block where it may be changed; its new cluster waits in `taken` for being counted.
    fn move_block(&mut self, index: usize) -> io::Result<()> {
        if !self.moved.insert(index) {
            return Ok(());
        }
        if (index as u64 + 1) * 8 > MAX_REFTABLE_BYTES {
            let text = "the image would need too large a refcount table";
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        if index >= self.state.reftable.len() {
            self.state.reftable.resize(index + 1, 0);
        }
        let cluster = self.state.layout.cluster();
        let at = self.find(1)?;
        self.taken.push(at);
        let (offset, old) = (at << self.bits(), self.old_reftable.get(index).copied().unwrap_or(0));
        let mut contents = vec![0; cluster as usize];
        let old = old & !REFTABLE_RESERVED;
        if old != 0 {
            self.state.files.file.read_at(old, &mut contents)?;
            self.dropped.push((old, cluster));
        }
        self.state.refblocks.forget(offset, offset + cluster);
        self.state.files.file.write_at(offset, &contents)?;
        if let Some(entry) = self.state.reftable.get_mut(index) {
            *entry = offset;
        }
        Ok(())
    }

    fn set(&mut self, cluster: u64, value: u64) -> io::Result<()> {
        let per = self.state.layout.refblock_entries();
        self.move_block((cluster / per) as usize)?;
        self.state.set_refcount(cluster, value)?;
        while let Some(block) = self.taken.last().copied() {
            // It is still held as taken while a place for its own block is looked for.
            self.move_block((block / per) as usize)?;
            self.taken.retain(|c| *c != block);
            self.state.set_refcount(block, 1)?;
        }
        Ok(())
    }

    /// One reference more to the clusters of a run of bytes.
    pub(super) fn add(&mut self, offset: u64, len: u64) -> io::Result<()> {
        for cluster in (offset >> self.bits())..=((offset + len - 1) >> self.bits()) {
            let old = self.state.refcount(cluster)?;
            if old >= self.state.layout.refcount_max() {
                let text = "the refcount would not fit its width";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            self.set(cluster, old + 1)?;
        }
        Ok(())
    }

    /// One reference less to the clusters of a run of bytes.
    pub(super) fn sub(&mut self, offset: u64, len: u64) -> io::Result<()> {
        for cluster in (offset >> self.bits())..=((offset + len - 1) >> self.bits()) {
            let old = self.state.refcount(cluster)?;
            if old == 0 {
                let at = cluster << self.bits();
                let what = format!("the cluster at {at:#x} is freed, but its refcount is 0");
                return Err(self.state.mark_corrupt(what));
            }
            self.set(cluster, old - 1)?;
            if old == 1 {
                let room = self.gone.len() < MAX_GONE;
                match self.gone.last_mut() {
                    Some((start, n)) if *start + *n == cluster => *n += 1,
                    _ if room => self.gone.push((cluster, 1)),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// A run of clusters with refcounts of one for `len` bytes. Returns its offset.
    pub(super) fn allocate(&mut self, len: u64) -> io::Result<u64> {
        let count = len.max(1).div_ceil(self.state.layout.cluster());
        let first = self.find(count)?;
        self.taken.extend(first..first + count);
        for cluster in first..first + count {
            self.set(cluster, 1)?;
        }
        Ok(first << self.bits())
    }

    /// Writes a table to new clusters, whose rest becomes zero. Returns its offset.
    pub(super) fn new_table(&mut self, entries: &[u64]) -> io::Result<u64> {
        let mut bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
        let at = self.allocate(bytes.len() as u64)?;
        bytes.resize(bytes.len().max(1).next_multiple_of(self.state.layout.cluster() as usize), 0);
        self.state.files.file.write_at(at, &bytes)?;
        Ok(at)
    }

    /// Makes the new tables the image's: an L1 table that [`Shadow::new_table`] wrote, and what `edit` says of the header.
    pub(super) fn commit(
        &mut self,
        l1: Vec<u64>,
        l1_offset: u64,
        edit: impl FnOnce(&mut Header),
    ) -> io::Result<()> {
        let cluster = self.state.layout.cluster();
        let old = (self.state.header.l1_offset, (self.state.l1.len() as u64 * 8).max(1));
        self.dropped.push(old);
        let reftable = u64::from(self.state.header.reftable_clusters) * cluster;
        self.dropped.push((self.state.header.reftable_offset, reftable.max(1)));
        let (mut at, mut clusters) = (0, 0);
        // Taking down counts moves blocks, which drops old ones and may make the table longer.
        loop {
            while let Some((offset, len)) = self.dropped.pop() {
                self.sub(offset, len)?;
            }
            let needed = (self.state.reftable.len() as u64 * 8).max(reftable).div_ceil(cluster).max(1);
            if needed == clusters {
                break;
            }
            if clusters != 0 {
                self.sub(at, clusters * cluster)?;
            }
            clusters = needed;
            at = self.allocate(clusters * cluster)?;
        }
        let file = Arc::clone(&self.state.files.file);
        self.state.reftable.resize((clusters * cluster / 8) as usize, 0);
        let bytes: Vec<u8> = self.state.reftable.iter().flat_map(|e| e.to_be_bytes()).collect();
        file.write_at(at, &bytes)?;
        self.state.refblocks.write_back(&*file)?;
        self.state.barrier()?;
        let mut header = self.state.header.clone();
        header.reftable_offset = at;
        header.reftable_clusters = clusters as u32;
        header.l1_offset = l1_offset;
        header.l1_size = l1.len() as u32;
        edit(&mut header);
        // What is wrong with it is wrong before it is written.
        header.to_bytes().map_err(io::Error::other)?;
        self.state.header = header;
        self.state.l1 = l1;
        let written = self.state.write_header().and_then(|()| file.flush());
        if let Err(error) = written {
            // Whether the disk has the old image or the new one is not known: neither may be written.
            self.state.corrupt = Some("its header could not be written".to_owned());
            return Err(error);
        }
        self.committed();
        Ok(())
    }

    fn committed(&mut self) {
        let bits = self.bits();
        let state = &mut *self.state;
        state.l2.clear();
        state.metadata.clear();
        state.find_metadata();
        let gone = std::mem::take(&mut self.gone);
        for (first, count) in gone {
            // What was freed and taken again in between is not to be lost.
            let free = (first..first + count).all(|c| matches!(state.refcount(c), Ok(0)));
            if free && state.discard_freed {
                // Advice; a file that cannot take it keeps the space.
                let _ = state.files.file.discard(first << bits, count << bits);
            }
        }
    }
}
