//! Virtio over PCI, modern devices only (virtio 1.2 section 4.1).
//!
//! All register structures, the MSI-X table and its pending bits share one 64-bit memory BAR, a page
//! each, so that a guest may map them with different rights.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use holdfast_device::{
    Access, BuildContext, BuildError, Device, DeviceState, IoEvents, MsiController, StateError, bus::Bus,
};
use holdfast_devices::pci::{
    BarKind, Bdf, ConfigBuilder, Identity, Msix, MsixState, PciBus, PciConfig, PciConfigState, PciDevice,
    PciError, PciSlot, cap,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::common::{Common, Flags};
use crate::device::{Interrupt, VirtioDevice, kind, read_bytes};
use crate::shared_memory::SharedMemory;

/// The BAR that holds everything. It takes the next one as well.
const BAR: u8 = 4;
const BAR_SIZE: u64 = 0x8000;
/// The BAR of shared memory, which takes the next one as well.
const SHARED_BAR: u8 = 2;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PBA: u64 = 0x6000;
const PAGE: u64 = 0x1000;
/// Bytes of the common configuration structure.
const COMMON_LEN: usize = 0x40;
/// Bytes between two queues' notification addresses.
const NOTIFY_MULTIPLIER: u32 = 4;

/// `cfg_type` of the capabilities (section 4.1.4).
mod cfg_type {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI: u8 = 5;
    pub(super) const SHARED_MEMORY: u8 = 8;
}

/// Offset of `pci_cfg_data` in its capability.
const PCI_CFG_DATA: u16 = 16;

const VENDOR: u16 = 0x1af4;
/// Added to the virtio device type to give the PCI device id.
const FIRST_DEVICE: u16 = 0x1040;
/// "No vector" (section 4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

const KIND: &str = "virtio-pci";
const STATE_VERSION: u32 = 1;

/// MSI-X where the guest has enabled it, the interrupt pin otherwise.
#[derive(Debug)]
struct PciInterrupt {
    flags: Arc<Flags>,
    config: Arc<PciConfig>,
    msix: Option<Arc<Msix>>,
    isr: Mutex<u8>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl PciInterrupt {
    fn raise(&self, cause: u8, vector: &AtomicU16) {
        if let Some(msix) = &self.msix
            && msix.enabled()
        {
            return msix.trigger(vector.load(Ordering::Acquire));
        }
        // Cause and pin change together; interrupt controllers do not call back.
        let mut isr = self.isr.lock();
        *isr |= cause;
        self.config.set_intx(true);
    }

    /// Reading the ISR acknowledges the interrupt.
    fn acknowledge(&self) -> u8 {
        let mut isr = self.isr.lock();
        self.config.set_intx(false);
        std::mem::take(&mut *isr)
    }

    /// A vector as the driver may set it: one that does not exist becomes "none".
    fn checked(&self, vector: u16) -> u16 {
        let exists = self.msix.as_ref().is_some_and(|m| vector < m.len());
        if exists { vector } else { NO_VECTOR }
    }

    fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.acknowledge();
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, queue: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.raise(ISR_QUEUE, vector);
        }
    }

    fn config_changed(&self) {
        self.flags.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(ISR_CONFIG, &self.config_vector);
    }

    fn needs_reset(&self) {
        self.flags.needs_reset.store(true, Ordering::Release);
        self.config_changed();
    }
}

