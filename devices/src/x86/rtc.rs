//! The real-time clock and its CMOS RAM: Motorola MC146818A data sheet, century at 0x32 as the FADT
//! tells.
//!
//! The time of day is the host's, moved by what the guest sets, so it is right again after a pause
//! or a restore. Its interrupts follow virtual time.

use std::fmt;
use std::sync::Arc;

use holdfast_clock::{Timer, VmClock};
use holdfast_device::{
    Access, BuildContext, BuildError, BusDevice, Device, DeviceState, IrqLine, StateError,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{attach, nanoseconds, ticks};

const KIND: &str = "mc146818";
const BASE: u64 = 0x70;
const SECOND: u64 = 1_000_000_000;
/// How long before the update the clock says that it is in progress, in nanoseconds.
const UPDATE_WARNING: u64 = 244_000;

const REG_A: usize = 0x0a;
const REG_B: usize = 0x0b;
const REG_C: usize = 0x0c;
const REG_D: usize = 0x0d;
const CENTURY: usize = 0x32;

const B_SET: u8 = 0x80;
const B_BINARY: u8 = 0x04;
const B_24H: u8 = 0x02;
/// Periodic, alarm and update flags of register C, and their enables in register B.
const INTERRUPTS: u8 = 0x70;
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATE: u8 = 0x10;
/// An alarm byte at or above this matches anything.
const ANY: u8 = 0xc0;
/// Longest stretch of seconds that is searched for an alarm: a day, after which all repeat.
const DAY: i64 = 86_400;

/// What the CMOS holds at power-on.
#[derive(Debug)]
pub struct CmosConfig {
    /// Interrupt 8.
    pub irq: IrqLine,
    /// Bytes of RAM below 4 GiB.
    pub ram_below_4g: u64,
    /// Bytes of RAM from 4 GiB on.
    pub ram_above_4g: u64,
    /// vCPUs present at boot.
    pub boot_vcpus: u32,
    /// The wall clock, nanoseconds since 1970; `None` for the host's.
    pub wall: Option<fn() -> u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    index: u8,
    cmos: Vec<u8>,
    /// Seconds added to the wall clock.
    offset: i64,
    /// The second up to which alarms and updates have been noticed.
    noticed: i64,
    /// Virtual time up to which periodic flags have been noticed.
    periodic: u64,
}

/// Days since 1970-01-01 of a date of the proleptic Gregorian calendar.
fn days_from_date(year: i64, month: i64, day: i64) -> i64 {
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let of_era = y.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// (year, month 1 to 12, day 1 to 31) of days since 1970-01-01.
fn date_from_days(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let of_era = z.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year + era * 400 + i64::from(month <= 2);
    (year, month, of_year - (153 * shifted + 2) / 5 + 1)
}

impl State {
    fn reg(&self, n: usize) -> u8 {
        self.cmos.get(n).copied().unwrap_or(0)
    }

    fn set_reg(&mut self, n: usize, value: u8) {
        if let Some(slot) = self.cmos.get_mut(n) {
            *slot = value;
        }
    }

    fn encode(&self, v: i64) -> u8 {
        let v = v.rem_euclid(100) as u8;
        if self.reg(REG_B) & B_BINARY != 0 { v } else { ((v / 10) << 4) | (v % 10) }
    }

    fn decode(&self, v: u8) -> i64 {
        i64::from(if self.reg(REG_B) & B_BINARY != 0 { v } else { (v >> 4) * 10 + (v & 0xf) })
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.reg(REG_B) & B_24H != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { 0x80 } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }

    fn decode_hour(&self, v: u8) -> i64 {
        if self.reg(REG_B) & B_24H != 0 {
            return self.decode(v);
        }
        self.decode(v & 0x7f) % 12 + if v & 0x80 != 0 { 12 } else { 0 }
    }

    /// Writes the time of day `t` (seconds since 1970) into the registers.
    fn show(&mut self, t: i64) {
        let (days, of_day) = (t.div_euclid(DAY), t.rem_euclid(DAY));
        let (year, month, day) = date_from_days(days);
        let hour = self.encode_hour(of_day / 3600);
        self.set_reg(4, hour);
        let weekday = (days + 4).rem_euclid(7) + 1;
        let fields = [(0, of_day % 60), (2, of_day / 60 % 60), (6, weekday), (7, day), (8, month), (9, year)];
        for (reg, v) in fields.into_iter().chain([(CENTURY, year / 100)]) {
            let byte = self.encode(v);
            self.set_reg(reg, byte);
        }
    }

    /// The time of day that the registers hold. Nonsense gives some time, not an error.
    fn shown(&self) -> i64 {
        let year = self.decode(self.reg(CENTURY)) * 100 + self.decode(self.reg(9));
        let month = self.decode(self.reg(8)).clamp(1, 12);
        let days = days_from_date(year, month, self.decode(self.reg(7)).clamp(1, 31));
        let hour = self.decode_hour(self.reg(4));
        days * DAY + hour * 3600 + self.decode(self.reg(2)) * 60 + self.decode(self.reg(0))
    }

    fn alarm_matches(&self, t: i64) -> bool {
        let of_day = t.rem_euclid(DAY);
        let now = [self.encode(of_day % 60), self.encode(of_day / 60 % 60), self.encode_hour(of_day / 3600)];
        [1, 3, 5].iter().zip(now).all(|(reg, v)| self.reg(*reg) >= ANY || self.reg(*reg) == v)
    }

    /// Rate of the periodic interrupt as a divider of 32768 Hz.
    fn divider(&self) -> Option<u64> {
        match self.reg(REG_A) & 0xf {
            0 => None,
            rs @ (1 | 2) => Some(1 << (rs + 6)),
            rs => Some(1 << (rs - 1)),
        }
    }

    /// Raises the flags of what has happened until wall second `t` and virtual time `now`.
    fn notice(&mut self, t: i64, now: u64) {
        let mut flags = 0;
        if self.reg(REG_B) & B_SET == 0 && t > self.noticed {
            flags |= UPDATE;
            let first = self.noticed.max(t.saturating_sub(DAY)) + 1;
            if (first..=t).any(|second| self.alarm_matches(second)) {
                flags |= ALARM;
            }
        }
        self.noticed = t;
        if let Some(divider) = self.divider() {
            let period = |at| ticks(at, 32_768) / divider;
            if period(now) > period(self.periodic) {
                flags |= PERIODIC;
            }
        }
        self.periodic = now;
        let flags = self.reg(REG_C) | flags;
        self.set_reg(REG_C, flags);
    }

    fn raised(&self) -> bool {
        self.reg(REG_B) & self.reg(REG_C) & INTERRUPTS != 0
    }
}

/// The clock at ports 0x70 and 0x71 with 128 bytes of CMOS RAM.
pub struct Rtc {
    config: CmosConfig,
    clock: Arc<VmClock>,
    alarm: Timer,
    state: Mutex<State>,
}

impl fmt::Debug for Rtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rtc").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Rtc {
    /// Builds the clock.
    ///
    /// # Errors
    /// [`BuildError::Bus`] if a port is taken.
    pub fn build(config: CmosConfig, context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        let rtc = Arc::new_cyclic(|weak: &std::sync::Weak<Self>| {
            let weak = weak.clone();
            let alarm = context.timers.timer(move || {
                if let Some(rtc) = weak.upgrade() {
                    rtc.update(&mut rtc.state.lock());
                }
            });
            let state = State {
                index: 0,
                cmos: power_on(&config),
                offset: 0,
                noticed: (wall(&config) / SECOND) as i64,
                periodic: 0,
            };
            Self { config, clock: Arc::clone(&context.clock), alarm, state: Mutex::new(state) }
        });
        attach(&context.pio, KIND, BASE, 2, Arc::clone(&rtc) as Arc<dyn BusDevice>)?;
        Ok(rtc)
    }

    /// The guest's time of day in seconds, and nanoseconds into the second.
    fn time(&self, s: &State) -> (i64, u64) {
        let wall = wall(&self.config);
        ((wall / SECOND) as i64 + s.offset, wall % SECOND)
    }

    /// Notices what has happened, drives the line and sets the next alarm.
    fn update(&self, s: &mut State) {
        let now = self.clock.now();
        let (t, into) = self.time(s);
        s.notice(t, now);
        let raised = s.raised();
        if raised {
            let flags = s.reg(REG_C) | 0x80;
            s.set_reg(REG_C, flags);
        }
        self.config.irq.set(raised);
        // Nothing new can happen to the line before the guest has read register C.
        let enabled = if raised { 0 } else { s.reg(REG_B) };
        let second = (enabled & (ALARM | UPDATE) != 0).then(|| now.saturating_add(SECOND - into));
        let period = s.divider().filter(|_| enabled & PERIODIC != 0).map(|d| {
            let next = (ticks(now, 32_768) / d + 1) * d;
            nanoseconds(next, 32_768)
        });
        match second.into_iter().chain(period).min() {
            Some(at) => self.alarm.arm(at),
            None => self.alarm.disarm(),
        }
    }

    fn read_byte(&self, port: u64) -> u8 {
        if port == BASE {
            return 0xff;
        }
        let mut s = self.state.lock();
        let index = usize::from(s.index & 0x7f);
        let (t, into) = self.time(&s);
        let set = s.reg(REG_B) & B_SET != 0;
        match index {
            0 | 2 | 4 | 6..=9 | CENTURY if !set => {
                s.show(t);
                s.reg(index)
            }
            REG_A => {
                let updating = !set && into >= SECOND - UPDATE_WARNING;
                s.reg(REG_A) & 0x7f | u8::from(updating) << 7
            }
            REG_C => {
                self.update(&mut s);
                let flags = s.reg(REG_C);
                s.set_reg(REG_C, 0);
                self.update(&mut s);
                flags
            }
            REG_D => 0x80,
            _ => s.reg(index),
        }
    }

    fn write_byte(&self, port: u64, value: u8) {
        let mut s = self.state.lock();
        if port == BASE {
            s.index = value;
            return;
        }
        let index = usize::from(s.index & 0x7f);
        let (t, _) = self.time(&s);
        match index {
            0 | 2 | 4 | 6..=9 | CENTURY => {
                let set = s.reg(REG_B) & B_SET != 0;
                if !set {
                    s.show(t);
                }
                s.set_reg(index, value);
                if !set {
                    self.adopt(&mut s, t);
                }
            }
            REG_A => s.set_reg(REG_A, value & 0x7f),
            REG_B => {
                let was_set = s.reg(REG_B) & B_SET != 0;
                let set = value & B_SET != 0;
                if set && !was_set {
                    s.show(t);
                }
                // Setting stops updates and with them their interrupt.
                let value = if set { value & !UPDATE } else { value };
                let adopted = (was_set && !set).then(|| s.shown());
                s.set_reg(REG_B, value);
                if let Some(shown) = adopted {
                    s.offset = s.offset.saturating_add(shown - t);
                    s.noticed = shown;
                }
            }
            REG_C | REG_D => return,
            _ => s.set_reg(index, value),
        }
        self.update(&mut s);
    }

    /// Takes the time in the registers for the present.
    fn adopt(&self, s: &mut State, t: i64) {
        let shown = s.shown();
        s.offset = s.offset.saturating_add(shown - t);
        s.noticed = shown;
    }
}

fn wall(config: &CmosConfig) -> u64 {
    config.wall.unwrap_or(holdfast_clock::host_realtime)()
}

/// CMOS contents that PC firmware reads.
fn power_on(config: &CmosConfig) -> Vec<u8> {
    let mut cmos = vec![0; 128];
    let below = config.ram_below_4g;
    let above_16m = below.saturating_sub(16 << 20) / (64 << 10);
    let kib_above_1m = (below.saturating_sub(1 << 20) / 1024).min(0xfc00);
    let above_4g = config.ram_above_4g / (64 << 10);
    let mut put = |at: usize, value: u64, len: usize| {
        for (i, byte) in value.to_le_bytes().iter().take(len).enumerate() {
            if let Some(slot) = cmos.get_mut(at + i) {
                *slot = *byte;
            }
        }
    };
    put(REG_A, 0x26, 1);
    put(REG_B, B_24H.into(), 1);
    // Equipment: an FPU and a PS/2 mouse, no floppies, no display type.
    put(0x14, 0x06, 1);
    put(0x15, 640, 2);
    put(0x17, kib_above_1m, 2);
    put(0x30, kib_above_1m, 2);
    put(0x34, above_16m.min(0xffff), 2);
    put(0x5b, above_4g.min(0xff_ffff), 3);
    put(0x5f, u64::from(config.boot_vcpus.saturating_sub(1).min(0xff)), 1);
    // Boot sequence: disk, then CD, then network.
    put(0x38, 0x40, 1);
    put(0x3d, 0x32, 1);
    let sum: u16 = cmos.iter().skip(0x10).take(0x1e).map(|b| u16::from(*b)).sum();
    if let Some(slot) = cmos.get_mut(0x2e..0x30) {
        slot.copy_from_slice(&sum.to_be_bytes());
    }
    cmos
}

impl BusDevice for Rtc {
    fn read(&self, access: Access, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = match access.address.wrapping_add(i as u64) {
                port @ (0x70 | 0x71) => self.read_byte(port),
                _ => 0xff,
            };
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            if let port @ (0x70 | 0x71) = access.address.wrapping_add(i as u64) {
                self.write_byte(port, *byte);
            }
        }
    }
}

