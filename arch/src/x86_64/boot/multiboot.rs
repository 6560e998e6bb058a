//! Multiboot 1 (Multiboot Specification 0.6.96): 32-bit ELF images and plain images whose header has addresses.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use super::start::Entry;
use super::{BootError, BootRequest, LOW_RAM_END, RangeKind, layout, read_into};

/// The header lies within this many bytes from the start of the image.
const SEARCH: u64 = 8192;
const MAGIC: u32 = 0x1bad_b002;
/// Header flag: boot modules begin on page boundaries (they always do here).
const ALIGN_MODULES: u32 = 1 << 0;
/// Header flag: memory information has to be there (it always is).
const MEMORY_INFO: u32 = 1 << 1;
/// Header flag: the address fields are valid (the "a.out kludge").
const ADDRESSES: u32 = 1 << 16;
/// The flags without which an image need not be started if a loader does not know them.
const REQUIREMENTS: u32 = 0xffff;

/// Information flags: memory sizes, boot device, command line, modules, memory map, loader's name.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
const INFO_LEN: u64 = 120;
const MODULE_LEN: u64 = 16;
const MAP_ENTRY_LEN: u64 = 24;
const LOADER_NAME: &[u8] = b"holdfast\0";
/// Most modules that an image is given.
const MAX_MODULES: usize = 32;
/// Boot parameters lie below; no image may be loaded there.
const FLOOR: u64 = layout::CMDLINE + layout::CMDLINE_ROOM;

/// ELF: 32 bits, little endian, version 1.
const ELF32: [u8; 7] = *b"\x7fELF\x01\x01\x01";
const MACHINE_386: u16 = 3;
const PT_LOAD: u32 = 1;
/// Most program headers of an image.
const MAX_SEGMENTS: u16 = 128;

/// What a Multiboot header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    /// Offset in the file.
    at: u64,
    flags: u32,
    /// Addresses of the header, of the load, of its end and of the end of the zeroed part, and the entry point.
    addresses: [u32; 5],
}

/// One part of the file and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    offset: u64,
    address: u64,
    file_len: u64,
    memory_len: u64,
}

fn bad(reason: impl Into<String>) -> BootError {
    BootError::Image(reason.into())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The header in the first bytes of an image.
fn find_header(head: &[u8]) -> Option<Header> {
    (0..head.len()).step_by(4).find_map(|at| {
        let word = |n: usize| u32_at(head, at + 4 * n);
        let (magic, flags, checksum) = (word(0)?, word(1)?, word(2)?);
        let sum = magic.wrapping_add(flags).wrapping_add(checksum);
        if magic != MAGIC || sum != 0 {
            return None;
        }
        let mut addresses = [0; 5];
        if flags & ADDRESSES != 0 {
            for (n, value) in addresses.iter_mut().enumerate() {
                *value = word(3 + n)?;
            }
        }
        Some(Header { at: at as u64, flags, addresses })
    })
}

/// The parts of a plain image by the addresses in its header.
fn plain_segments(header: &Header, file_len: u64) -> Result<Segment, BootError> {
    let [header_addr, load, load_end, bss_end, _] = header.addresses.map(u64::from);
    let before =
        header_addr.checked_sub(load).ok_or_else(|| bad("its header lies before its load address"))?;
    let offset = header.at.checked_sub(before).ok_or_else(|| bad("its load address lies before the file"))?;
    // Zero: all of the file.
    let len = match load_end {
        0 => file_len - offset,
        end => end.checked_sub(load).ok_or_else(|| bad("its load end lies before its load address"))?,
    };
    if len > file_len - offset {
        return Err(bad("its load end lies behind the file"));
    }
    let memory_len = match bss_end {
        0 => len,
        end => end.checked_sub(load).ok_or_else(|| bad("its bss end lies before its load address"))?.max(len),
    };
    Ok(Segment { offset, address: load, file_len: len, memory_len })
}

/// The loadable parts and the entry point of a 32-bit ELF image.
fn elf_segments(request: &mut BootRequest<'_>, head: &[u8]) -> Result<(Vec<Segment>, u32), BootError> {
    let short = || bad("its ELF header is cut short");
    let field = |at| u32_at(head, at).ok_or_else(short);
    let half = |at| u16_at(head, at).ok_or_else(short);
    if half(18)? != MACHINE_386 {
        return Err(bad("it is a Multiboot image for another processor than the 80386"));
    }
    let (entry, table) = (field(24)?, field(28)?);
    let (size, count) = (half(42)?, half(44)?);
    if size < 32 || count > MAX_SEGMENTS {
        return Err(bad("its ELF program headers cannot be read"));
    }
    let mut headers = vec![0; usize::from(size) * usize::from(count)];
    request.kernel.seek(SeekFrom::Start(table.into()))?;
    request.kernel.read_exact(&mut headers).map_err(|_| bad("its ELF program headers are cut short"))?;
    let mut segments = Vec::new();
    for raw in headers.chunks_exact(size.into()) {
        let field = |n: usize| u32_at(raw, 4 * n).map(u64::from).ok_or_else(short);
        if field(0)? != u64::from(PT_LOAD) || field(5)? == 0 {
            continue;
        }
        // By physical address.
        let (file_len, memory_len) = (field(4)?, field(5)?);
        if file_len > memory_len {
            return Err(bad("an ELF segment is longer in the file than in memory"));
        }
        segments.push(Segment { offset: field(1)?, address: field(3)?, file_len, memory_len });
    }
    if segments.is_empty() {
        return Err(bad("its ELF program headers load nothing"));
    }
    Ok((segments, entry))
}

/// The first bytes of a file, and the length of the file.
fn read_head(file: &mut File) -> Result<(Vec<u8>, u64), BootError> {
    let len = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(0))?;
    let mut head = Vec::new();
    Read::by_ref(file).take(SEARCH).read_to_end(&mut head)?;
    Ok((head, len))
}

