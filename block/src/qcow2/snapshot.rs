//! Internal snapshots (qcow2 specification, "Snapshots").

use std::io;
use std::sync::Arc;

use super::Qcow2;
use super::geometry::{COMPRESSED, COPIED, Entry, L1_RESERVED, OFFSET};
use super::header::{Header, MAX_L1_BYTES, be16, be32, be64};
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

    /// Everything that an L1 table refers to gets one more reference.
    fn reference_all(&mut self, l1: &[u64]) -> io::Result<()> {
        let bits = self.layout.cluster_bits;
        for table in self.tables_of(l1)? {
            self.add_reference(table >> bits)?;
            for entry in self.table_entries(table)? {
                let (offset, len) = if entry.l2 & COMPRESSED != 0 {
                    self.layout.compressed_range(entry.l2)
                } else if let (Some(host), false) = (self.layout.host(entry), self.layout.data_file) {
                    (host, 1)
                } else {
                    continue;
                };
                for cluster in (offset >> bits)..=((offset + len - 1) >> bits) {
                    self.add_reference(cluster)?;
                }
            }
        }
        Ok(())
    }

    /// Everything that an L1 table refers to loses a reference, once the tables are on the disk.
    fn release_all(&mut self, l1: &[u64]) -> io::Result<()> {
        for table in self.tables_of(l1)? {
            for entry in self.table_entries(table)? {
                self.free_entry(entry);
            }
            self.free(table, self.layout.cluster());
            self.free_pressure()?;
        }
        Ok(())
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
            let mut changed = false;
            for entry in &mut entries {
                let Some(host) = self.layout.host(*entry).filter(|_| !self.layout.data_file) else {
                    continue;
                };
                let copied = if self.refcount(host >> bits)? == 1 { COPIED } else { 0 };
                if entry.l2 & COPIED != copied {
                    entry.l2 = entry.l2 & !COPIED | copied;
                    changed = true;
                }
            }
            if changed {
                self.write_entries(table, &entries)?;
            }
        }
        self.flush()
    }

    /// Replaces the snapshot table on the disk.
    fn write_snapshots(&mut self) -> io::Result<()> {
        let old = (self.header.snapshots_offset, self.header.snapshots, self.snapshot_table_size);
        let bytes: Vec<u8> = self.snapshots.iter().flat_map(Snapshot::to_bytes).collect();
        let mut at = 0;
        if !bytes.is_empty() {
            at = self.allocate_run((bytes.len() as u64).div_ceil(self.layout.cluster()))?;
            self.files.file.write_at(at, &bytes)?;
        }
        self.flush()?;
        self.header.snapshots = self.snapshots.len() as u32;
        self.header.snapshots_offset = at;
        self.snapshot_table_size = bytes.len() as u64;
        self.write_header()?;
        self.files.file.flush()?;
        if old.1 != 0 {
            self.free(old.0, old.2.max(1));
        }
        self.flush()
    }

    fn find_snapshot(&self, key: &str) -> io::Result<usize> {
        // The name decides before the id, as with other tools' users.
        let by_name = self.snapshots.iter().position(|s| s.name == key);
        let found = by_name.or_else(|| self.snapshots.iter().position(|s| s.id == key));
        found.ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("Can't find the snapshot '{key}'"))
        })
    }

    fn snapshot_l1(&self, snapshot: &Snapshot) -> io::Result<Vec<u64>> {
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
        state.flush()?;
        let id = state.snapshots.iter().filter_map(|s| s.id.parse::<u64>().ok()).max().unwrap_or(0) + 1;
        let l1: Vec<u64> = state.l1.iter().map(|e| e & !COPIED).collect();
        let active = state.l1.clone();
        state.reference_all(&active)?;
        let l1_offset = state.new_l1(&l1)?;
        state.refresh_copied()?;
        let disk_size = self.size_now();
        state.snapshots.push(Snapshot {
            id: id.to_string(),
            name: name.to_owned(),
            date_sec: (now / 1_000_000_000) as u32,
            date_nsec: (now % 1_000_000_000) as u32,
            vm_clock_nsec: 0,
            vm_state_size: 0,
            disk_size,
            icount: u64::MAX,
            l1_offset,
            l1_size: l1.len() as u32,
            extra: Vec::new(),
        });
        state.write_snapshots()
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
        state.flush()?;
        let gone = state.snapshots.remove(at);
        let l1 = state.snapshot_l1(&gone)?;
        state.write_snapshots()?;
        state.release_all(&l1)?;
        state.free(gone.l1_offset, (u64::from(gone.l1_size) * 8).max(1));
        state.flush()?;
        state.refresh_copied()
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
        state.flush()?;
        let Some(snapshot) = state.snapshots.get(at).cloned() else {
            return Err(crate::node::os_error(libc::EIO));
        };
        let mut l1: Vec<u64> = state.snapshot_l1(&snapshot)?.iter().map(|e| e & !COPIED).collect();
        state.reference_all(&l1)?;
        let needed = state.header.l1_needed(snapshot.disk_size) as usize;
        l1.resize(l1.len().max(needed), 0);
        let new = state.new_l1(&l1)?;
        state.flush()?;
        let old = std::mem::replace(&mut state.l1, l1);
        let old_offset = state.header.l1_offset;
        state.header.l1_offset = new;
        state.header.l1_size = state.l1.len() as u32;
        state.header.size = snapshot.disk_size;
        state.write_header()?;
        state.files.file.flush()?;
        self.size.store(snapshot.disk_size, std::sync::atomic::Ordering::Release);
        state.release_all(&old)?;
        state.free(old_offset, (old.len() as u64 * 8).max(1));
        state.flush()?;
        state.refresh_copied()?;
        state.metadata.clear();
        state.find_metadata();
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
