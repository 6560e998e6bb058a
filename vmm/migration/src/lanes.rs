//! The connections that carry RAM at the source.
//!
//! A piece of RAM always takes the same connection, so a page's newer contents never arrive before its older ones.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use holdfast_clock::host_monotonic;
use holdfast_memory::{GuestMemory, PAGE_SIZE};
use holdfast_threads::{Role, Spawner};
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};

use crate::backed::{AT_ONCE, Backed};
use crate::control::Control;
use crate::frame::{self, HEADER, Kind};
use crate::pages::{Run, is_zero};
use crate::source::expect;
use crate::sparse;
use crate::{MigrationError, Stream};

/// Pieces of RAM that wait for a connection.
const QUEUE: usize = 16;
/// Frames are collected up to this size, in bytes.
const BATCH: usize = 128 << 10;
/// Runs of at least so many pages are asked about before they are read.
const MANY: u64 = 16;
/// RAM goes to connections in blocks of this size, in bytes.
pub(crate) const BLOCK: u64 = 2 << 20;

/// Keeps all connections together to the bandwidth.
#[derive(Debug, Default)]
pub(crate) struct Limiter(Mutex<Option<(u64, u64)>>);

impl Limiter {
    /// `bytes` are about to be sent: waits until they may.
    pub(crate) fn admit(&self, bytes: u64, control: &Control) -> Result<(), MigrationError> {
        loop {
            let bandwidth = control.parameters().bandwidth;
            let now = host_monotonic();
            let wait = {
                let mut state = self.0.lock();
                if bandwidth == 0 {
                    *state = None;
                    return Ok(());
                }
                // What was not used is lost: the allowance is never more than a tenth of a second's.
                let (at, debt) = state.unwrap_or((now, 0));
                let paid = u128::from(now.saturating_sub(at)) * u128::from(bandwidth) / 1_000_000_000;
                let debt = debt.saturating_sub(u64::try_from(paid).unwrap_or(u64::MAX));
                if debt <= bandwidth / 10 {
                    *state = Some((now, debt + bytes));
                    return Ok(());
                }
                *state = Some((now, debt));
                (debt - bandwidth / 10).saturating_mul(1_000_000_000) / bandwidth
            };
            control.check()?;
            std::thread::sleep(Duration::from_nanos(wait.clamp(100_000, 50_000_000)));
        }
    }
}

/// Where pages go.
pub(crate) trait Sink: Send {
    /// Takes the pages of `run`.
    fn send(&mut self, run: Run) -> Result<(), MigrationError>;

    /// What was taken so far is on its way when this returns.
    fn flush(&mut self) -> Result<(), MigrationError>;

    /// What was taken so far is where it belongs when this returns, if the other end can say so.
    fn settle(&mut self) -> Result<(), MigrationError> {
        self.flush()
    }

    /// Nothing more comes.
    fn end(&mut self) -> Result<(), MigrationError>;
}

/// A connection for RAM only.
pub(crate) struct Connection {
    pub(crate) encoder: Encoder,
    pub(crate) stream: Stream,
    /// The other end says what has arrived.
    pub(crate) syncs: bool,
}

/// Waits until the other end has taken all that was sent. Sockets hold megabytes, which would be worked off while the guest stands.
fn sync(stream: &mut Stream) -> Result<(), MigrationError> {
    const WHAT: &str = "waiting for the destination to have what was sent";
    frame::write(stream, Kind::Sync, 0, &[]).map_err(MigrationError::broken(WHAT))?;
    expect(stream, Kind::Synced, WHAT, "destination").map(drop)
}

impl Sink for Connection {
    fn send(&mut self, run: Run) -> Result<(), MigrationError> {
        self.encoder.send(run, &mut self.stream)
    }

    fn flush(&mut self) -> Result<(), MigrationError> {
        self.encoder.flush(&mut self.stream)
    }

    fn settle(&mut self) -> Result<(), MigrationError> {
        self.flush()?;
        if self.syncs { sync(&mut self.stream) } else { Ok(()) }
    }

    fn end(&mut self) -> Result<(), MigrationError> {
        self.flush()?;
        let end = frame::write(&mut self.stream, Kind::End, 0, &[]);
        end.map_err(MigrationError::broken("sending the end of RAM"))
    }
}

/// The first connection, on which other things go as well.
pub(crate) struct First<'a> {
    pub(crate) encoder: &'a mut Encoder,
    pub(crate) stream: &'a mut Stream,
    /// The other end says what has arrived.
    pub(crate) syncs: bool,
}

