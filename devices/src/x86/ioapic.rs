//! The I/O APIC: Intel 82093AA data sheet, and the EOI register of the ICH9's (ICH9 data sheet,
//! section 13.5.5).
//!
//! It delivers by messages, composed from the redirection entries as in PCI 3.0 section 6.8, so it
//! works with any local APIC that takes those. Line polarity is not modelled: an input is asserted
//! or it is not, and the polarity bit is kept for the guest to read.

use std::fmt;
use std::sync::Arc;

use holdfast_device::{
    Access, BuildContext, BuildError, BusDevice, Device, DeviceState, IrqSink, MsiController, MsiMessage,
    StateError,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{attach, read_reg};

/// Where the IOAPIC of a PC is.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Length of its window in bytes.
pub const IOAPIC_LEN: u64 = 0x1000;
/// Number of inputs.
pub const IOAPIC_PINS: usize = 24;

const KIND: &str = "ioapic";

const REGSEL: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

const INDEX_ID: u8 = 0x00;
const INDEX_VERSION: u8 = 0x01;
const INDEX_ARBITRATION: u8 = 0x02;
const INDEX_TABLE: u8 = 0x10;

const VECTOR: u64 = 0xff;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Bits that the guest cannot write: delivery status and remote IRR.
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;
/// Vector, modes, polarity, trigger, mask and destination.
const WRITABLE: u64 = 0xff00_0000_0001_ffff & !READ_ONLY;

/// Delivery modes that never are level triggered whatever the entry says (SDM 11.12.3).
const MODE_SMI: u64 = 2;
const MODE_NMI: u64 = 4;
const MODE_INIT: u64 = 5;
const MODE_EXTINT: u64 = 7;

/// Told which message each input sends, or `None` while it is masked, whenever that changes.
pub type IoApicRoutes = Arc<dyn Fn(&[Option<MsiMessage>; IOAPIC_PINS]) + Send + Sync>;

/// How the IOAPIC is to be.
pub struct IoApicConfig {
    /// 0x11 (82093AA: no EOI register) or 0x20 (ICH: with EOI register).
    pub version: u8,
    /// APIC ID after reset, 0 to 15.
    pub id: u8,
    /// Where messages go.
    pub msi: Arc<dyn MsiController>,
    /// Who needs to know the routes; called with the IOAPIC locked.
    pub routes: Option<IoApicRoutes>,
}

impl fmt::Debug for IoApicConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoApicConfig").field("version", &self.version).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct State {
    id: u8,
    select: u8,
    table: [u64; IOAPIC_PINS],
    /// Level of each input.
    lines: u32,
    /// Edges that wait for delivery.
    edges: u32,
}

impl Default for State {
    fn default() -> Self {
        Self { id: 0, select: 0, table: [MASKED; IOAPIC_PINS], lines: 0, edges: 0 }
    }
}

/// The I/O APIC.
pub struct IoApic {
    config: IoApicConfig,
    state: Mutex<State>,
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoApic").field("state", &*self.state.lock()).finish_non_exhaustive()
    }
}

fn is_level(entry: u64) -> bool {
    let mode = entry >> 8 & 7;
    entry & LEVEL != 0 && !matches!(mode, MODE_SMI | MODE_NMI | MODE_INIT | MODE_EXTINT)
}

/// The message that a redirection entry stands for.
fn message(entry: u64) -> MsiMessage {
    let destination = entry >> 56;
    let logical = entry >> 11 & 1;
    let mode = entry >> 8 & 7;
    let level = u64::from(is_level(entry));
    // Bit 14 is "assert", which level-triggered messages need; it means nothing for edges.
    let data = entry & VECTOR | mode << 8 | 1 << 14 | level << 15;
    MsiMessage { address: 0xfee0_0000 | destination << 12 | logical << 2, data: data as u32, device: 0 }
}

impl IoApic {
    /// Builds the IOAPIC at [`IOAPIC_BASE`].
    ///
    /// # Errors
    /// [`BuildError`] if the version is unknown or the window is taken.
    pub fn build(config: IoApicConfig, context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        if !matches!(config.version, 0x11 | 0x20) {
            let reason = format!("version {:#x} is unknown; 0x11 and 0x20 are", config.version);
            return Err(BuildError::Config { id: KIND.into(), reason });
        }
        let state = State { id: config.id & 0xf, ..State::default() };
        let ioapic = Arc::new(Self { config, state: Mutex::new(state) });
        attach(&context.mmio, KIND, IOAPIC_BASE, IOAPIC_LEN, Arc::clone(&ioapic) as Arc<dyn BusDevice>)?;
        Ok(ioapic)
    }

    /// An EOI for `vector` was broadcast by a local APIC: inputs that wait for it may fire again.
    pub fn eoi(&self, vector: u8) {
        let mut s = self.state.lock();
        for pin in 0..IOAPIC_PINS {
            let waits = s.table.get_mut(pin).is_some_and(|e| {
                let hit = *e & VECTOR == u64::from(vector) && *e & REMOTE_IRR != 0;
                if hit {
                    *e &= !REMOTE_IRR;
                }
                hit
            });
            if waits {
                self.service(&mut s, pin);
            }
        }
    }

