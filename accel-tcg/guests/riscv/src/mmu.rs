//! Address translation: Sv39, Sv48, Sv57 and bare (privileged specification, chapter 10).
//!
//! Accessed and dirty bits are set by hardware, atomically, as the base specification allows where neither
//! Svade nor Svadu is claimed; so `menvcfg.ADUE` reads as zero and the ISA string names neither.

use holdfast_tcg_runtime::{Access, AccessKind, Fault, PhysMemory, Translation};

use crate::hart::{Hart, mstatus, privilege};
use crate::pmp;
use crate::trap::cause;

/// MMU indexes: what an access is made as.
pub mod idx {
    /// U-mode.
    pub const U: u8 = 0;
    /// S-mode, without access to U pages.
    pub const S: u8 = 1;
    /// S-mode with SUM set.
    pub const S_SUM: u8 = 2;
    /// M-mode: no translation.
    pub const M: u8 = 3;
    /// How many there are.
    pub const COUNT: u8 = 4;
}

mod pte {
    pub const V: u64 = 1;
    pub const R: u64 = 1 << 1;
    pub const W: u64 = 1 << 2;
    pub const X: u64 = 1 << 3;
    pub const U: u64 = 1 << 4;
    pub const G: u64 = 1 << 5;
    pub const A: u64 = 1 << 6;
    pub const D: u64 = 1 << 7;
    /// Reserved bits, and those of Svpbmt and Svnapot, which are not there.
    pub const RESERVED: u64 = 0x3ff << 54;
    pub const PPN_SHIFT: u32 = 10;
    pub const PPN_MASK: u64 = (1 << 44) - 1;
}

/// A walk that lost against this many concurrent changes of one entry is not going to win.
const MAX_RETRIES: u32 = 1_000;

/// The MMU index of fetches.
pub fn fetch_index(hart: &Hart) -> u8 {
    match hart.privilege {
        privilege::M => idx::M,
        privilege::S => idx::S,
        _ => idx::U,
    }
}

/// The MMU index of loads and stores.
pub fn data_index(hart: &Hart) -> u8 {
    match hart.data_privilege() {
        privilege::M => idx::M,
        privilege::S if hart.mstatus & mstatus::SUM != 0 => idx::S_SUM,
        privilege::S => idx::S,
        _ => idx::U,
    }
}

/// The page fault for an access.
pub fn page_fault(access: &Access) -> Fault {
    let cause = match access.kind {
        AccessKind::Read => cause::LOAD_PAGE,
        AccessKind::Write => cause::STORE_PAGE,
        AccessKind::Fetch => cause::FETCH_PAGE,
    };
    Fault { cause, value: access.gva, aux: 0 }
}

/// The access fault for an access.
pub fn access_fault(access: &Access) -> Fault {
    let cause = match access.kind {
        AccessKind::Read => cause::LOAD_ACCESS,
        AccessKind::Write => cause::STORE_ACCESS,
        AccessKind::Fetch => cause::FETCH_ACCESS,
    };
    Fault { cause, value: access.gva, aux: 0 }
}

fn pmp_bit(kind: AccessKind) -> u8 {
    match kind {
        AccessKind::Read => pmp::cfg::R,
        AccessKind::Write => pmp::cfg::W,
        AccessKind::Fetch => pmp::cfg::X,
    }
}

/// What page tables say: guest-physical address, what is allowed (bits of [`pmp::cfg`]), page size as a
/// power of two.
struct Walked {
    gpa: u64,
    allowed: u8,
    page_bits: u8,
    /// The mapping is the same in all address spaces.
    global: bool,
}

const RWX: u8 = pmp::cfg::R | pmp::cfg::W | pmp::cfg::X;

/// Translates an access and sets accessed and dirty bits as it needs.
///
/// # Errors
/// The page or access fault.
pub fn translate(hart: &Hart, phys: &PhysMemory, access: &Access) -> Result<Translation, Fault> {
    let mode = match access.mmu_idx {
        idx::U => privilege::U,
        idx::M => privilege::M,
        _ => privilege::S,
    };
    let levels = if mode == privilege::M { 0 } else { levels(hart.satp) };
    let walked = if levels == 0 {
        // M-mode addresses mean the same whatever `satp` says; those of the others only while it is bare.
        Walked { gpa: access.gva, allowed: RWX, page_bits: 12, global: mode == privilege::M }
    } else {
        walk(hart, phys, access, levels)?
    };
    let verdict = pmp::check(hart, walked.gpa, u64::from(access.size), mode);
    if verdict.allowed & pmp_bit(access.kind) == 0 {
        return Err(access_fault(access));
    }
    let allowed = walked.allowed & verdict.allowed;
    Ok(Translation {
        gpa: walked.gpa,
        read: allowed & pmp::cfg::R != 0,
        write: allowed & pmp::cfg::W != 0,
        fetch: allowed & pmp::cfg::X != 0,
        page_bits: walked.page_bits,
        cacheable: verdict.whole_page,
        global: walked.global,
    })
}

