//! Changing the size, and allocating ahead of use.

use std::io;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::geometry::{COPIED, Entry, OFFSET};
use super::header::MAX_L1_BYTES;
use super::zero::Drop;
use crate::BlockNode;
use crate::node::Preallocation;

fn unsupported(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, text.to_owned())
}

impl Qcow2 {
    pub(super) fn resize(&self, size: u64, preallocation: Preallocation) -> io::Result<()> {
        let _all = self.ranges.lock(0, u64::MAX, true);
        let old = self.size_now();
        {
            let mut state = self.state.lock();
            state.check_writable()?;
            if !size.is_multiple_of(512) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "The new size must be a multiple of 512",
                ));
            }
            if !state.snapshots.is_empty() && self.layout.version < 3 {
                return Err(unsupported("Can't resize a v2 image which has snapshots"));
            }
            state.bitmaps_before_resize(size)?;
        }
        if size < old {
            if preallocation != Preallocation::Off {
                return Err(unsupported("Preallocation can't be used for shrinking an image"));
            }
            self.shrink(size, old)?;
        } else {
            self.grow(old, size, preallocation)?;
        }
        self.state.lock().resize_bitmaps(size);
        Ok(())
    }

    fn shrink(&self, size: u64, old: u64) -> io::Result<()> {
        let cluster = self.layout.cluster();
        self.drop_range(size.next_multiple_of(cluster), old.next_multiple_of(cluster), Drop::Forget)?;
        let mut state = self.state.lock();
        state.flush()?;
        state.header.size = size;
        state.write_header()?;
        state.flush()?;
        self.size.store(size, Ordering::Release);
        // L2 tables of what is gone, which hold nothing any more.
        let needed = state.header.l1_needed(size) as usize;
        for index in needed..state.l1.len() {
            let Some(entry) = state.l1.get_mut(index) else { break };
            let table = std::mem::take(entry) & OFFSET;
            if table != 0 {
                state.l1_dirty.insert(index);
                state.free(table, cluster);
            }
        }
        state.flush()?;
        if let Some(data) = &self.files.data {
            data.truncate(size, Preallocation::Off)?;
        } else if let Some(last) = self.last_used(&mut state)? {
            let end = (last + 1) << self.layout.cluster_bits;
            if end < self.files.file.size() {
                self.files.file.truncate(end, Preallocation::Off)?;
            }
        }
        Ok(())
    }

    fn last_used(&self, state: &mut super::State) -> io::Result<Option<u64>> {
        let end = self.files.file.size().div_ceil(self.layout.cluster());
        for cluster in (0..end).rev() {
            if state.refcount(cluster)? != 0 {
                return Ok(Some(cluster));
            }
        }
        Ok(None)
    }

    fn grow(&self, old: u64, size: u64, preallocation: Preallocation) -> io::Result<()> {
        let mut state = self.state.lock();
        let needed = state.header.l1_needed(size);
        if needed * 8 > MAX_L1_BYTES || size > i64::MAX as u64 - self.layout.cluster() {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "Image is too big for its cluster size"));
        }
        state.flush()?;
        if needed > state.l1.len() as u64 {
            let mut l1 = state.l1.clone();
            l1.resize(needed as usize, 0);
            let at = state.new_l1(&l1)?;
            state.flush()?;
            let (before, bytes) = (state.header.l1_offset, state.l1.len() as u64 * 8);
            state.l1 = l1;
            state.header.l1_offset = at;
            state.header.l1_size = needed as u32;
            state.write_header()?;
            state.files.file.flush()?;
            state.free(before, bytes.max(1));
            state.metadata.clear();
            state.find_metadata();
        }
        drop(state);
        // What a longer backing file has, or what was left in the last cluster, must not show in the new part.
        let stale = self.backing_node().is_some_and(|b| b.size() > old);
        if let Some(data) = &self.files.data {
            data.truncate(
                size,
                if self.data_file_raw { preallocation_of_file(preallocation) } else { Preallocation::Off },
            )?;
        }
        self.size.store(size, Ordering::Release);
        let grown =
            self.grow_contents(old, size, stale).and_then(|()| self.preallocate(old, size, preallocation));
        if let Err(error) = grown {
            self.size.store(old, Ordering::Release);
            return Err(error);
        }
        let mut state = self.state.lock();
        state.flush()?;
        state.header.size = size;
        state.write_header()?;
        state.flush()
    }

    fn grow_contents(&self, old: u64, size: u64, stale: bool) -> io::Result<()> {
        let cluster = self.layout.cluster();
        let head = old.next_multiple_of(cluster).min(size);
        if head > old {
            let extent = self.status_of(old, head - old)?;
            if !extent.zero || stale {
                self.write_locked(old, &vec![0; (head - old) as usize])?;
            }
        }
        if stale && head < size {
            self.drop_range(head, size.next_multiple_of(cluster), Drop::Unmap)?;
        }
        Ok(())
    }

    /// Allocates clusters for bytes `from` to `to`, which have none.
    pub(super) fn preallocate(&self, from: u64, to: u64, how: Preallocation) -> io::Result<()> {
        if how == Preallocation::Off {
            return Ok(());
        }
        let layout = self.layout;
        let mut at = layout.align(from.next_multiple_of(layout.cluster()));
        let mut end_of_data = 0;
        while at < to {
            let mut state = self.state.lock();
            state.own_l2(at)?;
            let room = layout.l2_coverage() - at % layout.l2_coverage();
            let wanted = (to - at).min(room).div_ceil(layout.cluster());
            let (host, got) = if layout.data_file { (at, wanted) } else { state.allocate(wanted)? };
            for n in 0..got {
                let step = n * layout.cluster();
                // With a backing file subclusters stay unallocated, so that it shows through.
                let bitmap = if layout.extended && self.backing.read().is_none() { 0xffff_ffff } else { 0 };
                state.set_entry(at + step, Entry { l2: (host + step) | COPIED, bitmap })?;
            }
            drop(state);
            let bytes = got * layout.cluster();
            let file = self.files.guest();
            match how {
                Preallocation::Full => write_zeroes_fully(&**file, host, bytes)?,
                _ => self.reserve(host, bytes, how)?,
            }
            end_of_data = host + bytes;
            at += bytes;
        }
        if end_of_data > self.files.guest().size() {
            self.files.guest().truncate(end_of_data, Preallocation::Off)?;
        }
        Ok(())
    }

    fn reserve(&self, host: u64, bytes: u64, how: Preallocation) -> io::Result<()> {
        let file = self.files.guest();
        let size = file.size();
        // Places that were in use before hold stale data.
        if host < size {
            file.write_zeroes(host, bytes.min(size - host), false)?;
        }
        if host + bytes > size {
            file.truncate(host + bytes, preallocation_of_file(how))?;
        }
        Ok(())
    }
}

fn preallocation_of_file(how: Preallocation) -> Preallocation {
    if how == Preallocation::Metadata { Preallocation::Off } else { how }
}

/// Writes zeroes as data, so that the host has to find the space.
fn write_zeroes_fully(file: &dyn BlockNode, mut offset: u64, len: u64) -> io::Result<()> {
    let zeroes = vec![0; len.min(1 << 20) as usize];
    let end = offset + len;
    while offset < end {
        let n = (end - offset).min(zeroes.len() as u64);
        file.write_at(offset, zeroes.get(..n as usize).unwrap_or(&zeroes))?;
        offset += n;
    }
    Ok(())
}
