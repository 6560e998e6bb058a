//! The platform devices of an x86 PC with an ICH9 south bridge.
//!
//! All of them see time through the VM's clock and drive interrupts through [`Gsi`], which fans the
//! PC's interrupt lines out to the 8259 pair and the IOAPIC (or to a kernel's own pair of them).

mod acpi_pm;
mod chipset;
mod debug;
mod gsi;
mod hpet;
mod i8042;
mod ioapic;
mod lapic;
mod lpc;
mod mch;
mod pic;
mod pit;
mod ports;
mod ps2;
mod rtc;

use std::sync::Arc;

use holdfast_device::{BuildError, Bus, BusDevice};

pub use acpi_pm::{AcpiPm, AcpiPmConfig, PM_BASE, SleepTypes};
pub use chipset::{ChipsetFunction, ChipsetRegisters};
pub use debug::DebugConsole;
pub use gsi::{FPU_PORT, Gsi, IrqTarget};
pub use hpet::{HPET_BASE, HPET_LEN, Hpet, HpetConfig};
pub use i8042::{I8042, I8042Config};
pub use ioapic::{IOAPIC_BASE, IOAPIC_LEN, IOAPIC_PINS, IoApic, IoApicConfig, IoApicRoutes};
pub use lapic::{EoiReceiver, LAPIC_BASE, LAPIC_LEN, Lapic, LapicBus, LapicSignals, LapicState, Waker};
pub use lpc::{Lpc, LpcRegisters, pirq_of};
pub use mch::{ECAM_WINDOW, Mch, MchRegisters};
pub use pic::PicPair;
pub use pit::{LegacyGate, Pit, PitConfig};
pub use ports::{PostPort, ResetControl, SystemControlA};
pub use rtc::{CmosConfig, Rtc};

/// Attaches `device` and names it in the error.
pub(crate) fn attach(
    bus: &Arc<Bus>,
    id: &str,
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
) -> Result<(), BuildError> {
    bus.attach(base, len, id, device).map_err(|source| BuildError::Bus { id: id.to_owned(), source })
}

/// Copies the bytes of register value `value` from `shift` bytes on into `data`; what lies beyond
/// the register reads as zero.
pub(crate) fn read_reg(value: u64, shift: u64, data: &mut [u8]) {
    let bytes = value.to_le_bytes();
    for (i, byte) in data.iter_mut().enumerate() {
        let at = usize::try_from(shift).ok().and_then(|s| s.checked_add(i));
        *byte = at.and_then(|at| bytes.get(at)).copied().unwrap_or(0);
    }
}

/// `old` with the bytes from `shift` on replaced by `data`; bytes beyond the register are dropped.
pub(crate) fn write_reg(old: u64, shift: u64, data: &[u8]) -> u64 {
    let mut bytes = old.to_le_bytes();
    for (i, byte) in data.iter().enumerate() {
        let at = usize::try_from(shift).ok().and_then(|s| s.checked_add(i));
        if let Some(slot) = at.and_then(|at| bytes.get_mut(at)) {
            *slot = *byte;
        }
    }
    u64::from_le_bytes(bytes)
}

/// `ns` nanoseconds in ticks of `hz`, rounded down.
pub(crate) fn ticks(ns: u64, hz: u64) -> u64 {
    u64::try_from(u128::from(ns) * u128::from(hz) / 1_000_000_000).unwrap_or(u64::MAX)
}

