//! The data base of translations: by page, by segment, and who jumps to whom.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use holdfast_memory::PAGE_SIZE;
use holdfast_tcg_ir::env::MAX_MAPPING_ID;
use holdfast_tcg_x64::LinkKind;
use parking_lot::Mutex;

use crate::cache::{CodeCache, SegmentId};
use crate::epoch::Epochs;
use crate::hash::Map;
use crate::phys::PhysMemory;
use crate::table::{GRANULE, Key, Link, NO_LINK, Region, Table};

/// No region.
const NONE: u32 = u32::MAX;

/// A region that was taken out: what vCPUs have to forget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Killed {
    /// Guest-virtual address of its entry.
    pub pc: u64,
    /// Its code, or 0.
    pub entry: u64,
}

/// Tells the vCPUs which regions are no more. Called with the data base locked.
pub type Post<'a> = &'a dyn Fn(&[Killed]);

#[derive(Debug)]
struct Slot {
    region: Option<Arc<Region>>,
    /// The first link that jumps here, as [`Link::next`].
    incoming: u64,
}

impl Slot {
    const EMPTY: Self = Self { region: None, incoming: NO_LINK };
}

#[derive(Debug, Default)]
struct Page {
    regions: Vec<u32>,
    /// Union of the regions' granules; may hold bits of regions that are gone.
    granules: u64,
    /// Granules written while something is being translated from the page: the number of the write, and the granules. Few.
    written: Vec<(u64, u64)>,
    /// Translations under way.
    busy: u32,
    /// Whether vCPUs can still write the page unnoticed.
    guard: Guard,
}

/// So many writes of a page are told apart.
const WRITES: usize = 8;

impl Page {
    /// Notes write number `write` of `granules`.
    fn note_write(&mut self, write: u64, granules: u64) {
        if self.busy == 0 {
            return;
        }
        self.written.push((write, granules));
        // The two oldest count as the later one then: some translation may be made again for nothing.
        if self.written.len() > WRITES {
            let (_, oldest) = self.written.remove(0);
            if let Some((_, next)) = self.written.first_mut() {
                *next |= oldest;
            }
        }
    }

    /// The granules written after write number `since`.
    fn written_since(&self, since: u64) -> u64 {
        self.written.iter().filter(|(write, _)| *write > since).fold(0, |all, (_, granules)| all | granules)
    }
}

/// Whether stores to a page with code are noticed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Guard {
    /// Some may not be.
    #[default]
    Open,
    /// A vCPU is taking the others' write entries away.
    Closing,
    /// All are.
    Closed,
}

/// What has to be done before bytes of a page may be read for translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// Nothing.
    Ready,
    /// The vCPUs' fast write entries have to go; then [`Regions::guarded`] is to be called.
    Guard,
    /// Another vCPU is doing that: wait until [`Regions::is_guarded`].
    Wait,
}

#[derive(Debug, Default)]
struct Db {
    slots: Vec<Slot>,
    free: Vec<u32>,
    pages: Map<u64, Page>,
    segments: Map<u32, Vec<u32>>,
    ids: Map<(u64, u64, u32), u32>,
    limbo: VecDeque<(u64, u32)>,
    live: u64,
}

/// Counters for `info jit`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct RegionCounts {
    /// Regions that can run.
    pub live: u64,
    /// Their direct jumps.
    pub links: u64,
    /// Those that are linked.
    pub linked: u64,
    /// Guest bytes of the live regions.
    pub guest_bytes: u64,
    /// Guest instructions of the live regions.
    pub insns: u64,
    /// Host bytes of the live regions.
    pub host_bytes: u64,
    /// Guest pages with translations.
    pub pages: u64,
}

/// All translations of a VM.
#[derive(Debug)]
pub struct Regions {
    table: Table,
    db: Mutex<Db>,
    /// Mapping ids given out, as the data base last had them.
    ids: AtomicU32,
    /// Writes of code so far.
    writes: AtomicU64,
    /// Safe points of the vCPUs.
    pub epochs: Epochs,
    /// Where host code lives; `None` when everything is interpreted.
    pub cache: Option<CodeCache>,
}

impl Regions {
    /// Empty, for `vcpus` vCPUs.
    pub fn new(vcpus: usize, cache: Option<CodeCache>) -> Self {
        Self {
            table: Table::new(),
            db: Mutex::default(),
            ids: AtomicU32::new(0),
            writes: AtomicU64::new(0),
            epochs: Epochs::new(vcpus),
            cache,
        }
    }

