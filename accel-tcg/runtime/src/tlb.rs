//! The soft TLB behind the inline probes.
//!
//! The arrays that translated code probes live in the `Env`. Here are what fills and flushes them, a
//! victim array behind each, and the translations of code pages. Flushing everything or one address space
//! is a new generation number; entries of other address spaces keep theirs and match again later.

use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_tcg_ir::env::{
    GEN_MAX, GEN_SHIFT, IBTC_ENTRIES, IBTC_SECOND, IbtcEntry, MMU_MODES, PAGE_IDS, TLB_SLOW, ibtc_index,
    page_id_entry, page_id_index, tlb_index, tlb_tag,
};

use crate::env::EnvBox;
use crate::guest::{Flush, Mode, Translation};
use crate::hash::{Map, mix};
use crate::large::LargePages;
use crate::regions::Killed;

/// Entries of each victim array.
const VICTIMS: usize = 8;
/// Entries of the code TLB.
const CODE_ENTRIES: usize = 512;
/// Words of the filter of pages with entries in the indirect-branch cache.
const FILTER: usize = 64;
/// Bits of a page offset, with generation and flags, in a tag.
const LOW: u64 = 0xfff;
/// Pages taken out of the indirect-branch cache one by one before all of it is forgotten, and the filter with it: a
/// filter that only fills up lets every flush of a page search the cache.
const BRANCH_SEARCHES: u32 = 64;
/// Counts of invalidation in the key of the indirect-branch cache before it is emptied.
const IBTC_EPOCHS: u64 = 1 << 20;

/// A translated code page.
#[derive(Debug, Clone, Copy, Default)]
pub struct CodeEntry {
    /// Guest-virtual page with the generation in its low bits; 0: empty.
    tag: u64,
    /// MMU index it was fetched with.
    idx: u8,
    /// Guest-physical page address.
    pub gpa: u64,
    /// Mapped alike in every address space.
    pub global: bool,
}

/// A TLB entry as the runtime handles it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Entry {
    /// As in [`holdfast_tcg_ir::env::TlbEntry`].
    pub tag: u64,
    /// Host address minus guest-virtual, or, in slow entries, guest-physical minus guest-virtual.
    pub addend: u64,
}

#[derive(Debug, Clone, Default)]
struct Victims {
    entries: [Entry; VICTIMS],
    next: usize,
}

/// What the TLB counted, for `info jit`.
#[derive(Debug, Default)]
pub struct TlbCounts {
    /// Refills by page walk.
    pub fills: AtomicU64,
    /// Refills from a victim array.
    pub victims: AtomicU64,
    /// Flushes of everything.
    pub flushes: AtomicU64,
    /// Flushes of an address space.
    pub space_flushes: AtomicU64,
    /// Flushes of one page that had to be one of all, for it may lie in a large page.
    pub large_flushes: AtomicU64,
    /// Flushes of one page.
    pub page_flushes: AtomicU64,
    /// Times all of the indirect-branch cache was forgotten.
    pub branch_flushes: AtomicU64,
    /// Times the generation numbers ran out.
    pub wraps: AtomicU64,
}

/// Adds to a counter that one thread writes.
#[inline]
pub fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

/// One vCPU's TLB state outside its `Env`.
#[derive(Debug)]
pub struct Tlb {
    generation: u64,
    next_generation: u64,
    space: u64,
    spaces: Map<u64, u64>,
    mode_key: u32,
    ibtc_epoch: u64,
    /// Mode keys under which code was run that is not mapped alike in all address spaces.
    local_modes: Vec<u32>,
    /// The bits of all of them, see [`local_bit`].
    local_filter: u64,
    /// What the current mode's entries of the indirect-branch cache carry.
    ibtc_key: u64,
    /// Pages that entries of the indirect-branch cache lie in, by hash.
    filter: [u64; FILTER],
    /// Pages that entries run into from the page before, by hash.
    crossings: [u64; FILTER],
    /// Searches of the indirect-branch cache since all of it was forgotten.
    searches: u32,
    victims: Vec<Victims>,
    code: Box<[CodeEntry]>,
    /// MMU indexes that have had entries.
    used: u8,
    /// Large pages since the last full flush.
    large: LargePages,
    pc_shift: u32,
}

