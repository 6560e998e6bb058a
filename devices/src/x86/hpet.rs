//! The high precision event timer: IA-PC HPET specification 1.0a.
//!
//! Three comparators, the first periodic-capable like the others, legacy replacement, no message
//! (FSB) delivery. The main counter runs at 100 MHz.

use std::fmt;
use std::sync::Arc;

use holdfast_clock::{Timer, VmClock};
use holdfast_device::{
    Access, BuildContext, BuildError, BusDevice, Device, DeviceState, IrqLine, StateError,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{Gsi, LegacyGate, attach, nanoseconds, read_reg, ticks, write_reg};

/// Where the HPET of a PC is.
pub const HPET_BASE: u64 = 0xfed0_0000;
/// Length of its window in bytes.
pub const HPET_LEN: u64 = 0x400;

const KIND: &str = "hpet";
const TIMERS: usize = 3;
const HZ: u64 = 100_000_000;
/// Period in femtoseconds; Intel; three timers; 64 bits; legacy replacement; revision 1.
const CAPABILITIES: u64 =
    (1_000_000_000_000_000 / HZ) << 32 | 0x8086_0000 | 0xa000 | (TIMERS as u64 - 1) << 8 | 1;
/// IOAPIC inputs to which every timer can be routed: 2, 8 and 16 to 23.
const ROUTES: u64 = 0x00ff_0104;

const ENABLE: u64 = 1 << 0;
const LEGACY: u64 = 1 << 1;

const T_LEVEL: u64 = 1 << 1;
const T_ENABLE: u64 = 1 << 2;
const T_PERIODIC: u64 = 1 << 3;
const T_VALUE_SET: u64 = 1 << 6;
const T_32BIT: u64 = 1 << 8;
const T_WRITABLE: u64 = T_LEVEL | T_ENABLE | T_PERIODIC | T_VALUE_SET | T_32BIT | 0x1f << 9;
/// Periodic capable, 64 bits wide, and the routes.
const T_CAPABILITIES: u64 = 1 << 4 | 1 << 5 | ROUTES << 32;

/// What the HPET is wired to.
#[derive(Debug)]
pub struct HpetConfig {
    /// The interrupt lines.
    pub gsi: Arc<Gsi>,
    /// What it silences in legacy replacement mode.
    pub gate: Arc<LegacyGate>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Comparator {
    config: u64,
    value: u64,
    period: u64,
    /// Virtual time of the next match.
    due: Option<u64>,
}

impl Default for Comparator {
    fn default() -> Self {
        Self { config: T_CAPABILITIES, value: u64::MAX, period: u64::MAX, due: None }
    }
}

impl Comparator {
    fn mask(&self) -> u64 {
        if self.config & T_32BIT != 0 { 0xffff_ffff } else { u64::MAX }
    }

    /// Sets [`Comparator::due`] given the main counter's value `now_ns`.
    fn schedule(&mut self, counter: u64, now_ns: u64, just_fired: bool) {
        let mask = self.mask();
        let mut left = self.value.wrapping_sub(counter) & mask;
        if left == 0 && just_fired {
            left = mask;
        }
        self.due = now_ns.checked_add(nanoseconds(left, HZ));
    }

    /// Whether a match raises no interrupt and sets no status: only a later look at the comparator shows that there was one.
    fn is_silent(&self) -> bool {
        self.config & (T_ENABLE | T_LEVEL) == 0
    }

    /// Moves a periodic comparator past `counter`.
    fn advance(&mut self, counter: u64) {
        let mask = self.mask();
        let period = self.period & mask;
        if self.config & T_PERIODIC == 0 || period == 0 {
            return;
        }
        let behind = counter.wrapping_sub(self.value) & mask;
        let steps = behind / period + 1;
        self.value = self.value.wrapping_add(steps.wrapping_mul(period)) & mask;
    }
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    config: u64,
    status: u64,
    /// The main counter when it last stopped or was set.
    counter: u64,
    /// Virtual time since when it runs from there.
    since: u64,
    timers: [Comparator; TIMERS],
}

impl State {
    fn counter(&self, now: u64) -> u64 {
        if self.config & ENABLE == 0 {
            return self.counter;
        }
        self.counter.wrapping_add(ticks(now.saturating_sub(self.since), HZ))
    }

    /// Does what the matches of silent timers up to `now` did; there is no alarm for those. Firmware and Linux leave such
    /// a timer behind that beats for as long as the machine runs.
    fn catch_up(&mut self, now: u64) {
        let counter = self.counter(now);
        for timer in self.timers.iter_mut().filter(|t| t.is_silent() && t.due.is_some_and(|at| at <= now)) {
            timer.advance(counter);
            timer.schedule(counter, now, true);
        }
    }
}

/// The HPET.
pub struct Hpet {
    config: HpetConfig,
    clock: Arc<VmClock>,
    alarms: [Timer; TIMERS],
    state: Mutex<State>,
}

impl fmt::Debug for Hpet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hpet").field("state", &*self.state.lock()).finish_non_exhaustive()
    }
}

