//! A VM's requests to a node: what the node can plan goes to the image file's own queue, the rest to threads.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use holdfast_threads::{Role, Spawner};
use parking_lot::{Condvar, Mutex};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::buffer::AlignedBuffer;
use crate::node::{Plan, os_error};
use crate::nodes::{Hold, NamedNode, User};
use crate::ranges::RangeGuard;
use crate::raw::RawImage;
use crate::{BlockBackend, BlockError, BlockNode, BlockQueue, Completion, Geometry, IoVec, Op, Request};

/// Threads of a node.
const THREADS: usize = 4;
/// Most bytes that pass through a buffer at a time.
const CHUNK: usize = 1 << 20;
/// Alignment of buffers: enough for direct I/O.
const ALIGN: usize = 4096;

#[derive(Debug)]
struct Work {
    request: Request,
    node: Arc<dyn BlockNode>,
    sink: Arc<Sink>,
}

#[derive(Debug, Default)]
struct Todo {
    work: VecDeque<Work>,
    stop: bool,
}

#[derive(Debug, Default)]
struct Shared {
    todo: Mutex<Todo>,
    more: Condvar,
}

#[derive(Debug)]
struct Sink {
    done: Mutex<Vec<Completion>>,
    event: EventFd,
}

/// Threads that carry out requests one call after the other.
#[derive(Debug)]
struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    fn start(name: &str, spawner: &dyn Spawner, role: Role) -> io::Result<Self> {
        let mut all = Self { shared: Arc::default(), threads: Vec::new() };
        for n in 0..THREADS {
            let shared = Arc::clone(&all.shared);
            all.threads.push(spawner.spawn(
                &format!("{name}_fmt{n}"),
                role,
                Box::new(move || run(&shared)),
            )?);
        }
        Ok(all)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.todo.lock().stop = true;
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared) {
    let mut memory = None;
    loop {
        let work = {
            let mut todo = shared.todo.lock();
            loop {
                if let Some(work) = todo.work.pop_front() {
                    break work;
                }
                if todo.stop {
                    return;
                }
                shared.more.wait(&mut todo);
            }
        };
        work.perform(&mut memory);
    }
}

impl Work {
    fn perform(self, memory: &mut Option<AlignedBuffer>) {
        let Self { request, node, sink } = self;
        let result = perform(&*node, &request, memory);
        drop(node);
        sink.done.lock().push(Completion { id: request.id, result });
        // An eventfd can be written unless its counter is full, and then it is readable already.
        let _ = sink.event.write(1);
    }
}

/// A thread's buffer of at least `len` bytes. It is kept from request to request: new memory costs more than what is done with it.
fn buffer_of(memory: &mut Option<AlignedBuffer>, len: usize) -> io::Result<&mut AlignedBuffer> {
    if memory.as_ref().is_none_or(|buffer| buffer.len() < len) {
        *memory = AlignedBuffer::new(len.next_power_of_two().max(ALIGN), ALIGN);
    }
    memory.as_mut().ok_or_else(|| os_error(libc::ENOMEM))
}

fn transfer(node: &dyn BlockNode, request: &Request, memory: &mut Option<AlignedBuffer>) -> io::Result<()> {
    let total: usize = request.buffers.iter().map(IoVec::len).sum();
    let buffer = buffer_of(memory, total.min(CHUNK))?;
    let mut at = 0;
    while at < total {
        let n = (total - at).min(CHUNK);
        let offset = request.offset + at as u64;
        let vectors = crate::buffer::part(&request.buffers, at, n);
        if request.op == Op::Read {
            node.read_at(offset, buffer.as_mut_slice().get_mut(..n).unwrap_or_default())?;
            buffer.scatter(0, n, &vectors);
        } else {
            buffer.gather(n, &vectors);
            let data = buffer.as_slice().get(..n).unwrap_or_default();
            node.write_at(offset, data)?;
        }
        at += n;
    }
    Ok(())
}

fn perform(node: &dyn BlockNode, request: &Request, memory: &mut Option<AlignedBuffer>) -> io::Result<()> {
    let data = matches!(request.op, Op::Read | Op::Write);
    let len = if data { request.buffers.iter().map(|b| b.len() as u64).sum() } else { request.len };
    if request.op != Op::Flush {
        if request.op != Op::Read && node.is_readonly() {
            return Err(os_error(libc::EROFS));
        }
        let end = request.offset.checked_add(len).ok_or_else(|| os_error(libc::EINVAL))?;
        if end > node.size() {
            return Err(os_error(libc::EINVAL));
        }
    }
    match request.op {
        Op::Read | Op::Write => transfer(node, request, memory),
        Op::Flush => node.flush(),
        Op::Discard => node.discard(request.offset, len),
        Op::WriteZeroes { unmap } => node.write_zeroes(request.offset, len, unmap),
    }
}

