//! The root bus: slots, configuration accesses, BAR windows.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::Arc;

use holdfast_device::{Access, Bus, BusDevice, IrqLine};
use parking_lot::{Mutex, RwLock};

use super::config::Bar;
use super::intx::SharedLine;
use super::{BarKind, Bdf, Intx, Msix, PciConfig, PciError, PciInfo, command, reg};

/// One PCI function.
pub trait PciDevice: Send + Sync + Debug {
    /// The id by which monitors and logs name it.
    fn pci_name(&self) -> &str;

    /// Its configuration space.
    fn config(&self) -> &Arc<PciConfig>;

    /// The number of the bus behind it, if it is a port that has a device there.
    fn secondary_bus(&self) -> Option<u8> {
        None
    }

    /// Its MSI-X table, if it has one. The bus passes enable and mask bits on to it.
    fn msix(&self) -> Option<&Arc<Msix>> {
        None
    }

    /// A read of registers in `bar`; `access.offset` counts from the BAR's start. Functions without BARs have none.
    fn read_bar(&self, bar: u8, access: Access, data: &mut [u8]) {
        let _ = (bar, access);
        data.fill(0xff);
    }

    /// A write to registers in `bar`.
    fn write_bar(&self, bar: u8, access: Access, data: &[u8]) {
        let _ = (bar, access, data);
    }

    /// A guest's read of configuration space, for devices with registers that have side effects.
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// A guest's write to configuration space. Must end up in [`PciConfig::write`].
    fn write_config(&self, offset: u16, data: &[u8]) {
        self.config().write(offset, data);
    }

    /// `bar` is now decoded at `base`, or not at all (`None`): the place to move ioeventfds. Called
    /// with the bus's mapping lock held: no configuration access may be made from here.
    fn bar_moved(&self, bar: u8, base: Option<u64>) {
        let _ = (bar, base);
    }
}

/// A function by its place: on the root bus its device and function number, behind a port those of the port and [`BEHIND`].
type Key = u16;

/// Set in the key of the function behind a port.
const BEHIND: Key = 0x100;

/// What a root bus is made of.
#[derive(Debug, Clone)]
pub struct PciBusSpec {
    /// PCI segment (domain).
    pub segment: u16,
    /// Where memory BARs appear.
    pub mmio: Arc<Bus>,
    /// Where port BARs appear.
    pub pio: Arc<Bus>,
    /// The wires that interrupt pins are routed to.
    pub wires: Vec<IrqLine>,
    /// Which wire (index into `wires`) pin 0 (INTA#) to 3 (INTD#) of a device number goes to.
    pub swizzle: fn(device: u8, pin: u8) -> usize,
}

/// Address ranges to hand out to BARs: first address and length in bytes; length 0: nothing there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Windows {
    /// Ports.
    pub io: (u64, u64),
    /// Memory below 4 GiB.
    pub mem32: (u64, u64),
    /// Memory above; 64-bit prefetchable BARs go there.
    pub mem64: (u64, u64),
}

/// A reserved place on the bus.
#[derive(Debug)]
pub struct PciSlot {
    bdf: Bdf,
    key: Key,
    wires: [Arc<SharedLine>; 4],
}

impl PciSlot {
    /// The function's address.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// The function's interrupt pin: 1 (INTA#) to 4 (INTD#); others mean INTA#.
    pub fn intx(&self, pin: u8) -> Intx {
        let pin = if (1..=4).contains(&pin) { pin } else { 1 };
        Intx::new(Arc::clone(&self.wires[usize::from(pin - 1)]), self.bdf.devfn(), pin)
    }
}

/// A BAR on the memory or port bus.
#[derive(Debug)]
struct BarWindow {
    device: Arc<dyn PciDevice>,
    bar: u8,
}

impl BusDevice for BarWindow {
    fn read(&self, access: Access, data: &mut [u8]) {
        self.device.read_bar(self.bar, access, data);
    }

    fn write(&self, access: Access, data: &[u8]) {
        self.device.write_bar(self.bar, access, data);
    }
}

