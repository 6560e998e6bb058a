//! Checking and repairing: refcounts against references.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::Qcow2;
use super::geometry::{
    COMPRESSED, COPIED, Entry, Kind, L1_RESERVED, L2_RESERVED, OFFSET, REFTABLE_RESERVED, ZERO,
};
use super::geometry::{get_refcount, set_refcount};
use super::header::{MAX_REFTABLE_BYTES, incompatible};
use super::state::State;

/// What a check may repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fix {
    /// Nothing.
    None,
    /// Clusters that nothing refers to.
    Leaks,
    /// Everything that can be.
    All,
}

/// The result of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// A line for each fault.
    pub messages: Vec<String>,
    /// Faults that could not be looked into.
    pub check_errors: u64,
    /// Faults that can destroy data.
    pub corruptions: u64,
    /// Clusters that nothing refers to.
    pub leaks: u64,
    /// Of the faults, those repaired.
    pub corruptions_fixed: u64,
    /// Of the leaks, those repaired.
    pub leaks_fixed: u64,
    /// Where the last used cluster ends.
    pub image_end_offset: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Of them, those in the image.
    pub allocated_clusters: u64,
    /// Of those, the ones that do not follow their predecessor.
    pub fragmented_clusters: u64,
    /// And those that are compressed.
    pub compressed_clusters: u64,
}

/// Messages that are kept; a broken image has millions.
const MAX_MESSAGES: usize = 10_000;
/// Clusters in a page of counts.
const PAGE: u64 = 4096;

/// References by cluster, in memory only where there are any.
#[derive(Debug, Default)]
struct Counts {
    pages: BTreeMap<u64, Box<[u32]>>,
}

impl Counts {
    fn add(&mut self, cluster: u64) {
        let page =
            self.pages.entry(cluster / PAGE).or_insert_with(|| vec![0; PAGE as usize].into_boxed_slice());
        if let Some(n) = page.get_mut((cluster % PAGE) as usize) {
            *n = n.saturating_add(1);
        }
    }

    fn get(&self, cluster: u64) -> u64 {
        let page = self.pages.get(&(cluster / PAGE));
        page.and_then(|p| p.get((cluster % PAGE) as usize)).map_or(0, |n| u64::from(*n))
    }

    fn last(&self) -> Option<u64> {
        self.pages
            .iter()
            .next_back()
            .and_then(|(page, counts)| counts.iter().rposition(|n| *n != 0).map(|at| page * PAGE + at as u64))
    }
}

struct Checker<'a> {
    state: &'a mut State,
    report: Report,
    counts: Counts,
    /// End of the file in clusters; nothing can be referred to behind it but what was never written.
    end: u64,
    fix: Fix,
}

