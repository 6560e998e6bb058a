//! What the vCPUs of one VM share.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use holdfast_clock::{Timers, VmClock};
use holdfast_memory::{CodeObserver, GuestMemory, GuestRegion, PAGE_SIZE};
use parking_lot::{Mutex, RwLock};

use crate::cache::{CodeCache, SegmentId};
use crate::engine::EngineKind;
use crate::guest::{Flush, Guest};
use crate::log::TraceLog;
use crate::perf::PerfMap;
use crate::phys::{Io, PhysMemory};
use crate::regions::{Killed, Regions};
use crate::shared::{VcpuShared, request};
use crate::table::Region;
use crate::unshare::Unshared;

/// How long a change of memory that devices show waits for vCPUs.
const SHORT: std::time::Duration = std::time::Duration::from_millis(20);

/// A VM or vCPU that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The host gave no memory for translated code or a vCPU.
    #[error("no memory for {0}")]
    Memory(&'static str, #[source] io::Error),
    /// The back end refused.
    #[error("no code can be generated")]
    Codegen(#[source] holdfast_tcg_x64::CodegenError),
    /// The CPU model is not one this guest has.
    #[error("CPU model: {0}")]
    Model(String),
    /// There is no such vCPU, or it was made already.
    #[error("vCPU {0} cannot be made")]
    Vcpu(u32),
    /// The ROM window does not fit.
    #[error("ROM at {gpa:#x}: {reason}")]
    Rom {
        /// Its start.
        gpa: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// A state that does not fit.
    #[error("state: {0}")]
    State(String),
    /// The guest left translated code in a way that nobody knows.
    #[error("unknown exit {code} at {pc:#x}")]
    Exit {
        /// The code.
        code: u32,
        /// Guest-virtual program counter.
        pc: u64,
    },
}

/// How to run guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// Generate host code if there is a back end for this host, else interpret.
    #[default]
    Auto,
    /// Interpret the IR: the oracle of tests.
    Interpreter,
}

/// What a VM is made from.
#[derive(Debug)]
pub struct VmParts {
    /// The architecture.
    pub guest: &'static dyn Guest,
    /// RAM.
    pub memory: GuestMemory,
    /// Everything that is not RAM.
    pub io: Arc<dyn Io>,
    /// Guest-virtual time.
    pub clock: Arc<VmClock>,
    /// Alarms on it.
    pub timers: Arc<Timers>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes for translated code; 0 for the default.
    pub code_cache: usize,
    /// How to run guest code.
    pub engine: Engine,
    /// A controller for each vCPU that its guest architecture knows how to talk to (x86: the local APIC). Empty if it
    /// has none.
    pub controllers: Vec<Arc<dyn Any + Send + Sync>>,
}

/// Translations that were made, and what they cost.
#[derive(Debug, Default)]
pub struct VmCounts {
    /// Regions translated.
    pub translated: AtomicU64,
    /// Those of them that were made before they ran.
    pub ahead: AtomicU64,
    /// Guest bytes of them.
    pub guest_bytes: AtomicU64,
    /// Basic blocks of the regions translated.
    pub blocks: AtomicU64,
    /// Guest instructions translated.
    pub insns: AtomicU64,
    /// Host bytes of them.
    pub host_bytes: AtomicU64,
    /// Translations whose CPU time was taken; others are not, for asking costs a system call.
    pub timed: AtomicU64,
    /// Nanoseconds of CPU time that these took.
    pub timed_ns: AtomicU64,
    /// Times a translation waited for another vCPU's safe point.
    pub waits: AtomicU64,
    /// Regions dropped because their bytes were written meanwhile.
    pub stale: AtomicU64,
    /// Regions invalidated by writes.
    pub invalidated: AtomicU64,
    /// Regions evicted for space.
    pub evicted: AtomicU64,
    /// Regions translated without shared probes.
    pub unshared: AtomicU64,
    /// Times a page became a code page while a vCPU could write it.
    pub protections: AtomicU64,
}

/// A VM as its vCPUs see it.
pub struct TcgVm {
    pub(crate) guest: &'static dyn Guest,
    phys: RwLock<Arc<PhysMemory>>,
    pub(crate) io: Arc<dyn Io>,
    pub(crate) clock: Arc<VmClock>,
    pub(crate) timers: Arc<Timers>,
    pub(crate) regions: Regions,
    pub(crate) engine: EngineKind,
    vcpus: RwLock<Vec<Arc<VcpuShared>>>,
    pub(crate) controllers: Vec<Arc<dyn Any + Send + Sync>>,
    pub(crate) limit: u32,
    /// The set of hot pages that vCPUs have to use from their next remap on.
    pub(crate) hot_side: AtomicUsize,
    pub(crate) counts: VmCounts,
    /// Code whose accesses share no probes.
    pub(crate) unshared: Unshared,
    /// Where translated code is listed for `perf`.
    perf_map: OnceLock<PerfMap>,
    /// Where translations are logged.
    pub(crate) log: OnceLock<TraceLog>,
    /// Addresses at which some vCPU stops; regions end before them.
    pub(crate) breakpoints: RwLock<Arc<Vec<u64>>>,
    /// How many vCPUs stop at each of them.
    breakpoint_users: Mutex<BTreeMap<u64, u32>>,
    /// One dirty log synchronisation or mapping change at a time.
    changing: Mutex<()>,
}

impl fmt::Debug for TcgVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcgVm").field("guest", &self.guest.spec().name).finish_non_exhaustive()
    }
}

