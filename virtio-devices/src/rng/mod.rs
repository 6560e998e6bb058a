//! The virtio rng device.

pub mod config;
