//! `blockdev-mirror`: a copy of a disk that is kept like it until somebody ends it.
//!
//! What is to be copied is marked in the disk's [`WriteLog`], all of it at first, and copied in sweeps over the log. When little is
//! left the job is *ready*, and goes on with what the guest writes. At its end the disk's requests wait, the last marks are copied
//! and made durable, and then the disk goes over to the target or stays where it is.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use holdfast_block::BlockNode;
use holdfast_block::copy::{CHUNK, Ends, MAX_ZEROES, copy};
use holdfast_block::node::status_above;
use holdfast_block::nodes::{Hold, NamedNode};
use holdfast_virtio::blk::log::{UNIT, WriteLog};
use holdfast_virtio::blk::policy::words;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::failed;
use super::{Aborted, End, Job, OnJobError, Outcome};
use crate::control::ControlError;

/// What may be left, in bytes, when the job is ready, and when the guest's requests begin to wait at its end.
const ENOUGH: u64 = 4 << 20;
/// Sweeps at the end before requests wait whatever is left: a guest that writes faster than the target gets no further by more.
const MAX_SWEEPS: u32 = 20;
/// Between two sweeps once little is left.
const REST: Duration = Duration::from_millis(100);
/// Most bits of a log: 128 MiB of memory.
const MAX_MARKS: u64 = 1 << 30;

/// What is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SyncMode {
    /// What the top image has, without those that it is based on.
    Top,
    /// Everything.
    Full,
    /// What is written from now on.
    None,
    /// Not a mode of mirrors.
    Incremental,
    /// Not a mode of mirrors.
    Bitmap,
}

/// When writes of the guest reach the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// Some time later.
    Background,
    /// Not supported.
    WriteBlocking,
}

/// A mirror (`blockdev-mirror`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MirrorOptions {
    /// Id of the job; the disk's if absent.
    #[serde(default)]
    pub job_id: Option<String>,
    /// Id of the disk, or name of its node.
    pub device: String,
    /// Name of the node that it is copied to.
    pub target: String,
    /// The node that the target takes the place of: the disk's.
    #[serde(default)]
    pub replaces: Option<String>,
    /// What is copied.
    pub sync: SyncMode,
    /// Most bytes a second; 0 for no limit.
    #[serde(default)]
    pub speed: Option<i64>,
    /// Bytes that are copied if one of them is written.
    #[serde(default)]
    pub granularity: Option<u32>,
    /// Most bytes that are on their way at a time.
    #[serde(default)]
    pub buf_size: Option<i64>,
    /// What is done if the source cannot be read: `report`.
    #[serde(default)]
    pub on_source_error: Option<OnJobError>,
    /// What is done if the target cannot be written: `report`.
    #[serde(default)]
    pub on_target_error: Option<OnJobError>,
    /// Not supported.
    #[serde(default)]
    pub filter_node_name: Option<String>,
    /// When writes of the guest reach the target: `background`.
    #[serde(default)]
    pub copy_mode: Option<CopyMode>,
    /// The job makes its end count by itself.
    #[serde(default)]
    pub auto_finalize: Option<bool>,
    /// The job is forgotten by itself.
    #[serde(default)]
    pub auto_dismiss: Option<bool>,
}

impl MirrorOptions {
    /// Checks what can be checked without a disk.
    ///
    /// # Errors
    /// Naming what is wrong, or not supported.
    pub fn check(&self) -> Result<(), ControlError> {
        match self.sync {
            SyncMode::Incremental => return Err(failed("Sync mode 'incremental' not supported")),
            SyncMode::Bitmap => return Err(failed("Sync mode 'bitmap' not supported")),
            SyncMode::Top | SyncMode::Full | SyncMode::None => {}
        }
        let reports =
            |on: Option<OnJobError>| matches!(on, None | Some(OnJobError::Report | OnJobError::Auto));
        for (name, on) in
            [("on-source-error", self.on_source_error), ("on-target-error", self.on_target_error)]
        {
            if !reports(on) {
                return Err(ControlError::unsupported(format_args!("'{name}' other than 'report'")));
            }
        }
        if self.copy_mode == Some(CopyMode::WriteBlocking) {
            return Err(ControlError::unsupported("'copy-mode': 'write-blocking'"));
        }
        if self.filter_node_name.is_some() {
            return Err(ControlError::unsupported("'filter-node-name'"));
        }
        if self.buf_size.is_some_and(|n| n < 0) {
            return Err(failed("Parameter 'buf-size' expects a non-negative value"));
        }
        match self.granularity.filter(|g| *g != 0) {
            Some(g) if !(512..=64 << 20).contains(&g) => {
                Err(failed("Parameter 'granularity' expects a value in range [512B, 64MB]"))
            }
            Some(g) if !g.is_power_of_two() => Err(failed("Parameter 'granularity' expects a power of 2")),
            _ => Ok(()),
        }
    }

