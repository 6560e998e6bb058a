//! The VM manager: one thread that owns the VM and serves every operation.
//!
//! It never does anything long itself. Building a VM, saving and restoring run as *jobs* on threads of
//! their own; while one is under way, operations that would change the VM's state are refused as busy
//! and everything else is answered.

mod chardev;
mod debug;
mod jobs;
mod lifecycle;
mod migrate;
mod netdev;
mod query;
mod serve;
mod storage;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};

use holdfast_accel::AccelError;
use holdfast_config::{IdAllocator, VmConfig};
use holdfast_device::{DeviceEvent, SystemEvent, SystemSink};
use holdfast_objects::Objects;
use holdfast_sandbox::Sandbox;
use holdfast_threads::{Role, Spawner};
use holdfast_virtio::blk::policy::IoFailure;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::control::{ControlError, ControlInbox, ErrorKind, Event, EventBus, Origin};
use crate::storage::Storage;
use crate::vm::vcpus::{DebugStop, VcpuEvents};
use crate::vm::{Host, Vm};

/// How the manager is set up.
#[derive(Clone)]
pub struct ManagerOptions {
    /// Confines all threads.
    pub sandbox: Arc<Sandbox>,
    /// The process goes on when the guest has switched itself off (`--no-shutdown`).
    pub no_shutdown: bool,
    /// Debuggers may connect (`--gdb`): a VM that they could not debug is not made.
    pub debug: bool,
    /// VMs stand at their first instruction until a debugger lets them run (`--gdb-wait`).
    pub debug_wait: bool,
    /// Secrets and the like that options name (`--object`).
    pub objects: Arc<Objects>,
}

impl std::fmt::Debug for ManagerOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ManagerOptions").field("no_shutdown", &self.no_shutdown).finish_non_exhaustive()
    }
}

/// A message to the manager from a thread of the VM.
enum Message {
    /// The guest asks for something.
    System(SystemEvent),
    /// Something to be published.
    Event(Event),
    /// The accelerator cannot go on.
    VcpuFailed(u32, AccelError),
    /// A vCPU stopped for the debugger.
    Debug(u32, DebugStop),
    /// A disk's request failed.
    Disk(IoFailure),
    /// The guest has let go of a device.
    Ejected(String),
    /// The terminal's escape was typed.
    Quit,
    /// A job is done; what is left is for the manager's thread.
    Done(Box<dyn FnOnce(&mut Manager) + Send>),
    /// A job needs something of the manager's thread and goes on.
    Ask(Box<dyn FnOnce(&mut Manager) + Send>),
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Message")
    }
}

/// The way for the VM's threads to wake the manager.
#[derive(Clone)]
struct Wire {
    messages: Sender<Message>,
    wake: Arc<EventFd>,
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Wire")
    }
}

impl Wire {
    fn send(&self, message: Message) {
        // Without a manager nobody is left to be told.
        let _ = self.messages.send(message);
        let _ = self.wake.write(1);
    }

    /// Runs `what` on the manager's thread and waits for it; `None` if the manager has ended.
    fn ask<T: Send + 'static>(&self, what: impl FnOnce(&mut Manager) -> T + Send + 'static) -> Option<T> {
        let (answer, answered) = sync_channel(1);
        // Who asks waits.
        self.send(Message::Ask(Box::new(move |manager| drop(answer.send(what(manager))))));
        answered.recv().ok()
    }
}

impl SystemSink for Wire {
    fn request(&self, event: SystemEvent) {
        self.send(Message::System(event));
    }

    fn device_event(&self, id: &str, event: DeviceEvent) {
        let id = id.to_owned();
        self.send(match event {
            DeviceEvent::Activated => Message::Event(Event::DeviceActivated { id }),
            DeviceEvent::Reset => Message::Event(Event::DeviceReset { id }),
            DeviceEvent::Ejected => Message::Ejected(id),
        });
    }
}

impl VcpuEvents for Wire {
    fn vcpu_failed(&self, index: u32, error: AccelError) {
        self.send(Message::VcpuFailed(index, error));
    }

    fn vcpu_debug(&self, index: u32, stop: DebugStop) {
        self.send(Message::Debug(index, stop));
    }
}

/// What a VM that is there does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Run {
    Running,
    Paused,
    /// Stopped for the debugger, or before its start for one that is to come.
    Debug,
    /// The guest switched itself off and the process stays.
    Off,
    /// The accelerator cannot go on.
    Failed,
    Panicked,
    /// It has moved elsewhere, with its RAM or not.
    Moved {
        ram: bool,
    },
    /// A disk's request failed and waits.
    IoError,
}

