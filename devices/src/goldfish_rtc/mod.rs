//! The goldfish real-time clock (Android emulator hardware, "goldfish virtual hardware", timer section):
//! nanoseconds since 1970 and one alarm.

use std::sync::{Arc, Weak};

use holdfast_clock::{Timer, Timers, host_realtime};
use holdfast_device::{Access, BusDevice, Device, DeviceState, IrqLine, StateError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// Bytes of the register window.
pub const WINDOW: u64 = 0x1000;

mod reg {
    pub const TIME_LOW: u64 = 0x00;
    pub const TIME_HIGH: u64 = 0x04;
    pub const ALARM_LOW: u64 = 0x08;
    pub const ALARM_HIGH: u64 = 0x0c;
    pub const IRQ_ENABLED: u64 = 0x10;
    pub const CLEAR_ALARM: u64 = 0x14;
    pub const ALARM_STATUS: u64 = 0x18;
    pub const CLEAR_INTERRUPT: u64 = 0x1c;
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Regs {
    /// Added (wrapping) to the host's wall-clock time, after the guest has set the clock.
    offset: u64,
    /// The half that the last read of TIME_LOW has latched.
    time_high: u32,
    /// The half that the next write to TIME_LOW takes.
    set_high: u32,
    alarm: u64,
    /// The half that the next write to ALARM_LOW takes.
    alarm_high: u32,
    armed: bool,
    irq_enabled: bool,
    irq_pending: bool,
}

/// The clock. It shows the host's wall-clock time, also after a pause or a restore, plus what the guest
/// has set it off by.
#[derive(Debug)]
pub struct GoldfishRtc {
    irq: IrqLine,
    timers: Arc<Timers>,
    regs: Mutex<Regs>,
    alarm: Timer,
}

impl GoldfishRtc {
    /// A clock whose alarm drives `irq`.
    pub fn new(irq: IrqLine, timers: Arc<Timers>) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = weak.clone();
            let alarm = timers.timer(move || {
                if let Some(rtc) = weak.upgrade() {
                    rtc.update(&mut rtc.regs.lock());
                }
            });
            Self { irq, timers, regs: Mutex::default(), alarm }
        })
    }

    fn time(regs: &Regs) -> u64 {
        host_realtime().wrapping_add(regs.offset)
    }

    /// Fires the alarm if it is due, arms it if not, and drives the line.
    fn update(&self, regs: &mut Regs) {
        if regs.armed {
            let now = Self::time(regs);
            if regs.alarm <= now {
                regs.armed = false;
                regs.irq_pending = true;
            } else {
                self.alarm.arm(self.timers.clock().now().saturating_add(regs.alarm - now));
            }
        }
        if !regs.armed {
            self.alarm.disarm();
        }
        self.irq.set(regs.irq_pending && regs.irq_enabled);
    }

    fn read_word(regs: &mut Regs, offset: u64) -> u32 {
        match offset {
            reg::TIME_LOW => {
                let now = Self::time(regs);
                regs.time_high = (now >> 32) as u32;
                now as u32
            }
            reg::TIME_HIGH => regs.time_high,
            reg::ALARM_LOW => regs.alarm as u32,
            reg::ALARM_HIGH => (regs.alarm >> 32) as u32,
            reg::IRQ_ENABLED => u32::from(regs.irq_enabled),
            reg::ALARM_STATUS => u32::from(regs.armed),
            _ => 0,
        }
    }

    fn write_word(&self, regs: &mut Regs, offset: u64, value: u32) {
        match offset {
            reg::TIME_LOW => {
                let wanted = u64::from(regs.set_high) << 32 | u64::from(value);
                regs.offset = wanted.wrapping_sub(host_realtime());
            }
            reg::TIME_HIGH => regs.set_high = value,
            reg::ALARM_LOW => {
                regs.alarm = u64::from(regs.alarm_high) << 32 | u64::from(value);
                regs.armed = true;
            }
            reg::ALARM_HIGH => regs.alarm_high = value,
            reg::IRQ_ENABLED => regs.irq_enabled = value & 1 != 0,
            reg::CLEAR_ALARM => regs.armed = false,
            reg::CLEAR_INTERRUPT => regs.irq_pending = false,
            _ => {}
        }
        self.update(regs);
    }
}

impl BusDevice for GoldfishRtc {
    fn read(&self, access: Access, data: &mut [u8]) {
        data.fill(0);
        if data.len() == 4 {
            let word = Self::read_word(&mut self.regs.lock(), access.offset);
            data.copy_from_slice(&word.to_le_bytes());
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        if let &[a, b, c, d] = data {
            self.write_word(&mut self.regs.lock(), access.offset, u32::from_le_bytes([a, b, c, d]));
        }
    }
}

const KIND: &str = "goldfish-rtc";

impl Device for GoldfishRtc {
    fn id(&self) -> &str {
        "rtc"
    }

