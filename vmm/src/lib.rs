//! The VM: machines, lifecycle, snapshot, and the control handle through which it is driven.

pub mod accel;
pub mod back_end;
pub mod confine;
pub mod control;
pub mod gdb;
pub mod manager;
pub mod ram;
pub mod snapshot;
pub mod storage;
pub mod vm;

/// Where a VM migrates to, or comes from.
pub use holdfast_migration::Address as MigrationAddress;
