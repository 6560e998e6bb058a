//! The two register layouts.

use std::sync::Arc;

use holdfast_device::{Access, BusDevice};

use super::FwCfg;

/// Port front end: selector at 0 (16 bits, little-endian), data at 1, DMA address at 4.
#[derive(Debug)]
pub struct FwCfgPorts(pub(super) Arc<FwCfg>);

impl BusDevice for FwCfgPorts {
    fn read(&self, access: Access, data: &mut [u8]) {
        match access.offset {
            1 if data.len() == 1 => self.0.read_data(data),
            at @ 4..12 => FwCfg::read_dma(at - 4, data),
            _ => data.fill(0),
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        match (access.offset, data) {
            (0, &[low, high]) => self.0.select(u16::from_le_bytes([low, high])),
            (at @ 4..12, data) => self.0.write_dma(at - 4, data),
            // The data port can no longer be written.
            _ => {}
        }
    }
}

/// Memory front end: data at 0 (any width), selector at 8 (16 bits, big-endian), DMA address at 16.
#[derive(Debug)]
pub struct FwCfgMmio(pub(super) Arc<FwCfg>);

impl BusDevice for FwCfgMmio {
    fn read(&self, access: Access, data: &mut [u8]) {
        match access.offset {
            0 if data.len() <= 8 => self.0.read_data(data),
            at @ 16..24 => FwCfg::read_dma(at - 16, data),
            _ => data.fill(0),
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        match (access.offset, data) {
            (8, &[high, low]) => self.0.select(u16::from_be_bytes([high, low])),
            (at @ 16..24, data) => self.0.write_dma(at - 16, data),
            _ => {}
        }
    }
}
