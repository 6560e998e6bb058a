//! The VM: machines, lifecycle, snapshot.

pub mod control;
pub mod ram;
pub mod snapshot;
pub mod vm;
