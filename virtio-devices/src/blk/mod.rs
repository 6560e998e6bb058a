//! The virtio block device (virtio 1.2 section 5.2).

pub mod back_end;
pub mod config;
mod handler;
pub mod log;
pub mod policy;
mod request;
pub mod stats;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use holdfast_block::graph::{Backing, Opener};
use holdfast_block::nodes::{NamedNode, Nodes, User};
use holdfast_block::options::{BlockdevOptions, DiscardMode, Driver, NodeRef};
use holdfast_block::queue::NodeBackend;
use holdfast_block::raw::LockRange;
use holdfast_block::{BlockBackend, BlockError, BlockNode};
use holdfast_device::{BuildContext, BuildError, StateError};
use holdfast_objects::ThrottleGroup;
use holdfast_threads::{Role, Spawner};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use crate::device::{Interrupt, VirtioDevice, feature, kind, read_bytes};
use crate::queue::{HandlerError, VirtQueue};
use crate::worker::{Activation, Handler, Watch, Worker};
use config::{DiskConfig, ImageType, LockGranularity, SERIAL_LEN};
use handler::BlkHandler;
pub use policy::OnError;
use policy::{DiskEvents, Policy};
use stats::{Count, Kind, Stats};

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

/// What a disk shows at the moment.
#[derive(Debug)]
pub(crate) struct Medium {
    pub(crate) backend: Arc<dyn BlockBackend>,
    /// Name of the node.
    pub(crate) node: String,
}

/// What the workers of all queues share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) id: String,
    pub(crate) medium: RwLock<Medium>,
    pub(crate) serial: [u8; SERIAL_LEN],
    /// False: every write is made durable before it completes.
    pub(crate) writeback: AtomicBool,
    pub(crate) stats: Stats,
    pub(crate) policy: Policy,
    pub(crate) events: Option<Arc<dyn DiskEvents>>,
    /// Rates that requests keep to.
    pub(crate) throttle: RwLock<Option<Arc<ThrottleGroup>>>,
    /// Queue and head of requests that failed and wait for the VM to go on.
    pub(crate) stalled: Mutex<Vec<(u16, u16)>>,
    /// Where writes are noted, while somebody copies the disk.
    pub(crate) logs: RwLock<Vec<Arc<log::WriteLog>>>,
    /// New requests wait.
    pub(crate) held: AtomicBool,
    /// The last of them failed because the host had no room.
    pub(crate) nospace: AtomicBool,
}

impl Shared {
    pub(crate) fn backend(&self) -> Arc<dyn BlockBackend> {
        Arc::clone(&self.medium.read().backend)
    }

    /// The heads of the requests of `queue` that wait, in their order.
    pub(crate) fn take_stalled(&self, queue: u16) -> Vec<u16> {
        let mut stalled = self.stalled.lock();
        let mine = stalled.iter().filter(|(q, _)| *q == queue).map(|(_, head)| *head).collect();
        stalled.retain(|(q, _)| *q != queue);
        mine
    }
}

/// What a disk is made of beside its config.
#[derive(Debug)]
pub struct DiskParts {
    /// What it shows.
    pub backend: Arc<dyn BlockBackend>,
    /// Name of the node behind it.
    pub node: String,
    /// Hears of requests that fail.
    pub events: Option<Arc<dyn DiskEvents>>,
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
    /// Queue and head of requests that wait for the VM to go on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    stalled: Vec<(u16, u16)>,
}

/// Opens the image and starts the workers of a disk.
///
/// # Errors
/// [`BuildError`] naming the field or what the host refused.
pub fn build(id: &str, config: &DiskConfig, context: &BuildContext) -> Result<Arc<Blk>, BuildError> {
    crate::registry::check(id, config.validate())?;
    let failed = |e: BlockError| {
        let cause = std::error::Error::source(&e).map(|s| format!(": {s}")).unwrap_or_default();
        BuildError::Config { id: id.to_owned(), reason: format!("{e}{cause}") }
    };
    let backend = open(id, config, &Arc::default(), &context.spawner).map_err(failed)?;
    Blk::new(id, config, backend, context)
}

/// Opens what a disk shows: the node that its config names, or its image, whatever format that is of, as a node with the disk's id.
///
/// # Errors
/// [`BlockError`].
pub fn open(
    id: &str,
    config: &DiskConfig,
    nodes: &Arc<Nodes>,
    spawner: &Arc<dyn Spawner>,
) -> Result<Arc<NodeBackend>, BlockError> {
    let (node, discard) = match &config.node {
        Some(name) => {
            let node = nodes.find(name)?;
            let discard = node.options().discard == Some(DiscardMode::Unmap);
            (node, discard && config.sparse)
        }
        None => (open_image(id, config, nodes, spawner)?, config.sparse),
    };
    if config.node.is_some() && !config.readonly && node.is_readonly() {
        tracing::info!(id, "the disk is read-only, because its node is");
    }
    let hold = node.hold(User {
        who: format!("block device '{id}'"),
        role: "root",
        writes: !config.readonly && !node.is_readonly(),
        // Until the VM is here, its disks are written by whoever brings them.
        shares_write: nodes.opens_inactive(),
    })?;
    Ok(NodeBackend::of(hold, id, spawner, discard))
}