/// The VM.
#[derive(Debug)]
enum Stage {
    /// There is none.
    Nothing,
    /// It has a config.
    Created,
    /// It is built.
    Built { vm: Arc<Vm>, run: Run },
}

/// The tap devices that came with a config, by device id.
type TapFds = BTreeMap<String, Vec<OwnedFd>>;

/// Owns the VM.
#[derive(Debug)]
pub struct Manager {
    inbox: ControlInbox,
    events: EventBus,
    options: ManagerOptions,
    spawner: Arc<dyn Spawner>,
    wire: Wire,
    messages: Receiver<Message>,
    /// What a VM had to say while the job that builds it was not done yet.
    held: Vec<Message>,
    config: VmConfig,
    ids: IdAllocator,
    tap_fds: TapFds,
    storage: Arc<Storage>,
    /// The sockets of back ends that were named.
    sockets: chardev::Sockets,
    /// The network back ends that were named.
    netdevs: netdev::Netdevs,
    stage: Stage,
    /// The job under way, by name.
    job: Option<&'static str>,
    debugger: Option<debug::Debugger>,
    migration: migrate::Migration,
    jobs: jobs::Jobs,
    exit: Option<u8>,
}

/// Exit status of the process when the VM failed.
const FAILED: u8 = 1;

impl Manager {
    /// A manager without a VM that serves `inbox`.
    ///
    /// # Errors
    /// The host's error if it has no eventfd left.
    pub fn new(inbox: ControlInbox, options: ManagerOptions) -> io::Result<Self> {
        let (messages_in, messages) = channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let events = inbox.events().clone();
        let (spawner, wire) = (options.sandbox.spawner(), Wire { messages: messages_in, wake });
        let told = Arc::new(wire.clone());
        let storage = Storage::new(Arc::clone(&options.objects), Arc::clone(&spawner), told);
        Ok(Self {
            inbox,
            events,
            spawner,
            storage,
            sockets: chardev::Sockets::default(),
            netdevs: netdev::Netdevs::default(),
            options,
            wire,
            messages,
            held: Vec::new(),
            config: VmConfig::default(),
            ids: IdAllocator::default(),
            tap_fds: TapFds::new(),
            stage: Stage::Nothing,
            job: None,
            debugger: None,
            migration: migrate::Migration::default(),
            jobs: jobs::Jobs::default(),
            exit: None,
        })
    }

    /// Serves until the process is to end; returns its exit status.
    ///
    /// # Errors
    /// The host's error if it cannot wait for requests.
    pub fn run(mut self) -> io::Result<u8> {
        self.events.publish(Event::VmmStarting);
        let status = loop {
            if let Some(status) = self.exit {
                break status;
            }
            self.wait()?;
            while let Ok(message) = self.messages.try_recv() {
                self.take(message);
            }
            while self.exit.is_none()
                && let Some(request) = self.inbox.next_request()
            {
                request.serve(&mut self);
            }
        };
        self.end_debugging(status);
        self.end_jobs(None);
        // The guest stops, and the terminal is as it was, before anyone hears of the end.
        self.stage = Stage::Nothing;
        self.events.publish(Event::VmmShutdown);
        Ok(status)
    }

    /// Sleeps until there is a request or a message.
    fn wait(&self) -> io::Result<()> {
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [poll(self.inbox.as_raw_fd()), poll(self.wire.wake.as_raw_fd())];
        // SAFETY: `fds` are two valid pollfds whose descriptors `self` keeps open.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        // An error means that nothing was written.
        let _ = self.wire.wake.read();
        Ok(())
    }

