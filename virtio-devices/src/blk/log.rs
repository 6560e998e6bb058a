//! Which parts of a disk were written, for who copies it meanwhile.

use parking_lot::Mutex;

/// Bytes that one bit stands for, unless somebody wants another unit.
pub const UNIT: u64 = 64 << 10;

/// Parts of a disk that were written since they were last taken.
///
/// The device marks a request when it begins and when it is done. So what was taken while a request was under way is taken once
/// more, and whoever copies between need not stop the device.
#[derive(Debug)]
pub struct WriteLog {
    size: u64,
    unit: u64,
    marks: Mutex<Marks>,
}

#[derive(Debug)]
struct Marks {
    words: Vec<u64>,
    /// Bits that are set.
    count: u64,
}

impl Marks {
    fn is_set(&self, unit: u64) -> bool {
        self.words.get((unit / 64) as usize).is_some_and(|word| word >> (unit % 64) & 1 != 0)
    }

    /// The first unit at or after `from` that is set.
    fn next(&self, from: u64) -> Option<u64> {
        let first = (from / 64) as usize;
        let (at, word) = self.words.iter().enumerate().skip(first).find_map(|(at, word)| {
            let word = if at == first { word & (u64::MAX << (from % 64)) } else { *word };
            (word != 0).then_some((at, word))
        })?;
        Some(at as u64 * 64 + u64::from(word.trailing_zeros()))
    }

    fn set(&mut self, unit: u64, on: bool) {
        let Some(word) = self.words.get_mut((unit / 64) as usize) else { return };
        let bit = 1 << (unit % 64);
        match (*word & bit != 0, on) {
            (false, true) => self.count += 1,
            (true, false) => self.count -= 1,
            _ => return,
        }
        *word ^= bit;
    }
}

impl WriteLog {
    /// Nothing was written of a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self::with_unit(size, UNIT)
    }

    /// The same, with a bit for every `unit` bytes, which are not 0.
    pub fn with_unit(size: u64, unit: u64) -> Self {
        let words = vec![0; size.div_ceil(unit).div_ceil(64) as usize];
        Self { size, unit, marks: Mutex::new(Marks { words, count: 0 }) }
    }

    /// Bytes `offset` to `offset + len` are about to be written, or just were.
    pub fn mark(&self, offset: u64, len: u64) {
        let end = offset.checked_add(len).filter(|_| len > 0 && offset < self.size);
        let Some(end) = end else { return };
        let mut marks = self.marks.lock();
        for unit in offset / self.unit..end.min(self.size).div_ceil(self.unit) {
            marks.set(unit, true);
        }
    }

    /// How much is marked, in bytes; the end of the disk counts as a whole unit.
    pub fn marked(&self) -> u64 {
        self.marks.lock().count * self.unit
    }

    /// The first marked run that begins at `from` bytes or later, as offset and length in bytes, and forgets it. Not much more than
    /// `most` bytes.
    pub fn take_run(&self, from: u64, most: u64) -> Option<(u64, u64)> {
        let mut marks = self.marks.lock();
        let first = marks.next(from.div_ceil(self.unit))?;
        let most = most.div_ceil(self.unit).max(1);
        let mut end = first;
        while end - first < most && marks.is_set(end) {
            marks.set(end, false);
            end += 1;
        }
        let start = first * self.unit;
        Some((start, (end * self.unit).min(self.size) - start))
    }

    /// All that is marked, as runs of offset and length in bytes, and forgets it. Writes that are under way may not have reached the
    /// disk; they are marked again when they have.
    pub fn take(&self) -> Vec<(u64, u64)> {
        let next = |last: &(u64, u64)| self.take_run(last.0 + last.1, u64::MAX);
        std::iter::successors(self.take_run(0, u64::MAX), next).collect()
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
        log.mark(1 << 40, 7);
        assert_eq!(log.marked(), 4 * UNIT);
        assert_eq!(log.take(), [(0, 2 * UNIT), (5 * UNIT, UNIT), (10 * UNIT, 512)]);
        assert!(log.take().is_empty());
        assert_eq!(log.marked(), 0);
    }

    #[test]
    fn a_disk_is_taken_in_runs() {
        let log = WriteLog::with_unit(1 << 20, 4096);
        log.mark(0, 1 << 20);
        assert_eq!(log.marked(), 1 << 20);
        assert_eq!(log.take_run(0, 10_000), Some((0, 12_288)));
        assert_eq!(log.take_run(12_288, u64::MAX), Some((12_288, (1 << 20) - 12_288)));
        assert_eq!(log.take_run(1 << 20, 1), None);
        log.mark(8191, 1);
        assert_eq!(log.take_run(4097, 1), None);
        assert_eq!(log.take_run(4096, 1), Some((4096, 4096)));
        log.mark(70 * 4096, 1);
        log.mark(300 * 4096, 1);
        assert_eq!(log.take_run(0, u64::MAX), Some((70 * 4096, 4096)));
        assert_eq!(log.take_run(0, u64::MAX), None);
    }
}
