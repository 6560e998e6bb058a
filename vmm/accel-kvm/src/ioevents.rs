//! Ioeventfds in the kernel.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use holdfast_device::IoEvents;
use kvm_bindings::{
    kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::sys;

/// The ioeventfds of one bus.
#[derive(Debug)]
pub struct KvmIoEvents {
    vm: Arc<VmFd>,
    pio: bool,
}

impl KvmIoEvents {
    /// Those of the port bus or the memory bus of `vm`.
    pub fn new(vm: Arc<VmFd>, pio: bool) -> Arc<Self> {
        Arc::new(Self { vm, pio })
    }

    fn request(&self, fd: &EventFd, at: (u64, u32), datamatch: Option<u64>, remove: bool) -> io::Result<()> {
        let (addr, len) = at;
        if !matches!(len, 0 | 1 | 2 | 4 | 8) || (len == 0 && datamatch.is_some()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "an ioeventfd is 1, 2, 4 or 8 bytes wide",
            ));
        }
        let mut flags = 0;
        if self.pio {
            flags |= 1 << kvm_ioeventfd_flag_nr_pio;
        }
        if datamatch.is_some() {
            flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
        }
        if remove {
            flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
        }
        let datamatch = datamatch.unwrap_or(0);
        let request = kvm_ioeventfd { datamatch, addr, len, fd: fd.as_raw_fd(), flags, ..Default::default() };
        sys::ioeventfd(&self.vm, &request)
    }
}

impl IoEvents for KvmIoEvents {
    fn register(&self, fd: &EventFd, address: u64, len: u32, datamatch: Option<u64>) -> io::Result<()> {
        self.request(fd, (address, len), datamatch, false)
    }

    fn unregister(&self, fd: &EventFd, address: u64, len: u32, datamatch: Option<u64>) -> io::Result<()> {
        self.request(fd, (address, len), datamatch, true)
    }
}
