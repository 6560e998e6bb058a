//! `pc-testdev`: what test suites for PCs (kvm-unit-tests) expect of a machine: a latch behind ports and one that takes
//! bytes only, a port that flushes a page, memory behind a device, and ports that drive interrupt lines.

use std::sync::Arc;

use holdfast_device::{
    Access, BuildContext, BuildError, Bus, BusDevice, Device, DeviceState, IrqLine, StateError,
};
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Board, DeviceKind};
use crate::x86::{attach, read_reg, write_reg};

const KIND: &str = "pc-testdev";

/// The latch: four ports.
const LATCH: u64 = 0xe0;
/// Writes here flush a page from whatever caches a host has. There is nothing that a guest could see.
const FLUSH: u64 = 0xe4;
/// The same latch, by bytes.
const BYTES: u64 = 0xe8;
/// Writing to the n-th port sets interrupt line n to whether the value is not 0.
const LINES: u64 = 0x2000;
const LINE_COUNT: u32 = 24;
/// Memory that every access reaches as an access to a device.
const MEMORY: u64 = 0xff00_0000;
const MEMORY_LEN: usize = 0x1_0000;

/// It has no options.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PcTestdevConfig {}

impl DeviceKind for PcTestdevConfig {
    const NAME: &'static str = KIND;
    const SUMMARY: &'static str = "Ports, memory and interrupt lines for test suites (kvm-unit-tests)";

    fn build(&self, board: &Board<'_>) -> Result<Arc<dyn Device>, BuildError> {
        let lines = board.isa(KIND)?;
        Ok(PcTestdev::build((0..LINE_COUNT).map(lines).collect(), board.build)?)
    }
}

/// What is saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct State {
    latch: u32,
    /// Levels of the lines, by bit.
    lines: u32,
    /// The memory without its trailing zeros.
    memory: Vec<u8>,
}

/// The device.
#[derive(Debug)]
pub struct PcTestdev {
    lines: Vec<IrqLine>,
    state: Mutex<State>,
}

/// One of its windows.
#[derive(Debug)]
struct Window {
    device: Arc<PcTestdev>,
    part: Part,
}

#[derive(Debug, Clone, Copy)]
enum Part {
    Latch,
    Flush,
    Lines,
    Memory,
}

impl PcTestdev {
    /// Builds the device with its interrupt lines.
    ///
    /// # Errors
    /// [`BuildError::Bus`] if a port is taken.
    pub fn build(lines: Vec<IrqLine>, context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        let state = State { memory: vec![0; MEMORY_LEN], ..State::default() };
        let count = lines.len() as u64;
        let device = Arc::new(Self { lines, state: Mutex::new(state) });
        let put = |bus: &Arc<Bus>, base, len, part| {
            attach(bus, KIND, base, len, Arc::new(Window { device: Arc::clone(&device), part }))
        };
        put(&context.pio, LATCH, 4, Part::Latch)?;
        put(&context.pio, FLUSH, 4, Part::Flush)?;
        put(&context.pio, BYTES, 4, Part::Latch)?;
        put(&context.pio, LINES, count, Part::Lines)?;
        put(&context.mmio, MEMORY, MEMORY_LEN as u64, Part::Memory)?;
        Ok(device)
    }

    fn set_line(&self, n: u64, level: bool) {
        let Some(line) = usize::try_from(n).ok().and_then(|n| self.lines.get(n)) else { return };
        let bit = 1u32.checked_shl(n as u32).unwrap_or(0);
        let mut state = self.state.lock();
        state.lines = if level { state.lines | bit } else { state.lines & !bit };
        line.set(level);
    }
}

fn range(offset: u64, len: usize) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok()?;
    Some(start..start.checked_add(len)?)
}

