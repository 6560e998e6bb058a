//! The interrupt wiring of a PC: ISA lines, PCI lines and where they end.
//!
//! An ISA interrupt goes to the 8259 input of its number and to an IOAPIC input (the timer's to
//! input 2, as the MADT tells). Each of the eight PCI lines `PIRQA` to `PIRQH` goes to IOAPIC inputs
//! 16 to 23 and, if its route register says so, to an 8259 input too (ICH9 data sheet, section 5.9).
//!
//! x87 errors of processors that have CR0.NE clear are interrupt 13 (the same, section 13.7.4): `FERR#` raises it, a write to port
//! 0xf0 lowers it and asserts `IGNNE#`, with which the processor runs past the error until it takes `FERR#` back.

use std::sync::Arc;

use holdfast_device::{Access, BusDevice, Device, DeviceState, FpuErrors, IrqLine, IrqSink, StateError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{IoApic, PicPair};

const KIND: &str = "gsi";
const PIRQS: usize = 8;
/// The port that ends the interrupt of an x87 error.
pub const FPU_PORT: u64 = 0xf0;
/// The interrupt of x87 errors.
const FPU_IRQ: u32 = 13;

/// Who takes the interrupts.
#[derive(Debug, Clone)]
pub enum IrqTarget {
    /// Controllers in user space.
    Split {
        /// The 8259 pair.
        pic: Arc<PicPair>,
        /// The IOAPIC.
        ioapic: Arc<IoApic>,
    },
    /// Controllers in the kernel. Its pins are GSIs; it does the fan-out of the ISA lines itself.
    Kernel(Arc<dyn IrqSink>),
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    /// Levels of the ISA lines.
    isa: u16,
    /// Levels of the PCI lines.
    pirq: u8,
    /// ISA interrupt to which each PCI line is routed; 0: none.
    route: [u8; PIRQS],
    /// A processor asserts `FERR#`.
    ferr: bool,
    /// `IGNNE#` is asserted.
    ignne: bool,
}

impl State {
    /// Level of ISA interrupt `n` as the 8259 sees it.
    fn pic_level(&self, n: u8) -> bool {
        let routed = self.route.iter().enumerate().any(|(i, r)| *r == n && self.pirq & 1 << i != 0);
        self.isa & 1 << n != 0 || n != 0 && routed
    }
}

/// The wiring. As an [`IrqSink`] its pins are GSIs: 0 to 15 the ISA lines, 16 to 23 `PIRQA` to `PIRQH`.
#[derive(Debug)]
pub struct Gsi {
    target: IrqTarget,
    state: Mutex<State>,
}

impl Gsi {
    /// Wires to `target`.
    pub fn new(target: IrqTarget) -> Arc<Self> {
        Arc::new(Self { target, state: Mutex::default() })
    }

    /// The wire of GSI `n`.
    pub fn line(self: &Arc<Self>, n: u32) -> IrqLine {
        IrqLine::new(Arc::clone(self) as Arc<dyn IrqSink>, n)
    }

    /// Routes PCI line `pirq` (0 to 7) to ISA interrupt `irq`, or to the IOAPIC alone.
    pub fn set_pirq_route(&self, pirq: usize, irq: Option<u8>) {
        let mut s = self.state.lock();
        // Interrupts that the ICH9 reserves cannot be routed to (data sheet section 13.1.17).
        let irq = irq.filter(|n| matches!(n, 3..=7 | 9..=12 | 14 | 15)).unwrap_or(0);
        let Some(slot) = s.route.get_mut(pirq) else {
            return;
        };
        let old = std::mem::replace(slot, irq);
        if old != irq {
            for n in [old, irq] {
                self.drive_pic(&s, n);
            }
        }
    }

    /// Drives 8259 input `n` (0: not routed) as the state says. The lock is held so that levels keep their order.
    fn drive_pic(&self, s: &State, n: u8) {
        if n == 0 {
            return;
        }
        match &self.target {
            IrqTarget::Split { pic, .. } => pic.set_level(u32::from(n), s.pic_level(n)),
            IrqTarget::Kernel(sink) => sink.set_level(u32::from(n), s.pic_level(n)),
        }
    }
}

impl Gsi {
    /// Drives ISA line `pin`, 0 to 15.
    fn set_isa(&self, s: &mut State, pin: u32, level: bool) {
        let bit = 1u16 << (pin & 15);
        s.isa = if level { s.isa | bit } else { s.isa & !bit };
        match &self.target {
            IrqTarget::Split { pic, ioapic } => {
                pic.set_level(pin, s.pic_level(pin as u8));
                ioapic.set_level(if pin == 0 { 2 } else { pin }, level);
            }
            IrqTarget::Kernel(sink) => sink.set_level(pin, s.pic_level(pin as u8)),
        }
    }
}

impl FpuErrors for Gsi {
    fn set_ferr(&self, level: bool) -> bool {
        let mut s = self.state.lock();
        s.ferr = level;
        s.ignne &= level;
        if level && !s.ignne {
            self.set_isa(&mut s, FPU_IRQ, true);
        }
        s.ignne
    }
}

/// Port 0xf0.
impl BusDevice for Gsi {
    fn read(&self, _access: Access, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _access: Access, _data: &[u8]) {
        let mut s = self.state.lock();
        self.set_isa(&mut s, FPU_IRQ, false);
        s.ignne = s.ferr;
    }
}

impl IrqSink for Gsi {
    fn set_level(&self, pin: u32, level: bool) {
        let mut s = self.state.lock();
        match pin {
            0..=15 => self.set_isa(&mut s, pin, level),
            16..=23 => {
                let index = (pin - 16) as usize;
                s.pirq = if level { s.pirq | 1 << index } else { s.pirq & !(1 << index) };
                match &self.target {
                    IrqTarget::Split { ioapic, .. } => ioapic.set_level(pin, level),
                    IrqTarget::Kernel(sink) => sink.set_level(pin, level),
                }
                if let Some(n) = s.route.get(index).copied().filter(|n| *n != 0) {
                    self.drive_pic(&s, n);
                }
            }
            _ => {}
        }
    }
}

impl Device for Gsi {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {
        // Levels belong to the devices that drive them; routes to the LPC bridge, which resets them. Processors come up
        // without x87 errors.
        let mut s = self.state.lock();
        if std::mem::take(&mut s.ferr) {
            s.ignne = false;
            self.set_isa(&mut s, FPU_IRQ, false);
        }
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(KIND, 1, &*self.state.lock())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let new: State = state.parse(KIND, 1)?;
        if new.route.iter().any(|r| *r > 15) {
            return Err(StateError::Invalid { kind: KIND, reason: "PCI line routed above 15".into() });
        }
        // The controllers restore what they saw of these levels themselves.
        *self.state.lock() = new;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Pins, access, hostile};
    use super::*;

    #[test]
    fn pci_lines_reach_the_ioapic_and_what_they_are_routed_to() {
        let pins = Arc::new(Pins::default());
        let gsi = Gsi::new(IrqTarget::Kernel(Arc::clone(&pins) as Arc<dyn IrqSink>));
        gsi.line(17).set(true);
        assert_eq!(pins.take(), [(17, true)]);
        gsi.set_pirq_route(1, Some(10));
        assert_eq!(pins.take(), [(10, true)], "routed while it is raised");
        gsi.line(10).set(true);
        gsi.line(17).set(false);
        assert_eq!(pins.take(), [(10, true), (17, false), (10, true)], "the ISA line still holds it");
        gsi.line(10).set(false);
        assert_eq!(pins.take(), [(10, false)]);
        gsi.set_pirq_route(1, Some(13));
        gsi.set_pirq_route(9, Some(10));
        gsi.line(17).set(true);
        assert_eq!(pins.take(), [(10, false), (17, true)], "13 is reserved, 9 is no PCI line");
        gsi.line(24).set(true);
        assert!(pins.take().is_empty());
    }

    #[test]
    fn x87_errors_are_interrupt_13_until_port_f0_is_written() {
        let pins = Arc::new(Pins::default());
        let gsi = Gsi::new(IrqTarget::Kernel(Arc::clone(&pins) as Arc<dyn IrqSink>));
        let clear = || gsi.write(access(FPU_PORT, 0), &[0]);
        assert!(!gsi.set_ferr(true), "the processor waits");
        assert_eq!(pins.take(), [(13, true)]);
        clear();
        assert_eq!(pins.take(), [(13, false)]);
        assert!(gsi.set_ferr(true), "the same error is ignored");
        assert!(pins.take().is_empty());
        gsi.set_ferr(false);
        clear();
        assert!(!gsi.set_ferr(true), "another one is not");
        assert_eq!(pins.take(), [(13, false), (13, true)]);
        gsi.reset();
        assert_eq!(pins.take(), [(13, false)]);
        hostile(&*gsi, FPU_PORT, 1);
    }

    #[test]
    fn state_survives() {
        let pins = Arc::new(Pins::default());
        let gsi = Gsi::new(IrqTarget::Kernel(Arc::clone(&pins) as Arc<dyn IrqSink>));
        gsi.set_pirq_route(0, Some(11));
        gsi.line(16).set(true);
        let state = gsi.save().expect("saves");
        let other = Gsi::new(IrqTarget::Kernel(pins as Arc<dyn IrqSink>));
        other.restore(&state).expect("restores");
        assert_eq!(other.save().expect("saves"), state);
        let mut bad = state;
        bad.data["route"][0] = 99.into();
        assert!(other.restore(&bad).is_err());
    }
}