/// The bit of a mode key in the filter of those that are local.
#[inline]
fn local_bit(key: u32) -> u64 {
    1 << (mix(0, u64::from(key)) & 63)
}

impl Tlb {
    /// An empty TLB.
    pub fn new(pc_shift: u32) -> Self {
        Self {
            generation: 1,
            next_generation: 2,
            space: 0,
            spaces: [(0, 1)].into_iter().collect(),
            mode_key: 0,
            ibtc_epoch: 1,
            local_modes: Vec::new(),
            local_filter: 0,
            ibtc_key: 0,
            filter: [0; FILTER],
            crossings: [0; FILTER],
            searches: 0,
            victims: vec![Victims::default(); MMU_MODES],
            code: vec![CodeEntry::default(); CODE_ENTRIES].into_boxed_slice(),
            used: 0,
            large: LargePages::default(),
            pc_shift,
        }
    }

    /// The current generation as tags have it.
    #[inline]
    pub fn gen_tag(&self) -> u64 {
        self.generation << GEN_SHIFT
    }

    /// Publishes generation and key of the indirect-branch cache. While a mode (a kernel's) runs nothing but
    /// global mappings, its key holds no generation, and its entries outlive changes of the address space.
    #[inline]
    fn publish(&mut self, env: &EnvBox) {
        let generation = if self.is_local(self.mode_key) { self.generation } else { 0 };
        self.ibtc_key = generation | u64::from(self.mode_key) << 11 | self.ibtc_epoch << 43;
        env.set_keys(self.gen_tag(), self.ibtc_key);
    }

    /// Code is run under `key` that is not mapped alike in all address spaces.
    #[inline]
    fn is_local(&self, key: u32) -> bool {
        // The kernel's modes, between which is switched most often, mostly are not.
        self.local_filter & local_bit(key) != 0 && self.local_modes.contains(&key)
    }

    /// Switches to the mode key `key` of the same address space.
    #[inline]
    pub fn set_key(&mut self, env: &EnvBox, key: u32) {
        self.mode_key = key;
        self.publish(env);
    }

    /// Switches to `mode` with the mode key `key`.
    #[inline]
    pub fn set_mode(&mut self, env: &EnvBox, mode: Mode, key: u32, counts: &TlbCounts) {
        self.mode_key = key;
        if mode.space != self.space {
            self.space = mode.space;
            self.generation = match self.spaces.get(&mode.space) {
                Some(known) => *known,
                None => self.fresh(env, counts),
            };
        }
        self.publish(env);
    }

    /// A new generation for the current space.
    fn fresh(&mut self, env: &EnvBox, counts: &TlbCounts) -> u64 {
        if self.next_generation > GEN_MAX {
            count(&counts.wraps);
            self.wipe(env);
        }
        let fresh = self.next_generation;
        self.next_generation += 1;
        self.generation = fresh;
        self.spaces.insert(self.space, fresh);
        fresh
    }

    /// Empties all arrays and starts counting generations again.
    fn wipe(&mut self, env: &EnvBox) {
        env.clear_tables();
        self.victims.fill(Victims::default());
        self.code.fill(CodeEntry::default());
        self.spaces.clear();
        self.clear_filters();
        self.next_generation = 1;
        self.large.clear();
    }

    /// Forgets entries.
    pub fn flush(&mut self, env: &EnvBox, what: Flush, counts: &TlbCounts) {
        match what {
            Flush::All => self.flush_all(env, counts),
            Flush::Space(space) => self.flush_space(env, space, counts),
            Flush::Page(va) => self.flush_page(env, va, None, counts),
            Flush::PageInSpace(va, space) => self.flush_page(env, va, Some(space), counts),
        }
    }

