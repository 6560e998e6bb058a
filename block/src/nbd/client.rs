//! A client: an export as a node.

use std::io::{self, BufReader, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::proto::{
    CHUNK_MAGIC, MAX_OPTION, MAX_REQUEST, OPTION_MAGIC, OPTION_REPLY_MAGIC, Request, SERVER_MAGIC,
    SIMPLE_MAGIC, allocation, chunk, command, garbage, handshake, host_error, info, option, reply,
    transmission, u16_from, u32_from, u64_from, vec_from,
};
use super::{Address, Socket, Stream, TlsClient};
use crate::node::{Extent, Preallocation, os_error};
use crate::ranges::Ranges;
use crate::{BlockError, BlockNode};

/// Most connections to a server that allows several.
const CONNECTIONS: usize = 4;
/// Bytes that are read ahead.
const AHEAD: usize = 256 << 10;
/// Most bytes of one request that moves no data.
const MAX_QUIET: u64 = 1 << 30;
/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(200);
/// Most replies to one option, and chunks of one reply.
const MAX_REPLIES: usize = 1 << 20;

/// A reply to an option: its type and its data.
type OptionReply = (u32, Vec<u8>);

/// Whom to connect to, and how.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Where the server is.
    pub address: Address,
    /// The export.
    pub export: String,
    /// Credentials, if TLS is to be used; then nothing else will do.
    pub tls: Option<TlsClient>,
    /// The metadata context that block status is asked of, if not `base:allocation`.
    pub context: Option<String>,
    /// How long requests wait for a connection that was lost, in seconds.
    pub reconnect_delay: u64,
    /// How long the first connection is tried for, in seconds.
    pub open_timeout: u64,
    /// It is not written.
    pub readonly: bool,
}

/// What a server says of an export.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExportInfo {
    /// The name.
    pub name: String,
    /// Words for people.
    pub description: Option<String>,
    /// Bytes.
    pub size: u64,
    /// See [`transmission`].
    pub flags: u16,
    /// Least, best and most bytes of a request, if the server says so.
    pub block: Option<(u32, u32, u32)>,
    /// Metadata contexts.
    pub contexts: Vec<String>,
}

#[derive(Debug)]
struct Connection {
    stream: BufReader<Stream>,
    structured: bool,
    /// Number of the metadata context.
    context: Option<u32>,
    cookie: u64,
    /// To end it while somebody waits for an answer.
    handle: Arc<Socket>,
}

/// A talk with a server before an export is chosen.
pub(super) struct Talk {
    pub(super) stream: Stream,
    fixed: bool,
    no_zeroes: bool,
}

fn string(text: &str) -> Vec<u8> {
    [(text.len() as u32).to_be_bytes().as_slice(), text.as_bytes()].concat()
}

impl Talk {
    pub(super) fn start(options: &ClientOptions) -> io::Result<Self> {
        let socket = Socket::connect(&options.address)?;
        // A server that says nothing is none.
        socket.set_timeout(Some(Duration::from_secs(30)))?;
        let mut talk = Self::over(Stream::Plain(socket))?;
        if let Some(tls) = &options.tls {
            talk.start_tls(tls)?;
        }
        Ok(talk)
    }

    /// Begins on a connection that is there.
    pub(super) fn over(mut stream: Stream) -> io::Result<Self> {
        if u64_from(&mut stream)? != SERVER_MAGIC {
            return Err(garbage("the server does not speak it"));
        }
        if u64_from(&mut stream)? != OPTION_MAGIC {
            return Err(garbage("the server is an oldstyle one, which is not supported"));
        }
        let flags = u16_from(&mut stream)?;
        let fixed = flags & handshake::FIXED_NEWSTYLE != 0;
        let no_zeroes = flags & handshake::NO_ZEROES != 0;
        let ours = flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        stream.write_all(&u32::from(ours).to_be_bytes())?;
        Ok(Self { stream, fixed, no_zeroes })
    }