/// A node as a VM's disk.
#[derive(Debug)]
pub struct NodeBackend {
    node: Arc<dyn BlockNode>,
    /// Whoever needs them has them started.
    threads: OnceLock<Arc<Threads>>,
    name: String,
    spawner: Arc<dyn Spawner>,
    size: AtomicU64,
    align: AtomicU32,
    can_discard: bool,
    /// The use of a node with a name.
    hold: Option<Hold>,
}

impl NodeBackend {
    /// The disk that `node` is. `name` is for its threads.
    pub fn new(
        node: Arc<dyn BlockNode>,
        name: &str,
        spawner: &Arc<dyn Spawner>,
        can_discard: bool,
    ) -> Arc<Self> {
        Self::make(node, (name, spawner), can_discard, None)
    }

    /// The disk that a named node is, whose use ends with the disk.
    pub fn of(hold: Hold, name: &str, spawner: &Arc<dyn Spawner>, can_discard: bool) -> Arc<Self> {
        let node = Arc::clone(hold.node());
        Self::make(node, (name, spawner), can_discard, Some(hold))
    }

    fn make(
        node: Arc<dyn BlockNode>,
        (name, spawner): (&str, &Arc<dyn Spawner>),
        can_discard: bool,
        hold: Option<Hold>,
    ) -> Arc<Self> {
        let this = Self {
            threads: OnceLock::new(),
            name: name.to_owned(),
            spawner: Arc::clone(spawner),
            size: AtomicU64::new(0),
            align: AtomicU32::new(512),
            can_discard,
            hold,
            node,
        };
        this.look();
        Arc::new(this)
    }

    /// The named node, if it is one.
    pub fn named(&self) -> Option<&Arc<NamedNode>> {
        self.hold.as_ref().map(Hold::node)
    }

    /// The file whose queue does everything.
    fn whole(&self) -> Option<Arc<RawImage>> {
        Arc::clone(&self.node).whole_file()
    }

    /// Looks at size and alignment. True if the size has changed.
    fn look(&self) -> bool {
        let (size, align) = match self.whole() {
            Some(file) => (file.geometry().size, file.geometry().logical_block),
            None => {
                let file = self.node.data_file();
                (self.node.size(), file.map_or(512, |f| f.geometry().logical_block))
            }
        };
        self.align.store(align, Ordering::Release);
        self.size.swap(size, Ordering::AcqRel) != size
    }

    fn threads(&self) -> io::Result<Arc<Threads>> {
        if let Some(threads) = self.threads.get() {
            return Ok(Arc::clone(threads));
        }
        let role = if self.node.is_remote() { Role::Nbd } else { Role::Block };
        let threads = Arc::new(Threads::start(&self.name, &*self.spawner, role)?);
        Ok(Arc::clone(self.threads.get_or_init(|| threads)))
    }

    /// The node.
    pub fn node(&self) -> &Arc<dyn BlockNode> {
        &self.node
    }
}

impl BlockBackend for NodeBackend {
    fn geometry(&self) -> Geometry {
        let align = self.align.load(Ordering::Acquire);
        Geometry {
            size: self.size.load(Ordering::Acquire),
            logical_block: align,
            physical_block: align.max(4096),
            can_discard: self.can_discard && !self.node.is_readonly(),
        }
    }

    fn is_readonly(&self) -> bool {
        self.node.is_readonly()
    }

    fn queue(self: Arc<Self>, depth: u16) -> Result<Box<dyn BlockQueue>, BlockError> {
        if let Some(file) = self.whole() {
            return file.queue(depth);
        }
        let failed = |what| {
            let path = self.node.path().unwrap_or_default();
            move |source| BlockError::Host { path, what, source }
        };
        let fail = |source| failed("cannot make an eventfd")(source);
        let threads = self.threads().map_err(failed("cannot start I/O threads"))?;
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(fail)?;
        let data_file = self.node.data_file();
        let mask = data_file.as_ref().map_or(0, |file| file.alignment().offset - 1);
        let file = match data_file {
            Some(file) => Some(file.queue_on(depth, event.try_clone().map_err(fail)?)?),
            None => None,
        };
        let sink = Arc::new(Sink { done: Mutex::default(), event });
        Ok(Box::new(NodeQueue {
            file,
            mask,
            sink,
            planned: HashMap::new(),
            slow: 0,
            ready: Vec::new(),
            held: None,
            memory: None,
            threads,
            backend: self,
        }))
    }

    fn refresh(&self) -> Result<bool, BlockError> {
        self.node.refresh_size().map_err(|source| BlockError::Host {
            path: self.node.path().unwrap_or_default(),
            what: "cannot get its size",
            source,
        })?;
        Ok(self.look())
    }

    fn claim(&self) -> Result<(), BlockError> {
        self.hold.as_ref().map_or(Ok(()), |hold| hold.hand_over(User { shares_write: false, ..hold.user() }))
    }

    fn engine(&self) -> &'static str {
        self.whole().or_else(|| self.node.data_file()).map_or("threads", |f| f.engine())
    }
}

