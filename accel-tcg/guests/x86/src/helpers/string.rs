//! Repeated string instructions, in runs within pages. RCX, RSI and RDI are exact at every fault and whenever the run is
//! interrupted; the flags are those of the last comparison then.

use holdfast_tcg_ir::env::exit;
use holdfast_tcg_runtime::{Access, AccessKind, Cpu, Fault, HelperResult, Leave};

use super::segment;
use crate::flags::{Kind, rflags};
use crate::state::{X86, seg};
use crate::system::regs::vector;
use crate::system::{fault, mmu};

const PAGE: u64 = 4096;
const RAX: usize = 0;
const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;

/// The instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum What {
    Movs,
    Stos,
    Lods,
    Cmps,
    Scas,
}

/// The helper's argument.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    pub what: What,
    /// Log2 of an element's bytes.
    pub log2: u8,
    /// Log2 of the bytes of the addresses and the count.
    pub address_log2: u8,
    /// Segment register of the source.
    pub segment: u8,
    /// REPNE: goes on while elements differ (of CMPS and SCAS).
    pub until_equal: bool,
    pub mmu_idx: u8,
    /// One element only: single step.
    pub single: bool,
    /// Alignment is checked.
    pub align: bool,
}

impl How {
    pub fn pack(self) -> u64 {
        u64::from(self.what as u8)
            | u64::from(self.log2) << 8
            | u64::from(self.address_log2) << 16
            | u64::from(self.segment) << 24
            | u64::from(self.until_equal) << 32
            | u64::from(self.mmu_idx) << 40
            | u64::from(self.single) << 48
            | u64::from(self.align) << 56
    }

    fn unpack(v: u64) -> Self {
        let byte = |n: u32| (v >> (8 * n)) as u8;
        let what = match byte(0) {
            0 => What::Movs,
            1 => What::Stos,
            2 => What::Lods,
            3 => What::Cmps,
            _ => What::Scas,
        };
        Self {
            what,
            log2: byte(1) & 3,
            address_log2: byte(2) & 3,
            segment: byte(3) & 7,
            until_equal: byte(4) != 0,
            mmu_idx: byte(5),
            single: byte(6) != 0,
            align: byte(7) != 0,
        }
    }
}

/// A run's element count and what it found.
struct Done {
    elements: u64,
    /// CMPS and SCAS: the last operands.
    compared: Option<(u64, u64)>,
    /// The condition of REPE or REPNE ended it.
    ended: bool,
}

impl Done {
    fn moved(elements: u64) -> Self {
        Self { elements, compared: None, ended: false }
    }
}

/// One operand of a run.
#[derive(Clone, Copy)]
struct Operand {
    /// Linear address of the next element.
    at: u64,
    /// How many elements from there are in one page.
    run: u64,
}

struct Run {
    how: How,
    size: u64,
    mask: u64,
    down: bool,
}

/// Runs a repeated string instruction.
///
/// (how, linear address behind it)
pub(crate) fn run(cpu: &mut Cpu<'_>, [how, next, ..]: [u64; 5]) -> HelperResult {
    let how = How::unpack(how);
    if at_once(cpu, how).is_some() {
        return Ok(0);
    }
    cpu.take_code_hit();
    repeat(cpu, how)?;
    if cpu.take_code_hit() {
        // What follows may be what it stored.
        cpu.set_pc(next);
        return Err(Leave::Exit(exit::RESUME));
    }
    Ok(0)
}