impl Hpet {
    /// Builds the HPET at [`HPET_BASE`].
    ///
    /// # Errors
    /// [`BuildError::Bus`] if the window is taken.
    pub fn build(config: HpetConfig, context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        let hpet = Arc::new_cyclic(|weak: &std::sync::Weak<Self>| {
            let alarm = |n: usize| {
                let weak = weak.clone();
                context.timers.timer(move || {
                    if let Some(hpet) = weak.upgrade() {
                        hpet.expired(n);
                    }
                })
            };
            let alarms = [alarm(0), alarm(1), alarm(2)];
            Self { config, clock: Arc::clone(&context.clock), alarms, state: Mutex::default() }
        });
        attach(&context.mmio, KIND, HPET_BASE, HPET_LEN, Arc::clone(&hpet) as Arc<dyn BusDevice>)?;
        Ok(hpet)
    }

    /// Where timer `n` interrupts; `None` if nowhere.
    fn line(&self, s: &State, n: usize) -> Option<IrqLine> {
        let route = match (n, s.config & LEGACY != 0) {
            (0, true) => 0,
            (1, true) => 8,
            _ => {
                let route = s.timers.get(n)?.config >> 9 & 0x1f;
                if ROUTES & 1 << route == 0 {
                    return None;
                }
                route
            }
        };
        Some(self.config.gsi.line(route as u32))
    }

    fn expired(&self, n: usize) {
        let mut s = self.state.lock();
        let now = self.clock.now();
        let counter = s.counter(now);
        let Some(timer) = s.timers.get_mut(n) else { return };
        if timer.due.is_none_or(|at| at > now) {
            return;
        }
        timer.advance(counter);
        timer.schedule(counter, now, true);
        let config = timer.config;
        if config & T_LEVEL != 0 {
            s.status |= 1 << n;
        }
        if config & T_ENABLE != 0
            && let Some(line) = self.line(&s, n)
        {
            if config & T_LEVEL != 0 { line.set(true) } else { line.pulse() }
        }
        self.arm(&s, n);
    }

    fn arm(&self, s: &State, n: usize) {
        let (Some(alarm), Some(timer)) = (self.alarms.get(n), s.timers.get(n)) else { return };
        match timer.due.filter(|_| !timer.is_silent()) {
            Some(at) => alarm.arm(at),
            None => alarm.disarm(),
        }
    }

    /// Starts or stops timer `n` as the general configuration says.
    fn reschedule(&self, s: &mut State, n: usize, now: u64) {
        let running = s.config & ENABLE != 0;
        let counter = s.counter(now);
        let Some(timer) = s.timers.get_mut(n) else { return };
        if running {
            timer.schedule(counter, now, false);
        } else {
            timer.due = None;
        }
        self.arm(s, n);
    }

    fn write_config(&self, s: &mut State, value: u64, now: u64) {
        let old = s.config;
        let new = value & (ENABLE | LEGACY);
        if (old ^ new) & LEGACY != 0 {
            // Lines that follow the old wiring must not stay up.
            (0..TIMERS).filter_map(|n| self.line(s, n)).for_each(|line| line.set(false));
            self.config.gate.replace(new & LEGACY != 0);
        }
        if (old ^ new) & ENABLE != 0 {
            s.counter = s.counter(now);
            s.since = now;
        }
        s.config = new;
        for n in 0..TIMERS {
            self.reschedule(s, n, now);
            self.drive_level(s, n);
        }
    }

    /// Holds a level-triggered line as the status says.
    fn drive_level(&self, s: &State, n: usize) {
        let Some(timer) = s.timers.get(n) else { return };
        if timer.config & T_LEVEL == 0 {
            return;
        }
        if let Some(line) = self.line(s, n) {
            let on = s.config & ENABLE != 0 && timer.config & T_ENABLE != 0 && s.status & 1 << n != 0;
            line.set(on);
        }
    }

