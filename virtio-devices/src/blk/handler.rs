//! One queue of a disk, on its worker.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use holdfast_block::{BlockBackend, BlockQueue, Completion, Op, Request};
use holdfast_clock::host_monotonic;
use vm_memory::Bytes;
use vmm_sys_util::timerfd::TimerFd;

use super::policy::{self, IoFailure};
use super::request::{Action, Range, Status, parse};
use super::stats::Kind;
use super::{Shared, bit};
use crate::device::Interrupt;
use crate::dma;
use crate::queue::{Chain, HandlerError, QueueError, Segment, VirtQueue, total_len};
use crate::worker::{Activation, Handler, Watch};

const KICK: u64 = 0;
const DONE: u64 = 1;
const TIMER: u64 = 2;

/// A request at the back end.
#[derive(Debug)]
struct Pending {
    head: u16,
    op: Op,
    /// What a read fills.
    fills: Vec<Segment>,
    status: Vec<Segment>,
    bytes: u64,
    /// Where it ends on the disk.
    end: u64,
    started: u64,
    /// Back-end requests that are not done.
    parts: u32,
    failed: Option<io::Error>,
    /// To be made durable before it completes.
    sync: bool,
    /// What it changes, if somebody wants to know.
    noted: Vec<Range>,
}

/// Serves one queue.
pub(super) struct BlkHandler {
    // Dropped first: it waits for requests that use the guest's RAM.
    requests: Box<dyn BlockQueue>,
    backend: Arc<dyn BlockBackend>,
    shared: Arc<Shared>,
    live: Option<Live>,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    done: Vec<Completion>,
    /// Rings when requests that are held back may pass.
    timer: TimerFd,
}

struct Live {
    queue: VirtQueue,
    interrupt: Arc<dyn Interrupt>,
    flush: bool,
}

