//! Starting a Linux kernel without firmware: the 64-bit and 32-bit boot protocols of a bzImage (Linux
//! `Documentation/arch/x86/boot.rst`), the PVH entry of an ELF image (Xen `docs/misc/pvh.pandoc`), the
//! 64-bit entry of an ELF image without one, and Multiboot 1.

mod linux;
mod multiboot;
mod pvh;
mod start;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use holdfast_memory::GuestMemory;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{GuestAddress, GuestMemoryError, ReadVolatile};

pub use multiboot::module_list;
pub use start::Entry;

/// Where kernels are loaded, and where RAM goes on above the holes of a PC.
pub const HIGH_RAM: u64 = 0x10_0000;
/// Guest-physical address and length of the ACPI root pointer and tables for a kernel started here.
pub const ACPI_AREA: (u64, u64) = (0xe_0000, 0x1_0000);
/// Guest-physical address and length of the SMBIOS entry point and tables, likewise.
pub const SMBIOS_AREA: (u32, u64) = (0xf_0000, 0x1_0000);
/// End of conventional memory.
const LOW_RAM_END: u64 = 0x9_fc00;

/// The boot parameters in low RAM. All lie below [`LOW_RAM_END`] and none overlaps.
mod layout {
    /// The GDT.
    pub const GDT: u64 = 0x500;
    /// PVH start information, with the module list and memory map behind it.
    pub const START_INFO: u64 = 0x6000;
    /// The "zero page".
    pub const BOOT_PARAMS: u64 = 0x7000;
    /// Page tables that map the first 4 GiB to themselves: six pages.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// The command line.
    pub const CMDLINE: u64 = 0x2_0000;
    /// Room for the command line with its end.
    pub const CMDLINE_ROOM: u64 = 0x1_0000;
}

/// What a range of guest-physical addresses is for, by its number in the E820 map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// RAM that may be used.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One entry of the E820 map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// The map of a PC with RAM at `ram` (address, length), the first range starting at 0, and the
/// reserved ranges `reserved`.
pub fn memory_map(ram: &[(u64, u64)], reserved: &[(u64, u64)]) -> Vec<MapEntry> {
    let entry = |base, end: u64, kind| MapEntry { base, len: end.saturating_sub(base), kind };
    let mut map = vec![
        entry(0, LOW_RAM_END, RangeKind::Ram),
        entry(LOW_RAM_END, 0xa_0000, RangeKind::Reserved),
        entry(0xe_0000, HIGH_RAM, RangeKind::Reserved),
    ];
    for &(base, len) in ram {
        let end = base.saturating_add(len);
        map.push(entry(base.max(HIGH_RAM), end, RangeKind::Ram));
    }
    map.extend(reserved.iter().map(|&(base, len)| MapEntry { base, len, kind: RangeKind::Reserved }));
    map.retain(|e| e.len > 0);
    map.sort_by_key(|e| e.base);
    map
}

/// A kernel that cannot be started. The text fits behind "cannot load kernel `path`: ".
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel image is of no known kind.
    #[error("it is neither a bzImage, nor a 64-bit ELF image for x86, nor a Multiboot image")]
    UnknownFormat,
    /// The image is damaged or needs what is not there.
    #[error("{0}")]
    Image(String),
    /// Reading it failed.
    #[error("it cannot be read")]
    Io(#[from] std::io::Error),
    /// It does not fit into RAM below 4 GiB.
    #[error("{what} needs RAM up to {end:#x}, which is not there")]
    TooLarge {
        /// `the kernel` or `the initramfs`.
        what: &'static str,
        /// End of what it needs.
        end: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the command line is {len} bytes long; this kernel takes {limit}")]
    Cmdline {
        /// Its length.
        len: usize,
        /// The limit.
        limit: u64,
    },
    /// Boot parameters have no RAM to be put into.
    #[error("boot parameters cannot be written")]
    Memory(#[from] GuestMemoryError),
}

/// Everything that a kernel is started from.
#[derive(Debug)]
pub struct BootRequest<'a> {
    /// Guest RAM.
    pub memory: &'a GuestMemory,
    /// The kernel image.
    pub kernel: &'a mut File,
    /// The image's name, which a Multiboot image finds as the first word of its command line.
    pub name: &'a str,
    /// The initial RAM disk.
    pub initramfs: Option<&'a mut File>,
    /// The modules of a Multiboot image, which takes them instead of `initramfs`.
    pub modules: Vec<BootModule<'a>>,
    /// The command line.
    pub cmdline: &'a str,
    /// The E820 map.
    pub map: &'a [MapEntry],
    /// The ACPI root pointer.
    pub rsdp: u64,
}

/// A file that a Multiboot image is given.
#[derive(Debug)]
pub struct BootModule<'a> {
    /// Its contents.
    pub file: &'a mut File,
    /// Its name and arguments.
    pub string: String,
}

