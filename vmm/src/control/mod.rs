//! The typed handle through which everything outside drives the VM.
//!
//! Every operation is a type that implements [`Operation`]: its fields are the request, its
//! [`Operation::Reply`] the answer. REST, QMP and the command line are codecs over
//! [`ControlHandle::call`] and [`ControlHandle::submit`]. The VM manager's thread takes requests from
//! its [`ControlInbox`] and serves them on its [`VmManager`]. What takes long is given a
//! [`Responder`] to answer later, so that the thread is free for the next request at once.
//!
//! [`Event`]s go the other way: the manager publishes them on the [`EventBus`], and every client hears
//! all of them.

mod debug;
mod error;
mod event;
mod handle;
mod manager;
mod migration;
mod netdev;
mod operation;
mod reply;

#[cfg(test)]
mod tests;

pub use debug::{DebugEvent, DebugListener, DebugTarget, DebugWhy, MemoryWrite};
pub use error::{ControlError, ErrorKind};
pub use event::{BlockJobFacts, Event, EventBus, Origin, TimedEvent};
pub use handle::{ControlHandle, ControlInbox, Request, Responder, control};
pub use manager::VmManager;
pub use migration::*;
pub use netdev::*;
pub use operation::*;
pub use reply::*;