impl Sink for First<'_> {
    fn send(&mut self, run: Run) -> Result<(), MigrationError> {
        self.encoder.send(run, self.stream)
    }

    fn flush(&mut self) -> Result<(), MigrationError> {
        self.encoder.flush(self.stream)
    }

    fn settle(&mut self) -> Result<(), MigrationError> {
        self.flush()?;
        if self.syncs { sync(self.stream) } else { Ok(()) }
    }

    fn end(&mut self) -> Result<(), MigrationError> {
        self.flush()
    }
}

/// Makes frames of RAM. Small ones are collected: a page of its own is not worth a wake-up at the other end.
pub(crate) struct Encoder {
    memory: GuestMemory,
    control: Arc<Control>,
    limiter: Arc<Limiter>,
    urgent: bool,
    /// Lines of zeroes are left out.
    sparse: bool,
    backed: Backed,
    out: Vec<u8>,
    page: [u8; PAGE_SIZE as usize],
}

impl Encoder {
    pub(crate) fn new(memory: GuestMemory, control: Arc<Control>, limiter: Arc<Limiter>) -> Self {
        let page = [0; PAGE_SIZE as usize];
        let backed = Backed::new();
        Self { memory, control, limiter, urgent: false, sparse: false, backed, out: Vec::new(), page }
    }

    /// What it sends does not wait for bandwidth.
    pub(crate) fn urgent(self) -> Self {
        Self { urgent: true, ..self }
    }

    /// Whether the other end knows [`Kind::Sparse`].
    pub(crate) fn sparse(self, sparse: bool) -> Self {
        Self { sparse, ..self }
    }

    /// Sends the pages of `run`, or keeps them until there are more or [`Encoder::flush`] is called.
    pub(crate) fn send(&mut self, run: Run, to: &mut Stream) -> Result<(), MigrationError> {
        let mut at = 0;
        while at < run.len {
            // What is written after this has been asked is noted by the log of writes, as what is written after it was read.
            let part = Run { gpa: run.gpa + at, len: (run.len - at).min(AT_ONCE * PAGE_SIZE) };
            let many = part.len >= MANY * PAGE_SIZE;
            let backed = if many { self.backed.pages(&self.memory, part) } else { u64::MAX };
            let mut done = 0;
            while done < part.len {
                let rest = Run { gpa: part.gpa + done, len: part.len - done };
                done += self.frame(rest, backed >> (done / PAGE_SIZE))?;
            }
            at += part.len;
        }
        if self.out.len() < BATCH { Ok(()) } else { self.flush(to) }
    }

    /// Sends what was kept.
    pub(crate) fn flush(&mut self, to: &mut Stream) -> Result<(), MigrationError> {
        if self.out.is_empty() {
            return Ok(());
        }
        if !self.urgent {
            self.limiter.admit(self.out.len() as u64, &self.control)?;
        }
        to.write_all(&self.out).map_err(MigrationError::broken("sending RAM"))?;
        self.control.counters.transferred.fetch_add(self.out.len() as u64, Relaxed);
        self.out.clear();
        Ok(())
    }

    /// Reads the page at `gpa`; returns which of its lines are not all zeroes, or just whether any is.
    fn read(&mut self, gpa: u64, lines: bool) -> Result<u64, MigrationError> {
        let read = self.memory.read_slice(&mut self.page, GuestAddress(gpa));
        read.map_err(|e| MigrationError::vm("RAM cannot be read", e))?;
        Ok(if lines { sparse::mask(&self.page) } else { u64::from(!is_zero(&self.page)) })
    }

