//! Code that is better off without shared probes.
//!
//! Accesses near each other share a probe of the TLB. Where they lie in two pages that probe fails whatever the TLB holds, and each
//! of them is made by the slow paths' stub ([`EnvHeader::retries`]), which takes many times what an inline probe does. When that
//! happens often, the code at hand is translated anew with a probe for each access.
//!
//! [`EnvHeader::retries`]: holdfast_tcg_ir::env::EnvHeader::retries

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use holdfast_clock::host_monotonic;
use holdfast_memory::PAGE_SIZE;
use holdfast_tcg_ir::MemOp;
use parking_lot::Mutex;

use crate::cpu::Cpu;
use crate::engine::EngineKind;
use crate::hash::Map;
use crate::slow::crosses;
use crate::table::GRANULE;
use crate::vcpu::VcpuCore;

/// So many accesses are made by the stub before anybody looks at what they cost. A prime, lest it is always the same one of a loop
/// at which that is.
pub const RETRIES: i32 = 1021;

/// An access that got as far as Rust counts as so many that the stub makes.
const IN_RUST: i32 = 4;

/// Nanoseconds within which [`RETRIES`] of them are too many. One takes some 10: a fifteenth of the vCPU's time.
const TOO_FAST: u64 = 150_000;

/// Pages whose code is remembered at most.
const PAGES: usize = 1024;

/// Code that is translated without shared probes: by guest-physical page number the granules of [`GRANULE`] bytes, a bit each. At
/// [`PAGES`] pages it is emptied, whatever the guest does; what was translated meanwhile stays as it is.
#[derive(Debug)]
pub struct Unshared {
    granules: Mutex<Map<u64, u64>>,
    /// Pages in there, so that most translations take no lock.
    pages: AtomicUsize,
    /// As [`TOO_FAST`].
    too_fast: AtomicU64,
}

impl Default for Unshared {
    fn default() -> Self {
        Self { granules: Mutex::default(), pages: AtomicUsize::new(0), too_fast: AtomicU64::new(TOO_FAST) }
    }
}

impl Unshared {
    /// Remembers the code at `gpa`. False if it was known.
    pub fn add(&self, gpa: u64) -> bool {
        let (page, bit) = (gpa / PAGE_SIZE, 1 << (gpa % PAGE_SIZE / GRANULE));
        let mut granules = self.granules.lock();
        if granules.len() >= PAGES && !granules.contains_key(&page) {
            granules.clear();
        }
        let of_page = granules.entry(page).or_default();
        let new = *of_page & bit == 0;
        *of_page |= bit;
        self.pages.store(granules.len(), Ordering::SeqCst);
        new
    }

    /// Whether any of these granules of guest-physical page `page` is remembered.
    pub fn holds(&self, page: u64, granules: u64) -> bool {
        self.pages.load(Ordering::SeqCst) != 0
            && self.granules.lock().get(&page).is_some_and(|known| known & granules != 0)
    }

    /// Sets the nanoseconds within which a vCPU has to make so many accesses in vain that anything is done about it.
    pub fn set_too_fast(&self, ns: u64) {
        self.too_fast.store(ns, Ordering::Relaxed);
    }
}

/// When a vCPU last had made [`RETRIES`].
#[derive(Debug, Default)]
pub struct Retries {
    last: u64,
}

impl Retries {
    /// There were [`RETRIES`] more at `now`; true if the last time was less than `too_fast` ago. All in nanoseconds.
    fn too_fast(&mut self, now: u64, too_fast: u64) -> bool {
        now.saturating_sub(std::mem::replace(&mut self.last, now)) < too_fast
    }
}

impl VcpuCore {
    /// Before an access by the slow path of the instruction at `pc`: if the TLB has all that it needs, only a shared probe brought
    /// it here. When there were many, the code is translated anew without any.
    pub(crate) fn note_retry(&mut self, va: u64, mem: MemOp, write: bool, pc: u64) {
        let bytes = mem.bytes();
        if crosses(va, bytes)
            || mem.is_aligned() && !va.is_multiple_of(u64::from(bytes))
            || self.host_at_hand(va, write, mem.mmu_idx() as u8).is_none()
            // The interpreter makes all its accesses so.
            || matches!(self.vm.engine, EngineKind::Interpreter)
        {
            return;
        }
        let left = self.shared.env().retries().saturating_sub(IN_RUST);
        self.shared.env().set_retries(if left > 0 { left } else { RETRIES });
        if left <= 0 {
            self.many_retries(pc);
        }
    }

    #[cold]
    fn many_retries(&mut self, pc: u64) {
        let too_fast = self.vm.unshared.too_fast.load(Ordering::Relaxed);
        if !self.retries.too_fast(host_monotonic(), too_fast) {
            return;
        }
        // Code that runs on and on by links need not have been fetched lately. If it is mapped elsewhere by now, nothing comes of it.
        let at_hand = self.tlb.code(pc, self.mode.fetch_idx).map(|code| code.gpa | pc & (PAGE_SIZE - 1));
        let guest = self.guest;
        let Some(gpa) = at_hand.or_else(|| guest.probe(&mut Cpu::new(self), pc)) else { return };
        if self.vm.unshared.add(gpa) {
            // As if another vCPU had stored there what is there: the code at hand runs on to its next safe point.
            self.vm.code_written(gpa, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_too_many_when_they_come_fast() {
        let mut retries = Retries::default();
        let times = [100, 150, 199, 199, 400, 449, 440];
        let found = times.map(|now| retries.too_fast(now, 50));
        assert_eq!(found, [false, false, true, true, false, true, true]);
        assert!(!retries.too_fast(440, 0), "never");
        assert!(Retries::default().too_fast(1 << 62, u64::MAX), "always");
    }

    #[test]
    fn code_is_known_by_its_granules_and_the_memory_of_it_is_bounded() {
        let unshared = Unshared::default();
        assert!(!unshared.holds(1, u64::MAX));
        assert!(unshared.add(0x1040));
        assert!(!unshared.add(0x107f), "the same granule");
        assert!(unshared.holds(1, 0b110) && !unshared.holds(1, !0b10) && !unshared.holds(2, u64::MAX));
        assert!(unshared.add(0x1fff));
        assert!(unshared.holds(1, 1 << 63) && unshared.holds(1, 0b10));
        for page in 2..=PAGES as u64 {
            assert!(unshared.add(page * PAGE_SIZE));
        }
        assert!(unshared.holds(1, 0b10), "there is room for all");
        assert!(unshared.add(0x1000), "a known page takes no more of it");
        assert!(unshared.holds(1, 0b10));
        assert!(unshared.add((PAGES as u64 + 1) * PAGE_SIZE));
        assert!(!unshared.holds(1, u64::MAX), "emptied");
        assert!(unshared.holds(PAGES as u64 + 1, 1));
    }
}