impl Device for Rtc {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {
        // The RESET pin disables interrupts; time and RAM are on the battery.
        let mut s = self.state.lock();
        let enables = s.reg(REG_B) & !(INTERRUPTS | 0x08);
        s.set_reg(REG_B, enables);
        s.set_reg(REG_C, 0);
        s.index = 0;
        self.update(&mut s);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(KIND, 1, &*self.state.lock())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let new: State = state.parse(KIND, 1)?;
        let limit = 1 << 40;
        if new.cmos.len() != 128 || new.offset.abs() > limit || new.noticed.abs() > limit {
            return Err(StateError::Invalid {
                kind: KIND,
                reason: "CMOS is not 128 bytes or its time is absurd".into(),
            });
        }
        let mut s = self.state.lock();
        *s = new;
        self.update(&mut s);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::super::testing::{Pins, context, hostile, inb, outb};
    use super::*;
    use holdfast_device::Bus;

    thread_local!(static WALL: Cell<u64> = const { Cell::new(0) });
    // 2026-11-21 12:28:33 UTC.
    const THEN: u64 = 1_795_264_113 * SECOND;

    fn rtc() -> (Arc<Rtc>, BuildContext, Arc<Pins>) {
        let (context, _) = context();
        let pins = Arc::new(Pins::default());
        WALL.set(THEN);
        let config = CmosConfig {
            irq: pins.line(8),
            ram_below_4g: 512 << 20,
            ram_above_4g: 1 << 30,
            boot_vcpus: 2,
            wall: Some(|| WALL.get()),
        };
        (Rtc::build(config, &context).expect("build"), context, pins)
    }

