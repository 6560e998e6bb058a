//! The memory block that translated code works on.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::unshare::RETRIES;
use holdfast_tcg_ir::env::{
    self as layout, EnvHeader, EnvTables, IBTC_ENTRIES, IbtcEntry, PAGE_IDS, TlbEntry,
};
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

/// MXCSR with all exceptions masked, round to nearest.
pub const MXCSR_DEFAULT: u32 = 0x1f80;

/// Owns one vCPU's environment: tables, generic header, then the guest's state.
///
/// Other threads touch `exit_request` and the tags of TLB entries, atomically. Everything else is
/// touched by the vCPU's own thread alone.
#[derive(Debug)]
pub struct EnvBox {
    base: *mut u8,
    len: usize,
    state_size: usize,
}

// SAFETY: plain memory under the rule above.
unsafe impl Send for EnvBox {}
// SAFETY: as above.
unsafe impl Sync for EnvBox {}

impl EnvBox {
    /// A zeroed environment with `state_size` bytes of guest state.
    ///
    /// # Errors
    /// The host's error if it has no memory for it.
    pub fn new(state_size: usize) -> io::Result<Self> {
        let len = layout::offset::GUEST + state_size.next_multiple_of(64);
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let this = Self { base: base.cast(), len, state_size };
        let header = this.header();
        // SAFETY: freshly mapped and not shared yet.
        unsafe { (*header).mxcsr = MXCSR_DEFAULT };
        this.set_retries(RETRIES);
        Ok(this)
    }

    /// The environment pointer: the guest's state.
    #[inline]
    pub fn ptr(&self) -> *mut u8 {
        self.base.wrapping_add(layout::offset::GUEST)
    }

    /// The generic header.
    #[inline]
    pub fn header(&self) -> *mut EnvHeader {
        layout::header(self.ptr())
    }

    /// The tables.
    #[inline]
    pub fn tables(&self) -> *mut EnvTables {
        layout::tables(self.ptr())
    }

    /// The word that translated code polls.
    #[inline]
    pub fn exit_request(&self) -> &AtomicU32 {
        // SAFETY: mapped, and only ever accessed as an atomic.
        unsafe { &(*self.header()).exit_request }
    }

    /// The guest's program counter.
    #[inline]
    pub fn pc(&self) -> u64 {
        // SAFETY: only the vCPU's thread touches it.
        unsafe { (*self.header()).pc }
    }

    /// Sets the guest's program counter.
    #[inline]
    pub fn set_pc(&self, pc: u64) {
        // SAFETY: only the vCPU's thread touches it.
        unsafe { (*self.header()).pc = pc }
    }

    /// Where the last indirect branch was that had to be looked up.
    pub fn branch_pc(&self) -> u64 {
        // SAFETY: only the vCPU's thread touches it.
        unsafe { (*self.header()).branch_pc }
    }

    /// Detail of the last exit.
    pub fn exit_arg(&self) -> u64 {
        // SAFETY: only the vCPU's thread touches it.
        unsafe { (*self.header()).exit_arg }
    }

    /// The guest's MXCSR.
    pub fn mxcsr(&self) -> u32 {
        // SAFETY: only the vCPU's thread touches it.
        unsafe { (*self.header()).mxcsr }
    }

    /// Sets the guest's MXCSR.
    pub fn set_mxcsr(&self, value: u32) {
        // SAFETY: only the vCPU's thread touches it.
        unsafe { (*self.header()).mxcsr = value }
    }

    /// See [`EnvHeader::retries`].
    pub fn retries(&self) -> i32 {
        // SAFETY: only the vCPU's thread touches it.
        unsafe { (*self.header()).retries }
    }

    /// Sets [`EnvHeader::retries`].
    pub fn set_retries(&self, value: i32) {
        // SAFETY: only the vCPU's thread touches it.
        unsafe { (*self.header()).retries = value }
    }

    /// The upper half of a 16-byte access.
    pub fn scratch(&self) -> u64 {
        // SAFETY: only the vCPU's thread touches it.
        unsafe { (*self.header()).scratch[0] }
    }

