//! `--rng` and `RngConfig`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{Checker, FieldError};

/// The source that stands for the VM's own source of randomness.
pub const DEFAULT_SOURCE: &str = "/dev/urandom";

/// A virtio entropy device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RngConfig {
    /// Where the bytes come from.
    pub src: PathBuf,
    /// Name of the device, unique in the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Behind the virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// PCI device number on the root bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: PathBuf::from(DEFAULT_SOURCE),
            id: None,
            iommu: false,
            pci_segment: 0,
            pci_device_id: None,
        }
    }
}

impl RngConfig {
    /// All fields that cannot be used.
    pub fn validate(&self) -> Vec<FieldError> {
        let mut check = Checker::default();
        check.pci(self.iommu, self.pci_segment, self.pci_device_id);
        check.refuse(self.src.as_os_str().is_empty(), "src", "is empty: name a file such as /dev/urandom");
        check.0
    }
}
