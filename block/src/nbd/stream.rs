//! Where the other side is: TCP or UNIX sockets, with or without TLS.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use holdfast_objects::tls::{self, ClientConnection, ServerConnection, StreamOwned};

/// A place to connect to or to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Host and port.
    Tcp(String, u16),
    /// A socket's path.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A connected socket.
#[derive(Debug)]
pub enum Socket {
    /// TCP.
    Tcp(TcpStream),
    /// UNIX.
    Unix(UnixStream),
}

impl Socket {
    /// Connects.
    ///
    /// # Errors
    /// The host's.
    pub fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(host, port) => {
                let stream = TcpStream::connect((host.as_str(), *port))?;
                stream.set_nodelay(true)?;
                Ok(Self::Tcp(stream))
            }
            Address::Unix(path) => UnixStream::connect(path).map(Self::Unix),
        }
    }

    /// Another handle to it.
    ///
    /// # Errors
    /// The host's.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(s) => s.try_clone().map(Self::Tcp),
            Self::Unix(s) => s.try_clone().map(Self::Unix),
        }
    }

    /// Ends it in both directions, for all handles.
    pub fn shut_down(&self) {
        // It is gone already, or it goes now.
        let _ = match self {
            Self::Tcp(s) => s.shutdown(Shutdown::Both),
            Self::Unix(s) => s.shutdown(Shutdown::Both),
        };
    }

    /// How long reads and writes may wait; forever if `None`.
    ///
    /// # Errors
    /// The host's.
    pub fn set_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_read_timeout(time).and_then(|()| s.set_write_timeout(time)),
            Self::Unix(s) => s.set_read_timeout(time).and_then(|()| s.set_write_timeout(time)),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(buf),
            Self::Unix(s) => s.read(buf),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write(buf),
            Self::Unix(s) => s.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket that listens. A UNIX socket's name goes with it.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// UNIX.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Listens.
    ///
    /// # Errors
    /// The host's.
    pub fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(host, port) => TcpListener::bind((host.as_str(), *port)).map(Self::Tcp),
            Address::Unix(path) => {
                // One that nobody listens at any more is in the way.
                if UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
                    std::fs::remove_file(path)?;
                }
                UnixListener::bind(path).map(|l| Self::Unix(l, path.clone()))
            }
        }
    }

    /// Waits for a connection.
    ///
    /// # Errors
    /// The host's.
    pub fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp(l) => {
                let (stream, _) = l.accept()?;
                stream.set_nodelay(true)?;
                Ok(Socket::Tcp(stream))
            }
            Self::Unix(l, _) => l.accept().map(|(s, _)| Socket::Unix(s)),
        }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The host's.
    pub fn address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(l) => l.local_addr().map(|a| Address::Tcp(a.ip().to_string(), a.port())),
            Self::Unix(_, path) => Ok(Address::Unix(path.clone())),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Tcp(l) => l.as_raw_fd(),
            Self::Unix(l, _) => l.as_raw_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Somebody may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// How a client does TLS: its credentials, and the name that the server's certificate must have.
#[derive(Debug, Clone)]
pub struct TlsClient {
    /// Credentials with the endpoint `client`.
    pub config: Arc<tls::ClientConfig>,
    /// The server's name.
    pub hostname: String,
}

/// A connection.
pub enum Stream {
    /// As it is.
    Plain(Socket),
    /// Under TLS, as the server.
    Server(Box<StreamOwned<ServerConnection, Socket>>),
    /// Under TLS, as the client.
    Client(Box<StreamOwned<ClientConnection, Socket>>),
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?})", self.socket())
    }
}

impl Stream {
    /// The socket.
    pub fn socket(&self) -> &Socket {
        match self {
            Self::Plain(s) => s,
            Self::Server(s) => &s.sock,
            Self::Client(s) => &s.sock,
        }
    }

    /// The name in the certificate of the client at the other end.
    pub fn peer_name(&self) -> Option<String> {
        match self {
            Self::Server(s) => tls::peer_name(&s.conn),
            _ => None,
        }
    }

    /// Goes on under TLS as the server.
    ///
    /// # Errors
    /// What TLS says.
    pub fn into_tls_server(self, config: &Arc<tls::ServerConfig>) -> io::Result<Self> {
        let Self::Plain(mut socket) = self else { return Err(super::proto::garbage("TLS within TLS")) };
        let mut connection = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut socket)?;
        }
        Ok(Self::Server(Box::new(StreamOwned::new(connection, socket))))
    }

    /// Goes on under TLS as the client.
    ///
    /// # Errors
    /// What TLS says, such as that the server's certificate is not to be trusted.
    pub fn into_tls_client(self, how: &TlsClient) -> io::Result<Self> {
        let Self::Plain(mut socket) = self else { return Err(super::proto::garbage("TLS within TLS")) };
        let name = tls::server_name(&how.hostname).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("'{}' is no host name", how.hostname))
        })?;
        let mut connection =
            ClientConnection::new(Arc::clone(&how.config), name).map_err(io::Error::other)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut socket)?;
        }
        Ok(Self::Client(Box::new(StreamOwned::new(connection, socket))))
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(s) => s.read(buf),
            Self::Server(s) => s.read(buf),
            Self::Client(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(s) => s.write(buf),
            Self::Server(s) => s.write(buf),
            Self::Client(s) => s.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(s) => s.flush(),
            Self::Server(s) => s.flush(),
            Self::Client(s) => s.flush(),
        }
    }
}
