//! Disks that the target has no other way to: their contents go along, over the first connection.
//!
//! All of a disk is sent first, then in passes what was written meanwhile, before RAM, behind it, and last when the guest stands. So the
//! target's images are exact in the moment in which the guest changes hands, and everything is as encrypted and as limited as RAM is.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use crate::control::{Control, TimeoutStrategy};
use crate::frame::{self, Header, Kind};
use crate::lanes::Limiter;
use crate::pages::is_zero;
use crate::source::Source;
use crate::target::Target;
use crate::{MigrationError, MirroredDisk, Stream};

/// Bytes that are read and sent at once.
const CHUNK: u64 = 256 << 10;
/// What may be left, in bytes, when RAM begins.
const ENOUGH: u64 = 4 << 20;
/// Passes before RAM begins whatever is left: a guest that writes faster than the connection gets no further by more.
const MAX_PASSES: u32 = 20;

/// Sends disks.
pub(crate) struct DiskSender<'a> {
    pub(crate) source: &'a dyn Source,
    pub(crate) control: &'a Arc<Control>,
    pub(crate) limiter: &'a Limiter,
    pub(crate) disks: &'a [MirroredDisk],
}

fn unreadable(source: Box<dyn std::error::Error + Send + Sync>) -> MigrationError {
    MigrationError::Vm { what: "a disk cannot be read", source }
}

impl DiskSender<'_> {
    /// Sends everything, then what was written meanwhile until little is left.
    pub(crate) fn begin(&self, main: &mut Stream) -> Result<(), MigrationError> {
        if self.disks.is_empty() {
            return Ok(());
        }
        self.source.log_disks(true).map_err(unreadable)?;
        for (disk, MirroredDisk { size, .. }) in self.disks.iter().enumerate() {
            self.send(disk, (0, *size), main)?;
        }
        for _ in 0..MAX_PASSES {
            if self.pass(main)? <= ENOUGH {
                break;
            }
        }
        Ok(())
    }

    /// Sends what was written since the last pass; returns how much that was, in bytes.
    pub(crate) fn pass(&self, main: &mut Stream) -> Result<u64, MigrationError> {
        let mut sent = 0;
        for disk in 0..self.disks.len() {
            for run in self.source.take_written(disk).map_err(unreadable)? {
                self.send(disk, run, main)?;
                sent += run.1;
            }
        }
        Ok(sent)
    }

    fn send(&self, disk: usize, (start, len): (u64, u64), main: &mut Stream) -> Result<(), MigrationError> {
        let index = (disk as u32).to_le_bytes();
        let mut buffer = vec![0; (CHUNK + 4) as usize];
        buffer[..4].copy_from_slice(&index);
        let end = start + len;
        let (mut at, mut zeroes) = (start, 0);
        while at < end {
            self.control.check()?;
            let parameters = self.control.parameters();
            let late = parameters.timeout.is_some_and(|limit| self.control.elapsed() >= limit);
            if late && parameters.strategy == TimeoutStrategy::Cancel {
                return Err(MigrationError::Timeout(parameters.timeout.unwrap_or_default().as_secs()));
            }
            let n = CHUNK.min(end - at);
            let frame = &mut buffer[..(n + 4) as usize];
            self.source.read_disk(disk, at, &mut frame[4..]).map_err(unreadable)?;
            if is_zero(&frame[4..]) {
                zeroes += n;
            } else {
                self.zero(&index, at - zeroes, zeroes, main)?;
                zeroes = 0;
                self.write(Kind::Disk, at, frame, main)?;
            }
            at += n;
        }
        self.zero(&index, at - zeroes, zeroes, main)
    }

    fn zero(&self, index: &[u8; 4], at: u64, len: u64, main: &mut Stream) -> Result<(), MigrationError> {
        if len == 0 {
            return Ok(());
        }
        self.write(Kind::DiskZero, at, &[&index[..], &len.to_le_bytes()].concat(), main)
    }

    fn write(&self, kind: Kind, at: u64, payload: &[u8], main: &mut Stream) -> Result<(), MigrationError> {
        let bytes = (frame::HEADER + payload.len()) as u64;
        self.limiter.admit(bytes, self.control)?;
        frame::write(main, kind, at, payload).map_err(MigrationError::broken("sending a disk"))?;
        self.control.counters.transferred.fetch_add(bytes, Relaxed);
        Ok(())
    }
}

/// Puts a frame of a disk where it belongs.
pub(crate) fn put(
    target: &mut dyn Target,
    disks: &[MirroredDisk],
    header: &Header,
    payload: &[u8],
) -> Result<(), MigrationError> {
    let wrong = || MigrationError::Protocol("a section of a disk that makes no sense".into());
    let (index, data) = payload.split_first_chunk::<4>().ok_or_else(wrong)?;
    let index = u32::from_le_bytes(*index) as usize;
    let size = disks.get(index).map(|d| d.size).ok_or_else(wrong)?;
    let within = |len: u64| header.arg.checked_add(len).is_some_and(|end| end <= size && len > 0);
    let done = if header.kind == Kind::DiskZero {
        let len = u64::from_le_bytes(data.try_into().map_err(|_| wrong())?);
        if !within(len) {
            return Err(wrong());
        }
        target.zero_disk(index, header.arg, len)
    } else {
        if !within(data.len() as u64) {
            return Err(wrong());
        }
        target.write_disk(index, header.arg, data)
    };
    done.map_err(|source| MigrationError::Vm { what: "a disk cannot be written", source })
}
