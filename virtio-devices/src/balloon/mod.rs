//! The virtio balloon device.

pub mod config;
