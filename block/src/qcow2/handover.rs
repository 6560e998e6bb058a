//! An image changes hands while it is open: one process writes what it knows and forgets it, another one reads it.

use std::io;
use std::sync::atomic::Ordering;

use super::header::{Header, incompatible};
use super::{BlockError, OpenOptions, Qcow2, State, host_error, read_header};

/// What of a header was decided on when the image was opened, and cannot change under its users.
fn shape(header: &Header) -> impl PartialEq + use<> {
    // The dirty and corrupt bits come and go.
    let lasting = header.incompatible & !(incompatible::DIRTY | incompatible::CORRUPT);
    let key = (header.crypt_method, header.crypto);
    (header.version, header.cluster_bits, header.refcount_order, lasting, key, header.data_file.clone())
}

impl Qcow2 {
    /// Writes everything that is only in memory, and nothing from then on.
    pub(super) fn give_up(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.readonly || state.inactive {
            return Ok(());
        }
        // A damaged image is given up as it is; who takes it sees so in its header.
        if state.corrupt.is_none() {
            state.store_bitmaps()?;
            state.flush()?;
        }
        state.inactive = true;
        self.inactive.store(true, Ordering::Release);
        Ok(())
    }

    /// Reads everything anew.
    pub(super) fn take(&self) -> Result<(), BlockError> {
        let mut state = self.state.lock();
        if !state.inactive {
            return Ok(());
        }
        let header = read_header(&*self.files.file)?;
        if shape(&header) != shape(&state.header) {
            return Err(BlockError::Format("the image is another one than before".into()));
        }
        if header.incompatible & incompatible::CORRUPT != 0 {
            return Err(BlockError::Format("qcow2: Image is corrupt; cannot be opened read/write".into()));
        }
        let repair = header.incompatible & incompatible::DIRTY != 0;
        let size = header.size;
        let options = OpenOptions { inactive: false, ..self.options.clone() };
        let mut fresh = State::load(header, &self.files, &options)?;
        fresh.watch = state.watch.take();
        *state = fresh;
        drop(state);
        *self.decompressed.lock() = <(u64, Vec<u8>)>::default();
        self.size.store(size, Ordering::Release);
        self.inactive.store(false, Ordering::Release);
        let usable = if repair { self.repair_dirty() } else { Ok(()) };
        let usable = usable.and_then(|()| {
            let started = self.state.lock().start_writing();
            started.map_err(|e| host_error(&*self.files.file, "Could not update qcow2 header", e))
        });
        if usable.is_err() {
            self.state.lock().inactive = true;
            self.inactive.store(true, Ordering::Release);
        }
        usable
    }
}
