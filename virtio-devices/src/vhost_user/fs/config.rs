//! `--fs` and `FsConfig`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{Checker, FieldError, MAX_QUEUES};

/// Bytes of a tag.
pub(super) const TAG_LEN: usize = 36;

/// A directory shared by a vhost-user back end such as virtiofsd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FsConfig {
    /// The name under which the guest mounts it, at most 36 bytes.
    pub tag: String,
    /// The UNIX socket on which the back end listens.
    pub socket: PathBuf,
    /// Number of request queues.
    #[serde(default = "num_queues")]
    pub num_queues: u16,
    /// Size of each queue, a power of two.
    #[serde(default = "queue_size")]
    pub queue_size: u16,
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

fn num_queues() -> u16 {
    1
}

fn queue_size() -> u16 {
    1024
}

impl FsConfig {
    /// A directory that is mounted as `tag`; everything else is as if it were not given.
    pub fn new(tag: String, socket: PathBuf) -> Self {
        Self {
            tag,
            socket,
            num_queues: num_queues(),
            queue_size: queue_size(),
            pci_segment: 0,
            bus: None,
            pci_device_id: None,
            id: None,
        }
    }

    /// All fields that cannot be used.
    pub fn validate(&self) -> Vec<FieldError> {
        let mut check = Checker::default();
        check.pci(false, self.pci_segment, self.pci_device_id);
        check.port(self.bus.as_ref(), self.pci_device_id);
        let len = self.tag.len();
        check.refuse(len == 0 || len > TAG_LEN, "tag", format!("has {len} bytes; it takes 1 to {TAG_LEN}"));
        check.refuse(self.socket.as_os_str().is_empty(), "socket", "is empty: name the back end's socket");
        let queues = self.num_queues;
        check.refuse(
            queues == 0 || queues > MAX_QUEUES,
            "num_queues",
            format!("is {queues}; it takes 1 to {MAX_QUEUES}"),
        );
        check.queue_size(self.queue_size);
        check.0
    }
}
