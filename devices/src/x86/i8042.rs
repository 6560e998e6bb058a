//! The keyboard controller at ports 0x60 and 0x64, with a PS/2 keyboard and mouse behind it: Intel
//! 8242 data sheet and IBM PS/2 Hardware Interface Technical Reference, keyboard controller section.
//!
//! The A20 gate can be set and read, but addresses are never masked: bit 20 always is what the CPU says.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use holdfast_device::{
    Access, BuildContext, BuildError, BusDevice, Device, DeviceState, IrqLine, StateError, SystemEvent,
    SystemSink,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::attach;
use super::ps2::{Keyboard, Mouse, translate};

const KIND: &str = "i8042";
const DATA: u64 = 0x60;
const STATUS: u64 = 0x64;

/// Command byte: keyboard interrupt, mouse interrupt, system flag, clocks off, translation.
const KBD_INT: u8 = 0x01;
const AUX_INT: u8 = 0x02;
const SYSTEM: u8 = 0x04;
const KBD_OFF: u8 = 0x10;
const AUX_OFF: u8 = 0x20;
const TRANSLATE: u8 = 0x40;

/// Replies that the controller itself keeps at most.
const REPLIES: usize = 16;

/// What the controller is wired to.
#[derive(Debug)]
pub struct I8042Config {
    /// Interrupt 1.
    pub keyboard_irq: IrqLine,
    /// Interrupt 12.
    pub mouse_irq: IrqLine,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct State {
    command_byte: u8,
    ram: Vec<u8>,
    output_port: u8,
    /// The output buffer and whether the mouse filled it.
    output: Option<(u8, bool)>,
    /// What the data port shows while the output buffer is empty: the last byte read.
    last: u8,
    /// The command that waits for its data byte.
    pending: u8,
    /// The last byte went to the command port.
    last_was_command: bool,
    replies: VecDeque<(u8, bool)>,
    /// A release prefix was swallowed by the translation.
    release: bool,
    keyboard: Keyboard,
    mouse: Mouse,
}

impl Default for State {
    fn default() -> Self {
        Self {
            command_byte: KBD_INT | AUX_INT | SYSTEM | TRANSLATE,
            ram: vec![0; 32],
            output_port: 0xcf,
            output: None,
            last: 0,
            pending: 0,
            last_was_command: false,
            replies: VecDeque::new(),
            release: false,
            keyboard: Keyboard::default(),
            mouse: Mouse::default(),
        }
    }
}

impl State {
    fn reply(&mut self, value: u8, from_mouse: bool) {
        if self.replies.len() < REPLIES {
            self.replies.push_back((value, from_mouse));
        }
    }

    /// The next byte of the keyboard as the host is to see it.
    fn keyboard_byte(&mut self) -> Option<u8> {
        if self.command_byte & TRANSLATE == 0 {
            return self.keyboard.out.pop();
        }
        loop {
            match self.keyboard.out.pop()? {
                0xf0 => self.release = true,
                code => {
                    let released = if std::mem::take(&mut self.release) { 0x80 } else { 0 };
                    return Some(translate(code) | released);
                }
            }
        }
    }

    /// Fills the output buffer if it is empty.
    fn pump(&mut self) {
        if self.output.is_some() {
            return;
        }
        self.output = self.replies.pop_front();
        if self.output.is_none() && self.command_byte & KBD_OFF == 0 {
            self.output = self.keyboard_byte().map(|b| (b, false));
        }
        if self.output.is_none() && self.command_byte & AUX_OFF == 0 {
            self.output = self.mouse.out.pop().map(|b| (b, true));
        }
    }

    fn status(&self) -> u8 {
        let (full, mouse) = self.output.map_or((0, 0), |(_, mouse)| (1, u8::from(mouse) << 5));
        // Bit 4: the keyboard is not locked.
        full | mouse | 0x10 | self.command_byte & SYSTEM | u8::from(self.last_was_command) << 3
    }

    /// A command to the controller; returns true if it asks for a reset.
    fn command(&mut self, value: u8) -> bool {
        self.last_was_command = true;
        self.pending = 0;
        match value {
            0x20 => self.reply(self.command_byte, false),
            0x21..=0x3f => {
                let byte = self.ram.get(usize::from(value & 0x1f)).copied().unwrap_or(0);
                self.reply(byte, false);
            }
            0x60..=0x7f | 0xd1..=0xd4 => self.pending = value,
            0xa7 => self.command_byte |= AUX_OFF,
            0xa8 => self.command_byte &= !AUX_OFF,
            0xa9 | 0xab => self.reply(0x00, false),
            0xaa => {
                self.command_byte |= SYSTEM;
                self.reply(0x55, false);
            }
            0xad => self.command_byte |= KBD_OFF,
            0xae => self.command_byte &= !KBD_OFF,
            // Input port: keyboard not locked, manufacturing jumper not set.
            0xc0 => self.reply(0x80, false),
            0xd0 => {
                let full = self.output.map_or(0, |(_, mouse)| if mouse { 0x20 } else { 0x10 });
                self.reply(self.output_port & 0xcf | full, false);
            }
            0xdd => self.output_port &= !2,
            0xdf => self.output_port |= 2,
            // Pulses the output lines whose bits are clear; line 0 is the CPU's reset.
            0xf0..=0xff => return value & 1 == 0,
            _ => {}
        }
        false
    }

