//! ACPI power management of the ICH9: PM1a, GPE0, the PM timer, SMI enables, and the APM ports
//! (ICH9 data sheet sections 13.8.3 and 13.7.4; ACPI 6.5 chapter 4).
//!
//! There is no system management mode. As hardware without it would have it, the SMI command port
//! switches ACPI mode on and off by itself, and `SMI_EN` comes up with APM SMIs already enabled so
//! that firmware does not install a handler.

use std::fmt;
use std::sync::Arc;

use holdfast_clock::{Timer, VmClock};
use holdfast_device::{
    Access, BuildContext, BuildError, Bus, BusDevice, Device, DeviceState, IrqLine, StateError, SystemEvent,
    SystemSink,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{attach, nanoseconds, read_reg, ticks, write_reg};

/// Where firmware and tables put the block.
pub const PM_BASE: u16 = 0x600;

const KIND: &str = "acpi-pm";
const LEN: u64 = 0x80;
const APM: u64 = 0xb2;
/// PM timer input in Hz.
const HZ: u64 = 3_579_545;

const TIMER: u16 = 1 << 0;
const GLOBAL: u16 = 1 << 5;
const POWER_BUTTON: u16 = 1 << 8;
const RTC: u16 = 1 << 10;
const WAKE: u16 = 1 << 15;
const STATUS_BITS: u16 = TIMER | 1 << 4 | GLOBAL | POWER_BUTTON | 1 << 9 | RTC | WAKE;
const ENABLE_BITS: u16 = TIMER | GLOBAL | POWER_BUTTON | 1 << 9 | RTC;

const SCI_EN: u16 = 1;
const SLP_EN: u16 = 1 << 13;
const CONTROL_BITS: u16 = 0x1c03;

/// `APMC_EN`: writes to port 0xb2 cause an SMI.
const SMI_APM: u32 = 1 << 5;

/// `SLP_TYP` values that the machine knows, as its DSDT tells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SleepTypes {
    /// Soft off. PC firmware relies on 0.
    pub s5: u8,
}

/// What the block is wired to.
#[derive(Debug)]
pub struct AcpiPmConfig {
    /// The system control interrupt, 9.
    pub sci: IrqLine,
    /// Sleep types.
    pub sleep: SleepTypes,
    /// Written to the SMI command port: ACPI mode on.
    pub acpi_enable: u8,
    /// Written to the SMI command port: ACPI mode off.
    pub acpi_disable: u8,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct State {
    /// I/O base; 0: not decoded.
    base: u16,
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u64,
    gpe_enable: u64,
    smi_enable: u32,
    apm: [u8; 2],
    /// Half turns of the PM timer that have been noticed.
    turns: u64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            base: 0,
            status: 0,
            enable: 0,
            control: 0,
            gpe_status: 0,
            gpe_enable: 0,
            smi_enable: SMI_APM,
            apm: [0; 2],
            turns: 0,
        }
    }
}

/// Half turns of the 24-bit timer: its top bit changes with each.
fn half_turns(now: u64) -> u64 {
    ticks(now, HZ) >> 23
}

/// The power management block.
pub struct AcpiPm {
    config: AcpiPmConfig,
    clock: Arc<VmClock>,
    system: Arc<dyn SystemSink>,
    pio: Arc<Bus>,
    alarm: Timer,
    this: std::sync::Weak<Self>,
    state: Mutex<State>,
}

impl fmt::Debug for AcpiPm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AcpiPm").field("state", &*self.state.lock()).finish_non_exhaustive()
    }
}

impl AcpiPm {
    /// Builds the block, not decoded yet, and the APM ports 0xb2 and 0xb3.
    ///
    /// # Errors
    /// [`BuildError::Bus`] if a port is taken.
    pub fn build(config: AcpiPmConfig, context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        let pm = Arc::new_cyclic(|weak: &std::sync::Weak<Self>| {
            let this = weak.clone();
            let alarm = context.timers.timer(move || {
                if let Some(pm) = this.upgrade() {
                    pm.update(&mut pm.state.lock());
                }
            });
            Self {
                config,
                clock: Arc::clone(&context.clock),
                system: Arc::clone(&context.system),
                pio: Arc::clone(&context.pio),
                alarm,
                this: weak.clone(),
                state: Mutex::default(),
            }
        });
        attach(&context.pio, KIND, APM, 2, Arc::clone(&pm) as Arc<dyn BusDevice>)?;
        Ok(pm)
    }

