//! The VM: machines, lifecycle, snapshot.

pub mod ram;
pub mod snapshot;
pub mod vm;
