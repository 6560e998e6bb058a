//! Writing: in place where a cluster is ours alone, to new clusters otherwise.

use std::io;

use super::Qcow2;
use super::compress::compress;
use super::geometry::{COMPRESSED, COPIED, Entry, Kind, OFFSET};
use super::state::State;
use crate::node::{is_zero, os_error};

/// Copied-up zeroes of up to this many bytes are written along with the data.
const JOIN: u64 = 16 << 10;

/// What to do for the start of a write.
enum Step {
    /// Write this many bytes here.
    InPlace(u64, u64),
    /// Fill this many new clusters, whose entries were these.
    New { host: u64, old: Vec<Entry> },
    /// Allocate subclusters of a cluster that is ours.
    Partly(u64, Entry),
}

impl State {
    fn needs_new(&self, entry: Entry) -> bool {
        entry.l2 & COMPRESSED != 0 || entry.l2 & COPIED == 0 || self.layout.host(entry).is_none()
    }

    /// Plans a write of `len` bytes at `offset`, whose clusters the caller has for itself.
    fn plan_write(&mut self, offset: u64, len: u64) -> io::Result<Step> {
        self.check_writable()?;
        self.free_pressure()?;
        let layout = self.layout;
        self.own_l2(offset)?;
        let run = self.map(offset, len)?;
        if let (Kind::Data, true, Some(host)) = (run.kind, run.owned, run.host) {
            return Ok(Step::InPlace(host, run.len));
        }
        let start = layout.align(offset);
        let wanted = (offset + len - start).div_ceil(layout.cluster()) as usize;
        let mut old = Vec::new();
        self.entries(start, wanted, &mut old)?;
        let first = old.first().copied().ok_or_else(|| os_error(libc::EIO))?;
        if !self.needs_new(first) {
            let host = layout.host(first).unwrap_or(0);
            return Ok(Step::Partly(host, first));
        }
        let count = old.iter().take_while(|e| self.needs_new(**e)).count();
        old.truncate(count);
        if layout.data_file {
            return Ok(Step::New { host: start, old });
        }
        let (host, got) = self.allocate(count as u64)?;
        old.truncate(got as usize);
        Ok(Step::New { host, old })
    }

    /// Takes back clusters whose data could not be written.
    fn give_up(&mut self, host: u64, count: u64) {
        if self.layout.data_file {
            return;
        }
        for n in 0..count {
            if let Err(error) = self.free_now(host + (n << self.layout.cluster_bits)) {
                tracing::warn!(%error, "a cluster leaks");
            }
        }
    }
}

/// The bits of a subcluster bitmap from one subcluster to before another.
fn bits(from: u64, to: u64) -> u64 {
    ((1u64 << to) - 1) & !((1u64 << from) - 1)
}

