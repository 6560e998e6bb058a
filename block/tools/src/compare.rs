//! `compare`.

use std::sync::Arc;

use holdfast_block::BlockNode;
use holdfast_block::node::{is_zero, status_above};

use crate::common::{ImgError, Progress, Result, Source, errno, print};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the first image; found out if absent
    #[arg(short, long = "a-format")]
    format: Option<String>,
    /// Format of the second image
    #[arg(short = 'F', long = "b-format")]
    second_format: Option<String>,
    /// Cache mode
    #[arg(short = 'T', long)]
    cache: Option<String>,
    /// Sizes and allocation must be equal too
    #[arg(short, long)]
    strict: bool,
    /// Show how far it is
    #[arg(short, long)]
    progress: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// The images are given by options
    #[arg(long)]
    image_opts: bool,
    /// Others may be writing them
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The first image
    first: String,
    /// The second image
    second: String,
}

const CHUNK: u64 = 2 << 20;

fn fail(what: String) -> impl FnOnce(std::io::Error) -> ImgError {
    move |e| ImgError::Status { text: format!("{what}: {}", errno(&e)), status: 2 }
}

fn read(node: &Arc<dyn BlockNode>, offset: u64, buf: &mut [u8]) -> Result<()> {
    node.read_at(offset, buf).map_err(fail(format!("Error while reading offset {offset}")))
}

/// The first byte that differs within a range, by 512-byte sectors.
fn difference(a: &[u8], b: &[u8]) -> Option<u64> {
    a.chunks(512).zip(b.chunks(512)).position(|(x, y)| x != y).map(|n| n as u64 * 512)
}

struct Comparison {
    nodes: [Arc<dyn BlockNode>; 2],
    strict: bool,
    buffers: [Vec<u8>; 2],
}

impl Comparison {
    /// Compares the common part at `offset`; how far, and where they differ.
    fn step(&mut self, offset: u64, end: u64) -> Result<(u64, Option<String>)> {
        let [a, b] = &self.nodes;
        let what = |n: usize| fail(format!("Sector allocation test failed for image {n}"));
        let (first, _) = status_above(&**a, offset, end - offset).map_err(what(1))?;
        let (second, _) = status_above(&**b, offset, end - offset).map_err(what(2))?;
        let mut len = first.len.min(second.len).max(1).min(end - offset);
        if self.strict
            && (first.data != second.data || first.zero != second.zero || first.allocated != second.allocated)
        {
            return Ok((len, Some(format!("Strict mode: Offset {offset} block status mismatch!"))));
        }
        if first.zero && second.zero {
            return Ok((len, None));
        }
        len = len.min(CHUNK);
        let [x, y] = &mut self.buffers;
        for (node, buffer, zero) in [(a, &mut *x, first.zero), (b, &mut *y, second.zero)] {
            buffer.resize(len as usize, 0);
            if zero {
                buffer.fill(0);
            } else {
                read(node, offset, buffer)?;
            }
        }
        Ok((len, difference(x, y).map(|n| format!("Content mismatch at offset {}!", offset + n))))
    }

    /// Looks for other than zeroes where only one image goes on.
    fn rest(&mut self, from: u64, progress: &mut Progress) -> Result<Option<String>> {
        let [a, b] = &self.nodes;
        let longer = if a.size() > b.size() { a } else { b };
        let mut offset = from;
        while offset < longer.size() {
            let (extent, _) = status_above(&**longer, offset, longer.size() - offset)
                .map_err(fail("Sector allocation test failed".into()))?;
            let mut len = extent.len.max(1);
            if !extent.zero {
                len = len.min(CHUNK);
                let [buffer, _] = &mut self.buffers;
                buffer.resize(len as usize, 0);
                read(longer, offset, buffer)?;
                if !is_zero(buffer) {
                    let at = buffer.chunks(512).position(|s| !is_zero(s)).unwrap_or(0) as u64 * 512;
                    return Ok(Some(format!("Content mismatch at offset {}!", offset + at)));
                }
            }
            offset += len;
            progress.add(len);
        }
        Ok(None)
    }
}

/// `compare`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let open = |name: &str, format: Option<&str>| {
        let source = Source {
            image_opts: args.image_opts,
            share: args.force_share,
            cache: args.cache.as_deref(),
            ..Source::new(name, format)
        };
        source.open(false).map_err(|e| ImgError::Status { text: e.to_string(), status: 2 })
    };
    let nodes =
        [open(&args.first, args.format.as_deref())?, open(&args.second, args.second_format.as_deref())?];
    let say = |text: &str| if args.quiet { Ok(()) } else { print(&format!("{text}\n")) };
    let [small, large] = {
        let (a, b) = (nodes[0].size(), nodes[1].size());
        [a.min(b), a.max(b)]
    };
    if small != large && args.strict {
        say("Strict mode: Image size mismatch!")?;
        return Ok(1);
    }
    let mut progress = Progress::new((args.progress, args.quiet), large);
    let mut comparison = Comparison { nodes, strict: args.strict, buffers: [Vec::new(), Vec::new()] };
    let mut offset = 0;
    while offset < small {
        let (len, mismatch) = comparison.step(offset, small)?;
        if let Some(text) = mismatch {
            drop(progress);
            say(&text)?;
            return Ok(1);
        }
        offset += len;
        progress.add(len);
    }
    if small != large {
        say("Warning: Image size mismatch!")?;
        if let Some(text) = comparison.rest(small, &mut progress)? {
            drop(progress);
            say(&text)?;
            return Ok(1);
        }
    }
    drop(progress);
    say("Images are identical.")?;
    Ok(0)
}
