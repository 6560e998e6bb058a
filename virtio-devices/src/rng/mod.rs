//! The virtio entropy device (virtio 1.2 section 5.4).

pub mod config;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_clock::RandomSource;
use holdfast_device::{BuildContext, BuildError};
use holdfast_threads::Role;

use crate::device::{Interrupt, VirtioDevice, feature, kind};
use crate::queue::{HandlerError, VirtQueue};
use crate::worker::{Activation, Handler, Watch, Worker};
use config::{DEFAULT_SOURCE, RngConfig};

const QUEUE_SIZE: u16 = 256;
/// Most bytes given for one request: more than any driver asks for, and little enough that a
/// malicious one cannot keep the host's generator busy.
const MAX_BYTES: u64 = 64 << 10;
/// Bytes made at a time.
const CHUNK: usize = 4096;

const KICK: u64 = 0;
const SOURCE: u64 = 1;

/// A virtio entropy device.
#[derive(Debug)]
pub struct Rng {
    worker: Worker,
    bytes: Arc<AtomicU64>,
}

/// Opens the source and starts the worker.
///
/// # Errors
/// [`BuildError`] naming the field or what the host refused.
pub fn build(id: &str, config: &RngConfig, context: &BuildContext) -> Result<Arc<Rng>, BuildError> {
    crate::registry::check(id, config.validate())?;
    let source = if config.src == Path::new(DEFAULT_SOURCE) {
        Source::Vm(Arc::clone(&context.random))
    } else {
        Source::File(open(&config.src).map_err(|source| BuildError::Host {
            id: id.to_owned(),
            what: format!("cannot use `{}` as a source of randomness", config.src.display()),
            source,
        })?)
    };
    let bytes = Arc::new(AtomicU64::new(0));
    let handler = RngHandler { source, bytes: Arc::clone(&bytes), live: None };
    let worker = Worker::start(id, Role::Device, &*context.spawner, Box::new(handler));
    let worker = worker.map_err(|source| BuildError::Host {
        id: id.to_owned(),
        what: "cannot start its thread".to_owned(),
        source,
    })?;
    Ok(Arc::new(Rng { worker, bytes }))
}

fn open(path: &Path) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_char_device() || kind.is_fifo() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it must be a character device or a FIFO"))
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        "virtio-rng"
    }

    fn device_type(&self) -> u32 {
        kind::RNG
    }

    fn features(&self) -> u64 {
        feature::QUEUES
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&self, activation: Activation) {
        self.worker.activate(activation);
    }

    fn stop(&self) -> Vec<VirtQueue> {
        self.worker.stop()
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        BTreeMap::from([("bytes".to_owned(), self.bytes.load(Ordering::Relaxed))])
    }
}

enum Source {
    Vm(Arc<dyn RandomSource>),
    File(File),
}

struct RngHandler {
    source: Source,
    bytes: Arc<AtomicU64>,
    live: Option<(VirtQueue, Arc<dyn Interrupt>)>,
}

impl Source {
    /// Bytes put into `buf`; none if the source has none at the moment.
    fn fill(&mut self, buf: &mut [u8]) -> Result<usize, HandlerError> {
        let failed = |source| HandlerError::Host { what: "the source of randomness fails", source };
        match self {
            Self::Vm(random) => {
                random.fill(buf).map_err(|e| failed(io::Error::other(e)))?;
                Ok(buf.len())
            }
            Self::File(file) => match file.read(buf) {
                Ok(n) => Ok(n),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
                Err(e) => Err(failed(e)),
            },
        }
    }
}

impl RngHandler {
    fn serve(&mut self) -> Result<(), HandlerError> {
        let Some((queue, interrupt)) = &mut self.live else { return Ok(()) };
        let mut buf = [0; CHUNK];
        let mut budget = queue.size();
        loop {
            while let Some(chain) = queue.pop()? {
                if budget == 0 {
                    queue.undo_pop();
                    queue.kick_again();
                    break;
                }
                budget -= 1;
                let mut writer = queue.writer(&chain);
                let wanted = writer.remaining().min(MAX_BYTES);
                while u64::from(writer.written()) < wanted {
                    let n = (wanted - u64::from(writer.written())).min(CHUNK as u64) as usize;
                    let some = buf.get_mut(..n).unwrap_or(&mut []);
                    let got = self.source.fill(some)?;
                    if got == 0 {
                        break;
                    }
                    writer.write(some.get(..got).unwrap_or(&[]))?;
                }
                let written = writer.written();
                if written == 0 && wanted != 0 {
                    // Nothing to be had now: the source's readiness brings us back.
                    queue.undo_pop();
                    if queue.wants_interrupt()? {
                        interrupt.queue(queue.index());
                    }
                    return Ok(());
                }
                self.bytes.fetch_add(u64::from(written), Ordering::Relaxed);
                queue.push(chain.head, written)?;
            }
            if budget == 0 || !queue.enable_kicks()? {
                break;
            }
        }
        if queue.wants_interrupt()? {
            interrupt.queue(queue.index());
        }
        Ok(())
    }
}

impl Handler for RngHandler {
    fn start(&mut self, activation: Activation, watch: &Watch) -> Result<(), HandlerError> {
        let Some(queue) = activation.queues.into_iter().next() else { return Ok(()) };
        watch.add(queue.kick().as_raw_fd(), KICK)?;
        self.live = Some((queue, activation.interrupt));
        if let Source::File(file) = &self.source
            && let Err(error) = watch.add(file.as_raw_fd(), SOURCE)
        {
            // Sources such as /dev/zero cannot be waited for; they never need it.
            tracing::debug!(%error, "the source of randomness is always ready");
        }
        self.serve()
    }

    fn event(&mut self, _token: u64, _watch: &Watch) -> Result<(), HandlerError> {
        self.serve()
    }

    fn stop(&mut self, watch: &Watch) -> Vec<VirtQueue> {
        if let Source::File(file) = &self.source {
            watch.remove(file.as_raw_fd());
        }
        let Some((queue, _)) = self.live.take() else { return Vec::new() };
        watch.remove(queue.kick().as_raw_fd());
        vec![queue]
    }
}
