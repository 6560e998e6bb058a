//! A 16550A UART (National Semiconductor PC16550D data sheet).
//!
//! Characters take no time: the transmitter is always empty again at once, and the receive time-out
//! interrupt comes as soon as characters wait below the trigger level.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use holdfast_device::{Access, BusDevice, Device, DeviceState, IrqLine, StateError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::chardev::{CharBackend, CharReceiver};

/// Bytes of the register window on a port bus.
pub const PORTS: u64 = 8;

/// Depth of the receive FIFO.
const FIFO: usize = 16;

/// Interrupt Enable Register.
mod ier {
    pub const RECEIVED: u8 = 1;
    pub const EMPTY: u8 = 2;
    pub const LINE_STATUS: u8 = 4;
    pub const MODEM: u8 = 8;
    pub const ALL: u8 = 15;
}

/// Interrupt Identification Register.
mod iir {
    pub const NONE: u8 = 0x01;
    pub const MODEM: u8 = 0x00;
    pub const EMPTY: u8 = 0x02;
    pub const RECEIVED: u8 = 0x04;
    pub const LINE_STATUS: u8 = 0x06;
    pub const TIMEOUT: u8 = 0x0c;
    pub const FIFOS: u8 = 0xc0;
}

/// FIFO Control Register.
mod fcr {
    pub const ENABLE: u8 = 1;
    pub const CLEAR_RECEIVE: u8 = 2;
    pub const KEPT: u8 = 0xc9;
}

/// Line Status Register.
mod lsr {
    pub const READY: u8 = 0x01;
    pub const OVERRUN: u8 = 0x02;
    pub const ERRORS: u8 = 0x1e;
    pub const EMPTY: u8 = 0x60;
}

/// Modem Control Register.
mod mcr {
    pub const LOOP: u8 = 0x10;
    pub const ALL: u8 = 0x1f;
}

/// Modem Status Register: CTS, DSR and DCD, as from a peer that is always there.
const PEER: u8 = 0xb0;
/// Line Control Register: registers 0 and 1 are the divisor latch.
const DLAB: u8 = 0x80;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Regs {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// Sticky error bits of LSR.
    errors: u8,
    /// Change bits of MSR.
    deltas: u8,
    scratch: u8,
    divisor: u16,
    received: VecDeque<u8>,
    /// The transmitter-empty interrupt has not been seen yet.
    empty_pending: bool,
    /// The back end was told that there is no room.
    starved: bool,
}

impl Default for Regs {
    fn default() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            errors: 0,
            deltas: 0,
            scratch: 0,
            // 9600 baud of a 1.8432 MHz clock.
            divisor: 12,
            received: VecDeque::new(),
            empty_pending: false,
            starved: false,
        }
    }
}

impl Regs {
    fn depth(&self) -> usize {
        if self.fcr & fcr::ENABLE != 0 { FIFO } else { 1 }
    }

    fn trigger(&self) -> usize {
        match (self.fcr & fcr::ENABLE, self.fcr >> 6) {
            (0, _) | (_, 0) => 1,
            (_, 1) => 4,
            (_, 2) => 8,
            _ => 14,
        }
    }

    /// The highest-priority interrupt (data sheet, table 5).
    fn interrupt(&self) -> u8 {
        if self.ier & ier::LINE_STATUS != 0 && self.errors != 0 {
            iir::LINE_STATUS
        } else if self.ier & ier::RECEIVED != 0 && self.received.len() >= self.trigger() {
            iir::RECEIVED
        } else if self.ier & ier::RECEIVED != 0 && !self.received.is_empty() {
            iir::TIMEOUT
        } else if self.ier & ier::EMPTY != 0 && self.empty_pending {
            iir::EMPTY
        } else if self.ier & ier::MODEM != 0 && self.deltas != 0 {
            iir::MODEM
        } else {
            iir::NONE
        }
    }

    fn receive(&mut self, byte: u8) {
        if self.received.len() < self.depth() {
            self.received.push_back(byte);
        } else {
            self.errors |= lsr::OVERRUN;
        }
    }

    /// The modem inputs: the peer's, or our own outputs in loopback.
    fn modem(&self) -> u8 {
        if self.mcr & mcr::LOOP == 0 {
            return PEER;
        }
        // RTS shows as CTS, DTR as DSR, OUT1 as RI, OUT2 as DCD.
        (self.mcr & 2) << 3 | (self.mcr & 1) << 5 | (self.mcr & 4) << 4 | (self.mcr & 8) << 4
    }

    fn set_mcr(&mut self, value: u8) {
        let before = self.modem();
        self.mcr = value & mcr::ALL;
        let after = self.modem();
        let changed = before ^ after;
        // RI counts only when it goes away.
        let ring_end = before & !after & 0x40;
        self.deltas |= (changed & 0xb0 | ring_end) >> 4;
    }
}

/// The UART.
#[derive(Debug)]
pub struct Serial {
    id: String,
    irq: IrqLine,
    backend: Option<Arc<dyn CharBackend>>,
    regs: Mutex<Regs>,
}

/// What the back end holds of the UART: no cycle keeps either alive.
#[derive(Debug)]
struct Input(Weak<Serial>);

impl CharReceiver for Input {
    fn capacity(&self) -> usize {
        self.0.upgrade().map_or(0, |s| s.capacity())
    }

    fn receive(&self, data: &[u8]) {
        if let Some(serial) = self.0.upgrade() {
            serial.receive(data);
        }
    }
}