/// Copies and fills upwards in 64-bit mode, within pages of RAM that the TLB has at hand: what compilers make of small
/// structures. `None`: nothing is done.
fn at_once(cpu: &mut Cpu<'_>, how: How) -> Option<()> {
    let moves = match how.what {
        What::Movs => true,
        What::Stos => false,
        What::Lods | What::Cmps | What::Scas => return None,
    };
    let based = moves && matches!(usize::from(how.segment), seg::FS | seg::GS);
    if how.address_log2 != 3 || how.single || how.align || based {
        return None;
    }
    let s = cpu.state::<X86>();
    let (count, si, di) = (s.gpr[RCX], s.gpr[RSI], s.gpr[RDI]);
    let bytes = if count > PAGE { return None } else { count << how.log2 };
    let fits = |at: u64| at % PAGE + bytes <= PAGE;
    if s.flags & rflags::DF != 0 || !fits(di) || moves && !fits(si) {
        return None;
    }
    let value = s.gpr[RAX];
    if count != 0 {
        let target = cpu.host_at_hand(di, true, how.mmu_idx)?;
        if moves {
            bulk::copy(cpu.host_at_hand(si, false, how.mmu_idx)?, target, count, 1 << how.log2, false);
        } else {
            bulk::fill(target, value, count, 1 << how.log2, false);
        }
    }
    let s = cpu.state::<X86>();
    s.gpr[RCX] = 0;
    s.gpr[RDI] = di.wrapping_add(bytes);
    if moves {
        s.gpr[RSI] = si.wrapping_add(bytes);
    }
    Some(())
}

fn repeat(cpu: &mut Cpu<'_>, how: How) -> HelperResult {
    let mask = u64::MAX >> (64 - (8u32 << how.address_log2));
    let down = cpu.state::<X86>().flags & rflags::DF != 0;
    let run = Run { how, size: 1 << how.log2, mask, down };
    loop {
        let count = cpu.state::<X86>().gpr[RCX] & mask;
        if count == 0 {
            return Ok(0);
        }
        let done = run.chunk(cpu, if how.single { 1 } else { count })?;
        let s = cpu.state::<X86>();
        run.account(s, &done);
        if let Some((a, b)) = done.compared {
            s.cc_op = Kind::Cmp.op(u32::from(how.log2));
            (s.cc_dst, s.cc_src) = (a, b);
        }
        if done.ended || done.elements == count {
            return Ok(0);
        }
        if how.single || cpu.exit_requested() {
            return Err(Leave::Exit(exit::RESUME));
        }
    }
}

/// #AC, or what comes before it.
fn misaligned(s: &X86, at: u64) -> Fault {
    let access = Access { gva: at, size: 1, kind: AccessKind::Read, mmu_idx: 0 };
    mmu::non_canonical(s, &access).unwrap_or(fault::coded(vector::AC, 0))
}

impl Run {
    /// Moves the registers over what was done.
    fn account(&self, s: &mut X86, done: &Done) {
        let bytes = done.elements * self.size;
        let step = if self.down { bytes.wrapping_neg() } else { bytes };
        let set = |r: &mut u64, v: u64| {
            // 32-bit registers zero the upper half, 16-bit ones leave it.
            *r = if self.mask == 0xffff { *r & !0xffff | v & 0xffff } else { v & self.mask };
        };
        let [source, destination] = match self.how.what {
            What::Movs | What::Cmps => [true, true],
            What::Lods => [true, false],
            What::Stos | What::Scas => [false, true],
        };
        let (count, si, di) = (s.gpr[RCX], s.gpr[RSI], s.gpr[RDI]);
        set(&mut s.gpr[RCX], count.wrapping_sub(done.elements));
        if source {
            set(&mut s.gpr[RSI], si.wrapping_add(step));
        }
        if destination {
            set(&mut s.gpr[RDI], di.wrapping_add(step));
        }
    }

    /// The operand at register `r`, at most `count` elements.
    fn operand(&self, s: &X86, r: usize, segment: usize, count: u64, write: bool) -> Result<Operand, Fault> {
        let offset = s.gpr[r] & self.mask;
        let at = segment::linear(s, segment, offset, self.size, write)?;
        if self.how.align && !at.is_multiple_of(self.size) {
            return Err(misaligned(s, at));
        }
        let in_page = at % PAGE;
        // Up to the page's end, or down to its start; an element across the end is done alone.
        let mut run = if self.down { in_page / self.size + 1 } else { (PAGE - in_page) / self.size };
        if in_page + self.size > PAGE {
            run = 0;
        }
        // Registers that wrap, and limits: one by one.
        let last = (run.max(1).min(count) - 1) * self.size;
        let end = offset.checked_add(last + self.size - 1);
        let wraps = if self.down { offset < last } else { end.is_none_or(|end| end > self.mask) };
        let far = if self.down { offset.wrapping_sub(last) } else { offset.wrapping_add(last) };
        if wraps || !s.code64() && segment::linear(s, segment, far & self.mask, self.size, write).is_err() {
            run = 1;
        }
        Ok(Operand { at, run: run.min(count) })
    }

