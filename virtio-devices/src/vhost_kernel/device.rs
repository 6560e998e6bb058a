//! A device of the kernel's as its transport sees it.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_device::{BuildContext, BuildError, StateError};
use holdfast_net::PacketQueue;
use holdfast_net::tap::duplicate;
use holdfast_threads::Role;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::kernel::{Kernel, Vhost};
use super::relay::{Bells, Parts, Relay};
use crate::device::{Interrupt, VirtioDevice, feature};
use crate::queue::VirtQueue;
use crate::vhost_user::LocalQueue;
use crate::vhost_user::ring::SharedRings;
use crate::worker::{Activation, Worker};

/// What kind of device it is.
#[derive(Debug)]
pub(super) struct Spec {
    /// Its id in the VM.
    pub(super) id: String,
    /// Its kind in saved states and logs.
    pub(super) name: &'static str,
    /// Its virtio device type.
    pub(super) device_type: u32,
    /// The size of each queue, that of the one that is served here last.
    pub(super) queue_sizes: Vec<u16>,
    /// What the driver is offered.
    pub(super) features: u64,
    /// What of it the kernel is told that the driver has accepted.
    pub(super) kernel_features: u64,
    /// The queue that the kernel does not see, and the config space.
    pub(super) local: Arc<dyn LocalQueue>,
    /// A card's interface, one for each pair of queues.
    pub(super) taps: Vec<Arc<dyn PacketQueue>>,
}

/// What the worker and the device share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The heads of the chains that the kernel had when it was left, for each queue, in their order.
    pub(super) in_flight: Mutex<BTreeMap<u16, Vec<u16>>>,
    pub(super) requests: AtomicU64,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// Heads of requests under way by queue.
    #[serde(default)]
    in_flight: BTreeMap<u16, Vec<u16>>,
    /// What the driver has set through the queue that is served here.
    #[serde(default)]
    local: serde_json::Value,
}

/// A device that the kernel serves.
#[derive(Debug)]
pub(crate) struct VhostKernel {
    spec: Arc<Spec>,
    shared: Arc<Shared>,
    worker: Worker,
    /// The driver's features and how it is told of things, while it is there.
    driver: Mutex<Option<(u64, Arc<dyn Interrupt>)>>,
}

/// Opens `path` `count` times, or takes the descriptors `fds` in its place.
pub(super) fn open(
    id: &str,
    path: &Path,
    (fds, count): (Option<&[RawFd]>, u16),
    rings: &SharedRings,
) -> Result<Vec<Box<dyn Vhost>>, BuildError> {
    let host = |source| BuildError::Host {
        id: id.to_owned(),
        what: format!("cannot open {}: its module may be missing, or the right to open it", path.display()),
        source,
    };
    let mut kernels: Vec<Box<dyn Vhost>> = Vec::new();
    match fds {
        Some(fds) => {
            for fd in fds {
                let copy = duplicate(*fd).map_err(|_| BuildError::Config {
                    id: id.to_owned(),
                    reason: format!("file descriptor {fd} for vhost is not open"),
                })?;
                kernels.push(Box::new(Kernel::of(copy, rings)));
            }
        }
        None => {
            for _ in 0..count {
                kernels.push(Box::new(Kernel::open(path, rings).map_err(host)?));
            }
        }
    }
    Ok(kernels)
}

/// Makes the kernel's devices this process's; returns what features all of them have.
pub(super) fn agree(id: &str, kernels: &[Box<dyn Vhost>]) -> Result<u64, BuildError> {
    let mut features = u64::MAX;
    for kernel in kernels {
        let asked = kernel.own().and_then(|()| kernel.features());
        features &= asked.map_err(|source| BuildError::Host {
            id: id.to_owned(),
            what: "the kernel's vhost does not answer".to_owned(),
            source,
        })?;
    }
    if features & feature::VERSION_1 == 0 {
        let reason = "the kernel's vhost lacks virtio 1".to_owned();
        return Err(BuildError::Config { id: id.to_owned(), reason });
    }
    Ok(features)
}

