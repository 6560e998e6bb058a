//! The log ([MS-VHDX] 2.3): changes of metadata are in it, durably, before they are made in place, so a crash leaves either
//! the old metadata or a log that brings the new.
//!
//! Entries are written one by one: each names itself as the oldest that still counts, and what the one before it said is
//! durable in place before it is written.

use std::collections::HashMap;
use std::io;

use super::header::{guid_at, seal, whole};
use crate::mapped::{bad, le32, le64, put, read_part};
use crate::node::Preallocation;
use crate::{BlockError, BlockNode};

/// Unit of the log and of what it describes.
pub(super) const PAGE: u64 = 4096;
/// Most pages in an entry: so many descriptors are in its first sector.
pub(super) const MAX_PAGES: usize = 126;
/// Longest log that is looked through.
const MAX_LOG: u64 = 64 << 20;
/// Most steps from entry to entry until a log is called hostile.
const MAX_STEPS: usize = 1 << 22;
/// Largest file that a log may ask for.
const MAX_FILE: u64 = 1 << 48;

/// Where entries go.
#[derive(Debug)]
pub(super) struct Log {
    /// Place and length in the file.
    place: (u64, u64),
    guid: u128,
    /// Number and place in the log of the next entry.
    sequence: u64,
    next: u64,
}

impl Log {
    pub(super) fn new(place: (u64, u64), guid: u128) -> Self {
        Self { place, guid, sequence: 1, next: 0 }
    }

    pub(super) fn guid(&self) -> u128 {
        self.guid
    }

    /// Writes one entry with pages of the file, at most [`MAX_PAGES`]. It is not durable yet.
    pub(super) fn append(&mut self, file: &dyn BlockNode, pages: &[(u64, Vec<u8>)]) -> io::Result<()> {
        let len = PAGE as usize * (1 + pages.len());
        if len as u64 > self.place.1 / 2 {
            return Err(io::Error::other("the VHDX log is too small"));
        }
        let mut e = vec![0; len];
        put(&mut e, 0, b"loge");
        put(&mut e, 8, &(len as u32).to_le_bytes());
        put(&mut e, 12, &(self.next as u32).to_le_bytes());
        put(&mut e, 16, &self.sequence.to_le_bytes());
        put(&mut e, 24, &(pages.len() as u32).to_le_bytes());
        put(&mut e, 32, &self.guid.to_le_bytes());
        let size = file.size();
        put(&mut e, 48, &(size >> 20 << 20).to_le_bytes());
        put(&mut e, 56, &size.next_multiple_of(1 << 20).to_le_bytes());
        for (n, (at, page)) in pages.iter().enumerate() {
            let d = 64 + n * 32;
            put(&mut e, d, b"desc");
            put(&mut e, d + 4, page.get(4092..4096).unwrap_or(&[0; 4]));
            put(&mut e, d + 8, page.get(..8).unwrap_or(&[0; 8]));
            put(&mut e, d + 16, &at.to_le_bytes());
            put(&mut e, d + 24, &self.sequence.to_le_bytes());
            let s = (n + 1) * PAGE as usize;
            put(&mut e, s, b"data");
            put(&mut e, s + 4, &((self.sequence >> 32) as u32).to_le_bytes());
            put(&mut e, s + 8, page.get(8..4092).unwrap_or_default());
            put(&mut e, s + 4092, &(self.sequence as u32).to_le_bytes());
        }
        seal(&mut e);
        let (start, length) = self.place;
        let first = (length - self.next).min(len as u64);
        let (head, rest) = e.split_at(first as usize);
        file.write_at(start + self.next, head)?;
        if !rest.is_empty() {
            file.write_at(start, rest)?;
        }
        self.next = (self.next + len as u64) % length;
        self.sequence += 1;
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    sequence: u64,
    len: u64,
    tail: u64,
}

/// `len` bytes of the log from `at` on, which goes round.
fn wrapped(log: &[u8], at: u64, len: u64) -> Vec<u8> {
    log.iter().cycle().skip(at as usize).take(len as usize).copied().collect()
}

/// The whole entries in the log, by their places.
fn entries(log: &[u8], guid: u128) -> Result<HashMap<u64, Entry>, BlockError> {
    let length = log.len() as u64;
    let mut out = HashMap::new();
    // Entries that overlap each other are nobody's: so much and no more is looked at.
    let mut budget = 4 * length;
    for at in (0..length).step_by(PAGE as usize) {
        let h = log.get(at as usize..).unwrap_or_default();
        if !h.starts_with(b"loge") || guid_at(h, 32) != guid {
            continue;
        }
        let (len, tail) = (u64::from(le32(h, 8)), u64::from(le32(h, 12)));
        let descriptors = 64 + u64::from(le32(h, 24)) * 32;
        let sane = len != 0 && len.is_multiple_of(PAGE) && len <= length && descriptors <= len;
        if !sane || !tail.is_multiple_of(PAGE) || tail >= length {
            continue;
        }
        let Some(left) = budget.checked_sub(len) else {
            return bad("VHDX log with entries that overlap each other");
        };
        budget = left;
        if whole(&wrapped(log, at, len)) {
            out.insert(at, Entry { sequence: le64(h, 16), len, tail });
        }
    }
    Ok(out)
}

/// Places of the entries that count, the oldest first.
fn active(entries: &HashMap<u64, Entry>, length: u64) -> Result<Vec<u64>, BlockError> {
    let mut heads: Vec<(u64, Entry)> = entries.iter().map(|(at, e)| (*at, *e)).collect();
    heads.sort_by_key(|(_, e)| std::cmp::Reverse(e.sequence));
    let mut steps = 0;
    for (head, newest) in heads {
        let mut at = newest.tail;
        let mut out = Vec::new();
        let mut before = None;
        while let Some(entry) = entries.get(&at).filter(|_| out.len() < entries.len()) {
            if before.is_some_and(|b: u64| b.checked_add(1) != Some(entry.sequence)) {
                break;
            }
            out.push(at);
            if at == head {
                return Ok(out);
            }
            steps += 1;
            if steps > MAX_STEPS {
                return bad("VHDX log with too many entries");
            }
            before = Some(entry.sequence);
            at = (at + entry.len) % length;
        }
    }
    Ok(Vec::new())
}

/// What is to be done again.
#[derive(Debug)]
pub(super) struct Replay {
    entries: Vec<Vec<u8>>,
}

impl Replay {
    /// Looks through the log at `place` for entries of `guid`; `None` if none count.
    pub(super) fn find(
        file: &dyn BlockNode,
        place: (u64, u64),
        guid: u128,
    ) -> Result<Option<Self>, BlockError> {
        let (at, length) = place;
        if length == 0 || !length.is_multiple_of(1 << 20) || at < 1 << 20 || length > MAX_LOG {
            return bad(format!("VHDX log of {length} bytes at {at}"));
        }
        let log = read_part(file, at, length, "Could not read the VHDX log")?;
        let found = entries(&log, guid)?;
        let active = active(&found, length)?;
        let entry = |at: &u64| found.get(at).map(|e| wrapped(&log, *at, e.len));
        let entries: Vec<Vec<u8>> = active.iter().filter_map(entry).collect();
        Ok((!entries.is_empty()).then_some(Self { entries }))
    }

