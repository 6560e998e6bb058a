//! Reading guest code for translation.

use crate::guest::Fault;

/// Where the bytes of a page come from and what is noted of them.
pub(crate) trait CodeSource {
    /// Copies 2 bytes at `pc` (2-byte aligned), or the fault of fetching them.
    fn half(&mut self, pc: u64) -> Result<u16, Fault>;
    /// Fills `out` from `pc` on, all of it in one page, or gives the fault of fetching it.
    fn bytes(&mut self, pc: u64, out: &mut [u8]) -> Result<(), Fault>;
    /// As [`CodeSource::bytes`], of bytes that may turn out to be of no use.
    fn peek(&mut self, pc: u64, out: &mut [u8]) -> Result<(), Fault>;
    /// The `len` bytes at `pc`, which are in one page and were looked at, are of use.
    fn note(&mut self, pc: u64, len: u64);
    /// One byte at `pc`, or the fault of fetching it.
    fn byte(&mut self, pc: u64) -> Result<u8, Fault>;
    /// True if a breakpoint is set at `pc`.
    fn is_break(&self, pc: u64) -> bool;
}

/// Reads instruction bytes at guest-virtual addresses. What is read becomes part of the region: a
/// change of any of these bytes invalidates it.
pub struct CodeReader<'a, 'b> {
    source: &'a mut (dyn CodeSource + 'b),
}

impl<'a, 'b> CodeReader<'a, 'b> {
    pub(crate) fn new(source: &'a mut (dyn CodeSource + 'b)) -> Self {
        Self { source }
    }

    /// Runs `f` with a reader of `bytes`, which are at `pc`; all else cannot be fetched
    /// (but reads as zero up to the end of a block of bytes). For tests and measurements.
    pub fn over<R>(pc: u64, bytes: &[u8], f: impl FnOnce(&mut CodeReader<'_, '_>) -> R) -> R {
        f(&mut CodeReader { source: &mut Plain { pc, bytes } })
    }

    /// The byte at `pc`.
    ///
    /// # Errors
    /// The fault of fetching it.
    pub fn u8(&mut self, pc: u64) -> Result<u8, Fault> {
        self.source.byte(pc)
    }

    /// Fills `out` with the bytes at `pc`, which must all lie in one page.
    ///
    /// # Errors
    /// The fault of fetching them; what is in `out` is then of no use.
    pub fn bytes(&mut self, pc: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.source.bytes(pc, out)
    }

    /// As [`CodeReader::bytes`], but what is read becomes part of the region only by [`CodeReader::note`], except in pages
    /// other than the one that the region begins in.
    ///
    /// # Errors
    /// The fault of fetching them; what is in `out` is then of no use.
    pub fn peek(&mut self, pc: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.source.peek(pc, out)
    }

    /// Makes the `len` bytes at `pc`, which were looked at and lie in one page, part of the region.
    pub fn note(&mut self, pc: u64, len: u64) {
        self.source.note(pc, len);
    }

    /// The two bytes at `pc`, little-endian. `pc` must be even.
    ///
    /// # Errors
    /// The fault of fetching them.
    pub fn u16(&mut self, pc: u64) -> Result<u16, Fault> {
        self.source.half(pc)
    }

    /// The four bytes at `pc`, little-endian. `pc` must be even.
    ///
    /// # Errors
    /// The fault of fetching the first that cannot be.
    pub fn u32(&mut self, pc: u64) -> Result<u32, Fault> {
        let low = self.source.half(pc)?;
        let high = self.source.half(pc.wrapping_add(2))?;
        Ok(u32::from(low) | u32::from(high) << 16)
    }

    /// True if a debugger wants to stop before the instruction at `pc`. A region does not go past it;
    /// one that would start there is never asked for.
    pub fn is_break(&self, pc: u64) -> bool {
        self.source.is_break(pc)
    }
}

/// Bytes in memory.
struct Plain<'a> {
    pc: u64,
    bytes: &'a [u8],
}

impl CodeSource for Plain<'_> {
    fn half(&mut self, pc: u64) -> Result<u16, Fault> {
        Ok(u16::from_le_bytes([self.byte(pc)?, self.byte(pc.wrapping_add(1))?]))
    }

    fn bytes(&mut self, pc: u64, out: &mut [u8]) -> Result<(), Fault> {
        // What is behind the end reads as zero, unless nothing is there.
        let at = usize::try_from(pc.wrapping_sub(self.pc)).ok();
        let from = at.and_then(|at| self.bytes.get(at..)).filter(|b| !b.is_empty());
        let from = from.ok_or(Fault { cause: 0, value: pc, aux: 0 })?;
        let len = out.len().min(from.len());
        let (there, behind) = out.split_at_mut(len);
        there.copy_from_slice(from.get(..len).unwrap_or_default());
        behind.fill(0);
        Ok(())
    }

    fn peek(&mut self, pc: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.bytes(pc, out)
    }

    fn note(&mut self, _pc: u64, _len: u64) {}

    fn byte(&mut self, pc: u64) -> Result<u8, Fault> {
        let at = usize::try_from(pc.wrapping_sub(self.pc)).ok().and_then(|at| self.bytes.get(at));
        at.copied().ok_or(Fault { cause: 0, value: pc, aux: 0 })
    }

    fn is_break(&self, _pc: u64) -> bool {
        false
    }
}
