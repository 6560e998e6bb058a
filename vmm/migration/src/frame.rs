//! The frames of the protocol.
//!
//! A connection begins with a [`Preamble`] each way. After it there are frames only: a header of 24 bytes (kind, length of
//! what follows, an argument, a checksum over all), little endian, then the payload. What a kind's payload may be at most is
//! checked before any memory is taken for it.

use std::io::{self, Read, Write};

use crate::MigrationError;
use crate::checksum::checksum;

/// Version of the protocol that is spoken.
pub const VERSION: u16 = 1;
/// The oldest version that is understood.
pub const OLDEST: u16 = 1;

const MAGIC: [u8; 8] = *b"HOLDFAST";

/// Length of a [`Preamble`] in bytes.
pub const PREAMBLE: usize = 32;
/// Length of a frame's header in bytes.
pub const HEADER: usize = 24;
/// What `Accept` carries if the target answers [`Kind::Sync`].
pub const SYNC: &[u8] = b"sync";
/// The same if it takes [`Kind::Sparse`].
pub const SPARSE: &[u8] = b"sparse";
/// The same if it serves the images of [mirrored disks](crate::Plan::mirror) over NBD, as the plan [asks](crate::Plan::nbd).
pub const NBD: &[u8] = b"nbd";
/// The same if it takes [`Kind::Code`].
pub const CODE: &[u8] = b"code";
/// All of them, separated by spaces.
pub const KNOWN: &[u8] = b"sync sparse nbd code";
/// Most bytes of RAM in one frame.
pub const MAX_RAM: usize = 1 << 20;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The first one: plan, RAM, state, hand-over.
    Main,
    /// RAM only.
    Ram,
    /// Pages that the guest waits for (post-copy).
    Priority,
    /// Goes on with a post-copy migration whose connections were lost.
    Recover,
    /// A disk's contents: NBD from its first byte behind the preamble on, served by the target.
    Disk,
}

impl Role {
    const ALL: [Self; 5] = [Self::Main, Self::Ram, Self::Priority, Self::Recover, Self::Disk];
}

/// How a connection begins, in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// What the connection is for.
    pub role: Role,
    /// The migration that it belongs to.
    pub session: [u8; 16],
}

impl Preamble {
    /// Its bytes.
    pub fn encode(&self) -> [u8; PREAMBLE] {
        let mut bytes = [0; PREAMBLE];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&OLDEST.to_le_bytes());
        let role = Role::ALL.iter().position(|r| *r == self.role).unwrap_or_default();
        bytes[12..14].copy_from_slice(&(role as u16).to_le_bytes());
        bytes[16..].copy_from_slice(&self.session);
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`MigrationError::Protocol`] if it is something else, [`MigrationError::Version`].
    pub fn decode(bytes: &[u8; PREAMBLE]) -> Result<Self, MigrationError> {
        if bytes[..8] != MAGIC {
            return Err(MigrationError::Protocol(
                "the other side speaks no migration protocol of Holdfast".into(),
            ));
        }
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let (theirs, theirs_oldest) = (short(8), short(10));
        check_version(theirs, theirs_oldest)?;
        let role = Role::ALL.get(usize::from(short(12))).copied();
        let role =
            role.ok_or_else(|| MigrationError::Protocol(format!("connection of role {}", short(12))))?;
        let mut session = [0; 16];
        session.copy_from_slice(&bytes[16..]);
        Ok(Self { role, session })
    }
}

