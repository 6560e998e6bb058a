//! Parallel NOR flash with the Intel command set (JEDEC JESD68.01 and JESD137, command set 0x0001): one
//! bank of two 16-bit chips side by side, 32 bits wide, with erase blocks of 256 KiB, or of one chip of 8 bits with
//! blocks of 4 KiB, as firmware of PCs expects it.
//!
//! A bank is backed by a file, mapped into guest memory as ROM while it is in array mode, or by memory
//! that is only allocated for blocks that were programmed.

mod cfi;
mod store;

use std::fmt::Debug;
use std::fs::File;
use std::sync::Arc;

use holdfast_device::{Access, BuildError, BusDevice, Device, DeviceState, StateError};
use holdfast_memory::GuestRegion;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use store::Store;

/// Bytes of an erase block of [`Chips::Pair16`] (both chips).
pub const BLOCK: u64 = 256 << 10;
/// Bytes of an erase block of [`Chips::Single8`].
pub const SMALL_BLOCK: u64 = 4 << 10;
/// Most bytes of a bank.
pub const MAX_SIZE: u64 = 256 << 20;
/// Bytes of the write buffer (all chips).
const BUFFER: usize = 2048;

/// What a bank consists of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Chips {
    /// Two chips of 16 bits: blocks of 256 KiB, the size is a power of two.
    #[default]
    Pair16,
    /// One chip of 8 bits: blocks of 4 KiB, the size is any number of blocks. Clearing the status clears "ready"
    /// too, until the next operation: it is how OVMF tells flash from ROM.
    Single8,
}

impl Chips {
    /// Bytes of an erase block.
    fn block(self) -> u64 {
        match self {
            Self::Pair16 => BLOCK,
            Self::Single8 => SMALL_BLOCK,
        }
    }

    /// Bytes of the bank for one address of a chip: also what one write takes at most.
    fn word(self) -> usize {
        match self {
            Self::Pair16 => 4,
            Self::Single8 => 1,
        }
    }

    /// How many chips share the bank.
    fn count(self) -> u64 {
        match self {
            Self::Pair16 => 2,
            Self::Single8 => 1,
        }
    }

    fn is_size(self, size: u64) -> bool {
        let whole = match self {
            Self::Pair16 => size.is_power_of_two(),
            Self::Single8 => size.is_multiple_of(SMALL_BLOCK),
        };
        whole && (self.block()..=MAX_SIZE).contains(&size)
    }
}

/// Status: ready.
const READY: u8 = 0x80;
/// Status: erase failed.
const ERASE_ERROR: u8 = 0x20;
/// Status: programming failed.
const PROGRAM_ERROR: u8 = 0x10;
/// Status: the block is locked.
const LOCKED: u8 = 0x02;

/// Maps a bank into guest memory as ROM, where the accelerator can.
pub trait RomHook: Send + Sync + Debug {
    /// Maps `region` at `gpa`: reads and fetches go there, writes to the bus. False if it cannot be done:
    /// then reads go to the bus too.
    fn map(&self, gpa: u64, region: &Arc<GuestRegion>) -> bool;
    /// Undoes [`RomHook::map`].
    fn unmap(&self, gpa: u64);
}

/// What a bank holds.
#[derive(Debug)]
pub enum Backing {
    /// Erased flash that lives as long as the VM.
    Erased,
    /// A file of exactly the bank's size.
    File {
        /// The file, open for writing unless read-only.
        file: File,
        /// All blocks are locked.
        readonly: bool,
    },
}

/// What a bank is made from.
#[derive(Debug)]
pub struct FlashSpec {
    /// The device's id.
    pub id: String,
    /// First guest-physical address.
    pub gpa: u64,
    /// What the bank consists of.
    pub chips: Chips,
    /// Bytes: at least one block, at most [`MAX_SIZE`]; see [`Chips`].
    pub size: u64,
    /// Contents.
    pub backing: Backing,
    /// The accelerator, if it can map ROM.
    pub rom: Option<Arc<dyn RomHook>>,
}

/// What reads return, and what the next write means.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Mode {
    #[default]
    Array,
    Status,
    Id,
    Query,
    /// The next write is a datum.
    Program,
    /// The next write confirms.
    Erase,
    /// The next write is a lock or unlock.
    Lock,
    /// The next write is a word count minus one.
    BufferCount,
    /// This many data writes follow into the block that starts at the offset.
    BufferData(u32, u64),
    /// The next write confirms the buffer.
    BufferConfirm,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Regs {
    mode: Mode,
    status: u8,
    /// (offset, bytes) to be programmed by a confirmed buffer write.
    buffer: Vec<(u64, Vec<u8>)>,
}

