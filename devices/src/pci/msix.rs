//! MSI-X: table, pending bits and enable logic (PCI Local Bus 3.0, section 6.8.2).

use std::io;
use std::sync::Arc;

use holdfast_device::{MsiController, MsiMessage, MsiVector, StateError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{Bdf, ConfigBuilder, PciConfig, PciError, cap};

/// Bytes of a table entry.
const ENTRY: usize = 16;
/// The most vectors a table can have.
const MAX_VECTORS: u16 = 2048;
/// Message Control: MSI-X Enable.
const ENABLE: u16 = 1 << 15;
/// Message Control: Function Mask.
const FUNCTION_MASK: u16 = 1 << 14;

/// One table entry. Vector Control bit 0 is the mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Entry {
    const RESET: Self = Self { address: 0, data: 0, control: 1 };

    fn masked(&self) -> bool {
        self.control & 1 != 0
    }

    fn bytes(&self) -> [u8; ENTRY] {
        let mut b = [0; ENTRY];
        b[..8].copy_from_slice(&self.address.to_le_bytes());
        b[8..12].copy_from_slice(&self.data.to_le_bytes());
        b[12..].copy_from_slice(&self.control.to_le_bytes());
        b
    }

    fn from_bytes(b: &[u8; ENTRY]) -> Self {
        let word = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        Self { address: u64::from(word(0)) | u64::from(word(4)) << 32, data: word(8), control: word(12) & 1 }
    }
}

#[derive(Debug)]
struct Table {
    entries: Vec<Entry>,
    enabled: bool,
    function_masked: bool,
}

/// The MSI-X table of one function.
///
/// The device forwards accesses to the BAR ranges that it chose for table and pending bits, and
/// names it in [`super::PciDevice::msix`] so that the bus passes the capability's enable bits on.
#[derive(Debug)]
pub struct Msix {
    requester: u32,
    vectors: Vec<Box<dyn MsiVector>>,
    table: Mutex<Table>,
}

/// Saved table: what [`Msix::save`] gives.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MsixState {
    /// (address, data, vector control) by vector.
    entries: Vec<(u64, u32, u32)>,
    /// Vectors with a trigger that waits to be unmasked.
    pending: Vec<u16>,
}

