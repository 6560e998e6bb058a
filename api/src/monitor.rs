//! The event monitor: Cloud Hypervisor's stream of JSON objects on a file, FIFO or file descriptor.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use holdfast_threads::{Role, Spawner};
use holdfast_vmm::control::EventBus;

use crate::cli::Endpoint;

/// How long the last events may take to leave.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Opens where events are written. Opening a FIFO waits for its reader.
///
/// # Errors
/// What the host says.
pub fn open(endpoint: &Endpoint) -> io::Result<File> {
    match endpoint {
        Endpoint::Path(path) => OpenOptions::new().create(true).truncate(true).write(true).open(path),
        Endpoint::Fd(fd) => inherited(*fd).map(File::from),
    }
}

/// Takes over an inherited file descriptor and makes it close-on-exec.
///
/// # Errors
/// When it is not open.
pub(crate) fn inherited(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: fcntl on a number that may be no descriptor only fails.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and whoever names it on the command line gives it to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A running event monitor.
#[derive(Debug)]
pub struct EventMonitor {
    stop: mpsc::Sender<Option<String>>,
    thread: JoinHandle<()>,
}

impl EventMonitor {
    /// Writes every event from now on to `file`, on a thread of its own.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start(spawner: &dyn Spawner, events: &EventBus, mut file: File) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel::<Option<String>>();
        let stop = sender.clone();
        let body = move || {
            while let Ok(Some(text)) = receiver.recv() {
                if let Err(error) = file.write_all(text.as_bytes()) {
                    tracing::warn!(%error, "the event monitor's reader is gone");
                    return;
                }
            }
        };
        let thread = spawner.spawn("event-monitor", Role::Api, Box::new(body))?;
        events.listen(move |event| match event.to_monitor() {
            Some(object) => sender.send(Some(format!("{object:#}\n\n"))).is_ok(),
            None => true,
        });
        Ok(Self { stop, thread })
    }

    /// Writes what is left and ends. A reader that does not read is not waited for.
    pub fn stop(self) {
        // An error means that the thread has ended already.
        let _ = self.stop.send(None);
        let deadline = Instant::now() + LAST_WORDS;
        while !self.thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
