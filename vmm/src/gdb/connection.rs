//! The socket to the debugger.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use vmm_sys_util::eventfd::EventFd;

/// Where debuggers connect to.
#[derive(Debug)]
pub enum GdbListener {
    /// A UNIX socket.
    Unix(UnixListener),
    /// A TCP socket.
    Tcp(TcpListener),
}

/// A connection to one.
#[derive(Debug)]
pub enum Connection {
    /// Over a UNIX socket.
    Unix(UnixStream),
    /// Over TCP.
    Tcp(TcpStream),
}

impl GdbListener {
    /// Takes a connection.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn accept(&self) -> io::Result<Connection> {
        match self {
            Self::Unix(listener) => listener.accept().map(|(stream, _)| Connection::Unix(stream)),
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                // Packets are small and each is answered.
                stream.set_nodelay(true)?;
                Ok(Connection::Tcp(stream))
            }
        }
    }
}

impl AsFd for GdbListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Connection {
    /// A second descriptor of the same connection, to read from while the protocol has the first to write to.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn another(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
        })
    }

    /// Reads what is there, once [`wait`] says that there is something; 0 at the end.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(into),
            Self::Tcp(stream) => stream.read(into),
        }
    }

    /// Whether the debugger has closed it without a word.
    pub(super) fn is_closed(&self) -> bool {
        let mut byte = 0_u8;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: `byte` is valid for one byte, and the descriptor is open.
        let n = unsafe { libc::recv(self.as_fd().as_raw_fd(), (&raw mut byte).cast(), 1, flags) };
        n == 0
    }
}

impl gdbstub::conn::Connection for Connection {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        Self::write_all(self, &[byte])
    }

    fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => Write::write_all(stream, data),
            Self::Tcp(stream) => Write::write_all(stream, data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What there is to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ready {
    /// News of the VM.
    Mail,
    /// The socket.
    Connection,
    /// The process is to end.
    Stop,
    /// Time is over.
    Nothing,
}

/// Waits for news of the VM, then the socket, then the end. `limit`: milliseconds.
pub(super) fn wait(socket: &impl AsFd, stop: &EventFd, mail: &EventFd, limit: Option<i32>) -> Ready {
    let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll(mail.as_raw_fd()), poll(socket.as_fd().as_raw_fd()), poll(stop.as_raw_fd())];
    loop {
        // SAFETY: `fds` are three valid pollfds whose descriptors the caller keeps open.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), 3, limit.unwrap_or(-1)) };
        if n < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
            continue;
        }
        return match fds.map(|fd| fd.revents != 0) {
            [true, ..] => Ready::Mail,
            [_, true, _] => Ready::Connection,
            [_, _, true] => Ready::Stop,
            _ => Ready::Nothing,
        };
    }
}
