//! Port I/O with its permissions (SDM volume 1, chapter 19).

use holdfast_tcg_runtime::{Cpu, Fault};

use super::events;
use super::fault::gp;
use super::mode::attr;
use super::regs::{cr0, cr4};
use super::segment::{sys_load, system};
use crate::state::X86;

/// Fails if the I/O permission bitmap forbids `size` bytes at `port`.
fn check(cpu: &mut Cpu<'_>, port: u16, size: u8) -> Result<(), Fault> {
    let s = cpu.state::<X86>();
    let checked = s.cr0 & cr0::PE != 0 && (s.vm86() || s.cpl > s.iopl());
    let watch = s.cr4 & cr4::DE != 0 && s.dr[super::regs::dr::DR7] & 0xff != 0;
    if watch {
        events::watch_port(s, port, size);
    }
    if !checked {
        return Ok(());
    }
    let tr = cpu.state::<X86>().tr;
    let wide = matches!(tr.attributes & 15, system::TSS | system::TSS_BUSY);
    if tr.attributes & attr::P == 0 || !wide || tr.limit < 0x67 {
        return Err(gp(0));
    }
    let map = sys_load(cpu, tr.base.wrapping_add(0x66), 2)?;
    let at = map + u64::from(port) / 8;
    if at + 1 > tr.limit {
        return Err(gp(0));
    }
    let bits = sys_load(cpu, tr.base.wrapping_add(at), 2)?;
    let mask = (1_u64 << size) - 1;
    if bits >> (port & 7) & mask != 0 { Err(gp(0)) } else { Ok(()) }
}

/// IN and INS.
///
/// # Errors
/// #GP
pub(crate) fn read(cpu: &mut Cpu<'_>, port: u16, size: u8) -> Result<u64, Fault> {
    check(cpu, port, size)?;
    Ok(u64::from(cpu.port_read(port, size)))
}

/// OUT and OUTS.
///
/// # Errors
/// #GP
pub(crate) fn write(cpu: &mut Cpu<'_>, port: u16, size: u8, value: u64) -> Result<(), Fault> {
    check(cpu, port, size)?;
    cpu.port_write(port, size, value as u32);
    Ok(())
}

/// Fails if `size` bytes at `port` are forbidden: INS and OUTS check before they touch memory.
///
/// # Errors
/// #GP
pub(crate) fn allowed(cpu: &mut Cpu<'_>, port: u16, size: u8) -> Result<(), Fault> {
    check(cpu, port, size)
}