impl Msix {
    /// A table of `vectors` (1 to 2048) entries, all masked, that signals through `controller`.
    ///
    /// # Errors
    /// The controller's error if it has no vectors left; `InvalidInput` for an impossible count.
    pub fn new(controller: &Arc<dyn MsiController>, vectors: u16, bdf: Bdf) -> io::Result<Arc<Self>> {
        if vectors == 0 || vectors > MAX_VECTORS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "MSI-X tables have 1 to 2048 vectors"));
        }
        let handles =
            (0..vectors).map(|_| Arc::clone(controller).vector()).collect::<io::Result<Vec<_>>>()?;
        let entries = vec![Entry::RESET; usize::from(vectors)];
        let table = Mutex::new(Table { entries, enabled: false, function_masked: false });
        Ok(Arc::new(Self { requester: bdf.requester(), vectors: handles, table }))
    }

    /// Adds the capability: table and pending bits live in `bar`, at these offsets (multiples of 8).
    ///
    /// # Errors
    /// [`PciError::Capabilities`] if there is no room.
    pub fn add_capability(
        &self,
        config: &mut ConfigBuilder,
        bar: u8,
        table_offset: u32,
        pba_offset: u32,
    ) -> Result<u16, PciError> {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&((self.vectors.len() - 1) as u16).to_le_bytes());
        body[2..6].copy_from_slice(&((table_offset & !7) | u32::from(bar & 7)).to_le_bytes());
        body[6..].copy_from_slice(&((pba_offset & !7) | u32::from(bar & 7)).to_le_bytes());
        config.capability(cap::MSIX, &body, &(ENABLE | FUNCTION_MASK).to_le_bytes())
    }

    /// Number of vectors.
    pub fn len(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Never true: a table has at least one vector.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// Bytes of the table.
    pub fn table_size(&self) -> u64 {
        (self.vectors.len() * ENTRY) as u64
    }

    /// Bytes of the pending bit array.
    pub fn pba_size(&self) -> u64 {
        self.vectors.len().div_ceil(64) as u64 * 8
    }

    /// True while the guest has MSI-X enabled: the interrupt pin is not used then.
    pub fn enabled(&self) -> bool {
        self.table.lock().enabled
    }

    /// One vector's handle, for its eventfd.
    pub fn vector(&self, vector: u16) -> Option<&dyn MsiVector> {
        self.vectors.get(usize::from(vector)).map(AsRef::as_ref)
    }

    /// Sends the message of `vector`, or marks it pending while masked. Vectors that do not exist and
    /// triggers while MSI-X is disabled are dropped.
    pub fn trigger(&self, vector: u16) {
        let Some(handle) = self.vector(vector) else { return };
        if !self.enabled() {
            return;
        }
        if let Err(error) = handle.trigger() {
            tracing::error!(vector, %error, "MSI-X message cannot be delivered");
        }
    }

    /// Takes over Message Control from the configuration space. The bus calls it after each write.
    pub fn config_changed(&self, config: &PciConfig) {
        let Some(at) = config.find_capability(cap::MSIX) else { return };
        let control = config.read_u16(at + 2);
        let mut table = self.table.lock();
        let (enabled, masked) = (control & ENABLE != 0, control & FUNCTION_MASK != 0);
        if (table.enabled, table.function_masked) == (enabled, masked) {
            return;
        }
        (table.enabled, table.function_masked) = (enabled, masked);
        for vector in 0..self.vectors.len() {
            self.update(&table, vector);
        }
    }

    /// Tells the controller what `vector` sends now.
    fn update(&self, table: &Table, vector: usize) {
        let (Some(entry), Some(handle)) = (table.entries.get(vector), self.vectors.get(vector)) else {
            return;
        };
        let open = table.enabled && !table.function_masked && !entry.masked();
        let message =
            open.then_some(MsiMessage { address: entry.address, data: entry.data, device: self.requester });
        if let Err(error) = handle.set(message) {
            tracing::error!(vector, %error, "MSI-X message cannot be routed");
        }
    }

    /// A read from the table. Offsets behind it read as zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = self.table.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(i as u64);
            let entry = usize::try_from(at).ok().and_then(|at| table.entries.get(at / ENTRY));
            *byte = entry.map_or(0, |e| e.bytes()[at as usize % ENTRY]);
        }
    }

    /// A write to the table: aligned accesses of 4 or 8 bytes; others are undefined and dropped.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let aligned = (data.len() == 4 || data.len() == 8) && offset.is_multiple_of(data.len() as u64);
        let Ok(at) = usize::try_from(offset) else { return };
        let mut table = self.table.lock();
        let Some(entry) = table.entries.get_mut(at / ENTRY).filter(|_| aligned) else { return };
        let mut bytes = entry.bytes();
        let lane = at % ENTRY;
        bytes[lane..lane + data.len()].copy_from_slice(data);
        *entry = Entry::from_bytes(&bytes);
        self.update(&table, at / ENTRY);
    }

    /// A read from the pending bit array. Writes to it are dropped.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(i as u64).saturating_mul(8);
            let bit = |n: u64| {
                let vector = usize::try_from(first + n).ok().and_then(|v| self.vectors.get(v));
                vector.is_some_and(|v| v.pending())
            };
            *byte = if first >= self.vectors.len() as u64 {
                0
            } else {
                (0..8).fold(0, |bits, n| bits | u8::from(bit(n)) << n)
            };
        }
    }

    /// Back to power-on: disabled, all entries masked and zero. The configuration space is reset apart.
    pub fn reset(&self) {
        let mut table = self.table.lock();
        table.entries.fill(Entry::RESET);
        (table.enabled, table.function_masked) = (false, false);
        for vector in 0..self.vectors.len() {
            self.update(&table, vector);
        }
    }

    /// The table and the pending bits.
    pub fn save(&self) -> MsixState {
        let table = self.table.lock();
        let pending = (0..self.len()).filter(|&v| self.vector(v).is_some_and(MsiVector::pending)).collect();
        let entries = table.entries.iter().map(|e| (e.address, e.data, e.control)).collect();
        MsixState { entries, pending }
    }

    /// Takes over a saved table. `config` must have been restored before.
    ///
    /// # Errors
    /// [`StateError::Invalid`] if the number of vectors differs.
    pub fn restore(&self, state: &MsixState, config: &PciConfig) -> Result<(), StateError> {
        if state.entries.len() != self.vectors.len() {
            let reason = format!("{} vectors, this device has {}", state.entries.len(), self.vectors.len());
            return Err(StateError::Invalid { kind: "msix", reason });
        }
        {
            let mut table = self.table.lock();
            for (entry, &(address, data, control)) in table.entries.iter_mut().zip(&state.entries) {
                *entry = Entry { address, data, control: control & 1 };
            }
            // Forces the update below, whatever the bits were.
            table.enabled = false;
            for vector in 0..self.vectors.len() {
                self.update(&table, vector);
            }
        }
        self.config_changed(config);
        for &vector in &state.pending {
            if let Some(Err(error)) = self.vector(vector).map(MsiVector::trigger) {
                tracing::error!(vector, %error, "pending MSI-X message cannot be delivered");
            }
        }
        Ok(())
    }
}