fn open_image(
    id: &str,
    config: &DiskConfig,
    nodes: &Arc<Nodes>,
    spawner: &Arc<dyn Spawner>,
) -> Result<Arc<NamedNode>, BlockError> {
    let opener = Opener {
        writable: !config.readonly,
        lock: match config.lock_granularity {
            LockGranularity::ByteRange => LockRange::Bytes,
            LockGranularity::Full => LockRange::Full,
        },
        backing: if config.backing_files { Backing::Follow } else { Backing::Refuse },
        direct: config.direct,
        discard: config.sparse,
        io_uring: !config.disable_io_uring,
        name: id.to_owned(),
        for_vm: true,
        nodes: Some(Arc::clone(nodes)),
        ..Opener::reading(Arc::clone(spawner))
    };
    let driver = match config.image_type {
        Some(ImageType::Raw) => Some(Driver::Raw),
        Some(ImageType::Qcow2) => Some(Driver::Qcow2),
        _ => None,
    };
    // A path, whatever it looks like.
    let path = config.path.clone().unwrap_or_default();
    let file = BlockdevOptions {
        driver: Some(Driver::File),
        filename: Some(format!("file:{}", path.display())),
        ..BlockdevOptions::default()
    };
    let file = Some(NodeRef::Node(Box::new(file)));
    opener.open_as(id, &BlockdevOptions { driver, file, ..BlockdevOptions::default() })
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
        Self::of(id, config, DiskParts { backend, node: id.to_owned(), events: None }, context)
    }

    /// A disk made of `parts`.
    ///
    /// # Errors
    /// [`BuildError`] if the host gives no ring or thread.
    pub fn of(
        id: &str,
        config: &DiskConfig,
        parts: DiskParts,
        context: &BuildContext,
    ) -> Result<Arc<Self>, BuildError> {
        let mut serial = [0; SERIAL_LEN];
        let text = config.serial.as_deref().unwrap_or(id);
        for (to, from) in serial.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        let policy = Policy {
            read: config.rerror.unwrap_or(OnError::Report),
            write: config.werror.unwrap_or(OnError::Enospc),
        };
        let shared = Arc::new(Shared {
            id: id.to_owned(),
            medium: RwLock::new(Medium { backend: parts.backend, node: parts.node }),
            serial,
            writeback: AtomicBool::new(true),
            stats: Stats::default(),
            policy,
            events: parts.events,
            throttle: RwLock::default(),
            stalled: Mutex::default(),
            logs: RwLock::default(),
            held: AtomicBool::new(false),
            nospace: AtomicBool::new(false),
        });
        let mut workers = Vec::new();
        let host = |what: &str, source| BuildError::Host { id: id.to_owned(), what: what.to_owned(), source };
        for n in 0..config.num_queues {
            let handler = new_handler(&shared, config.queue_size)
                .map_err(|e| host("cannot make a request queue", e))?;
            let name = if config.num_queues == 1 { id.to_owned() } else { format!("{id}_q{n}") };
            let worker = Worker::start(&name, Role::Block, &*context.spawner, Box::new(handler));
            let worker = worker.map_err(|e| host("cannot start its thread", e))?;
            let places = config.queue_affinity.iter().flatten().find(|a| a.queue_index == n);
            if let Some(places) = places {
                worker.pin(&places.host_cpus).map_err(|e| host("cannot pin its thread", e))?;
            }
            workers.push(worker);
        }
        Ok(Arc::new(Self { shared, workers, queue_size: config.queue_size, interrupt: Mutex::default() }))
    }

    /// The disk's id.
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// Name of its node.
    pub fn node(&self) -> String {
        self.shared.medium.read().node.clone()
    }

    /// `ok`, or `nospace` or `failed` while requests wait for the VM to go on.
    pub fn io_status(&self) -> &'static str {
        if self.shared.stalled.lock().is_empty() {
            "ok"
        } else if self.shared.nospace.load(Ordering::Relaxed) {
            "nospace"
        } else {
            "failed"
        }
    }

    /// What it shows.
    pub fn backend(&self) -> Arc<dyn BlockBackend> {
        self.shared.backend()
    }

    /// What was counted of one kind of requests.
    pub fn count(&self, kind: Kind) -> Count {
        self.shared.stats.count(kind)
    }

    /// The end of the write that came furthest, in bytes, and nanoseconds since the last request was done, if one was.
    pub fn progress(&self) -> (u64, Option<u64>) {
        (self.shared.stats.highest(), self.shared.stats.idle())
    }

    /// Begins a histogram of requests' times with these boundaries (rising, in nanoseconds), or ends it.
    pub fn set_histogram(&self, kind: Kind, boundaries: Option<Vec<u64>>) {
        self.shared.stats.set_histogram(kind, boundaries);
    }

    /// Lets requests keep to the rates of a group, or to none.
    pub fn set_throttle(&self, group: Option<Arc<ThrottleGroup>>) {
        *self.shared.throttle.write() = group;
    }

    /// Notes all that is written from now on in `log` too, or no more. Requests under way are not noted.
    pub fn log_writes(&self, log: &Arc<log::WriteLog>, on: bool) {
        let mut logs = self.shared.logs.write();
        logs.retain(|other| !Arc::ptr_eq(other, log));
        if on {
            logs.push(Arc::clone(log));
        }
    }

    /// Lets new requests wait, or no more, from the next time that the device is resumed.
    pub fn hold_back(&self, yes: bool) {
        self.shared.held.store(yes, Ordering::Release);
    }

    /// Shows what another back end has, which is the node `node`, while the device is paused.
    ///
    /// # Errors
    /// The host's if that has no queues to be had: then it shows what it has shown before.
    pub fn change_medium(&self, backend: Arc<dyn BlockBackend>, node: String) -> std::io::Result<()> {
        self.let_go();
        let old = std::mem::replace(&mut *self.shared.medium.write(), Medium { backend, node });
        let taken = self.take_up();
        if taken.is_err() {
            *self.shared.medium.write() = old;
            self.take_up()?;
        }
        taken
    }

    /// The group whose rates requests keep to.
    pub fn throttle(&self) -> Option<Arc<ThrottleGroup>> {
        self.shared.throttle.read().clone()
    }

    /// Nobody else may write what it shows from now on.
    ///
    /// # Errors
    /// [`BlockError`] that says who does; then others still may.
    pub fn claim(&self) -> Result<(), BlockError> {
        self.backend().claim()
    }

    /// Lets go of the back end's queues, while the device is paused: until [`Blk::take_up`] nothing uses it.
    pub fn let_go(&self) {
        for worker in &self.workers {
            worker.replace(Box::new(NoHandler));
        }
    }

    /// Uses the back end again after [`Blk::let_go`].
    ///
    /// # Errors
    /// The host's if there are no queues to be had: the device answers nothing then.
    pub fn take_up(&self) -> std::io::Result<()> {
        for worker in &self.workers {
            worker.replace(Box::new(new_handler(&self.shared, self.queue_size)?));
        }
        Ok(())
    }

    /// Looks at the image's size again and tells the driver if it has changed.
    ///
    /// # Errors
    /// [`holdfast_block::BlockError`] if the image cannot be asked.
    pub fn refresh_size(&self) -> Result<bool, holdfast_block::BlockError> {
        let changed = self.shared.backend().refresh()?;
        let interrupt = self.interrupt.lock().clone();
        if let (true, Some(interrupt)) = (changed, interrupt) {
            interrupt.config_changed();
        }
        Ok(changed)
    }

    fn config_space(&self) -> [u8; CONFIG_LEN] {
        let g = self.shared.backend().geometry();
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
        let backend = self.shared.backend();
        if backend.is_readonly() {
            f |= bit::RO;
        } else {
            f |= bit::WRITE_ZEROES;
        }
        if backend.geometry().can_discard {
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
        self.shared.stalled.lock().clear();
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let writeback = self.shared.writeback.load(Ordering::Relaxed);
        let state = BlkState { writeback, stalled: self.shared.stalled.lock().clone() };
        serde_json::to_value(state).map_err(|source| StateError::Parse { kind: "virtio-blk", source })
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), StateError> {
        let state = BlkState::deserialize(state)
            .map_err(|source| StateError::Parse { kind: "virtio-blk", source })?;
        self.shared.writeback.store(state.writeback, Ordering::Relaxed);
        *self.shared.stalled.lock() = state.stalled;
        Ok(())
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        self.shared.stats.report()
    }
}

/// Stands in while the back end is changed.
struct NoHandler;

impl Handler for NoHandler {
    fn start(&mut self, _: Activation, _: &Watch) -> Result<(), HandlerError> {
        let source = std::io::Error::from_raw_os_error(libc::EIO);
        Err(HandlerError::Host { what: "the disk has no back end", source })
    }

    fn event(&mut self, _: u64, _: &Watch) -> Result<(), HandlerError> {
        Ok(())
    }

    fn stop(&mut self, _: &Watch) -> Vec<VirtQueue> {
        Vec::new()
    }
}

fn new_handler(shared: &Arc<Shared>, size: u16) -> std::io::Result<BlkHandler> {
    let backend = shared.backend();
    let queue = Arc::clone(&backend).queue(size).map_err(std::io::Error::other)?;
    BlkHandler::new(Arc::clone(shared), backend, queue)
}