/// Tells the VM of writes by others.
struct Observer(Weak<TcgVm>);

impl CodeObserver for Observer {
    fn code_written(&self, gpa: u64, len: u64) {
        if let Some(vm) = self.0.upgrade() {
            vm.code_written(gpa, len);
        }
    }
}

impl TcgVm {
    /// Makes the VM and starts watching its RAM.
    ///
    /// # Errors
    /// [`RuntimeError`] if the host has no memory for code or the back end refuses.
    pub fn new(parts: VmParts) -> Result<Arc<Self>, RuntimeError> {
        let vcpus = parts.vcpus as usize;
        let (engine, cache) = EngineKind::new(parts.guest, parts.engine, parts.code_cache, vcpus)?;
        let vm = Arc::new(Self {
            guest: parts.guest,
            phys: RwLock::new(Arc::new(PhysMemory::new(&parts.memory))),
            io: parts.io,
            clock: parts.clock,
            timers: parts.timers,
            regions: Regions::new(vcpus, cache),
            engine,
            vcpus: RwLock::default(),
            controllers: parts.controllers,
            limit: parts.vcpus,
            hot_side: AtomicUsize::new(0),
            counts: VmCounts::default(),
            unshared: Unshared::default(),
            perf_map: OnceLock::new(),
            log: OnceLock::new(),
            breakpoints: RwLock::default(),
            breakpoint_users: Mutex::default(),
            changing: Mutex::new(()),
        });
        let observer: Arc<dyn CodeObserver> = Arc::new(Observer(Arc::downgrade(&vm)));
        holdfast_memory::observe_code(&parts.memory, &observer);
        Ok(vm)
    }

    /// RAM and ROM as they are now.
    pub fn phys(&self) -> Arc<PhysMemory> {
        Arc::clone(&self.phys.read())
    }

    /// Lists all code that is translated from now on in `/tmp/perf-PID.map`, where `perf` finds it.
    ///
    /// # Errors
    /// The host's, if the file cannot be made, or if nothing is translated to host code.
    pub fn start_perf_map(&self) -> io::Result<()> {
        let cache = self.cache().ok_or_else(|| io::Error::other("guest code is interpreted"))?;
        let map = PerfMap::create()?;
        map.add(cache.exec_addr(0).addr() as u64, cache.segment_len() as u64, "holdfast_stubs");
        // A second call changes nothing.
        let _ = self.perf_map.set(map);
        Ok(())
    }

    /// Sets the nanoseconds within which a thousand accesses of a vCPU have to fall back from the TLB probe that they share, for
    /// they lie in two pages, for their code to be translated without: 0 for never, `u64::MAX` for always.
    pub fn unshare_within(&self, ns: u64) {
        self.unshared.set_too_fast(ns);
    }

    /// Logs what is translated from now on. A second call changes nothing.
    pub fn start_log(&self, log: TraceLog) {
        let _ = self.log.set(log);
    }

    /// Says that `region` is there, for profilers.
    pub(crate) fn list(&self, region: &Region) {
        if let (Some(map), Some(code)) = (self.perf_map.get(), region.host()) {
            let name = format!("{}_{:x}_{:x}", self.guest.spec().name, region.key.pc, region.key.mode);
            map.add(code.entry, u64::from(code.len), &name);
        }
    }

    /// The code cache, if host code is generated.
    pub fn cache(&self) -> Option<&CodeCache> {
        self.regions.cache.as_ref()
    }

    /// The vCPUs made so far.
    pub fn vcpus(&self) -> Vec<Arc<VcpuShared>> {
        self.vcpus.read().clone()
    }

