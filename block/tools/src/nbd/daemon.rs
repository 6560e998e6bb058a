//! Waiting for clients and signals, and going to the background.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use holdfast_block::nbd::Listener;

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// A client wants to connect.
    Client,
    /// A client has gone.
    Gone,
    /// The process is to end.
    Stop,
}

/// The server's process.
#[derive(Debug)]
pub(super) struct Daemon {
    signals: OwnedFd,
    gone: OwnedFd,
    clients: AtomicUsize,
}

/// A client that is there; dropping it says that it has gone.
#[derive(Debug)]
pub(super) struct Guest(Arc<Daemon>);

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::AcqRel);
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes eight bytes of `one`. An eventfd takes them unless its counter is full, and then it is readable.
        unsafe { libc::write(self.0.gone.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the caller has just made `fd`, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Daemon {
    /// Takes the signals that end the process. To be called before threads are started, which inherit that.
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: all-zero bytes are a valid signal set, which the calls fill and read.
        let signals = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                libc::sigaddset(&mut set, signal);
            }
            if libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::signalfd(-1, &set, libc::SFD_CLOEXEC)
        };
        // SAFETY: no memory is passed.
        let gone = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        Ok(Self { signals: owned(signals)?, gone: owned(gone)?, clients: AtomicUsize::new(0) })
    }

    /// Clients that are there.
    pub(super) fn clients(&self) -> usize {
        self.clients.load(Ordering::Acquire)
    }

    /// A client has come.
    pub(super) fn enter(self: &Arc<Self>) -> Guest {
        self.clients.fetch_add(1, Ordering::AcqRel);
        Guest(Arc::clone(self))
    }

    /// Waits for what comes next; for clients only if a listener is given.
    pub(super) fn wait(&self, listener: Option<&Listener>) -> io::Result<Event> {
        let fd = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // A negative descriptor is not waited for.
        let listening = listener.map_or(-1, AsRawFd::as_raw_fd);
        let mut all = [fd(self.signals.as_raw_fd()), fd(self.gone.as_raw_fd()), fd(listening)];
        loop {
            // SAFETY: `all` holds as many entries as is said, for the duration of the call.
            let n = unsafe { libc::poll(all.as_mut_ptr(), all.len() as libc::nfds_t, -1) };
            if n >= 0 {
                break;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        let [signal, gone, _] = all;
        if signal.revents != 0 {
            return Ok(Event::Stop);
        }
        if gone.revents != 0 {
            let mut count = [0u8; 8];
            // SAFETY: reads at most eight bytes into `count`.
            unsafe { libc::read(self.gone.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
            return Ok(Event::Gone);
        }
        Ok(Event::Client)
    }
}

/// Goes on in a process of its own, without a terminal. The one before ends when [`Child::ready`] is called, or with an error if that
/// is never. There must be no other thread.
pub(super) fn fork() -> io::Result<Child> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    let (mut ready, tell) = io::pipe()?;
    // SAFETY: there is one thread, so the child has all there is of the process's state.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: no memory is passed.
            unsafe { libc::setsid() };
            Ok(Child { null, tell })
        }
        _ => {
            drop(tell);
            let status = i32::from(ready.read_exact(&mut [0]).is_err());
            // SAFETY: ends the process at once: what it has open is the child's now, so nothing is closed or written.
            unsafe { libc::_exit(status) }
        }
    }
}

/// A process in the background whose parent still waits.
#[derive(Debug)]
pub(super) struct Child {
    null: std::fs::File,
    tell: io::PipeWriter,
}

impl Child {
    /// Lets go of the terminal and of the parent.
    pub(super) fn ready(mut self) -> io::Result<()> {
        for fd in 0..3 {
            // SAFETY: no memory is passed; the first descriptor is open.
            if unsafe { libc::dup2(self.null.as_raw_fd(), fd) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        self.tell.write_all(&[0])
    }
}