    fn get(bus: &Bus, reg: u8) -> u8 {
        outb(bus, 0x70, reg);
        inb(bus, 0x71)
    }

    fn set(bus: &Bus, reg: u8, value: u8) {
        outb(bus, 0x70, reg);
        outb(bus, 0x71, value);
    }

    #[test]
    fn tells_the_time_in_every_format() {
        let (_, c, _) = rtc();
        let b = &c.pio;
        let regs = [0, 2, 4, 6, 7, 8, 9, 0x32].map(|r| get(b, r));
        assert_eq!(regs, [0x33, 0x28, 0x12, 0x07, 0x21, 0x11, 0x26, 0x20]);
        set(b, 0x0b, 0x06);
        assert_eq!([0, 2, 4].map(|r| get(b, r)), [33, 28, 12]);
        set(b, 0x0b, 0x00);
        assert_eq!(get(b, 4), 0x92, "noon is 12 PM");
        WALL.set(THEN + 12 * 3600 * SECOND);
        assert_eq!(get(b, 4), 0x12, "midnight is 12 AM");
        assert_eq!(get(b, 0x0d), 0x80);
    }

    #[test]
    fn dates_round_trip() {
        for days in (-200_000..300_000).step_by(37) {
            let (y, m, d) = date_from_days(days);
            assert_eq!(days_from_date(y, m, d), days);
        }
        assert_eq!(date_from_days(0), (1970, 1, 1));
        assert_eq!(date_from_days(19_782), (2024, 2, 29));
    }

