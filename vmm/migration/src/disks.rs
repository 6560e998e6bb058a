//! Disks that the target has no other way to: their contents go along.
//!
//! All of a disk is sent first, then in passes what was written meanwhile, before RAM, behind it, and last when the guest stands. So the
//! target's images are exact in the moment in which the guest changes hands. They go over NBD, each disk on a connection of its own to a
//! [server](crate::images) at the target; a target that does not know that, or that has one connection only, gets them as sections of
//! the first connection. Everything is as encrypted and as limited as RAM is.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use holdfast_block::copy::{CHUNK, Ends, copy};
use holdfast_block::nbd::{Writer, WriterError};

use crate::control::{Control, TimeoutStrategy};
use crate::frame::{self, Kind};
use crate::images::tally;
use crate::lanes::Limiter;
use crate::source::Source;
use crate::{MigrationError, MirroredDisk, Stream};

/// What may be written without having to be durable, in bytes: making it so is not to take longer than a peer may be silent.
const LOOSE: u64 = 1 << 30;
/// What may be left, in bytes, when RAM begins.
const ENOUGH: u64 = 4 << 20;
/// Passes before RAM begins whatever is left: a guest that writes faster than the connection gets no further by more.
const MAX_PASSES: u32 = 20;

/// An image at the target that is written over NBD.
pub(crate) struct Remote {
    writer: Writer,
    id: String,
    /// Of all that was written; see [`tally`].
    sum: u64,
    /// Bytes written since the last flush.
    loose: u64,
}

/// What the NBD server's answer, or its silence, means for the migration.
fn failed(id: &str, what: &'static str) -> impl FnOnce(WriterError) -> MigrationError {
    move |error| match error {
        WriterError::Lost(source) => MigrationError::broken(what)(source),
        WriterError::Refused(source) => {
            let reason = format!("disk `{id}` cannot be written there: {source}");
            MigrationError::Refused { side: "destination", reason }
        }
    }
}

const SENDING: &str = "sending a disk";

impl Remote {
    /// Asks the NBD server at the other end of `stream` for the image of `disk`.
    pub(crate) fn open(stream: Stream, disk: &MirroredDisk) -> Result<Self, MigrationError> {
        let MirroredDisk { id, size, .. } = disk;
        let opened = Writer::over(stream.into(), id);
        let writer = opened.map_err(failed(id, "asking for the image of a disk"))?;
        let there = writer.info().size;
        if there != *size {
            let text = format!("disk `{id}` has {size} bytes here, {there} at the destination");
            return Err(MigrationError::Differs(text));
        }
        Ok(Self { writer, id: id.clone(), sum: 0, loose: 0 })
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Result<(), MigrationError> {
        self.sum = self.sum.wrapping_add(tally(at, data.len() as u64, data));
        self.writer.write(at, data).map_err(failed(&self.id, SENDING))?;
        self.loose += data.len() as u64;
        if self.loose >= LOOSE { self.flush() } else { Ok(()) }
    }

    fn zero(&mut self, at: u64, len: u64) -> Result<(), MigrationError> {
        self.sum = self.sum.wrapping_add(tally(at, len, &[]));
        self.writer.write_zeroes(at, len).map_err(failed(&self.id, SENDING))
    }

    fn flush(&mut self) -> Result<(), MigrationError> {
        self.loose = 0;
        self.writer.flush().map_err(failed(&self.id, "waiting for a disk to be written"))
    }
}

/// How disks go over.
pub(crate) enum Way {
    /// As sections of the first connection.
    Sections,
    /// Over NBD, in the plan's order.
    Nbd(Vec<Remote>),
}

/// Sends disks.
pub(crate) struct DiskSender<'a> {
    pub(crate) source: &'a dyn Source,
    pub(crate) control: &'a Arc<Control>,
    pub(crate) limiter: &'a Limiter,
    pub(crate) disks: &'a [MirroredDisk],
    pub(crate) way: Way,
}

fn unreadable(source: Box<dyn std::error::Error + Send + Sync>) -> MigrationError {
    MigrationError::Vm { what: "a disk cannot be read", source }
}

fn missing() -> MigrationError {
    MigrationError::Protocol("a disk without its connection".into())
}

