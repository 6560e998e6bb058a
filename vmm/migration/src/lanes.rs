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
use vm_memory::bitmap::MS;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::backed::{AT_ONCE, Window};
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
/// Runs of at least so many pages are asked about before they are read. And so many pages without an empty line have a frame of their own.
const MANY: u64 = 16;
/// The longest payload of a frame, in bytes: pages with their masks, and one that may be too much.
const LONGEST: usize = (AT_ONCE as usize + 1) * (PAGE_SIZE as usize + sparse::MASK);
type Slice<'a> = VolatileSlice<'a, MS<'a, GuestMemory>>;

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

    /// Sends something else behind what was taken so far, where there is somebody to take it.
    fn tell(&mut self, _kind: Kind, _payload: &[u8]) -> Result<(), MigrationError> {
        Ok(())
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

    fn tell(&mut self, kind: Kind, payload: &[u8]) -> Result<(), MigrationError> {
        self.flush()?;
        frame::write(self.stream, kind, 0, payload).map_err(MigrationError::broken("sending RAM"))
    }

    fn end(&mut self) -> Result<(), MigrationError> {
        self.flush()
    }
}

/// Makes frames of RAM. Small ones are collected: a page of its own is not worth a wake-up at the other end.
pub(crate) struct Encoder {
    memory: Arc<GuestMemory>,
    control: Arc<Control>,
    limiter: Arc<Limiter>,
    urgent: bool,
    /// Lines of zeroes are left out.
    sparse: bool,
    backed: Window,
    /// Frames, and room for the longest that may follow.
    out: Vec<u8>,
    /// Bytes of frames.
    used: usize,
}

/// A frame that is being made out of pages: where it ends, and whether lines of it are left out.
struct Pages {
    count: u64,
    end: usize,
    loose: bool,
}

