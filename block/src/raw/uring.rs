//! The io_uring engine.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::RawImage;
use super::job::{Call, Job};
use super::pool::PoolQueue;
use crate::{BlockError, BlockQueue, Completion, Op, Request};

/// True if the host lets us have rings and they know the operations that we use.
pub(super) fn available() -> bool {
    let Ok(ring) = IoUring::new(2) else { return false };
    let mut probe = Probe::new();
    if ring.submitter().register_probe(&mut probe).is_err() {
        return false;
    }
    let needed = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
    needed.iter().all(|code| probe.is_supported(*code))
}

/// A queue that is one ring.
pub(super) struct UringQueue {
    // Dropped before the jobs, whose memory the kernel may use.
    ring: IoUring,
    event: EventFd,
    image: Arc<RawImage>,
    /// Jobs in the ring by slot: the slot number is the request's `user_data`.
    slots: Vec<Option<Box<Job>>>,
    free: Vec<usize>,
    /// Jobs for which there was no slot.
    backlog: VecDeque<Box<Job>>,
    done: Vec<Completion>,
    in_flight: usize,
    /// The ring has entries that the kernel has not been told of.
    unsubmitted: bool,
    /// Takes writes through the page cache, with [`BlockQueue::assist`]: file systems that cannot make them without waiting have
    /// the kernel hand each to a thread of its own, which costs more than to make it here.
    writes: Option<PoolQueue>,
}

impl std::fmt::Debug for UringQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringQueue")
            .field("image", &self.image.path())
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

impl UringQueue {
    pub(super) fn new(image: Arc<RawImage>, depth: u16, event: EventFd) -> io::Result<Self> {
        let depth = usize::from(depth.clamp(1, 1024));
        let ring = IoUring::new(depth as u32)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Self {
            ring,
            event,
            image,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            backlog: VecDeque::new(),
            done: Vec::new(),
            in_flight: 0,
            unsubmitted: false,
            writes: None,
        })
    }

    fn entry(&self, call: Call, job: &Job, slot: usize) -> squeue::Entry {
        let fd = types::Fd(self.image.file.as_raw_fd());
        let vectors = job.vectors();
        let (base, count) = (vectors.as_ptr().cast::<libc::iovec>(), vectors.len() as u32);
        match call {
            Call::Read(offset) => opcode::Readv::new(fd, base, count).offset(offset).build(),
            Call::Write(offset) => opcode::Writev::new(fd, base, count).offset(offset).build(),
            Call::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Call::Allocate { mode, offset, len } => {
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
        }
        .user_data(slot as u64)
    }

    /// Puts the call into the ring; the job stays in its slot until the kernel is done with it.
    fn push(&mut self, call: Call, job: Box<Job>, slot: usize) -> io::Result<()> {
        let entry = self.entry(call, &job, slot);
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(job);
        }
        loop {
            // SAFETY: the buffers and vectors belong to the job, which stays in its slot, unmoved on
            // the heap, until its completion; the ring is dropped only when no job is in it.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            self.unsubmitted = true;
            match pushed {
                Ok(()) => return Ok(()),
                Err(_) => self.enter()?,
            }
        }
    }

    fn enter(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit() {
                Ok(_) => {
                    self.unsubmitted = false;
                    return Ok(());
                }
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Goes on with a job: into the ring, or done.
    fn proceed(&mut self, job: Box<Job>, slot: usize, next: io::Result<Option<Call>>) {
        let result = match next {
            Ok(Some(call)) => match self.push(call, job, slot) {
                Ok(()) => return,
                Err(e) => {
                    // The entry is not in the ring, so the kernel does not use the job.
                    match self.slots.get_mut(slot).and_then(Option::take) {
                        Some(job) => self.done.push(job.complete(Err(e))),
                        None => tracing::error!("a block request was lost"),
                    }
                    self.free.push(slot);
                    return;
                }
            },
            Ok(None) => Ok(()),
            Err(e) => Err(e),
        };
        self.free.push(slot);
        self.done.push(job.complete(result));
    }

    fn start(&mut self, mut job: Box<Job>) {
        match self.free.pop() {
            Some(slot) => {
                let first = job.begin(&self.image);
                self.proceed(job, slot, first);
            }
            None => self.backlog.push_back(job),
        }
    }

    fn collect(&mut self) {
        loop {
            let next = self.ring.completion().next();
            let Some(entry) = next else { break };
            let slot = entry.user_data() as usize;
            let Some(mut job) = self.slots.get_mut(slot).and_then(Option::take) else { continue };
            let next = job.advance(&self.image, i64::from(entry.result()));
            self.proceed(job, slot, next);
        }
        while !self.free.is_empty()
            && let Some(job) = self.backlog.pop_front()
        {
            self.start(job);
        }
    }

    fn in_ring(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

impl BlockQueue for UringQueue {
    fn submit(&mut self, request: Request) {
        if request.op == Op::Write
            && let Some(writes) = &mut self.writes
        {
            return writes.submit(request);
        }
        self.in_flight += 1;
        self.start(Box::new(Job::new(request)));
    }

    fn kick(&mut self) {
        if let Some(writes) = &mut self.writes {
            writes.kick();
        }
        self.enter_all();
    }

    fn assist(&mut self) -> Result<(), BlockError> {
        if self.image.alignment().offset == 1 && self.writes.is_none() {
            let fail = |what| {
                let path = self.image.path().to_owned();
                move |source| BlockError::Host { path, what, source }
            };
            let event = self.event.try_clone().map_err(fail("cannot make an eventfd"))?;
            let pool = self.image.pool().map_err(fail("cannot start I/O threads"))?;
            let mut queue = PoolQueue::new(Arc::clone(&self.image), pool, event);
            queue.assist()?;
            self.writes = Some(queue);
        }
        Ok(())
    }

    fn kick_and_wait(&mut self) {
        self.enter_all();
        if self.done.is_empty() && !self.writes.as_mut().is_some_and(PoolQueue::help) {
            self.kick();
            self.wait();
        }
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        let _ = self.event.read();
        self.collect();
        self.in_flight -= self.done.len();
        out.append(&mut self.done);
        if let Some(writes) = &mut self.writes {
            writes.reap(out);
        }
        self.kick();
    }

    fn in_flight(&self) -> usize {
        self.in_flight + self.writes.as_ref().map_or(0, |w| w.in_flight())
    }

    fn event(&self) -> &EventFd {
        &self.event
    }
}

impl UringQueue {
    fn enter_all(&mut self) {
        if self.unsubmitted
            && let Err(error) = self.enter()
        {
            // Busy or out of memory: the entries stay in the ring and go with the next call.
            tracing::warn!(%error, "io_uring does not take requests now");
            let _ = self.event.write(1);
        }
        if !self.done.is_empty() {
            // Requests that ended without the kernel: nobody else would signal them.
            let _ = self.event.write(1);
        }
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        self.backlog.clear();
        while self.in_ring() != 0 {
            match self.ring.submit_and_wait(1) {
                Err(e) if !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                    // The kernel may still write to the jobs' memory: it must outlive this process's use.
                    tracing::error!(error = %e, "io_uring cannot be drained");
                    std::mem::forget(std::mem::take(&mut self.slots));
                    return;
                }
                _ => self.collect(),
            }
        }
    }
}