    /// Sets the upper half of a 16-byte load.
    pub fn set_scratch(&self, value: u64) {
        // SAFETY: only the vCPU's thread touches it.
        unsafe { (*self.header()).scratch[0] = value }
    }

    /// Publishes generation and key of the indirect-branch cache to translated code.
    pub fn set_keys(&self, gen_tag: u64, ibtc_key: u64) {
        // SAFETY: only the vCPU's thread touches them.
        unsafe {
            (*self.header()).gen_tag = gen_tag;
            (*self.header()).ibtc_key = ibtc_key;
        }
    }

    /// Sets the runtime's object for this vCPU.
    pub fn set_owner(&self, owner: u64) {
        // SAFETY: an atomic.
        unsafe { (*self.header()).owner.store(owner, Ordering::Release) }
    }

    /// A TLB entry: tag and addend. `index` is taken modulo the size.
    #[inline]
    pub fn tlb(&self, mmu_idx: u8, write: bool, index: usize) -> (&AtomicU64, &AtomicU64) {
        let base = if write {
            layout::offset::tlb_write(mmu_idx as usize % layout::MMU_MODES)
        } else {
            layout::offset::tlb_read(mmu_idx as usize % layout::MMU_MODES)
        };
        let entry = self.ptr().wrapping_offset(base as isize).cast::<TlbEntry>();
        let entry = entry.wrapping_add(index % layout::TLB_ENTRIES);
        // SAFETY: in the tables; entries are only ever accessed as atomics outside translated code.
        unsafe { (AtomicU64::from_ptr(&raw mut (*entry).tag), AtomicU64::from_ptr(&raw mut (*entry).addend)) }
    }

    /// The write entries of an MMU index (modulo their number): tag and addend.
    pub fn write_entries(&self, mmu_idx: u8) -> &[[AtomicU64; 2]; layout::TLB_ENTRIES] {
        const { assert!(size_of::<TlbEntry>() == 16) };
        let base = layout::offset::tlb_write(mmu_idx as usize % layout::MMU_MODES);
        // SAFETY: the array is in the tables, an entry is two words, and outside translated code they are only ever accessed
        // as atomics.
        unsafe { &*self.ptr().wrapping_offset(base as isize).cast() }
    }

    /// Sets the mapping id that a code page has.
    #[inline]
    pub fn set_page_id(&self, index: usize, value: u32) {
        // SAFETY: in bounds; only the vCPU's thread touches it.
        unsafe { (*self.tables()).page_ids[index % PAGE_IDS] = value }
    }

    /// An entry of the indirect-branch cache.
    #[inline]
    pub fn ibtc(&self, index: usize) -> IbtcEntry {
        // SAFETY: in bounds; only the vCPU's thread touches it.
        unsafe { (*self.tables()).ibtc[index % IBTC_ENTRIES] }
    }

    /// Sets an entry of the indirect-branch cache.
    #[inline]
    pub fn set_ibtc(&self, index: usize, entry: IbtcEntry) {
        // SAFETY: in bounds; only the vCPU's thread touches it.
        unsafe { (*self.tables()).ibtc[index % IBTC_ENTRIES] = entry }
    }

    /// Empties all tables: the kernel gives fresh zero pages.
    pub fn clear_tables(&self) {
        // SAFETY: the tables are a plain private mapping; zero is their valid empty state. Other threads
        // access them atomically and see either old or zero.
        unsafe { ptr::write_bytes(self.base, 0, size_of::<EnvTables>()) };
    }

    /// The guest's state.
    #[allow(clippy::mut_from_ref, reason = "the vCPU's thread reaches it through `&mut Cpu` only")]
    #[inline]
    pub(crate) fn state<T: FromBytes + IntoBytes + KnownLayout>(&self) -> &mut T {
        assert!(size_of::<T>() <= self.state_size && align_of::<T>() <= 64, "guest state type does not fit");
        // SAFETY: size and alignment were checked, any bytes are a valid `T`, and the caller holds the
        // one `&mut Cpu` of this vCPU.
        unsafe { &mut *self.ptr().cast::<T>() }
    }
}

impl Drop for EnvBox {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}
