//! Which code runs, so that it can be translated elsewhere before it runs there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use holdfast_memory::PAGE_SIZE;

use crate::table::Key;
use crate::vcpu::{KEY_STEP, TcgVcpu, VcpuCore};
use crate::vm::TcgVm;

/// How many regions of a vCPU are noted.
const NOTED: usize = 4096;

/// A place in guest code at which a translation begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CodePlace {
    /// Guest-physical address.
    pub gpa: u64,
    /// Guest-virtual address, at the same place of its page.
    pub pc: u64,
    /// [`crate::guest::Mode::key`].
    pub mode: u32,
}

/// The regions that a vCPU was last given by the runtime: those that its own caches did not know, or not any more.
#[derive(Debug)]
pub(crate) struct Recent {
    ids: Box<[AtomicU32]>,
    next: AtomicUsize,
    /// What was noted before this one is of no interest.
    begun: AtomicUsize,
}

impl Recent {
    /// None yet.
    pub fn new() -> Self {
        let ids = (0..NOTED).map(|_| AtomicU32::new(u32::MAX)).collect();
        Self { ids, next: AtomicUsize::new(0), begun: AtomicUsize::new(0) }
    }

    /// What was noted so far is of no interest any more.
    fn begin(&self) {
        self.begun.store(self.next.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// The vCPU is given region `id`. Only its own thread calls this.
    #[inline]
    pub fn note(&self, id: u32) {
        let next = self.next.load(Ordering::Relaxed);
        if let Some(place) = self.ids.get(next % NOTED) {
            place.store(id, Ordering::Relaxed);
        }
        self.next.store(next.wrapping_add(1), Ordering::Relaxed);
    }

    /// Their numbers, the last one first, some more than once. Numbers are used again: some may mean another region by now.
    fn latest(&self) -> Vec<u32> {
        let next = self.next.load(Ordering::Relaxed);
        let count = next.wrapping_sub(self.begun.load(Ordering::Relaxed)).min(NOTED);
        let at = |back: usize| self.ids.get(next.wrapping_sub(back) % NOTED);
        (1..=count).filter_map(at).map(|id| id.load(Ordering::Relaxed)).collect()
    }
}

impl TcgVm {
    /// Notes from now on which code runs.
    pub fn note_running_code(&self) {
        for vcpu in self.vcpus() {
            vcpu.recent.begin();
            // What its caches know would not be noted.
            vcpu.forget_everything();
        }
    }

    /// Where translations begin that have run since [`TcgVm::note_running_code`], and those that they jump to, the
    /// likeliest first: `most` at most.
    pub fn running_code(&self, most: usize) -> Vec<CodePlace> {
        let noted: Vec<Vec<u32>> = self.vcpus().iter().map(|vcpu| vcpu.recent.latest()).collect();
        let longest = noted.iter().map(Vec::len).max().unwrap_or_default();
        let first = (0..longest).flat_map(|n| noted.iter().filter_map(move |ids| ids.get(n).copied()));
        let place = |key: Key| CodePlace { gpa: key.phys, pc: key.pc, mode: key.mode };
        self.regions.reached_from(first, most).into_iter().map(place).collect()
    }
}

impl VcpuCore {
    /// Translates the code at `place` unless that has been done. Whatever is wrong with it, nothing comes of it.
    fn translate_place(&mut self, place: &CodePlace) -> bool {
        let apart = !(place.gpa ^ place.pc).is_multiple_of(PAGE_SIZE);
        let aligned = place.pc.is_multiple_of(u64::from(self.guest.spec().insn_align.max(1)));
        if apart || !aligned || place.mode & KEY_STEP != 0 || self.vm.regions.ids_exhausted() {
            return false;
        }
        let key = Key { phys: place.gpa, pc: place.pc, mode: place.mode };
        // SAFETY: the caller has entered an epoch, and the region is not used.
        let known = unsafe { self.vm.regions.find(&key) }.is_some();
        !known && matches!(self.translate(key), Ok(Some(_)))
    }
}

impl TcgVcpu {
    /// Translates the code at `places`, as far as RAM and ROM have it, for as long as `go_on` says so; returns how many
    /// translations came of it. The vCPU must not be running; its state does not matter.
    pub fn translate_ahead(&mut self, places: &[CodePlace], go_on: &dyn Fn() -> bool) -> usize {
        let core = self.core();
        let vm = Arc::clone(&core.vm);
        core.remap();
        core.ahead = true;
        let mut made = 0;
        for place in places.iter().take_while(|_| go_on()) {
            // Others may wait for this one to pass a safe point.
            vm.regions.epochs.enter(core.shared.index());
            made += usize::from(core.translate_place(place));
        }
        core.ahead = false;
        core.failure = None;
        vm.counts.ahead.fetch_add(made as u64, Ordering::Relaxed);
        vm.regions.epochs.leave(core.shared.index());
        made
    }
}