    fn flush_all(&mut self, env: &EnvBox, counts: &TlbCounts) {
        count(&counts.flushes);
        self.spaces.clear();
        self.large.clear();
        self.fresh(env, counts);
        self.local_modes.clear();
        self.local_filter = 0;
        self.forget_branches(env, counts);
    }

    fn flush_space(&mut self, env: &EnvBox, space: u64, counts: &TlbCounts) {
        count(&counts.space_flushes);
        if space == self.space {
            self.fresh(env, counts);
            self.publish(env);
        } else {
            self.spaces.remove(&space);
        }
    }

    fn flush_page(&mut self, env: &EnvBox, va: u64, space: Option<u64>, counts: &TlbCounts) {
        if self.large.may_hold(va) {
            count(&counts.large_flushes);
            return match space {
                Some(space) => self.flush_space(env, space, counts),
                None => self.flush_all(env, counts),
            };
        }
        count(&counts.page_flushes);
        let page = va & !LOW;
        for idx in (0..MMU_MODES as u8).filter(|i| self.used >> i & 1 != 0) {
            for write in [false, true] {
                let (tag, _) = env.tlb(idx, write, tlb_index(va));
                let old = tag.load(Ordering::Relaxed);
                if old != 0 && old & !LOW == page {
                    tag.store(0, Ordering::Relaxed);
                }
            }
            for victim in &mut self.victims[idx as usize % MMU_MODES].entries {
                if victim.tag & !LOW == page {
                    *victim = Entry::default();
                }
            }
        }
        self.code[(va >> 12) as usize % CODE_ENTRIES] = CodeEntry::default();
        env.set_page_id(page_id_index(va), 0);
        let (word, bit) = filter_bit(page);
        let (here, before) = (self.filter[word] & bit != 0, self.crossings[word] & bit != 0);
        if !here && !before {
            return;
        }
        self.searches += 1;
        if self.searches > BRANCH_SEARCHES {
            return self.forget_branches(env, counts);
        }
        if here {
            self.forget_branches_of(env, page);
        }
        if before {
            self.forget_branches_of(env, page.wrapping_sub(0x1000));
        }
    }

    /// Takes the entries of one page out of the indirect-branch cache.
    fn forget_branches_of(&self, env: &EnvBox, page: u64) {
        for pc in (page..=page | LOW).step_by(1 << self.pc_shift) {
            let n = ibtc_index(pc, self.pc_shift);
            if env.ibtc(n).pc & !LOW == page {
                env.set_ibtc(n, IbtcEntry::default());
            }
        }
    }

    fn clear_filters(&mut self) {
        self.filter = [0; FILTER];
        self.crossings = [0; FILTER];
        self.searches = 0;
    }

    /// Makes all entries of the indirect-branch cache miss.
    pub fn forget_branches(&mut self, env: &EnvBox, counts: &TlbCounts) {
        count(&counts.branch_flushes);
        self.ibtc_epoch += 1;
        self.clear_filters();
        if self.ibtc_epoch == IBTC_EPOCHS {
            self.ibtc_epoch = 1;
            for n in 0..IBTC_ENTRIES {
                env.set_ibtc(n, IbtcEntry::default());
            }
        }
        self.publish(env);
    }

    /// Makes all entries of the indirect-branch cache and all mapping ids miss.
    pub fn forget_links(&mut self, env: &EnvBox, counts: &TlbCounts) {
        for n in 0..PAGE_IDS {
            env.set_page_id(n, 0);
        }
        self.forget_branches(env, counts);
    }

    /// Takes regions that are no more out of the indirect-branch cache.
    pub fn forget_regions(&mut self, env: &EnvBox, killed: &[Killed], counts: &TlbCounts) {
        if killed.len() > 256 {
            return self.forget_branches(env, counts);
        }
        for k in killed {
            let index = ibtc_index(k.pc, self.pc_shift);
            for index in [index, index ^ IBTC_SECOND] {
                if env.ibtc(index).code == k.entry {
                    env.set_ibtc(index, IbtcEntry::default());
                }
            }
        }
    }

