//! What monitors are shown of the graph, in QEMU's JSON.

use std::sync::Arc;

use holdfast_block::facts::{luks_json, qcow2_specific};
use holdfast_block::nodes::NamedNode;
use holdfast_block::options::BlockdevOptions;
use holdfast_block::qcow2::header::incompatible;
use holdfast_block::{BlockNode, SECTOR};
use holdfast_objects::throttle::{Limits, Rate};
use holdfast_virtio::blk::Blk;
use holdfast_virtio::blk::stats::{Count, Kind};
use serde_json::{Map, Value, json};

use super::Storage;

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

/// `ImageInfo`.
fn image(node: &NamedNode) -> Value {
    let mut info = Map::new();
    let mut put = |key: &str, value: Value| drop(info.insert(key.to_owned(), value));
    put("virtual-size", json!(node.size().next_multiple_of(SECTOR)));
    put("filename", json!(file_name(node)));
    put("format", json!(node.driver()));
    put("actual-size", json!(node.disk_usage()));
    let mut dirty = false;
    let inner = node.inner().ok();
    if let Some(image) = inner.as_ref().and_then(|i| i.as_qcow2()) {
        let header = image.header();
        put("cluster-size", json!(header.cluster_size()));
        put("format-specific", qcow2_specific(image));
        if header.crypt_method != 0 {
            put("encrypted", json!(true));
        }
        dirty = header.incompatible & incompatible::DIRTY != 0;
        if let Some(name) = &header.backing_file {
            put("backing-filename", json!(name));
            let full = node.path().and_then(|p| p.parent().map(|d| d.join(name)));
            put("full-backing-filename", json!(full.map_or(name.clone(), |p| p.display().to_string())));
            if let Some(format) = &header.backing_format {
                put("backing-filename-format", json!(format));
            }
        }
    } else if let Some(header) = inner.as_ref().and_then(|i| i.as_luks()).and_then(|l| l.header().ok()) {
        put("encrypted", json!(true));
        put("format-specific", json!({ "type": "luks", "data": luks_json(&header, false) }));
    } else if node.driver() == "file" {
        put("format-specific", json!({ "type": "file", "data": {} }));
    }
    put("dirty-flag", json!(dirty));
    Value::Object(info)
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

/// The rates of `BlockDeviceInfo`.
fn rates(limits: &Limits, out: &mut Map<String, Value>) {
    for (rate, name) in limits.rates.iter().zip(["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"]) {
        let Rate { average, max, length } = *rate;
        out.insert(name.to_owned(), json!(average));
        if max != 0 {
            out.insert(format!("{name}_max"), json!(max));
            out.insert(format!("{name}_max_length"), json!(length));
        }
    }
    if limits.iops_size != 0 {
        out.insert("iops_size".to_owned(), json!(limits.iops_size));
    }
}

/// `BlockDeviceInfo` of a node, and of the disk that shows it.
fn device_info(storage: &Storage, node: &Arc<NamedNode>, disk: Option<&Blk>) -> Value {
    let options = node.options();
    let cache = options.cache.unwrap_or_default();
    let mut info = Map::new();
    let group = disk.and_then(Blk::throttle);
    rates(&group.as_ref().map(|g| g.limits()).unwrap_or_default(), &mut info);
    let mut put = |key: &str, value: Value| drop(info.insert(key.to_owned(), value));
    if let Some(name) = disk.and_then(|d| storage.group_name(d)) {
        put("group", json!(name));
    }
    let encrypted = node.inner().is_ok_and(|inner| {
        inner.as_luks().is_some() || inner.as_qcow2().is_some_and(|q| q.header().crypt_method != 0)
    });
    let file = file_name(node);
    if let Some(below) = node.backing().and_then(|b| b.path()) {
        put("backing_file", json!(below));
    }
    put("detect_zeroes", json!("off"));
    put("image", image(node));
    put("ro", json!(node.is_readonly()));
    put("active", json!(true));
    put("node-name", json!(node.name()));
    put("backing_file_depth", json!(depth(node)));
    put("drv", json!(node.driver()));
    put("write_threshold", json!(node.write_threshold()));
    put("encrypted", json!(encrypted));
    put(
        "cache",
        json!({
            "no-flush": cache.no_flush.unwrap_or(false),
            "direct": cache.direct.unwrap_or(false),
            "writeback": true,
        }),
    );
    put("file", json!(file));
    Value::Object(info)
}

/// `query-named-block-nodes`.
pub fn named_nodes(storage: &Storage) -> Value {
    storage.nodes().list().iter().map(|node| device_info(storage, node, None)).collect()
}

/// `query-block`.
pub fn block_info(storage: &Storage, disks: &[Arc<Blk>]) -> Value {
    let disk = |disk: &Arc<Blk>| {
        let mut info = Map::new();
        let mut put = |key: &str, value: Value| drop(info.insert(key.to_owned(), value));
        put("device", json!(disk.id()));
        put("qdev", json!(format!("/machine/peripheral/{}/virtio-backend", disk.id())));
        put("type", json!("unknown"));
        put("removable", json!(false));
        put("locked", json!(false));
        put("io-status", json!(disk.io_status()));
        if let Ok(node) = storage.nodes().find(disk.node()) {
            put("inserted", device_info(storage, &node, Some(disk)));
        }
        Value::Object(info)
    };
    disks.iter().map(disk).collect()
}

fn histogram(count: &Count) -> Option<Value> {
    let h = count.histogram.as_ref()?;
    Some(json!({ "boundaries": h.boundaries, "bins": h.bins }))
}

/// `BlockDeviceStats` of a disk.
fn device_stats(disk: &Blk) -> Value {
    let mut stats = Map::new();
    let (highest, idle) = disk.progress();
    for (kind, name) in
        [(Kind::Read, "rd"), (Kind::Write, "wr"), (Kind::Flush, "flush"), (Kind::Unmap, "unmap")]
    {
        let count = disk.count(kind);
        let mut put = |key: String, value: u64| drop(stats.insert(key, json!(value)));
        if kind != Kind::Flush {
            put(format!("{name}_bytes"), count.bytes);
            put(format!("{name}_merged"), 0);
        }
        put(format!("{name}_operations"), count.ops);
        put(format!("{name}_total_time_ns"), count.nanoseconds);
        put(format!("failed_{name}_operations"), count.failed);
        put(format!("invalid_{name}_operations"), count.invalid);
        if let Some(histogram) = histogram(&count) {
            stats.insert(format!("{name}_latency_histogram"), histogram);
        }
    }
    stats.insert("wr_highest_offset".to_owned(), json!(highest));
    if let Some(idle) = idle {
        stats.insert("idle_time_ns".to_owned(), json!(idle));
    }
    stats.insert("account_invalid".to_owned(), json!(true));
    stats.insert("account_failed".to_owned(), json!(true));
    stats.insert("timed_stats".to_owned(), json!([]));
    Value::Object(stats)
}

/// `query-blockstats`.
pub fn block_stats(disks: &[Arc<Blk>]) -> Value {
    let disk = |disk: &Arc<Blk>| {
        json!({
            "device": disk.id(),
            "qdev": format!("/machine/peripheral/{}/virtio-backend", disk.id()),
            "node-name": disk.node(),
            "stats": device_stats(disk),
        })
    };
    disks.iter().map(disk).collect()
}