    /// A data byte; returns true if it asks for a reset.
    fn data(&mut self, value: u8) -> bool {
        self.last_was_command = false;
        match std::mem::take(&mut self.pending) {
            0x60 => self.command_byte = value & 0x7f,
            at @ 0x61..=0x7f => {
                if let Some(slot) = self.ram.get_mut(usize::from(at & 0x1f)) {
                    *slot = value;
                }
            }
            0xd1 => {
                self.output_port = value | 1;
                return value & 1 == 0;
            }
            0xd2 => self.reply(value, false),
            0xd3 => self.reply(value, true),
            0xd4 => {
                self.command_byte &= !AUX_OFF;
                self.mouse.write(value);
            }
            _ => {
                // Writing to the keyboard starts its clock again.
                self.command_byte &= !KBD_OFF;
                self.keyboard.write(value);
            }
        }
        false
    }
}

/// The keyboard controller.
pub struct I8042 {
    config: I8042Config,
    system: Arc<dyn SystemSink>,
    state: Mutex<State>,
}

impl fmt::Debug for I8042 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("I8042").field("config", &self.config).finish_non_exhaustive()
    }
}

impl I8042 {
    /// Builds the controller.
    ///
    /// # Errors
    /// [`BuildError::Bus`] if a port is taken.
    pub fn build(config: I8042Config, context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        let system = Arc::clone(&context.system);
        let controller = Arc::new(Self { config, system, state: Mutex::default() });
        for port in [DATA, STATUS] {
            attach(&context.pio, KIND, port, 1, Arc::clone(&controller) as Arc<dyn BusDevice>)?;
        }
        Ok(controller)
    }

    /// A key was pressed or released: its scan codes of set 2 (0xf0 before a release, 0xe0 before an
    /// extended key).
    pub fn key(&self, codes: &[u8]) {
        let mut s = self.state.lock();
        s.keyboard.key(codes);
        self.settle(&mut s);
    }

    /// The mouse was moved (right and up are positive), its wheel turned, its buttons (bit 0 left,
    /// 1 right, 2 middle) are held as given.
    pub fn pointer(&self, dx: i32, dy: i32, dz: i32, buttons: u8) {
        let mut s = self.state.lock();
        s.mouse.moved(dx, dy, dz, buttons);
        self.settle(&mut s);
    }

    /// Fills the output buffer and drives the interrupt lines.
    fn settle(&self, s: &mut State) {
        s.pump();
        let (kbd, aux) = s.output.map_or((false, false), |(_, mouse)| (!mouse, mouse));
        self.config.keyboard_irq.set(kbd && s.command_byte & KBD_INT != 0);
        self.config.mouse_irq.set(aux && s.command_byte & AUX_INT != 0);
    }
}

impl BusDevice for I8042 {
    fn read(&self, access: Access, data: &mut [u8]) {
        data.fill(0xff);
        let Some(first) = data.first_mut() else { return };
        let mut s = self.state.lock();
        if access.address == STATUS {
            *first = s.status();
            return;
        }
        *first = match s.output.take() {
            Some((byte, _)) => {
                // Lower the lines first, so that the next byte gives an edge.
                self.config.keyboard_irq.set(false);
                self.config.mouse_irq.set(false);
                s.last = byte;
                byte
            }
            None => s.last,
        };
        self.settle(&mut s);
    }

    fn write(&self, access: Access, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut s = self.state.lock();
        let reset = if access.address == STATUS { s.command(value) } else { s.data(value) };
        self.settle(&mut s);
        drop(s);
        if reset {
            self.system.request(SystemEvent::Reset);
        }
    }
}

impl Device for I8042 {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {
        let mut s = self.state.lock();
        *s = State::default();
        self.settle(&mut s);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(KIND, 1, &*self.state.lock())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let new: State = state.parse(KIND, 1)?;
        let absurd = new.keyboard.out.is_absurd() || new.mouse.out.is_absurd();
        if absurd || new.replies.len() > REPLIES || new.ram.len() != 32 {
            return Err(StateError::Invalid { kind: KIND, reason: "a queue is too long".into() });
        }
        let mut s = self.state.lock();
        *s = new;
        self.settle(&mut s);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Pins, Requests, context, hostile, inb, outb};
    use super::*;
    use holdfast_device::Bus;

    struct Rig {
        kbc: Arc<I8042>,
        bus: Arc<Bus>,
        pins: Arc<Pins>,
        requests: Arc<Requests>,
    }

    fn rig() -> Rig {
        let (context, requests) = context();
        let pins = Arc::new(Pins::default());
        let config = I8042Config { keyboard_irq: pins.line(1), mouse_irq: pins.line(12) };
        let kbc = I8042::build(config, &context).expect("build");
        Rig { kbc, bus: context.pio, pins, requests }
    }

