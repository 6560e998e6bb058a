//! `map`.

use std::sync::Arc;

use holdfast_block::BlockNode;

use crate::common::{Output, Result, Source, failed, print, refused, size_argument};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the image; found out if absent
    #[arg(short, long)]
    format: Option<String>,
    /// Shape of the output
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Where to start
    #[arg(short, long, default_value = "0")]
    start_offset: String,
    /// How far to go
    #[arg(short = 'l', long)]
    max_length: Option<String>,
    /// The image is given by options
    #[arg(long)]
    image_opts: bool,
    /// Others may be writing it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    filename: String,
}

/// A range of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    start: u64,
    length: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
    file: Option<String>,
}

impl Entry {
    fn goes_on(&self, next: &Self) -> bool {
        let follows = match (self.offset, next.offset) {
            (Some(a), Some(b)) => a + self.length == b && self.file == next.file,
            (None, None) => true,
            _ => false,
        };
        follows
            && (self.depth, self.present, self.zero, self.data, self.compressed)
                == (next.depth, next.present, next.zero, next.data, next.compressed)
    }

    fn json(&self) -> String {
        let offset = self.offset.map(|o| format!(", \"offset\": {o}")).unwrap_or_default();
        format!(
            "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}{offset}}}",
            self.start, self.length, self.depth, self.present, self.zero, self.data, self.compressed
        )
    }

    fn human(&self) -> Result<Option<String>> {
        if !self.data || self.zero {
            return Ok(None);
        }
        let (Some(offset), Some(file)) = (self.offset, &self.file) else {
            return refused("File contains external, encrypted or compressed clusters.");
        };
        let hex = |n: u64| if n == 0 { "0".to_owned() } else { format!("{n:#x}") };
        Ok(Some(format!("{:<16}{:<16}{:<16}{file}\n", hex(self.start), hex(self.length), hex(offset))))
    }
}

fn entry(top: &Arc<dyn BlockNode>, start: u64, mut length: u64) -> Result<Entry> {
    let mut node = Arc::clone(top);
    let mut depth = 0;
    loop {
        let e = node.status(start, length).map_err(failed("Failed to get the block status"))?;
        length = e.len.max(1);
        let below = node.backing();
        // What nobody below can say is zeroes.
        let shallow = !e.allocated && below.as_ref().is_none_or(|b| start >= b.size());
        if e.allocated || shallow {
            let file = e.offset.and_then(|_| node.path()).map(|p| p.display().to_string());
            let (zero, data) = (e.zero || shallow, e.data);
            return Ok(Entry {
                start,
                length,
                depth,
                present: e.allocated,
                zero,
                data,
                compressed: e.compressed,
                offset: e.offset,
                file,
            });
        }
        let Some(below) = below else {
            return refused("a node without a backing file left its contents open");
        };
        length = length.min(below.size() - start);
        node = below;
        depth += 1;
    }
}

/// `map`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let source = Source {
        image_opts: args.image_opts,
        share: args.force_share,
        ..Source::new(&args.filename, args.format.as_deref())
    };
    let node = source.open(false)?;
    let start = size_argument(&args.start_offset, "start offset")?;
    let mut end = node.size();
    if let Some(length) = &args.max_length {
        end = end.min(start.saturating_add(size_argument(length, "max length")?));
    }
    let json = args.output == Output::Json;
    let mut out = if json {
        "[".to_owned()
    } else {
        format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to")
    };
    let mut first = true;
    let mut emit = |e: &Entry, out: &mut String| -> Result<()> {
        if json {
            if !std::mem::take(&mut first) {
                *out += ",\n";
            }
            *out += &e.json();
        } else if let Some(line) = e.human()? {
            *out += &line;
        }
        Ok(())
    };
    let mut last: Option<Entry> = None;
    let mut at = start;
    while at < end {
        let next = entry(&node, at, end - at)?;
        at += next.length;
        match &mut last {
            Some(e) if e.goes_on(&next) => e.length += next.length,
            _ => {
                if let Some(e) = last.replace(next) {
                    emit(&e, &mut out)?;
                }
            }
        }
        if out.len() > 1 << 16 {
            print(&std::mem::take(&mut out))?;
        }
    }
    if let Some(e) = last {
        emit(&e, &mut out)?;
    }
    if json {
        out += "]\n";
    }
    print(&out)?;
    Ok(0)
}