/// What is saved beside the common part.
#[derive(Debug, Serialize, Deserialize)]
struct PciState {
    config: PciConfigState,
    #[serde(default)]
    msix: Option<MsixState>,
    isr: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

/// A device on a PCI bus.
#[derive(Debug)]
pub struct PciTransport {
    common: Common,
    name: String,
    bdf: Bdf,
    config: Arc<PciConfig>,
    interrupt: Arc<PciInterrupt>,
    /// Offset of the PCI configuration access capability.
    access_cap: u16,
    mmio: Arc<Bus>,
    /// Where the BAR is, for the ioeventfds.
    mapped: Mutex<Option<u64>>,
}

/// Class code of a device type.
fn class(device_type: u32) -> u32 {
    match device_type {
        kind::NET => 0x02_0000,
        kind::BLOCK => 0x01_8000,
        kind::CONSOLE => 0x07_8000,
        kind::INPUT => 0x09_8000,
        _ => 0x00_ff00,
    }
}

fn capability(
    config: &mut ConfigBuilder,
    cfg_type: u8,
    (offset, len): (u64, u64),
    extra: &[u8],
) -> Result<u16, PciError> {
    let mut body = vec![16 + extra.len() as u8, cfg_type, BAR, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&(len as u32).to_le_bytes());
    body.extend_from_slice(extra);
    // The driver chooses what the configuration access capability accesses.
    let writable: &[u8] = match cfg_type {
        cfg_type::PCI => {
            &[0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]
        }
        _ => &[],
    };
    config.capability(cap::VENDOR, &body, writable)
}

/// The BAR of the device's shared memory and a capability for each region (`struct virtio_pci_cap64`, section 4.1.4).
fn add_shared_memory(config: &mut ConfigBuilder, shared: &SharedMemory) -> Result<(), PciError> {
    let Some(len) = shared.bar_len() else { return Ok(()) };
    config.bar(SHARED_BAR, BarKind::Mem64 { prefetchable: true }, len)?;
    for region in shared.regions() {
        let mut body = vec![24, cfg_type::SHARED_MEMORY, SHARED_BAR, region.id, 0, 0];
        for half in [region.offset, region.len, region.offset >> 32, region.len >> 32] {
            body.extend((half as u32).to_le_bytes());
        }
        config.capability(cap::VENDOR, &body, &[])?;
    }
    Ok(())
}

/// The configuration space, its MSI-X table, and the offset of the configuration access capability.
type Space = (Arc<PciConfig>, Option<Arc<Msix>>, u16);

fn config_space(
    device: &dyn VirtioDevice,
    slot: &PciSlot,
    msi: Option<&Arc<dyn MsiController>>,
) -> Result<Space, std::io::Error> {
    let other = std::io::Error::other::<PciError>;
    let device_type = device.device_type() as u16;
    let mut config = ConfigBuilder::new(Identity {
        vendor: VENDOR,
        device: FIRST_DEVICE + device_type,
        revision: 1,
        class: class(device.device_type()),
        subsystem_vendor: VENDOR,
        subsystem: FIRST_DEVICE + device_type,
        multifunction: false,
    });
    config.bar(BAR, BarKind::Mem64 { prefetchable: true }, BAR_SIZE).map_err(other)?;
    config.intx(slot.intx(1));
    let queues = device.queue_sizes().len();
    let msix = match msi {
        Some(msi) => {
            let msix = Msix::new(msi, queues as u16 + 1, slot.bdf())?;
            msix.add_capability(&mut config, BAR, MSIX_TABLE as u32, MSIX_PBA as u32).map_err(other)?;
            Some(msix)
        }
        None => None,
    };
    let notify_len = queues as u64 * u64::from(NOTIFY_MULTIPLIER);
    capability(&mut config, cfg_type::COMMON, (COMMON, COMMON_LEN as u64), &[]).map_err(other)?;
    capability(&mut config, cfg_type::ISR, (ISR, 4), &[]).map_err(other)?;
    capability(&mut config, cfg_type::DEVICE, (DEVICE, PAGE), &[]).map_err(other)?;
    capability(&mut config, cfg_type::NOTIFY, (NOTIFY, notify_len), &NOTIFY_MULTIPLIER.to_le_bytes())
        .map_err(other)?;
    let access = capability(&mut config, cfg_type::PCI, (0, 0), &[0; 4]).map_err(other)?;
    if let Some(shared) = device.shared_memory() {
        add_shared_memory(&mut config, &shared).map_err(other)?;
    }
    Ok((config.build(), msix, access))
}

impl PciTransport {
    /// Plugs `device` into device number `number` of `bus`, or into the first that is free.
    ///
    /// # Errors
    /// [`BuildError`] if there is no such place or the host refuses something.
    pub fn plug(
        id: &str,
        device: Arc<dyn VirtioDevice>,
        (bus, number): (&Arc<PciBus>, Option<u8>),
        context: &BuildContext,
    ) -> Result<Arc<Self>, BuildError> {
        let wrong = |e: PciError| BuildError::Config { id: id.to_owned(), reason: e.to_string() };
        let slot = bus.reserve(number).map_err(wrong)?;
        Self::plug_into(id, device, (bus, &slot), context)
    }

