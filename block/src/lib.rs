//! The block layer: disks as asynchronous back ends. It knows no VM.
//!
//! A [`BlockBackend`] is opened once and shared; each user takes a [`BlockQueue`] of its own from it,
//! submits [`Request`]s and reaps [`Completion`]s, woken by an eventfd. Buffers are given as host
//! memory ranges, so that data moves between a disk and guest RAM without a copy.

#[cfg(test)]
mod at_once;
mod buffer;
pub mod copy;
pub mod crypto;
mod detect;
pub mod facts;
pub mod foreign;
pub mod format;
pub mod graph;
pub mod http;
pub mod luks;
mod mapped;
pub mod nbd;
pub mod node;
pub mod nodes;
pub mod options;
pub mod qcow2;
pub mod queue;
mod ranges;
pub mod raw;
mod request;
pub mod throttle;
pub mod vdi;
pub mod vhdx;
pub mod vmdk;
pub mod vpc;

use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

pub use node::{BlockNode, Extent, Preallocation};
pub use request::{Completion, IoVec, Op, Request};

/// The unit in which disks count: 512 bytes.
pub const SECTOR: u64 = 512;

/// What a disk looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes.
    pub size: u64,
    /// Requests must start and end at multiples of this many bytes (a power of two, at least 512).
    pub logical_block: u32,
    /// Requests that start and end at multiples of this many bytes avoid read-modify-write.
    pub physical_block: u32,
    /// True if discarded and zeroed ranges can be given back to the host.
    pub can_discard: bool,
}

impl Geometry {
    /// The number of whole sectors.
    pub fn sectors(&self) -> u64 {
        self.size / SECTOR
    }
}

/// A disk that cannot be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The host does not open the file.
    #[error("cannot open disk image `{path}`")]
    Open {
        /// The image.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Somebody else is using it.
    #[error("disk image `{path}` is in use: another process has it open {how}")]
    Locked {
        /// The image.
        path: PathBuf,
        /// What the other has: for writing, or for reading where we want to write.
        how: &'static str,
    },
    /// Somebody else is using it; QEMU's words, which its users know.
    #[error("Failed to get {lock} lock\nIs another process using the image [{path}]?")]
    QemuLocked {
        /// The image.
        path: PathBuf,
        /// The lock.
        lock: String,
    },
    /// This process uses it already.
    #[error("`{path}` is in use: `{holder}` has it open for writing")]
    Held {
        /// The image.
        path: PathBuf,
        /// Who has it.
        holder: String,
    },
    /// An option or its value.
    #[error("{0}")]
    Option(String),
    /// The image's format is not what it should be.
    #[error("{0}")]
    Format(String),
    /// The image could be used if this program knew more.
    #[error("{0}")]
    Unsupported(String),
    /// It is neither a file nor a block device.
    #[error("`{path}` is neither a regular file nor a block device")]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// A call on the open image failed.
    #[error("disk image `{path}`: {what}")]
    Host {
        /// The image.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A disk.
pub trait BlockBackend: Send + Sync + Debug {
    /// Its size and alignment, as last seen.
    fn geometry(&self) -> Geometry;

    /// True if it cannot be written.
    fn is_readonly(&self) -> bool;

    /// A queue for up to `depth` requests at a time. More may be submitted; they wait their turn.
    ///
    /// # Errors
    /// [`BlockError::Host`] if the host gives no ring or thread.
    fn queue(self: Arc<Self>, depth: u16) -> Result<Box<dyn BlockQueue>, BlockError>;

    /// Looks at the size again (the image may have been resized). True if it has changed.
    ///
    /// # Errors
    /// [`BlockError::Host`].
    fn refresh(&self) -> Result<bool, BlockError>;

    /// Lets nobody else write what it shows, from now on.
    ///
    /// # Errors
    /// [`BlockError::Option`] that says who does; then nothing has changed.
    fn claim(&self) -> Result<(), BlockError> {
        Ok(())
    }

    /// How requests are carried out, for logs: `io_uring` or `threads`.
    fn engine(&self) -> &'static str;
}

/// One user's stream of requests to a disk. Requests may complete in any order; flush covers the
/// writes that completed before it was submitted. Dropping the queue waits for requests under way.
pub trait BlockQueue: Send + Debug {
    /// Takes a request. Everything that goes wrong with it is reported by its completion.
    fn submit(&mut self, request: Request);

    /// Hands what was submitted to the host. To be called after a batch of submissions.
    fn kick(&mut self);

    /// Moves the completions so far to the end of `out`.
    fn reap(&mut self, out: &mut Vec<Completion>);

    /// Requests submitted and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Promises that whoever has the queue calls [`BlockQueue::kick_and_wait`] and does nothing else meanwhile, so that it may
    /// carry requests out itself. For tools: a VM's queue must not block.
    fn assist(&mut self) -> Result<(), BlockError> {
        Ok(())
    }

    /// Hands over what was submitted and blocks until there may be something to reap, after [`BlockQueue::assist`] with
    /// a part of the work.
    fn kick_and_wait(&mut self) {
        self.kick();
        self.wait();
    }

    /// Readable when there may be something to reap. [`BlockQueue::reap`] resets it.
    fn event(&self) -> &EventFd;

    /// Blocks until there may be something to reap.
    fn wait(&self) {
        let mut poll = libc::pollfd {
            fd: std::os::fd::AsRawFd::as_raw_fd(self.event()),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: `poll` is one valid pollfd for the duration of the call; a failure only ends the wait.
        unsafe { libc::poll(&mut poll, 1, 1000) };
    }
}
