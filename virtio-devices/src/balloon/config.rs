//! `--balloon` and `BalloonConfig`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{Checker, FieldError};

/// A virtio memory balloon.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BalloonConfig {
    /// Bytes of RAM that the guest is asked to give back at boot.
    pub size: u64,
    /// Deflate the balloon when the guest is under memory pressure.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Let the guest report free pages.
    #[serde(default)]
    pub free_page_reporting: bool,
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

impl BalloonConfig {
    /// All fields that cannot be used.
    pub fn validate(&self) -> Vec<FieldError> {
        let mut check = Checker::default();
        check.pci(self.iommu, self.pci_segment, self.pci_device_id);
        let pages = self.size >> 12;
        check.refuse(pages > u64::from(u32::MAX), "size", format!("{} is more than 16 TiB", self.size));
        check.0
    }
}