impl Qcow2 {
    /// Writes that all go to clusters of ours: their places, or `None`.
    fn in_place(&self, offset: u64, len: u64) -> io::Result<Option<Vec<(u64, u64)>>> {
        let mut state = self.state.lock();
        state.check_writable()?;
        let mut places = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let run = state.map(at, offset + len - at)?;
            let (Kind::Data, true, Some(host)) = (run.kind, run.owned, run.host) else {
                return Ok(None);
            };
            places.push((host, run.len));
            at += run.len;
        }
        Ok(Some(places))
    }

    pub(super) fn write_range(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let len = buf.len() as u64;
        let (start, end) =
            (self.layout.align(offset), (offset + len).next_multiple_of(self.layout.cluster()));
        {
            let _shared = self.ranges.lock(start, end, false);
            // While the range was waited for, the disk may have become smaller.
            self.check_range(offset, len)?;
            self.note_write(offset, len)?;
            if let Some(places) = self.in_place(offset, len)? {
                let mut rest = buf;
                for (host, n) in places {
                    let (now, later) = rest.split_at(n as usize);
                    self.files.guest().write_at(host, now)?;
                    rest = later;
                }
                return Ok(());
            }
        }
        let _exclusive = self.ranges.lock(start, end, true);
        self.check_range(offset, len)?;
        self.write_locked(offset, buf)
    }

    /// Writes to a range that is locked exclusively.
    pub(super) fn write_locked(&self, mut offset: u64, mut buf: &[u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let step = self.state.lock().plan_write(offset, buf.len() as u64)?;
            let done = match step {
                Step::InPlace(host, n) => {
                    self.files.guest().write_at(host, buf.get(..n as usize).unwrap_or(buf))?;
                    n
                }
                Step::New { host, old } => {
                    let room = old.len() as u64 * self.layout.cluster() - offset % self.layout.cluster();
                    let now = buf.get(..room.min(buf.len() as u64) as usize).unwrap_or(buf);
                    self.write_new(offset, now, host, &old)?;
                    now.len() as u64
                }
                Step::Partly(host, old) => {
                    let room = self.layout.cluster() - offset % self.layout.cluster();
                    let now = buf.get(..room.min(buf.len() as u64) as usize).unwrap_or(buf);
                    self.write_partly(offset, now, host, old)?;
                    now.len() as u64
                }
            };
            offset += done;
            buf = buf.get(done as usize..).unwrap_or_default();
        }
        Ok(())
    }

    /// Guest bytes that have to be written besides `offset..end`: from where, to where.
    fn cow_bounds(&self, offset: u64, end: u64, old: &[Entry]) -> (u64, u64) {
        let layout = self.layout;
        // Clusters that had contents are copied whole; others only as far as their subclusters reach.
        let unit = |entry: Option<&Entry>| match entry {
            Some(e) if e.l2 & (COMPRESSED | OFFSET) == 0 => layout.subcluster(),
            _ => layout.cluster(),
        };
        let (first, last) = (unit(old.first()), unit(old.last()));
        (offset - offset % first, end.next_multiple_of(last))
    }

    fn write_new(&self, offset: u64, data: &[u8], host: u64, old: &[Entry]) -> io::Result<()> {
        let layout = self.layout;
        let start = layout.align(offset);
        let end = offset + data.len() as u64;
        let (from, to) = self.cow_bounds(offset, end, old);
        if let Err(error) = self.fill(host + (from - start), (from, to), offset, data) {
            self.state.lock().give_up(host, old.len() as u64);
            return Err(error);
        }
        let mut state = self.state.lock();
        for (n, before) in old.iter().enumerate() {
            let cluster_start = start + n as u64 * layout.cluster();
            let bitmap = if layout.extended {
                let sub = layout.subcluster();
                let low = from.saturating_sub(cluster_start) / sub;
                let high = (to - cluster_start).min(layout.cluster()) / sub;
                let written = bits(low, high);
                // The others stay what they were: unallocated, or zero.
                before.bitmap & (u64::from(u32::MAX) << 32) & !(written << 32) | written
            } else {
                0
            };
            let l2 = (host + n as u64 * layout.cluster()) | COPIED;
            state.set_entry(cluster_start, Entry { l2, bitmap })?;
            state.free_entry(*before);
        }
        Ok(())
    }

    /// Allocates in a cluster of ours what a write covers.
    fn write_partly(&self, offset: u64, data: &[u8], host: u64, old: Entry) -> io::Result<()> {
        let layout = self.layout;
        let (start, sub) = (layout.align(offset), layout.subcluster());
        let end = offset + data.len() as u64;
        let (from, to) = (offset - offset % sub, end.next_multiple_of(sub));
        self.fill(host + (from - start), (from, to), offset, data)?;
        let entry = if layout.extended {
            let written = bits((from - start) / sub, (to - start) / sub);
            Entry { l2: old.l2, bitmap: old.bitmap & !(written << 32) | written }
        } else {
            Entry { l2: host | COPIED, bitmap: 0 }
        };
        self.state.lock().set_entry(start, entry)
    }

    /// Writes guest bytes `bounds` to `host`: `data` at `offset`, and what was there before around it.
    fn fill(&self, host: u64, bounds: (u64, u64), offset: u64, data: &[u8]) -> io::Result<()> {
        let (from, to) = bounds;
        let end = offset + data.len() as u64;
        let file = self.files.guest();
        if from == offset && to == end {
            return file.write_at(host, data);
        }
        let mut head = vec![0; (offset - from) as usize];
        let mut tail = vec![0; (to - end) as usize];
        self.read_unlocked(from, &mut head)?;
        self.read_unlocked(end, &mut tail)?;
        let around = (to - from) - data.len() as u64;
        if around > JOIN && is_zero(&head) && is_zero(&tail) && file.grows_by_zeroes() {
            if host < file.size() {
                file.write_zeroes(host, to - from, false)?;
            } else {
                // Past the end there is nothing but zeroes; only the size has to cover it.
                file.write_zeroes(host + (end - from), to - end, true)?;
            }
            return file.write_at(host + (offset - from), data);
        }
        head.extend_from_slice(data);
        head.extend_from_slice(&tail);
        file.write_at(host, &head)
    }

    /// Writes a cluster compressed, or as it is if that is no gain.
    ///
    /// # Errors
    /// As a write; `InvalidInput` if `offset` is not at the start of a cluster.
    pub fn write_compressed(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let layout = self.layout;
        if layout.data_file {
            let text = "Compressed clusters are not possible with an external data file";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        let cluster = layout.cluster();
        let at_end = offset + data.len() as u64 == self.size_now();
        if !offset.is_multiple_of(cluster) || (data.len() as u64 != cluster && !at_end) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "compressed writes are of whole clusters",
            ));
        }
        let mut whole = data.to_vec();
        whole.resize(cluster as usize, 0);
        let packed = compress(self.compression, &whole)?;
        self.store_compressed(offset, data, packed)
    }

    /// Compresses a cluster as the image would; `None` if that is no gain.
    ///
    /// # Errors
    /// Those of the compressor.
    pub fn compress(&self, cluster: &[u8]) -> io::Result<Option<Vec<u8>>> {
        compress(self.compression, cluster)
    }

    /// Writes a cluster that [`Qcow2::compress`] has packed.
    ///
    /// # Errors
    /// As a write.
    pub fn store_compressed(&self, offset: u64, data: &[u8], packed: Option<Vec<u8>>) -> io::Result<()> {
        let Some(packed) = packed else { return self.write_range(offset, data) };
        if self.files.crypt.is_some() {
            let text = "Compression and encryption not supported at the same time";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        let layout = self.layout;
        let _exclusive = self.ranges.lock(offset, offset + layout.cluster(), true);
        self.note_write(offset, data.len() as u64)?;
        let mut state = self.state.lock();
        state.check_writable()?;
        state.free_pressure()?;
        state.own_l2(offset)?;
        let at = state.allocate_bytes(packed.len() as u64)?;
        let Some(l2) = layout.compressed_entry(at, packed.len() as u64) else {
            return Err(os_error(libc::EFBIG));
        };
        drop(state);
        self.files.file.write_at(at, &packed)?;
        {
            // Its place may be that of another one before, which was as long and was read last.
            let mut cached = self.decompressed.lock();
            if cached.0 == l2 {
                cached.0 = 0;
            }
        }
        let mut state = self.state.lock();
        let mut old = Vec::new();
        state.entries(offset, 1, &mut old)?;
        state.set_entry(offset, Entry { l2, bitmap: 0 })?;
        state.free_entry(old.first().copied().unwrap_or_default());
        Ok(())
    }
}
