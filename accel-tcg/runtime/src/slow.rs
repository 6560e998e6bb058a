//! What inline probes fall back to: refills, accesses that cross pages, MMIO, ROM, stores to code.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use holdfast_memory::PAGE_SIZE;
use holdfast_tcg_ir::env::{SlowPaths, TLB_SLOW, exit};
use holdfast_tcg_ir::helper::HelperRet;
use holdfast_tcg_ir::{MemOp, RmwKind};

use crate::cpu::Cpu;
use crate::fpenv::with_host_fp;
use crate::guest::{Access, AccessKind, Fault};
use crate::shared::request;
use crate::tlb::{Entry, count};
use crate::vcpu::VcpuCore;

/// The functions that translated code calls.
pub fn slow_paths() -> SlowPaths {
    SlowPaths { load, store, rmw, cas, lookup }
}

/// Where an access goes.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// RAM or ROM at this host address; the guest-physical address if a store has to be reported.
    Host(*mut u8, Option<u64>),
    /// The bus.
    Bus(u64),
}

/// The access is not done, for [`VcpuCore::again`] is set. Nobody reads what is in it.
const AGAIN: Fault = Fault { cause: 0, value: 0, aux: 0 };

fn finish(core: &mut VcpuCore, pc: u64, result: Result<u64, Fault>) -> HelperRet {
    match result {
        Ok(value) => HelperRet::ok(value),
        Err(_) if std::mem::take(&mut core.again) => {
            core.shared.env().set_pc(pc);
            core.redo = true;
            HelperRet::exit(exit::POLL)
        }
        Err(fault) => {
            core.shared.env().set_pc(pc);
            core.pending_fault = Some(fault);
            HelperRet::exit(exit::FAULT)
        }
    }
}

unsafe extern "C" fn load(env: *mut u8, va: u64, desc: u32, pc: u64) -> HelperRet {
    // SAFETY: called by translated code or the interpreter on the vCPU's thread.
    let core = unsafe { VcpuCore::from_env(env) };
    let mem = MemOp(desc as u16 & (MemOp::MASK | MemOp::FOR_UPDATE));
    core.note_retry(va, mem, mem.is_for_update(), pc);
    let result = core.load(va, mem);
    finish(core, pc, result)
}

unsafe extern "C" fn store(env: *mut u8, va: u64, desc: u32, pc: u64, value: u64) -> HelperRet {
    // SAFETY: as in `load`.
    let core = unsafe { VcpuCore::from_env(env) };
    let mem = MemOp(desc as u16 & MemOp::MASK);
    core.note_retry(va, mem, true, pc);
    core.storing = Some(pc);
    let result = core.store(va, mem, value).map(|()| 0);
    core.storing = None;
    finish(core, pc, result)
}

unsafe extern "C" fn rmw(env: *mut u8, va: u64, desc: u32, pc: u64, value: u64) -> HelperRet {
    // SAFETY: as in `load`.
    let core = unsafe { VcpuCore::from_env(env) };
    let kind = RmwKind::from_index((desc >> MemOp::BITS) as u16);
    let mem = MemOp(desc as u16 & MemOp::MASK);
    core.storing = Some(pc);
    let result = core.atomic(va, mem, |old| Some(kind.apply(old, value, mem.bytes())));
    core.storing = None;
    finish(core, pc, result)
}

unsafe extern "C" fn cas(env: *mut u8, va: u64, desc: u32, pc: u64, expected: u64, new: u64) -> HelperRet {
    // SAFETY: as in `load`.
    let core = unsafe { VcpuCore::from_env(env) };
    let mem = MemOp(desc as u16 & MemOp::MASK);
    let mask = low_mask(mem.bytes());
    core.storing = Some(pc);
    let result = core.atomic(va, mem, |old| (old & mask == expected & mask).then_some(new));
    core.storing = None;
    finish(core, pc, result)
}

unsafe extern "C" fn lookup(env: *mut u8, pc: u64) -> u64 {
    // SAFETY: as in `load`.
    let core = unsafe { VcpuCore::from_env(env) };
    core.lookup(pc)
}