    pub(crate) fn add_vcpu(&self, vcpu: &Arc<VcpuShared>) -> Result<(), RuntimeError> {
        let mut vcpus = self.vcpus.write();
        if vcpu.index() >= self.limit || vcpus.iter().any(|v| v.index() == vcpu.index()) {
            return Err(RuntimeError::Vcpu(vcpu.index()));
        }
        vcpus.push(Arc::clone(vcpu));
        Ok(())
    }

    /// Sets pin `pin` of vCPU `index`; unknown ones are ignored.
    pub fn set_pin(&self, index: u32, pin: u32, level: bool) {
        if let Some(vcpu) = self.vcpus.read().iter().find(|v| v.index() == index) {
            vcpu.set_pin(pin, level);
        }
    }

    /// Makes vCPU `index` look for interrupts at its next safe point, and wakes it: for controllers that hold more
    /// than the level of a pin. Unknown ones are ignored.
    pub fn interrupt(&self, index: u32) {
        if let Some(vcpu) = self.vcpus.read().iter().find(|v| v.index() == index) {
            vcpu.request(request::INTERRUPT);
        }
    }

    /// Bytes that may have been translated were written.
    ///
    /// How many translations that took out.
    pub fn code_written(&self, gpa: u64, len: u64) -> usize {
        let phys = self.phys();
        let killed = self.regions.invalidate(&phys, gpa, len, &|killed| self.post(killed));
        self.counts.invalidated.fetch_add(killed as u64, Ordering::Relaxed);
        killed
    }

    /// Takes out everything whose code lies in `segment`.
    pub(crate) fn evict(&self, segment: SegmentId) {
        let killed = self.regions.evict(&self.phys(), segment, &|killed| self.post(killed));
        self.counts.evicted.fetch_add(killed as u64, Ordering::Relaxed);
    }

    /// Tells all vCPUs to forget regions that were taken out.
    fn post(&self, killed: &[Killed]) {
        for vcpu in self.vcpus.read().iter() {
            vcpu.forget(killed);
        }
    }

    /// Takes out everything that was translated.
    pub(crate) fn forget_all(&self) {
        self.clear_regions(&self.phys());
    }

    fn clear_regions(&self, phys: &PhysMemory) {
        self.regions.clear(phys, &|_| self.vcpus.read().iter().for_each(|v| v.forget_everything()));
    }

    /// Code is about to be read from `page` for the first time: no vCPU may write it unnoticed any more. Gives the
    /// vCPUs other than `me` that could: the bytes must not be read before each has passed a safe point, for
    /// it may be between a probe and its store.
    pub(crate) fn protect(&self, me: u32, phys: &PhysMemory, page: u64) -> Vec<Arc<VcpuShared>> {
        let Some(at) = phys.find(page * PAGE_SIZE, PAGE_SIZE) else { return Vec::new() };
        if !at.block.hot.is_hot(at.offset / PAGE_SIZE) {
            return Vec::new();
        }
        self.counts.protections.fetch_add(1, Ordering::Relaxed);
        let host = at.host.expose_provenance() as u64;
        let vcpus = self.vcpus.read();
        vcpus.iter().filter(|v| v.clear_write_entries(host) && v.index() != me).cloned().collect()
    }

    /// Asks all vCPUs but `except` to flush.
    pub(crate) fn flush_others(&self, except: u32, what: Flush) {
        for vcpu in self.vcpus.read().iter().filter(|v| v.index() != except) {
            vcpu.post_flush(what);
        }
    }

    /// Makes all vCPUs start over with an empty TLB and waits until each has, or runs nothing. A device that
    /// changes mappings on a vCPU's thread does not wait: that vCPU sees the change at once, the others
    /// at their next safe point, and until then the old mapping is kept alive by them.
    fn remap_all(&self) {
        self.remap(None);
    }

    /// As [`TcgVm::remap_all`]; waits no longer than `limit`.
    fn remap(&self, limit: Option<std::time::Duration>) {
        for vcpu in self.vcpus.read().iter() {
            vcpu.request(request::REMAP);
        }
        let epoch = self.regions.epochs.advance();
        if crate::vcpu::IN_RUN.get() {
            return;
        }
        let step = std::time::Duration::from_micros(20);
        let mut left = limit;
        while self.regions.epochs.passed() <= epoch && left.is_none_or(|left| !left.is_zero()) {
            std::thread::sleep(step);
            left = left.map(|left| left.saturating_sub(step));
        }
    }

    /// Adds a ROM window.
    ///
    /// # Errors
    /// [`RuntimeError::Rom`] if it is not page aligned, empty, or overlaps RAM or another window.
    pub fn map_rom(&self, gpa: u64, region: &Arc<GuestRegion>) -> Result<(), RuntimeError> {
        self.map_window(gpa, region, false)?;
        self.remap_all();
        Ok(())
    }

