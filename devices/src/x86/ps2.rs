//! A PS/2 keyboard and mouse: IBM PS/2 Hardware Interface Technical Reference, keyboard and auxiliary
//! device sections; the wheel follows the Microsoft IntelliMouse protocol.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
/// Bytes that a device keeps for its host; a host that never reads loses the rest.
const QUEUE: usize = 256;
/// Input events are dropped above this, so that replies to commands always fit.
const EVENTS: usize = 192;

/// What a device says, oldest first.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Queue(VecDeque<u8>);

impl Queue {
    fn say(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if self.0.len() < QUEUE {
                self.0.push_back(*byte);
            }
        }
    }

    fn event(&mut self, bytes: &[u8]) {
        if self.0.len() + bytes.len() <= EVENTS {
            self.say(bytes);
        }
    }

    fn clear(&mut self) {
        self.0.clear();
    }

    /// The next byte for the host.
    pub fn pop(&mut self) -> Option<u8> {
        self.0.pop_front()
    }

    /// Longer than any device lets it grow: no state of ours.
    pub fn is_absurd(&self) -> bool {
        self.0.len() > QUEUE
    }
}

/// The keyboard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Keyboard {
    /// What it says.
    pub out: Queue,
    scanning: bool,
    /// The command that waits for its argument.
    command: u8,
    leds: u8,
    /// Scan code set, 1 to 3.
    set: u8,
    last: u8,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self { out: Queue::default(), scanning: true, command: 0, leds: 0, set: 2, last: 0 }
    }
}

impl Keyboard {
    /// A byte from the host.
    pub fn write(&mut self, value: u8) {
        match std::mem::take(&mut self.command) {
            0 => self.start(value),
            0xed => {
                self.leds = value & 7;
                self.out.say(&[ACK]);
            }
            0xf0 => match value {
                0 => self.out.say(&[ACK, self.set]),
                1..=3 => {
                    self.set = value;
                    self.out.say(&[ACK]);
                }
                _ => self.out.say(&[RESEND]),
            },
            _ => self.out.say(&[ACK]),
        }
    }

    fn start(&mut self, value: u8) {
        match value {
            0xed | 0xf0 | 0xf3 => {
                self.command = value;
                self.out.say(&[ACK]);
            }
            0xee => self.out.say(&[0xee]),
            0xf2 => self.out.say(&[ACK, 0xab, 0x83]),
            0xf4 => {
                self.scanning = true;
                self.out.say(&[ACK]);
            }
            0xf5 | 0xf6 => {
                self.out.clear();
                (self.scanning, self.set) = (value == 0xf6, 2);
                self.out.say(&[ACK]);
            }
            0xfe => self.out.say(&[self.last]),
            0xff => {
                *self = Self::default();
                self.out.say(&[ACK, 0xaa]);
            }
            _ => self.out.say(&[RESEND]),
        }
    }

    /// Scan codes of set 2 for a key that was pressed or released.
    pub fn key(&mut self, codes: &[u8]) {
        if self.scanning {
            self.out.event(codes);
            self.last = codes.last().copied().unwrap_or(self.last);
        }
    }
}

/// The mouse.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mouse {
    /// What it says.
    pub out: Queue,
    reporting: bool,
    remote: bool,
    wrap: bool,
    double_scale: bool,
    resolution: u8,
    rate: u8,
    /// 0, or 3 with a wheel.
    device_id: u8,
    /// The last three rates: 200, 100, 80 turns the wheel on.
    knock: [u8; 3],
    command: u8,
    dx: i32,
    dy: i32,
    dz: i32,
    buttons: u8,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            out: Queue::default(),
            reporting: false,
            remote: false,
            wrap: false,
            double_scale: false,
            resolution: 2,
            rate: 100,
            device_id: 0,
            knock: [0; 3],
            command: 0,
            dx: 0,
            dy: 0,
            dz: 0,
            buttons: 0,
        }
    }
}

impl Mouse {
    /// A byte from the host.
    pub fn write(&mut self, value: u8) {
        if self.wrap && !matches!(value, 0xec | 0xff) {
            self.out.say(&[value]);
            return;
        }
        match std::mem::take(&mut self.command) {
            0 => self.start(value),
            0xe8 => {
                self.resolution = value & 3;
                self.out.say(&[ACK]);
            }
            _ => {
                let [_, b, c] = self.knock;
                (self.rate, self.knock) = (value, [b, c, value]);
                if self.knock == [200, 100, 80] {
                    self.device_id = 3;
                }
                self.out.say(&[ACK]);
            }
        }
    }

    fn start(&mut self, value: u8) {
        match value {
            0xe6 | 0xe7 => self.double_scale = value == 0xe7,
            0xe8 | 0xf3 => self.command = value,
            0xea => self.remote = false,
            0xec => self.wrap = false,
            0xee => self.wrap = true,
            0xf0 => self.remote = true,
            0xf4 | 0xf5 => self.reporting = value == 0xf4,
            0xf6 => {
                *self =
                    Self { out: std::mem::take(&mut self.out), device_id: self.device_id, ..Self::default() }
            }
            0xe9 => {
                let modes = u8::from(self.remote) << 6 | u8::from(self.reporting) << 5;
                let status = modes | u8::from(self.double_scale) << 4 | self.buttons;
                self.out.say(&[ACK, status, self.resolution, self.rate]);
                return;
            }
            0xeb => {
                self.out.say(&[ACK]);
                self.report();
                return;
            }
            0xf2 => {
                self.out.say(&[ACK, self.device_id]);
                return;
            }
            0xff => {
                *self = Self::default();
                self.out.say(&[ACK, 0xaa, 0x00]);
                return;
            }
            _ => {
                self.out.say(&[RESEND]);
                return;
            }
        }
        self.out.say(&[ACK]);
    }

    /// Queues one packet of the movement gathered so far.
    fn report(&mut self) {
        let dx = self.dx.clamp(-255, 255);
        let dy = self.dy.clamp(-255, 255);
        let dz = self.dz.clamp(-8, 7);
        let signs = u8::from(dx < 0) << 4 | u8::from(dy < 0) << 5;
        let packet = [self.buttons & 7 | 8 | signs, dx as u8, dy as u8, dz as u8];
        let len = if self.device_id == 3 { 4 } else { 3 };
        self.out.event(packet.get(..len).unwrap_or(&packet));
        (self.dx, self.dy, self.dz) = (self.dx - dx, self.dy - dy, 0);
    }

    /// Movement (right and up are positive), wheel steps, and buttons held (bit 0 left, 1 right,
    /// 2 middle).
    pub fn moved(&mut self, dx: i32, dy: i32, dz: i32, buttons: u8) {
        let limit = |v: i32| v.clamp(-4096, 4096);
        self.dx = limit(self.dx.saturating_add(dx));
        self.dy = limit(self.dy.saturating_add(dy));
        self.dz = limit(self.dz.saturating_add(dz));
        self.buttons = buttons & 7;
        if self.reporting && !self.remote {
            self.report();
        }
    }
}

/// What the controller makes of set 2 codes below 0x80 when it translates to set 1; the others stay.
#[rustfmt::skip]
const SET_1: [u8; 128] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59,
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b,
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f,
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61,
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f,
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
];

/// The set 1 code of a set 2 code.
pub fn translate(code: u8) -> u8 {
    match code {
        // F7 and Print Screen are the only set 2 codes above 0x7f.
        0x83 => 0x41,
        0x84 => 0x54,
        _ => SET_1.get(usize::from(code)).copied().unwrap_or(code),
    }
}
