//! PCI Express root ports into which one device can be plugged while the guest runs (PCI Express base 4.0, sections 6.7 and 7.5.3).
//!
//! A device that comes is there at once: the port says that a card is present and its link up. One that is to go is announced by the
//! attention button; the guest's driver lets go of it and switches the slot's power off, and then it may be taken out.

use std::sync::Arc;

use holdfast_device::{
    Access, BuildContext, BuildError, Device, DeviceEvent, DeviceState, StateError, SystemSink,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{
    BarKind, ConfigBuilder, Identity, Msix, MsixState, PciBus, PciConfig, PciConfigState, PciDevice,
    PciError, cap, reg,
};

/// Offsets of the registers of a bridge's header.
mod bridge {
    pub(super) const SECONDARY: u16 = 0x19;
    pub(super) const BUSES: u16 = 0x18;
    pub(super) const SECONDARY_STATUS: u16 = 0x1e;
    pub(super) const MEMORY: u16 = 0x20;
    pub(super) const PREFETCHABLE: u16 = 0x24;
    pub(super) const UPPER: u16 = 0x28;
    pub(super) const CONTROL: u16 = 0x3e;
}

/// Offsets in the PCI Express capability.
mod express {
    pub(super) const LINK_STATUS: u16 = 0x12;
    pub(super) const SLOT_CONTROL: u16 = 0x18;
    pub(super) const SLOT_STATUS: u16 = 0x1a;
}

/// Link Status: speed 2.5 GT/s, one lane, and whether the link is up.
const LINK: u16 = 0x0011;
const LINK_UP: u16 = 1 << 13;

/// Slot Control.
mod control {
    pub(super) const HOT_PLUG_INTERRUPT: u16 = 1 << 5;
    pub(super) const POWER_INDICATOR: u16 = 3 << 8;
    pub(super) const POWER_INDICATOR_BLINKS: u16 = 2 << 8;
    pub(super) const POWER_INDICATOR_ON: u16 = 1 << 8;
    pub(super) const POWER_OFF: u16 = 1 << 10;
    pub(super) const ATTENTION_INDICATOR_OFF: u16 = 3 << 6;
    pub(super) const WRITABLE: u16 = 0x17ff;
}

/// Slot Status.
mod status {
    pub(super) const BUTTON: u16 = 1 << 0;
    pub(super) const PRESENCE_CHANGED: u16 = 1 << 3;
    pub(super) const PRESENT: u16 = 1 << 6;
    pub(super) const LINK_CHANGED: u16 = 1 << 8;
    /// What is cleared by writing one.
    pub(super) const EVENTS: u16 = 0x011f;
}

const KIND: &str = "pcie-root-port";
const BAR_SIZE: u64 = 0x1000;
const PBA: u64 = 0x800;

/// What became of a wish to take the device out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// The guest was asked; [`DeviceEvent::Ejected`] tells when it has let go.
    Asked,
    /// The guest does not use it: it may be taken out at once.
    Now,
    /// The guest was asked before, and is at it.
    UnderWay,
}

