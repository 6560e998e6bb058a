//! Kernels: RISC-V `Image` headers and where things are placed, x86 bzImages and ELF images with and
//! without a PVH note.

use std::cell::OnceCell;
use std::fs::File;
use std::io::{Seek, Write};

use holdfast_arch::riscv64::boot::{ImageHeader, Sizes, place};
use holdfast_arch::x86_64::boot::{ACPI_AREA, BootRequest, load, memory_map};
use holdfast_memory::GuestMemory;
use vm_memory::GuestAddress;
use vmm_sys_util::tempfile::TempFile;

const RAM: u64 = 32 << 20;

struct Rig {
    memory: GuestMemory,
    kernel: File,
    initramfs: File,
}

thread_local!(static RIG: OnceCell<Rig> = const { OnceCell::new() });

fn build() -> Rig {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM as usize)]).expect("RAM");
    Rig { memory, kernel: TempFile::new().expect("a file").into_file(), initramfs: TempFile::new().expect("a file").into_file() }
}

fn riscv(data: &[u8]) {
    let Ok(header) = ImageHeader::parse(data, data.len() as u64) else { return };
    assert!(header.image_size >= data.len() as u64);
    let kernel = Some((header.text_offset, header.image_size));
    let sizes = Sizes {
        ram_base: 1 << 31,
        ram_size: 4 << 30,
        firmware: 1 << 18,
        kernel,
        initramfs: Some(9),
        fdt: 99,
    };
    let Ok(placed) = place(&sizes) else { return };
    let (kernel, initramfs) = (placed.kernel.expect("placed"), placed.initramfs.expect("placed"));
    assert!(kernel >= sizes.ram_base + sizes.firmware && kernel + header.image_size <= initramfs);
    assert!(initramfs + 9 <= placed.fdt && placed.fdt + 99 <= sizes.ram_base + sizes.ram_size);
}

fn x86(rig: &Rig, len: u8, data: &[u8]) -> std::io::Result<()> {
    let (mut kernel, mut initramfs) = (&rig.kernel, rig.initramfs.try_clone()?);
    kernel.set_len(0)?;
    kernel.rewind()?;
    kernel.write_all(data)?;
    initramfs.set_len(u64::from(len) << 12)?;
    let cmdline = "x".repeat(usize::from(len) * 16);
    let request = BootRequest {
        memory: &rig.memory,
        kernel: &mut kernel.try_clone()?,
        name: "kernel",
        modules: Vec::new(),
        initramfs: (len & 1 != 0).then_some(&mut initramfs),
        cmdline: &cmdline,
        map: &memory_map(&[(0, RAM)], &[]),
        rsdp: ACPI_AREA.0,
    };
    let _ = load(request).map_err(|error| error.to_string());
    Ok(())
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let Some((&first, data)) = data.split_first() else { return };
    riscv(data);
    RIG.with(|rig| x86(rig.get_or_init(build), first, data).expect("files work"));
}
