//! `measure`.

use holdfast_block::node::status_above;
use holdfast_block::options::Driver;
use holdfast_block::qcow2;
use serde_json::json;

use crate::common::{Output, Result, Source, failed, print, print_json, refused, size_argument};
use crate::convert::at_snapshot;
use crate::create::{Target, target_driver};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the existing image; found out if absent
    #[arg(short = 'f', long)]
    format: Option<String>,
    /// Format of the new image
    #[arg(short = 'O', long, default_value = "raw")]
    target_format: String,
    /// Options of the new image
    #[arg(short, long)]
    options: Vec<String>,
    /// Size of the new image's disk
    #[arg(short, long, conflicts_with = "filename")]
    size: Option<String>,
    /// The existing image is this internal snapshot: an id or name, or `snapshot.id=`, `snapshot.name=`
    #[arg(short = 'l', long)]
    snapshot: Option<String>,
    /// Shape of the output
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// The existing image is given by options
    #[arg(long)]
    image_opts: bool,
    /// Others may be writing it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The existing image
    filename: Option<String>,
}

/// Clusters of `cluster` bytes in which an image has data.
fn allocated(node: &dyn holdfast_block::BlockNode, cluster: u64) -> Result<u64> {
    let mut bytes = 0;
    let mut at = 0;
    let mut counted_to = 0;
    let size = node.size();
    while at < size {
        let (extent, _) = status_above(node, at, size - at).map_err(failed("Unable to get block status"))?;
        let end = at + extent.len.max(1);
        if extent.data && !extent.zero {
            let from = (at - at % cluster).max(counted_to);
            let to = end.next_multiple_of(cluster);
            bytes += to.saturating_sub(from);
            counted_to = counted_to.max(to);
        }
        at = end;
    }
    Ok(bytes)
}

/// `measure`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let driver = target_driver(&args.target_format)?;
    if holdfast_block::foreign::is_foreign(driver) {
        return refused(format!("Block driver '{}' does not support size measurement", driver.name()));
    }
    let mut target = Target::new(driver);
    target.apply(&args.options)?;
    let node = match (&args.filename, &args.size) {
        (Some(name), _) => {
            let source = Source {
                image_opts: args.image_opts,
                share: args.force_share,
                ..Source::new(name, args.format.as_deref())
            };
            let node = source.open(false)?;
            Some(match &args.snapshot {
                Some(key) => at_snapshot(&node, name, key)?,
                None => node,
            })
        }
        (None, Some(_)) if args.snapshot.is_some() => return refused("-l needs an existing image"),
        (None, Some(size)) => {
            target.size = Some(size_argument(size, "image size")?);
            None
        }
        (None, None) => return refused("Either --size N or one filename must be specified."),
    };
    let size = node.as_ref().map_or(target.size.unwrap_or(0), |n| n.size()).next_multiple_of(512);
    target.settle()?;
    let mut bitmaps = None;
    let (required, full) = if driver == Driver::Qcow2 {
        target.options.size = size;
        let cluster = target.options.cluster_size;
        let prealloc = target.options.preallocation;
        let all = size.next_multiple_of(cluster.max(1));
        let used = match &node {
            _ if matches!(
                prealloc,
                holdfast_block::Preallocation::Falloc | holdfast_block::Preallocation::Full
            ) =>
            {
                all
            }
            Some(node) if cluster.is_power_of_two() => allocated(&**node, cluster)?,
            _ => 0,
        };
        let calculate = |n| {
            qcow2::measure(&target.options, n).map_err(|e| crate::common::ImgError::Refused(e.to_string()))
        };
        let image = node.as_ref().and_then(|n| n.as_qcow2());
        if let Some(image) = image.filter(|i| i.header().version >= 3) {
            bitmaps = Some(image.bitmaps().iter().map(|b| bitmap_bytes(b, size, cluster)).sum::<u64>());
        }
        (calculate(used)?, calculate(all)?)
    } else if driver == Driver::Luks {
        let all = size.saturating_add(target.luks_payload()?);
        (all, all)
    } else {
        // As other tools have it: nothing is known of holes in raw files.
        (size, size)
    };
    if args.output == Output::Json {
        let mut value = json!({ "required": required, "fully-allocated": full });
        if let (Some(bytes), Some(map)) = (bitmaps, value.as_object_mut()) {
            map.insert("bitmaps".into(), json!(bytes));
        }
        print_json(&value)?;
    } else {
        print(&format!("required size: {required}\nfully allocated size: {full}\n"))?;
        if let Some(bytes) = bitmaps {
            print(&format!("bitmaps size: {bytes}\n"))?;
        }
    }
    Ok(0)
}

/// Bytes that a bitmap takes in a new image.
fn bitmap_bytes(bitmap: &qcow2::bitmap::Bitmap, size: u64, cluster: u64) -> u64 {
    let bytes = size.div_ceil(1 << bitmap.granularity_bits).div_ceil(8).div_ceil(cluster) * cluster;
    bytes
        + (bytes / cluster * 8).next_multiple_of(cluster)
        + (24 + bitmap.name.len() as u64).next_multiple_of(8).next_multiple_of(cluster)
}