fn low_mask(bytes: u32) -> u64 {
    if bytes >= 8 { u64::MAX } else { (1 << (bytes * 8)) - 1 }
}

/// Extends the low bytes of `value` as `mem` says.
fn extend(value: u64, mem: MemOp) -> u64 {
    let value = if mem.is_big_endian() && mem.bytes() <= 8 {
        value.swap_bytes() >> (64 - mem.bytes() * 8)
    } else {
        value & low_mask(mem.bytes())
    };
    match (mem.is_signed(), mem.bytes()) {
        (true, 1) => value as i8 as u64,
        (true, 2) => value as i16 as u64,
        (true, 4) => value as i32 as u64,
        _ => value,
    }
}

/// Brings the low bytes of `value` into memory order.
fn to_memory(value: u64, mem: MemOp) -> u64 {
    if mem.is_big_endian() && mem.bytes() <= 8 { value.swap_bytes() >> (64 - mem.bytes() * 8) } else { value }
}

/// # Safety
/// `host` is valid for reads of `bytes` (1, 2, 4, 8).
unsafe fn host_load(host: *const u8, bytes: u32) -> u64 {
    // SAFETY: by contract; volatile, because other vCPUs and devices write the same memory. Aligned
    // accesses are single on the host; misaligned ones promise nothing.
    unsafe {
        match bytes {
            1 => u64::from(host.read_volatile()),
            2 if host.addr().is_multiple_of(2) => u64::from(host.cast::<u16>().read_volatile()),
            4 if host.addr().is_multiple_of(4) => u64::from(host.cast::<u32>().read_volatile()),
            8 if host.addr().is_multiple_of(8) => host.cast::<u64>().read_volatile(),
            2 => u64::from(host.cast::<u16>().read_unaligned()),
            4 => u64::from(host.cast::<u32>().read_unaligned()),
            _ => host.cast::<u64>().read_unaligned(),
        }
    }
}

/// # Safety
/// `host` is valid for writes of `bytes` (1, 2, 4, 8).
unsafe fn host_store(host: *mut u8, bytes: u32, value: u64) {
    // SAFETY: as in `host_load`.
    unsafe {
        match bytes {
            1 => host.write_volatile(value as u8),
            2 if host.addr().is_multiple_of(2) => host.cast::<u16>().write_volatile(value as u16),
            4 if host.addr().is_multiple_of(4) => host.cast::<u32>().write_volatile(value as u32),
            8 if host.addr().is_multiple_of(8) => host.cast::<u64>().write_volatile(value),
            2 => host.cast::<u16>().write_unaligned(value as u16),
            4 => host.cast::<u32>().write_unaligned(value as u32),
            _ => host.cast::<u64>().write_unaligned(value),
        }
    }
}

/// # Safety
/// `host` is valid for reads of 16 bytes.
unsafe fn host_load_pair(host: *const u8) -> u128 {
    // SAFETY: by contract.
    unsafe { u128::from(host_load(host, 8)) | u128::from(host_load(host.wrapping_add(8), 8)) << 64 }
}

/// Stores the low `bytes` (1 to 15) of `value`.
///
/// # Safety
/// `host` is valid for writes of `bytes`.
unsafe fn host_store_piece(host: *mut u8, bytes: u32, value: u128) {
    let mut done = 0;
    for piece in [8, 4, 2, 1] {
        if bytes & piece != 0 {
            // SAFETY: by contract.
            unsafe { host_store(host.wrapping_add(done as usize), piece, (value >> (8 * done)) as u64) };
            done += piece;
        }
    }
}

/// Whether `bytes` at `va` lie in two pages.
pub(crate) fn crosses(va: u64, bytes: u32) -> bool {
    va % PAGE_SIZE + u64::from(bytes) > PAGE_SIZE
}

/// The parts of an access of `bytes` at `va`, which crosses into the next page.
fn halves(va: u64, bytes: u32, whole: &Access) -> [Access; 2] {
    let room = PAGE_SIZE - va % PAGE_SIZE;
    [(va, room), (va.wrapping_add(room), u64::from(bytes) - room)].map(|(gva, len)| Access {
        gva,
        size: len as u8,
        ..*whole
    })
}

