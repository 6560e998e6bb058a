//! The source's end.

use std::cell::Cell;
use std::error::Error;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use holdfast_clock::host_monotonic;
use holdfast_memory::{GuestMemory, PAGE_SIZE};
use holdfast_threads::Spawner;
use parking_lot::Mutex;

use crate::control::{Control, Phase, TimeoutStrategy};
use crate::disks::{DiskSender, Remote, Way};
use crate::frame::{self, Header, Kind, Preamble, Role};
use crate::lanes::{Connection, Encoder, First, Lanes, Limiter, Sink};
use crate::mapped::MappedFile;
use crate::marks::Marks;
use crate::pages::{self, PageSet, Run};
use crate::postcopy::{Left, Pusher};
use crate::{Address, MAX_CONNECTIONS, MigrationError, MirroredDisk, Plan, Stream, Tls};

type Failure = Box<dyn Error + Send + Sync>;

/// How long the source waits for the reason of a connection's end.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// What sends more than this is worth a pass of its own.
const WORTH: Duration = Duration::from_millis(1);
/// How long a guest that is to go over at once may stay for the sake of its code.
const SHORTLY: Duration = Duration::from_millis(100);
/// How often the source looks whether somebody let it go on.
const PATIENCE: Duration = Duration::from_millis(10);

/// The VM at the source.
pub trait Source: Send + Sync {
    /// Its RAM.
    fn memory(&self) -> GuestMemory;

    /// What the target must be like.
    ///
    /// # Errors
    /// Why this VM cannot migrate.
    fn plan(&self) -> Result<Plan, Failure>;

    /// The disks whose contents go along.
    ///
    /// # Errors
    /// Naming the one that cannot.
    fn mirror(&self) -> Result<Vec<MirroredDisk>, Failure> {
        Ok(Vec::new())
    }

    /// The descriptors of its RAM, by range, for a target on the same host.
    ///
    /// # Errors
    /// If RAM has none that another process can share.
    fn ram_files(&self) -> Result<Vec<RawFd>, Failure>;

    /// Starts the accelerator's log of writes, for all pages.
    ///
    /// # Errors
    /// If it cannot.
    fn start_log(&self) -> Result<(), Failure>;

    /// Adds what vCPUs wrote to the trackers of RAM.
    ///
    /// # Errors
    /// If it cannot.
    fn sync_log(&self) -> Result<(), Failure>;

    /// Ends the log.
    fn stop_log(&self);

    /// Notes from now on which code the guest runs, if it is translated.
    fn note_code(&self) {}

    /// Which code it has run since then.
    fn running_code(&self) -> RunningCode {
        RunningCode::default()
    }

    /// Lets vCPUs stand for this many percent of the time from now on.
    fn throttle(&self, percent: u8);

    /// Notes what is written to the mirrored disks from now on, or no more.
    ///
    /// # Errors
    /// If it cannot.
    fn log_disks(&self, _on: bool) -> Result<(), Failure> {
        Err("there are no disks to mirror".into())
    }

    /// What was written to mirrored disk number `disk` since it was last asked, and has reached it: offsets and lengths in bytes.
    ///
    /// # Errors
    /// If it cannot be told.
    fn take_written(&self, _disk: usize) -> Result<Vec<(u64, u64)>, Failure> {
        Err("there are no disks to mirror".into())
    }

    /// Reads a mirrored disk.
    ///
    /// # Errors
    /// The disk's.
    fn read_disk(&self, _disk: usize, _offset: u64, _to: &mut [u8]) -> Result<(), Failure> {
        Err("there are no disks to mirror".into())
    }

    /// Stops the guest.
    ///
    /// # Errors
    /// If it does not stop, or ended by itself.
    fn stop(&self) -> Result<(), Failure>;

    /// Everything but RAM, of the stopped VM.
    ///
    /// # Errors
    /// Naming what cannot be saved.
    fn save(&self) -> Result<Vec<u8>, Failure>;

    /// Gives up what only one VM can have.
    ///
    /// # Errors
    /// If it cannot.
    fn give_up(&self) -> Result<(), Failure>;

    /// Takes back what was given up.
    ///
    /// # Errors
    /// If somebody else has it.
    fn take_back(&self) -> Result<(), Failure>;

