//! `bench`.

use std::sync::Arc;

use holdfast_block::queue::NodeBackend;
use holdfast_block::{BlockBackend, IoVec, Op, Request};
use holdfast_threads::PlainSpawner;

use crate::common::{ImgError, Result, Source, errno, explain, print, refused, size_argument};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the image; found out if absent
    #[arg(short = 'f', long)]
    format: Option<String>,
    /// Number of requests
    #[arg(short, long, default_value = "75000")]
    count: u64,
    /// Requests at a time
    #[arg(short, long, default_value = "64")]
    depth: u16,
    /// Where to start
    #[arg(short, long, default_value = "0")]
    offset: String,
    /// Bytes of a request
    #[arg(short = 's', long = "buffer-size", default_value = "4k")]
    size: String,
    /// Bytes from one request to the next
    #[arg(short = 'S', long = "step-size", default_value = "0")]
    step: String,
    /// Write instead of reading
    #[arg(short, long)]
    write: bool,
    /// What is written
    #[arg(long, default_value = "0")]
    pattern: u8,
    /// Flush after this many requests
    #[arg(long, default_value = "0")]
    flush_interval: u64,
    /// Do not wait for requests before a flush
    #[arg(long)]
    no_drain: bool,
    /// How requests are carried out: threads or io_uring
    #[arg(short = 'i', long)]
    aio: Option<String>,
    /// Cache mode
    #[arg(short, long = "cache")]
    t: Option<String>,
    /// Without the page cache
    #[arg(short = 'n', long)]
    native: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// The image is given by options
    #[arg(long)]
    image_opts: bool,
    /// Others may be writing it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    filename: String,
}

/// `bench`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let size = size_argument(&args.size, "buffer size")?;
    let step = size_argument(&args.step, "step size")?;
    let start = size_argument(&args.offset, "offset")?;
    let step = if step == 0 { size } else { step };
    if args.native {
        return refused("-n: Linux AIO is not supported; -i io_uring is");
    }
    if !matches!(args.aio.as_deref(), None | Some("threads" | "io_uring")) {
        return refused("-i: threads and io_uring are supported");
    }
    if args.flush_interval != 0 {
        return refused("--flush-interval is not supported by this version");
    }
    if args.no_drain {
        return refused("--no-drain makes no sense without --flush-interval");
    }
    if size == 0 || size > 1 << 30 || args.depth == 0 {
        return refused("a request has 1 byte to 1 GiB, and there is at least one at a time");
    }
    let source = Source {
        image_opts: args.image_opts,
        share: args.force_share,
        cache: args.t.as_deref(),
        ..Source::new(&args.filename, args.format.as_deref())
    };
    let mut opener = source.opener(args.write)?;
    opener.io_uring = args.aio.as_deref() != Some("threads");
    let node = source.open_with(&opener)?;
    let disk = node.size();
    if start.saturating_add(size) > disk {
        return refused("the image is smaller than offset and request");
    }
    let spawner = PlainSpawner::shared();
    let backend = NodeBackend::new(Arc::clone(&node), "bench", &spawner, true);
    let mut queue = backend.queue(args.depth).map_err(|e| ImgError::Refused(explain(&e)))?;
    if !args.quiet {
        let kind = if args.write { "write" } else { "read" };
        print(&format!(
            "Sending {} {kind} requests, {size} bytes each, {} in parallel (starting at offset {start}, step size {step})\n",
            args.count, args.depth
        ))?;
    }
    let mut buffers: Vec<Vec<u8>> = (0..args.depth).map(|_| vec![args.pattern; size as usize]).collect();
    let mut free: Vec<usize> = (0..buffers.len()).collect();
    let began = holdfast_clock::host_monotonic();
    let (mut sent, mut finished, mut offset) = (0, 0, start);
    let mut done = Vec::new();
    while finished < args.count {
        while sent < args.count
            && let Some(n) = free.pop()
        {
            let Some(buffer) = buffers.get_mut(n) else { break };
            // SAFETY: the buffer lives until the queue is dropped, below, and is used by one request at a time.
            let vector = unsafe { IoVec::new(buffer.as_mut_ptr(), buffer.len()) };
            let op = if args.write { Op::Write } else { Op::Read };
            queue.submit(Request { id: n as u64, op, offset, len: size, buffers: vec![vector] });
            sent += 1;
            offset += step;
            if offset + size > disk {
                offset = start;
            }
        }
        queue.kick();
        queue.wait();
        queue.reap(&mut done);
        for completion in done.drain(..) {
            completion.result.map_err(|e| ImgError::Refused(format!("Failed request: {}", errno(&e))))?;
            free.push(completion.id as usize);
            finished += 1;
        }
    }
    drop(queue);
    node.flush().map_err(|e| ImgError::Refused(format!("Failed flush: {}", errno(&e))))?;
    let took = holdfast_clock::host_monotonic() - began;
    if !args.quiet {
        print(&format!("Run completed in {:.3} seconds.\n", took as f64 / 1e9))?;
    }
    Ok(0)
}
