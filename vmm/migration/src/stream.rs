//! Connections: TCP, UNIX and inherited sockets, with TLS over TCP.

use std::io::{self, Read, Write};
use std::mem::size_of;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use holdfast_block::nbd;
use holdfast_objects::Objects;
use holdfast_objects::tls::{
    ClientConfig, ClientConnection, ServerConfig, ServerConnection, StreamOwned, server_name,
};
use serde_json::{Map, Value};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::control::Control;
use crate::frame::{PREAMBLE, Preamble};
use crate::{Address, MigrationError};

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a peer that has to answer may be silent.
pub(crate) const SILENCE: Duration = Duration::from_secs(60);
/// How often a listener looks whether it is still wanted.
const POLL_MS: i32 = 100;

/// Certificates of one side.
#[derive(Debug, Clone)]
pub enum Tls {
    /// For who listens.
    Server(Arc<ServerConfig>),
    /// For who connects, with the name that the server's certificate has to have if it is not that of the address.
    Client(Arc<ClientConfig>, Option<String>),
}

impl Tls {
    /// Reads `ca-cert.pem`, and `server-cert.pem` and `server-key.pem` or `client-cert.pem` and `client-key.pem`, out of
    /// `dir`. A server insists on a client's certificate.
    ///
    /// # Errors
    /// [`MigrationError::Tls`] naming what is wrong with which file.
    pub fn load(dir: &Path, server: bool) -> Result<Self, MigrationError> {
        let tls = |e: holdfast_objects::ObjectError| {
            let cause = std::error::Error::source(&e).map(|s| format!(": {s}")).unwrap_or_default();
            MigrationError::Tls(format!("{e}{cause}"))
        };
        if !server && !dir.join("client-cert.pem").exists() {
            let text = format!("there is no {}", dir.join("client-cert.pem").display());
            return Err(MigrationError::Tls(text));
        }
        let mut fields = Map::new();
        let endpoint = if server { "server" } else { "client" };
        let given = [("qom-type", "tls-creds-x509"), ("id", "tls"), ("endpoint", endpoint)];
        fields.extend(given.map(|(key, value)| (key.to_owned(), Value::from(value))));
        fields.insert("dir".to_owned(), dir.display().to_string().into());
        let objects = Objects::default();
        objects.add(fields).map_err(tls)?;
        let creds = objects.tls("tls").map_err(tls)?;
        if server {
            creds.server().map(Self::Server).map_err(tls)
        } else {
            creds.client().map(|config| Self::Client(config, None)).map_err(tls)
        }
    }
}

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a UNIX socket.
    Unix(UnixStream),
    /// Over TLS, connected.
    TlsClient(Box<StreamOwned<ClientConnection, TcpStream>>),
    /// Over TLS, accepted.
    TlsServer(Box<StreamOwned<ServerConnection, TcpStream>>),
}

macro_rules! each {
    ($self:ident, $stream:ident => $what:expr) => {
        match $self {
            Self::Tcp($stream) => $what,
            Self::Unix($stream) => $what,
            Self::TlsClient($stream) => $what,
            Self::TlsServer($stream) => $what,
        }
    };
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        each!(self, stream => stream.read(buffer))
    }
}

impl Write for Stream {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        each!(self, stream => stream.write(data))
    }

    fn flush(&mut self) -> io::Result<()> {
        each!(self, stream => stream.flush())
    }
}

impl From<Stream> for nbd::Stream {
    /// The same connection as NBD's ends take it.
    fn from(stream: Stream) -> Self {
        match stream {
            Stream::Tcp(socket) => Self::Plain(nbd::Socket::Tcp(socket)),
            Stream::Unix(socket) => Self::Plain(nbd::Socket::Unix(socket)),
            Stream::TlsClient(tls) => {
                let StreamOwned { conn, sock } = *tls;
                Self::Client(Box::new(StreamOwned::new(conn, nbd::Socket::Tcp(sock))))
            }
            Stream::TlsServer(tls) => {
                let StreamOwned { conn, sock } = *tls;
                Self::Server(Box::new(StreamOwned::new(conn, nbd::Socket::Tcp(sock))))
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
            Self::TlsClient(stream) => stream.sock.as_fd(),
            Self::TlsServer(stream) => stream.sock.as_fd(),
        }
    }
}

fn option(fd: RawFd, level: i32, name: i32, value: i32) {
    // SAFETY: `value` is an int of the length given. A host that does not know the option does without.
    unsafe {
        libc::setsockopt(fd, level, name, (&raw const value).cast(), size_of::<i32>() as libc::socklen_t)
    };
}

/// Makes a cut network noticed within half a minute, and short messages leave at once.
fn tune(stream: &TcpStream) {
    let fd = stream.as_raw_fd();
    // Without it short messages are late, no more.
    let _ = stream.set_nodelay(true);
    option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
    option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 5);
    option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 5);
    option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3);
    option(fd, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 20_000);
}

