//! ACLINT: machine software interrupts and the machine timer (RISC-V ACLINT specification 1.0-rc4), laid
//! out like the SiFive CLINT: MSWI at 0, MTIMECMP at 0x4000, MTIME at 0xbff8.

use std::sync::{Arc, Weak};

use holdfast_clock::{Timer, Timers};
use holdfast_device::{Access, BusDevice, CpuLines, Device, DeviceState, StateError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::pin;

/// Bytes of the register window.
pub const WINDOW: u64 = 0x1_0000;

const MTIMECMP: u64 = 0x4000;
const MTIME: u64 = 0xbff8;
const END: u64 = 0xc000;

/// What an ACLINT is made from.
#[derive(Debug, Clone)]
pub struct AclintSpec {
    /// Number of harts, at most 4095.
    pub harts: u32,
    /// Ticks of `mtime` per second.
    pub timebase_hz: u64,
    /// The harts' pins.
    pub lines: Arc<dyn CpuLines>,
    /// Guest-virtual time and alarms on it.
    pub timers: Arc<Timers>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Regs {
    msip: Vec<bool>,
    mtimecmp: Vec<u64>,
    /// Added (wrapping) to the clock to give `mtime`, after a guest has written it.
    offset: u64,
}

/// The device.
#[derive(Debug)]
pub struct Aclint {
    spec: AclintSpec,
    regs: Mutex<Regs>,
    alarms: Vec<Timer>,
}

impl Aclint {
    /// Timers at rest (`mtimecmp` all ones) and no software interrupt.
    pub fn new(spec: AclintSpec) -> Arc<Self> {
        let spec = AclintSpec { harts: spec.harts.min(4095), ..spec };
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let alarm = |hart: u32| {
                let weak = weak.clone();
                spec.timers.timer(move || {
                    if let Some(aclint) = weak.upgrade() {
                        aclint.update_timer(&aclint.regs.lock(), hart as usize);
                    }
                })
            };
            let alarms = (0..spec.harts).map(alarm).collect();
            let regs = Mutex::new(Self::reset_state(spec.harts));
            Self { alarms, regs, spec }
        })
    }

    fn reset_state(harts: u32) -> Regs {
        Regs { msip: vec![false; harts as usize], mtimecmp: vec![u64::MAX; harts as usize], offset: 0 }
    }

    /// Ticks at `nanoseconds` of guest-virtual time.
    fn ticks(&self, nanoseconds: u64) -> u64 {
        (u128::from(nanoseconds) * u128::from(self.spec.timebase_hz) / 1_000_000_000) as u64
    }

    fn mtime(&self, regs: &Regs) -> u64 {
        self.ticks(self.spec.timers.clock().now()).wrapping_add(regs.offset)
    }

    /// Drives the timer pin of `hart` and arms its alarm. Called under the lock, so that an alarm and a
    /// guest's write cannot reorder their levels.
    fn update_timer(&self, regs: &Regs, hart: usize) {
        let (Some(&compare), Some(alarm)) = (regs.mtimecmp.get(hart), self.alarms.get(hart)) else { return };
        let now = self.mtime(regs);
        let due = now >= compare;
        self.spec.lines.set_cpu_pin(hart as u32, pin::MTIP, due);
        let nanoseconds = u128::from(compare.wrapping_sub(regs.offset)) * 1_000_000_000;
        let deadline = nanoseconds.div_ceil(u128::from(self.spec.timebase_hz.max(1)));
        match u64::try_from(deadline) {
            Ok(deadline) if !due => alarm.arm(deadline),
            // Due already, or centuries away.
            _ => alarm.disarm(),
        }
    }

    fn update_all(&self, regs: &Regs) {
        for hart in 0..self.alarms.len() {
            self.update_timer(regs, hart);
            let msip = regs.msip.get(hart).copied().unwrap_or(false);
            self.spec.lines.set_cpu_pin(hart as u32, pin::MSIP, msip);
        }
    }

    /// The 64-bit register that holds `offset` (a multiple of 4), as a value.
    fn timer_register(&self, regs: &Regs, offset: u64) -> u64 {
        match offset & !7 {
            MTIME => self.mtime(regs),
            at => regs.mtimecmp.get(((at - MTIMECMP) / 8) as usize).copied().unwrap_or(0),
        }
    }
}