    /// Plugs `device` into the place behind the port at `port` of `bus`.
    ///
    /// # Errors
    /// As [`PciTransport::plug`].
    pub fn plug_behind(
        id: &str,
        device: Arc<dyn VirtioDevice>,
        (bus, port): (&Arc<PciBus>, u8),
        context: &BuildContext,
    ) -> Result<Arc<Self>, BuildError> {
        let wrong = |e: PciError| BuildError::Config { id: id.to_owned(), reason: e.to_string() };
        let slot = bus.reserve_behind(port).map_err(wrong)?;
        Self::plug_into(id, device, (bus, &slot), context)
    }

    fn plug_into(
        id: &str,
        device: Arc<dyn VirtioDevice>,
        (bus, slot): (&Arc<PciBus>, &PciSlot),
        context: &BuildContext,
    ) -> Result<Arc<Self>, BuildError> {
        let wrong = |e: PciError| BuildError::Config { id: id.to_owned(), reason: e.to_string() };
        let built = Self::build(id, device, slot, context).map_err(|source| BuildError::Host {
            id: id.to_owned(),
            what: "cannot make its PCI function".to_owned(),
            source,
        });
        let plugged = built.and_then(|this| {
            bus.plug(slot, Arc::clone(&this) as Arc<dyn PciDevice>).map_err(wrong)?;
            Ok(this)
        });
        if plugged.is_err() {
            bus.release(slot);
        }
        plugged
    }

    fn build(
        id: &str,
        device: Arc<dyn VirtioDevice>,
        slot: &PciSlot,
        context: &BuildContext,
    ) -> Result<Arc<Self>, std::io::Error> {
        let queues = device.queue_sizes().len();
        // The notification page and the MSI-X table have room for this many.
        if queues >= ((MSIX_PBA - MSIX_TABLE) / 16) as usize {
            return Err(std::io::Error::other("it has too many queues"));
        }
        let (config, msix, access_cap) = config_space(&*device, slot, context.msi.as_ref())?;
        let flags = Arc::new(Flags::default());
        let interrupt = Arc::new(PciInterrupt {
            flags: Arc::clone(&flags),
            config: Arc::clone(&config),
            msix,
            isr: Mutex::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        });
        let dynamic = Arc::clone(&interrupt) as Arc<dyn Interrupt>;
        Ok(Arc::new(Self {
            common: Common::new(id, device, context, dynamic, flags)?,
            name: format!("_virtio-pci-{id}"),
            bdf: slot.bdf(),
            config,
            interrupt,
            access_cap,
            mmio: Arc::clone(&context.mmio),
            mapped: Mutex::default(),
        }))
    }

    /// Where on the bus it is.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    fn vector_of(&self, queue: u16) -> &AtomicU16 {
        self.interrupt.queue_vectors.get(usize::from(queue)).unwrap_or(&self.interrupt.config_vector)
    }

