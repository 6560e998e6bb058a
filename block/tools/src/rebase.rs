//! `rebase`.

use std::path::Path;
use std::sync::Arc;

use holdfast_block::BlockNode;
use holdfast_block::graph::{Backing, beside};
use holdfast_block::node::is_zero;
use holdfast_block::options::Driver;

use crate::common::{Progress, Result, Source, failed, qcow2, refused};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the image; found out if absent
    #[arg(short = 'f', long)]
    format: Option<String>,
    /// The new backing file; none if empty
    #[arg(short = 'b', long, required = true)]
    backing: String,
    /// Its format
    #[arg(short = 'F', long)]
    backing_format: Option<String>,
    /// Change the name only: the contents are known to be the same
    #[arg(short = 'u', long = "backing-unsafe")]
    unsafe_mode: bool,
    /// Compress what is copied
    #[arg(short = 'c', long)]
    compress: bool,
    /// Show how far it is
    #[arg(short, long)]
    progress: bool,
    /// Cache mode of the image
    #[arg(short = 't', long)]
    cache: Option<String>,
    /// Cache mode of the backing files
    #[arg(short = 'T', long = "backing-cache")]
    source_cache: Option<String>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// The image is given by options
    #[arg(long)]
    image_opts: bool,
    /// Others may be writing the backing files
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    filename: String,
}

const CHUNK: u64 = 2 << 20;

/// Reads from a node that may be shorter, or none at all.
fn read(node: Option<&Arc<dyn BlockNode>>, offset: u64, buf: &mut [u8]) -> Result<()> {
    let there = node.map_or(0, |n| n.size().saturating_sub(offset).min(buf.len() as u64)) as usize;
    let (data, rest) = buf.split_at_mut(there);
    rest.fill(0);
    match node {
        Some(node) if !data.is_empty() => {
            node.read_at(offset, data).map_err(failed("error while reading from the backing file"))
        }
        _ => Ok(()),
    }
}

/// Copies into the image what the two backing files do not have in common.
fn copy_differences(
    node: &Arc<dyn BlockNode>,
    old: Option<&Arc<dyn BlockNode>>,
    new: Option<&Arc<dyn BlockNode>>,
    args: &Args,
) -> Result<()> {
    let image = qcow2(node, "rebase")?;
    let cluster = image.header().cluster_size();
    let size = node.size();
    let mut progress = Progress::new((args.progress, args.quiet), size);
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < size {
        let extent = node.status(at, size - at).map_err(failed("error while reading image metadata"))?;
        let len = extent.len.max(1);
        if extent.allocated {
            at += len;
            progress.add(len);
            continue;
        }
        let len = len.min(CHUNK);
        before.resize(len as usize, 0);
        after.resize(len as usize, 0);
        read(old, at, &mut before)?;
        read(new, at, &mut after)?;
        for (n, (x, y)) in before.chunks(cluster as usize).zip(after.chunks(cluster as usize)).enumerate() {
            if x == y {
                continue;
            }
            let offset = at + n as u64 * cluster;
            let written = if is_zero(x) {
                node.write_zeroes(offset, x.len() as u64, true)
            } else if args.compress && offset.is_multiple_of(cluster) {
                image.write_compressed(offset, x)
            } else {
                node.write_at(offset, x)
            };
            written.map_err(failed("Error while writing to COW image"))?;
        }
        at += len;
        progress.add(len);
    }
    Ok(())
}

/// `rebase`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    if args.unsafe_mode && args.compress {
        return refused("Cannot use -c with -u");
    }
    let source = Source {
        image_opts: args.image_opts,
        cache: args.cache.as_deref(),
        ..Source::new(&args.filename, args.format.as_deref())
    };
    let mut opener = source.opener(true)?;
    if args.unsafe_mode {
        opener.backing = Backing::Ignore;
    }
    let node = source.open_with(&opener)?;
    let image = qcow2(&node, "A backing file")?;
    if image.header().has_data_file() && image.header().autoclear & 2 != 0 && !args.backing.is_empty() {
        return refused("a backing file and a raw data file cannot be used at the same time");
    }
    if let Some(format) = &args.backing_format
        && Driver::from_name(format).is_err()
    {
        return refused(format!("Invalid format name: '{format}'"));
    }
    if !args.backing.is_empty() && args.backing_format.is_none() {
        return refused("Could not change the backing file: backing format must be specified (-F)");
    }
    if !args.unsafe_mode {
        let directory = Path::new(&args.filename).parent().map(Path::to_owned).unwrap_or_default();
        let place = beside(&directory, &args.backing);
        let new = if args.backing.is_empty() {
            None
        } else {
            let source = Source {
                share: args.force_share,
                cache: args.source_cache.as_deref(),
                ..Source::new(&place, args.backing_format.as_deref())
            };
            Some(source.open(false)?)
        };
        let old = node.backing();
        if image.header().backing_file.is_some() && old.is_none() {
            return refused("the old backing file could not be opened");
        }
        copy_differences(&node, old.as_ref(), new.as_ref(), args)?;
    }
    let name = Some(args.backing.clone()).filter(|b| !b.is_empty());
    let format = args.backing_format.clone().filter(|_| name.is_some());
    image
        .set_backing_name(name, format)
        .map_err(failed(format!("Could not change the backing file to '{}'", args.backing)))?;
    image.close().map_err(failed("Could not close the image"))?;
    Ok(0)
}
