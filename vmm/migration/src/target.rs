//! The target's end.

use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use holdfast_block::BlockNode;
use holdfast_memory::{GuestMemory, PAGE_SIZE, tracker_at};
use holdfast_threads::{Role as ThreadRole, Spawner};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::backed::Backed;
use crate::control::{Control, Phase};
use crate::frame::{self, Header, Kind, Role};
use crate::images::Images;
use crate::inbox::Inbox;
use crate::marks::Marks;
use crate::pages::{decode_runs, host_pages, is_zero, log_writes};
use crate::postcopy::{Arrivals, Arriving};
use crate::source::expect;
use crate::sparse;
use crate::{Listener, MAX_CONNECTIONS, MigrationError, Plan, Stream};

type Failure = Box<dyn Error + Send + Sync>;

/// How long the source waits for code that is being prepared, each time it asks what has arrived.
const PREPARED: Duration = Duration::from_millis(3);
/// How long the source may take to make its further connections.
const FOLLOW: Duration = Duration::from_secs(30);

/// The VM at the target.
pub trait Target {
    /// Builds a VM that `plan` fits and returns its RAM, which is fresh. If the plan is local, RAM is `files`.
    ///
    /// # Errors
    /// Naming what differs.
    fn build(&mut self, plan: &Plan, files: Vec<OwnedFd>) -> Result<GuestMemory, Failure>;

    /// The images of the plan's mirrored disks, in its order: what the disks hold at the source is written into them.
    ///
    /// # Errors
    /// Naming the one that is not there.
    fn images(&self) -> Result<Vec<Arc<dyn BlockNode>>, Failure> {
        Ok(Vec::new())
    }

    /// Begins to prepare code that the guest runs, as [`Source::running_code`](crate::Source::running_code) named it; what makes no
    /// sense is passed over.
    fn prepare_code(&mut self, _places: &[u8]) {}

    /// Waits until that is done, for `patience` at most.
    fn wait_for_code(&mut self, _patience: Duration) {}

    /// What has not been prepared yet is not needed any more. RAM is not read when this returns.
    fn end_code(&mut self) {}

    /// Takes over everything but RAM.
    ///
    /// # Errors
    /// Naming what does not fit.
    fn restore(&mut self, state: &[u8]) -> Result<(), Failure>;

    /// Takes what only one VM can have; the source has given it up.
    ///
    /// # Errors
    /// If somebody else has it.
    fn take_over(&mut self) -> Result<(), Failure>;

    /// Lets the guest run. Whether it does or not, it is this VM's from now on.
    ///
    /// # Errors
    /// If there is no VM.
    fn run(&mut self) -> Result<(), Failure>;

    /// The migration has entered this phase.
    fn entered(&mut self, phase: Phase);

    /// Hears of phases that are entered after [`receive`] has returned.
    fn watcher(&self) -> Box<dyn FnMut(Phase) + Send>;
}

/// Takes a VM over from whoever connects first. If it fails, the VM must not be run. In post-copy the guest runs when this
/// returns while its pages are still coming; what is returned is to be kept for as long as the VM.
///
/// # Errors
/// [`MigrationError`].
pub fn receive(
    listener: &Listener,
    target: &mut dyn Target,
    control: &Arc<Control>,
    spawner: &Arc<dyn Spawner>,
) -> Result<Option<Arriving>, MigrationError> {
    let result = take(listener, target, control, spawner);
    let phase = match &result {
        Ok(Some(_)) => return result,
        Ok(None) => Phase::Completed,
        Err(_) if control.is_cancelled() => Phase::Cancelled,
        Err(error) => {
            control.set_error(error.describe());
            Phase::Failed
        }
    };
    control.forget_connections();
    control.enter(phase);
    target.entered(phase);
    result
}

fn take(
    listener: &Listener,
    target: &mut dyn Target,
    control: &Arc<Control>,
    spawner: &Arc<dyn Spawner>,
) -> Result<Option<Arriving>, MigrationError> {
    let (main, preamble) = listener.accept(control, None)?;
    let mut main = Inbox::new(main);
    if preamble.role != Role::Main {
        return Err(MigrationError::Protocol(format!("the first connection is a {:?} one", preamble.role)));
    }
    control.enter(Phase::Active);
    target.entered(Phase::Active);
    let session = Session { listener, control, spawner, id: preamble.session };
    let result = session.serve(&mut main, target);
    if let Err(error) = &result {
        let text: String = error.describe().chars().take(4096).collect();
        // The reason is a courtesy: that the connection ends says enough.
        let _ = frame::write(&mut main, Kind::Abort, 0, text.as_bytes());
        control.break_connections_after(main.stream());
    }
    let Some(arrivals) = result? else { return Ok(None) };
    let arriving = arrivals.handle();
    let mut watcher = target.watcher();
    let body = move || arrivals.run(main, &mut watcher);
    let failed = |source| MigrationError::Host { what: "no thread for pages", source };
    spawner.spawn("migrate-pages", ThreadRole::Migration, Box::new(body)).map_err(failed)?;
    Ok(Some(arriving))
}