    /// Decodes the block at I/O address `base` from now on, or nowhere. A base that collides with
    /// other ports is not decoded.
    pub fn set_base(&self, base: Option<u16>) {
        let mut s = self.state.lock();
        self.move_to(&mut s, base.map_or(0, |b| b & 0xff80));
    }

    fn move_to(&self, s: &mut State, base: u16) {
        if base == s.base {
            return;
        }
        if s.base != 0
            && let Err(error) = self.pio.detach(s.base.into())
        {
            tracing::error!(%error, "ACPI PM block was not attached");
        }
        s.base = 0;
        if base == 0 {
            return;
        }
        let Some(this) = self.this.upgrade() else { return };
        match self.pio.attach(base.into(), LEN, KIND, this) {
            Ok(()) => s.base = base,
            Err(error) => tracing::warn!(%error, "guest moves the ACPI PM block into the way"),
        }
    }

    /// The user presses the power button.
    pub fn press_power_button(&self) {
        let mut s = self.state.lock();
        s.status |= POWER_BUTTON;
        self.update(&mut s);
    }

    /// Raises general-purpose event `n` (0 to 63), for hot-plug and the like.
    pub fn raise_gpe(&self, n: u32) {
        let mut s = self.state.lock();
        s.gpe_status |= 1u64.checked_shl(n).unwrap_or(0);
        self.update(&mut s);
    }

    /// Notices turns of the timer, drives the SCI, and sets the alarm of the next turn.
    fn update(&self, s: &mut State) {
        let now = self.clock.now();
        let turns = half_turns(now);
        if turns != s.turns {
            s.turns = turns;
            s.status |= TIMER;
        }
        let events = s.status & s.enable & ENABLE_BITS != 0 || s.gpe_status & s.gpe_enable != 0;
        self.config.sci.set(s.control & SCI_EN != 0 && events);
        if s.enable & TIMER != 0 && s.status & TIMER == 0 {
            self.alarm.arm(nanoseconds((turns + 1) << 23, HZ));
        } else {
            self.alarm.disarm();
        }
    }

    fn write_control(&self, s: &mut State, value: u16) {
        // SCI_EN belongs to the SMI command port as long as that exists.
        s.control = value & CONTROL_BITS & !SCI_EN | s.control & SCI_EN;
        if value & SLP_EN == 0 {
            return;
        }
        let kind = (value >> 10 & 7) as u8;
        if kind == self.config.sleep.s5 {
            self.system.request(SystemEvent::Shutdown);
        } else {
            tracing::warn!(kind, "guest asks for a sleep state that this machine does not have");
        }
    }

    fn write_apm(&self, s: &mut State, port: u64, value: u8) {
        if let Some(slot) = s.apm.get_mut(usize::from(port != APM)) {
            *slot = value;
        }
        if port == APM {
            if value == self.config.acpi_enable {
                s.control |= SCI_EN;
            } else if value == self.config.acpi_disable {
                s.control &= !SCI_EN;
            }
        }
    }

    fn write_block(&self, s: &mut State, offset: u64, data: &[u8]) {
        let merge = |old: u64, base: u64| write_reg(old, offset - base, data);
        match offset {
            0x00..0x04 => {
                let merged = merge(u64::from(s.enable) << 16, 0) as u32;
                s.status &= !(merged as u16);
                s.enable = (merged >> 16) as u16 & ENABLE_BITS;
            }
            0x04..0x08 => {
                let value = merge(s.control.into(), 4) as u16;
                self.write_control(s, value);
            }
            0x20..0x28 => s.gpe_status &= !merge(0, 0x20),
            0x28..0x30 => s.gpe_enable = merge(s.gpe_enable, 0x28),
            // The APM enable stays: there is nothing behind it that could be switched off.
            0x30..0x34 => s.smi_enable = merge(s.smi_enable.into(), 0x30) as u32 | SMI_APM,
            _ => {}
        }
    }
}

