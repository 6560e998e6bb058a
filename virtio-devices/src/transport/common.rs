//! The part of a device that all transports share: status, features, queue setup, life cycle.
//!
//! One mutex guards the registers. It is never held while a worker is waited for: a transition marks
//! itself [`Phase::Busy`], lets go, and takes the lock again to finish.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use holdfast_device::{BuildContext, DeviceEvent, DeviceState, StateError, SystemSink};
use holdfast_memory::GuestMemory;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{Interrupt, VirtioDevice, feature};
use crate::queue::{QueueError, VirtQueue};
use crate::worker::Activation;

/// Device status bits (section 2.1).
pub(crate) mod status {
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
}

/// What a transport's interrupt and its registers share without a lock.
#[derive(Debug, Default)]
pub(crate) struct Flags {
    pub(crate) needs_reset: AtomicBool,
    pub(crate) generation: AtomicU32,
}

/// How the driver has set up a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QueueSetup {
    pub(crate) max_size: u16,
    pub(crate) size: u16,
    pub(crate) ready: bool,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    #[serde(default)]
    pub(crate) next_avail: u16,
    #[serde(default)]
    pub(crate) next_used: u16,
}

impl QueueSetup {
    fn fresh(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ready: false,
            desc: 0,
            avail: 0,
            used: 0,
            next_avail: 0,
            next_used: 0,
        }
    }

    fn state(&self, event_idx: bool) -> QueueState {
        QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        }
    }
}

/// Registers that all transports have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registers {
    pub(crate) status: u8,
    #[serde(default)]
    pub(crate) device_select: u32,
    #[serde(default)]
    pub(crate) driver_select: u32,
    pub(crate) driver_features: u64,
    #[serde(default)]
    pub(crate) queue_select: u16,
    pub(crate) queues: Vec<QueueSetup>,
}

impl Registers {
    fn fresh(sizes: &[u16]) -> Self {
        Self { queues: sizes.iter().map(|s| QueueSetup::fresh(*s)).collect(), ..Self::default() }
    }

    pub(crate) fn queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The driver is not ready.
    Idle,
    /// The workers have the queues.
    Active,
    /// The queues were taken back for a pause.
    Paused,
    /// A transition is under way.
    Busy,
}

#[derive(Debug)]
struct Inner {
    phase: Phase,
    registers: Registers,
}

/// A device behind a transport.
#[derive(Debug)]
pub(crate) struct Common {
    pub(crate) id: String,
    pub(crate) device: Arc<dyn VirtioDevice>,
    memory: GuestMemory,
    kicks: Vec<Arc<EventFd>>,
    pub(crate) flags: Arc<Flags>,
    interrupt: Arc<dyn Interrupt>,
    system: Arc<dyn SystemSink>,
    sizes: Vec<u16>,
    inner: Mutex<Inner>,
}

/// What is saved of a device and its transport.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Saved<T> {
    pub(crate) registers: Registers,
    #[serde(default)]
    pub(crate) generation: u32,
    pub(crate) device: serde_json::Value,
    pub(crate) transport: T,
}