/// Replaces the value at `host` by what `next` makes of it, if anything; gives the old one.
///
/// # Safety
/// `host` is valid for `bytes` (1, 2, 4, 8) and aligned to it.
unsafe fn host_atomic(host: *mut u8, bytes: u32, next: impl Fn(u64) -> Option<u64>) -> u64 {
    macro_rules! update {
        ($atomic:ident, $int:ident) => {{
            // SAFETY: by contract.
            let cell = unsafe { $atomic::from_ptr(host.cast()) };
            let step = |old: $int| next(u64::from(old)).map(|new| new as $int);
            match cell.fetch_update(Ordering::SeqCst, Ordering::SeqCst, step) {
                Ok(old) | Err(old) => u64::from(old),
            }
        }};
    }
    match bytes {
        1 => update!(AtomicU8, u8),
        2 => update!(AtomicU16, u16),
        4 => update!(AtomicU32, u32),
        _ => update!(AtomicU64, u64),
    }
}

impl VcpuCore {
    fn access(va: u64, mem: MemOp, kind: AccessKind) -> Access {
        Access { gva: va, size: mem.bytes() as u8, kind, mmu_idx: mem.mmu_idx() as u8 }
    }

    /// Finds where an access that crosses no page goes, refilling the TLB.
    fn place(&mut self, access: &Access) -> Result<Place, Fault> {
        let (va, write) = (access.gva, access.kind == AccessKind::Write);
        let counts = &self.shared.counts.tlb;
        if let Some(entry) = self.tlb.find(self.shared.env(), va, access.mmu_idx, write, counts) {
            if entry.tag & TLB_SLOW == 0 {
                let host = (va as usize).wrapping_add(entry.addend as usize);
                return Ok(Place::Host(std::ptr::with_exposed_provenance_mut(host), None));
            }
            return Ok(self.slow_place(access, va.wrapping_add(entry.addend)));
        }
        count(&counts.fills);
        let guest = self.guest;
        let mut t = guest.fill(&mut Cpu::new(self), access)?;
        match self.watched(access) {
            None => {}
            Some(false) => t.cacheable = false,
            Some(true) => return Err(AGAIN),
        }
        if t.cacheable {
            self.tlb.note_large(va, t.page_bits);
            if write && t.read && !self.tlb.has_read(self.shared.env(), va, access.mmu_idx) {
                // What is written is read before long.
                self.enter(&Access { kind: AccessKind::Read, ..*access }, t.gpa, true);
            }
        }
        Ok(self.enter(access, t.gpa, t.cacheable))
    }

    /// A place behind a slow entry: MMIO, ROM, or a page that had code when it was entered.
    fn slow_place(&mut self, access: &Access, gpa: u64) -> Place {
        self.enter(access, gpa, true)
    }

    /// Makes a TLB entry for `access` to `gpa` and says where it goes.
    fn enter(&mut self, access: &Access, gpa: u64, cacheable: bool) -> Place {
        let (va, write, idx) = (access.gva, access.kind == AccessKind::Write, access.mmu_idx);
        // No counted references here: this is on the way of every miss.
        let (shared, phys) = (&*self.shared, &*self.phys);
        let env = shared.env();
        let page = gpa & !(PAGE_SIZE - 1);
        let Some(at) = phys.find(page, PAGE_SIZE).filter(|at| !(write && at.block.rom)) else {
            if cacheable {
                let entry = Entry { tag: TLB_SLOW, addend: gpa.wrapping_sub(va) };
                self.tlb.insert(env, va, (idx, write), entry);
            }
            return Place::Bus(gpa);
        };
        let host = at.host.wrapping_add((gpa - page) as usize);
        let addend = (host.expose_provenance() as u64).wrapping_sub(va);
        if !write {
            if cacheable {
                self.tlb.insert(env, va, (idx, false), Entry { tag: 0, addend });
            }
            return Place::Host(host, None);
        }
        let n = at.offset / PAGE_SIZE;
        // Whoever translates the page sets its code bit, then looks at `hot`, then takes this lock to clear
        // tags: one of both sees the other.
        let _entering = shared.tlb_lock.lock();
        at.block.hot.set(self.hot_side, n);
        let code = at.block.tracker.is_code(n);
        if cacheable {
            let slow = Entry { tag: TLB_SLOW, addend: gpa.wrapping_sub(va) };
            self.tlb.insert(env, va, (idx, true), if code { slow } else { Entry { tag: 0, addend } });
            shared.set_tlb_used(self.tlb.used());
        }
        // Without an entry nobody knows that this store is under way: it is reported whatever the page holds by now.
        Place::Host(host, (code || !cacheable).then_some(gpa))
    }