    /// Enters a region in the indirect-branch cache. `second`: it runs into the next page. `global`: all of it is
    /// mapped alike in every address space.
    pub fn remember_branch(&mut self, env: &EnvBox, pc: u64, code: u64, (second, global): (bool, bool)) {
        if !global && !self.is_local(self.mode_key) {
            // The entries that the mode has so far match again when everything has been flushed: never.
            self.local_modes.push(self.mode_key);
            self.local_filter |= local_bit(self.mode_key);
            self.publish(env);
        }
        let index = ibtc_index(pc, self.pc_shift);
        let old = env.ibtc(index);
        if old.key == self.ibtc_key && old.pc != pc {
            env.set_ibtc(index ^ IBTC_SECOND, old);
        }
        env.set_ibtc(index, IbtcEntry { pc, key: self.ibtc_key, code, pad: 0 });
        let (word, bit) = filter_bit(pc & !LOW);
        self.filter[word] |= bit;
        if second {
            let (word, bit) = filter_bit((pc & !LOW).wrapping_add(0x1000));
            self.crossings[word] |= bit;
        }
    }

    /// Says which mapping the code page of `pc` has now.
    #[inline]
    pub fn set_page_id(&self, env: &EnvBox, pc: u64, id: u32) {
        env.set_page_id(page_id_index(pc), page_id_entry(id, self.gen_tag()));
    }

    /// The translation of the code page of `pc`, if known.
    #[inline]
    pub fn code(&self, pc: u64, idx: u8) -> Option<CodeEntry> {
        let entry = self.code[(pc >> 12) as usize % CODE_ENTRIES];
        (entry.tag == tlb_tag(pc, self.gen_tag()) && entry.idx == idx).then_some(entry)
    }

    /// Enters the translation of a code page.
    pub fn set_code(&mut self, pc: u64, idx: u8, t: &Translation) {
        self.note_large(pc, t.page_bits);
        let entry = CodeEntry { tag: tlb_tag(pc, self.gen_tag()), idx, gpa: t.gpa & !LOW, global: t.global };
        self.code[(pc >> 12) as usize % CODE_ENTRIES] = entry;
    }

    /// Notes that `va` lies in a page of `1 << bits` bytes.
    pub fn note_large(&mut self, va: u64, bits: u8) {
        if bits > 12 {
            self.large.note(va, bits);
        }
    }

    /// Looks for an entry of the current generation in the array and then among the victims, from where it
    /// returns to the array. The entry may be slow.
    #[inline]
    pub fn find(&mut self, env: &EnvBox, va: u64, idx: u8, write: bool, counts: &TlbCounts) -> Option<Entry> {
        let wanted = tlb_tag(va, self.gen_tag());
        let (tag, addend) = env.tlb(idx, write, tlb_index(va));
        let current = tag.load(Ordering::Relaxed);
        if current & !TLB_SLOW == wanted {
            return Some(Entry { tag: current, addend: addend.load(Ordering::Relaxed) });
        }
        // Write entries have no victims: a page may have become code meanwhile.
        if write {
            return None;
        }
        let set = self.victims.get_mut(idx as usize % MMU_MODES)?;
        let n = set.entries.iter().position(|e| e.tag & !TLB_SLOW == wanted)?;
        count(&counts.victims);
        let old = Entry { tag: current, addend: addend.load(Ordering::Relaxed) };
        let found = std::mem::replace(&mut set.entries[n], old);
        addend.store(found.addend, Ordering::Relaxed);
        tag.store(found.tag, Ordering::Relaxed);
        Some(found)
    }

