//! What a virtio device is to its transport.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use holdfast_device::StateError;

use crate::queue::VirtQueue;
use crate::shared_memory::SharedMemory;
use crate::worker::Activation;

/// Virtio device types (virtio 1.2 section 5).
pub mod kind {
    /// Network card.
    pub const NET: u32 = 1;
    /// Block device.
    pub const BLOCK: u32 = 2;
    /// Console.
    pub const CONSOLE: u32 = 3;
    /// Entropy source.
    pub const RNG: u32 = 4;
    /// Memory balloon.
    pub const BALLOON: u32 = 5;
    /// Input: keyboards and the like.
    pub const INPUT: u32 = 18;
    /// Sockets.
    pub const VSOCK: u32 = 19;
    /// File system.
    pub const FS: u32 = 26;
}

/// Feature bits of all devices (virtio 1.2 section 6).
pub mod feature {
    /// Chains may refer to tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `used_event` and `avail_event`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.0 or later. Always offered and required.
    pub const VERSION_1: u64 = 1 << 32;
    /// What the queues offer for every device.
    pub const QUEUES: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// How a device interrupts its driver: implemented by the transports.
pub trait Interrupt: Send + Sync + Debug {
    /// Buffers of `queue` were used.
    fn queue(&self, queue: u16);
    /// The config space has changed.
    fn config_changed(&self);
    /// The driver broke the rules: the device stands until it is reset (section 2.1.2).
    fn needs_reset(&self);
}

/// A virtio device without its transport.
pub trait VirtioDevice: Send + Sync + Debug {
    /// Its kind in saved states and logs: `virtio-blk`, ...
    fn name(&self) -> &'static str;

    /// Its type on the wire: see [`kind`].
    fn device_type(&self) -> u32;

    /// The features it offers, those of its queues ([`feature::QUEUES`]) included.
    fn features(&self) -> u64;

    /// The largest size of each of its queues.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads its config space. Bytes past its end are left as they are (zero).
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes its config space. Most fields are read-only: such writes are dropped.
    fn write_config(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready: requests may be served from now on. Does not block.
    fn activate(&self, activation: Activation);

    /// Finishes what is under way and hands the queues back. Nothing happens to the back end.
    fn stop(&self) -> Vec<VirtQueue>;

    /// Forgets what a reset of the device forgets. Called after [`VirtioDevice::stop`].
    fn reset(&self) {}

    /// State beside the transport's and the queues'.
    ///
    /// # Errors
    /// [`StateError`] if it cannot be captured.
    fn save(&self) -> Result<serde_json::Value, StateError> {
        Ok(serde_json::Value::Null)
    }

    /// Takes over what [`VirtioDevice::save`] gave.
    ///
    /// # Errors
    /// [`StateError`] if it does not fit this device.
    fn restore(&self, state: &serde_json::Value) -> Result<(), StateError> {
        let _ = state;
        Ok(())
    }

    /// See [`holdfast_device::Device::announce`].
    fn announce(&self) {}

    /// The memory that it shows to the driver beside RAM.
    fn shared_memory(&self) -> Option<Arc<SharedMemory>> {
        None
    }

    /// Counters for `vm.counters`.
    fn counters(&self) -> BTreeMap<String, u64> {
        BTreeMap::new()
    }
}

/// Reads `data.len()` bytes at `offset` of a config space with the bytes `config`.
pub fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).ok().and_then(|o| config.get(o..));
    for (to, from) in data.iter_mut().zip(from.unwrap_or(&[])) {
        *to = *from;
    }
}
