//! Copying the contents of images: several chunks at once, holes skipped.

use std::io;
use std::sync::Arc;

use holdfast_block::node::{Plan as Found, is_zero, status_above};
use holdfast_block::raw::RawImage;
use holdfast_block::{BlockNode, Op};
use holdfast_objects::ThrottleGroup;
use holdfast_threads::{PlainSpawner, Role, Spawner};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::common::{Progress, Result, failed};

/// Bytes that are read at a time.
const CHUNK: u64 = 2 << 20;

/// One source of a copy, and where it goes.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) node: Arc<dyn BlockNode>,
    /// Where it starts in the target.
    pub(crate) start: u64,
}

/// How to copy.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) parts: Vec<Part>,
    pub(crate) target: Arc<dyn BlockNode>,
    /// Bytes to copy: the target's size as a rule.
    pub(crate) total: u64,
    /// The target reads as zeroes where nothing was written.
    pub(crate) target_zero: bool,
    /// Shortest run of zeroes that is not written, in bytes; 0 to write everything.
    pub(crate) sparse: u64,
    /// Write compressed clusters of this size.
    pub(crate) compress: Option<u64>,
    /// What the sources have from here on down their chain is not copied.
    pub(crate) skip_below: Option<usize>,
    /// Chunks under way at a time.
    pub(crate) workers: usize,
    /// Writes need not be in order.
    pub(crate) unordered: bool,
    /// Sectors that cannot be read become zeroes.
    pub(crate) salvage: bool,
    /// What the host does of it.
    pub(crate) offload: Offload,
    /// Bytes that are written in a second.
    pub(crate) limit: Option<Arc<ThrottleGroup>>,
}

impl Plan {
    /// How many threads are worth it. Those that wait for a server cost nothing; others, if there are more of them than CPUs, take the
    /// time of the one whose turn it is to write.
    fn threads(&self) -> usize {
        let remote = self.target.is_remote() || self.parts.iter().any(|part| part.node.is_remote());
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.clamp(1, if remote { usize::MAX } else { cpus + 2 })
    }
}

/// What is left to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offload {
    /// Nothing.
    No,
    /// To have both files share data, where the file system can.
    Share,
    /// To copy data, by sharing it or otherwise.
    Copy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Zero,
    /// The backing file of the target has it.
    Below,
}

struct Shared {
    /// What comes next, and its number.
    cursor: u64,
    ticket: u64,
    /// The number whose turn it is to write.
    turn: u64,
    error: Option<(String, io::Error)>,
    progress: Progress,
    /// What is known from `cursor` on.
    known: Option<(Kind, u64)>,
}

struct Copier {
    plan: Plan,
    /// The target's file if the host may copy to it, place by place.
    offload: Option<Arc<RawImage>>,
    /// The host does not copy between these files.
    refused: AtomicBool,
    shared: Mutex<Shared>,
    /// One for each worker, taken in turns: who waits for number n waits at place n.
    turned: Vec<Condvar>,
}

/// A chunk whose data is known.
enum Ready {
    /// It is at its place already.
    Done,
    /// It has to be written, perhaps as it was packed.
    Store(Option<Vec<u8>>),
}

struct Chunk {
    ticket: u64,
    offset: u64,
    len: u64,
    kind: Kind,
}

impl Copier {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where chunk number `ticket` waits for its turn: there are never more under way than places.
    fn place(&self, ticket: u64) -> &Condvar {
        &self.turned[(ticket % self.turned.len() as u64) as usize]
    }

    /// Nothing more is to be done, which those that wait for their turn hear too.
    fn fail(&self, shared: &mut Shared, what: String, error: io::Error) {
        shared.error.get_or_insert((what, error));
        self.turned.iter().for_each(Condvar::notify_all);
    }

    /// The part that holds `offset`, and the bytes of it from there on.
    fn part(&self, offset: u64) -> Option<(&Part, u64)> {
        let part = self.plan.parts.iter().rev().find(|p| p.start <= offset)?;
        let end = part.start + part.node.size();
        (offset < end).then(|| (part, end - offset))
    }

    fn look(&self, offset: u64) -> io::Result<(Kind, u64)> {
        let rest = self.plan.total - offset;
        let Some((part, there)) = self.part(offset) else {
            let next = self.plan.parts.iter().map(|p| p.start).filter(|s| *s > offset).min();
            return Ok((Kind::Zero, next.map_or(rest, |n| n - offset)));
        };
        let (extent, depth) = status_above(&*part.node, offset - part.start, there.min(rest))?;
        let len = extent.len.max(1);
        if self.plan.skip_below.is_some_and(|limit| depth >= limit || !extent.allocated) {
            return Ok((Kind::Below, len));
        }
        Ok((if extent.zero { Kind::Zero } else { Kind::Data }, len))
    }

