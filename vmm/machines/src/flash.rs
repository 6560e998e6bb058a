//! Flash banks of any machine.

use std::sync::Arc;

use holdfast_accel::{RomWindow, Vm};
use holdfast_device::BuildError;
use holdfast_devices::flash::{Backing, RomHook};
use holdfast_memory::GuestRegion;

use crate::FlashImage;

/// Opens what a flash bank holds.
pub fn backing(id: &str, image: Option<&FlashImage>) -> Result<Backing, BuildError> {
    let Some(FlashImage { path, readonly }) = image else { return Ok(Backing::Erased) };
    let what = || format!("flash image `{}` cannot be opened", path.display());
    let file = std::fs::File::options().read(true).write(!readonly).open(path);
    let file = file.map_err(|source| BuildError::Host { id: id.to_owned(), what: what(), source })?;
    Ok(Backing::File { file, readonly: *readonly })
}

/// Maps flash in array mode as ROM.
#[derive(Debug)]
pub struct VmRom(pub Arc<dyn Vm>);

impl RomHook for VmRom {
    fn map(&self, gpa: u64, region: &Arc<GuestRegion>) -> bool {
        let mapped = self.0.map_rom(&RomWindow { gpa, region: Arc::clone(region) });
        if let Err(error) = &mapped {
            tracing::warn!(%error, "flash at {gpa:#x} is read through its registers");
        }
        mapped.is_ok()
    }

    fn unmap(&self, gpa: u64) {
        if let Err(error) = self.0.unmap_rom(gpa) {
            tracing::error!(%error, "flash at {gpa:#x} stays mapped");
        }
    }
}
