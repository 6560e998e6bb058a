//! Snapshot and restore.

pub mod ram;
pub mod uffd;
