//! The vCPU environment: the memory that translated code, the runtime and helpers share.
//!
//! ```text
//!   [ EnvTables ][ EnvHeader, 128 bytes ][ guest state: slots ]
//!                                        ^ environment pointer (rbp)
//! ```
//! The environment pointer points at the guest state, so a [`crate::Slot`]'s offset counts from there, the first
//! 128 bytes of guest state and the whole header are in reach of one-byte displacements, and the tables are at
//! constant negative offsets. All functions that translated code calls get this pointer; [`header`] and
//! [`tables`] go from it to the other parts.
//!
//! **Registers while translated code runs**: rbp the environment, r15 [`EnvHeader::gen_tag`] (the back end reloads
//! it after everything that may flush), the pins, rsp a frame of the back end. MXCSR is the guest's.
//!
//! **Soft TLB.** Entry `(va >> 12) & (TLB_ENTRIES - 1)` of the array for the MMU index and kind of access holds
//! `tag = (va & !0xfff) | gen_tag` and `addend = host address - guest address`. A probe computes
//! `((va + size - 1) & !0xfff) | gen_tag` (so accesses that cross a page miss; with [`crate::MemOp::aligned`] the
//! address itself is tested before) and compares. [`TLB_SLOW`] in a tag makes it never match:
//! for MMIO, pages with code (write array), clean pages under dirty logging (write array), watchpoints.
//! The generation occupies bits 1..=11 and is never 0, so zeroed arrays hold no entries.
//! Atomic instructions probe the write array; the runtime must enter only pages that are readable too there.
//!
//! **Guarded cross-page links.** [`EnvTables::page_ids`] says, for the current generation, which *mapping id* the
//! code page at a virtual page has now: `page_ids[page_id_index(va)] = (id << 12) | gen_tag`, as `u32`. An id (1 to
//! `MAX_MAPPING_ID`) stands for one triple (virtual page, physical page, mode key) for as long as any link was made with
//! it. A cross-page link compares `r15 + (id << 12)` with the entry, and falls back to the indirect-branch cache
//! otherwise. The runtime writes the entry when it resolves a fetch, and zeroes it when it flushes that page.
//!
//! **Indirect-branch cache.** Entry `((pc >> pc_shift) ^ (pc >> 12)) & (IBTC_ENTRIES - 1)`, for functions start at few places of
//! their pages, or the one at that index ^ [`IBTC_SECOND`]; matches when `pc` and
//! `key == EnvHeader::ibtc_key`. The runtime sets the key from the generation and the mode.

use std::sync::atomic::{AtomicU32, AtomicU64};

/// Entries of each read and write TLB array.
pub const TLB_ENTRIES: usize = 4096;
/// Log2 of the translation granule.
pub const TLB_PAGE_BITS: u32 = 12;
/// MMU indexes per vCPU.
pub const MMU_MODES: usize = 8;
/// Bit of a TLB tag that makes it match no probe.
pub const TLB_SLOW: u64 = 1;
/// Position of the generation in a tag.
pub const GEN_SHIFT: u32 = 1;
/// Largest generation; the smallest is 1.
pub const GEN_MAX: u64 = 2047;
/// Entries of [`EnvTables::page_ids`].
pub const PAGE_IDS: usize = 1024;
/// Largest mapping id.
pub const MAX_MAPPING_ID: u32 = (1 << 20) - 1;
/// Entries of the indirect-branch cache.
pub const IBTC_ENTRIES: usize = 4096;

/// A TLB entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct TlbEntry {
    /// Guest-virtual page, generation and [`TLB_SLOW`].
    pub tag: u64,
    /// Host address minus guest address, modulo 2^64. Meaningless to translated code in slow entries.
    pub addend: u64,
}

/// The TLB of one MMU index.
#[repr(C)]
pub struct MmuTlb {
    /// Entries that allow loads.
    pub read: [TlbEntry; TLB_ENTRIES],
    /// Entries that allow loads and stores.
    pub write: [TlbEntry; TLB_ENTRIES],
}

/// An entry of the indirect-branch cache.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub struct IbtcEntry {
    /// Guest pc.
    pub pc: u64,
    /// [`EnvHeader::ibtc_key`] it is valid under; 0 in empty entries.
    pub key: u64,
    /// Address of the code.
    pub code: u64,
    /// Unused.
    pub pad: u64,
}

/// Tables below the header.
#[repr(C, align(64))]
pub struct EnvTables {
    /// Soft TLBs by MMU index.
    pub tlb: [MmuTlb; MMU_MODES],
    /// Current mapping ids of code pages.
    pub page_ids: [u32; PAGE_IDS],
    /// Indirect-branch cache.
    pub ibtc: [IbtcEntry; IBTC_ENTRIES],
}

