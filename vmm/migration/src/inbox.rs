//! What comes over a connection, read ahead: short frames come many at once, and RAM goes from the socket to its place.

use std::io::{self, Read, Write};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

use crate::Stream;
use crate::checksum::Sum;
use crate::frame::{HEADER, Header, MAX_RAM};

/// Bytes that are read ahead at most; shorter payloads are not copied.
const AHEAD: usize = 64 << 10;
/// The same behind a long frame: another one is likely, and what is read ahead of that is copied twice.
const LITTLE: usize = 4 << 10;
/// Bytes that come over TLS at once.
const RECORD: usize = 16 << 10;

/// A connection and what was read of it ahead. [`Read`] reads no more than it is asked for; only the functions for frames read ahead.
#[derive(Debug)]
pub(crate) struct Inbox {
    stream: Stream,
    ahead: Box<[u8]>,
    /// What of `ahead` has not been taken yet.
    at: usize,
    end: usize,
    /// How much is to be read ahead.
    much: usize,
    /// A payload that is too long for `ahead`. It only grows: to clear what is overwritten anyway takes time.
    long: Vec<u8>,
}

impl Read for Inbox {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let there = self.ahead.get(self.at..self.end).unwrap_or_default();
        if there.is_empty() {
            return self.stream.read(buffer);
        }
        let count = there.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..count), there.get(..count)) {
            to.copy_from_slice(from);
        }
        self.at += count;
        Ok(count)
    }
}

impl Write for Inbox {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.stream.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Inbox {
    /// Nothing has been read ahead yet.
    pub(crate) fn new(stream: Stream) -> Self {
        let ahead = vec![0; AHEAD].into_boxed_slice();
        Self { stream, ahead, at: 0, end: 0, much: AHEAD, long: Vec::new() }
    }

