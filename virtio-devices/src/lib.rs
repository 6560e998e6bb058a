//! Virtio transports and devices.

pub mod balloon;
pub mod blk;
pub mod config;
pub mod console;
pub mod net;
pub mod rng;

pub use config::FieldError;

#[cfg(test)]
mod config_tests;
