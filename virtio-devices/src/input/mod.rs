//! A power button as a virtio input device (virtio 1.2 section 5.8), for machines without one of their own: a
//! keyboard with one key, `KEY_POWER`, which is what systemd-logind and acpid look for.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_device::{BuildContext, BuildError, StateError};
use holdfast_threads::Role;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{Interrupt, VirtioDevice, feature, kind, read_bytes};
use crate::queue::{HandlerError, VirtQueue};
use crate::worker::{Activation, Handler, Watch, Worker};

/// Events to the driver.
const EVENTS: u16 = 0;
const QUEUE_SIZE: u16 = 64;
/// Token of a press.
const PRESS: u64 = 0x100;

/// Selectors of the config space (section 5.8.4).
mod select {
    pub(super) const NAME: u8 = 0x01;
    pub(super) const SERIAL: u8 = 0x02;
    pub(super) const IDS: u8 = 0x03;
    pub(super) const EVENT_BITS: u8 = 0x11;
}

/// Linux's event types and codes (`input-event-codes.h`), which the specification refers to.
const EV_SYN: u16 = 0;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// Bus type in the device's ids: virtual.
const BUS_VIRTUAL: u16 = 6;

/// An event as the driver gets it: type, code, value.
type InputEvent = (u16, u16, u32);

/// A press and a release.
const CLICK: [InputEvent; 4] =
    [(EV_KEY, KEY_POWER, 1), (EV_SYN, 0, 0), (EV_KEY, KEY_POWER, 0), (EV_SYN, 0, 0)];
/// Presses that wait for a driver without buffers; further ones change nothing.
const MAX_WAITING: usize = 4;

/// What is saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct State {
    /// What the driver looks at in the config space.
    select: u8,
    subsel: u8,
    /// Events that the driver has not got yet.
    waiting: VecDeque<InputEvent>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    pressed: EventFd,
    presses: AtomicU64,
}

/// A power button.
#[derive(Debug)]
pub struct PowerButton {
    worker: Worker,
    shared: Arc<Shared>,
    live: Arc<Mutex<bool>>,
}

/// Builds the button `id` and starts its worker.
///
/// # Errors
/// [`BuildError`] with what the host refused.
pub fn build_power_button(id: &str, context: &BuildContext) -> Result<Arc<PowerButton>, BuildError> {
    let host = |what: &str, source| BuildError::Host { id: id.to_owned(), what: what.to_owned(), source };
    let pressed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| host("no eventfd", e))?;
    let shared = Arc::new(Shared { state: Mutex::default(), pressed, presses: AtomicU64::new(0) });
    let live = Arc::new(Mutex::new(false));
    let handler = ButtonHandler { shared: Arc::clone(&shared), queues: Vec::new(), interrupt: None };
    let worker = Worker::start(id, Role::Device, &*context.spawner, Box::new(handler));
    let worker = worker.map_err(|e| host("cannot start its thread", e))?;
    Ok(Arc::new(PowerButton { worker, shared, live }))
}

impl PowerButton {
    /// Presses and releases it. False if the guest has no driver for it.
    pub fn press(&self) -> bool {
        if !*self.live.lock() {
            return false;
        }
        let mut state = self.shared.state.lock();
        if state.waiting.len() < MAX_WAITING * CLICK.len() {
            state.waiting.extend(CLICK);
        }
        drop(state);
        self.shared.presses.fetch_add(1, Ordering::Relaxed);
        // A full counter is readable as well.
        let _ = self.shared.pressed.write(1);
        true
    }
}

/// The bytes that the driver sees for a selector; none if there is no such thing.
fn item(select: u8, subsel: u8) -> Vec<u8> {
    match (select, subsel) {
        (select::NAME, 0) => b"Power Button".to_vec(),
        (select::SERIAL, 0) => b"holdfast".to_vec(),
        (select::IDS, 0) => [BUS_VIRTUAL, 0, 0, 1].iter().flat_map(|id| id.to_le_bytes()).collect(),
        (select::EVENT_BITS, kind) if u16::from(kind) == EV_KEY => {
            let (byte, bit) = (usize::from(KEY_POWER / 8), KEY_POWER % 8);
            let mut bits = vec![0; byte];
            bits.push(1 << bit);
            bits
        }
        _ => Vec::new(),
    }
}

