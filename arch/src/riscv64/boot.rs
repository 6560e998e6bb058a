//! How a RISC-V guest is started: the Linux `Image` header, OpenSBI's dynamic information, the reset ROM
//! and where everything goes in RAM.

/// Bytes of an `Image` header.
pub const HEADER_LEN: usize = 64;
/// Kernels and device trees are aligned to this (one Sv39 megapage).
pub const ALIGN: u64 = 2 << 20;
/// The device tree must lie below this: early firmware maps no more.
const LOW_END: u64 = 3 << 30;

/// A payload that cannot be booted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// It is no uncompressed `Image`.
    #[error("it is {found}; an uncompressed RISC-V Linux `Image` would be right")]
    NotAnImage {
        /// What it looks like.
        found: &'static str,
    },
    /// Its header makes no sense.
    #[error("its `Image` header says {what}")]
    Header {
        /// What is wrong.
        what: String,
    },
    /// It does not fit.
    #[error("{what} of {size:#x} bytes does not fit into RAM of {ram:#x} bytes")]
    NoRoom {
        /// `kernel`, `initramfs`, ...
        what: &'static str,
        /// Its size.
        size: u64,
        /// RAM size.
        ram: u64,
    },
}

/// The header of a Linux `Image` (Linux, Documentation/arch/riscv/boot-image-header.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageHeader {
    /// Where the kernel wants to be, from a 2 MiB boundary.
    pub text_offset: u64,
    /// Bytes of RAM that it uses from its start, BSS included.
    pub image_size: u64,
}

impl ImageHeader {
    /// Checks the first [`HEADER_LEN`] bytes of a kernel whose file is `file_size` bytes long. What is nothing known
    /// is taken for a plain program.
    ///
    /// # Errors
    /// [`BootError`] saying what the file is instead, or what is wrong with the header.
    pub fn parse(head: &[u8], file_size: u64) -> Result<Self, BootError> {
        let not = |found| Err(BootError::NotAnImage { found });
        if head.starts_with(b"\x7fELF") {
            return not("an ELF file");
        }
        if head.starts_with(&[0x1f, 0x8b]) {
            return not("compressed with gzip");
        }
        if head.get(4..8) == Some(b"zimg") {
            return not("an EFI zboot image");
        }
        let word =
            |at: usize| -> Option<u64> { Some(u64::from_le_bytes(head.get(at..at + 8)?.try_into().ok()?)) };
        if head.get(56..60) != Some(b"RSC\x05") {
            return match head {
                _ if head.get(56..60) == Some(b"ARM\x64") => not("an arm64 `Image`"),
                _ if head.len() < HEADER_LEN => not("too short"),
                // A bootloader such as U-Boot: a plain program for the first 2 MiB boundary after the firmware.
                _ => Ok(Self { text_offset: ALIGN, image_size: file_size }),
            };
        }
        let (Some(text_offset), Some(image_size), Some(flags)) = (word(8), word(16), word(24)) else {
            return not("too short");
        };
        if flags & 1 != 0 {
            return Err(BootError::Header { what: "big-endian".into() });
        }
        if text_offset % ALIGN != 0 || text_offset > LOW_END {
            return Err(BootError::Header {
                what: format!("text offset {text_offset:#x}, not a multiple of 2 MiB"),
            });
        }
        // Very old kernels left the size out.
        let image_size = image_size.max(file_size);
        if image_size > 1 << 40 {
            return Err(BootError::Header { what: format!("image size {image_size:#x}") });
        }
        Ok(Self { text_offset, image_size })
    }
}

/// What has to be placed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// First address of RAM.
    pub ram_base: u64,
    /// Bytes of RAM.
    pub ram_size: u64,
    /// Bytes of firmware at the start of RAM.
    pub firmware: u64,
    /// Offset from the start of RAM and bytes of the kernel, if there is one.
    pub kernel: Option<(u64, u64)>,
    /// Bytes of the initramfs, if there is one.
    pub initramfs: Option<u64>,
    /// Bytes of the device tree.
    pub fdt: u64,
}

/// Where things go, guest-physical.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Placement {
    /// The kernel's first address.
    pub kernel: Option<u64>,
    /// The initramfs' first address.
    pub initramfs: Option<u64>,
    /// The device tree's first address.
    pub fdt: u64,
}

