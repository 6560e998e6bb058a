//! Numbers of the protocol, and messages to and from bytes.

use std::io::{self, Read};

/// First words of a server: `NBDMAGIC`.
pub const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second words of a newstyle server, and first of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First words of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First words of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First words of a simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// First words of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Longest string in the protocol, in bytes.
pub const MAX_STRING: usize = 4096;
/// Longest option, in bytes: some strings.
pub const MAX_OPTION: u32 = 64 << 10;
/// Longest read or write, in bytes.
pub const MAX_REQUEST: u32 = 32 << 20;

/// Handshake flags.
pub mod handshake {
    /// Options can be refused without hanging up.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zeroes behind the answer to `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 2;
}

/// Options.
pub mod option {
    /// Ends the negotiation; errors hang up.
    pub const EXPORT_NAME: u32 = 1;
    /// Hangs up.
    pub const ABORT: u32 = 2;
    /// Names of exports.
    pub const LIST: u32 = 3;
    /// Goes on under TLS.
    pub const STARTTLS: u32 = 5;
    /// What an export is.
    pub const INFO: u32 = 6;
    /// Ends the negotiation.
    pub const GO: u32 = 7;
    /// Replies in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Names of metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// A piece of information on an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Marks errors.
    pub const ERROR: u32 = 1 << 31;
    /// The option is not known.
    pub const UNSUPPORTED: u32 = ERROR + 1;
    /// Not allowed.
    pub const POLICY: u32 = ERROR + 2;
    /// Malformed.
    pub const INVALID: u32 = ERROR + 3;
    /// Only under TLS.
    pub const TLS_REQUIRED: u32 = ERROR + 5;
    /// No such export.
    pub const UNKNOWN: u32 = ERROR + 6;
    /// Too long.
    pub const TOO_BIG: u32 = ERROR + 9;
}

/// Kinds of information on an export.
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// The name.
    pub const NAME: u16 = 1;
    /// Words for people.
    pub const DESCRIPTION: u16 = 2;
    /// Least, best and most bytes of a request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Flags of an export.
pub mod transmission {
    /// The others mean something.
    pub const HAS_FLAGS: u16 = 1;
    /// No writes.
    pub const READ_ONLY: u16 = 2;
    /// There is `FLUSH`.
    pub const FLUSH: u16 = 4;
    /// There is the flag `FUA`.
    pub const FUA: u16 = 8;
    /// There is `TRIM`.
    pub const TRIM: u16 = 32;
    /// There is `WRITE_ZEROES`.
    pub const WRITE_ZEROES: u16 = 64;
    /// Reads may be asked for in one chunk.
    pub const DF: u16 = 128;
    /// A flush holds for all connections.
    pub const MULTI_CONN: u16 = 256;
    /// There is `CACHE`.
    pub const CACHE: u16 = 1024;
    /// All names, in the order of their bits.
    pub const NAMES: [(u16, &str); 10] = [
        (READ_ONLY, "readonly"),
        (FLUSH, "flush"),
        (FUA, "fua"),
        (16, "rotational"),
        (TRIM, "trim"),
        (WRITE_ZEROES, "zeroes"),
        (DF, "df"),
        (MULTI_CONN, "multi"),
        (512, "resize"),
        (CACHE, "cache"),
    ];
}

/// Requests.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Hang up.
    pub const DISCONNECT: u16 = 2;
    /// Make durable.
    pub const FLUSH: u16 = 3;
    /// Not needed any more.
    pub const TRIM: u16 = 4;
    /// Will be read.
    pub const CACHE: u16 = 5;
    /// Zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Metadata.
    pub const BLOCK_STATUS: u16 = 7;
    /// Flag: durable before the reply.
    pub const FLAG_FUA: u16 = 1;
    /// Flag: zeroes keep their space.
    pub const FLAG_NO_HOLE: u16 = 2;
    /// Flag: one chunk.
    pub const FLAG_DF: u16 = 4;
    /// Flag: one extent.
    pub const FLAG_REQ_ONE: u16 = 8;
}

