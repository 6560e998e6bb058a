//! Post-copy: the guest runs at the target, and its pages follow.
//!
//! The first connection carries pages in order, from where the guest was last seen to wait. Pages that it waits for are asked for,
//! and come, on a connection of their own, with what is around them; several may be asked for before the first comes. If either breaks, both ends wait until somebody brings them together again; the target then says what it lacks.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use holdfast_clock::host_monotonic;
use holdfast_memory::{GuestMemory, PAGE_SIZE, Tracked};
use holdfast_threads::{Role as ThreadRole, Spawner};
use parking_lot::Mutex;
use vm_memory::{Address as _, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::control::{Control, Phase};
use crate::frame::{self, Header, Kind, Preamble, Role};
use crate::huge::Gathered;
use crate::inbox::Inbox;
use crate::lanes::{Encoder, Limiter};
use crate::pages::{self, CHUNK, PageSet, Run};
use crate::source::{SendTo, Source, expect};
use crate::sparse;
use crate::target::{Filler, unpack};
use crate::uffd::Userfault;
use crate::{Listener, MigrationError, Stream};

/// How often somebody who waits for a new connection looks for it.
const PATIENCE: Duration = Duration::from_millis(20);
/// How long the second of two new connections may take.
const FOLLOW: Duration = Duration::from_secs(30);
/// How long the fault thread waits before it looks whether it is still wanted, in milliseconds.
const FAULT_MS: i32 = 50;
/// Most pages that are asked for at once.
const BATCH: usize = 64;
/// What is within the same block of this many bytes comes along with a page that is asked for.
const AROUND: u64 = 64 << 10;

/// The source's part.
pub(crate) struct Pusher<'a> {
    pub(crate) source: &'a dyn Source,
    pub(crate) to: &'a SendTo,
    pub(crate) control: &'a Arc<Control>,
    pub(crate) spawner: &'a Arc<dyn Spawner>,
    pub(crate) memory: GuestMemory,
    pub(crate) limiter: Arc<Limiter>,
    /// The target takes pages without their empty lines.
    pub(crate) sparse: bool,
    /// What the target lacks, as far as is known here.
    pub(crate) left: Arc<Mutex<Left>>,
}

/// Pages that are still to be sent.
#[derive(Debug)]
pub(crate) struct Left {
    pages: PageSet,
    /// How many there are.
    count: u64,
    /// Where to go on: behind what was asked for last.
    next: u64,
}

impl Left {
    /// These.
    pub(crate) fn new(pages: PageSet) -> Self {
        Self { count: pages.count(), pages, next: 0 }
    }

    /// Takes out the next ones.
    fn pop(&mut self) -> Option<Run> {
        let run = self.pages.next_from(self.next)?;
        self.take(run);
        Some(run)
    }

    /// Takes out `run`, all of which is there.
    fn take(&mut self, run: Run) {
        self.pages.set(run, false);
        self.count -= run.len / PAGE_SIZE;
        self.next = run.gpa + run.len;
    }

    /// Takes out what is asked for and what is around it, which is returned without the first. False if it is no RAM.
    fn asked_for(&mut self, run: Run) -> Option<Vec<Run>> {
        if !self.pages.covers(run) {
            return None;
        }
        self.pages.within(run).into_iter().for_each(|run| self.take(run));
        let start = run.gpa / AROUND * AROUND;
        // From the page on to the end, then what is before it.
        let behind = Run { gpa: run.gpa, len: (start + AROUND).saturating_sub(run.gpa) };
        let before = Run { gpa: start, len: run.gpa - start };
        let around: Vec<_> = [behind, before].into_iter().flat_map(|part| self.pages.within(part)).collect();
        around.iter().for_each(|run| self.take(*run));
        self.next = (start + AROUND).max(run.gpa + run.len);
        Some(around)
    }
}

