//! The pair of 8259A interrupt controllers of a PC: Intel 8259A data sheet (order 231468), and the
//! edge/level control registers of the ICH9 (data sheet section 13.4.9).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use holdfast_device::{
    Access, BuildContext, BuildError, BusDevice, CpuLines, Device, DeviceState, ExtInt, IrqSink, StateError,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::attach;

const KIND: &str = "i8259";
const MASTER: u64 = 0x20;
const SLAVE: u64 = 0xa0;
const ELCR: u64 = 0x4d0;
/// The input of the master that the slave's output drives.
const CASCADE: u8 = 2;
/// Inputs that cannot be level triggered: timer, keyboard, cascade; RTC and FPU on the slave.
const EDGE_ONLY: [u8; 2] = [0b0000_0111, 0b0010_0001];

/// One 8259A.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
struct Chip {
    /// Level of the inputs.
    lines: u8,
    irr: u8,
    imr: u8,
    isr: u8,
    /// Level-triggered inputs.
    elcr: u8,
    /// The input with the highest priority.
    top: u8,
    vector_base: u8,
    /// Next initialisation word expected: 0 none, else 2, 3 or 4.
    expects: u8,
    icw4_follows: bool,
    single: bool,
    read_isr: bool,
    poll: bool,
    special_mask: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
}

impl Chip {
    /// Highest-priority bit set in `mask`: (rank from 0, input).
    fn first(&self, mask: u8) -> Option<(u8, u8)> {
        (0..8).map(|rank| (rank, (self.top + rank) & 7)).find(|(_, n)| mask & 1 << n != 0)
    }

    /// The input to be serviced next, if any beats what is in service.
    fn next(&self, master: bool) -> Option<u8> {
        let (rank, input) = self.first(self.irr & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested && master {
            in_service &= !(1 << CASCADE);
        }
        match self.first(in_service) {
            Some((serving, _)) if serving <= rank => None,
            _ => Some(input),
        }
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        if self.elcr & bit != 0 {
            if level {
                self.irr |= bit;
            } else {
                self.irr &= !bit;
            }
        } else if level && self.lines & bit == 0 {
            self.irr |= bit;
        }
        if level {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.top = (input + 1) & 7;
            }
        } else {
            self.isr |= bit;
        }
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
    }