/// Checks that what speaks version `theirs`, and everything from `theirs_oldest` on, can be understood.
///
/// # Errors
/// [`MigrationError::Version`].
pub(crate) fn check_version(theirs: u16, theirs_oldest: u16) -> Result<(), MigrationError> {
    if theirs < OLDEST || theirs_oldest > VERSION {
        let (ours, ours_oldest) = (VERSION, OLDEST);
        return Err(MigrationError::Version { theirs, theirs_oldest, ours, ours_oldest });
    }
    Ok(())
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $limit:expr;)*) => {
        /// What a frame is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u16)]
        pub enum Kind {
            $($(#[$doc])* $name = $code,)*
        }

        impl Kind {
            fn from_code(code: u16) -> Option<Self> {
                match code {
                    $($code => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Most bytes of its payload.
            pub fn limit(self) -> usize {
                match self {
                    $(Self::$name => $limit,)*
                }
            }
        }
    };
}

const TEXT: usize = 64 << 10;

kinds! {
    /// Source: its [`Plan`](crate::Plan), as JSON.
    Hello = 1, 16 << 20;
    /// Target: the plan fits and the VM is built. The argument is the size of its largest host pages, in bytes: pages that follow
    /// the guest are to be whole ones. The payload is what else the target understands: [`SYNC`].
    Accept = 2, TEXT;
    /// Either: why it gives up, as text.
    Abort = 3, TEXT;
    /// Source: RAM; the argument is its guest-physical address.
    Ram = 4, MAX_RAM;
    /// Source: zeroes; the argument is their address, the payload their length (8 bytes).
    Zero = 5, 8;
    /// Source: RAM compressed with zstd, behind its length (4 bytes).
    Zstd = 6, MAX_RAM + 4096;
    /// Source: nothing else comes on this connection before the state.
    End = 7, 0;
    /// Source: vCPUs and devices, as JSON.
    State = 8, 1 << 30;
    /// Target: it could run the guest at once.
    Ready = 9, 0;
    /// Source: it has given the guest up.
    Go = 10, 0;
    /// Target: it runs the guest from now on.
    Done = 11, 0;
    /// Source: which pages come later (post-copy): runs of address and length, 16 bytes each.
    Missing = 12, 256 << 20;
    /// Target: pages that it waits for; as above.
    Request = 13, TEXT;
    /// Target: all pages are there.
    Complete = 14, 0;
    /// Source: bytes of a disk that does not come over NBD; the argument is their offset, the payload the disk's number in the plan (4 bytes) and the bytes.
    Disk = 15, MAX_RAM + 4;
    /// Source: zeroes of a disk; the argument is their offset, the payload the disk's number (4 bytes) and their length (8 bytes).
    DiskZero = 16, 12;
    /// Source: is everything before this in RAM? Only if `Accept` said [`SYNC`].
    Sync = 17, 0;
    /// Target: it is.
    Synced = 18, 0;
    /// Source: RAM without its empty lines; the argument is its guest-physical address. Each page is a mask of its 64 lines of 64 bytes
    /// (8 bytes, bit 0 for the first) and those whose bit is set; the others are zeroes. Only if `Accept` said `sparse`.
    Sparse = 19, MAX_RAM + MAX_RAM / 512;
    /// Source: nothing more comes for disks over NBD; the checksums of what came, 8 bytes each, in the plan's order.
    DiskSums = 20, TEXT;
    /// Source: which code the guest runs, as the VMs at both ends understand it: the target may prepare it. Only if `Accept` said [`CODE`].
    Code = 21, 256 << 10;
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// Its argument.
    pub arg: u64,
    /// Bytes that follow.
    pub len: usize,
    sum: u64,
    head: [u8; 16],
}

fn head(kind: Kind, len: usize, arg: u64) -> [u8; 16] {
    let mut head = [0; 16];
    head[..2].copy_from_slice(&(kind as u16).to_le_bytes());
    head[4..8].copy_from_slice(&(len as u32).to_le_bytes());
    head[8..].copy_from_slice(&arg.to_le_bytes());
    head
}

/// The header of a frame with this payload.
pub fn header(kind: Kind, arg: u64, payload: &[u8]) -> [u8; HEADER] {
    let head = head(kind, payload.len(), arg);
    let mut bytes = [0; HEADER];
    bytes[..16].copy_from_slice(&head);
    bytes[16..].copy_from_slice(&checksum(&head, payload).to_le_bytes());
    bytes
}

/// Appends a whole frame to `out`.
pub fn append(out: &mut Vec<u8>, kind: Kind, arg: u64, payload: &[u8]) {
    out.extend_from_slice(&header(kind, arg, payload));
    out.extend_from_slice(payload);
}

/// Writes a frame.
///
/// # Errors
/// The host's; `InvalidInput` if the payload is longer than its kind may be.
pub fn write(to: &mut impl Write, kind: Kind, arg: u64, payload: &[u8]) -> io::Result<()> {
    if payload.len() > kind.limit() {
        let text = format!("{} bytes are too many for a {kind:?} frame", payload.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    // In one piece: two would be two segments and two wake-ups.
    let mut frame = Vec::with_capacity(HEADER + payload.len());
    append(&mut frame, kind, arg, payload);
    to.write_all(&frame)?;
    to.flush()
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

impl Header {
    /// Reads a header out of its bytes.
    ///
    /// # Errors
    /// `InvalidData` for an unknown kind or an impossible length.
    pub fn decode(bytes: &[u8; HEADER]) -> io::Result<Self> {
        let mut head = [0; 16];
        head.copy_from_slice(&bytes[..16]);
        let mut sum = [0; 8];
        sum.copy_from_slice(&bytes[16..]);
        let code = u16::from_le_bytes([head[0], head[1]]);
        let kind =
            Kind::from_code(code).ok_or_else(|| invalid(format!("there is no section of kind {code}")))?;
        let len = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if len > kind.limit() || head[2..4] != [0, 0] {
            return Err(invalid(format!("a {kind:?} section of {len} bytes")));
        }
        let arg = head[8..].iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
        Ok(Self { kind, arg, len, sum: u64::from_le_bytes(sum), head })
    }

    /// What goes into the checksum before the payload.
    pub(crate) fn head(&self) -> &[u8; 16] {
        &self.head
    }

    /// Fails with `InvalidData` if `payload` is not what was sent.
    pub(crate) fn check(&self, payload: &[u8]) -> io::Result<()> {
        self.check_sum(checksum(&self.head, payload))
    }

    /// The same for the checksum of what came.
    pub(crate) fn check_sum(&self, sum: u64) -> io::Result<()> {
        if sum == self.sum {
            return Ok(());
        }
        Err(invalid(format!("the checksum of a {:?} section is wrong", self.kind)))
    }
}

/// Reads the next frame; its payload goes into `payload`, whose memory is used again.
///
/// # Errors
/// The host's; `UnexpectedEof` at the end of the stream; `InvalidData` for what is no frame.
pub fn read(from: &mut impl Read, payload: &mut Vec<u8>) -> io::Result<Header> {
    let mut bytes = [0; HEADER];
    from.read_exact(&mut bytes)?;
    let header = Header::decode(&bytes)?;
    if header.len <= MAX_RAM + 4096 {
        // What it held is overwritten, which is cheaper than to clear it first.
        payload.resize(header.len, 0);
        from.read_exact(payload)?;
    } else {
        payload.clear();
        // Long payloads take memory as they come, not as they are announced.
        if from.take(header.len as u64).read_to_end(payload)? < header.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    header.check(payload)?;
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_and_alterations_are_seen() {
        let mut stream = Vec::new();
        append(&mut stream, Kind::Ram, 0x8000_0000, &[5; 4096]);
        append(&mut stream, Kind::End, 0, &[]);
        let (mut from, mut payload) = (stream.as_slice(), Vec::new());
        let ram = read(&mut from, &mut payload).expect("a frame");
        assert_eq!((ram.kind, ram.arg, payload.len()), (Kind::Ram, 0x8000_0000, 4096));
        assert_eq!(read(&mut from, &mut payload).expect("a frame").kind, Kind::End);
        assert_eq!(read(&mut from, &mut payload).expect_err("over").kind(), io::ErrorKind::UnexpectedEof);
        for at in (0..HEADER).chain([HEADER, HEADER + 4095]) {
            let mut altered = stream.clone();
            altered[at] ^= 0x40;
            read(&mut altered.as_slice(), &mut payload).expect_err("altered");
        }
        for cut in [0, 1, HEADER - 1, HEADER, HEADER + 100] {
            read(&mut &stream[..cut], &mut payload).expect_err("cut");
        }
    }

    #[test]
    fn a_length_that_is_announced_takes_no_memory() {
        let mut bytes = header(Kind::State, 0, &[]);
        bytes[4..8].copy_from_slice(&(1u32 << 30).to_le_bytes());
        let mut payload = Vec::new();
        read(&mut &bytes[..], &mut payload).expect_err("nothing follows");
        assert!(payload.capacity() < 1 << 20);
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(
            read(&mut &bytes[..], &mut payload).expect_err("too long").kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn preambles_say_who_is_there() {
        let preamble = Preamble { role: Role::Priority, session: [9; 16] };
        let bytes = preamble.encode();
        assert_eq!(Preamble::decode(&bytes).expect("ours"), preamble);
        let mut newer = bytes;
        (newer[8], newer[10]) = (9, 9);
        assert!(matches!(Preamble::decode(&newer), Err(MigrationError::Version { theirs: 9, .. })));
        let mut compatible = bytes;
        compatible[8] = 9;
        Preamble::decode(&compatible).expect("a newer one that still speaks ours");
        assert!(matches!(Preamble::decode(&[0; PREAMBLE]), Err(MigrationError::Protocol(_))));
    }
}
