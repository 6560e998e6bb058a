//! Gathers what monitors are shown of the graph.

use std::sync::Arc;

use holdfast_block::facts::ImageInfo;
use holdfast_block::nodes::NamedNode;
use holdfast_block::options::{BlockdevOptions, DetectZeroes};
use holdfast_block::qcow2::bitmap::Bitmap;
use holdfast_block::{BlockNode, SECTOR};
use holdfast_objects::throttle::{Limits, Rate};
use holdfast_virtio::blk::Blk;
use holdfast_virtio::blk::stats::{Count, Kind};

use super::Storage;
use super::shown::{
    BlockDeviceInfo, BlockDeviceStats, BlockDirtyInfo, BlockInfo, BlockLatencyHistogramInfo, BlockStats,
    BlockdevCacheInfo, ShownLimits,
};

/// What a name of a file shows: the path where there is one, the options otherwise.
fn file_name(node: &NamedNode) -> String {
    match node.path() {
        Some(path) => path.display().to_string(),
        None => {
            let options = node.options();
            let shown = serde_json::to_string(&BlockdevOptions { node_name: None, ..options });
            format!("json:{}", shown.unwrap_or_default())
        }
    }
}

/// A node's image, and, unless `flat`, those below it within.
fn image(node: &Arc<NamedNode>, flat: bool) -> ImageInfo {
    let name = file_name(node);
    let mut info = match node.inner() {
        Ok(inner) => ImageInfo::of(&name, &*inner),
        Err(_) => ImageInfo::of(&name, &**node),
    };
    info.virtual_size = info.virtual_size.next_multiple_of(SECTOR);
    if !flat {
        info.backing_image = node.child("backing").map(|below| Box::new(image(&below, false)));
    }
    info
}

fn depth(node: &Arc<NamedNode>) -> u64 {
    let mut depth = 0;
    let mut next = node.backing();
    while let Some(below) = next {
        depth += 1;
        next = below.backing();
    }
    depth
}

/// Limits as they are shown.
fn limits(limits: &Limits, group: Option<String>) -> ShownLimits {
    let [bps, bps_rd, bps_wr, iops, iops_rd, iops_wr] = limits.rates;
    let max = |rate: Rate| (rate.max != 0).then_some(rate.max);
    let length = |rate: Rate| (rate.max != 0).then_some(rate.length);
    ShownLimits {
        bps: bps.average,
        bps_rd: bps_rd.average,
        bps_wr: bps_wr.average,
        iops: iops.average,
        iops_rd: iops_rd.average,
        iops_wr: iops_wr.average,
        bps_max: max(bps),
        bps_rd_max: max(bps_rd),
        bps_wr_max: max(bps_wr),
        iops_max: max(iops),
        iops_rd_max: max(iops_rd),
        iops_wr_max: max(iops_wr),
        bps_max_length: length(bps),
        bps_rd_max_length: length(bps_rd),
        bps_wr_max_length: length(bps_wr),
        iops_max_length: length(iops),
        iops_rd_max_length: length(iops_rd),
        iops_wr_max_length: length(iops_wr),
        iops_size: (limits.iops_size != 0).then_some(limits.iops_size),
        group,
    }
}

fn dirty(bitmap: &Bitmap) -> BlockDirtyInfo {
    let set: u64 = bitmap.bits.iter().map(|b| u64::from(b.count_ones())).sum();
    BlockDirtyInfo {
        name: bitmap.name.clone(),
        count: (set << bitmap.granularity_bits) as i64,
        granularity: 1 << bitmap.granularity_bits,
        recording: bitmap.enabled && !bitmap.inconsistent,
        busy: false,
        persistent: true,
        inconsistent: bitmap.inconsistent.then_some(true),
    }
}

/// A node, and the disk that shows it.
fn device_info(storage: &Storage, node: &Arc<NamedNode>, disk: Option<&Blk>, flat: bool) -> BlockDeviceInfo {
    let options = node.options();
    let cache = options.cache.unwrap_or_default();
    let group = disk.and_then(Blk::throttle);
    let image = image(node, flat);
    let bitmaps: Vec<_> = node
        .inner()
        .ok()
        .and_then(|inner| inner.as_qcow2().map(|q| q.bitmaps().iter().map(dirty).collect()))
        .unwrap_or_default();
    BlockDeviceInfo {
        file: file_name(node),
        node_name: node.name().to_owned(),
        ro: node.is_readonly(),
        drv: node.driver().to_owned(),
        backing_file: node.backing().and_then(|b| b.path()).map(|p| p.display().to_string()),
        backing_file_depth: depth(node),
        encrypted: image.encrypted == Some(true),
        detect_zeroes: options.detect_zeroes.unwrap_or(DetectZeroes::Off),
        limits: limits(
            &group.as_ref().map(|g| g.limits()).unwrap_or_default(),
            disk.and_then(|d| storage.group_name(d)),
        ),
        image,
        cache: BlockdevCacheInfo {
            writeback: true,
            direct: cache.direct.unwrap_or(false),
            no_flush: cache.no_flush.unwrap_or(false),
        },
        write_threshold: node.write_threshold(),
        dirty_bitmaps: Some(bitmaps).filter(|b| !b.is_empty()),
        active: true,
    }
}

