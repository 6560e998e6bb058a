//! The firmware configuration device (QEMU, docs/specs/fw_cfg.rst): numbered items and named files that
//! firmware and kernels read by selecting a key.
//!
//! Machines add items before the guest starts; [`FwCfg::port_io`] and [`FwCfg::mmio`] are the two front
//! ends, both with the DMA interface.

mod front;

use std::collections::BTreeMap;
use std::sync::Arc;

use holdfast_device::{Device, DeviceState, StateError};
use holdfast_memory::GuestMemory;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

pub use front::{FwCfgMmio, FwCfgPorts};

/// Well-known keys.
pub mod key {
    /// `QEMU`.
    pub const SIGNATURE: u16 = 0x00;
    /// Feature bits.
    pub const ID: u16 = 0x01;
    /// Machine UUID.
    pub const UUID: u16 = 0x02;
    /// Bytes of RAM, 64 bits.
    pub const RAM_SIZE: u16 = 0x03;
    /// Non-zero without a graphics adapter, 16 bits.
    pub const NO_GRAPHIC: u16 = 0x04;
    /// vCPUs at boot, 16 bits.
    pub const CPUS: u16 = 0x05;
    /// Kernel size, 32 bits.
    pub const KERNEL_SIZE: u16 = 0x08;
    /// Initramfs size, 32 bits.
    pub const INITRD_SIZE: u16 = 0x0b;
    /// Non-zero: the firmware shows a boot menu, 16 bits.
    pub const BOOT_MENU: u16 = 0x0e;
    /// vCPUs that there can be, 16 bits.
    pub const MAX_CPUS: u16 = 0x0f;
    /// Kernel.
    pub const KERNEL_DATA: u16 = 0x11;
    /// Initramfs.
    pub const INITRD_DATA: u16 = 0x12;
    /// Command line size with its NUL, 32 bits.
    pub const CMDLINE_SIZE: u16 = 0x14;
    /// Command line with its NUL.
    pub const CMDLINE_DATA: u16 = 0x15;
    /// File directory.
    pub const FILE_DIR: u16 = 0x19;
    /// The first file.
    pub const FILE_FIRST: u16 = 0x20;
}

/// Feature bits of [`key::ID`]: the traditional and the DMA interface.
const FEATURES: u32 = 0b11;
/// Key bit that once chose writing; it selects nothing.
const WRITE_CHANNEL: u16 = 0x4000;
/// Most files, so that all their keys lie below the write channel.
const MAX_FILES: usize = 1024;
/// Bytes of a file name, NUL included.
const NAME: usize = 56;
/// What reading the DMA address register gives.
const DMA_SIGNATURE: u64 = 0x5145_4d55_2043_4647;

/// Bits of the DMA control word.
mod dma {
    pub const ERROR: u32 = 1 << 0;
    pub const READ: u32 = 1 << 1;
    pub const SKIP: u32 = 1 << 2;
    pub const SELECT: u32 = 1 << 3;
    pub const WRITE: u32 = 1 << 4;
}

/// A file that cannot be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FwCfgError {
    /// Its name is too long, empty, or there already.
    #[error("fw_cfg file name `{0}` is in use, empty, or longer than 55 bytes")]
    Name(String),
    /// There are too many, or it is too large.
    #[error("fw_cfg has no room for file `{0}`")]
    Room(String),
}

#[derive(Debug, Clone, Default)]
struct Item {
    data: Vec<u8>,
    writable: bool,
}

#[derive(Debug, Default)]
struct Regs {
    items: BTreeMap<u16, Item>,
    /// (key, name) in the order in which they were added.
    files: Vec<(u16, String)>,
    selected: u16,
    offset: u32,
    /// The upper half of the DMA address.
    dma_high: u32,
}

impl Regs {
    fn select(&mut self, key: u16) {
        self.selected = key & !WRITE_CHANNEL;
        self.offset = 0;
    }

    /// Bytes of the selected item from the current offset; zeroes behind its end.
    fn read(&mut self, data: &mut [u8]) {
        let item = self.items.get(&self.selected).map_or(&[][..], |i| &i.data);
        let rest = item.get(self.offset as usize..).unwrap_or(&[]);
        let n = rest.len().min(data.len());
        let (head, tail) = data.split_at_mut(n);
        head.copy_from_slice(&rest[..n]);
        tail.fill(0);
        self.offset = self.offset.saturating_add(data.len() as u32);
    }