/// An inherited descriptor as a socket.
fn inherited(fd: RawFd) -> io::Result<(OwnedFd, bool)> {
    // SAFETY: fcntl takes any number; the new descriptor is ours.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just made.
    let socket = unsafe { OwnedFd::from_raw_fd(copy) };
    let (mut domain, mut len) = (0_i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: `domain` is an int, as `len` says.
    let rc = unsafe {
        libc::getsockopt(copy, libc::SOL_SOCKET, libc::SO_DOMAIN, (&raw mut domain).cast(), &raw mut len)
    };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok((socket, domain == libc::AF_UNIX)) }
}

fn resolve(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl Stream {
    /// Connects to `address` as `preamble` says, and lets `control` break the connection.
    ///
    /// # Errors
    /// [`MigrationError`].
    pub fn connect(
        address: &Address,
        tls: Option<&Tls>,
        preamble: &Preamble,
        control: &Control,
    ) -> Result<Self, MigrationError> {
        let failed = |source| MigrationError::Connect {
            what: "cannot connect to",
            address: address.to_string(),
            source,
        };
        let mut stream = match (address, tls) {
            (Address::Tcp(host, port), tls) => {
                let stream = resolve(host, *port).map_err(failed)?;
                tune(&stream);
                match tls {
                    None => Self::Tcp(stream),
                    Some(Tls::Client(config, name)) => {
                        Self::client(config, name.as_deref().unwrap_or(host), stream)?
                    }
                    Some(Tls::Server(_)) => {
                        return Err(MigrationError::Tls("these are a server's keys".into()));
                    }
                }
            }
            (_, Some(_)) => return Err(MigrationError::Tls("TLS goes over tcp:HOST:PORT only".into())),
            (Address::Unix(path), None) => Self::Unix(UnixStream::connect(path).map_err(failed)?),
            (Address::File(_), None) => return Err(no_connection(address)),
            (Address::Fd(fd), None) => Self::adopt(*fd).map_err(failed)?,
        };
        control.watch(stream.duplicate()?)?;
        stream.set_timeouts(Some(SILENCE))?;
        stream.write_all(&preamble.encode()).map_err(MigrationError::broken("connecting"))?;
        let mut answer = [0; PREAMBLE];
        stream
            .read_exact(&mut answer)
            .map_err(MigrationError::broken("waiting for the other side's version"))?;
        Preamble::decode(&answer)?;
        Ok(stream)
    }

    fn client(config: &Arc<ClientConfig>, host: &str, socket: TcpStream) -> Result<Self, MigrationError> {
        let say = |e: String| MigrationError::Tls(e);
        let name = server_name(host).ok_or_else(|| say(format!("`{host}` is no name of a host")))?;
        let connection = ClientConnection::new(Arc::clone(config), name).map_err(|e| say(e.to_string()))?;
        let mut stream = StreamOwned::new(connection, socket);
        // Done now, so that a refused certificate is not taken for a broken connection.
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).map_err(|e| say(e.to_string()))?;
        }
        Ok(Self::TlsClient(Box::new(stream)))
    }

    fn server(config: &Arc<ServerConfig>, socket: TcpStream) -> Result<Self, MigrationError> {
        let say = |e: String| MigrationError::Tls(e);
        let connection = ServerConnection::new(Arc::clone(config)).map_err(|e| say(e.to_string()))?;
        let mut stream = StreamOwned::new(connection, socket);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).map_err(|e| say(e.to_string()))?;
        }
        Ok(Self::TlsServer(Box::new(stream)))
    }

    /// Takes an inherited socket that is connected.
    fn adopt(fd: RawFd) -> io::Result<Self> {
        let (socket, unix) = inherited(fd)?;
        if unix {
            return Ok(Self::Unix(socket.into()));
        }
        let stream = TcpStream::from(socket);
        tune(&stream);
        Ok(Self::Tcp(stream))
    }

    fn duplicate(&self) -> Result<OwnedFd, MigrationError> {
        let copy = self.as_fd().try_clone_to_owned();
        copy.map_err(|source| MigrationError::Host { what: "a connection cannot be duplicated", source })
    }

    /// How long a read or write may take; `None` for ever.
    pub(crate) fn set_timeouts(&self, limit: Option<Duration>) -> Result<(), MigrationError> {
        let limit = limit.unwrap_or_default();
        let time =
            libc::timeval { tv_sec: limit.as_secs() as i64, tv_usec: i64::from(limit.subsec_micros()) };
        for name in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            // SAFETY: `time` is a timeval of the length given.
            let rc = unsafe {
                libc::setsockopt(
                    self.as_fd().as_raw_fd(),
                    libc::SOL_SOCKET,
                    name,
                    (&raw const time).cast(),
                    size_of::<libc::timeval>() as libc::socklen_t,
                )
            };
            if rc < 0 {
                let source = io::Error::last_os_error();
                return Err(MigrationError::Host { what: "a time limit of a connection", source });
            }
        }
        Ok(())
    }

    /// Whether there is something to read that poll(2) does not know of: TLS has taken it off the socket.
    pub(crate) fn has_more(&mut self) -> bool {
        let state = match self {
            Self::Tcp(_) | Self::Unix(_) => return false,
            Self::TlsClient(stream) => stream.conn.process_new_packets(),
            Self::TlsServer(stream) => stream.conn.process_new_packets(),
        };
        // Reading finds out about errors.
        state.map_or(true, |state| state.plaintext_bytes_to_read() > 0)
    }

    /// Sends file descriptors, with one byte.
    pub(crate) fn send_fds(&self, fds: &[RawFd]) -> Result<(), MigrationError> {
        let Self::Unix(socket) = self else { return Err(only_unix()) };
        let sent = socket.send_with_fds(&[&b"F"[..]], fds);
        let failed = |e: vmm_sys_util::errno::Error| io::Error::from_raw_os_error(e.errno());
        sent.map(drop).map_err(failed).map_err(MigrationError::broken("sending RAM's file descriptors"))
    }

    /// Receives `count` file descriptors.
    pub(crate) fn receive_fds(&self, count: usize) -> Result<Vec<OwnedFd>, MigrationError> {
        let Self::Unix(socket) = self else { return Err(only_unix()) };
        if count > 64 {
            return Err(MigrationError::Protocol(format!("{count} ranges of RAM")));
        }
        let mut byte = [0_u8; 1];
        let mut fds: Vec<RawFd> = vec![-1; count];
        let mut iovecs = [libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 }];
        // SAFETY: the one iovec is `byte`, which outlives the call and may hold anything.
        let received = unsafe { socket.recv_with_fds(&mut iovecs, &mut fds) };
        let failed = |e: vmm_sys_util::errno::Error| io::Error::from_raw_os_error(e.errno());
        let (bytes, came) =
            received.map_err(failed).map_err(MigrationError::broken("receiving RAM's file descriptors"))?;
        // SAFETY: the kernel made these descriptors for this process, and nobody else owns them.
        let fds: Vec<OwnedFd> = fds[..came].iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect();
        if bytes != 1 || came != count {
            let text = format!("{came} file descriptors came for {count} ranges of RAM");
            return Err(MigrationError::Protocol(text));
        }
        Ok(fds)
    }
}

