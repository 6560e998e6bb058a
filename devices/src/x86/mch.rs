//! The memory controller hub of a Q35 (PCI function 00:00.0): Intel 3 Series Express Chipset
//! Family data sheet, section 5.1, as far as firmware and kernels use it.
//!
//! The PAM and SMRAM registers keep what firmware writes, but 0xc0000 to 0xfffff always is RAM: the
//! machine puts the firmware's copy there at every reset, so a guest cannot tell, except by writing
//! to what it has locked itself.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Weak};

use holdfast_device::{BuildContext, BuildError, Bus, BusDevice};
use parking_lot::Mutex;

use super::chipset::{ChipsetFunction, ChipsetRegisters, slot_error};
use crate::pci::{ConfigBuilder, Ecam, Identity, PciBus, PciConfig, PciDevice};

const KIND: &str = "q35-mch";
const PCIEXBAR: u16 = 0x60;
const PAM0: u16 = 0x90;
const SMRAM: u16 = 0x9d;

/// Where firmware and tables put the configuration window: base and length in bytes.
pub const ECAM_WINDOW: (u64, u64) = (0xb000_0000, 256 << 20);

/// The host bridge.
pub type Mch = ChipsetFunction<MchRegisters>;

/// What the host bridge's registers switch.
pub struct MchRegisters {
    mmio: Arc<Bus>,
    /// The bus holds this function, so this does not hold the bus.
    bus: Weak<PciBus>,
    /// Where the configuration window is attached.
    window: Mutex<Option<u64>>,
}

impl fmt::Debug for MchRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MchRegisters").field("window", &*self.window.lock()).finish_non_exhaustive()
    }
}

impl Mch {
    /// Builds the bridge as 00:00.0 of `bus`.
    ///
    /// # Errors
    /// [`BuildError::Config`] if the slot is taken.
    pub fn build(bus: &Arc<PciBus>, context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        let slot = bus.reserve(Some(0)).map_err(|e| slot_error(KIND, &e))?;
        let identity = Identity {
            vendor: 0x8086,
            device: 0x29c0,
            class: 0x06_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            ..Identity::default()
        };
        let mut builder = ConfigBuilder::new(identity);
        builder
            // Enable, length, base bits 26 to 35.
            .writable(PCIEXBAR, &0x0000_000f_fc00_0007u64.to_le_bytes())
            .writable(PAM0, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33])
            .set(SMRAM, &[0x02])
            .writable(SMRAM, &[0x78]);
        let registers = MchRegisters {
            mmio: Arc::clone(&context.mmio),
            bus: Arc::downgrade(bus),
            window: Mutex::new(None),
        };
        Self::plug(bus, &slot, builder.build(), registers)
    }

    /// Programs PCIEXBAR as firmware does, for kernels that start without any.
    pub fn enable_ecam(&self) {
        self.write_config(PCIEXBAR, &(ECAM_WINDOW.0 | 1).to_le_bytes());
    }
}

impl ChipsetRegisters for MchRegisters {
    const KIND: &'static str = KIND;
    const WATCHED: Range<u16> = PCIEXBAR..PCIEXBAR + 8;

    /// Attaches the window where PCIEXBAR says.
    fn apply(&self, config: &PciConfig) {
        let mut raw = [0; 8];
        config.read(PCIEXBAR, &mut raw);
        let value = u64::from_le_bytes(raw);
        // Length: 256, 128 or 64 MiB; 3 is reserved.
        let len = match value >> 1 & 3 {
            0 => 256 << 20,
            1 => 128 << 20,
            2 => 64u64 << 20,
            _ => 0,
        };
        let wanted = (value & 1 != 0 && len != 0).then(|| value & 0xf_fc00_0000 & !(len - 1));
        let mut window = self.window.lock();
        // A change of length alone is a move, too.
        if let Some(old) = window.take()
            && let Err(error) = self.mmio.detach(old)
        {
            tracing::error!(%error, "ECAM window was not attached");
        }
        let (Some(base), Some(bus)) = (wanted, self.bus.upgrade()) else { return };
        match self.mmio.attach(base, len, "ecam", Ecam::new(bus) as Arc<dyn BusDevice>) {
            Ok(()) => *window = Some(base),
            Err(error) => tracing::warn!(%error, "guest moves the ECAM window into the way"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lpc::tests::root_bus;
    use super::*;
    use holdfast_device::Device;

    fn mch() -> (Arc<Mch>, Arc<PciBus>, BuildContext) {
        let (bus, context, _) = root_bus();
        (Mch::build(&bus, &context).expect("build"), bus, context)
    }

    #[test]
    fn the_configuration_window_moves_with_pciexbar() {
        let (mch, _bus, c) = mch();
        let mut id = [0; 4];
        assert!(!c.mmio.read(None, ECAM_WINDOW.0, &mut id));
        mch.enable_ecam();
        assert!(c.mmio.read(None, ECAM_WINDOW.0, &mut id));
        assert_eq!(id, [0x86, 0x80, 0xc0, 0x29]);
        // Through the window itself: 64 MiB at 0xe0000000.
        c.mmio.write(Some(0), ECAM_WINDOW.0 + 0x60, &0xe000_0005u32.to_le_bytes());
        assert!(!c.mmio.read(None, ECAM_WINDOW.0, &mut id));
        assert!(c.mmio.read(None, 0xe000_0000, &mut id));
        assert!(!c.mmio.read(None, 0xe400_0000, &mut id));
        let state = mch.save().expect("saves");
        mch.reset();
        assert!(!c.mmio.read(None, 0xe000_0000, &mut id));
        mch.restore(&state).expect("restores");
        assert!(c.mmio.read(None, 0xe000_0000, &mut id));
    }

    #[test]
    fn pam_registers_keep_what_firmware_writes() {
        let (_, bus, _) = mch();
        bus.write_config(0, 0, 0x90, &[0xff; 4]);
        let mut pam = [0; 4];
        bus.read_config(0, 0, 0x90, &mut pam);
        assert_eq!(pam, [0x30, 0x33, 0x33, 0x33]);
    }

    #[test]
    fn hostile_configuration_writes() {
        let (mch, bus, _) = mch();
        for at in 0..4096 {
            for value in [0u64, 1, 7, u64::MAX, 0xffff_ffff_0000_0001] {
                bus.write_config(0, 0, at, &value.to_le_bytes());
            }
        }
        mch.reset();
    }
}