    /// ICW1: everything but the inputs and the trigger modes starts afresh.
    fn initialise(&mut self, value: u8) {
        let (lines, elcr) = (self.lines, self.elcr);
        *self = Self {
            lines,
            elcr,
            irr: lines & elcr,
            expects: 2,
            icw4_follows: value & 1 != 0,
            single: value & 2 != 0,
            ..Self::default()
        };
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.initialise(value);
        } else if value & 0x08 != 0 {
            self.operation3(value);
        } else {
            self.operation2(value);
        }
    }

    /// OCW3: read selection, poll, special mask.
    fn operation3(&mut self, value: u8) {
        if value & 0x04 != 0 {
            self.poll = true;
        }
        if value & 0x02 != 0 {
            self.read_isr = value & 1 != 0;
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    /// OCW2: end of interrupt and rotation.
    fn operation2(&mut self, value: u8) {
        let named = value & 7;
        match value >> 5 {
            0 | 4 => self.rotate_on_auto_eoi = value >> 5 == 4,
            command @ (1 | 5) => {
                // The highest in service; special mask mode hides the masked ones from it.
                let in_service = if self.special_mask { self.isr & !self.imr } else { self.isr };
                if let Some((_, input)) = self.first(in_service) {
                    self.isr &= !(1 << input);
                    if command == 5 {
                        self.top = (input + 1) & 7;
                    }
                }
            }
            3 => self.isr &= !(1 << named),
            6 => self.top = (named + 1) & 7,
            7 => {
                self.isr &= !(1 << named);
                self.top = (named + 1) & 7;
            }
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.expects {
            2 => {
                self.vector_base = value & 0xf8;
                self.expects = match (self.single, self.icw4_follows) {
                    (false, _) => 3,
                    (true, true) => 4,
                    (true, false) => 0,
                };
            }
            3 => self.expects = if self.icw4_follows { 4 } else { 0 },
            4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                self.expects = 0;
            }
            _ => self.imr = value,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    chips: [Chip; 2],
}

impl State {
    /// Carries the slave's output to the master; returns the master's output.
    fn output(&mut self) -> bool {
        let [master, slave] = &mut self.chips;
        master.set_line(CASCADE, slave.next(false).is_some());
        if slave.next(false).is_none() {
            // A request that the slave has withdrawn must not leave a latched edge behind.
            master.irr &= !(1 << CASCADE);
        }
        master.next(true).is_some()
    }

    /// The interrupt acknowledge cycles of both chips.
    fn acknowledge(&mut self) -> u8 {
        let [master, slave] = &mut self.chips;
        let Some(input) = master.next(true) else { return master.vector_base | 7 };
        master.acknowledge(input);
        if input != CASCADE {
            return master.vector_base | input;
        }
        let vector = match slave.next(false) {
            Some(input) => {
                slave.acknowledge(input);
                slave.vector_base | input
            }
            None => slave.vector_base | 7,
        };
        // The cascade line drops and, if there is more, rises again.
        master.set_line(CASCADE, false);
        vector
    }

    fn read(&mut self, port: u64) -> u8 {
        let index = match port & !1 {
            MASTER => 0,
            SLAVE => 1,
            ELCR => return self.chips.get((port & 1) as usize).map_or(0xff, |c| c.elcr),
            _ => return 0xff,
        };
        let Some(chip) = self.chips.get_mut(index) else { return 0xff };
        if chip.poll {
            chip.poll = false;
            return match chip.next(index == 0) {
                Some(input) => {
                    chip.acknowledge(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match port & 1 {
            0 if chip.read_isr => chip.isr,
            0 => chip.irr,
            _ => chip.imr,
        }
    }

    fn write(&mut self, port: u64, value: u8) {
        let index = match port & !1 {
            MASTER => 0,
            SLAVE => 1,
            ELCR => {
                let at = (port & 1) as usize;
                if let (Some(chip), Some(fixed)) = (self.chips.get_mut(at), EDGE_ONLY.get(at)) {
                    chip.elcr = value & !fixed;
                }
                return;
            }
            _ => return,
        };
        let Some(chip) = self.chips.get_mut(index) else { return };
        if port & 1 == 0 { chip.write_command(value) } else { chip.write_data(value) }
    }
}

/// The master at port 0x20, the slave at 0xa0, trigger modes at 0x4d0.
///
/// Inputs 0 to 15 are the ISA interrupts; input 2 is the cascade and cannot be driven. The output
/// goes to `LINT0` of vCPU 0 as a level, and vectors are fetched through [`ExtInt`].
pub struct PicPair {
    state: Mutex<State>,
    /// The output, readable without the lock.
    raised: AtomicBool,
    lines: Arc<dyn CpuLines>,
}

impl fmt::Debug for PicPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PicPair").field("state", &*self.state.lock()).finish_non_exhaustive()
    }
}

impl PicPair {
    /// Builds the pair at its PC ports; `lines` are the vCPUs' pins.
    ///
    /// # Errors
    /// [`BuildError::Bus`] if a port is taken.
    pub fn build(lines: Arc<dyn CpuLines>, context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        let pic = Arc::new(Self { state: Mutex::default(), raised: AtomicBool::new(false), lines });
        for base in [MASTER, SLAVE, ELCR] {
            attach(&context.pio, KIND, base, 2, Arc::clone(&pic) as Arc<dyn BusDevice>)?;
        }
        Ok(pic)
    }

    /// Does `change` to the state and drives the output accordingly.
    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let (result, before, level) = {
            let mut s = self.state.lock();
            let result = change(&mut s);
            let level = s.output();
            (result, self.raised.swap(level, Ordering::SeqCst), level)
        };
        if before != level {
            // The pin is driven without the lock, so that the vCPU may look at once. Whoever finds
            // that another thread has changed the output meanwhile drives the pin again.
            let mut driven = level;
            loop {
                self.lines.set_cpu_pin(0, 0, driven);
                let now = self.raised.load(Ordering::SeqCst);
                if now == driven {
                    break;
                }
                driven = now;
            }
        }
        result
    }
}

impl IrqSink for PicPair {
    fn set_level(&self, pin: u32, level: bool) {
        if pin >= 16 || pin == u32::from(CASCADE) {
            return;
        }
        self.with(|s| {
            if let Some(chip) = s.chips.get_mut(pin as usize / 8) {
                chip.set_line((pin % 8) as u8, level);
            }
        });
    }
}

impl ExtInt for PicPair {
    fn pending(&self) -> bool {
        self.raised.load(Ordering::SeqCst)
    }

    fn acknowledge(&self) -> u8 {
        self.with(State::acknowledge)
    }
}

impl BusDevice for PicPair {
    fn read(&self, access: Access, data: &mut [u8]) {
        self.with(|s| {
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = s.read(access.address.wrapping_add(i as u64));
            }
        });
    }

    fn write(&self, access: Access, data: &[u8]) {
        self.with(|s| {
            for (i, byte) in data.iter().enumerate() {
                s.write(access.address.wrapping_add(i as u64), *byte);
            }
        });
    }
}

impl Device for PicPair {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {
        self.with(|s| {
            for chip in &mut s.chips {
                *chip = Chip { lines: chip.lines, ..Chip::default() };
            }
        });
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(KIND, 1, &*self.state.lock())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let new: State = state.parse(KIND, 1)?;
        if new.chips.iter().any(|c| c.top > 7) {
            return Err(StateError::Invalid { kind: KIND, reason: "priority above 7".into() });
        }
        self.with(|s| *s = new);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{context, hostile, inb, outb};
    use super::*;
    use holdfast_device::Bus;

    #[derive(Debug, Default)]
    struct Cpu(AtomicBool);
    impl CpuLines for Cpu {
        fn set_cpu_pin(&self, vcpu: u32, pin: u32, level: bool) {
            assert_eq!((vcpu, pin), (0, 0));
            self.0.store(level, Ordering::SeqCst);
        }
    }

    fn pair() -> (Arc<PicPair>, Arc<Bus>, Arc<Cpu>) {
        let (context, _) = context();
        let cpu = Arc::new(Cpu::default());
        let pic = PicPair::build(Arc::clone(&cpu) as Arc<dyn CpuLines>, &context).expect("build");
        let bus = context.pio;
        for (port, words) in [(0x20, [0x11, 0x08, 0x04, 0x01]), (0xa0, [0x11, 0x70, 0x02, 0x01])] {
            outb(&bus, port, words[0]);
            words[1..].iter().for_each(|w| outb(&bus, port + 1, *w));
            outb(&bus, port + 1, 0);
        }
        (pic, bus, cpu)
    }

    #[test]
    fn an_edge_interrupts_once_and_the_end_of_interrupt_lets_lower_ones_in() {
        let (pic, bus, cpu) = pair();
        pic.set_level(4, true);
        assert!(pic.pending() && cpu.0.load(Ordering::SeqCst));
        assert_eq!(pic.acknowledge(), 0x0c);
        assert!(!pic.pending() && !cpu.0.load(Ordering::SeqCst));
        pic.set_level(5, true);
        assert!(!pic.pending(), "lower priority than what is in service");
        pic.set_level(1, true);
        assert_eq!(pic.acknowledge(), 0x09);
        outb(&bus, 0x20, 0x20);
        outb(&bus, 0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x0d);
        outb(&bus, 0x20, 0x65);
        assert!(!pic.pending());
        pic.set_level(4, true);
        assert!(!pic.pending(), "still the same edge");
    }

    #[test]
    fn the_slave_cascades_through_input_2() {
        let (pic, bus, _) = pair();
        pic.set_level(8, true);
        pic.set_level(14, true);
        assert_eq!(pic.acknowledge(), 0x70);
        assert!(!pic.pending());
        outb(&bus, 0xa0, 0x20);
        outb(&bus, 0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x76);
        outb(&bus, 0xa0, 0x0b);
        assert_eq!(inb(&bus, 0xa0), 0x40, "in service");
    }

    #[test]
    fn a_withdrawn_level_gives_the_spurious_vector() {
        let (pic, bus, _) = pair();
        outb(&bus, 0x4d0, 0xff);
        assert_eq!(inb(&bus, 0x4d0), 0xf8, "timer, keyboard and cascade stay edge triggered");
        outb(&bus, 0x4d1, 0xff);
        assert_eq!(inb(&bus, 0x4d1), 0xde);
        pic.set_level(5, true);
        assert!(pic.pending());
        pic.set_level(5, false);
        assert!(!pic.pending());
        assert_eq!(pic.acknowledge(), 0x0f);
        pic.set_level(11, true);
        assert!(pic.pending());
        pic.set_level(11, false);
        assert!(!pic.pending(), "nothing latched in the cascade");
        pic.set_level(5, true);
        assert_eq!(pic.acknowledge(), 0x0d);
        outb(&bus, 0x20, 0x20);
        assert!(pic.pending(), "a level fires until it is lowered");
    }

    #[test]
    fn masks_rotation_auto_eoi_and_poll() {
        let (pic, bus, _) = pair();
        outb(&bus, 0x21, 0x10);
        pic.set_level(4, true);
        assert!(!pic.pending());
        assert_eq!(inb(&bus, 0x21), 0x10);
        outb(&bus, 0x21, 0);
        outb(&bus, 0x20, 0x0c);
        assert_eq!(inb(&bus, 0x20), 0x84, "poll acknowledges");
        outb(&bus, 0x20, 0xa0);
        pic.set_level(3, true);
        pic.set_level(5, true);
        assert_eq!(pic.acknowledge(), 0x0d, "after the rotation 5 is on top");
        outb(&bus, 0x20, 0x20);
        for word in [0x11, 0x20, 0x04, 0x03] {
            outb(&bus, if word == 0x11 { 0x20 } else { 0x21 }, word);
        }
        pic.set_level(6, true);
        assert_eq!(pic.acknowledge(), 0x26);
        outb(&bus, 0x20, 0x0b);
        assert_eq!(inb(&bus, 0x20), 0, "auto EOI leaves nothing in service");
    }

    #[test]
    fn special_mask_mode_lets_lower_priorities_in() {
        let (pic, bus, _) = pair();
        pic.set_level(3, true);
        assert_eq!(pic.acknowledge(), 0x0b);
        outb(&bus, 0x21, 0x08);
        outb(&bus, 0x20, 0x68);
        pic.set_level(6, true);
        assert_eq!(pic.acknowledge(), 0x0e);
    }

    #[test]
    fn state_survives_reset_clears_and_nonsense_is_refused() {
        let (pic, ..) = pair();
        pic.set_level(14, true);
        let state = pic.save().expect("saves");
        let (other, ..) = pair();
        other.restore(&state).expect("restores");
        assert!(other.pending());
        assert_eq!(other.acknowledge(), 0x76);
        other.reset();
        assert!(!other.pending());
        let mut bad = state.clone();
        bad.data["chips"][0]["top"] = 200.into();
        assert!(matches!(other.restore(&bad), Err(StateError::Invalid { .. })));
    }

    #[test]
    fn survives_hostile_accesses() {
        let (pic, ..) = pair();
        for base in [MASTER, SLAVE, ELCR] {
            hostile(&*pic, base, 2);
        }
        pic.set_level(16, true);
        pic.set_level(2, true);
        pic.acknowledge();
    }
}