    /// The region for `key`.
    ///
    /// # Safety
    /// As for [`Table::find`].
    #[inline]
    pub unsafe fn find<'a>(&self, key: &Key) -> Option<&'a Region> {
        // SAFETY: by this function's contract.
        unsafe { self.table.find(key) }
    }

    /// Announces that bytes of `page` are about to be read for translation, and says what has to be done before. Must be
    /// paired with [`Regions::end_page`].
    pub fn begin_page(&self, phys: &PhysMemory, page: u64) -> Begin {
        let mut db = self.db.lock();
        let info = db.pages.entry(page).or_default();
        if info.busy == 0 {
            info.written.clear();
        }
        info.busy += 1;
        match info.guard {
            Guard::Closed => Begin::Ready,
            Guard::Closing => Begin::Wait,
            Guard::Open => {
                info.guard = Guard::Closing;
                if let Some(at) = phys.find(page * PAGE_SIZE, PAGE_SIZE) {
                    at.block.tracker.set_code(at.offset / PAGE_SIZE);
                }
                Begin::Guard
            }
        }
    }

    /// From now on every store to `page` is noticed.
    pub fn guarded(&self, page: u64) {
        if let Some(info) = self.db.lock().pages.get_mut(&page) {
            info.guard = Guard::Closed;
        }
    }

    /// True if every store to `page` is noticed.
    pub fn is_guarded(&self, page: u64) -> bool {
        self.db.lock().pages.get(&page).is_some_and(|info| info.guard == Guard::Closed)
    }

    /// The translation that [`Regions::begin_page`] announced is over.
    pub fn end_page(&self, phys: &PhysMemory, page: u64) {
        let db = &mut *self.db.lock();
        if let Some(info) = db.pages.get_mut(&page) {
            info.busy = info.busy.saturating_sub(1);
        }
        forget_page_if_empty(db, phys, page);
    }

    /// A number for a region to be.
    pub fn reserve_id(&self) -> u32 {
        let db = &mut *self.db.lock();
        let passed = self.epochs.passed();
        while let Some(&(epoch, id)) = db.limbo.front()
            && epoch < passed
        {
            db.limbo.pop_front();
            if let Some(slot) = db.slots.get_mut(id as usize) {
                *slot = Slot::EMPTY;
            }
            db.free.push(id);
        }
        db.free.pop().unwrap_or_else(|| {
            db.slots.push(Slot::EMPTY);
            db.slots.len() as u32 - 1
        })
    }

    /// Gives back a number that no region was made with.
    pub fn release_id(&self, id: u32) {
        self.db.lock().free.push(id);
    }