    fn write_timer(&self, s: &mut State, n: usize, reg: u64, shift: u64, data: &[u8]) {
        let now = self.clock.now();
        if reg == 0
            && let Some(line) = self.line(s, n).filter(|_| s.status & 1 << n != 0)
        {
            line.set(false);
        }
        let Some(timer) = s.timers.get_mut(n) else { return };
        match reg {
            0 => {
                let value = write_reg(timer.config, shift, data);
                timer.config = timer.config & !T_WRITABLE | value & T_WRITABLE;
                if timer.config & T_LEVEL == 0 {
                    s.status &= !(1 << n);
                }
                let mask = timer.mask();
                timer.value &= mask;
                timer.period &= mask;
                self.drive_level(s, n);
            }
            8 => {
                let periodic = timer.config & T_PERIODIC != 0;
                let mask = timer.mask();
                if !periodic || timer.config & T_VALUE_SET != 0 {
                    timer.value = write_reg(timer.value, shift, data) & mask;
                }
                if periodic {
                    timer.period = write_reg(timer.period, shift, data) & mask;
                }
                timer.config &= !T_VALUE_SET;
            }
            _ => return,
        }
        self.reschedule(s, n, now);
    }
}

impl BusDevice for Hpet {
    fn read(&self, access: Access, data: &mut [u8]) {
        let mut s = self.state.lock();
        s.catch_up(self.clock.now());
        let value = match access.offset & !7 {
            0x00 => CAPABILITIES,
            0x10 => s.config,
            0x20 => s.status,
            0xf0 => s.counter(self.clock.now()),
            at @ 0x100..0x160 => {
                let timer = s.timers.get((at - 0x100) as usize / 0x20);
                match (timer, at & 0x18) {
                    (Some(t), 0x00) => t.config,
                    (Some(t), 0x08) => t.value,
                    _ => 0,
                }
            }
            _ => 0,
        };
        read_reg(value, access.offset & 7, data);
    }

    fn write(&self, access: Access, data: &[u8]) {
        let mut s = self.state.lock();
        let now = self.clock.now();
        s.catch_up(now);
        let shift = access.offset & 7;
        match access.offset & !7 {
            0x10 => {
                let value = write_reg(s.config, shift, data);
                self.write_config(&mut s, value, now);
            }
            0x20 => {
                let cleared = write_reg(0, shift, data);
                s.status &= !cleared;
                (0..TIMERS).filter(|n| cleared & 1 << n != 0).for_each(|n| self.drive_level(&s, n));
            }
            // The counter can be set only while it is halted (section 2.3.7).
            0xf0 if s.config & ENABLE == 0 => s.counter = write_reg(s.counter, shift, data),
            at @ 0x100..0x160 => {
                let n = (at - 0x100) as usize / 0x20;
                self.write_timer(&mut s, n, at & 0x18, shift, data);
            }
            _ => {}
        }
    }
}

impl Device for Hpet {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {
        let mut s = self.state.lock();
        (0..TIMERS).filter_map(|n| self.line(&s, n)).for_each(|line| line.set(false));
        self.config.gate.replace(false);
        self.alarms.iter().for_each(Timer::disarm);
        *s = State::default();
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let mut s = self.state.lock();
        s.catch_up(self.clock.now());
        DeviceState::new(KIND, 1, &*s)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let new: State = state.parse(KIND, 1)?;
        let mut s = self.state.lock();
        *s = new;
        for timer in &mut s.timers {
            timer.config = timer.config & T_WRITABLE | T_CAPABILITIES;
        }
        s.config &= ENABLE | LEGACY;
        self.config.gate.replace(s.config & LEGACY != 0);
        for n in 0..TIMERS {
            self.arm(&s, n);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Pins, context, hostile, readl, writel};
    use super::super::{Gsi, IrqTarget};
    use super::*;
    use holdfast_device::IrqSink;

    fn hpet() -> (Arc<Hpet>, BuildContext, Arc<Pins>) {
        let (context, _) = context();
        let pins = Arc::new(Pins::default());
        let gsi = Gsi::new(IrqTarget::Kernel(Arc::clone(&pins) as Arc<dyn IrqSink>));
        let gate = LegacyGate::new(gsi.line(0), gsi.line(8));
        let hpet = Hpet::build(HpetConfig { gsi, gate }, &context).expect("build");
        (hpet, context, pins)
    }

    #[test]
    fn identifies_itself_and_counts_while_enabled() {
        let (h, c, _) = hpet();
        assert_eq!((readl(&*h, 0), readl(&*h, 4)), (0x8086_a201, 10_000_000));
        c.clock.set(1000);
        assert_eq!(readl(&*h, 0xf0), 0);
        writel(&*h, 0xf4, 1);
        writel(&*h, 0x10, 1);
        c.clock.set(1500);
        assert_eq!((readl(&*h, 0xf0), readl(&*h, 0xf4)), (50, 1));
        writel(&*h, 0xf0, 7);
        assert_eq!(readl(&*h, 0xf0), 50, "cannot be set while it runs");
        writel(&*h, 0x10, 0);
        c.clock.set(9000);
        assert_eq!(readl(&*h, 0xf0), 50);
    }

