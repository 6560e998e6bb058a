//! `dd`.

use holdfast_block::node::is_zero;

use crate::common::{Result, Source, failed, refused, size_argument};
use crate::create::{Target, target_driver};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the source; found out if absent
    #[arg(short = 'f', long)]
    format: Option<String>,
    /// Format of the target
    #[arg(short = 'O', long = "output-format", default_value = "raw")]
    target_format: String,
    /// The source is given by options
    #[arg(long)]
    image_opts: bool,
    /// Others may be writing the source
    #[arg(short = 'U', long)]
    force_share: bool,
    /// `if=SOURCE of=TARGET bs=BYTES count=BLOCKS skip=BLOCKS`
    operands: Vec<String>,
}

/// `dd`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let (mut input, mut output) = (None, None);
    let (mut bs, mut count, mut skip) = (512, None, 0);
    for operand in &args.operands {
        match operand.split_once('=') {
            Some(("if", name)) => input = Some(name),
            Some(("of", name)) => output = Some(name),
            Some(("bs", n)) => bs = size_argument(n, "block size")?,
            Some(("count", n)) => count = Some(size_argument(n, "count")?),
            Some(("skip", n)) => skip = size_argument(n, "skip")?,
            _ => return refused(format!("unrecognized operand {operand}")),
        }
    }
    let (Some(input), Some(output)) = (input, output) else {
        return refused("Must specify both input and output file names");
    };
    if bs == 0 || bs > 1 << 30 {
        return refused("bs: a block has 1 byte to 1 GiB");
    }
    let source = Source {
        image_opts: args.image_opts,
        share: args.force_share,
        ..Source::new(input, args.format.as_deref())
    };
    let node = source.open(false)?;
    let size = node.size();
    let start = skip.saturating_mul(bs);
    if start > size {
        eprintln!("warning: {input}: cannot skip to specified offset");
    }
    let end = count.map_or(size, |n| start.saturating_add(n.saturating_mul(bs)).min(size));
    let mut target = Target::new(target_driver(&args.target_format)?);
    target.options.size = end.saturating_sub(start).next_multiple_of(512);
    let out = target.make(output, false)?;
    let noise = target.starts_as_noise(&out);
    let mut buf = vec![0; bs as usize];
    let mut at = start;
    while at < end {
        let n = bs.min(end - at);
        let part = buf.get_mut(..n as usize).unwrap_or_default();
        node.read_at(at, part).map_err(failed("error while reading from input image file"))?;
        let written = match is_zero(part) {
            true if noise => out.write_zeroes(at - start, n, true),
            true => Ok(()),
            false => out.write_at(at - start, part),
        };
        written.map_err(failed("error while writing to output image file"))?;
        at += n;
    }
    out.flush().map_err(failed("error while flushing the output image file"))?;
    Ok(0)
}
