//! Firmware and kernels.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use holdfast_accel::{RomWindow, Vm};
use holdfast_arch::x86_64::acpi;
use holdfast_arch::x86_64::boot::{self, ACPI_AREA, BootError, BootModule, BootRequest, Entry, SMBIOS_AREA};
use holdfast_arch::x86_64::smbios::{self, SmbiosConfig};
use holdfast_device::{BuildError, BusDevice, Device};
use holdfast_devices::flash::{Chips, Flash, FlashSpec};
use holdfast_memory::{GuestMemory, GuestRegion};
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

use super::plan::{NAME, Plan};
use crate::{FlashImage, MachineContext, MachineError, Payload, flash};

/// Firmware ends here.
const TOP: u64 = 1 << 32;
/// Largest firmware: below it are the local APICs.
const LARGEST: u64 = 16 << 20;
/// The end of firmware appears below 1 MiB too, this much of it.
const SHADOW: usize = 128 << 10;
const SHADOW_END: u64 = 1 << 20;

/// Firmware in its ROM or in flash.
#[derive(Debug)]
pub struct Firmware(Kind);

#[derive(Debug)]
enum Kind {
    Rom(Vec<u8>),
    /// The bank that ends at 4 GiB.
    Flash(Arc<Flash>),
}

/// Puts flash banks below 4 GiB, the first at the end, each as large as its file. Adds them to `devices`; the first
/// is the firmware.
///
/// # Errors
/// [`BuildError`] if a file cannot be opened, is no bank's size, or all are too large together.
pub fn flash_banks(
    images: &[FlashImage],
    context: &MachineContext,
    devices: &mut Vec<Arc<dyn Device>>,
) -> Result<Option<Firmware>, BuildError> {
    let mut end = TOP;
    let mut firmware = None;
    for (n, image) in images.iter().enumerate() {
        let id = format!("flash{n}");
        let meta = image.path.metadata().map_err(|source| BuildError::Host {
            id: id.clone(),
            what: format!("flash image `{}` cannot be examined", image.path.display()),
            source,
        })?;
        let size = meta.len();
        let Some(gpa) = end.checked_sub(size).filter(|gpa| *gpa >= TOP - LARGEST) else {
            let reason = "the flash images are larger than 16 MiB together".to_owned();
            return Err(BuildError::Config { id, reason });
        };
        let bank = Flash::new(FlashSpec {
            gpa,
            chips: Chips::Single8,
            size,
            backing: flash::backing(&id, Some(image))?,
            id: id.clone(),
            rom: Some(Arc::new(flash::VmRom(Arc::clone(&context.vm)))),
        })?;
        let attached = context.build.mmio.attach(gpa, size, "flash", Arc::clone(&bank) as Arc<dyn BusDevice>);
        attached.map_err(|source| BuildError::Bus { id, source })?;
        devices.push(Arc::clone(&bank) as Arc<dyn Device>);
        firmware.get_or_insert(Firmware(Kind::Flash(bank)));
        end = gpa;
    }
    Ok(firmware)
}

/// Describes a failure to load `path`, with the whole chain of reasons.
pub fn load_error(what: &'static str, path: &Path, error: &dyn std::error::Error) -> MachineError {
    let mut reason = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        reason = format!("{reason}: {inner}");
        source = inner.source();
    }
    MachineError::Load { what, path: path.to_owned(), reason }
}

