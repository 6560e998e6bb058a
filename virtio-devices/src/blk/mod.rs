//! The virtio block device (virtio 1.2 section 5.2).

pub mod config;
mod handler;
mod request;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use holdfast_block::BlockBackend;
use holdfast_block::graph::{Backing, Opener};
use holdfast_block::options::{DetectZeroes, Driver};
use holdfast_block::queue::NodeBackend;
use holdfast_block::raw::{LockRange, RawImage, RawOptions};
use holdfast_device::{BuildContext, BuildError, StateError};
use holdfast_threads::{Role, Spawner};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::device::{Interrupt, VirtioDevice, feature, kind, read_bytes};
use crate::queue::VirtQueue;
use crate::worker::{Activation, Worker};
use config::{DiskConfig, ImageType, LockGranularity, SERIAL_LEN};
use handler::BlkHandler;

/// Feature bits (section 5.2.3).
pub(crate) mod bit {
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const CONFIG_WCE: u64 = 1 << 11;
    pub(crate) const MQ: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Most sectors of one discard or write-zeroes segment: 1 GiB.
pub(crate) const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Most segments of one discard or write-zeroes request.
pub(crate) const MAX_RANGES: u32 = 32;

const CONFIG_LEN: usize = 60;
const WRITEBACK_OFFSET: u64 = 32;

/// What the workers of all queues share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) backend: Arc<dyn BlockBackend>,
    pub(crate) serial: [u8; SERIAL_LEN],
    /// False: every write is made durable before it completes.
    pub(crate) writeback: AtomicBool,
    pub(crate) counters: Counters,
}

/// What was done so far.
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) read: Traffic,
    pub(crate) write: Traffic,
    pub(crate) flush_ops: AtomicU64,
    pub(crate) errors: AtomicU64,
}

/// Bytes, requests and their host time in microseconds.
#[derive(Debug)]
pub(crate) struct Traffic {
    bytes: AtomicU64,
    ops: AtomicU64,
    latency_sum: AtomicU64,
    latency_min: AtomicU64,
    latency_max: AtomicU64,
}

impl Traffic {
    fn new() -> Self {
        Self {
            bytes: AtomicU64::new(0),
            ops: AtomicU64::new(0),
            latency_sum: AtomicU64::new(0),
            latency_min: AtomicU64::new(u64::MAX),
            latency_max: AtomicU64::new(0),
        }
    }

    pub(crate) fn count(&self, bytes: u64, nanoseconds: u64) {
        let us = nanoseconds / 1000;
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.ops.fetch_add(1, Ordering::Relaxed);
        self.latency_sum.fetch_add(us, Ordering::Relaxed);
        self.latency_min.fetch_min(us, Ordering::Relaxed);
        self.latency_max.fetch_max(us, Ordering::Relaxed);
    }

    fn report(&self, name: &str, out: &mut BTreeMap<String, u64>) {
        let ops = self.ops.load(Ordering::Relaxed);
        out.insert(format!("{name}_bytes"), self.bytes.load(Ordering::Relaxed));
        out.insert(format!("{name}_ops"), ops);
        let sum = self.latency_sum.load(Ordering::Relaxed);
        out.insert(format!("{name}_latency_avg"), sum.checked_div(ops).unwrap_or(0));
        let min = self.latency_min.load(Ordering::Relaxed);
        out.insert(format!("{name}_latency_min"), if ops == 0 { 0 } else { min });
        out.insert(format!("{name}_latency_max"), self.latency_max.load(Ordering::Relaxed));
    }
}

/// A virtio block device.
#[derive(Debug)]
pub struct Blk {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    queue_size: u16,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct BlkState {
    writeback: bool,
}

/// Opens the image and starts the workers of a disk.
///
/// # Errors
/// [`BuildError`] naming the field or what the host refused.
pub fn build(id: &str, config: &DiskConfig, context: &BuildContext) -> Result<Arc<Blk>, BuildError> {
    crate::registry::check(id, config.validate())?;
    let failed = |e: holdfast_block::BlockError| {
        let cause = std::error::Error::source(&e).map(|s| format!(": {s}")).unwrap_or_default();
        BuildError::Config { id: id.to_owned(), reason: format!("{e}{cause}") }
    };
    let backend = open(id, config, &context.spawner).map_err(failed)?;
    Blk::new(id, config, backend, context)
}

/// Opens the image of a disk, whatever format it is of.
fn open(
    id: &str,
    config: &DiskConfig,
    spawner: &Arc<dyn Spawner>,
) -> Result<Arc<dyn BlockBackend>, holdfast_block::BlockError> {
    let lock = match config.lock_granularity {
        LockGranularity::ByteRange => LockRange::Bytes,
        LockGranularity::Full => LockRange::Full,
    };
    let options = RawOptions {
        readonly: config.readonly,
        direct: config.direct,
        sparse: config.sparse,
        io_uring: !config.disable_io_uring,
        lock,
        name: id.to_owned(),
        ..RawOptions::new(config.path.clone().unwrap_or_default())
    };
    let file = RawImage::open(options, Arc::clone(spawner))?;
    let opener = Opener {
        writable: !config.readonly,
        lock,
        backing: if config.backing_files { Backing::Follow } else { Backing::Refuse },
        direct: config.direct,
        discard: config.sparse,
        io_uring: !config.disable_io_uring,
        name: id.to_owned(),
        for_vm: true,
        ..Opener::reading(Arc::clone(spawner))
    };
    let driver = match config.image_type {
        Some(ImageType::Raw) => Driver::Raw,
        Some(ImageType::Qcow2) => Driver::Qcow2,
        _ => opener.probe(&*file)?,
    };
    if driver == Driver::Raw {
        return Ok(file);
    }
    let node = opener.open_over(file, driver)?;
    Ok(NodeBackend::new(node, id, &**spawner, config.sparse, DetectZeroes::Off)?)
}

impl Blk {
    /// A disk on an open back end.
    ///
    /// # Errors
    /// [`BuildError`] if the host gives no ring or thread.
    pub fn new(
        id: &str,
        config: &DiskConfig,
        backend: Arc<dyn BlockBackend>,
        context: &BuildContext,
    ) -> Result<Arc<Self>, BuildError> {
        let mut serial = [0; SERIAL_LEN];
        let text = config.serial.as_deref().unwrap_or(id);
        for (to, from) in serial.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        let counters = Counters {
            read: Traffic::new(),
            write: Traffic::new(),
            flush_ops: AtomicU64::new(0),
            errors: AtomicU64::new(0),
        };
        let writeback = AtomicBool::new(true);
        let shared = Arc::new(Shared { backend, serial, writeback, counters });
        let mut workers = Vec::new();
        for n in 0..config.num_queues {
            let host =
                |what: &str, source| BuildError::Host { id: id.to_owned(), what: what.to_owned(), source };
            let queue = Arc::clone(&shared.backend)
                .queue(config.queue_size)
                .map_err(|e| host("cannot make a request queue", std::io::Error::other(e)))?;
            let handler = BlkHandler::new(Arc::clone(&shared), queue);
            let name = if config.num_queues == 1 { id.to_owned() } else { format!("{id}_q{n}") };
            let worker = Worker::start(&name, Role::Block, &*context.spawner, Box::new(handler));
            workers.push(worker.map_err(|e| host("cannot start its thread", e))?);
        }
        Ok(Arc::new(Self { shared, workers, queue_size: config.queue_size, interrupt: Mutex::default() }))
    }