    /// Does at least one element, or faults.
    fn chunk(&self, cpu: &mut Cpu<'_>, count: u64) -> Result<Done, Fault> {
        let (idx, size) = (self.how.mmu_idx, self.size as u8);
        let segment = usize::from(self.how.segment);
        let s = cpu.state::<X86>();
        match self.how.what {
            What::Movs => {
                let from = self.operand(s, RSI, segment, count, false)?;
                let to = match self.operand(s, RDI, seg::ES, count, true) {
                    Ok(to) => to,
                    Err(fault) => {
                        // The source's faults come first.
                        cpu.load(from.at, size, idx)?;
                        return Err(fault);
                    }
                };
                let n = from.run.min(to.run);
                if n > 0
                    && let Some(source) = cpu.host_range(from.at, self.size, AccessKind::Read, idx)?
                    && let Some(target) = cpu.host_range(to.at, self.size, AccessKind::Write, idx)?
                {
                    bulk::copy(source, target, n, self.size, self.down);
                    return Ok(Done::moved(n));
                }
                let v = cpu.load(from.at, size, idx)?;
                cpu.store(to.at, size, idx, v)?;
                Ok(Done::moved(1))
            }
            What::Stos => {
                let value = s.gpr[RAX];
                let to = self.operand(s, RDI, seg::ES, count, true)?;
                if to.run > 0
                    && let Some(target) = cpu.host_range(to.at, self.size, AccessKind::Write, idx)?
                {
                    bulk::fill(target, value, to.run, self.size, self.down);
                    return Ok(Done::moved(to.run));
                }
                cpu.store(to.at, size, idx, value)?;
                Ok(Done::moved(1))
            }
            What::Lods => {
                let from = self.operand(s, RSI, segment, count, false)?;
                let v = cpu.load(from.at, size, idx)?;
                let rax = &mut cpu.state::<X86>().gpr[RAX];
                *rax = match self.how.log2 {
                    0 => *rax & !0xff | v,
                    1 => *rax & !0xffff | v,
                    _ => v,
                };
                Ok(Done::moved(1))
            }
            What::Cmps => {
                let first = self.operand(s, RSI, segment, count, false)?;
                let second = self.operand(s, RDI, seg::ES, count, false)?;
                let n = first.run.min(second.run);
                // Processors read what RSI points to first, other than without a repetition.
                if n > 0
                    && let Some(a) = cpu.host_range(first.at, self.size, AccessKind::Read, idx)?
                    && let Some(b) = cpu.host_range(second.at, self.size, AccessKind::Read, idx)?
                {
                    return Ok(self.search(n, |i| {
                        (bulk::read(a, i, self.size, self.down), bulk::read(b, i, self.size, self.down))
                    }));
                }
                let a = cpu.load(first.at, size, idx)?;
                let b = cpu.load(second.at, size, idx)?;
                Ok(self.search(1, |_| (a, b)))
            }
            What::Scas => {
                let value = s.gpr[RAX] & u64::MAX >> (64 - 8 * self.size);
                let at = self.operand(s, RDI, seg::ES, count, false)?;
                if at.run > 0
                    && let Some(p) = cpu.host_range(at.at, self.size, AccessKind::Read, idx)?
                {
                    return Ok(self.search(at.run, |i| (value, bulk::read(p, i, self.size, self.down))));
                }
                let b = cpu.load(at.at, size, idx)?;
                Ok(self.search(1, |_| (value, b)))
            }
        }
    }

    /// Compares up to `n` elements, until the condition ends it.
    fn search(&self, n: u64, get: impl Fn(u64) -> (u64, u64)) -> Done {
        let mut pair = (0, 0);
        for i in 0..n {
            pair = get(i);
            if (pair.0 == pair.1) == self.how.until_equal {
                return Done { elements: i + 1, compared: Some(pair), ended: true };
            }
        }
        Done { elements: n, compared: Some(pair), ended: false }
    }
}

/// Accesses to runs of elements within a page of guest RAM, which others may change meanwhile.
mod bulk {
    /// The pointer of element `i` of a run that starts at `p`.
    fn element(p: *mut u8, i: u64, size: u64, down: bool) -> *mut u8 {
        let bytes = (i * size) as usize;
        if down { p.wrapping_sub(bytes) } else { p.wrapping_add(bytes) }
    }