/// The rings of a device with so many queues.
pub(super) fn rings(id: &str, queues: usize) -> Result<SharedRings, BuildError> {
    let what = "cannot make its rings".to_owned();
    SharedRings::new(queues).map_err(|source| BuildError::Host { id: id.to_owned(), what, source })
}

impl VhostKernel {
    /// Starts the worker of a device that `kernels` serve.
    pub(super) fn build(
        spec: Spec,
        kernels: Vec<Box<dyn Vhost>>,
        rings: SharedRings,
        context: &BuildContext,
    ) -> Result<Arc<Self>, BuildError> {
        let id = spec.id.clone();
        let host = |what: &str| {
            let (id, what) = (id.clone(), what.to_owned());
            move |source| BuildError::Host { id, what, source }
        };
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("cannot make an eventfd"));
        let mut bells = Vec::new();
        for _ in 1..spec.queue_sizes.len() {
            bells.push(Bells { call: eventfd()?, kick: eventfd()? });
        }
        let (spec, shared) = (Arc::new(spec), Arc::new(Shared::default()));
        let calls = Epoll::new().map_err(host("cannot make an epoll instance"))?;
        let parts =
            Parts { spec: Arc::clone(&spec), kernels, shared: Arc::clone(&shared), rings, bells, calls };
        let relay = Relay::new(parts).map_err(host("cannot watch the kernel"))?;
        let worker = Worker::start(&spec.id, Role::Vhost, &*context.spawner, Box::new(relay));
        let worker = worker.map_err(host("cannot start its thread"))?;
        Ok(Arc::new(Self { spec, shared, worker, driver: Mutex::new(None) }))
    }

    fn invalid(&self, reason: impl Into<String>) -> StateError {
        StateError::Invalid { kind: self.spec.name, reason: reason.into() }
    }
}

impl VirtioDevice for VhostKernel {
    fn name(&self) -> &'static str {
        self.spec.name
    }

    fn device_type(&self) -> u32 {
        self.spec.device_type
    }

    fn features(&self) -> u64 {
        self.spec.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.spec.queue_sizes.clone()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.spec.local.read_config(offset, data);
    }

    fn activate(&self, activation: Activation) {
        *self.driver.lock() = Some((activation.features, Arc::clone(&activation.interrupt)));
        self.worker.activate(activation);
    }

    fn stop(&self) -> Vec<VirtQueue> {
        self.worker.stop()
    }

    fn announce(&self) {
        if let Some(tap) = self.spec.taps.first()
            && let Err(error) = crate::net::announce::send(&**tap, self.spec.local.address())
        {
            tracing::warn!(id = self.spec.id, %error, "the device cannot be announced");
        }
        if let Some((features, interrupt)) = &*self.driver.lock()
            && self.spec.local.announce(*features)
        {
            interrupt.config_changed();
        }
    }

    fn reset(&self) {
        *self.driver.lock() = None;
        self.shared.in_flight.lock().clear();
        self.spec.local.reset();
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let state = State { in_flight: self.shared.in_flight.lock().clone(), local: self.spec.local.save()? };
        serde_json::to_value(state).map_err(|e| self.invalid(e.to_string()))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), StateError> {
        let state =
            State::deserialize(state).map_err(|source| StateError::Parse { kind: self.spec.name, source })?;
        if state.in_flight.keys().any(|queue| usize::from(*queue) >= self.spec.queue_sizes.len()) {
            return Err(self.invalid("it has requests of a queue that is not there"));
        }
        self.spec.local.restore(&state.local)?;
        *self.shared.in_flight.lock() = state.in_flight;
        Ok(())
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        BTreeMap::from([("requests".to_owned(), self.shared.requests.load(Ordering::Relaxed))])
    }
}
