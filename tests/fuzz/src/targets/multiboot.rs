//! Multiboot images: what follows the first bytes is an image, as it is or with a valid header put in, so that its
//! addresses and program headers are what is tried.

use std::cell::OnceCell;
use std::fs::File;
use std::io::{Seek, Write};

use holdfast_arch::x86_64::State;
use holdfast_arch::x86_64::boot::{BootModule, BootRequest, is_multiboot, load, memory_map, module_list};
use holdfast_memory::GuestMemory;
use std::os::unix::ffi::OsStrExt;
use vm_memory::GuestAddress;
use vmm_sys_util::tempfile::TempFile;

const RAM: u64 = 32 << 20;
const MAGIC: u32 = 0x1bad_b002;

struct Rig {
    memory: GuestMemory,
    kernel: File,
    module: File,
}

thread_local!(static RIG: OnceCell<Rig> = const { OnceCell::new() });

fn file() -> File {
    TempFile::new().expect("a file").into_file()
}

fn build() -> Rig {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM as usize)]).expect("RAM");
    Rig { memory, kernel: file(), module: file() }
}

/// `image` with a Multiboot header at `at`, if it has room there.
fn with_header(image: &[u8], at: usize, flags: u32) -> Vec<u8> {
    let mut image = image.to_vec();
    let words = [MAGIC, flags, 0u32.wrapping_sub(MAGIC.wrapping_add(flags))];
    let header: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    if let Some(place) = image.get_mut(at..at + header.len()) {
        place.copy_from_slice(&header);
    }
    image
}

fn try_image(rig: &Rig, image: &[u8], pages: u8) -> std::io::Result<()> {
    let mut kernel = rig.kernel.try_clone()?;
    kernel.set_len(0)?;
    kernel.rewind()?;
    kernel.write_all(image)?;
    let Ok(true) = is_multiboot(&mut kernel) else { return Ok(()) };
    let mut module = rig.module.try_clone()?;
    module.set_len(u64::from(pages) << 12)?;
    let request = BootRequest {
        memory: &rig.memory,
        kernel: &mut kernel,
        name: "image",
        initramfs: None,
        modules: vec![BootModule { file: &mut module, string: "x".repeat(pages.into()) }],
        cmdline: "a=b",
        map: &memory_map(&[(0, RAM)], &[]),
        rsdp: 0,
    };
    match load(request) {
        Ok(entry) => assert_eq!(entry.apply(State::default()).gpr[0], 0x2bad_b002),
        Err(error) => drop(error.to_string()),
    }
    Ok(())
}

/// Runs one input: how much of a header is put in where, the module's pages, the image.
pub fn run(data: &[u8]) {
    let Some((&[at, flags, pages], image)) = data.split_first_chunk() else { return };
    let _ = module_list(std::path::Path::new(std::ffi::OsStr::from_bytes(image)));
    let flags = u32::from(flags & 7) | u32::from(flags >> 3 & 1) << 16;
    RIG.with(|rig| {
        let rig = rig.get_or_init(build);
        try_image(rig, image, pages).expect("files work");
        try_image(rig, &with_header(image, usize::from(at) * 4, flags), pages).expect("files work");
    });
}