    /// A load by translated code.
    pub(crate) fn load(&mut self, va: u64, mem: MemOp) -> Result<u64, Fault> {
        let kind = if mem.is_for_update() { AccessKind::Write } else { AccessKind::Read };
        let access = Self::access(va, mem, kind);
        self.check_alignment(&access, mem)?;
        let bytes = mem.bytes();
        if bytes == 16 {
            let [low, high] = if crosses(va, bytes) {
                self.load_across(va, bytes, &access)?
            } else {
                [self.load_part(va, 8, &access)?, self.load_part(va.wrapping_add(8), 8, &access)?]
            };
            self.shared.env().set_scratch(high);
            return Ok(low);
        }
        Ok(extend(self.load_part(va, bytes, &access)?, mem))
    }

    fn check_alignment(&mut self, access: &Access, mem: MemOp) -> Result<(), Fault> {
        let misaligned = !access.gva.is_multiple_of(u64::from(mem.bytes()));
        if misaligned && (mem.is_aligned() || !self.guest.spec().misaligned_ok) {
            return Err(self.misaligned(access, false));
        }
        Ok(())
    }

    fn misaligned(&mut self, access: &Access, atomic: bool) -> Fault {
        let guest = self.guest;
        guest.misaligned_fault(&mut Cpu::new(self), access, atomic)
    }

    /// Loads `bytes` (1 to 8) little-endian, across pages if need be.
    fn load_part(&mut self, va: u64, bytes: u32, whole: &Access) -> Result<u64, Fault> {
        if crosses(va, bytes) {
            return Ok(self.load_across(va, bytes, whole)?[0]);
        }
        let access = Access { gva: va, size: bytes as u8, ..*whole };
        match self.place(&access)? {
            // SAFETY: the place is valid for the access, which crosses no page.
            Place::Host(host, _) => Ok(unsafe { host_load(host, bytes) }),
            // Before a store: ROM is read all the same.
            Place::Bus(_) if access.kind == AccessKind::Write => {
                self.load_part(va, bytes, &Access { kind: AccessKind::Read, ..access })
            }
            Place::Bus(gpa) => self.bus_read(&access, gpa),
        }
    }

    /// A load of `bytes` (2 to 16) in two pages: the low eight, then the others. Both pages have to be readable before
    /// either is read; the first one's fault comes first.
    fn load_across(&mut self, va: u64, bytes: u32, whole: &Access) -> Result<[u64; 2], Fault> {
        let [low, high] = halves(va, bytes, whole);
        if let (Place::Host(first, _), Place::Host(second, _)) = (self.place(&low)?, self.place(&high)?) {
            let room = u32::from(low.size);
            // SAFETY: both are in pages of RAM or ROM, of which these are the last and the first 16 bytes.
            let (end, start) = unsafe {
                (host_load_pair(first.wrapping_add(room as usize).wrapping_sub(16)), host_load_pair(second))
            };
            let value = end >> (8 * (16 - room)) | start << (8 * room);
            let high = if bytes > 8 { (value >> 64) as u64 } else { 0 };
            return Ok([value as u64 & low_mask(bytes), high]);
        }
        let mut parts = [0; 2];
        for (n, part) in (0_u32..).zip(&mut parts).filter(|(n, _)| n * 8 < bytes) {
            *part = self.load_bytes(va.wrapping_add(u64::from(n * 8)), (bytes - n * 8).min(8), whole)?;
        }
        Ok(parts)
    }

