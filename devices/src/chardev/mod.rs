//! Character back ends: where a serial port's or console's bytes go and come from.

mod escape;
mod file;
mod pty;
mod stream;
mod sys;
pub mod terminal;

use std::fmt;
use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use holdfast_device::BuildError;
use holdfast_threads::Spawner;

pub use escape::{Escape, Escaped, HELP};

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
    /// The path of the pseudo-terminal, if this is one.
    fn pty_path(&self) -> Option<PathBuf> {
        None
    }
    /// True while someone listens at the other end.
    fn is_open(&self) -> bool {
        true
    }
}

/// What to open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CharSpec {
    /// Output is dropped, input never comes.
    Null,
    /// This process's own terminal (standard input and output), in raw mode with an escape key.
    Tty,
    /// A new pseudo-terminal.
    Pty,
    /// Output is written to a file, which is created or truncated.
    File(PathBuf),
    /// A UNIX socket that listens; one client at a time, a new one replaces the old.
    Socket(PathBuf),
}

impl fmt::Display for CharSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Tty => f.write_str("tty"),
            Self::Pty => f.write_str("pty"),
            Self::File(path) => write!(f, "file={}", path.display()),
            Self::Socket(path) => write!(f, "socket={}", path.display()),
        }
    }
}

/// What a back end needs besides its spec.
pub struct CharContext<'a> {
    /// The front end's id (`serial`, `console`): names the thread and the errors.
    pub id: &'a str,
    /// Starts the reading side's thread.
    pub spawner: &'a Arc<dyn Spawner>,
    /// Called (on the reading thread) when the user asks to quit with the terminal's escape.
    pub quit: Arc<dyn Fn() + Send + Sync>,
    /// Files keep what they hold: the VM comes from elsewhere, and goes on writing.
    pub keep: bool,
}

/// Opens a back end. It is closed, its thread ended and the terminal restored, when dropped.
///
/// # Errors
/// [`BuildError::Host`] naming the file or socket that cannot be opened.
pub fn open(spec: &CharSpec, context: &CharContext<'_>) -> Result<Arc<dyn CharBackend>, BuildError> {
    let host =
        |what: String| move |source: io::Error| BuildError::Host { id: context.id.to_owned(), what, source };
    Ok(match spec {
        CharSpec::Null => Arc::new(Null),
        CharSpec::Tty => stream::terminal(context).map_err(host("the terminal cannot be used".into()))?,
        CharSpec::Pty => pty::open(context).map_err(host("no pseudo-terminal can be made".into()))?,
        CharSpec::File(path) => file::open(path, context.keep)
            .map_err(host(format!("file `{}` cannot be written", path.display())))?,
        CharSpec::Socket(path) => stream::socket(path, context)
            .map_err(host(format!("socket `{}` cannot be listened on", path.display())))?,
    })
}

/// Drops everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct Null;

impl CharBackend for Null {
    fn send(&self, _data: &[u8]) {}
    fn connect(&self, _receiver: Arc<dyn CharReceiver>) {}
    fn receiver_ready(&self) {}
    fn label(&self) -> String {
        "null".into()
    }
}

#[cfg(test)]
mod tests;
