//! The virtio console (virtio 1.2 section 5.3): one or more ports over character back ends.

pub mod config;
mod control;
mod handler;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_device::{BuildContext, BuildError, StateError};
use holdfast_devices::chardev::{CharBackend, CharReceiver};
use holdfast_threads::Role;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{Interrupt, VirtioDevice, feature, kind, read_bytes};
use crate::queue::VirtQueue;
use crate::worker::{Activation, Worker};
use config::ConsoleConfig;
use control::Control;
use handler::ConsoleHandler;

/// Feature bits (section 5.3.3).
pub(crate) mod bit {
    pub(crate) const SIZE: u64 = 1 << 0;
    pub(crate) const MULTIPORT: u64 = 1 << 1;
}

const QUEUE_SIZE: u16 = 256;
/// Most ports; each takes two queues.
pub const MAX_PORTS: usize = 16;
/// Bytes of input that wait for the guest, for each port.
const INPUT: usize = 4096;

/// One port of a console.
#[derive(Debug, Clone)]
pub struct PortArgs {
    /// Shown in the guest's `/dev/virtio-ports` and sysfs, if given.
    pub name: Option<String>,
    /// A terminal (`hvc`), not just a stream of bytes.
    pub is_console: bool,
    /// What it is connected to.
    pub backend: Arc<dyn CharBackend>,
}

/// What a port's back end and the worker share.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) args: PortArgs,
    input: Mutex<VecDeque<u8>>,
    wake: EventFd,
}

impl Port {
    /// Takes up to `max` bytes of input.
    pub(crate) fn take(&self, max: usize) -> Vec<u8> {
        let mut input = self.input.lock();
        let n = input.len().min(max);
        input.drain(..n).collect()
    }

    pub(crate) fn has_input(&self) -> bool {
        !self.input.lock().is_empty()
    }

    /// Drops input that nobody in the guest will read.
    pub(crate) fn discard(&self) {
        self.input.lock().clear();
    }

    pub(crate) fn wake(&self) -> &EventFd {
        &self.wake
    }
}

impl CharReceiver for Port {
    fn capacity(&self) -> usize {
        INPUT - self.input.lock().len().min(INPUT)
    }

    fn receive(&self, data: &[u8]) {
        let mut input = self.input.lock();
        let n = data.len().min(INPUT - input.len().min(INPUT));
        input.extend(data.iter().take(n));
        drop(input);
        // A full counter is readable as well.
        let _ = self.wake.write(1);
    }
}

/// What the worker shares with the rest of the device.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) ports: Vec<Arc<Port>>,
    pub(crate) control: Mutex<Control>,
    /// Columns and rows.
    size: Mutex<(u16, u16)>,
    pub(crate) control_wake: EventFd,
    pub(crate) received: AtomicU64,
    pub(crate) sent: AtomicU64,
}

impl Shared {
    pub(crate) fn size(&self) -> (u16, u16) {
        *self.size.lock()
    }
}

/// A virtio console.
#[derive(Debug)]
pub struct Console {
    shared: Arc<Shared>,
    worker: Worker,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ConsoleState {
    ports: Vec<SavedPort>,
    control: Control,
    size: (u16, u16),
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedPort {
    input: Vec<u8>,
}

/// Builds a console with these ports.
///
/// # Errors
/// [`BuildError`] naming the field or what the host refused.
pub fn build(
    id: &str,
    config: &ConsoleConfig,
    ports: Vec<PortArgs>,
    context: &BuildContext,
) -> Result<Arc<Console>, BuildError> {
    crate::registry::check(id, config.validate())?;
    Console::new(id, ports, context)
}

impl Console {
    /// A console with these ports.
    ///
    /// # Errors
    /// [`BuildError`] if there are none or too many, or the host has no thread or file descriptor.
    pub fn new(id: &str, ports: Vec<PortArgs>, context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        if !(1..=MAX_PORTS).contains(&ports.len()) {
            let reason = format!("{} ports: a console has 1 to {MAX_PORTS}", ports.len());
            return Err(BuildError::Config { id: id.to_owned(), reason });
        }
        let host = |what: &str, source| BuildError::Host { id: id.to_owned(), what: what.to_owned(), source };
        let eventfd =
            || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| host("cannot make an eventfd", e));
        let mut made = Vec::new();
        for args in ports {
            made.push(Arc::new(Port { args, input: Mutex::default(), wake: eventfd()? }));
        }
        let control = Control::new(made.len());
        let shared = Arc::new(Shared {
            ports: made,
            control: Mutex::new(control),
            size: Mutex::new((0, 0)),
            control_wake: eventfd()?,
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        });
        let handler = Box::new(ConsoleHandler::new(Arc::clone(&shared)));
        let worker = Worker::start(id, Role::Device, &*context.spawner, handler)
            .map_err(|e| host("cannot start its thread", e))?;
        for port in &shared.ports {
            port.args.backend.connect(Arc::clone(port) as Arc<dyn CharReceiver>);
        }
        Ok(Arc::new(Self { shared, worker, interrupt: Mutex::default() }))
    }

    /// The terminal behind the first port has this size now.
    pub fn resize(&self, columns: u16, rows: u16) {
        let changed = std::mem::replace(&mut *self.shared.size.lock(), (columns, rows)) != (columns, rows);
        if !changed {
            return;
        }
        let multiport = {
            let mut control = self.shared.control.lock();
            control.resize(0, columns, rows);
            control.multiport
        };
        let interrupt = self.interrupt.lock().clone();
        match interrupt {
            Some(_) if multiport => drop(self.shared.control_wake.write(1)),
            Some(interrupt) => interrupt.config_changed(),
            None => {}
        }
    }
}

impl VirtioDevice for Console {
    fn name(&self) -> &'static str {
        "virtio-console"
    }

    fn device_type(&self) -> u32 {
        kind::CONSOLE
    }

    fn features(&self) -> u64 {
        feature::QUEUES | bit::SIZE | bit::MULTIPORT
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2 + 2 * self.shared.ports.len()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.shared.size();
        let mut config = [0; 12];
        config[..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4..8].copy_from_slice(&(self.shared.ports.len() as u32).to_le_bytes());
        read_bytes(&config, offset, data);
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
        self.shared.control.lock().reset();
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let ports = &self.shared.ports;
        let input = |p: &Arc<Port>| SavedPort { input: p.input.lock().iter().copied().collect() };
        let state = ConsoleState {
            ports: ports.iter().map(input).collect(),
            control: self.shared.control.lock().clone(),
            size: self.shared.size(),
        };
        serde_json::to_value(state).map_err(|source| StateError::Parse { kind: "virtio-console", source })
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), StateError> {
        let kind = "virtio-console";
        let state = ConsoleState::deserialize(state).map_err(|source| StateError::Parse { kind, source })?;
        let n = self.shared.ports.len();
        if state.ports.len() != n || state.control.states.len() != n {
            let reason = format!("it has {} ports, this console has {n}", state.ports.len());
            return Err(StateError::Invalid { kind, reason });
        }
        for (port, saved) in self.shared.ports.iter().zip(state.ports) {
            let mut input = port.input.lock();
            input.clear();
            input.extend(saved.input.into_iter().take(INPUT));
        }
        *self.shared.control.lock() = state.control.bounded();
        *self.shared.size.lock() = state.size;
        Ok(())
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        BTreeMap::from([
            ("rx_bytes".to_owned(), self.shared.received.load(Ordering::Relaxed)),
            ("tx_bytes".to_owned(), self.shared.sent.load(Ordering::Relaxed)),
        ])
    }
}
