//! PCI functions of a chipset whose configuration registers switch something elsewhere in the machine.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use holdfast_device::{BuildError, Device, DeviceState, StateError};

use crate::pci::{PciBus, PciConfig, PciConfigState, PciDevice, PciError, PciSlot};

/// What the configuration registers of a chipset function mean.
pub trait ChipsetRegisters: fmt::Debug + Send + Sync + 'static {
    /// Name of the function and kind of its state.
    const KIND: &'static str;
    /// The registers that [`Self::apply`] reads, as byte offsets into configuration space.
    const WATCHED: Range<u16>;

    /// Makes the machine what the registers say. Called after each change of a watched register, after reset and
    /// after a restored state.
    fn apply(&self, config: &PciConfig);
}

/// A function of the chipset: configuration space in front of `T`.
#[derive(Debug)]
pub struct ChipsetFunction<T> {
    config: Arc<PciConfig>,
    pub(super) registers: T,
}

impl<T: ChipsetRegisters> ChipsetFunction<T> {
    /// Puts the function into `slot`.
    ///
    /// # Errors
    /// [`BuildError::Config`] if the bus does not take it.
    pub(super) fn plug(
        bus: &Arc<PciBus>,
        slot: &PciSlot,
        config: Arc<PciConfig>,
        registers: T,
    ) -> Result<Arc<Self>, BuildError> {
        let function = Arc::new(Self { config, registers });
        bus.plug(slot, Arc::clone(&function) as Arc<dyn PciDevice>).map_err(|e| slot_error(T::KIND, &e))?;
        Ok(function)
    }
}

/// A chipset function that cannot be put on its bus.
pub(super) fn slot_error(id: &str, error: &PciError) -> BuildError {
    BuildError::Config { id: id.to_owned(), reason: error.to_string() }
}

impl<T: ChipsetRegisters> PciDevice for ChipsetFunction<T> {
    fn pci_name(&self) -> &str {
        T::KIND
    }

    fn config(&self) -> &Arc<PciConfig> {
        &self.config
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        let end = usize::from(offset) + data.len();
        if offset < T::WATCHED.end && end > usize::from(T::WATCHED.start) {
            self.registers.apply(&self.config);
        }
    }
}

impl<T: ChipsetRegisters> Device for ChipsetFunction<T> {
    fn id(&self) -> &str {
        T::KIND
    }

    fn reset(&self) {
        self.config.reset();
        self.registers.apply(&self.config);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(T::KIND, 1, &self.config.save())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let new: PciConfigState = state.parse(T::KIND, 1)?;
        self.config.restore(&new)?;
        self.registers.apply(&self.config);
        Ok(())
    }
}
