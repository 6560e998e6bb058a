//! Configuration space of one function (type 0 header).

use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{Intx, PciBus, PciError};
use holdfast_device::StateError;

/// Bytes of an extended configuration space.
const SPACE: usize = 4096;
/// Bytes of a conventional configuration space; capabilities live below.
const CONVENTIONAL: usize = 256;
/// First byte behind the header.
const HEADER_END: usize = 0x40;

/// Offsets of the type 0 header's registers.
pub mod reg {
    /// Vendor ID.
    pub const VENDOR: u16 = 0x00;
    /// Command.
    pub const COMMAND: u16 = 0x04;
    /// Status.
    pub const STATUS: u16 = 0x06;
    /// Revision ID; the class code follows.
    pub const REVISION: u16 = 0x08;
    /// Cache Line Size.
    pub const CACHE_LINE: u16 = 0x0c;
    /// Header Type.
    pub const HEADER_TYPE: u16 = 0x0e;
    /// Base Address Register 0.
    pub const BAR0: u16 = 0x10;
    /// Subsystem Vendor ID.
    pub const SUBSYSTEM: u16 = 0x2c;
    /// Capabilities Pointer.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt Line.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Interrupt Pin.
    pub const INTERRUPT_PIN: u16 = 0x3d;
}

/// Bits of the Command register.
pub mod command {
    /// I/O Space enable.
    pub const IO: u16 = 1 << 0;
    /// Memory Space enable.
    pub const MEMORY: u16 = 1 << 1;
    /// Bus Master enable.
    pub const MASTER: u16 = 1 << 2;
    /// Interrupt Disable.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// Capability ids.
pub mod cap {
    /// Vendor specific (virtio uses it).
    pub const VENDOR: u8 = 0x09;
    /// PCI Express.
    pub const EXPRESS: u8 = 0x10;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
}

/// Writable bits of Command: I/O, memory, master, parity, SERR#, interrupt disable.
const COMMAND_WRITABLE: u16 = 0x0547;
/// Status bits that are cleared by writing one.
const STATUS_W1C: u16 = 0xf900;
/// Status: a capability list is there.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Status: INTx is asserted (whether or not it is disabled).
const STATUS_INTERRUPT: u16 = 1 << 3;

/// What a function says that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and programming interface, 24 bits: 0x020000 is an Ethernet controller.
    pub class: u32,
    /// Subsystem Vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Bit 7 of Header Type: other functions of this device may exist.
    pub multifunction: bool,
}

/// The kind of a Base Address Register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// 32-bit memory.
    Mem32,
    /// 64-bit memory, taking this BAR and the next; prefetchable or not.
    Mem64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

/// A BAR's fixed properties.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bar {
    pub index: u8,
    pub kind: BarKind,
    pub size: u64,
}

/// Builds a [`PciConfig`].
#[derive(Debug)]
pub struct ConfigBuilder {
    regs: Box<[u8; SPACE]>,
    writable: Box<[u8; SPACE]>,
    w1c: Box<[u8; SPACE]>,
    bars: Vec<Bar>,
    intx: Option<Intx>,
    /// Where the next capability goes.
    next_cap: usize,
    /// The byte that will point to it.
    link: usize,
}

fn put(space: &mut [u8; SPACE], at: u16, bytes: &[u8]) {
    if let Some(target) = space.get_mut(usize::from(at)..usize::from(at) + bytes.len()) {
        target.copy_from_slice(bytes);
    }
}