    fn start_tls(&mut self, tls: &TlsClient) -> io::Result<()> {
        if !self.fixed {
            return Err(io::Error::other("Server does not support STARTTLS"));
        }
        self.ask(option::STARTTLS, &[])?;
        match self.reply(option::STARTTLS)? {
            (reply::ACK, _) => {}
            (_, _) => return Err(io::Error::other("Server does not support TLS, which is required")),
        }
        let handle = self.stream.socket().try_clone()?;
        self.stream = std::mem::replace(&mut self.stream, Stream::Plain(handle)).into_tls_client(tls)?;
        Ok(())
    }

    pub(super) fn ask(&mut self, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut out = OPTION_MAGIC.to_be_bytes().to_vec();
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        self.stream.write_all(&out)?;
        self.stream.flush()
    }

    fn reply(&mut self, kind: u32) -> io::Result<(u32, Vec<u8>)> {
        if u64_from(&mut self.stream)? != OPTION_REPLY_MAGIC {
            return Err(garbage("a reply to an option without its magic number"));
        }
        if u32_from(&mut self.stream)? != kind {
            return Err(garbage("a reply to another option"));
        }
        let (what, len) = (u32_from(&mut self.stream)?, u32_from(&mut self.stream)?);
        let data = vec_from(&mut self.stream, len as usize, MAX_OPTION as usize)?;
        Ok((what, data))
    }

    /// All replies up to the one that ends them: true if that is not an error.
    pub(super) fn replies(&mut self, kind: u32, data: &[u8]) -> io::Result<(bool, Vec<OptionReply>)> {
        self.ask(kind, data)?;
        let mut all = Vec::new();
        loop {
            let (what, data) = self.reply(kind)?;
            if what == reply::ACK {
                return Ok((true, all));
            }
            let error = what & reply::ERROR != 0;
            all.push((what, data));
            if error {
                return Ok((false, all));
            }
            if all.len() >= MAX_REPLIES {
                return Err(garbage("replies without end"));
            }
        }
    }

    pub(super) fn info(&mut self, kind: u32, name: &str) -> io::Result<Result<ExportInfo, (u32, String)>> {
        let mut data = string(name);
        let asked = [info::BLOCK_SIZE, info::DESCRIPTION];
        data.extend_from_slice(&(asked.len() as u16).to_be_bytes());
        data.extend(asked.iter().flat_map(|a| a.to_be_bytes()));
        let (good, replies) = self.replies(kind, &data)?;
        let mut out = ExportInfo { name: name.to_owned(), ..ExportInfo::default() };
        let mut known = false;
        for (what, data) in replies {
            let mut b = data.as_slice();
            if what & reply::ERROR != 0 {
                return Ok(Err((what, String::from_utf8_lossy(b).into_owned())));
            }
            if what != reply::INFO {
                return Err(garbage("a reply that was not asked for"));
            }
            match u16_from(&mut b)? {
                info::EXPORT => {
                    (out.size, out.flags) = (u64_from(&mut b)?, u16_from(&mut b)?);
                    known = true;
                }
                info::DESCRIPTION => out.description = Some(String::from_utf8_lossy(b).into_owned()),
                info::BLOCK_SIZE => {
                    let sizes = (u32_from(&mut b)?, u32_from(&mut b)?, u32_from(&mut b)?);
                    if !sizes.0.is_power_of_two() || sizes.0 > 64 << 10 || sizes.2 < sizes.0 {
                        return Err(garbage("block sizes that cannot be"));
                    }
                    out.block = Some(sizes);
                }
                _ => {}
            }
        }
        if !good || !known {
            return Err(garbage("an export without a size"));
        }
        Ok(Ok(out))
    }

