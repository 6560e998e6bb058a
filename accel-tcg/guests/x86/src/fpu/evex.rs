//! Memory operands of AVX-512's instructions under a mask, gathers and scatters.

use holdfast_tcg_runtime::{Cpu, Fault, HelperResult};

use super::masked::{element, set_element};
use crate::helpers::segment;
use crate::state::X86;
use crate::system::fault::gp;

/// log2 of an element's bytes (2 bits), elements (7 bits from 2), what the mask means (9 and 10: see
/// `translate::vec::evex_memory`), bits of the mask that count (7 bits from 11), only a probe (bit 18), all of
/// it may fault (19), segment register (20 to 22), bits of an address by 32 (24 and 25), has to be aligned (26), alignment
/// checks are on (27).
struct How {
    size: usize,
    count: usize,
    kind: u64,
    needed: u32,
    probe: bool,
    whole: bool,
    segment: usize,
    offset_mask: u64,
    aligned: bool,
    checked: bool,
}

fn how(bits: u64) -> How {
    How {
        size: 1 << (bits & 3),
        count: (bits >> 2 & 127) as usize,
        kind: bits >> 9 & 3,
        needed: (bits >> 11 & 127) as u32,
        probe: bits >> 18 & 1 != 0,
        whole: bits >> 19 & 1 != 0,
        aligned: bits >> 26 & 1 != 0,
        checked: bits >> 27 & 1 != 0,
        segment: (bits >> 20 & 7) as usize,
        offset_mask: match bits >> 24 & 3 {
            0 => 0xffff,
            1 => 0xffff_ffff,
            _ => u64::MAX,
        },
    }
}

/// The low `n` bits.
fn low(n: u32) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// A run of bytes that are accessed at once: where it begins in the operand, and its length (1, 2, 4 or 8).
#[derive(Clone, Copy)]
struct Run {
    at: usize,
    len: usize,
}

impl How {
    /// The elements that are accessed.
    fn accessed(&self, mask: u64) -> u64 {
        let all = low(self.count as u32);
        match self.kind {
            0 => all,
            1 => mask & all,
            2 => {
                let mask = mask & low(self.needed);
                (0..64).step_by(self.count.max(1)).fold(0, |sum, n| sum | mask >> n & all)
            }
            _ => low((mask & all).count_ones()),
        }
    }

    /// What of elements is accessed, in order: 8 bytes at once where all of them are.
    fn runs(&self, accessed: u64) -> impl Iterator<Item = Run> + use<> {
        let (size, bytes) = (self.size, self.size * self.count);
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < bytes {
                let per_word = 8 / size;
                let word = accessed >> (at / size) & low(per_word as u32);
                if at % 8 == 0 && at + 8 <= bytes && word == low(per_word as u32) {
                    at += 8;
                    return Some(Run { at: at - 8, len: 8 });
                }
                at += size;
                if word & 1 != 0 {
                    return Some(Run { at: at - size, len: size });
                }
            }
            None
        })
    }

    /// That the operand is aligned, if it has to be and anything is accessed.
    fn check(&self, s: &X86, offset: u64, accessed: u64) -> Result<(), Fault> {
        let bytes = (self.size * self.count) as u64;
        if accessed == 0 && !self.whole || !self.aligned && !self.checked {
            return Ok(());
        }
        let at = self.linear(s, offset, Run { at: 0, len: self.size }, false)?;
        if self.aligned && !at.is_multiple_of(bytes) {
            return Err(gp(0));
        }
        // Processors check each element where they hide faults.
        super::check_alignment(
            s,
            at,
            if self.whole || self.kind == 0 { bytes.min(16) } else { self.size as u64 },
        )
    }

    /// The linear address of a run. Addresses of 16 and 32 bits do not wrap within an operand.
    fn linear(&self, s: &X86, offset: u64, run: Run, write: bool) -> Result<u64, Fault> {
        let at = (offset & self.offset_mask).wrapping_add(run.at as u64);
        segment::linear(s, self.segment, at, run.len as u64, write)
    }

    /// Operands of 8 bytes and fewer are apart.
    fn is_small(&self) -> bool {
        self.size * self.count <= 8
    }
}