/// A queue to a node.
#[derive(Debug)]
struct NodeQueue {
    /// The queue of the file that the data is in. Dropped first: it waits for its requests.
    file: Option<Box<dyn BlockQueue>>,
    /// The bits that are 0 in places and lengths that the file's queue can write.
    mask: u64,
    sink: Arc<Sink>,
    /// What must not be let go before a request to the file is done.
    planned: HashMap<u64, VecDeque<RangeGuard>>,
    /// Requests that the threads have.
    slow: usize,
    /// Requests that are done already.
    ready: Vec<Completion>,
    /// With [`BlockQueue::assist`], what no thread has been given yet.
    held: Option<VecDeque<Work>>,
    /// For what is done here.
    memory: Option<AlignedBuffer>,
    threads: Arc<Threads>,
    backend: Arc<NodeBackend>,
}

impl NodeQueue {
    /// Tries to do a request without a thread; gives it back if that is not possible.
    fn fast(&mut self, request: Request) -> Option<Request> {
        let data = matches!(request.op, Op::Read | Op::Write);
        if !data && request.op != Op::Flush {
            return Some(request);
        }
        let Some(file) = &mut self.file else { return Some(request) };
        let len = request.buffers.iter().map(|b| b.len() as u64).sum();
        match self.backend.node.plan(request.op, request.offset, len) {
            // Where direct I/O needs whole blocks, a part of one is read first, by a thread.
            Some(Plan::File(offset, _)) if request.op == Op::Write && (offset | len) & self.mask != 0 => {
                Some(request)
            }
            Some(Plan::File(offset, guard)) => {
                self.planned.entry(request.id).or_default().push_back(guard);
                file.submit(Request { offset, ..request });
                None
            }
            Some(Plan::Flush) => {
                file.submit(request);
                None
            }
            Some(Plan::Zeroes) => {
                crate::buffer::zero(&request.buffers);
                self.ready.push(Completion { id: request.id, result: Ok(()) });
                None
            }
            None => Some(request),
        }
    }
}

impl NodeQueue {
    /// Gives the threads what was held back.
    fn hand_over(&mut self) {
        if let Some(held) = self.held.as_mut().filter(|held| !held.is_empty()) {
            let count = held.len();
            self.threads.shared.todo.lock().work.append(held);
            (0..count.min(THREADS)).for_each(|_| {
                self.threads.shared.more.notify_one();
            });
        }
    }
}

impl BlockQueue for NodeQueue {
    fn submit(&mut self, request: Request) {
        let Some(request) = self.fast(request) else { return };
        let work = Work { request, node: Arc::clone(&self.backend.node), sink: Arc::clone(&self.sink) };
        self.slow += 1;
        match &mut self.held {
            Some(held) => held.push_back(work),
            None => {
                self.threads.shared.todo.lock().work.push_back(work);
                self.threads.shared.more.notify_one();
            }
        }
    }

    fn assist(&mut self) -> Result<(), BlockError> {
        self.held.get_or_insert_default();
        self.file.as_mut().map_or(Ok(()), |file| file.assist())
    }

    fn kick_and_wait(&mut self) {
        if !self.ready.is_empty() {
            return self.kick();
        }
        // What is done here may wait for ranges that are in use. Those of requests to the file are only given back by `reap`.
        let helping = self.held.is_some() && self.planned.is_empty();
        let own = self.held.as_mut().filter(|_| helping).and_then(VecDeque::pop_front);
        self.hand_over();
        let work =
            own.or_else(|| if helping { self.threads.shared.todo.lock().work.pop_front() } else { None });
        match (work, &mut self.file) {
            (Some(work), file) => {
                file.iter_mut().for_each(|file| file.kick());
                work.perform(&mut self.memory);
            }
            (None, Some(file)) => file.kick_and_wait(),
            (None, None) => self.wait(),
        }
    }

    fn kick(&mut self) {
        self.hand_over();
        if let Some(file) = &mut self.file {
            file.kick();
        }
        if !self.ready.is_empty() {
            let _ = self.sink.event.write(1);
        }
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        let from = out.len();
        match &mut self.file {
            // It resets the event, before anything is looked at.
            Some(file) => file.reap(out),
            None => {
                let _ = self.sink.event.read();
            }
        }
        for done in out.get(from..).unwrap_or_default() {
            if let Some(guards) = self.planned.get_mut(&done.id) {
                guards.pop_front();
                if guards.is_empty() {
                    self.planned.remove(&done.id);
                }
            }
        }
        let mut done = self.sink.done.lock();
        self.slow -= done.len();
        out.append(&mut done);
        drop(done);
        out.append(&mut self.ready);
    }

    fn in_flight(&self) -> usize {
        self.file.as_ref().map_or(0, |f| f.in_flight()) + self.slow + self.ready.len()
    }

    fn event(&self) -> &EventFd {
        &self.sink.event
    }
}

impl Drop for NodeQueue {
    fn drop(&mut self) {
        let mut done = Vec::new();
        self.kick();
        while self.in_flight() != 0 {
            self.wait();
            self.reap(&mut done);
        }
    }
}