/// The first nanosecond at which `ticks` ticks of `hz` have passed.
pub(crate) fn nanoseconds(ticks: u64, hz: u64) -> u64 {
    let ns = (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(hz));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod testing {
    //! What the unit tests of PC devices share.

    use std::io;
    use std::sync::Arc;

    use holdfast_clock::{HostRandom, Timers, VmClock};
    use holdfast_device::{
        Access, BuildContext, Bus, BusDevice, IrqLine, IrqSink, MsiController, MsiMessage, MsiVector,
        SystemEvent, SystemSink,
    };
    use holdfast_memory::GuestMemory;
    use holdfast_threads::PlainSpawner;
    use parking_lot::Mutex;

    /// Records what happens to a set of pins.
    #[derive(Debug, Default)]
    pub struct Pins(pub Mutex<Vec<(u32, bool)>>);
    impl IrqSink for Pins {
        fn set_level(&self, pin: u32, level: bool) {
            self.0.lock().push((pin, level));
        }
    }
    impl Pins {
        pub fn take(&self) -> Vec<(u32, bool)> {
            std::mem::take(&mut *self.0.lock())
        }
        pub fn line(self: &Arc<Self>, pin: u32) -> IrqLine {
            IrqLine::new(Arc::clone(self) as Arc<dyn IrqSink>, pin)
        }
    }

    /// Records messages.
    #[derive(Debug, Default)]
    pub struct Messages(pub Mutex<Vec<MsiMessage>>);
    impl MsiController for Messages {
        fn send(&self, message: MsiMessage) -> io::Result<()> {
            self.0.lock().push(message);
            Ok(())
        }
        fn vector(self: Arc<Self>) -> io::Result<Box<dyn MsiVector>> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }
    impl Messages {
        pub fn take(&self) -> Vec<MsiMessage> {
            std::mem::take(&mut *self.0.lock())
        }
    }

    /// Records requests.
    #[derive(Debug, Default)]
    pub struct Requests(pub Mutex<Vec<SystemEvent>>);
    impl SystemSink for Requests {
        fn request(&self, event: SystemEvent) {
            self.0.lock().push(event);
        }
    }
    impl Requests {
        pub fn take(&self) -> Vec<SystemEvent> {
            std::mem::take(&mut *self.0.lock())
        }
    }

    /// A context whose clock stands at zero until a test sets it.
    pub fn context() -> (BuildContext, Arc<Requests>) {
        let clock = VmClock::stopped_at(0);
        let requests = Arc::new(Requests::default());
        let context = BuildContext {
            memory: GuestMemory::default(),
            mmio: Bus::new("mmio"),
            pio: Bus::new("pio"),
            timers: Timers::start(Arc::clone(&clock), &PlainSpawner).expect("thread"),
            clock,
            random: Arc::new(HostRandom),
            spawner: PlainSpawner::shared(),
            system: Arc::clone(&requests) as Arc<dyn SystemSink>,
            msi: None,
            windows: None,
        };
        (context, requests)
    }

    pub use super::lpc::tests::root_bus;

    pub fn access(address: u64, offset: u64) -> Access {
        Access { offset, address, vcpu: Some(0) }
    }

    pub fn inb(bus: &Bus, port: u64) -> u8 {
        let mut data = [0];
        bus.read(Some(0), port, &mut data);
        data[0]
    }

    pub fn outb(bus: &Bus, port: u64, value: u8) {
        bus.write(Some(0), port, &[value]);
    }

    pub fn readl(device: &dyn BusDevice, offset: u64) -> u32 {
        let mut data = [0; 4];
        device.read(access(offset, offset), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn writel(device: &dyn BusDevice, offset: u64, value: u32) {
        device.write(access(offset, offset), &value.to_le_bytes());
    }

    /// Reads and writes of every length at every offset of a window, with all values of a byte: the
    /// device may do what it likes but has to survive it.
    pub fn hostile(device: &dyn BusDevice, base: u64, len: u64) {
        for size in [0usize, 1, 2, 3, 4, 8, 16] {
            for offset in 0..len {
                for value in [0u8, 1, 0x10, 0x3f, 0x55, 0x80, 0xaa, 0xff] {
                    device.write(access(base + offset, offset), &vec![value; size]);
                    let mut data = vec![0; size];
                    device.read(access(base + offset, offset), &mut data);
                }
            }
        }
        let mut data = [0; 8];
        device.read(access(u64::MAX, u64::MAX), &mut data);
        device.write(access(u64::MAX, u64::MAX), &data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_read_and_written_in_parts() {
        let mut data = [0; 2];
        read_reg(0x8877_6655_4433_2211, 6, &mut data);
        assert_eq!(data, [0x77, 0x88]);
        read_reg(0x8877_6655_4433_2211, 7, &mut data);
        assert_eq!(data, [0x88, 0], "beyond the register is zero");
        read_reg(1, u64::MAX, &mut data);
        assert_eq!(data, [0, 0]);
        assert_eq!(write_reg(0x1111_1111, 1, &[0x22, 0x33]), 0x1133_2211);
        assert_eq!(write_reg(0, 7, &[1, 2]), 0x0100_0000_0000_0000);
    }

    #[test]
    fn ticks_and_nanoseconds_agree() {
        for t in [0, 1, 2, 1_193_182, 65_536, u64::from(u32::MAX)] {
            assert_eq!(ticks(nanoseconds(t, 1_193_182), 1_193_182), t);
            assert_eq!(ticks(nanoseconds(t, 3_579_545), 3_579_545), t);
        }
    }
}
