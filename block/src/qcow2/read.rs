//! Where guest bytes are, and reading them.

use std::io;
use std::sync::Arc;

use super::Qcow2;
use super::compress::decompress;
use super::geometry::{COPIED, Entry, Kind};
use super::state::{State, corrupt_error};
use crate::crypto::{SectorCipher, window};
use crate::node::{Extent, os_error};

/// A range of guest bytes of one kind.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) kind: Kind,
    pub(super) len: u64,
    /// Where it is in the file, or would be: data, zeroes that keep their cluster, subclusters of one that is allocated.
    pub(super) host: Option<u64>,
    /// The entry of its first cluster.
    pub(super) entry: Entry,
    /// It can be written in place.
    pub(super) owned: bool,
}

impl State {
    /// The longest run of one kind at `offset`, at most `len` bytes.
    pub(super) fn map(&mut self, offset: u64, len: u64) -> io::Result<Run> {
        let layout = self.layout;
        let start = layout.align(offset);
        let most = (len + (offset - start)).div_ceil(layout.cluster()).min(1 << 16) as usize;
        let mut entries = std::mem::take(&mut self.scratch);
        let found = self.entries(start, most, &mut entries);
        let run = match found {
            Ok(true) => self.run(offset, len, &entries),
            Ok(false) => {
                let coverage = layout.l2_coverage();
                let len = len.min(coverage - offset % coverage);
                Ok(Run { kind: Kind::Unallocated, len, host: None, entry: Entry::default(), owned: false })
            }
            Err(e) => Err(e),
        };
        self.scratch = entries;
        run
    }

    /// True if the tables say something of `offset` without reading the file.
    pub(super) fn is_cached(&mut self, offset: u64) -> bool {
        let start = self.layout.align(offset);
        let entry = self.l1.get((offset / self.layout.l2_coverage()) as usize).copied().unwrap_or(0);
        let table = entry & super::geometry::OFFSET;
        if table == 0 {
            return true;
        }
        let (slice, _) = self.entry_place(table, start);
        self.l2.find(slice).is_some()
    }

    fn l1_owned(&self, offset: u64) -> bool {
        self.l1.get((offset / self.layout.l2_coverage()) as usize).is_some_and(|e| e & COPIED != 0)
    }

    fn run(&mut self, offset: u64, len: u64, entries: &[Entry]) -> io::Result<Run> {
        let layout = self.layout;
        let (cluster, sub) = (layout.cluster(), layout.subcluster());
        let l1_owned = self.l1_owned(offset);
        let mut found: Option<Run> = None;
        let mut at = offset;
        let end = offset + len;
        'clusters: for entry in entries {
            let entry = *entry;
            let base = layout.host(entry);
            if let Some(host) = base
                && !layout.data_file
                && !host.is_multiple_of(cluster)
            {
                let what = format!("Cluster allocation offset {host:#x} unaligned (guest offset: {at:#x})");
                return Err(self.mark_corrupt(what));
            }
            let owned = l1_owned && entry.l2 & COPIED != 0;
            loop {
                if at >= end {
                    break 'clusters;
                }
                let kind = layout.kind(entry, at % cluster / sub);
                if kind == Kind::Invalid {
                    let what = format!("invalid L2 entry {:#x} at guest offset {at:#x}", entry.l2);
                    return Err(self.mark_corrupt(what));
                }
                let host = match kind {
                    // A subcluster that is not allocated has its place in its cluster, too.
                    Kind::Data | Kind::Zero | Kind::Unallocated => base.map(|b| b + at % cluster),
                    _ => None,
                };
                let step = if kind == Kind::Compressed { cluster } else { sub };
                let next = (at - at % step + step).min(end);
                match &mut found {
                    None => found = Some(Run { kind, len: next - at, host, entry, owned }),
                    Some(run) => {
                        let goes_on = run.kind == kind
                            && kind != Kind::Compressed
                            && run.owned == owned
                            && run.host.map(|h| h + run.len) == host;
                        if !goes_on {
                            break 'clusters;
                        }
                        run.len += next - at;
                    }
                }
                at = next;
                if at.is_multiple_of(cluster) {
                    break;
                }
            }
        }
        found.ok_or_else(|| os_error(libc::EIO))
    }
}

impl Qcow2 {
    /// What the backing file has; zeroes past its end.
    pub(super) fn read_backing(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let backing = self.backing.read().clone();
        let Some(backing) = backing else {
            buf.fill(0);
            return Ok(());
        };
        // What is past our own end must stay out of clusters that are copied up.
        let end = backing.size().min(self.size_now());
        let there = end.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (from, rest) = buf.split_at_mut(there);
        rest.fill(0);
        if from.is_empty() { Ok(()) } else { backing.read_at(offset, from) }
    }