    #[test]
    fn a_one_shot_edge_fires_once_on_its_route() {
        let (h, c, pins) = hpet();
        writel(&*h, 0x10, 1);
        writel(&*h, 0x120, 2 << 9 | 4);
        writel(&*h, 0x128, 100);
        writel(&*h, 0x12c, 0);
        c.clock.set(999);
        h.expired(1);
        assert!(pins.take().is_empty());
        c.clock.set(1000);
        h.expired(1);
        h.expired(1);
        assert_eq!(pins.take(), [(2, true), (2, false)]);
        writel(&*h, 0x120, 3 << 9 | 4);
        writel(&*h, 0x128, 200);
        c.clock.set(2000);
        h.expired(1);
        assert!(pins.take().is_empty(), "3 is no route");
    }

    #[test]
    fn a_timer_that_nobody_hears_needs_no_alarm_and_loses_no_beat() {
        let (h, c, pins) = hpet();
        writel(&*h, 0x10, 3);
        writel(&*h, 0x100, 0x14c);
        writel(&*h, 0x108, 100);
        writel(&*h, 0x108, 100);
        assert!(h.alarms[0].deadline().is_some());
        // Linux switches off the interrupt and leaves the timer be.
        writel(&*h, 0x100, 0x148);
        assert_eq!(h.alarms[0].deadline(), None);
        c.clock.set(5_500);
        assert_eq!((readl(&*h, 0x108), readl(&*h, 0xf0)), (600, 550));
        c.clock.set(7_500);
        let saved = h.save().expect("save");
        writel(&*h, 0x100, 0x14c);
        assert_eq!(h.alarms[0].deadline(), Some(8_000));
        assert!(pins.take().iter().all(|(_, high)| !high));
        let (other, c, pins) = hpet();
        c.clock.set(9_500);
        other.restore(&saved).expect("restore");
        assert_eq!((other.alarms[0].deadline(), readl(&*other, 0x108)), (None, 1_000));
        writel(&*other, 0x100, 0x14c);
        c.clock.set(10_000);
        pins.take();
        other.expired(0);
        assert_eq!(pins.take(), [(0, true), (0, false)]);
    }

    #[test]
    fn periodic_legacy_replacement_as_linux_programs_it() {
        let (h, c, pins) = hpet();
        writel(&*h, 0x10, 3);
        writel(&*h, 0x100, 0x14c);
        writel(&*h, 0x108, 1_000);
        writel(&*h, 0x108, 500);
        pins.take();
        for at in [10_000, 15_000, 20_000] {
            c.clock.set(at);
            h.expired(0);
            assert_eq!(pins.take(), [(0, true), (0, false)], "at {at}");
        }
        c.clock.set(47_000);
        h.expired(0);
        assert_eq!(pins.take().len(), 2);
        assert_eq!(readl(&*h, 0x108), 5_000, "periods missed are skipped");
        writel(&*h, 0x10, 0);
        c.clock.set(100_000);
        h.expired(0);
        assert!(pins.take().iter().all(|(_, level)| !level));
    }

    #[test]
    fn a_level_stays_until_its_status_is_cleared() {
        let (h, c, pins) = hpet();
        writel(&*h, 0x140, 20 << 9 | 6);
        writel(&*h, 0x148, 10);
        writel(&*h, 0x14c, 0);
        writel(&*h, 0x10, 1);
        c.clock.set(100);
        pins.take();
        h.expired(2);
        assert_eq!(pins.take(), [(20, true)]);
        assert_eq!(readl(&*h, 0x20), 4);
        writel(&*h, 0x20, 4);
        assert_eq!(pins.take(), [(20, false)]);
    }

    #[test]
    fn state_survives() {
        let (h, c, _) = hpet();
        c.clock.set(5000);
        writel(&*h, 0x10, 3);
        writel(&*h, 0x100, 0x104);
        writel(&*h, 0x108, 300);
        let state = h.save().expect("saves");
        let (other, c2, pins) = hpet();
        c2.clock.set(5000);
        other.restore(&state).expect("restores");
        assert_eq!(other.save().expect("saves"), state);
        c2.clock.set(8000);
        pins.take();
        other.expired(0);
        assert_eq!(pins.take(), [(0, true), (0, false)]);
        other.reset();
        assert_eq!(readl(&*other, 0x10), 0);
    }

    #[test]
    fn survives_hostile_accesses() {
        let (h, c, _) = hpet();
        for now in [0, u64::MAX / 3, u64::MAX] {
            c.clock.set(now);
            hostile(&*h, HPET_BASE, 0x168);
            (0..4).for_each(|n| h.expired(n));
        }
    }
}