#[derive(Debug)]
struct Inner {
    regs: Regs,
    store: Store,
    mapped: bool,
}

/// One bank.
#[derive(Debug)]
pub struct Flash {
    id: String,
    gpa: u64,
    chips: Chips,
    size: u64,
    rom: Option<Arc<dyn RomHook>>,
    query: [u8; cfi::LEN],
    inner: Mutex<Inner>,
}

impl Flash {
    /// A bank in array mode.
    ///
    /// # Errors
    /// [`BuildError`] if the size is impossible or the file does not fit or cannot be mapped.
    pub fn new(spec: FlashSpec) -> Result<Arc<Self>, BuildError> {
        let FlashSpec { id, gpa, chips, size, backing, rom } = spec;
        if !chips.is_size(size) {
            let possible = match chips {
                Chips::Pair16 => "a power of two from 256 KiB to 256 MiB",
                Chips::Single8 => "a multiple of 4 KiB up to 256 MiB",
            };
            return Err(BuildError::Config { id, reason: format!("{size} bytes; {possible} is possible") });
        }
        let store = Store::new(&id, gpa, size, chips.block(), backing)?;
        let regs = Regs { status: READY, ..Regs::default() };
        let flash = Self {
            id,
            gpa,
            chips,
            size,
            rom,
            query: cfi::query(chips, size, BUFFER as u64),
            inner: Mutex::new(Inner { regs, store, mapped: false }),
        };
        flash.update_mapping(&mut flash.inner.lock());
        Ok(Arc::new(flash))
    }

    /// Bytes of the bank, for the bus.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What is programmed from `offset` on, whatever the mode; bytes behind the end are ones.
    pub fn contents(&self, offset: u64, data: &mut [u8]) {
        self.inner.lock().store.read(offset, data);
    }

    /// Maps or unmaps the bank as its mode asks.
    fn update_mapping(&self, inner: &mut Inner) {
        let (Some(rom), Some(region)) = (&self.rom, inner.store.region()) else { return };
        match (inner.regs.mode == Mode::Array, inner.mapped) {
            (true, false) => inner.mapped = rom.map(self.gpa, region),
            (false, true) => {
                rom.unmap(self.gpa);
                inner.mapped = false;
            }
            _ => {}
        }
    }

    /// A byte of a non-array mode: both chips answer alike in their 16-bit lanes.
    fn register(&self, inner: &Inner, offset: u64) -> u8 {
        // Bits 8 to 15 of each 16-bit lane read as zero.
        if self.chips == Chips::Pair16 && offset % 2 == 1 {
            return 0;
        }
        let word = self.chips.word() as u64;
        let address = offset / word;
        match inner.regs.mode {
            Mode::Id => cfi::identifier(address, self.chips.block() / word, inner.store.readonly()),
            Mode::Query => {
                let at = usize::try_from(address).unwrap_or(usize::MAX);
                self.query.get(at).copied().unwrap_or(0)
            }
            _ => inner.regs.status,
        }
    }

    fn command(&self, inner: &mut Inner, command: u8) {
        let regs = &mut inner.regs;
        regs.mode = match command {
            0x10 | 0x40 => Mode::Program,
            0x20 => Mode::Erase,
            0x50 => {
                regs.status = if self.chips == Chips::Single8 { 0 } else { READY };
                // The mode stays as it was.
                return;
            }
            0x60 => Mode::Lock,
            0x70 => Mode::Status,
            0x90 => Mode::Id,
            0x98 => Mode::Query,
            0xe8 => {
                regs.status |= READY;
                regs.buffer.clear();
                Mode::BufferCount
            }
            // 0xff, 0xf0, 0x00, and anything that is no command.
            _ => Mode::Array,
        };
    }

