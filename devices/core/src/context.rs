//! What a device is given while it is built.

use std::sync::Arc;

use holdfast_clock::{RandomSource, Timers, VmClock};
use holdfast_memory::GuestMemory;
use holdfast_threads::Spawner;

use crate::bus::{Bus, BusError};
use crate::irq::MsiController;
use crate::system::SystemSink;
use crate::windows::MemoryWindows;

/// A device that could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Its window collides with another.
    #[error("device `{id}` cannot be attached to its bus")]
    Bus {
        /// The device.
        id: String,
        /// Why.
        #[source]
        source: BusError,
    },
    /// Its configuration is wrong.
    #[error("device `{id}`: {reason}")]
    Config {
        /// The device.
        id: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The host refused something it needs.
    #[error("device `{id}`: {what}")]
    Host {
        /// The device.
        id: String,
        /// What was asked for.
        what: String,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

/// The parts of the VM that devices are built on.
#[derive(Debug, Clone)]
pub struct BuildContext {
    /// Guest RAM.
    pub memory: GuestMemory,
    /// The memory bus (guest-physical addresses).
    pub mmio: Arc<Bus>,
    /// The port bus (x86: 0 to 0xffff); empty elsewhere.
    pub pio: Arc<Bus>,
    /// Guest-virtual time.
    pub clock: Arc<VmClock>,
    /// Alarms on guest-virtual time.
    pub timers: Arc<Timers>,
    /// Randomness.
    pub random: Arc<dyn RandomSource>,
    /// Starts the device's threads.
    pub spawner: Arc<dyn Spawner>,
    /// Takes what the guest asks of its machine: power-off, reset, panic.
    pub system: Arc<dyn SystemSink>,
    /// Where message-signalled interrupts go, if the machine has them.
    pub msi: Option<Arc<dyn MsiController>>,
    /// Shows memory of devices to the guest, where there is one.
    pub windows: Option<Arc<dyn MemoryWindows>>,
}
