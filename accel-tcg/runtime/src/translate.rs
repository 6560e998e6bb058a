//! Making regions from guest code.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use holdfast_clock::{host_monotonic, thread_cpu_time};
use holdfast_memory::PAGE_SIZE;

use crate::code::{CodeReader, CodeSource};
use crate::guest::{Access, AccessKind, Fault, Guest, TranslateRequest};
use crate::log::Translated;
use crate::phys::PhysMemory;
use crate::regions::Begin;
use crate::shared::{VcpuShared, request};
use crate::table::{Body, GRANULE, Key, Region};
use crate::vcpu::{KEY_STEP, VcpuCore};
use crate::vm::TcgVm;
use crate::wait;

/// Guest instructions in one region at most.
const MAX_INSNS: u32 = 64;

/// The time of one in so many translations is taken. Its beginning is not taken from the thread's CPU time: to ask for that is a
/// system call, after which the host's branch predictors and caches have to learn the translator anew. That the thread was on its
/// processor all the while is asked at the end.
const TIMED: u32 = 8;

/// A translation is not counted if the thread was off its processor for longer than this, in nanoseconds, since the last one was
/// timed.
const OFF_CPU: u64 = 2_000;

/// What reading the clock itself takes, in nanoseconds.
fn clock_cost() -> u64 {
    const TIMES: u64 = 32;
    static COST: OnceLock<u64> = OnceLock::new();
    *COST.get_or_init(|| {
        let started = host_monotonic();
        let ended = (0..TIMES).fold(started, |_, _| host_monotonic());
        ended.saturating_sub(started) / TIMES
    })
}

/// A page that code is read from.
#[derive(Debug, Clone, Copy)]
struct SourcePage {
    /// Guest-virtual page address.
    va: u64,
    /// Guest-physical page number.
    page: u64,
    /// Host address of the page.
    host: *const u8,
    /// Granules read so far.
    granules: u64,
}

/// Reads code for one region and notes what was read.
struct Source<'a> {
    core: &'a mut VcpuCore,
    phys: Arc<PhysMemory>,
    breakpoints: Arc<Vec<u64>>,
    first: SourcePage,
    second: Option<SourcePage>,
    /// Writes of code before anything was read.
    since: u64,
}

impl VcpuCore {
    /// Begins reading code from the page of `gpa`. The fault if there is neither RAM nor ROM.
    fn open_page(&mut self, phys: &PhysMemory, va: u64, gpa: u64) -> Result<SourcePage, Fault> {
        let page = gpa / PAGE_SIZE;
        let Some(at) = phys.find(page * PAGE_SIZE, PAGE_SIZE) else {
            let access = Access {
                gva: va,
                size: self.guest.spec().insn_align,
                kind: AccessKind::Fetch,
                mmu_idx: self.mode.fetch_idx,
            };
            // Code is never fetched from devices; where reads of nothing give all ones, so does this.
            let fault = Fault { cause: 0, value: va, aux: 0 };
            return Err(self.guest.bus_fault(&access, gpa).unwrap_or(fault));
        };
        let vm = Arc::clone(&self.vm);
        match vm.regions.begin_page(phys, page) {
            Begin::Ready => {}
            Begin::Guard => {
                let writers = vm.protect(self.shared.index(), phys, page);
                self.wait_for(&writers);
                vm.regions.guarded(page);
            }
            Begin::Wait => self.out_of_epoch(|vm| {
                wait::until(|| vm.regions.is_guarded(page));
            }),
        }
        Ok(SourcePage { va: va & !(PAGE_SIZE - 1), page, host: at.host, granules: 0 })
    }

    /// Waits until each of `others` has passed a safe point.
    fn wait_for(&mut self, others: &[Arc<VcpuShared>]) {
        if others.is_empty() {
            return;
        }
        self.out_of_epoch(|vm| {
            let epoch = vm.regions.epochs.advance();
            for other in others {
                other.request(request::WORK);
                wait::until(|| vm.regions.epochs.has_passed(other.index(), epoch));
            }
        });
    }