    fn next(&self) -> Option<Chunk> {
        let mut shared = self.lock();
        if shared.error.is_some() || shared.cursor >= self.plan.total {
            return None;
        }
        let offset = shared.cursor;
        let known = shared.known.take().map_or_else(|| self.look(offset), Ok);
        let (mut kind, mut len) = match known {
            Ok(known) => known,
            Err(_) if self.plan.salvage => (Kind::Data, CHUNK.min(self.plan.total - offset)),
            Err(error) => {
                self.fail(&mut shared, format!("error while reading block status at offset {offset}"), error);
                return None;
            }
        };
        if let Some(cluster) = self.plan.compress {
            // Whole clusters only: a cluster of several kinds is data.
            let whole = len - len % cluster;
            if kind != Kind::Data && whole == 0 && offset + len < self.plan.total {
                kind = Kind::Data;
            }
            len = if whole == 0 { cluster.min(self.plan.total - offset) } else { whole };
            if kind == Kind::Data {
                len = len.min(cluster);
            }
        } else if kind == Kind::Data {
            let most = CHUNK - offset % CHUNK.min(1 << 16);
            if len > most {
                shared.known = Some((kind, len - most));
                len = most;
            }
        }
        let ticket = shared.ticket;
        shared.ticket += 1;
        shared.cursor += len;
        Some(Chunk { ticket, offset, len, kind })
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut at = 0;
        while at < buf.len() {
            let here = offset + at as u64;
            let (n, result) = match self.part(here) {
                Some((part, there)) => {
                    let n = there.min((buf.len() - at) as u64) as usize;
                    let place = buf.get_mut(at..at + n).unwrap_or_default();
                    (n, part.node.read_at(here - part.start, place))
                }
                None => {
                    let next = self.plan.parts.iter().map(|p| p.start).filter(|s| *s > here).min();
                    let n = next.map_or(buf.len() - at, |s| ((s - here) as usize).min(buf.len() - at));
                    buf.get_mut(at..at + n).unwrap_or_default().fill(0);
                    (n, Ok(()))
                }
            };
            match result {
                Err(_) if self.plan.salvage => {
                    self.salvage(here, buf.get_mut(at..at + n).unwrap_or_default())
                }
                other => other?,
            }
            at += n;
        }
        Ok(())
    }

    /// Reads sector by sector what can be read.
    fn salvage(&self, offset: u64, buf: &mut [u8]) {
        for (n, sector) in buf.chunks_mut(512).enumerate() {
            let at = offset + n as u64 * 512;
            let read = self.part(at).map_or(Ok(()), |(part, _)| part.node.read_at(at - part.start, sector));
            if read.is_err() {
                eprintln!("warning: error while reading offset {at}: it is taken as zeroes");
                sector.fill(0);
            }
        }
    }

