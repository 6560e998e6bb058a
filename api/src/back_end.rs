//! The process of `holdfast blk-backend` and `holdfast net-backend`.

use std::io;
use std::sync::Arc;

use holdfast_objects::Objects;
use holdfast_sandbox::{Sandbox, SandboxError};
use holdfast_threads::Role;
use holdfast_vmm::back_end::{BackEnd, BackEndError};
use holdfast_vmm::confine;

use crate::cli::BackEndOptions;
use crate::logging;
use crate::process::{block_signals, wait_for};
use crate::serve::{OwnSocket, ServeError};

/// A back end that could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// An object cannot be made.
    #[error("--object: {0}")]
    Object(String),
    /// The log cannot be written.
    #[error("--log-file cannot be opened")]
    Log(#[source] io::Error),
    /// The host has no thread or the like.
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
    /// The socket cannot be made.
    #[error("no front end could connect")]
    Socket(#[source] ServeError),
    /// The process cannot be confined.
    #[error("the process cannot be confined")]
    Confine(#[source] SandboxError),
    /// The device is not there.
    #[error("nothing can be served")]
    Device(#[source] BackEndError),
}

/// Serves what `options` say until a signal asks for the end.
///
/// # Errors
/// [`ServiceError`]; nothing was served.
pub fn run(options: &BackEndOptions) -> Result<(), ServiceError> {
    let sandbox = Sandbox::new(options.seccomp).map_err(ServiceError::Confine)?;
    // Before the sandbox closes: secrets may be in files.
    let objects = Arc::new(Objects::default());
    for text in &options.objects.0 {
        objects.add_text(text).map_err(|error| ServiceError::Object(error.to_string()))?;
    }
    logging::start(options.log_file.as_deref(), options.verbosity).map_err(ServiceError::Log)?;
    // Before the first thread: a thread that does not block a signal dies of it, and the process with it.
    let signals = block_signals().map_err(|error| ServiceError::Host("signals cannot be blocked", error))?;
    let config = &options.config;
    let (listener, path) = match config.is_client() {
        true => (None, None),
        false => {
            let bound = OwnSocket::bind("the socket", config.socket()).map_err(ServiceError::Socket)?;
            let (listener, path) = bound.into_parts();
            (Some(listener), path)
        }
    };
    let directories: Vec<_> = path.iter().map(|path| path.directory()).collect();
    sandbox.keep_sockets_removable(&directories);
    if let Some(more) = &options.landlock {
        confine::limit_process(&sandbox, Some(&config.as_vm()), None, more, &directories)
            .map_err(ServiceError::Confine)?;
    }
    let served =
        BackEnd::start(config, listener, objects, &sandbox.spawner()).map_err(ServiceError::Device)?;
    sandbox.confine(Role::Api).map_err(ServiceError::Confine)?;
    while let Some(signal) = wait_for(&signals) {
        if signal != libc::SIGHUP {
            tracing::info!(signal, "asked to end by a signal");
            break;
        }
        served.refresh();
    }
    served.stop();
    drop(path);
    Ok(())
}