/// Whether an image is to be started by its Multiboot header. Linux images and 64-bit ELF images have other entries.
pub(super) fn is_image(file: &mut File) -> Result<bool, BootError> {
    let (head, _) = read_head(file)?;
    let Some(header) = find_header(&head) else { return Ok(false) };
    let linux = head.get(0x202..0x206) == Some(b"HdrS");
    let elf = head.starts_with(b"\x7fELF");
    Ok(head.starts_with(&ELF32) || !linux && (header.flags & ADDRESSES != 0 || !elf))
}

/// Loads the image and whatever it is told.
///
/// # Errors
/// [`BootError`].
pub(super) fn load(request: &mut BootRequest<'_>) -> Result<Entry, BootError> {
    let (head, file_len) = read_head(request.kernel)?;
    let header = find_header(&head).ok_or(BootError::UnknownFormat)?;
    if !head.starts_with(&ELF32) && header.flags & ADDRESSES == 0 {
        return Err(bad("its Multiboot header has no load addresses, and it is no 32-bit ELF image"));
    }
    let unknown = header.flags & REQUIREMENTS & !(ALIGN_MODULES | MEMORY_INFO);
    if unknown & 1 << 2 != 0 {
        return Err(bad("its Multiboot header requires a video mode (flag 2), which there is not"));
    }
    if unknown != 0 {
        return Err(bad(format!("its Multiboot header requires what is not known: flags {unknown:#x}")));
    }
    let (segments, entry) = if header.flags & ADDRESSES != 0 {
        (vec![plain_segments(&header, file_len)?], header.addresses[4])
    } else {
        elf_segments(request, &head)?
    };
    let end = place(request, &segments, file_len)?;
    inform(request, end)?;
    Ok(Entry::multiboot(entry, layout::START_INFO))
}

/// Puts the image into RAM; returns its end.
fn place(request: &mut BootRequest<'_>, segments: &[Segment], file_len: u64) -> Result<u64, BootError> {
    let limit = request.low_ram_end();
    let mut last = 0;
    for s in segments {
        // All are sums of 32-bit numbers.
        let end = s.address + s.memory_len;
        if s.address < FLOOR {
            return Err(bad(format!(
                "it wants to lie at {:#x}, below {FLOOR:#x}, where it is told what to know",
                s.address
            )));
        }
        let whole = end <= LOW_RAM_END || (s.address >= super::HIGH_RAM && end <= limit);
        if !whole {
            return Err(BootError::TooLarge { what: "the kernel", end });
        }
        if s.offset.checked_add(s.file_len).is_none_or(|end| end > file_len) {
            return Err(bad("it is cut short"));
        }
        request.kernel.seek(SeekFrom::Start(s.offset))?;
        read_into(request.memory, request.kernel, s.address, s.file_len)?;
        zero(request, s.address + s.file_len, end)?;
        last = last.max(end);
    }
    Ok(last)
}