    /// The connection itself.
    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Reads ahead until there are `wanted` bytes, at most [`AHEAD`].
    fn fill(&mut self, wanted: usize) -> io::Result<()> {
        if self.end - self.at >= wanted {
            return Ok(());
        }
        self.ahead.copy_within(self.at..self.end, 0);
        (self.at, self.end) = (0, self.end - self.at);
        while self.end < wanted {
            let most = self.much.max(wanted).min(self.ahead.len());
            let Some(room) = self.ahead.get_mut(self.end..most) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            match self.stream.read(room) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.end += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads the next frame's header.
    ///
    /// # Errors
    /// As [`frame::read`](crate::frame::read).
    pub(crate) fn header(&mut self) -> io::Result<Header> {
        self.fill(HEADER)?;
        let mut bytes = [0; HEADER];
        self.read_exact(&mut bytes)?;
        Header::decode(&bytes)
    }

    /// Reads the payload of the frame whose header was read last.
    ///
    /// # Errors
    /// As [`frame::read`](crate::frame::read); `InvalidData` for one that is longer than RAM may be.
    pub(crate) fn payload(&mut self, header: &Header) -> io::Result<&[u8]> {
        let len = header.len;
        if len > MAX_RAM + MAX_RAM / 8 {
            let text = format!("a {:?} section of {len} bytes within RAM", header.kind);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let payload = if len <= AHEAD / 2 {
            self.much = AHEAD;
            self.fill(len)?;
            self.at += len;
            self.ahead.get(self.at - len..self.at).unwrap_or_default()
        } else {
            self.much = LITTLE;
            let mut long = std::mem::take(&mut self.long);
            if long.len() < len {
                long.resize(len, 0);
            }
            let place = long.get_mut(..len).unwrap_or_default();
            let read = self.read_exact(place);
            self.long = long;
            read?;
            self.long.get(..len).unwrap_or_default()
        };
        header.check(payload)?;
        Ok(payload)
    }

    /// The same into RAM: `to` is as long as the payload. What is there when this fails may be anything.
    ///
    /// # Errors
    /// As [`frame::read`](crate::frame::read).
    pub(crate) fn payload_into(
        &mut self,
        header: &Header,
        to: &VolatileSlice<'_, impl BitmapSlice>,
    ) -> io::Result<()> {
        let there = self.ahead.get(self.at..self.end).unwrap_or_default();
        let count = there.len().min(to.len());
        to.copy_from(there.get(..count).unwrap_or_default());
        self.at += count;
        self.much = if to.len() > AHEAD / 2 { LITTLE } else { AHEAD };
        let mut done = count;
        while done < to.len() {
            let mut rest = to.offset(done).map_err(io::Error::other)?;
            match self.stream.read_volatile(&mut rest) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(VolatileMemoryError::IOError(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(VolatileMemoryError::IOError(error)) => return Err(error),
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        header.check_sum(Sum::of_ram(header.head(), to))
    }
}

impl ReadVolatile for Stream {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        to: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        match self {
            Self::Tcp(socket) => socket.read_volatile(to),
            Self::Unix(socket) => socket.read_volatile(to),
            tls => {
                let mut record = [0; RECORD];
                let room = to.len().min(RECORD);
                let came = tls.read(record.get_mut(..room).unwrap_or_default());
                let count = came.map_err(VolatileMemoryError::IOError)?;
                to.copy_from(record.get(..count).unwrap_or_default());
                Ok(count)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Kind, append, read};
    use std::os::unix::net::UnixStream;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    const BASE: u64 = 0x8000_0000;

    /// Frames of all lengths, alternately into RAM; the last is read as any other stream.
    #[test]
    fn frames_come_in_order_whatever_is_read_ahead() {
        let pages = |n: usize| vec![n as u8 + 1; n * 4096];
        let short = |n: usize| vec![7; n * 100];
        let mut bytes = Vec::new();
        for n in 1..40 {
            append(&mut bytes, Kind::Ram, BASE, &pages(n));
            append(&mut bytes, Kind::Sparse, BASE, &short(n * n));
            append(&mut bytes, Kind::Zero, BASE, &(n as u64).to_le_bytes());
        }
        append(&mut bytes, Kind::State, 0, &[9; 200_000]);
        let (mut near, far) = UnixStream::pair().expect("sockets");
        let writer = std::thread::spawn(move || near.write_all(&bytes).expect("somebody reads"));
        let memory = memory();
        let mut inbox = Inbox::new(Stream::Unix(far));
        for n in 1..40 {
            let header = inbox.header().expect("a header");
            assert_eq!((header.kind, header.len), (Kind::Ram, n * 4096));
            let place = memory.get_slice(GuestAddress(BASE), header.len).expect("RAM");
            inbox.payload_into(&header, &place).expect("RAM");
            let mut there = vec![0; n * 4096];
            memory.read_slice(&mut there, GuestAddress(BASE)).expect("RAM");
            assert_eq!(there, pages(n));
            let header = inbox.header().expect("a header");
            assert_eq!(inbox.payload(&header).expect("a payload"), short(n * n));
            let header = inbox.header().expect("a header");
            assert_eq!(inbox.payload(&header).expect("a payload"), (n as u64).to_le_bytes());
        }
        let mut state = Vec::new();
        assert_eq!(read(&mut inbox, &mut state).expect("a frame").kind, Kind::State);
        assert_eq!(state, [9; 200_000]);
        writer.join().expect("no panic");
        assert_eq!(inbox.header().expect_err("over").kind(), io::ErrorKind::UnexpectedEof);
    }

    fn memory() -> holdfast_memory::GuestMemory {
        holdfast_memory::GuestMemory::from_ranges(&[(GuestAddress(BASE), 1 << 20)]).expect("RAM")
    }

    #[test]
    fn what_is_altered_or_cut_is_seen() {
        let memory = memory();
        for (len, ram) in [(4096, true), (128 << 10, true), (4096, false), (128 << 10, false)] {
            for (harm, cut) in [(None, false), (Some(24), false), (Some(24 + len - 1), false), (None, true)] {
                let mut bytes = Vec::new();
                append(&mut bytes, Kind::Ram, BASE, &vec![5; len]);
                if let Some(at) = harm {
                    bytes[at] ^= 1;
                }
                bytes.truncate(bytes.len() - usize::from(cut));
                let (mut near, far) = UnixStream::pair().expect("sockets");
                let writer = std::thread::spawn(move || near.write_all(&bytes).expect("somebody reads"));
                let mut inbox = Inbox::new(Stream::Unix(far));
                let header = inbox.header().expect("a header");
                let came = if ram {
                    let place = memory.get_slice(GuestAddress(BASE), header.len).expect("RAM");
                    inbox.payload_into(&header, &place)
                } else {
                    inbox.payload(&header).map(drop)
                };
                let wanted = match (harm, cut) {
                    (None, false) => None,
                    (Some(_), _) => Some(io::ErrorKind::InvalidData),
                    (None, true) => Some(io::ErrorKind::UnexpectedEof),
                };
                assert_eq!(came.err().map(|error| error.kind()), wanted, "{len} {ram} {harm:?} {cut}");
                writer.join().expect("no panic");
            }
        }
    }
}
