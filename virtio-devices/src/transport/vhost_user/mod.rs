//! A device whose driver is in another VMM: the back end of the vhost-user protocol (QEMU's documentation,
//! `interop/vhost-user`).
//!
//! The device is the same as behind the other transports. The front end says where the guest's RAM is, as
//! files, and where the rings are in it; every chain in them is checked as usual. A front end that goes
//! away leaves the device as a reset does, and the next one finds it so.

pub(crate) mod bus_error;
mod channel;
mod log;
mod memory;
mod session;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use holdfast_threads::{Role, Spawner};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, poll};
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError, VhostUserBackendReqHandlerMut};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::VirtioDevice;
use session::{Doorbells, Session};

/// Between attempts to reach a front end that is not there.
const RETRY: Duration = Duration::from_millis(100);

/// Where front ends come from.
#[derive(Debug)]
pub enum Address {
    /// They connect here, one at a time.
    Listener(UnixListener),
    /// The front end listens there; it is connected to, again and again.
    Client(PathBuf),
}

/// What ends the service of a device, shared with who asks for it.
struct Control {
    ending: AtomicBool,
    /// Rung when the RAM of the front end is not there any more.
    alarm: Arc<EventFd>,
    /// The listener, or the connection that is served.
    open: Mutex<Vec<std::os::fd::OwnedFd>>,
    doorbells: Mutex<Option<Arc<Doorbells>>>,
}

/// A device that is served.
pub struct Server {
    control: Arc<Control>,
    device: Arc<dyn VirtioDevice>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("device", &self.device.name()).finish_non_exhaustive()
    }
}

impl Server {
    /// Serves `device` to one front end after the other until [`Server::stop`].
    ///
    /// # Errors
    /// The host's if there is no thread to be had.
    pub fn start(device: Arc<dyn VirtioDevice>, address: Address, spawner: &dyn Spawner) -> io::Result<Self> {
        bus_error::catch()?;
        let control = Arc::new(Control {
            ending: AtomicBool::new(false),
            alarm: Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?),
            open: Mutex::default(),
            doorbells: Mutex::default(),
        });
        if let Address::Listener(listener) = &address {
            control.open.lock().push(listener.try_clone()?.into());
        }
        let (served, shared) = (Arc::clone(&device), Arc::clone(&control));
        let body = move || serve(&served, &address, &shared);
        let thread = Some(spawner.spawn("vhost-user", Role::BackEnd, Box::new(body))?);
        Ok(Self { control, device, thread })
    }

    /// Tells the front end, if there is one, that the config space is another one.
    pub fn config_changed(&self) {
        let doorbells = self.control.doorbells.lock().clone();
        if let Some(doorbells) = doorbells {
            crate::device::Interrupt::config_changed(&*doorbells);
        }
    }

    /// Whether the thread has ended by itself, which it does only if its socket is of no more use.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends the connection and the service. Requests under way are finished first.
    pub fn stop(&mut self) {
        self.control.ending.store(true, Ordering::SeqCst);
        for fd in self.control.open.lock().iter() {
            // SAFETY: the descriptor is open and ours; shutting a socket down touches no memory.
            unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_RDWR) };
        }
        if let Some(thread) = self.thread.take() {
            // Who panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The next front end. `None`: there will be none.
fn next(address: &Address, control: &Control) -> Option<UnixStream> {
    let mut complained = false;
    loop {
        if control.ending.load(Ordering::SeqCst) {
            return None;
        }
        let found = match address {
            Address::Listener(listener) => listener.accept().map(|(stream, _)| stream),
            Address::Client(path) => UnixStream::connect(path),
        };
        match found {
            Ok(stream) => return Some(stream),
            Err(_) if control.ending.load(Ordering::SeqCst) => return None,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                tracing::error!(%error, "no front end can connect any more");
                return None;
            }
            Err(error) => {
                if !std::mem::replace(&mut complained, true) {
                    tracing::info!(%error, "no front end yet");
                }
                std::thread::sleep(RETRY);
            }
        }
    }
}

/// Waits for a message. False: the RAM is not there any more.
fn wait(connection: &UnixStream, alarm: &EventFd) -> bool {
    let mut fds =
        [PollFd::new(connection, PollFlags::IN), PollFd::from_borrowed_fd(alarm_fd(alarm), PollFlags::IN)];
    loop {
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            // What is wrong is met again by who takes the message.
            Err(_) => return true,
            Ok(_) => return !fds.last().is_some_and(|fd| fd.revents().contains(PollFlags::IN)),
        }
    }
}

fn alarm_fd(alarm: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the borrow.
    unsafe { BorrowedFd::borrow_raw(alarm.as_raw_fd()) }
}

fn serve(device: &Arc<dyn VirtioDevice>, address: &Address, control: &Control) {
    while let Some(stream) = next(address, control) {
        let (watched, kept_open) = match (stream.try_clone(), stream.try_clone()) {
            (Ok(watched), Ok(kept_open)) => (watched, kept_open),
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(%error, "a front end cannot be served");
                continue;
            }
        };
        let kept = {
            let mut open = control.open.lock();
            open.push(kept_open.into());
            open.len()
        };
        // Who asked for the end before it could see this connection.
        if control.ending.load(Ordering::SeqCst) {
            return;
        }
        tracing::info!("a front end is there");
        // What rang for the last one is nobody's any more.
        let _ = control.alarm.read();
        let session = Session::new(Arc::clone(device), Arc::clone(&control.alarm));
        let doorbells = session.doorbells();
        *control.doorbells.lock() = Some(Arc::clone(&doorbells));
        // The protocol's library wants this mutex.
        let session = Arc::new(std::sync::Mutex::new(session));
        let mut requests = BackendReqHandler::from_stream(stream, Arc::clone(&session));
        let why = loop {
            if !wait(&watched, &control.alarm) {
                tracing::warn!("the front end has shortened the file of its RAM");
                break ProtocolError::Disconnected;
            }
            if let Some(fd) = channel::look(&watched) {
                doorbells.set_channel(fd);
            }
            if let Some((ring, on, answer)) = channel::take_enable(&watched) {
                let done = match session.lock() {
                    Ok(mut session) => session.set_vring_enable(ring, on).is_ok(),
                    Err(_) => false,
                };
                if answer && channel::answer_enable(&watched, done).is_err() {
                    break ProtocolError::Disconnected;
                }
                continue;
            }
            match requests.handle_request() {
                // A request that could not be done was answered, if the front end wants answers.
                Ok(()) | Err(ProtocolError::ReqHandlerError(_)) => {}
                Err(error) => break error,
            }
        };
        match why {
            ProtocolError::Disconnected => tracing::info!("the front end is gone"),
            error => tracing::warn!(%error, "the connection to the front end is closed"),
        }
        *control.doorbells.lock() = None;
        drop(requests);
        // The session's end stops the device.
        drop(session);
        control.open.lock().truncate(kept.saturating_sub(1));
    }
}