/// A PCI root bus: bus 0 of its segment, and the device behind each of its root ports.
///
/// Lock order: `mapped`, then `functions`, then a function's registers.
#[derive(Debug)]
pub struct PciBus {
    segment: u16,
    mmio: Arc<Bus>,
    pio: Arc<Bus>,
    wires: Vec<Arc<SharedLine>>,
    swizzle: fn(u8, u8) -> usize,
    reserved: Mutex<BTreeSet<Key>>,
    functions: RwLock<BTreeMap<Key, Arc<dyn PciDevice>>>,
    /// Where each (function, BAR) is attached.
    mapped: Mutex<BTreeMap<(Key, u8), u64>>,
}

impl PciBus {
    /// An empty bus.
    pub fn new(spec: PciBusSpec) -> Arc<Self> {
        let mut wires: Vec<_> = spec.wires.into_iter().map(SharedLine::new).collect();
        if wires.is_empty() {
            wires.push(SharedLine::new(IrqLine::unconnected()));
        }
        Arc::new(Self {
            segment: spec.segment,
            mmio: spec.mmio,
            pio: spec.pio,
            wires,
            swizzle: spec.swizzle,
            reserved: Mutex::default(),
            functions: RwLock::default(),
            mapped: Mutex::default(),
        })
    }

    /// The segment (domain) number.
    pub fn segment(&self) -> u16 {
        self.segment
    }

    /// Reserves function 0 of the wanted device number (0 to 31), or of the lowest free one.
    ///
    /// # Errors
    /// [`PciError`] if it is taken, does not exist, or none is free.
    pub fn reserve(&self, device: Option<u8>) -> Result<PciSlot, PciError> {
        if let Some(device) = device {
            return self.reserve_function(device, 0);
        }
        let device = {
            let reserved = self.reserved.lock();
            (0..32u8).find(|d| !reserved.iter().any(|f| f >> 3 == Key::from(*d))).ok_or(PciError::Full)?
        };
        self.reserve_function(device, 0)
    }

    /// Reserves one function of a multi-function device.
    ///
    /// # Errors
    /// [`PciError`] if it is taken or does not exist.
    pub fn reserve_function(&self, device: u8, function: u8) -> Result<PciSlot, PciError> {
        if device > 31 || function > 7 {
            return Err(PciError::NoSuchSlot { device, function });
        }
        let devfn = device << 3 | function;
        if !self.reserved.lock().insert(Key::from(devfn)) {
            return Err(PciError::SlotTaken { device, function });
        }
        Ok(self.slot(Bdf::new(self.segment, 0, devfn), Key::from(devfn)))
    }

    /// Reserves the only place behind the port at `port`, a device and function number of the root bus.
    ///
    /// # Errors
    /// [`PciError::SlotTaken`].
    pub fn reserve_behind(&self, port: u8) -> Result<PciSlot, PciError> {
        let key = Key::from(port) | BEHIND;
        if !self.reserved.lock().insert(key) {
            return Err(PciError::SlotTaken { device: 0, function: 0 });
        }
        let number = self.functions.read().get(&Key::from(port)).map_or(0, |f| secondary_number(f.as_ref()));
        Ok(self.slot(Bdf::new(self.segment, number, 0), key))
    }

    fn slot(&self, bdf: Bdf, key: Key) -> PciSlot {
        // Pins of a device 0 behind a port are those of the port.
        let device = (key as u8) >> 3;
        let wire = |pin| {
            let index = (self.swizzle)(device, pin) % self.wires.len();
            Arc::clone(&self.wires[index])
        };
        PciSlot { bdf, key, wires: [wire(0), wire(1), wire(2), wire(3)] }
    }

    /// Gives a slot back that no device was plugged into.
    pub fn release(&self, slot: &PciSlot) {
        if !self.functions.read().contains_key(&slot.key) {
            self.reserved.lock().remove(&slot.key);
        }
    }

    /// Plugs a device into its slot.
    ///
    /// # Errors
    /// [`PciError::SlotTaken`] if the slot holds a device already.
    pub fn plug(self: &Arc<Self>, slot: &PciSlot, device: Arc<dyn PciDevice>) -> Result<(), PciError> {
        let mut functions = self.functions.write();
        if functions.contains_key(&slot.key) {
            return Err(PciError::SlotTaken { device: slot.bdf.device(), function: slot.bdf.function() });
        }
        device.config().plugged_into(Arc::downgrade(self));
        functions.insert(slot.key, device);
        Ok(())
    }

