//! The memory and port buses as the translator's I/O.

use std::sync::Arc;

use holdfast_device::Bus;
use holdfast_tcg::Io;

/// Serves accesses on the VM's buses.
#[derive(Debug)]
pub struct BusIo {
    bus: Arc<Bus>,
    ports: Arc<Bus>,
}

impl BusIo {
    /// On the memory bus `bus` and the port bus `ports`.
    pub fn new(bus: Arc<Bus>, ports: Arc<Bus>) -> Self {
        Self { bus, ports }
    }
}

impl Io for BusIo {
    fn read(&self, vcpu: u32, gpa: u64, size: u8) -> Option<u64> {
        let mut data = [0; 8];
        let there = self.bus.read(Some(vcpu), gpa, data.get_mut(..usize::from(size))?);
        there.then_some(u64::from_le_bytes(data))
    }

    fn write(&self, vcpu: u32, gpa: u64, size: u8, value: u64) -> bool {
        let data = value.to_le_bytes();
        data.get(..usize::from(size)).is_some_and(|data| self.bus.write(Some(vcpu), gpa, data))
    }

    fn port_read(&self, vcpu: u32, port: u16, size: u8) -> Option<u32> {
        let mut data = [0; 4];
        let there = self.ports.read(Some(vcpu), u64::from(port), data.get_mut(..usize::from(size))?);
        there.then_some(u32::from_le_bytes(data))
    }

    fn port_write(&self, vcpu: u32, port: u16, size: u8, value: u32) -> bool {
        let data = value.to_le_bytes();
        data.get(..usize::from(size)).is_some_and(|data| self.ports.write(Some(vcpu), u64::from(port), data))
    }
}
