//! Guest RAM.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Guest RAM unless the user says otherwise.
pub(crate) const DEFAULT_SIZE: u64 = 512 << 20;

/// Guest RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryConfig {
    /// Bytes, a multiple of the page size.
    #[serde(default = "default_size")]
    #[schemars(extend("x-size" = true, "x-positional" = true))]
    pub size: u64,
    /// Share RAM with other processes that hold its memfd.
    #[serde(default)]
    pub shared: bool,
    /// Back RAM with huge pages from hugetlbfs.
    #[serde(default)]
    pub hugepages: bool,
    /// Size in bytes of those huge pages; the host's default size if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-size" = true))]
    pub hugepage_size: Option<u64>,
    /// Populate all of RAM before the VM starts.
    #[serde(default)]
    pub prefault: bool,
    /// Ask for transparent huge pages.
    #[serde(default = "default_true")]
    pub thp: bool,
}

fn default_size() -> u64 {
    DEFAULT_SIZE
}

fn default_true() -> bool {
    true
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: DEFAULT_SIZE,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: false,
            thp: true,
        }
    }
}
