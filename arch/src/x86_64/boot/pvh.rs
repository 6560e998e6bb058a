//! The PVH entry.

use vm_memory::{Bytes, GuestAddress};

use super::start::Entry;
use super::{BootError, BootRequest, RangeKind, layout};

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
const START_INFO_LEN: u64 = 56;
const MODULE_LEN: u64 = 32;

/// Prepares the entry of an ELF image that is loaded up to `end`.
pub(super) fn prepare(request: &mut BootRequest<'_>, entry: u64, end: u64) -> Result<Entry, BootError> {
    let entry32 =
        u32::try_from(entry).map_err(|_| BootError::Image("its PVH entry lies above 4 GiB".into()))?;
    // Linux refuses longer command lines than 2047 characters; other kernels may take more.
    request.place_cmdline(layout::CMDLINE_ROOM - 1)?;
    let initramfs = request.place_initramfs(end.next_multiple_of(4096), 1 << 32)?;
    let modules = layout::START_INFO + START_INFO_LEN;
    let map = modules + MODULE_LEN;
    if map + 24 * request.map.len() as u64 > layout::BOOT_PARAMS {
        return Err(BootError::Image("the memory map is too long".into()));
    }

    let mut info = Vec::new();
    let words = [MAGIC, 1, 0, u32::from(initramfs.is_some())];
    words.iter().for_each(|w| info.extend(w.to_le_bytes()));
    let modlist = if initramfs.is_some() { modules } else { 0 };
    for address in [modlist, layout::CMDLINE, request.rsdp, map] {
        info.extend(address.to_le_bytes());
    }
    info.extend((request.map.len() as u32).to_le_bytes());
    info.extend(0u32.to_le_bytes());
    let (at, len) = initramfs.unwrap_or((0, 0));
    for value in [at, len, 0, 0] {
        info.extend(value.to_le_bytes());
    }
    for e in request.map {
        info.extend(e.base.to_le_bytes());
        info.extend(e.len.to_le_bytes());
        let kind: u32 = match e.kind {
            RangeKind::Ram => 1,
            RangeKind::Reserved => 2,
        };
        info.extend(kind.to_le_bytes());
        info.extend(0u32.to_le_bytes());
    }
    request.memory.write_slice(&info, GuestAddress(layout::START_INFO))?;
    Ok(Entry::pvh(entry32, layout::START_INFO))
}