    /// Delivers what input `pin` has to say, if it may.
    fn service(&self, s: &mut State, pin: usize) {
        let bit = 1u32 << pin;
        let Some(entry) = s.table.get_mut(pin) else { return };
        if *entry & MASKED != 0 {
            return;
        }
        if is_level(*entry) {
            if s.lines & bit == 0 || *entry & REMOTE_IRR != 0 {
                return;
            }
            *entry |= REMOTE_IRR;
        } else {
            if s.edges & bit == 0 {
                return;
            }
            s.edges &= !bit;
        }
        if let Err(error) = self.config.msi.send(message(*entry)) {
            tracing::warn!(pin, %error, "IOAPIC message is lost");
        }
    }

    fn routes_changed(&self, s: &State) {
        if let Some(told) = &self.config.routes {
            told(&s.table.map(|entry| (entry & MASKED == 0).then(|| message(entry))));
        }
    }

    fn read_index(&self, s: &State) -> u32 {
        match s.select {
            INDEX_ID | INDEX_ARBITRATION => u32::from(s.id) << 24,
            INDEX_VERSION => u32::from(self.config.version) | (IOAPIC_PINS as u32 - 1) << 16,
            index => {
                let at = usize::from(index.wrapping_sub(INDEX_TABLE));
                let entry = s.table.get(at / 2).copied().unwrap_or(0);
                (if at % 2 == 0 { entry } else { entry >> 32 }) as u32
            }
        }
    }

    fn write_index(&self, s: &mut State, value: u32) {
        if s.select == INDEX_ID {
            s.id = (value >> 24 & 0xf) as u8;
            return;
        }
        let at = usize::from(s.select.wrapping_sub(INDEX_TABLE));
        let pin = at / 2;
        let Some(entry) = s.table.get_mut(pin) else { return };
        let old = *entry;
        let written = if at % 2 == 0 {
            old & !0xffff_ffff | u64::from(value)
        } else {
            old & 0xffff_ffff | u64::from(value) << 32
        };
        *entry = written & WRITABLE | old & READ_ONLY;
        if !is_level(*entry) {
            // Guests without an EOI register lower remote IRR by passing through edge mode.
            *entry &= !REMOTE_IRR;
        }
        let changed = *entry & !READ_ONLY != old & !READ_ONLY;
        if changed {
            // Routes first: the EOI of what is delivered next must already be known to matter.
            self.routes_changed(s);
        }
        self.service(s, pin);
    }
}

impl IrqSink for IoApic {
    fn set_level(&self, pin: u32, level: bool) {
        let mut s = self.state.lock();
        let index = pin as usize;
        let Some(&entry) = s.table.get(index) else { return };
        let bit = 1u32 << pin;
        let was = s.lines & bit != 0;
        if level {
            s.lines |= bit;
            // 82093AA section 3.4.2: edges are not kept while the input is masked.
            if !was && !is_level(entry) && entry & MASKED == 0 {
                s.edges |= bit;
            }
            self.service(&mut s, index);
        } else {
            s.lines &= !bit;
        }
    }
}

impl BusDevice for IoApic {
    fn read(&self, access: Access, data: &mut [u8]) {
        let s = self.state.lock();
        let value = match access.offset & !3 {
            REGSEL => u32::from(s.select),
            WINDOW => self.read_index(&s),
            _ => 0,
        };
        read_reg(u64::from(value), access.offset & 3, data);
    }

    fn write(&self, access: Access, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        match access.offset {
            REGSEL => self.state.lock().select = value as u8,
            // Only whole registers can be written; parts of one have no defined meaning.
            WINDOW if data.len() >= 4 => self.write_index(&mut self.state.lock(), value),
            EOI if self.config.version >= 0x20 => self.eoi(value as u8),
            _ => {}
        }
    }
}

impl Device for IoApic {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {
        let mut s = self.state.lock();
        // The devices that drive the inputs are reset too, each lowering its own.
        *s = State { id: self.config.id & 0xf, lines: s.lines, ..State::default() };
        self.routes_changed(&s);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(KIND, 1, &*self.state.lock())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let new: State = state.parse(KIND, 1)?;
        let mut s = self.state.lock();
        *s = new;
        self.routes_changed(&s);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Messages, context, hostile, readl, writel};
    use super::*;

    fn ioapic(version: u8) -> (Arc<IoApic>, Arc<Messages>) {
        let msi = Arc::new(Messages::default());
        let config =
            IoApicConfig { version, id: 0, msi: Arc::clone(&msi) as Arc<dyn MsiController>, routes: None };
        (IoApic::build(config, &context().0).expect("build"), msi)
    }

    fn set(io: &IoApic, index: u32, value: u32) {
        writel(io, 0, index);
        writel(io, 0x10, value);
    }

    fn get(io: &IoApic, index: u32) -> u32 {
        writel(io, 0, index);
        readl(io, 0x10)
    }

