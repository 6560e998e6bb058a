//! `bitmap`.

use crate::common::{ImgError, Result, Source, failed, qcow2, refused, size_argument};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the image; found out if absent
    #[arg(short = 'f', long)]
    format: Option<String>,
    /// Image that the merged bitmap is in, if it is another one
    #[arg(short = 'b', long)]
    source_file: Option<String>,
    /// Its format
    #[arg(short = 'F', long)]
    source_format: Option<String>,
    /// Bytes for a bit of the new bitmap
    #[arg(short = 'g', long, default_value = "64k")]
    granularity: String,
    /// Add the bitmap
    #[arg(long)]
    add: bool,
    /// Remove the bitmap
    #[arg(long)]
    remove: bool,
    /// Clear all bits
    #[arg(long)]
    clear: bool,
    /// Let writes set bits
    #[arg(long)]
    enable: bool,
    /// Let writes set no bits
    #[arg(long)]
    disable: bool,
    /// Set the bits that this bitmap has set
    #[arg(long)]
    merge: Vec<String>,
    /// The image is given by options
    #[arg(long)]
    image_opts: bool,
    /// The image
    filename: String,
    /// The bitmap
    bitmap: String,
}

fn merge(args: &Args, image: &holdfast_block::qcow2::Qcow2, from: &str) -> Result<()> {
    let fail = |e| failed(format!("Operation merge on bitmap {} failed", args.bitmap))(e);
    let find = |bitmaps: Vec<holdfast_block::qcow2::bitmap::Bitmap>| {
        let found = bitmaps.into_iter().find(|b| b.name == from);
        found.ok_or_else(|| ImgError::Refused(format!("Dirty bitmap '{from}' not found")))
    };
    let other = match &args.source_file {
        None => find(image.bitmaps())?,
        Some(name) => {
            let node = Source::new(name, args.source_format.as_deref()).open(false)?;
            find(qcow2(&node, "A bitmap")?.bitmaps())?
        }
    };
    if other.inconsistent {
        return refused(format!("Bitmap '{from}' is inconsistent and cannot be used"));
    }
    let granule = 1u64 << other.granularity_bits;
    image
        .change_bitmap(&args.bitmap, |bitmap| {
            for n in (0..other.bits.len() as u64 * 8).filter(|n| other.is_set(*n)) {
                bitmap.mark(n * granule, granule, true);
            }
        })
        .map_err(fail)
}

/// `bitmap`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let actions = [args.add, args.remove, args.clear, args.enable, args.disable];
    if !actions.contains(&true) && args.merge.is_empty() {
        return refused("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge");
    }
    if args.remove && (actions.iter().filter(|a| **a).count() > 1 || !args.merge.is_empty()) {
        return refused("--remove cannot be used with other actions");
    }
    if args.enable && args.disable {
        return refused("--enable and --disable contradict each other");
    }
    let source =
        Source { image_opts: args.image_opts, ..Source::new(&args.filename, args.format.as_deref()) };
    let node = source.open(true)?;
    let image = qcow2(&node, "A persistent bitmap")?;
    let name = &args.bitmap;
    let fail = |what: &str| {
        let what = format!("Operation {what} on bitmap {name} failed");
        move |e| failed(what)(e)
    };
    if args.add {
        let granularity = size_argument(&args.granularity, "granularity")?;
        image.add_bitmap(name, granularity, !args.disable).map_err(fail("add"))?;
    }
    if args.clear {
        image.change_bitmap(name, |b| b.bits.fill(0)).map_err(fail("clear"))?;
    }
    for from in &args.merge {
        merge(args, image, from)?;
    }
    if args.enable || (args.disable && !args.add) {
        image.change_bitmap(name, |b| b.enabled = args.enable).map_err(fail("enable or disable"))?;
    }
    if args.remove {
        image.remove_bitmap(name).map_err(fail("remove"))?;
    }
    image.close().map_err(fail("store"))?;
    Ok(0)
}
