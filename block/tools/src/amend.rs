//! `amend`.

use holdfast_block::graph::Backing;
use holdfast_block::node::Preallocation;
use holdfast_block::options::{Driver, split_pairs};

use crate::common::{ImgError, Result, Source, errno, print, qcow2, refused};
use crate::create::options_help;

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the image; found out if absent
    #[arg(short)]
    format: Option<String>,
    /// The options to change; `-o help` lists them
    #[arg(short, required = true)]
    options: Vec<String>,
    /// Cache mode
    #[arg(short = 't')]
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

/// `amend`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    if let Some(help) = options_help(Driver::Qcow2, &args.options) {
        print(help)?;
        return Ok(0);
    }
    let source = Source {
        image_opts: args.image_opts,
        cache: args.cache.as_deref(),
        ..Source::new(&args.filename, args.format.as_deref())
    };
    let mut opener = source.opener(true)?;
    opener.backing = Backing::Ignore;
    let node = source.open_with(&opener)?;
    let image = qcow2(&node, "Format driver option amendment")?;
    let mut header = image.header();
    let mut size = None;
    let mut backing = false;
    let fail = |e: std::io::Error| ImgError::Refused(format!("Error while amending options: {}", errno(&e)));
    for (key, value) in args.options.iter().flat_map(|o| split_pairs(o)) {
        let Some(value) = value else { return refused(format!("Expected '=' after parameter '{key}'")) };
        let on = matches!(value.as_str(), "on" | "yes" | "true" | "y");
        match key.as_str() {
            "size" => size = Some(crate::common::size_argument(&value, "image size")?),
            "compat" => match (value.as_str(), header.version) {
                ("0.10" | "v2", 2) => {}
                ("1.1" | "v3", _) => image.upgrade().map_err(fail)?,
                ("0.10" | "v2", _) => {
                    return refused("compat: downgrading to version 2 is not supported by this version");
                }
                _ => return refused(format!("Unknown compatibility level {value}")),
            },
            "lazy_refcounts" => image.set_lazy_refcounts(on).map_err(fail)?,
            "data_file_raw" => image.set_data_file_raw(on).map_err(fail)?,
            "backing_file" => {
                header.backing_file = Some(value).filter(|v| !v.is_empty());
                backing = true;
            }
            "backing_fmt" => {
                header.backing_format = Some(value).filter(|v| !v.is_empty());
                backing = true;
            }
            "cluster_size" | "preallocation" | "compression_type" | "extended_l2" | "refcount_bits"
            | "data_file" => {
                return refused(format!(
                    "Cannot amend '{key}': it is not supported to change it in an existing image"
                ));
            }
            _ => return refused(format!("Invalid parameter '{key}'")),
        }
    }
    if backing {
        image.set_backing_name(header.backing_file, header.backing_format).map_err(fail)?;
    }
    if let Some(size) = size {
        node.truncate(size.next_multiple_of(512), Preallocation::Off).map_err(fail)?;
    }
    image.close().map_err(fail)?;
    Ok(0)
}