/// The generic header, 128 bytes right below the guest state. Zero is a valid initial value of all but
/// `gen_tag`, `ibtc_key` and `mxcsr`.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct EnvHeader {
    /// Non-zero asks translated code to leave with [`exit::POLL`] soon; written by any thread, cleared by the runtime.
    pub exit_request: AtomicU32,
    /// Guest's MXCSR: rounding, sticky flags, all exceptions masked (0x1f80 initially). In the host register while
    /// translated code runs; valid here outside of it and in helpers with [`crate::Effects::USES_FP`].
    pub mxcsr: u32,
    /// `generation << GEN_SHIFT`; loaded into r15.
    pub gen_tag: u64,
    /// What entries of the indirect-branch cache must carry; never 0.
    pub ibtc_key: u64,
    /// Guest pc, set when translated code is left and before helpers that want it.
    pub pc: u64,
    /// Detail of the exit, see [`exit`].
    pub exit_arg: u64,
    /// The host's MXCSR, saved on entry.
    pub host_mxcsr: u32,
    /// How many more accesses may be made by the slow paths' own probes, for only the shared one failed them, before the
    /// runtime is told; it is when this is 0 or less.
    pub retries: i32,
    /// Host stack pointer to leave by.
    pub host_sp: u64,
    /// Temporaries of the back end: helper arguments 4 and 5, and moves.
    pub scratch: [u64; 4],
    /// For the runtime: its per-vCPU object.
    pub owner: AtomicU64,
    /// For the runtime.
    pub runtime: [u64; 2],
    /// Guest pc of the instruction whose `goto_reg` was the last to find nothing in the indirect-branch cache.
    pub branch_pc: u64,
}

/// A whole environment with guest state `G`. Large: allocate it zeroed (a mapping), do not build it on a stack.
#[repr(C, align(64))]
pub struct Env<G> {
    /// Tables.
    pub tables: EnvTables,
    /// Header.
    pub header: EnvHeader,
    /// Guest state; the environment pointer points here. `G` must have alignment 64 at most.
    pub guest: G,
}

const _: () = assert!(size_of::<EnvHeader>() == 128);
const _: () = assert!(size_of::<EnvTables>().is_multiple_of(64));
const _: () = assert!(size_of::<IbtcEntry>() == 32 && size_of::<TlbEntry>() == 16);

/// Offsets from the environment pointer.
pub mod offset {
    use super::*;
    use std::mem::offset_of;

    const HEADER: i32 = -(size_of::<EnvHeader>() as i32);
    const TABLES: i32 = HEADER - size_of::<EnvTables>() as i32;
    /// [`EnvHeader::exit_request`]
    pub const EXIT_REQUEST: i32 = HEADER + offset_of!(EnvHeader, exit_request) as i32;
    /// [`EnvHeader::mxcsr`]
    pub const MXCSR: i32 = HEADER + offset_of!(EnvHeader, mxcsr) as i32;
    /// [`EnvHeader::gen_tag`]
    pub const GEN_TAG: i32 = HEADER + offset_of!(EnvHeader, gen_tag) as i32;
    /// [`EnvHeader::ibtc_key`]
    pub const IBTC_KEY: i32 = HEADER + offset_of!(EnvHeader, ibtc_key) as i32;
    /// [`EnvHeader::pc`]
    pub const PC: i32 = HEADER + offset_of!(EnvHeader, pc) as i32;
    /// [`EnvHeader::exit_arg`]
    pub const EXIT_ARG: i32 = HEADER + offset_of!(EnvHeader, exit_arg) as i32;
    /// [`EnvHeader::host_mxcsr`]
    pub const HOST_MXCSR: i32 = HEADER + offset_of!(EnvHeader, host_mxcsr) as i32;
    /// [`EnvHeader::retries`]
    pub const RETRIES: i32 = HEADER + offset_of!(EnvHeader, retries) as i32;
    /// [`EnvHeader::host_sp`]
    pub const HOST_SP: i32 = HEADER + offset_of!(EnvHeader, host_sp) as i32;
    /// [`EnvHeader::branch_pc`]
    pub const BRANCH_PC: i32 = HEADER + offset_of!(EnvHeader, branch_pc) as i32;
    /// [`EnvHeader::scratch`]
    pub const SCRATCH: i32 = HEADER + offset_of!(EnvHeader, scratch) as i32;
    /// [`EnvTables::page_ids`]
    pub const PAGE_IDS: i32 = TABLES + offset_of!(EnvTables, page_ids) as i32;
    /// [`EnvTables::ibtc`]
    pub const IBTC: i32 = TABLES + offset_of!(EnvTables, ibtc) as i32;

    /// The read array of MMU index `i`.
    pub const fn tlb_read(i: usize) -> i32 {
        TABLES + offset_of!(EnvTables, tlb) as i32 + (i * size_of::<MmuTlb>()) as i32
    }

    /// The write array of MMU index `i`.
    pub const fn tlb_write(i: usize) -> i32 {
        tlb_read(i) + offset_of!(MmuTlb, write) as i32
    }

    /// Bytes from the start of [`Env`] to the guest state.
    pub const GUEST: usize = (-TABLES) as usize;
}