    /// One write of at most [`Chips::word`] bytes.
    fn write_word(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        let Some(&low) = data.first() else { return };
        let block_size = self.chips.block();
        match inner.regs.mode.clone() {
            Mode::Array | Mode::Status | Mode::Id | Mode::Query => self.command(inner, low),
            Mode::Program => {
                inner.regs.status |= READY;
                if !inner.store.program(offset, data) {
                    inner.regs.status |= PROGRAM_ERROR | LOCKED;
                }
                inner.regs.mode = Mode::Status;
            }
            Mode::Erase => {
                inner.regs.status |= READY;
                if low != 0xd0 {
                    inner.regs.status |= ERASE_ERROR | PROGRAM_ERROR;
                } else if !inner.store.erase(offset / block_size) {
                    inner.regs.status |= ERASE_ERROR | LOCKED;
                }
                inner.regs.mode = Mode::Status;
            }
            Mode::Lock => {
                // Blocks have no locks of their own: 0x01 (lock), 0xd0 (unlock) and 0x2f are acknowledged.
                if !matches!(low, 0x01 | 0xd0 | 0x2f) {
                    inner.regs.status |= ERASE_ERROR | PROGRAM_ERROR;
                }
                inner.regs.mode = Mode::Status;
            }
            Mode::BufferCount => {
                let words = u32::from(low) | data.get(1).map_or(0, |&b| u32::from(b) << 8);
                if words as usize >= BUFFER / self.chips.word() {
                    inner.regs.status |= ERASE_ERROR | PROGRAM_ERROR;
                    inner.regs.mode = Mode::Status;
                } else {
                    inner.regs.mode = Mode::BufferData(words + 1, offset / block_size * block_size);
                }
            }
            Mode::BufferData(left, block) => {
                if offset / block_size * block_size != block {
                    inner.regs.status |= PROGRAM_ERROR;
                    inner.regs.mode = Mode::Status;
                    return;
                }
                inner.regs.buffer.push((offset, data.to_vec()));
                inner.regs.mode =
                    if left <= 1 { Mode::BufferConfirm } else { Mode::BufferData(left - 1, block) };
            }
            Mode::BufferConfirm => {
                inner.regs.status |= READY;
                let buffer = std::mem::take(&mut inner.regs.buffer);
                if low != 0xd0 {
                    inner.regs.status |= ERASE_ERROR | PROGRAM_ERROR;
                } else if !buffer.iter().all(|(at, bytes)| inner.store.program(*at, bytes)) {
                    inner.regs.status |= PROGRAM_ERROR | LOCKED;
                }
                inner.regs.mode = Mode::Status;
            }
        }
    }
}

impl BusDevice for Flash {
    fn read(&self, access: Access, data: &mut [u8]) {
        let inner = self.inner.lock();
        if inner.regs.mode == Mode::Array {
            inner.store.read(access.offset, data);
            return;
        }
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.register(&inner, access.offset.saturating_add(i as u64));
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        let mut inner = self.inner.lock();
        let size = self.chips.word();
        for (i, word) in data.chunks(size).enumerate() {
            let Some(offset) = access.offset.checked_add((size * i) as u64) else { break };
            if offset >= self.size {
                break;
            }
            self.write_word(&mut inner, offset, word);
        }
        self.update_mapping(&mut inner);
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    regs: Regs,
    /// (offset, bytes) of what is not erased, for banks without a file.
    programmed: Vec<(u64, Vec<u8>)>,
}

const KIND: &str = "cfi-flash";

impl Device for Flash {
    fn id(&self) -> &str {
        &self.id
    }

    fn reset(&self) {
        let mut inner = self.inner.lock();
        inner.regs = Regs { status: READY, ..Regs::default() };
        self.update_mapping(&mut inner);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let inner = self.inner.lock();
        DeviceState::new(KIND, 1, &State { regs: inner.regs.clone(), programmed: inner.store.programmed() })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let state: State = state.parse(KIND, 1)?;
        let invalid = |reason: &str| StateError::Invalid { kind: KIND, reason: reason.to_owned() };
        let buffered: usize = state.regs.buffer.iter().map(|(_, bytes)| bytes.len()).sum();
        // What the guest may still add counts too: it would be added without another look.
        let expected = match state.regs.mode {
            Mode::BufferData(left, _) => left as usize,
            _ => 0,
        };
        if buffered > BUFFER || state.regs.buffer.len().saturating_add(expected) > BUFFER / self.chips.word()
        {
            return Err(invalid("its write buffer is larger than this device's"));
        }
        let mut inner = self.inner.lock();
        if !inner.store.set_programmed(&state.programmed) {
            return Err(invalid("it has bytes behind this bank's end"));
        }
        inner.regs = state.regs;
        self.update_mapping(&mut inner);
        Ok(())
    }
}

impl Drop for Flash {
    fn drop(&mut self) {
        if let (Some(rom), true) = (&self.rom, self.inner.get_mut().mapped) {
            rom.unmap(self.gpa);
        }
    }
}

#[cfg(test)]
mod tests;