    /// Does it.
    pub(super) fn run(&self, file: &dyn BlockNode) -> Result<(), BlockError> {
        let path = || file.path().unwrap_or_default();
        let host = |source| BlockError::Host { path: path(), what: "Could not replay the VHDX log", source };
        let Some(newest) = self.entries.last() else { return Ok(()) };
        let (flushed, last) = (le64(newest, 48), le64(newest, 56));
        if file.size() < flushed {
            return bad("VHDX image is shorter than its log says: it was truncated");
        }
        for entry in &self.entries {
            apply(file, entry).map_err(host)?;
        }
        if last > MAX_FILE {
            return bad(format!("VHDX log that makes the file {last} bytes long"));
        }
        if last > file.size() {
            file.truncate(last, Preallocation::Off).map_err(host)?;
        }
        file.flush().map_err(host)
    }
}

fn corrupt(text: &str) -> io::Error {
    io::Error::other(format!("the VHDX log is corrupt: {text}"))
}

fn apply(file: &dyn BlockNode, entry: &[u8]) -> io::Result<()> {
    let sequence = le64(entry, 16);
    let count = le32(entry, 24) as usize;
    let mut sector = (64 + count * 32).next_multiple_of(PAGE as usize);
    for n in 0..count {
        let d = entry.get(64 + n * 32..96 + n * 32).unwrap_or_default();
        let at = le64(d, 16);
        if le64(d, 24) != sequence {
            return Err(corrupt("a descriptor of another entry"));
        }
        if at > MAX_FILE || !at.is_multiple_of(PAGE) {
            return Err(corrupt("a descriptor of an impossible place"));
        }
        if d.starts_with(b"zero") {
            let len = le64(d, 8);
            if !len.is_multiple_of(PAGE) || len > MAX_FILE {
                return Err(corrupt("zeroes of an impossible length"));
            }
            // What lies beyond the end is zero as it is.
            let there = file.size().saturating_sub(at).min(len);
            if there != 0 {
                file.write_zeroes(at, there, false)?;
            }
        } else if d.starts_with(b"desc") {
            let s = entry.get(sector..sector + PAGE as usize).unwrap_or_default();
            let own = u64::from(le32(s, 4)) << 32 | u64::from(le32(s, 4092));
            if !s.starts_with(b"data") || own != sequence {
                return Err(corrupt("a sector of another entry"));
            }
            let mut page = s.to_vec();
            put(&mut page, 0, d.get(8..16).unwrap_or_default());
            put(&mut page, 4092, d.get(4..8).unwrap_or_default());
            file.write_at(at, &page)?;
            sector += PAGE as usize;
        } else {
            return Err(corrupt("a descriptor of an unknown kind"));
        }
    }
    Ok(())
}
