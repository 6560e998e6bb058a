//! `resize`.

use holdfast_block::node::Preallocation;

use crate::common::{ImgError, Result, Source, errno, failed, print, refused, size_argument};

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
pub(crate) struct Args {
    /// Format of the image; found out if absent
    #[arg(short, long)]
    format: Option<String>,
    /// Allow making it smaller
    #[arg(long)]
    shrink: bool,
    /// What of the new part is allocated at once
    #[arg(long)]
    preallocation: Option<String>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// The image is given by options
    #[arg(long)]
    image_opts: bool,
    /// The image
    filename: String,
    /// The new size, or the change with a sign
    #[arg(allow_hyphen_values = true)]
    size: String,
}

/// `resize`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let how = args.preallocation.as_deref().map_or(Some(Preallocation::Off), Preallocation::from_name);
    let Some(how) = how else { return refused("Invalid preallocation mode") };
    let source =
        Source { image_opts: args.image_opts, ..Source::new(&args.filename, args.format.as_deref()) };
    let node = source.open(true)?;
    let old = node.size();
    let number = |text: &str| size_argument(text, "image size");
    let new = match args.size.as_bytes().first() {
        Some(b'+') => old.checked_add(number(args.size.get(1..).unwrap_or_default())?),
        Some(b'-') => old.checked_sub(number(args.size.get(1..).unwrap_or_default())?),
        _ => Some(number(&args.size)?),
    };
    let new = new.filter(|n| *n != 0 && *n <= i64::MAX as u64).map(|n| n.next_multiple_of(512));
    let Some(new) = new else { return refused("New image size must be positive") };
    if new < old && how != Preallocation::Off {
        return refused("Preallocation can only be used for growing images");
    }
    if new < old && !args.shrink {
        eprintln!(
            "warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an operation, make sure there is no important data there."
        );
        return refused("Use the --shrink option to perform a shrink operation.");
    }
    node.truncate(new, how)
        .map_err(|e| ImgError::Refused(format!("Could not resize image: {}", errno(&e))))?;
    node.flush().map_err(failed("Could not flush the image"))?;
    if !args.quiet {
        print("Image resized.\n")?;
    }
    Ok(0)
}
