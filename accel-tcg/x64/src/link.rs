//! Direct jumps between regions, patched while other threads run them.
//!
//! A jump on the guest's page is `jmp rel32`; it is followed only under the mapping its region was entered with:
//! ```text
//!         jmp   TARGET          ; rel32 at `jump`; first to the request stub
//! request: (sets pc, exit_arg = region_id << 32 | index; exits with exit::LINK)
//! ```
//! or `jcc rel32` alike. A jump to another page is guarded by the mapping id of the target page (see `holdfast_tcg_ir::env`):
//! ```text
//!         lea   eax, [r15 + ID<<12]               ; disp32 at `id`; first 0, which matches nothing
//!         cmp   eax, [rbp + page_ids + 4*index]
//!         jne   MISS            ; rel32 at `miss`; first to the request stub, then to the lookup stub
//!         jmp   TARGET          ; rel32 at `jump`; first to the request stub
//! lookup: (sets pc; jumps through the indirect-branch cache)
//! ```
//! All patched fields are aligned to four bytes, so a thread that executes them sees the old or the new value. The
//! order of the stores makes every mixture of old and new fields go to the right target or a stub. For that, a
//! cross-page site is linked with one mapping id only: once it has one, [`LinkSite::link`] with another does nothing
//! (the indirect-branch cache serves the other mappings). [`LinkSite::unlink`] leaves the id and sends the jump to the
//! request stub, so the same id links again.

use std::sync::atomic::{AtomicU32, Ordering};

/// Whether the target is on the region's own guest page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum LinkKind {
    /// Same page: no guard.
    SamePage,
    /// Another page: guarded by a mapping id.
    CrossPage,
}

/// A patchable jump of a compiled region. Offsets are bytes from the start of the region's code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkSite {
    /// Guest pc jumped to.
    pub target_pc: u64,
    /// Kind of jump.
    pub kind: LinkKind,
    /// Offset of the jump's rel32.
    pub jump: u32,
    /// Offset of the mapping id's disp32 ([`LinkKind::CrossPage`]).
    pub id: u32,
    /// Offset of the guard's rel32 ([`LinkKind::CrossPage`]).
    pub miss: u32,
    /// Offset of the stub that asks the runtime to link.
    pub request_stub: u32,
    /// Offset of the stub that goes through the indirect-branch cache; 0 where there is none: on the region's own page,
    /// far from its end.
    pub lookup_stub: u32,
}

impl LinkSite {
    /// A site on the region's page.
    pub(crate) fn same_page(target_pc: u64, jump: u32) -> Self {
        Self { target_pc, kind: LinkKind::SamePage, jump, id: 0, miss: 0, request_stub: 0, lookup_stub: 0 }
    }

    /// Makes the jump go to `target`, a byte distance from the start of this region's code (in the executable mapping)
    /// to the code of the target region. `mapping_id` (1 to `MAX_MAPPING_ID`) is the id of the target's page mapping for
    /// [`LinkKind::CrossPage`], and ignored for [`LinkKind::SamePage`]. Returns whether the site is now linked.
    ///
    /// # Safety
    /// `code` is the start of this region's code in the writable mapping, 4-byte aligned, and stays valid; no other thread
    /// patches this site at the same time (threads may execute it).
    pub unsafe fn link(&self, code: *mut u8, target: i64, mapping_id: u32) -> bool {
        let Some(rel) = rel32(self.jump, target) else { return false };
        if self.kind == LinkKind::SamePage {
            // SAFETY: by this function's contract.
            unsafe { field(code, self.jump) }.store(rel, Ordering::Release);
            return true;
        }
        let wanted = mapping_id << holdfast_tcg_ir::env::TLB_PAGE_BITS;
        // SAFETY: by this function's contract.
        let id = unsafe { field(code, self.id) };
        let old = id.load(Ordering::Relaxed);
        if mapping_id == 0 || (old != 0 && old != wanted) {
            return false;
        }
        let Some(miss) = rel32(self.miss, i64::from(self.lookup_stub)) else { return false };
        // SAFETY: by this function's contract.
        unsafe { field(code, self.jump) }.store(rel, Ordering::Release);
        id.store(wanted, Ordering::Release);
        // SAFETY: by this function's contract.
        unsafe { field(code, self.miss) }.store(miss, Ordering::Release);
        true
    }

    /// Sends the jump through the indirect-branch cache, for a target that nothing may be linked to. False where it cannot go
    /// there.
    ///
    /// # Safety
    /// As for [`LinkSite::link`].
    pub unsafe fn defer(&self, code: *mut u8) -> bool {
        let at = if self.kind == LinkKind::SamePage { self.jump } else { self.miss };
        match rel32(at, i64::from(self.lookup_stub)) {
            Some(rel) if self.lookup_stub != 0 => {
                // SAFETY: by this function's contract.
                unsafe { field(code, at) }.store(rel, Ordering::Release);
                true
            }
            _ => false,
        }
    }

    /// Takes the link away, because the target's code goes. Threads that execute the old bytes may still enter the target
    /// until they next leave translated code: reuse its memory only then.
    ///
    /// # Safety
    /// As for [`LinkSite::link`].
    pub unsafe fn unlink(&self, code: *mut u8) {
        if let Some(rel) = rel32(self.jump, i64::from(self.request_stub)) {
            // SAFETY: by this function's contract.
            unsafe { field(code, self.jump) }.store(rel, Ordering::Release);
        }
    }
}

/// The rel32 at offset `at` that reaches `target`, both from the start of the code.
fn rel32(at: u32, target: i64) -> Option<u32> {
    i32::try_from(target.checked_sub(i64::from(at) + 4)?).ok().map(|r| r as u32)
}

/// # Safety
/// `code + at` is valid for atomic access and 4-byte aligned.
unsafe fn field<'a>(code: *mut u8, at: u32) -> &'a AtomicU32 {
    // SAFETY: by this function's contract.
    unsafe { AtomicU32::from_ptr(code.wrapping_add(at as usize).cast()) }
}