    fn read_compressed(&self, entry: u64, within: u64, buf: &mut [u8]) -> io::Result<()> {
        let (offset, len) = self.layout.compressed_range(entry);
        if offset.checked_add(len).is_none() {
            return Err(corrupt_error("a compressed cluster lies outside of the file"));
        }
        let mut cached = self.decompressed.lock();
        if cached.0 != entry {
            let mut data = vec![0; len as usize];
            self.files.file.read_at(offset, &mut data)?;
            // Nothing is in the cache while it is filled.
            cached.0 = 0;
            cached.1.resize(self.layout.cluster() as usize, 0);
            decompress(self.compression, &data, &mut cached.1)?;
            cached.0 = entry;
        }
        let from = cached.1.get(within as usize..within as usize + buf.len());
        buf.copy_from_slice(from.ok_or_else(|| os_error(libc::EIO))?);
        Ok(())
    }

    /// Reads data at `host` that is encrypted by its sectors of the disk.
    fn read_legacy(&self, cipher: &SectorCipher, offset: u64, host: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        for part in buf.chunks_mut(self.layout.cluster() as usize) {
            let (start, len) = window(offset + done, part.len());
            let skip = offset + done - start;
            let mut whole = vec![0; len];
            self.files.guest().read_at(host + done - skip, &mut whole)?;
            cipher.decrypt(start / 512, &mut whole);
            part.copy_from_slice(whole.get(skip as usize..skip as usize + part.len()).unwrap_or_default());
            done += part.len() as u64;
        }
        Ok(())
    }

    /// Reads without regard to what others do with the range.
    pub(super) fn read_unlocked(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let run = self.state.lock().map(offset, buf.len() as u64)?;
            let (now, rest) = buf.split_at_mut(run.len as usize);
            match (run.kind, run.host) {
                (Kind::Unallocated, _) => self.read_backing(offset, now)?,
                (Kind::Data, Some(host)) => match &self.files.legacy {
                    Some(cipher) => self.read_legacy(cipher, offset, host, now)?,
                    None => self.files.guest().read_at(host, now)?,
                },
                (Kind::Compressed, _) => {
                    self.read_compressed(run.entry.l2, offset % self.layout.cluster(), now)?;
                }
                _ => now.fill(0),
            }
            offset += run.len;
            buf = rest;
        }
        Ok(())
    }

    pub(super) fn status_of(&self, offset: u64, len: u64) -> io::Result<Extent> {
        let len = len.min(self.size_now().saturating_sub(offset));
        let empty =
            Extent { len, allocated: false, data: false, zero: true, compressed: false, offset: None };
        if len == 0 {
            return Ok(empty);
        }
        let mut at = offset;
        let mut total: Option<(Kind, Option<u64>, u64)> = None;
        while at < offset + len {
            let run = self.state.lock().map(at, offset + len - at)?;
            match &mut total {
                None => total = Some((run.kind, run.host, run.len)),
                Some((kind, host, sum)) => {
                    if *kind != run.kind || host.map(|h| h + *sum) != run.host {
                        break;
                    }
                    *sum += run.len;
                }
            }
            at += run.len;
        }
        let Some((kind, host, mut len)) = total else { return Ok(empty) };
        let mut zero = kind == Kind::Zero || (kind == Kind::Unallocated && self.backing.read().is_none());
        if let (Kind::Data, Some(host), true) = (kind, host, self.preallocated()) {
            // Clusters that were allocated ahead of their use: the file knows which have been.
            let below = self.files.guest().status(host, len)?;
            if below.len != 0 {
                len = len.min(below.len);
                zero = below.zero;
            }
        }
        Ok(Extent {
            len,
            allocated: kind != Kind::Unallocated,
            data: matches!(kind, Kind::Data | Kind::Compressed),
            zero,
            compressed: kind == Kind::Compressed,
            offset: host,
        })
    }

    /// True if the image has many more clusters than its file takes on the host: then they were preallocated.
    fn preallocated(&self) -> bool {
        *self.preallocated.get_or_init(|| {
            let cluster = self.layout.cluster();
            let real = self.files.file.disk_usage() / cluster;
            let threshold = (real * 10 / 9).max(real + 2);
            let clusters = self.files.file.size().div_ceil(cluster);
            if self.files.data.is_some() || clusters < threshold {
                return false;
            }
            let mut state = self.state.lock();
            let used = (0..clusters).filter(|c| state.refcount(*c).is_ok_and(|n| n != 0));
            used.take(threshold as usize).count() as u64 >= threshold
        })
    }

    /// The node below, if there is one.
    pub(super) fn backing_node(&self) -> Option<Arc<dyn crate::BlockNode>> {
        self.backing.read().clone()
    }
}