    /// Reads element `i`.
    pub fn read(p: *mut u8, i: u64, size: u64, down: bool) -> u64 {
        let at = element(p, i, size, down);
        // SAFETY: the run lies in one mapped page of guest RAM, and so does each of its elements.
        unsafe {
            match size {
                1 => u64::from(at.read()),
                2 => u64::from(u16::from_le(at.cast::<u16>().read_unaligned())),
                4 => u64::from(u32::from_le(at.cast::<u32>().read_unaligned())),
                _ => u64::from_le(at.cast::<u64>().read_unaligned()),
            }
        }
    }

    fn write(p: *mut u8, i: u64, size: u64, down: bool, v: u64) {
        let at = element(p, i, size, down);
        // SAFETY: as in `read`.
        unsafe {
            match size {
                1 => at.write(v as u8),
                2 => at.cast::<u16>().write_unaligned((v as u16).to_le()),
                4 => at.cast::<u32>().write_unaligned((v as u32).to_le()),
                _ => at.cast::<u64>().write_unaligned(v.to_le()),
            }
        }
    }

    /// Copies `n` elements, one after the other where that can be seen.
    pub fn copy(from: *mut u8, to: *mut u8, n: u64, size: u64, down: bool) {
        let len = (n * size) as usize;
        let distance = if down {
            (from as usize).wrapping_sub(to as usize)
        } else {
            (to as usize).wrapping_sub(from as usize)
        };
        if distance != 0 && distance < len {
            // Each element may be read after it was written.
            for i in 0..n {
                let v = read(from, i, size, down);
                write(to, i, size, down, v);
            }
            return;
        }
        let last = if down { n - 1 } else { 0 };
        let (from, to) = (element(from, last, size, down), element(to, last, size, down));
        // SAFETY: both runs lie in mapped pages of guest RAM; `copy` allows overlap.
        unsafe { std::ptr::copy(from, to, len) }
    }

    /// Stores `v` in `n` elements.
    pub fn fill(p: *mut u8, v: u64, n: u64, size: u64, down: bool) {
        let bytes = v.to_le_bytes();
        let first = bytes[0];
        if bytes.iter().take(size as usize).all(|b| *b == first) {
            let last = if down { n - 1 } else { 0 };
            // SAFETY: the run lies in one mapped page of guest RAM.
            return unsafe { element(p, last, size, down).write_bytes(first, (n * size) as usize) };
        }
        for i in 0..n {
            write(p, i, size, down, v);
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn reference(ram: &mut [u8], from: usize, to: usize, n: usize, size: usize, down: bool) {
            for i in 0..n {
                let at = |base: usize| if down { base - i * size } else { base + i * size };
                let element: Vec<u8> = ram[at(from)..at(from) + size].to_vec();
                ram[at(to)..at(to) + size].copy_from_slice(&element);
            }
        }

        #[test]
        fn copies_are_element_by_element() {
            for size in [1, 2, 4, 8] {
                for down in [false, true] {
                    for distance in -20i64..=20 {
                        let mut ram: Vec<u8> = (0..=255).collect();
                        let mut expected = ram.clone();
                        let (from, to) = (120usize, (120 + distance) as usize);
                        let n = 40 / size;
                        reference(&mut expected, from, to, n, size, down);
                        let p = ram.as_mut_ptr();
                        copy(p.wrapping_add(from), p.wrapping_add(to), n as u64, size as u64, down);
                        assert_eq!(ram, expected, "size {size}, down {down}, distance {distance}");
                    }
                }
            }
        }

        #[test]
        fn fills_go_both_ways() {
            let mut ram = [0u8; 32];
            fill(ram.as_mut_ptr().wrapping_add(16), 0x0201, 3, 2, true);
            assert_eq!(&ram[12..18], &[1, 2, 1, 2, 1, 2]);
            fill(ram.as_mut_ptr().wrapping_add(20), 0x0303, 2, 2, false);
            assert_eq!(&ram[18..26], &[0, 0, 3, 3, 3, 3, 0, 0]);
        }
    }
}