    /// Takes a device out and frees its slot; its BARs are unmapped.
    pub fn unplug(&self, bdf: Bdf) -> Option<Arc<dyn PciDevice>> {
        self.take_out(Key::from(bdf.devfn()))
    }

    /// The device behind the port at `port`.
    pub fn behind(&self, port: u8) -> Option<Arc<dyn PciDevice>> {
        self.functions.read().get(&(Key::from(port) | BEHIND)).cloned()
    }

    /// Takes the device out that is behind the port at `port`.
    pub fn unplug_behind(&self, port: u8) -> Option<Arc<dyn PciDevice>> {
        self.take_out(Key::from(port) | BEHIND)
    }

    fn take_out(&self, key: Key) -> Option<Arc<dyn PciDevice>> {
        let mut mapped = self.mapped.lock();
        let device = self.functions.write().remove(&key)?;
        for bar in device.config().bars() {
            self.unmap(&mut mapped, key, &device, bar);
        }
        self.reserved.lock().remove(&key);
        Some(device)
    }

    fn function(&self, bus: u8, devfn: u8) -> Option<Arc<dyn PciDevice>> {
        let functions = self.functions.read();
        if bus == 0 {
            return functions.get(&Key::from(devfn)).cloned();
        }
        let port = functions.iter().find(|(_, f)| f.secondary_bus() == Some(bus));
        // A port has one device behind it, with one function.
        let key = port.filter(|_| devfn == 0).map(|(key, _)| key | BEHIND)?;
        functions.get(&key).cloned()
    }

