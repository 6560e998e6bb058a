//! A vhost-user device as its transport sees it.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use holdfast_clock::VmClock;
use holdfast_device::{BuildContext, BuildError, StateError};
use holdfast_threads::Role;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vhost::vhost_user::message::VhostTransferStateDirection;
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::door::Door;
use super::link::{Guard, Link, LinkError};
use super::relay::{Bells, Parts, Relay};
use super::ring::SharedRings;
use crate::device::{Interrupt, VirtioDevice, feature, kind, read_bytes};
use crate::queue::{HandlerError, VirtQueue};
use crate::shared_memory::{SharedMemory, SharedRegion};
use crate::worker::{Activation, Worker};

/// Most bytes of a back end's own state.
const MAX_STATE: u64 = 64 << 20;

/// Where a device's config space comes from.
#[derive(Debug, Clone)]
pub(crate) enum ConfigSource {
    /// These bytes, which the driver only reads.
    Fixed(Vec<u8>),
    /// The first so many bytes of the back end's, if it has any.
    BackEnd(u32),
}

/// A queue that the back end does not see: the control queue of a network device.
pub(crate) trait LocalQueue: Send + Sync + std::fmt::Debug {
    /// Its number with these features.
    fn number(&self, features: u64) -> u16;

    /// The driver with these features is there, and what it has set counts.
    ///
    /// # Errors
    /// The host's.
    fn begin(&self, features: u64) -> io::Result<()> {
        let _ = features;
        Ok(())
    }

    /// Serves the chains that wait.
    ///
    /// # Errors
    /// [`HandlerError`] if the driver breaks the rules.
    fn serve(&self, queue: &mut VirtQueue, features: u64) -> Result<(), HandlerError>;

    /// How many of the back end's queues it is to serve.
    fn enabled(&self) -> u16;

    /// Forgets what the driver has set.
    fn reset(&self);

    /// What the driver has set.
    ///
    /// # Errors
    /// [`StateError`].
    fn save(&self) -> Result<serde_json::Value, StateError>;

    /// Takes over what [`LocalQueue::save`] gave.
    ///
    /// # Errors
    /// [`StateError`] if it does not fit.
    fn restore(&self, state: &serde_json::Value) -> Result<(), StateError>;

    /// Reads the config space.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The device is to be announced. True: a driver with these features does so itself, at a change of the config space.
    fn announce(&self, features: u64) -> bool;

    /// The address under which the network knows the device.
    fn address(&self) -> [u8; 6];
}

/// What kind of device it is.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    /// Its id in the VM.
    pub(crate) id: String,
    /// Its kind in saved states and logs.
    pub(crate) name: &'static str,
    /// Its virtio device type.
    pub(crate) device_type: u32,
    /// How connections to the back end come about.
    pub(crate) door: Door,
    /// The size of each queue.
    pub(crate) queue_sizes: Vec<u16>,
    /// The features of the device that may be passed on from the back end.
    pub(crate) features: u64,
    /// The features of the device that are not the back end's affair.
    pub(crate) own_features: u64,
    /// Features that the back end has to have, and what it cannot do without them.
    pub(crate) required: Vec<(u64, &'static str)>,
    /// Its config space.
    pub(crate) config: ConfigSource,
    /// What the guest is shown of the back end's config space.
    pub(crate) adapt: fn(&Spec, &mut [u8]),
    /// The queue that is served here, if there is one: the last of `queue_sizes`.
    pub(crate) local: Option<Arc<dyn LocalQueue>>,
    /// Whether the requests of a queue come to an end by themselves (a receive queue's do not).
    pub(crate) settles: fn(u16) -> bool,
    /// Whether the back end has state of its own, without which the guest cannot go on elsewhere.
    pub(crate) stateful: bool,
    /// What the back end may show to the guest beside RAM.
    pub(crate) shared: Option<Arc<SharedMemory>>,
}

impl Spec {
    /// A device of a type, with nothing but the back end's queues.
    pub(crate) fn new(id: &str, name: &'static str, device_type: u32, door: Door) -> Self {
        Self {
            id: id.to_owned(),
            name,
            device_type,
            door,
            queue_sizes: Vec::new(),
            features: 0,
            own_features: 0,
            required: Vec::new(),
            config: ConfigSource::Fixed(Vec::new()),
            adapt: |_, _| {},
            local: None,
            settles: |_| true,
            stateful: false,
            shared: None,
        }
    }