impl Firmware {
    /// Reads the image and maps it so that it ends at 4 GiB.
    ///
    /// # Errors
    /// [`MachineError::Load`] if it cannot be read or is no PC firmware's size, [`MachineError::Request`] if
    /// it cannot be mapped.
    pub fn map(path: &Path, vm: &dyn Vm) -> Result<Self, MachineError> {
        let file = File::open(path).map_err(|e| load_error("firmware", path, &e))?;
        let mut bytes = Vec::new();
        file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(|e| load_error("firmware", path, &e))?;
        let len = bytes.len() as u64;
        if len == 0 || len > LARGEST || !len.is_multiple_of(64 << 10) {
            let reason = format!("it is {len} bytes long; PC firmware is a multiple of 64 KiB, up to 16 MiB");
            return Err(MachineError::Load { what: "firmware", path: path.to_owned(), reason });
        }
        let refuse = |e: &dyn std::error::Error| MachineError::Request {
            machine: NAME,
            reason: format!("the firmware ROM cannot be mapped: {e}"),
        };
        let region =
            GuestRegion::from_range(GuestAddress(TOP - len), bytes.len(), None).map_err(|e| refuse(&e))?;
        region.write_slice(&bytes, MemoryRegionAddress(0)).map_err(|e| refuse(&e))?;
        vm.map_rom(&RomWindow { gpa: TOP - len, region: Arc::new(region) }).map_err(|e| refuse(&e))?;
        Ok(Self(Kind::Rom(bytes)))
    }

    /// Copies the last 128 KiB to below 1 MiB, as a chipset's decoder shows them after a reset.
    ///
    /// # Errors
    /// [`MachineError::Request`] if there is no RAM.
    pub fn shadow(&self, memory: &GuestMemory) -> Result<(), MachineError> {
        let tail = match &self.0 {
            Kind::Rom(bytes) => bytes.get(bytes.len().saturating_sub(SHADOW)..).unwrap_or(bytes).to_vec(),
            Kind::Flash(bank) => {
                let len = bank.size().min(SHADOW as u64);
                let mut tail = vec![0; len as usize];
                bank.contents(bank.size() - len, &mut tail);
                tail
            }
        };
        memory.write_slice(&tail, GuestAddress(SHADOW_END - tail.len() as u64)).map_err(|e| {
            MachineError::Request { machine: NAME, reason: format!("firmware cannot be copied to RAM: {e}") }
        })
    }
}

/// Puts a kernel with its initramfs and all tables into RAM; returns how to enter it.
///
/// # Errors
/// [`MachineError`].
pub fn kernel(
    path: &Path,
    payload: &Payload,
    plan: &Plan,
    smbios: &SmbiosConfig,
    memory: &GuestMemory,
) -> Result<Entry, MachineError> {
    let tables = |what: &str, e: &dyn std::error::Error| MachineError::Request {
        machine: NAME,
        reason: format!("{what} tables cannot be placed: {e}"),
    };
    acpi::build(&plan.acpi()).place(memory, ACPI_AREA.0, ACPI_AREA.1).map_err(|e| tables("ACPI", &e))?;
    smbios::place(smbios, memory, SMBIOS_AREA.0, SMBIOS_AREA.1).map_err(|e| tables("SMBIOS", &e))?;
    let mut file = File::open(path).map_err(|e| load_error("kernel", path, &e))?;
    let multiboot = boot::is_multiboot(&mut file).map_err(|e| load_error("kernel", path, &e))?;
    let open = |path: &Path| File::open(path).map_err(|e| load_error("initramfs", path, &e));
    let (mut initramfs, mut modules) = (None, Vec::new());
    match &payload.initramfs {
        // A Multiboot image takes several files, with arguments.
        Some(list) if multiboot => {
            for (path, string) in boot::module_list(list) {
                modules.push((open(&path)?, string));
            }
        }
        Some(path) => initramfs = Some(open(path)?),
        None => {}
    }
    let modules = modules.iter_mut().map(|(file, string)| BootModule { file, string: string.clone() });
    let request = BootRequest {
        memory,
        kernel: &mut file,
        name: &path.to_string_lossy(),
        initramfs: initramfs.as_mut(),
        modules: modules.collect(),
        cmdline: &payload.cmdline,
        map: &plan.memory_map(),
        rsdp: ACPI_AREA.0,
    };
    boot::load(request).map_err(|e| match (&e, &payload.initramfs) {
        (BootError::TooLarge { what: "the initramfs", .. }, Some(path)) => load_error("initramfs", path, &e),
        _ => load_error("kernel", path, &e),
    })
}
