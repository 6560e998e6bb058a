//! `--vsock` and `VsockConfig`.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{Checker, FieldError};

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

/// Sockets between the guest and processes of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VsockConfig {
    /// The guest's address (context id), 3 or more. With `vhost_user` also 0, for the one that the back end was started with.
    pub cid: u64,
    /// The UNIX socket on which processes of the host connect to the guest: `CONNECT PORT` and a newline, answered by
    /// `OK PORT`. What the guest connects to is this path, an underscore and the port. With `vhost_user` the socket on
    /// which the vhost-user back end listens. With `vhost` there is none.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub socket: PathBuf,
    /// Served by a vhost-user back end, such as vhost-device-vsock.
    #[serde(default, skip_serializing_if = "crate::config::is_false")]
    pub vhost_user: bool,
    /// Served by the host's kernel (vhost-vsock): processes of the host use sockets of the family `AF_VSOCK`.
    #[serde(default, skip_serializing_if = "crate::config::is_false")]
    pub vhost: bool,
    /// An open file descriptor of `/dev/vhost-vsock`; opened if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhostfd: Option<i32>,
    /// Behind the virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// The hot-plug port that it is plugged into, instead of the root bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    /// PCI device number on the root bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Name of the device, unique in the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

impl VsockConfig {
    /// Sockets of the guest with this address; everything else is as if it were not given.
    pub fn new(cid: u64, socket: PathBuf) -> Self {
        Self {
            cid,
            socket,
            vhost_user: false,
            vhost: false,
            vhostfd: None,
            iommu: false,
            pci_segment: 0,
            bus: None,
            pci_device_id: None,
            id: None,
        }
    }

    /// All fields that cannot be used.
    pub fn validate(&self) -> Vec<FieldError> {
        let mut check = Checker::default();
        check.pci(self.iommu, self.pci_segment, self.pci_device_id);
        check.port(self.bus.as_ref(), self.pci_device_id);
        // 0 to 2 are reserved, and so are the upper 32 bits (virtio 1.2 section 5.10.4).
        let theirs = self.vhost_user && self.cid == 0;
        let good = theirs || (3..u64::from(u32::MAX)).contains(&self.cid);
        check.refuse(!good, "cid", format!("is {}; it takes 3 to {}", self.cid, u32::MAX - 1));
        let none = is_empty(&self.socket);
        check.refuse(none && !self.vhost, "socket", "is empty: name a UNIX socket");
        check.refuse(!none && self.vhost, "socket", "does not go with `vhost`: the host's end is AF_VSOCK");
        check.refuse(self.vhost && self.vhost_user, "vhost", "does not go with `vhost_user`");
        check.refuse(self.vhostfd.is_some() && !self.vhost, "vhostfd", "is of no use without `vhost`");
        check.0
    }
}