impl Encoder {
    pub(crate) fn new(memory: GuestMemory, control: Arc<Control>, limiter: Arc<Limiter>) -> Self {
        let (backed, out) = (Window::default(), vec![0; BATCH + HEADER + LONGEST]);
        let memory = Arc::new(memory);
        Self { memory, control, limiter, urgent: false, sparse: false, backed, out, used: 0 }
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
                if self.used >= BATCH {
                    self.write(to)?;
                }
            }
            at += part.len;
        }
        Ok(())
    }

    /// Sends what was kept.
    pub(crate) fn flush(&mut self, to: &mut Stream) -> Result<(), MigrationError> {
        // Another pass has to ask anew.
        self.backed.forget();
        self.write(to)
    }

    fn write(&mut self, to: &mut Stream) -> Result<(), MigrationError> {
        let Some(frames) = self.out.get(..self.used).filter(|frames| !frames.is_empty()) else {
            return Ok(());
        };
        if !self.urgent {
            self.limiter.admit(frames.len() as u64, &self.control)?;
        }
        to.write_all(frames).map_err(MigrationError::broken("sending RAM"))?;
        self.control.counters.transferred.fetch_add(frames.len() as u64, Relaxed);
        self.used = 0;
        Ok(())
    }

    /// Copies pages from `at` on in `ram`, both in bytes, to the place `to` in `out`.
    fn copy(&mut self, ram: &Slice<'_>, at: u64, to: usize, pages: u64) -> Result<(), MigrationError> {
        let len = (pages * PAGE_SIZE) as usize;
        let from = ram.subslice(at as usize, len);
        let from = from.map_err(|e| MigrationError::vm("RAM cannot be read", e))?;
        from.copy_to(self.out.get_mut(to..to + len).unwrap_or_default());
        Ok(())
    }

    /// Which lines of the page at the place `at` in `out` are not all zeroes, or just whether any is.
    fn mask(&self, at: usize, lines: bool) -> u64 {
        let Some(page) = self.out.get(at..).and_then(|rest| rest.first_chunk()) else { return 0 };
        match lines {
            true => sparse::mask(page),
            false if is_zero(page) => 0,
            false => u64::MAX,
        }
    }

    /// Appends a frame for as much of the start of `run`, at most [`AT_ONCE`] pages of one range of RAM, as is alike: zeroes, or not; of the
    /// latter, if there are many, either without an empty line or with some. Of its pages only those in `backed`, from bit 0
    /// on, may be something else than zeroes. Returns its length in bytes.
    fn frame(&mut self, run: Run, backed: u64) -> Result<u64, MigrationError> {
        let level = self.control.parameters().zstd;
        // What is compressed needs no such help.
        let sparse = self.sparse && level.is_none();
        let memory = Arc::clone(&self.memory);
        let ram = memory.get_slice(GuestAddress(run.gpa), run.len as usize);
        let ram = ram.map_err(|e| MigrationError::vm("RAM cannot be read", e))?;
        let begin = self.used + HEADER;
        let (mut zeroes, mut pages) = (0, Pages { count: 0, end: begin, loose: false });
        // How many pages behind the zeroes have been copied, each to where it belongs if no line of any is empty.
        let mut copied = 0;
        while (zeroes + pages.count) * PAGE_SIZE < run.len {
            let number = zeroes + pages.count;
            let mut mask = 0;
            if backed >> number & 1 != 0 {
                let place = pages.end + if pages.loose { sparse::MASK } else { 0 };
                if pages.loose {
                    self.copy(&ram, number * PAGE_SIZE, place, 1)?;
                } else if pages.count >= copied {
                    // Twice as many each time: what is copied page by page comes slower, and what is no use is no more than what was.
                    let follow =
                        u64::from((backed >> number).trailing_ones()).min(run.len / PAGE_SIZE - number);
                    let many = pages.count.max(1).min(follow);
                    self.copy(&ram, number * PAGE_SIZE, place, many)?;
                    copied = pages.count + many;
                }
                mask = self.mask(place, sparse);
            }
            match mask {
                0 if pages.count == 0 => (zeroes, copied) = (zeroes + 1, 0),
                0 => break,
                _ if zeroes > 0 => break,
                u64::MAX if !pages.loose => {
                    pages.count += 1;
                    pages.end += PAGE_SIZE as usize;
                }
                _ if !pages.loose && pages.count >= MANY => break,
                _ => self.leave_out(&mut pages, begin, mask),
            }
        }
        if zeroes > 0 {
            self.put(Kind::Zero, run.gpa, &(zeroes * PAGE_SIZE).to_le_bytes());
            self.control.counters.zero.fetch_add(zeroes, Relaxed);
            return Ok(zeroes * PAGE_SIZE);
        }
        let len = pages.count * PAGE_SIZE;
        self.control.counters.normal.fetch_add(pages.count, Relaxed);
        let payload = self.out.get(begin..pages.end).unwrap_or_default();
        if let Some(level) = level
            && let Ok(packed) = zstd::bulk::compress(payload, level)
            && (packed.len() as u64) + 4 < len
        {
            let payload = [&(len as u32).to_le_bytes()[..], &packed].concat();
            self.put(Kind::Zstd, run.gpa, &payload);
            return Ok(len);
        }
        let kind = if pages.loose { Kind::Sparse } else { Kind::Ram };
        let header = frame::header(kind, run.gpa, payload);
        if let Some(place) = self.out.get_mut(self.used..begin) {
            place.copy_from_slice(&header);
        }
        self.used = pages.end;
        Ok(len)
    }

    /// Adds the page behind `pages`, whose mask is `mask`, without its empty lines. `begin` is where the first is.
    fn leave_out(&mut self, pages: &mut Pages, begin: usize, mask: u64) {
        let Some(place) = self.out.get_mut(begin..) else { return };
        if !pages.loose {
            sparse::loosen(place, pages.count as usize);
            (pages.end, pages.loose) = (pages.end + pages.count as usize * sparse::MASK, true);
        }
        if let Some(place) = place.get_mut(pages.end - begin..) {
            pages.end += sparse::pack(place, mask);
        }
        pages.count += 1;
    }

    /// Appends a whole frame, which is no longer than there is room.
    fn put(&mut self, kind: Kind, gpa: u64, payload: &[u8]) {
        let header = frame::header(kind, gpa, payload);
        let room = self.out.get_mut(self.used..).and_then(|rest| rest.split_at_mut_checked(HEADER));
        let Some((head, rest)) = room else { return };
        if let Some(place) = rest.get_mut(..payload.len()) {
            head.copy_from_slice(&header);
            place.copy_from_slice(payload);
            self.used += HEADER + payload.len();
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inbox::Inbox;
    use crate::target::Filler;
    use std::os::unix::net::UnixStream;
    use vm_memory::Bytes;

    const BASE: u64 = 0x8000_0000;
    const PAGES: u64 = 700;

    fn memory() -> GuestMemory {
        let len = (PAGES * PAGE_SIZE) as usize;
        GuestMemory::from_ranges(&[(GuestAddress(BASE), len)]).expect("RAM")
    }

    /// RAM in which runs of empty, whole and partly empty pages follow each other.
    fn filled(seed: u64) -> GuestMemory {
        let (memory, mut random) = (memory(), seed);
        let mut next = |below: u64| {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (random >> 33) % below
        };
        let mut page = 0;
        while page < PAGES {
            let (kind, count) = (next(4), [1, 2, 20, 90][next(4) as usize]);
            for page in page..(page + count).min(PAGES) {
                let mut bytes = [0; PAGE_SIZE as usize];
                match kind {
                    0 => {}
                    1 => bytes[next(4096) as usize] = 1,
                    _ => bytes.fill(page as u8 | 1),
                }
                memory.write_slice(&bytes, GuestAddress(BASE + page * PAGE_SIZE)).expect("RAM");
            }
            page += count;
        }
        memory
    }

    /// Moves `memory`, in runs as pages are given to connections, and returns what arrives.
    fn moved(memory: &GuestMemory, (sparse, zstd): (bool, Option<i32>), sent: &Arc<Control>) -> GuestMemory {
        sent.set_parameters(crate::Parameters { zstd, ..crate::Parameters::default() });
        let (near, far) = UnixStream::pair().expect("sockets");
        let (there, control) = (self::memory(), Control::new(crate::Parameters::default()));
        let copy = there.clone();
        let reader = std::thread::spawn(move || {
            let filler = Filler { memory: &copy, control: &control };
            filler.until_end(&mut Inbox::new(Stream::Unix(far)), &mut |header, _| panic!("{header:?}"))
        });
        let mut encoder = Encoder::new(memory.clone(), Arc::clone(sent), Arc::default()).sparse(sparse);
        let mut stream = Stream::Unix(near);
        for run in crate::pages::PageSet::full(&crate::pages::ranges(memory)).runs() {
            encoder.send(run, &mut stream).expect("somebody reads");
        }
        encoder.flush(&mut stream).expect("somebody reads");
        frame::write(&mut stream, Kind::End, 0, &[]).expect("somebody reads");
        reader.join().expect("no panic").expect("it makes sense");
        there
    }

    #[test]
    fn all_pages_arrive_as_they_are() {
        for seed in 0..12 {
            let memory = filled(seed);
            for how in [(true, None), (false, None), (true, Some(1))] {
                let control = Arc::new(Control::new(crate::Parameters::default()));
                let there = moved(&memory, how, &control);
                for page in 0..PAGES {
                    let at = GuestAddress(BASE + page * PAGE_SIZE);
                    let (mut here, mut came) = ([0; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
                    memory
                        .read_slice(&mut here, at)
                        .and_then(|()| there.read_slice(&mut came, at))
                        .expect("RAM");
                    assert!(here == came, "page {page} of {seed}, {how:?}");
                }
                let sent = control.statistics();
                assert_eq!(sent.normal + sent.zero, PAGES, "{seed}, {how:?}");
            }
        }
    }
}