fn zero(request: &BootRequest<'_>, mut from: u64, to: u64) -> Result<(), BootError> {
    let zeros = [0; 4096];
    while from < to {
        let len = (to - from).min(4096);
        request.memory.write_slice(zeros.get(..len as usize).unwrap_or(&zeros), GuestAddress(from))?;
        from += len;
    }
    Ok(())
}

/// Loads the modules behind the image's end and writes the information that the image finds in EBX.
fn inform(request: &mut BootRequest<'_>, end: u64) -> Result<(), BootError> {
    let name = request.name.to_owned();
    // The first word names the image, as with other loaders.
    let cmdline = if request.cmdline.is_empty() { name } else { format!("{name} {}", request.cmdline) };
    let mut strings = cmdline.into_bytes();
    strings.push(0);
    if strings.contains(&0) && strings.iter().filter(|b| **b == 0).count() > 1 {
        return Err(bad("its name or command line has a zero byte"));
    }
    let mut modules = Vec::new();
    let limit = request.low_ram_end();
    let mut at = end.max(super::HIGH_RAM).next_multiple_of(4096);
    if request.modules.len() > MAX_MODULES {
        return Err(bad(format!("{} modules; at most {MAX_MODULES} can be given", request.modules.len())));
    }
    let memory = request.memory;
    for module in request.modules.iter_mut() {
        let len = module.file.seek(SeekFrom::End(0))?;
        module.file.seek(SeekFrom::Start(0))?;
        let module_end = at.saturating_add(len);
        if module_end > limit {
            return Err(BootError::TooLarge { what: "the initramfs", end: module_end });
        }
        read_into(memory, module.file, at, len)?;
        let string = layout::CMDLINE + strings.len() as u64;
        strings.extend(module.string.bytes().filter(|b| *b != 0));
        strings.push(0);
        modules.push([at as u32, module_end as u32, string as u32, 0]);
        at = module_end.next_multiple_of(4096);
    }
    let loader = layout::CMDLINE + strings.len() as u64;
    strings.extend(LOADER_NAME);
    if strings.len() as u64 > layout::CMDLINE_ROOM {
        return Err(BootError::Cmdline { len: strings.len(), limit: layout::CMDLINE_ROOM });
    }
    memory.write_slice(&strings, GuestAddress(layout::CMDLINE))?;
    write_info(request, &modules, loader)
}

fn write_info(request: &BootRequest<'_>, modules: &[[u32; 4]], loader: u64) -> Result<(), BootError> {
    let modules_at = layout::START_INFO + INFO_LEN;
    let map_at = modules_at + MODULE_LEN * modules.len() as u64;
    let map_len = MAP_ENTRY_LEN * request.map.len() as u64;
    if map_at + map_len > layout::BOOT_PARAMS {
        return Err(bad("the memory map is too long"));
    }
    let upper = request.low_ram_end().saturating_sub(super::HIGH_RAM) >> 10;
    let mut info = [0u32; INFO_LEN as usize / 4];
    let fields = [
        (0, INFO_FLAGS),
        (1, (LOW_RAM_END >> 10) as u32),
        (2, upper as u32),
        // The first hard disk, no partition.
        (3, 0x80ff_ffff),
        (4, layout::CMDLINE as u32),
        (5, modules.len() as u32),
        (6, modules_at as u32),
        (11, map_len as u32),
        (12, map_at as u32),
        (16, loader as u32),
    ];
    for (n, value) in fields {
        if let Some(field) = info.get_mut(n) {
            *field = value;
        }
    }
    let mut bytes: Vec<u8> =
        info.iter().chain(modules.iter().flatten()).flat_map(|w| w.to_le_bytes()).collect();
    for e in request.map {
        // The size does not count itself.
        bytes.extend((MAP_ENTRY_LEN as u32 - 4).to_le_bytes());
        bytes.extend(e.base.to_le_bytes());
        bytes.extend(e.len.to_le_bytes());
        let kind: u32 = match e.kind {
            RangeKind::Ram => 1,
            RangeKind::Reserved => 2,
        };
        bytes.extend(kind.to_le_bytes());
    }
    request.memory.write_slice(&bytes, GuestAddress(layout::START_INFO))?;
    Ok(())
}