    /// A load by a helper: `size` bytes (1 to 8), little-endian, zero-extended, across pages if need be.
    pub(crate) fn helper_load(&mut self, va: u64, size: u8, mmu_idx: u8) -> Result<u64, Fault> {
        let access = Access { gva: va, size, kind: AccessKind::Read, mmu_idx };
        match size {
            1 | 2 | 4 | 8 => Ok(self.load_part(va, u32::from(size), &access)? & low_mask(u32::from(size))),
            _ => self.load_bytes(va, u32::from(size.min(8)), &access),
        }
    }

    /// A store by a helper: the low `size` bytes (1, 2, 4, 8) of `value`; nothing is written if any byte faults.
    pub(crate) fn helper_store(&mut self, va: u64, size: u8, mmu_idx: u8, value: u64) -> Result<(), Fault> {
        let access = Access { gva: va, size, kind: AccessKind::Write, mmu_idx };
        self.store_part(va, u32::from(size.min(8)), value, &access)
    }

    /// Host memory behind `len` bytes in one page; `None` for devices, and for stores to ROM or code.
    pub(crate) fn host_range(&mut self, access: &Access) -> Result<Option<*mut u8>, Fault> {
        Ok(match self.place(access)? {
            // Where there are watchpoints, every element is looked at.
            Place::Host(..) if self.watches_page(access.gva) => None,
            Place::Host(host, None) => Some(host),
            Place::Host(..) | Place::Bus(_) => None,
        })
    }

    /// Host memory at `va`, to its page's end, if the TLB has it at hand.
    #[inline]
    pub(crate) fn host_at_hand(&self, va: u64, write: bool, mmu_idx: u8) -> Option<*mut u8> {
        if !self.debug.watchpoints.is_empty() {
            return None;
        }
        let addend = self.tlb.addend(self.shared.env(), va, mmu_idx, write)?;
        Some(std::ptr::with_exposed_provenance_mut((va as usize).wrapping_add(addend as usize)))
    }

    pub(crate) fn port_read(&mut self, port: u16, size: u8) -> u32 {
        count(&self.shared.counts.mmio);
        let index = self.shared.index();
        let read = with_host_fp(|| self.io.port_read(index, port, size));
        self.after_bus();
        read.unwrap_or(u32::MAX) & low_mask(u32::from(size)) as u32
    }

    pub(crate) fn port_write(&mut self, port: u16, size: u8, value: u32) {
        count(&self.shared.counts.mmio);
        let index = self.shared.index();
        with_host_fp(|| self.io.port_write(index, port, size, value & low_mask(u32::from(size)) as u32));
        self.after_bus();
    }

    fn load_bytes(&mut self, va: u64, bytes: u32, whole: &Access) -> Result<u64, Fault> {
        let mut value = 0;
        for n in 0..bytes {
            let access = Access { gva: va.wrapping_add(u64::from(n)), size: 1, ..*whole };
            let byte = match self.place(&access)? {
                // SAFETY: one byte at a valid place.
                Place::Host(host, _) => unsafe { host_load(host, 1) },
                Place::Bus(gpa) => self.bus_read(&access, gpa)? & 0xff,
            };
            value |= byte << (n * 8);
        }
        Ok(value)
    }

    fn bus_read(&mut self, access: &Access, gpa: u64) -> Result<u64, Fault> {
        count(&self.shared.counts.mmio);
        let (io, index) = (Arc::clone(&self.io), self.shared.index());
        let read = with_host_fp(|| io.read(index, gpa, access.size));
        self.after_bus();
        match read {
            Some(value) => Ok(value),
            None => match self.guest.bus_fault(access, gpa) {
                Some(fault) => Err(fault),
                None => Ok(u64::MAX),
            },
        }
    }

    fn bus_write(&mut self, access: &Access, gpa: u64, value: u64) -> Result<(), Fault> {
        count(&self.shared.counts.mmio);
        let index = self.shared.index();
        let value = value & low_mask(u32::from(access.size));
        let done = with_host_fp(|| self.io.write(index, gpa, access.size, value));
        self.after_bus();
        if !done && let Some(fault) = self.guest.bus_fault(access, gpa) {
            return Err(fault);
        }
        Ok(())
    }

    /// A device may have changed mappings (flash that leaves array mode): the next access sees that.
    fn after_bus(&mut self) {
        if self.shared.take_request(request::REMAP) {
            self.remap();
        }
    }

