//! Packets (virtio 1.2 section 5.10.6).

use vm_memory::ByteValued;

/// The host's address.
pub(super) const HOST_CID: u64 = 2;
/// Connected streams, the only type that is offered.
pub(super) const TYPE_STREAM: u16 = 1;

pub(super) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// The sender will receive no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender will send no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// `struct virtio_vsock_hdr`, little-endian as all of virtio.
#[repr(C, packed)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

// SAFETY: packed plain integers; any bytes are a valid value.
unsafe impl ByteValued for Header {}

/// Bytes of a header.
pub(super) const HEADER_LEN: usize = size_of::<Header>();

impl Header {
    /// The same with the bytes of this host's integers, or back.
    pub(super) fn swapped(self) -> Self {
        Self {
            src_cid: u64::from_le(self.src_cid),
            dst_cid: u64::from_le(self.dst_cid),
            src_port: u32::from_le(self.src_port),
            dst_port: u32::from_le(self.dst_port),
            len: u32::from_le(self.len),
            kind: u16::from_le(self.kind),
            op: u16::from_le(self.op),
            flags: u32::from_le(self.flags),
            buf_alloc: u32::from_le(self.buf_alloc),
            fwd_cnt: u32::from_le(self.fwd_cnt),
        }
    }
}
