//! What monitors ask of the graph.

use holdfast_block::options::BlockdevOptions;
use holdfast_virtio::blk::stats::Kind;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::jobs::JobVerb;
use super::jobs::mirror::MirrorOptions;
use super::nbd::{ExportOptions, ServerOptions};

/// A disk, or a node by its name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct NodeOrDevice {
    /// The disk.
    #[serde(default)]
    pub device: Option<String>,
    /// The node.
    #[serde(default)]
    pub node_name: Option<String>,
}

/// Rates of a disk (`block_set_io_throttle`); 0 for no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BlockIoThrottle {
    /// The disk.
    #[serde(default)]
    pub device: Option<String>,
    /// The disk, too.
    #[serde(default)]
    pub id: Option<String>,
    /// Bytes a second.
    pub bps: u64,
    /// Bytes read a second.
    pub bps_rd: u64,
    /// Bytes written a second.
    pub bps_wr: u64,
    /// Operations a second.
    pub iops: u64,
    /// Reads a second.
    pub iops_rd: u64,
    /// Writes a second.
    pub iops_wr: u64,
    /// Bytes a second in a burst.
    #[serde(default)]
    pub bps_max: Option<u64>,
    /// Bytes read a second in a burst.
    #[serde(default)]
    pub bps_rd_max: Option<u64>,
    /// Bytes written a second in a burst.
    #[serde(default)]
    pub bps_wr_max: Option<u64>,
    /// Operations a second in a burst.
    #[serde(default)]
    pub iops_max: Option<u64>,
    /// Reads a second in a burst.
    #[serde(default)]
    pub iops_rd_max: Option<u64>,
    /// Writes a second in a burst.
    #[serde(default)]
    pub iops_wr_max: Option<u64>,
    /// Length of a burst in seconds.
    #[serde(default)]
    pub bps_max_length: Option<u64>,
    /// Length of a burst in seconds.
    #[serde(default)]
    pub bps_rd_max_length: Option<u64>,
    /// Length of a burst in seconds.
    #[serde(default)]
    pub bps_wr_max_length: Option<u64>,
    /// Length of a burst in seconds.
    #[serde(default)]
    pub iops_max_length: Option<u64>,
    /// Length of a burst in seconds.
    #[serde(default)]
    pub iops_rd_max_length: Option<u64>,
    /// Length of a burst in seconds.
    #[serde(default)]
    pub iops_wr_max_length: Option<u64>,
    /// Bytes that count as one operation.
    #[serde(default)]
    pub iops_size: Option<u64>,
    /// Name of the group that the disk joins; its own name if absent.
    #[serde(default)]
    pub group: Option<String>,
}

/// Begins or ends histograms (`block-latency-histogram-set`); boundaries are in nanoseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct HistogramSet {
    /// The disk.
    pub id: String,
    /// Of everything that has none of its own.
    #[serde(default)]
    pub boundaries: Option<Vec<u64>>,
    /// Of reads.
    #[serde(default)]
    pub boundaries_read: Option<Vec<u64>>,
    /// Of writes.
    #[serde(default)]
    pub boundaries_write: Option<Vec<u64>>,
    /// Of flushes.
    #[serde(default)]
    pub boundaries_flush: Option<Vec<u64>>,
}

impl HistogramSet {
    /// The boundaries of each kind of requests that has some; nothing at all ends all histograms.
    pub(crate) fn of(&self, kind: Kind) -> Option<&Vec<u64>> {
        let own = match kind {
            Kind::Read => &self.boundaries_read,
            Kind::Write => &self.boundaries_write,
            Kind::Flush => &self.boundaries_flush,
            Kind::Unmap => &None,
        };
        own.as_ref().or(self.boundaries.as_ref().filter(|_| kind != Kind::Unmap))
    }
}

/// Something that is asked of the graph. The answer is QEMU's JSON.
#[derive(Debug)]
pub enum StorageRequest {
    /// `blockdev-add`.
    Add(Box<BlockdevOptions>),
    /// `blockdev-del`.
    Delete(String),
    /// `blockdev-reopen`.
    Reopen(Vec<BlockdevOptions>),
    /// `query-named-block-nodes`; images are shown within images unless it says so (`flat`).
    Nodes(bool),
    /// `query-block`.
    Block,
    /// `query-blockstats`, of all nodes if it says so.
    Stats(bool),
    /// `block_set_io_throttle`.
    Throttle(Box<BlockIoThrottle>),
    /// `block-latency-histogram-set`.
    Histogram(HistogramSet),
    /// `block_resize`, in bytes.
    Resize(NodeOrDevice, u64),
    /// `block-set-write-threshold`: node and offset in bytes.
    Threshold(String, u64),
    /// `object-add`.
    ObjectAdd(Map<String, Value>),
    /// `object-del`.
    ObjectDelete(String),
    /// `qom-set` of a throttle group's `limits`.
    SetLimits(String, Map<String, Value>),
    /// `qom-get` of a throttle group's `limits`.
    GetLimits(String),
    /// `nbd-server-start`.
    ServerStart(ServerOptions),
    /// `nbd-server-stop`.
    ServerStop,
    /// `block-export-add`.
    ExportAdd(ExportOptions),
    /// `block-export-del`: id, and whether clients are sent away.
    ExportDelete(String, bool),
    /// `query-block-exports`.
    Exports,
    /// `blockdev-mirror`.
    Mirror(Box<MirrorOptions>),
    /// `query-jobs`.
    Jobs,
    /// `query-block-jobs`.
    BlockJobs,
    /// What is asked of the job of this id; the flag says that it is asked as of a block job.
    Job(String, JobVerb, bool),
}