/// Replaces the half of `old` that `offset` names, or all of it.
fn merge(old: u64, offset: u64, data: &[u8]) -> Option<u64> {
    match (*data).try_into() {
        Ok(all) => Some(u64::from_le_bytes(all)),
        Err(_) => {
            let half = u64::from(u32::from_le_bytes(data.try_into().ok()?));
            Some(if offset & 4 == 0 { old & !0xffff_ffff | half } else { old & 0xffff_ffff | half << 32 })
        }
    }
}

/// Registers take naturally aligned accesses of 4 or 8 bytes.
fn aligned(offset: u64, len: usize) -> bool {
    (len == 4 || len == 8) && offset.is_multiple_of(len as u64)
}

impl BusDevice for Aclint {
    fn read(&self, access: Access, data: &mut [u8]) {
        data.fill(0);
        let offset = access.offset;
        if !aligned(offset, data.len()) {
            return;
        }
        let regs = self.regs.lock();
        match offset {
            0..MTIMECMP => {
                for (i, word) in data.chunks_exact_mut(4).enumerate() {
                    let set = regs.msip.get((offset / 4) as usize + i).copied().unwrap_or(false);
                    word[0] = u8::from(set);
                }
            }
            MTIMECMP..END => {
                let value = self.timer_register(&regs, offset) >> (8 * (offset & 4));
                let len = data.len();
                data.copy_from_slice(&value.to_le_bytes()[..len]);
            }
            _ => {}
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        let offset = access.offset;
        if !aligned(offset, data.len()) {
            return;
        }
        let mut regs = self.regs.lock();
        match offset {
            0..MTIMECMP => {
                for (i, word) in data.chunks_exact(4).enumerate() {
                    let hart = (offset / 4) as usize + i;
                    if let Some(msip) = regs.msip.get_mut(hart) {
                        *msip = word[0] & 1 != 0;
                        self.spec.lines.set_cpu_pin(hart as u32, pin::MSIP, word[0] & 1 != 0);
                    }
                }
            }
            MTIMECMP..END => {
                let old = self.timer_register(&regs, offset);
                let Some(value) = merge(old, offset, data) else { return };
                if offset & !7 == MTIME {
                    regs.offset = value.wrapping_sub(self.ticks(self.spec.timers.clock().now()));
                    (0..self.alarms.len()).for_each(|hart| self.update_timer(&regs, hart));
                } else {
                    let hart = ((offset - MTIMECMP) / 8) as usize;
                    if let Some(compare) = regs.mtimecmp.get_mut(hart) {
                        *compare = value;
                        self.update_timer(&regs, hart);
                    }
                }
            }
            _ => {}
        }
    }
}

const KIND: &str = "riscv-aclint";

impl Device for Aclint {
    fn id(&self) -> &str {
        "aclint"
    }

