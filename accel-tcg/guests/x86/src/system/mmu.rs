//! Paging (SDM volume 3, chapter 4).

use holdfast_tcg_runtime::{Access, AccessKind, Fault, PhysMemory, Translation};

use super::fault;
use super::regs::{cr0, cr4, efer};
use crate::key::idx;
use crate::state::X86;

/// Bits of page-table entries.
mod pte {
    pub const P: u64 = 1;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// Bits of a page fault's error code.
mod code {
    pub const P: u32 = 1;
    pub const W: u32 = 2;
    pub const U: u32 = 4;
    pub const RSVD: u32 = 8;
    pub const I: u32 = 16;
    pub const PK: u32 = 32;
}

/// The entries of one walk: (physical address, value), and the width of an entry.
#[derive(Debug, Default)]
struct Path {
    entries: [(u64, u64); 5],
    len: usize,
    wide: bool,
}

impl Path {
    fn push(&mut self, at: u64, value: u64) {
        if let Some(e) = self.entries.get_mut(self.len) {
            *e = (at, value);
            self.len += 1;
        }
    }

    fn known(&self) -> &[(u64, u64)] {
        self.entries.get(..self.len).unwrap_or_default()
    }
}

/// What a walk found.
#[derive(Debug, Clone, Copy)]
struct Leaf {
    gpa: u64,
    bits: u8,
    user: bool,
    writable: bool,
    no_execute: bool,
    global: bool,
    key: u8,
    dirty: bool,
}

/// Why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Miss {
    NotPresent,
    Reserved,
}

/// The bits that have to be zero in entries of 8 bytes, apart from those of large pages.
fn reserved(s: &X86) -> u64 {
    let high = !((1_u64 << s.phys_bits.clamp(32, 52)) - 1);
    let address = high & 0x000f_ffff_ffff_ffff;
    let nx = if s.efer & efer::NXE != 0 { 0 } else { pte::NX };
    // PAE paging ignores no bits above the address.
    let ignored = if s.long() { 0 } else { 0x7ff0_0000_0000_0000 };
    address | nx | ignored
}

/// Paging with entries of 8 bytes.
fn walk_wide(s: &X86, phys: &PhysMemory, va: u64, path: &mut Path) -> Result<Leaf, Miss> {
    path.wide = true;
    let reserved = reserved(s);
    let (mut level, mut table) = if !s.long() {
        let pdpte = s.pdpte[(va >> 30 & 3) as usize];
        if pdpte & pte::P == 0 {
            return Err(Miss::NotPresent);
        }
        (2, pdpte & pte::ADDRESS)
    } else if s.cr4 & cr4::LA57 != 0 {
        (5, s.cr3 & pte::ADDRESS)
    } else {
        (4, s.cr3 & pte::ADDRESS)
    };
    let (mut user, mut writable, mut no_execute) = (true, true, false);
    loop {
        let shift = 12 + 9 * (level - 1);
        let at = table + (va >> shift & 0x1ff) * 8;
        let entry = phys.read_u64(at).unwrap_or(0);
        if entry & pte::P == 0 {
            return Err(Miss::NotPresent);
        }
        let large = level == 1 || entry & pte::PS != 0 && matches!(level, 2 | 3);
        let inner = if large && level > 1 { ((1_u64 << shift) - 1) & !0x1fff } else { 0 };
        let no_large = if level > 3 { pte::PS } else { 0 };
        if entry & (reserved | inner | no_large) != 0 {
            return Err(Miss::Reserved);
        }
        path.push(at, entry);
        user &= entry & pte::U != 0;
        writable &= entry & pte::W != 0;
        no_execute |= entry & pte::NX != 0;
        if large {
            let offset = (1_u64 << shift) - 1;
            return Ok(Leaf {
                gpa: entry & pte::ADDRESS & !offset | va & offset,
                bits: shift as u8,
                user,
                writable,
                no_execute,
                global: entry & pte::G != 0,
                key: (entry >> 59 & 15) as u8,
                dirty: entry & pte::D != 0,
            });
        }
        table = entry & pte::ADDRESS;
        level -= 1;
    }
}