    /// Looks at the image's size again and tells the driver if it has changed.
    ///
    /// # Errors
    /// [`holdfast_block::BlockError`] if the image cannot be asked.
    pub fn refresh_size(&self) -> Result<bool, holdfast_block::BlockError> {
        let changed = self.shared.backend.refresh()?;
        let interrupt = self.interrupt.lock().clone();
        if let (true, Some(interrupt)) = (changed, interrupt) {
            interrupt.config_changed();
        }
        Ok(changed)
    }

    fn config_space(&self) -> [u8; CONFIG_LEN] {
        let g = self.shared.backend.geometry();
        let mut c = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            for (to, from) in c.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        put(0, &g.sectors().to_le_bytes());
        // Two descriptors of the queue are the request's header and status.
        put(12, &u32::from(self.queue_size.saturating_sub(2).max(1)).to_le_bytes());
        put(20, &g.logical_block.to_le_bytes());
        let ratio = (g.physical_block / g.logical_block.max(1)).max(1);
        put(24, &[ratio.ilog2() as u8, 0]);
        put(26, &(ratio as u16).to_le_bytes());
        put(WRITEBACK_OFFSET as usize, &[u8::from(self.shared.writeback.load(Ordering::Relaxed))]);
        put(34, &(self.workers.len() as u16).to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &(g.logical_block / 512).max(1).to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[u8::from(g.can_discard)]);
        c
    }
}

impl VirtioDevice for Blk {
    fn name(&self) -> &'static str {
        "virtio-blk"
    }

    fn device_type(&self) -> u32 {
        kind::BLOCK
    }

    fn features(&self) -> u64 {
        let mut f =
            feature::QUEUES | bit::SEG_MAX | bit::BLK_SIZE | bit::FLUSH | bit::TOPOLOGY | bit::CONFIG_WCE;
        if self.workers.len() > 1 {
            f |= bit::MQ;
        }
        if self.shared.backend.is_readonly() {
            f |= bit::RO;
        } else {
            f |= bit::WRITE_ZEROES;
        }
        if self.shared.backend.geometry().can_discard {
            f |= bit::DISCARD;
        }
        f
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; self.workers.len()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config_space(), offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (WRITEBACK_OFFSET, [value]) = (offset, data) {
            self.shared.writeback.store(value & 1 != 0, Ordering::Relaxed);
        }
    }

    fn activate(&self, activation: Activation) {
        let Activation { queues, features, memory, interrupt } = activation;
        *self.interrupt.lock() = Some(Arc::clone(&interrupt));
        for queue in queues {
            if let Some(worker) = self.workers.get(usize::from(queue.index())) {
                let (memory, interrupt) = (memory.clone(), Arc::clone(&interrupt));
                worker.activate(Activation { queues: vec![queue], features, memory, interrupt });
            }
        }
    }

    fn stop(&self) -> Vec<VirtQueue> {
        *self.interrupt.lock() = None;
        self.workers.iter().flat_map(Worker::stop).collect()
    }

    fn reset(&self) {
        self.shared.writeback.store(true, Ordering::Relaxed);
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let state = BlkState { writeback: self.shared.writeback.load(Ordering::Relaxed) };
        serde_json::to_value(state).map_err(|source| StateError::Parse { kind: "virtio-blk", source })
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), StateError> {
        let state = BlkState::deserialize(state)
            .map_err(|source| StateError::Parse { kind: "virtio-blk", source })?;
        self.shared.writeback.store(state.writeback, Ordering::Relaxed);
        Ok(())
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        let mut out = BTreeMap::new();
        let c = &self.shared.counters;
        c.read.report("read", &mut out);
        c.write.report("write", &mut out);
        out.insert("flush_ops".to_owned(), c.flush_ops.load(Ordering::Relaxed));
        out.insert("errors".to_owned(), c.errors.load(Ordering::Relaxed));
        out
    }
}