    /// What to add to `va` for its host address, if the array has the page as RAM.
    #[inline]
    pub fn addend(&self, env: &EnvBox, va: u64, idx: u8, write: bool) -> Option<u64> {
        let (tag, addend) = env.tlb(idx, write, tlb_index(va));
        (tag.load(Ordering::Relaxed) == tlb_tag(va, self.gen_tag())).then(|| addend.load(Ordering::Relaxed))
    }

    /// True if the read array has an entry for the page of `va`.
    pub fn has_read(&self, env: &EnvBox, va: u64, idx: u8) -> bool {
        let (tag, _) = env.tlb(idx, false, tlb_index(va));
        tag.load(Ordering::Relaxed) & !TLB_SLOW == tlb_tag(va, self.gen_tag())
    }

    /// Enters a translation of the page of `va` in the array for (MMU index, writes), moving what was there to the
    /// victims. Of `entry.tag` only [`TLB_SLOW`] counts.
    pub fn insert(&mut self, env: &EnvBox, va: u64, (idx, write): (u8, bool), entry: Entry) {
        self.used |= 1 << (idx % 8);
        let (tag, place) = env.tlb(idx, write, tlb_index(va));
        let old = Entry { tag: tag.load(Ordering::Relaxed), addend: place.load(Ordering::Relaxed) };
        let new = tlb_tag(va, self.gen_tag()) | entry.tag & TLB_SLOW;
        if !write && old.tag != 0 && old.tag & !TLB_SLOW != new & !TLB_SLOW {
            let set = &mut self.victims[idx as usize % MMU_MODES];
            set.entries[set.next % VICTIMS] = old;
            set.next = set.next.wrapping_add(1);
        }
        // No probe of this thread is under way; other threads only clear tags.
        tag.store(0, Ordering::Relaxed);
        place.store(entry.addend, Ordering::Relaxed);
        tag.store(new, Ordering::Release);
    }

    /// Empties everything: mappings changed.
    pub fn reset(&mut self, env: &EnvBox, counts: &TlbCounts) {
        self.wipe(env);
        self.fresh(env, counts);
        self.publish(env);
    }

    /// The MMU indexes in use.
    pub fn used(&self) -> u8 {
        self.used
    }
}