impl Pusher<'_> {
    fn enter(&self, phase: Phase) {
        if self.control.enter(phase) {
            self.source.entered(phase);
        }
    }

    /// Sends all that is left, over new connections when old ones break.
    pub(crate) fn run(&self, mut main: Stream, mut priority: Stream) -> Result<(), MigrationError> {
        loop {
            self.enter(Phase::PostcopyActive);
            let error = match self.attempt(main, priority) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            tracing::warn!("post-copy is interrupted: {}", error.describe());
            self.control.break_connections();
            self.control.set_error(error.describe());
            self.enter(Phase::PostcopyPaused);
            (main, priority) = self.reconnect()?;
        }
    }

    fn attempt(&self, mut main: Stream, mut priority: Stream) -> Result<(), MigrationError> {
        let encoder = |limiter| {
            Encoder::new(self.memory.clone(), Arc::clone(self.control), limiter).sparse(self.sparse)
        };
        let (mut pushed, urgent) = (encoder(Arc::clone(&self.limiter)), encoder(Arc::default()).urgent());
        let (left, control) = (Arc::clone(&self.left), Arc::clone(self.control));
        let all_sent = Arc::new(AtomicBool::new(false));
        let last_word = Arc::clone(&all_sent);
        let body = move || {
            if let Err(error) = serve_requests(&mut priority, urgent, &left, &control) {
                tracing::debug!("the connection for urgent pages ended: {}", error.describe());
                if last_word.load(Ordering::Acquire) {
                    // The target may have ended it because it has all pages, and its word of that may still be on the way.
                    // One that lacks some ends the other connection too.
                    Control::break_connection(&priority);
                } else {
                    // Who pushes is to notice.
                    control.break_connections();
                }
            }
        };
        let failed = |source| MigrationError::Host { what: "no thread for urgent pages", source };
        let thread =
            self.spawner.spawn("migrate-urgent", ThreadRole::Migration, Box::new(body)).map_err(failed)?;
        let pushed = self.push(&mut main, &mut pushed, &all_sent);
        // It ends with its connection.
        self.control.break_connections();
        // A panic was reported by the thread itself.
        let _ = thread.join();
        pushed
    }

    /// Sets `all_sent` before the target can know that all was sent.
    fn push(
        &self,
        main: &mut Stream,
        encoder: &mut Encoder,
        all_sent: &AtomicBool,
    ) -> Result<(), MigrationError> {
        loop {
            let next = {
                let mut left = self.left.lock();
                let next = left.pop();
                self.control.counters.remaining.store(left.count * PAGE_SIZE, Ordering::Relaxed);
                next
            };
            let Some(run) = next else { break };
            encoder.send(run, main)?;
        }
        encoder.flush(main)?;
        all_sent.store(true, Ordering::Release);
        frame::write(main, Kind::End, 0, &[]).map_err(MigrationError::broken("sending the end of RAM"))?;
        main.set_timeouts(None)?;
        expect(main, Kind::Complete, "waiting for the destination to have all pages", "destination").map(drop)
    }

    /// Waits until somebody says where to go on, and connects there.
    fn reconnect(&self) -> Result<(Stream, Stream), MigrationError> {
        loop {
            let Some(address) = self.control.take_way_back() else {
                std::thread::sleep(PATIENCE);
                continue;
            };
            self.enter(Phase::PostcopyRecover);
            self.control.forget_connections();
            let connect = |role| {
                let preamble = Preamble { role, session: self.to.session };
                Stream::connect(&address, self.to.tls.as_ref(), &preamble, self.control)
            };
            let connected = connect(Role::Recover).and_then(|mut main| {
                let priority = connect(Role::Priority)?;
                let (_, runs) = expect(&mut main, Kind::Missing, "asking what is missing", "destination")?;
                let runs =
                    pages::decode_runs(&runs).map_err(MigrationError::broken("asking what is missing"))?;
                let mut left = PageSet::empty(&pages::ranges(&self.memory));
                if !runs.into_iter().all(|run| left.set(run, true)) {
                    return Err(MigrationError::Protocol("pages are missing outside of RAM".into()));
                }
                *self.left.lock() = Left::new(left);
                Ok((main, priority))
            });
            match connected {
                Ok(connected) => return Ok(connected),
                Err(error) => {
                    tracing::warn!("post-copy does not go on yet: {}", error.describe());
                    self.control.set_error(error.describe());
                    self.enter(Phase::PostcopyPaused);
                }
            }
        }
    }
}