impl BlkHandler {
    pub(super) fn new(
        shared: Arc<Shared>,
        backend: Arc<dyn BlockBackend>,
        requests: Box<dyn BlockQueue>,
    ) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        let (pending, free, done) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { requests, backend, shared, live: None, pending, free, done, timer })
    }

    /// Takes all chains that wait.
    fn serve(&mut self) -> Result<(), HandlerError> {
        if self.shared.held.load(Ordering::Acquire) {
            return Ok(());
        }
        let Some(mut live) = self.live.take() else { return Ok(()) };
        let result = self.serve_queue(&mut live);
        self.live = Some(live);
        self.requests.kick();
        result
    }

    fn serve_queue(&mut self, live: &mut Live) -> Result<(), HandlerError> {
        loop {
            live.queue.disable_kicks()?;
            while let Some(chain) = live.queue.pop()? {
                if !self.start(live, &chain, true)? {
                    // The rest waits in the ring, in its order, until the timer rings.
                    live.queue.undo_pop();
                    return Ok(interrupt_if_wanted(live)?);
                }
            }
            if !live.queue.enable_kicks()? {
                break;
            }
        }
        interrupt_if_wanted(live)?;
        Ok(())
    }

    /// Requests that failed and are tried again, now that the VM goes on.
    fn retry(&mut self) -> Result<(), HandlerError> {
        if self.shared.held.load(Ordering::Acquire) {
            return Ok(());
        }
        let Some(mut live) = self.live.take() else { return Ok(()) };
        let mut result = Ok(());
        for head in self.shared.take_stalled(live.queue.index()) {
            let started = live.queue.again(head).and_then(|chain| self.start(&mut live, &chain, false));
            result = result.and(started.map(drop));
        }
        self.live = Some(live);
        result.map_err(HandlerError::from)
    }

    /// Holds a request back that its throttle group does not let pass yet.
    fn held_back(&mut self, op: Op, bytes: u64) -> bool {
        let group = self.shared.throttle.read().clone();
        let Some(group) = group else { return false };
        if op == Op::Flush {
            return false;
        }
        let Err(wait) = group.admit(op != Op::Read, bytes, host_monotonic()) else { return false };
        // Rates may change meanwhile.
        let wait = Duration::from_nanos(wait.clamp(1, 100_000_000));
        match self.timer.reset(wait, None) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "a disk's timer cannot be set: its rates are not kept");
                false
            }
        }
    }

    /// Starts a request. False: it has to wait for its turn, and nothing was done.
    fn start(&mut self, live: &mut Live, chain: &Chain, throttled: bool) -> Result<bool, QueueError> {
        let parsed = parse(&live.queue, chain, self.backend.geometry().sectors())?;
        let readonly = self.backend.is_readonly();
        let refused = |status| (Err(status), Vec::new());
        let (work, data) = match parsed.action {
            Action::Refuse(status) => refused(status),
            Action::GetId { data } => {
                let n = self.get_id(live, &data)?;
                return finish(live, chain.head, &parsed.status, Status::Ok, n).map(|()| true);
            }
            Action::Read { offset, data } => (Ok((Op::Read, vec![whole(offset, &data)])), data),
            Action::Flush => (Ok((Op::Flush, vec![whole(0, &[])])), Vec::new()),
            _ if readonly => refused(Status::IoError),
            Action::Write { offset, data } => (Ok((Op::Write, vec![whole(offset, &data)])), data),
            Action::Discard(ranges) => (Ok((Op::Discard, ranges)), Vec::new()),
            Action::WriteZeroes(ranges) => (Ok((Op::WriteZeroes { unmap: false }, ranges)), Vec::new()),
        };
        let (op, ranges) = match work {
            Ok(work) => work,
            Err(status) => {
                let reads = total_len(&chain.writable) > 1;
                self.shared.stats.invalid(if reads { Kind::Read } else { Kind::Write });
                return finish(live, chain.head, &parsed.status, status, 0).map(|()| true);
            }
        };
        let bytes = ranges.iter().map(|r| r.len).sum();
        if throttled && self.held_back(op, bytes) {
            return Ok(false);
        }
        self.submit(live, (chain.head, parsed.status), (op, ranges), data).map(|()| true)
    }

    fn submit(
        &mut self,
        live: &Live,
        (head, status): (u16, Vec<Segment>),
        (op, ranges): (Op, Vec<Range>),
        data: Vec<Segment>,
    ) -> Result<(), QueueError> {
        // SAFETY: the queue holds a clone of the memory, and the queue is not let go before all
        // requests are done: `stop` waits for them, and so does dropping `requests`, the first field.
        let buffers = unsafe { dma::iovecs(live.queue.memory(), &data) };
        let mut buffers = buffers.ok_or(QueueError::Short { queue: live.queue.index() })?;
        let writes = matches!(op, Op::Write | Op::WriteZeroes { .. });
        let changes = matches!(op, Op::Write | Op::WriteZeroes { .. } | Op::Discard);
        let logged = changes && !self.shared.logs.read().is_empty();
        let noted = if logged { ranges.clone() } else { Vec::new() };
        self.note(&noted);
        let pending = Pending {
            head,
            op,
            bytes: ranges.iter().map(|r| r.len).sum(),
            end: ranges.iter().map(|r| r.offset + r.len).max().unwrap_or(0),
            fills: if op == Op::Read { data } else { Vec::new() },
            status,
            started: host_monotonic(),
            parts: ranges.len() as u32,
            failed: None,
            sync: writes && !(live.flush && self.shared.writeback.load(Ordering::Relaxed)),
            noted,
        };
        let id = self.keep(pending);
        for Range { offset, len, unmap } in ranges {
            let op = if let Op::WriteZeroes { .. } = op { Op::WriteZeroes { unmap } } else { op };
            // Reads and writes have one range; the others have no buffers.
            let buffers = std::mem::take(&mut buffers);
            self.requests.submit(Request { id, op, offset, len, buffers });
        }
        Ok(())
    }

    /// Tells who copies the disk what a request changes, or has changed.
    fn note(&self, ranges: &[Range]) {
        if ranges.is_empty() {
            return;
        }
        for log in self.shared.logs.read().iter() {
            ranges.iter().for_each(|r| log.mark(r.offset, r.len));
        }
    }

    fn get_id(&self, live: &Live, data: &[Segment]) -> Result<u32, QueueError> {
        let mut from = self.shared.serial.as_slice();
        let mut written = 0;
        for s in data {
            let (now, rest) = from.split_at(from.len().min(s.len as usize));
            let short = |_| QueueError::Short { queue: live.queue.index() };
            live.queue.memory().write_slice(now, s.addr).map_err(short)?;
            written += now.len() as u32;
            from = rest;
        }
        Ok(written)
    }

    fn keep(&mut self, pending: Pending) -> u64 {
        match self.free.pop() {
            Some(at) => {
                if let Some(place) = self.pending.get_mut(at) {
                    *place = Some(pending);
                }
                at as u64
            }
            // As many as the queue has descriptors at most.
            None => {
                self.pending.push(Some(pending));
                self.pending.len() as u64 - 1
            }
        }
    }

    /// Answers what the back end has done.
    fn complete(&mut self) -> Result<(), HandlerError> {
        let Some(mut live) = self.live.take() else { return Ok(()) };
        let result = self.complete_queue(&mut live);
        self.live = Some(live);
        result
    }

    fn complete_queue(&mut self, live: &mut Live) -> Result<(), HandlerError> {
        let mut done = std::mem::take(&mut self.done);
        self.requests.reap(&mut done);
        let mut result = Ok(());
        for completion in done.drain(..) {
            if let Err(error) = self.complete_one(live, completion) {
                result = Err(error.into());
            }
        }
        self.done = done;
        self.requests.kick();
        result.and_then(|()| Ok(interrupt_if_wanted(live)?))
    }

    fn complete_one(&mut self, live: &mut Live, completion: Completion) -> Result<(), QueueError> {
        let at = completion.id as usize;
        let Some(pending) = self.pending.get_mut(at).and_then(Option::as_mut) else { return Ok(()) };
        if let Err(error) = completion.result {
            tracing::warn!(op = ?pending.op, %error, "disk request failed");
            pending.failed.get_or_insert(error);
        }
        pending.parts = pending.parts.saturating_sub(1);
        if pending.parts != 0 {
            return Ok(());
        }
        if pending.sync && pending.failed.is_none() {
            pending.sync = false;
            pending.parts = 1;
            let id = completion.id;
            self.requests.submit(Request { id, op: Op::Flush, offset: 0, len: 0, buffers: Vec::new() });
            return Ok(());
        }
        let Some(pending) = self.pending.get_mut(at).and_then(Option::take) else { return Ok(()) };
        self.free.push(at);
        self.note(&pending.noted);
        // Part of a failed read may have arrived.
        dma::mark_written(live.queue.memory(), &pending.fills);
        let (status, filled) = match &pending.failed {
            Some(error) => match self.failed(&pending, live.queue.index(), error) {
                policy::Action::Report => (Status::IoError, 0),
                policy::Action::Ignore => (Status::Ok, total_len(&pending.fills) as u32),
                // The driver hears of it when the VM has gone on.
                policy::Action::Stop => return Ok(()),
            },
            None => {
                self.account(&pending);
                (Status::Ok, total_len(&pending.fills) as u32)
            }
        };
        finish(live, pending.head, &pending.status, status, filled)
    }

    /// Decides about a request that failed, and says so.
    fn failed(&self, pending: &Pending, queue: u16, error: &io::Error) -> policy::Action {
        let shared = &self.shared;
        shared.stats.failed(Kind::of(pending.op));
        let write = pending.op != Op::Read;
        let action = shared.policy.action(write, error);
        if action == policy::Action::Stop {
            shared.nospace.store(policy::no_space(error), Ordering::Relaxed);
            shared.stalled.lock().push((queue, pending.head));
        }
        if let Some(events) = &shared.events {
            events.io_error(IoFailure {
                id: shared.id.clone(),
                node: shared.medium.read().node.clone(),
                write,
                action,
                nospace: policy::no_space(error),
                reason: policy::words(error),
            });
        }
        action
    }

    fn account(&self, pending: &Pending) {
        let took = host_monotonic().saturating_sub(pending.started);
        let kind = Kind::of(pending.op);
        self.shared.stats.done(kind, pending.bytes, took);
        if kind == Kind::Write {
            self.shared.stats.wrote(pending.end);
        }
    }
}

