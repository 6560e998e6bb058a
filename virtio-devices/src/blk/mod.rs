//! The virtio blk device.

pub mod config;