#[derive(Debug, Default)]
struct Slot {
    /// Id of the device that is plugged in.
    device: Option<String>,
    /// It is to be taken out.
    leaving: bool,
    /// The interrupt's level.
    raised: bool,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct PortState {
    config: PciConfigState,
    #[serde(default)]
    msix: Option<MsixState>,
    #[serde(default)]
    leaving: bool,
}

/// A root port.
#[derive(Debug)]
pub struct RootPort {
    id: String,
    devfn: u8,
    config: Arc<PciConfig>,
    msix: Option<Arc<Msix>>,
    /// Offset of the PCI Express capability.
    express: u16,
    slot: Mutex<Slot>,
    system: Arc<dyn SystemSink>,
}

fn express_capability(number: u8) -> (Vec<u8>, Vec<u8>) {
    let mut body = vec![0u8; 58];
    let mut writable = vec![0u8; 58];
    let put = |space: &mut Vec<u8>, at: usize, bytes: &[u8]| {
        // Offsets count from the capability's id.
        for (to, from) in space.iter_mut().skip(at - 2).zip(bytes) {
            *to = *from;
        }
    };
    // Version 2, root port, with a slot.
    put(&mut body, 0x02, &0x0142u16.to_le_bytes());
    // Role-based error reporting.
    put(&mut body, 0x04, &0x8000u32.to_le_bytes());
    put(&mut writable, 0x08, &0x70efu16.to_le_bytes());
    // 2.5 GT/s, one lane, says when the link is up.
    put(&mut body, 0x0c, &(0x0010_0011u32 | u32::from(number) << 24).to_le_bytes());
    put(&mut writable, 0x10, &0x00d8u16.to_le_bytes());
    put(&mut body, 0x12, &LINK.to_le_bytes());
    // Button, power controller, indicators, surprise, hot-plug; commands complete at once and say nothing.
    put(&mut body, 0x14, &(0x0004_007bu32 | u32::from(number) << 19).to_le_bytes());
    put(&mut body, 0x18, &slot_control(false).to_le_bytes());
    put(&mut writable, 0x18, &control::WRITABLE.to_le_bytes());
    put(&mut writable, 0x1c, &0x001fu16.to_le_bytes());
    put(&mut body, 0x2c, &2u32.to_le_bytes());
    put(&mut body, 0x30, &1u16.to_le_bytes());
    (body, writable)
}

/// Slot Control after a reset: power and its indicator are on if there is a device.
fn slot_control(occupied: bool) -> u16 {
    let power =
        if occupied { control::POWER_INDICATOR_ON } else { control::POWER_INDICATOR | control::POWER_OFF };
    control::ATTENTION_INDICATOR_OFF | power
}

impl RootPort {
    /// Plugs a root port with slot number `number` (1 to 31) into device `device` of the bus.
    ///
    /// # Errors
    /// [`BuildError`] if the place is taken or the host has no interrupt left.
    pub fn build(
        id: &str,
        (bus, device, number): (&Arc<PciBus>, u8, u8),
        context: &BuildContext,
    ) -> Result<Arc<Self>, BuildError> {
        let wrong = |e: PciError| BuildError::Config { id: id.to_owned(), reason: e.to_string() };
        let host =
            |source| BuildError::Host { id: id.to_owned(), what: "it has no interrupt".into(), source };
        let place = bus.reserve(Some(device)).map_err(wrong)?;
        // Red Hat's generic root port, which guests know to need no driver of its own.
        let identity = Identity { vendor: 0x1b36, device: 0x000c, class: 0x06_0400, ..Identity::default() };
        let mut config = ConfigBuilder::new(identity);
        config.set(reg::HEADER_TYPE, &[1]);
        config.writable(bridge::BUSES, &[0xff; 3]);
        config.write_one_to_clear(bridge::SECONDARY_STATUS, &0xf900u16.to_le_bytes());
        config.writable(bridge::MEMORY, &[0xf0, 0xff, 0xf0, 0xff]);
        // No window for ports; the prefetchable one is 64 bits wide.
        config.set(bridge::PREFETCHABLE, &[1, 0, 1, 0]);
        config.writable(bridge::PREFETCHABLE, &[0xf0, 0xff, 0xf0, 0xff]);
        config.writable(bridge::UPPER, &[0xff; 8]);
        config.writable(bridge::CONTROL, &0x0043u16.to_le_bytes());
        config.bar(0, BarKind::Mem32, BAR_SIZE).map_err(wrong)?;
        config.intx(place.intx(1));
        let msix = match &context.msi {
            Some(msi) => {
                let msix = Msix::new(msi, 1, place.bdf()).map_err(host)?;
                msix.add_capability(&mut config, 0, 0, PBA as u32).map_err(wrong)?;
                Some(msix)
            }
            None => None,
        };
        let (body, writable) = express_capability(number);
        let express = config.capability(cap::EXPRESS, &body, &writable).map_err(wrong)?;
        config.write_one_to_clear(express + express::SLOT_STATUS, &status::EVENTS.to_le_bytes());
        let port = Arc::new(Self {
            id: id.to_owned(),
            devfn: place.bdf().devfn(),
            config: config.build(),
            msix,
            express,
            slot: Mutex::default(),
            system: Arc::clone(&context.system),
        });
        bus.plug(&place, Arc::clone(&port) as Arc<dyn PciDevice>).map_err(wrong)?;
        Ok(port)
    }

