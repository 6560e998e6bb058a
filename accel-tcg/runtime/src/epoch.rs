//! When may something that vCPUs could still be using be freed?
//!
//! Every vCPU publishes the global epoch that it saw at its last safe point, or that it runs no
//! translated code at all. Something that was unlinked in epoch `e` is free once every vCPU has
//! published a later one.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use crossbeam_utils::CachePadded;

/// Runs nothing.
const QUIESCENT: u64 = u64::MAX;

/// The epochs of one VM's vCPUs.
#[derive(Debug)]
pub struct Epochs {
    global: AtomicU64,
    vcpus: Vec<CachePadded<AtomicU64>>,
}

impl Epochs {
    /// For `vcpus` vCPUs.
    pub fn new(vcpus: usize) -> Self {
        Self {
            global: AtomicU64::new(1),
            vcpus: (0..vcpus).map(|_| CachePadded::new(AtomicU64::new(QUIESCENT))).collect(),
        }
    }

    /// `vcpu` is at a safe point: it holds no pointer that it has not looked up since.
    #[inline]
    pub fn enter(&self, vcpu: u32) {
        let Some(mine) = self.vcpus.get(vcpu as usize) else { return };
        let now = self.global.load(Ordering::Relaxed);
        if mine.load(Ordering::Relaxed) != now {
            mine.store(now, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
    }

    /// `vcpu` runs no translated code until its next [`Epochs::enter`].
    pub fn leave(&self, vcpu: u32) {
        if let Some(mine) = self.vcpus.get(vcpu as usize) {
            mine.store(QUIESCENT, Ordering::Release);
        }
    }

    /// Begins a new epoch; what was unlinked before the call belongs to the one returned.
    pub fn advance(&self) -> u64 {
        self.global.fetch_add(1, Ordering::SeqCst)
    }

    /// True if `vcpu` has passed a safe point since `epoch` ended, or runs nothing.
    pub fn has_passed(&self, vcpu: u32, epoch: u64) -> bool {
        self.vcpus.get(vcpu as usize).is_none_or(|v| v.load(Ordering::SeqCst) > epoch)
    }

    /// What was unlinked in an epoch lower than this is used by no vCPU.
    pub fn passed(&self) -> u64 {
        fence(Ordering::SeqCst);
        let now = self.global.load(Ordering::SeqCst);
        self.vcpus.iter().map(|v| v.load(Ordering::SeqCst)).min().unwrap_or(QUIESCENT).min(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_free_before_the_slowest_vcpu_moved_on() {
        let epochs = Epochs::new(2);
        epochs.enter(0);
        let unlinked = epochs.advance();
        assert!(unlinked >= epochs.passed(), "vCPU 0 may still use it");
        epochs.enter(1);
        assert!(unlinked >= epochs.passed());
        epochs.leave(0);
        assert!(unlinked < epochs.passed());
        epochs.enter(0);
        assert!(unlinked < epochs.passed());
    }
}
