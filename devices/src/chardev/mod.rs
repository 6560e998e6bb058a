//! Character back ends: where a serial port's or console's bytes go and come from.

use std::fmt::Debug;
use std::sync::Arc;

/// Receives what the outside sends.
pub trait CharReceiver: Send + Sync + Debug {
    /// How many bytes the front end takes now. The back end keeps the rest until
    /// [`CharBackend::receiver_ready`].
    fn capacity(&self) -> usize;
    /// Takes at most [`CharReceiver::capacity`] bytes.
    fn receive(&self, data: &[u8]);
}

/// A connection to the outside.
pub trait CharBackend: Send + Sync + Debug {
    /// Sends bytes. Never blocks for long and never fails visibly: a back end without a listener
    /// keeps a bounded backlog (so that a late client sees the early boot log) and drops the oldest.
    fn send(&self, data: &[u8]);
    /// Connects the front end, replacing an earlier one.
    fn connect(&self, receiver: Arc<dyn CharReceiver>);
    /// The front end has room again.
    fn receiver_ready(&self);
    /// For `query-chardev` and `vm.info`: `pty:/dev/pts/3`, `stdio`, `file:/path`, ...
    fn label(&self) -> String;
}