/// Whether `file` is an image that [`load`] takes for a Multiboot image.
///
/// # Errors
/// It cannot be read.
pub fn is_multiboot(file: &mut File) -> Result<bool, BootError> {
    multiboot::is_image(file)
}

/// Puts the kernel, initramfs, command line and boot parameters into RAM; returns how to enter.
///
/// # Errors
/// [`BootError`].
pub fn load(mut request: BootRequest<'_>) -> Result<Entry, BootError> {
    let mut magic = [0; 4];
    request.kernel.seek(SeekFrom::Start(0))?;
    request.kernel.read_exact(&mut magic).map_err(|_| BootError::UnknownFormat)?;
    if multiboot::is_image(request.kernel)? {
        return multiboot::load(&mut request);
    }
    request.kernel.seek(SeekFrom::Start(0))?;
    if magic != *b"\x7fELF" {
        return linux::load(&mut request);
    }
    let high = Some(GuestAddress(HIGH_RAM));
    let loaded =
        Elf::load(request.memory, None, request.kernel, high).map_err(|e| BootError::Image(e.to_string()))?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => pvh::prepare(&mut request, entry.0, loaded.kernel_end),
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            linux::prepare_elf(&mut request, loaded.kernel_load.0, loaded.kernel_end)
        }
    }
}

impl BootRequest<'_> {
    /// End of the RAM below 4 GiB that starts at or below 1 MiB.
    fn low_ram_end(&self) -> u64 {
        let low = self.map.iter().filter(|e| e.kind == RangeKind::Ram && e.base <= HIGH_RAM);
        low.map(|e| e.base.saturating_add(e.len)).max().unwrap_or(0).min(1 << 32)
    }

    /// Writes the command line; `limit` bytes without its end at most.
    fn place_cmdline(&self, limit: u64) -> Result<(), BootError> {
        use vm_memory::Bytes;
        let limit = limit.min(layout::CMDLINE_ROOM - 1);
        let text = self.cmdline.as_bytes();
        if text.len() as u64 > limit || text.contains(&0) {
            return Err(BootError::Cmdline { len: text.len(), limit });
        }
        self.memory.write_slice(text, GuestAddress(layout::CMDLINE))?;
        self.memory.write_slice(&[0], GuestAddress(layout::CMDLINE + text.len() as u64))?;
        Ok(())
    }

    /// Reads the initramfs to the highest pages below `limit` and above `floor`; returns address and
    /// length.
    fn place_initramfs(&mut self, floor: u64, limit: u64) -> Result<Option<(u64, u64)>, BootError> {
        let end = self.low_ram_end().min(limit);
        let memory = self.memory;
        let Some(file) = self.initramfs.as_deref_mut() else { return Ok(None) };
        let len = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(0))?;
        let too_large = BootError::TooLarge { what: "the initramfs", end: floor.saturating_add(len) };
        let at = end.checked_sub(len).map(|at| at & !0xfff).filter(|at| *at >= floor);
        let Some(at) = at else { return Err(too_large) };
        read_into(memory, file, at, len)?;
        Ok(Some((at, len)))
    }
}

/// Reads `len` bytes of a file into RAM at `at`.
fn read_into(memory: &GuestMemory, file: &mut File, at: u64, len: u64) -> Result<(), BootError> {
    use vm_memory::Bytes;
    let len = usize::try_from(len).map_err(|_| BootError::Image("it is too long".into()))?;
    fn volatile(file: &mut File) -> &mut impl ReadVolatile {
        file
    }
    memory.read_exact_volatile_from(GuestAddress(at), volatile(file), len)?;
    Ok(())
}

#[cfg(test)]
mod tests;
