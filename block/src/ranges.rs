//! Which parts of an image are in use by requests under way.
//!
//! A cluster must not be freed, and so handed to somebody else, while a write to it is under way; two writes must not
//! allocate the same cluster. Requests hold their range shared while they only move data, and exclusively while they change
//! the mapping.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

#[derive(Debug)]
struct Held {
    id: u64,
    start: u64,
    end: u64,
    exclusive: bool,
}

#[derive(Debug, Default)]
struct Table {
    held: Vec<Held>,
    next: u64,
}

/// The ranges in use.
#[derive(Debug, Default)]
pub struct Ranges {
    table: Mutex<Table>,
    changed: Condvar,
}

/// A range in use; dropping it ends the use.
#[derive(Debug)]
pub struct RangeGuard {
    ranges: Arc<Ranges>,
    id: u64,
}

impl Ranges {
    fn conflict(table: &Table, start: u64, end: u64, exclusive: bool) -> bool {
        table.held.iter().any(|h| h.start < end && start < h.end && (exclusive || h.exclusive))
    }

    fn enter(self: &Arc<Self>, table: &mut Table, start: u64, end: u64, exclusive: bool) -> RangeGuard {
        let id = table.next;
        table.next += 1;
        table.held.push(Held { id, start, end, exclusive });
        RangeGuard { ranges: Arc::clone(self), id }
    }

    /// Waits until bytes `start` to `end` can be used so.
    pub fn lock(self: &Arc<Self>, start: u64, end: u64, exclusive: bool) -> RangeGuard {
        let mut table = self.table.lock();
        while Self::conflict(&table, start, end, exclusive) {
            self.changed.wait(&mut table);
        }
        self.enter(&mut table, start, end, exclusive)
    }

    /// Uses bytes `start` to `end` if that is possible now.
    pub fn try_lock(self: &Arc<Self>, start: u64, end: u64, exclusive: bool) -> Option<RangeGuard> {
        let mut table = self.table.lock();
        if Self::conflict(&table, start, end, exclusive) {
            return None;
        }
        Some(self.enter(&mut table, start, end, exclusive))
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut table = self.ranges.table.lock();
        if let Some(at) = table.held.iter().position(|h| h.id == self.id) {
            table.held.swap_remove(at);
        }
        drop(table);
        self.ranges.changed.notify_all();
    }
}
