//! The API thread: one current-thread runtime that serves REST and QMP.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use holdfast_threads::{Role, Spawner};
use holdfast_vmm::control::ControlHandle;
use holdfast_vmm::gdb::{GdbListener, GdbThread};
use tokio::sync::watch;

use crate::cli::{Endpoint, QmpAddress};
use crate::monitor::inherited;
use crate::{http, qmp};

/// A socket that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another process serves it.
    #[error("{what} {path} is in use by another process")]
    InUse {
        /// `the API socket`, `the QMP socket`.
        what: &'static str,
        /// The socket.
        path: PathBuf,
    },
    /// It cannot be made.
    #[error("{what} {name} cannot be made")]
    Listen {
        /// `the API socket`, `the QMP socket`.
        what: &'static str,
        /// Path, file descriptor or address.
        name: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// The gdb server's thread cannot be made.
    #[error("the gdb thread cannot be made")]
    Gdb(#[source] io::Error),
    /// The thread or its runtime cannot be made.
    #[error("the API thread cannot be made")]
    Thread(#[source] io::Error),
}

/// A listening UNIX socket; its path and lock go when it is dropped.
#[derive(Debug)]
pub(crate) struct OwnSocket {
    listener: UnixListener,
    path: Option<SocketPath>,
}

/// The path of a socket, which goes with it.
#[derive(Debug)]
pub(crate) struct SocketPath {
    path: PathBuf,
    lock_path: PathBuf,
    // Held as long as the socket is served.
    _lock: File,
}

impl SocketPath {
    /// Where it is removed from.
    pub(crate) fn directory(&self) -> PathBuf {
        match self.path.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        }
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        // Nothing is lost if they are gone already.
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_file(&self.lock_path);
    }
}

impl OwnSocket {
    pub(crate) fn bind(what: &'static str, path: &Path) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Listen { what, name: path.display().to_string(), source };
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let lock = File::create(&lock_path).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ServeError::InUse { what, path: path.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        // We hold the lock: a socket that is there was left behind.
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        // SAFETY: umask only sets a number; no other thread makes files this early.
        let old = unsafe { libc::umask(0o077) };
        let bound = UnixListener::bind(path);
        // SAFETY: as above.
        unsafe { libc::umask(old) };
        let listener = bound.map_err(failed)?;
        Ok(Self { listener, path: Some(SocketPath { path: path.to_owned(), lock_path, _lock: lock }) })
    }

    /// The listening socket and its path, which goes when that is dropped.
    pub(crate) fn into_parts(self) -> (UnixListener, Option<SocketPath>) {
        (self.listener, self.path)
    }

    fn inherit(what: &'static str, fd: i32) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Listen { what, name: format!("fd={fd}"), source };
        Ok(Self { listener: inherited(fd).map_err(failed)?.into(), path: None })
    }
}

/// Sockets that are bound and not served yet: bind them before the sandbox closes.
#[derive(Debug, Default)]
pub struct Listeners {
    rest: Option<OwnSocket>,
    qmp_unix: Option<OwnSocket>,
    qmp_tcp: Option<std::net::TcpListener>,
    gdb_unix: Option<OwnSocket>,
    gdb_tcp: Option<std::net::TcpListener>,
}

impl Listeners {
    /// Binds what is asked for.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn bind(
        rest: Option<&Endpoint>,
        qmp: Option<&QmpAddress>,
        gdb: Option<&QmpAddress>,
    ) -> Result<Self, ServeError> {
        const REST: &str = "the API socket";
        const QMP: &str = "the QMP socket";
        const GDB: &str = "the gdb socket";
        let rest = match rest {
            Some(Endpoint::Path(path)) => Some(OwnSocket::bind(REST, path)?),
            Some(Endpoint::Fd(fd)) => Some(OwnSocket::inherit(REST, *fd)?),
            None => None,
        };
        let (qmp_unix, qmp_tcp) = address(QMP, qmp)?;
        let (gdb_unix, gdb_tcp) = address(GDB, gdb)?;
        Ok(Self { rest, qmp_unix, qmp_tcp, gdb_unix, gdb_tcp })
    }

    /// Serves debuggers, if that is asked for, on a thread of their own.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn start_gdb(
        &mut self,
        spawner: &dyn Spawner,
        handle: ControlHandle,
    ) -> Result<Option<GdbServer>, ServeError> {
        let (listener, path) = match (self.gdb_unix.take(), self.gdb_tcp.take()) {
            (Some(socket), _) => (GdbListener::Unix(socket.listener), socket.path),
            (None, Some(listener)) => (GdbListener::Tcp(listener), None),
            (None, None) => return Ok(None),
        };
        let thread = GdbThread::start(spawner, handle, listener).map_err(ServeError::Gdb)?;
        Ok(Some(GdbServer { thread, path }))
    }

    /// The directories of the UNIX sockets, from which they are removed at the end.
    pub fn directories(&self) -> Vec<PathBuf> {
        let sockets = [self.rest.as_ref(), self.qmp_unix.as_ref(), self.gdb_unix.as_ref()];
        let paths = sockets.into_iter().flatten().filter_map(|socket| socket.path.as_ref());
        paths.map(SocketPath::directory).collect()
    }

    /// Whether there is nothing to serve.
    pub fn is_empty(&self) -> bool {
        self.rest.is_none() && self.qmp_unix.is_none() && self.qmp_tcp.is_none()
    }

    /// The address of the QMP TCP socket, if there is one.
    pub fn qmp_tcp_address(&self) -> Option<std::net::SocketAddr> {
        self.qmp_tcp.as_ref()?.local_addr().ok()
    }
}

