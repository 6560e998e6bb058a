//! A connection to a bus (D-Bus Specification, "Authentication Protocol" and "Message Bus Specification").
//!
//! It is a socket that is read by whoever asks something, until the answer or a time limit: no threads, nothing that goes on by itself. So
//! it lives under the filters of the thread that has it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use holdfast_objects::vmstate::{BusAddress, BusSocket};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zbus::Type;

use crate::BusError;
use crate::message::{self, ERROR, METHOD_RETURN, Message, Method, PROLOGUE};

/// The name that the bus itself has.
pub(crate) const BUS: &str = "org.freedesktop.DBus";
const BUS_PATH: &str = "/org/freedesktop/DBus";
/// Most bytes of a line while the two get to know each other.
const MAX_LINE: usize = 1024;

/// A connection to a bus.
#[derive(Debug)]
pub(crate) struct Bus {
    stream: UnixStream,
    serial: u32,
    /// How long each answer may take.
    patience: Duration,
}

/// The end of somebody's patience.
struct Deadline {
    end: Instant,
    patience: Duration,
}

impl Deadline {
    fn after(patience: Duration) -> Self {
        Self { end: Instant::now() + patience, patience }
    }

    fn late(&self) -> BusError {
        BusError::Late(self.patience.as_secs())
    }

    /// What is left, which is more than nothing.
    fn left(&self) -> Result<Duration, BusError> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(self.late()) } else { Ok(left) }
    }

    fn read(&self, mut stream: &UnixStream, mut to: &mut [u8]) -> Result<(), BusError> {
        while !to.is_empty() {
            stream.set_read_timeout(Some(self.left()?)).map_err(BusError::Broken)?;
            match stream.read(to) {
                Ok(0) => return Err(BusError::Broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => to = to.get_mut(n..).unwrap_or_default(),
                Err(error) => self.pass(error)?,
            }
        }
        Ok(())
    }

    fn write(&self, mut stream: &UnixStream, mut from: &[u8]) -> Result<(), BusError> {
        while !from.is_empty() {
            stream.set_write_timeout(Some(self.left()?)).map_err(BusError::Broken)?;
            match stream.write(from) {
                Ok(n) => from = from.get(n..).unwrap_or_default(),
                Err(error) => self.pass(error)?,
            }
        }
        Ok(())
    }

    /// Passes over what only says that it was not yet.
    fn pass(&self, error: io::Error) -> Result<(), BusError> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Err(self.late()),
            _ => Err(BusError::Broken(error)),
        }
    }
}

fn reach(socket: &BusSocket, patience: Duration) -> io::Result<UnixStream> {
    let address = match socket {
        BusSocket::Path(path) => SocketAddrUnix::new(path)?,
        BusSocket::Abstract(name) => SocketAddrUnix::new_abstract_name(name)?,
    };
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // For `connect`, which waits while too many others do.
    set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    connect(&socket, &address)?;
    Ok(socket.into())
}

impl Bus {
    /// Connects to the first of `places` that lets this process in.
    pub(crate) fn connect(places: &[BusAddress], patience: Duration) -> Result<Self, BusError> {
        let mut failed = BusError::Broken(io::ErrorKind::NotFound.into());
        for place in places {
            match Self::connect_one(place, patience) {
                Ok(bus) => return Ok(bus),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    fn connect_one(place: &BusAddress, patience: Duration) -> Result<Self, BusError> {
        let deadline = Deadline::after(patience);
        let stream = reach(&place.socket, patience).map_err(BusError::Unreachable)?;
        let mut bus = Self { stream, serial: 0, patience };
        let guid = bus.authenticate(&deadline)?;
        if place.guid.as_ref().is_some_and(|wanted| !guid.eq_ignore_ascii_case(wanted)) {
            return Err(BusError::Protocol(format!("it is the bus {guid}, another than the address names")));
        }
        let _own_name: String = bus.ask_bus("Hello", &())?;
        Ok(bus)
    }

    /// Shows the bus who this is, which it knows from the socket; returns its GUID.
    fn authenticate(&self, deadline: &Deadline) -> Result<String, BusError> {
        // No name is given: whoever the socket belongs to.
        deadline.write(&self.stream, b"\0AUTH EXTERNAL\r\n")?;
        let mut line = self.line(deadline)?;
        if line == "DATA" || line == "DATA " {
            deadline.write(&self.stream, b"DATA\r\n")?;
            line = self.line(deadline)?;
        }
        let Some(guid) = line.strip_prefix("OK ") else {
            return Err(if line.starts_with("REJECTED") {
                BusError::Rejected
            } else {
                BusError::Protocol(format!("it says {line:?} when asked to be let in"))
            });
        };
        deadline.write(&self.stream, b"BEGIN\r\n")?;
        Ok(guid.trim_end().to_owned())
    }

    fn line(&self, deadline: &Deadline) -> Result<String, BusError> {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            deadline.read(&self.stream, &mut byte)?;
            line.extend(byte);
            if line.len() > MAX_LINE {
                return Err(BusError::Protocol("it is no D-Bus bus".into()));
            }
        }
        line.truncate(line.len() - 2);
        String::from_utf8(line).map_err(|_| BusError::Protocol("it is no D-Bus bus".into()))
    }

    /// Calls a method of the bus itself.
    pub(crate) fn ask_bus<A, R>(&mut self, member: &str, argument: &A) -> Result<R, BusError>
    where
        A: Serialize + Type,
        R: DeserializeOwned + Type,
    {
        let method = Method { destination: BUS, path: BUS_PATH, interface: BUS, member };
        self.call(&method, argument, MAX_ANSWER)
    }

    /// Calls a method and waits for what it gives, of `limit` bytes at most.
    pub(crate) fn call<A, R>(
        &mut self,
        method: &Method<'_>,
        argument: &A,
        limit: usize,
    ) -> Result<R, BusError>
    where
        A: Serialize + Type,
        R: DeserializeOwned + Type,
    {
        let deadline = Deadline::after(self.patience);
        // 0 is no serial.
        self.serial = self.serial.wrapping_add(1).max(1);
        deadline.write(&self.stream, &method.call(self.serial, argument)?)?;
        loop {
            let message = self.next(&deadline, limit)?;
            // Who else sends something is not listened to.
            if message.answers != self.serial || message.sender != method.destination {
                // But the bus says in an addressee's name that there is none.
                let from_bus = message.answers == self.serial && message.sender == BUS;
                if from_bus && message.kind == ERROR {
                    return Err(message.complaint());
                }
                continue;
            }
            match message.kind {
                METHOD_RETURN => return message.body(),
                ERROR => return Err(message.complaint()),
                _ => {}
            }
        }
    }

    fn next(&self, deadline: &Deadline, limit: usize) -> Result<Message, BusError> {
        let mut prologue = [0; PROLOGUE];
        deadline.read(&self.stream, &mut prologue)?;
        let rest = message::rest(prologue, limit)?;
        let mut bytes = prologue.to_vec();
        bytes.resize(PROLOGUE + rest, 0);
        deadline.read(&self.stream, bytes.get_mut(PROLOGUE..).unwrap_or_default())?;
        Message::parse(bytes)
    }
}

/// Most bytes of answers that are no state.
pub(crate) const MAX_ANSWER: usize = 256 << 10;
