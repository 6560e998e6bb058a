//! Refcounts and the allocation of clusters.

use std::io;
use std::sync::Arc;

use super::cache::Room;
use super::geometry::{OFFSET, REFTABLE_RESERVED, get_refcount, set_refcount};
use super::header::MAX_REFTABLE_BYTES;
use super::state::State;
use crate::node::os_error;

impl State {
    pub(super) fn load_refblock(&mut self, offset: u64) -> io::Result<usize> {
        if let Some(at) = self.refblocks.find(offset) {
            return Ok(at);
        }
        let at = match self.refblocks.room() {
            Room::Slot(at) => at,
            Room::WriteBack => {
                // Counts may always be written: what they lose was lost by the tables before.
                self.refblocks.write_back(&*Arc::clone(&self.files.file))?;
                match self.refblocks.room() {
                    Room::Slot(at) => at,
                    Room::WriteBack => return Err(os_error(libc::EIO)),
                }
            }
        };
        self.refblocks.load(at, offset, &*Arc::clone(&self.files.file))?;
        Ok(at)
    }

    /// The refcount block of a cluster: its index in the table, and where it is if there is one.
    fn refblock(&mut self, cluster: u64) -> io::Result<(usize, Option<u64>)> {
        let index = (cluster / self.layout.refblock_entries()) as usize;
        let entry = self.reftable.get(index).copied().unwrap_or(0);
        let offset = entry & !REFTABLE_RESERVED;
        if offset == 0 {
            return Ok((index, None));
        }
        if !offset.is_multiple_of(self.layout.cluster()) || offset & !OFFSET != 0 {
            let what = format!("Refblock offset {offset:#x} unaligned (reftable index: {index:#x})");
            return Err(self.mark_corrupt(what));
        }
        Ok((index, Some(offset)))
    }

    /// Slice of a refcount block and the number in it of a cluster's refcount.
    pub(super) fn refcount_place(&self, block: u64, cluster: u64) -> (u64, usize) {
        let n = cluster % self.layout.refblock_entries();
        let per_slice = (self.refblocks.slice() * 8) >> self.layout.refcount_order;
        (block + n / per_slice * self.refblocks.slice(), (n % per_slice) as usize)
    }

    /// How often a cluster is referred to.
    pub(super) fn refcount(&mut self, cluster: u64) -> io::Result<u64> {
        let (_, Some(block)) = self.refblock(cluster)? else { return Ok(0) };
        let (slice, n) = self.refcount_place(block, cluster);
        let slot = self.load_refblock(slice)?;
        Ok(get_refcount(self.refblocks.data(slot), self.layout.refcount_order, n))
    }

    /// Sets a cluster's refcount, making a refcount block if there is none.
    pub(super) fn set_refcount(&mut self, cluster: u64, value: u64) -> io::Result<()> {
        let block = match self.refblock(cluster)? {
            (_, Some(block)) => block,
            (index, None) => {
                let block = self.allocate(1)?.0;
                // The allocation may have made just this block.
                match self.refblock(cluster)? {
                    (_, Some(made)) => {
                        self.free_now(block)?;
                        made
                    }
                    (_, None) => {
                        self.new_refblock(index, block)?;
                        block
                    }
                }
            }
        };
        self.put_refcount(block, cluster, value)
    }

    fn put_refcount(&mut self, block: u64, cluster: u64, value: u64) -> io::Result<()> {
        let (slice, n) = self.refcount_place(block, cluster);
        let slot = self.load_refblock(slice)?;
        set_refcount(self.refblocks.change(slot), self.layout.refcount_order, n, value);
        if value == 0 {
            self.first_free = self.first_free.min(cluster);
        }
        Ok(())
    }

    /// Takes back a cluster that nothing on the disk ever referred to.
    pub(super) fn free_now(&mut self, offset: u64) -> io::Result<()> {
        let cluster = offset >> self.layout.cluster_bits;
        let old = self.refcount(cluster)?;
        self.metadata.remove(&cluster);
        self.set_refcount(cluster, old.saturating_sub(1))
    }

    fn new_refblock(&mut self, index: usize, offset: u64) -> io::Result<()> {
        if index >= self.reftable.len() {
            self.grow_reftable(index)?;
        }
        self.refblocks.forget(offset, offset + self.layout.cluster());
        self.files.file.write_at(offset, &vec![0; self.layout.cluster() as usize])?;
        if let Some(entry) = self.reftable.get_mut(index) {
            *entry = offset;
        }
        self.reftable_dirty.insert(index);
        self.metadata.insert(offset >> self.layout.cluster_bits);
        Ok(())
    }