    /// The common structure as it reads now (section 4.1.4.3).
    fn common_bytes(&self) -> [u8; COMMON_LEN] {
        let common = &self.common;
        let mut out = [0; COMMON_LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            for (to, from) in out.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        let (device_select, driver_select, queue_select) =
            common.with(|r| (r.device_select, r.driver_select, r.queue_select));
        put(0x00, &device_select.to_le_bytes());
        put(0x04, &common.device_features().to_le_bytes());
        put(0x08, &driver_select.to_le_bytes());
        put(0x0c, &common.driver_features().to_le_bytes());
        put(0x10, &self.interrupt.config_vector.load(Ordering::Acquire).to_le_bytes());
        put(0x12, &(common.kicks().len() as u16).to_le_bytes());
        put(0x14, &[common.status(), common.flags.generation.load(Ordering::Acquire) as u8]);
        put(0x16, &queue_select.to_le_bytes());
        if let Some(q) = common.with(|r| r.queue().copied()) {
            put(0x18, &q.size.to_le_bytes());
            put(0x1a, &self.vector_of(queue_select).load(Ordering::Acquire).to_le_bytes());
            put(0x1c, &u16::from(q.ready).to_le_bytes());
            put(0x1e, &queue_select.to_le_bytes());
            put(0x20, &q.desc.to_le_bytes());
            put(0x28, &q.avail.to_le_bytes());
            put(0x30, &q.used.to_le_bytes());
        } else {
            put(0x1a, &NO_VECTOR.to_le_bytes());
        }
        out
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let common = &self.common;
        match (offset, data) {
            (0x14, &[status]) => self.set_status(status),
            (_, &[a, b]) => self.write_common_u16(offset, u16::from_le_bytes([a, b])),
            (_, &[a, b, c, d]) => {
                let value = u32::from_le_bytes([a, b, c, d]);
                match offset {
                    0x00 => common.select(|r| r.device_select = value),
                    0x08 => common.select(|r| r.driver_select = value),
                    0x0c => common.set_driver_features(value),
                    _ => self.write_address(offset, value),
                }
            }
            (0x20 | 0x28 | 0x30, &[a, b, c, d, e, f, g, h]) => {
                self.write_address(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_address(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn write_common_u16(&self, offset: u64, value: u16) {
        let common = &self.common;
        match offset {
            0x10 => {
                let vector = self.interrupt.checked(value);
                self.interrupt.config_vector.store(vector, Ordering::Release);
            }
            0x16 => common.select(|r| r.queue_select = value),
            0x18 => common.set_queue(|q| {
                if value.is_power_of_two() && value <= q.max_size {
                    q.size = value;
                }
            }),
            0x1a => {
                let queue = common.with(|r| r.queue_select);
                if let Some(place) = self.interrupt.queue_vectors.get(usize::from(queue)) {
                    place.store(self.interrupt.checked(value), Ordering::Release);
                }
            }
            // Writing 0 is not allowed (section 4.1.4.3.2).
            0x1c if value == 1 => common.set_queue(|q| q.ready = true),
            _ => {}
        }
    }

    fn write_address(&self, offset: u64, value: u32) {
        self.common.set_queue(|q| {
            let field = match offset & !7 {
                0x20 => &mut q.desc,
                0x28 => &mut q.avail,
                0x30 => &mut q.used,
                _ => return,
            };
            if offset & 4 == 0 {
                *field = *field & !0xffff_ffff | u64::from(value);
            } else {
                *field = *field & 0xffff_ffff | u64::from(value) << 32;
            }
        });
    }

    fn set_status(&self, value: u8) {
        self.common.set_status(value);
        if value == 0 {
            self.interrupt.reset();
        }
    }

    /// What the configuration access capability accesses now, if it is an access of this device.
    fn cfg_access(&self) -> Option<(u64, usize)> {
        let mut bar = [0];
        self.config.read(self.access_cap + 4, &mut bar);
        let offset = u64::from(self.config.read_u32(self.access_cap + 8));
        let len = self.config.read_u32(self.access_cap + 12);
        let fits = matches!(len, 1 | 2 | 4)
            && offset % u64::from(len) == 0
            && offset + u64::from(len) <= BAR_SIZE
            && bar == [BAR];
        fits.then_some((offset, len as usize))
    }

    fn touches_cfg_data(&self, offset: u16, len: usize) -> bool {
        let data = usize::from(self.access_cap + PCI_CFG_DATA);
        usize::from(offset) < data + 4 && usize::from(offset) + len > data
    }

    /// Moves the ioeventfds to where the notification structure is.
    fn move_events(&self, base: Option<u64>) {
        let old = std::mem::replace(&mut *self.mapped.lock(), base);
        for (n, kick) in self.common.kicks().iter().enumerate() {
            let at = |base: u64| base + NOTIFY + n as u64 * u64::from(NOTIFY_MULTIPLIER);
            if let Some(old) = old
                && let Err(error) = self.mmio.unregister(kick, at(old), 0, None)
            {
                tracing::warn!(device = self.name, %error, "an ioeventfd cannot be removed");
            }
            // Without one, notifications arrive as register writes.
            if let Some(new) = base
                && let Err(error) = self.mmio.register(kick, at(new), 0, None)
            {
                tracing::warn!(device = self.name, %error, "an ioeventfd cannot be registered");
            }
        }
    }
}

impl PciDevice for PciTransport {
    fn pci_name(&self) -> &str {
        &self.name
    }

    fn config(&self) -> &Arc<PciConfig> {
        &self.config
    }

    fn msix(&self) -> Option<&Arc<Msix>> {
        self.interrupt.msix.as_ref()
    }

    fn read_bar(&self, bar: u8, access: Access, data: &mut [u8]) {
        data.fill(0);
        if bar != BAR {
            return;
        }
        let offset = access.offset % PAGE;
        match (access.offset - offset, &self.interrupt.msix) {
            (COMMON, _) => read_bytes(&self.common_bytes(), offset, data),
            (ISR, _) if offset == 0 => {
                if let Some(first) = data.first_mut() {
                    *first = self.interrupt.acknowledge();
                }
            }
            (DEVICE, _) => self.common.device.read_config(offset, data),
            (MSIX_TABLE.., Some(msix)) if access.offset < MSIX_PBA => {
                msix.read_table(access.offset - MSIX_TABLE, data);
            }
            (MSIX_PBA, Some(msix)) => msix.read_pba(offset, data),
            _ => {}
        }
    }

    fn write_bar(&self, bar: u8, access: Access, data: &[u8]) {
        if bar != BAR {
            return;
        }
        let offset = access.offset % PAGE;
        match (access.offset - offset, &self.interrupt.msix) {
            (COMMON, _) => self.write_common(offset, data),
            (DEVICE, _) => self.common.device.write_config(offset, data),
            (NOTIFY, _) => self.common.kick((offset / u64::from(NOTIFY_MULTIPLIER)) as u32),
            (MSIX_TABLE.., Some(msix)) if access.offset < MSIX_PBA => {
                msix.write_table(access.offset - MSIX_TABLE, data);
            }
            _ => {}
        }
    }

    fn read_config(&self, offset: u16, data: &mut [u8]) {
        if self.touches_cfg_data(offset, data.len())
            && let Some((at, len)) = self.cfg_access()
        {
            let mut value = [0; 4];
            let access = Access { offset: at, address: 0, vcpu: None };
            self.read_bar(BAR, access, value.get_mut(..len).unwrap_or(&mut []));
            self.config.set(self.access_cap + PCI_CFG_DATA, &value);
        }
        self.config.read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if self.touches_cfg_data(offset, data.len())
            && let Some((at, len)) = self.cfg_access()
        {
            let value = self.config.read_u32(self.access_cap + PCI_CFG_DATA).to_le_bytes();
            let access = Access { offset: at, address: 0, vcpu: None };
            self.write_bar(BAR, access, value.get(..len).unwrap_or(&[]));
        }
    }

    fn bar_moved(&self, bar: u8, base: Option<u64>) {
        match bar {
            BAR => self.move_events(base),
            _ => {
                if let Some(shared) = self.common.device.shared_memory() {
                    shared.move_to(base);
                }
            }
        }
    }
}

impl Device for PciTransport {
    fn id(&self) -> &str {
        &self.common.id
    }

    fn reset(&self) {
        self.set_status(0);
        if let Some(msix) = &self.interrupt.msix {
            msix.reset();
        }
        self.config.reset();
    }

    fn pause(&self) {
        self.common.pause();
    }

    fn resume(&self) {
        self.common.resume();
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let load = |v: &AtomicU16| v.load(Ordering::Acquire);
        let state = PciState {
            config: self.config.save(),
            msix: self.interrupt.msix.as_ref().map(|m| m.save()),
            isr: *self.interrupt.isr.lock(),
            config_vector: load(&self.interrupt.config_vector),
            queue_vectors: self.interrupt.queue_vectors.iter().map(load).collect(),
        };
        self.common.save(KIND, STATE_VERSION, state)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: PciState = self.common.restore(KIND, STATE_VERSION, state)?;
        let interrupt = &self.interrupt;
        if saved.queue_vectors.len() != interrupt.queue_vectors.len() {
            let reason = "the number of queue vectors differs".to_owned();
            return Err(StateError::Invalid { kind: KIND, reason });
        }
        *interrupt.isr.lock() = saved.isr & (ISR_QUEUE | ISR_CONFIG);
        interrupt.config_vector.store(interrupt.checked(saved.config_vector), Ordering::Release);
        for (place, vector) in interrupt.queue_vectors.iter().zip(saved.queue_vectors) {
            place.store(interrupt.checked(vector), Ordering::Release);
        }
        self.config.restore(&saved.config)?;
        match (&interrupt.msix, saved.msix) {
            (Some(msix), Some(state)) => msix.restore(&state, &self.config),
            (None, None) => Ok(()),
            _ => {
                let reason = "only one side has message-signalled interrupts".to_owned();
                Err(StateError::Invalid { kind: KIND, reason })
            }
        }
    }

    fn announce(&self) {
        self.common.device.announce();
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        self.common.device.counters()
    }
}
