//! One stream between the guest and a process of the host.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes of the guest's that are kept for a process that does not read.
pub(super) const BUFFER: u32 = 256 * 1024;
/// The guest is told of room when it knows of this much less than there is.
const TELL: u32 = BUFFER / 4;

/// A connection, by its ports: the host's and the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// The state of a connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    /// The guest has agreed to it.
    pub(super) open: bool,
    /// Bytes of the guest's that the process has not taken.
    waiting: VecDeque<u8>,
    /// Bytes that the process has taken, as the guest counts them.
    taken: Wrapping<u32>,
    /// What the guest was told of that last.
    told: Wrapping<u32>,
    /// Bytes sent to the guest.
    sent: Wrapping<u32>,
    /// The guest's buffer, and what it has taken.
    guest_buffer: u32,
    guest_taken: Wrapping<u32>,
    /// There may be something to read.
    pub(super) readable: bool,
    /// The guest was asked for room.
    pub(super) asked: bool,
    /// What the guest has shut down (flags of SHUTDOWN).
    guest_shut: u32,
    /// The guest was told that nothing more comes.
    pub(super) ended: bool,
}

/// What reading from the process gives.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// So many bytes.
    Bytes(usize),
    /// Nothing for now.
    Nothing,
    /// Nothing any more.
    End,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, open: bool) -> Self {
        Self {
            stream,
            open,
            waiting: VecDeque::new(),
            taken: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            guest_buffer: 0,
            guest_taken: Wrapping(0),
            readable: true,
            asked: false,
            guest_shut: 0,
            ended: false,
        }
    }

    /// Notes what every packet of the guest says of its buffer.
    pub(super) fn credit(&mut self, buffer: u32, taken: u32) {
        (self.guest_buffer, self.guest_taken) = (buffer, Wrapping(taken));
        self.asked = false;
    }

    /// Bytes that the guest has room for. A guest that counts nonsense has none.
    pub(super) fn room(&self) -> u32 {
        self.guest_buffer.saturating_sub((self.sent - self.guest_taken).0)
    }

    /// Whether data may go to the guest, room or not.
    pub(super) fn sends(&self) -> bool {
        self.open && self.readable && !self.ended && self.guest_shut & SHUTDOWN_RECEIVE == 0
    }

    /// What the guest is told with every packet: the buffer here and what was taken from it.
    pub(super) fn tell(&mut self) -> (u32, u32) {
        self.told = self.taken;
        (BUFFER, self.taken.0)
    }

    /// Whether the guest should hear of room.
    pub(super) fn has_news(&self) -> bool {
        (self.taken - self.told).0 >= TELL
    }

    /// Reads for the guest.
    pub(super) fn read(&mut self, into: &mut [u8]) -> Taken {
        match self.stream.read(into) {
            Ok(0) => Taken::End,
            Ok(n) => {
                self.sent += n as u32;
                Taken::Bytes(n)
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => self.read(into),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Taken::Nothing
            }
            Err(_) => Taken::End,
        }
    }

    /// Takes bytes of the guest. False if they are more than it was allowed.
    pub(super) fn push(&mut self, bytes: &[u8]) -> bool {
        if self.waiting.len() + bytes.len() > BUFFER as usize {
            return false;
        }
        self.waiting.extend(bytes);
        true
    }

    /// Gives the process what it takes. False if it takes no more.
    pub(super) fn flush(&mut self) -> bool {
        while !self.waiting.is_empty() {
            let (front, _) = self.waiting.as_slices();
            match self.stream.write(front) {
                Ok(0) => return false,
                Ok(n) => {
                    self.waiting.drain(..n);
                    self.taken += n as u32;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            }
        }
        if self.guest_shut & SHUTDOWN_SEND != 0 {
            // Who is gone has nothing to be told.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        true
    }

    /// Notes what the guest has shut down.
    pub(super) fn shut(&mut self, flags: u32) {
        self.guest_shut |= flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
    }

    /// Whether the guest has closed it and the process has all that was sent.
    pub(super) fn is_over(&self) -> bool {
        let both = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        self.waiting.is_empty()
            && (self.guest_shut == both || (self.ended && self.guest_shut & SHUTDOWN_SEND != 0))
    }
}