    pub(super) fn contexts(
        &mut self,
        kind: u32,
        export: &str,
        queries: &[&str],
    ) -> io::Result<Vec<(u32, String)>> {
        let mut data = string(export);
        data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
        queries.iter().for_each(|q| data.extend(string(q)));
        let (_, replies) = self.replies(kind, &data)?;
        let mut out = Vec::new();
        for (what, data) in replies.into_iter().filter(|(w, _)| *w == reply::META_CONTEXT) {
            let mut b = data.as_slice();
            debug_assert_eq!(what, reply::META_CONTEXT);
            let id = u32_from(&mut b)?;
            out.push((id, String::from_utf8_lossy(b).into_owned()));
        }
        Ok(out)
    }

    pub(super) fn structured(&mut self) -> io::Result<bool> {
        self.replies(option::STRUCTURED_REPLY, &[]).map(|(good, _)| good)
    }

    fn export_name(&mut self, name: &str) -> io::Result<ExportInfo> {
        self.ask(option::EXPORT_NAME, name.as_bytes())?;
        let (size, flags) = (u64_from(&mut self.stream)?, u16_from(&mut self.stream)?);
        if !self.no_zeroes {
            vec_from(&mut self.stream, 124, 124)?;
        }
        Ok(ExportInfo { name: name.to_owned(), size, flags, ..ExportInfo::default() })
    }
}

pub(super) fn refusal((kind, text): (u32, String), name: &str) -> io::Error {
    let text: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    let text = match kind {
        reply::TLS_REQUIRED => format!("Server requires TLS, which is not configured: {text}"),
        reply::UNKNOWN => format!("Requested export '{name}' not available: {text}"),
        _ => format!("the server refuses the export '{name}' (error {}): {text}", kind & !reply::ERROR),
    };
    io::Error::other(text)
}

/// Sends a request. Short ones go in one piece.
pub(super) fn send(stream: &mut Stream, request: &Request, payload: &[u8]) -> io::Result<()> {
    let head = request.to_bytes();
    if payload.len() <= 64 << 10 {
        stream.write_all(&[head.as_slice(), payload].concat())?;
    } else {
        stream.write_all(&head)?;
        stream.write_all(payload)?;
    }
    stream.flush()
}

impl Connection {
    fn open(options: &ClientOptions) -> io::Result<(Self, ExportInfo)> {
        let mut talk = Talk::start(options)?;
        let name = options.export.as_str();
        let (mut structured, mut context) = (false, None);
        let found = if talk.fixed {
            structured = talk.structured()?;
            let wanted = options.context.as_deref().unwrap_or("base:allocation");
            if structured {
                let chosen = talk.contexts(option::SET_META_CONTEXT, name, &[wanted])?;
                context = chosen.into_iter().find(|(_, c)| c == wanted).map(|(id, _)| id);
            }
            if context.is_none() && options.context.is_some() {
                return Err(io::Error::other(format!("the server has no metadata context '{wanted}'")));
            }
            match talk.info(option::GO, name)? {
                Ok(found) => found,
                Err((reply::UNSUPPORTED, _)) => talk.export_name(name)?,
                Err(refused) => return Err(refusal(refused, name)),
            }
        } else {
            talk.export_name(name)?
        };
        if found.size > i64::MAX as u64 {
            return Err(garbage("an export that is too large"));
        }
        talk.stream.socket().set_timeout(None)?;
        let handle = Arc::new(talk.stream.socket().try_clone()?);
        let stream = BufReader::with_capacity(AHEAD, talk.stream);
        Ok((Self { stream, structured, context, cookie: 0, handle }, found))
    }

    fn send(&mut self, request: &Request, payload: &[u8]) -> io::Result<()> {
        send(self.stream.get_mut(), request, payload)
    }