impl BusDevice for AcpiPm {
    fn read(&self, access: Access, data: &mut [u8]) {
        let mut s = self.state.lock();
        self.update(&mut s);
        if access.address.wrapping_sub(access.offset) == APM {
            let [command, status] = s.apm;
            read_reg(u64::from(command) | u64::from(status) << 8, access.offset, data);
            return;
        }
        let (value, base) = match access.offset {
            0x00..0x04 => (u64::from(s.status) | u64::from(s.enable) << 16, 0x00),
            0x04..0x08 => (u64::from(s.control), 0x04),
            0x08..0x0c => (ticks(self.clock.now(), HZ) & 0xff_ffff, 0x08),
            0x20..0x28 => (s.gpe_status, 0x20),
            0x28..0x30 => (s.gpe_enable, 0x28),
            0x30..0x34 => (u64::from(s.smi_enable), 0x30),
            other => (0, other),
        };
        read_reg(value, access.offset - base, data);
    }

    fn write(&self, access: Access, data: &[u8]) {
        let mut s = self.state.lock();
        if access.address.wrapping_sub(access.offset) == APM {
            for (i, byte) in data.iter().enumerate() {
                self.write_apm(&mut s, access.address.wrapping_add(i as u64), *byte);
            }
        } else {
            self.write_block(&mut s, access.offset, data);
        }
        self.update(&mut s);
    }
}

impl Device for AcpiPm {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {
        let mut s = self.state.lock();
        let turns = half_turns(self.clock.now());
        // Where the block is decoded is the LPC bridge's to reset.
        *s = State { base: s.base, turns, ..State::default() };
        self.update(&mut s);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let mut s = self.state.lock();
        // Turns that nobody has looked at yet: the saved state says what a read would.
        self.update(&mut s);
        DeviceState::new(KIND, 1, &*s)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let new: State = state.parse(KIND, 1)?;
        let mut s = self.state.lock();
        self.move_to(&mut s, new.base & 0xff80);
        *s = State { base: s.base, status: new.status & STATUS_BITS, ..new };
        self.update(&mut s);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Pins, Requests, context, hostile, inb, outb};
    use super::*;

    struct Rig {
        pm: Arc<AcpiPm>,
        context: BuildContext,
        pins: Arc<Pins>,
        requests: Arc<Requests>,
    }

    fn rig() -> Rig {
        let (context, requests) = context();
        let pins = Arc::new(Pins::default());
        let config =
            AcpiPmConfig { sci: pins.line(9), sleep: SleepTypes { s5: 0 }, acpi_enable: 2, acpi_disable: 3 };
        let pm = AcpiPm::build(config, &context).expect("build");
        pm.set_base(Some(PM_BASE));
        Rig { pm, context, pins, requests }
    }

    fn inw(bus: &Bus, port: u64) -> u16 {
        let mut data = [0; 2];
        bus.read(Some(0), port, &mut data);
        u16::from_le_bytes(data)
    }

    fn outw(bus: &Bus, port: u64, value: u16) {
        bus.write(Some(0), port, &value.to_le_bytes());
    }

    #[test]
    fn acpi_mode_is_switched_by_the_command_port() {
        let r = rig();
        let bus = &r.context.pio;
        outw(bus, 0x604, 1);
        assert_eq!(inw(bus, 0x604) & 1, 0);
        outb(bus, 0xb2, 2);
        assert_eq!(inw(bus, 0x604) & 1, 1);
        outb(bus, 0xb3, 0x77);
        assert_eq!((inb(bus, 0xb2), inb(bus, 0xb3)), (2, 0x77));
        outb(bus, 0xb2, 3);
        assert_eq!(inw(bus, 0x604) & 1, 0);
    }