/// A read or write of one range with all its data; the buffers say how much.
fn whole(offset: u64, data: &[Segment]) -> Range {
    Range { offset, len: total_len(data), unmap: false }
}

/// Gives a request back with its status.
fn finish(
    live: &mut Live,
    head: u16,
    status_at: &[Segment],
    status: Status,
    filled: u32,
) -> Result<(), QueueError> {
    if let Some(at) = status_at.first() {
        let short = |_| QueueError::Short { queue: live.queue.index() };
        live.queue.memory().write_obj(status as u8, at.addr).map_err(short)?;
    }
    live.queue.push(head, filled.saturating_add(1))
}

fn interrupt_if_wanted(live: &mut Live) -> Result<(), QueueError> {
    if live.queue.wants_interrupt()? {
        live.interrupt.queue(live.queue.index());
    }
    Ok(())
}

impl Handler for BlkHandler {
    fn start(&mut self, activation: Activation, watch: &Watch) -> Result<(), HandlerError> {
        let Some(queue) = activation.queues.into_iter().next() else { return Ok(()) };
        let flush = activation.features & bit::FLUSH != 0;
        watch.add(queue.kick().as_raw_fd(), KICK)?;
        watch.add(self.requests.event().as_raw_fd(), DONE)?;
        watch.add(self.timer.as_raw_fd(), TIMER)?;
        self.live = Some(Live { queue, interrupt: activation.interrupt, flush });
        self.retry()?;
        self.serve()
    }

    fn event(&mut self, token: u64, _watch: &Watch) -> Result<(), HandlerError> {
        match token {
            KICK | TIMER => self.serve(),
            _ => self.complete(),
        }
    }

    fn stop(&mut self, watch: &Watch) -> Vec<VirtQueue> {
        watch.remove(self.requests.event().as_raw_fd());
        watch.remove(self.timer.as_raw_fd());
        self.requests.kick();
        while self.requests.in_flight() != 0 {
            self.requests.wait();
            if let Err(error) = self.complete() {
                tracing::warn!(%error, "a disk request cannot be answered");
            }
        }
        self.pending.clear();
        self.free.clear();
        let Some(live) = self.live.take() else { return Vec::new() };
        watch.remove(live.queue.kick().as_raw_fd());
        vec![live.queue]
    }
}
