//! Loads and stores under a mask, element by element, and gathers.

use holdfast_tcg_runtime::{Cpu, Fault, HelperResult};

use super::probe;
use crate::helpers::segment;
use crate::state::X86;

/// Data and mask registers (8 bits each), 64-bit elements (bit 16), 256 bits (bit 17), segment register (bits 20 to 22),
/// bits of an address by 32 (24 and 25).
struct How {
    segment: usize,
    /// The bits that an offset in the segment has.
    offset_mask: u64,
    data: usize,
    mask: usize,
    /// Bytes of an element.
    size: u8,
    count: usize,
}

fn how(bits: u64) -> How {
    let size = if bits >> 16 & 1 != 0 { 8 } else { 4 };
    let bytes = if bits >> 17 & 1 != 0 { 32 } else { 16 };
    How {
        data: (bits & 15) as usize,
        mask: (bits >> 8 & 15) as usize,
        size,
        count: bytes / usize::from(size),
        segment: (bits >> 20 & 7) as usize,
        offset_mask: match bits >> 24 & 3 {
            0 => 0xffff,
            1 => 0xffff_ffff,
            _ => u64::MAX,
        },
    }
}

impl How {
    /// The linear address of element `n`. What is off is not checked. Addresses of 16 and 32 bits do not wrap within an operand.
    fn at(&self, s: &X86, offset: u64, n: usize, write: bool) -> Result<u64, Fault> {
        let size = u64::from(self.size);
        let at = (offset & self.offset_mask).wrapping_add(n as u64 * size);
        segment::linear(s, self.segment, at, size, write)
    }
}

/// Element `n` of `size` bytes (4 or 8) of a register.
pub(super) fn element(register: &[u64], n: usize, size: u8) -> u64 {
    let word = |n: usize| register.get(n).copied().unwrap_or(0);
    if size == 8 { word(n) } else { (word(n / 2) >> (32 * (n & 1))) & 0xffff_ffff }
}

/// Sets it.
pub(super) fn set_element(register: &mut [u64], n: usize, size: u8, value: u64) {
    let (at, shift, mask) =
        if size == 8 { (n, 0, u64::MAX) } else { (n / 2, 32 * (n & 1), 0xffff_ffff << (32 * (n & 1))) };
    if let Some(word) = register.get_mut(at) {
        *word = *word & !mask | value << shift & mask;
    }
}

fn is_on(mask: &[u64; 4], n: usize, size: u8) -> bool {
    element(mask, n, size) >> (u32::from(size) * 8 - 1) & 1 != 0
}

/// `vmaskmov` and `vpmaskmov` to memory.
pub(super) fn store(cpu: &mut Cpu<'_>, [offset, bits, ..]: [u64; 5]) -> HelperResult {
    let h = how(bits);
    let s = cpu.state::<X86>();
    let (idx, data, mask) = (s.data_idx(), s.ymm[h.data], s.ymm[h.mask]);
    for pass in 0..2 {
        for n in (0..h.count).filter(|n| is_on(&mask, *n, h.size)) {
            let at = h.at(cpu.state(), offset, n, true)?;
            if pass == 0 {
                probe(cpu, at, u64::from(h.size))?;
            } else {
                cpu.store(at, h.size, idx, element(&data, n, h.size))?;
            }
        }
    }
    Ok(0)
}

/// A store of a YMM register that crosses a page.
pub(super) fn store_wide(cpu: &mut Cpu<'_>, [va, register, ..]: [u64; 5]) -> HelperResult {
    probe(cpu, va, 32)?;
    let s = cpu.state::<X86>();
    let (idx, data) = (s.data_idx(), s.ymm[register as usize & 15]);
    for (n, word) in data.into_iter().enumerate() {
        cpu.store(va.wrapping_add(8 * n as u64), 8, idx, word)?;
    }
    Ok(0)
}