/// Paging with entries of 4 bytes.
fn walk_narrow(s: &X86, phys: &PhysMemory, va: u64, path: &mut Path) -> Result<Leaf, Miss> {
    let at = (s.cr3 & 0xffff_f000) + (va >> 22 & 0x3ff) * 4;
    let pde = u64::from(phys.read_u32(at).unwrap_or(0));
    if pde & pte::P == 0 {
        return Err(Miss::NotPresent);
    }
    let leaf = |entry: u64, gpa: u64, bits: u8, both: u64| Leaf {
        gpa,
        bits,
        user: both & pte::U != 0,
        writable: both & pte::W != 0,
        no_execute: false,
        global: entry & pte::G != 0,
        key: 0,
        dirty: entry & pte::D != 0,
    };
    path.push(at, pde);
    if pde & pte::PS != 0 && s.cr4 & cr4::PSE != 0 {
        // PSE-36: bits 13 to 20 are bits 32 to 39 of the address.
        let above = s.phys_bits.clamp(32, 40) - 32;
        let reserved = (0x1fe000 & !(((1 << above) - 1) << 13)) | 1 << 21;
        if pde & reserved != 0 {
            return Err(Miss::Reserved);
        }
        let gpa = pde & 0xffc0_0000 | (pde >> 13 & 0xff) << 32 | va & 0x3f_ffff;
        return Ok(leaf(pde, gpa, 22, pde));
    }
    let at = (pde & 0xffff_f000) + (va >> 12 & 0x3ff) * 4;
    let entry = u64::from(phys.read_u32(at).unwrap_or(0));
    if entry & pte::P == 0 {
        return Err(Miss::NotPresent);
    }
    path.push(at, entry);
    Ok(leaf(entry, entry & 0xffff_f000 | va & 0xfff, 12, pde & entry))
}

fn walk(s: &X86, phys: &PhysMemory, va: u64, path: &mut Path) -> Result<Leaf, Miss> {
    if s.cr4 & cr4::PAE != 0 || s.long() {
        walk_wide(s, phys, va, path)
    } else {
        walk_narrow(s, phys, va, path)
    }
}

/// PKRU for user pages, IA32_PKRS for others: (reads are denied, writes are denied) for the leaf.
fn protection_key(s: &X86, leaf: &Leaf) -> (bool, bool) {
    let (enable, rights) = if leaf.user { (cr4::PKE, s.pkru) } else { (cr4::PKS, s.pkrs) };
    if s.cr4 & enable == 0 || !s.long() {
        return (false, false);
    }
    let bits = rights >> (2 * leaf.key);
    (bits & 1 != 0, bits & 2 != 0)
}

/// The error code's bits if the access is not allowed, besides the kind of access.
fn denied(s: &X86, leaf: &Leaf, access: &Access) -> Option<u32> {
    let user = access.mmu_idx == idx::USER;
    if access.kind == AccessKind::Fetch {
        let smep = !user && leaf.user && s.cr4 & cr4::SMEP != 0;
        return (leaf.no_execute || user && !leaf.user || smep).then_some(code::P);
    }
    let (write, protected) = (access.kind == AccessKind::Write, user || s.cr0 & cr0::WP != 0);
    let smap = !user && leaf.user && s.cr4 & cr4::SMAP != 0 && access.mmu_idx != idx::KERNEL_AC;
    let rights = user && !leaf.user || smap || write && !leaf.writable && protected;
    // That the key denies the access is told whatever else does.
    let (no_read, no_write) = if user && !leaf.user { (false, false) } else { protection_key(s, leaf) };
    let key = no_read || write && no_write && protected;
    (rights || key).then_some(if key { code::P | code::PK } else { code::P })
}

fn page_fault(s: &X86, access: &Access, bits: u32) -> Fault {
    let mut code = bits;
    if access.kind == AccessKind::Write {
        code |= code::W;
    }
    if access.mmu_idx == idx::USER {
        code |= code::U;
    }
    let nx = s.efer & efer::NXE != 0 && s.cr4 & cr4::PAE != 0;
    if access.kind == AccessKind::Fetch && (nx || s.cr4 & cr4::SMEP != 0) {
        code |= code::I;
    }
    fault::pf(access.gva, code)
}

