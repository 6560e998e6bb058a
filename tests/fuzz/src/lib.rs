//! Fuzz targets: everything that reads what guests, files and peers send.
//!
//! Each target is a function from bytes. `libfuzzer/` feeds them coverage-guided; `tests/replay.rs` feeds
//! them their seeds, past findings and pseudo-random bytes in every test run.

pub mod access;
pub mod driver;
pub mod fdt;
pub mod program;
pub mod rig;
pub mod targets;
