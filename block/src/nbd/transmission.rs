//! A server's side after the negotiation: requests and replies.

use std::io::{self, BufReader, Read, Write};

use super::Stream;
use super::handshake::Session;
use super::proto::{
    MAX_REQUEST, Request, SIMPLE_MAGIC, allocation, chunk, chunk_header, command, error_number, garbage,
};
use super::server::Context;
use crate::BlockNode;
use crate::node::{os_error, status_above};

/// Most bytes of one chunk of data.
const DATA: u64 = 2 << 20;
/// Most extents in a reply.
const MAX_EXTENTS: usize = 2048;
/// Bytes of requests that are read ahead.
const AHEAD: usize = 64 << 10;

struct Connection {
    stream: BufReader<Stream>,
    session: Agreed,
    /// What is written in, kept for its memory.
    buffer: Vec<u8>,
}

/// What of the session matters here.
struct Agreed {
    export: std::sync::Arc<super::Export>,
    structured: bool,
    contexts: Vec<(u32, Context)>,
}

/// Serves requests until the client goes.
///
/// # Errors
/// The connection's, or what makes no sense.
pub(super) fn serve(session: Session) -> io::Result<()> {
    let Session { stream, export, structured, contexts } = session;
    let mut connection = Connection {
        stream: BufReader::with_capacity(AHEAD, stream),
        session: Agreed { export, structured, contexts },
        buffer: Vec::new(),
    };
    loop {
        let request = match Request::read(&mut connection.stream) {
            // Clients may go without a word.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        };
        if request.command == command::DISCONNECT {
            return Ok(());
        }
        connection.request(request)?;
    }
}

impl Connection {
    fn send(&mut self, data: &[u8]) -> io::Result<()> {
        let stream = self.stream.get_mut();
        stream.write_all(data)?;
        stream.flush()
    }

    fn node(&self) -> &dyn BlockNode {
        &*self.session.export.node
    }

    fn request(&mut self, request: Request) -> io::Result<()> {
        let most =
            if matches!(request.command, command::READ | command::WRITE) { MAX_REQUEST } else { u32::MAX };
        let mut payload = std::mem::take(&mut self.buffer);
        if request.command == command::WRITE {
            if request.len > most {
                return Err(garbage("a write that is too long"));
            }
            payload.resize(request.len as usize, 0);
            self.stream.read_exact(&mut payload)?;
        }
        let result = self.check(&request, most).and_then(|()| match request.command {
            command::READ | command::BLOCK_STATUS => Ok(()),
            _ => self.change(&request, &payload),
        });
        self.buffer = payload;
        if let Err(error) = result {
            return self.failed(&request, &error, None);
        }
        match request.command {
            command::READ => self.read(&request),
            command::BLOCK_STATUS => self.block_status(&request),
            _ => self.done(&request),
        }
    }

    /// Refuses requests that cannot be.
    fn check(&self, request: &Request, most: u32) -> io::Result<()> {
        let export = &self.session.export;
        let allowed = match request.command {
            command::READ if self.session.structured => command::FLAG_DF,
            command::READ | command::FLUSH | command::CACHE => 0,
            command::WRITE | command::TRIM => command::FLAG_FUA,
            command::WRITE_ZEROES => command::FLAG_FUA | command::FLAG_NO_HOLE,
            command::BLOCK_STATUS if !self.session.contexts.is_empty() => command::FLAG_REQ_ONE,
            _ => return Err(os_error(libc::EINVAL)),
        };
        // FUA is allowed everywhere, if it means nothing.
        if request.flags & !(allowed | command::FLAG_FUA) != 0 || request.len > most {
            return Err(os_error(libc::EINVAL));
        }
        if matches!(request.command, command::WRITE | command::TRIM | command::WRITE_ZEROES)
            && export.readonly
        {
            return Err(os_error(libc::EROFS));
        }
        if request.command == command::FLUSH {
            return Ok(());
        }
        let end = request.offset.checked_add(u64::from(request.len)).filter(|e| *e <= self.node().size());
        match end {
            Some(_) if request.command == command::BLOCK_STATUS && request.len == 0 => {
                Err(os_error(libc::EINVAL))
            }
            Some(_) => Ok(()),
            None if request.command == command::WRITE => Err(os_error(libc::ENOSPC)),
            None => Err(os_error(libc::EINVAL)),
        }
    }

    fn change(&self, request: &Request, payload: &[u8]) -> io::Result<()> {
        let (node, len) = (self.node(), u64::from(request.len));
        match request.command {
            command::WRITE => node.write_at(request.offset, payload)?,
            command::FLUSH => return node.flush(),
            command::TRIM if len != 0 => node.discard(request.offset, len)?,
            command::WRITE_ZEROES if len != 0 => {
                node.write_zeroes(request.offset, len, request.flags & command::FLAG_NO_HOLE == 0)?;
            }
            _ => {}
        }
        let changes = matches!(request.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        if changes && request.flags & command::FLAG_FUA != 0 { node.flush() } else { Ok(()) }
    }

    fn simple(&mut self, request: &Request, error: u32) -> io::Result<()> {
        let mut out = SIMPLE_MAGIC.to_be_bytes().to_vec();
        out.extend_from_slice(&error.to_be_bytes());
        out.extend_from_slice(&request.cookie.to_be_bytes());
        self.send(&out)
    }

    fn done(&mut self, request: &Request) -> io::Result<()> {
        if !self.session.structured {
            return self.simple(request, 0);
        }
        let out = chunk_header(chunk::DONE, chunk::NONE, request.cookie, 0);
        self.send(&out)
    }

    /// Reports an error; `at` for one behind data that was sent already.
    fn failed(&mut self, request: &Request, error: &io::Error, at: Option<u64>) -> io::Result<()> {
        let number = error_number(error);
        if !self.session.structured {
            return self.simple(request, number);
        }
        let text = error.to_string();
        let text = text.get(..text.len().min(1024)).unwrap_or_default();
        let mut data = number.to_be_bytes().to_vec();
        data.extend_from_slice(&(text.len() as u16).to_be_bytes());
        data.extend_from_slice(text.as_bytes());
        data.extend(at.into_iter().flat_map(u64::to_be_bytes));
        let kind = if at.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR_WHOLE };
        let mut out = chunk_header(chunk::DONE, kind, request.cookie, data.len() as u32);
        out.extend_from_slice(&data);
        self.send(&out)
    }

    fn read(&mut self, request: &Request) -> io::Result<()> {
        let len = u64::from(request.len);
        if self.session.structured && request.flags & command::FLAG_DF == 0 && len != 0 {
            return self.read_chunks(request);
        }
        let head = if self.session.structured && len != 0 {
            let mut head = chunk_header(chunk::DONE, chunk::DATA, request.cookie, request.len + 8);
            head.extend_from_slice(&request.offset.to_be_bytes());
            head
        } else if self.session.structured {
            return self.done(request);
        } else {
            let mut head = SIMPLE_MAGIC.to_be_bytes().to_vec();
            head.extend_from_slice(&[0; 4]);
            head.extend_from_slice(&request.cookie.to_be_bytes());
            head
        };
        // Whether there is an error has to be known before the first byte.
        let mut out = std::mem::take(&mut self.buffer);
        out.clear();
        out.extend_from_slice(&head);
        out.resize(head.len() + len as usize, 0);
        let read = self.node().read_at(request.offset, out.get_mut(head.len()..).unwrap_or_default());
        let sent = match read {
            Ok(()) => self.send(&out),
            Err(error) => self.failed(request, &error, None),
        };
        self.buffer = out;
        sent
    }

    /// Reads in chunks: holes are not sent.
    fn read_chunks(&mut self, request: &Request) -> io::Result<()> {
        let (mut at, end) = (request.offset, request.offset + u64::from(request.len));
        let mut out = std::mem::take(&mut self.buffer);
        while at < end {
            let extent = status_above(self.node(), at, end - at).map(|(e, _)| e);
            let (len, zero) = match extent {
                Ok(e) if e.len != 0 => (e.len.min(end - at), e.zero),
                // What is not known is read.
                _ => (end - at, false),
            };
            let len = if zero { len } else { len.min(DATA) };
            let flags = if at + len == end { chunk::DONE } else { 0 };
            out.clear();
            if zero {
                out.extend(chunk_header(flags, chunk::HOLE, request.cookie, 12));
                out.extend_from_slice(&at.to_be_bytes());
                out.extend_from_slice(&(len as u32).to_be_bytes());
            } else {
                out.extend(chunk_header(flags, chunk::DATA, request.cookie, len as u32 + 8));
                out.extend_from_slice(&at.to_be_bytes());
                let head = out.len();
                out.resize(head + len as usize, 0);
                if let Err(error) = self.node().read_at(at, out.get_mut(head..).unwrap_or_default()) {
                    self.buffer = out;
                    return self.failed(request, &error, Some(at));
                }
            }
            self.send(&out)?;
            at += len;
        }
        self.buffer = out;
        Ok(())
    }

    fn block_status(&mut self, request: &Request) -> io::Result<()> {
        let one = request.flags & command::FLAG_REQ_ONE != 0;
        let mut replies = Vec::new();
        for (id, context) in &self.session.contexts {
            match extents(self.node(), context, request, if one { 1 } else { MAX_EXTENTS }) {
                Ok(extents) => replies.push((*id, extents)),
                Err(error) => return self.failed(request, &error, None),
            }
        }
        let count = replies.len();
        for (n, (id, extents)) in replies.into_iter().enumerate() {
            let flags = if n + 1 == count { chunk::DONE } else { 0 };
            let len = 4 + extents.len() as u32 * 8;
            let mut out = chunk_header(flags, chunk::BLOCK_STATUS, request.cookie, len);
            out.extend_from_slice(&id.to_be_bytes());
            for (len, flags) in extents {
                out.extend_from_slice(&len.to_be_bytes());
                out.extend_from_slice(&flags.to_be_bytes());
            }
            self.send(&out)?;
        }
        Ok(())
    }
}

/// The extents of a range: lengths and flags, neighbours that are alike joined.
fn extents(
    node: &dyn BlockNode,
    context: &Context,
    request: &Request,
    most: usize,
) -> io::Result<Vec<(u32, u32)>> {
    let (mut at, end) = (request.offset, request.offset + u64::from(request.len));
    let mut out: Vec<(u32, u32)> = Vec::new();
    while at < end {
        let (len, flags) = match context {
            Context::Allocation => {
                let (e, _) = status_above(node, at, end - at)?;
                let hole = if e.data { 0 } else { allocation::HOLE };
                (e.len, hole | if e.zero { allocation::ZERO } else { 0 })
            }
            Context::Depth => {
                let (e, depth) = status_above(node, at, end - at)?;
                (e.len, if e.allocated { depth as u32 + 1 } else { 0 })
            }
            Context::Bitmap(b) => {
                let shift = b.bitmap.granularity_bits;
                let first = at >> shift;
                let set = b.bitmap.is_set(first);
                let last = (end - 1) >> shift;
                let next = (first + 1..=last).find(|n| b.bitmap.is_set(*n) != set);
                (next.map_or(end, |n| n << shift) - at, u32::from(set))
            }
        };
        let len = len.clamp(1, end - at) as u32;
        let full = out.len() == most;
        match out.last_mut() {
            Some((sum, last)) if *last == flags => *sum += len,
            _ if full => break,
            _ => out.push((len, flags)),
        }
        at += u64::from(len);
    }
    Ok(out)
}
