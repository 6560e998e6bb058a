//! Devices whose work is done by the host's kernel: vhost-net and vhost-vsock (linux/vhost.h).
//!
//! As with vhost-user (`crate::vhost_user`) the other side works on rings of our own and never sees the guest's: every chain
//! is checked first, and every page that the kernel writes is known, for migration and for translated code.

mod device;
mod kernel;
mod relay;
#[cfg(test)]
mod tests;

pub mod net;
pub mod vsock;