    /// Lets the guest go on here: undoes [`Source::stop`].
    fn go_on(&self);

    /// The guest is the target's.
    fn moved(&self);

    /// The migration has entered this phase.
    fn entered(&self, phase: Phase);

    /// Another pass over RAM has begun; the first is 1.
    fn passed(&self, pass: u64);
}

/// Code that the guest runs, for a target that can prepare it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunningCode {
    /// Guest-physical addresses of the pages that it is in, without order.
    pub pages: Vec<u64>,
    /// What the VM at the target is told, at most 256 KiB; nothing if it is not.
    pub places: Vec<u8>,
}

/// How a migration that came about has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// The guest ran, and runs at the target.
    pub running: bool,
}

/// What a migration is started with.
#[derive(Debug, Clone)]
pub struct SendTo {
    /// Where the VM goes.
    pub address: Address,
    /// TLS, if the connections are to have it.
    pub tls: Option<Tls>,
    /// Connections for RAM, 1 to [`MAX_CONNECTIONS`].
    pub connections: u32,
    /// RAM goes over as file descriptors.
    pub local: bool,
    /// The guest may go over before its RAM has.
    pub postcopy: bool,
    /// Disks go along: the target has other storage.
    pub mirror: bool,
    /// RAM bypasses the page cache on its way into a file.
    pub direct: bool,
    /// Distinguishes this migration from others.
    pub session: [u8; 16],
}

/// Moves the VM. When it fails, the VM is as it was, but for [`MigrationError::Unknown`].
///
/// # Errors
/// [`MigrationError`].
pub fn send(
    source: &dyn Source,
    to: &SendTo,
    control: &Arc<Control>,
    spawner: &Arc<dyn Spawner>,
) -> Result<Outcome, MigrationError> {
    let mut sender = Sender {
        source,
        to,
        control,
        spawner,
        memory: source.memory(),
        limiter: Arc::default(),
        lanes: Lanes::none(),
        stopped: false,
        given_up: false,
        logging: false,
        mirroring: false,
        behind: None,
        unit: 0,
        syncs: false,
        sparse: false,
        code: Cell::new(false),
    };
    let result = sender.run();
    sender.finish(result)
}

struct Sender<'a> {
    source: &'a dyn Source,
    to: &'a SendTo,
    control: &'a Arc<Control>,
    spawner: &'a Arc<dyn Spawner>,
    memory: GuestMemory,
    limiter: Arc<Limiter>,
    lanes: Lanes,
    stopped: bool,
    given_up: bool,
    logging: bool,
    mirroring: bool,
    /// Pages that follow the guest.
    behind: Option<PageSet>,
    /// Bytes that the destination can only bring in together (its huge pages); 0 if it has said nothing.
    unit: u64,
    /// The destination says what has arrived.
    syncs: bool,
    /// It takes pages without their empty lines.
    sparse: bool,
    /// It can prepare the guest's code, and has not been told yet which that is.
    code: Cell<bool>,
}

fn vm(what: &'static str) -> impl FnOnce(Failure) -> MigrationError {
    move |source| MigrationError::Vm { what, source }
}

/// Reads a frame of kind `wanted`; one that says why the other side gives up becomes an error.
pub(crate) fn expect(
    stream: &mut impl io::Read,
    wanted: Kind,
    what: &'static str,
    side: &'static str,
) -> Result<(Header, Vec<u8>), MigrationError> {
    let (header, payload) = next(stream, what, side)?;
    match header.kind {
        kind if kind == wanted => Ok((header, payload)),
        kind => Err(MigrationError::Protocol(format!("a {kind:?} section where {wanted:?} belongs"))),
    }
}

/// Reads the next frame; one that says why the other side gives up becomes an error.
pub(crate) fn next(
    stream: &mut impl io::Read,
    what: &'static str,
    side: &'static str,
) -> Result<(Header, Vec<u8>), MigrationError> {
    let mut payload = Vec::new();
    let header = frame::read(stream, &mut payload).map_err(MigrationError::broken(what))?;
    if header.kind == Kind::Abort {
        let reason = String::from_utf8_lossy(&payload).into_owned();
        return Err(MigrationError::Refused { side, reason });
    }
    Ok((header, payload))
}