/// The same from memory: elements that are not loaded are zero.
pub(super) fn load(cpu: &mut Cpu<'_>, [offset, bits, ..]: [u64; 5]) -> HelperResult {
    let h = how(bits);
    let s = cpu.state::<X86>();
    let (idx, mask) = (s.data_idx(), s.ymm[h.mask]);
    let mut result = [0; 4];
    for n in (0..h.count).filter(|n| is_on(&mask, *n, h.size)) {
        let at = h.at(cpu.state(), offset, n, false)?;
        let value = cpu.load(at, h.size, idx)?;
        set_element(&mut result, n, h.size, value);
    }
    cpu.state::<X86>().ymm[h.data] = result;
    Ok(0)
}

fn store_bytes(cpu: &mut Cpu<'_>, va: u64, data: &[u8], mask: &[u8]) -> HelperResult {
    if data.len() == 8 {
        super::check_alignment(cpu.state(), va, 8)?;
    }
    let idx = cpu.state::<X86>().data_idx();
    let on = || data.iter().zip(mask).enumerate().filter(|(_, (_, m))| **m & 0x80 != 0);
    // The whole range has to be writable, whatever the mask says.
    probe(cpu, va, data.len() as u64)?;
    for (n, (byte, _)) in on() {
        cpu.store(va.wrapping_add(n as u64), 1, idx, u64::from(*byte))?;
    }
    Ok(0)
}

/// `maskmovdqu`
pub(super) fn maskmovdqu(cpu: &mut Cpu<'_>, [va, registers, ..]: [u64; 5]) -> HelperResult {
    let s = cpu.state::<X86>();
    let bytes = |r: [u64; 4]| (u128::from(r[0]) | u128::from(r[1]) << 64).to_le_bytes();
    let data = bytes(s.ymm[registers as usize & 15]);
    let mask = bytes(s.ymm[(registers >> 8) as usize & 15]);
    store_bytes(cpu, va, &data, &mask)
}

/// `maskmovq`
pub(super) fn maskmovq(cpu: &mut Cpu<'_>, [va, data, mask, ..]: [u64; 5]) -> HelperResult {
    store_bytes(cpu, va, &data.to_le_bytes(), &mask.to_le_bytes())
}

/// Gathers. What has been loaded stays loaded when a later element faults: its mask is clear.
pub(super) fn gather(cpu: &mut Cpu<'_>, [base, bits, ..]: [u64; 5]) -> HelperResult {
    let number = |shift: u32| (bits >> shift & 15) as usize;
    let (data, index, mask) = (number(0), number(4), number(8));
    let (wide_index, wide_element) = (bits >> 12 & 1 != 0, bits >> 13 & 1 != 0);
    let (scale, narrow_address) = (bits >> 14 & 3, bits >> 16 & 1 != 0);
    let count = (bits >> 17 & 15) as usize;
    let size = if wide_element { 8 } else { 4 };
    let idx = cpu.state::<X86>().data_idx();
    for n in 0..count {
        let s = cpu.state::<X86>();
        if !is_on(&s.ymm[mask], n, size) {
            set_element(&mut s.ymm[mask], n, size, 0);
            continue;
        }
        let i = element(&s.ymm[index], n, if wide_index { 8 } else { 4 });
        let i = if wide_index { i } else { i as u32 as i32 as u64 };
        let mut va = base.wrapping_add(i << scale);
        if narrow_address {
            va &= 0xffff_ffff;
        }
        let value = cpu.load(va, size, idx)?;
        let s = cpu.state::<X86>();
        set_element(&mut s.ymm[data], n, size, value);
        set_element(&mut s.ymm[mask], n, size, 0);
    }
    // The rest of both registers is zero.
    let s = cpu.state::<X86>();
    s.ymm[mask] = [0; 4];
    let bytes = count * usize::from(size);
    for (n, word) in s.ymm[data].iter_mut().enumerate() {
        if n * 8 >= bytes {
            *word = 0;
        }
    }
    Ok(0)
}
