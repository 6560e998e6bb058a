//! The LPC bridge of an ICH9 (PCI function 00:1f.0): ICH9 data sheet section 13.1, as far as firmware
//! and kernels use it.
//!
//! Decoded are the ACPI block (PMBASE) and the routes of the PCI interrupt lines. The root complex
//! block and GPIOs are absent: their base registers read as zero.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use holdfast_device::BuildError;

use super::chipset::{ChipsetFunction, ChipsetRegisters, slot_error};
use super::{AcpiPm, Gsi, PM_BASE};
use crate::pci::{ConfigBuilder, Identity, PciBus, PciConfig, PciDevice};

const KIND: &str = "ich9-lpc";
const PMBASE: u16 = 0x40;
const ACPI_CNTL: u16 = 0x44;
const ACPI_EN: u8 = 0x80;
const PIRQ_A: u16 = 0x60;
const PIRQ_E: u16 = 0x68;
/// Bit 7 of a route register: not routed.
const UNROUTED: u8 = 0x80;

/// Which of the wires `PIRQA` (0) to `PIRQH` (7) pin 0 to 3 of a device on the root bus drives:
/// devices 0 to 24 rotate over `PIRQE` to `PIRQH`, the chipset's own use `PIRQA` to `PIRQD`.
pub fn pirq_of(device: u8, pin: u8) -> usize {
    let pin = usize::from(pin);
    if device < 25 { 4 + (usize::from(device) + pin) % 4 } else { pin % 4 }
}

/// The bridge.
pub type Lpc = ChipsetFunction<LpcRegisters>;

/// What the bridge's registers switch.
pub struct LpcRegisters {
    pm: Arc<AcpiPm>,
    gsi: Arc<Gsi>,
}

impl fmt::Debug for LpcRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LpcRegisters").field("pm", &self.pm).finish_non_exhaustive()
    }
}

impl Lpc {
    /// Builds the bridge as 00:1f.0 of `bus`.
    ///
    /// # Errors
    /// [`BuildError::Config`] if the slot is taken.
    pub fn build(bus: &Arc<PciBus>, pm: Arc<AcpiPm>, gsi: Arc<Gsi>) -> Result<Arc<Self>, BuildError> {
        let slot = bus.reserve_function(0x1f, 0).map_err(|e| slot_error(KIND, &e))?;
        let identity = Identity {
            vendor: 0x8086,
            device: 0x2918,
            revision: 2,
            class: 0x06_0100,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            multifunction: true,
        };
        let mut builder = ConfigBuilder::new(identity);
        // The bridge decodes always (command bits are hard-wired).
        builder.set(0x04, &[0x07]).writable(0x04, &[0, 0]);
        // Bit 0 says "I/O space" and cannot be changed. SCI stays on interrupt 9.
        builder.set(PMBASE, &[1]).writable(PMBASE, &[0x80, 0xff]).writable(ACPI_CNTL, &[ACPI_EN]);
        for base in [PIRQ_A, PIRQ_E] {
            builder.set(base, &[UNROUTED; 4]).writable(base, &[0x8f; 4]);
        }
        // Serial interrupt control, I/O decode ranges and enables: kept, with nothing to switch.
        builder.writable(0x64, &[0xff]).writable(0x80, &[0x77, 0x13, 0xff, 0x3f]);
        Self::plug(bus, &slot, builder.build(), LpcRegisters { pm, gsi })
    }

    /// Programs the ACPI block's base and the PCI interrupt routes (10, 10, 11, 11) as firmware
    /// does, for kernels that start without any.
    pub fn program(&self) {
        self.write_config(PMBASE, &(PM_BASE | 1).to_le_bytes());
        self.write_config(ACPI_CNTL, &[ACPI_EN]);
        for base in [PIRQ_A, PIRQ_E] {
            self.write_config(base, &[10, 10, 11, 11]);
        }
    }
}

impl ChipsetRegisters for LpcRegisters {
    const KIND: &'static str = KIND;
    const WATCHED: Range<u16> = PMBASE..PIRQ_E + 4;

