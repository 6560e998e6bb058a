//! `convert`.

use std::path::Path;
use std::sync::Arc;

use holdfast_block::BlockNode;
use holdfast_block::graph::beside;
use holdfast_block::node::Preallocation;
use holdfast_block::options::Driver;

use crate::common::{ImgError, Progress, Result, Source, failed, print, rate_limit, refused, size_argument};
use crate::copy::{Offload, Part, Plan, copy};
use crate::create::{Target, check_backing, options_help, target_driver};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the source; found out if absent
    #[arg(short = 'f', long = "source-format")]
    format: Option<String>,
    /// Format of the target
    #[arg(short = 'O', long)]
    target_format: Option<String>,
    /// Options of the target; `-o help` lists them
    #[arg(short, long = "target-options")]
    options: Vec<String>,
    /// Backing file of the target, from which the source differs
    #[arg(short = 'B', long)]
    backing: Option<String>,
    /// Its format
    #[arg(short = 'F', long)]
    backing_format: Option<String>,
    /// Compress
    #[arg(short, long)]
    compress: bool,
    /// Show how far it is
    #[arg(short, long)]
    progress: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// The target exists already
    #[arg(short, long)]
    no_create: bool,
    /// The existing target reads as zeroes
    #[arg(long)]
    target_is_zero: bool,
    /// Cache mode of the target
    #[arg(short = 't', long, default_value = "unsafe")]
    target_cache: String,
    /// Cache mode of the source
    #[arg(short = 'T', long, default_value = "writeback")]
    source_cache: String,
    /// Shortest run of zeroes that is left out; 0 writes everything
    #[arg(short = 'S', long = "sparse-size")]
    sparse: Option<String>,
    /// The source is this internal snapshot: an id or name, or `snapshot.id=`, `snapshot.name=`
    #[arg(short = 'l', long = "source-snapshot")]
    snapshot: Option<String>,
    /// Have the host copy data without reading it, where it can
    #[arg(short = 'C', long = "copy-range-offloading")]
    offload: bool,
    /// Chunks at a time
    #[arg(short = 'm', long = "parallel", default_value = "8")]
    workers: usize,
    /// Writes need not be in order
    #[arg(short = 'W', long = "oob-writes")]
    unordered: bool,
    /// Bytes per second
    #[arg(short, long)]
    rate_limit: Option<String>,
    /// Take what cannot be read as zeroes
    #[arg(long)]
    salvage: bool,
    /// Copy persistent bitmaps too
    #[arg(long)]
    bitmaps: bool,
    /// With --bitmaps: leave out those that cannot be relied on
    #[arg(long)]
    skip_broken_bitmaps: bool,
    /// The sources are given by options
    #[arg(long)]
    image_opts: bool,
    /// The target is given by options
    #[arg(long)]
    target_image_opts: bool,
    /// Others may be writing the source
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The sources and the target
    #[arg(required = true)]
    files: Vec<String>,
}

fn sources(args: &Args, names: &[String]) -> Result<Vec<Arc<dyn BlockNode>>> {
    let mut out: Vec<Arc<dyn BlockNode>> = Vec::new();
    for name in names {
        let source = Source {
            image_opts: args.image_opts,
            share: args.force_share,
            cache: Some(&args.source_cache),
            ..Source::new(name, args.format.as_deref())
        };
        let node = source.open(false)?;
        match &args.snapshot {
            None => out.push(node),
            Some(_) if names.len() > 1 => {
                return refused("No support for concatenating multiple snapshot");
            }
            Some(key) => out.push(at_snapshot(&node, name, key)?),
        }
    }
    Ok(out)
}

pub(crate) fn at_snapshot(node: &Arc<dyn BlockNode>, name: &str, key: &str) -> Result<Arc<dyn BlockNode>> {
    let key = key.strip_prefix("snapshot.id=").or_else(|| key.strip_prefix("snapshot.name=")).unwrap_or(key);
    let Some(image) = node.as_qcow2() else {
        return refused(format!("Failed to load snapshot: '{name}' has none"));
    };
    let view = image.snapshot_view(key);
    let view = view.map_err(|source| ImgError::Image {
        what: "Failed to load snapshot of",
        name: name.to_owned(),
        source,
    })?;
    Ok(view)
}

