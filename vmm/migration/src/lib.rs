//! Live migration: a running VM moves to another process.
//!
//! The two ends talk over one to 128 connections in [frames](frame) of a protocol of their own, and over one more for each disk that goes
//! along, in NBD. This crate knows the
//! protocol, guest RAM and the order of things; what a VM is, it knows by the traits [`Source`] and [`Target`].
//!
//! # Who may run the guest
//! 1. The source sends its [`Plan`]. The target compares, builds a VM, and accepts or refuses, saying what differs. The
//!    guest has not noticed anything.
//! 2. RAM is sent while the guest runs, in passes over what was written meanwhile.
//! 3. The guest stops; the rest of RAM and its state are sent. The target takes them over and says `Ready`. Until then
//!    every failure lets the source go on.
//! 4. The source gives up what only one VM can have (locks of disk images) and says `Go`. Without it the target
//!    never runs the guest.
//! 5. The target says `Done`, or why it cannot, then lets the guest run. If neither comes, nobody can know: the source stays
//!    paused and says so; it can still be resumed by who knows that the target is gone.
//!
//! So two VMs never run at once, and one is left that can.

pub mod address;
mod backed;
mod checksum;
mod control;
mod disks;
pub mod frame;
mod huge;
mod images;
mod inbox;
mod lanes;
pub mod mapped;
mod marks;
pub mod pages;
mod plan;
mod postcopy;
mod source;
mod sparse;
mod stream;
mod target;
pub mod uffd;

pub use address::Address;
pub use control::{Control, LATENCY_BUCKETS, Latency, Parameters, Phase, Statistics, TimeoutStrategy};
pub use marks::Marks;
pub use plan::{MirroredDisk, Plan};
pub use postcopy::Arriving;
pub use source::{Outcome, RunningCode, SendTo, Source, send};
pub use stream::{Listener, Stream, Tls};
pub use target::{Target, receive};

use std::io;

/// Most connections of one migration.
pub const MAX_CONNECTIONS: u32 = 128;

/// A migration that did not come about.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// An address that is none.
    #[error("`{address}` is no address to migrate to or from: {reason}")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong.
        reason: String,
    },
    /// The other side cannot be reached.
    #[error("{what} `{address}`")]
    Connect {
        /// What was tried.
        what: &'static str,
        /// Where.
        address: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// TLS cannot be set up.
    #[error("TLS: {0}")]
    Tls(String),
    /// A file that a VM is in, or was to be.
    #[error("{what} `{path}`")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: std::path::PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The connection broke while something was on its way.
    #[error("the connection broke while {what}")]
    Broken {
        /// What was going on.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The other side does not keep to the protocol.
    #[error("the stream cannot be read: {0}")]
    Protocol(String),
    /// The other side speaks no version that this one does.
    #[error(
        "the other side speaks versions {theirs_oldest} to {theirs} of the migration protocol, this one {ours_oldest} to {ours}"
    )]
    Version {
        /// Its newest version.
        theirs: u16,
        /// Its oldest.
        theirs_oldest: u16,
        /// Our newest.
        ours: u16,
        /// Our oldest.
        ours_oldest: u16,
    },
    /// The two VMs are not alike.
    #[error("the VM does not fit the destination: {0}")]
    Differs(String),
    /// The other side gave up.
    #[error("the {side} gave up: {reason}")]
    Refused {
        /// `destination` or `source`.
        side: &'static str,
        /// Its reason.
        reason: String,
    },
    /// Somebody cancelled it.
    #[error("the migration was cancelled")]
    Cancelled,
    /// It took too long.
    #[error("the migration did not end within {0} seconds; the VM goes on here")]
    Timeout(u64),
    /// The VM cannot do what it must.
    #[error("{what}")]
    Vm {
        /// What failed.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Nobody knows who has the VM.
    #[error(
        "the connection was lost in the moment of the hand-over: the VM may run at the destination. It stays paused \
         here; resume it only if it does not run there"
    )]
    Unknown(#[source] io::Error),
    /// The host refuses something.
    #[error("{what}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

impl MigrationError {
    /// A failure of the VM.
    pub fn vm(what: &'static str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Vm { what, source: source.into() }
    }

    pub(crate) fn broken(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            // Frames that were read but make no sense come as this kind.
            io::ErrorKind::InvalidData => Self::Protocol(source.to_string()),
            _ => Self::Broken { what, source },
        }
    }

    /// The messages of the whole chain, in one line.
    pub fn describe(&self) -> String {
        let first: &dyn std::error::Error = self;
        let chain = std::iter::successors(Some(first), |e| (*e).source());
        chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
    }
}