/// The modules that the text of an initramfs option names: files separated by commas, each with arguments behind
/// the first space.
pub fn module_list(text: &Path) -> Vec<(PathBuf, String)> {
    let text = text.as_os_str().as_bytes();
    let parts = text.split(|b| *b == b',').filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let path = part.split(|b| *b == b' ').next().unwrap_or(part);
            (PathBuf::from(OsStr::from_bytes(path)), String::from_utf8_lossy(part).into_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use holdfast_memory::GuestMemory;

    use super::super::{BootModule, load, memory_map};
    use super::*;
    use crate::x86_64::State;

    const RAM: usize = 16 << 20;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), RAM)]).expect("memory")
    }

    fn file(bytes: &[u8]) -> File {
        let mut f = tempfile::tempfile().expect("file");
        f.write_all(bytes).expect("write");
        f
    }

    fn header(flags: u32, addresses: &[u32]) -> Vec<u8> {
        let words = [MAGIC, flags, 0u32.wrapping_sub(MAGIC.wrapping_add(flags))];
        words.iter().chain(addresses).flat_map(|w| w.to_le_bytes()).collect()
    }

    /// A 32-bit ELF with one segment of 16 bytes in the file and 8192 in memory at 4 MiB, header behind.
    fn elf(flags: u32) -> Vec<u8> {
        let mut f = ELF32.to_vec();
        f.resize(16, 0);
        f.extend([2, 0, 3, 0]);
        for word in [1u32, 0x40_0010, 52, 0, 0] {
            f.extend(word.to_le_bytes());
        }
        for half in [52u16, 32, 1, 0, 0, 0] {
            f.extend(half.to_le_bytes());
        }
        for word in [PT_LOAD, 84, 0xc040_0000, 0x40_0000, 16, 8192, 7, 4096u32] {
            f.extend(word.to_le_bytes());
        }
        f.extend(header(flags, &[]));
        f.extend([0xaa; 4]);
        f
    }

    fn boot(
        memory: &GuestMemory,
        image: &[u8],
        modules: &[(&str, &[u8])],
        cmdline: &str,
    ) -> Result<State, BootError> {
        let mut files: Vec<File> = modules.iter().map(|m| file(m.1)).collect();
        let modules = files.iter_mut().zip(modules);
        let request = BootRequest {
            memory,
            kernel: &mut file(image),
            name: "image",
            initramfs: None,
            modules: modules.map(|(file, m)| BootModule { file, string: m.0.to_owned() }).collect(),
            cmdline,
            map: &memory_map(&[(0, RAM as u64)], &[]),
            rsdp: 0,
        };
        load(request).map(|entry| entry.apply(State::default()))
    }

    fn read<const N: usize>(memory: &GuestMemory, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        memory.read_slice(&mut bytes, GuestAddress(at)).expect("readable");
        bytes
    }

    fn word(memory: &GuestMemory, at: u64) -> u32 {
        u32::from_le_bytes(read(memory, at))
    }

    #[test]
    fn an_elf_image_is_loaded_and_told_everything() {
        let memory = memory();
        memory.write_slice(&[0xff; 8192], GuestAddress(0x40_0000)).expect("write");
        let modules: [(&str, &[u8]); 2] = [("env A=1", b"first"), ("second", &[7; 5000])];
        let s = boot(&memory, &elf(3), &modules, "a b").expect("boots");
        assert_eq!((s.rip, s.gpr[0], s.gpr[3], s.cr[0]), (0x40_0010, 0x2bad_b002, 0x6000, 0x11));
        assert_eq!(read::<16>(&memory, 0x40_0000)[12..], [0xaa; 4]);
        assert_eq!(read::<8>(&memory, 0x40_1ff8), [0; 8], "the rest of the segment is zero");
        let info = |n: u64| word(&memory, 0x6000 + 4 * n);
        assert_eq!((info(0) & 0x4f, info(1), info(2)), (0x4f, 639, 15 << 10));
        assert_eq!(&read::<10>(&memory, info(4).into()), b"image a b\0");
        assert_eq!(info(5), 2);
        let module = |n: u64| word(&memory, u64::from(info(6)) + 4 * n);
        assert_eq!((module(0), module(1)), (0x40_2000, 0x40_2005));
        assert_eq!(&read::<5>(&memory, module(0).into()), b"first");
        assert_eq!(&read::<8>(&memory, module(2).into()), b"env A=1\0");
        assert_eq!((module(4), module(5)), (0x40_3000, 0x40_3000 + 5000));
        assert_eq!(&read::<7>(&memory, module(6).into()), b"second\0");
        assert_eq!(info(11) % 24, 0);
        let map = u64::from(info(12));
        assert_eq!((word(&memory, map), word(&memory, map + 12), word(&memory, map + 20)), (20, 0x9_fc00, 1));
        assert_eq!(&read::<9>(&memory, info(16).into()), LOADER_NAME);
    }

    #[test]
    fn a_plain_image_is_loaded_by_the_addresses_of_its_header() {
        let memory = memory();
        let mut image = vec![0x55; 64];
        // The load starts 32 bytes before the header.
        image.extend(header(ADDRESSES, &[0x20_0020, 0x20_0000, 0x20_0050, 0x20_1000, 0x20_0044]));
        image.extend([0x66; 64]);
        memory.write_slice(&[0xff; 8192], GuestAddress(0x20_0000)).expect("write");
        let s = boot(&memory, &image, &[], "").expect("boots");
        assert_eq!((s.rip, s.gpr[0]), (0x20_0044, 0x2bad_b002));
        assert_eq!(word(&memory, 0x20_001c), 0x5555_5555);
        assert_eq!(word(&memory, 0x20_0020), MAGIC);
        assert_eq!(word(&memory, 0x20_004c), 0x6666_6666);
        assert_eq!((word(&memory, 0x20_0050), word(&memory, 0x20_1000)), (0, u32::MAX));
        assert_eq!(&read::<6>(&memory, layout::CMDLINE), b"image\0");
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let memory = memory();
        let text = |image: &[u8]| boot(&memory, image, &[], "").expect_err("refused").to_string();
        assert!(text(&elf(4)).contains("video mode"), "{}", text(&elf(4)));
        assert!(text(&elf(8)).contains("flags 0x8"), "{}", text(&elf(8)));
        let plain = |addresses: [u32; 5]| text(&[header(ADDRESSES, &addresses), vec![0; 64]].concat());
        assert!(plain([0x1000, 0x1000, 0, 0, 0x1000]).contains("wants to lie at 0x1000"));
        assert!(plain([0x10_0000, 0x20_0000, 0, 0, 0]).contains("before its load address"));
        assert!(plain([0x10_0000, 0x0f_ff00, 0, 0, 0]).contains("before the file"));
        assert!(plain([0x10_0000, 0x10_0000, 0x20_0000, 0, 0]).contains("behind the file"));
        assert!(plain([0x10_0000, 0x10_0000, 0, 0xffff_ffff, 0]).contains("needs RAM up to"));
        assert!(plain([0x9_0000, 0x9_0000, 0, 0xa_0000, 0]).contains("needs RAM up to"));
        assert!(text(&[header(0, &[]), vec![0; 64]].concat()).contains("no load addresses"));
        let big: (&str, &[u8]) = ("m", &vec![0; RAM]);
        let error = boot(&memory, &elf(0), &[big], "").expect_err("too large");
        assert!(matches!(error, BootError::TooLarge { what: "the initramfs", .. }));
    }

    #[test]
    fn modules_are_listed_with_commas_and_arguments_behind_spaces() {
        let list = module_list(Path::new("/a/b c=1 d,e,,"));
        let expected = [("/a/b", "/a/b c=1 d"), ("e", "e")];
        assert_eq!(list, expected.map(|(path, string)| (PathBuf::from(path), string.to_owned())));
        assert!(module_list(Path::new("")).is_empty());
    }

    #[test]
    fn damaged_images_are_survived() {
        let memory = memory();
        let plain = [header(ADDRESSES, &[0x10_0000, 0x10_0000, 0, 0, 0x10_0000]), vec![0; 64]].concat();
        for image in [elf(3), plain] {
            for cut in 0..image.len() {
                let _ = boot(&memory, &image[..cut], &[("m", b"m")], "");
            }
            for at in 0..image.len() {
                for flip in [0xff, 0x80, 1] {
                    let mut broken = image.clone();
                    broken[at] ^= flip;
                    let _ = boot(&memory, &broken, &[("m", b"m")], "");
                }
            }
        }
    }
}