    /// The log of a disk of `size` bytes.
    ///
    /// # Errors
    /// If the granularity is too fine for it.
    pub fn log(&self, size: u64) -> Result<WriteLog, ControlError> {
        let unit = self.granularity.filter(|g| *g != 0).map_or(UNIT, u64::from);
        if size / unit > MAX_MARKS {
            let text = format!("a 'granularity' of {unit} bytes for a disk of {size} bytes");
            return Err(ControlError::unsupported(text));
        }
        Ok(WriteLog::with_unit(size, unit))
    }

    fn chunk(&self) -> usize {
        match self.buf_size {
            None | Some(0) => CHUNK,
            Some(n) => usize::try_from(n).unwrap_or(CHUNK).next_multiple_of(4096).min(CHUNK),
        }
    }
}

/// The disk that is mirrored, as the job's thread sees it.
pub trait MirroredDevice: Send {
    /// Lets new requests wait, and those under way end.
    ///
    /// # Errors
    /// If there is nobody left to do it.
    fn quiesce(&self) -> Result<(), String>;

    /// Lets the disk go over to the node that is held.
    ///
    /// # Errors
    /// If it cannot; then it stays where it is.
    fn pivot(&self, target: Hold) -> Result<(), String>;

    /// Nothing is noted any more, and requests go on.
    fn release(&self);
}

/// Why a mirror ends before somebody lets it.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// Somebody wants it so.
    #[error("it was told to end at once")]
    Aborted,
    /// The source cannot be read, or if `write` the target cannot be written.
    #[error("a node cannot be used")]
    Io {
        /// The target.
        write: bool,
        /// What the node says.
        #[source]
        error: io::Error,
    },
    /// The disk does not do what it should.
    #[error("{0}")]
    Device(String),
}

impl From<Aborted> for MirrorError {
    fn from(_: Aborted) -> Self {
        Self::Aborted
    }
}

fn reading(error: io::Error) -> MirrorError {
    MirrorError::Io { write: false, error }
}

fn writing(error: io::Error) -> MirrorError {
    MirrorError::Io { write: true, error }
}

/// A mirror at work.
pub struct Mirror {
    job: Arc<Job>,
    source: Hold,
    target: Option<Hold>,
    from: Arc<NamedNode>,
    to: Arc<NamedNode>,
    log: Arc<WriteLog>,
    sync: SyncMode,
    buffer: Vec<u8>,
    /// Bytes that were copied or found to need no copy, and bytes that were taken from the log and are not done.
    done: u64,
    in_hand: u64,
    /// The end has come: nobody waits any more for speed or for being resumed.
    last: bool,
}

impl Mirror {
    /// A mirror that notes in `log` what is left. All is, but with [`SyncMode::None`].
    pub fn new(
        job: Arc<Job>,
        (source, target): (Hold, Hold),
        log: Arc<WriteLog>,
        options: &MirrorOptions,
    ) -> Self {
        let (from, to) = (Arc::clone(source.node()), Arc::clone(target.node()));
        if options.sync != SyncMode::None {
            log.mark(0, from.size());
        }
        job.progress(0, log.marked());
        Self {
            job,
            source,
            target: Some(target),
            from,
            to,
            log,
            sync: options.sync,
            buffer: vec![0; options.chunk()],
            done: 0,
            in_hand: 0,
            last: false,
        }
    }