fn new_target(args: &Args, name: &str, size: u64) -> Result<(Target, Arc<dyn BlockNode>)> {
    let driver = target_driver(args.target_format.as_deref().unwrap_or("raw"))?;
    let mut target = Target::new(driver);
    target.apply(&args.options).map_err(|e| ImgError::Refused(format!("{name}: {e}")))?;
    let compresses = matches!(driver, Driver::Qcow2 | Driver::Vmdk);
    if (args.backing.is_some() && driver != Driver::Qcow2) || (args.compress && !compresses) {
        let what = if args.compress && !compresses {
            "Compression not supported for this file format"
        } else {
            "Backing file not supported for this file format"
        };
        return refused(what);
    }
    target.options.backing_file = args.backing.clone().or(target.options.backing_file);
    target.options.backing_format = args.backing_format.clone().or(target.options.backing_format);
    target.size.get_or_insert(size);
    check_backing(&mut target, name, true)?;
    target.options.size = target.size.unwrap_or(size).next_multiple_of(512);
    target.settle().map_err(|e| ImgError::Refused(format!("{name}: {e}")))?;
    if args.compress && target.options.encrypt.is_some() {
        return refused("Compression and encryption not supported at the same time");
    }
    if args.compress && target.options.preallocation != Preallocation::Off {
        return refused("Compression and preallocation not supported at the same time");
    }
    if args.compress && target.options.data_file.is_some() {
        return refused("Compression and data file not supported at the same time");
    }
    let (direct, no_flush) = crate::common::cache_mode(&args.target_cache)?;
    if direct {
        return refused(
            "-t: a new target is written through the page cache; 'writeback' and 'unsafe' are supported",
        );
    }
    let node = target.make(name, no_flush)?;
    Ok((target, node))
}

/// How many nodes of the source's chain are above the one that the target is backed by.
fn shared_depth(source: &Arc<dyn BlockNode>, backing: &str) -> Option<usize> {
    let wanted = std::fs::canonicalize(backing).ok()?;
    let mut node = Some(Arc::clone(source));
    let mut depth = 0;
    while let Some(n) = node {
        if n.path().and_then(|p| std::fs::canonicalize(p).ok()).is_some_and(|p| p == wanted) {
            return Some(depth);
        }
        depth += 1;
        node = n.backing();
    }
    None
}

fn open_backing(name: &str, target: &Target) -> Result<Option<Arc<dyn BlockNode>>> {
    let Some(backing) = &target.options.backing_file else { return Ok(None) };
    let directory = Path::new(name).parent().map(Path::to_owned).unwrap_or_default();
    let place = beside(&directory, backing);
    let source = Source { share: true, ..Source::new(&place, target.options.backing_format.as_deref()) };
    source.open(false).map(Some)
}

fn check(args: &Args) -> Result<()> {
    if args.target_is_zero && !args.no_create {
        return refused("--target-is-zero requires use of -n flag");
    }
    if !(1..=16).contains(&args.workers) {
        return refused("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16");
    }
    if args.unordered && args.compress {
        return refused("Out of order write and compress are mutually exclusive");
    }
    if args.offload && (args.compress || args.sparse.is_some() || args.salvage) {
        return refused(match (args.compress, args.salvage) {
            (true, _) => "Cannot enable copy offloading when -c is used",
            (_, true) => "Cannot use copy offloading in salvaging mode",
            _ => "Cannot enable copy offloading when -S is used",
        });
    }
    if args.skip_broken_bitmaps && !args.bitmaps {
        return refused("Use of --skip-broken-bitmaps requires --bitmaps");
    }
    if args.target_image_opts && !args.no_create {
        return refused("--target-image-opts requires use of -n flag");
    }
    if args.no_create && !args.options.is_empty() {
        eprintln!("warning: -o has no effect when skipping image creation");
    }
    Ok(())
}

/// What the host copies. To share data is always a gain: runs of zeroes in it that could be left out take no space then.
fn offload(args: &Args) -> Offload {
    match (args.offload, args.sparse.is_some() || args.salvage || args.compress) {
        (true, _) => Offload::Copy,
        (false, false) => Offload::Share,
        (false, true) => Offload::No,
    }
}

