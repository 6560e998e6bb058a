//! The kernel's side, one method for each request of linux/vhost.h that is used.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{
    VHOST_NET_SET_BACKEND, VHOST_VSOCK_SET_GUEST_CID, VHOST_VSOCK_SET_RUNNING, vhost_vring_file,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::vhost_user::ring::{RingMemory, SharedRings};

/// What one vhost device of the kernel is asked for. `ring` is a number among its own rings.
pub(super) trait Vhost: Send + Sync + Debug {
    /// `VHOST_SET_OWNER`: works in this process's memory from now on.
    fn own(&self) -> io::Result<()>;

    /// `VHOST_GET_FEATURES`.
    fn features(&self) -> io::Result<u64>;

    /// `VHOST_SET_FEATURES`.
    fn set_features(&self, features: u64) -> io::Result<()>;

    /// `VHOST_SET_MEM_TABLE`.
    fn set_memory(&self, regions: &[VhostUserMemoryRegionInfo]) -> io::Result<()>;

    /// `VHOST_SET_VRING_NUM`, `_ADDR` and `_BASE`: an empty ring of which nothing was used.
    fn set_ring(&self, ring: u16, place: &VringConfigData) -> io::Result<()>;

    /// `VHOST_SET_VRING_CALL` and `_KICK`.
    fn set_bells(&self, ring: u16, call: &EventFd, kick: &EventFd) -> io::Result<()>;

    /// `VHOST_NET_SET_BACKEND`: serves the ring with this queue of a tap from now on, or leaves it.
    fn set_backend(&self, ring: u16, tap: Option<RawFd>) -> io::Result<()>;

    /// `VHOST_VSOCK_SET_GUEST_CID`.
    fn set_guest_cid(&self, cid: u64) -> io::Result<()>;

    /// `VHOST_VSOCK_SET_RUNNING`: serves the rings from now on, or leaves them.
    fn set_running(&self, running: bool) -> io::Result<()>;
}

/// A file descriptor of `/dev/vhost-net` or `/dev/vhost-vsock`.
#[derive(Debug)]
pub(super) struct Kernel {
    file: File,
    /// Where the rings are found by their addresses.
    rings: Arc<RingMemory>,
}

fn host(error: vhost::Error) -> io::Error {
    match error {
        vhost::Error::IoctlError(source) => source,
        other => io::Error::other(other.to_string()),
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Kernel {
    /// Opens `path`.
    pub(super) fn open(path: &Path, rings: &SharedRings) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
        Ok(Self { file, rings: Arc::new(rings.memory().clone()) })
    }

    /// Takes over a descriptor that was opened by another process.
    pub(super) fn of(fd: OwnedFd, rings: &SharedRings) -> Self {
        Self { file: fd.into(), rings: Arc::new(rings.memory().clone()) }
    }
}

impl AsRawFd for Kernel {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for Kernel {
    type AS = Arc<RingMemory>;

    fn mem(&self) -> &Self::AS {
        &self.rings
    }
}

impl Vhost for Kernel {
    fn own(&self) -> io::Result<()> {
        self.set_owner().map_err(host)
    }

    fn features(&self) -> io::Result<u64> {
        self.get_features().map_err(host)
    }

    fn set_features(&self, features: u64) -> io::Result<()> {
        VhostBackend::set_features(self, features).map_err(host)
    }

    fn set_memory(&self, regions: &[VhostUserMemoryRegionInfo]) -> io::Result<()> {
        self.set_mem_table(regions).map(drop).map_err(host)
    }

    fn set_ring(&self, ring: u16, place: &VringConfigData) -> io::Result<()> {
        let ring = usize::from(ring);
        self.set_vring_num(ring, place.queue_size).map_err(host)?;
        self.set_vring_addr(ring, place).map_err(host)?;
        self.set_vring_base(ring, 0).map_err(host)
    }

    fn set_bells(&self, ring: u16, call: &EventFd, kick: &EventFd) -> io::Result<()> {
        let ring = usize::from(ring);
        self.set_vring_call(ring, call).map_err(host)?;
        self.set_vring_kick(ring, kick).map_err(host)
    }

    fn set_backend(&self, ring: u16, tap: Option<RawFd>) -> io::Result<()> {
        let request = vhost_vring_file { index: u32::from(ring), fd: tap.unwrap_or(-1) };
        // SAFETY: the request reads one `vhost_vring_file`, which lives until it is done.
        check(unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &request) })
    }

    fn set_guest_cid(&self, cid: u64) -> io::Result<()> {
        // SAFETY: the request reads one u64, which lives until it is done.
        check(unsafe { ioctl_with_ref(self, VHOST_VSOCK_SET_GUEST_CID(), &cid) })
    }

    fn set_running(&self, running: bool) -> io::Result<()> {
        let on = libc::c_int::from(running);
        // SAFETY: the request reads one int, which lives until it is done.
        check(unsafe { ioctl_with_ref(self, VHOST_VSOCK_SET_RUNNING(), &on) })
    }
}
