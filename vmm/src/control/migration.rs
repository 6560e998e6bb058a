//! What is asked and shown of migrations. Names and shapes are QEMU's.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What QEMU calls migration capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationCapability {
    /// Not there.
    Xbzrle,
    /// Not there.
    RdmaPinAll,
    /// vCPUs that write too fast are slowed.
    AutoConverge,
    /// `MIGRATION` and `MIGRATION_PASS` are emitted.
    Events,
    /// Pages may follow the guest.
    PostcopyRam,
    /// Not there.
    XColo,
    /// Not there.
    ReleaseRam,
    /// The destination answers; always so.
    ReturnPath,
    /// The guest is not stopped before `migrate-continue`.
    PauseBeforeSwitchover,
    /// RAM goes over several connections.
    Multifd,
    /// Not there.
    DirtyBitmaps,
    /// Not there.
    PostcopyBlocktime,
    /// Not there.
    LateBlockActivate,
    /// Not there.
    XIgnoreShared,
    /// Not there.
    ValidateUuid,
    /// Not there.
    BackgroundSnapshot,
    /// Not there.
    ZeroCopySend,
    /// Pages that the guest waits for have a connection of their own; always so.
    PostcopyPreempt,
    /// The destination says when it can take over; always so.
    SwitchoverAck,
    /// Not there.
    DirtyLimit,
    /// In a file each page has its place; always so there.
    MappedRam,
}

/// A capability and whether it is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MigrationCapabilityStatus {
    /// Which.
    pub capability: MigrationCapability,
    /// On.
    pub state: bool,
}

/// How RAM is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MultifdCompression {
    /// Not at all.
    #[default]
    None,
    /// By zstd.
    Zstd,
    /// Not there.
    Zlib,
}

/// Migration parameters. Those that are not given stay as they are.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationParameters {
    /// Percent by which vCPUs are slowed at first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_initial: Option<u8>,
    /// By how many more each time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_increment: Option<u8>,
    /// By how many at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_cpu_throttle: Option<u8>,
    /// Bytes a second; 0 for as many as there can be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<u64>,
    /// Milliseconds that the guest may stand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_limit: Option<u64>,
    /// Connections that carry RAM when `multifd` is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multifd_channels: Option<u32>,
    /// How RAM is compressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multifd_compression: Option<MultifdCompression>,
    /// zstd's level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multifd_zstd_level: Option<i32>,
    /// Id of a `tls-creds-x509` object: connections have TLS. Empty: they do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_creds: Option<String>,
    /// The name that the destination's certificate has to have, if not that of the address. Empty: that of the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_hostname: Option<String>,
    /// Not there; only the empty name is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_authz: Option<String>,
    /// RAM bypasses the page cache on its way into a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_io: Option<bool>,
    /// Milliseconds between the first and the second announcement of a VM that has come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announce_initial: Option<u64>,
    /// Milliseconds between two of them at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announce_max: Option<u64>,
    /// How many there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announce_rounds: Option<u64>,
    /// Milliseconds that each wait is longer than the one before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announce_step: Option<u64>,
}

/// How a VM tells the network where it is: several times, ever later. QEMU's defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct AnnounceParameters {
    /// Milliseconds between the first and the second time.
    pub initial: u64,
    /// Milliseconds between two times at most.
    pub max: u64,
    /// How many times.
    pub rounds: u64,
    /// Milliseconds that each wait is longer than the one before.
    pub step: u64,
    /// Ids of the network devices that do; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interfaces: Option<Vec<String>>,
    /// Name of this round of announcements: one of the same name that is under way ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

impl Default for AnnounceParameters {
    fn default() -> Self {
        Self { initial: 50, max: 550, rounds: 5, step: 100, interfaces: None, id: None }
    }
}

/// Figures about RAM.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationStats {
    /// Bytes on the wire.
    pub transferred: u64,
    /// Bytes that are still to go.
    pub remaining: u64,
    /// Bytes of RAM.
    pub total: u64,
    /// Pages of zeroes.
    pub duplicate: u64,
    /// Other pages.
    pub normal: u64,
    /// Their bytes.
    pub normal_bytes: u64,
    /// Pages a second that the guest writes.
    pub dirty_pages_rate: u64,
    /// Megabits a second that are sent.
    pub mbps: f64,
    /// Passes over RAM.
    pub dirty_sync_count: u64,
    /// Pages that the guest waited for.
    pub postcopy_requests: u64,
    /// Bytes of a page.
    pub page_size: u64,
}

/// A migration under way, or the last one.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// Where it is; nothing if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// Figures about RAM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram: Option<MigrationStats>,
    /// Milliseconds since it began, or that it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// Milliseconds that the guest would stand if it were stopped now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// Milliseconds that it stood.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// Milliseconds that connecting and comparing took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<u64>,
    /// Percent by which vCPUs are slowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_percentage: Option<u64>,
    /// At the destination, in post-copy: how long the guest waited for a page in the mean, in nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy_latency: Option<u64>,
    /// At the destination, in post-copy: how many pages took how long to come. Number n counts those that took from 2^n to 2^(n+1)
    /// microseconds; the first also what was faster, the last what was slower.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy_latency_dist: Option<Vec<u64>>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
}