/// `convert`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let driver = args.target_format.as_deref().unwrap_or("raw");
    if let Some(help) = target_driver(driver).ok().and_then(|d| options_help(d, &args.options)) {
        print(help)?;
        return Ok(0);
    }
    check(args)?;
    let Some((target_name, names)) = args.files.split_last().filter(|(_, names)| !names.is_empty()) else {
        return refused("Must specify image file name");
    };
    let sources = sources(args, names)?;
    let total: u64 = sources.iter().map(|s| s.size()).sum();
    let sparse = size_argument(args.sparse.as_deref().unwrap_or("4k"), "sparse size")?;
    if sparse != 0 && (!sparse.is_multiple_of(512) || sparse > 16 << 20) {
        return refused(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to 16777216. Select 0 to disable sparse detection (fully allocates output).",
        );
    }
    let (target, node) = if args.no_create {
        let source = Source {
            image_opts: args.target_image_opts,
            cache: Some(&args.target_cache),
            ..Source::new(target_name, args.target_format.as_deref())
        };
        (None, source.open(true)?)
    } else {
        let (target, node) = new_target(args, target_name, total)?;
        (Some(target), node)
    };
    let backing = target.as_ref().map_or(Ok(None), |t| open_backing(target_name, t))?;
    if node.size() < total {
        return refused("output file is smaller than input file");
    }
    let preallocated = target
        .as_ref()
        .is_some_and(|t| t.options.preallocation == Preallocation::Full || t.starts_as_noise(&node));
    let skip_below = match (&backing, sources.first()) {
        (Some(b), Some(first)) => {
            let place = b.path().map(|p| p.display().to_string()).unwrap_or_default();
            Some(shared_depth(first, &place).unwrap_or(1))
        }
        _ => None,
    };
    if let (Some(image), Some(backing)) = (node.as_qcow2(), &backing) {
        image.set_backing(Some(Arc::clone(backing)));
    }
    let mut start = 0;
    let mut parts = Vec::new();
    for source in &sources {
        parts.push(Part { node: Arc::clone(source), start });
        start += source.size();
    }
    // Some take compressed data only.
    let packed = node.compressed_unit();
    let cluster = packed.or_else(|| node.as_qcow2().map(|q| q.header().cluster_size()));
    if args.compress && cluster.is_none() {
        return refused("Compression not supported for this file format");
    }
    let plan = Plan {
        parts,
        total,
        target_zero: backing.is_none() && (args.target_is_zero || (!args.no_create && !preallocated)),
        target: Arc::clone(&node),
        sparse,
        compress: cluster.filter(|_| args.compress || packed.is_some()),
        skip_below,
        workers: args.workers,
        unordered: args.unordered,
        salvage: args.salvage,
        offload: offload(args),
        limit: rate_limit(args.rate_limit.as_deref())?,
    };
    copy(plan, Progress::new((args.progress, args.quiet), total))?;
    if args.bitmaps {
        copy_bitmaps(&sources, &node, args.skip_broken_bitmaps)?;
    }
    node.flush().map_err(failed("error while flushing the target"))?;
    if let Some(image) = node.as_qcow2() {
        image.close().map_err(failed("error while closing the target"))?;
    }
    Ok(0)
}

fn copy_bitmaps(sources: &[Arc<dyn BlockNode>], target: &Arc<dyn BlockNode>, skip: bool) -> Result<()> {
    let [source] = sources else { return refused("Copying bitmaps only possible with single source") };
    let (Some(from), Some(to)) = (source.as_qcow2(), target.as_qcow2()) else {
        return refused("Bitmaps are copied between qcow2 images only");
    };
    for bitmap in from.bitmaps() {
        if bitmap.inconsistent && skip {
            eprintln!("warning: Skipping inconsistent bitmap '{}'", bitmap.name);
            continue;
        }
        if bitmap.inconsistent {
            return refused(format!("Cannot copy inconsistent bitmap '{}'", bitmap.name));
        }
        let fail = |e| failed(format!("Failed to copy bitmap '{}'", bitmap.name))(e);
        to.add_bitmap(&bitmap.name, 1 << bitmap.granularity_bits, bitmap.enabled).map_err(fail)?;
        to.change_bitmap(&bitmap.name, |new| new.bits.clone_from(&bitmap.bits)).map_err(fail)?;
    }
    Ok(())
}