/// (offset, [`How`], mask): loads the memory operand; what is not accessed is zero.
pub(super) fn load(cpu: &mut Cpu<'_>, [offset, bits, mask, ..]: [u64; 5]) -> HelperResult {
    let h = how(bits);
    let idx = cpu.state::<X86>().data_idx();
    let mut words = [0u64; 8];
    let accessed = h.accessed(mask);
    h.check(cpu.state(), offset, accessed)?;
    for run in h.runs(accessed) {
        let at = h.linear(cpu.state(), offset, run, false)?;
        let value = cpu.load(at, run.len as u8, idx)?;
        words[(run.at / 8) & 7] |= value << (8 * (run.at % 8));
    }
    let s = cpu.state::<X86>();
    if h.is_small() {
        s.evex_small[0] = words[0];
    } else {
        s.evex_memory = words;
    }
    Ok(0)
}

/// (offset, [`How`], mask): stores the memory operand, or nothing if any of it faults.
pub(super) fn store(cpu: &mut Cpu<'_>, [offset, bits, mask, ..]: [u64; 5]) -> HelperResult {
    let h = how(bits);
    let s = cpu.state::<X86>();
    let idx = s.data_idx();
    let words = if h.is_small() { [s.evex_small[1], 0, 0, 0, 0, 0, 0, 0] } else { s.evex_memory };
    let accessed = h.accessed(mask);
    h.check(cpu.state(), offset, accessed)?;
    for run in h.runs(if h.whole { u64::MAX } else { accessed }) {
        let at = h.linear(cpu.state(), offset, run, true)?;
        super::probe(cpu, at, run.len as u64)?;
    }
    if h.probe {
        return Ok(0);
    }
    for run in h.runs(accessed) {
        let at = h.linear(cpu.state(), offset, run, true)?;
        cpu.store(at, run.len as u8, idx, words[(run.at / 8) & 7] >> (8 * (run.at % 8)))?;
    }
    Ok(0)
}

/// (offset, how): gathers and scatters. What has been accessed is clear in the mask when a later element faults.
///
/// `how`: data and index register (5 bits each), opmask register (3), 64-bit indexes (bit 13), 64-bit elements (14), log2 of
/// the scale (15 and 16), 32-bit addresses (17), elements (5 bits from 18), scatter (23), segment register (24 to 26), 16
/// bytes that the instruction works on (3 bits from 27).
pub(super) fn gather(cpu: &mut Cpu<'_>, [offset, bits, ..]: [u64; 5]) -> HelperResult {
    let (data, index, mask) = ((bits & 31) as usize, (bits >> 5 & 31) as usize, (bits >> 10 & 7) as usize);
    let (wide_index, wide_element) = (bits >> 13 & 1 != 0, bits >> 14 & 1 != 0);
    let scale = bits >> 15 & 3;
    let offset_mask = if bits >> 17 & 1 != 0 { 0xffff_ffff } else { u64::MAX };
    let (count, scatter) = ((bits >> 18 & 31) as usize, bits >> 23 & 1 != 0);
    let (segment, length) = ((bits >> 24 & 7) as usize, 16 * (bits >> 27 & 7) as usize);
    let size = if wide_element { 8 } else { 4 };
    let s = cpu.state::<X86>();
    let (idx, indexes, mut values) = (s.data_idx(), s.vector(index), s.vector(data));
    let clear_above = |values: &mut [u64; 8], bytes: usize| {
        values.iter_mut().enumerate().filter(|(n, _)| 8 * n >= bytes).for_each(|(_, word)| *word = 0);
    };
    for n in 0..count {
        if cpu.state::<X86>().opmask[mask] >> n & 1 == 0 {
            continue;
        }
        let i = element(&indexes, n, if wide_index { 8 } else { 4 });
        let i = if wide_index { i } else { i as u32 as i32 as u64 };
        let at = offset.wrapping_add(i << scale) & offset_mask;
        let va = segment::linear(cpu.state(), segment, at, u64::from(size), scatter)?;
        if scatter {
            cpu.store(va, size, idx, element(&values, n, size))?;
        } else {
            let value = cpu.load(va, size, idx)?;
            set_element(&mut values, n, size, value);
            clear_above(&mut values, length);
            cpu.state::<X86>().set_vector(data, values);
        }
        cpu.state::<X86>().opmask[mask] &= !(1 << n);
    }
    let s = cpu.state::<X86>();
    s.opmask[mask] = 0;
    if !scatter {
        // Where indexes are wider than elements, the result is half as long.
        clear_above(&mut values, count * usize::from(size));
        s.set_vector(data, values);
    }
    Ok(0)
}