    /// Appends a frame for as much of the start of `run` as is alike: zeroes, or not. Of its pages only those in `backed`, from bit 0
    /// on, may be something else than zeroes. Returns its length in bytes.
    fn frame(&mut self, run: Run, mut backed: u64) -> Result<u64, MigrationError> {
        let start = self.out.len();
        self.out.resize(start + HEADER, 0);
        let level = self.control.parameters().zstd;
        // What is compressed needs no such help.
        let sparse = self.sparse && level.is_none();
        let (mut zeroes, mut data) = (0, 0);
        while zeroes + data < run.len {
            let mask = if backed & 1 == 0 { 0 } else { self.read(run.gpa + zeroes + data, sparse)? };
            backed >>= 1;
            match (mask, zeroes, data) {
                (0, _, 0) => zeroes += PAGE_SIZE,
                (1.., 0, _) => {
                    data += PAGE_SIZE;
                    if sparse {
                        sparse::append(&mut self.out, &self.page, mask);
                    } else {
                        self.out.extend_from_slice(&self.page);
                    }
                }
                _ => break,
            }
        }
        if zeroes > 0 {
            self.out.truncate(start);
            frame::append(&mut self.out, Kind::Zero, run.gpa, &zeroes.to_le_bytes());
            self.control.counters.zero.fetch_add(zeroes / PAGE_SIZE, Relaxed);
            return Ok(zeroes);
        }
        self.control.counters.normal.fetch_add(data / PAGE_SIZE, Relaxed);
        if let Some(level) = level
            && let Ok(packed) = zstd::bulk::compress(&self.out[start + HEADER..], level)
            && (packed.len() as u64) + 4 < data
        {
            self.out.truncate(start);
            let mut payload = (data as u32).to_le_bytes().to_vec();
            payload.extend_from_slice(&packed);
            frame::append(&mut self.out, Kind::Zstd, run.gpa, &payload);
            return Ok(data);
        }
        let kind = if sparse { Kind::Sparse } else { Kind::Ram };
        let header = frame::header(kind, run.gpa, &self.out[start + HEADER..]);
        self.out[start..start + HEADER].copy_from_slice(&header);
        Ok(data)
    }
}

enum Job {
    Send(Run),
    /// Says when everything before it has arrived.
    Flush(SyncSender<Result<(), MigrationError>>),
    End(SyncSender<Result<(), MigrationError>>),
}

/// A connection with a thread of its own.
struct Lane {
    jobs: SyncSender<Job>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Lane {
    fn drop(&mut self) {
        // Without a sender the thread ends.
        self.jobs = sync_channel(0).0;
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// All connections but the first.
pub(crate) struct Lanes {
    lanes: Vec<Lane>,
}

fn serve(jobs: &Receiver<Job>, mut sink: Box<dyn Sink>) {
    let mut result: Result<(), MigrationError> = Ok(());
    for job in jobs {
        match job {
            // After a failure what is left is only taken off the queue.
            Job::Send(run) => {
                if result.is_ok() {
                    result = sink.send(run);
                }
            }
            Job::Flush(answer) => {
                let said = std::mem::replace(&mut result, Ok(())).and_then(|()| sink.settle());
                // Who asked waits for it.
                let _ = answer.send(said);
            }
            Job::End(answer) => {
                let ended = std::mem::replace(&mut result, Ok(())).and_then(|()| sink.end());
                let _ = answer.send(ended);
            }
        }
    }
}

impl Lanes {
    /// No further connections.
    pub(crate) fn none() -> Self {
        Self { lanes: Vec::new() }
    }

    /// Adds a connection, or another way for pages.
    pub(crate) fn add(&mut self, sink: Box<dyn Sink>, spawner: &dyn Spawner) -> Result<(), MigrationError> {
        let (jobs, queue) = sync_channel(QUEUE);
        let name = format!("migrate-ram{}", self.lanes.len() + 1);
        let body = move || serve(&queue, sink);
        let thread = spawner.spawn(&name, Role::Migration, Box::new(body));
        let failed = |source| MigrationError::Host { what: "no thread for a connection", source };
        self.lanes.push(Lane { jobs, thread: Some(thread.map_err(failed)?) });
        Ok(())
    }

    /// Gives `run` to its connection; false if that is the first.
    pub(crate) fn send(&self, run: Run) -> bool {
        let index = (run.gpa / BLOCK) % (self.lanes.len() as u64 + 1);
        let Some(lane) = index.checked_sub(1).and_then(|i| self.lanes.get(i as usize)) else { return false };
        // A thread that is gone is noticed when its answer is waited for.
        let _ = lane.jobs.send(Job::Send(run));
        true
    }

    fn ask(&self, job: impl Fn(SyncSender<Result<(), MigrationError>>) -> Job) -> Result<(), MigrationError> {
        let gone = || MigrationError::Protocol("the thread of a connection ended".into());
        let mut answers = Vec::new();
        for lane in &self.lanes {
            let (tx, rx) = sync_channel(1);
            lane.jobs.send(job(tx)).map_err(|_| gone())?;
            answers.push(rx);
        }
        answers.into_iter().try_for_each(|answer| answer.recv().map_err(|_| gone())?)
    }

    /// Waits until everything has arrived.
    pub(crate) fn settle(&self) -> Result<(), MigrationError> {
        self.ask(Job::Flush)
    }

    /// Says on every connection that nothing more comes.
    pub(crate) fn end(&self) -> Result<(), MigrationError> {
        self.ask(Job::End)
    }
}
