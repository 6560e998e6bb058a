//! What monitors are shown of disks and nodes, with QEMU's names and types (its `block-core.json` and `block-export.json`).

use holdfast_block::facts::ImageInfo;
use holdfast_block::options::DetectZeroes;
use schemars::JsonSchema;
use serde::Serialize;

/// How a node caches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevCacheInfo {
    /// Writes are done before they are durable.
    pub writeback: bool,
    /// The host's page cache is left out.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
}

/// A dirty bitmap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct BlockDirtyInfo {
    /// Its name.
    pub name: String,
    /// Bytes of the disk that are dirty.
    pub count: i64,
    /// Bytes of the disk for a bit.
    pub granularity: u32,
    /// Writes set bits in it.
    pub recording: bool,
    /// Somebody uses it.
    pub busy: bool,
    /// It is stored in the image.
    pub persistent: bool,
    /// It was not closed and cannot be trusted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inconsistent: Option<bool>,
}

/// Limits of a disk; 0 for none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ShownLimits {
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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_max: Option<u64>,
    /// Bytes read a second in a burst.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_rd_max: Option<u64>,
    /// Bytes written a second in a burst.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_wr_max: Option<u64>,
    /// Operations a second in a burst.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_max: Option<u64>,
    /// Reads a second in a burst.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_rd_max: Option<u64>,
    /// Writes a second in a burst.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_wr_max: Option<u64>,
    /// Length of a burst in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_max_length: Option<u64>,
    /// Length of a burst in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_rd_max_length: Option<u64>,
    /// Length of a burst in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_wr_max_length: Option<u64>,
    /// Length of a burst in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_max_length: Option<u64>,
    /// Length of a burst in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_rd_max_length: Option<u64>,
    /// Length of a burst in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_wr_max_length: Option<u64>,
    /// Bytes that count as one operation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_size: Option<u64>,
    /// The group that shares them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
}

/// A node, and the limits of the disk that shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct BlockDeviceInfo {
    /// Its file.
    pub file: String,
    /// Its name.
    #[serde(rename = "node-name")]
    pub node_name: String,
    /// It is not written.
    pub ro: bool,
    /// Its driver.
    pub drv: String,
    /// The file of the image below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_file: Option<String>,
    /// Images below it.
    pub backing_file_depth: u64,
    /// It is encrypted.
    pub encrypted: bool,
    /// What becomes of writes of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Limits.
    #[serde(flatten)]
    pub limits: ShownLimits,
    /// The image.
    pub image: ImageInfo,
    /// How it caches.
    pub cache: BlockdevCacheInfo,
    /// See `block-set-write-threshold`.
    pub write_threshold: u64,
    /// Its bitmaps.
    #[serde(rename = "dirty-bitmaps", skip_serializing_if = "Option::is_none")]
    pub dirty_bitmaps: Option<Vec<BlockDirtyInfo>>,
    /// It is in use by this VM, not by one that it has moved to.
    pub active: bool,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct BlockInfo {
    /// Its id.
    pub device: String,
    /// The path of its device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qdev: Option<String>,
    /// Always `unknown`, with QEMU too.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its medium can be changed.
    pub removable: bool,
    /// The guest keeps the medium in.
    pub locked: bool,
    /// The node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inserted: Option<BlockDeviceInfo>,
    /// What stopped the VM, if anything did: `ok`, `failed`, `nospace`.
    #[serde(rename = "io-status", skip_serializing_if = "Option::is_none")]
    pub io_status: Option<String>,
}

/// How many requests took how long, in nanoseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct BlockLatencyHistogramInfo {
    /// Where one bin ends and the next begins.
    pub boundaries: Vec<u64>,
    /// Requests.
    pub bins: Vec<u64>,
}

/// What was counted in the last seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct BlockDeviceTimedStats {
    /// How many seconds these are.
    pub interval_length: u64,
}

/// What a disk has done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct BlockDeviceStats {
    /// Bytes read.
    pub rd_bytes: u64,
    /// Bytes written.
    pub wr_bytes: u64,
    /// Bytes discarded.
    pub unmap_bytes: u64,
    /// Reads.
    pub rd_operations: u64,
    /// Writes.
    pub wr_operations: u64,
    /// Flushes.
    pub flush_operations: u64,
    /// Discards.
    pub unmap_operations: u64,
    /// Nanoseconds spent reading.
    pub rd_total_time_ns: u64,
    /// Nanoseconds spent writing.
    pub wr_total_time_ns: u64,
    /// Nanoseconds spent flushing.
    pub flush_total_time_ns: u64,
    /// Nanoseconds spent discarding.
    pub unmap_total_time_ns: u64,
    /// The end of the write that came furthest.
    pub wr_highest_offset: u64,
    /// Reads that were joined with others.
    pub rd_merged: u64,
    /// Writes that were joined with others.
    pub wr_merged: u64,
    /// Discards that were joined with others.
    pub unmap_merged: u64,
    /// Nanoseconds since the last request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_time_ns: Option<u64>,
    /// Reads that failed.
    pub failed_rd_operations: u64,
    /// Writes that failed.
    pub failed_wr_operations: u64,
    /// Flushes that failed.
    pub failed_flush_operations: u64,
    /// Discards that failed.
    pub failed_unmap_operations: u64,
    /// Reads that made no sense.
    pub invalid_rd_operations: u64,
    /// Writes that made no sense.
    pub invalid_wr_operations: u64,
    /// Flushes that made no sense.
    pub invalid_flush_operations: u64,
    /// Discards that made no sense.
    pub invalid_unmap_operations: u64,
    /// Requests that make no sense end idle time.
    pub account_invalid: bool,
    /// Requests that fail end idle time.
    pub account_failed: bool,
    /// Intervals that are counted apart: none can be asked for.
    pub timed_stats: Vec<BlockDeviceTimedStats>,
    /// How long reads took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rd_latency_histogram: Option<BlockLatencyHistogramInfo>,
    /// How long writes took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wr_latency_histogram: Option<BlockLatencyHistogramInfo>,
    /// How long flushes took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flush_latency_histogram: Option<BlockLatencyHistogramInfo>,
}

/// A disk or a node, and the nodes below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockStats {
    /// The disk's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The path of its device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qdev: Option<String>,
    /// The node's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// What it has done.
    pub stats: BlockDeviceStats,
    /// The node of its file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<Box<BlockStats>>,
    /// The node of the image below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<Box<BlockStats>>,
}

/// Kinds of exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BlockExportType {
    /// By the NBD server.
    Nbd,
}

/// An export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockExportInfo {
    /// Its id.
    pub id: String,
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: BlockExportType,
    /// The node.
    pub node_name: String,
    /// It goes when its clients have gone.
    pub shutting_down: bool,
}
