//! Discarding and zeroing.

use std::io;

use super::Qcow2;
use super::geometry::{COMPRESSED, COPIED, Entry, Kind, OFFSET, ZERO};
use super::state::State;

/// Zeroes that are written at a time where nothing better is possible.
const CHUNK: u64 = 1 << 20;
const ALL_ZERO: u64 = 0xffff_ffff << 32;

/// What becomes of whole clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drop {
    /// They read as zeroes and may keep their place.
    Zero,
    /// They read as zeroes and give their place back.
    Unmap,
    /// Their contents do not matter; stale contents do not come back.
    Discard,
    /// They become unallocated.
    Forget,
}

impl State {
    fn zero_entry(&self) -> Entry {
        match (self.layout.extended, self.layout.version) {
            (true, _) => Entry { l2: 0, bitmap: ALL_ZERO },
            (false, 3) => Entry { l2: ZERO, bitmap: 0 },
            _ => Entry::default(),
        }
    }

    fn dropped(&self, old: Entry, how: Drop, backing: bool) -> Entry {
        let layout = self.layout;
        let host = layout.host(old);
        match how {
            Drop::Forget => Entry::default(),
            Drop::Zero if host.is_some() && old.l2 & COPIED != 0 && layout.version >= 3 => {
                match layout.extended {
                    true => Entry { l2: old.l2, bitmap: ALL_ZERO },
                    false => Entry { l2: old.l2 & (OFFSET | COPIED) | ZERO, bitmap: 0 },
                }
            }
            Drop::Zero | Drop::Unmap => self.zero_entry(),
            Drop::Discard => {
                let allocated = old.l2 & COMPRESSED != 0
                    || (0..layout.subclusters()).any(|n| layout.kind(old, n) == Kind::Data);
                if backing || allocated { self.zero_entry() } else { old }
            }
        }
    }

    /// Treats whole clusters from `offset` on. Returns the bytes done, and runs of the data file to discard.
    fn drop_clusters(
        &mut self,
        offset: u64,
        len: u64,
        how: Drop,
        backing: bool,
    ) -> io::Result<(u64, Vec<(u64, u64)>)> {
        self.check_writable()?;
        self.free_pressure()?;
        let layout = self.layout;
        let mut old = Vec::new();
        let count = len.div_ceil(layout.cluster()).min(1 << 20) as usize;
        let empty_is_fine = !backing || how == Drop::Forget;
        if !self.entries(offset, count, &mut old)? && empty_is_fine {
            let coverage = layout.l2_coverage();
            return Ok(((coverage - offset % coverage).min(len), Vec::new()));
        }
        let mut changed =
            old.iter().map(|e| self.dropped(*e, how, backing)).zip(&old).any(|(new, old)| new != *old);
        changed |= old.is_empty();
        let mut freed = Vec::new();
        if changed {
            self.own_l2(offset)?;
            self.entries(offset, count, &mut old)?;
            for (n, entry) in old.iter().enumerate() {
                let new = self.dropped(*entry, how, backing);
                if new == *entry {
                    continue;
                }
                let at = offset + n as u64 * layout.cluster();
                self.set_entry(at, new)?;
                if layout.host(new).is_none() {
                    self.free_entry(*entry);
                    if let (Some(host), true) = (layout.host(*entry), layout.data_file) {
                        freed.push((host, layout.cluster()));
                    }
                }
            }
        }
        Ok(((old.len() as u64 * layout.cluster()).min(len), freed))
    }
}

impl Qcow2 {
    /// Treats all clusters of a range that is locked exclusively.
    pub(super) fn drop_range(&self, start: u64, end: u64, how: Drop) -> io::Result<()> {
        let backing = self.backing.read().is_some();
        let mut at = start;
        while at < end {
            let (done, freed) = self.state.lock().drop_clusters(at, end - at, how, backing)?;
            for (offset, len) in freed {
                if self.discards {
                    self.files.guest().discard(offset, len)?;
                }
            }
            at += done;
        }
        Ok(())
    }

    fn zero_by_writing(&self, mut offset: u64, end: u64) -> io::Result<()> {
        let zeroes = vec![0; (end - offset).min(CHUNK) as usize];
        while offset < end {
            // What reads as zeroes already needs nothing.
            let extent = self.status_of(offset, end - offset)?;
            let n = extent.len.clamp(1, CHUNK);
            let zero = extent.zero && (extent.allocated || self.backing.read().is_none());
            if !zero {
                self.write_range(offset, zeroes.get(..n as usize).unwrap_or(&zeroes))?;
            }
            offset += n;
        }
        Ok(())
    }

    /// The whole clusters of a range, the last of the disk counting as whole.
    fn whole(&self, offset: u64, end: u64) -> (u64, u64) {
        let cluster = self.layout.cluster();
        let last = if end == self.size_now() { end.next_multiple_of(cluster) } else { end - end % cluster };
        (offset.next_multiple_of(cluster), last)
    }

    pub(super) fn zero_range(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let end = offset + len;
        let (from, to) = self.whole(offset, end);
        let no_zero_flag = self.layout.version < 3 && self.backing.read().is_some();
        if from >= to || no_zero_flag {
            return self.zero_by_writing(offset, end);
        }
        self.zero_by_writing(offset, from)?;
        if to < end {
            self.zero_by_writing(to, end)?;
        }
        let _exclusive = self.ranges.lock(from, to, true);
        self.check_range(offset, len)?;
        self.note_write(offset, len)?;
        if let (Some(data), true) = (&self.files.data, self.data_file_raw) {
            // Who reads the data file by itself must find the zeroes too.
            data.write_zeroes(from, to.min(end) - from, unmap && self.discards)?;
        }
        let how = if unmap && self.discards { Drop::Unmap } else { Drop::Zero };
        self.drop_range(from, to, how)
    }

    pub(super) fn discard_range(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.discards {
            return Ok(());
        }
        let end = offset + len;
        let (from, to) = self.whole(offset, end);
        // Without the zero flag, what is in the backing file would come back.
        if from >= to || (self.layout.version < 3 && self.backing.read().is_some()) {
            return Ok(());
        }
        let _exclusive = self.ranges.lock(from, to, true);
        self.check_range(offset, len)?;
        self.note_write(from, to.min(end) - from)?;
        if let (Some(data), true) = (&self.files.data, self.data_file_raw) {
            // It has to go on saying the same as the tables.
            data.write_zeroes(from, to.min(end) - from, true)?;
        }
        self.drop_range(from, to, Drop::Discard)
    }
}