struct Session<'a> {
    listener: &'a Listener,
    control: &'a Arc<Control>,
    spawner: &'a Arc<dyn Spawner>,
    id: [u8; 16],
}

fn vm(what: &'static str) -> impl FnOnce(Failure) -> MigrationError {
    move |source| MigrationError::Vm { what, source }
}

impl Session<'_> {
    /// Returns what brings in the pages that are still missing, if any are.
    fn serve(
        &self,
        main: &mut Inbox,
        target: &mut dyn Target,
    ) -> Result<Option<Arc<Arrivals>>, MigrationError> {
        let (_, text) = expect(main, Kind::Hello, "waiting for the plan", "source")?;
        let plan: Plan = serde_json::from_slice(&text)
            .map_err(|e| MigrationError::Protocol(format!("the plan does not parse: {e}")))?;
        check(&plan)?;
        let files = if plan.local { main.stream().receive_fds(plan.ram.len())? } else { Vec::new() };
        let memory = target.build(&plan, files).map_err(|e| MigrationError::Differs(describe(e.as_ref())))?;
        let nodes = if plan.mirror.is_empty() { Ok(Vec::new()) } else { target.images() };
        let nodes = nodes.map_err(|e| MigrationError::Differs(describe(e.as_ref())))?;
        let mut images = Images::new(&plan.mirror, nodes)?;
        let total: u64 = plan.ram.iter().map(|r| r.1).sum();
        self.control.counters.total.store(total, Relaxed);
        if !plan.local {
            // From here on the logs know which pages are zeroes: RAM is fresh, and what comes is written through its door.
            log_writes(&memory, true);
            Backed::new().mark(&memory);
        }
        let unit = host_pages(&memory).max().unwrap_or(PAGE_SIZE);
        frame::write(main, Kind::Accept, unit, frame::KNOWN)
            .map_err(MigrationError::broken("accepting the plan"))?;
        let lanes = self.lanes(&plan, &memory)?;
        let urgent = if plan.postcopy { Some(self.accept(Role::Priority)?) } else { None };
        if plan.nbd && !plan.mirror.is_empty() {
            images.serve(self.control, self.spawner.as_ref(), || self.accept(Role::Disk))?;
        }
        let filled = self.fill(main, &memory, images, target);
        target.end_code();
        filled?;
        let mut marks = Marks::start("the pause at the destination");
        for lane in lanes {
            let gone = || MigrationError::Protocol("the thread of a connection ended".into());
            lane.recv().map_err(|_| gone())??;
        }
        log_writes(&memory, false);
        let (mut header, mut state) = crate::source::next(main, "waiting for the state", "source")?;
        let mut arrivals = None;
        if let (Kind::Missing, Some(urgent)) = (header.kind, urgent) {
            let runs = decode_runs(&state).map_err(MigrationError::broken("reading what is missing"))?;
            let begun = Arrivals::begin(&memory, runs, urgent, self.control, self.id, self.spawner.as_ref())?;
            arrivals = Some(Unless(Some(begun)));
            (header, state) = crate::source::next(main, "waiting for the state", "source")?;
        }
        if header.kind != Kind::State {
            return Err(MigrationError::Protocol(format!("a {:?} section where State belongs", header.kind)));
        }
        marks.mark("state comes");
        target.entered(Phase::Device);
        target.restore(&state).map_err(vm("the state cannot be taken over"))?;
        marks.mark("restore");
        frame::write(main, Kind::Ready, 0, &[])
            .map_err(MigrationError::broken("saying that all is there"))?;
        expect(main, Kind::Go, "waiting for the source to give the VM up", "source")?;
        marks.mark("go");
        target.take_over().map_err(vm("the VM cannot be taken over"))?;
        frame::write(main, Kind::Done, 0, &[]).map_err(MigrationError::broken("taking the VM over"))?;
        marks.mark("take over");
        if plan.running {
            target.run().map_err(vm("the guest does not run"))?;
        }
        marks.mark("run");
        Ok(arrivals.and_then(Unless::go_on))
    }

    fn accept(&self, role: Role) -> Result<Stream, MigrationError> {
        let (stream, preamble) = self.listener.accept(self.control, Some(FOLLOW))?;
        if preamble.session != self.id || preamble.role != role {
            return Err(MigrationError::Protocol("a connection of another migration".into()));
        }
        Ok(stream)
    }

    /// Accepts the connections that carry RAM beside the first.
    fn lanes(
        &self,
        plan: &Plan,
        memory: &GuestMemory,
    ) -> Result<Vec<Receiver<Result<(), MigrationError>>>, MigrationError> {
        let mut all = Vec::new();
        for n in 1..plan.connections {
            let mut stream = Inbox::new(self.accept(Role::Ram)?);
            let (done, result) = channel();
            let (memory, control) = (memory.clone(), Arc::clone(self.control));
            let body = move || {
                let filled =
                    Filler { memory: &memory, control: &control }.until_end(&mut stream, &mut |header, _| {
                        if header.kind == Kind::Sync {
                            return Ok(());
                        }
                        let text = format!("a {:?} section on a connection for RAM", header.kind);
                        Err(MigrationError::Protocol(text))
                    });
                if filled.is_err() {
                    // The first connection's thread is not to wait for what no longer comes.
                    control.break_connections();
                }
                // Whoever waits may have given up.
                let _ = done.send(filled);
            };
            let name = format!("migrate-ram{n}");
            let failed = |source| MigrationError::Host { what: "no thread for a connection", source };
            self.spawner.spawn(&name, ThreadRole::Migration, Box::new(body)).map_err(failed)?;
            all.push(result);
        }
        Ok(all)
    }

    fn fill(
        &self,
        main: &mut Inbox,
        memory: &GuestMemory,
        mut images: Images<'_>,
        target: &mut dyn Target,
    ) -> Result<(), MigrationError> {
        let filler = Filler { memory, control: self.control };
        let filled = filler.until_end(main, &mut |header, payload| {
            match header.kind {
                Kind::Code => target.prepare_code(payload),
                Kind::Sync => target.wait_for_code(PREPARED),
                _ => images.take(header, payload)?,
            }
            Ok(())
        });
        // What it was that ended is better known there.
        filled.map_err(|error| images.failure().unwrap_or(error))?;
        images.finish()
    }
}