impl Sender<'_> {
    fn enter(&self, phase: Phase) {
        if self.control.enter(phase) {
            self.source.entered(phase);
        }
    }

    fn run(&mut self) -> Result<Outcome, MigrationError> {
        self.source.entered(Phase::Setup);
        if self.to.connections == 0 || self.to.connections > MAX_CONNECTIONS {
            let text = format!("connections={} is not from 1 to {MAX_CONNECTIONS}", self.to.connections);
            return Err(MigrationError::Address { address: self.to.address.to_string(), reason: text });
        }
        if self.to.local && (self.to.connections > 1 || self.to.postcopy || self.to.mirror) {
            let reason =
                "a local migration has one connection, no post-copy and no mirrored disks".to_owned();
            return Err(MigrationError::Address { address: self.to.address.to_string(), reason });
        }
        let total: u64 = self.ranges().iter().map(|r| r.1).sum();
        self.control.counters.total.store(total, Relaxed);
        if let Address::File(path) = &self.to.address {
            return self.store(path);
        }
        let mut plan = self.source.plan().map_err(vm("this VM cannot migrate"))?;
        plan.local = self.to.local;
        plan.connections = self.to.connections;
        plan.postcopy = self.to.postcopy;
        if self.to.mirror {
            plan.mirror = self.source.mirror().map_err(vm("the disks cannot go along"))?;
            // An inherited socket is one connection.
            plan.nbd = !plan.mirror.is_empty() && !matches!(self.to.address, Address::Fd(_));
        }
        let files = if self.to.local {
            self.source.ram_files().map_err(vm("this VM cannot migrate locally"))?
        } else {
            Vec::new()
        };
        let mut main = self.connect(Role::Main)?;
        let text =
            serde_json::to_vec(&plan).map_err(|e| MigrationError::vm("the plan cannot be written", e))?;
        frame::write(&mut main, Kind::Hello, 0, &text).map_err(MigrationError::broken("sending the plan"))?;
        if self.to.local {
            main.send_fds(&files)?;
        }
        let (accepted, understands) =
            expect(&mut main, Kind::Accept, "waiting for the destination to build the VM", "destination")?;
        self.unit = accepted.arg;
        let knows = |word: &[u8]| understands.split(|byte| *byte == b' ').any(|known| known == word);
        (self.syncs, self.sparse, self.code) =
            (knows(frame::SYNC), knows(frame::SPARSE), knows(frame::CODE).into());
        for _ in 1..self.to.connections {
            let stream = self.connect(Role::Ram)?;
            let sink = Box::new(Connection { encoder: self.encoder(), stream, syncs: self.syncs });
            self.lanes.add(sink, self.spawner.as_ref())?;
        }
        self.control.counters.setup.store(self.control.elapsed().as_millis() as u64, Relaxed);
        let priority = if plan.postcopy { Some(self.connect(Role::Priority)?) } else { None };
        let way = if plan.nbd && knows(frame::NBD) { self.images(&plan) } else { Ok(Way::Sections) };
        let mut result = way.and_then(|way| self.transfer(&mut main, &plan, way));
        if let (Ok(_), Some(left), Some(priority)) = (&result, self.behind.take(), priority) {
            // The guest is gone; from here on nothing brings it back.
            self.source.moved();
            self.stopped = false;
            let pusher = Pusher {
                source: self.source,
                to: self.to,
                control: self.control,
                spawner: self.spawner,
                memory: self.memory.clone(),
                limiter: Arc::clone(&self.limiter),
                sparse: self.sparse,
                left: Arc::new(Mutex::new(Left::new(left))),
            };
            pusher.run(main, priority)?;
            return result;
        }
        if let Err(MigrationError::Broken { .. }) = &result
            && main.set_timeouts(Some(LAST_WORDS)).is_ok()
            && let Err(said @ MigrationError::Refused { .. }) =
                expect(&mut main, Kind::Abort, "asking why", "destination")
        {
            result = Err(said);
        }
        if let Err(error) = &result
            && !matches!(error, MigrationError::Broken { .. } | MigrationError::Unknown(_))
        {
            // The reason is a courtesy: that the connection ends says enough.
            let text: String = error.describe().chars().take(4096).collect();
            let _ = frame::write(&mut main, Kind::Abort, 0, text.as_bytes());
        }
        result
    }

    fn connect(&self, role: Role) -> Result<Stream, MigrationError> {
        let preamble = Preamble { role, session: self.to.session };
        Stream::connect(&self.to.address, self.to.tls.as_ref(), &preamble, self.control)
    }

    /// Connects to the images of the disks that go along.
    fn images(&self, plan: &Plan) -> Result<Way, MigrationError> {
        let open = |disk: &MirroredDisk| Remote::open(self.connect(Role::Disk)?, disk);
        plan.mirror.iter().map(open).collect::<Result<_, _>>().map(Way::Nbd)
    }

    fn encoder(&self) -> Encoder {
        Encoder::new(self.memory.clone(), Arc::clone(self.control), Arc::clone(&self.limiter))
            .sparse(self.sparse)
    }

    fn transfer(&mut self, main: &mut Stream, plan: &Plan, way: Way) -> Result<Outcome, MigrationError> {
        let mut left = PageSet::empty(&self.ranges());
        let (mut encoder, syncs) = (self.encoder(), self.syncs);
        let (source, control, limiter) = (self.source, self.control, Arc::clone(&self.limiter));
        let mut disks = DiskSender { source, control, limiter: &limiter, disks: &plan.mirror, way };
        self.mirroring = !plan.mirror.is_empty();
        disks.begin(main)?;
        if self.to.local {
            self.enter(Phase::Active);
        } else {
            left = self.begin()?;
            self.converge(&mut left, &mut First { encoder: &mut encoder, stream: main, syncs })?;
        }
        if self.code.get() && self.to.postcopy {
            // Post-copy has come early. The guest is better off here until its code is prepared, if that does not take long.
            let mut first = First { encoder: &mut encoder, stream: main, syncs };
            self.send_code(&mut left, &mut first, SHORTLY)?;
            first.settle()?;
        }
        disks.pass(main)?;
        self.wait_for_leave()?;
        let mut marks = Marks::start("the pause at the source");
        self.stop()?;
        marks.mark("stop");
        disks.pass(main)?;
        disks.end(main)?;
        marks.mark("disks");
        if !self.to.local {
            self.source.sync_log().map_err(vm("writes to RAM cannot be logged"))?;
            left.take_dirty(&self.memory);
            marks.mark("log");
            let behind = self.to.postcopy && self.control.wants_postcopy() && left.count() > 0;
            if !behind {
                self.send_pages(&mut left, &mut First { encoder: &mut encoder, stream: main, syncs })?;
            }
            marks.mark("RAM");
        }
        self.lanes.end()?;
        frame::write(main, Kind::End, 0, &[]).map_err(MigrationError::broken("sending the end of RAM"))?;
        if left.count() > 0 {
            left.widen(self.unit);
            let runs = pages::encode_runs(left.runs());
            frame::write(main, Kind::Missing, 0, &runs)
                .map_err(MigrationError::broken("saying what is missing"))?;
            self.behind = Some(left);
        }
        marks.mark("end");
        let state = self.source.save().map_err(vm("the VM cannot be saved"))?;
        marks.mark("save");
        frame::write(main, Kind::State, 0, &state).map_err(MigrationError::broken("sending the state"))?;
        expect(main, Kind::Ready, "waiting for the destination to take the state over", "destination")?;
        marks.mark("ready");
        self.hand_over(main)?;
        marks.mark("hand-over");
        self.stood(marks.began());
        Ok(Outcome { running: plan.running })
    }

    /// Moves the VM into a file.
    fn store(&mut self, path: &Path) -> Result<Outcome, MigrationError> {
        let refused = |what: &str| {
            let reason = format!("{what} does not go with a file");
            Err(MigrationError::Address { address: self.to.address.to_string(), reason })
        };
        if self.to.postcopy || self.to.local || self.to.mirror || self.to.tls.is_some() {
            return refused("post-copy, local, TLS or mirrored disks");
        }
        if self.control.parameters().zstd.is_some() {
            return refused("compression");
        }
        let plan = self.source.plan().map_err(vm("this VM cannot be stored"))?;
        let text =
            serde_json::to_vec(&plan).map_err(|e| MigrationError::vm("the plan cannot be written", e))?;
        let file = Arc::new(MappedFile::create(path, &text, self.ranges(), self.to.direct)?);
        let stored = self.store_in(&file, plan.running);
        if stored.is_err() {
            // Threads that write are done before it goes.
            self.lanes = Lanes::none();
            file.discard();
        }
        stored
    }

    fn store_in(&mut self, file: &Arc<MappedFile>, running: bool) -> Result<Outcome, MigrationError> {
        let writer = || file.writer(self.memory.clone(), Arc::clone(self.control), Arc::clone(&self.limiter));
        let mut first = writer()?;
        let further = (1..self.to.connections).map(|_| writer()).collect::<Result<Vec<_>, _>>()?;
        for writer in further {
            self.lanes.add(Box::new(writer), self.spawner.as_ref())?;
        }
        let mut left = self.begin()?;
        self.converge(&mut left, &mut first)?;
        self.wait_for_leave()?;
        let began = host_monotonic();
        self.stop()?;
        self.source.sync_log().map_err(vm("writes to RAM cannot be logged"))?;
        left.take_dirty(&self.memory);
        self.send_pages(&mut left, &mut first)?;
        self.lanes.end()?;
        let state = self.source.save().map_err(vm("the VM cannot be saved"))?;
        file.finish(&state)?;
        self.control.commit()?;
        self.given_up = true;
        self.source.give_up().map_err(vm("the VM cannot be given up"))?;
        self.stood(began);
        Ok(Outcome { running })
    }

    fn ranges(&self) -> Vec<(u64, u64)> {
        pages::ranges(&self.memory)
    }

    /// Starts the log of writes; returns all pages.
    fn begin(&mut self) -> Result<PageSet, MigrationError> {
        self.enter(Phase::Active);
        let ranges = self.ranges();
        pages::log_writes(&self.memory, true);
        self.logging = true;
        self.source.start_log().map_err(vm("writes to RAM cannot be logged"))?;
        if self.code.get() {
            self.source.note_code();
        }
        Ok(PageSet::full(&ranges))
    }

    fn stop(&mut self) -> Result<(), MigrationError> {
        self.source.throttle(0);
        self.source.stop().map_err(vm("the guest cannot be stopped"))?;
        self.stopped = true;
        self.enter(Phase::Device);
        Ok(())
    }

    /// The guest has stood since `began`, and is gone.
    fn stood(&self, began: u64) {
        let stood = (host_monotonic() - began) / 1_000_000;
        self.control.counters.downtime.store(stood, Relaxed);
        self.control.counters.remaining.store(0, Relaxed);
    }

    /// Sends RAM in passes until what is left takes no longer than the guest may stand.
    fn converge(&mut self, left: &mut PageSet, first: &mut dyn Sink) -> Result<(), MigrationError> {
        let (mut throttle, mut last, mut fastest) = (Throttle::default(), u64::MAX, 0);
        for pass in 1.. {
            self.control.counters.passes.store(pass, Relaxed);
            self.source.passed(pass);
            let before = self.control.counters.transferred.load(Relaxed);
            let began = host_monotonic();
            self.send_pages(left, first)?;
            first.settle()?;
            self.lanes.settle()?;
            let sent = self.control.counters.transferred.load(Relaxed) - before;
            let took = (host_monotonic() - began).max(1);
            self.source.sync_log().map_err(vm("writes to RAM cannot be logged"))?;
            tracing::debug!(
                pass,
                sent,
                took = took / 1000,
                log = (host_monotonic() - began - took) / 1000,
                "a pass (bytes, µs)"
            );
            // What is left was not sent, if somebody asked for post-copy meanwhile.
            left.take_dirty(&self.memory);
            if self.to.postcopy && self.control.wants_postcopy() {
                return Ok(());
            }
            let parameters = self.control.parameters();
            let remaining = left.count() * PAGE_SIZE;
            let rate = per_second(sent, took).max(1);
            let counters = &self.control.counters;
            counters.remaining.store(remaining, Relaxed);
            counters.rate.store(rate, Relaxed);
            counters.dirty_rate.store(per_second(left.count(), took), Relaxed);
            let expected = Duration::from_micros(remaining.saturating_mul(1_000_000) / rate);
            counters.expected_downtime.store(expected.as_millis() as u64, Relaxed);
            // Short passes cost little and shorten the pause, for as long as each leaves much less than the one before.
            let in_time =
                parameters.timeout.is_none_or(|limit| self.control.elapsed() + 2 * expected < limit);
            // The rate of a short pass is mostly that of its end.
            fastest = rate.max(fastest);
            let worth = remaining > fastest / 1_000_000 * WORTH.as_micros() as u64;
            let shrinks = remaining < last / 2 && worth && in_time;
            last = remaining;
            if expected <= parameters.downtime {
                if shrinks {
                    continue;
                }
                return Ok(());
            }
            if self.to.postcopy && self.control.is_hybrid() {
                self.control.start_postcopy();
                return Ok(());
            }
            if parameters.timeout.is_some_and(|limit| self.control.elapsed() >= limit) {
                match parameters.strategy {
                    TimeoutStrategy::Cancel => {
                        return Err(MigrationError::Timeout(
                            parameters.timeout.unwrap_or_default().as_secs(),
                        ));
                    }
                    TimeoutStrategy::Ignore => return Ok(()),
                }
            }
            if parameters.auto_converge {
                let percent = throttle.after_pass(&parameters, sent, remaining);
                counters.throttle.store(u64::from(percent), Relaxed);
                self.source.throttle(percent);
            }
        }
        Ok(())
    }

    /// Sends the pages of `set`, those of the first connection by `first`, and takes them out of it. Stops early if somebody asks for post-copy.
    fn send_pages(&self, set: &mut PageSet, first: &mut dyn Sink) -> Result<(), MigrationError> {
        let mut left = set.count() * PAGE_SIZE;
        let runs: Vec<_> = set.runs().collect();
        let half = runs.len() / 2;
        for (n, run) in runs.into_iter().enumerate() {
            self.control.check()?;
            if self.to.postcopy && self.control.postcopy_is_due() {
                return first.flush();
            }
            if self.code.get() && n >= half {
                // By now it is known what runs, and the target has the rest of this pass to prepare it.
                self.send_code(set, first, Duration::MAX)?;
            }
            for part in set.within(run) {
                set.set(part, false);
                if !self.lanes.send(part) {
                    first.send(part)?;
                }
            }
            left -= run.len;
            self.control.counters.remaining.store(left, Relaxed);
            let parameters = self.control.parameters();
            let late = parameters.timeout.is_some_and(|limit| self.control.elapsed() >= limit);
            if late && parameters.strategy == TimeoutStrategy::Cancel {
                return Err(MigrationError::Timeout(parameters.timeout.unwrap_or_default().as_secs()));
            }
        }
        first.flush()
    }

    /// Tells the target which code the guest runs, behind the pages that it is in, which are taken out of `set`; unless the
    /// bandwidth makes that take longer than `limit`.
    fn send_code(
        &self,
        set: &mut PageSet,
        first: &mut dyn Sink,
        limit: Duration,
    ) -> Result<(), MigrationError> {
        self.code.set(false);
        let code = self.source.running_code();
        let (bytes, bandwidth) = (code.pages.len() as u64 * PAGE_SIZE, self.control.parameters().bandwidth);
        let takes = Duration::from_millis(bytes.saturating_mul(1000).checked_div(bandwidth).unwrap_or(0));
        if code.places.is_empty() || takes > limit {
            return Ok(());
        }
        for gpa in code.pages {
            let run = Run { gpa, len: PAGE_SIZE };
            if set.contains(gpa) && set.set(run, false) && !self.lanes.send(run) {
                first.send(run)?;
            }
        }
        first.tell(Kind::Code, &code.places)
    }

    /// Waits until the guest may be stopped, if somebody wants to be asked.
    fn wait_for_leave(&self) -> Result<(), MigrationError> {
        if !self.control.parameters().pause_before_switchover {
            return self.control.check();
        }
        self.enter(Phase::PreSwitchover);
        while !self.control.may_switch_over() {
            self.control.check()?;
            std::thread::sleep(PATIENCE);
        }
        Ok(())
    }

    /// The moment in which the guest changes hands.
    fn hand_over(&mut self, main: &mut Stream) -> Result<(), MigrationError> {
        self.control.commit()?;
        self.given_up = true;
        self.source.give_up().map_err(vm("the VM cannot be given up"))?;
        frame::write(main, Kind::Go, 0, &[]).map_err(MigrationError::broken("giving the VM up"))?;
        let mut payload = Vec::new();
        match frame::read(main, &mut payload) {
            Ok(header) if header.kind == Kind::Done => Ok(()),
            Ok(header) if header.kind == Kind::Abort => {
                let reason = String::from_utf8_lossy(&payload).into_owned();
                Err(MigrationError::Refused { side: "destination", reason })
            }
            Ok(header) => {
                let text = format!("a {:?} section where Done belongs", header.kind);
                Err(MigrationError::Unknown(io::Error::new(io::ErrorKind::InvalidData, text)))
            }
            // Even if the stream has ended in order: something on the way may have ended it behind `Done`.
            Err(source) => Err(MigrationError::Unknown(source)),
        }
    }

    /// Puts everything in order again.
    fn finish(mut self, result: Result<Outcome, MigrationError>) -> Result<Outcome, MigrationError> {
        if result.is_err() {
            // Threads that send are not to wait for a peer that does not read.
            self.control.break_connections();
        }
        self.lanes = Lanes::none();
        self.control.forget_connections();
        self.source.throttle(0);
        if self.mirroring
            && let Err(error) = self.source.log_disks(false)
        {
            tracing::warn!(error, "the log of writes to disks cannot be ended");
        }
        if self.logging {
            self.source.stop_log();
            pages::log_writes(&self.memory, false);
        }
        let result = match result {
            // Connections that break because somebody cancelled are no failure of theirs.
            Err(_) if self.control.is_cancelled() => Err(MigrationError::Cancelled),
            other => other,
        };
        let Err(error) = result else {
            self.source.moved();
            self.enter(Phase::Completed);
            return result;
        };
        self.control.set_error(error.describe());
        if self.stopped && !matches!(error, MigrationError::Unknown(_)) {
            let back = if self.given_up { self.source.take_back() } else { Ok(()) };
            match back {
                Ok(()) => self.source.go_on(),
                Err(source) => {
                    self.enter(Phase::Failed);
                    return Err(MigrationError::Vm {
                        what: "the VM stays paused: it cannot be taken back",
                        source,
                    });
                }
            }
        }
        self.enter(if self.control.is_cancelled() { Phase::Cancelled } else { Phase::Failed });
        Err(error)
    }
}

