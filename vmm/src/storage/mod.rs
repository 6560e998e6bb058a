//! The storage graph of the process: nodes, objects that they name, throttled disks and exports.

mod info;
pub mod jobs;
mod logged;
mod nbd;
mod request;
pub mod shown;
mod throttle;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use holdfast_block::graph::{Backing, Opener};
use holdfast_block::nodes::{NamedNode, NodeEvents, Nodes};
use holdfast_block::options::{BlockdevOptions, DiscardMode};
use holdfast_block::raw::LockRange;
use holdfast_block::{BlockBackend, BlockError, BlockNode, Preallocation};
use holdfast_config::DiskConfig;
use holdfast_objects::{Objects, ThrottleGroup};
use holdfast_threads::Spawner;
use holdfast_virtio::blk::{self, Blk, DiskParts, policy::DiskEvents};
use parking_lot::Mutex;

use crate::control::{ControlError, ErrorKind};

pub use info::{block_info, block_stats, named_nodes};
pub(crate) use logged::LoggedDisk;
pub use nbd::{ExportOptions, NbdAddress, ServerOptions};
pub use request::{BlockIoThrottle, HistogramSet, NodeOrDevice, StorageRequest};

/// Hears of everything that happens in the graph, on any thread. It must not block.
pub trait StorageEvents: DiskEvents + NodeEvents {
    /// A block export is gone.
    fn export_deleted(&self, id: &str);
}

/// Who hears of nothing.
#[derive(Debug)]
struct Nobody;

impl DiskEvents for Nobody {
    fn io_error(&self, _: blk::policy::IoFailure) {}
}

impl NodeEvents for Nobody {
    fn write_threshold(&self, _: &str, _: u64, _: u64) {}
    fn image_corrupted(&self, _: &str, _: &str) {}
}

impl StorageEvents for Nobody {
    fn export_deleted(&self, _: &str) {}
}

/// The storage graph of the process.
#[derive(Debug)]
pub struct Storage {
    nodes: Arc<Nodes>,
    objects: Arc<Objects>,
    spawner: Arc<dyn Spawner>,
    events: Arc<dyn StorageEvents>,
    /// Groups that `block_set_io_throttle` has made, with the disks in them.
    groups: Mutex<BTreeMap<String, Arc<ThrottleGroup>>>,
    exports: nbd::Exports,
}

/// Makes an error of the block layer one of an operation, in its words.
#[expect(clippy::needless_pass_by_value, reason = "it is what `map_err` calls")]
pub(crate) fn refused(error: BlockError) -> ControlError {
    let cause = std::error::Error::source(&error).map(|s| format!(": {s}")).unwrap_or_default();
    ControlError::new(ErrorKind::Failed, format!("{error}{cause}"))
}

fn failed(text: impl Into<String>) -> ControlError {
    ControlError::new(ErrorKind::Failed, text)
}

impl Storage {
    /// A graph without nodes.
    pub fn new(
        objects: Arc<Objects>,
        spawner: Arc<dyn Spawner>,
        events: Arc<dyn StorageEvents>,
    ) -> Arc<Self> {
        let node_events: Arc<dyn NodeEvents> = Arc::clone(&events) as Arc<dyn NodeEvents>;
        Arc::new(Self {
            nodes: Nodes::new(node_events),
            objects,
            spawner,
            events,
            groups: Mutex::default(),
            exports: nbd::Exports::default(),
        })
    }

    /// A graph without nodes that tells nobody anything.
    pub fn detached(spawner: Arc<dyn Spawner>) -> Arc<Self> {
        Self::unheard(Arc::default(), spawner)
    }

    /// A graph without nodes, which may use `objects`, and tells nobody anything.
    pub fn unheard(objects: Arc<Objects>, spawner: Arc<dyn Spawner>) -> Arc<Self> {
        Self::new(objects, spawner, Arc::new(Nobody))
    }

    /// The nodes.
    pub fn nodes(&self) -> &Arc<Nodes> {
        &self.nodes
    }

    /// Secrets and the like.
    pub fn objects(&self) -> &Arc<Objects> {
        &self.objects
    }