/// Ends the arrival of pages unless the hand-over comes about.
struct Unless(Option<Arc<Arrivals>>);

impl Unless {
    fn go_on(mut self) -> Option<Arc<Arrivals>> {
        self.0.take()
    }
}

impl Drop for Unless {
    fn drop(&mut self) {
        if let Some(arrivals) = &self.0 {
            arrivals.end();
        }
    }
}

fn describe(error: &(dyn Error + 'static)) -> String {
    let chain = std::iter::successors(Some(error), |e| (*e).source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Whether a plan makes sense at all.
fn check(plan: &Plan) -> Result<(), MigrationError> {
    if plan.page_size != PAGE_SIZE {
        let text = format!("the page size is {} at the source, {PAGE_SIZE} here", plan.page_size);
        return Err(MigrationError::Differs(text));
    }
    if plan.connections == 0 || plan.connections > MAX_CONNECTIONS {
        return Err(MigrationError::Protocol(format!("{} connections", plan.connections)));
    }
    Ok(())
}

/// Takes the sections of a connection that are not RAM.
type Aside<'a> = dyn FnMut(&Header, &[u8]) -> Result<(), MigrationError> + 'a;

/// Puts into RAM what comes over one connection.
pub(crate) struct Filler<'a> {
    pub(crate) memory: &'a GuestMemory,
    pub(crate) control: &'a Control,
}

impl Filler<'_> {
    /// Takes frames until an `End`; `aside` gets those that carry no RAM.
    pub(crate) fn until_end(&self, inbox: &mut Inbox, aside: &mut Aside<'_>) -> Result<(), MigrationError> {
        const WHAT: &str = "receiving RAM";
        loop {
            let header = inbox.header().map_err(MigrationError::broken(WHAT))?;
            if header.kind == Kind::Ram {
                self.pages(&header, inbox)?;
            } else {
                let payload = inbox.payload(&header).map_err(MigrationError::broken(WHAT))?;
                match header.kind {
                    Kind::End => {}
                    Kind::Abort => {
                        let reason = String::from_utf8_lossy(payload).into_owned();
                        return Err(MigrationError::Refused { side: "source", reason });
                    }
                    Kind::Disk | Kind::DiskZero | Kind::DiskSums | Kind::Code | Kind::Sync => {
                        aside(&header, payload)?;
                    }
                    _ => self.put(&header, payload)?,
                }
            }
            self.control.counters.transferred.fetch_add((frame::HEADER + header.len) as u64, Relaxed);
            match header.kind {
                Kind::End => return Ok(()),
                Kind::Sync => frame::write(inbox, Kind::Synced, 0, &[])
                    .map_err(MigrationError::broken("saying what has arrived"))?,
                _ => {}
            }
        }
    }

    /// Takes whole pages off the connection into RAM. No guest runs, and none will if they are not what was sent.
    fn pages(&self, header: &Header, inbox: &mut Inbox) -> Result<(), MigrationError> {
        whole(header.arg, header.len)?;
        let place = self.memory.get_slice(GuestAddress(header.arg), header.len);
        let place = place.map_err(|_| outside(header.arg, header.len))?;
        inbox.payload_into(header, &place).map_err(MigrationError::broken("receiving RAM"))?;
        self.control.counters.normal.fetch_add(header.len as u64 / PAGE_SIZE, Relaxed);
        Ok(())
    }

    /// Puts one frame's contents into RAM.
    fn put(&self, header: &Header, payload: &[u8]) -> Result<(), MigrationError> {
        let data = match header.kind {
            Kind::Zstd => unpack(payload)?,
            Kind::Zero => return self.zero(header.arg, payload),
            Kind::Sparse => return self.sparse(header.arg, payload),
            kind => return Err(MigrationError::Protocol(format!("a {kind:?} section within RAM"))),
        };
        whole(header.arg, data.len())?;
        self.memory
            .write_slice(&data, GuestAddress(header.arg))
            .map_err(|_| outside(header.arg, data.len()))?;
        self.control.counters.normal.fetch_add(data.len() as u64 / PAGE_SIZE, Relaxed);
        Ok(())
    }

    /// The length of the zeroes that a `Zero` frame is for.
    pub(crate) fn zeroes(gpa: u64, payload: &[u8]) -> Result<u64, MigrationError> {
        let len = payload.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
        if payload.len() != 8 || len == 0 || !len.is_multiple_of(PAGE_SIZE) || !gpa.is_multiple_of(PAGE_SIZE)
        {
            return Err(MigrationError::Protocol(format!("{len} zeroes at {gpa:#x} are no whole pages")));
        }
        gpa.checked_add(len).map(|_| len).ok_or_else(|| outside(gpa, usize::MAX))
    }

    fn sparse(&self, gpa: u64, payload: &[u8]) -> Result<(), MigrationError> {
        if !gpa.is_multiple_of(PAGE_SIZE) {
            return Err(MigrationError::Protocol(format!("RAM at {gpa:#x} is no whole pages")));
        }
        let mut at = gpa;
        let pages = sparse::for_each(payload, |page| {
            let put = self.memory.write_slice(page, GuestAddress(at));
            put.map_err(|_| outside(gpa, payload.len()))?;
            at = at.checked_add(PAGE_SIZE).ok_or_else(|| outside(gpa, payload.len()))?;
            Ok(())
        })?;
        self.control.counters.normal.fetch_add(pages, Relaxed);
        Ok(())
    }

    fn zero(&self, gpa: u64, payload: &[u8]) -> Result<(), MigrationError> {
        let len = Self::zeroes(gpa, payload)?;
        let end = gpa + len;
        let mut page = [0; PAGE_SIZE as usize];
        let mut at = gpa;
        let (tracker, offset) = tracker_at(self.memory, gpa).ok_or_else(|| outside(gpa, len as usize))?;
        while at < end {
            let index = (offset + (at - gpa)) / PAGE_SIZE;
            if tracker.logging() && index < tracker.pages() && !tracker.is_dirty(index) {
                at += PAGE_SIZE;
                continue;
            }
            // Reading takes no memory from the host where there is none yet; writing would.
            self.memory.read_slice(&mut page, GuestAddress(at)).map_err(|_| outside(at, page.len()))?;
            if !is_zero(&page) {
                page.fill(0);
                self.memory.write_slice(&page, GuestAddress(at)).map_err(|_| outside(at, page.len()))?;
            }
            at += PAGE_SIZE;
        }
        self.control.counters.zero.fetch_add(len / PAGE_SIZE, Relaxed);
        Ok(())
    }
}

/// Fails unless `len` bytes at `gpa` are whole pages, at least one.
fn whole(gpa: u64, len: usize) -> Result<(), MigrationError> {
    if len > 0 && (len as u64).is_multiple_of(PAGE_SIZE) && gpa.is_multiple_of(PAGE_SIZE) {
        return Ok(());
    }
    Err(MigrationError::Protocol(format!("{len} bytes of RAM at {gpa:#x} are no whole pages")))
}

fn outside(gpa: u64, len: usize) -> MigrationError {
    MigrationError::Protocol(format!("{len} bytes at {gpa:#x} are outside of RAM"))
}

/// Unpacks a `Zstd` frame.
pub(crate) fn unpack(payload: &[u8]) -> Result<Vec<u8>, MigrationError> {
    let wrong = || MigrationError::Protocol("compressed RAM that cannot be unpacked".into());
    let (length, packed) = payload.split_first_chunk::<4>().ok_or_else(wrong)?;
    let length = u32::from_le_bytes(*length) as usize;
    if length > frame::MAX_RAM {
        return Err(wrong());
    }
    let data = zstd::bulk::decompress(packed, length).map_err(|_| wrong())?;
    if data.len() == length { Ok(data) } else { Err(wrong()) }
}
