//! The gdb server: one thread, one debugger at a time, over the control handle.
//!
//! A connection attaches to the VM, which stops, and detaches when it ends, after which the guest goes on. Everything
//! goes through the manager's thread, so other clients see what happens, and this thread needs nothing but its socket.

mod connection;
mod riscv64;
mod session;
mod target;
mod x86_64;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use holdfast_arch::Arch;
use holdfast_threads::{Role, Spawner};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::control::{
    ControlHandle, DebugAttach, DebugDetach, DebugEvent, DebugListener, DebugTarget, ErrorKind, Event,
};
pub use connection::GdbListener;
use connection::{Connection, Ready, wait};

/// What happened to the VM that the session has not looked at yet, and what wakes it.
#[derive(Debug, Clone)]
pub(crate) struct Mailbox {
    events: Arc<Mutex<VecDeque<DebugEvent>>>,
    wake: Arc<EventFd>,
}

impl Mailbox {
    fn put(&self, event: DebugEvent) {
        self.events.lock().push_back(event);
        self.ring();
    }

    fn ring(&self) {
        // The counter cannot overflow: each look clears it.
        let _ = self.wake.write(1);
    }

    fn take(&self) -> Option<DebugEvent> {
        // An error means that nothing was written since.
        let _ = self.wake.read();
        self.events.lock().pop_front()
    }

    fn clear(&self) {
        self.events.lock().clear();
    }
}

/// The running gdb server.
#[derive(Debug)]
pub struct GdbThread {
    stop: Arc<EventFd>,
    thread: JoinHandle<()>,
}

/// What the server's thread has.
struct Server {
    listener: GdbListener,
    handle: ControlHandle,
    stop: Arc<EventFd>,
    mailbox: Mailbox,
}

impl GdbThread {
    /// Serves debuggers that connect to `listener`.
    ///
    /// # Errors
    /// The host's, if it has no thread or eventfd.
    pub fn start(spawner: &dyn Spawner, handle: ControlHandle, listener: GdbListener) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
        let stop = event()?;
        let mailbox = Mailbox { events: Arc::default(), wake: event()? };
        let bell = mailbox.clone();
        handle.events().listen(move |event| {
            if matches!(event.event, Event::Booted | Event::Restored) {
                bell.ring();
            }
            true
        });
        let server = Server { listener, handle, stop: Arc::clone(&stop), mailbox };
        let thread = spawner.spawn("gdb", Role::Gdb, Box::new(move || server.run()))?;
        Ok(Self { stop, thread })
    }

    /// Ends once a debugger has heard what there is to hear.
    pub fn stop(self) {
        let _ = self.stop.write(1);
        if self.thread.join().is_err() {
            tracing::error!("the gdb thread panicked");
        }
    }
}

impl Server {
    fn run(&self) {
        loop {
            match wait(&self.listener, &self.stop, &self.mailbox.wake, None) {
                Ready::Stop => return,
                Ready::Connection => match self.listener.accept() {
                    Ok(connection) => self.serve(connection),
                    Err(error) => tracing::debug!(%error, "a debugger did not connect"),
                },
                // Old news.
                Ready::Mail | Ready::Nothing => drop(self.mailbox.take()),
            }
        }
    }

    /// Serves one debugger.
    fn serve(&self, connection: Connection) {
        self.mailbox.clear();
        let Some(target) = self.attach(&connection) else { return };
        tracing::info!(arch = %target.arch, vcpus = target.vcpus, "a debugger is attached");
        let result = match target.arch {
            Arch::X86_64 => session::run::<x86_64::X86>(self, connection, target),
            Arch::Riscv64 => session::run::<riscv64::Riscv>(self, connection, target),
        };
        match result {
            Ok(how) => tracing::info!("the debugger has left: {how}"),
            Err(error) => tracing::warn!("the debugger's connection ends: {error}"),
        }
        if let Err(error) = self.handle.call(DebugDetach) {
            tracing::warn!("the debugger could not be detached: {}", error.describe());
        }
    }

    /// Attaches to the VM as soon as there is one. `None` if the debugger or the process ends before.
    fn attach(&self, connection: &Connection) -> Option<DebugTarget> {
        /// A VM that is busy says nothing when it no longer is.
        const AGAIN_MS: i32 = 100;
        loop {
            let mailbox = self.mailbox.clone();
            let listener = DebugListener::new(move |event| mailbox.put(event));
            match self.handle.call(DebugAttach(listener)) {
                Ok(target) => return Some(target),
                Err(error) => match error.kind() {
                    ErrorKind::Busy | ErrorKind::NotCreated => {}
                    _ => {
                        tracing::warn!("no debugger can be attached: {}", error.describe());
                        return None;
                    }
                },
            }
            match wait(connection, &self.stop, &self.mailbox.wake, Some(AGAIN_MS)) {
                Ready::Stop => return None,
                Ready::Connection if connection.is_closed() => return None,
                // What the debugger has to say has time; what it says must not keep us awake.
                Ready::Connection => std::thread::sleep(std::time::Duration::from_millis(AGAIN_MS as u64)),
                Ready::Mail => drop(self.mailbox.take()),
                Ready::Nothing => {}
            }
        }
    }
}