fn filter_bit(page: u64) -> (usize, u64) {
    let hash = mix(0, page >> 12);
    ((hash >> 32) as usize % FILTER, 1 << (hash >> 58))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup() -> (EnvBox, Tlb, TlbCounts) {
        (EnvBox::new(64).expect("memory"), Tlb::new(1), TlbCounts::default())
    }

    fn mode(space: u64) -> Mode {
        Mode { space, ..Mode::default() }
    }

    #[test]
    fn an_address_space_finds_its_entries_again_until_it_is_flushed() {
        let (env, mut tlb, counts) = setup();
        tlb.set_mode(&env, mode(1), 0, &counts);
        tlb.insert(&env, 0x1234, (0, false), Entry { tag: 0, addend: 77 });
        tlb.set_mode(&env, mode(2), 0, &counts);
        assert_eq!(tlb.find(&env, 0x1234, 0, false, &counts), None);
        tlb.set_mode(&env, mode(1), 0, &counts);
        assert_eq!(tlb.find(&env, 0x1234, 0, false, &counts).map(|e| e.addend), Some(77));
        tlb.flush(&env, Flush::Space(1), &counts);
        assert_eq!(tlb.find(&env, 0x1234, 0, false, &counts), None);
    }

    #[test]
    fn conflicting_entries_survive_among_the_victims() {
        let (env, mut tlb, counts) = setup();
        tlb.set_mode(&env, mode(1), 0, &counts);
        let other = 0x1000 + ((holdfast_tcg_ir::env::TLB_ENTRIES as u64) << 12);
        tlb.insert(&env, 0x1000, (0, false), Entry { tag: 0, addend: 1 });
        tlb.insert(&env, other, (0, false), Entry { tag: TLB_SLOW, addend: 2 });
        assert_eq!(tlb.find(&env, 0x1000, 0, false, &counts).map(|e| e.addend), Some(1));
        assert_eq!(tlb.find(&env, other, 0, false, &counts).map(|e| e.addend), Some(2));
        tlb.flush(&env, Flush::Page(0x1008), &counts);
        assert_eq!(tlb.find(&env, 0x1000, 0, false, &counts), None);
        assert_eq!(tlb.find(&env, other, 0, false, &counts).map(|e| e.addend), Some(2));
    }

    #[test]
    fn flushing_an_address_in_a_large_page_flushes_all_of_it() {
        let (env, mut tlb, counts) = setup();
        tlb.set_mode(&env, mode(1), 0, &counts);
        tlb.note_large(0x20_0000, 21);
        tlb.insert(&env, 0x20_5000, (0, false), Entry { tag: 0, addend: 1 });
        tlb.flush(&env, Flush::PageInSpace(0x20_0000, 1), &counts);
        assert_eq!(tlb.find(&env, 0x20_5000, 0, false, &counts), None);
    }

    #[test]
    fn flushing_a_page_forgets_its_branches_and_those_that_run_into_it() {
        let (env, mut tlb, counts) = setup();
        tlb.set_mode(&env, mode(1), 0, &counts);
        let known = |pc: u64| env.ibtc(ibtc_index(pc, 1)).pc == pc;
        let refill = |tlb: &mut Tlb| {
            for (pc, second) in [(0x4010, false), (0x4ffe, true), (0x5020, false), (0x6030, false)] {
                tlb.remember_branch(&env, pc, 0x77, (second, true));
            }
        };
        refill(&mut tlb);
        tlb.flush(&env, Flush::Page(0x6000), &counts);
        assert!(known(0x4010) && known(0x4ffe) && known(0x5020) && !known(0x6030));
        tlb.flush(&env, Flush::Page(0x5000), &counts);
        assert!(!known(0x4ffe) && !known(0x5020));
        let key = tlb.ibtc_key;
        for _ in 0..2 * BRANCH_SEARCHES {
            refill(&mut tlb);
            tlb.flush(&env, Flush::Page(0x4123), &counts);
            assert!(!known(0x4010) || env.ibtc(ibtc_index(0x4010, 1)).key != tlb.ibtc_key);
        }
        assert_ne!(key, tlb.ibtc_key, "now and then all is forgotten");
    }

    #[test]
    fn two_branches_share_an_index_until_their_page_or_region_goes() {
        let (env, mut tlb, counts) = setup();
        tlb.set_mode(&env, mode(1), 0, &counts);
        let (a, b) = (0x4010, 0x4010 + (1 << 24));
        let index = ibtc_index(a, 1);
        assert_eq!(index, ibtc_index(b, 1));
        let known = |pc: u64| [index, index ^ IBTC_SECOND].iter().any(|n| env.ibtc(*n).pc == pc);
        let refill = |tlb: &mut Tlb| {
            for (pc, code) in [(a, 0x77), (b, 0x88), (b, 0x88)] {
                tlb.remember_branch(&env, pc, code, (false, true));
            }
            assert!(known(a) && known(b));
        };
        refill(&mut tlb);
        tlb.flush(&env, Flush::Page(a), &counts);
        assert!(!known(a) && known(b));
        refill(&mut tlb);
        tlb.forget_regions(&env, &[Killed { pc: a, entry: 0x77 }], &counts);
        assert!(!known(a) && known(b));
    }

    #[test]
    fn generations_wrap_without_reviving_old_entries() {
        let (env, mut tlb, counts) = setup();
        tlb.set_mode(&env, mode(1), 0, &counts);
        tlb.insert(&env, 0x1000, (0, true), Entry { tag: 0, addend: 1 });
        for _ in 0..3 * GEN_MAX {
            tlb.flush(&env, Flush::All, &counts);
            assert_eq!(tlb.find(&env, 0x1000, 0, true, &counts), None);
        }
        assert!(counts.wraps.load(Ordering::Relaxed) >= 2);
    }
}
