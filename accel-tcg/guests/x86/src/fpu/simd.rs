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
/// Underflow's flag.
const UNDERFLOW: u32 = 1 << 4;
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

// An instruction whose exceptions may be unmasked runs twice, with results set only after both. The first run tells all
// flags but one: masked underflow is noted for tiny results that are inexact, the unmasked one for all that are tiny. So the
// second run has FZ set, which notes it for all. Conversions to half precision do not look at FZ; their results tell.

/// Where the flags before the instruction are, and those of its first run above them.
fn aside(s: &mut X86) -> &mut u64 {
    &mut s.vec_scratch[3][3]
}

fn unmasked(s: &X86) -> u32 {
    (s.mxcsr_unmasked as u32 & MASKS) >> 7
}

/// Puts the sticky flags aside, so that those of one instruction can be told.
pub(super) fn begin(cpu: &mut Cpu<'_>, _: [u64; 5]) -> u64 {
    let now = cpu.mxcsr();
    *aside(cpu.state()) = u64::from(now & FLAGS);
    cpu.set_mxcsr(now & !FLAGS);
    0
}

/// After the first run: raises what was found before the operation, and prepares for the second.
pub(super) fn again(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    let now = cpu.mxcsr();
    let s = cpu.state::<X86>();
    let (new, unmasked, trap) = (now & FLAGS, unmasked(s), vector_of(s));
    let old = *aside(s) as u32;
    if new & unmasked & BEFORE != 0 {
        // The operation was not done, so nothing was found after it.
        cpu.set_mxcsr(now & !FLAGS | old | new & BEFORE);
        return Err(fault::plain(trap).into());
    }
    *aside(s) = u64::from(old | new << 8);
    let flush = if unmasked & UNDERFLOW != 0 { FZ } else { 0 };
    cpu.set_mxcsr(now & !FLAGS | flush);
    Ok(0)
}

/// (place, lanes): notes underflow if one of these lanes of a conversion to half precision is tiny. No number that is becomes a normal
/// one, so those are the denormal ones, and zeroes that are inexact, which the first run has told. The result is in
/// [`X86::vec_scratch`] (place 0), [`X86::evex_result`] (1), [`X86::evex_memory`] (2) or [`X86::evex_small`] (3).
pub(super) fn halves(cpu: &mut Cpu<'_>, [place, lanes, ..]: [u64; 5]) -> u64 {
    let s = cpu.state::<X86>();
    let words: &[u64] = match place {
        0 => &s.vec_scratch[2],
        1 => &s.evex_result,
        2 => &s.evex_memory,
        _ => &s.evex_small[1..],
    };
    let halves = words.iter().flat_map(|word| (0..64).step_by(16).map(move |at| (word >> at) as u16));
    let tiny = |half: u16| half & 0x7c00 == 0 && half & 0x3ff != 0;
    if halves.take(16).enumerate().any(|(n, half)| lanes >> n & 1 != 0 && tiny(half)) {
        cpu.set_mxcsr(cpu.mxcsr() | UNDERFLOW);
    }
    0
}

/// After the second run: raises what the operation raised and the guest has unmasked.
pub(super) fn check(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    let now = cpu.mxcsr();
    let s = cpu.state::<X86>();
    let (unmasked, trap) = (unmasked(s), vector_of(s));
    let (old, first) = (*aside(s) as u32 & FLAGS, (*aside(s) >> 8) as u32 & FLAGS);
    let (mut new, mut rest) = (first, now & !FLAGS);
    if unmasked & UNDERFLOW != 0 {
        new |= now & UNDERFLOW;
        rest &= !FZ;
    }
    cpu.set_mxcsr(rest | old | new);
    if new & unmasked != 0 { Err(fault::plain(trap).into()) } else { Ok(0) }
}

/// #XM, or #UD if the system does not know of it.
fn vector_of(s: &X86) -> u8 {
    if s.cr4 & cr4::OSXMMEXCPT != 0 { vector::XM } else { vector::UD }
}