    /// The part of the selected item that a DMA write of `len` bytes may replace.
    fn target(&mut self, len: u32) -> Option<&mut [u8]> {
        let end = self.offset.checked_add(len)?;
        let item = self.items.get_mut(&self.selected).filter(|i| i.writable)?;
        item.data.get_mut(self.offset as usize..end as usize)
    }

    fn directory(&self) -> Vec<u8> {
        let mut dir = (self.files.len() as u32).to_be_bytes().to_vec();
        for (key, name) in &self.files {
            let size = self.items.get(key).map_or(0, |i| i.data.len());
            dir.extend((size as u32).to_be_bytes());
            dir.extend(key.to_be_bytes());
            dir.extend([0; 2]);
            let mut field = [0; NAME];
            field[..name.len()].copy_from_slice(name.as_bytes());
            dir.extend(field);
        }
        dir
    }
}

/// The device.
#[derive(Debug)]
pub struct FwCfg {
    memory: GuestMemory,
    regs: Mutex<Regs>,
}

/// Bytes copied at a time by DMA.
const CHUNK: usize = 4096;

impl FwCfg {
    /// A device with its signature, its features and an empty directory; DMA goes to `memory`.
    pub fn new(memory: GuestMemory) -> Arc<Self> {
        let device = Arc::new(Self { memory, regs: Mutex::default() });
        device.add_item(key::SIGNATURE, b"QEMU".to_vec());
        device.add_item(key::ID, FEATURES.to_le_bytes().to_vec());
        device.add_item(key::FILE_DIR, 0u32.to_be_bytes().to_vec());
        device
    }

    /// Sets the item with a well-known key (bit 15: architecture's own), replacing an earlier one.
    pub fn add_item(&self, key: u16, data: Vec<u8>) {
        self.regs.lock().items.insert(key & !WRITE_CHANNEL, Item { data, writable: false });
    }

    /// Adds a file and returns its key.
    ///
    /// # Errors
    /// [`FwCfgError`].
    pub fn add_file(&self, name: &str, data: Vec<u8>) -> Result<u16, FwCfgError> {
        self.insert_file(name, data, false)
    }

    /// Adds a file that the guest may overwrite by DMA (its size stays).
    ///
    /// # Errors
    /// [`FwCfgError`].
    pub fn add_writable_file(&self, name: &str, data: Vec<u8>) -> Result<u16, FwCfgError> {
        self.insert_file(name, data, true)
    }

    fn insert_file(&self, name: &str, data: Vec<u8>, writable: bool) -> Result<u16, FwCfgError> {
        let mut regs = self.regs.lock();
        if name.is_empty() || name.len() >= NAME || regs.files.iter().any(|(_, n)| n == name) {
            return Err(FwCfgError::Name(name.to_owned()));
        }
        if regs.files.len() >= MAX_FILES || u32::try_from(data.len()).is_err() {
            return Err(FwCfgError::Room(name.to_owned()));
        }
        let key = key::FILE_FIRST + regs.files.len() as u16;
        regs.items.insert(key, Item { data, writable });
        regs.files.push((key, name.to_owned()));
        let directory = regs.directory();
        regs.items.insert(key::FILE_DIR, Item { data: directory, writable: false });
        Ok(key)
    }

    /// Replaces a file's contents, for tables that are made anew at every reset. False if there is none
    /// with this name.
    pub fn set_file(&self, name: &str, data: Vec<u8>) -> bool {
        let mut regs = self.regs.lock();
        let Some(key) = regs.files.iter().find(|(_, n)| n == name).map(|(key, _)| *key) else { return false };
        if let Some(item) = regs.items.get_mut(&key) {
            item.data = data;
        }
        let directory = regs.directory();
        regs.items.insert(key::FILE_DIR, Item { data: directory, writable: false });
        true
    }

    /// The contents of a file, for example what a guest wrote into it.
    pub fn file(&self, name: &str) -> Option<Vec<u8>> {
        let regs = self.regs.lock();
        let (key, _) = regs.files.iter().find(|(_, n)| n == name)?;
        regs.items.get(key).map(|i| i.data.clone())
    }

    /// The front end for a port bus: 12 ports, at 0x510 on PCs.
    pub fn port_io(self: &Arc<Self>) -> Arc<FwCfgPorts> {
        Arc::new(FwCfgPorts(Arc::clone(self)))
    }

    /// The front end for a memory bus: 24 bytes.
    pub fn mmio(self: &Arc<Self>) -> Arc<FwCfgMmio> {
        Arc::new(FwCfgMmio(Arc::clone(self)))
    }

    fn select(&self, key: u16) {
        self.regs.lock().select(key);
    }