    /// Lets `wait` wait for other vCPUs, which may be waiting for this one's safe point. It holds no region, and passes
    /// a real one before it runs code again.
    fn out_of_epoch(&mut self, wait: impl FnOnce(&TcgVm)) {
        let vm = Arc::clone(&self.vm);
        vm.counts.waits.fetch_add(1, Ordering::Relaxed);
        self.away = true;
        vm.regions.epochs.leave(self.shared.index());
        wait(&vm);
        vm.regions.epochs.enter(self.shared.index());
    }

    /// Counts the time since `started` as that of a translation, if the thread was at it all the time.
    fn count_time(&mut self, started: u64) {
        let (ended, on_cpu) = (host_monotonic(), thread_cpu_time());
        let (last_ended, last_on_cpu) = std::mem::replace(&mut self.timed, (ended, on_cpu));
        let off = ended.saturating_sub(last_ended).saturating_sub(on_cpu.saturating_sub(last_on_cpu));
        // Waiting for others is no translation.
        if !self.away && last_ended != 0 && off < OFF_CPU {
            let took = ended.saturating_sub(started).saturating_sub(clock_cost());
            self.vm.counts.timed.fetch_add(1, Ordering::Relaxed);
            self.vm.counts.timed_ns.fetch_add(took, Ordering::Relaxed);
        }
    }

    /// Translates the code at `key` and publishes it. `None` if it has to be tried again.
    pub(crate) fn translate(&mut self, key: Key) -> Result<Option<*const Region>, Fault> {
        self.translations = self.translations.wrapping_add(1);
        let started = self.translations.is_multiple_of(TIMED).then(host_monotonic);
        let vm = Arc::clone(&self.vm);
        if vm.regions.ids_exhausted() {
            vm.forget_all();
            return Ok(None);
        }
        self.away = false;
        let phys = Arc::clone(&self.phys);
        let first = self.open_page(&phys, key.pc, key.phys)?;
        let since = vm.regions.writes();
        let mut source = Source {
            phys: Arc::clone(&phys),
            breakpoints: Arc::clone(&vm.breakpoints.read()),
            core: self,
            first,
            second: None,
            since,
        };
        let made = make(&mut source, key);
        let pages = [Some(first.page), source.second.map(|p| p.page)];
        let region = match made {
            Ok(made) => Ok(vm.regions.publish_and_end(&phys, made, pages)),
            Err(fault) => {
                pages.into_iter().flatten().for_each(|page| vm.regions.end_page(&phys, page));
                Err(fault)
            }
        };
        // Waiting for others is no translation.
        if let Some(started) = started {
            self.count_time(started);
        }
        match region? {
            Some(region) => {
                vm.counts.translated.fetch_add(1, Ordering::Relaxed);
                vm.counts.blocks.fetch_add(u64::from(region.blocks), Ordering::Relaxed);
                vm.counts.insns.fetch_add(u64::from(region.insns), Ordering::Relaxed);
                vm.counts.guest_bytes.fetch_add(u64::from(region.guest_len), Ordering::Relaxed);
                let host_len = region.host().map_or(0, |code| u64::from(code.len));
                vm.counts.host_bytes.fetch_add(host_len, Ordering::Relaxed);
                vm.counts.unshared.fetch_add(u64::from(region.unshared), Ordering::Relaxed);
                vm.list(&region);
                Ok((!self.away).then_some(Arc::as_ptr(&region)))
            }
            None => {
                vm.counts.stale.fetch_add(1, Ordering::Relaxed);
                Ok(None)
            }
        }
    }
}