/// Sends the pages that are asked for.
fn serve_requests(
    stream: &mut Stream,
    mut encoder: Encoder,
    left: &Mutex<Left>,
    control: &Control,
) -> Result<(), MigrationError> {
    const WHAT: &str = "serving urgent pages";
    stream.set_timeouts(None)?;
    loop {
        let (_, runs) = expect(stream, Kind::Request, WHAT, "destination")?;
        let mut around = Vec::new();
        for run in pages::decode_runs(&runs).map_err(MigrationError::broken(WHAT))? {
            let more = left.lock().asked_for(run);
            let outside = || MigrationError::Protocol("the destination asks for what is no RAM".into());
            around.extend(more.ok_or_else(outside)?);
            control.counters.requests.fetch_add(1, Ordering::Relaxed);
            // Again, if it was sent already: there it may stand behind much else.
            let end = run.gpa + run.len;
            for gpa in (run.gpa..end).step_by(CHUNK as usize) {
                encoder.send(Run { gpa, len: CHUNK.min(end - gpa) }, stream)?;
            }
        }
        encoder.flush(stream)?;
        for run in around {
            encoder.send(run, stream)?;
        }
        encoder.flush(stream)?;
    }
}

/// The connection for urgent pages. The thread that serves faults has it.
#[derive(Debug)]
struct Urgent {
    /// It is not known to have broken.
    works: bool,
    /// The thread is to take this one.
    next: Option<Stream>,
}

/// RAM at the target while pages are missing.
pub(crate) struct Arrivals {
    memory: GuestMemory,
    uffd: Userfault,
    missing: Mutex<PageSet>,
    /// Of RAM in huge pages.
    gathered: Mutex<Gathered>,
    urgent: Mutex<Urgent>,
    /// Pages that were asked for, by their addresses, and when; host monotonic nanoseconds.
    waiting: Mutex<HashMap<u64, u64>>,
    over: AtomicBool,
    control: Arc<Control>,
    session: [u8; 16],
}

/// Ends the arrival of pages with its VM.
#[derive(Debug)]
pub struct Arriving {
    over: Arc<Arrivals>,
}

impl std::fmt::Debug for Arrivals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrivals").field("missing", &self.missing.lock().count()).finish_non_exhaustive()
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        self.over.end();
        self.over.control.break_connections();
    }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> MigrationError {
    move |source| MigrationError::Host { what, source }
}

impl Arrivals {
    /// Takes the pages in `runs` out of RAM and lets a thread bring them in when they are touched.
    pub(crate) fn begin(
        memory: &GuestMemory,
        runs: Vec<Run>,
        urgent: Stream,
        control: &Arc<Control>,
        session: [u8; 16],
        spawner: &dyn Spawner,
    ) -> Result<Arc<Self>, MigrationError> {
        let mut missing = PageSet::empty(&pages::ranges(memory));
        if runs.into_iter().any(|run| !missing.set(run, true)) {
            return Err(MigrationError::Protocol("pages are missing outside of RAM".into()));
        }
        let mut whole = missing.clone();
        whole.widen(pages::host_pages(memory).max().unwrap_or(PAGE_SIZE));
        if whole != missing {
            return Err(MigrationError::Protocol("parts of huge pages are missing".into()));
        }
        let uffd = Userfault::open().map_err(host("userfaultfd is needed for post-copy"))?;
        let this = Self {
            memory: memory.clone(),
            uffd,
            missing: Mutex::new(missing),
            gathered: Mutex::default(),
            urgent: Mutex::new(Urgent { works: true, next: Some(urgent) }),
            waiting: Mutex::default(),
            over: AtomicBool::new(false),
            control: Arc::clone(control),
            session,
        };
        // In as few calls as there can be: the guest stands meanwhile. Huge pages are missing as whole ones.
        let missing = this.missing.lock().joined();
        missing.into_iter().try_for_each(|run| this.discard(run))?;
        for (start, len) in this.mappings()? {
            this.uffd.register(start, len).map_err(host("RAM cannot be watched by userfaultfd"))?;
        }
        let this = Arc::new(this);
        let server = Arc::clone(&this);
        let body = move || {
            if let Err(error) = server.serve_faults()
                && !server.over.load(Ordering::Acquire)
            {
                tracing::error!(%error, "pages that the guest waits for can no longer be brought in");
            }
        };
        let spawned = spawner.spawn("migrate-faults", ThreadRole::Migration, Box::new(body));
        spawned.map_err(host("no thread for page faults"))?;
        Ok(this)
    }