    /// The same, and the back end may show memory to the guest, where there is one.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn with_shared_memory(mut self, context: &BuildContext) -> Result<Self, BuildError> {
        let host = |source| BuildError::Host {
            id: self.id.clone(),
            what: "cannot prepare its shared memory".to_owned(),
            source,
        };
        self.shared = context.windows.as_ref().map(SharedMemory::new).transpose().map_err(host)?;
        Ok(self)
    }

    /// The number of queues that the back end serves.
    pub(super) fn back_end_queues(&self) -> usize {
        self.queue_sizes.len().saturating_sub(usize::from(self.local.is_some()))
    }

    /// Whether the requests belong to a session that is lost with the back end (see `fuse`).
    pub(super) fn has_session(&self) -> bool {
        matches!(self.device_type, kind::FS | kind::VSOCK)
    }

    /// Connects to the back end.
    pub(super) fn connect(&self, guard: &Guard) -> Result<(Link, UnixStream), LinkError> {
        let listen = matches!(self.config, ConfigSource::BackEnd(_));
        Link::connect(&self.door, self.back_end_queues(), (listen, self.shared.as_ref()), guard)
    }

    /// What the guest is to see of the back end's config space; nothing if there is none.
    pub(super) fn read_config(&self, link: &mut Link) -> Result<Option<Vec<u8>>, LinkError> {
        match &self.config {
            ConfigSource::BackEnd(len) if *len != 0 && link.has_config() => {
                let mut bytes = link.config(*len)?;
                (self.adapt)(self, &mut bytes);
                Ok(Some(bytes))
            }
            _ => Ok(None),
        }
    }
}

/// What the worker and the device share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) link: Mutex<Option<Link>>,
    /// The config space as it was last read.
    pub(super) config: Mutex<Vec<u8>>,
    /// The heads of the chains that a back end had when it was left, for each queue.
    pub(super) in_flight: Mutex<BTreeMap<u16, Vec<u16>>>,
    pub(super) clock: Arc<VmClock>,
    /// The guest and the back end agree on what they have open. If not, the requests of a file system are answered here
    /// and a driver of sockets is told that all are lost; other devices have nothing to lose.
    pub(super) session: AtomicBool,
    pub(super) requests: AtomicU64,
    pub(super) reconnects: AtomicU64,
}

/// A device behind a vhost-user back end.
#[derive(Debug)]
pub(crate) struct VhostUser {
    spec: Arc<Spec>,
    features: u64,
    shared: Arc<Shared>,
    worker: Worker,
    /// The driver's features and how it is told of things, while it is there.
    driver: Mutex<Option<(u64, Arc<dyn Interrupt>)>>,
    /// After the worker, whose thread may remove no socket.
    _door: Door,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// Heads of requests under way by queue.
    #[serde(default)]
    in_flight: BTreeMap<u16, Vec<u16>>,
    /// The back end's own state, base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    back_end: Option<String>,
    /// What the driver has set through the queue that is served here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    local: Option<serde_json::Value>,
    /// The regions of its shared memory, in which nothing was mapped.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    shared: Vec<SharedRegion>,
    /// Whether the back end has a session that the guest's requests belong to.
    #[serde(default = "yes", skip_serializing_if = "Clone::clone")]
    session: bool,
}

fn yes() -> bool {
    true
}