/// Levels of page tables under `satp`; 0 if bare.
fn levels(satp: u64) -> u32 {
    match satp >> 60 {
        mode @ 8..=10 => mode as u32 - 5,
        _ => 0,
    }
}

/// True if all bits above the virtual address repeat its highest bit.
fn canonical(gva: u64, levels: u32) -> bool {
    let unused = 64 - (12 + 9 * levels);
    ((gva << unused) as i64 >> unused) as u64 == gva
}

fn walk(hart: &Hart, phys: &PhysMemory, access: &Access, levels: u32) -> Result<Walked, Fault> {
    if !canonical(access.gva, levels) {
        return Err(page_fault(access));
    }
    for _ in 0..MAX_RETRIES {
        if let Some(walked) = walk_once(hart, phys, access, levels)? {
            return Ok(walked);
        }
    }
    Err(access_fault(access))
}

/// One walk; `None` if an entry changed under it.
fn walk_once(hart: &Hart, phys: &PhysMemory, access: &Access, levels: u32) -> Result<Option<Walked>, Fault> {
    let mut table = (hart.satp & pte::PPN_MASK) << 12;
    let mut global = false;
    for level in (0..levels).rev() {
        let at = table + (access.gva >> (12 + 9 * level) & 0x1ff) * 8;
        let table_pmp = pmp::check(hart, at, 8, privilege::S).allowed;
        if table_pmp & pmp::cfg::R == 0 {
            return Err(access_fault(access));
        }
        let entry = phys.read_u64(at).ok_or_else(|| access_fault(access))?;
        let invalid =
            entry & pte::V == 0 || entry & (pte::R | pte::W) == pte::W || entry & pte::RESERVED != 0;
        if invalid {
            return Err(page_fault(access));
        }
        let ppn = entry >> pte::PPN_SHIFT & pte::PPN_MASK;
        global |= entry & pte::G != 0;
        if entry & (pte::R | pte::X) == 0 {
            if entry & (pte::A | pte::D | pte::U) != 0 {
                return Err(page_fault(access)); // reserved in pointers to tables
            }
            table = ppn << 12;
            continue;
        }
        let low = (1u64 << (9 * level)) - 1;
        let mut allowed = permissions(hart, access.mmu_idx, entry);
        if ppn & low != 0 || allowed & pmp_bit(access.kind) == 0 {
            return Err(page_fault(access));
        }
        let wanted = entry | pte::A | if access.kind == AccessKind::Write { pte::D } else { 0 };
        if wanted != entry {
            if table_pmp & pmp::cfg::W == 0 {
                return Err(access_fault(access));
            }
            match phys.cas_u64(at, entry, wanted) {
                Some(Ok(())) => {}
                Some(Err(_)) => return Ok(None),
                None => return Err(access_fault(access)),
            }
        }
        if wanted & pte::D == 0 {
            allowed &= !pmp::cfg::W; // the first write has to come here
        }
        let gpa = (ppn | access.gva >> 12 & low) << 12 | access.gva & 0xfff;
        return Ok(Some(Walked { gpa, allowed, page_bits: (12 + 9 * level) as u8, global }));
    }
    Err(page_fault(access))
}

/// What a leaf allows to an access made as `mmu_idx`.
fn permissions(hart: &Hart, mmu_idx: u8, entry: u64) -> u8 {
    let user = entry & pte::U != 0;
    let mut allowed = 0;
    if entry & pte::R != 0 || entry & pte::X != 0 && hart.mstatus & mstatus::MXR != 0 {
        allowed |= pmp::cfg::R;
    }
    if entry & pte::W != 0 {
        allowed |= pmp::cfg::W;
    }
    if entry & pte::X != 0 {
        allowed |= pmp::cfg::X;
    }
    match (mmu_idx, user) {
        (idx::U, true) | (idx::S | idx::S_SUM, false) => allowed,
        (idx::S_SUM, true) => allowed & !pmp::cfg::X,
        _ => 0,
    }
}

/// Where `gva` is now, for a debugger: protection is ignored and nothing changes.
pub fn probe(hart: &Hart, phys: &PhysMemory, gva: u64) -> Option<u64> {
    let levels = levels(hart.satp);
    if levels == 0 || hart.data_privilege() == privilege::M {
        return Some(gva);
    }
    if !canonical(gva, levels) {
        return None;
    }
    let mut table = (hart.satp & pte::PPN_MASK) << 12;
    for level in (0..levels).rev() {
        let entry = phys.read_u64(table + (gva >> (12 + 9 * level) & 0x1ff) * 8)?;
        if entry & pte::V == 0 {
            return None;
        }
        let ppn = entry >> pte::PPN_SHIFT & pte::PPN_MASK;
        if entry & (pte::R | pte::X) != 0 {
            let low = (1u64 << (9 * level)) - 1;
            return Some((ppn & !low | gva >> 12 & low) << 12 | gva & 0xfff);
        }
        table = ppn << 12;
    }
    None
}

#[cfg(test)]
mod tests;
