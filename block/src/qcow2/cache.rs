//! Slices of tables in memory, a bounded number of them.

use std::collections::HashMap;
use std::io;

use crate::BlockNode;

/// Bytes of a slice, unless clusters are smaller.
pub(super) const SLICE: u64 = 4096;

#[derive(Debug)]
struct Slot {
    offset: u64,
    data: Box<[u8]>,
    dirty: bool,
    /// Used since the clock's hand last passed.
    used: bool,
}

/// A write-back cache of one kind of table.
#[derive(Debug)]
pub(super) struct TableCache {
    slice: u64,
    capacity: usize,
    slots: Vec<Slot>,
    index: HashMap<u64, usize>,
    hand: usize,
    dirty: usize,
}

/// What has to happen before a slice can be loaded.
pub(super) enum Room {
    /// Nothing: it goes to this slot.
    Slot(usize),
    /// Dirty slices have to be written first.
    WriteBack,
}

impl TableCache {
    pub(super) fn new(cluster_size: u64, bytes: u64) -> Self {
        let slice = SLICE.min(cluster_size);
        let capacity = (bytes / slice).max(16) as usize;
        Self { slice, capacity, slots: Vec::new(), index: HashMap::new(), hand: 0, dirty: 0 }
    }

    pub(super) fn slice(&self) -> u64 {
        self.slice
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.dirty != 0
    }

    pub(super) fn find(&mut self, offset: u64) -> Option<usize> {
        let at = *self.index.get(&offset)?;
        if let Some(slot) = self.slots.get_mut(at) {
            slot.used = true;
        }
        Some(at)
    }

    /// A slot for a new slice: a free one, or one that is clean and was not used lately.
    pub(super) fn room(&mut self) -> Room {
        if self.slots.len() < self.capacity {
            return Room::Slot(self.slots.len());
        }
        for _ in 0..2 * self.slots.len() {
            self.hand = (self.hand + 1) % self.slots.len();
            let Some(slot) = self.slots.get_mut(self.hand) else { break };
            if std::mem::take(&mut slot.used) {
                continue;
            }
            if slot.dirty {
                return Room::WriteBack;
            }
            return Room::Slot(self.hand);
        }
        Room::WriteBack
    }

    pub(super) fn load(&mut self, at: usize, offset: u64, file: &dyn BlockNode) -> io::Result<()> {
        if let Some(slot) = self.slots.get_mut(at) {
            self.index.remove(&slot.offset);
            // Until it is read the slot holds nothing.
            slot.offset = u64::MAX;
            file.read_at(offset, &mut slot.data)?;
            slot.offset = offset;
            slot.used = true;
        } else {
            let mut data = vec![0; self.slice as usize].into_boxed_slice();
            file.read_at(offset, &mut data)?;
            self.slots.push(Slot { offset, data, dirty: false, used: true });
        }
        self.index.insert(offset, at);
        Ok(())
    }

    pub(super) fn data(&self, at: usize) -> &[u8] {
        self.slots.get(at).map_or(&[], |s| &s.data)
    }

    pub(super) fn change(&mut self, at: usize) -> &mut [u8] {
        match self.slots.get_mut(at) {
            Some(slot) => {
                if !std::mem::replace(&mut slot.dirty, true) {
                    self.dirty += 1;
                }
                slot.used = true;
                &mut slot.data
            }
            None => &mut [],
        }
    }

    /// Writes all dirty slices, neighbours in one call.
    pub(super) fn write_back(&mut self, file: &dyn BlockNode) -> io::Result<()> {
        if self.dirty == 0 {
            return Ok(());
        }
        let mut dirty: Vec<usize> =
            (0..self.slots.len()).filter(|i| self.slots.get(*i).is_some_and(|s| s.dirty)).collect();
        dirty.sort_by_key(|i| self.slots.get(*i).map_or(0, |s| s.offset));
        let mut buffer: Vec<u8> = Vec::new();
        let mut start = 0;
        let mut members: Vec<usize> = Vec::new();
        for at in dirty.into_iter().map(Some).chain([None]) {
            let offset = at.and_then(|i| self.slots.get(i)).map(|s| s.offset);
            if !members.is_empty() && (offset != Some(start + buffer.len() as u64) || buffer.len() >= 1 << 20)
            {
                file.write_at(start, &buffer)?;
                for i in members.drain(..) {
                    if let Some(slot) = self.slots.get_mut(i) {
                        slot.dirty = false;
                        self.dirty -= 1;
                    }
                }
                buffer.clear();
            }
            if let (Some(i), Some(offset)) = (at, offset) {
                if members.is_empty() {
                    start = offset;
                }
                buffer.extend_from_slice(self.data(i));
                members.push(i);
            }
        }
        Ok(())
    }

    /// Forgets slices of bytes `start` to `end`, changes included.
    pub(super) fn forget(&mut self, start: u64, end: u64) {
        for at in (start..end).step_by(self.slice as usize) {
            if let Some(i) = self.index.remove(&at)
                && let Some(slot) = self.slots.get_mut(i)
            {
                if std::mem::take(&mut slot.dirty) {
                    self.dirty -= 1;
                }
                slot.offset = u64::MAX;
                slot.used = false;
            }
        }
    }

    /// Forgets everything, changes included.
    pub(super) fn reset(&mut self) {
        self.slots.clear();
        self.index.clear();
        self.hand = 0;
        self.dirty = 0;
    }

    /// Forgets everything if all of it is clean.
    pub(super) fn clear(&mut self) {
        if self.dirty == 0 {
            self.reset();
        }
    }
}
