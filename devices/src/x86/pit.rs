//! The programmable interval timer: Intel 8254 data sheet (order 231164), with the gate of channel 2
//! and the speaker bits of port 0x61.
//!
//! A new count takes effect at once in every mode; the data sheet lets the current period of modes 2
//! and 3 end first, which no guest can rely on. Periods that pass unobserved are not made up for.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use holdfast_clock::{Timer, VmClock};
use holdfast_device::{
    Access, BuildContext, BuildError, BusDevice, Device, DeviceState, IrqLine, IrqSink, StateError,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{attach, nanoseconds, ticks};

const KIND: &str = "i8254";
const BASE: u64 = 0x40;
const CONTROL: u64 = 0x43;
const PORT_B: u64 = 0x61;
/// Input clock in Hz.
const HZ: u64 = 1_193_182;
/// The refresh toggle of port 0x61 changes this often, in nanoseconds.
const REFRESH_NS: u64 = 15_085;

/// Drops the PIT's (pin 0) and the RTC's (pin 1) interrupts while the HPET stands in for them.
#[derive(Debug)]
pub struct LegacyGate {
    lines: [IrqLine; 2],
    replaced: AtomicBool,
}

impl LegacyGate {
    /// `timer` is interrupt 0, `rtc` interrupt 8.
    pub fn new(timer: IrqLine, rtc: IrqLine) -> Arc<Self> {
        Arc::new(Self { lines: [timer, rtc], replaced: AtomicBool::new(false) })
    }

    /// The HPET takes over (`true`) or lets go.
    pub fn replace(&self, on: bool) {
        if self.replaced.swap(on, Ordering::SeqCst) != on {
            self.lines.iter().for_each(|line| line.set(false));
        }
    }

    /// The line for the PIT (0) or the RTC (1).
    pub fn line(self: &Arc<Self>, n: u32) -> IrqLine {
        IrqLine::new(Arc::clone(self) as Arc<dyn IrqSink>, n)
    }
}

impl IrqSink for LegacyGate {
    fn set_level(&self, pin: u32, level: bool) {
        if let Some(line) = self.lines.get(pin as usize)
            && !self.replaced.load(Ordering::SeqCst)
        {
            line.set(level);
        }
    }
}

/// What the PIT is wired to.
#[derive(Debug)]
pub struct PitConfig {
    /// Output of channel 0.
    pub irq: IrqLine,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Channel {
    /// Ticks in a period, 1 to 0x10000.
    count: u32,
    mode: u8,
    bcd: bool,
    /// 1: low byte, 2: high byte, 3: low then high.
    access: u8,
    gate: bool,
    /// Virtual time at which counting began; `None` before the first count or trigger.
    start: Option<u64>,
    /// Ticks counted when the gate closed.
    held: Option<u64>,
    /// Low byte of a count of which the high byte has not come yet.
    low: Option<u8>,
    /// The next read gives the high byte.
    read_high: bool,
    latched: Option<u16>,
    status: Option<u8>,
    /// A control word came and no count since.
    null_count: bool,
}

impl Default for Channel {
    fn default() -> Self {
        Self {
            count: 0x1_0000,
            mode: 3,
            bcd: false,
            access: 3,
            gate: true,
            start: None,
            held: None,
            low: None,
            read_high: false,
            latched: None,
            status: None,
            null_count: true,
        }
    }
}

fn from_bcd(v: u16) -> u32 {
    (0..4).rev().fold(0, |n, digit| n * 10 + u32::from(v >> (4 * digit) & 0xf))
}

fn to_bcd(v: u32) -> u16 {
    let digit = |div: u32, shift: u16| ((v / div % 10) as u16) << shift;
    digit(1000, 12) | digit(100, 8) | digit(10, 4) | digit(1, 0)
}

impl Channel {
    fn period(&self) -> u64 {
        u64::from(self.count.clamp(1, 0x1_0000))
    }

    /// Ticks since counting began.
    fn elapsed(&self, now: u64) -> Option<u64> {
        self.held.or_else(|| self.start.map(|s| ticks(now.saturating_sub(s), HZ)))
    }

    fn output(&self, now: u64) -> bool {
        let Some(d) = self.elapsed(now) else { return self.mode != 0 };
        let n = self.period();
        match self.mode {
            0 | 1 => d >= n,
            2 => !self.gate || d % n != n - 1 || n == 1,
            3 => !self.gate || d % n < n.div_ceil(2),
            _ => d != n,
        }
    }

    /// The counting element as the guest reads it.
    fn value(&self, now: u64) -> u16 {
        let n = self.period();
        let modulus = if self.bcd { 10_000 } else { 0x1_0000 };
        let d = self.elapsed(now).unwrap_or(0);
        let left = match self.mode {
            2 => n - d % n,
            3 => n - (d % n * 2) % n,
            _ => (n + modulus - d % modulus) % modulus,
        } % modulus;
        if self.bcd { to_bcd(left as u32) } else { left as u16 }
    }

    fn control(&mut self, value: u8) {
        let access = value >> 4 & 3;
        let mode = value >> 1 & 7;
        // 6 and 7 are other names of 2 and 3.
        self.mode = if mode > 5 { mode - 4 } else { mode };
        self.access = access;
        self.bcd = value & 1 != 0;
        (self.low, self.latched, self.status, self.read_high) = (None, None, None, false);
        (self.start, self.held, self.null_count) = (None, None, true);
    }

    fn latch(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.value(now));
            self.read_high = self.access == 2;
        }
    }

    fn latch_status(&mut self, now: u64) {
        if self.status.is_none() {
            let out = u8::from(self.output(now)) << 7;
            let null = u8::from(self.null_count) << 6;
            self.status = Some(out | null | self.access << 4 | self.mode << 1 | u8::from(self.bcd));
        }
    }

    /// A byte of the count; true if a whole count has been loaded.
    fn write(&mut self, value: u8, now: u64) -> bool {
        let count = match self.access {
            1 => u16::from(value),
            2 => u16::from(value) << 8,
            _ => match self.low.take() {
                Some(low) => u16::from_le_bytes([low, value]),
                None => {
                    self.low = Some(value);
                    if self.mode == 0 {
                        // The first byte stops the count (data sheet, mode 0).
                        self.start = None;
                    }
                    return false;
                }
            },
        };
        let count = if self.bcd { from_bcd(count) } else { u32::from(count) };
        self.count = match count {
            0 if self.bcd => 10_000,
            0 => 0x1_0000,
            n => n,
        };
        self.null_count = false;
        if !matches!(self.mode, 1 | 5) {
            self.start = Some(now);
            self.held = (!self.gate).then_some(0);
        }
        true
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let [low, high] = self.latched.unwrap_or_else(|| self.value(now)).to_le_bytes();
        let (byte, last) = match (self.access, self.read_high) {
            (1, _) => (low, true),
            (2, _) => (high, true),
            (_, false) => (low, false),
            (_, true) => (high, true),
        };
        self.read_high = !last;
        if last {
            self.latched = None;
        }
        byte
    }

    fn set_gate(&mut self, open: bool, now: u64) {
        if open == self.gate {
            return;
        }
        let elapsed = self.elapsed(now);
        self.gate = open;
        match (self.mode, open) {
            (0 | 4, true) => {
                self.start = elapsed.map(|d| now.saturating_sub(nanoseconds(d, HZ)));
                self.held = None;
            }
            (1 | 5, true) | (2 | 3, true) => {
                self.start = (!self.null_count).then_some(now);
                self.held = None;
            }
            (1 | 5, false) => {}
            (_, false) => self.held = elapsed,
            (_, true) => {}
        }
    }

    /// The first rising edge of the output after `now`.
    fn next_edge(&self, now: u64) -> Option<u64> {
        if self.held.is_some() {
            return None;
        }
        let start = self.start?;
        let n = self.period();
        let at = match self.mode {
            2 | 3 => (ticks(now.saturating_sub(start), HZ) / n + 1) * n,
            0 | 1 => n,
            _ => n + 1,
        };
        let at = start.saturating_add(nanoseconds(at, HZ));
        (at > now).then_some(at)
    }
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    channels: [Channel; 3],
    /// Speaker data enable (port 0x61 bit 1) and the two check-enable bits above it.
    port_b: u8,
    /// When the interrupt line rises next.
    edge: Option<u64>,
}

