//! Virtio transports and devices.
//!
//! A device is a [`VirtioDevice`] with its own worker threads; [`registry::plug`] puts it behind a
//! transport, which is what the VM and the guest's driver see. The driver's rings are read through
//! [`queue::VirtQueue`], which checks every chain before a device sees it: a driver that breaks the
//! rules finds its device in need of a reset (virtio 1.2 section 2.1.2) and nothing worse.

pub mod balloon;
pub mod blk;
pub mod config;
pub mod console;
pub mod device;
mod dma;
pub mod in_flight;
pub mod input;
pub mod net;
pub mod queue;
pub mod registry;
pub mod rng;
pub mod shared_memory;
pub mod transport;
pub mod vhost_kernel;
pub mod vhost_user;
pub mod vsock;
pub mod worker;

pub use config::FieldError;
pub use device::{Interrupt, VirtioDevice};
pub use registry::{BuildArgs, Slot, VirtioDeviceModule, plug};

#[cfg(test)]
mod config_tests;
#[cfg(test)]
mod testing;
