//! Memory of devices, shown by the accelerator.

use std::io;
use std::sync::{Arc, Weak};

use holdfast_accel::Vm;
use holdfast_device::MemoryWindows;
use holdfast_memory::GuestRegion;

/// The accelerator's VM, which devices do not keep alive.
#[derive(Debug)]
pub(super) struct Windows(Weak<dyn Vm>);

impl Windows {
    pub(super) fn new(vm: &Arc<dyn Vm>) -> Self {
        Self(Arc::downgrade(vm))
    }
}

impl MemoryWindows for Windows {
    fn show(&self, gpa: u64, region: &Arc<GuestRegion>, writable: bool) -> io::Result<()> {
        let vm = self.0.upgrade().ok_or(io::ErrorKind::NotFound)?;
        vm.map_shared(gpa, region, writable).map_err(io::Error::other)
    }

    fn hide(&self, gpa: u64) {
        let Some(vm) = self.0.upgrade() else { return };
        if let Err(error) = vm.unmap_shared(gpa) {
            tracing::error!(%error, "memory of a device at {gpa:#x} stays mapped");
        }
    }
}
