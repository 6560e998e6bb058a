//! Requests of `aio_` commands: they are under way while the next commands are read.

use std::collections::HashMap;
use std::sync::Arc;

use holdfast_block::queue::NodeBackend;
use holdfast_block::{BlockBackend, BlockNode, BlockQueue, Completion, IoVec, Op, Request};
use holdfast_threads::PlainSpawner;

use super::commands::{Report, dump};
use crate::common::{errno, explain};

/// Requests that a ring takes at a time; more wait.
const DEPTH: u16 = 64;

/// How the end of a request is shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) quiet: bool,
    pub(super) dump: bool,
    pub(super) condensed: bool,
    /// What each byte that is read should be.
    pub(super) pattern: Option<u8>,
}

/// A request under way.
#[derive(Debug)]
struct Pending {
    op: Op,
    offset: u64,
    len: u64,
    /// The data, and where in it it starts. It stays where it is until the request is done.
    memory: (Vec<u8>, usize),
    /// It is flushed once it is written.
    sync: bool,
    shape: Shape,
    began: u64,
}

/// The requests under way.
#[derive(Debug)]
pub(super) struct Flight {
    // Dropped first: it waits for what uses the memory of `pending`.
    queue: Box<dyn BlockQueue>,
    pending: HashMap<u64, Pending>,
    next: u64,
    done: Vec<Completion>,
}

impl Flight {
    pub(super) fn new(node: Arc<dyn BlockNode>) -> Result<Self, String> {
        let backend = NodeBackend::new(node, "io", &PlainSpawner::shared(), true);
        let mut queue = backend.queue(DEPTH).map_err(|e| explain(&e))?;
        queue.assist().map_err(|e| explain(&e))?;
        Ok(Self { queue, pending: HashMap::new(), next: 0, done: Vec::new() })
    }

    pub(super) fn read(&mut self, (offset, len): (u64, u64), memory: (Vec<u8>, usize), shape: Shape) {
        let began = holdfast_clock::host_monotonic();
        self.submit(Pending { op: Op::Read, offset, len, memory, sync: false, shape, began });
    }

    /// `zeroes` says whether zeroes that are written may give space back; then there is no data.
    pub(super) fn write(
        &mut self,
        (offset, len): (u64, u64),
        memory: (Vec<u8>, usize),
        (zeroes, sync): (Option<bool>, bool),
        shape: Shape,
    ) {
        let op = zeroes.map_or(Op::Write, |unmap| Op::WriteZeroes { unmap });
        let began = holdfast_clock::host_monotonic();
        self.submit(Pending { op, offset, len, memory, sync, shape, began });
    }

    fn submit(&mut self, mut pending: Pending) {
        let mut buffers = Vec::new();
        let (memory, start) = &mut pending.memory;
        if let (Op::Read | Op::Write, Some(data)) =
            (pending.op, memory.get_mut(*start..*start + pending.len as usize))
        {
            // SAFETY: the memory is `pending`'s, on the heap, which is kept until the completion is reaped or the queue dropped;
            // nothing else uses it meanwhile.
            buffers.push(unsafe { IoVec::new(data.as_mut_ptr(), data.len()) });
        }
        let (id, op, offset, len) = (self.next, pending.op, pending.offset, pending.len);
        self.next += 1;
        self.pending.insert(id, pending);
        self.queue.submit(Request { id, op, offset, len, buffers });
        self.queue.kick();
    }

    /// Shows what is done.
    pub(super) fn reap(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.queue.reap(&mut done);
        for completion in done.drain(..) {
            self.complete(completion);
        }
        self.done = done;
    }

    fn complete(&mut self, completion: Completion) {
        let id = completion.id;
        let Some(mut pending) = self.pending.remove(&id) else { return };
        if pending.sync && completion.result.is_ok() {
            pending.sync = false;
            self.pending.insert(id, pending);
            self.queue.submit(Request { id, op: Op::Flush, offset: 0, len: 0, buffers: Vec::new() });
            self.queue.kick();
            return;
        }
        if let Err(error) = completion.result {
            let what = if pending.op == Op::Read { "readv" } else { "aio_write" };
            println!("{what} failed: {}", errno(&error));
            return;
        }
        pending.show();
    }

    /// Waits for everything.
    pub(super) fn drain(&mut self) {
        self.reap();
        while self.queue.in_flight() != 0 {
            self.queue.kick_and_wait();
            self.reap();
        }
    }
}

impl Pending {
    fn show(&self) {
        let took = holdfast_clock::host_monotonic().saturating_sub(self.began);
        let (memory, start) = &self.memory;
        let data = memory.get(*start..*start + self.len as usize).unwrap_or_default();
        if self.shape.pattern.is_some_and(|byte| data.iter().any(|b| *b != byte)) {
            println!("Pattern verification failed at offset {}, {} bytes", self.offset, self.len);
        }
        if self.shape.quiet {
            return;
        }
        if self.shape.dump {
            dump(data, self.offset);
        }
        let what = if self.op == Op::Read { "read" } else { "wrote" };
        let (offset, total, condensed) = (self.offset, self.len, self.shape.condensed);
        Report { what, offset, total, took, condensed }.show();
    }
}
