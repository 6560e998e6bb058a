//! REST, QMP, event monitor and command line: codecs over [`holdfast_vmm::control::ControlHandle`].

pub mod back_end;
pub mod cli;
pub mod client;
pub mod http;
pub mod logging;
pub mod monitor;
pub mod process;
pub mod progress;
pub mod qmp;
pub mod serve;

mod scm;

use holdfast_vmm::control::{ControlError, ControlHandle, ErrorKind, Operation};

/// Runs `operation` without blocking the thread.
pub(crate) async fn call<O: Operation>(
    handle: &ControlHandle,
    operation: O,
) -> Result<O::Reply, ControlError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    // Whoever asked may have gone by the time the answer comes.
    handle.submit(operation, move |result| drop(sender.send(result)));
    let gone = || ControlError::new(ErrorKind::Failed, "The VM manager ended before it answered");
    receiver.await.unwrap_or_else(|_| Err(gone()))
}