    /// Its name: what `bus=` names.
    pub fn name(&self) -> &str {
        &self.id
    }

    /// Its place on the root bus, which is also that of the bus behind it.
    pub fn devfn(&self) -> u8 {
        self.devfn
    }

    /// The device that is plugged in.
    pub fn device(&self) -> Option<String> {
        self.slot.lock().device.clone()
    }

    fn register(&self, at: u16) -> u16 {
        self.config.read_u16(self.express + at)
    }

    fn set_register(&self, at: u16, value: u16) {
        self.config.set(self.express + at, &value.to_le_bytes());
    }

    /// Shows whether there is a device.
    fn show(&self, present: bool, events: u16) {
        let sta = self.register(express::SLOT_STATUS) & !status::PRESENT;
        let here = if present { status::PRESENT } else { 0 };
        self.set_register(express::SLOT_STATUS, sta | here | events);
        self.set_register(express::LINK_STATUS, if present { LINK | LINK_UP } else { LINK });
    }

    /// A device was plugged into the bus behind the port. Before the guest runs, power is on at once.
    pub fn plugged(&self, device: &str, running: bool) {
        let mut slot = self.slot.lock();
        slot.device = Some(device.to_owned());
        slot.leaving = false;
        let events = if running { status::PRESENCE_CHANGED | status::LINK_CHANGED } else { 0 };
        if !running {
            self.set_register(express::SLOT_CONTROL, slot_control(true));
        }
        self.show(true, events);
        self.signal(&mut slot);
    }

    /// True if a driver in the guest hears of what happens at the port.
    pub fn is_driven(&self) -> bool {
        self.register(express::SLOT_CONTROL) & control::HOT_PLUG_INTERRUPT != 0
    }

    /// Asks the guest to let go of the device.
    pub fn remove(&self) -> Removal {
        let mut slot = self.slot.lock();
        let ctl = self.register(express::SLOT_CONTROL);
        let indicator = ctl & control::POWER_INDICATOR;
        if ctl & control::POWER_OFF != 0 && indicator == control::POWER_INDICATOR {
            return Removal::Now;
        }
        if indicator == control::POWER_INDICATOR_BLINKS || slot.leaving {
            return Removal::UnderWay;
        }
        slot.leaving = true;
        let sta = self.register(express::SLOT_STATUS);
        self.set_register(express::SLOT_STATUS, sta | status::BUTTON);
        self.signal(&mut slot);
        Removal::Asked
    }

    /// The device was taken out of the bus behind the port.
    pub fn emptied(&self) {
        let mut slot = self.slot.lock();
        if slot.device.take().is_some() {
            slot.leaving = false;
            self.show(false, status::PRESENCE_CHANGED | status::LINK_CHANGED);
            self.signal(&mut slot);
        }
    }

    /// Raises the interrupt while an event is there that the guest wants to hear of.
    fn signal(&self, slot: &mut Slot) {
        let (ctl, sta) = (self.register(express::SLOT_CONTROL), self.register(express::SLOT_STATUS));
        // Enable bits are where the events' are, but for that of the link.
        let link = if ctl & 1 << 12 != 0 { status::LINK_CHANGED } else { 0 };
        let pending =
            ctl & control::HOT_PLUG_INTERRUPT != 0 && sta & ((ctl & 0x1f) | link) & status::EVENTS != 0;
        let rises = pending && !slot.raised;
        slot.raised = pending;
        match &self.msix {
            Some(msix) if msix.enabled() => {
                if rises {
                    msix.trigger(0);
                }
            }
            _ => self.config.set_intx(pending),
        }
    }

