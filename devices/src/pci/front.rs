//! How guests reach configuration space and PCI's own port space.

use std::sync::Arc;

use holdfast_device::{Access, Bus, BusDevice, Device, DeviceState, StateError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::PciBus;

/// The enhanced configuration access mechanism: 4 KiB a function, 1 MiB a bus (PCI Express base 4.0,
/// section 7.2.2).
#[derive(Debug)]
pub struct Ecam {
    bus: Arc<PciBus>,
}

impl Ecam {
    /// The window onto `bus`; its length on the memory bus is 1 MiB times the number of bus numbers.
    pub fn new(bus: Arc<PciBus>) -> Arc<Self> {
        Arc::new(Self { bus })
    }

    fn target(offset: u64, len: usize) -> Option<(u8, u8, u16)> {
        let register = (offset & 0xfff) as u16;
        let bus = u8::try_from(offset >> 20).ok()?;
        // An access across two functions is no configuration access.
        (usize::from(register) + len <= 4096).then_some((bus, (offset >> 12) as u8, register))
    }
}

impl BusDevice for Ecam {
    fn read(&self, access: Access, data: &mut [u8]) {
        match Self::target(access.offset, data.len()) {
            Some((bus, devfn, register)) => self.bus.read_config(bus, devfn, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        if let Some((bus, devfn, register)) = Self::target(access.offset, data.len()) {
            self.bus.write_config(bus, devfn, register, data);
        }
    }
}

/// Configuration mechanism 1: an address port at 0xcf8, a data port at 0xcfc (PCI Local Bus 3.0, section
/// 3.2.2.3.2). To be attached at port 0xcf8, 8 ports long.
#[derive(Debug)]
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: Mutex<u32>,
    /// What answers byte accesses to port 0xcf9 (the reset control register of PC chipsets).
    reset_control: Option<Arc<dyn BusDevice>>,
}

/// The address register's enable bit.
const ENABLE: u32 = 1 << 31;
/// Bits of the address register that can be written.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

impl ConfigPorts {
    /// The ports of `bus`. Byte accesses to 0xcf9 go to `reset_control` with offset 0.
    pub fn new(bus: Arc<PciBus>, reset_control: Option<Arc<dyn BusDevice>>) -> Arc<Self> {
        Arc::new(Self { bus, address: Mutex::new(0), reset_control })
    }

    fn target(&self, offset: u64, len: usize) -> Option<(u8, u8, u16)> {
        let address = *self.address.lock();
        let lane = offset.checked_sub(4)?;
        if address & ENABLE == 0 || lane as usize + len > 4 {
            return None;
        }
        Some(((address >> 16) as u8, (address >> 8) as u8, (address & 0xfc) as u16 + lane as u16))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, access: Access, data: &mut [u8]) {
        match (access.offset, data.len(), &self.reset_control) {
            (0, 4, _) => data.copy_from_slice(&self.address.lock().to_le_bytes()),
            (1, 1, Some(reset)) => reset.read(Access { offset: 0, ..access }, data),
            _ => match self.target(access.offset, data.len()) {
                Some((bus, devfn, register)) => self.bus.read_config(bus, devfn, register, data),
                None => data.fill(0xff),
            },
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        match (access.offset, data, &self.reset_control) {
            (0, &[a, b, c, d], _) => *self.address.lock() = u32::from_le_bytes([a, b, c, d]) & ADDRESS_BITS,
            (1, [_], Some(reset)) => reset.write(Access { offset: 0, ..access }, data),
            _ => {
                if let Some((bus, devfn, register)) = self.target(access.offset, data.len()) {
                    self.bus.write_config(bus, devfn, register, data);
                }
            }
        }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct PortsState {
    address: u32,
}

const KIND: &str = "pci-config-ports";

impl Device for ConfigPorts {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {
        *self.address.lock() = 0;
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(KIND, 1, &PortsState { address: *self.address.lock() })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let state: PortsState = state.parse(KIND, 1)?;
        *self.address.lock() = state.address & ADDRESS_BITS;
        Ok(())
    }
}

/// A memory window through which CPUs without port instructions reach PCI's port space.
#[derive(Debug)]
pub struct IoWindow {
    pio: Arc<Bus>,
}

impl IoWindow {
    /// A window onto `pio`; offset 0 is port 0.
    pub fn new(pio: Arc<Bus>) -> Arc<Self> {
        Arc::new(Self { pio })
    }
}

impl BusDevice for IoWindow {
    fn read(&self, access: Access, data: &mut [u8]) {
        self.pio.read(access.vcpu, access.offset, data);
    }

    fn write(&self, access: Access, data: &[u8]) {
        self.pio.write(access.vcpu, access.offset, data);
    }
}