impl VhostUser {
    /// Connects to the back end, agrees on features and starts the worker.
    pub(crate) fn build(spec: Spec, context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        let id = spec.id.clone();
        let link_error = |error: LinkError| BuildError::Host {
            id: id.clone(),
            what: error.to_string(),
            source: std::error::Error::source(&error).map_or_else(
                || io::ErrorKind::Unsupported.into(),
                |cause| io::Error::other(cause.to_string()),
            ),
        };
        let host = |what: &str, source| BuildError::Host { id: id.clone(), what: what.to_owned(), source };
        {
            use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
            if context.memory.iter().any(|region| region.file_offset().is_none()) {
                let reason =
                    "vhost-user needs RAM that other processes can map: `--memory shared=on`".to_owned();
                return Err(BuildError::Config { id, reason });
            }
        }
        let guard = Guard::start(&id, &*context.spawner).map_err(|e| host("cannot start a thread", e))?;
        spec.door.wait().map_err(|source| host("no back end has connected", source))?;
        let (mut link, socket) = spec.connect(&guard).map_err(link_error)?;
        if let Some((_, what)) = spec.required.iter().find(|(bit, _)| link.features() & bit == 0) {
            let reason = format!("the vhost-user back end {what}");
            return Err(BuildError::Config { id: id.clone(), reason });
        }
        // What the queues offer is ours, except indirect tables: a chain must fit the back end's ring.
        let queues = feature::QUEUES & !feature::INDIRECT_DESC;
        let features = link.features() & spec.features | spec.own_features | queues;
        let config = match &spec.config {
            ConfigSource::Fixed(bytes) => bytes.clone(),
            ConfigSource::BackEnd(_) => spec.read_config(&mut link).map_err(link_error)?.unwrap_or_default(),
        };
        let eventfd =
            || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| host("cannot make an eventfd", e));
        let mut bells = Vec::new();
        for _ in &spec.queue_sizes {
            bells.push(Bells { call: eventfd()?, kick: eventfd()? });
        }
        let rings = SharedRings::new(spec.queue_sizes.len()).map_err(|e| host("cannot make its rings", e))?;
        let shared = Arc::new(Shared {
            link: Mutex::new(Some(link)),
            config: Mutex::new(config),
            in_flight: Mutex::default(),
            clock: Arc::clone(&context.clock),
            session: AtomicBool::new(spec.device_type != kind::FS),
            requests: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
        });
        let retry = Arc::new(eventfd()?);
        let bell = Arc::clone(&retry);
        let timer = context.timers.timer(move || {
            // A full counter wakes as well.
            let _ = bell.write(1);
        });
        let door = spec.door.clone();
        let spec = Arc::new(spec);
        let calls = Epoll::new().map_err(|e| host("cannot make an epoll instance", e))?;
        let parts = Parts {
            guard,
            spec: Arc::clone(&spec),
            shared: Arc::clone(&shared),
            rings,
            bells,
            calls,
            retry,
            timer,
            socket,
        };
        let relay = Relay::new(parts).map_err(|e| host("cannot watch the back end", e))?;
        let worker = Worker::start(&spec.id, Role::BackEnd, &*context.spawner, Box::new(relay))
            .map_err(|e| host("cannot start its thread", e))?;
        Ok(Arc::new(Self { spec, features, shared, worker, driver: Mutex::new(None), _door: door }))
    }

    fn invalid(&self, reason: impl Into<String>) -> StateError {
        StateError::Invalid { kind: self.spec.name, reason: reason.into() }
    }

    fn shared_regions(&self) -> Vec<SharedRegion> {
        self.spec.shared.as_ref().map(|shared| shared.regions().to_vec()).unwrap_or_default()
    }

    /// The first `len` bytes of the back end's own config space, if it has one and answers.
    pub(super) fn back_end_config(&self, len: u32) -> Option<Vec<u8>> {
        let mut link = self.shared.link.lock().clone().filter(Link::has_config)?;
        link.config(len).ok()
    }

    fn transfer(
        &self,
        direction: VhostTransferStateDirection,
        fd: OwnedFd,
        carry: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), StateError> {
        let link = self.shared.link.lock().clone();
        let mut link = link.ok_or_else(|| self.invalid("the back end is not there"))?;
        if !link.has_state() {
            let why = "the back end cannot carry its state (VHOST_USER_PROTOCOL_F_DEVICE_STATE)";
            return Err(self.invalid(why));
        }
        let failed = |e: LinkError| {
            let cause = std::error::Error::source(&e).map(ToString::to_string).unwrap_or_default();
            self.invalid(format!("the back end's state: {e}: {cause}"))
        };
        link.transfer(direction, fd, carry).map_err(failed)
    }

    fn save_back_end(&self) -> Result<String, StateError> {
        let (reader, writer) = io::pipe().map_err(|e| self.invalid(e.to_string()))?;
        let mut bytes = Vec::new();
        self.transfer(VhostTransferStateDirection::SAVE, writer.into(), || {
            reader.take(MAX_STATE + 1).read_to_end(&mut bytes).map(|_| ())
        })?;
        if bytes.len() as u64 > MAX_STATE {
            return Err(self.invalid("the back end's state is too large"));
        }
        Ok(BASE64.encode(bytes))
    }

    fn load_back_end(&self, text: &str) -> Result<(), StateError> {
        let bytes = BASE64.decode(text).map_err(|e| self.invalid(format!("the back end's state: {e}")))?;
        let (reader, mut writer) = io::pipe().map_err(|e| self.invalid(e.to_string()))?;
        self.transfer(VhostTransferStateDirection::LOAD, reader.into(), move || writer.write_all(&bytes))
    }
}

