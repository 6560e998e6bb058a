use std::io::Write;

use super::*;
use crate::x86_64::State;
use vm_memory::Bytes;

fn memory(mib: usize) -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), mib << 20)]).expect("memory")
}

fn file(bytes: &[u8]) -> File {
    let mut f = tempfile::tempfile().expect("file");
    f.write_all(bytes).expect("write");
    f
}

/// A bzImage with a setup sector, `body` behind it, and a header of protocol 2.15.
fn bzimage(body: &[u8]) -> Vec<u8> {
    let mut k = vec![0; 1024];
    k[0x1f1] = 1;
    k[0x1fe..0x200].copy_from_slice(&0xaa55u16.to_le_bytes());
    k[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    k[0x202..0x206].copy_from_slice(b"HdrS");
    k[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    k[0x211] = 1;
    k[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    k[0x236] = 1;
    k[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    k[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    k[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
    k.extend_from_slice(body);
    k
}

/// A 64-bit ELF with one segment at 16 MiB and, if wanted, a PVH note with entry 16 MiB + 0x10.
fn elf(pvh: bool) -> Vec<u8> {
    let mut e = b"\x7fELF\x02\x01\x01".to_vec();
    e.resize(16, 0);
    e.extend(2u16.to_le_bytes());
    e.extend(62u16.to_le_bytes());
    e.extend(1u32.to_le_bytes());
    e.extend(0x100_0000u64.to_le_bytes());
    e.extend(64u64.to_le_bytes());
    e.extend(0u64.to_le_bytes());
    e.extend(0u32.to_le_bytes());
    for v in [64u16, 56, if pvh { 2 } else { 1 }, 0, 0, 0] {
        e.extend(v.to_le_bytes());
    }
    let mut header = |kind: u32, offset: u64, address: u64, len: u64| {
        e.extend(kind.to_le_bytes());
        e.extend(5u32.to_le_bytes());
        for v in [offset, address, address, len, len, 4] {
            e.extend(v.to_le_bytes());
        }
    };
    header(1, 0x100, 0x100_0000, 16);
    if pvh {
        header(4, 0x120, 0, 20);
    }
    e.resize(0x100, 0);
    e.extend([0x90; 16]);
    e.resize(0x120, 0);
    for v in [4u32, 4, 18] {
        e.extend(v.to_le_bytes());
    }
    e.extend(b"Xen\0");
    e.extend(0x100_0010u32.to_le_bytes());
    e
}

fn boot(
    memory: &GuestMemory,
    kernel: &[u8],
    initramfs: Option<&[u8]>,
    cmdline: &str,
) -> Result<Entry, BootError> {
    let map = memory_map(&[(0, 64 << 20)], &[(0xb000_0000, 256 << 20)]);
    let mut initramfs = initramfs.map(file);
    load(BootRequest {
        memory,
        kernel: &mut file(kernel),
        name: "kernel",
        initramfs: initramfs.as_mut(),
        modules: Vec::new(),
        cmdline,
        map: &map,
        rsdp: ACPI_AREA.0,
    })
}

fn read<const N: usize>(memory: &GuestMemory, at: u64) -> [u8; N] {
    let mut out = [0; N];
    memory.read_slice(&mut out, GuestAddress(at)).expect("RAM");
    out
}

fn u32_at(memory: &GuestMemory, at: u64) -> u32 {
    u32::from_le_bytes(read(memory, at))
}

fn u64_at(memory: &GuestMemory, at: u64) -> u64 {
    u64::from_le_bytes(read(memory, at))
}

#[test]
fn the_memory_map_leaves_the_holes_of_a_pc() {
    let map = memory_map(&[(0, 0x8000_0000), (1 << 32, 1 << 30)], &[(0xb000_0000, 256 << 20)]);
    let flat: Vec<_> = map.iter().map(|e| (e.base, e.base + e.len, e.kind as u32)).collect();
    assert_eq!(
        flat,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0xa_0000, 2),
            (0xe_0000, 0x10_0000, 2),
            (0x10_0000, 0x8000_0000, 1),
            (0xb000_0000, 0xc000_0000, 2),
            (1 << 32, 5 << 30, 1),
        ]
    );
}

#[test]
fn a_bzimage_is_entered_in_long_mode_where_it_prefers_to_be() {
    let memory = memory(64);
    let entry = boot(&memory, &bzimage(b"KERNEL"), Some(b"INITRAMFS"), "console=ttyS0").expect("boots");
    assert_eq!(&read::<6>(&memory, 0x100_0000), b"KERNEL");
    assert_eq!(&read::<14>(&memory, layout::CMDLINE), b"console=ttyS0\0");
    let zero = layout::BOOT_PARAMS;
    assert_eq!(read::<1>(&memory, zero + 0x210), [0xff]);
    assert_eq!(u32_at(&memory, zero + 0x228), layout::CMDLINE as u32);
    let (ramdisk, len) = (u32_at(&memory, zero + 0x218), u32_at(&memory, zero + 0x21c));
    assert_eq!((ramdisk, len), ((64 << 20) - 4096, 9));
    assert_eq!(&read::<9>(&memory, ramdisk.into()), b"INITRAMFS");
    assert_eq!(u64_at(&memory, zero + 0x70), 0xe_0000);
    assert_eq!(read::<1>(&memory, zero + 0x1e8), [5]);
    assert_eq!(u64_at(&memory, zero + 0x2d0 + 3 * 20 + 8), 63 << 20);

    let s = entry.apply(State::default());
    assert_eq!((s.rip, s.gpr[6], s.rflags), (0x100_0200, zero, 2));
    assert_eq!((s.cr[0], s.cr[2], s.efer), (0x8000_0011, layout::PAGE_TABLES, 0x500));
    assert_eq!(s.segments[1].attributes & 0x2000, 0x2000, "64-bit code");
    // The identity map, as the processor walks it.
    for address in [0u64, 0x100_0200, 0xfec0_0000] {
        let pdpt = u64_at(&memory, s.cr[2]) & !0xfff;
        let pd = u64_at(&memory, pdpt + 8 * (address >> 30)) & !0xfff;
        let page = u64_at(&memory, pd + 8 * (address >> 21 & 511));
        assert_eq!(page, address & !0x1f_ffff | 0x83);
    }
}

#[test]
fn an_old_bzimage_is_entered_in_protected_mode() {
    let memory = memory(64);
    let mut image = bzimage(b"KERNEL");
    image[0x236] = 0;
    let s = boot(&memory, &image, None, "").expect("boots").apply(State::default());
    assert_eq!((s.rip, s.cr[0], s.efer), (0x100_0000, 0x11, 0));
    image[0x206] = 5;
    let error = boot(&memory, &image, None, "").expect_err("too old");
    assert_eq!(error.to_string(), "its boot protocol 2.05 is older than 2.06");
}

#[test]
fn an_elf_with_a_note_is_entered_as_pvh() {
    let memory = memory(64);
    let entry = boot(&memory, &elf(true), Some(b"INITRAMFS"), "quiet").expect("boots");
    let s = entry.apply(State::default());
    assert_eq!((s.rip, s.gpr[3], s.cr[0]), (0x100_0010, layout::START_INFO, 0x11));
    let info = layout::START_INFO;
    assert_eq!((u32_at(&memory, info), u32_at(&memory, info + 12)), (0x336e_c578, 1));
    let module = u64_at(&memory, info + 16);
    assert_eq!(&read::<9>(&memory, u64_at(&memory, module)), b"INITRAMFS");
    assert_eq!(&read::<6>(&memory, u64_at(&memory, info + 24)), b"quiet\0");
    assert_eq!(u64_at(&memory, info + 32), 0xe_0000);
    let map = u64_at(&memory, info + 40);
    assert_eq!(
        (u32_at(&memory, info + 48), u64_at(&memory, map + 8), u32_at(&memory, map + 16)),
        (5, 0x9_fc00, 1)
    );
}

#[test]
fn an_elf_without_a_note_is_entered_in_long_mode() {
    let memory = memory(64);
    let s = boot(&memory, &elf(false), None, "").expect("boots").apply(State::default());
    assert_eq!((s.rip, s.gpr[6]), (0x100_0000, layout::BOOT_PARAMS));
    assert_eq!(&read::<4>(&memory, layout::BOOT_PARAMS + 0x202), b"HdrS");
}

#[test]
fn what_does_not_fit_is_refused() {
    let ram = memory(64);
    let small = memory(2);
    let error = load(BootRequest {
        memory: &small,
        kernel: &mut file(&bzimage(b"K")),
        name: "kernel",
        initramfs: None,
        modules: Vec::new(),
        cmdline: "",
        map: &memory_map(&[(0, 2 << 20)], &[]),
        rsdp: 0,
    });
    assert!(matches!(error, Err(BootError::TooLarge { what: "the kernel", .. })));
    let huge = vec![0; 64 << 20];
    let error = boot(&ram, &bzimage(b"K"), Some(&huge), "");
    assert!(matches!(error, Err(BootError::TooLarge { what: "the initramfs", .. })));
    let long = "x".repeat(2048);
    assert!(matches!(boot(&ram, &bzimage(b"K"), None, &long), Err(BootError::Cmdline { limit: 2047, .. })));
}

#[test]
fn damaged_images_are_refused() {
    let ram = memory(64);
    for bytes in [&b""[..], b"\x7fE", b"MZ", &[0; 4096]] {
        assert!(matches!(boot(&ram, bytes, None, ""), Err(BootError::UnknownFormat)));
    }
    assert!(matches!(boot(&ram, &bzimage(b"")[..1000], None, ""), Err(BootError::Image(_))));
    for image in [elf(true), bzimage(b"KERNEL")] {
        for cut in 0..image.len() {
            let _ = boot(&ram, &image[..cut], None, "");
        }
        for at in 0..image.len() {
            let mut broken = image.clone();
            broken[at] ^= 0xff;
            let _ = boot(&ram, &broken, None, "");
        }
    }
}
