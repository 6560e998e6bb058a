//! Loading firmware, kernel, initramfs and device tree.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use holdfast_arch::riscv64::boot::{self, DynamicInfo, ImageHeader, OtherHarts, Placement, Sizes};
use holdfast_clock::RandomSource;
use holdfast_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::fdt::{self, Chosen};
use super::plan::Plan;
use crate::{MachineError, Payload};

/// Where distributions put OpenSBI's dynamic firmware.
const OPENSBI: [&str; 2] = [
    "/usr/lib/riscv64-linux-gnu/opensbi/generic/fw_dynamic.bin",
    "/usr/share/qemu/opensbi-riscv64-generic-fw_dynamic.bin",
];

/// Bytes of a firmware that are searched for its banner; OpenSBI has less than 300 KiB.
const FIRMWARE_SEARCH: usize = 4 << 20;

/// An open file to be copied into RAM.
struct Part {
    what: &'static str,
    path: PathBuf,
    file: File,
    size: u64,
}

fn failure(what: &'static str, path: &Path, reason: impl Into<String>) -> MachineError {
    MachineError::Load { what, path: path.to_owned(), reason: reason.into() }
}

impl Part {
    fn open(what: &'static str, path: &Path) -> Result<Self, MachineError> {
        let file = File::open(path).map_err(|e| failure(what, path, e.to_string()))?;
        let meta = file.metadata().map_err(|e| failure(what, path, e.to_string()))?;
        if !meta.is_file() || meta.len() == 0 {
            return Err(failure(what, path, "it is not a file with something in it"));
        }
        Ok(Self { what, path: path.to_owned(), file, size: meta.len() })
    }

    /// The first `len` bytes, or fewer if the file is shorter.
    fn head(&mut self, len: usize) -> Result<Vec<u8>, MachineError> {
        let mut head = Vec::with_capacity(len);
        let read = self.file.by_ref().take(len as u64).read_to_end(&mut head);
        read.and_then(|_| self.file.rewind()).map_err(|e| failure(self.what, &self.path, e.to_string()))?;
        Ok(head)
    }

    fn copy(&mut self, memory: &GuestMemory, gpa: u64) -> Result<(), MachineError> {
        memory
            .read_exact_volatile_from(GuestAddress(gpa), &mut self.file, self.size as usize)
            .map_err(|e| failure(self.what, &self.path, e.to_string()))
    }
}

/// The firmware to use: the one asked for, or OpenSBI.
fn firmware(payload: &Payload) -> Result<Part, MachineError> {
    let path = match &payload.firmware {
        Some(path) => path.clone(),
        None => OPENSBI.iter().map(PathBuf::from).find(|p| p.exists()).ok_or_else(|| {
            let reason = "it is not installed; install the package opensbi, or name another firmware";
            failure("firmware", Path::new(OPENSBI[0]), reason)
        })?,
    };
    let mut part = Part::open("firmware", &path)?;
    if part.head(4)?.starts_with(b"\x7fELF") {
        return Err(failure("firmware", &path, "it is an ELF file; the raw binary (.bin) would be right"));
    }
    Ok(part)
}

/// How harts other than the first come to the firmware. OpenSBI, known by its banner, calls them with a software
/// interrupt; other firmware finds all harts at its entry, as on any board like this.
fn other_harts(firmware: &mut Part) -> Result<OtherHarts, MachineError> {
    const BANNER: &[u8] = b"\nOpenSBI ";
    let bytes = firmware.head(FIRMWARE_SEARCH)?;
    let is_opensbi = bytes.windows(BANNER.len()).any(|w| w == BANNER);
    Ok(if is_opensbi { OtherHarts::WaitForMsip } else { OtherHarts::Enter })
}