    /// A store by translated code.
    pub(crate) fn store(&mut self, va: u64, mem: MemOp, value: u64) -> Result<(), Fault> {
        let access = Self::access(va, mem, AccessKind::Write);
        self.check_alignment(&access, mem)?;
        let value = to_memory(value, mem);
        if mem.bytes() == 16 {
            let high = self.shared.env().scratch();
            if crosses(va, 16) {
                return self.store_across(va, 16, [value, high], &access);
            }
            self.store_part(va, 8, value, &access)?;
            return self.store_part(va.wrapping_add(8), 8, high, &access);
        }
        self.store_part(va, mem.bytes(), value, &access)
    }

    fn store_part(&mut self, va: u64, bytes: u32, value: u64, whole: &Access) -> Result<(), Fault> {
        if crosses(va, bytes) {
            return self.store_across(va, bytes, [value, 0], whole);
        }
        self.store_within(va, bytes, value, whole)
    }

    /// A store of `bytes` (2 to 16) in two pages. The first page's fault comes first, and nothing is written unless both
    /// pages can be.
    fn store_across(&mut self, va: u64, bytes: u32, value: [u64; 2], whole: &Access) -> Result<(), Fault> {
        let [low, high] = halves(va, bytes, whole);
        let (first, second) = (self.place(&low)?, self.place(&high)?);
        let (room, rest) = (u32::from(low.size), u32::from(high.size));
        self.changes_code(first, room)?;
        self.changes_code(second, rest)?;
        let all = u128::from(value[0]) | u128::from(value[1]) << 64;
        if let (Place::Host(first, report), Place::Host(second, second_report)) = (first, second) {
            // SAFETY: both places are valid for their part of the access, which crosses no page.
            unsafe {
                host_store_piece(first, room, all);
                host_store_piece(second, rest, all >> (8 * room));
            }
            self.report(report, room);
            self.report(second_report, rest);
            return Ok(());
        }
        for n in 0..bytes {
            self.store_within(va.wrapping_add(u64::from(n)), 1, (all >> (n * 8)) as u64, whole)?;
        }
        Ok(())
    }

    fn store_within(&mut self, va: u64, bytes: u32, value: u64, whole: &Access) -> Result<(), Fault> {
        let access = Access { gva: va, size: bytes as u8, ..*whole };
        let place = self.place(&access)?;
        self.changes_code(place, bytes)?;
        match place {
            Place::Host(host, report) => {
                // SAFETY: the place is valid for the access, which crosses no page.
                unsafe { host_store(host, bytes, value) };
                self.report(report, bytes);
                Ok(())
            }
            Place::Bus(gpa) => self.bus_write(&access, gpa, value),
        }
    }

    /// Invalidates what was translated from bytes that were just stored.
    fn report(&mut self, gpa: Option<u64>, bytes: u32) {
        if let Some(gpa) = gpa {
            count(&self.shared.counts.code_stores);
            self.code_hit |= self.vm.code_written(gpa, u64::from(bytes)) > 0;
        }
    }

    /// Before a store of translated code: if it changes code that is translated, and the guest may count on running it
    /// next, the instruction is to be run again by itself.
    ///
    /// # Errors
    /// [`VcpuCore::again`] is set then; the fault means nothing.
    fn changes_code(&mut self, place: Place, bytes: u32) -> Result<(), Fault> {
        let Place::Host(_, Some(gpa)) = place else { return Ok(()) };
        let Some(pc) = self.storing else { return Ok(()) };
        if !self.guest.spec().precise_code || self.alone == Some(pc) {
            return Ok(());
        }
        if self.vm.code_written(gpa, u64::from(bytes)) == 0 {
            return Ok(());
        }
        self.again = true;
        Err(AGAIN)
    }

