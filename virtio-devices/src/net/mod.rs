//! The virtio net device.

pub mod config;
