//! A Holdfast process from its options to its exit status.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;

use holdfast_sandbox::SandboxError;
use holdfast_threads::{Role, Spawner};
use holdfast_vmm::control::{
    Boot, ControlError, ControlHandle, ControlInbox, Create, MigrateIncoming, Origin, Restore, VmmShutdown,
    control,
};

use crate::cli::RunOptions;
use crate::logging;
use crate::monitor::{self, EventMonitor};
use crate::serve::{ApiThread, Listeners, ServeError};

/// Exit status when Holdfast itself fails.
const FAILED: u8 = 1;

/// A process that could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The log cannot be written.
    #[error("--log-file cannot be opened")]
    Log(#[source] io::Error),
    /// The event monitor cannot be opened.
    #[error("--event-monitor cannot be opened")]
    EventMonitor(#[source] io::Error),
    /// A socket cannot be served.
    #[error("the control sockets cannot be served")]
    Serve(#[source] ServeError),
    /// The host has no thread, eventfd or the like.
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
    /// The process or its main thread cannot be confined.
    #[error("the process cannot be confined")]
    Confine(#[source] SandboxError),
    /// The VM manager failed.
    #[error("the VM manager failed")]
    Manager(#[source] io::Error),
    /// The VM that the options describe does not come up.
    #[error("the VM does not start")]
    Start(#[source] ControlError),
}

/// The messages of an error's whole chain, in one line.
pub fn describe(error: &dyn Error) -> String {
    let chain = std::iter::successors(Some(error), |error| (*error).source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// How a process is confined.
pub trait Confinement {
    /// Called before there are other threads, when all files are open that the options themselves name. The control
    /// sockets are in the directories `sockets`, and are removed from there at the end.
    ///
    /// # Errors
    /// [`SandboxError`]; the process ends then.
    fn paths(&self, options: &RunOptions, sockets: &[PathBuf]) -> Result<(), SandboxError>;

    /// Called on the main thread once all others have been made.
    ///
    /// # Errors
    /// [`SandboxError`]; the process ends then.
    fn main_thread(&self) -> Result<(), SandboxError>;
}

/// No confinement, for tests.
#[derive(Debug, Clone, Copy)]
pub struct Unconfined;

impl Confinement for Unconfined {
    fn paths(&self, _options: &RunOptions, _sockets: &[PathBuf]) -> Result<(), SandboxError> {
        Ok(())
    }

    fn main_thread(&self) -> Result<(), SandboxError> {
        Ok(())
    }
}

/// Runs `manager` on the `vmm` thread with everything that `options` ask for around it, until it ends.
/// Returns the exit status of the process.
///
/// # Errors
/// [`ProcessError`]; everything has been put back in order.
pub fn run(
    options: RunOptions,
    spawner: &Arc<dyn Spawner>,
    confinement: &dyn Confinement,
    manager: impl FnOnce(ControlInbox) -> io::Result<u8> + Send + 'static,
) -> Result<u8, ProcessError> {
    logging::start(options.log_file.as_deref(), options.verbosity).map_err(ProcessError::Log)?;
    // Before the first thread: a thread that does not block a signal dies of it, and the process with it.
    let signals = block_signals().map_err(|error| ProcessError::Host("signals cannot be blocked", error))?;
    let listeners = Listeners::bind(options.api_socket.as_ref(), options.qmp.as_ref(), options.gdb.as_ref());
    let mut listeners = listeners.map_err(ProcessError::Serve)?;
    let monitor = options.event_monitor.as_ref().map(monitor::open).transpose();
    let monitor = monitor.map_err(ProcessError::EventMonitor)?;
    confinement.paths(&options, &listeners.directories()).map_err(ProcessError::Confine)?;
    let (handle, inbox) = control().map_err(|error| ProcessError::Host("no eventfd", error))?;
    let monitor = monitor.map(|file| EventMonitor::start(&**spawner, handle.events(), file)).transpose();
    let monitor = monitor.map_err(ProcessError::EventMonitor)?;
    watch_signals(&**spawner, handle.clone(), signals)
        .map_err(|error| ProcessError::Host("no signal thread", error))?;
    let status = spawn_manager(&**spawner, inbox, manager)
        .map_err(|error| ProcessError::Host("no VM manager thread", error))?;
    let gdb = listeners.start_gdb(&**spawner, handle.clone()).map_err(ProcessError::Serve)?;
    // Before anyone is served: what clients ask for comes after what the command line asks for.
    let mut begun = begin(&handle, options).map_err(ProcessError::Start);
    let mut api = None;
    if !listeners.is_empty() {
        match ApiThread::start(&**spawner, handle.clone(), listeners) {
            Ok(thread) => api = Some(thread),
            Err(error) => begun = Err(ProcessError::Serve(error)),
        }
    }
    // All threads but those that the manager makes are there. This one only waits from now on.
    let confined = confinement.main_thread().map_err(ProcessError::Confine);
    let started = confined.and(begun).and_then(|begun| begun.finish().map_err(ProcessError::Start));
    if started.is_err() {
        // It may have ended already, which is why the answer does not matter.
        let _ = handle.call(VmmShutdown(Origin::HostError));
    }
    let status = status.recv().unwrap_or_else(|_| Err(io::Error::other("it panicked")));
    if let Some(gdb) = gdb {
        gdb.stop();
    }
    if let Some(api) = api {
        api.stop();
    }
    if let Some(monitor) = monitor {
        monitor.stop();
    }
    match (started, status) {
        (Err(error), Ok(FAILED | 0) | Err(_)) => Err(error),
        (_, Ok(status)) => Ok(status),
        (Ok(()), Err(error)) => Err(ProcessError::Manager(error)),
    }
}

/// What the command line asks for is under way.
struct Begun(Option<mpsc::Receiver<Result<(), ControlError>>>);

impl Begun {
    /// Waits for what takes long.
    fn finish(self) -> Result<(), ControlError> {
        // A manager that ends says why elsewhere.
        self.0.map_or(Ok(()), |restored| restored.recv().unwrap_or(Ok(())))
    }
}

/// Creates and boots, or begins to restore or to wait for, what the options describe.
fn begin(handle: &ControlHandle, options: RunOptions) -> Result<Begun, ControlError> {
    if let Some(config) = options.config {
        handle.call(Create(config))?;
        if options.incoming.is_none() {
            handle.call(Boot)?;
        }
    }
    if let Some(uri) = options.incoming {
        // First that it will come, which allows a VM that was created to wait.
        handle.call(MigrateIncoming(None, true))?;
        if uri != "defer" {
            handle.call(MigrateIncoming(Some(uri), true))?;
        }
    }
    let restored = options.restore.map(|restore| {
        let (sender, receiver) = mpsc::channel();
        // The receiver waits unless the process ends.
        handle.submit(Restore(restore, Vec::new()), move |result| drop(sender.send(result)));
        receiver
    });
    Ok(Begun(restored))
}

fn spawn_manager(
    spawner: &dyn Spawner,
    inbox: ControlInbox,
    manager: impl FnOnce(ControlInbox) -> io::Result<u8> + Send + 'static,
) -> io::Result<mpsc::Receiver<io::Result<u8>>> {
    let (sender, receiver) = mpsc::channel();
    // The receiver waits until the thread has sent or gone.
    let body = move || drop(sender.send(manager(inbox)));
    spawner.spawn("vmm", Role::Vmm, Box::new(body))?;
    Ok(receiver)
}

/// Blocks the signals that ask for an end, in this thread and all that it makes from now on.
pub(crate) fn block_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: sigset_t is plain data that sigemptyset initialises.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid signal set, and the signal numbers are valid.
    unsafe {
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&raw mut set, signal);
        }
    }
    // SAFETY: `set` is a valid signal set; the old mask is not asked for.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if blocked == 0 { Ok(set) } else { Err(io::Error::from_raw_os_error(blocked)) }
}

/// Lets `signals` end the process in order: one thread waits for them.
fn watch_signals(spawner: &dyn Spawner, handle: ControlHandle, signals: libc::sigset_t) -> io::Result<()> {
    let body = move || {
        while let Some(signal) = wait_for(&signals) {
            tracing::info!(signal, "asked to end by a signal");
            handle.submit(VmmShutdown(Origin::HostSignal), drop);
        }
    };
    spawner.spawn("vmm_signal_hand", Role::Signal, Box::new(body)).map(drop)
}

/// The next of `signals`, which are blocked.
pub(crate) fn wait_for(signals: &libc::sigset_t) -> Option<i32> {
    let mut signal = 0;
    // SAFETY: `signals` and `signal` are valid for the call.
    let waited = unsafe { libc::sigwait(signals, &raw mut signal) };
    (waited == 0).then_some(signal)
}