    /// Runs `work` on a thread of its own, then `done` with its result here.
    fn start_job<T: Send + 'static>(
        &mut self,
        name: &'static str,
        work: impl FnOnce() -> T + Send + 'static,
        done: impl FnOnce(&mut Self, T) + Send + 'static,
    ) -> Result<(), ControlError> {
        let wire = self.wire.clone();
        let body = move || {
            let result = work();
            wire.send(Message::Done(Box::new(move |manager| {
                manager.job = None;
                done(manager, result);
            })));
        };
        // A job makes the VM's threads, which inherit what confines it: its role must be a wide one.
        self.spawner
            .spawn(name, Role::Vmm, Box::new(body))
            .map_err(|e| ControlError::failed(format!("No thread for `{name}`"), e))?;
        self.job = Some(name);
        Ok(())
    }

    /// Fails while a job is under way.
    fn idle(&self) -> Result<(), ControlError> {
        match self.job {
            Some(job) => Err(ControlError::new(ErrorKind::Busy, format!("`{job}` is under way"))),
            None => Ok(()),
        }
    }

    /// The VM, if it is built.
    fn built(&self) -> Result<&Arc<Vm>, ControlError> {
        match &self.stage {
            Stage::Nothing => Err(ControlError::not_created()),
            Stage::Created => Err(ControlError::not_running()),
            Stage::Built { vm, .. } => Ok(vm),
        }
    }

    /// The VM if its state is `wanted`.
    fn built_and(&self, wanted: Run, otherwise: &str) -> Result<Arc<Vm>, ControlError> {
        match &self.stage {
            Stage::Built { vm, run } if *run == wanted => Ok(Arc::clone(vm)),
            Stage::Built { .. } => Err(ControlError::new(ErrorKind::Failed, otherwise)),
            _ => self.built().cloned(),
        }
    }

    /// Whether devices do what the guest asks for.
    fn devices_work(&self) -> bool {
        matches!(self.stage, Stage::Built { run: Run::Running | Run::Debug, .. })
    }

    fn set_run(&mut self, to: Run) {
        if let Stage::Built { run, .. } = &mut self.stage {
            *run = to;
        }
    }

    /// What VMs are built with. What an earlier VM still had to say is done with first.
    fn host(&mut self) -> Host {
        while let Ok(message) = self.messages.try_recv() {
            self.take(message);
        }
        let quit = self.wire.clone();
        Host {
            spawner: Arc::clone(&self.spawner),
            system: Arc::new(self.wire.clone()),
            vcpu_events: Arc::new(self.wire.clone()),
            events: self.events.clone(),
            quit: Arc::new(move || quit.send(Message::Quit)),
            tap_fds: std::mem::take(&mut self.tap_fds),
            incoming: false,
            ram_files: Vec::new(),
            storage: Arc::clone(&self.storage),
            accelerator: None,
        }
    }

    fn take(&mut self, message: Message) {
        let built = matches!(self.stage, Stage::Built { .. });
        match message {
            // A guest may be quicker than the thread that has just started it.
            Message::System(_) | Message::VcpuFailed(..) | Message::Debug(..) | Message::Disk(_)
                if self.job.is_some() && !built =>
            {
                self.held.push(message);
            }
            Message::Done(done) => {
                done(self);
                for held in std::mem::take(&mut self.held) {
                    self.take(held);
                }
            }
            Message::Ask(what) => what(self),
            Message::Quit => {
                self.events.publish(Event::Shutdown(Origin::HostQuit));
                self.exit = Some(0);
            }
            Message::System(event) => self.guest_asks(event),
            Message::Event(event) => self.events.publish(event),
            Message::VcpuFailed(index, error) => {
                let error = ControlError::failed(format!("vCPU {index} cannot go on"), error);
                tracing::error!("{}", error.describe());
                self.stand_still(Run::Failed);
                self.end_unless_kept(FAILED, Event::Shutdown(Origin::HostError));
            }
            Message::Debug(index, stop) => self.vcpu_stopped(index, stop),
            Message::Disk(failure) => self.disk_failed(failure),
            Message::Ejected(id) => self.take_out(&id),
        }
    }

    fn guest_asks(&mut self, event: SystemEvent) {
        // A guest that is debugged may ask while another of its vCPUs stops.
        let Stage::Built { run: Run::Running | Run::Debug, .. } = &self.stage else { return };
        match event {
            SystemEvent::Shutdown => {
                self.stand_still(Run::Off);
                self.end_unless_kept(0, Event::Shutdown(Origin::Guest));
            }
            SystemEvent::Exit(status) => {
                self.stand_still(Run::Off);
                self.end_unless_kept(status, Event::Shutdown(Origin::Guest));
            }
            SystemEvent::Panic => {
                self.events.publish(Event::GuestPanic);
                self.stand_still(Run::Panicked);
                self.tell_stopped();
            }
            SystemEvent::Reset => {
                // What a job would be in the way of, a migration is prepared for.
                if let Err(error) = self.reset_now(Origin::Guest) {
                    tracing::error!("the guest's reset failed: {}", error.describe());
                    self.stand_still(Run::Failed);
                    self.end_unless_kept(FAILED, Event::Shutdown(Origin::HostError));
                }
            }
        }
    }

    /// Stops the guest for good.
    fn stand_still(&mut self, run: Run) {
        self.migration.guest_ended();
        if let Stage::Built { vm, .. } = &self.stage
            && let Err(error) = vm.pause()
        {
            tracing::error!("{error}");
        }
        self.set_run(run);
    }

    fn end_unless_kept(&mut self, status: u8, event: Event) {
        self.events.publish(event);
        self.end_debugging(status);
        if !self.options.no_shutdown {
            self.exit = Some(status);
        }
    }
}
