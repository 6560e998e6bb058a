//! Which parts of a disk were written, for who copies it meanwhile.

use parking_lot::Mutex;

/// Bytes that one bit stands for.
const UNIT: u64 = 64 << 10;

/// Parts of a disk that were written since they were last taken.
#[derive(Debug)]
pub struct WriteLog {
    size: u64,
    bits: Mutex<Vec<u64>>,
}

impl WriteLog {
    /// Nothing was written of a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self { size, bits: Mutex::new(vec![0; size.div_ceil(UNIT).div_ceil(64) as usize]) }
    }

    /// Bytes `offset` to `offset + len` are about to be written.
    pub(super) fn mark(&self, offset: u64, len: u64) {
        let Some(last) = offset.checked_add(len).filter(|_| len > 0) else { return };
        let mut bits = self.bits.lock();
        for unit in offset / UNIT..last.div_ceil(UNIT) {
            if let Some(word) = bits.get_mut((unit / 64) as usize) {
                *word |= 1 << (unit % 64);
            }
        }
    }

    /// What was written, as runs of offset and length in bytes, and forgets it. Writes that are under way may not have reached the disk.
    pub fn take(&self) -> Vec<(u64, u64)> {
        let bits = {
            let mut bits = self.bits.lock();
            let empty = vec![0; bits.len()];
            std::mem::replace(&mut *bits, empty)
        };
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for unit in 0..self.size.div_ceil(UNIT) {
            if bits.get((unit / 64) as usize).is_none_or(|word| word >> (unit % 64) & 1 == 0) {
                continue;
            }
            let (start, end) = (unit * UNIT, ((unit + 1) * UNIT).min(self.size));
            match runs.last_mut() {
                Some((at, len)) if *at + *len == start => *len = end - *at,
                _ => runs.push((start, end - start)),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_told_once() {
        let log = WriteLog::new(10 * UNIT + 512);
        log.mark(UNIT - 1, 2);
        log.mark(5 * UNIT, UNIT);
        log.mark(10 * UNIT, 512);
        log.mark(3, 0);
        log.mark(u64::MAX, 7);
        assert_eq!(log.take(), [(0, 2 * UNIT), (5 * UNIT, UNIT), (10 * UNIT, 512)]);
        assert!(log.take().is_empty());
    }
}
