//! `commit`.

use std::sync::Arc;

use holdfast_block::BlockNode;
use holdfast_block::graph::beside;
use holdfast_block::throttle::Throttle;
use std::path::Path;

use crate::common::{Progress, Result, Source, failed, print, qcow2, rate_limit, refused};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the image; found out if absent
    #[arg(short, long)]
    format: Option<String>,
    /// The file of the chain to write to, if it is not the next one
    #[arg(short, long)]
    base: Option<String>,
    /// Leave the image as it is
    #[arg(short, long)]
    drop: bool,
    /// Show how far it is
    #[arg(short, long)]
    progress: bool,
    /// Bytes per second
    #[arg(short, long = "rate")]
    rate_limit: Option<String>,
    /// Cache mode
    #[arg(short = 't', long)]
    cache: Option<String>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// The image is given by options
    #[arg(long)]
    image_opts: bool,
    /// The image
    filename: String,
}

const CHUNK: u64 = 2 << 20;

/// Names of the chain, from the image's backing file down, with their formats.
fn chain(node: &Arc<dyn BlockNode>, filename: &str) -> Vec<(String, Option<String>)> {
    let mut out = Vec::new();
    let mut next = Some(Arc::clone(node));
    let mut here = filename.to_owned();
    while let Some(n) = next {
        let Some(header) = n.as_qcow2().map(|q| q.header()) else { break };
        let Some(name) = header.backing_file else { break };
        let directory = Path::new(&here).parent().map(Path::to_owned).unwrap_or_default();
        here = beside(&directory, &name);
        out.push((here.clone(), header.backing_format));
        next = n.backing();
    }
    out
}

fn copy_up(
    top: &Arc<dyn BlockNode>,
    base: &Arc<dyn BlockNode>,
    levels: usize,
    progress: &mut Progress,
) -> Result<()> {
    let size = top.size();
    let mut buf = Vec::new();
    let mut at = 0;
    while at < size {
        let (extent, depth) = holdfast_block::node::status_above(&**top, at, size - at)
            .map_err(failed("error while reading image metadata"))?;
        let mut len = extent.len.max(1);
        if extent.allocated && depth < levels {
            if extent.zero {
                base.write_zeroes(at, len, true)
                    .map_err(failed("error while writing to the backing file"))?;
            } else {
                len = len.min(CHUNK);
                buf.resize(len as usize, 0);
                top.read_at(at, &mut buf).map_err(failed("error while reading the image"))?;
                base.write_at(at, &buf).map_err(failed("error while writing to the backing file"))?;
            }
        }
        at += len;
        progress.add(len);
    }
    Ok(())
}

/// `commit`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let limit = rate_limit(args.rate_limit.as_deref())?;
    let source = |cache| Source {
        image_opts: args.image_opts,
        cache,
        ..Source::new(&args.filename, args.format.as_deref())
    };
    // The names first; then the base is opened for writing, which nobody else may have open by then.
    let names = {
        let node = source(None).open(false)?;
        chain(&node, &args.filename)
    };
    let level = match &args.base {
        None => 0,
        Some(base) => match names
            .iter()
            .position(|(n, _)| n == base || std::fs::canonicalize(n).ok() == std::fs::canonicalize(base).ok())
        {
            Some(n) => n,
            None => {
                return refused(format!("Did not find '{base}' in the backing chain of '{}'", args.filename));
            }
        },
    };
    let Some((base_name, base_format)) = names.get(level) else {
        return refused("Image does not have a backing file");
    };
    let mut opener = source(args.cache.as_deref()).opener(true)?;
    // The base is both a backing file here and written below: this process knows what it does.
    opener.share = true;
    let node = source(args.cache.as_deref()).open_with(&opener)?;
    let image = qcow2(&node, "commit")?;
    let mut base_opener = Source::new(base_name, base_format.as_deref()).opener(true)?;
    base_opener.lock = holdfast_block::raw::LockRange::Qemu;
    let base = Source::new(base_name, base_format.as_deref()).open_with(&base_opener)?;
    let base = match limit {
        Some(group) => Throttle::new(base, group),
        None => base,
    };
    let old = base.size();
    if old < node.size() {
        base.truncate(node.size(), holdfast_block::Preallocation::Off)
            .map_err(failed("the backing file cannot be made as large as the image"))?;
        if !base.grows_by_zeroes() {
            base.write_zeroes(old, node.size() - old, true)
                .map_err(failed("error while writing to the backing file"))?;
        }
    }
    let mut progress = Progress::new((args.progress, args.quiet), node.size());
    copy_up(&node, &base, level + 1, &mut progress)?;
    base.flush().map_err(failed("the backing file cannot be flushed"))?;
    drop(progress);
    // With a base further down, the image's own backing file still lacks what was between.
    if !args.drop && level == 0 {
        image.make_empty().map_err(failed(format!("Could not empty {}", args.filename)))?;
    }
    image.close().map_err(failed("Could not close the image"))?;
    if !args.quiet {
        print("Image committed.\n")?;
    }
    Ok(0)
}