/// A UNIX or a TCP socket.
type Bound = (Option<OwnSocket>, Option<std::net::TcpListener>);

fn address(what: &'static str, address: Option<&QmpAddress>) -> Result<Bound, ServeError> {
    Ok(match address {
        Some(QmpAddress::Unix(path)) => (Some(OwnSocket::bind(what, path)?), None),
        Some(QmpAddress::Tcp(host, port)) => {
            let bound = std::net::TcpListener::bind((host.as_str(), *port));
            let failed = |source| ServeError::Listen { what, name: format!("tcp:{host}:{port}"), source };
            (None, Some(bound.map_err(failed)?))
        }
        None => (None, None),
    })
}

/// The running gdb server.
#[derive(Debug)]
pub struct GdbServer {
    thread: GdbThread,
    path: Option<SocketPath>,
}

impl GdbServer {
    /// Ends once a debugger has heard of the end.
    pub fn stop(self) {
        self.thread.stop();
        drop(self.path);
    }
}

/// The running API thread.
#[derive(Debug)]
pub struct ApiThread {
    shutdown: watch::Sender<bool>,
    thread: JoinHandle<()>,
}

impl ApiThread {
    /// Serves `listeners` on a thread of their own.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn start(
        spawner: &dyn Spawner,
        handle: ControlHandle,
        listeners: Listeners,
    ) -> Result<Self, ServeError> {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_io().enable_time().build().map_err(ServeError::Thread)?;
        let served = Tasks::new(&runtime, listeners)?;
        let (shutdown, stop) = watch::channel(false);
        let body = move || runtime.block_on(served.run(handle, stop));
        let thread = spawner.spawn("http-server", Role::Api, Box::new(body)).map_err(ServeError::Thread)?;
        Ok(Self { shutdown, thread })
    }

    /// Lets answers that are on their way leave, and ends.
    pub fn stop(self) {
        // An error means that the thread has ended already.
        let _ = self.shutdown.send(true);
        if self.thread.join().is_err() {
            tracing::error!("the API thread panicked");
        }
    }
}

/// The listeners as the runtime has them.
struct Tasks {
    rest: Option<tokio::net::UnixListener>,
    qmp_unix: Option<tokio::net::UnixListener>,
    qmp_tcp: Option<tokio::net::TcpListener>,
    paths: Vec<SocketPath>,
}

impl Tasks {
    fn new(runtime: &tokio::runtime::Runtime, listeners: Listeners) -> Result<Self, ServeError> {
        let _inside = runtime.enter();
        let mut paths = Vec::new();
        let mut unix = |socket: Option<OwnSocket>| {
            let Some(socket) = socket else { return Ok(None) };
            paths.extend(socket.path);
            socket.listener.set_nonblocking(true)?;
            tokio::net::UnixListener::from_std(socket.listener).map(Some)
        };
        let rest = unix(listeners.rest).map_err(ServeError::Thread)?;
        let qmp_unix = unix(listeners.qmp_unix).map_err(ServeError::Thread)?;
        let tcp = |listener: Option<std::net::TcpListener>| {
            let Some(listener) = listener else { return Ok(None) };
            listener.set_nonblocking(true)?;
            tokio::net::TcpListener::from_std(listener).map(Some)
        };
        let qmp_tcp = tcp(listeners.qmp_tcp).map_err(ServeError::Thread)?;
        Ok(Self { rest, qmp_unix, qmp_tcp, paths })
    }

    async fn run(self, handle: ControlHandle, stop: watch::Receiver<bool>) {
        let rest = async {
            if let Some(listener) = self.rest {
                http::serve(listener, handle.clone(), stop.clone()).await;
            }
        };
        let qmp_unix = async {
            if let Some(listener) = self.qmp_unix {
                qmp::serve(listener, handle.clone(), stop.clone()).await;
            }
        };
        let qmp_tcp = async {
            if let Some(listener) = self.qmp_tcp {
                qmp::serve(listener, handle.clone(), stop.clone()).await;
            }
        };
        tokio::join!(rest, qmp_unix, qmp_tcp);
        drop(self.paths);
    }
}
