//! A client that only writes, over a connection that somebody else has made: several requests are under way at a time.

use std::io::{self, BufReader};

use super::Stream;
use super::client::{ExportInfo, Talk, refusal, send};
use super::proto::{
    MAX_REQUEST, Request, SIMPLE_MAGIC, command, garbage, host_error, option, transmission, u32_from,
    u64_from,
};

/// Most requests under way. Their replies of 16 bytes fit any socket, so a server never waits for this end to read them.
const WINDOW: usize = 16;
/// What an export must offer.
const NEEDED: u16 = transmission::HAS_FLAGS | transmission::FLUSH | transmission::WRITE_ZEROES;

/// Why what was asked of an export was not done. Nothing more is to be asked of it then.
#[derive(Debug, thiserror::Error)]
pub enum WriterError {
    /// The server says so.
    #[error("{0}")]
    Refused(#[source] io::Error),
    /// The connection ended, or what comes over it makes no sense (`InvalidData`).
    #[error("{0}")]
    Lost(#[source] io::Error),
}

/// An export that is written. Requests that are under way together are carried out in any order.
#[derive(Debug)]
pub struct Writer {
    stream: BufReader<Stream>,
    info: ExportInfo,
    cookie: u64,
    /// Cookies of what is not answered yet.
    waiting: Vec<u64>,
}

impl Writer {
    /// Talks to the server at the other end of `stream`, whose time limits stay what they are.
    ///
    /// # Errors
    /// [`WriterError`], also if the export cannot be written in pieces of any length up to 32 MiB at any byte, zeroed and flushed.
    pub fn over(stream: Stream, export: &str) -> Result<Self, WriterError> {
        let refused = |text: String| WriterError::Refused(io::Error::other(text));
        let mut talk = Talk::over(stream).map_err(WriterError::Lost)?;
        let found = talk.info(option::GO, export).map_err(WriterError::Lost)?;
        let info = found.map_err(|why| WriterError::Refused(refusal(why, export)))?;
        if info.flags & transmission::READ_ONLY != 0 {
            return Err(refused(format!("the export '{export}' is read-only")));
        }
        if info.flags & NEEDED != NEEDED
            || info.block.is_some_and(|(min, _, max)| min > 1 || max < MAX_REQUEST)
        {
            return Err(refused(format!(
                "the export '{export}' cannot be flushed, zeroed or written at any byte"
            )));
        }
        Ok(Self { stream: BufReader::new(talk.stream), info, cookie: 0, waiting: Vec::new() })
    }

    /// What the server said of the export.
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// Writes `data`, at most 32 MiB; it may not be there before [`Writer::settle`] has returned.
    ///
    /// # Errors
    /// [`WriterError`], of this or of an earlier request.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), WriterError> {
        self.ask(command::WRITE, offset, data.len() as u64, data)
    }

    /// The same of `len` zeroes, at most 4 GiB - 1, which need take no room.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), WriterError> {
        self.ask(command::WRITE_ZEROES, offset, len, &[])
    }

    /// Waits until all is written.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn settle(&mut self) -> Result<(), WriterError> {
        while !self.waiting.is_empty() {
            self.answer()?;
        }
        Ok(())
    }

    /// Waits until all is written and durable.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn flush(&mut self) -> Result<(), WriterError> {
        // A flush is for what was answered before it was asked for.
        self.settle()?;
        self.ask(command::FLUSH, 0, 0, &[])?;
        self.settle()
    }

    /// Takes leave of the server, when all is settled.
    ///
    /// # Errors
    /// [`WriterError::Lost`].
    pub fn end(mut self) -> Result<(), WriterError> {
        let bye = Request { flags: 0, command: command::DISCONNECT, cookie: 0, offset: 0, len: 0 };
        send(self.stream.get_mut(), &bye, &[]).map_err(WriterError::Lost)
    }

    fn ask(&mut self, command: u16, offset: u64, len: u64, payload: &[u8]) -> Result<(), WriterError> {
        let too_long = |_| WriterError::Refused(io::ErrorKind::InvalidInput.into());
        let len = u32::try_from(len).map_err(too_long)?;
        while self.waiting.len() >= WINDOW {
            self.answer()?;
        }
        self.cookie += 1;
        let request = Request { flags: 0, command, cookie: self.cookie, offset, len };
        send(self.stream.get_mut(), &request, payload).map_err(WriterError::Lost)?;
        self.waiting.push(self.cookie);
        Ok(())
    }

    /// Takes one reply in.
    fn answer(&mut self) -> Result<(), WriterError> {
        let mut read = || {
            // Structured ones were not agreed on.
            if u32_from(&mut self.stream)? != SIMPLE_MAGIC {
                return Err(garbage("a reply without its magic number"));
            }
            Ok((u32_from(&mut self.stream)?, u64_from(&mut self.stream)?))
        };
        let (error, cookie) = read().map_err(WriterError::Lost)?;
        let Some(place) = self.waiting.iter().position(|waiting| *waiting == cookie) else {
            return Err(WriterError::Lost(garbage("a reply to no request")));
        };
        self.waiting.swap_remove(place);
        if error == 0 { Ok(()) } else { Err(WriterError::Refused(host_error(error))) }
    }
}