    /// The guest has written Slot Control.
    fn commanded(&self, before: u16) {
        const OFF: u16 = control::POWER_OFF | control::POWER_INDICATOR;
        let now = self.register(express::SLOT_CONTROL);
        let mut slot = self.slot.lock();
        if now & OFF == OFF
            && before & OFF != OFF
            && let Some(device) = slot.device.clone()
        {
            self.show(false, status::PRESENCE_CHANGED | status::LINK_CHANGED);
            self.system.device_event(&device, DeviceEvent::Ejected);
        }
        self.signal(&mut slot);
    }
}

impl PciDevice for RootPort {
    fn pci_name(&self) -> &str {
        &self.id
    }

    fn config(&self) -> &Arc<PciConfig> {
        &self.config
    }

    fn msix(&self) -> Option<&Arc<Msix>> {
        self.msix.as_ref()
    }

    fn secondary_bus(&self) -> Option<u8> {
        let mut number = [0];
        self.config.read(bridge::SECONDARY, &mut number);
        let [number] = number;
        let present = self.register(express::SLOT_STATUS) & status::PRESENT != 0;
        (number != 0 && present).then_some(number)
    }

    fn read_bar(&self, _bar: u8, access: Access, data: &mut [u8]) {
        match &self.msix {
            Some(msix) if access.offset < PBA => msix.read_table(access.offset, data),
            Some(msix) => msix.read_pba(access.offset - PBA, data),
            None => data.fill(0),
        }
    }

    fn write_bar(&self, _bar: u8, access: Access, data: &[u8]) {
        if let (Some(msix), 0..PBA) = (&self.msix, access.offset) {
            msix.write_table(access.offset, data);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let before = self.register(express::SLOT_CONTROL);
        self.config.write(offset, data);
        let (from, to) = (usize::from(offset), usize::from(offset) + data.len());
        let slot = usize::from(self.express + express::SLOT_CONTROL);
        if from < slot + 4 && to > slot {
            self.commanded(before);
        }
    }
}

impl Device for RootPort {
    fn id(&self) -> &str {
        &self.id
    }

    fn reset(&self) {
        if let Some(msix) = &self.msix {
            msix.reset();
        }
        self.config.reset();
        let mut slot = self.slot.lock();
        slot.raised = false;
        let leaving = std::mem::take(&mut slot.leaving);
        let device = slot.device.clone();
        self.set_register(express::SLOT_CONTROL, slot_control(device.is_some()));
        self.show(device.is_some(), 0);
        // A guest that was reset has let go of everything.
        if let (true, Some(device)) = (leaving, device) {
            self.system.device_event(&device, DeviceEvent::Ejected);
        }
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let state = PortState {
            config: self.config.save(),
            msix: self.msix.as_ref().map(|m| m.save()),
            leaving: self.slot.lock().leaving,
        };
        DeviceState::new(KIND, 1, &state)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: PortState = state.parse(KIND, 1)?;
        self.config.restore(&saved.config)?;
        let mut slot = self.slot.lock();
        slot.leaving = saved.leaving;
        // Read-only bits come back as they were built, but these say whether the guest has let go of the device.
        let at = usize::from(self.express + express::SLOT_STATUS);
        let present = saved.config.regs.get(at).is_some_and(|low| u16::from(*low) & status::PRESENT != 0);
        self.show(present && slot.device.is_some(), 0);
        drop(slot);
        match (&self.msix, saved.msix) {
            (Some(msix), Some(state)) => msix.restore(&state, &self.config),
            (None, None) => Ok(()),
            _ => {
                let reason = "only one side has message-signalled interrupts".to_owned();
                Err(StateError::Invalid { kind: KIND, reason })
            }
        }
    }
}