    /// Carries out a request. The outer error is the connection's end; the inner one is the server's answer.
    fn call(
        &mut self,
        mut request: Request,
        payload: &[u8],
        into: &mut Answer<'_>,
    ) -> io::Result<io::Result<()>> {
        self.cookie += 1;
        request.cookie = self.cookie;
        self.send(&request, payload)?;
        let mut result = Ok(());
        let mut filled = 0;
        for _ in 0..MAX_REPLIES {
            let magic = u32_from(&mut self.stream)?;
            if magic == SIMPLE_MAGIC {
                let (error, cookie) = (u32_from(&mut self.stream)?, u64_from(&mut self.stream)?);
                let data = matches!(into, Answer::Read(_));
                if cookie != request.cookie || (self.structured && data && error == 0) {
                    return Err(garbage("a simple reply that was not to be expected"));
                }
                if error != 0 {
                    return Ok(Err(host_error(error)));
                }
                if let Answer::Read(buf) = into {
                    self.stream.read_exact(buf)?;
                }
                return Ok(Ok(()));
            }
            if magic != CHUNK_MAGIC || !self.structured {
                return Err(garbage("a reply without its magic number"));
            }
            let (flags, kind) = (u16_from(&mut self.stream)?, u16_from(&mut self.stream)?);
            let (cookie, len) = (u64_from(&mut self.stream)?, u32_from(&mut self.stream)?);
            if cookie != request.cookie {
                return Err(garbage("a reply to another request"));
            }
            match self.chunk(kind, len as usize, &request, into)? {
                Ok(n) => filled += n,
                Err(error) => result = Err(error),
            }
            if flags & chunk::DONE != 0 {
                let short = matches!(into, Answer::Read(_)) && filled != u64::from(request.len);
                if result.is_ok() && short {
                    return Err(garbage("a read that is answered in part"));
                }
                return Ok(result);
            }
        }
        Err(garbage("a reply without end"))
    }

    /// Takes in a chunk: bytes that it fills.
    fn chunk(
        &mut self,
        kind: u16,
        len: usize,
        request: &Request,
        into: &mut Answer<'_>,
    ) -> io::Result<io::Result<u64>> {
        match (kind, into) {
            (chunk::NONE, _) if len == 0 => Ok(Ok(0)),
            (chunk::DATA | chunk::HOLE, Answer::Read(buf)) if len > 8 => {
                let at = u64_from(&mut self.stream)?.wrapping_sub(request.offset);
                let n =
                    if kind == chunk::DATA { len as u64 - 8 } else { u64::from(u32_from(&mut self.stream)?) };
                let end = at.checked_add(n).filter(|e| *e <= buf.len() as u64);
                let Some(end) = end.filter(|_| kind == chunk::DATA || len == 12) else {
                    return Err(garbage("data beyond what was asked for"));
                };
                let place = buf.get_mut(at as usize..end as usize).unwrap_or_default();
                if kind == chunk::DATA {
                    self.stream.read_exact(place)?;
                } else {
                    place.fill(0);
                }
                Ok(Ok(n))
            }
            (chunk::BLOCK_STATUS, Answer::Extent(extent)) if len >= 12 && (len - 4).is_multiple_of(8) => {
                let data = vec_from(&mut self.stream, len, MAX_REQUEST as usize)?;
                let mut b = data.as_slice();
                let (id, length, flags) = (u32_from(&mut b)?, u32_from(&mut b)?, u32_from(&mut b)?);
                if Some(id) != self.context || length == 0 {
                    return Err(garbage("block status that was not asked for"));
                }
                **extent = Some((length, flags));
                Ok(Ok(0))
            }
            (kind, _) if kind & chunk::ERROR != 0 => {
                let data = vec_from(&mut self.stream, len, MAX_OPTION as usize)?;
                let number = u32_from(&mut data.as_slice())?;
                if number == 0 {
                    return Err(garbage("an error that is none"));
                }
                Ok(Err(host_error(number)))
            }
            _ => Err(garbage("a chunk that was not to be expected")),
        }
    }
}