fn no_connection(address: &Address) -> MigrationError {
    let reason = "a file is no connection".to_owned();
    MigrationError::Address { address: address.to_string(), reason }
}

fn only_unix() -> MigrationError {
    let reason = "RAM's file descriptors travel over UNIX sockets only".to_owned();
    MigrationError::Address { address: "local".to_owned(), reason }
}

/// Where migrations come in.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    tls: Option<Tls>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
    /// Connected already.
    Fd(RawFd, parking_lot::Mutex<bool>),
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Where it cannot be removed nobody listens, which who connects will see.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Removes what a listener that was killed has left.
fn clear_stale(path: &Path) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err() {
        let _ = std::fs::remove_file(path);
    }
}

impl Listener {
    /// Listens at `address`.
    ///
    /// # Errors
    /// [`MigrationError`].
    pub fn bind(address: &Address, tls: Option<Tls>) -> Result<Self, MigrationError> {
        let failed = |source| MigrationError::Connect {
            what: "cannot listen at",
            address: address.to_string(),
            source,
        };
        if tls.is_some() && !matches!(address, Address::Tcp(..)) {
            return Err(MigrationError::Tls("TLS goes over tcp:HOST:PORT only".into()));
        }
        let socket = match address {
            Address::Tcp(host, port) => {
                let listener = TcpListener::bind((host.as_str(), *port)).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Socket::Tcp(listener)
            }
            Address::Unix(path) => {
                clear_stale(path);
                let listener = UnixListener::bind(path).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Socket::Unix(listener, path.clone())
            }
            Address::File(_) => return Err(no_connection(address)),
            Address::Fd(fd) => Socket::Fd(*fd, parking_lot::Mutex::new(false)),
        };
        Ok(Self { socket, tls })
    }