impl ConfigBuilder {
    /// A header without BARs and capabilities.
    pub fn new(id: Identity) -> Self {
        let mut b = Self {
            regs: Box::new([0; SPACE]),
            writable: Box::new([0; SPACE]),
            w1c: Box::new([0; SPACE]),
            bars: Vec::new(),
            intx: None,
            next_cap: HEADER_END,
            link: usize::from(reg::CAPABILITIES),
        };
        b.set(reg::VENDOR, &id.vendor.to_le_bytes());
        b.set(reg::VENDOR + 2, &id.device.to_le_bytes());
        b.set(reg::REVISION, &(id.class << 8 | u32::from(id.revision)).to_le_bytes());
        b.set(reg::HEADER_TYPE, &[u8::from(id.multifunction) << 7]);
        b.set(reg::SUBSYSTEM, &id.subsystem_vendor.to_le_bytes());
        b.set(reg::SUBSYSTEM + 2, &id.subsystem.to_le_bytes());
        b.writable(reg::COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        put(&mut b.w1c, reg::STATUS, &STATUS_W1C.to_le_bytes());
        b.writable(reg::CACHE_LINE, &[0xff]);
        b.writable(reg::INTERRUPT_LINE, &[0xff]);
        b
    }

    /// Sets register bytes. Bytes behind the end of the space are ignored.
    pub fn set(&mut self, at: u16, bytes: &[u8]) -> &mut Self {
        put(&mut self.regs, at, bytes);
        self
    }

    /// Sets which bits the guest can write.
    pub fn writable(&mut self, at: u16, mask: &[u8]) -> &mut Self {
        put(&mut self.writable, at, mask);
        self
    }

    /// Sets which bits the guest clears by writing one.
    pub fn write_one_to_clear(&mut self, at: u16, mask: &[u8]) -> &mut Self {
        put(&mut self.w1c, at, mask);
        self
    }

    /// Adds BAR `index` (0 to 5) of `size` bytes, a power of two.
    ///
    /// # Errors
    /// [`PciError::Bar`] if the index is taken or the size is impossible.
    pub fn bar(&mut self, index: u8, kind: BarKind, size: u64) -> Result<&mut Self, PciError> {
        let fail = |reason| Err(PciError::Bar { bar: index, reason });
        let wide = matches!(kind, BarKind::Mem64 { .. });
        if index > 5 || (wide && index > 4) {
            return fail("there are six 32-bit BARs");
        }
        let span = |b: &Bar| (b.index, b.index + u8::from(matches!(b.kind, BarKind::Mem64 { .. })));
        let last = index + u8::from(wide);
        if self.bars.iter().any(|b| span(b).0 <= last && index <= span(b).1) {
            return fail("is taken");
        }
        let (min, max, flags) = match kind {
            BarKind::Io => (4, 256, 1),
            BarKind::Mem32 => (16, 1 << 31, 0),
            BarKind::Mem64 { prefetchable } => (16, 1 << 46, 4 | u8::from(prefetchable) << 3),
        };
        if !size.is_power_of_two() || size < min || size > max {
            return fail("the size must be a power of two of at least 4 ports or 16 bytes");
        }
        let at = reg::BAR0 + 4 * u16::from(index);
        let mask = !(size - 1);
        self.set(at, &[flags]);
        if wide {
            self.writable(at, &mask.to_le_bytes());
        } else {
            self.writable(at, &(mask as u32).to_le_bytes());
        }
        self.bars.push(Bar { index, kind, size });
        Ok(self)
    }

    /// Adds a capability: `body` follows id and next pointer; `writable` are the body's writable bits.
    /// Returns the capability's offset.
    ///
    /// # Errors
    /// [`PciError::Capabilities`] if the conventional space is full.
    pub fn capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, PciError> {
        let len = body.len() + 2;
        let at = self.next_cap;
        if at + len > CONVENTIONAL || writable.len() > body.len() {
            return Err(PciError::Capabilities { len });
        }
        let offset = at as u16;
        self.regs[self.link] = at as u8;
        self.link = at + 1;
        self.next_cap = (at + len).next_multiple_of(4);
        self.set(offset, &[id, 0]).set(offset + 2, body).writable(offset + 2, writable);
        self.regs[usize::from(reg::STATUS)] |= STATUS_CAPABILITIES as u8;
        Ok(offset)
    }

    /// Connects the interrupt pin.
    pub fn intx(&mut self, intx: Intx) -> &mut Self {
        self.set(reg::INTERRUPT_PIN, &[intx.pin()]);
        self.intx = Some(intx);
        self
    }

    /// The finished configuration space.
    pub fn build(self) -> Arc<PciConfig> {
        Arc::new(PciConfig {
            regs: Mutex::new(Regs { bytes: self.regs.clone(), intx: false }),
            initial: self.regs,
            writable: self.writable,
            w1c: self.w1c,
            bars: self.bars,
            intx: self.intx,
            bus: OnceLock::new(),
        })
    }
}

#[derive(Debug)]
struct Regs {
    bytes: Box<[u8; SPACE]>,
    /// The level the device drives its pin to.
    intx: bool,
}

impl Regs {
    fn u16(&self, at: u16) -> u16 {
        let at = usize::from(at);
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn u32(&self, at: u16) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }
}

/// The configuration space of one function, shared between the device and the bus.
#[derive(Debug)]
pub struct PciConfig {
    regs: Mutex<Regs>,
    initial: Box<[u8; SPACE]>,
    writable: Box<[u8; SPACE]>,
    w1c: Box<[u8; SPACE]>,
    bars: Vec<Bar>,
    intx: Option<Intx>,
    bus: OnceLock<Weak<PciBus>>,
}

/// Saved configuration space: what [`PciConfig::save`] gives.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PciConfigState {
    /// Register bytes from offset 0; trailing zeroes are left out.
    pub regs: Vec<u8>,
    /// The level of the interrupt pin.
    pub intx: bool,
}