impl BusDevice for Window {
    fn read(&self, access: Access, data: &mut [u8]) {
        let state = self.device.state.lock();
        data.fill(0);
        match self.part {
            Part::Latch => read_reg(state.latch.into(), access.offset, data),
            Part::Memory => {
                let found = range(access.offset, data.len()).and_then(|range| state.memory.get(range));
                if let Some(bytes) = found {
                    data.copy_from_slice(bytes);
                }
            }
            Part::Flush | Part::Lines => {}
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        match self.part {
            Part::Latch => {
                let mut state = self.device.state.lock();
                state.latch = write_reg(state.latch.into(), access.offset, data) as u32;
            }
            Part::Memory => {
                let mut state = self.device.state.lock();
                let found = range(access.offset, data.len()).and_then(|range| state.memory.get_mut(range));
                if let Some(bytes) = found {
                    bytes.copy_from_slice(data);
                }
            }
            Part::Lines => self.device.set_line(access.offset, data.iter().any(|b| *b != 0)),
            Part::Flush => {}
        }
    }
}

impl Device for PcTestdev {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {
        let mut state = self.state.lock();
        *state = State { memory: vec![0; MEMORY_LEN], ..State::default() };
        self.lines.iter().for_each(|line| line.set(false));
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let mut state = self.state.lock().clone();
        let end = state.memory.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
        state.memory.truncate(end);
        DeviceState::new(KIND, 1, &state)
    }

    /// The lines' levels are part of the interrupt controllers' state, too.
    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let mut new: State = state.parse(KIND, 1)?;
        if new.memory.len() > MEMORY_LEN {
            let reason = format!("{} bytes of memory; there are {MEMORY_LEN}", new.memory.len());
            return Err(StateError::Invalid { kind: KIND, reason });
        }
        new.memory.resize(MEMORY_LEN, 0);
        *self.state.lock() = new;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::testing::{Pins, context, hostile, inb, outb};

    fn rig() -> (Arc<PcTestdev>, Arc<Pins>, BuildContext) {
        let (c, _) = context();
        let pins = Arc::new(Pins::default());
        let device = PcTestdev::build((0..24).map(|n| pins.line(n)).collect(), &c).expect("build");
        (device, pins, c)
    }

    #[test]
    fn the_latch_and_the_memory_keep_what_is_written() {
        let (device, _, c) = rig();
        c.pio.write(None, 0xe0, &[1, 2, 3, 4]);
        outb(&c.pio, 0xe9, 9);
        let mut word = [0; 4];
        c.pio.read(None, 0xe0, &mut word);
        assert_eq!((word, inb(&c.pio, 0xea)), ([1, 9, 3, 4], 3));
        c.mmio.write(None, 0xff00_fff8, &[7; 8]);
        let state = device.save().expect("saves");
        device.reset();
        let mut tail = [1; 8];
        c.mmio.read(None, 0xff00_fff8, &mut tail);
        assert_eq!((tail, inb(&c.pio, 0xe0)), ([0; 8], 0));
        device.restore(&state).expect("restores");
        c.mmio.read(None, 0xff00_fff8, &mut tail);
        assert_eq!((tail, inb(&c.pio, 0xe1)), ([7; 8], 9));
    }

    #[test]
    fn ports_drive_interrupt_lines() {
        let (device, pins, c) = rig();
        outb(&c.pio, 0x2000 + 0x12, 1);
        outb(&c.pio, 0x2000 + 0x12, 0);
        outb(&c.pio, 0x2001, 0xff);
        assert_eq!(pins.take(), [(0x12, true), (0x12, false), (1, true)]);
        device.reset();
        assert!(pins.take().contains(&(1, false)));
    }

    #[test]
    fn hostile_accesses_and_states() {
        let (device, _, _) = rig();
        for part in [Part::Latch, Part::Flush, Part::Lines, Part::Memory] {
            hostile(&Window { device: Arc::clone(&device), part }, 0, 64);
        }
        let large = State { memory: vec![1; MEMORY_LEN + 1], ..State::default() };
        assert!(device.restore(&DeviceState::new(KIND, 1, &large).expect("state")).is_err());
    }
}