    fn apply(&self, config: &PciConfig) {
        let mut control = [0];
        config.read(ACPI_CNTL, &mut control);
        let base = config.read_u16(PMBASE) & 0xff80;
        self.pm.set_base((control[0] & ACPI_EN != 0 && base != 0).then_some(base));
        let mut routes = [0; 8];
        if let Some((low, high)) = routes.split_at_mut_checked(4) {
            config.read(PIRQ_A, low);
            config.read(PIRQ_E, high);
        }
        for (pirq, route) in routes.into_iter().enumerate() {
            self.gsi.set_pirq_route(pirq, (route & UNROUTED == 0).then_some(route & 0xf));
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::testing::{Pins, context};
    use super::super::{AcpiPmConfig, IrqTarget, SleepTypes};
    use super::*;
    use crate::pci::PciBusSpec;
    use holdfast_device::{BuildContext, Device, IrqSink};

    pub fn root_bus() -> (Arc<PciBus>, BuildContext, Arc<Pins>) {
        let (context, _) = context();
        let pins = Arc::new(Pins::default());
        let bus = PciBus::new(PciBusSpec {
            segment: 0,
            mmio: Arc::clone(&context.mmio),
            pio: Arc::clone(&context.pio),
            wires: (16..24).map(|n| pins.line(n)).collect(),
            swizzle: pirq_of,
        });
        (bus, context, pins)
    }

    struct Rig {
        lpc: Arc<Lpc>,
        gsi: Arc<Gsi>,
        bus: Arc<PciBus>,
        context: BuildContext,
        pins: Arc<Pins>,
    }

    fn rig() -> Rig {
        let (bus, context, pins) = root_bus();
        let gsi = Gsi::new(IrqTarget::Kernel(Arc::clone(&pins) as Arc<dyn IrqSink>));
        let config =
            AcpiPmConfig { sci: gsi.line(9), sleep: SleepTypes { s5: 0 }, acpi_enable: 2, acpi_disable: 3 };
        let pm = AcpiPm::build(config, &context).expect("build");
        let lpc = Lpc::build(&bus, pm, Arc::clone(&gsi)).expect("build");
        Rig { lpc, gsi, bus, context, pins }
    }

    #[test]
    fn pins_rotate() {
        assert_eq!(
            [pirq_of(0, 0), pirq_of(1, 0), pirq_of(2, 3), pirq_of(31, 0), pirq_of(31, 3)],
            [4, 5, 5, 0, 3]
        );
    }

    #[test]
    fn the_acpi_block_appears_where_firmware_puts_it() {
        let r = rig();
        let mut data = [0; 4];
        assert!(!r.context.pio.read(None, 0x608, &mut data));
        r.bus.write_config(0, 0xf8, 0x40, &0x601u32.to_le_bytes());
        assert!(!r.context.pio.read(None, 0x608, &mut data), "not before ACPI_EN");
        r.bus.write_config(0, 0xf8, 0x44, &[0x80]);
        assert!(r.context.pio.read(None, 0x608, &mut data));
        r.bus.read_config(0, 0xf8, 0x40, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x601);
        r.lpc.reset();
        assert!(!r.context.pio.read(None, 0x608, &mut data));
    }

    fn level_of_10(r: &Rig) -> Option<bool> {
        r.pins.take().into_iter().rfind(|(pin, _)| *pin == 10).map(|(_, level)| level)
    }

    #[test]
    fn routes_follow_the_registers() {
        let r = rig();
        r.gsi.line(20).set(true);
        r.pins.take();
        r.bus.write_config(0, 0xf8, 0x68, &[10]);
        assert_eq!(level_of_10(&r), Some(true));
        r.bus.write_config(0, 0xf8, 0x68, &[0x80]);
        assert_eq!(level_of_10(&r), Some(false));
        r.lpc.program();
        assert_eq!(level_of_10(&r), Some(true));
        let state = r.lpc.save().expect("saves");
        r.lpc.reset();
        assert_eq!(level_of_10(&r), Some(false));
        r.lpc.restore(&state).expect("restores");
        assert_eq!(level_of_10(&r), Some(true));
    }

    #[test]
    fn hostile_configuration_writes() {
        let r = rig();
        for at in 0..4096 {
            for value in [0u64, 1, 0x601, 0x81, u64::MAX] {
                r.bus.write_config(0, 0xf8, at, &value.to_le_bytes());
            }
        }
        r.lpc.reset();
    }
}