/// Decodes, builds and compiles; the region is not published yet.
fn make(source: &mut Source<'_>, key: Key) -> Result<Option<Arc<Region>>, Fault> {
    let guest = source.core.guest;
    let step = key.mode & KEY_STEP != 0;
    let request = TranslateRequest {
        pc: key.pc,
        key: key.mode & !KEY_STEP,
        max_insns: if step { 1 } else { MAX_INSNS.min(source.core.engine.limit()) },
        // Loops back to a breakpoint leave the region: the debugger stops there every time round.
        no_chain: step || source.breakpoints.binary_search(&key.pc).is_ok(),
    };
    let mut builder = source.core.engine.take_builder(guest);
    builder.start(key.pc);
    let translated = guest.translate(&request, &mut CodeReader::new(source), &mut builder);
    let result = match translated {
        Ok(t) => {
            let id = source.core.vm.regions.reserve_id();
            let unshared = source.unshared();
            match source.core.compile(&mut builder, id, !unshared) {
                Ok(Some(body)) => {
                    let len = t.end.wrapping_sub(key.pc);
                    if source.core.vm.log.get().is_some_and(|log| log.wants(key.pc, len)) {
                        log_region(source, key, len, (builder.region(), &body));
                    }
                    let mut shared = Arc::new(Region::new(id, key, body));
                    // Nobody else has it yet.
                    if let Some(region) = Arc::get_mut(&mut shared) {
                        region.insns = t.insns;
                        region.blocks = t.blocks;
                        region.guest_len = t.end.wrapping_sub(key.pc) as u32;
                        region.unshared = unshared;
                        region.granules[0] = source.first.granules;
                        region.since = source.since;
                        if let Some(second) = source.second {
                            region.second = second.page;
                            region.granules[1] = second.granules;
                        }
                        // What is translated ahead was cached where it ran.
                        let cached = source.core.ahead
                            || source.core.tlb.code(key.pc, source.core.mode.fetch_idx).is_some();
                        region.chain = !step && cached && source.breakpoints.binary_search(&key.pc).is_err();
                    }
                    Ok(Some(shared))
                }
                Ok(None) => {
                    source.core.vm.regions.release_id(id);
                    Ok(None)
                }
                Err(e) => {
                    source.core.vm.regions.release_id(id);
                    source.core.failure = Some(e);
                    Ok(None)
                }
            }
        }
        Err(fault) => Err(fault),
    };
    source.core.engine.return_builder(builder);
    result
}

/// Logs a region of `len` bytes.
fn log_region(source: &mut Source<'_>, key: Key, len: u64, made: (&holdfast_tcg_ir::Region, &Body)) {
    let vm = Arc::clone(&source.core.vm);
    let Some(log) = vm.log.get() else { return };
    let mut guest = String::new();
    if log.guest() {
        // The bytes may have changed since; then the region is dropped, and a later one tells.
        let mut reader = CodeReader::new(source);
        let bytes: Vec<u8> = (0..len).map_while(|n| reader.u8(key.pc.wrapping_add(n)).ok()).collect();
        guest = disassemble(vm.guest, key, &bytes);
    }
    let host = match (made.1, source.core.engine.stubs()) {
        (Body::Host(code), Some(stubs)) => {
            let start = vm.cache().map(|cache| cache.exec_addr(code.offset));
            // SAFETY: the region's code is in the cache, nobody changes it before it is published, and its segment is
            // this vCPU's.
            start.map(|at| (unsafe { std::slice::from_raw_parts(at, code.len as usize) }, code.entry, stubs))
        }
        _ => None,
    };
    log.region(&Translated {
        vcpu: source.core.shared.index(),
        pc: key.pc,
        phys: key.phys,
        key: key.mode,
        guest: &guest,
        ir: made.0,
        host,
    });
}

/// A line for each instruction: address, bytes, text.
fn disassemble(guest: &dyn Guest, key: Key, bytes: &[u8]) -> String {
    let (mut text, mut at) = (String::new(), 0);
    while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
        let pc = key.pc.wrapping_add(at as u64);
        let (len, insn) = guest.disassemble(key.mode & !KEY_STEP, pc, rest);
        let len = len.clamp(1, rest.len());
        let code: String = rest.iter().take(len).map(|b| format!("{b:02x}")).collect();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {pc:#018x}: {code:<20} {insn}");
        at += len;
    }
    text
}