impl Checker<'_> {
    fn say(&mut self, text: String) {
        if self.report.messages.len() < MAX_MESSAGES {
            self.report.messages.push(text);
        }
    }

    fn corruption(&mut self, text: String) {
        self.say(text);
        self.report.corruptions += 1;
    }

    /// Counts references to bytes of the file.
    fn count(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let bits = self.state.layout.cluster_bits;
        let last = offset.saturating_add(len - 1);
        if last >> bits >= self.end {
            let size = self.end << bits;
            return self.corruption(format!("ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset {offset:#x} size {len:#x} (file ends at {size:#x})"));
        }
        for cluster in (offset >> bits)..=(last >> bits) {
            self.counts.add(cluster);
        }
    }

    fn entry(&mut self, entry: Entry, n: usize, next: &mut u64, active: bool) {
        let layout = self.state.layout;
        if entry.l2 & COMPRESSED != 0 {
            if entry.l2 & COPIED != 0 {
                let cluster = (entry.l2 & OFFSET) >> 9;
                self.corruption(format!(
                    "ERROR: coffset={cluster:#x}: copied flag must never be set for compressed clusters"
                ));
            }
            if layout.data_file {
                return self.corruption(format!(
                    "ERROR compressed cluster {n} with data file, entry={:#x}",
                    entry.l2
                ));
            }
            let (offset, len) = layout.compressed_range(entry.l2);
            self.count(offset, len);
            if active {
                self.report.allocated_clusters += 1;
                self.report.compressed_clusters += 1;
                self.report.fragmented_clusters += 1;
            }
            return;
        }
        let reserved = if layout.extended { L2_RESERVED | ZERO } else { L2_RESERVED };
        if entry.l2 & reserved != 0 {
            self.corruption(format!("ERROR found l2 entry with reserved bits set: {:x}", entry.l2));
        }
        if (0..layout.subclusters()).any(|s| layout.kind(entry, s) == Kind::Invalid) {
            self.corruption(format!("ERROR: invalid subcluster bitmap {:#x}", entry.bitmap));
        }
        let Some(host) = layout.host(entry) else { return };
        if active {
            self.report.allocated_clusters += 1;
            if *next != 0 && host != *next {
                self.report.fragmented_clusters += 1;
            }
            *next = host + layout.cluster();
        }
        if layout.data_file {
            return;
        }
        if !host.is_multiple_of(layout.cluster()) {
            self.corruption(format!(
                "ERROR offset={host:x}: Cluster is not properly aligned; L2 entry corrupted."
            ));
            return;
        }
        self.count(host, layout.cluster());
    }

    fn l1(&mut self, l1: &[u64], active: bool) -> io::Result<()> {
        let cluster = self.state.layout.cluster();
        for (index, entry) in l1.iter().enumerate() {
            if *entry == 0 {
                continue;
            }
            if entry & L1_RESERVED != 0 {
                self.corruption(format!("ERROR found L1 entry with reserved bits set: {entry:x}"));
            }
            let table = entry & OFFSET;
            self.count(table, cluster);
            if !table.is_multiple_of(cluster) {
                self.corruption(format!("ERROR l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted (index {index})"));
                continue;
            }
            if table == 0 || (table >> self.state.layout.cluster_bits) >= self.end {
                continue;
            }
            let mut next = 0;
            for (n, entry) in self.state.table_entries(table)?.into_iter().enumerate() {
                self.entry(entry, n, &mut next, active);
            }
        }
        Ok(())
    }

    /// Counts everything but refcount blocks. Returns false if snapshots could not be read.
    fn count_all(&mut self) -> io::Result<()> {
        let cluster = self.state.layout.cluster();
        self.count(0, cluster);
        let l1 = self.state.l1.clone();
        self.count(self.state.header.l1_offset, l1.len() as u64 * 8);
        self.l1(&l1, true)?;
        for snapshot in self.state.snapshots.clone() {
            self.count(snapshot.l1_offset, u64::from(snapshot.l1_size) * 8);
            let table =
                super::read_table(&*self.state.files.file, snapshot.l1_offset, u64::from(snapshot.l1_size))?;
            self.l1(&table, false)?;
        }
        self.count(self.state.header.snapshots_offset, self.state.snapshot_table_size);
        let runs = self.state.bitmaps.runs(&*self.state.files.file, &self.state.header)?;
        for (offset, len) in runs {
            self.count(offset, len);
        }
        if let Some((offset, len)) = self.state.header.crypto {
            self.count(offset, len);
        }
        let reftable = u64::from(self.state.header.reftable_clusters) * cluster;
        self.count(self.state.header.reftable_offset, reftable);
        Ok(())
    }

    /// Counts refcount blocks. True if the structure of refcounts has to be made anew.
    fn count_blocks(&mut self) -> bool {
        let cluster = self.state.layout.cluster();
        let mut rebuild = false;
        for (n, entry) in self.state.reftable.clone().into_iter().enumerate() {
            let offset = entry & !REFTABLE_RESERVED;
            if entry == 0 {
                continue;
            }
            if !offset.is_multiple_of(cluster) || entry & REFTABLE_RESERVED != 0 {
                self.corruption(format!(
                    "ERROR refcount block {n} is not cluster aligned; refcount table entry corrupted"
                ));
                rebuild = true;
            } else if offset >> self.state.layout.cluster_bits >= self.end {
                self.corruption(format!("ERROR refcount block {n} is outside image"));
                rebuild = true;
            } else {
                self.count(offset, cluster);
                let count = self.counts.get(offset >> self.state.layout.cluster_bits);
                if count != 1 {
                    self.corruption(format!("ERROR refcount block {n} refcount={count}"));
                    rebuild = true;
                }
            }
        }
        rebuild
    }

    /// Compares all counts; repairs those that are wrong if that is wanted. True if the structure has to be made anew.
    fn compare(&mut self) -> io::Result<bool> {
        let layout = self.state.layout;
        let per = layout.refblock_entries();
        let mut highest = 0;
        let mut rebuild = false;
        let last = self.counts.last().map_or(0, |c| c / per + 1);
        let blocks = (self.state.reftable.len() as u64).max(last);
        for index in 0..blocks {
            let offset = self.state.reftable.get(index as usize).map_or(0, |e| e & !REFTABLE_RESERVED);
            let usable = offset != 0
                && offset.is_multiple_of(layout.cluster())
                && offset >> layout.cluster_bits < self.end;
            let mut block = vec![0; if usable { layout.cluster() as usize } else { 0 }];
            if usable {
                self.state.files.file.read_at(offset, &mut block)?;
            } else if index * per > self.counts.last().unwrap_or(0) {
                continue;
            }
            let mut changed = false;
            for n in 0..per {
                let cluster = index * per + n;
                let found = get_refcount(&block, layout.refcount_order, n as usize);
                let wanted = self.counts.get(cluster);
                if cluster >= self.end && wanted == 0 {
                    // Nothing of it is in the file: it takes no space.
                    continue;
                }
                if found != 0 || wanted != 0 {
                    highest = cluster;
                }
                if found == wanted {
                    continue;
                }
                let leak = found > wanted;
                let fixes = if leak { self.fix != Fix::None } else { self.fix == Fix::All } && usable;
                let what = match (fixes, leak) {
                    (true, _) => "Repairing",
                    (_, true) => "Leaked",
                    _ => "ERROR",
                };
                self.say(format!("{what} cluster {cluster} refcount={found} reference={wanted}"));
                rebuild |= !usable;
                if fixes {
                    set_refcount(&mut block, layout.refcount_order, n as usize, wanted);
                    changed = true;
                }
                let report = &mut self.report;
                match (leak, fixes) {
                    (true, true) => report.leaks_fixed += 1,
                    (true, false) => report.leaks += 1,
                    (false, true) => report.corruptions_fixed += 1,
                    (false, false) => report.corruptions += 1,
                }
            }
            if changed {
                self.state.files.file.write_at(offset, &block)?;
            }
        }
        self.report.image_end_offset = (highest + 1) << layout.cluster_bits;
        Ok(rebuild)
    }

    /// Makes refcount blocks and table anew, behind everything that is used.
    fn rebuild(&mut self) -> io::Result<()> {
        let layout = self.state.layout;
        let (per, cluster) = (layout.refblock_entries(), layout.cluster());
        // The old blocks and the old table are not used any more.
        self.counts = Counts::default();
        let before = std::mem::take(&mut self.report);
        self.count_all()?;
        self.report = before;
        let reftable = self.state.header.reftable_offset >> layout.cluster_bits;
        for n in 0..u64::from(self.state.header.reftable_clusters) {
            if let Some(page) = self.counts.pages.get_mut(&((reftable + n) / PAGE))
                && let Some(count) = page.get_mut(((reftable + n) % PAGE) as usize)
            {
                *count = count.saturating_sub(1);
            }
        }
        let start = self.end.max(self.counts.last().unwrap_or(0) + 1);
        let mut used: Vec<u64> =
            self.counts.pages.keys().flat_map(|p| (p * PAGE / per)..=((p * PAGE + PAGE - 1) / per)).collect();
        used.dedup();
        let (mut blocks, mut table_clusters) = (used.len() as u64, 1);
        // Blocks and table are counted by blocks themselves: until nothing is added.
        loop {
            let end = start + blocks + table_clusters;
            let mut all = used.clone();
            all.extend((start / per)..=((end - 1) / per));
            all.sort_unstable();
            all.dedup();
            let clusters = (all.last().copied().unwrap_or(0) + 1).div_ceil(cluster / 8);
            if all.len() as u64 <= blocks && clusters <= table_clusters {
                used = all;
                break;
            }
            (blocks, table_clusters) = (all.len() as u64, clusters);
        }
        if table_clusters * cluster > MAX_REFTABLE_BYTES.max(cluster) {
            return Err(io::Error::other("the rebuilt refcount table would be too large"));
        }
        for n in 0..blocks + table_clusters {
            self.counts.add(start + n);
        }
        self.write_rebuilt(&used, start, blocks, table_clusters)
    }

    fn write_rebuilt(
        &mut self,
        used: &[u64],
        start: u64,
        blocks: u64,
        table_clusters: u64,
    ) -> io::Result<()> {
        let layout = self.state.layout;
        let (per, cluster) = (layout.refblock_entries(), layout.cluster());
        let file = Arc::clone(&self.state.files.file);
        let mut table = vec![0u64; (table_clusters * cluster / 8) as usize];
        for (n, index) in used.iter().enumerate() {
            let mut block = vec![0; cluster as usize];
            for i in 0..per {
                let count = self.counts.get(index * per + i).min(layout.refcount_max());
                if count != 0 {
                    set_refcount(&mut block, layout.refcount_order, i as usize, count);
                }
            }
            let offset = (start + n as u64) << layout.cluster_bits;
            file.write_at(offset, &block)?;
            if let Some(entry) = table.get_mut(*index as usize) {
                *entry = offset;
            }
        }
        let offset = (start + blocks) << layout.cluster_bits;
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        file.write_at(offset, &bytes)?;
        file.flush()?;
        self.state.header.reftable_offset = offset;
        self.state.header.reftable_clusters = table_clusters as u32;
        self.state.write_header()?;
        file.flush()?;
        self.state.reftable = table;
        self.report.image_end_offset = (start + blocks + table_clusters) << layout.cluster_bits;
        Ok(())
    }

    /// Compares the copied flags of active tables with refcounts.
    fn copied_flags(&mut self) -> io::Result<bool> {
        let bits = self.state.layout.cluster_bits;
        let mut wrong = false;
        for entry in self.state.l1.clone() {
            let table = entry & OFFSET;
            if table == 0 || !table.is_multiple_of(1 << bits) || table >> bits >= self.end {
                continue;
            }
            let count = self.counts.get(table >> bits);
            wrong |= self.copied(entry, count, "L2 cluster: l1_entry");
            for entry in self.state.table_entries(table)? {
                let data_file = self.state.layout.data_file;
                if let Some(host) =
                    self.state.layout.host(entry).filter(|h| h.is_multiple_of(1 << bits) && !data_file)
                {
                    let count = self.counts.get(host >> bits);
                    wrong |= self.copied(entry.l2, count, "data cluster: l2_entry");
                }
            }
        }
        Ok(wrong)
    }

    fn copied(&mut self, entry: u64, count: u64, what: &str) -> bool {
        if (count == 1) == (entry & COPIED != 0) {
            return false;
        }
        let repair = self.fix == Fix::All;
        let word = if repair { "Repairing" } else { "ERROR" };
        self.say(format!("{word} OFLAG_COPIED {what}={entry:x} refcount={count}"));
        if repair {
            self.report.corruptions_fixed += 1;
        } else {
            self.report.corruptions += 1;
        }
        true
    }
}