    fn read_data(&self, data: &mut [u8]) {
        self.regs.lock().read(data);
    }

    /// A read of the DMA address register.
    fn read_dma(offset: u64, data: &mut [u8]) {
        let bytes = DMA_SIGNATURE.to_be_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = usize::try_from(offset).ok().and_then(|o| bytes.get(o + i)).copied().unwrap_or(0);
        }
    }

    /// A write to the DMA address register (big-endian); its lower half starts the transfer.
    fn write_dma(&self, offset: u64, data: &[u8]) {
        let mut regs = self.regs.lock();
        let address = match (offset, data) {
            (0, &[a, b, c, d]) => {
                regs.dma_high = u32::from_be_bytes([a, b, c, d]);
                return;
            }
            (4, &[a, b, c, d]) => {
                u64::from(std::mem::take(&mut regs.dma_high)) << 32
                    | u64::from(u32::from_be_bytes([a, b, c, d]))
            }
            (0, &[a, b, c, d, e, f, g, h]) => u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            _ => return,
        };
        self.transfer(&mut regs, address);
    }

    /// Carries out the `FWCfgDmaAccess` at `address`: control, length and address, all big-endian.
    fn transfer(&self, regs: &mut Regs, address: u64) {
        let mut header = [0; 16];
        let at = GuestAddress(address);
        if self.memory.read_slice(&mut header, at).is_err() {
            tracing::warn!("fw_cfg: DMA descriptor at {address:#x} is not in RAM");
            return;
        }
        let word = |i: usize| u32::from_be_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
        let (control, length) = (word(0), word(4));
        let target = u64::from(word(8)) << 32 | u64::from(word(12));
        if control & dma::SELECT != 0 {
            regs.select((control >> 16) as u16);
        }
        let done = if control & dma::READ != 0 {
            self.dma_read(regs, target, length)
        } else if control & dma::WRITE != 0 {
            self.dma_write(regs, target, length)
        } else {
            if control & dma::SKIP != 0 {
                regs.offset = regs.offset.saturating_add(length);
            }
            true
        };
        let status = if done { 0 } else { dma::ERROR };
        if let Err(error) = self.memory.write_slice(&status.to_be_bytes(), at) {
            tracing::warn!(%error, "fw_cfg: DMA status cannot be written");
        }
    }

    fn dma_read(&self, regs: &mut Regs, target: u64, length: u32) -> bool {
        let mut buffer = [0; CHUNK];
        let mut done = 0u64;
        while done < u64::from(length) {
            let n = (u64::from(length) - done).min(CHUNK as u64);
            let chunk = &mut buffer[..n as usize];
            regs.read(chunk);
            let Some(at) = target.checked_add(done) else { return false };
            if self.memory.write_slice(chunk, GuestAddress(at)).is_err() {
                return false;
            }
            done += n;
        }
        true
    }

    fn dma_write(&self, regs: &mut Regs, source: u64, length: u32) -> bool {
        let Some(target) = regs.target(length) else { return false };
        if self.memory.read_slice(target, GuestAddress(source)).is_err() {
            return false;
        }
        regs.offset += length;
        true
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    selected: u16,
    offset: u32,
    dma_high: u32,
    /// Files that the guest may have changed, by name.
    written: BTreeMap<String, Vec<u8>>,
}

const KIND: &str = "fw-cfg";

impl Device for FwCfg {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {
        let mut regs = self.regs.lock();
        regs.select(key::SIGNATURE);
        regs.dma_high = 0;
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let regs = self.regs.lock();
        let writable = |key: &u16| regs.items.get(key).filter(|i| i.writable).map(|i| i.data.clone());
        let written =
            regs.files.iter().filter_map(|(key, name)| Some((name.clone(), writable(key)?))).collect();
        let state = State { selected: regs.selected, offset: regs.offset, dma_high: regs.dma_high, written };
        DeviceState::new(KIND, 1, &state)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let state: State = state.parse(KIND, 1)?;
        let mut regs = self.regs.lock();
        regs.selected = state.selected & !WRITE_CHANNEL;
        (regs.offset, regs.dma_high) = (state.offset, state.dma_high);
        let files = regs.files.clone();
        for (name, data) in state.written {
            let key = files.iter().find(|(_, n)| *n == name).map(|(key, _)| *key);
            let item = key.and_then(|key| regs.items.get_mut(&key)).filter(|i| i.writable);
            match item {
                Some(item) if item.data.len() == data.len() => item.data = data,
                _ => {
                    let reason = format!("file `{name}` is not here or has another size");
                    return Err(StateError::Invalid { kind: KIND, reason });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
