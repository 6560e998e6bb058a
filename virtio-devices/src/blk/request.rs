//! What a chain of the block device asks for.

use holdfast_block::SECTOR;
use vm_memory::ByteValued;

use super::{MAX_RANGE_SECTORS, MAX_RANGES};
use crate::queue::{Chain, QueueError, Segment, VirtQueue, slice_of, total_len};

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Bytes of the request's header.
const HEADER: u64 = 16;
/// The `unmap` flag of a range.
const UNMAP: u32 = 1;

/// A status that the driver is told (section 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

// SAFETY: plain integers without padding; any bytes are a valid value.
unsafe impl ByteValued for Header {}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct RawRange {
    sector: u64,
    sectors: u32,
    flags: u32,
}

// SAFETY: plain integers without padding; any bytes are a valid value.
unsafe impl ByteValued for RawRange {}

/// Part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) unmap: bool,
}

/// A request, checked as far as that is possible without the disk's contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    Read {
        offset: u64,
        data: Vec<Segment>,
    },
    Write {
        offset: u64,
        data: Vec<Segment>,
    },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    GetId {
        data: Vec<Segment>,
    },
    /// To be answered with this at once.
    Refuse(Status),
}

/// A parsed chain.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) action: Action,
    /// Where the status byte goes: one byte.
    pub(super) status: Vec<Segment>,
}

/// Byte range of `len` bytes at `sector`, if it lies on a disk of `capacity` sectors.
fn range(sector: u64, len: u64, capacity: u64) -> Option<u64> {
    let end = sector.checked_add(len / SECTOR)?;
    (len.is_multiple_of(SECTOR) && end <= capacity).then(|| sector * SECTOR)
}

/// Reads the request in `chain`.
///
/// # Errors
/// [`QueueError`] if there is no header or no room for the status: then there is no way to answer.
pub(super) fn parse(queue: &VirtQueue, chain: &Chain, capacity: u64) -> Result<Parsed, QueueError> {
    let mut reader = queue.reader(chain);
    let header: Header = reader.read_obj()?;
    let room = total_len(&chain.writable);
    let Some(writable) = room.checked_sub(1) else {
        return Err(QueueError::Short { queue: queue.index() });
    };
    let status = slice_of(&chain.writable, writable, 1);
    let readable = total_len(&chain.readable) - HEADER;
    let sector = u64::from_le(header.sector);
    let action = match u32::from_le(header.kind) {
        T_IN => match range(sector, writable, capacity) {
            Some(offset) => Action::Read { offset, data: slice_of(&chain.writable, 0, writable) },
            None => Action::Refuse(Status::IoError),
        },
        T_OUT => match range(sector, readable, capacity) {
            Some(offset) => Action::Write { offset, data: slice_of(&chain.readable, HEADER, readable) },
            None => Action::Refuse(Status::IoError),
        },
        T_FLUSH => Action::Flush,
        T_GET_ID => Action::GetId { data: slice_of(&chain.writable, 0, writable) },
        kind @ (T_DISCARD | T_WRITE_ZEROES) => {
            let count = readable / 16;
            if !readable.is_multiple_of(16) || count == 0 || count > u64::from(MAX_RANGES) {
                Action::Refuse(Status::IoError)
            } else {
                let mut ranges = Vec::with_capacity(count as usize);
                for _ in 0..count {
                    ranges.push(reader.read_obj::<RawRange>()?);
                }
                check_ranges(kind, &ranges, capacity)
            }
        }
        _ => Action::Refuse(Status::Unsupported),
    };
    Ok(Parsed { action, status })
}

fn check_ranges(kind: u32, raw: &[RawRange], capacity: u64) -> Action {
    let mut ranges = Vec::with_capacity(raw.len());
    for r in raw {
        let (flags, sectors) = (u32::from_le(r.flags), u32::from_le(r.sectors));
        // Section 5.2.6.2: unknown flags, and unmap for a discard, are unsupported.
        if flags & !UNMAP != 0 || (kind == T_DISCARD && flags != 0) {
            return Action::Refuse(Status::Unsupported);
        }
        let len = u64::from(sectors) * SECTOR;
        match range(u64::from_le(r.sector), len, capacity) {
            Some(offset) if sectors <= MAX_RANGE_SECTORS => {
                ranges.push(Range { offset, len, unmap: flags & UNMAP != 0 });
            }
            _ => return Action::Refuse(Status::IoError),
        }
    }
    if kind == T_DISCARD { Action::Discard(ranges) } else { Action::WriteZeroes(ranges) }
}