    #[test]
    fn version_and_id() {
        let (io, _) = ioapic(0x20);
        assert_eq!(get(&io, 1), 0x0017_0020);
        set(&io, 0, 0xff00_0000);
        assert_eq!(get(&io, 0), 0x0f00_0000);
        let config = IoApicConfig { version: 3, id: 0, msi: Arc::new(Messages::default()), routes: None };
        assert!(matches!(IoApic::build(config, &context().0), Err(BuildError::Config { .. })));
    }

    #[test]
    fn an_edge_is_delivered_once_and_dropped_while_masked() {
        let (io, msi) = ioapic(0x11);
        io.set_level(4, true);
        io.set_level(4, false);
        set(&io, 0x18, 0x31);
        assert!(msi.take().is_empty(), "an edge while masked is gone");
        set(&io, 0x19, 0x0500_0000);
        io.set_level(4, true);
        io.set_level(4, true);
        let sent = msi.take();
        assert_eq!(sent, [MsiMessage { address: 0xfee0_5000, data: 0x4031, device: 0 }]);
        io.set_level(4, false);
        io.set_level(4, true);
        assert_eq!(msi.take().len(), 1);
    }

    #[test]
    fn a_level_waits_for_its_eoi() {
        let (io, msi) = ioapic(0x20);
        set(&io, 0x10 + 2 * 16, 0x8041);
        io.set_level(16, true);
        assert_eq!(msi.take()[0].data, 0xc041);
        assert_eq!(get(&io, 0x10 + 2 * 16) & 0x4000, 0x4000, "remote IRR");
        io.set_level(16, false);
        io.set_level(16, true);
        assert!(msi.take().is_empty(), "no second message before the EOI");
        io.eoi(0x42);
        assert!(msi.take().is_empty(), "another vector's EOI");
        io.eoi(0x41);
        assert_eq!(msi.take().len(), 1, "still asserted: again");
        io.set_level(16, false);
        writel(&*io, 0x40, 0x41);
        assert!(msi.take().is_empty());
        assert_eq!(get(&io, 0x10 + 2 * 16) & 0x4000, 0);
    }

    #[test]
    fn version_11_has_no_eoi_register_and_edge_mode_lowers_remote_irr() {
        let (io, msi) = ioapic(0x11);
        set(&io, 0x10 + 2 * 16, 0x8041);
        io.set_level(16, true);
        writel(&*io, 0x40, 0x41);
        assert_eq!(get(&io, 0x10 + 2 * 16) & 0x4000, 0x4000, "no EOI register");
        msi.take();
        set(&io, 0x10 + 2 * 16, 0x1_0041);
        set(&io, 0x10 + 2 * 16, 0x8041);
        assert_eq!(msi.take().len(), 1, "fires again after the detour through edge mode");
    }

    #[test]
    fn unmasking_a_raised_level_delivers_it_and_nmi_is_an_edge() {
        let (io, msi) = ioapic(0x11);
        io.set_level(10, true);
        set(&io, 0x10 + 20, 0x8850);
        assert_eq!(msi.take(), [MsiMessage { address: 0xfee0_0004, data: 0xc050, device: 0 }]);
        set(&io, 0x10 + 22, 0x8400);
        io.set_level(11, true);
        assert_eq!(msi.take()[0].data, 0x4400);
        assert_eq!(get(&io, 0x10 + 22) & 0x4000, 0);
    }

    #[test]
    fn routes_follow_the_entries() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&seen);
        let routes: IoApicRoutes = Arc::new(move |r| told.lock().push(r[3]));
        let config =
            IoApicConfig { version: 0x20, id: 0, msi: Arc::new(Messages::default()), routes: Some(routes) };
        let io = IoApic::build(config, &context().0).expect("build");
        set(&io, 0x16, 0x8033);
        assert_eq!(seen.lock().pop().flatten().map(|m| m.data), Some(0xc033));
        set(&io, 0x16, 0x1_8033);
        assert_eq!(seen.lock().pop(), Some(None));
        set(&io, 0x16, 0x1_8033);
        assert_eq!(seen.lock().len(), 0, "nothing changed, nobody told");
    }

    #[test]
    fn state_survives_and_reset_masks() {
        let (io, _) = ioapic(0x20);
        set(&io, 0x10 + 2 * 16, 0x8041);
        io.set_level(16, true);
        let state = io.save().expect("saves");
        let (other, msi) = ioapic(0x20);
        other.restore(&state).expect("restores");
        assert_eq!(other.save().expect("saves"), state);
        other.eoi(0x41);
        assert_eq!(msi.take().len(), 1);
        other.reset();
        assert_eq!(get(&other, 0x10), 0x1_0000);
        assert!(other.restore(&DeviceState::new("pit", 1, &0).expect("state")).is_err());
    }

    #[test]
    fn survives_hostile_accesses() {
        let (io, _) = ioapic(0x20);
        for index in [0, 1, 2, 3, 0x10, 0x3f, 0x40, 0xff] {
            set(&io, index, u32::MAX);
            get(&io, index);
        }
        io.set_level(24, true);
        io.set_level(u32::MAX, true);
        hostile(&*io, IOAPIC_BASE, 0x48);
    }
}