    /// An atomic read-modify-write: `next` gives what to store, `None` to leave it. Gives the old value.
    fn atomic(&mut self, va: u64, mem: MemOp, next: impl Fn(u64) -> Option<u64>) -> Result<u64, Fault> {
        let access = Self::access(va, mem, AccessKind::Write);
        let bytes = mem.bytes().min(8);
        let swapped = |old: u64| next(extend(old, mem) & low_mask(bytes)).map(|new| to_memory(new, mem));
        if !va.is_multiple_of(u64::from(bytes)) {
            if mem.is_aligned() || !self.guest.spec().misaligned_ok {
                return Err(self.misaligned(&access, true));
            }
            return Ok(extend(self.atomic_misaligned(&access, swapped)?, mem));
        }
        let place = self.place(&access)?;
        self.changes_code(place, bytes)?;
        let old = match place {
            Place::Host(host, report) => {
                // SAFETY: the place is valid, and aligned as the address is.
                let old = unsafe { host_atomic(host, bytes, swapped) };
                self.report(report, bytes);
                old
            }
            Place::Bus(gpa) => {
                let old = self.bus_read(&access, gpa)?;
                if let Some(new) = swapped(old) {
                    self.bus_write(&access, gpa, new)?;
                }
                old
            }
        };
        Ok(extend(old, mem))
    }

    /// An atomic access that is not aligned. Where the host has one for it (x86), it is atomic if the memory is one
    /// piece on the host; otherwise only against others of this kind.
    fn atomic_misaligned(
        &mut self,
        access: &Access,
        next: impl Fn(u64) -> Option<u64>,
    ) -> Result<u64, Fault> {
        let (va, bytes) = (access.gva, u32::from(access.size));
        // The last page's first byte, or that of the access if there is only one. Both ends have to be writable before
        // anything happens.
        let last = va.wrapping_add(u64::from(bytes) - 1);
        let last = va.max(last & !(PAGE_SIZE - 1));
        let first = self.place(&Access { size: 1, ..*access })?;
        let end = self.place(&Access { gva: last, size: 1, ..*access })?;
        self.changes_code(first, bytes.min((PAGE_SIZE - va % PAGE_SIZE) as u32))?;
        self.changes_code(end, 1)?;
        if let (Place::Host(host, report), Place::Host(end, end_report)) = (first, end)
            && host.wrapping_add((last - va) as usize) == end
            && let Some(old) = split::update(host, bytes, &next)
        {
            self.report(report, bytes);
            self.report(end_report, 1);
            return Ok(old);
        }
        let _alone = split::LOCK.lock();
        let old = self.load_part(va, bytes, access)?;
        if let Some(new) = next(old) {
            self.store_part(va, bytes, new, access)?;
        }
        Ok(old)
    }
}

/// Atomic accesses that are not aligned, which Rust's atomics do not have.
mod split {
    use parking_lot::Mutex;

    /// Held by those that the host cannot do.
    pub static LOCK: Mutex<()> = Mutex::new(());

    /// Replaces the value at `host` by what `next` makes of it, if anything; gives the old one. `None` if the host
    /// has no such access.
    #[cfg(target_arch = "x86_64")]
    pub fn update(host: *mut u8, bytes: u32, next: &impl Fn(u64) -> Option<u64>) -> Option<u64> {
        macro_rules! exchange {
            ($int:ident, $new:literal) => {{
                // SAFETY: guest RAM, which others may change meanwhile: then the exchange fails.
                let mut old = unsafe { host.cast::<$int>().read_unaligned() };
                loop {
                    let Some(new) = next(u64::from(old)) else { break };
                    let expected = old;
                    // SAFETY: guest RAM; LOCK CMPXCHG takes any alignment.
                    unsafe {
                        std::arch::asm!(
                            concat!("lock cmpxchg [{host}], ", $new),
                            host = in(reg) host,
                            new = in(reg) new as $int,
                            inout("rax") old,
                            options(nostack),
                        );
                    }
                    if old == expected {
                        break;
                    }
                }
                Some(u64::from(old))
            }};
        }
        match bytes {
            2 => exchange!(u16, "{new:x}"),
            4 => exchange!(u32, "{new:e}"),
            8 => exchange!(u64, "{new:r}"),
            _ => None,
        }
    }

    /// Other hosts have none.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn update(_: *mut u8, _: u32, _: &impl Fn(u64) -> Option<u64>) -> Option<u64> {
        None
    }
}