impl State {
    fn fresh() -> Self {
        let mut s = Self::default();
        s.channels[2].gate = false;
        s
    }
}

/// The PIT and port 0x61.
pub struct Pit {
    config: PitConfig,
    clock: Arc<VmClock>,
    alarm: Timer,
    state: Mutex<State>,
}

impl fmt::Debug for Pit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pit").field("state", &*self.state.lock()).finish_non_exhaustive()
    }
}

impl Pit {
    /// Builds the timer at ports 0x40 to 0x43 and 0x61.
    ///
    /// # Errors
    /// [`BuildError::Bus`] if a port is taken.
    pub fn build(config: PitConfig, context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        let pit = Arc::new_cyclic(|weak: &std::sync::Weak<Self>| {
            let weak = weak.clone();
            let alarm = context.timers.timer(move || {
                if let Some(pit) = weak.upgrade() {
                    pit.expired();
                }
            });
            Self { config, clock: Arc::clone(&context.clock), alarm, state: Mutex::new(State::fresh()) }
        });
        for (base, len) in [(BASE, 4), (PORT_B, 1)] {
            attach(&context.pio, KIND, base, len, Arc::clone(&pit) as Arc<dyn BusDevice>)?;
        }
        Ok(pit)
    }

    fn expired(&self) {
        let mut s = self.state.lock();
        let now = self.clock.now();
        if s.edge.is_none_or(|at| at > now) {
            return;
        }
        let [timer, ..] = &s.channels;
        if timer.mode != 0 {
            self.config.irq.set(false);
        }
        self.config.irq.set(true);
        self.schedule(&mut s, now);
    }