    /// The TCP port, for who let the host choose one.
    pub fn port(&self) -> Option<u16> {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr().ok().map(|a| a.port()),
            _ => None,
        }
    }

    fn ready(&self, limit_ms: i32) -> io::Result<bool> {
        let fd = match &self.socket {
            Socket::Tcp(listener) => listener.as_raw_fd(),
            Socket::Unix(listener, _) => listener.as_raw_fd(),
            Socket::Fd(_, used) => return Ok(!*used.lock()),
        };
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        match unsafe { libc::poll(&raw mut poll, 1, limit_ms) } {
            -1 => {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted { Ok(false) } else { Err(error) }
            }
            count => Ok(count > 0),
        }
    }

    fn accept_socket(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                tune(&stream);
                Ok(Stream::Tcp(stream))
            }
            Socket::Unix(listener, _) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(Stream::Unix(stream))
            }
            Socket::Fd(fd, used) => {
                *used.lock() = true;
                Stream::adopt(*fd)
            }
        }
    }

    /// Waits for the next connection and greets it. `limit` is how long, `None` until `control` is cancelled.
    ///
    /// # Errors
    /// [`MigrationError`]: also if what connects is no migration, after which one can accept again.
    pub fn accept(
        &self,
        control: &Control,
        limit: Option<Duration>,
    ) -> Result<(Stream, Preamble), MigrationError> {
        let mut waited = 0;
        let failed = |source| MigrationError::Host { what: "no connection can be accepted", source };
        while !self.ready(POLL_MS).map_err(failed)? {
            control.check()?;
            if matches!(self.socket, Socket::Fd(..)) {
                let reason = "an inherited socket is one connection".to_owned();
                return Err(MigrationError::Address { address: "fd".to_owned(), reason });
            }
            waited += POLL_MS as u128;
            if limit.is_some_and(|limit| waited > limit.as_millis()) {
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
        }
        let mut stream = self.accept_socket().map_err(failed)?;
        stream.set_timeouts(Some(CONNECT))?;
        stream = match (stream, &self.tls) {
            (Stream::Tcp(socket), Some(Tls::Server(config))) => Stream::server(config, socket)?,
            (_, Some(Tls::Client(..))) => {
                return Err(MigrationError::Tls("these are a client's keys".into()));
            }
            (stream, _) => stream,
        };
        control.watch(stream.duplicate()?)?;
        let mut bytes = [0; PREAMBLE];
        stream.read_exact(&mut bytes).map_err(MigrationError::broken("reading who connects"))?;
        let preamble = Preamble::decode(&bytes);
        // Who speaks another version is told ours, so that both can say so.
        let answer = preamble
            .as_ref()
            .map_or(Preamble { role: crate::frame::Role::Main, session: [0; 16] }, |preamble| *preamble);
        stream.write_all(&answer.encode()).map_err(MigrationError::broken("answering who connects"))?;
        let preamble = preamble?;
        stream.set_timeouts(None)?;
        Ok((stream, preamble))
    }
}