/// Index of `va` in a TLB array.
#[inline]
pub const fn tlb_index(va: u64) -> usize {
    (va >> TLB_PAGE_BITS) as usize & (TLB_ENTRIES - 1)
}

/// The tag that a probe of the page of `va` expects.
#[inline]
pub const fn tlb_tag(va: u64, gen_tag: u64) -> u64 {
    va & !((1 << TLB_PAGE_BITS) - 1) | gen_tag
}

/// Index of `va` in [`EnvTables::page_ids`].
#[inline]
pub const fn page_id_index(va: u64) -> usize {
    (va >> TLB_PAGE_BITS) as usize & (PAGE_IDS - 1)
}

/// The entry of [`EnvTables::page_ids`] for mapping `id`.
#[inline]
pub const fn page_id_entry(id: u32, gen_tag: u64) -> u32 {
    id << TLB_PAGE_BITS | gen_tag as u32
}

/// Index of `pc` in the indirect-branch cache of a guest with [`crate::GuestSpec::pc_shift`].
#[inline]
pub const fn ibtc_index(pc: u64, pc_shift: u32) -> usize {
    ((pc >> pc_shift) ^ (pc >> TLB_PAGE_BITS)) as usize & (IBTC_ENTRIES - 1)
}

/// What the index of an entry's second place differs in. What is taken from the first place goes there.
pub const IBTC_SECOND: usize = 1;

/// The header of the environment that `env` points into.
#[inline]
pub fn header(env: *mut u8) -> *mut EnvHeader {
    env.wrapping_sub(size_of::<EnvHeader>()).cast()
}

/// The tables of the environment that `env` points into.
#[inline]
pub fn tables(env: *mut u8) -> *mut EnvTables {
    env.wrapping_sub(offset::GUEST).cast()
}

/// The environment pointer of `e`.
#[inline]
pub fn env_ptr<G>(e: *mut Env<G>) -> *mut u8 {
    e.cast::<u8>().wrapping_add(offset::GUEST)
}

/// Exit codes: why translated code was left. [`EnvHeader::pc`] is always the guest pc to go on at (for faults, of the
/// faulting instruction), and all slots are exact.
pub mod exit {
    /// No exit.
    pub const NONE: u32 = 0;
    /// [`super::EnvHeader::exit_request`] was seen.
    pub const POLL: u32 = 1;
    /// A direct jump has no link yet; `exit_arg` is `region_id << 32 | link index` of the site.
    pub const LINK: u32 = 2;
    /// An indirect jump found nothing, not even through the lookup function.
    pub const LOOKUP: u32 = 3;
    /// A guest exception; the guest state says which.
    pub const FAULT: u32 = 4;
    /// The guest waits for an interrupt.
    pub const HALT: u32 = 5;
    /// State changed so that the next instruction must be looked up and interrupts reconsidered.
    pub const RESUME: u32 = 6;
    /// First code that a guest or runtime may define.
    pub const USER: u32 = 0x100;
}

/// Slow path of a load: `desc` is the [`crate::MemOp`]. Returns the value, extended as `desc` says; non-zero `exit`
/// when the guest faults (the function has noted the exception for `pc`).
///
/// Slow paths run with the guest's MXCSR: one that reaches code which may compute in floating point switches first.
/// They may refill, flush and change the generation.
pub type SlowLoad =
    unsafe extern "C" fn(env: *mut u8, va: u64, desc: u32, pc: u64) -> crate::helper::HelperRet;
/// Slow path of a store of the low bytes of `value`. 16-byte stores have the upper half in `scratch[0]`; 16-byte loads
/// return it there.
pub type SlowStore =
    unsafe extern "C" fn(env: *mut u8, va: u64, desc: u32, pc: u64, value: u64) -> crate::helper::HelperRet;
/// Slow path of an atomic read-modify-write: bits 10 and up of `desc` are the [`crate::RmwKind`].
pub type SlowRmw = SlowStore;
/// Slow path of a compare and swap.
pub type SlowCas = unsafe extern "C" fn(
    env: *mut u8,
    va: u64,
    desc: u32,
    pc: u64,
    expected: u64,
    new: u64,
) -> crate::helper::HelperRet;
/// Finds the code for an indirect jump to `pc` in the current mode, and enters it in the indirect-branch cache. Returns
/// its address, or 0 to leave with [`exit::LOOKUP`] (not translated, or the fetch would fault).
pub type Lookup = unsafe extern "C" fn(env: *mut u8, pc: u64) -> u64;

/// Functions that the shared stubs call.
#[derive(Clone, Copy, Debug)]
pub struct SlowPaths {
    /// Loads.
    pub load: SlowLoad,
    /// Stores.
    pub store: SlowStore,
    /// Atomic read-modify-write.
    pub rmw: SlowRmw,
    /// Compare and swap.
    pub cas: SlowCas,
    /// Indirect jumps.
    pub lookup: Lookup,
}