impl Common {
    pub(crate) fn new(
        id: &str,
        device: Arc<dyn VirtioDevice>,
        context: &BuildContext,
        interrupt: Arc<dyn Interrupt>,
        flags: Arc<Flags>,
    ) -> std::io::Result<Self> {
        let sizes = device.queue_sizes();
        let mut kicks = Vec::new();
        for _ in &sizes {
            kicks.push(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?));
        }
        let inner = Mutex::new(Inner { phase: Phase::Idle, registers: Registers::fresh(&sizes) });
        let (memory, system) = (context.memory.clone(), Arc::clone(&context.system));
        Ok(Self { id: id.to_owned(), device, memory, kicks, flags, interrupt, system, sizes, inner })
    }

    /// Signalled by the driver's notifications of each queue.
    pub(crate) fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// A notification that came as a register write.
    pub(crate) fn kick(&self, queue: u32) {
        if let Some(kick) = self.kicks.get(queue as usize) {
            // An eventfd whose counter is full is readable already.
            let _ = kick.write(1);
        }
    }

    /// Looks at the registers.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&Registers) -> R) -> R {
        f(&self.inner.lock().registers)
    }

    /// Changes the registers' selectors.
    pub(crate) fn select(&self, f: impl FnOnce(&mut Registers)) {
        f(&mut self.inner.lock().registers);
    }

    /// Changes the selected queue's setup, which is allowed until the device is live.
    pub(crate) fn set_queue(&self, f: impl FnOnce(&mut QueueSetup)) {
        let mut inner = self.inner.lock();
        let at = usize::from(inner.registers.queue_select);
        if inner.phase != Phase::Idle {
            return;
        }
        if let Some(queue) = inner.registers.queues.get_mut(at) {
            f(queue);
        }
    }

    pub(crate) fn device_features(&self) -> u32 {
        let features = self.device.features() | feature::VERSION_1;
        match self.with(|r| r.device_select) {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        }
    }

    pub(crate) fn driver_features(&self) -> u32 {
        self.with(|r| match r.driver_select {
            0 => r.driver_features as u32,
            1 => (r.driver_features >> 32) as u32,
            _ => 0,
        })
    }

    pub(crate) fn set_driver_features(&self, value: u32) {
        let mut inner = self.inner.lock();
        let r = &mut inner.registers;
        if r.status & status::FEATURES_OK != 0 {
            return;
        }
        match r.driver_select {
            0 => r.driver_features = r.driver_features & !0xffff_ffff | u64::from(value),
            1 => r.driver_features = r.driver_features & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    pub(crate) fn status(&self) -> u8 {
        let broken = self.flags.needs_reset.load(Ordering::Acquire);
        self.with(|r| r.status) | if broken { status::NEEDS_RESET } else { 0 }
    }

    pub(crate) fn set_status(&self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let mut inner = self.inner.lock();
        if matches!(inner.phase, Phase::Busy | Phase::Paused) {
            return;
        }
        let old = inner.registers.status;
        let mut value = value & !status::NEEDS_RESET;
        if value & !old & status::FEATURES_OK != 0 {
            let offered = self.device.features() | feature::VERSION_1;
            let chosen = inner.registers.driver_features;
            if chosen & !offered != 0 || chosen & feature::VERSION_1 == 0 {
                tracing::warn!(id = self.id, chosen, offered, "the driver's features are refused");
                value &= !status::FEATURES_OK;
            }
        }
        // Bits are only ever set until the device is reset.
        inner.registers.status = old | value;
        let ready = status::DRIVER_OK | status::FEATURES_OK;
        if inner.phase == Phase::Idle && inner.registers.status & ready == ready {
            self.activate(&mut inner);
            self.system.device_event(&self.id, DeviceEvent::Activated);
        }
    }

    /// Hands the queues to the device, or finds that they make no sense.
    fn activate(&self, inner: &mut Inner) {
        match self.build_queues(&inner.registers) {
            Ok(queues) => {
                tracing::debug!(id = self.id, queues = queues.len(), "virtio device activated");
                inner.phase = Phase::Active;
                self.device.activate(Activation {
                    queues,
                    features: inner.registers.driver_features,
                    memory: self.memory.clone(),
                    interrupt: Arc::clone(&self.interrupt),
                });
            }
            Err(error) => {
                tracing::error!(id = self.id, %error, "device needs reset");
                self.interrupt.needs_reset();
            }
        }
    }

    fn build_queues(&self, registers: &Registers) -> Result<Vec<VirtQueue>, QueueError> {
        let event_idx = registers.driver_features & feature::EVENT_IDX != 0;
        let mut queues = Vec::new();
        for (n, (setup, kick)) in registers.queues.iter().zip(&self.kicks).enumerate() {
            if setup.ready {
                let state = setup.state(event_idx);
                queues.push(VirtQueue::new(n as u16, state, &self.memory, Arc::clone(kick))?);
            }
        }
        Ok(queues)
    }

    /// Marks a transition; `None` if one is under way already.
    fn begin(&self) -> Option<Phase> {
        let mut inner = self.inner.lock();
        let before = inner.phase;
        inner.phase = Phase::Busy;
        (before != Phase::Busy).then_some(before)
    }

    /// A reset by the driver or the machine. Requests under way are finished first, so that nothing
    /// touches RAM afterwards.
    pub(crate) fn reset(&self) {
        let Some(before) = self.begin() else { return };
        if before == Phase::Active {
            self.device.stop();
            self.system.device_event(&self.id, DeviceEvent::Reset);
        }
        self.device.reset();
        self.flags.needs_reset.store(false, Ordering::Release);
        let mut inner = self.inner.lock();
        inner.registers = Registers::fresh(&self.sizes);
        inner.phase = Phase::Idle;
    }

    pub(crate) fn pause(&self) {
        let Some(before) = self.begin() else { return };
        let queues = if before == Phase::Active { self.device.stop() } else { Vec::new() };
        let mut inner = self.inner.lock();
        for queue in queues {
            if let Some(setup) = inner.registers.queues.get_mut(usize::from(queue.index())) {
                let state = queue.state();
                (setup.next_avail, setup.next_used) = (state.next_avail, state.next_used);
            }
        }
        inner.phase = if before == Phase::Active { Phase::Paused } else { before };
    }

    pub(crate) fn resume(&self) {
        let mut inner = self.inner.lock();
        if inner.phase != Phase::Paused {
            return;
        }
        inner.phase = Phase::Idle;
        if self.flags.needs_reset.load(Ordering::Acquire) {
            // It stands until the driver resets it.
            inner.phase = Phase::Active;
        } else {
            self.activate(&mut inner);
        }
    }

    pub(crate) fn save<T: Serialize>(
        &self,
        kind: &'static str,
        version: u32,
        transport: T,
    ) -> Result<DeviceState, StateError> {
        let mut registers = {
            let inner = self.inner.lock();
            if matches!(inner.phase, Phase::Active | Phase::Busy) {
                let reason = "the device must be paused to be saved".to_owned();
                return Err(StateError::Invalid { kind, reason });
            }
            inner.registers.clone()
        };
        registers.status = self.status();
        let generation = self.flags.generation.load(Ordering::Acquire);
        let saved = Saved { registers, generation, device: self.device.save()?, transport };
        DeviceState::new(kind, version, &saved)
    }

    pub(crate) fn restore<T: serde::de::DeserializeOwned>(
        &self,
        kind: &'static str,
        version: u32,
        state: &DeviceState,
    ) -> Result<T, StateError> {
        let saved: Saved<T> = state.parse(kind, version)?;
        let invalid = |reason: String| StateError::Invalid { kind, reason };
        let mut registers = saved.registers;
        let sizes: Vec<u16> = registers.queues.iter().map(|q| q.max_size).collect();
        if sizes != self.sizes {
            return Err(invalid(format!("its queues are {sizes:?}, this device's are {:?}", self.sizes)));
        }
        let offered = self.device.features() | feature::VERSION_1;
        let missing = registers.driver_features & !offered;
        if registers.status & status::FEATURES_OK != 0 && missing != 0 {
            return Err(invalid(format!("the driver uses features {missing:#x} that are not offered here")));
        }
        if self.inner.lock().phase == Phase::Active {
            return Err(invalid("this device is running".to_owned()));
        }
        self.device.restore(&saved.device)?;
        let broken = registers.status & status::NEEDS_RESET != 0;
        registers.status &= !status::NEEDS_RESET;
        self.flags.needs_reset.store(broken, Ordering::Release);
        self.flags.generation.store(saved.generation, Ordering::Release);
        let live = registers.status & status::DRIVER_OK != 0;
        let mut inner = self.inner.lock();
        inner.phase = if live { Phase::Paused } else { Phase::Idle };
        inner.registers = registers;
        Ok(saved.transport)
    }
}

impl Drop for Common {
    fn drop(&mut self) {
        if self.inner.get_mut().phase == Phase::Active {
            self.device.stop();
        }
    }
}
