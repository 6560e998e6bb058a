//! Changing options of an image that exists.

use std::io;

use super::Qcow2;
use super::header::{AUTOCLEAR_RAW, LAZY_REFCOUNTS};

impl Qcow2 {
    /// Turns postponed refcount updates on or off. This program never postpones them; others may.
    ///
    /// # Errors
    /// `Unsupported` for version 2; the host's.
    pub fn set_lazy_refcounts(&self, on: bool) -> io::Result<()> {
        let mut state = self.state.lock();
        state.check_writable()?;
        if state.layout.version < 3 && on {
            let text = "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        state.header.compatible =
            state.header.compatible & !LAZY_REFCOUNTS | if on { LAZY_REFCOUNTS } else { 0 };
        state.write_header()?;
        state.flush()
    }

    /// Makes a version 2 image a version 3 image.
    ///
    /// # Errors
    /// The host's.
    pub fn upgrade(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        state.check_writable()?;
        if state.header.version >= 3 {
            return Ok(());
        }
        state.flush()?;
        state.header.version = 3;
        state.write_header()?;
        state.flush()
    }

    /// Changes whether the external data file is a raw image by itself.
    ///
    /// # Errors
    /// `InvalidInput` if it cannot be set; the host's.
    pub fn set_data_file_raw(&self, on: bool) -> io::Result<()> {
        let mut state = self.state.lock();
        state.check_writable()?;
        if on && state.header.autoclear & AUTOCLEAR_RAW == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "data-file-raw cannot be set on existing images",
            ));
        }
        state.header.autoclear &= if on { u64::MAX } else { !AUTOCLEAR_RAW };
        state.write_header()?;
        state.flush()
    }
}
