//! The bytes of a bank.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use holdfast_device::BuildError;
use holdfast_memory::GuestRegion;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MemoryRegionAddress, MmapRegion};

use super::Backing;

/// Saved runs of programmed bytes start and end at multiples of this.
const RUN: usize = 64;

#[derive(Debug)]
pub(super) enum Store {
    /// Programmed blocks by number; all others are erased.
    Sparse { size: u64, block_size: u64, blocks: BTreeMap<u64, Box<[u8]>> },
    /// A mapped file.
    File { size: u64, block_size: u64, region: Arc<GuestRegion>, readonly: bool },
}

impl Store {
    pub(super) fn new(
        id: &str,
        gpa: u64,
        size: u64,
        block_size: u64,
        backing: Backing,
    ) -> Result<Self, BuildError> {
        let Backing::File { file, readonly } = backing else {
            return Ok(Self::Sparse { size, block_size, blocks: BTreeMap::new() });
        };
        let host = |what: &str, source| BuildError::Host { id: id.to_owned(), what: what.to_owned(), source };
        let len = file.metadata().map_err(|e| host("the flash image cannot be examined", e))?.len();
        if len != size {
            let reason = format!("the flash image has {len} bytes, the bank {size}; both must be equal");
            return Err(BuildError::Config { id: id.to_owned(), reason });
        }
        let protection = libc::PROT_READ | if readonly { 0 } else { libc::PROT_WRITE };
        let sharing = libc::MAP_NORESERVE | if readonly { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
        let mapping = MmapRegion::build(Some(FileOffset::new(file, 0)), size as usize, protection, sharing)
            .map_err(|e| host("the flash image cannot be mapped", io::Error::other(e)))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(gpa)).ok_or_else(|| {
            host("the flash bank ends behind the address space", io::ErrorKind::InvalidInput.into())
        })?;
        Ok(Self::File { size, block_size, region: Arc::new(region), readonly })
    }

    /// The mapping, if there is a file.
    pub(super) fn region(&self) -> Option<&Arc<GuestRegion>> {
        match self {
            Self::Sparse { .. } => None,
            Self::File { region, .. } => Some(region),
        }
    }

    pub(super) fn readonly(&self) -> bool {
        matches!(self, Self::File { readonly: true, .. })
    }

    fn size(&self) -> u64 {
        match self {
            Self::Sparse { size, .. } | Self::File { size, .. } => *size,
        }
    }

    fn block_size(&self) -> u64 {
        match self {
            Self::Sparse { block_size, .. } | Self::File { block_size, .. } => *block_size,
        }
    }

    /// Reads; bytes behind the end are ones.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let block_size = self.block_size();
        match self {
            Self::File { region, .. } => {
                // A short read at the end leaves ones.
                let _ = region.read(data, MemoryRegionAddress(offset));
            }
            Self::Sparse { blocks, .. } => {
                for (i, byte) in data.iter_mut().enumerate() {
                    let at = offset.saturating_add(i as u64);
                    if let Some(block) = blocks.get(&(at / block_size)) {
                        *byte = block[(at % block_size) as usize];
                    }
                }
            }
        }
    }

    /// Programs: bits can only go from one to zero. False if the bank is read-only or ends before.
    pub(super) fn program(&mut self, offset: u64, data: &[u8]) -> bool {
        let end = offset.checked_add(data.len() as u64);
        if self.readonly() || end.is_none_or(|end| end > self.size()) {
            return false;
        }
        let block_size = self.block_size();
        let mut old = vec![0; data.len()];
        self.read(offset, &mut old);
        let new: Vec<u8> = old.iter().zip(data).map(|(old, new)| old & new).collect();
        match self {
            Self::File { region, .. } => region.write_slice(&new, MemoryRegionAddress(offset)).is_ok(),
            Self::Sparse { blocks, .. } => {
                for (i, &byte) in new.iter().enumerate() {
                    let at = offset + i as u64;
                    let block = blocks
                        .entry(at / block_size)
                        .or_insert_with(|| vec![0xff; block_size as usize].into_boxed_slice());
                    block[(at % block_size) as usize] = byte;
                }
                true
            }
        }
    }

    /// Sets a block to ones. False if the bank is read-only or has no such block.
    pub(super) fn erase(&mut self, block: u64) -> bool {
        let block_size = self.block_size();
        if self.readonly() || block >= self.size() / block_size {
            return false;
        }
        match self {
            Self::File { region, .. } => {
                let ones = vec![0xff; block_size as usize];
                region.write_slice(&ones, MemoryRegionAddress(block * block_size)).is_ok()
            }
            Self::Sparse { blocks, .. } => {
                blocks.remove(&block);
                true
            }
        }
    }

    /// What must be saved with the VM: (offset, bytes) of what was programmed and no file keeps.
    pub(super) fn programmed(&self) -> Vec<(u64, Vec<u8>)> {
        let Self::Sparse { blocks, block_size, .. } = self else { return Vec::new() };
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        for (number, block) in blocks {
            for (at, piece) in block.chunks(RUN).enumerate() {
                if piece.iter().all(|&b| b == 0xff) {
                    continue;
                }
                let offset = number * block_size + (at * RUN) as u64;
                match runs.last_mut() {
                    Some((start, bytes)) if *start + bytes.len() as u64 == offset => bytes.extend(piece),
                    _ => runs.push((offset, piece.to_vec())),
                }
            }
        }
        runs
    }

    /// Takes over what was saved. False if it does not fit; then nothing has changed.
    pub(super) fn set_programmed(&mut self, runs: &[(u64, Vec<u8>)]) -> bool {
        let fits = |(at, bytes): &(u64, Vec<u8>)| {
            at.checked_add(bytes.len() as u64).is_some_and(|end| end <= self.size())
        };
        if !runs.iter().all(fits) {
            return false;
        }
        match self {
            Self::File { .. } => return runs.is_empty(),
            Self::Sparse { blocks, .. } => blocks.clear(),
        }
        runs.iter().all(|(at, bytes)| self.program(*at, bytes))
    }
}