    fn reset(&self) {
        let mut regs = self.regs.lock();
        // A battery-backed clock keeps its time over a reset.
        *regs = Regs { offset: regs.offset, ..Regs::default() };
        self.update(&mut regs);
    }

    fn resume(&self) {
        // Wall-clock time has gone on during the pause: the alarm comes sooner now.
        self.update(&mut self.regs.lock());
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(KIND, 1, &*self.regs.lock())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: Regs = state.parse(KIND, 1)?;
        let mut regs = self.regs.lock();
        *regs = saved;
        self.update(&mut regs);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    use holdfast_clock::VmClock;
    use holdfast_device::IrqSink;
    use holdfast_threads::PlainSpawner;

    #[derive(Debug, Default)]
    struct Wire(AtomicBool);
    impl IrqSink for Wire {
        fn set_level(&self, _pin: u32, level: bool) {
            self.0.store(level, Ordering::SeqCst);
        }
    }

    struct Rig {
        rtc: Arc<GoldfishRtc>,
        wire: Arc<Wire>,
        timers: Arc<Timers>,
    }

    impl Rig {
        fn new() -> Self {
            let wire = Arc::new(Wire::default());
            let clock = VmClock::stopped_at(0);
            clock.resume();
            let timers = Timers::start(clock, &PlainSpawner).expect("thread");
            let irq = IrqLine::new(Arc::clone(&wire) as Arc<dyn IrqSink>, 0);
            Self { rtc: GoldfishRtc::new(irq, Arc::clone(&timers)), wire, timers }
        }
        fn read(&self, offset: u64) -> u64 {
            let mut b = [0; 4];
            self.rtc.read(Access { offset, address: offset, vcpu: Some(0) }, &mut b);
            u64::from(u32::from_le_bytes(b))
        }
        fn write(&self, offset: u64, value: u64) {
            self.rtc.write(Access { offset, address: offset, vcpu: Some(0) }, &(value as u32).to_le_bytes());
        }
        fn time(&self) -> u64 {
            self.read(reg::TIME_LOW) | self.read(reg::TIME_HIGH) << 32
        }
        fn set(&self, low: u64, high: u64, value: u64) {
            self.write(high, value >> 32);
            self.write(low, value);
        }
        fn fires(&self) -> bool {
            for _ in 0..2000 {
                if self.wire.0.load(Ordering::SeqCst) {
                    return true;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            false
        }
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            self.timers.stop();
        }
    }

    #[test]
    fn shows_wall_clock_time_and_can_be_set() {
        let r = Rig::new();
        let host = host_realtime();
        assert!(r.time() - host < 10_000_000_000);
        let wanted = 0x1234_5678_9abc_def0;
        r.set(reg::TIME_LOW, reg::TIME_HIGH, wanted);
        assert!(r.time() - wanted < 10_000_000_000);
        r.rtc.reset();
        assert!(r.time() - wanted < 20_000_000_000, "kept over a reset");
    }

    #[test]
    fn the_alarm_fires_once_and_only_while_enabled() {
        let r = Rig::new();
        r.set(reg::ALARM_LOW, reg::ALARM_HIGH, r.time() + 5_000_000);
        assert_eq!(r.read(reg::ALARM_STATUS), 1);
        r.write(reg::IRQ_ENABLED, 1);
        assert!(r.fires());
        assert_eq!(r.read(reg::ALARM_STATUS), 0);
        r.write(reg::CLEAR_INTERRUPT, 0);
        assert!(!r.wire.0.load(Ordering::SeqCst));
        r.set(reg::ALARM_LOW, reg::ALARM_HIGH, 1);
        assert!(r.wire.0.load(Ordering::SeqCst), "an alarm in the past is due at once");
        r.write(reg::IRQ_ENABLED, 0);
        assert!(!r.wire.0.load(Ordering::SeqCst));
        r.set(reg::ALARM_LOW, reg::ALARM_HIGH, u64::MAX);
        r.write(reg::CLEAR_ALARM, 0);
        assert_eq!(r.read(reg::ALARM_STATUS), 0);
    }

    #[test]
    fn state_survives() {
        let r = Rig::new();
        r.set(reg::TIME_LOW, reg::TIME_HIGH, 1 << 40);
        r.write(reg::IRQ_ENABLED, 1);
        r.set(reg::ALARM_LOW, reg::ALARM_HIGH, (1 << 40) + 30_000_000);
        let state = r.rtc.save().expect("state");
        let other = Rig::new();
        other.rtc.restore(&state).expect("same kind");
        assert!(other.time() - (1 << 40) < 10_000_000_000);
        assert!(other.fires());
    }

    #[test]
    fn odd_accesses_do_no_harm() {
        let r = Rig::new();
        for offset in (0..64).chain([WINDOW - 1, u64::MAX]) {
            for len in [0, 1, 2, 3, 4, 8, 64] {
                let mut data = vec![0xff; len];
                r.rtc.write(Access { offset, address: offset, vcpu: None }, &data);
                r.rtc.read(Access { offset, address: offset, vcpu: None }, &mut data);
            }
        }
    }
}
