//! Segment limits and types, where segments are not flat.

use holdfast_tcg_runtime::{Cpu, Fault, HelperResult};

use crate::state::{X86, seg};
use crate::system::fault;
use crate::system::mode::attr;

/// (segment | bytes << 8 | write << 24, offset): the linear address.
pub(crate) fn address(cpu: &mut Cpu<'_>, [how, offset, ..]: [u64; 5]) -> HelperResult {
    let (segment, bytes) = ((how & 7) as usize, how >> 8 & 0xffff);
    Ok(linear(cpu.state(), segment, offset, bytes, how >> 24 & 1 != 0)?)
}

/// The linear address of `bytes` bytes (at least 1) at `offset` of a segment.
///
/// # Errors
/// #SS for the stack segment, else #GP.
pub(crate) fn linear(s: &X86, segment: usize, offset: u64, bytes: u64, write: bool) -> Result<u64, Fault> {
    let Some(r) = s.seg.get(segment) else { return Err(fault::gp(0)) };
    if s.code64() {
        let based = matches!(segment, seg::FS | seg::GS);
        return Ok(if based { r.base.wrapping_add(offset) } else { offset });
    }
    let denied = || if segment == seg::SS { fault::ss(0) } else { fault::gp(0) };
    let last = offset.wrapping_add(bytes - 1);
    let code = r.attributes & attr::CODE != 0;
    if s.protected() {
        let usable = r.attributes & attr::P != 0;
        // The same bit makes data writable and code readable.
        let allowed = match (code, write) {
            (true, true) => false,
            (true, false) => r.attributes & attr::WRITABLE != 0,
            (false, true) => r.attributes & attr::WRITABLE != 0,
            (false, false) => true,
        };
        if !usable || !allowed {
            return Err(denied());
        }
    }
    let outside = if !code && r.attributes & attr::DOWN != 0 {
        let top = if r.attributes & attr::DB != 0 { 0xffff_ffff } else { 0xffff };
        offset <= r.limit || last > top
    } else {
        last > r.limit
    };
    if outside {
        return Err(denied());
    }
    Ok(r.base.wrapping_add(offset) & 0xffff_ffff)
}