    /// How monitors' nodes are opened: as QEMU does it, except that an image's own words open no other files.
    fn opener(&self, options: &BlockdevOptions) -> Opener {
        Opener {
            writable: options.read_only != Some(true),
            lock: LockRange::Qemu,
            backing: Backing::Refuse,
            discard: options.discard == Some(DiscardMode::Unmap),
            name: options.node_name.clone().unwrap_or_else(|| "block".to_owned()),
            objects: Arc::clone(&self.objects),
            nodes: Some(Arc::clone(&self.nodes)),
            for_vm: true,
            ..Opener::reading(Arc::clone(&self.spawner))
        }
    }

    /// Adds a node by its options.
    ///
    /// # Errors
    /// What the block layer says, in QEMU's words where it has them.
    pub fn add(&self, options: &BlockdevOptions) -> Result<(), ControlError> {
        self.nodes.add(options, &self.opener(options)).map_err(refused)
    }

    /// [`Storage::add`], unless there is a node of that name.
    ///
    /// # Errors
    /// As [`Storage::add`].
    pub fn ensure(&self, options: &BlockdevOptions) -> Result<(), ControlError> {
        match options.node_name.as_deref().map(|name| self.nodes.find(name)) {
            Some(Ok(_)) => Ok(()),
            _ => self.add(options),
        }
    }

    /// Opens a node anew by other options, while all disks on it stand.
    ///
    /// # Errors
    /// What the block layer says.
    pub fn reopen(&self, options: &BlockdevOptions) -> Result<(), ControlError> {
        self.nodes.reopen(options, &self.opener(options)).map_err(refused)
    }

    /// What a disk is made of.
    ///
    /// # Errors
    /// What the block layer says.
    pub fn disk_parts(&self, id: &str, config: &DiskConfig) -> Result<DiskParts, BlockError> {
        let backend = blk::open(id, config, &self.nodes, &self.spawner)?;
        let node = backend.named().map(|n| n.name().to_owned()).unwrap_or_else(|| id.to_owned());
        let backend: Arc<dyn BlockBackend> = backend;
        Ok(DiskParts { backend, node, events: Some(Arc::clone(&self.events) as Arc<dyn DiskEvents>) })
    }

    /// The node that a disk or a name is.
    ///
    /// # Errors
    /// [`ErrorKind::DeviceNotFound`], or QEMU's words for a node that is not there.
    pub fn node_of(&self, which: &NodeOrDevice, disks: &[Arc<Blk>]) -> Result<Arc<NamedNode>, ControlError> {
        match (which.device.as_deref().filter(|d| !d.is_empty()), &which.node_name) {
            (Some(id), None) => {
                let disk = find_disk(disks, id)?;
                self.nodes.find(&disk.node()).map_err(refused)
            }
            (None, Some(name)) => self.nodes.find(name).map_err(refused),
            _ => Err(failed("Need exactly one of 'device' and 'node-name'")),
        }
    }

    /// Changes the size of a node's image, and tells the disks on it.
    ///
    /// # Errors
    /// What the block layer says.
    pub fn resize(&self, which: &NodeOrDevice, size: u64, disks: &[Arc<Blk>]) -> Result<(), ControlError> {
        let node = self.node_of(which, disks)?;
        if node.is_readonly() {
            return Err(failed("Image is read-only"));
        }
        if !size.is_multiple_of(512) {
            return Err(failed("The new size must be a multiple of 512"));
        }
        node.truncate(size, Preallocation::Off)
            .map_err(|e| failed(format!("Failed to resize '{}': {e}", node.name())))?;
        for disk in disks {
            if self.nodes.find(&disk.node()).is_ok_and(|top| top.rests_on(node.name())) {
                disk.refresh_size().map_err(refused)?;
            }
        }
        Ok(())
    }
}

/// The disk called `id`, or the one of the object path `id`.
pub(crate) fn find_disk<'a>(disks: &'a [Arc<Blk>], id: &str) -> Result<&'a Arc<Blk>, ControlError> {
    let plain = id.strip_prefix("/machine/peripheral/").unwrap_or(id);
    let plain = plain.strip_suffix("/virtio-backend").unwrap_or(plain);
    disks
        .iter()
        .find(|d| d.id() == plain)
        .ok_or_else(|| ControlError::new(ErrorKind::DeviceNotFound, format!("Device '{id}' not found")))
}