    /// How many writes of code there were, for [`Region::since`]. To be asked after [`Regions::begin_page`] and before any byte
    /// is read: what was written up to here is read.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::SeqCst)
    }

    /// Publishes a region unless its bytes were written since [`Region::since`]: then it is dropped.
    #[cfg(test)]
    pub fn publish(&self, region: Region) -> Option<Arc<Region>> {
        self.publish_locked(&mut self.db.lock(), Arc::new(region))
    }

    /// Publishes a region, if one was made, unless its bytes were written since [`Region::since`]: then it is dropped. The
    /// translation that [`Regions::begin_page`] announced for `pages` is over.
    pub fn publish_and_end(
        &self,
        phys: &PhysMemory,
        region: Option<Arc<Region>>,
        pages: [Option<u64>; 2],
    ) -> Option<Arc<Region>> {
        let db = &mut *self.db.lock();
        let published = region.and_then(|region| self.publish_locked(db, region));
        for page in pages.into_iter().flatten() {
            let Some(info) = db.pages.get_mut(&page) else { continue };
            info.busy = info.busy.saturating_sub(1);
            if published.is_none() {
                forget_page_if_empty(db, phys, page);
            }
        }
        published
    }

    fn publish_locked(&self, db: &mut Db, mut region: Arc<Region>) -> Option<Arc<Region>> {
        let written = |page: &u64| db.pages.get(page).map_or(u64::MAX, |p| p.written_since(region.since));
        let stale = region.pages().any(|(page, granules)| written(&page) & granules != 0);
        let id = region.id;
        // Nobody else has it yet.
        let Some(made) = Arc::get_mut(&mut region).filter(|_| !stale) else {
            db.free.push(id);
            return None;
        };
        made.page_id = mapping_id(db, &made.key);
        for (page, granules) in region.pages() {
            let info = db.pages.entry(page).or_default();
            info.regions.push(id);
            info.granules |= granules;
        }
        if let Some(code) = region.host() {
            db.segments.entry(code.segment).or_default().push(id);
        }
        if let Some(slot) = db.slots.get_mut(id as usize) {
            *slot = Slot { region: Some(Arc::clone(&region)), incoming: NO_LINK };
        }
        self.ids.store(db.ids.len() as u32, Ordering::Relaxed);
        db.live += 1;
        self.table.insert(&region);
        Some(region)
    }

    /// Makes link `index` of region `source` jump to `target`, if both are alive and it may.
    pub fn link(&self, source: u32, index: u32, target: &Region) -> bool {
        let Some(cache) = &self.cache else { return false };
        let db = &mut *self.db.lock();
        if !target.chain || target.dead.load(Ordering::Relaxed) {
            return false;
        }
        let Some(from) = db.slots.get(source as usize).and_then(|s| s.region.clone()) else { return false };
        let (Some(code), Some(to)) = (from.host(), target.host()) else { return false };
        let Some(link) = code.links.get(index as usize).filter(|l| l.site.target_pc == target.key.pc) else {
            return false;
        };
        let site = &link.site;
        // A link to a region that needs two pages would not notice that the second one is mapped elsewhere.
        let dead = from.dead.load(Ordering::Relaxed);
        if dead || from.key.mode != target.key.mode {
            return false;
        }
        if target.second != crate::table::NO_PAGE {
            cache.defer(site, code.offset);
            return false;
        }
        let same_page = (from.key.phys ^ target.key.phys) >> 12 == 0;
        if site.kind == LinkKind::SamePage && !same_page {
            return false;
        }
        let distance = to.offset as i64 - code.offset as i64;
        if !cache.link(site, code.offset, distance, target.page_id) {
            return false;
        }
        let old = link.to.load(Ordering::Relaxed);
        if old != target.id {
            let me = link_id(source, index);
            take_off(db, old, me);
            put_on(db, target.id, me);
        }
        true
    }

    /// Takes out the regions that were made from any of `len` bytes at `gpa`. `post` is called with them.
    pub fn invalidate(&self, phys: &PhysMemory, gpa: u64, len: u64, post: Post<'_>) -> usize {
        let db = &mut *self.db.lock();
        let mut killed = Vec::new();
        let write = self.writes.fetch_add(1, Ordering::SeqCst) + 1;
        let last = gpa.saturating_add(len.max(1) - 1);
        for page in gpa / PAGE_SIZE..=last / PAGE_SIZE {
            let first_byte = gpa.max(page * PAGE_SIZE) % PAGE_SIZE;
            let last_byte = last.min(page * PAGE_SIZE + (PAGE_SIZE - 1)) % PAGE_SIZE;
            let touched = (u64::MAX << (first_byte / GRANULE)) & (u64::MAX >> (63 - last_byte / GRANULE));
            let Some(info) = db.pages.get_mut(&page) else {
                forget_page_if_empty(db, phys, page);
                continue;
            };
            info.note_write(write, touched);
            if info.granules & touched != 0 {
                let hit: Vec<u32> = info.regions.clone();
                for id in hit {
                    self.kill_if(
                        db,
                        id,
                        |r| r.pages().any(|(p, g)| p == page && g & touched != 0),
                        &mut killed,
                    );
                }
                recompute(db, page);
            }
            forget_page_if_empty(db, phys, page);
        }
        self.bury(db, &killed, post);
        killed.len()
    }

    /// Takes out the regions that hold the instruction at any of these guest-virtual addresses, wherever it is mapped.
    /// `post` is called with them. Walks everything: for debuggers.
    pub fn invalidate_code_at(&self, phys: &PhysMemory, pcs: &[u64], post: Post<'_>) {
        let db = &mut *self.db.lock();
        let mut killed = Vec::new();
        let write = self.writes.fetch_add(1, Ordering::SeqCst) + 1;
        // What is being translated right now may have been built without them.
        for info in db.pages.values_mut().filter(|info| info.busy > 0) {
            info.note_write(write, u64::MAX);
        }
        let holds =
            |r: &Region| pcs.iter().any(|pc| pc.wrapping_sub(r.key.pc) < u64::from(r.guest_len.max(1)));
        for id in 0..db.slots.len() as u32 {
            let region = db.slots.get(id as usize).and_then(|s| s.region.clone());
            let Some(region) = region.filter(|r| holds(r)) else { continue };
            self.kill_if(db, id, holds, &mut killed);
            for (page, _) in region.pages() {
                recompute(db, page);
                forget_page_if_empty(db, phys, page);
            }
        }
        self.bury(db, &killed, post);
    }

    /// Takes out all regions of `segment`. `post` is called with them.
    pub fn evict(&self, phys: &PhysMemory, segment: SegmentId, post: Post<'_>) -> usize {
        let db = &mut *self.db.lock();
        let mut killed = Vec::new();
        for id in db.segments.remove(&segment).unwrap_or_default() {
            let region = db.slots.get(id as usize).and_then(|s| s.region.clone());
            let in_segment = |r: &Region| r.host().is_some_and(|c| c.segment == segment);
            self.kill_if(db, id, in_segment, &mut killed);
            for (page, _) in region.iter().flat_map(|r| r.pages()) {
                forget_page_if_empty(db, phys, page);
            }
        }
        self.bury(db, &killed, post);
        killed.len()
    }

    /// Takes out every region. `post` is called with them; mapping ids start anew, so vCPUs must forget those too.
    pub fn clear(&self, phys: &PhysMemory, post: Post<'_>) {
        let db = &mut *self.db.lock();
        let mut killed = Vec::new();
        for id in 0..db.slots.len() as u32 {
            self.kill_if(db, id, |_| true, &mut killed);
        }
        let pages: Vec<u64> = db.pages.keys().copied().collect();
        for page in pages {
            recompute(db, page);
            forget_page_if_empty(db, phys, page);
        }
        db.ids.clear();
        self.ids.store(0, Ordering::Relaxed);
        self.bury(db, &killed, post);
    }

    fn kill_if(&self, db: &mut Db, id: u32, wanted: impl Fn(&Region) -> bool, killed: &mut Vec<Killed>) {
        let Some(slot) = db.slots.get_mut(id as usize) else { return };
        let Some(region) = slot.region.clone().filter(|r| !r.dead.load(Ordering::Relaxed) && wanted(r))
        else {
            return;
        };
        region.dead.store(true, Ordering::SeqCst);
        self.table.remove(&region);
        let mut at = std::mem::replace(&mut slot.incoming, NO_LINK);
        while let Some((link, offset)) = link_of(db, at) {
            at = link.next.swap(NO_LINK, Ordering::Relaxed);
            link.before.store(NO_LINK, Ordering::Relaxed);
            link.to.store(NONE, Ordering::Relaxed);
            if let Some(cache) = &self.cache {
                cache.unlink(&link.site, offset);
            }
        }
        for (index, link) in region.host().iter().flat_map(|c| c.links.iter()).enumerate() {
            let target = link.to.swap(NONE, Ordering::Relaxed);
            take_off(db, target, link_id(id, index as u32));
        }
        for (page, _) in region.pages() {
            if let Some(info) = db.pages.get_mut(&page) {
                info.regions.retain(|r| *r != id);
            }
        }
        killed.push(Killed { pc: region.key.pc, entry: region.entry() });
        db.live -= 1;
        // The epoch is filled in when all of the batch are unlinked.
        db.limbo.push_back((u64::MAX, id));
    }

    /// Dates the regions that were just taken out. The vCPUs are told before: one that enters the new epoch has to see
    /// at that safe point that it must forget them.
    fn bury(&self, db: &mut Db, killed: &[Killed], post: Post<'_>) {
        if killed.is_empty() {
            return;
        }
        post(killed);
        let epoch = self.epochs.advance();
        for entry in db.limbo.iter_mut().rev().take_while(|(e, _)| *e == u64::MAX) {
            entry.0 = epoch;
        }
    }

    /// What the regions `first`, and those that they are linked to, directly or through others, are translations of: the
    /// nearest first, at most `most`.
    pub fn reached_from(&self, first: impl Iterator<Item = u32>, most: usize) -> Vec<Key> {
        let db = self.db.lock();
        let (mut seen, mut queue) = (vec![false; db.slots.len()], VecDeque::new());
        let mut keys = Vec::new();
        let mut reach = |id: u32, queue: &mut VecDeque<u32>| {
            if let Some(seen) = seen.get_mut(id as usize).filter(|seen| !**seen) {
                *seen = true;
                queue.push_back(id);
            }
        };
        first.for_each(|id| reach(id, &mut queue));
        while let Some(id) = queue.pop_front().filter(|_| keys.len() < most) {
            let Some(region) = db.slots.get(id as usize).and_then(|slot| slot.region.as_ref()) else {
                continue;
            };
            if region.dead.load(Ordering::Relaxed) || !region.chain || region.second != crate::table::NO_PAGE
            {
                continue;
            }
            keys.push(region.key);
            region
                .host()
                .iter()
                .flat_map(|code| code.links.iter())
                .for_each(|link| reach(link.to.load(Ordering::Relaxed), &mut queue));
        }
        keys
    }

    /// Counts what is there. Walks everything: for humans.
    pub fn counts(&self) -> RegionCounts {
        let db = self.db.lock();
        let mut c = RegionCounts { live: db.live, pages: db.pages.len() as u64, ..RegionCounts::default() };
        for slot in &db.slots {
            let Some(region) = slot.region.as_ref().filter(|r| !r.dead.load(Ordering::Relaxed)) else {
                continue;
            };
            let links = region.host().map_or(&[][..], |code| &code.links);
            c.links += links.len() as u64;
            c.linked += links.iter().filter(|l| l.to.load(Ordering::Relaxed) != NONE).count() as u64;
            c.guest_bytes += u64::from(region.guest_len);
            c.insns += u64::from(region.insns);
            c.host_bytes += region.host().map_or(0, |h| u64::from(h.len));
        }
        c
    }

    /// True when mapping ids have run out: everything has to be taken out once.
    pub fn ids_exhausted(&self) -> bool {
        self.ids.load(Ordering::Relaxed) >= MAX_MAPPING_ID - 1
    }
}