/// Places kernel, initramfs and device tree: the kernel low, the device tree 2 MiB aligned at the top of
/// RAM (below 3 GiB of it), the initramfs under it.
///
/// # Errors
/// [`BootError::NoRoom`] naming what does not fit.
pub fn place(sizes: &Sizes) -> Result<Placement, BootError> {
    let no_room = |what, size| BootError::NoRoom { what, size, ram: sizes.ram_size };
    let end = sizes.ram_base + sizes.ram_size.min(LOW_END);
    let mut floor = sizes.ram_base.saturating_add(sizes.firmware);
    if floor > end {
        return Err(no_room("firmware", sizes.firmware));
    }
    let mut kernel = None;
    if let Some((offset, size)) = sizes.kernel {
        let at = sizes.ram_base + offset;
        let kernel_end = at.checked_add(size).filter(|&e| e <= end).ok_or(no_room("kernel", size))?;
        if at < floor {
            return Err(no_room("firmware below the kernel", sizes.firmware));
        }
        (kernel, floor) = (Some(at), kernel_end);
    }
    let below = |end: u64, size: u64, align: u64| {
        end.checked_sub(size).map(|at| at / align * align).filter(|&at| at >= floor)
    };
    let fdt = below(end, sizes.fdt, ALIGN).ok_or(no_room("device tree", sizes.fdt))?;
    let initramfs = match sizes.initramfs {
        Some(size) => Some(below(fdt, size, 4096).ok_or(no_room("initramfs", size))?),
        None => None,
    };
    Ok(Placement { kernel, initramfs, fdt })
}

/// `struct fw_dynamic_info` of OpenSBI (docs/firmware/fw_dynamic.md), version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DynamicInfo {
    /// Where OpenSBI goes on; 0 if nothing was loaded.
    pub next_addr: u64,
    /// The hart that boots; all ones: any.
    pub boot_hart: u64,
}

impl DynamicInfo {
    const MAGIC: u64 = 0x4942_534f;
    const VERSION: u64 = 2;
    /// The next stage runs in supervisor mode.
    const NEXT_MODE_S: u64 = 1;

    fn words(self) -> [u64; 6] {
        [Self::MAGIC, Self::VERSION, self.next_addr, Self::NEXT_MODE_S, 0, self.boot_hart]
    }
}

/// What the harts other than hart 0 do after reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OtherHarts {
    /// They enter the firmware at once, with hart 0.
    Enter,
    /// They sleep until their software interrupt (MSIP) is raised, and enter the firmware then.
    ///
    /// For OpenSBI, which raises it when it is asked to start a hart. Harts that have been there since reset spin for
    /// that until then; and OpenSBI up to 1.2 lets them go before it has stored where to, so one that spins may find
    /// the boot hart's entry instead and boot the kernel a second time, over the first.
    WaitForMsip,
}

/// Offsets of the reset ROM's words: the firmware's entry, the device tree, the dynamic information.
const ROM_ENTRY: usize = 0x38;
const ROM_FDT: usize = 0x40;
const ROM_INFO: usize = 0x48;

/// The reset ROM: enters the firmware at `entry` with a0 = hart id, a1 = device tree, a2 = the dynamic
/// information, as all firmware for this platform expects.
pub fn reset_rom(entry: u64, fdt: u64, info: DynamicInfo, others: OtherHarts) -> Vec<u8> {
    const CODE: [u32; ROM_ENTRY / 4] = [
        0x0000_0297,                            //       auipc t0, 0
        0xf140_2573,                            //       csrr  a0, mhartid
        0x0005_0e63,                            //       beqz  a0, go
        0x3044_5073,                            //       csrwi mie, 8        # MSIE
        0x1050_0073,                            // wait: wfi
        0x3440_2373,                            //       csrr  t1, mip
        0x0083_7313,                            //       andi  t1, t1, 8     # MSIP
        0xfe03_0ae3,                            //       beqz  t1, wait
        0x3040_5073,                            //       csrwi mie, 0
        0x0002_8613 | (ROM_INFO as u32) << 20,  // go: addi a2, t0, ROM_INFO
        0x0002_b583 | (ROM_FDT as u32) << 20,   // ld a1, ROM_FDT(t0)
        0x0002_b283 | (ROM_ENTRY as u32) << 20, // ld t0, ROM_ENTRY(t0)
        0x0002_8067,                            //       jr    t0
        0x0000_0013,                            //       nop
    ];
    /// `j go` in the place of `beqz a0, go`.
    const NO_WAIT: u32 = 0x01c0_006f;
    let mut code = CODE;
    if others == OtherHarts::Enter {
        code[2] = NO_WAIT;
    }
    let mut rom: Vec<u8> = code.iter().flat_map(|w| w.to_le_bytes()).collect();
    for word in [entry, fdt].into_iter().chain(info.words()) {
        rom.extend(word.to_le_bytes());
    }
    rom
}

