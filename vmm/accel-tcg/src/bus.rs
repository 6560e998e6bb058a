//! The memory bus as the translator's I/O.

use std::sync::Arc;

use holdfast_device::Bus;
use holdfast_tcg::Io;

/// Serves accesses on a [`Bus`].
#[derive(Debug)]
pub struct BusIo {
    bus: Arc<Bus>,
}

impl BusIo {
    /// On `bus`.
    pub fn new(bus: Arc<Bus>) -> Self {
        Self { bus }
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
}
