//! Packet back ends: they know no VM.

mod addr;

pub use addr::{MacAddr, ParseMacError, prefix_len};

/// Bytes of an interface name with its terminating zero (`IFNAMSIZ`).
pub const IF_NAME_SIZE: usize = libc::IFNAMSIZ;