impl VirtioDevice for VhostUser {
    fn name(&self) -> &'static str {
        self.spec.name
    }

    fn device_type(&self) -> u32 {
        self.spec.device_type
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.spec.queue_sizes.clone()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        match &self.spec.local {
            Some(local) => local.read_config(offset, data),
            None => read_bytes(&self.shared.config.lock(), offset, data),
        }
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let ConfigSource::BackEnd(len) = self.spec.config else { return };
        let Some(mut link) = self.shared.link.lock().clone().filter(Link::has_config) else { return };
        let within = offset.checked_add(data.len() as u64).is_some_and(|end| end <= u64::from(len));
        let Ok(at) = u32::try_from(offset) else { return };
        if !within || data.is_empty() {
            return;
        }
        // The back end says what the config space looks like afterwards.
        match link.set_config(at, data).and_then(|()| self.spec.read_config(&mut link)) {
            Ok(bytes) => *self.shared.config.lock() = bytes.unwrap_or_default(),
            Err(error) => tracing::warn!(id = self.spec.id, %error, "the back end takes no config write"),
        }
    }

    fn activate(&self, activation: Activation) {
        *self.driver.lock() = Some((activation.features, Arc::clone(&activation.interrupt)));
        self.worker.activate(activation);
    }

    fn stop(&self) -> Vec<VirtQueue> {
        self.worker.stop()
    }

    fn announce(&self) {
        let Some(local) = &self.spec.local else { return };
        // For guests that do not speak for themselves.
        if let Some(mut link) = self.shared.link.lock().clone()
            && let Err(error) = link.send_rarp(local.address())
        {
            tracing::warn!(id = self.spec.id, %error, "the back end does not announce the device");
        }
        if let Some((features, interrupt)) = &*self.driver.lock()
            && local.announce(*features)
        {
            interrupt.config_changed();
        }
    }

    fn reset(&self) {
        *self.driver.lock() = None;
        self.shared.in_flight.lock().clear();
        if let Some(local) = &self.spec.local {
            local.reset();
        }
    }

    fn shared_memory(&self) -> Option<Arc<SharedMemory>> {
        self.spec.shared.clone().filter(|shared| !shared.regions().is_empty())
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        if self.spec.shared.as_ref().is_some_and(|shared| shared.is_used()) {
            let why = "the back end has mapped files into the guest's sight (VHOST_USER_PROTOCOL_F_SHMEM), which \
                       cannot be saved or moved";
            return Err(self.invalid(why));
        }
        let back_end = if self.spec.stateful { Some(self.save_back_end()?) } else { None };
        let local = self.spec.local.as_ref().map(|local| local.save()).transpose()?;
        let session = self.shared.session.load(Ordering::SeqCst);
        let in_flight = self.shared.in_flight.lock().clone();
        let state = State { in_flight, back_end, local, shared: self.shared_regions(), session };
        serde_json::to_value(state).map_err(|e| self.invalid(e.to_string()))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), StateError> {
        let state =
            State::deserialize(state).map_err(|source| StateError::Parse { kind: self.spec.name, source })?;
        if state.in_flight.keys().any(|queue| usize::from(*queue) >= self.spec.queue_sizes.len()) {
            return Err(self.invalid("it has requests of a queue that is not there"));
        }
        if state.shared != self.shared_regions() {
            return Err(self.invalid("the back end has other regions of shared memory"));
        }
        match (&state.back_end, self.spec.stateful) {
            (Some(text), true) => self.load_back_end(text)?,
            (None, false) => {}
            _ => return Err(self.invalid("the back end's own state is missing or not expected")),
        }
        if let (Some(local), Some(state)) = (&self.spec.local, &state.local) {
            local.restore(state)?;
        }
        *self.shared.in_flight.lock() = state.in_flight;
        // The processes that the guest's sockets were connected to are not here.
        let session = state.session && self.spec.device_type != kind::VSOCK;
        self.shared.session.store(session, Ordering::SeqCst);
        Ok(())
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        BTreeMap::from([
            ("requests".to_owned(), self.shared.requests.load(Ordering::Relaxed)),
            ("reconnects".to_owned(), self.shared.reconnects.load(Ordering::Relaxed)),
        ])
    }
}
