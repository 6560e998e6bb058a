//! Memory slots: which host memory backs which guest-physical range.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use holdfast_accel::{AccelError, RomWindow};
use holdfast_memory::{GuestMemory, GuestRegion, PAGE_SIZE, RamTracker, Tracked};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::{host, sys};

/// A slot of RAM.
#[derive(Debug)]
pub struct RamSlot {
    /// Slot number.
    pub id: u32,
    /// Pages.
    pub pages: u64,
    /// The region's tracker.
    pub tracker: RamTracker,
    gpa: u64,
    hva: u64,
}

#[derive(Debug)]
struct RomSlot {
    id: u32,
    /// Keeps the host memory mapped.
    _region: Arc<GuestRegion>,
}

/// All slots of a VM.
#[derive(Debug)]
pub struct Slots {
    /// RAM, fixed when the VM is made.
    pub ram: Vec<RamSlot>,
    rom: BTreeMap<u64, RomSlot>,
    limit: u32,
    /// Keeps the host memory mapped.
    _memory: GuestMemory,
}

fn host_address(region: &GuestRegion) -> io::Result<u64> {
    region
        .get_host_address(MemoryRegionAddress(0))
        .map(|p| p as u64)
        .map_err(|e| io::Error::other(e.to_string()))
}

impl Slots {
    /// Maps all of `memory`. `limit` is how many slots the host allows.
    pub fn new(vm: &VmFd, memory: &GuestMemory, limit: u32) -> Result<Self, AccelError> {
        let mut ram = Vec::new();
        for (id, region) in (0u32..).zip(memory.iter()) {
            let gpa = region.start_addr().raw_value();
            let hva = host_address(region).map_err(|e| host("RAM has no host address", e))?;
            let slot =
                RamSlot { id, pages: region.len() / PAGE_SIZE, tracker: region.bitmap_tracker(), gpa, hva };
            slot.set(vm, 0).map_err(|e| host(format!("cannot map RAM at {gpa:#x}"), e))?;
            ram.push(slot);
        }
        Ok(Self { ram, rom: BTreeMap::new(), limit, _memory: memory.clone() })
    }

    /// Turns the kernel's dirty log on or off for all RAM.
    pub fn log(&self, vm: &VmFd, on: bool) -> Result<(), AccelError> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        for slot in &self.ram {
            slot.set(vm, flags).map_err(|e| host("cannot switch the dirty log", e))?;
        }
        Ok(())
    }

    /// Maps a ROM window.
    pub fn map_rom(&mut self, vm: &VmFd, rom: &RomWindow) -> Result<(), AccelError> {
        self.map(vm, (rom.gpa, &rom.region), false)
    }

    /// Maps a region outside of RAM.
    pub fn map(
        &mut self,
        vm: &VmFd,
        (gpa, region): (u64, &Arc<GuestRegion>),
        writable: bool,
    ) -> Result<(), AccelError> {
        if self.rom.contains_key(&gpa) {
            return Err(host(format!("memory at {gpa:#x}"), io::Error::from(io::ErrorKind::AlreadyExists)));
        }
        let id = (self.ram.len() as u32..self.limit).find(|id| self.rom.values().all(|r| r.id != *id));
        let id =
            id.ok_or_else(|| host("no memory slot is left", io::Error::from_raw_os_error(libc::ENOSPC)))?;
        let hva = host_address(region).map_err(|e| host("it has no host address", e))?;
        let slot = kvm_userspace_memory_region {
            slot: id,
            flags: if writable { 0 } else { KVM_MEM_READONLY },
            guest_phys_addr: gpa,
            memory_size: region.len(),
            userspace_addr: hva,
        };
        // SAFETY: the region is kept in `self.rom` until its slot is deleted, or dropped with the VM.
        unsafe { sys::set_memory_slot(vm, slot) }
            .map_err(|e| host(format!("cannot map memory at {gpa:#x}"), e))?;
        self.rom.insert(gpa, RomSlot { id, _region: Arc::clone(region) });
        Ok(())
    }

    /// Unmaps the ROM window at `gpa`.
    pub fn unmap_rom(&mut self, vm: &VmFd, gpa: u64) -> Result<(), AccelError> {
        let not_there = || host(format!("no ROM at {gpa:#x}"), io::Error::from(io::ErrorKind::NotFound));
        let rom = self.rom.get(&gpa).ok_or_else(not_there)?;
        let slot = kvm_userspace_memory_region { slot: rom.id, guest_phys_addr: gpa, ..Default::default() };
        // SAFETY: a size of zero deletes the slot; no memory is named.
        unsafe { sys::set_memory_slot(vm, slot) }
            .map_err(|e| host(format!("cannot unmap ROM at {gpa:#x}"), e))?;
        self.rom.remove(&gpa);
        Ok(())
    }
}

impl RamSlot {
    fn set(&self, vm: &VmFd, flags: u32) -> io::Result<()> {
        let slot = kvm_userspace_memory_region {
            slot: self.id,
            flags,
            guest_phys_addr: self.gpa,
            memory_size: self.pages * PAGE_SIZE,
            userspace_addr: self.hva,
        };
        // SAFETY: the region belongs to the guest memory that `Slots` keeps as long as the VM.
        unsafe { sys::set_memory_slot(vm, slot) }
    }
}