impl Serial {
    /// A UART connected to `backend`; without one, output is dropped.
    pub fn new(id: &str, irq: IrqLine, backend: Option<Arc<dyn CharBackend>>) -> Arc<Self> {
        let serial =
            Arc::new(Self { id: id.to_owned(), irq, backend: backend.clone(), regs: Mutex::default() });
        if let Some(backend) = backend {
            backend.connect(Arc::new(Input(Arc::downgrade(&serial))));
        }
        serial
    }

    fn capacity(&self) -> usize {
        let mut regs = self.regs.lock();
        let looped = regs.mcr & mcr::LOOP != 0;
        let room = if looped { 0 } else { regs.depth().saturating_sub(regs.received.len()) };
        regs.starved |= room == 0;
        room
    }

    fn receive(&self, data: &[u8]) {
        let mut regs = self.regs.lock();
        for &byte in data {
            regs.receive(byte);
        }
        self.update(&regs);
    }

    /// Drives the interrupt line. Called under the lock, so that two threads cannot reorder edges.
    fn update(&self, regs: &Regs) {
        self.irq.set(regs.interrupt() != iir::NONE);
    }

    /// True once if the back end waits for room and there is some.
    fn fed(regs: &mut Regs) -> bool {
        let room = regs.mcr & mcr::LOOP == 0 && regs.received.is_empty();
        room && std::mem::take(&mut regs.starved)
    }

    fn read_register(&self, regs: &mut Regs, register: u64) -> u8 {
        match register {
            0 if regs.lcr & DLAB != 0 => regs.divisor as u8,
            1 if regs.lcr & DLAB != 0 => (regs.divisor >> 8) as u8,
            0 => regs.received.pop_front().unwrap_or(0),
            1 => regs.ier,
            2 => {
                let id = regs.interrupt();
                if id == iir::EMPTY {
                    regs.empty_pending = false;
                }
                if regs.fcr & fcr::ENABLE != 0 { id | iir::FIFOS } else { id }
            }
            3 => regs.lcr,
            4 => regs.mcr,
            5 => {
                let ready = if regs.received.is_empty() { 0 } else { lsr::READY };
                ready | lsr::EMPTY | std::mem::take(&mut regs.errors)
            }
            6 => regs.modem() | std::mem::take(&mut regs.deltas),
            7 => regs.scratch,
            _ => 0,
        }
    }

    fn write_register(&self, regs: &mut Regs, register: u64, value: u8) {
        match register {
            0 if regs.lcr & DLAB != 0 => regs.divisor = regs.divisor & 0xff00 | u16::from(value),
            1 if regs.lcr & DLAB != 0 => regs.divisor = regs.divisor & 0x00ff | u16::from(value) << 8,
            0 => self.transmit(regs, value),
            1 => {
                let risen = value & !regs.ier & ier::EMPTY != 0;
                regs.ier = value & ier::ALL;
                regs.empty_pending |= risen;
            }
            2 => {
                if (value ^ regs.fcr) & fcr::ENABLE != 0 || value & fcr::CLEAR_RECEIVE != 0 {
                    regs.received.clear();
                }
                regs.fcr = if value & fcr::ENABLE != 0 { value & fcr::KEPT } else { 0 };
            }
            3 => regs.lcr = value,
            4 => regs.set_mcr(value),
            7 => regs.scratch = value,
            // LSR and MSR are read-only; factory test writes have no effect.
            _ => {}
        }
    }

    fn transmit(&self, regs: &mut Regs, value: u8) {
        // The interrupt goes away and comes back, which edge-triggered inputs need.
        regs.empty_pending = false;
        self.update(regs);
        if regs.mcr & mcr::LOOP != 0 {
            regs.receive(value);
        } else if let Some(backend) = &self.backend {
            backend.send(&[value]);
        }
        regs.empty_pending = true;
    }

    fn after_access(&self, mut regs: parking_lot::MutexGuard<'_, Regs>) {
        self.update(&regs);
        let fed = Self::fed(&mut regs);
        drop(regs);
        if let Some(backend) = self.backend.as_ref().filter(|_| fed) {
            backend.receiver_ready();
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, access: Access, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            let mut regs = self.regs.lock();
            *first = self.read_register(&mut regs, access.offset);
            self.after_access(regs);
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        if let Some(&first) = data.first() {
            let mut regs = self.regs.lock();
            self.write_register(&mut regs, access.offset, first);
            self.after_access(regs);
        }
    }
}

const KIND: &str = "serial-16550";

impl Device for Serial {
    fn id(&self) -> &str {
        &self.id
    }

    fn reset(&self) {
        let mut regs = self.regs.lock();
        // A back end that waits for room must still be told.
        *regs = Regs { starved: regs.starved, ..Regs::default() };
        self.after_access(regs);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(KIND, 1, &*self.regs.lock())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let mut saved: Regs = state.parse(KIND, 1)?;
        if saved.received.len() > FIFO {
            let reason = format!("{} characters in a FIFO of {FIFO}", saved.received.len());
            return Err(StateError::Invalid { kind: KIND, reason });
        }
        saved.ier &= ier::ALL;
        saved.mcr &= mcr::ALL;
        saved.errors &= lsr::ERRORS;
        saved.deltas &= 0x0f;
        saved.starved = true;
        let mut regs = self.regs.lock();
        *regs = saved;
        self.after_access(regs);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