    fn drain(bus: &Bus) -> Vec<u8> {
        let mut out = Vec::new();
        while inb(bus, 0x64) & 1 != 0 {
            out.push(inb(bus, 0x60));
        }
        out
    }

    #[test]
    fn self_tests_and_command_byte() {
        let r = rig();
        for (command, reply) in [(0xaa, 0x55), (0xab, 0x00), (0xa9, 0x00), (0x20, 0x47)] {
            outb(&r.bus, 0x64, command);
            assert_eq!(drain(&r.bus), [reply]);
        }
        outb(&r.bus, 0x64, 0x60);
        outb(&r.bus, 0x60, 0x30);
        outb(&r.bus, 0x64, 0x20);
        assert_eq!(drain(&r.bus), [0x30]);
        outb(&r.bus, 0x64, 0xd0);
        assert_eq!(drain(&r.bus)[0] & 3, 3, "A20 open, not in reset");
    }

    #[test]
    fn the_keyboard_resets_identifies_and_types() {
        let r = rig();
        outb(&r.bus, 0x60, 0xff);
        assert_eq!(drain(&r.bus), [0xfa, 0xaa]);
        outb(&r.bus, 0x60, 0xf2);
        assert_eq!(drain(&r.bus), [0xfa, 0xab, 0x41], "translated as on every PC");
        outb(&r.bus, 0x60, 0xed);
        outb(&r.bus, 0x60, 0x07);
        assert_eq!(drain(&r.bus), [0xfa, 0xfa]);
        r.pins.take();
        r.kbc.key(&[0x1c]);
        r.kbc.key(&[0xf0, 0x1c]);
        assert!(r.pins.take().contains(&(1, true)));
        assert_eq!(drain(&r.bus), [0x1e, 0x9e], "A down and up in set 1");
        assert_eq!(inb(&r.bus, 0x60), 0x9e, "an empty buffer shows the last byte");
        outb(&r.bus, 0x60, 0xf5);
        drain(&r.bus);
        r.kbc.key(&[0x1c]);
        assert!(drain(&r.bus).is_empty());
    }

    #[test]
    fn every_byte_gives_an_edge() {
        let r = rig();
        outb(&r.bus, 0x60, 0xff);
        r.pins.take();
        inb(&r.bus, 0x60);
        let keyboard: Vec<_> = r.pins.take().into_iter().filter(|p| p.0 == 1).collect();
        assert_eq!(keyboard, [(1, false), (1, true)]);
    }

    #[test]
    fn the_mouse_knocks_its_wheel_free_and_moves() {
        let r = rig();
        let aux = |byte| {
            outb(&r.bus, 0x64, 0xd4);
            outb(&r.bus, 0x60, byte);
        };
        aux(0xff);
        assert_eq!(inb(&r.bus, 0x64) & 0x21, 0x21);
        assert_eq!(drain(&r.bus), [0xfa, 0xaa, 0x00]);
        for byte in [0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf2] {
            aux(byte);
        }
        assert_eq!(drain(&r.bus).last(), Some(&3));
        aux(0xf4);
        drain(&r.bus);
        r.pins.take();
        r.kbc.pointer(5, -3, 1, 1);
        assert!(r.pins.take().contains(&(12, true)));
        assert_eq!(drain(&r.bus), [0x29, 5, 0xfd, 1]);
    }

    #[test]
    fn resets_are_asked_for_by_pulse_and_by_output_port() {
        let r = rig();
        outb(&r.bus, 0x64, 0xff);
        assert!(r.requests.take().is_empty());
        outb(&r.bus, 0x64, 0xfe);
        assert_eq!(r.requests.take(), [SystemEvent::Reset]);
        outb(&r.bus, 0x64, 0xd1);
        outb(&r.bus, 0x60, 0xfe);
        assert_eq!(r.requests.take(), [SystemEvent::Reset]);
    }

    #[test]
    fn a_host_that_never_reads_costs_bounded_memory() {
        let r = rig();
        for _ in 0..10_000 {
            r.kbc.key(&[0x1c, 0xf0, 0x1c]);
            outb(&r.bus, 0x60, 0xf2);
            outb(&r.bus, 0x64, 0x20);
        }
        let state = r.kbc.save().expect("saves");
        assert!(serde_json::to_string(&state).expect("text").len() < 4096);
        let other = rig();
        other.kbc.restore(&state).expect("restores");
        assert_eq!(drain(&other.bus), drain(&r.bus));
        other.kbc.reset();
        assert!(drain(&other.bus).is_empty());
    }

    #[test]
    fn survives_hostile_accesses() {
        let r = rig();
        hostile(&*r.kbc, DATA, 1);
        hostile(&*r.kbc, STATUS, 1);
        for value in 0..=255 {
            for data in 0..=255 {
                outb(&r.bus, 0x64, value);
                outb(&r.bus, 0x60, data);
            }
        }
    }
}