    fn schedule(&self, s: &mut State, now: u64) {
        let [timer, ..] = &s.channels;
        s.edge = timer.next_edge(now);
        match s.edge {
            Some(at) => self.alarm.arm(at),
            None => self.alarm.disarm(),
        }
    }

    fn write_control(&self, s: &mut State, value: u8, now: u64) {
        let selected = usize::from(value >> 6);
        if selected == 3 {
            for (i, channel) in s.channels.iter_mut().enumerate() {
                if value & 2 << i == 0 {
                    continue;
                }
                if value & 0x20 == 0 {
                    channel.latch(now);
                }
                if value & 0x10 == 0 {
                    channel.latch_status(now);
                }
            }
            return;
        }
        let Some(channel) = s.channels.get_mut(selected) else { return };
        if value & 0x30 == 0 {
            channel.latch(now);
            return;
        }
        channel.control(value);
        if selected == 0 {
            // Mode 0 begins with the output low, all others with it high.
            self.config.irq.set(channel.mode != 0);
            self.schedule(s, now);
        }
    }

    fn write_byte(&self, port: u64, value: u8) {
        let now = self.clock.now();
        let mut s = self.state.lock();
        match port {
            CONTROL => self.write_control(&mut s, value, now),
            PORT_B => {
                s.port_b = value & 0x0e;
                let [_, _, speaker] = &mut s.channels;
                speaker.set_gate(value & 1 != 0, now);
            }
            _ => {
                let at = port.wrapping_sub(BASE);
                let Some(channel) = usize::try_from(at).ok().and_then(|i| s.channels.get_mut(i)) else {
                    return;
                };
                let loaded = channel.write(value, now);
                if at == 0 && (loaded || channel.mode == 0) {
                    if channel.mode == 0 {
                        self.config.irq.set(false);
                    }
                    self.schedule(&mut s, now);
                }
            }
        }
    }

