//! Output to a file.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{CharBackend, CharReceiver};

#[derive(Debug)]
struct FileBackend {
    path: PathBuf,
    file: File,
    failed: AtomicBool,
}

/// Opens the file; what it holds stays if `keep`.
pub(super) fn open(path: &Path, keep: bool) -> io::Result<Arc<dyn CharBackend>> {
    let mut options = File::options();
    // Two processes write to it while a VM moves from one to the other.
    options.create(true).write(true).truncate(!keep).custom_flags(libc::O_APPEND);
    let file = options.open(path)?;
    Ok(Arc::new(FileBackend { path: path.to_owned(), file, failed: AtomicBool::new(false) }))
}

impl CharBackend for FileBackend {
    fn send(&self, data: &[u8]) {
        if let Err(error) = (&self.file).write_all(data)
            && !self.failed.swap(true, Ordering::Relaxed)
        {
            tracing::error!(%error, "output to `{}` is lost", self.path.display());
        }
    }

    fn connect(&self, _receiver: Arc<dyn CharReceiver>) {}

    fn receiver_ready(&self) {}

    fn label(&self) -> String {
        format!("file:{}", self.path.display())
    }
}
