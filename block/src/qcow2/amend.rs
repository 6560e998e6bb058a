//! Changing options of an image that exists.

use std::io;

use super::Qcow2;
use super::geometry::{COMPRESSED, OFFSET, ZERO};
use super::header::{AUTOCLEAR_RAW, LAZY_REFCOUNTS};
use super::state::State;
use super::zero::Drop;

impl State {
    /// Refuses to make a version 2 image of one that has what only version 3 has.
    fn check_downgrade(&mut self) -> io::Result<()> {
        self.check_writable()?;
        let refuse = |text: String| Err(io::Error::new(io::ErrorKind::Unsupported, text));
        if self.layout.data_file {
            return refuse("Cannot downgrade an image with a data file".into());
        }
        if self.header.refcount_order != 4 {
            return refuse("compat=0.10 requires refcount_bits=16".into());
        }
        if self.header.incompatible != 0 {
            let bits = self.header.incompatible;
            return refuse(format!("Cannot downgrade an image with incompatible features {bits:#x} set"));
        }
        if self.header.bitmaps.is_some() {
            return refuse("Cannot downgrade an image with persistent bitmaps".into());
        }
        let odd = |s: &super::snapshot::Snapshot| {
            s.disk_size != self.header.size || s.vm_state_size > u64::from(u32::MAX)
        };
        if self.snapshots.iter().any(odd) {
            return refuse("Internal snapshots prevent downgrade of image".into());
        }
        for snapshot in &self.snapshots {
            for table in self.snapshot_l1(snapshot)?.iter().map(|e| e & OFFSET).filter(|t| *t != 0) {
                let entries = self.table_entries(table)?;
                if entries.iter().any(|e| e.l2 & COMPRESSED == 0 && e.l2 & ZERO != 0) {
                    let name = &snapshot.name;
                    return refuse(format!(
                        "Cannot downgrade an image whose snapshot '{name}' has zero clusters"
                    ));
                }
            }
        }
        Ok(())
    }
}

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

    /// Makes a version 3 image a version 2 image: clusters that read as zeroes become unallocated or, over a backing file, data.
    ///
    /// # Errors
    /// `Unsupported` with what version 2 does not have; the host's.
    pub fn downgrade(&self) -> io::Result<()> {
        if self.state.lock().header.version < 3 {
            return Ok(());
        }
        self.state.lock().check_downgrade()?;
        self.expand_zeroes()?;
        let mut state = self.state.lock();
        state.flush()?;
        state.header.version = 2;
        state.layout.version = 2;
        state.header.compatible = 0;
        state.header.autoclear = 0;
        state.header.feature_names.clear();
        state.write_header()?;
        state.flush()
    }

    /// Leaves no cluster that only its entry says to be zero.
    fn expand_zeroes(&self) -> io::Result<()> {
        let (cluster, size) = (self.layout.cluster(), self.size_now());
        let backed = self.state.lock().header.backing_file.is_some();
        let zeroes = vec![0; cluster as usize];
        let mut old = Vec::new();
        let mut offset = 0;
        while offset < size {
            old.clear();
            if !self.state.lock().entries(offset, 1 << 16, &mut old)? || old.is_empty() {
                let coverage = self.layout.l2_coverage();
                offset += coverage - offset % coverage;
                continue;
            }
            for entry in &old {
                if entry.l2 & COMPRESSED != 0 || entry.l2 & ZERO == 0 || offset >= size {
                } else if backed {
                    let len = cluster.min(size - offset) as usize;
                    self.write_range(offset, zeroes.get(..len).unwrap_or(&zeroes))?;
                } else {
                    let _exclusive = self.ranges.lock(offset, offset + cluster, true);
                    self.drop_range(offset, offset + cluster, Drop::Forget)?;
                }
                offset += cluster;
            }
        }
        Ok(())
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