/// Link `index` of region `source` as [`Link::next`] names it.
fn link_id(source: u32, index: u32) -> u64 {
    u64::from(source) << 32 | u64::from(index)
}

/// The link of that name, and where its region's code is.
fn link_of(db: &Db, id: u64) -> Option<(&Link, usize)> {
    let code = db.slots.get((id >> 32) as usize)?.region.as_ref()?.host()?;
    Some((code.links.get(id as u32 as usize)?, code.offset))
}

/// Takes link `id` off the list of those that jump to region `target`, where it is if that is a region.
fn take_off(db: &mut Db, target: u32, id: u64) {
    if target == NONE {
        return;
    }
    let Some((me, _)) = link_of(db, id) else { return };
    let next = me.next.swap(NO_LINK, Ordering::Relaxed);
    let before = me.before.swap(NO_LINK, Ordering::Relaxed);
    if let Some((link, _)) = link_of(db, next) {
        link.before.store(before, Ordering::Relaxed);
    }
    if let Some((link, _)) = link_of(db, before) {
        link.next.store(next, Ordering::Relaxed);
    } else if let Some(slot) = db.slots.get_mut(target as usize) {
        slot.incoming = next;
    }
}

/// Puts link `id`, which is on no list, on that of those that jump to region `target`.
fn put_on(db: &mut Db, target: u32, id: u64) {
    let Some(slot) = db.slots.get_mut(target as usize) else { return };
    let next = std::mem::replace(&mut slot.incoming, id);
    if let Some((link, _)) = link_of(db, next) {
        link.before.store(id, Ordering::Relaxed);
    }
    if let Some((me, _)) = link_of(db, id) {
        me.to.store(target, Ordering::Relaxed);
        me.next.store(next, Ordering::Relaxed);
    }
}