/// The extensions in an ISA string such as `rv64imac_zicsr`, one by one, for `riscv,isa-extensions`.
pub fn extensions(isa: &str) -> Vec<String> {
    let mut parts = isa.split('_');
    let single = parts.next().unwrap_or("").trim_start_matches("rv64");
    single.chars().map(String::from).chain(parts.map(str::to_owned)).filter(|e| !e.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(text_offset: u64, image_size: u64, flags: u64) -> Vec<u8> {
        let mut h = vec![0; HEADER_LEN];
        h[8..16].copy_from_slice(&text_offset.to_le_bytes());
        h[16..24].copy_from_slice(&image_size.to_le_bytes());
        h[24..32].copy_from_slice(&flags.to_le_bytes());
        h[56..60].copy_from_slice(b"RSC\x05");
        h
    }

    #[test]
    fn headers_are_checked() {
        let good = ImageHeader::parse(&header(ALIGN, 0x200_0000, 0), 0x100_0000).expect("well formed");
        assert_eq!(good, ImageHeader { text_offset: ALIGN, image_size: 0x200_0000 });
        let grown = ImageHeader::parse(&header(ALIGN, 0, 0), 77).expect("an old kernel");
        assert_eq!(grown.image_size, 77);
        assert!(ImageHeader::parse(&header(0x1000, 0, 0), 1).is_err());
        assert!(ImageHeader::parse(&header(ALIGN, u64::MAX, 0), 1).is_err());
        assert!(ImageHeader::parse(&header(ALIGN, 0, 1), 1).is_err());
        for len in 0..60 {
            assert!(ImageHeader::parse(&header(0, 0, 0)[..len], 1).is_err(), "{len}");
        }
        let found = |head: &[u8]| ImageHeader::parse(head, 99).expect_err("no Image").to_string();
        assert!(found(b"\x7fELF").contains("ELF"));
        assert!(found(&[0x1f, 0x8b, 8]).contains("gzip"));
        assert!(found(b"MZ\0\0zimg").contains("zboot"));
        let plain = ImageHeader::parse(&[0x13; HEADER_LEN], 0x10_0000).expect("a plain program");
        assert_eq!(plain, ImageHeader { text_offset: ALIGN, image_size: 0x10_0000 });
        let mut arm = [0; HEADER_LEN];
        arm[56..60].copy_from_slice(b"ARM\x64");
        assert!(found(&arm).contains("arm64"));
    }

    #[test]
    fn nothing_overlaps_whatever_the_sizes() {
        let base = 0x8000_0000;
        for ram in [16 << 20, 64 << 20, 512 << 20, 3 << 30, 8u64 << 30] {
            for initramfs in [None, Some(1), Some(4 << 20)] {
                let sizes = Sizes {
                    ram_base: base,
                    ram_size: ram,
                    firmware: 0x4_0000,
                    kernel: Some((ALIGN, 5 << 20)),
                    initramfs,
                    fdt: 8000,
                };
                let p = place(&sizes).expect("it fits");
                let kernel = p.kernel.expect("placed");
                assert_eq!(kernel, base + ALIGN);
                assert!(p.fdt.is_multiple_of(ALIGN) && p.fdt + 8000 <= base + ram.min(LOW_END));
                let low = p.initramfs.unwrap_or(p.fdt);
                assert!(low >= kernel + (5 << 20));
                assert!(low + initramfs.unwrap_or(0) <= p.fdt);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let small = Sizes { ram_base: 0x8000_0000, ram_size: 8 << 20, fdt: 8000, ..Sizes::default() };
        let what = |sizes: Sizes| match place(&sizes) {
            Err(BootError::NoRoom { what, .. }) => what,
            other => panic!("{other:?}"),
        };
        assert_eq!(what(Sizes { firmware: 9 << 20, ..small }), "firmware");
        assert_eq!(what(Sizes { kernel: Some((ALIGN, 7 << 20)), ..small }), "kernel");
        assert_eq!(what(Sizes { kernel: Some((ALIGN, u64::MAX)), ..small }), "kernel");
        assert_eq!(what(Sizes { initramfs: Some(8 << 20), ..small }), "initramfs");
        assert_eq!(what(Sizes { fdt: 9 << 20, ..small }), "device tree");
        let high = Sizes { firmware: 3 << 20, kernel: Some((ALIGN, 1)), ..small };
        assert_eq!(what(high), "firmware below the kernel");
    }

    #[test]
    fn the_rom_holds_its_words_where_its_code_looks() {
        let info = DynamicInfo { next_addr: 0x8020_0000, boot_hart: 0 };
        for others in [OtherHarts::Enter, OtherHarts::WaitForMsip] {
            let rom = reset_rom(0x8000_0000, 0x9fe0_0000, info, others);
            let word = |at: usize| u64::from_le_bytes(rom[at..at + 8].try_into().expect("8 bytes"));
            assert_eq!((word(ROM_ENTRY), word(ROM_FDT)), (0x8000_0000, 0x9fe0_0000));
            assert_eq!(word(ROM_INFO), 0x4942_534f);
            assert_eq!((word(ROM_INFO + 16), word(ROM_INFO + 24)), (0x8020_0000, 1));
        }
        assert_eq!(extensions("rv64imac_zicsr_zba"), ["i", "m", "a", "c", "zicsr", "zba"]);
    }
}
