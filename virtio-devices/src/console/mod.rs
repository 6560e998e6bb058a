//! The virtio console device.

pub mod config;