    fn reset(&self) {
        let mut regs = self.regs.lock();
        *regs = Self::reset_state(self.spec.harts);
        self.update_all(&regs);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(KIND, 1, &*self.regs.lock())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: Regs = state.parse(KIND, 1)?;
        let harts = self.spec.harts as usize;
        if saved.msip.len() != harts || saved.mtimecmp.len() != harts {
            let reason = format!("it is of {} harts, this machine has {harts}", saved.mtimecmp.len());
            return Err(StateError::Invalid { kind: KIND, reason });
        }
        let mut regs = self.regs.lock();
        *regs = saved;
        self.update_all(&regs);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::riscv::tests::Pins;
    use holdfast_clock::VmClock;
    use holdfast_threads::PlainSpawner;

    fn rig(harts: u32) -> (Arc<Aclint>, Arc<Pins>, Arc<Timers>) {
        let pins = Arc::new(Pins::default());
        let timers = Timers::start(VmClock::stopped_at(1_000_000), &PlainSpawner).expect("thread");
        let lines = Arc::clone(&pins) as Arc<dyn CpuLines>;
        let spec = AclintSpec { harts, timebase_hz: 10_000_000, lines, timers: Arc::clone(&timers) };
        (Aclint::new(spec), pins, timers)
    }

    fn read(aclint: &Aclint, offset: u64) -> u64 {
        let mut b = [0; 8];
        aclint.read(Access { offset, address: offset, vcpu: Some(0) }, &mut b);
        u64::from_le_bytes(b)
    }

    fn write(aclint: &Aclint, offset: u64, data: &[u8]) {
        aclint.write(Access { offset, address: offset, vcpu: Some(0) }, data);
    }

    #[test]
    fn software_interrupts_reach_their_hart() {
        let (aclint, pins, timers) = rig(3);
        write(&aclint, 4, &1u32.to_le_bytes());
        assert!(pins.get(1, pin::MSIP) && !pins.get(0, pin::MSIP));
        assert_eq!(read(&aclint, 0), 1 << 32);
        write(&aclint, 0, &0xffff_ffffu64.to_le_bytes());
        assert!(pins.get(0, pin::MSIP) && !pins.get(1, pin::MSIP));
        assert_eq!(read(&aclint, 0), 1, "only bit 0 exists");
        aclint.reset();
        assert!(!pins.get(0, pin::MSIP));
        timers.stop();
    }

    #[test]
    fn the_timer_compares_counts_and_fires() {
        let (aclint, pins, timers) = rig(2);
        assert_eq!(read(&aclint, MTIME), 10_000, "1 ms at 10 MHz");
        write(&aclint, MTIMECMP + 8, &10_000u64.to_le_bytes());
        assert!(pins.get(1, pin::MTIP));
        write(&aclint, MTIMECMP + 8 + 4, &1u32.to_le_bytes());
        assert!(!pins.get(1, pin::MTIP));
        assert_eq!(read(&aclint, MTIMECMP + 8), 10_000 + (1 << 32));
        write(&aclint, MTIMECMP, &20_000u64.to_le_bytes());
        assert!(!pins.get(0, pin::MTIP));
        timers.clock().resume();
        timers.clock_changed();
        for _ in 0..2000 {
            if pins.get(0, pin::MTIP) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(pins.get(0, pin::MTIP) && read(&aclint, MTIME) >= 20_000);
        timers.stop();
    }

    #[test]
    fn mtime_can_be_set_and_state_survives() {
        let (aclint, pins, timers) = rig(1);
        write(&aclint, MTIME, &5u64.to_le_bytes());
        assert_eq!(read(&aclint, MTIME), 5);
        write(&aclint, MTIMECMP, &5u64.to_le_bytes());
        let state = aclint.save().expect("state");
        aclint.reset();
        assert!(!pins.get(0, pin::MTIP));
        aclint.restore(&state).expect("own state");
        assert!(pins.get(0, pin::MTIP));
        assert_eq!(read(&aclint, MTIME), 5);
        let (other, _, more) = rig(2);
        assert!(other.restore(&state).is_err());
        more.stop();
        timers.stop();
    }

    #[test]
    fn hostile_accesses_do_no_harm() {
        let (aclint, pins, timers) = rig(2);
        let offsets = [0, 4, 8, 0x3ffc, 0x3ff8, 0x4010, 0xbff0, 0xbff8, 0xbffc, 0xbfff, 0xc000, 0xfff8];
        for offset in offsets.into_iter().chain([u64::MAX - 7, u64::MAX]) {
            for len in [0, 1, 2, 3, 4, 5, 8, 64] {
                let mut data = vec![0xff; len];
                aclint.write(Access { offset, address: offset, vcpu: None }, &data);
                aclint.read(Access { offset, address: offset, vcpu: None }, &mut data);
            }
        }
        assert!(pins.get(1, pin::MSIP));
        assert!(!pins.get(2, pin::MSIP), "there is no hart 2");
        timers.stop();
    }
}