fn per_second(count: u64, nanoseconds: u64) -> u64 {
    u64::try_from(u128::from(count) * 1_000_000_000 / u128::from(nanoseconds.max(1))).unwrap_or(u64::MAX)
}

/// Decides when vCPUs are slowed, and by how much.
#[derive(Debug, Default)]
struct Throttle {
    percent: u8,
    /// Passes in a row after which more than half of what was sent had been written again.
    losing: u32,
}

impl Throttle {
    fn after_pass(&mut self, parameters: &crate::Parameters, sent: u64, remaining: u64) -> u8 {
        self.losing = if remaining > sent / 2 { self.losing + 1 } else { 0 };
        if self.losing >= 2 {
            self.losing = 0;
            self.percent = match self.percent {
                0 => parameters.throttle_initial,
                now => now.saturating_add(parameters.throttle_increment),
            };
        }
        self.percent = self.percent.min(parameters.throttle_max).min(99);
        self.percent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Parameters;

    #[test]
    fn vcpus_are_slowed_step_by_step() {
        let (parameters, mut throttle) = (Parameters::default(), Throttle::default());
        let steps: Vec<u8> = (0..24).map(|_| throttle.after_pass(&parameters, 100, 80)).collect();
        assert_eq!(steps[..6], [0, 20, 20, 30, 30, 40]);
        assert_eq!(*steps.last().expect("a step"), 99);
        assert_eq!(Throttle::default().after_pass(&parameters, 100, 20), 0);
    }
}
