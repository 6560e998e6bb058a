//! Internal snapshots (qcow2 specification, "Snapshots").

use std::io;
use std::sync::Arc;

use super::Qcow2;
use super::geometry::{COMPRESSED, COPIED, Entry, L1_RESERVED, OFFSET};
use super::header::{Header, MAX_L1_BYTES, be16, be32, be64};
use super::shadow::Shadow;
use super::state::State;
use crate::{BlockError, BlockNode};

/// Bytes of an entry before its extra data.
const ENTRY: u64 = 40;
/// Extra data that this program writes: size of the VM state, size of the disk, instruction count.
const EXTRA: u32 = 24;
/// Most bytes of extra data.
const MAX_EXTRA: u64 = 1024;
/// Most bytes of the table.
const MAX_TABLE: u64 = 64 << 20;

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its unique id, a number as a rule.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was made: seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// How long the VM had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// Size of the disk in bytes.
    pub disk_size: u64,
    /// Instructions that the VM had executed; all ones if they were not counted.
    pub icount: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    /// Extra data that is not known.
    extra: Vec<u8>,
}

fn bad(text: &str) -> BlockError {
    BlockError::Format(text.to_owned())
}

/// Reads the snapshot table; also how many bytes it takes.
pub(super) fn read(file: &dyn BlockNode, header: &Header) -> Result<(Vec<Snapshot>, u64), BlockError> {
    let mut out = Vec::new();
    if header.snapshots == 0 {
        return Ok((out, 0));
    }
    let fail = |source| BlockError::Host {
        path: file.path().unwrap_or_default(),
        what: "Could not read snapshots",
        source,
    };
    let most = file.size().saturating_sub(header.snapshots_offset).min(MAX_TABLE);
    let mut table = vec![0; most as usize];
    file.read_at(header.snapshots_offset, &mut table).map_err(fail)?;
    let mut rest = table.as_slice();
    for _ in 0..header.snapshots {
        let (snapshot, used) = parse(rest, header.size)?;
        if u64::from(snapshot.l1_size) * 8 > MAX_L1_BYTES
            || !snapshot.l1_offset.is_multiple_of(header.cluster_size())
            || snapshot.l1_offset > OFFSET
        {
            return Err(bad("Snapshot L1 table invalid"));
        }
        out.push(snapshot);
        rest = rest.get(used..).unwrap_or_default();
    }
    Ok((out, (table.len() - rest.len()) as u64))
}

fn parse(b: &[u8], disk_size: u64) -> Result<(Snapshot, usize), BlockError> {
    if (b.len() as u64) < ENTRY {
        return Err(bad("Snapshot table is cut off"));
    }
    let (id_len, name_len) = (usize::from(be16(b, 12)), usize::from(be16(b, 14)));
    let extra_len = u64::from(be32(b, 36));
    if extra_len > MAX_EXTRA {
        return Err(bad("Too much extra metadata in snapshot table entry"));
    }
    let extra_len = extra_len as usize;
    let at = ENTRY as usize;
    let extra = b.get(at..at + extra_len).ok_or_else(|| bad("Snapshot table is cut off"))?;
    let text = |from: usize, len: usize| {
        let bytes = b.get(from..from + len).ok_or_else(|| bad("Snapshot table is cut off"))?;
        Ok::<_, BlockError>(String::from_utf8_lossy(bytes).into_owned())
    };
    let snapshot = Snapshot {
        id: text(at + extra_len, id_len)?,
        name: text(at + extra_len + id_len, name_len)?,
        date_sec: be32(b, 16),
        date_nsec: be32(b, 20),
        vm_clock_nsec: be64(b, 24),
        vm_state_size: if extra_len >= 8 { be64(extra, 0) } else { u64::from(be32(b, 32)) },
        disk_size: if extra_len >= 16 { be64(extra, 8) } else { disk_size },
        icount: if extra_len >= 24 { be64(extra, 16) } else { u64::MAX },
        l1_offset: be64(b, 0),
        l1_size: be32(b, 8),
        extra: extra.get(EXTRA as usize..).unwrap_or_default().to_vec(),
    };
    Ok((snapshot, (at + extra_len + id_len + name_len).next_multiple_of(8)))
}

impl Snapshot {
    fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&self.l1_offset.to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&(self.id.len() as u16).to_be_bytes());
        out.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&self.date_sec.to_be_bytes());
        out.extend_from_slice(&self.date_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_clock_nsec.to_be_bytes());
        let small = u32::try_from(self.vm_state_size).unwrap_or(0);
        out.extend_from_slice(&small.to_be_bytes());
        out.extend_from_slice(&(EXTRA + self.extra.len() as u32).to_be_bytes());
        out.extend_from_slice(&self.vm_state_size.to_be_bytes());
        out.extend_from_slice(&self.disk_size.to_be_bytes());
        out.extend_from_slice(&self.icount.to_be_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(self.id.as_bytes());
        out.extend_from_slice(self.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }
}