/// Where an answer goes.
enum Answer<'a> {
    Nothing,
    Read(&'a mut [u8]),
    Extent(&'a mut Option<(u32, u32)>),
}

#[derive(Debug, Default)]
struct Pool {
    idle: Vec<Connection>,
    open: usize,
    /// Those with a request under way.
    busy: Vec<Arc<Socket>>,
    /// How often requests under way were given up.
    given_up: u64,
}

impl Pool {
    fn is_done(&mut self, handle: &Arc<Socket>) {
        self.busy.retain(|other| !Arc::ptr_eq(other, handle));
    }
}

/// An export of a server.
#[derive(Debug)]
pub struct Nbd {
    options: ClientOptions,
    info: ExportInfo,
    /// Block status can be asked for.
    status: bool,
    size: AtomicU64,
    pool: Mutex<Pool>,
    returned: Condvar,
    ranges: Arc<Ranges>,
}

fn seconds(n: u64) -> u64 {
    n.saturating_mul(1_000_000_000)
}

impl Nbd {
    /// Connects to an export.
    ///
    /// # Errors
    /// [`BlockError::Option`] with what went wrong.
    pub fn open(options: ClientOptions) -> Result<Arc<Self>, BlockError> {
        let deadline = holdfast_clock::host_monotonic().saturating_add(seconds(options.open_timeout));
        let (connection, info) = loop {
            match Connection::open(&options) {
                Ok(open) => break open,
                Err(error) if holdfast_clock::host_monotonic() >= deadline => {
                    let text = format!("Failed to connect to '{}': {error}", options.address);
                    return Err(BlockError::Option(text));
                }
                Err(_) => std::thread::sleep(PAUSE),
            }
        };
        if !options.readonly && info.flags & transmission::READ_ONLY != 0 {
            return Err(BlockError::Option("request for write access denied".into()));
        }
        let min = info.block.map_or(1, |b| b.0);
        if !info.size.is_multiple_of(u64::from(min)) {
            return Err(BlockError::Format("export length is not multiple of minimum block size".into()));
        }
        Ok(Arc::new(Self {
            status: connection.context.is_some(),
            size: AtomicU64::new(info.size),
            pool: Mutex::new(Pool { idle: vec![connection], open: 1, ..Pool::default() }),
            returned: Condvar::new(),
            ranges: Arc::default(),
            options,
            info,
        }))
    }

    /// What the server said of the export when it was opened.
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    fn offers(&self, flag: u16) -> bool {
        self.info.flags & flag != 0
    }

    /// A connection for a request that began when requests had been given up `given_up` times.
    fn take(&self, given_up: u64) -> io::Result<Connection> {
        let most = if self.offers(transmission::MULTI_CONN) { CONNECTIONS } else { 1 };
        let mut pool = self.pool.lock();
        loop {
            if pool.given_up != given_up {
                return Err(os_error(libc::ECANCELED));
            }
            if let Some(connection) = pool.idle.pop() {
                pool.busy.push(Arc::clone(&connection.handle));
                return Ok(connection);
            }
            if pool.open < most {
                pool.open += 1;
                break;
            }
            self.returned.wait(&mut pool);
        }
        drop(pool);
        let opened = Connection::open(&self.options).and_then(|(connection, info)| {
            if info.flags != self.info.flags || info.block != self.info.block {
                return Err(garbage("the export is not what it was"));
            }
            self.size.store(info.size, Ordering::Release);
            Ok(connection)
        });
        let mut pool = self.pool.lock();
        match opened {
            Ok(connection) if pool.given_up == given_up => {
                pool.busy.push(Arc::clone(&connection.handle));
                Ok(connection)
            }
            other => {
                pool.open -= 1;
                drop(pool);
                self.returned.notify_one();
                other.and_then(|_| Err(os_error(libc::ECANCELED)))
            }
        }
    }

    /// Gives a connection back whose request is done, or lets it go if it is of no use any more.
    fn put_back(&self, connection: Connection, answered: bool, given_up: u64) {
        let mut pool = self.pool.lock();
        pool.is_done(&connection.handle);
        if answered && pool.given_up == given_up {
            pool.idle.push(connection);
        } else {
            pool.open -= 1;
        }
        drop(pool);
        self.returned.notify_one();
    }

    /// Carries out a request, on a new connection if one is lost and there is time for that.
    fn request(
        &self,
        (command, flags): (u16, u16),
        offset: u64,
        len: u64,
        payload: &[u8],
        into: &mut Answer<'_>,
    ) -> io::Result<()> {
        let len = u32::try_from(len).map_err(|_| os_error(libc::EINVAL))?;
        let request = Request { flags, command, cookie: 0, offset, len };
        let given_up = self.pool.lock().given_up;
        let mut deadline = None;
        loop {
            let lost = match self.take(given_up) {
                Ok(mut connection) => {
                    let answer = connection.call(request, payload, into);
                    self.put_back(connection, answer.is_ok(), given_up);
                    match answer {
                        Ok(answer) => return answer,
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            if self.pool.lock().given_up != given_up {
                return Err(os_error(libc::ECANCELED));
            }
            let now = holdfast_clock::host_monotonic();
            let until = *deadline.get_or_insert(now.saturating_add(seconds(self.options.reconnect_delay)));
            if now >= until {
                tracing::warn!(address = %self.options.address, %lost, "the connection to the NBD server is lost");
                return Err(os_error(libc::EIO));
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Least and most bytes of a request that moves data.
    fn limits(&self) -> (u64, u64) {
        let (min, _, max) = self.info.block.unwrap_or((1, 4096, MAX_REQUEST));
        let min = u64::from(min);
        let max = u64::from(max.min(MAX_REQUEST));
        (min, (max - max % min).max(min))
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).ok_or_else(|| os_error(libc::EINVAL))?;
        if end > self.size() { Err(os_error(libc::EIO)) } else { Ok(()) }
    }

    fn writable(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.is_readonly() { Err(os_error(libc::EROFS)) } else { self.check(offset, len) }
    }

    /// The whole blocks around a range.
    fn window(&self, offset: u64, len: u64) -> (u64, u64) {
        let (min, _) = self.limits();
        let start = offset - offset % min;
        (start, (offset + len).next_multiple_of(min) - start)
    }

    fn read_blocks(&self, mut offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (_, max) = self.limits();
        for part in buf.chunks_mut(max as usize) {
            let len = part.len() as u64;
            self.request((command::READ, 0), offset, len, &[], &mut Answer::Read(part))?;
            offset += len;
        }
        Ok(())
    }

    fn write_blocks(&self, mut offset: u64, buf: &[u8]) -> io::Result<()> {
        let (_, max) = self.limits();
        for part in buf.chunks(max as usize) {
            self.request((command::WRITE, 0), offset, part.len() as u64, part, &mut Answer::Nothing)?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    fn quiet(&self, what: (u16, u16), mut offset: u64, mut len: u64) -> io::Result<()> {
        while len != 0 {
            let n = len.min(MAX_QUIET);
            self.request(what, offset, n, &[], &mut Answer::Nothing)?;
            offset += n;
            len -= n;
        }
        Ok(())
    }
}

impl BlockNode for Nbd {
    fn driver(&self) -> &'static str {
        "nbd"
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn is_readonly(&self) -> bool {
        self.options.readonly || self.offers(transmission::READ_ONLY)
    }

    /// What is past the end reads as zeroes, as of files.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let there = self.size().saturating_sub(offset).min(buf.len() as u64);
        let (buf, past) = buf.split_at_mut(there as usize);
        past.fill(0);
        if buf.is_empty() {
            return Ok(());
        }
        let (start, len) = self.window(offset, buf.len() as u64);
        if start == offset && len == buf.len() as u64 {
            return self.read_blocks(offset, buf);
        }
        let mut whole = vec![0; len as usize];
        self.read_blocks(start, &mut whole)?;
        let skip = (offset - start) as usize;
        buf.copy_from_slice(whole.get(skip..skip + buf.len()).unwrap_or_default());
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.writable(offset, buf.len() as u64)?;
        let (start, len) = self.window(offset, buf.len() as u64);
        let aligned = start == offset && len == buf.len() as u64;
        if aligned && self.limits().0 == 1 {
            return self.write_blocks(offset, buf);
        }
        let _guard = self.ranges.lock(start, start + len, !aligned);
        if aligned {
            return self.write_blocks(offset, buf);
        }
        let mut whole = vec![0; len as usize];
        self.read_blocks(start, &mut whole)?;
        let skip = (offset - start) as usize;
        if let Some(place) = whole.get_mut(skip..skip + buf.len()) {
            place.copy_from_slice(buf);
        }
        self.write_blocks(start, &whole)
    }

    fn flush(&self) -> io::Result<()> {
        if self.is_readonly() || !self.offers(transmission::FLUSH) {
            return Ok(());
        }
        self.request((command::FLUSH, 0), 0, 0, &[], &mut Answer::Nothing)
    }

    fn cancel_in_flight(&self) {
        let mut pool = self.pool.lock();
        pool.given_up += 1;
        pool.busy.iter().for_each(|socket| socket.shut_down());
        drop(pool);
        self.returned.notify_all();
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.writable(offset, len)?;
        let (min, _) = self.limits();
        let (from, to) = (offset.next_multiple_of(min), offset + len - (offset + len) % min);
        if !self.offers(transmission::TRIM) || to <= from {
            return Ok(());
        }
        self.quiet((command::TRIM, 0), from, to - from)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.writable(offset, len)?;
        let (start, whole) = self.window(offset, len);
        if self.offers(transmission::WRITE_ZEROES) && start == offset && whole == len {
            let flags = if unmap { 0 } else { command::FLAG_NO_HOLE };
            return self.quiet((command::WRITE_ZEROES, flags), offset, len);
        }
        let zeroes = vec![0; len.min(1 << 20) as usize];
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let n = (end - at).min(1 << 20);
            self.write_at(at, zeroes.get(..n as usize).unwrap_or_default())?;
            at += n;
        }
        Ok(())
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        let len = len.min(self.size().saturating_sub(offset));
        let at = Some(offset);
        let all = Extent { len, allocated: true, data: true, zero: false, compressed: false, offset: at };
        let (min, _) = self.limits();
        if !self.status || len < min || !offset.is_multiple_of(min) {
            return Ok(all);
        }
        let asked = len.min(MAX_QUIET);
        let mut extent = None;
        let what = (command::BLOCK_STATUS, command::FLAG_REQ_ONE);
        self.request(what, offset, asked - asked % min, &[], &mut Answer::Extent(&mut extent))?;
        let Some((length, flags)) = extent else { return Err(os_error(libc::EIO)) };
        Ok(Extent {
            len: u64::from(length).min(len),
            data: flags & allocation::HOLE == 0,
            zero: flags & allocation::ZERO != 0,
            ..all
        })
    }

    fn truncate(&self, size: u64, _preallocation: Preallocation) -> io::Result<()> {
        // Growing within what the server has is what formats do that write up to their end. It may have more than it had.
        let fits = |this: &Self| size <= this.size() && !this.is_readonly();
        if fits(self) || (self.refresh_size().is_ok() && fits(self)) {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::Unsupported, "Cannot resize NBD nodes"))
    }

    fn refresh_size(&self) -> io::Result<()> {
        let (connection, info) = Connection::open(&self.options)?;
        self.size.store(info.size, Ordering::Release);
        drop(connection);
        Ok(())
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        for mut connection in self.pool.lock().idle.drain(..) {
            let bye = Request { flags: 0, command: command::DISCONNECT, cookie: 0, offset: 0, len: 0 };
            // The server may be gone already.
            let _ = connection.send(&bye, &[]);
        }
    }
}
