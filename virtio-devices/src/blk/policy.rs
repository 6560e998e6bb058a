//! What becomes of requests that fail.

use std::fmt::Debug;
use std::io;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is done when a request fails (`rerror=`, `werror=`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The guest is told.
    Report,
    /// The guest is told that it was done.
    Ignore,
    /// The VM stops, and tries again when it goes on.
    Stop,
    /// As `stop` if the host has no room left, as `report` otherwise.
    Enospc,
}

/// What was done about a request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The guest was told.
    Report,
    /// The guest was told that it was done.
    Ignore,
    /// It waits until the VM goes on; the VM has to be stopped.
    Stop,
}

impl Action {
    /// The word of QEMU's events.
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
        }
    }
}

/// A request that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoFailure {
    /// The disk.
    pub id: String,
    /// Its node.
    pub node: String,
    /// It was no read.
    pub write: bool,
    /// What was done about it.
    pub action: Action,
    /// The host has no room left.
    pub nospace: bool,
    /// What the host said.
    pub reason: String,
}

/// Hears of requests that failed, on the disk's threads: it must not block.
pub trait DiskEvents: Send + Sync + Debug {
    /// A request failed.
    fn io_error(&self, failure: IoFailure);
}

/// What is done about failures of a disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    pub(super) read: OnError,
    pub(super) write: OnError,
}

pub(super) fn no_space(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

impl Policy {
    pub(super) fn action(self, write: bool, error: &io::Error) -> Action {
        match if write { self.write } else { self.read } {
            OnError::Report => Action::Report,
            OnError::Ignore => Action::Ignore,
            OnError::Stop => Action::Stop,
            OnError::Enospc if no_space(error) => Action::Stop,
            OnError::Enospc => Action::Report,
        }
    }
}

/// The system's words for an error, without its number.
pub fn words(error: &io::Error) -> String {
    let text = error.to_string();
    match error.raw_os_error() {
        Some(code) => text.strip_suffix(&format!(" (os error {code})")).map(str::to_owned).unwrap_or(text),
        None => text,
    }
}