impl State {
    /// The entries of an L2 table on the disk. The cache has nothing newer: the caller has flushed.
    pub(super) fn table_entries(&self, table: u64) -> io::Result<Vec<Entry>> {
        let mut bytes = vec![0; self.layout.cluster() as usize];
        self.files.file.read_at(table, &mut bytes)?;
        let step = self.layout.entry() as usize;
        let extended = self.layout.extended;
        let entries = bytes.chunks_exact(step);
        Ok(entries.map(|e| Entry { l2: be64(e, 0), bitmap: if extended { be64(e, 8) } else { 0 } }).collect())
    }

    fn write_entries(&mut self, table: u64, entries: &[Entry]) -> io::Result<()> {
        let extended = self.layout.extended;
        let mut bytes = Vec::with_capacity(self.layout.cluster() as usize);
        for entry in entries {
            bytes.extend_from_slice(&entry.l2.to_be_bytes());
            if extended {
                bytes.extend_from_slice(&entry.bitmap.to_be_bytes());
            }
        }
        self.l2.forget(table, table + self.layout.cluster());
        self.files.file.write_at(table, &bytes)
    }

    fn tables_of(&mut self, l1: &[u64]) -> io::Result<Vec<u64>> {
        let mut out = Vec::new();
        for entry in l1 {
            let table = entry & OFFSET;
            if table == 0 {
                continue;
            }
            if !table.is_multiple_of(self.layout.cluster()) || entry & L1_RESERVED != 0 {
                return Err(self.mark_corrupt(format!("L2 table offset {table:#x} unaligned")));
            }
            out.push(table);
        }
        Ok(out)
    }

    /// Makes the active tables say which clusters are theirs alone.
    pub(super) fn refresh_copied(&mut self) -> io::Result<()> {
        self.flush()?;
        let bits = self.layout.cluster_bits;
        for index in 0..self.l1.len() {
            let Some(&l1_entry) = self.l1.get(index) else { break };
            let table = l1_entry & OFFSET;
            if table == 0 {
                continue;
            }
            let copied = if self.refcount(table >> bits)? == 1 { COPIED } else { 0 };
            if let Some(slot) = self.l1.get_mut(index)
                && *slot != table | copied
            {
                *slot = table | copied;
                self.l1_dirty.insert(index);
            }
            let mut entries = self.table_entries(table)?;
            if self.refresh_entries(&mut entries)? {
                self.write_entries(table, &entries)?;
            }
        }
        self.flush()
    }

    /// Makes entries say which clusters are theirs alone. True if any has changed.
    fn refresh_entries(&mut self, entries: &mut [Entry]) -> io::Result<bool> {
        let bits = self.layout.cluster_bits;
        let mut changed = false;
        for entry in entries {
            let Some(host) = self.layout.host(*entry).filter(|_| !self.layout.data_file) else {
                continue;
            };
            let copied = if self.refcount(host >> bits)? == 1 { COPIED } else { 0 };
            if entry.l2 & COPIED != copied {
                entry.l2 = entry.l2 & !COPIED | copied;
                changed = true;
            }
        }
        Ok(changed)
    }

    /// The snapshots that are on the disk now, in a table of so many bytes.
    fn snapshots_are(&mut self, all: Vec<Snapshot>, bytes: u64) {
        self.snapshots = all;
        self.snapshot_table_size = bytes;
        self.metadata.clear();
        self.find_metadata();
    }

    fn find_snapshot(&self, key: &str) -> io::Result<usize> {
        // The name decides before the id, as with other tools' users.
        let by_name = self.snapshots.iter().position(|s| s.name == key);
        let found = by_name.or_else(|| self.snapshots.iter().position(|s| s.id == key));
        found.ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("Can't find the snapshot '{key}'"))
        })
    }

    pub(super) fn snapshot_l1(&self, snapshot: &Snapshot) -> io::Result<Vec<u64>> {
        super::read_table(&*self.files.file, snapshot.l1_offset, u64::from(snapshot.l1_size))
    }

    /// Writes an L1 table to new clusters.
    pub(super) fn new_l1(&mut self, l1: &[u64]) -> io::Result<u64> {
        let bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        let cluster = self.layout.cluster();
        let clusters = (bytes.len().max(1) as u64).div_ceil(cluster);
        let at = self.allocate_run(clusters)?;
        let mut whole = bytes;
        whole.resize((clusters * cluster) as usize, 0);
        self.files.file.write_at(at, &whole)?;
        Ok(at)
    }
}