impl VirtioDevice for PowerButton {
    fn name(&self) -> &'static str {
        "virtio-input"
    }

    fn device_type(&self) -> u32 {
        kind::INPUT
    }

    fn features(&self) -> u64 {
        feature::QUEUES
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (select, subsel) = {
            let state = self.shared.state.lock();
            (state.select, state.subsel)
        };
        let item = item(select, subsel);
        // No item has more than 128 bytes.
        let mut config = vec![select, subsel, item.len() as u8, 0, 0, 0, 0, 0];
        config.extend(item);
        read_bytes(&config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let mut state = self.shared.state.lock();
        for (at, byte) in (offset..).zip(data) {
            match at {
                0 => state.select = *byte,
                1 => state.subsel = *byte,
                _ => {}
            }
        }
    }

    fn activate(&self, activation: Activation) {
        *self.live.lock() = true;
        self.worker.activate(activation);
    }

    fn stop(&self) -> Vec<VirtQueue> {
        *self.live.lock() = false;
        self.worker.stop()
    }

    fn reset(&self) {
        *self.shared.state.lock() = State::default();
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let state = serde_json::to_value(&*self.shared.state.lock());
        state.map_err(|source| StateError::Parse { kind: "virtio-input", source })
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), StateError> {
        let kind = "virtio-input";
        let state = State::deserialize(state).map_err(|source| StateError::Parse { kind, source })?;
        if state.waiting.len() > MAX_WAITING * CLICK.len() {
            let reason = format!("{} events wait, more than there can be", state.waiting.len());
            return Err(StateError::Invalid { kind, reason });
        }
        *self.shared.state.lock() = state;
        Ok(())
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        BTreeMap::from([("presses".to_owned(), self.shared.presses.load(Ordering::Relaxed))])
    }
}

struct ButtonHandler {
    shared: Arc<Shared>,
    queues: Vec<VirtQueue>,
    interrupt: Option<Arc<dyn Interrupt>>,
}

impl ButtonHandler {
    /// Gives waiting events to the driver, and its status messages (of LEDs that are not there) back.
    fn serve(&mut self) -> Result<(), HandlerError> {
        for queue in &mut self.queues {
            let mut budget = queue.size();
            loop {
                if budget == 0 {
                    // A driver that never stops must not keep this thread from other events.
                    queue.kick_again();
                    break;
                }
                budget -= 1;
                let mut state = self.shared.state.lock();
                if queue.index() == EVENTS && state.waiting.is_empty() {
                    break;
                }
                let Some(chain) = queue.pop()? else {
                    if queue.enable_kicks()? {
                        continue;
                    }
                    break;
                };
                let mut written = 0;
                if queue.index() == EVENTS
                    && let Some((kind, code, value)) = state.waiting.pop_front()
                {
                    let mut writer = queue.writer(&chain);
                    writer.write(&kind.to_le_bytes())?;
                    writer.write(&code.to_le_bytes())?;
                    writer.write(&value.to_le_bytes())?;
                    written = writer.written();
                }
                queue.push(chain.head, written)?;
            }
            if queue.wants_interrupt()?
                && let Some(interrupt) = &self.interrupt
            {
                interrupt.queue(queue.index());
            }
        }
        Ok(())
    }
}

impl Handler for ButtonHandler {
    fn start(&mut self, activation: Activation, watch: &Watch) -> Result<(), HandlerError> {
        for queue in &activation.queues {
            watch.add(queue.kick().as_raw_fd(), u64::from(queue.index()))?;
        }
        watch.add(self.shared.pressed.as_raw_fd(), PRESS)?;
        self.queues = activation.queues;
        self.interrupt = Some(activation.interrupt);
        self.serve()
    }

    fn event(&mut self, token: u64, _watch: &Watch) -> Result<(), HandlerError> {
        if token == PRESS {
            // An error means that the wake-up was taken already.
            let _ = self.shared.pressed.read();
        }
        self.serve()
    }

    fn stop(&mut self, watch: &Watch) -> Vec<VirtQueue> {
        watch.remove(self.shared.pressed.as_raw_fd());
        self.interrupt = None;
        for queue in &self.queues {
            watch.remove(queue.kick().as_raw_fd());
        }
        std::mem::take(&mut self.queues)
    }
}