    fn read_byte(&self, port: u64) -> u8 {
        let now = self.clock.now();
        let mut s = self.state.lock();
        match port {
            CONTROL => 0xff,
            PORT_B => {
                let [_, _, speaker] = &s.channels;
                let refresh = ((now / REFRESH_NS) & 1) as u8;
                s.port_b | u8::from(speaker.gate) | refresh << 4 | u8::from(speaker.output(now)) << 5
            }
            _ => {
                let at = usize::try_from(port.wrapping_sub(BASE)).ok();
                at.and_then(|i| s.channels.get_mut(i)).map_or(0xff, |c| c.read(now))
            }
        }
    }
}

impl BusDevice for Pit {
    fn read(&self, access: Access, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.read_byte(access.address.wrapping_add(i as u64));
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            self.write_byte(access.address.wrapping_add(i as u64), *byte);
        }
    }
}

impl Device for Pit {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {
        let mut s = self.state.lock();
        *s = State::fresh();
        self.alarm.disarm();
        self.config.irq.set(false);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(KIND, 1, &*self.state.lock())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let new: State = state.parse(KIND, 1)?;
        if new.channels.iter().any(|c| c.mode > 5 || c.access > 3) {
            return Err(StateError::Invalid { kind: KIND, reason: "unknown counter mode".into() });
        }
        let mut s = self.state.lock();
        *s = new;
        match s.edge {
            Some(at) => self.alarm.arm(at),
            None => self.alarm.disarm(),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Pins, context, hostile, inb, outb};
    use super::*;

    fn pit() -> (Arc<Pit>, BuildContext, Arc<Pins>) {
        let (context, _) = context();
        let pins = Arc::new(Pins::default());
        let pit = Pit::build(PitConfig { irq: pins.line(0) }, &context).expect("build");
        (pit, context, pins)
    }

    fn at_tick(context: &BuildContext, t: u64) {
        context.clock.set(nanoseconds(t, HZ));
    }

    #[test]
    fn a_rate_generator_counts_down_and_interrupts_every_period() {
        let (pit, c, pins) = pit();
        outb(&c.pio, 0x43, 0x34);
        outb(&c.pio, 0x40, 0x10);
        outb(&c.pio, 0x40, 0x27);
        assert_eq!(pins.take(), [(0, true)]);
        at_tick(&c, 3);
        outb(&c.pio, 0x43, 0x00);
        at_tick(&c, 100);
        assert_eq!((inb(&c.pio, 0x40), inb(&c.pio, 0x40)), (0x0d, 0x27), "latched at tick 3");
        assert_eq!((inb(&c.pio, 0x40), inb(&c.pio, 0x40)), (0xac, 0x26), "and then live");
        pit.expired();
        assert!(pins.take().is_empty(), "not yet");
        at_tick(&c, 10_000);
        pit.expired();
        pit.expired();
        assert_eq!(pins.take(), [(0, false), (0, true)]);
        at_tick(&c, 35_000);
        pit.expired();
        assert_eq!(pins.take().len(), 2, "periods that were missed are not made up for");
        assert_eq!(pit.alarm.deadline(), Some(nanoseconds(40_000, HZ)));
    }

    #[test]
    fn mode_0_interrupts_once_and_read_back_tells_the_output() {
        let (pit, c, pins) = pit();
        outb(&c.pio, 0x43, 0x30);
        outb(&c.pio, 0x43, 0xe2);
        assert_eq!(inb(&c.pio, 0x40), 0x70, "low output, null count, both bytes, mode 0");
        outb(&c.pio, 0x40, 100);
        outb(&c.pio, 0x40, 0);
        pins.take();
        at_tick(&c, 100);
        pit.expired();
        assert_eq!(pins.take(), [(0, true)]);
        outb(&c.pio, 0x43, 0xc2);
        assert_eq!(inb(&c.pio, 0x40), 0xb0);
        assert_eq!((inb(&c.pio, 0x40), inb(&c.pio, 0x40)), (0, 0));
        at_tick(&c, 101);
        assert_eq!((inb(&c.pio, 0x40), inb(&c.pio, 0x40)), (0xff, 0xff), "wraps");
        assert_eq!(pit.alarm.deadline(), None);
    }

