//! The Linux boot protocol.

use std::io::{Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress};

use super::start::Entry;
use super::{BootError, BootRequest, HIGH_RAM, layout, read_into};

/// Offset of the setup header in the image and in the zero page.
const HEADER: usize = 0x1f1;
/// Fields, as offsets into the zero page.
const SETUP_SECTS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOADER: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const CODE32_START: usize = 0x214;
const RAMDISK: usize = 0x218;
const HEAP_END: usize = 0x224;
const CMDLINE_PTR: usize = 0x228;
const INITRD_MAX: usize = 0x22c;
const KERNEL_ALIGNMENT: usize = 0x230;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
/// Fields of the zero page outside of the header.
const RSDP: usize = 0x70;
const E820_ENTRIES: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_MAX: usize = 128;

const LOADED_HIGH: u8 = 1;
const CAN_USE_HEAP: u8 = 0x80;
/// `XLF_KERNEL_64`: the 64-bit entry at 0x200 exists.
const KERNEL_64: u16 = 1;

/// The page of boot parameters that the kernel is given.
struct ZeroPage(Box<[u8; 4096]>);

impl ZeroPage {
    fn new() -> Self {
        Self(Box::new([0; 4096]))
    }

    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut out = [0; N];
        out.iter_mut().zip(self.0.iter().skip(at)).for_each(|(to, from)| *to = *from);
        out
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.get(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.get(at))
    }

    /// Fills in what does not depend on the kind of image, and writes the page.
    fn finish(mut self, request: &BootRequest<'_>, initramfs: Option<(u64, u64)>) -> Result<(), BootError> {
        // A boot loader without a registered number.
        self.put(LOADER, &[0xff]);
        self.put(CMDLINE_PTR, &(layout::CMDLINE as u32).to_le_bytes());
        if let Some((at, len)) = initramfs {
            self.put(RAMDISK, &(at as u32).to_le_bytes());
            self.put(RAMDISK + 4, &(len as u32).to_le_bytes());
        }
        self.put(RSDP, &request.rsdp.to_le_bytes());
        if request.map.len() > E820_MAX {
            return Err(BootError::Image(format!("the memory map has more than {E820_MAX} entries")));
        }
        self.put(E820_ENTRIES, &[request.map.len() as u8]);
        for (n, e) in request.map.iter().enumerate() {
            let at = E820_TABLE + 20 * n;
            self.put(at, &e.base.to_le_bytes());
            self.put(at + 8, &e.len.to_le_bytes());
            self.put(at + 16, &(e.kind as u32).to_le_bytes());
        }
        request.memory.write_slice(&self.0[..], GuestAddress(layout::BOOT_PARAMS))?;
        Ok(())
    }
}

/// Loads a bzImage.
pub(super) fn load(request: &mut BootRequest<'_>) -> Result<Entry, BootError> {
    let mut start = Vec::new();
    request.kernel.by_ref().take(0x400).read_to_end(&mut start)?;
    let mut page = ZeroPage::new();
    // The header ends where the jump at 0x200 leads: 0x202 plus the byte at 0x201.
    let end = start.get(0x201).map_or(0, |b| 0x202 + usize::from(*b));
    page.put(HEADER, start.get(HEADER..end).unwrap_or(&[]));
    if page.get(MAGIC) != *b"HdrS" || page.u16(BOOT_FLAG) != 0xaa55 {
        return Err(BootError::UnknownFormat);
    }
    let version = page.u16(VERSION);
    let [flags] = page.get(LOAD_FLAGS);
    if version < 0x0206 || flags & LOADED_HIGH == 0 {
        let reason = format!("its boot protocol {}.{:02} is older than 2.06", version >> 8, version & 0xff);
        return Err(BootError::Image(reason));
    }
    let [sects] = page.get(SETUP_SECTS);
    let setup = 512 * (u64::from(if sects == 0 { 4 } else { sects }) + 1);
    let total = request.kernel.seek(SeekFrom::End(0))?;
    let len = total.checked_sub(setup).filter(|len| *len > 0).ok_or_else(truncated)?;

    let load = load_address(&page, version);
    let needs = if version >= 0x020a { u64::from(page.u32(INIT_SIZE)).max(len) } else { len };
    let end = load.checked_add(needs).filter(|end| *end <= request.low_ram_end());
    let Some(end) = end else {
        return Err(BootError::TooLarge { what: "the kernel", end: load.saturating_add(needs) });
    };
    request.kernel.seek(SeekFrom::Start(setup))?;
    read_into(request.memory, request.kernel, load, len)?;

    request.place_cmdline(page.u32(CMDLINE_SIZE).into())?;
    let initramfs = request.place_initramfs(end, u64::from(page.u32(INITRD_MAX)) + 1)?;
    page.put(LOAD_FLAGS, &[flags | CAN_USE_HEAP]);
    page.put(HEAP_END, &0xfe00u16.to_le_bytes());
    page.put(CODE32_START, &(load as u32).to_le_bytes());
    let wide = version >= 0x020c && page.u16(XLOADFLAGS) & KERNEL_64 != 0;
    page.finish(request, initramfs)?;
    if wide {
        Entry::long_mode(request.memory, load + 0x200, layout::BOOT_PARAMS)
    } else {
        Entry::flat_linux(request.memory, load, layout::BOOT_PARAMS)
    }
}

fn truncated() -> BootError {
    BootError::Image("it ends before its setup code does".into())
}

/// Where the protected-mode part goes: where it prefers to be, so that it need not move itself.
fn load_address(page: &ZeroPage, version: u16) -> u64 {
    let preferred = if version >= 0x020a { u64::from_le_bytes(page.get(PREF_ADDRESS)) } else { 0 };
    if (HIGH_RAM..1 << 32).contains(&preferred) { preferred } else { HIGH_RAM }
}

/// Prepares the 64-bit entry of a loaded ELF image.
pub(super) fn prepare_elf(request: &mut BootRequest<'_>, entry: u64, end: u64) -> Result<Entry, BootError> {
    let mut page = ZeroPage::new();
    page.put(BOOT_FLAG, &0xaa55u16.to_le_bytes());
    page.put(MAGIC, b"HdrS");
    page.put(VERSION, &0x020cu16.to_le_bytes());
    page.put(KERNEL_ALIGNMENT, &0x0100_0000u32.to_le_bytes());
    request.place_cmdline(2047)?;
    let initramfs = request.place_initramfs(end, 1 << 32)?;
    page.finish(request, initramfs)?;
    Entry::long_mode(request.memory, entry, layout::BOOT_PARAMS)
}
