//! What a debugger wants of a vCPU: breakpoints, watchpoints, single step.
//!
//! None of it costs translated code anything when nobody asks for it. Regions end before breakpoints, and those that
//! hold one are taken out when the set changes. Pages with watchpoints have no TLB entries, so each access to them takes
//! the slow path; one that hits is not done, but run again as the only instruction of a region, behind which the
//! vCPU stops.

use std::sync::Arc;

use holdfast_memory::PAGE_SIZE;

use crate::guest::{Access, AccessKind, Flush};
use crate::vcpu::{KEY_STEP, TcgVcpu, VcpuCore};

/// Accesses that a watchpoint stops at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchKind {
    /// Loads.
    Read,
    /// Stores and atomics.
    Write,
    /// Both.
    Access,
}

/// A range of guest-virtual memory whose accesses stop the vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watchpoint {
    /// First byte.
    pub address: u64,
    /// Bytes, at least 1.
    pub len: u64,
    /// Which accesses.
    pub kind: WatchKind,
}

impl Watchpoint {
    fn last(&self) -> u64 {
        self.address.saturating_add(self.len.max(1) - 1)
    }

    fn hit_by(&self, access: &Access) -> bool {
        let kind = match self.kind {
            WatchKind::Read => access.kind == AccessKind::Read,
            WatchKind::Write => access.kind == AccessKind::Write,
            WatchKind::Access => access.kind != AccessKind::Fetch,
        };
        let last = access.gva.saturating_add(u64::from(access.size.max(1)) - 1);
        kind && access.gva <= self.last() && self.address <= last
    }

    fn in_page_of(&self, gva: u64) -> bool {
        let page = gva / PAGE_SIZE;
        self.address / PAGE_SIZE <= page && page <= self.last() / PAGE_SIZE
    }
}

/// The debugger's state of one vCPU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Debug {
    pub single_step: bool,
    /// No interrupts are taken while single-stepping.
    pub hold_interrupts: bool,
    pub breakpoints: Vec<u64>,
    pub watchpoints: Vec<Watchpoint>,
    /// The breakpoint at this pc has been reported: go past it.
    pub passed: Option<u64>,
    /// A watchpoint that the last instruction hit.
    pub hit: Option<Watchpoint>,
    /// Translated code runs: an access may be given up, to be done by its instruction alone.
    pub in_code: bool,
}

impl VcpuCore {
    /// True if interrupts wait until the debugger lets the guest run.
    pub(crate) fn holds_interrupts(&self) -> bool {
        self.debug.single_step && self.debug.hold_interrupts
    }

    /// Looks whether `access`, which found nothing in the TLB, is watched. `Some(true)`: it is not to be done now, its
    /// instruction is to be run again as the only one of a region. `Some(false)`: its page must not be cached.
    pub(crate) fn watched(&mut self, access: &Access) -> Option<bool> {
        if self.debug.watchpoints.is_empty() || access.kind == AccessKind::Fetch {
            return None;
        }
        let hit = self.debug.watchpoints.iter().find(|w| w.hit_by(access)).copied();
        let Some(hit) = hit else {
            return self.watches_page(access.gva).then_some(false);
        };
        let single = self.alone.is_some() || self.key & KEY_STEP != 0;
        if self.debug.in_code && !single {
            self.again = true;
            return Some(true);
        }
        self.debug.hit.get_or_insert(hit);
        Some(false)
    }

    /// True if the page of `gva` has watchpoints: it must be accessed piece by piece.
    pub(crate) fn watches_page(&self, gva: u64) -> bool {
        self.debug.watchpoints.iter().any(|w| w.in_page_of(gva))
    }

    /// True if the debugger wants to stop here.
    pub(crate) fn breaks(&mut self, pc: u64) -> bool {
        if self.debug.passed.take() == Some(pc) {
            return false;
        }
        self.debug.breakpoints.binary_search(&pc).is_ok()
    }
}

impl TcgVcpu {
    /// Sets single step and breakpoints. Breakpoints end regions on every vCPU, but stop this one only.
    pub fn set_debug(&mut self, single_step: bool, breakpoints: &[u64]) {
        let mut wanted = breakpoints.to_vec();
        wanted.sort_unstable();
        wanted.dedup();
        let core = self.core();
        core.debug.single_step = single_step;
        if core.debug.breakpoints != wanted {
            let old = std::mem::replace(&mut core.debug.breakpoints, wanted.clone());
            let vm = Arc::clone(&core.vm);
            vm.change_breakpoints(&old, &wanted);
        }
        core.update_mode();
    }

    /// Sets watchpoints; all that this vCPU accesses by them costs a slow path for each page that has one.
    pub fn set_watchpoints(&mut self, watchpoints: &[Watchpoint]) {
        let core = self.core();
        if core.debug.watchpoints != watchpoints {
            core.debug.watchpoints = watchpoints.to_vec();
            core.flush(Flush::All);
        }
    }

    /// Whether interrupts wait while single-stepping.
    pub fn hold_interrupts(&mut self, hold: bool) {
        self.core().debug.hold_interrupts = hold;
    }

    /// The breakpoint at which the last run ended was reported to nobody: the next run stops there again.
    pub fn rearm_breakpoint(&mut self) {
        self.core().debug.passed = None;
    }
}