impl PciConfig {
    /// Reads registers. Bytes behind the end of the space read as all ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let regs = self.regs.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = regs.bytes.get(usize::from(offset) + i).copied().unwrap_or(0xff);
        }
    }

    /// A guest's write: only writable bits change. The bus updates BAR windows afterwards; a device
    /// that calls this outside of [`super::PciDevice::write_config`] must not.
    pub fn write(&self, offset: u16, data: &[u8]) {
        let mut regs = self.regs.lock();
        for (i, &new) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            let Some(byte) = regs.bytes.get_mut(at) else { break };
            let mask = self.writable[at];
            *byte = (*byte & !mask) | (new & mask);
            *byte &= !(new & self.w1c[at]);
        }
        self.drive_intx(&mut regs);
    }

    /// The device's own change of its registers, regardless of what the guest may write.
    pub fn set(&self, offset: u16, data: &[u8]) {
        put(&mut self.regs.lock().bytes, offset, data);
    }

    /// A 16-bit register, all ones behind the end of the space.
    pub fn read_u16(&self, offset: u16) -> u16 {
        let mut b = [0; 2];
        self.read(offset, &mut b);
        u16::from_le_bytes(b)
    }

    /// A 32-bit register, all ones behind the end of the space.
    pub fn read_u32(&self, offset: u16) -> u32 {
        let mut b = [0; 4];
        self.read(offset, &mut b);
        u32::from_le_bytes(b)
    }

    /// The Command register.
    pub fn command(&self) -> u16 {
        self.read_u16(reg::COMMAND)
    }

    /// True if the guest lets the device access memory (and so send MSIs).
    pub fn bus_master(&self) -> bool {
        self.command() & command::MASTER != 0
    }

    /// Drives the interrupt pin, subject to Interrupt Disable.
    pub fn set_intx(&self, level: bool) {
        let mut regs = self.regs.lock();
        regs.intx = level;
        self.drive_intx(&mut regs);
    }

    fn drive_intx(&self, regs: &mut Regs) {
        let Some(intx) = &self.intx else { return };
        let status = usize::from(reg::STATUS);
        regs.bytes[status] &= !(STATUS_INTERRUPT as u8);
        if regs.intx {
            regs.bytes[status] |= STATUS_INTERRUPT as u8;
        }
        intx.set(regs.intx && regs.u16(reg::COMMAND) & command::INTX_DISABLE == 0);
    }

    pub(super) fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// The address in a BAR, whether or not it is decoded.
    pub(super) fn bar_address(&self, bar: &Bar) -> u64 {
        Self::address_in(&self.regs.lock(), bar)
    }

    fn address_in(regs: &Regs, bar: &Bar) -> u64 {
        let at = reg::BAR0 + 4 * u16::from(bar.index);
        let low = regs.u32(at);
        match bar.kind {
            BarKind::Io => u64::from(low & !3),
            BarKind::Mem32 => u64::from(low & !15),
            BarKind::Mem64 { .. } => u64::from(low & !15) | u64::from(regs.u32(at + 4)) << 32,
        }
    }

    /// Where the guest wants `bar` to be decoded now. Address 0 and the all-ones pattern of BAR sizing
    /// are never decoded.
    pub(super) fn decoded(&self, bar: &Bar) -> Option<u64> {
        let regs = self.regs.lock();
        let (enable, top) = match bar.kind {
            BarKind::Io => (command::IO, 0x1_0000),
            BarKind::Mem32 => (command::MEMORY, 1 << 32),
            BarKind::Mem64 { .. } => (command::MEMORY, 1 << 52),
        };
        let at = Self::address_in(&regs, bar);
        let enabled = regs.u16(reg::COMMAND) & enable != 0;
        let end = at.checked_add(bar.size)?;
        // A BAR full of ones would end right at the top of its space: that is a sizing cycle.
        (enabled && at != 0 && end < top).then_some(at)
    }

    /// Writes an address into a BAR, as firmware does.
    pub(super) fn set_bar(&self, bar: &Bar, address: u64) {
        let at = reg::BAR0 + 4 * u16::from(bar.index);
        match bar.kind {
            BarKind::Mem64 { .. } => self.write(at, &address.to_le_bytes()),
            BarKind::Io | BarKind::Mem32 => self.write(at, &(address as u32).to_le_bytes()),
        }
    }

    pub(super) fn plugged_into(&self, bus: Weak<PciBus>) {
        // A second bus would be a bug of the machine; the first one stays.
        let _ = self.bus.set(bus);
    }

    /// The offset of the first capability with `id`.
    pub fn find_capability(&self, id: u8) -> Option<u16> {
        let regs = self.regs.lock();
        let mut at = regs.bytes[usize::from(reg::CAPABILITIES)];
        // The list is ours and ends, but a device may have patched it: never walk further than it fits.
        for _ in 0..CONVENTIONAL / 4 {
            if usize::from(at) < HEADER_END {
                return None;
            }
            if regs.bytes[usize::from(at)] == id {
                return Some(u16::from(at));
            }
            at = regs.bytes[usize::from(at | 1)];
        }
        None
    }

    /// Back to power-on: BARs and Command cleared, the pin low. Unmaps the BARs. Not to be called
    /// from within a configuration access.
    pub fn reset(&self) {
        {
            let mut regs = self.regs.lock();
            regs.bytes.copy_from_slice(&self.initial[..]);
            regs.intx = false;
            self.drive_intx(&mut regs);
        }
        self.remap();
    }

    fn remap(&self) {
        if let Some(bus) = self.bus.get().and_then(Weak::upgrade) {
            bus.remap();
        }
    }

    /// The registers, for the device's state.
    pub fn save(&self) -> PciConfigState {
        let regs = self.regs.lock();
        let used = regs.bytes.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
        PciConfigState { regs: regs.bytes[..used].to_vec(), intx: regs.intx }
    }

    /// Takes over saved registers and maps the BARs where they were. Bits that the guest cannot write
    /// and the device's identity keep this device's values.
    ///
    /// # Errors
    /// [`StateError::Invalid`] if the state is of another device or too long.
    pub fn restore(&self, state: &PciConfigState) -> Result<(), StateError> {
        let invalid = |reason: &str| StateError::Invalid { kind: "pci-config", reason: reason.to_owned() };
        if state.regs.len() > SPACE {
            return Err(invalid("it is longer than a configuration space"));
        }
        if state.regs.get(..4) != self.initial.get(..4) {
            return Err(invalid("it is of another device"));
        }
        {
            let mut regs = self.regs.lock();
            for (at, byte) in regs.bytes.iter_mut().enumerate() {
                let saved = state.regs.get(at).copied().unwrap_or(0);
                let mask = self.writable[at] | self.w1c[at];
                *byte = (self.initial[at] & !mask) | (saved & mask);
            }
            regs.intx = state.intx;
            self.drive_intx(&mut regs);
        }
        self.remap();
        Ok(())
    }
}
