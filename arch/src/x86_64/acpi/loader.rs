//! Tables whose addresses are not known yet.
//!
//! Firmware that finds `etc/table-loader` in fw_cfg allocates memory for the files named there, adds
//! the files' addresses to the pointers in them, and makes the checksums. A directly started kernel
//! has no such firmware, so [`LinkedTables::place`] does the same here.

use holdfast_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// The file that holds the root pointer.
pub const RSDP: &str = "etc/acpi/rsdp";
/// The file that holds all tables.
pub const TABLES: &str = "etc/acpi/tables";
/// The linker script.
pub const LOADER: &str = "etc/table-loader";

/// A pointer into [`TABLES`]: it holds an offset until it is relocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pointer {
    /// The file in which it is.
    pub file: &'static str,
    /// Where in that file.
    pub at: u32,
    /// Its size in bytes: 4 or 8.
    pub size: u8,
}

/// A byte that makes a range of its file sum up to zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Checksum {
    file: &'static str,
    at: u32,
    start: u32,
    len: u32,
}

/// ACPI tables before they have an address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkedTables {
    /// Contents of [`RSDP`].
    pub rsdp: Vec<u8>,
    /// Contents of [`TABLES`].
    pub tables: Vec<u8>,
    pointers: Vec<Pointer>,
    checksums: Vec<Checksum>,
}

/// Tables that cannot be placed.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// They do not fit.
    #[error("ACPI tables need {need:#x} bytes, there are {have:#x}")]
    TooLong {
        /// Their length.
        need: u64,
        /// The room.
        have: u64,
    },
    /// There is no RAM where they are to go.
    #[error("ACPI tables cannot be written")]
    Memory(#[from] GuestMemoryError),
}

impl LinkedTables {
    /// Appends bytes at a multiple of `align`; returns their offset.
    pub(super) fn add_raw(&mut self, bytes: &[u8], align: usize) -> u32 {
        self.tables.resize(self.tables.len().next_multiple_of(align), 0);
        let at = self.tables.len() as u32;
        self.tables.extend_from_slice(bytes);
        at
    }

    /// Appends a table with the usual header; returns its offset.
    pub(super) fn add(&mut self, table: &[u8]) -> u32 {
        let at = self.add_raw(table, 16);
        self.clear_checksum(TABLES, at + 9);
        self.checksums.push(Checksum { file: TABLES, at: at + 9, start: at, len: table.len() as u32 });
        at
    }

    /// Checksums are 0 until they are computed: OVMF stores the negative sum of all bytes, this one included.
    fn clear_checksum(&mut self, file: &str, at: u32) {
        let bytes = if file == RSDP { &mut self.rsdp } else { &mut self.tables };
        if let Some(byte) = bytes.get_mut(at as usize) {
            *byte = 0;
        }
    }

    pub(super) fn point(&mut self, pointer: Pointer) {
        self.pointers.push(pointer);
    }

    pub(super) fn set_rsdp(&mut self, rsdp: Vec<u8>) {
        self.rsdp = rsdp;
        for (at, size) in [(16, 4), (24, 8)] {
            self.point(Pointer { file: RSDP, at, size });
        }
        // The first 20 bytes for ACPI 1.0, then all of it.
        for (at, len) in [(8, 20), (32, 36)] {
            self.clear_checksum(RSDP, at);
            self.checksums.push(Checksum { file: RSDP, at, start: 0, len });
        }
    }

    /// The linker script: commands of 128 bytes.
    pub fn script(&self) -> Vec<u8> {
        let mut out = Vec::new();
        // Zone 1: anywhere below 4 GiB. Zone 2: 0xf0000 to 0xfffff, where root pointers are looked for.
        for (file, align, zone) in [(RSDP, 16u32, 2u8), (TABLES, 64, 1)] {
            command(&mut out, 1, &[&name(file), &align.to_le_bytes(), &[zone]]);
        }
        for p in &self.pointers {
            command(&mut out, 2, &[&name(p.file), &name(TABLES), &p.at.to_le_bytes(), &[p.size]]);
        }
        for c in &self.checksums {
            let range = [c.at.to_le_bytes(), c.start.to_le_bytes(), c.len.to_le_bytes()];
            command(&mut out, 3, &[&name(c.file), range.as_flattened()]);
        }
        out
    }

    /// The tables as they are at address `tables`, and the root pointer.
    pub fn relocated(&self, tables: u64) -> (Vec<u8>, Vec<u8>) {
        let mut out = self.clone();
        for p in &self.pointers {
            let file = if p.file == RSDP { &mut out.rsdp } else { &mut out.tables };
            let (at, size) = (p.at as usize, usize::from(p.size));
            let Some(slot) = file.get_mut(at..at + size) else { continue };
            let mut value = [0; 8];
            value.iter_mut().zip(&*slot).for_each(|(to, from)| *to = *from);
            let value = u64::from_le_bytes(value).wrapping_add(tables).to_le_bytes();
            slot.iter_mut().zip(value).for_each(|(to, from)| *to = from);
        }
        for c in &self.checksums {
            let file = if c.file == RSDP { &mut out.rsdp } else { &mut out.tables };
            let range = c.start as usize..(c.start + c.len) as usize;
            let sum = file.get(range).unwrap_or(&[]).iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
            if let Some(byte) = file.get_mut(c.at as usize) {
                *byte = byte.wrapping_sub(sum);
            }
        }
        (out.rsdp, out.tables)
    }

    /// Writes the root pointer at `base` and the tables behind it, all within `room` bytes below 4 GiB.
    ///
    /// # Errors
    /// [`PlaceError`] if they do not fit or there is no RAM.
    pub fn place(&self, memory: &GuestMemory, base: u64, room: u64) -> Result<(), PlaceError> {
        let at = (base + self.rsdp.len() as u64).next_multiple_of(64);
        let need = at - base + self.tables.len() as u64;
        if need > room {
            return Err(PlaceError::TooLong { need, have: room });
        }
        let (rsdp, tables) = self.relocated(at);
        memory.write_slice(&rsdp, GuestAddress(base))?;
        memory.write_slice(&tables, GuestAddress(at))?;
        Ok(())
    }
}

/// A file name as the script holds it.
fn name(file: &str) -> [u8; 56] {
    let mut out = [0; 56];
    out.iter_mut().zip(file.bytes()).for_each(|(to, from)| *to = from);
    out
}

fn command(out: &mut Vec<u8>, code: u32, parts: &[&[u8]]) {
    let end = out.len() + 128;
    out.extend(code.to_le_bytes());
    parts.iter().for_each(|p| out.extend_from_slice(p));
    out.resize(end, 0);
}