/// The mapping id of the page that `key` lies in; 0 when they have run out.
fn mapping_id(db: &mut Db, key: &Key) -> u32 {
    let next = db.ids.len() as u32 + 1;
    if next > MAX_MAPPING_ID {
        return 0;
    }
    *db.ids.entry((key.pc >> 12, key.phys >> 12, key.mode)).or_insert(next)
}

fn recompute(db: &mut Db, page: u64) {
    let Some(info) = db.pages.get(&page) else { return };
    let regions = info.regions.iter().filter_map(|id| db.slots.get(*id as usize)?.region.as_ref());
    let granules = regions.flat_map(|r| r.pages()).filter(|(p, _)| *p == page).fold(0, |all, (_, g)| all | g);
    if let Some(info) = db.pages.get_mut(&page) {
        info.granules = granules;
    }
}

fn forget_page_if_empty(db: &mut Db, phys: &PhysMemory, page: u64) {
    if db.pages.get(&page).is_none_or(|p| p.regions.is_empty() && p.busy == 0) {
        db.pages.remove(&page);
        if let Some(at) = phys.find(page * PAGE_SIZE, PAGE_SIZE) {
            at.block.tracker.clear_code(at.offset / PAGE_SIZE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Body;
    use holdfast_memory::GuestMemory;
    use vm_memory::GuestAddress;

    fn phys() -> PhysMemory {
        PhysMemory::new(&GuestMemory::from_ranges(&[(GuestAddress(0), 0x4000)]).expect("RAM"))
    }

    #[test]
    fn nobody_reads_code_from_a_page_before_all_stores_to_it_are_noticed() {
        let (regions, phys) = (Regions::new(2, None), phys());
        let is_code = || phys.find(0x1000, 1).is_some_and(|at| at.block.tracker.is_code(1));
        assert_eq!(regions.begin_page(&phys, 1), Begin::Guard);
        assert!(is_code(), "stores are reported from now on");
        assert_eq!(regions.begin_page(&phys, 1), Begin::Wait, "although the page is marked by now");
        assert!(!regions.is_guarded(1));
        regions.guarded(1);
        assert!(regions.is_guarded(1));
        assert_eq!(regions.begin_page(&phys, 1), Begin::Ready);
        for _ in 0..3 {
            assert!(is_code());
            regions.end_page(&phys, 1);
        }
        assert!(!is_code(), "nothing came of it");
        assert_eq!(regions.begin_page(&phys, 1), Begin::Guard, "vCPUs may write it unnoticed again");
    }

    #[test]
    fn a_write_makes_only_those_translations_void_that_began_before_it() {
        let (regions, phys) = (Regions::new(2, None), phys());
        let begin = || {
            regions.begin_page(&phys, 1);
            regions.writes()
        };
        let publish = |since: u64| {
            let key = Key { phys: 0x1000, pc: 0x1000, mode: 0 };
            let mut region = Region::new(regions.reserve_id(), key, Body::Ir(Box::default()));
            region.granules[0] = 1;
            region.since = since;
            regions.publish(region).is_some()
        };
        let early = begin();
        regions.invalidate(&phys, 0x1000, 8, &|_| {});
        // The page is busy all the time, as when several vCPUs try again and again.
        let late = begin();
        assert!(!publish(early), "read before the write, perhaps");
        assert!(publish(late));
        for n in 0..20 {
            regions.invalidate(&phys, 0x1000 + 64 * (n % 2), 8, &|_| {});
        }
        assert!(!publish(late));
        let last = begin();
        regions.invalidate(&phys, 0x1040, 8, &|_| {});
        assert!(publish(last), "another granule");
        for _ in 0..3 {
            regions.end_page(&phys, 1);
        }
    }

    #[test]
    fn vcpus_are_told_of_dead_regions_before_the_next_epoch() {
        let (regions, phys) = (Regions::new(1, None), phys());
        regions.begin_page(&phys, 2);
        let key = Key { phys: 0x2000, pc: 0x2000, mode: 0 };
        let mut region = Region::new(regions.reserve_id(), key, Body::Ir(Box::default()));
        region.granules[0] = 1;
        assert!(regions.publish(region).is_some());
        regions.end_page(&phys, 2);
        let epoch = regions.epochs.advance();
        let told = std::cell::Cell::new(None);
        let post = |killed: &[Killed]| told.set(Some((killed.len(), regions.epochs.advance())));
        assert_eq!(regions.invalidate(&phys, 0x2040, 8, &post), 0, "another granule");
        assert_eq!(told.get(), None);
        assert_eq!(regions.invalidate(&phys, 0x2000, 8, &post), 1);
        assert_eq!(told.get(), Some((1, epoch + 1)), "in the epoch in which it was taken out");
        assert_eq!(regions.epochs.advance(), epoch + 3, "which ended after that");
    }
}
