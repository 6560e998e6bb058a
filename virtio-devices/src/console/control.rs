//! The control protocol of multi-port consoles (section 5.3.6.2).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Bytes of a message without its payload.
pub(crate) const MESSAGE: usize = 8;
/// Most messages that wait for the driver. A driver that asks again and again without taking the
/// answers loses the latest.
const MAX_WAITING: usize = 256;

/// What is known of a port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PortState {
    /// The driver knows the port.
    pub(crate) ready: bool,
    /// A program in the guest has it open.
    pub(crate) open: bool,
}

/// What a port is, for the messages about it.
#[derive(Debug, Clone)]
pub(crate) struct PortInfo {
    pub(crate) name: Option<String>,
    pub(crate) is_console: bool,
}

/// The protocol's state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Control {
    /// Negotiated.
    pub(crate) multiport: bool,
    pub(crate) states: Vec<PortState>,
    /// Messages for the driver, as they go to memory.
    waiting: VecDeque<Vec<u8>>,
}

impl Control {
    /// The state of a console with `ports` ports before the driver comes.
    pub(crate) fn new(ports: usize) -> Self {
        Self { states: vec![PortState::default(); ports], ..Self::default() }
    }

    /// Forgets everything but the number of ports.
    pub(crate) fn reset(&mut self) {
        self.multiport = false;
        self.waiting.clear();
        self.states.fill(PortState::default());
    }

    /// A restored state, with no more messages than could have been.
    pub(crate) fn bounded(mut self) -> Self {
        self.waiting.truncate(MAX_WAITING);
        self.waiting.retain(|m| m.len() <= 4096);
        self
    }

    fn send(&mut self, port: u32, event: u16, value: u16, payload: &[u8]) {
        if self.waiting.len() >= MAX_WAITING {
            tracing::warn!(port, event, "the driver does not take console control messages");
            return;
        }
        let mut message = Vec::with_capacity(MESSAGE + payload.len());
        message.extend_from_slice(&port.to_le_bytes());
        message.extend_from_slice(&event.to_le_bytes());
        message.extend_from_slice(&value.to_le_bytes());
        message.extend_from_slice(payload);
        self.waiting.push_back(message);
    }

    /// The next message for the driver.
    pub(crate) fn next(&mut self) -> Option<Vec<u8>> {
        self.waiting.pop_front()
    }

    /// Gives a message back that could not be delivered yet.
    pub(crate) fn put_back(&mut self, message: Vec<u8>) {
        self.waiting.push_front(message);
    }

    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Tells the driver a terminal's size, if it knows the port.
    pub(crate) fn resize(&mut self, port: u32, columns: u16, rows: u16) {
        let known = self.states.get(port as usize).is_some_and(|s| s.ready);
        if self.multiport && known {
            let mut payload = [0; 4];
            // struct virtio_console_resize { cols; rows }
            payload[..2].copy_from_slice(&columns.to_le_bytes());
            payload[2..].copy_from_slice(&rows.to_le_bytes());
            self.send(port, RESIZE, 0, &payload);
        }
    }

    /// Takes a message of the driver.
    pub(crate) fn receive(&mut self, message: [u8; MESSAGE], ports: &[PortInfo], size: (u16, u16)) {
        let [a, b, c, d, e, f, g, h] = message;
        let port = u32::from_le_bytes([a, b, c, d]);
        let (event, value) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        match event {
            DEVICE_READY if value == 1 => {
                for n in 0..ports.len() {
                    self.send(n as u32, DEVICE_ADD, 1, &[]);
                }
            }
            PORT_READY if value == 1 => self.port_ready(port, ports, size),
            PORT_OPEN => {
                if let Some(state) = self.states.get_mut(port as usize) {
                    state.open = value != 0;
                }
            }
            _ => tracing::debug!(port, event, value, "console control message ignored"),
        }
    }

    fn port_ready(&mut self, port: u32, ports: &[PortInfo], (columns, rows): (u16, u16)) {
        let at = port as usize;
        let (Some(state), Some(info)) = (self.states.get_mut(at), ports.get(at)) else { return };
        state.ready = true;
        if info.is_console {
            // The guest's terminal layer does not say when it opens one.
            state.open = true;
            self.send(port, CONSOLE_PORT, 1, &[]);
            if (columns, rows) != (0, 0) {
                self.resize(port, columns, rows);
            }
        }
        if let Some(name) = &info.name {
            self.send(port, PORT_NAME, 1, name.as_bytes());
        }
        self.send(port, PORT_OPEN, 1, &[]);
    }
}