    /// Nobody needs the pages any more.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Release);
    }

    fn mappings(&self) -> Result<Vec<(u64, u64)>, MigrationError> {
        let address = |r: &holdfast_memory::GuestRegion| {
            let start = r.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
            Ok((start as u64, r.len()))
        };
        self.memory.iter().map(address).collect::<io::Result<_>>().map_err(host("RAM has no address"))
    }

    /// Where the page at `gpa` is in this process.
    fn hva(&self, gpa: u64) -> Option<u64> {
        let region = self.memory.find_region(vm_memory::GuestAddress(gpa))?;
        let start = region.get_host_address(MemoryRegionAddress(0)).ok()? as u64;
        Some(start + (gpa - region.start_addr().raw_value()))
    }

    fn gpa(&self, hva: u64) -> Option<u64> {
        self.memory.iter().find_map(|region| {
            let start = region.get_host_address(MemoryRegionAddress(0)).ok()? as u64;
            let offset = hva.checked_sub(start).filter(|o| *o < region.len())?;
            Some(region.start_addr().raw_value() + offset)
        })
    }

    /// The host's page that holds `gpa`: its start and length.
    fn unit_at(&self, gpa: u64) -> Option<(u64, u64)> {
        let region = self.memory.find_region(vm_memory::GuestAddress(gpa))?;
        let (unit, start) = (pages::host_page(region), region.start_addr().raw_value());
        Some((start + (gpa - start) / unit * unit, unit))
    }

    fn discard(&self, run: Run) -> Result<(), MigrationError> {
        let Some(region) = self.memory.find_region(vm_memory::GuestAddress(run.gpa)) else { return Ok(()) };
        let Some(hva) = self.hva(run.gpa) else { return Ok(()) };
        // What a file holds must go from the file.
        let shared = region.flags() & libc::MAP_SHARED != 0;
        let advice = if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        // SAFETY: the run is within the region's mapping, and nobody relies on its contents: the guest has not run.
        let rc = unsafe { libc::madvise(hva as *mut libc::c_void, run.len as usize, advice) };
        if rc != 0 {
            return Err(host("RAM cannot be emptied")(io::Error::last_os_error()));
        }
        // Code that was prepared may be another when the pages come.
        let first = (run.gpa - region.start_addr().raw_value()) / PAGE_SIZE;
        region.bitmap_tracker().forget_code(first, run.len / PAGE_SIZE);
        Ok(())
    }

    /// Puts what came into RAM; returns its length in bytes.
    fn put(&self, header: &Header, payload: &[u8]) -> Result<u64, MigrationError> {
        let outside = || MigrationError::Protocol(format!("pages at {:#x} are outside of RAM", header.arg));
        let unpacked;
        let (data, len) = match header.kind {
            Kind::Ram => (payload, payload.len() as u64),
            Kind::Zstd => {
                unpacked = unpack(payload)?;
                (unpacked.as_slice(), unpacked.len() as u64)
            }
            Kind::Sparse => {
                unpacked = sparse::expand(payload)?;
                (unpacked.as_slice(), unpacked.len() as u64)
            }
            Kind::Zero => (&[][..], Filler::zeroes(header.arg, payload)?),
            kind => return Err(MigrationError::Protocol(format!("a {kind:?} section among pages"))),
        };
        let run = Run { gpa: header.arg, len };
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) || !run.gpa.is_multiple_of(PAGE_SIZE) {
            return Err(outside());
        }
        if !self.missing.lock().covers(run) {
            return Err(outside());
        }
        let (_, unit) = self.unit_at(run.gpa).ok_or_else(outside)?;
        if unit > PAGE_SIZE {
            self.gather(run, data, unit)?;
            return Ok(len);
        }
        // A run that came late may be longer than what is still missing; pages that are there are left alone.
        let hva = self.hva(run.gpa).ok_or_else(outside)?;
        let filled = if data.is_empty() { self.uffd.zero(hva, len) } else { self.uffd.fill(hva, data) };
        filled.map_err(host("a page cannot be put into RAM"))?;
        self.there(run);
        Ok(len)
    }

    /// The pages of `run` are in RAM.
    fn there(&self, run: Run) {
        self.missing.lock().set(run, false);
        let mut waiting = self.waiting.lock();
        if waiting.is_empty() {
            return;
        }
        let now = host_monotonic();
        let mut latency = self.control.latency.lock();
        waiting.retain(|gpa, asked| {
            let came = (run.gpa..run.gpa + run.len).contains(gpa);
            if came {
                latency.add(now.saturating_sub(*asked));
            }
            !came
        });
    }

    /// Keeps parts of huge pages until these are whole.
    fn gather(&self, run: Run, data: &[u8], unit: u64) -> Result<(), MigrationError> {
        let end = run.gpa + run.len;
        let mut gathered = self.gathered.lock();
        let mut at = run.gpa;
        while let Some((start, _)) = self.unit_at(at).filter(|_| at < end) {
            let len = (start + unit).min(end) - at;
            let part = data.get((at - run.gpa) as usize..).and_then(|rest| rest.get(..len as usize));
            // What came over the other connection already is left alone: the guest may have written to it.
            if self.missing.lock().contains(start)
                && let Some(whole) = gathered.add(start, unit, at - start, len, part.unwrap_or_default())
                && let Some(hva) = self.hva(start)
            {
                let filled = self.uffd.fill_pages(hva, &whole, unit);
                filled.map_err(host("a page cannot be put into RAM"))?;
                self.there(Run { gpa: start, len: unit });
            }
            at += len;
        }
        Ok(())
    }

    /// Brings in the pages that the guest waits for.
    fn serve_faults(&self) -> io::Result<()> {
        let (mut stream, mut payload) = (None, Vec::new());
        while !self.over.load(Ordering::Acquire) {
            let mut ask = Vec::new();
            if let Some(new) = self.urgent.lock().next.take() {
                stream = Some(new);
                // What the last one was asked for.
                let waiting = self.waiting.lock();
                ask.extend(waiting.keys().filter_map(|gpa| self.unit_at(*gpa)));
            }
            let patience = if stream.is_some() { FAULT_MS } else { PATIENCE.as_millis() as i32 };
            let patience = if ask.is_empty() { patience } else { 0 };
            let (faults, came) = self.uffd.wait(stream.as_ref().map(AsFd::as_fd), patience)?;
            if faults {
                self.take_faults(&mut ask)?;
            }
            let Some(working) = &mut stream else { continue };
            let done = self
                .ask_for(&ask, working)
                .and_then(|()| if came { self.take_urgent(working, &mut payload) } else { Ok(()) });
            if let Err(error) = done {
                tracing::debug!("urgent pages do not come: {}", error.describe());
                stream = None;
                // What comes when all pages are there has no place any more. The other connection has to carry the word of that.
                if !self.over.load(Ordering::Acquire) {
                    self.urgent_broke();
                }
            }
        }
        Ok(())
    }

    /// Unless somebody has seen to it already, the other connection is broken too, so that its thread notices.
    fn urgent_broke(&self) {
        let mut urgent = self.urgent.lock();
        // Under the lock: new connections are made by who has seen that this one is gone.
        if urgent.works && urgent.next.is_none() {
            urgent.works = false;
            self.control.break_connections();
        }
    }

    /// Adds the pages whose faults have been taken, and that are missing, to `ask`, as start and length.
    fn take_faults(&self, ask: &mut Vec<(u64, u64)>) -> io::Result<()> {
        let mut wanted = HashSet::new();
        while wanted.len() < BATCH
            && let Some(next) = self.uffd.take_fault()?
        {
            wanted.extend(self.gpa(next).and_then(|gpa| self.unit_at(gpa)));
        }
        for (gpa, unit) in wanted {
            let Some(hva) = self.hva(gpa) else { continue };
            // Noted first: it may come in this moment.
            let news = self.waiting.lock().insert(gpa, host_monotonic()).is_none();
            if self.missing.lock().contains(gpa) {
                if news {
                    ask.push((gpa, unit));
                }
                continue;
            }
            self.waiting.lock().remove(&gpa);
            if unit == PAGE_SIZE {
                // It was never written, or has come meanwhile.
                self.uffd.zero(hva, PAGE_SIZE)?;
            } else {
                self.uffd.fill_pages(hva, &vec![0; unit as usize], unit)?;
            }
        }
        Ok(())
    }

    fn ask_for(&self, pages: &[(u64, u64)], stream: &mut Stream) -> Result<(), MigrationError> {
        if pages.is_empty() {
            return Ok(());
        }
        self.control.counters.requests.fetch_add(pages.len() as u64, Ordering::Relaxed);
        let runs = pages.iter().map(|&(gpa, len)| Run { gpa, len });
        frame::write(stream, Kind::Request, 0, &pages::encode_runs(runs))
            .map_err(MigrationError::broken("asking for urgent pages"))
    }

    /// Puts into RAM what has come.
    fn take_urgent(&self, stream: &mut Stream, payload: &mut Vec<u8>) -> Result<(), MigrationError> {
        loop {
            let header =
                frame::read(stream, payload).map_err(MigrationError::broken("receiving urgent pages"))?;
            self.put(&header, payload)?;
            let bytes = (frame::HEADER + header.len) as u64;
            self.control.counters.transferred.fetch_add(bytes, Ordering::Relaxed);
            if !stream.has_more() {
                return Ok(());
            }
        }
    }

    /// Takes pages from `main` until all are there; fails if the connection breaks.
    fn take_pages(&self, main: &mut Inbox) -> Result<(), MigrationError> {
        const WHAT: &str = "receiving pages";
        loop {
            let header = main.header().map_err(MigrationError::broken(WHAT))?;
            let payload = main.payload(&header).map_err(MigrationError::broken(WHAT))?;
            if header.kind == Kind::End {
                break;
            }
            self.put(&header, payload)?;
            self.control
                .counters
                .transferred
                .fetch_add((frame::HEADER + header.len) as u64, Ordering::Relaxed);
        }
        // What the guest waited for may still be on its way over the other connection.
        while self.missing.lock().count() > 0 {
            if !self.urgent.lock().works {
                return Err(MigrationError::Protocol("the connection for urgent pages broke".into()));
            }
            std::thread::sleep(PATIENCE);
        }
        Ok(())
    }

    /// Runs until all pages are there, over new connections when old ones break.
    pub(crate) fn run(&self, mut main: Inbox, mut entered: impl FnMut(Phase)) {
        let mut enter = |phase| {
            if self.control.enter(phase) {
                entered(phase);
            }
        };
        enter(Phase::PostcopyActive);
        loop {
            let error = match self.take_pages(&mut main) {
                Ok(()) => break,
                Err(error) => error,
            };
            if self.over.load(Ordering::Acquire) {
                return enter(Phase::Failed);
            }
            tracing::warn!("post-copy is interrupted: {}", error.describe());
            self.control.break_connections();
            self.control.set_error(error.describe());
            enter(Phase::PostcopyPaused);
            loop {
                let Some(listener) = self.control.take_listener() else {
                    if self.over.load(Ordering::Acquire) {
                        return enter(Phase::Failed);
                    }
                    std::thread::sleep(PATIENCE);
                    continue;
                };
                enter(Phase::PostcopyRecover);
                match self.accept_again(&listener) {
                    Ok(again) => {
                        main = again;
                        break;
                    }
                    Err(error) => {
                        tracing::warn!("post-copy does not go on yet: {}", error.describe());
                        enter(Phase::PostcopyPaused);
                    }
                }
            }
            enter(Phase::PostcopyActive);
        }
        self.over.store(true, Ordering::Release);
        for (start, len) in self.mappings().unwrap_or_default() {
            if let Err(error) = self.uffd.unregister(start, len) {
                tracing::error!(%error, "RAM is still watched by userfaultfd");
            }
        }
        if let Err(error) = frame::write(&mut main, Kind::Complete, 0, &[]) {
            tracing::warn!(%error, "the source is not told that all pages are here");
        }
        enter(Phase::Completed);
    }

    fn accept_again(&self, listener: &Listener) -> Result<Inbox, MigrationError> {
        // From here on the end of the old one is no news to the thread that serves faults.
        *self.urgent.lock() = Urgent { works: false, next: None };
        self.control.forget_connections();
        let wanted = |role, limit| loop {
            let (stream, preamble) = listener.accept(&self.control, limit)?;
            if preamble.session == self.session && preamble.role == role {
                return Ok(stream);
            }
            tracing::warn!("a connection of another migration is refused");
        };
        let mut main: Stream = wanted(Role::Recover, None)?;
        let priority: Stream = wanted(Role::Priority, Some(FOLLOW))?;
        let missing = pages::encode_runs(self.missing.lock().runs());
        frame::write(&mut main, Kind::Missing, 0, &missing)
            .map_err(MigrationError::broken("saying what is missing"))?;
        *self.urgent.lock() = Urgent { works: true, next: Some(priority) };
        Ok(Inbox::new(main))
    }

    /// What ends the arrival when it is dropped.
    pub(crate) fn handle(self: &Arc<Self>) -> Arriving {
        Arriving { over: Arc::clone(self) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use holdfast_threads::PlainSpawner;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::Parameters;

    const BASE: u64 = 0x8000_0000;
    const LEN: u64 = 1 << 20;

    /// A page that comes over the urgent connection when all are there already, for it was asked for and then came over the other:
    /// the word that all are there may still be on its way.
    #[test]
    fn what_comes_too_late_breaks_no_connection() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(BASE), LEN as usize)]).expect("RAM");
        let (mut urgent, far) = UnixStream::pair().expect("sockets");
        let (mut main, mut source) = UnixStream::pair().expect("sockets");
        let control = Arc::new(Control::new(Parameters::default()));
        control.watch(main.try_clone().expect("a duplicate").into()).expect("nobody cancelled");
        let missing = vec![Run { gpa: BASE, len: LEN }];
        let arrivals = Arrivals::begin(&memory, missing, Stream::Unix(far), &control, [0; 16], &PlainSpawner)
            .expect("userfaultfd");
        while arrivals.urgent.lock().next.is_some() {
            std::thread::yield_now();
        }
        arrivals.end();
        for (start, len) in arrivals.mappings().expect("RAM has an address") {
            arrivals.uffd.unregister(start, len).expect("it is watched");
        }
        frame::write(&mut urgent, Kind::Ram, BASE, &[1; PAGE_SIZE as usize]).expect("somebody reads");
        // Until the thread has ended.
        assert_eq!(urgent.read(&mut [0]).expect("its end"), 0);
        while Arc::strong_count(&arrivals) > 1 {
            std::thread::yield_now();
        }
        main.write_all(b"all there").expect("it is not broken");
        let mut word = [0; 9];
        source.read_exact(&mut word).expect("it is not broken");
        assert_eq!(&word, b"all there");
    }
}