/// Types of chunks.
pub mod chunk {
    /// Flag: the last of the reply.
    pub const DONE: u16 = 1;
    /// Nothing.
    pub const NONE: u16 = 0;
    /// Bytes.
    pub const DATA: u16 = 1;
    /// Zeroes.
    pub const HOLE: u16 = 2;
    /// Extents of a metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// Marks errors.
    pub const ERROR: u16 = 1 << 15;
    /// An error of the whole request.
    pub const ERROR_WHOLE: u16 = ERROR + 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = ERROR + 2;
}

/// Extent flags of `base:allocation`.
pub mod allocation {
    /// No space is taken.
    pub const HOLE: u32 = 1;
    /// It reads as zeroes.
    pub const ZERO: u32 = 2;
}

/// The error number of the protocol for one of the host's.
pub fn error_number(error: &io::Error) -> u32 {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EROFS | libc::EACCES) => 1,
        Some(libc::ENOMEM) => 12,
        Some(libc::EINVAL) => 22,
        Some(libc::ENOSPC | libc::EFBIG | libc::EDQUOT) => 28,
        Some(libc::EOVERFLOW) => 75,
        Some(libc::ENOTSUP) => 95,
        Some(libc::ESHUTDOWN) => 108,
        _ => 5,
    }
}

/// The host's error for a number of the protocol.
pub fn host_error(number: u32) -> io::Error {
    io::Error::from_raw_os_error(match number {
        1 => libc::EPERM,
        12 => libc::ENOMEM,
        22 => libc::EINVAL,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::ENOTSUP,
        108 => libc::ESHUTDOWN,
        _ => libc::EIO,
    })
}

/// What the other side said makes no sense.
pub fn garbage(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("NBD protocol: {what}"))
}

pub(super) fn bytes<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut b = [0; N];
    from.read_exact(&mut b)?;
    Ok(b)
}

pub(super) fn u16_from(from: &mut impl Read) -> io::Result<u16> {
    bytes(from).map(u16::from_be_bytes)
}

pub(super) fn u32_from(from: &mut impl Read) -> io::Result<u32> {
    bytes(from).map(u32::from_be_bytes)
}

pub(super) fn u64_from(from: &mut impl Read) -> io::Result<u64> {
    bytes(from).map(u64::from_be_bytes)
}

/// Bytes of a known length, at most `most`.
pub(super) fn vec_from(from: &mut impl Read, len: usize, most: usize) -> io::Result<Vec<u8>> {
    if len > most {
        return Err(garbage(&format!("{len} bytes are too many here")));
    }
    let mut b = vec![0; len];
    from.read_exact(&mut b)?;
    Ok(b)
}

/// A string with its length before it.
pub(super) fn string_from(from: &mut &[u8]) -> io::Result<String> {
    let len = u32_from(from)? as usize;
    let text = vec_from(from, len, MAX_STRING)?;
    String::from_utf8(text).map_err(|_| garbage("a name that is not UTF-8"))
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// See [`command`].
    pub flags: u16,
    /// See [`command`].
    pub command: u16,
    /// Comes back with the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

impl Request {
    /// The request as bytes.
    pub fn to_bytes(self) -> [u8; 28] {
        let mut out = [0; 28];
        let parts: [&[u8]; 6] = [
            &REQUEST_MAGIC.to_be_bytes(),
            &self.flags.to_be_bytes(),
            &self.command.to_be_bytes(),
            &self.cookie.to_be_bytes(),
            &self.offset.to_be_bytes(),
            &self.len.to_be_bytes(),
        ];
        out.iter_mut().zip(parts.concat()).for_each(|(o, b)| *o = b);
        out
    }

    /// Reads a request.
    ///
    /// # Errors
    /// The connection's, or that it is none.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let all: [u8; 28] = bytes(from)?;
        let mut b = all.as_slice();
        if u32_from(&mut b)? != REQUEST_MAGIC {
            return Err(garbage("a request without its magic number"));
        }
        Ok(Self {
            flags: u16_from(&mut b)?,
            command: u16_from(&mut b)?,
            cookie: u64_from(&mut b)?,
            offset: u64_from(&mut b)?,
            len: u32_from(&mut b)?,
        })
    }
}

/// The start of a chunk.
pub(super) fn chunk_header(flags: u16, kind: u16, cookie: u64, len: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(20 + len as usize);
    out.extend_from_slice(&CHUNK_MAGIC.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out
}