    /// Writes data, leaving out what is zero.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.plan.sparse == 0 {
            return self.plan.target.write_at(offset, data);
        }
        let step = self.plan.sparse as usize;
        let mut at = 0;
        while at < data.len() {
            // Runs of blocks that are all zero, or all not.
            let blocks = data.get(at..).unwrap_or_default();
            let first = step - (offset as usize + at) % step;
            let mut len = first.min(blocks.len());
            let zero = is_zero(blocks.get(..len).unwrap_or_default());
            while len < blocks.len() {
                let end = (len + step).min(blocks.len());
                if is_zero(blocks.get(len..end).unwrap_or_default()) != zero {
                    break;
                }
                len = end;
            }
            let here = offset + at as u64;
            if !zero {
                self.plan.target.write_at(here, blocks.get(..len).unwrap_or_default())?;
            } else if !self.plan.target_zero {
                self.plan.target.write_zeroes(here, len as u64, true)?;
            }
            at += len;
        }
        Ok(())
    }

    fn store(&self, chunk: &Chunk, data: &[u8], packed: Option<Vec<u8>>) -> io::Result<()> {
        if let Some(limit) = self.plan.limit.as_ref().filter(|_| chunk.kind == Kind::Data) {
            limit.pass(true, data.len() as u64);
        }
        match chunk.kind {
            Kind::Below => Ok(()),
            Kind::Zero if self.plan.target_zero => Ok(()),
            Kind::Zero => self.plan.target.write_zeroes(chunk.offset, chunk.len, true),
            Kind::Data => match (self.plan.compress, self.plan.target.as_qcow2()) {
                (Some(_), Some(_)) if is_zero(data) => {
                    if self.plan.target_zero {
                        Ok(())
                    } else {
                        self.plan.target.write_zeroes(chunk.offset, chunk.len, true)
                    }
                }
                (Some(_), Some(image)) => image.store_compressed(chunk.offset, data, packed),
                (Some(_), None) => self.plan.target.write_compressed(chunk.offset, data),
                _ => self.write(chunk.offset, data),
            },
        }
    }

    /// Has the host copy a chunk. False if that cannot be done.
    fn offloaded(&self, chunk: &Chunk) -> io::Result<bool> {
        let Some(target) = self.offload.as_ref().filter(|_| chunk.kind == Kind::Data) else {
            return Ok(false);
        };
        let Some((part, _)) = self.part(chunk.offset) else { return Ok(false) };
        if self.refused.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let offset = chunk.offset - part.start;
        let (extent, depth) = status_above(&*part.node, offset, chunk.len)?;
        let mut node = Some(Arc::clone(&part.node));
        for _ in 0..depth {
            node = node.and_then(|n| n.backing());
        }
        let Some((node, file)) = node.and_then(|n| n.data_file().map(|f| (n, f))) else { return Ok(false) };
        if extent.len < chunk.len || extent.compressed {
            return Ok(false);
        }
        // The plan's guard keeps the data where it is meanwhile.
        let Some(Found::File(place, _guard)) = node.plan(Op::Read, offset, chunk.len) else {
            return Ok(false);
        };
        let copied = match self.plan.offload {
            Offload::No => false,
            Offload::Share => target.share_from(chunk.offset, &file, place, chunk.len)?,
            Offload::Copy => {
                if let Some(limit) = &self.plan.limit {
                    limit.pass(true, chunk.len);
                }
                target.copy_from(chunk.offset, &file, place, chunk.len)?
            }
        };
        if !copied {
            self.refused.store(true, Ordering::Relaxed);
        }
        Ok(copied)
    }

    fn prepare(&self, chunk: &Chunk, buf: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
        if chunk.kind != Kind::Data {
            return Ok(None);
        }
        buf.resize(chunk.len as usize, 0);
        self.read(chunk.offset, buf)?;
        match (self.plan.compress, self.plan.target.as_qcow2()) {
            (Some(cluster), Some(image)) if !is_zero(buf) => {
                if (buf.len() as u64) < cluster {
                    let mut whole = buf.clone();
                    whole.resize(cluster as usize, 0);
                    return image.compress(&whole);
                }
                image.compress(buf)
            }
            _ => Ok(None),
        }
    }

    fn work(&self) {
        let mut buf = Vec::new();
        while let Some(chunk) = self.next() {
            let ready = match self.offloaded(&chunk) {
                Ok(true) => Ok(Ready::Done),
                Ok(false) => self.prepare(&chunk, &mut buf).map(Ready::Store),
                Err(error) => Err(error),
            };
            let mut shared = self.lock();
            while !self.plan.unordered && shared.turn != chunk.ticket && shared.error.is_none() {
                shared = self.place(chunk.ticket).wait(shared).unwrap_or_else(PoisonError::into_inner);
            }
            if shared.error.is_some() {
                return;
            }
            drop(shared);
            let done = match ready {
                Ok(Ready::Done) => Ok(()),
                Ok(Ready::Store(packed)) => self.store(&chunk, &buf, packed).map_err(|e| ("writing", e)),
                Err(error) => Err(("reading", error)),
            };
            let mut shared = self.lock();
            match done {
                Ok(()) => shared.progress.add(chunk.len),
                Err((what, error)) => {
                    let text = format!("error while {what} at byte {}", chunk.offset);
                    self.fail(&mut shared, text, error);
                }
            }
            shared.turn += 1;
            self.place(shared.turn).notify_all();
        }
    }
}

/// Copies.
pub(crate) fn copy(plan: Plan, progress: Progress) -> Result<()> {
    let workers = plan.threads();
    let shared = Shared { cursor: 0, ticket: 0, turn: 0, error: None, progress, known: None };
    let offload = (plan.offload != Offload::No).then(|| Arc::clone(&plan.target).whole_file()).flatten();
    let refused = AtomicBool::new(false);
    let turned = (0..workers).map(|_| Condvar::new()).collect();
    let copier = Copier { plan, offload, refused, shared: Mutex::new(shared), turned };
    let copier = Arc::new(copier);
    let mut threads = Vec::new();
    for n in 1..workers {
        let copier = Arc::clone(&copier);
        let body = Box::new(move || copier.work());
        match PlainSpawner.spawn(&format!("copy{n}"), Role::Block, body) {
            Ok(thread) => threads.push(thread),
            // Fewer do it too.
            Err(_) => break,
        }
    }
    copier.work();
    for thread in threads {
        let _ = thread.join();
    }
    match copier.lock().error.take() {
        Some((what, error)) => Err(failed(what)(error)),
        None => Ok(()),
    }
}