/// `query-named-block-nodes`; images are shown within images unless `flat`.
pub fn named_nodes(storage: &Storage, flat: bool) -> Vec<BlockDeviceInfo> {
    storage.nodes().list().iter().map(|node| device_info(storage, node, None, flat)).collect()
}

fn device_path(disk: &Blk) -> String {
    format!("/machine/peripheral/{}/virtio-backend", disk.id())
}

/// `query-block`.
pub fn block_info(storage: &Storage, disks: &[Arc<Blk>]) -> Vec<BlockInfo> {
    let disk = |disk: &Arc<Blk>| {
        let node = storage.nodes().find(&disk.node()).ok();
        BlockInfo {
            device: disk.id().to_owned(),
            qdev: Some(device_path(disk)),
            kind: "unknown".to_owned(),
            removable: false,
            locked: false,
            inserted: node.map(|node| device_info(storage, &node, Some(disk), false)),
            io_status: Some(disk.io_status().to_owned()),
        }
    };
    disks.iter().map(disk).collect()
}

fn histogram(count: &Count) -> Option<BlockLatencyHistogramInfo> {
    let h = count.histogram.as_ref()?;
    Some(BlockLatencyHistogramInfo { boundaries: h.boundaries.clone(), bins: h.bins.clone() })
}

/// What a disk has done.
fn device_stats(disk: &Blk) -> BlockDeviceStats {
    let [rd, wr, flush, unmap] = Kind::ALL.map(|kind| disk.count(kind));
    let (highest, idle) = disk.progress();
    BlockDeviceStats {
        rd_bytes: rd.bytes,
        wr_bytes: wr.bytes,
        unmap_bytes: unmap.bytes,
        rd_operations: rd.ops,
        wr_operations: wr.ops,
        flush_operations: flush.ops,
        unmap_operations: unmap.ops,
        rd_total_time_ns: rd.nanoseconds,
        wr_total_time_ns: wr.nanoseconds,
        flush_total_time_ns: flush.nanoseconds,
        unmap_total_time_ns: unmap.nanoseconds,
        wr_highest_offset: highest,
        idle_time_ns: idle,
        failed_rd_operations: rd.failed,
        failed_wr_operations: wr.failed,
        failed_flush_operations: flush.failed,
        failed_unmap_operations: unmap.failed,
        invalid_rd_operations: rd.invalid,
        invalid_wr_operations: wr.invalid,
        invalid_flush_operations: flush.invalid,
        invalid_unmap_operations: unmap.invalid,
        account_invalid: true,
        account_failed: true,
        rd_latency_histogram: histogram(&rd),
        wr_latency_histogram: histogram(&wr),
        flush_latency_histogram: histogram(&flush),
        ..BlockDeviceStats::default()
    }
}

/// A node, the nodes of its files, and, if `all`, of the images below. Only disks count requests; nodes know how far writes went.
fn node_stats(node: &Arc<NamedNode>, all: bool) -> BlockStats {
    let below = |role| node.child(role).map(|child| Box::new(node_stats(&child, all)));
    BlockStats {
        device: None,
        qdev: None,
        node_name: Some(node.name().to_owned()),
        stats: BlockDeviceStats { wr_highest_offset: node.highest_write(), ..BlockDeviceStats::default() },
        parent: below("file"),
        backing: if all { below("backing") } else { None },
    }
}

/// `query-blockstats`: of all nodes if `nodes`, of disks otherwise.
pub fn block_stats(storage: &Storage, disks: &[Arc<Blk>], nodes: bool) -> Vec<BlockStats> {
    if nodes {
        return storage.nodes().list().iter().map(|node| node_stats(node, false)).collect();
    }
    let disk = |disk: &Arc<Blk>| {
        let below = storage.nodes().find(&disk.node()).ok().map(|node| node_stats(&node, true));
        let (parent, backing) = below.map_or((None, None), |b| (b.parent, b.backing));
        BlockStats {
            device: Some(disk.id().to_owned()),
            qdev: Some(device_path(disk)),
            node_name: Some(disk.node()),
            stats: device_stats(disk),
            parent,
            backing,
        }
    };
    disks.iter().map(disk).collect()
}
