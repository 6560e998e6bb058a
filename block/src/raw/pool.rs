//! The fallback engine: a few threads that make blocking calls.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use holdfast_threads::{Role, Spawner};
use parking_lot::{Condvar, Mutex};
use vmm_sys_util::eventfd::EventFd;

use super::RawImage;
use super::job::{Call, Job};
use crate::{BlockError, BlockQueue, Completion, Request};

/// Threads of one image.
const THREADS: usize = 4;

#[derive(Debug, Default)]
struct Todo {
    jobs: VecDeque<Work>,
    stop: bool,
}

#[derive(Debug, Default)]
struct Shared {
    todo: Mutex<Todo>,
    more: Condvar,
}

#[derive(Debug)]
struct Work {
    job: Box<Job>,
    image: Arc<RawImage>,
    sink: Arc<Sink>,
}

impl Work {
    fn perform(self) {
        let Self { mut job, image, sink } = self;
        let result = run(&mut job, &image);
        // The image may own this pool: it is let go before the completion can be seen.
        drop(image);
        sink.push(job.complete(result));
    }
}

/// Where the completions of a queue go.
#[derive(Debug)]
struct Sink {
    done: Mutex<Vec<Completion>>,
    event: EventFd,
}

impl Sink {
    fn push(&self, completion: Completion) {
        self.done.lock().push(completion);
        // An eventfd can be written unless its counter is full, and then it is readable already.
        let _ = self.event.write(1);
    }
}

/// The threads of one image.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub(super) fn start(name: &str, spawner: &dyn Spawner) -> io::Result<Arc<Self>> {
        let mut pool = Self { shared: Arc::default(), threads: Vec::new() };
        for n in 0..THREADS {
            let shared = Arc::clone(&pool.shared);
            let body = Box::new(move || work(&shared));
            pool.threads.push(spawner.spawn(&format!("{name}_io{n}"), Role::Block, body)?);
        }
        Ok(Arc::new(pool))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.todo.lock().stop = true;
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            // The last reference may go away on one of the threads themselves.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

fn work(shared: &Shared) {
    loop {
        let work = {
            let mut todo = shared.todo.lock();
            loop {
                if let Some(work) = todo.jobs.pop_front() {
                    break work;
                }
                if todo.stop {
                    return;
                }
                shared.more.wait(&mut todo);
            }
        };
        work.perform();
    }
}

fn run(job: &mut Job, image: &RawImage) -> io::Result<()> {
    let mut call = job.begin(image)?;
    while let Some(now) = call {
        let result = make(now, job, image.file.as_raw_fd());
        call = job.advance(image, result)?;
    }
    Ok(())
}

/// Makes a call and returns what it returned, or the negated error.
fn make(call: Call, job: &Job, fd: RawFd) -> i64 {
    let vectors = job.vectors();
    // `IoVec` is a transparent `iovec`.
    let (base, count) = (vectors.as_ptr().cast::<libc::iovec>(), vectors.len() as libc::c_int);
    let result = match call {
        // SAFETY: `base` points to `count` iovecs whose ranges are valid by `IoVec`'s contract.
        Call::Read(offset) => unsafe { libc::preadv(fd, base, count, offset as i64) as i64 },
        // SAFETY: as above.
        Call::Write(offset) => unsafe { libc::pwritev(fd, base, count, offset as i64) as i64 },
        // SAFETY: no memory is passed.
        Call::Sync => i64::from(unsafe { libc::fdatasync(fd) }),
        Call::Allocate { mode, offset, len } => {
            // SAFETY: no memory is passed.
            i64::from(unsafe { libc::fallocate(fd, mode, offset as i64, len as i64) })
        }
    };
    if result >= 0 {
        return result;
    }
    -i64::from(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

/// A queue served by the pool.
#[derive(Debug)]
pub(super) struct PoolQueue {
    image: Arc<RawImage>,
    pool: Arc<Pool>,
    sink: Arc<Sink>,
    in_flight: usize,
    /// With [`BlockQueue::assist`], what no thread has been given yet.
    held: Option<VecDeque<Work>>,
}

impl PoolQueue {
    pub(super) fn new(image: Arc<RawImage>, pool: Arc<Pool>, event: EventFd) -> Self {
        Self { image, pool, sink: Arc::new(Sink { done: Mutex::default(), event }), in_flight: 0, held: None }
    }

    /// Something that can be done here: what was held back, or what no thread has taken.
    fn take(&mut self) -> Option<Work> {
        let own = self.held.as_mut().and_then(VecDeque::pop_front);
        self.kick();
        own.or_else(|| self.pool.shared.todo.lock().jobs.pop_front())
    }

    /// Carries out one request that no thread has taken. False if there is none.
    pub(super) fn help(&mut self) -> bool {
        match self.take() {
            Some(work) => {
                work.perform();
                true
            }
            None => false,
        }
    }
}

impl BlockQueue for PoolQueue {
    fn submit(&mut self, request: Request) {
        let work = Work {
            job: Box::new(Job::new(request)),
            image: Arc::clone(&self.image),
            sink: Arc::clone(&self.sink),
        };
        self.in_flight += 1;
        match &mut self.held {
            Some(held) => held.push_back(work),
            None => {
                self.pool.shared.todo.lock().jobs.push_back(work);
                self.pool.shared.more.notify_one();
            }
        }
    }

    fn kick(&mut self) {
        let Some(held) = self.held.as_mut().filter(|held| !held.is_empty()) else { return };
        let count = held.len();
        self.pool.shared.todo.lock().jobs.append(held);
        (0..count.min(THREADS)).for_each(|_| {
            self.pool.shared.more.notify_one();
        });
    }

    fn assist(&mut self) -> Result<(), BlockError> {
        self.held.get_or_insert_default();
        Ok(())
    }

    fn kick_and_wait(&mut self) {
        if self.held.is_none() || !self.help() {
            self.kick();
            self.wait();
        }
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        let _ = self.sink.event.read();
        let mut done = self.sink.done.lock();
        self.in_flight -= done.len();
        out.append(&mut done);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn event(&self) -> &EventFd {
        &self.sink.event
    }
}

impl Drop for PoolQueue {
    fn drop(&mut self) {
        let mut done = Vec::new();
        self.kick();
        self.reap(&mut done);
        while self.in_flight != 0 {
            self.wait();
            self.reap(&mut done);
        }
    }
}