impl DiskSender<'_> {
    /// Sends everything, then what was written meanwhile until little is left.
    pub(crate) fn begin(&mut self, main: &mut Stream) -> Result<(), MigrationError> {
        if self.disks.is_empty() {
            return Ok(());
        }
        self.source.log_disks(true).map_err(unreadable)?;
        for (disk, MirroredDisk { size, .. }) in self.disks.iter().enumerate() {
            self.send(disk, (0, *size), main)?;
        }
        self.settle()?;
        for _ in 0..MAX_PASSES {
            if self.pass(main)? <= ENOUGH {
                break;
            }
        }
        Ok(())
    }

    /// Sends what was written since the last pass, and over NBD waits until it is durable; returns how much that was, in bytes.
    pub(crate) fn pass(&mut self, main: &mut Stream) -> Result<u64, MigrationError> {
        let mut sent = 0;
        for disk in 0..self.disks.len() {
            for run in self.source.take_written(disk).map_err(unreadable)? {
                self.send(disk, run, main)?;
                sent += run.1;
            }
        }
        self.settle()?;
        Ok(sent)
    }

    /// Nothing more comes: says what all of it was.
    pub(crate) fn end(&mut self, main: &mut Stream) -> Result<(), MigrationError> {
        let Way::Nbd(remotes) = &mut self.way else { return Ok(()) };
        if remotes.is_empty() {
            return Ok(());
        }
        let sums: Vec<u8> = remotes.iter().flat_map(|remote| remote.sum.to_le_bytes()).collect();
        for Remote { writer, id, .. } in remotes.drain(..) {
            writer.end().map_err(failed(&id, SENDING))?;
        }
        frame::write(main, Kind::DiskSums, 0, &sums).map_err(MigrationError::broken(SENDING))
    }

    /// No newer contents may overtake what is under way.
    fn settle(&mut self) -> Result<(), MigrationError> {
        match &mut self.way {
            Way::Sections => Ok(()),
            Way::Nbd(remotes) => remotes.iter_mut().try_for_each(Remote::flush),
        }
    }

    fn send(&mut self, disk: usize, run: (u64, u64), main: &mut Stream) -> Result<(), MigrationError> {
        copy(&mut OneDisk { sender: self, disk, main }, run, &mut vec![0; CHUNK])
    }

    /// Waits until `bytes` and a header may be sent, and counts them.
    fn admit(&self, bytes: u64) -> Result<(), MigrationError> {
        let bytes = bytes + frame::HEADER as u64;
        self.limiter.admit(bytes, self.control)?;
        self.control.counters.transferred.fetch_add(bytes, Relaxed);
        Ok(())
    }

    fn zero(&mut self, disk: usize, at: u64, len: u64, main: &mut Stream) -> Result<(), MigrationError> {
        self.admit(12)?;
        match &mut self.way {
            Way::Sections => {
                let payload = [&(disk as u32).to_le_bytes()[..], &len.to_le_bytes()].concat();
                let written = frame::write(main, Kind::DiskZero, at, &payload);
                written.map_err(MigrationError::broken(SENDING))
            }
            Way::Nbd(remotes) => remotes.get_mut(disk).ok_or_else(missing)?.zero(at, len),
        }
    }

    fn write(&mut self, disk: usize, at: u64, data: &[u8], main: &mut Stream) -> Result<(), MigrationError> {
        self.admit(data.len() as u64)?;
        match &mut self.way {
            Way::Sections => {
                let payload = [&(disk as u32).to_le_bytes()[..], data].concat();
                let written = frame::write(main, Kind::Disk, at, &payload);
                written.map_err(MigrationError::broken(SENDING))
            }
            Way::Nbd(remotes) => remotes.get_mut(disk).ok_or_else(missing)?.write(at, data),
        }
    }
}

/// One of the disks, on its way.
struct OneDisk<'a, 'b> {
    sender: &'a mut DiskSender<'b>,
    disk: usize,
    main: &'a mut Stream,
}

impl Ends for OneDisk<'_, '_> {
    type Error = MigrationError;

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), MigrationError> {
        let control = self.sender.control;
        control.check()?;
        let parameters = control.parameters();
        let late = parameters.timeout.is_some_and(|limit| control.elapsed() >= limit);
        if late && parameters.strategy == TimeoutStrategy::Cancel {
            return Err(MigrationError::Timeout(parameters.timeout.unwrap_or_default().as_secs()));
        }
        self.sender.source.read_disk(self.disk, offset, buf).map_err(unreadable)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), MigrationError> {
        self.sender.write(self.disk, offset, data, self.main)
    }

    fn zero(&mut self, offset: u64, len: u64) -> Result<(), MigrationError> {
        self.sender.zero(self.disk, offset, len, self.main)
    }
}