    #[test]
    fn the_guest_sets_the_clock() {
        let (_, c, _) = rtc();
        let b = &c.pio;
        set(b, 0x0b, 0x82);
        for (reg, value) in [(0, 0x05), (2, 0x04), (4, 0x03), (7, 0x02), (8, 0x01), (9, 0x99), (0x32, 0x19)] {
            set(b, reg, value);
        }
        WALL.set(THEN + 60 * SECOND);
        assert_eq!(get(b, 0), 0x05, "stands while it is set");
        set(b, 0x0b, 0x02);
        WALL.set(THEN + 61 * SECOND);
        assert_eq!([0, 2, 4, 7, 8, 9, 0x32].map(|r| get(b, r)), [6, 4, 3, 2, 1, 0x99, 0x19]);
        set(b, 9, 0x98);
        assert_eq!([0, 9].map(|r| get(b, r)), [6, 0x98]);
    }

    #[test]
    fn updates_alarms_and_periods_interrupt_until_register_c_is_read() {
        let (rtc, c, pins) = rtc();
        let b = &c.pio;
        assert_eq!(get(b, 0x0c) & 0x30, 0);
        set(b, 1, 0x35);
        set(b, 3, 0xff);
        set(b, 5, 0xff);
        set(b, 0x0b, 0x32);
        pins.take();
        WALL.set(THEN + SECOND);
        rtc.update(&mut rtc.state.lock());
        assert_eq!(pins.take(), [(8, true)]);
        assert_eq!(get(b, 0x0c), 0x90);
        assert_eq!(get(b, 0x0c), 0);
        WALL.set(THEN + 2 * SECOND);
        assert_eq!(get(b, 0x0c), 0xb0, "the alarm at second 35");
        set(b, 0x0b, 0x42);
        set(b, 0x0a, 0x26);
        c.clock.set(976_562);
        assert_eq!(get(b, 0x0c), 0);
        pins.take();
        c.clock.set(976_563);
        rtc.update(&mut rtc.state.lock());
        assert!(pins.take().contains(&(8, true)));
        assert_eq!(get(b, 0x0c), 0xc0, "1024 Hz");
        assert_eq!(rtc.alarm.deadline(), Some(1_953_125));
    }