    #[test]
    fn the_gate_and_output_of_channel_2_are_in_port_61() {
        let (_, c, _) = pit();
        outb(&c.pio, 0x61, 0x00);
        outb(&c.pio, 0x43, 0xb0);
        outb(&c.pio, 0x42, 50);
        outb(&c.pio, 0x42, 0);
        at_tick(&c, 1000);
        assert_eq!(inb(&c.pio, 0x61) & 0x21, 0, "closed gate: nothing counts");
        outb(&c.pio, 0x61, 0x03);
        assert_eq!(inb(&c.pio, 0x61) & 0x23, 0x03);
        at_tick(&c, 1051);
        assert_eq!(inb(&c.pio, 0x61) & 0x20, 0x20);
        c.clock.set(REFRESH_NS * 2);
        let before = inb(&c.pio, 0x61) & 0x10;
        c.clock.set(REFRESH_NS * 3);
        assert_ne!(inb(&c.pio, 0x61) & 0x10, before, "refresh toggles");
    }

    #[test]
    fn square_waves_bcd_and_one_shots() {
        let (_, c, _) = pit();
        outb(&c.pio, 0x43, 0x57);
        outb(&c.pio, 0x41, 0x20);
        at_tick(&c, 4);
        assert_eq!(inb(&c.pio, 0x41), 0x12, "mode 3 counts by two, in BCD");
        let s = Channel { mode: 3, count: 20, start: Some(0), ..Channel::default() };
        assert!(s.output(0) && s.output(nanoseconds(9, HZ)) && !s.output(nanoseconds(10, HZ)));
        let mut one = Channel { mode: 1, gate: false, ..Channel::default() };
        one.write(10, 0);
        one.write(0, 0);
        assert!(one.output(nanoseconds(20, HZ)), "high until it is triggered");
        one.set_gate(true, 0);
        assert!(!one.output(nanoseconds(9, HZ)) && one.output(nanoseconds(10, HZ)));
        let strobe = Channel { mode: 4, count: 5, start: Some(0), ..Channel::default() };
        assert!(!strobe.output(nanoseconds(5, HZ)) && strobe.output(nanoseconds(6, HZ)));
        assert_eq!(strobe.next_edge(0), Some(nanoseconds(6, HZ)));
    }

    #[test]
    fn the_gate_drops_what_the_hpet_replaces() {
        let pins = Arc::new(Pins::default());
        let gate = LegacyGate::new(pins.line(0), pins.line(8));
        gate.line(1).set(true);
        gate.replace(true);
        gate.line(0).set(true);
        assert_eq!(pins.take(), [(8, true), (0, false), (8, false)]);
        gate.line(2).set(true);
        assert!(pins.take().is_empty());
    }

    #[test]
    fn state_survives_and_bad_ones_are_refused() {
        let (pit, c, _) = pit();
        outb(&c.pio, 0x43, 0x34);
        outb(&c.pio, 0x40, 0);
        outb(&c.pio, 0x40, 1);
        let state = pit.save().expect("saves");
        let (other, c2, pins) = self::pit();
        other.restore(&state).expect("restores");
        at_tick(&c2, 256);
        other.expired();
        assert_eq!(pins.take().len(), 2);
        other.reset();
        assert_eq!(other.alarm.deadline(), None);
        let mut bad = state;
        bad.data["channels"][0]["mode"] = 9.into();
        assert!(other.restore(&bad).is_err());
    }

    #[test]
    fn survives_hostile_accesses() {
        let (pit, c, _) = pit();
        for now in [0, 1, u64::MAX / 2, u64::MAX] {
            c.clock.set(now);
            hostile(&*pit, BASE, 4);
            hostile(&*pit, PORT_B, 1);
            pit.expired();
        }
        let zero = Channel { count: 0, start: Some(u64::MAX), ..Channel::default() };
        assert_eq!(zero.value(0), zero.value(1));
    }
}
