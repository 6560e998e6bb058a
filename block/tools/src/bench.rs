//! `bench`.

use std::sync::Arc;

use holdfast_block::queue::NodeBackend;
use holdfast_block::{BlockBackend, BlockQueue, IoVec, Op, Request};
use holdfast_threads::PlainSpawner;

use crate::common::{ImgError, Result, Source, errno, explain, print, refused, size_argument};

/// Alignment of buffers, enough for direct I/O.
const ALIGN: usize = 4096;

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
    if args.flush_interval != 0 && !args.write {
        return refused("--flush-interval is only available in write tests");
    }
    if args.flush_interval != 0 && args.flush_interval < u64::from(args.depth) {
        return refused("Flush interval can't be smaller than depth");
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
    queue.assist().map_err(|e| ImgError::Refused(explain(&e)))?;
    if !args.quiet {
        let kind = if args.write { "write" } else { "read" };
        print(&format!(
            "Sending {} {kind} requests, {size} bytes each, {} in parallel (starting at offset {start}, step size {step})\n",
            args.count, args.depth
        ))?;
    }
    if args.flush_interval != 0 && !args.quiet {
        print(&format!("Sending flush every {} requests\n", args.flush_interval))?;
    }
    let mut run = Run::new(args, (start, step, size), disk);
    let took = run.requests(&mut *queue);
    // Whatever is still under way uses the run's memory.
    drop(queue);
    let took = took?;
    node.flush().map_err(|e| ImgError::Refused(format!("Failed flush: {}", errno(&e))))?;
    if !args.quiet {
        print(&format!("Run completed in {:.3} seconds.\n", took as f64 / 1e9))?;
    }
    Ok(0)
}

/// What marks the completion of a flush.
const FLUSH: u64 = u64::MAX;

/// A run of requests.
struct Run<'a> {
    args: &'a Args,
    /// Of the first request, and from one to the next.
    start: u64,
    step: u64,
    size: u64,
    disk: u64,
    offset: u64,
    sent: u64,
    finished: u64,
    /// Requests are held back until a flush is done.
    flushing: bool,
    memory: Vec<u8>,
    /// Where buffers start in `memory`, for those that no request uses.
    free: Vec<usize>,
}

impl<'a> Run<'a> {
    fn new(args: &'a Args, (start, step, size): (u64, u64, u64), disk: u64) -> Self {
        let (len, depth) = (size as usize, usize::from(args.depth));
        // Written here, so that no request is the first to touch a page, and aligned for direct I/O.
        let mut memory = Vec::with_capacity(len * depth + ALIGN);
        memory.resize(len * depth + ALIGN, args.pattern);
        let skip = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        let free = (0..depth).map(|n| skip + n * len).collect();
        let offset = start;
        Self { args, start, step, size, disk, offset, sent: 0, finished: 0, flushing: false, memory, free }
    }

    fn submit(&mut self, queue: &mut dyn BlockQueue) {
        while !self.flushing
            && self.sent < self.args.count
            && let Some(at) = self.free.pop()
        {
            let Some(buffer) = self.memory.get_mut(at..at + self.size as usize) else { break };
            // SAFETY: the memory lives until the queue is dropped, and this part of it is used by one request at a time.
            let vector = unsafe { IoVec::new(buffer.as_mut_ptr(), buffer.len()) };
            let op = if self.args.write { Op::Write } else { Op::Read };
            let (id, offset) = (at as u64, self.offset);
            queue.submit(Request { id, op, offset, len: self.size, buffers: vec![vector] });
            self.sent += 1;
            self.offset += self.step;
            if self.offset + self.size > self.disk {
                self.offset = self.start;
            }
        }
    }

    /// After a request: flushes if it is time to.
    fn flush(&mut self, queue: &mut dyn BlockQueue) {
        let interval = self.args.flush_interval;
        if interval == 0 || !(self.args.count - self.sent).is_multiple_of(interval) {
            return;
        }
        let drain = !self.args.no_drain;
        if !drain || self.finished == self.sent {
            queue.submit(Request { id: FLUSH, op: Op::Flush, offset: 0, len: 0, buffers: Vec::new() });
        }
        self.flushing |= drain;
    }

    /// Carries the requests out. Returns how many nanoseconds that took.
    fn requests(&mut self, queue: &mut dyn BlockQueue) -> Result<u64> {
        let began = holdfast_clock::host_monotonic();
        let mut done = Vec::new();
        while self.finished < self.args.count || self.flushing {
            self.submit(queue);
            queue.kick_and_wait();
            queue.reap(&mut done);
            for completion in done.drain(..) {
                let what = if completion.id == FLUSH { "flush" } else { "request" };
                completion.result.map_err(|e| ImgError::Refused(format!("Failed {what}: {}", errno(&e))))?;
                if completion.id == FLUSH {
                    self.flushing = false;
                } else {
                    self.free.push(completion.id as usize);
                    self.finished += 1;
                    self.flush(queue);
                    self.submit(queue);
                }
            }
        }
        Ok(holdfast_clock::host_monotonic() - began)
    }
}
