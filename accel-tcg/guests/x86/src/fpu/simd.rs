//! MXCSR. The host's register has the guest's rounding, FZ, DAZ and sticky flags, with all exceptions masked; which of them
//! the guest has unmasked is in [`X86::mxcsr_unmasked`].

use holdfast_tcg_runtime::{Cpu, HelperResult};

use crate::state::X86;
use crate::system::fault;
use crate::system::regs::{cr4, vector};

/// Sticky flags.
const FLAGS: u32 = 0x3f;
/// Exception masks.
const MASKS: u32 = 0x1f80;
/// Underflow's mask.
const UM: u32 = 1 << 11;
/// Flush to zero.
const FZ: u32 = 1 << 15;
/// Bits that exist.
const DEFINED: u32 = 0xffff;
/// Invalid, denormal, division by zero: found before the operation.
const BEFORE: u32 = 7;

/// The guest's MXCSR, as it has it.
pub fn mxcsr(cpu: &mut Cpu<'_>) -> u32 {
    let host = cpu.mxcsr();
    let hidden = cpu.state::<X86>().mxcsr_unmasked as u32;
    (host & !MASKS & DEFINED) | MASKS & !hidden | hidden & FZ
}

/// Sets the guest's MXCSR; undefined bits are dropped. Afterwards [`Cpu::mode_changed`] is due.
pub fn set_mxcsr(cpu: &mut Cpu<'_>, value: u32) {
    let unmasked = !value & MASKS;
    let mut host = value & DEFINED | MASKS;
    let mut hidden = unmasked;
    if unmasked & UM != 0 && value & FZ != 0 {
        // Without effect while underflow is unmasked.
        host &= !FZ;
        hidden |= FZ;
    }
    cpu.state::<X86>().mxcsr_unmasked = u64::from(hidden);
    cpu.set_mxcsr(host);
}

/// Takes a new MXCSR from a guest.
///
/// # Errors
/// #GP(0) for undefined bits.
pub(super) fn load_mxcsr(cpu: &mut Cpu<'_>, value: u32) -> HelperResult {
    if value & !DEFINED != 0 {
        return Err(fault::gp(0).into());
    }
    set_mxcsr(cpu, value);
    cpu.mode_changed();
    Ok(0)
}

pub(super) fn ldmxcsr(cpu: &mut Cpu<'_>, [value, ..]: [u64; 5]) -> HelperResult {
    load_mxcsr(cpu, value as u32)
}

pub(super) fn stmxcsr(cpu: &mut Cpu<'_>, _: [u64; 5]) -> u64 {
    u64::from(mxcsr(cpu))
}

/// Puts the sticky flags aside, so that those of one instruction can be told.
pub(super) fn begin(cpu: &mut Cpu<'_>, _: [u64; 5]) -> u64 {
    let now = cpu.mxcsr();
    cpu.state::<X86>().vec_scratch[3][3] = u64::from(now & FLAGS);
    cpu.set_mxcsr(now & !FLAGS);
    0
}

/// Raises what the instruction raised and the guest has unmasked.
pub(super) fn check(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    let now = cpu.mxcsr();
    let s = cpu.state::<X86>();
    let unmasked = (s.mxcsr_unmasked as u32 & MASKS) >> 7;
    let old = s.vec_scratch[3][3] as u32;
    let trap = vector_of(s);
    let mut new = now & FLAGS;
    if new & unmasked & BEFORE != 0 {
        // The operation was not done, so nothing was found after it.
        new &= BEFORE;
    }
    let raised = new & unmasked != 0;
    cpu.set_mxcsr(now & !FLAGS | old | new);
    if raised { Err(fault::plain(trap).into()) } else { Ok(0) }
}

/// #XM, or #UD if the system does not know of it.
fn vector_of(s: &X86) -> u8 {
    if s.cr4 & cr4::OSXMMEXCPT != 0 { vector::XM } else { vector::UD }
}
