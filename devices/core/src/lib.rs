//! What every device is made of.
//!
//! A device is one folder: its config struct, `build`, its register or queue logic behind
//! [`BusDevice`], its versioned state behind [`Device`], and its tests. Devices know neither an
//! accelerator nor an API: they see buses, interrupt lines, clocks and guest memory through this crate.

pub mod bus;
mod context;
pub mod irq;
mod state;
mod system;
mod windows;

pub use bus::{Access, Bus, BusDevice, BusError, IoEvents};
pub use context::{BuildContext, BuildError};
pub use irq::{CpuLines, ExtInt, FpuErrors, IrqLine, IrqSink, MsiController, MsiMessage, MsiVector};
pub use state::{DeviceState, StateError};
pub use system::{DeviceEvent, SystemEvent, SystemSink};
pub use windows::MemoryWindows;

use std::collections::BTreeMap;
use std::fmt::Debug;

/// A built device as the VM keeps it: a name, a life cycle and a state. Its register windows were
/// attached to the buses, and its interrupts wired, while it was built.
pub trait Device: Send + Sync + Debug {
    /// The id by which configs, snapshots, events and monitors name it, unique in the VM.
    fn id(&self) -> &str;

    /// Goes back to the state after power-on, as on a system reset. Back ends stay connected.
    fn reset(&self);

    /// Lets no further request start and returns when those under way are done. Called before
    /// [`Device::save`]; vCPUs and the clock stand already.
    fn pause(&self) {}

    /// Undoes [`Device::pause`].
    fn resume(&self) {}

    /// The whole guest-visible state.
    ///
    /// # Errors
    /// [`StateError`] if it cannot be captured.
    fn save(&self) -> Result<DeviceState, StateError>;

    /// Takes over a saved state, in a device freshly built with the same config.
    ///
    /// # Errors
    /// [`StateError`] if the state is of another kind or version or does not fit.
    fn restore(&self, state: &DeviceState) -> Result<(), StateError>;

    /// Tells the network once more that the device is here: `announce-self`.
    fn announce(&self) {}

    /// Counters for `vm.counters` and `query-stats`, by name.
    fn counters(&self) -> BTreeMap<String, u64> {
        BTreeMap::new()
    }
}