impl Shadow<'_> {
    /// Clusters that an entry refers to: offset and bytes.
    fn target(&self, entry: Entry) -> Option<(u64, u64)> {
        let layout = self.state.layout;
        if entry.l2 & COMPRESSED != 0 {
            return Some(layout.compressed_range(entry.l2));
        }
        layout.host(entry).map(|host| (host, layout.cluster()))
    }

    /// Everything that an L1 table refers to gets one more reference.
    fn reference_tables(&mut self, l1: &[u64]) -> io::Result<()> {
        for table in self.state.tables_of(l1)? {
            self.add(table, 1)?;
            for entry in self.state.table_entries(table)? {
                if let Some((offset, len)) = self.target(entry) {
                    self.add(offset, len)?;
                }
            }
        }
        Ok(())
    }

    /// Everything that an L1 table refers to loses a reference.
    fn release_tables(&mut self, l1: &[u64]) -> io::Result<()> {
        for table in self.state.tables_of(l1)? {
            for entry in self.state.table_entries(table)? {
                if let Some((offset, len)) = self.target(entry) {
                    self.sub(offset, len)?;
                }
            }
            self.sub(table, 1)?;
        }
        Ok(())
    }

    /// Everything active gets one more reference, and nothing is called one's own any more. Returns the L1 table for both.
    fn share_tables(&mut self) -> io::Result<Vec<u64>> {
        let mut l1 = self.state.l1.clone();
        self.state.tables_of(&l1)?;
        for slot in l1.iter_mut().filter(|e| **e & OFFSET != 0) {
            let mut table = *slot & OFFSET;
            let mut entries = self.state.table_entries(table)?;
            let mut changed = false;
            for entry in &mut entries {
                if let Some((offset, len)) = self.target(*entry) {
                    self.add(offset, len)?;
                    changed |= entry.l2 & COPIED != 0;
                    entry.l2 &= !COPIED;
                }
            }
            if changed {
                table = self.replace_table(table, &entries)?;
            }
            self.add(table, 1)?;
            *slot = table;
        }
        Ok(l1)
    }

    /// Makes the tables of an L1 table say which clusters are theirs alone. Returns the L1 table that says so too.
    fn own_tables(&mut self, mut l1: Vec<u64>) -> io::Result<Vec<u64>> {
        self.state.tables_of(&l1)?;
        let bits = self.state.layout.cluster_bits;
        for slot in l1.iter_mut().filter(|e| **e & OFFSET != 0) {
            let mut table = *slot & OFFSET;
            let mut entries = self.state.table_entries(table)?;
            if self.state.refresh_entries(&mut entries)? {
                table = self.replace_table(table, &entries)?;
            }
            let alone = self.state.refcount(table >> bits)? == 1;
            *slot = table | if alone { COPIED } else { 0 };
        }
        Ok(l1)
    }

    /// A new L2 table with these entries instead of a reference to an old one.
    fn replace_table(&mut self, old: u64, entries: &[Entry]) -> io::Result<u64> {
        let new = self.allocate(self.state.layout.cluster())?;
        self.state.write_entries(new, entries)?;
        self.sub(old, 1)?;
        Ok(new)
    }

    /// Writes a snapshot table to a new place, for the old one. Returns where it is, and its bytes.
    fn new_snapshots(&mut self, all: &[Snapshot]) -> io::Result<(u64, u64)> {
        let (old, size) = (self.state.header.snapshots_offset, self.state.snapshot_table_size);
        if self.state.header.snapshots != 0 {
            self.sub(old, size.max(1))?;
        }
        let bytes: Vec<u8> = all.iter().flat_map(Snapshot::to_bytes).collect();
        if bytes.is_empty() {
            return Ok((0, 0));
        }
        let at = self.allocate(bytes.len() as u64)?;
        self.state.files.file.write_at(at, &bytes)?;
        Ok((at, bytes.len() as u64))
    }
}