    #[test]
    fn the_power_button_raises_the_sci_until_its_status_is_cleared() {
        let r = rig();
        let bus = &r.context.pio;
        outb(bus, 0xb2, 2);
        outw(bus, 0x602, POWER_BUTTON);
        r.pins.take();
        r.pm.press_power_button();
        assert_eq!(r.pins.take(), [(9, true)]);
        assert_eq!(inw(bus, 0x600), POWER_BUTTON);
        outw(bus, 0x600, POWER_BUTTON);
        assert_eq!(r.pins.take().last(), Some(&(9, false)));
        assert_eq!(inw(bus, 0x602), POWER_BUTTON, "writing the status leaves the enables");
    }

    #[test]
    fn soft_off_powers_off_and_unknown_types_do_not() {
        let r = rig();
        outw(&r.context.pio, 0x604, SLP_EN | 1 << 10);
        assert!(r.requests.take().is_empty());
        outw(&r.context.pio, 0x604, SLP_EN);
        assert_eq!(r.requests.take(), [SystemEvent::Shutdown]);
        assert_eq!(inw(&r.context.pio, 0x604) & SLP_EN, 0);
    }

    #[test]
    fn the_timer_counts_and_its_turns_are_noticed() {
        let r = rig();
        let bus = &r.context.pio;
        r.context.clock.set(1_000_000_000);
        let mut data = [0; 4];
        bus.read(Some(0), 0x608, &mut data);
        assert_eq!(u32::from_le_bytes(data), 3_579_545);
        outb(bus, 0xb2, 2);
        outw(bus, 0x600, TIMER);
        outw(bus, 0x602, TIMER);
        let at = nanoseconds(1 << 23, HZ);
        assert_eq!(r.pm.alarm.deadline(), Some(at));
        r.context.clock.set(at);
        r.pins.take();
        r.pm.update(&mut r.pm.state.lock());
        assert_eq!(r.pins.take(), [(9, true)]);
        bus.read(Some(0), 0x608, &mut data);
        assert_eq!(u32::from_le_bytes(data), 1 << 23);
    }

    #[test]
    fn general_purpose_events() {
        let r = rig();
        let bus = &r.context.pio;
        outb(bus, 0xb2, 2);
        outb(bus, 0x628, 4);
        r.pm.raise_gpe(2);
        assert_eq!(r.pins.take().last(), Some(&(9, true)));
        assert_eq!(inb(bus, 0x620), 4);
        outb(bus, 0x620, 4);
        assert_eq!(r.pins.take().last(), Some(&(9, false)));
        r.pm.raise_gpe(64);
    }

    #[test]
    fn the_block_moves_but_not_onto_others() {
        let r = rig();
        let bus = &r.context.pio;
        r.pm.set_base(Some(0xb080));
        assert_eq!(inb(bus, 0x630), 0xff);
        assert_eq!(inb(bus, 0xb0b0), 0x20);
        r.pm.set_base(Some(0x0080));
        assert_eq!(inb(bus, 0xb0b0), 0xff, "collides with the APM ports: decoded nowhere");
        r.pm.set_base(None);
        r.pm.set_base(Some(PM_BASE));
        assert_eq!(inb(bus, 0x630), 0x20);
    }

    #[test]
    fn state_survives() {
        let r = rig();
        let bus = &r.context.pio;
        outb(bus, 0xb2, 2);
        outw(bus, 0x602, POWER_BUTTON);
        r.pm.press_power_button();
        let state = r.pm.save().expect("saves");
        let other = rig();
        other.pm.set_base(None);
        other.pm.restore(&state).expect("restores");
        assert_eq!(other.pm.save().expect("saves"), state);
        assert_eq!(other.pins.take().last(), Some(&(9, true)));
        other.pm.reset();
        assert_eq!(other.pins.take().last(), Some(&(9, false)));
    }

    #[test]
    fn survives_hostile_accesses() {
        let r = rig();
        hostile(&*r.pm, 0x600, LEN);
        hostile(&*r.pm, APM, 2);
    }
}