impl Qcow2 {
    /// Checks the image and repairs what `fix` says. Nobody else should use it meanwhile.
    ///
    /// # Errors
    /// The host's.
    pub fn check(&self, fix: Fix) -> io::Result<Report> {
        let _all = self.ranges.lock(0, u64::MAX, true);
        let mut state = self.state.lock();
        if fix != Fix::None && state.readonly {
            return Err(crate::node::os_error(libc::EROFS));
        }
        if !state.readonly && state.corrupt.is_none() {
            state.flush()?;
        }
        let layout = self.layout;
        let end = state.files.file.size().div_ceil(layout.cluster());
        let mut checker =
            Checker { state: &mut state, report: Report::default(), counts: Counts::default(), end, fix };
        checker.report.total_clusters = self.size_now().div_ceil(layout.cluster());
        checker.count_all()?;
        let mut rebuild = checker.count_blocks();
        rebuild |= checker.compare()?;
        if rebuild && fix == Fix::All {
            checker.say("Rebuilding refcount structure".to_owned());
            checker.rebuild()?;
            let report = &mut checker.report;
            report.corruptions_fixed += std::mem::take(&mut report.corruptions);
            report.leaks_fixed += std::mem::take(&mut report.leaks);
        }
        let wrong = checker.copied_flags()?;
        let report = checker.report;
        if fix != Fix::None {
            self.after_repair(&mut state, &report, wrong && fix == Fix::All)?;
        }
        Ok(report)
    }

    fn after_repair(&self, state: &mut State, report: &Report, copied: bool) -> io::Result<()> {
        // The tables on the disk are the truth now.
        state.refblocks.clear();
        state.l2.clear();
        state.first_free = 0;
        state.free_byte = 0;
        state.metadata.clear();
        state.find_metadata();
        if copied {
            state.refresh_copied()?;
        }
        if report.corruptions == 0 && report.check_errors == 0 && report.leaks == 0 {
            let stale = incompatible::DIRTY | incompatible::CORRUPT;
            if state.header.incompatible & stale != 0 {
                state.files.file.flush()?;
                state.header.incompatible &= !stale;
                state.write_header()?;
            }
            state.corrupt = None;
        }
        state.files.file.flush()
    }
}