impl Qcow2 {
    /// All snapshots, the oldest first.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.state.lock().snapshots.clone()
    }

    fn snapshot_ready(&self, state: &State) -> io::Result<()> {
        state.check_writable()?;
        if self.layout.data_file {
            let text = "internal snapshots are not possible with an external data file";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        Ok(())
    }

    /// Makes a snapshot of the disk. `now` is the time in nanoseconds since 1970.
    ///
    /// # Errors
    /// `InvalidInput` if refcounts are too narrow; the host's.
    pub fn create_snapshot(&self, name: &str, now: u64) -> io::Result<()> {
        let _all = self.ranges.lock(0, u64::MAX, true);
        let mut state = self.state.lock();
        self.snapshot_ready(&state)?;
        if name.len() > usize::from(u16::MAX)
            || state.snapshots.len() >= super::header::MAX_SNAPSHOTS as usize
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the snapshot's name is too long, or there are too many",
            ));
        }
        if self.layout.refcount_max() < state.snapshots.len() as u64 + 2 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the image's refcounts are too narrow for another snapshot",
            ));
        }
        let id = state.snapshots.iter().filter_map(|s| s.id.parse::<u64>().ok()).max().unwrap_or(0) + 1;
        let mut snapshot = Snapshot {
            id: id.to_string(),
            name: name.to_owned(),
            date_sec: (now / 1_000_000_000) as u32,
            date_nsec: (now % 1_000_000_000) as u32,
            vm_clock_nsec: 0,
            vm_state_size: 0,
            disk_size: self.size_now(),
            icount: u64::MAX,
            l1_offset: 0,
            l1_size: state.l1.len() as u32,
            extra: Vec::new(),
        };
        let mut all = state.snapshots.clone();
        let bytes = Shadow::run(&mut state, |shadow| {
            let l1 = shadow.share_tables()?;
            snapshot.l1_offset = shadow.new_table(&l1)?;
            let active = shadow.new_table(&l1)?;
            all.push(snapshot);
            let (at, bytes) = shadow.new_snapshots(&all)?;
            shadow.commit(l1, active, |header| {
                header.snapshots = all.len() as u32;
                header.snapshots_offset = at;
            })?;
            Ok(bytes)
        })?;
        state.snapshots_are(all, bytes);
        Ok(())
    }

    /// Deletes a snapshot, by name or id.
    ///
    /// # Errors
    /// `NotFound`; the host's.
    pub fn delete_snapshot(&self, key: &str) -> io::Result<()> {
        let _all = self.ranges.lock(0, u64::MAX, true);
        let mut state = self.state.lock();
        self.snapshot_ready(&state)?;
        let at = state.find_snapshot(key)?;
        let mut left = state.snapshots.clone();
        let gone = left.remove(at);
        let bytes = Shadow::run(&mut state, |shadow| {
            let l1 = shadow.state.snapshot_l1(&gone)?;
            shadow.release_tables(&l1)?;
            shadow.sub(gone.l1_offset, (u64::from(gone.l1_size) * 8).max(1))?;
            let active = shadow.state.l1.clone();
            let active = shadow.own_tables(active)?;
            let active_at = shadow.new_table(&active)?;
            let (at, bytes) = shadow.new_snapshots(&left)?;
            shadow.commit(active, active_at, |header| {
                header.snapshots = left.len() as u32;
                header.snapshots_offset = at;
            })?;
            Ok(bytes)
        })?;
        state.snapshots_are(left, bytes);
        *self.decompressed.lock() = (0, Vec::new());
        Ok(())
    }

    /// Makes the disk what it was at a snapshot, by name or id.
    ///
    /// # Errors
    /// `NotFound`; the host's.
    pub fn apply_snapshot(&self, key: &str) -> io::Result<()> {
        let _all = self.ranges.lock(0, u64::MAX, true);
        let mut state = self.state.lock();
        self.snapshot_ready(&state)?;
        let at = state.find_snapshot(key)?;
        if !state.bitmaps.is_empty() {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "Device has active dirty bitmaps"));
        }
        let Some(snapshot) = state.snapshots.get(at).cloned() else {
            return Err(crate::node::os_error(libc::EIO));
        };
        Shadow::run(&mut state, |shadow| {
            let mut l1 = shadow.state.snapshot_l1(&snapshot)?;
            shadow.reference_tables(&l1)?;
            let old = shadow.state.l1.clone();
            shadow.release_tables(&old)?;
            let needed = shadow.state.header.l1_needed(snapshot.disk_size) as usize;
            l1.resize(l1.len().max(needed), 0);
            let l1 = shadow.own_tables(l1)?;
            let at = shadow.new_table(&l1)?;
            shadow.commit(l1, at, |header| header.size = snapshot.disk_size)
        })?;
        self.size.store(snapshot.disk_size, std::sync::atomic::Ordering::Release);
        *self.decompressed.lock() = (0, Vec::new());
        Ok(())
    }

    /// A read-only node of a snapshot's contents, by name or id.
    ///
    /// # Errors
    /// `NotFound`; the host's.
    pub fn snapshot_view(&self, key: &str) -> Result<Arc<Self>, BlockError> {
        let (mut header, snapshot) = {
            let state = self.state.lock();
            let at = state.find_snapshot(key).map_err(|e| BlockError::Format(e.to_string()))?;
            (state.header.clone(), state.snapshots.get(at).cloned())
        };
        let Some(snapshot) = snapshot else { return Err(bad("Can't find the snapshot")) };
        header.l1_offset = snapshot.l1_offset;
        header.l1_size = snapshot.l1_size;
        header.size = snapshot.disk_size;
        header.bitmaps = None;
        let options = super::OpenOptions { readonly: true, ..super::OpenOptions::default() };
        Self::with_header(header, self.files.clone(), self.backing_node(), &options)
    }
}