impl Source<'_> {
    /// Whether accesses of what was read are to share no probes.
    fn unshared(&self) -> bool {
        let pages = [Some(self.first), self.second];
        pages.into_iter().flatten().any(|p| self.core.vm.unshared.holds(p.page, p.granules))
    }

    /// The page of `pc` and the offset in it, opening the second page when it is reached.
    fn page(&mut self, pc: u64, len: u64) -> Result<(*const u8, u64), Fault> {
        let offset = pc % PAGE_SIZE;
        let last = (offset + len - 1).min(PAGE_SIZE - 1) / GRANULE;
        let granules = (u64::MAX << (offset / GRANULE)) & (u64::MAX >> (63 - last));
        let va = pc - offset;
        if va == self.first.va {
            self.first.granules |= granules;
            return Ok((self.first.host, offset));
        }
        if self.second.is_none_or(|p| p.va != va) {
            if self.core.ahead {
                return Err(Fault { cause: 0, value: pc, aux: 0 });
            }
            let gpa = self.core.fetch(pc)?;
            let phys = Arc::clone(&self.phys);
            let opened = self.core.open_page(&phys, pc, gpa)?;
            if let Some(old) = self.second.replace(opened) {
                self.core.vm.regions.end_page(&phys, old.page);
            }
        }
        let second = self.second.get_or_insert(self.first);
        second.granules |= granules;
        Ok((second.host, offset))
    }
}

/// Copies what lies at `offset` of the page at `host`, up to its end.
fn copy_code(host: *const u8, offset: usize, out: &mut [u8]) {
    let len = out.len().min((PAGE_SIZE as usize).saturating_sub(offset));
    let Some(out) = out.get_mut(..len) else { return };
    let to_word = (offset.wrapping_neg() % 8).min(len);
    let (odd, rest) = out.split_at_mut(to_word);
    let mut words = rest.chunks_exact_mut(8);
    let mut at = offset;
    for byte in odd {
        // SAFETY: in the page, which is mapped; volatile because others may write it.
        *byte = unsafe { host.add(at).read_volatile() };
        at += 1;
    }
    for word in &mut words {
        // SAFETY: in the page, which is a multiple of eight bytes and mapped, and `at` is one.
        word.copy_from_slice(&unsafe { host.add(at).cast::<u64>().read_volatile() }.to_ne_bytes());
        at += 8;
    }
    for byte in words.into_remainder() {
        // SAFETY: in the page, which is mapped.
        *byte = unsafe { host.add(at).read_volatile() };
        at += 1;
    }
}

impl CodeSource for Source<'_> {
    fn half(&mut self, pc: u64) -> Result<u16, Fault> {
        let (host, offset) = self.page(pc, 2)?;
        // SAFETY: inside the page (`pc` is even), which is mapped; volatile because others may write it.
        Ok(u16::from_le(unsafe { host.add((offset & !1) as usize).cast::<u16>().read_volatile() }))
    }

    fn bytes(&mut self, pc: u64, out: &mut [u8]) -> Result<(), Fault> {
        let len = (out.len() as u64).min(PAGE_SIZE - pc % PAGE_SIZE);
        let (host, offset) = self.page(pc, len.max(1))?;
        copy_code(host, offset as usize, out);
        Ok(())
    }

    fn peek(&mut self, pc: u64, out: &mut [u8]) -> Result<(), Fault> {
        let offset = pc % PAGE_SIZE;
        if pc - offset != self.first.va {
            return self.bytes(pc, out);
        }
        copy_code(self.first.host, offset as usize, out);
        Ok(())
    }

    fn note(&mut self, pc: u64, len: u64) {
        // What was looked at can be fetched.
        let _ = self.page(pc, len.max(1));
    }

    fn byte(&mut self, pc: u64) -> Result<u8, Fault> {
        let (host, offset) = self.page(pc, 1)?;
        // SAFETY: inside the page, which is mapped.
        Ok(unsafe { host.add(offset as usize).read_volatile() })
    }

    fn is_break(&self, pc: u64) -> bool {
        self.breakpoints.binary_search(&pc).is_ok()
    }
}
