//! The virtio memory balloon (virtio 1.2 section 5.5).

pub mod config;
mod handler;
mod ram;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use holdfast_device::{BuildContext, BuildError, StateError};
use holdfast_threads::Role;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{Interrupt, VirtioDevice, feature, kind, read_bytes};
use crate::queue::VirtQueue;
use crate::worker::{Activation, Worker};
use config::BalloonConfig;
use handler::BalloonHandler;

/// Feature bits (section 5.5.3).
pub(crate) mod bit {
    pub(crate) const STATS_VQ: u64 = 1 << 1;
    pub(crate) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(crate) const REPORTING: u64 = 1 << 5;
}

const QUEUE_SIZE: u16 = 128;
/// The balloon counts pages of 4 KiB, whatever the guest's page size.
const PAGE_SHIFT: u32 = 12;
/// Offset of `actual` in the config space.
const ACTUAL: u64 = 4;

/// The names of the driver's statistics by tag (section 5.5.6.4).
pub const STATISTICS: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kills",
    "allocation_stalls",
    "async_scans",
    "direct_scans",
    "async_reclaims",
    "direct_reclaims",
];

/// What the worker shares.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Pages that the guest is asked for.
    target: AtomicU32,
    /// Pages that it says it has given.
    actual: AtomicU32,
    /// The latest statistics, by name.
    pub(crate) statistics: Mutex<BTreeMap<&'static str, u64>>,
    /// Asks the worker for new ones.
    pub(crate) ask: EventFd,
    pub(crate) inflated: AtomicU64,
    pub(crate) deflated: AtomicU64,
    pub(crate) reported: AtomicU64,
}

/// A virtio memory balloon.
#[derive(Debug)]
pub struct Balloon {
    shared: Arc<Shared>,
    worker: Worker,
    features: u64,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct BalloonState {
    target: u32,
    actual: u32,
}

/// Builds a balloon and starts its worker.
///
/// # Errors
/// [`BuildError`] naming the field or what the host refused.
pub fn build(id: &str, config: &BalloonConfig, context: &BuildContext) -> Result<Arc<Balloon>, BuildError> {
    crate::registry::check(id, config.validate())?;
    let host = |what: &str, source| BuildError::Host { id: id.to_owned(), what: what.to_owned(), source };
    let shared = Arc::new(Shared {
        target: AtomicU32::new(pages(config.size)),
        actual: AtomicU32::new(0),
        statistics: Mutex::default(),
        ask: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| host("cannot make an eventfd", e))?,
        inflated: AtomicU64::new(0),
        deflated: AtomicU64::new(0),
        reported: AtomicU64::new(0),
    });
    let mut features = feature::QUEUES | bit::STATS_VQ;
    if config.deflate_on_oom {
        features |= bit::DEFLATE_ON_OOM;
    }
    if config.free_page_reporting {
        features |= bit::REPORTING;
    }
    let handler = Box::new(BalloonHandler::new(Arc::clone(&shared)));
    let worker = Worker::start(id, Role::Device, &*context.spawner, handler)
        .map_err(|e| host("cannot start its thread", e))?;
    Ok(Arc::new(Balloon { shared, worker, features, interrupt: Mutex::default() }))
}

fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes >> PAGE_SHIFT).unwrap_or(u32::MAX)
}

impl Balloon {
    /// Asks the guest to give back `bytes` of RAM in all, rounded down to pages.
    pub fn resize(&self, bytes: u64) {
        self.shared.target.store(pages(bytes), Ordering::Release);
        let interrupt = self.interrupt.lock().clone();
        if let Some(interrupt) = interrupt {
            interrupt.config_changed();
        }
    }

    /// Bytes that the guest is asked to give back.
    pub fn target(&self) -> u64 {
        u64::from(self.shared.target.load(Ordering::Acquire)) << PAGE_SHIFT
    }

    /// Bytes that the guest has given back.
    pub fn actual(&self) -> u64 {
        u64::from(self.shared.actual.load(Ordering::Acquire)) << PAGE_SHIFT
    }

    /// The driver's latest statistics by name, in bytes or events; asks it for new ones.
    pub fn statistics(&self) -> BTreeMap<&'static str, u64> {
        // A full counter is readable as well.
        let _ = self.shared.ask.write(1);
        self.shared.statistics.lock().clone()
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &'static str {
        "virtio-balloon"
    }

    fn device_type(&self) -> u32 {
        kind::BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        // Inflate, deflate, statistics, and reporting where it is offered.
        vec![QUEUE_SIZE; if self.features & bit::REPORTING != 0 { 4 } else { 3 }]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        config[..4].copy_from_slice(&self.shared.target.load(Ordering::Acquire).to_le_bytes());
        config[4..8].copy_from_slice(&self.shared.actual.load(Ordering::Acquire).to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(value)) = (offset, <[u8; 4]>::try_from(data)) {
            self.shared.actual.store(u32::from_le_bytes(value), Ordering::Release);
        }
    }

    fn activate(&self, activation: Activation) {
        *self.interrupt.lock() = Some(Arc::clone(&activation.interrupt));
        self.worker.activate(activation);
    }

    fn stop(&self) -> Vec<VirtQueue> {
        *self.interrupt.lock() = None;
        self.worker.stop()
    }

    fn reset(&self) {
        self.shared.actual.store(0, Ordering::Release);
        self.shared.statistics.lock().clear();
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let load = |n: &AtomicU32| n.load(Ordering::Acquire);
        let state = BalloonState { target: load(&self.shared.target), actual: load(&self.shared.actual) };
        serde_json::to_value(state).map_err(|source| StateError::Parse { kind: "virtio-balloon", source })
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), StateError> {
        let state = BalloonState::deserialize(state)
            .map_err(|source| StateError::Parse { kind: "virtio-balloon", source })?;
        self.shared.target.store(state.target, Ordering::Release);
        self.shared.actual.store(state.actual, Ordering::Release);
        Ok(())
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let mut out = BTreeMap::from([
            ("actual_bytes".to_owned(), self.actual()),
            ("inflated_pages".to_owned(), load(&self.shared.inflated)),
            ("deflated_pages".to_owned(), load(&self.shared.deflated)),
            ("reported_bytes".to_owned(), load(&self.shared.reported)),
        ]);
        out.extend(self.statistics().into_iter().map(|(name, value)| (name.to_owned(), value)));
        out
    }
}