    /// A free cluster run: at most `count` long, at least 1. Returns its offset and length in clusters, with refcounts of one.
    pub(super) fn allocate(&mut self, count: u64) -> io::Result<(u64, u64)> {
        let bits = self.layout.cluster_bits;
        let mut cluster = self.first_free.max(1);
        loop {
            let (index, block) = self.refblock(cluster)?;
            if block.is_none() {
                self.place_refblock(index, cluster)?;
                continue;
            }
            if self.refcount(cluster)? != 0 {
                cluster += 1;
                continue;
            }
            break;
        }
        if cluster << bits > i64::MAX as u64 - (1 << 40) {
            return Err(os_error(libc::EFBIG));
        }
        let mut got = 0;
        while got < count && self.refblock(cluster + got)?.1.is_some() && self.refcount(cluster + got)? == 0 {
            self.claim(cluster + got)?;
            got += 1;
        }
        self.first_free = cluster + got;
        Ok((cluster << bits, got))
    }

    /// `count` clusters in one run, for tables.
    pub(super) fn allocate_run(&mut self, count: u64) -> io::Result<u64> {
        let bits = self.layout.cluster_bits;
        let mut start = self.first_free.max(1);
        let mut len = 0;
        while len < count {
            let next = start + len;
            let (index, block) = self.refblock(next)?;
            if block.is_none() {
                // The block goes where the run would have gone on, and the run starts behind it.
                self.place_refblock(index, next)?;
                (start, len) = (next + 1, 0);
            } else if self.refcount(next)? == 0 {
                len += 1;
            } else {
                (start, len) = (next + 1, 0);
            }
        }
        for cluster in start..start + count {
            self.claim(cluster)?;
        }
        if self.first_free == start {
            self.first_free = start + count;
        }
        Ok(start << bits)
    }

    fn claim(&mut self, cluster: u64) -> io::Result<()> {
        if cluster == 0 || self.metadata.contains(&cluster) {
            let at = cluster << self.layout.cluster_bits;
            return Err(self
                .mark_corrupt(format!("metadata at {at:#x} has a refcount of 0 and would be overwritten")));
        }
        let (_, Some(block)) = self.refblock(cluster)? else { return Err(os_error(libc::EIO)) };
        self.put_refcount(block, cluster, 1)
    }

    /// Makes the refcount block of a range without one, in the range itself: it counts itself.
    fn place_refblock(&mut self, index: usize, cluster: u64) -> io::Result<()> {
        let offset = cluster << self.layout.cluster_bits;
        if self.metadata.contains(&cluster) {
            return Err(self.mark_corrupt(format!(
                "metadata at {offset:#x} has a refcount of 0 and would be overwritten"
            )));
        }
        if index >= self.reftable.len() {
            return self.grow_reftable(index);
        }
        self.new_refblock(index, offset)?;
        self.put_refcount(offset, cluster, 1)
    }

    /// Moves the refcount table to a larger place.
    fn grow_reftable(&mut self, index: usize) -> io::Result<()> {
        let cluster = self.layout.cluster();
        let per = cluster as usize / 8;
        let old_clusters = u64::from(self.header.reftable_clusters);
        // Room for its own blocks too, and then some, so that this stays rare.
        let wanted = (index + 2).max(self.reftable.len() + self.reftable.len() / 2);
        let clusters = wanted.div_ceil(per) as u64;
        if clusters * cluster > MAX_REFTABLE_BYTES.max(cluster) {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "the image would need too large a refcount table",
            ));
        }
        self.reftable.resize(clusters as usize * per, 0);
        let new = self.allocate_run(clusters)?;
        for n in 0..clusters {
            self.metadata.insert((new >> self.layout.cluster_bits) + n);
        }
        let file = Arc::clone(&self.files.file);
        self.refblocks.write_back(&*file)?;
        let bytes: Vec<u8> = self.reftable.iter().flat_map(|e| e.to_be_bytes()).collect();
        file.write_at(new, &bytes)?;
        file.flush()?;
        let old = self.header.reftable_offset;
        self.header.reftable_offset = new;
        self.header.reftable_clusters = clusters as u32;
        self.reftable_dirty.clear();
        self.write_header()?;
        file.flush()?;
        self.free(old, old_clusters * cluster);
        Ok(())
    }

    /// Room for a compressed cluster of `len` bytes, which is at most a cluster: beside the last one if it fits.
    pub(super) fn allocate_bytes(&mut self, len: u64) -> io::Result<u64> {
        let cluster = self.layout.cluster();
        let bits = self.layout.cluster_bits;
        let at = self.free_byte;
        if at != 0 {
            let room = cluster - at % cluster;
            let home = at >> bits;
            let count = self.refcount(home)?;
            if count != 0 && count < self.layout.refcount_max() {
                if len <= room {
                    self.set_refcount(home, count + 1)?;
                    self.free_byte = if len == room { 0 } else { at + len };
                    return Ok(at);
                }
                // It may go on in the next cluster, if that one is free.
                if self.refblock(home + 1)?.1.is_some()
                    && self.refcount(home + 1)? == 0
                    && !self.metadata.contains(&(home + 1))
                {
                    self.set_refcount(home, count + 1)?;
                    self.claim(home + 1)?;
                    self.first_free = if self.first_free == home + 1 { home + 2 } else { self.first_free };
                    self.free_byte = at + len;
                    return Ok(at);
                }
            }
        }
        let (new, _) = self.allocate(1)?;
        self.free_byte = if len == cluster { 0 } else { new + len };
        Ok(new)
    }
}
