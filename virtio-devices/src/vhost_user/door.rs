//! How connections to a back end come about.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Seconds that a back end may take to connect while the VM is built.
const PATIENCE: i64 = if cfg!(test) { 5 } else { 60 };

/// A socket on which back ends connect. Its path goes with it.
#[derive(Debug)]
pub(crate) struct OwnListener {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for OwnListener {
    fn drop(&mut self) {
        // Nothing is lost if it is gone already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Which side listens.
#[derive(Debug, Clone)]
pub(crate) enum Door {
    /// The back end, here.
    Connect(PathBuf),
    /// We do.
    Listen(Arc<OwnListener>),
}

/// Removes a socket that nobody listens on any more.
pub(crate) fn remove_left_behind(path: &Path) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
        // If it stays, binding says so.
        let _ = std::fs::remove_file(path);
    }
}

impl Door {
    /// Listens at `path`.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn listen(path: &Path) -> io::Result<Self> {
        remove_left_behind(path);
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self::Listen(Arc::new(OwnListener { listener, path: path.to_owned() })))
    }

    /// The socket.
    pub(super) fn path(&self) -> &PathBuf {
        match self {
            Self::Connect(path) => path,
            Self::Listen(own) => &own.path,
        }
    }

    /// Waits for a back end that is to connect here.
    pub(super) fn wait(&self) -> io::Result<()> {
        let Self::Listen(own) = self else { return Ok(()) };
        let mut fds = [PollFd::new(&own.listener, PollFlags::IN)];
        let limit = Timespec { tv_sec: PATIENCE, tv_nsec: 0 };
        loop {
            match poll(&mut fds, Some(&limit)) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A connection; an error if there is nobody.
    pub(super) fn open(&self) -> io::Result<UnixStream> {
        match self {
            Self::Connect(path) => UnixStream::connect(path),
            Self::Listen(own) => own.listener.accept().map(|(stream, _)| stream),
        }
    }
}
