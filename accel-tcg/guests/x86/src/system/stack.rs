//! Stacks that the processor itself pushes to and pops from.

use holdfast_tcg_runtime::{Cpu, Fault};

use super::fault::{self, ss};
use super::mode::attr;
use crate::key::idx;
use crate::state::{SegmentRegister, X86, seg};

/// RSP in [`X86::gpr`].
pub(crate) const RSP: usize = 4;

/// A stack being pushed to or popped from. The registers are set when all of it went well.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stack {
    base: u64,
    limit: u64,
    attributes: u64,
    /// The stack pointer.
    pub sp: u64,
    mask: u64,
    idx: u8,
    long: bool,
    /// Bytes of an item: 2, 4, 8.
    pub size: u8,
}

impl Stack {
    /// The current stack with items of `size` bytes.
    pub fn current(s: &X86, size: u8) -> Self {
        let idx = if s.cpl == 3 { idx::USER } else { s.data_idx() };
        let mut stack = Self::at(s, &s.seg[seg::SS], s.gpr[RSP], size);
        stack.idx = idx;
        if s.code64() {
            stack.mask = u64::MAX;
            stack.base = 0;
            stack.long = true;
        }
        stack
    }

    /// A stack in the segment `ss` at `sp`, accessed by the processor itself.
    pub fn at(s: &X86, ss: &SegmentRegister, sp: u64, size: u8) -> Self {
        let big = ss.attributes & attr::DB != 0;
        let mask = if big { 0xffff_ffff } else { 0xffff };
        Self {
            base: ss.base,
            limit: ss.limit,
            attributes: ss.attributes,
            sp,
            mask,
            idx: idx::SYSTEM,
            long: s.code64(),
            size,
        }
    }

    /// A 64-bit stack at `sp`, accessed by the processor itself.
    pub fn flat(sp: u64) -> Self {
        Self { base: 0, limit: 0, attributes: 0, sp, mask: u64::MAX, idx: idx::SYSTEM, long: true, size: 8 }
    }

    fn linear(&self, sp: u64) -> Result<u64, Fault> {
        let offset = sp & self.mask;
        if self.long {
            return Ok(self.base.wrapping_add(offset));
        }
        let last = offset + u64::from(self.size) - 1;
        let down = self.attributes & (attr::S | attr::CODE | attr::DOWN) == attr::S | attr::DOWN;
        let outside = if down {
            let top = if self.attributes & attr::DB != 0 { 0xffff_ffff } else { 0xffff };
            offset <= self.limit || last > top
        } else {
            last > self.limit
        };
        if outside {
            return Err(ss(0));
        }
        Ok(self.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Pushes an item.
    pub fn push(&mut self, cpu: &mut Cpu<'_>, value: u64) -> Result<(), Fault> {
        let sp = self.sp.wrapping_sub(u64::from(self.size));
        let at = self.linear(sp)?;
        cpu.store(at, self.size, self.idx, value).map_err(|f| self.as_stack_fault(f))?;
        self.sp = self.sp & !self.mask | sp & self.mask;
        Ok(())
    }

    /// Pops an item.
    pub fn pop(&mut self, cpu: &mut Cpu<'_>) -> Result<u64, Fault> {
        let value = self.peek(cpu, 0)?;
        self.skip(u64::from(self.size));
        Ok(value)
    }

    /// The item `offset` bytes above the top.
    pub fn peek(&self, cpu: &mut Cpu<'_>, offset: u64) -> Result<u64, Fault> {
        let at = self.linear(self.sp.wrapping_add(offset))?;
        cpu.load(at, self.size, self.idx).map_err(|f| self.as_stack_fault(f))
    }

    /// Drops `bytes`.
    pub fn skip(&mut self, bytes: u64) {
        self.sp = self.sp & !self.mask | self.sp.wrapping_add(bytes) & self.mask;
    }

    /// Takes the stack pointer over.
    pub fn commit(&self, s: &mut X86) {
        s.gpr[RSP] = if self.mask == 0xffff_ffff {
            self.sp & 0xffff_ffff
        } else {
            s.gpr[RSP] & !self.mask | self.sp & self.mask
        };
    }

    /// Stack addresses that are not canonical are #SS.
    fn as_stack_fault(&self, f: Fault) -> Fault {
        if self.long && f.aux & fault::NON_CANONICAL != 0 { ss(0) } else { f }
    }
}