    /// Copies until somebody ends it.
    pub fn run(mut self, device: Box<dyn MirroredDevice>) {
        let outcome = match self.work(&*device) {
            Ok(()) => Outcome::Done,
            Err(MirrorError::Aborted) => Outcome::Cancelled,
            Err(MirrorError::Device(text)) => Outcome::Failed(text),
            // Whoever was told to end may have had its requests cut off.
            Err(MirrorError::Io { .. }) if self.job.check().is_err() => Outcome::Cancelled,
            Err(MirrorError::Io { write, error }) => {
                tracing::warn!(job = self.job.id(), write, %error, "the mirror failed");
                self.job.io_failed(write);
                Outcome::Failed(words(&error))
            }
        };
        if outcome != Outcome::Done {
            self.job.aborting();
        }
        device.release();
        let Self { job, source, target, from, to, .. } = self;
        // Whoever hears of the end may delete the nodes.
        drop((device, source, target, from, to));
        job.conclude(&outcome);
    }

    fn work(&mut self, device: &dyn MirroredDevice) -> Result<(), MirrorError> {
        self.sweep(self.sync == SyncMode::Top)?;
        while self.log.marked() > ENOUGH {
            self.sweep(false)?;
        }
        self.to.flush().map_err(writing)?;
        self.job.ready();
        let end = self.follow()?;
        for _ in 0..MAX_SWEEPS {
            if self.log.marked() <= ENOUGH {
                break;
            }
            self.sweep(false)?;
        }
        self.last = true;
        device.quiesce().map_err(MirrorError::Device)?;
        self.sweep(false)?;
        self.to.flush().map_err(writing)?;
        self.job.settle()?;
        match self.target.take() {
            Some(target) if end == End::Complete => device.pivot(target).map_err(MirrorError::Device),
            target => {
                self.target = target;
                Ok(())
            }
        }
    }

    /// Keeps the target like the source until somebody ends it.
    fn follow(&mut self) -> Result<End, MirrorError> {
        loop {
            self.job.checkpoint()?;
            let busy = self.log.marked() > ENOUGH;
            if let Some(end) = self.job.rest(if busy { Duration::ZERO } else { REST }) {
                // In standby it is not there yet.
                self.job.checkpoint()?;
                return Ok(end);
            }
            self.job.checkpoint()?;
            self.sweep(false)?;
        }
    }

    /// Copies everything that is marked, once; `top` leaves out what the top image does not have.
    fn sweep(&mut self, top: bool) -> Result<(), MirrorError> {
        let mut at = 0;
        while let Some((start, len)) = self.log.take_run(at, MAX_ZEROES) {
            at = start + len;
            self.in_hand = len;
            self.tell();
            self.run_of(start, len, top)?;
        }
        self.in_hand = 0;
        self.tell();
        Ok(())
    }

    fn tell(&self) {
        self.job.progress(self.done, self.in_hand + self.log.marked());
    }

    fn did(&mut self, bytes: u64) {
        self.done += bytes;
        self.in_hand = self.in_hand.saturating_sub(bytes);
        self.tell();
    }

    fn run_of(&mut self, start: u64, len: u64, top: bool) -> Result<(), MirrorError> {
        let (mut at, end) = (start, start + len);
        while at < end {
            self.wait()?;
            let (extent, depth) = status_above(&*self.from, at, end - at).map_err(reading)?;
            let n = if extent.len == 0 { end - at } else { extent.len.min(end - at) };
            if top && (depth > 0 || !extent.allocated) && self.from.backing().is_some() {
                self.did(n);
            } else if extent.zero {
                self.zero(at, n)?;
            } else {
                let mut buffer = std::mem::take(&mut self.buffer);
                let copied = copy(self, (at, n), &mut buffer);
                self.buffer = buffer;
                copied?;
            }
            at += n;
        }
        Ok(())
    }

    fn wait(&self) -> Result<(), MirrorError> {
        if self.last {
            self.job.check()?
        } else {
            self.job.checkpoint()?
        }
        Ok(())
    }
}

impl Ends for Mirror {
    type Error = MirrorError;

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), MirrorError> {
        self.wait()?;
        self.from.read_at(offset, buf).map_err(reading)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), MirrorError> {
        if !self.last {
            self.job.pace(data.len() as u64)?;
        }
        self.to.write_at(offset, data).map_err(writing)?;
        self.did(data.len() as u64);
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> Result<(), MirrorError> {
        self.to.write_zeroes(offset, len, true).map_err(writing)?;
        self.did(len);
        Ok(())
    }
}
