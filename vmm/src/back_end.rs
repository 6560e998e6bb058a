//! Devices for VMs of other processes: what `holdfast blk-backend` and `holdfast net-backend` serve.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use holdfast_block::options::BlockdevOptions;
use holdfast_clock::{HostRandom, Timers, VmClock};
use holdfast_config::{BlkBackEndConfig, NetBackEndConfig, VmConfig};
use holdfast_device::{BuildContext, BuildError, Bus, SystemEvent, SystemSink};
use holdfast_memory::GuestMemory;
use holdfast_objects::Objects;
use holdfast_threads::{Role, Spawner};
use holdfast_virtio::blk::Blk;
use holdfast_virtio::transport::vhost_user::{Address, Server};
use holdfast_virtio::{VirtioDevice, net};

use parking_lot::Mutex;

use crate::control::ControlError;
use crate::storage::Storage;

/// What is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackEndConfig {
    /// A disk, and the nodes that it may name.
    Disk(BlkBackEndConfig, Vec<BlockdevOptions>),
    /// A tap.
    Net(NetBackEndConfig),
}

/// A back end that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum BackEndError {
    /// A node cannot be opened.
    #[error("node `{name}` cannot be opened")]
    Node {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: ControlError,
    },
    /// The device cannot be made.
    #[error("the device cannot be made")]
    Device(#[from] BuildError),
    /// The host has no thread or the like.
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
}

impl BackEndConfig {
    /// The socket.
    pub fn socket(&self) -> &PathBuf {
        match self {
            Self::Disk(config, _) => &config.socket,
            Self::Net(config) => &config.socket,
        }
    }

    /// The front end listens.
    pub fn is_client(&self) -> bool {
        match self {
            Self::Disk(config, _) => config.client,
            Self::Net(config) => config.client,
        }
    }

    /// A VM that would use the same files, for the sandbox.
    pub fn as_vm(&self) -> VmConfig {
        match self {
            Self::Disk(config, nodes) => VmConfig {
                disks: Some(vec![config.disk()]),
                blockdevs: Some(nodes.clone()),
                ..VmConfig::default()
            },
            Self::Net(config) => VmConfig { net: Some(vec![config.net()]), ..VmConfig::default() },
        }
    }
}

/// Guests of other processes ask nothing of this one.
#[derive(Debug)]
struct NoMachine;

impl SystemSink for NoMachine {
    fn request(&self, _: SystemEvent) {}
}

/// A device that is served.
#[derive(Debug)]
pub struct BackEnd {
    server: Arc<Mutex<Server>>,
    refresh: Sender<()>,
}

impl BackEnd {
    /// Makes the device and serves it on `listener`, or as a client.
    ///
    /// # Errors
    /// [`BackEndError`].
    pub fn start(
        config: &BackEndConfig,
        listener: Option<UnixListener>,
        objects: Arc<Objects>,
        spawner: &Arc<dyn Spawner>,
    ) -> Result<Self, BackEndError> {
        let clock = VmClock::stopped_at(0);
        let timers = Timers::start(Arc::clone(&clock), &**spawner);
        let build = BuildContext {
            memory: GuestMemory::new(),
            mmio: Bus::new("memory"),
            pio: Bus::new("I/O"),
            timers: timers.map_err(|e| BackEndError::Host("no timer thread", e))?,
            clock,
            random: Arc::new(HostRandom),
            spawner: Arc::clone(spawner),
            system: Arc::new(NoMachine),
            msi: None,
            windows: None,
        };
        let address = match listener {
            Some(listener) => Address::Listener(listener),
            None => Address::Client(config.socket().clone()),
        };
        let (device, disk): (Arc<dyn VirtioDevice>, _) = match config {
            BackEndConfig::Disk(config, nodes) => {
                let disk = disk(config, nodes, objects, &build)?;
                (Arc::clone(&disk) as _, Some(disk))
            }
            BackEndConfig::Net(config) => {
                let net = net::back_end::build(config, &build)?;
                tracing::info!(interface = net.interface(), "serving a tap");
                (net, None)
            }
        };
        let server = Server::start(device, address, &**spawner);
        let server = Arc::new(Mutex::new(server.map_err(|e| BackEndError::Host("no thread", e))?));
        let (refresh, asked) = channel();
        let told = Arc::clone(&server);
        let body = move || {
            while let (Some(disk), Ok(())) = (&disk, asked.recv()) {
                look_again(disk, &told);
            }
        };
        // A role that may ask block devices and use sockets.
        let started = spawner.spawn("refresh", Role::Nbd, Box::new(body));
        started.map_err(|e| BackEndError::Host("no thread", e))?;
        Ok(Self { server, refresh })
    }

    /// Looks at the image's size again and tells the front end if it is another one.
    pub fn refresh(&self) {
        // Only a disk listens.
        let _ = self.refresh.send(());
    }

    /// Finishes the requests under way and ends.
    pub fn stop(self) {
        self.server.lock().stop();
    }
}

fn look_again(disk: &Blk, server: &Mutex<Server>) {
    match disk.backend().refresh() {
        Ok(true) => server.lock().config_changed(),
        Ok(false) => {}
        Err(error) => tracing::warn!(%error, "the image's size cannot be told"),
    }
}

fn disk(
    config: &BlkBackEndConfig,
    nodes: &[BlockdevOptions],
    objects: Arc<Objects>,
    build: &BuildContext,
) -> Result<Arc<Blk>, BackEndError> {
    let wrong = |reason| BackEndError::Device(BuildError::Config { id: "disk".to_owned(), reason });
    if let Some(problem) = config.validate().into_iter().next() {
        return Err(wrong(problem.to_string()));
    }
    let storage = Storage::unheard(objects, Arc::clone(&build.spawner));
    for options in nodes {
        let name = options.node_name.clone().unwrap_or_default();
        storage.ensure(options).map_err(|source| BackEndError::Node { name, source })?;
    }
    let disk = config.disk();
    let parts = storage.disk_parts("disk", &disk).map_err(|e| {
        let cause = std::error::Error::source(&e).map(|s| format!(": {s}")).unwrap_or_default();
        wrong(format!("{e}{cause}"))
    })?;
    Ok(Blk::of("disk", &disk, parts, build)?)
}
