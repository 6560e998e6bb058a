//! Copying a disk: in chunks, with runs of zeroes told apart from data.

use crate::node::is_zero;

/// Most bytes that are read and written at once.
pub const CHUNK: usize = 1 << 20;
/// Zeroes are looked for in pieces of this size, in bytes.
const PIECE: usize = 64 << 10;
/// Most zeroes that are asked for at once, in bytes: a host may have to write them.
pub const MAX_ZEROES: u64 = 1 << 30;

/// The two ends of a copy.
pub trait Ends {
    /// What goes wrong at either end.
    type Error;

    /// Fills `buf` with what is at `offset` of the source. Called for each chunk, so it may also wait, or end the copy.
    ///
    /// # Errors
    /// Whatever ends the copy.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), Self::Error>;

    /// Writes to the target.
    ///
    /// # Errors
    /// Whatever ends the copy.
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Self::Error>;

    /// Makes `len` bytes of the target read as zeroes.
    ///
    /// # Errors
    /// Whatever ends the copy.
    fn zero(&mut self, offset: u64, len: u64) -> Result<(), Self::Error>;
}

/// Copies `len` bytes at `start` through `buffer`, which is not empty.
///
/// # Errors
/// What an end says; then a part is copied.
pub fn copy<E: Ends>(ends: &mut E, (start, len): (u64, u64), buffer: &mut [u8]) -> Result<(), E::Error> {
    let end = start + len;
    let (mut at, mut zeroes) = (start, 0);
    let most = buffer.len() as u64;
    while at < end {
        let (chunk, _) = buffer.split_at_mut(most.min(end - at) as usize);
        ends.read(at, chunk)?;
        let pieces: Vec<bool> = chunk.chunks(PIECE).map(is_zero).collect();
        let mut rest = &*chunk;
        for alike in pieces.chunk_by(PartialEq::eq) {
            let (data, behind) = rest.split_at(rest.len().min(alike.len() * PIECE));
            if alike.first() == Some(&true) {
                zeroes += data.len() as u64;
            } else {
                flush_zeroes(ends, at, &mut zeroes)?;
                ends.write(at, data)?;
            }
            at += data.len() as u64;
            rest = behind;
        }
        if zeroes + most > MAX_ZEROES {
            flush_zeroes(ends, at, &mut zeroes)?;
        }
    }
    flush_zeroes(ends, at, &mut zeroes)
}

/// Writes the zeroes that end at `at`.
fn flush_zeroes<E: Ends>(ends: &mut E, at: u64, zeroes: &mut u64) -> Result<(), E::Error> {
    match std::mem::take(zeroes) {
        0 => Ok(()),
        len => ends.zero(at - len, len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Both {
        from: Vec<u8>,
        told: Vec<(u64, u64, bool)>,
    }

    impl Ends for Both {
        type Error = &'static str;

        fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), Self::Error> {
            let from = self.from.get(offset as usize..).ok_or("past the end")?;
            buf.copy_from_slice(from.get(..buf.len()).ok_or("past the end")?);
            Ok(())
        }
        fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Self::Error> {
            self.told.push((offset, data.len() as u64, false));
            Ok(())
        }
        fn zero(&mut self, offset: u64, len: u64) -> Result<(), Self::Error> {
            self.told.push((offset, len, true));
            Ok(())
        }
    }

    #[test]
    fn zeroes_are_told_apart_and_put_together_across_chunks() {
        let piece = PIECE as u64;
        let mut both = Both { from: vec![0; 7 * PIECE + 100], ..Both::default() };
        both.from[PIECE] = 1;
        both.from[7 * PIECE + 99] = 1;
        copy(&mut both, (0, 7 * piece + 100), &mut vec![0; 3 * PIECE]).expect("copied");
        let expected =
            [(0, piece, true), (piece, piece, false), (2 * piece, 5 * piece, true), (7 * piece, 100, false)];
        assert_eq!(both.told, expected);
        both.told.clear();
        copy(&mut both, (piece, 512), &mut vec![0; CHUNK]).expect("copied");
        assert_eq!(both.told, [(piece, 512, false)]);
        assert_eq!(copy(&mut both, (8 * piece, 512), &mut vec![0; CHUNK]), Err("past the end"));
    }

    #[test]
    fn a_long_run_of_zeroes_is_asked_for_in_parts() {
        struct Nothing(Vec<u64>);
        impl Ends for Nothing {
            type Error = ();
            fn read(&mut self, _: u64, buf: &mut [u8]) -> Result<(), ()> {
                buf.fill(0);
                Ok(())
            }
            fn write(&mut self, _: u64, _: &[u8]) -> Result<(), ()> {
                Err(())
            }
            fn zero(&mut self, _: u64, len: u64) -> Result<(), ()> {
                self.0.push(len);
                Ok(())
            }
        }
        let mut all = Nothing(Vec::new());
        copy(&mut all, (0, MAX_ZEROES + 4096), &mut vec![0; CHUNK]).expect("copied");
        assert_eq!(all.0, [MAX_ZEROES, 4096]);
    }
}