/// Sets accessed and dirty bits; false if an entry changed meanwhile.
fn mark(phys: &PhysMemory, path: &Path, write: bool) -> bool {
    let known = path.known();
    for (n, &(at, entry)) in known.iter().enumerate() {
        let leaf = n + 1 == known.len();
        let new = entry | pte::A | if leaf && write { pte::D } else { 0 };
        if new == entry {
            continue;
        }
        let done = if path.wide {
            phys.cas_u64(at, entry, new).is_none_or(|r| r.is_ok())
        } else {
            phys.cas_u32(at, entry as u32, new as u32).is_none_or(|r| r.is_ok())
        };
        if !done {
            return false;
        }
    }
    true
}

/// The fault of an access to an address that is not canonical.
pub(crate) fn non_canonical(s: &X86, access: &Access) -> Option<Fault> {
    if !s.long() || s.canonical(access.gva) {
        return None;
    }
    Some(fault::non_canonical(access.gva))
}

/// Translates an address, with accessed and dirty bits set as the access needs.
///
/// # Errors
/// #PF; #GP(0) for an address that is not canonical.
pub(crate) fn translate(s: &X86, phys: &PhysMemory, access: &Access) -> Result<Translation, Fault> {
    if s.cr0 & cr0::PG == 0 {
        let gpa = access.gva & 0xffff_ffff;
        let all = Translation {
            gpa,
            read: true,
            write: true,
            fetch: true,
            page_bits: 12,
            cacheable: true,
            global: true,
        };
        return Ok(all);
    }
    if let Some(fault) = non_canonical(s, access) {
        return Err(fault);
    }
    loop {
        let mut path = Path::default();
        let leaf = match walk(s, phys, access.gva, &mut path) {
            Ok(leaf) => leaf,
            Err(Miss::NotPresent) => return Err(page_fault(s, access, 0)),
            Err(Miss::Reserved) => return Err(page_fault(s, access, code::P | code::RSVD)),
        };
        if let Some(bits) = denied(s, &leaf, access) {
            return Err(page_fault(s, access, bits));
        }
        let write = access.kind == AccessKind::Write;
        if !mark(phys, &path, write) {
            continue;
        }
        let as_read = Access { kind: AccessKind::Read, ..*access };
        let as_write = Access { kind: AccessKind::Write, ..*access };
        return Ok(Translation {
            gpa: leaf.gpa,
            read: denied(s, &leaf, &as_read).is_none(),
            write: (leaf.dirty || write) && denied(s, &leaf, &as_write).is_none(),
            fetch: access.kind == AccessKind::Fetch,
            page_bits: leaf.bits,
            cacheable: true,
            global: leaf.global && s.cr4 & cr4::PGE != 0,
        });
    }
}

/// The guest-physical address of `va`, whatever the rights.
pub(crate) fn probe(s: &X86, phys: &PhysMemory, va: u64) -> Option<u64> {
    if s.cr0 & cr0::PG == 0 {
        return Some(va & 0xffff_ffff);
    }
    if s.long() && !s.canonical(va) {
        return None;
    }
    Some(walk(s, phys, va, &mut Path::default()).ok()?.gpa)
}

/// Reads the PDPTE registers for PAE paging from `cr3`; `None` (#GP) if a reserved bit is set.
pub(crate) fn load_pdptes(s: &X86, phys: &PhysMemory, cr3: u64) -> Option<[u64; 4]> {
    let mut out = [0; 4];
    let wrong = !((1_u64 << s.phys_bits.clamp(32, 52)) - 1) | 0x1e6;
    for (at, place) in (0..).step_by(8).zip(&mut out) {
        let entry = phys.read_u64((cr3 & 0xffff_ffe0) + at).unwrap_or(0);
        if entry & pte::P != 0 && entry & wrong != 0 {
            return None;
        }
        *place = entry;
    }
    Some(out)
}

#[cfg(test)]
mod tests;
