//! `--generic-vhost-user` and `GenericVhostUserConfig`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{Checker, FieldError, MAX_QUEUE_SIZE, MAX_QUEUES};

/// A device of any type that a vhost-user back end implements.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GenericVhostUserConfig {
    /// The UNIX socket on which the back end listens.
    pub socket: PathBuf,
    /// The size of each queue, a power of two.
    pub queue_sizes: Vec<u16>,
    /// The virtio device type.
    pub device_type: u32,
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

impl GenericVhostUserConfig {
    /// A device of this type; everything else is as if it were not given.
    pub fn new(device_type: u32, queue_sizes: Vec<u16>, socket: PathBuf) -> Self {
        Self {
            socket,
            queue_sizes,
            device_type,
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
        check.refuse(self.socket.as_os_str().is_empty(), "socket", "is empty: name the back end's socket");
        let kind = self.device_type;
        // PCI device ids are 0x1040 plus the type (virtio 1.2 section 4.1.2.1).
        check.refuse(kind == 0 || kind > 63, "device_type", format!("is {kind}; it takes 1 to 63"));
        let n = self.queue_sizes.len();
        let most = usize::from(MAX_QUEUES);
        check.refuse(n == 0 || n > most, "queue_sizes", format!("names {n} queues; it takes 1 to {most}"));
        for size in &self.queue_sizes {
            let good = size.is_power_of_two() && (2..=MAX_QUEUE_SIZE).contains(size);
            let reason = format!("has {size}; sizes are powers of two from 2 to {MAX_QUEUE_SIZE}");
            check.refuse(!good, "queue_sizes", reason);
        }
        check.0
    }
}
