//! Regions by physical pc, and the table that finds them without a lock.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use holdfast_tcg_ir as ir;
use holdfast_tcg_x64::LinkSite;

use crate::cache::SegmentId;
use crate::hash::mix;

/// No second page.
pub const NO_PAGE: u64 = u64::MAX;
/// Bytes of the granules in which stores are compared with regions.
pub const GRANULE: u64 = 64;

/// What makes two regions the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Guest-physical address of the first instruction.
    pub phys: u64,
    /// Guest-virtual address of the first instruction.
    pub pc: u64,
    /// Mode key, with the runtime's own bits.
    pub mode: u32,
}

impl Key {
    fn hash(&self) -> u64 {
        mix(mix(u64::from(self.mode), self.phys), self.pc)
    }
}

/// A region in a form that runs.
#[derive(Debug)]
pub enum Body {
    /// Host code.
    Host(HostCode),
    /// IR, to be interpreted.
    Ir(Box<ir::Region>),
}

/// Where a region's host code is.
#[derive(Debug)]
pub struct HostCode {
    /// Address at which it is entered.
    pub entry: u64,
    /// Offset in the code cache.
    pub offset: usize,
    /// Bytes.
    pub len: u32,
    /// The segment it lies in.
    pub segment: SegmentId,
    /// Direct jumps.
    pub links: Box<[Link]>,
}

/// No link: see [`Link::next`].
pub const NO_LINK: u64 = u64::MAX;

/// A direct jump of a region, and where it is linked to. What changes is changed under the lock of the region data base.
#[derive(Debug)]
pub struct Link {
    /// The jump.
    pub site: LinkSite,
    /// Number of the region that it goes to, or `u32::MAX`.
    pub to: AtomicU32,
    /// The next of the links to the same region: number of the region it is in and, in the lower half, its index there; or
    /// [`NO_LINK`].
    pub next: AtomicU64,
    /// The one before it, or [`NO_LINK`].
    pub before: AtomicU64,
}

impl Link {
    /// A jump that is not linked.
    pub fn new(site: &LinkSite) -> Self {
        Self {
            site: *site,
            to: AtomicU32::new(u32::MAX),
            next: AtomicU64::new(NO_LINK),
            before: AtomicU64::new(NO_LINK),
        }
    }
}

/// A translated region. Immutable once published, but for what is atomic.
///
/// What a lookup reads is in one cache line: where many processes come and go, most regions that are looked up are in no near cache.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Region {
    /// What it is the translation of.
    pub key: Key,
    next: AtomicPtr<Region>,
    /// The guest-physical page that its last instruction runs into, or [`NO_PAGE`].
    pub second: u64,
    entry: u64,
    /// Number, used by the code's link requests.
    pub id: u32,
    /// Mapping id of its page for guarded links.
    pub page_id: u32,
    /// It was invalidated: do not enter it again.
    pub dead: AtomicBool,
    /// False if nothing may jump to it directly.
    pub chain: bool,
    /// Its accesses share no probes.
    pub unshared: bool,
    /// The 64-byte granules of the first and the second page that it was made from, a bit each.
    pub granules: [u64; 2],
    /// How many writes of code there had been when it was begun.
    pub since: u64,
    /// Guest instructions.
    pub insns: u32,
    /// Basic blocks.
    pub blocks: u32,
    /// Guest bytes.
    pub guest_len: u32,
    /// The translation.
    pub body: Body,
}

const _: () = assert!(std::mem::offset_of!(Region, granules) <= 64);

impl Region {
    /// A region that is not in any table yet.
    pub fn new(id: u32, key: Key, body: Body) -> Self {
        let entry = match &body {
            Body::Host(code) => code.entry,
            Body::Ir(_) => 0,
        };
        Self {
            id,
            key,
            entry,
            second: NO_PAGE,
            granules: [0; 2],
            since: 0,
            page_id: 0,
            insns: 0,
            blocks: 0,
            guest_len: 0,
            chain: true,
            unshared: false,
            body,
            dead: AtomicBool::new(false),
            next: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// Address at which its code is entered; 0 for IR.
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// Its host code.
    pub fn host(&self) -> Option<&HostCode> {
        match &self.body {
            Body::Host(code) => Some(code),
            Body::Ir(_) => None,
        }
    }

    /// The guest-physical pages that it was made from.
    pub fn pages(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let first = (self.key.phys >> 12, self.granules[0]);
        let second = (self.second, self.granules[1]);
        [first, second].into_iter().filter(|(page, _)| *page != NO_PAGE)
    }
}

/// Number of chains.
const BUCKETS: usize = 1 << 16;

/// Finds regions without a lock. Chains are changed by one thread at a time (under the lock of the region
/// data base); regions that were taken out live on until every vCPU has passed a safe point.
#[derive(Debug)]
pub struct Table {
    buckets: Box<[AtomicPtr<Region>]>,
}

impl Table {
    /// An empty table.
    pub fn new() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicPtr::new(ptr::null_mut())).collect() }
    }

    fn bucket(&self, key: &Key) -> &AtomicPtr<Region> {
        &self.buckets[(key.hash() >> 32) as usize % BUCKETS]
    }

    /// The region for `key`.
    ///
    /// # Safety
    /// The caller has entered an epoch ([`crate::epoch::Epochs::enter`]) and uses the reference only
    /// until its next safe point.
    pub unsafe fn find<'a>(&self, key: &Key) -> Option<&'a Region> {
        let mut at = self.bucket(key).load(Ordering::Acquire);
        // SAFETY: pointers in chains are to regions that are kept alive for the caller's epoch.
        while let Some(region) = unsafe { at.as_ref() } {
            if region.key == *key && !region.dead.load(Ordering::Relaxed) {
                return Some(region);
            }
            at = region.next.load(Ordering::Acquire);
        }
        None
    }

    /// Adds a region. One thread at a time.
    pub fn insert(&self, region: &Arc<Region>) {
        let head = self.bucket(&region.key);
        region.next.store(head.load(Ordering::Relaxed), Ordering::Relaxed);
        head.store(Arc::as_ptr(region).cast_mut(), Ordering::Release);
    }

    /// Takes a region out. One thread at a time. Readers that are at it go on from it.
    pub fn remove(&self, region: &Arc<Region>) {
        let mut link = self.bucket(&region.key);
        loop {
            let at = link.load(Ordering::Relaxed);
            // SAFETY: regions in chains are alive, and only this thread changes chains.
            let Some(found) = (unsafe { at.as_ref() }) else { return };
            if ptr::eq(found, Arc::as_ptr(region)) {
                link.store(found.next.load(Ordering::Relaxed), Ordering::Release);
                return;
            }
            link = &found.next;
        }
    }
}