    /// Adds memory of a device, which vCPUs write as RAM if it is `writable`. A thread that a vCPU waits for may call
    /// it: vCPUs that do not come to a safe point soon see it later.
    ///
    /// # Errors
    /// As [`TcgVm::map_rom`].
    pub fn map_shared(
        &self,
        gpa: u64,
        region: &Arc<GuestRegion>,
        writable: bool,
    ) -> Result<(), RuntimeError> {
        self.map_window(gpa, region, writable)?;
        self.remap(Some(SHORT));
        Ok(())
    }

    /// Removes what [`TcgVm::map_shared`] added at `gpa`. vCPUs that do not come to a safe point soon may use it until
    /// then: they keep it.
    ///
    /// # Errors
    /// As [`TcgVm::unmap_rom`].
    pub fn unmap_shared(&self, gpa: u64) -> Result<(), RuntimeError> {
        self.unmap_window(gpa)?;
        self.remap(Some(SHORT));
        Ok(())
    }

    fn map_window(&self, gpa: u64, region: &Arc<GuestRegion>, writable: bool) -> Result<(), RuntimeError> {
        use vm_memory::GuestMemoryRegion;
        let _one = self.changing.lock();
        let old = self.phys();
        let len = region.len() & !(PAGE_SIZE - 1);
        if !gpa.is_multiple_of(PAGE_SIZE) || len == 0 || gpa.checked_add(len).is_none() {
            return Err(RuntimeError::Rom { gpa, reason: "is no whole number of pages" });
        }
        if old.blocks().iter().any(|b| gpa < b.gpa + b.len && b.gpa < gpa + len) {
            return Err(RuntimeError::Rom { gpa, reason: "overlaps RAM or another ROM" });
        }
        *self.phys.write() = Arc::new(old.with_window(gpa, region, writable));
        Ok(())
    }

    /// Removes the ROM window that starts at `gpa`.
    ///
    /// # Errors
    /// [`RuntimeError::Rom`] if there is none.
    pub fn unmap_rom(&self, gpa: u64) -> Result<(), RuntimeError> {
        self.unmap_window(gpa)?;
        self.remap_all();
        Ok(())
    }

    fn unmap_window(&self, gpa: u64) -> Result<(), RuntimeError> {
        let _one = self.changing.lock();
        let old = self.phys();
        if !old.has_window(gpa) {
            return Err(RuntimeError::Rom { gpa, reason: "is not mapped" });
        }
        *self.phys.write() = Arc::new(old.without_window(gpa));
        // Code translated from it goes too.
        self.clear_regions(&old);
        Ok(())
    }

    /// Marks the pages that vCPUs wrote since the last call dirty in the RAM's own trackers.
    pub fn sync_dirty_log(&self) {
        let _one = self.changing.lock();
        let old = self.hot_side.fetch_xor(1, Ordering::SeqCst) & 1;
        self.remap_all();
        let phys = self.phys();
        for block in phys.blocks() {
            block.hot.take(old, |page| block.tracker.set_dirty(page));
        }
    }

    /// Forgets which pages vCPUs wrote so far: logging starts.
    pub fn start_dirty_log(&self) {
        let _one = self.changing.lock();
        let old = self.hot_side.fetch_xor(1, Ordering::SeqCst) & 1;
        self.remap_all();
        for block in self.phys().blocks() {
            block.hot.take(old, |_| {});
        }
    }

    /// One vCPU stops at `new` instead of `old`: regions end there, and those that have to change are taken out.
    pub(crate) fn change_breakpoints(&self, old: &[u64], new: &[u64]) {
        let changed = {
            let mut users = self.breakpoint_users.lock();
            let mut changed = Vec::new();
            for pc in new.iter().filter(|pc| old.binary_search(pc).is_err()) {
                let count = users.entry(*pc).or_insert(0_u32);
                *count += 1;
                if *count == 1 {
                    changed.push(*pc);
                }
            }
            for pc in old.iter().filter(|pc| new.binary_search(pc).is_err()) {
                if let Some(count) = users.get_mut(pc) {
                    *count -= 1;
                    if *count == 0 {
                        users.remove(pc);
                        changed.push(*pc);
                    }
                }
            }
            if !changed.is_empty() {
                *self.breakpoints.write() = Arc::new(users.keys().copied().collect());
            }
            changed
        };
        if !changed.is_empty() {
            self.regions.invalidate_code_at(&self.phys(), &changed, &|killed| self.post(killed));
        }
    }
}
