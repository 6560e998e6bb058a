//! What identifies the platform to the guest, and Landlock rules.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What identifies the platform to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct PlatformConfig {
    /// Number of PCI segments; only 1 is supported.
    #[serde(default = "one")]
    pub num_pci_segments: u16,
    /// UUID of the machine.
    #[serde(default, alias = "uuid", skip_serializing_if = "Option::is_none")]
    pub system_uuid: Option<String>,
}

fn one() -> u16 {
    1
}

/// What a Landlock rule permits: any of `r` (read) and `w` (write).
pub type LandlockAccess = String;

/// A path that Holdfast may open beside those that the configuration names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LandlockConfig {
    /// The path, with everything below it.
    pub path: PathBuf,
    /// What is permitted: `r`, `w` or `rw`.
    #[schemars(regex(pattern = "^(r|w|rw|wr)$"))]
    pub access: LandlockAccess,
}