/// Loads everything and returns the contents of the reset ROM.
///
/// # Errors
/// [`MachineError::Load`] naming the file and what is wrong with it.
pub fn load(
    plan: &Plan,
    payload: &Payload,
    memory: &GuestMemory,
    random: &dyn RandomSource,
) -> Result<Vec<u8>, MachineError> {
    if payload.kernel.is_none() && payload.firmware.is_none() && payload.flash.is_empty() {
        let reason = "neither a kernel nor a firmware is given, nor flash".into();
        return Err(MachineError::Request { machine: super::plan::NAME, reason });
    }
    if payload.kernel.is_none() && (payload.initramfs.is_some() || !payload.cmdline.is_empty()) {
        let reason = "an initramfs and a command line need a kernel".into();
        return Err(MachineError::Request { machine: super::plan::NAME, reason });
    }
    let mut firmware = firmware(payload)?;
    let mut kernel = payload.kernel.as_deref().map(|path| Part::open("kernel", path)).transpose()?;
    let mut initramfs = payload.initramfs.as_deref().map(|path| Part::open("initramfs", path)).transpose()?;
    let mut sizes = Sizes {
        ram_base: plan.ram.gpa,
        ram_size: plan.ram.len,
        firmware: firmware.size,
        kernel: None,
        initramfs: initramfs.as_ref().map(|part| part.size),
        fdt: 0,
    };
    if let Some(part) = &mut kernel {
        let head = part.head(boot::HEADER_LEN)?;
        let header = ImageHeader::parse(&head, part.size)
            .map_err(|e| failure(part.what, &part.path, e.to_string()))?;
        // A kernel that would lie on the firmware goes to the next boundary: it can run at any.
        sizes.kernel = Some((header.text_offset.max(boot::ALIGN), header.image_size));
    }
    let mut chosen = Chosen { bootargs: payload.cmdline.clone(), ..Chosen::default() };
    let mut seed = [0; fdt::SEED + 8];
    random.fill(&mut seed).map_err(|e| MachineError::Request {
        machine: super::plan::NAME,
        reason: format!("no seed for the guest: {e}"),
    })?;
    chosen.rng_seed.copy_from_slice(&seed[..fdt::SEED]);
    chosen.kaslr_seed = seed[fdt::SEED..].iter().fold(0, |n, &b| n << 8 | u64::from(b));
    let (blob, placement) = tree(plan, sizes, chosen).map_err(|reason| {
        // What does not fit is whatever was loaded; the kernel is what users think of.
        let path = payload.kernel.as_ref().unwrap_or(&firmware.path);
        failure("kernel", path, reason)
    })?;
    let others = other_harts(&mut firmware)?;
    firmware.copy(memory, plan.ram.gpa)?;
    if let (Some(part), Some(gpa)) = (&mut kernel, placement.kernel) {
        part.copy(memory, gpa)?;
    }
    if let (Some(part), Some(gpa)) = (&mut initramfs, placement.initramfs) {
        part.copy(memory, gpa)?;
    }
    memory
        .write_slice(&blob, GuestAddress(placement.fdt))
        .map_err(|e| failure("firmware", &firmware.path, format!("no device tree in RAM: {e}")))?;
    // Without a kernel, OpenSBI goes on with what is in flash: UEFI, for instance.
    let flash = if payload.flash.is_empty() { 0 } else { super::plan::flash_bank(0).base };
    let info = DynamicInfo { next_addr: placement.kernel.unwrap_or(flash), boot_hart: 0 };
    Ok(boot::reset_rom(plan.ram.gpa, placement.fdt, info, others))
}

/// The device tree, and where everything goes. Its size does not depend on the addresses in it, so a
/// first one without them says how much room it needs.
fn tree(plan: &Plan, mut sizes: Sizes, mut chosen: Chosen) -> Result<(Vec<u8>, Placement), String> {
    let build = |chosen: &Chosen| {
        fdt::build(plan, chosen).map_err(|e| format!("the device tree cannot be made ({e})"))
    };
    chosen.initramfs = sizes.initramfs.map(|size| (0, size));
    sizes.fdt = build(&chosen)?.len() as u64;
    let placement = boot::place(&sizes).map_err(|e| e.to_string())?;
    chosen.initramfs = placement.initramfs.zip(sizes.initramfs).map(|(at, size)| (at, at + size));
    Ok((build(&chosen)?, placement))
}
