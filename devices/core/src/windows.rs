//! Memory of devices in the guest's sight.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use holdfast_memory::GuestRegion;

/// Shows memory of devices to the guest, beside RAM.
pub trait MemoryWindows: Send + Sync + Debug {
    /// Shows `region` at `gpa`, a multiple of the page size; accesses do not reach the memory bus, but for writes if
    /// it is not `writable`.
    ///
    /// # Errors
    /// What the accelerator says: something is there already, or it can show no more.
    fn show(&self, gpa: u64, region: &Arc<GuestRegion>, writable: bool) -> io::Result<()>;

    /// Hides what is shown at `gpa`. vCPUs that are about to use it may do so a last time.
    fn hide(&self, gpa: u64);
}