    #[test]
    fn the_update_is_announced() {
        let (_, c, _) = rtc();
        assert_eq!(get(&c.pio, 0x0a), 0x26);
        WALL.set(THEN + SECOND - 1000);
        assert_eq!(get(&c.pio, 0x0a), 0xa6);
    }

    #[test]
    fn memory_sizes_are_where_firmware_looks() {
        let (_, c, _) = rtc();
        let word = |r| u16::from(get(&c.pio, r)) | u16::from(get(&c.pio, r + 1)) << 8;
        assert_eq!(word(0x34), ((512 - 16) << 20 >> 16) as u16);
        assert_eq!(word(0x5b), (1u64 << 30 >> 16) as u16);
        assert_eq!(get(&c.pio, 0x5f), 1);
        assert_eq!(word(0x15), 640);
    }

    #[test]
    fn state_survives_and_nonsense_is_refused() {
        let (rtc, c, _) = rtc();
        set(&c.pio, 0x50, 0x77);
        set(&c.pio, 9, 0x30);
        let state = rtc.save().expect("saves");
        let (other, c2, _) = self::rtc();
        other.restore(&state).expect("restores");
        assert_eq!([0x50, 9].map(|r| get(&c2.pio, r)), [0x77, 0x30]);
        other.reset();
        assert_eq!(get(&c2.pio, 0x50), 0x77, "the battery lasts");
        let mut bad = state;
        bad.data["cmos"] = serde_json::json!([1, 2]);
        assert!(other.restore(&bad).is_err());
    }

    #[test]
    fn survives_hostile_accesses() {
        let (rtc, c, _) = rtc();
        for reg in 0..=255 {
            for value in [0, 0x7f, 0x80, 0xff] {
                set(&c.pio, reg, value);
                get(&c.pio, reg);
            }
        }
        hostile(&*rtc, BASE, 2);
    }
}
