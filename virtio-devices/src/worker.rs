//! Device threads.
//!
//! A [`Worker`] is started when its device is built, before the sandbox closes, and lives as long as
//! the device. It is handed queues when the driver is ready and hands them back when the device is
//! reset or paused, so queues need no lock: they are always owned by one thread.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use holdfast_memory::GuestMemory;
use holdfast_threads::{Role, Spawner};
use parking_lot::Mutex;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::Interrupt;
use crate::queue::{HandlerError, VirtQueue};

/// What a worker gets when the driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// The queues that the driver has enabled, in order of their numbers.
    pub queues: Vec<VirtQueue>,
    /// The negotiated features.
    pub features: u64,
    /// Guest RAM.
    pub memory: GuestMemory,
    /// How the driver is interrupted.
    pub interrupt: Arc<dyn Interrupt>,
}

/// The part of a device that runs on its worker.
pub trait Handler: Send {
    /// Takes the queues, watches their kicks, and looks at what waits in them already.
    ///
    /// # Errors
    /// [`HandlerError`]: the device needs a reset.
    fn start(&mut self, activation: Activation, watch: &Watch) -> Result<(), HandlerError>;

    /// Something watched has become ready, edge-triggered.
    ///
    /// # Errors
    /// [`HandlerError`]: the device needs a reset; no more events come until then.
    fn event(&mut self, token: u64, watch: &Watch) -> Result<(), HandlerError>;

    /// Finishes the requests under way, forgets what was watched and hands the queues back.
    fn stop(&mut self, watch: &Watch) -> Vec<VirtQueue>;
}

/// Token of the worker's own wake-up; handlers use smaller ones.
const WAKE: u64 = u64::MAX;

/// What a worker waits for.
#[derive(Debug)]
pub struct Watch(Epoll);

impl Watch {
    /// Reports `token` each time `fd` becomes readable (edge-triggered, and once now if it is).
    ///
    /// # Errors
    /// [`HandlerError::Host`].
    pub fn add(&self, fd: RawFd, token: u64) -> Result<(), HandlerError> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        let added = self.0.ctl(ControlOperation::Add, fd, event);
        added.map_err(|source| HandlerError::Host { what: "cannot watch a file descriptor", source })
    }

    /// As [`Watch::add`], and when `fd` becomes writable.
    ///
    /// # Errors
    /// [`HandlerError::Host`].
    pub fn add_both(&self, fd: RawFd, token: u64) -> Result<(), HandlerError> {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let added = self.0.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token));
        added.map_err(|source| HandlerError::Host { what: "cannot watch a file descriptor", source })
    }

    /// Undoes [`Watch::add`]. An `fd` that is not watched is ignored.
    pub fn remove(&self, fd: RawFd) {
        let _ = self.0.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }
}

enum Command {
    Start(Box<Activation>),
    Stop(Sender<Vec<VirtQueue>>),
    Replace(Box<dyn Handler>, Sender<()>),
    Quit,
}

/// A device thread.
#[derive(Debug)]
pub struct Worker {
    commands: Sender<Command>,
    wake: EventFd,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Worker {
    /// Starts the thread `name` that runs `handler`.
    ///
    /// # Errors
    /// The host's error if there is no thread or file descriptor to be had.
    pub fn start(
        name: &str,
        role: Role,
        spawner: &dyn Spawner,
        handler: Box<dyn Handler>,
    ) -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&wake);
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, WAKE))?;
        let (commands, inbox) = channel();
        let mut thread = Thread {
            name: name.to_owned(),
            watch: Watch(epoll),
            wake: wake.try_clone()?,
            inbox,
            handler,
            interrupt: None,
            broken: false,
        };
        let join = spawner.spawn(name, role, Box::new(move || thread.run()))?;
        Ok(Self { commands, wake, thread: Mutex::new(Some(join)) })
    }

    /// Lets the thread run on these host CPUs only.
    ///
    /// # Errors
    /// The host's.
    pub fn pin(&self, cpus: &[usize]) -> io::Result<()> {
        self.thread.lock().as_ref().map_or(Ok(()), |thread| holdfast_threads::pin(thread, cpus))
    }

    fn send(&self, command: Command) -> bool {
        // A closed inbox means that the thread is gone, having said why.
        self.commands.send(command).is_ok() && self.wake.write(1).is_ok()
    }

    /// Hands queues to the handler. Returns at once.
    pub fn activate(&self, activation: Activation) {
        self.send(Command::Start(Box::new(activation)));
    }

    /// Takes the queues back once the requests under way are done.
    pub fn stop(&self) -> Vec<VirtQueue> {
        let (reply, answer) = channel();
        if !self.send(Command::Stop(reply)) {
            return Vec::new();
        }
        answer.recv().unwrap_or_default()
    }
}

impl Worker {
    /// Puts another handler in the place of one that has no queues, which is gone when this returns.
    pub fn replace(&self, handler: Box<dyn Handler>) {
        let (reply, answer) = channel();
        if self.send(Command::Replace(handler, reply)) {
            // A thread that is gone has said why.
            let _ = answer.recv();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.send(Command::Quit);
        if let Some(thread) = self.thread.get_mut().take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

struct Thread {
    name: String,
    watch: Watch,
    wake: EventFd,
    inbox: Receiver<Command>,
    handler: Box<dyn Handler>,
    interrupt: Option<Arc<dyn Interrupt>>,
    broken: bool,
}

impl Thread {
    fn run(&mut self) {
        let mut events = [EpollEvent::default(); 32];
        loop {
            let n = match self.watch.0.wait(-1, &mut events) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(device = self.name, %error, "the device's thread cannot wait");
                    return;
                }
            };
            for event in events.get(..n).unwrap_or(&[]) {
                let token = event.data();
                if token == WAKE {
                    if !self.obey() {
                        return;
                    }
                } else if !self.broken && self.interrupt.is_some() {
                    let result = self.handler.event(token, &self.watch);
                    self.check(result);
                }
            }
        }
    }

    fn check(&mut self, result: Result<(), HandlerError>) {
        let Err(error) = result else { return };
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        tracing::error!(device = self.name, %error, cause, "device needs reset");
        self.broken = true;
        if let Some(interrupt) = &self.interrupt {
            interrupt.needs_reset();
        }
    }

    /// Carries out the commands that wait. False: to end.
    fn obey(&mut self) -> bool {
        let _ = self.wake.read();
        loop {
            match self.inbox.try_recv() {
                Ok(Command::Start(activation)) => {
                    self.broken = false;
                    self.interrupt = Some(Arc::clone(&activation.interrupt));
                    let result = self.handler.start(*activation, &self.watch);
                    self.check(result);
                }
                Ok(Command::Stop(reply)) => {
                    self.interrupt = None;
                    // The asker may be gone; then nobody needs the queues.
                    let _ = reply.send(self.handler.stop(&self.watch));
                }
                Ok(Command::Replace(handler, reply)) => {
                    self.handler = handler;
                    let _ = reply.send(());
                }
                Ok(Command::Quit) => {
                    self.handler.stop(&self.watch);
                    return false;
                }
                Err(std::sync::mpsc::TryRecvError::Empty) => return true,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }
}
