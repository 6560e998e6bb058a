//! Devices whose work is done by another process, a vhost-user back end (the vhost-user protocol of QEMU's
//! documentation, `interop/vhost-user`).
//!
//! The back end never sees the guest's rings. It works on rings of our own in memory that it shares with
//! us (`ring`); a worker moves every chain from the guest's ring to it once the chain was checked, and
//! back. So a driver that breaks the rules meets the same checks as with our own devices, every page that
//! the back end writes is known (dirty pages, translated code), and the requests that a back end held when
//! it died are known too and are given to its successor.

mod device;
mod door;
mod fuse;
#[cfg(test)]
mod hostile_tests;
pub(crate) mod lane;
mod link;
mod news;
mod relay;
pub(crate) mod ring;
#[cfg(test)]
mod tests;

pub mod blk;
pub mod fs;
pub mod generic;
pub mod net;
pub mod vsock;

pub(crate) use device::{ConfigSource, LocalQueue, Spec, VhostUser};
pub(crate) use door::{Door, remove_left_behind};
