//! Bodies of requests other than `vm.create`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::AccelChoice;

/// Where a hot-plugged device sits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PciDeviceInfo {
    /// Its identifier.
    pub id: String,
    /// Segment, bus, device and function: `0000:00:03.0`.
    pub bdf: String,
}

/// New sizes of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct VmResize {
    /// vCPUs. Not supported yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub desired_vcpus: Option<u32>,
    /// Bytes of RAM. Not supported yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_ram: Option<u64>,
    /// Bytes of RAM that the balloon takes from the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_balloon: Option<u64>,
}

/// The device to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmRemoveDevice {
    /// Its identifier.
    pub id: String,
}

/// Where a snapshot goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmSnapshotConfig {
    /// `file://` and an absolute path of an existing directory.
    pub destination_url: String,
}

/// How guest RAM comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum MemoryRestoreMode {
    /// All of it before the VM runs.
    #[default]
    #[serde(alias = "copy")]
    Copy,
    /// Page by page, as the guest touches it.
    #[serde(alias = "ondemand")]
    OnDemand,
}

/// New tap devices for a restored network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestoredNet {
    /// Identifier of the network device.
    pub id: String,
    /// How many file descriptors of the message are its.
    pub num_fds: usize,
}

/// What is restored, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestoreConfig {
    /// `file://` and the absolute path of the snapshot's directory.
    #[schemars(extend("x-positional" = true))]
    pub source_url: String,
    /// Accelerators to try instead of those of the saved VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accel: Option<AccelChoice>,
    /// Populate all of RAM before the VM runs.
    #[serde(default)]
    pub prefault: bool,
    /// How guest RAM comes back.
    #[serde(default)]
    pub memory_restore_mode: MemoryRestoreMode,
    /// Network devices that take new tap devices from the message's file descriptors, in this order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_fds: Option<Vec<RestoredNet>>,
    /// Run at once; otherwise the VM is restored paused.
    #[serde(default)]
    pub resume: bool,
}

impl RestoreConfig {
    /// The directory that [`RestoreConfig::source_url`] names.
    pub fn directory(&self) -> Option<PathBuf> {
        file_url(&self.source_url)
    }
}

impl VmSnapshotConfig {
    /// The directory that [`VmSnapshotConfig::destination_url`] names.
    pub fn directory(&self) -> Option<PathBuf> {
        file_url(&self.destination_url)
    }
}

fn file_url(url: &str) -> Option<PathBuf> {
    url.strip_prefix("file://").filter(|path| path.starts_with('/')).map(PathBuf::from)
}
