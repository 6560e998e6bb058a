//! Packet back ends. They know no VM.
//!
//! A [`PacketBackend`] is a network interface with one or more [`PacketQueue`]s. Frames carry a 12-byte
//! `virtio_net_hdr_v1` in front, by which checksums and segmentation are left to the other side.

mod addr;
mod ifreq;
pub mod tap;

use std::fmt::Debug;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

pub use addr::{MacAddr, ParseMacError, prefix_len};

/// Bytes of an interface name with its terminating zero (`IFNAMSIZ`).
pub const IF_NAME_SIZE: usize = libc::IFNAMSIZ;

/// Bytes of the header in front of each frame.
pub const HEADER_LEN: usize = 12;

/// Most bytes of a frame with its header: 64 KiB of IP packet, Ethernet header and VLAN tag.
pub const MAX_FRAME: usize = HEADER_LEN + 18 + 65536;

/// What the reader of frames can finish itself: frames may arrive with these things undone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums.
    pub csum: bool,
    /// TCP over IPv4 larger than the MTU.
    pub tso4: bool,
    /// TCP over IPv6 larger than the MTU.
    pub tso6: bool,
    /// Large TCP frames with ECN.
    pub ecn: bool,
    /// Large UDP datagrams.
    pub ufo: bool,
}

/// A network interface on the host.
pub trait PacketBackend: Send + Sync + Debug {
    /// Its name on the host.
    fn name(&self) -> &str;

    /// Its queues.
    fn queues(&self) -> Vec<Arc<dyn PacketQueue>>;

    /// Lets frames arrive with `offloads` undone.
    ///
    /// # Errors
    /// The host's error if the interface cannot do that.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Uses the first `count` queues and no others.
    ///
    /// # Errors
    /// The host's error.
    fn enable_queues(&self, count: usize) -> io::Result<()>;

    /// Its MTU, if it has one.
    fn mtu(&self) -> Option<u16>;
}

/// One queue of an interface. Neither call blocks: `WouldBlock` says to wait for readiness.
pub trait PacketQueue: Send + Sync + Debug {
    /// Becomes readable when a frame waits.
    fn fd(&self) -> RawFd;

    /// Takes one frame into `buf` ([`MAX_FRAME`] bytes fit every one) and returns its length.
    ///
    /// # Errors
    /// `WouldBlock` if none waits; the host's error.
    fn receive(&self, buf: &mut [u8]) -> io::Result<usize>;

    /// Sends one frame that lies in `parts`.
    ///
    /// # Safety
    /// The parts must be readable memory until the call returns. Others may change their contents.
    ///
    /// # Errors
    /// `WouldBlock` if the interface is full; `InvalidInput` for a header that makes no sense.
    unsafe fn send(&self, parts: &[libc::iovec]) -> io::Result<usize>;
}