    /// A configuration read: all ones where no function is.
    pub fn read_config(&self, bus: u8, devfn: u8, offset: u16, data: &mut [u8]) {
        match self.function(bus, devfn) {
            Some(device) => device.read_config(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A configuration write: dropped where no function is.
    pub fn write_config(&self, bus: u8, devfn: u8, offset: u16, data: &[u8]) {
        let Some(device) = self.function(bus, devfn) else { return };
        device.write_config(offset, data);
        let end = usize::from(offset) + data.len();
        let touches = |from: u16, to: u16| end > usize::from(from) && offset < to;
        // Only the Command register and the BARs change what is decoded.
        if touches(reg::COMMAND, reg::COMMAND + 2) || touches(reg::BAR0, reg::BAR0 + 24) {
            self.remap();
        }
        if let Some(msix) = device.msix() {
            msix.config_changed(device.config());
        }
    }

    /// Attaches and detaches BAR windows until they are where the guest wants them. A window that
    /// collides stays unmapped and is tried again at the next change.
    pub(super) fn remap(&self) {
        let mut mapped = self.mapped.lock();
        let functions: Vec<_> = self.functions.read().iter().map(|(&d, f)| (d, Arc::clone(f))).collect();
        for (devfn, device) in &functions {
            for bar in device.config().bars() {
                let now = mapped.get(&(*devfn, bar.index)).copied();
                if now.is_some() && device.config().decoded(bar) != now {
                    self.unmap(&mut mapped, *devfn, device, bar);
                }
            }
        }
        for (devfn, device) in &functions {
            for bar in device.config().bars() {
                if mapped.contains_key(&(*devfn, bar.index)) {
                    continue;
                }
                if let Some(base) = device.config().decoded(bar) {
                    self.map(&mut mapped, *devfn, device, (bar, base));
                }
            }
        }
    }

    fn bus_of(&self, bar: &Bar) -> &Arc<Bus> {
        if bar.kind == BarKind::Io { &self.pio } else { &self.mmio }
    }

    fn map(
        &self,
        mapped: &mut BTreeMap<(Key, u8), u64>,
        devfn: Key,
        device: &Arc<dyn PciDevice>,
        (bar, base): (&Bar, u64),
    ) {
        let name = format!("{} bar{}", device.pci_name(), bar.index);
        let window = Arc::new(BarWindow { device: Arc::clone(device), bar: bar.index });
        match self.bus_of(bar).attach(base, bar.size, &name, window) {
            Ok(()) => {
                mapped.insert((devfn, bar.index), base);
                device.bar_moved(bar.index, Some(base));
            }
            Err(error) => tracing::debug!(%error, "{name} is not mapped"),
        }
    }

    fn unmap(
        &self,
        mapped: &mut BTreeMap<(Key, u8), u64>,
        devfn: Key,
        device: &Arc<dyn PciDevice>,
        bar: &Bar,
    ) {
        let Some(base) = mapped.remove(&(devfn, bar.index)) else { return };
        device.bar_moved(bar.index, None);
        if let Err(error) = self.bus_of(bar).detach(base) {
            tracing::error!(%error, "BAR {} of {} was not attached", bar.index, device.pci_name());
        }
    }

    /// Gives every BAR an address, largest first, and enables decoding, as firmware would.
    ///
    /// # Errors
    /// [`PciError::NoRoom`] naming the first BAR that does not fit.
    pub fn assign_resources(&self, windows: Windows) -> Result<(), PciError> {
        // What is behind ports is the guest's own business, as their windows are.
        let on_root = |(key, f): (&Key, &Arc<dyn PciDevice>)| {
            u8::try_from(*key).ok().map(|devfn| (devfn, Arc::clone(f)))
        };
        let functions: Vec<_> = self.functions.read().iter().filter_map(on_root).collect();
        let mut wanted: Vec<_> = functions
            .iter()
            .flat_map(|(devfn, f)| f.config().bars().iter().map(move |bar| (*devfn, f, *bar)))
            .collect();
        wanted.sort_by_key(|(devfn, _, bar)| (std::cmp::Reverse(bar.size), *devfn, bar.index));
        let mut io = Cursor::new(windows.io);
        let mut mem32 = Cursor::new(windows.mem32);
        let mut mem64 = Cursor::new(windows.mem64);
        for (devfn, function, bar) in wanted {
            let address = match bar.kind {
                BarKind::Io => io.take(bar.size),
                BarKind::Mem32 | BarKind::Mem64 { prefetchable: false } => mem32.take(bar.size),
                BarKind::Mem64 { prefetchable: true } if bar.size <= SMALL_BAR => {
                    mem32.take(bar.size).or_else(|| mem64.take(bar.size))
                }
                BarKind::Mem64 { prefetchable: true } => {
                    mem64.take(bar.size).or_else(|| mem32.take(bar.size))
                }
            };
            let bdf = Bdf::new(self.segment, 0, devfn);
            let address = address.ok_or(PciError::NoRoom { bdf, bar: bar.index, size: bar.size })?;
            function.config().set_bar(&bar, address);
            let decode = if bar.kind == BarKind::Io { command::IO } else { command::MEMORY };
            let enabled = function.config().command() | decode;
            function.config().write(reg::COMMAND, &enabled.to_le_bytes());
        }
        self.remap();
        Ok(())
    }

    /// All functions, for `query-pci` and `info qtree`.
    pub fn info(&self) -> Vec<PciInfo> {
        let functions = self.functions.read();
        functions
            .iter()
            .map(|(key, f)| {
                let bdf = match u8::try_from(*key) {
                    Ok(devfn) => Bdf::new(self.segment, 0, devfn),
                    Err(_) => {
                        let port = functions.get(&(key & !BEHIND));
                        Bdf::new(self.segment, port.map_or(0, |p| secondary_number(p.as_ref())), 0)
                    }
                };
                PciInfo::of(bdf, f.as_ref())
            })
            .collect()
    }
}

/// The bus number that the guest has given to what is behind a port.
fn secondary_number(port: &dyn PciDevice) -> u8 {
    port.config().read_u16(0x18).to_le_bytes()[1]
}

/// 64-bit BARs up to this size go below 4 GiB while there is room, where 32-bit kernels reach them: Debian 12's
/// `ioremap` with PAE drops the upper half of addresses.
const SMALL_BAR: u64 = 1 << 20;

/// Hands out naturally aligned pieces of a window, upwards.
struct Cursor {
    next: u64,
    end: u64,
}

impl Cursor {
    fn new((base, len): (u64, u64)) -> Self {
        Self { next: base, end: base.saturating_add(len) }
    }

    fn take(&mut self, size: u64) -> Option<u64> {
        // Address 0 is never decoded: it means "not assigned".
        let at = self.next.max(1).checked_next_multiple_of(size)?;
        let end = at.checked_add(size).filter(|&e| e <= self.end)?;
        self.next = end;
        Some(at)
    }
}
