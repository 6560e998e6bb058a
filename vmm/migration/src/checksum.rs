//! A checksum that keeps up with the network: four lanes of multiply and rotate over 64-bit words. It finds accidents and
//! careless tampering; against an attacker there is TLS.

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{VolatileMemory, VolatileSlice};

const PRIMES: [u64; 4] =
    [0x9e37_79b1_85eb_ca87, 0xc2b2_ae3d_27d4_eb4f, 0x1656_67b1_9e37_79f9, 0x85eb_ca77_c2b2_ae63];

fn word(bytes: &[u8]) -> u64 {
    let mut le = [0; 8];
    for (to, from) in le.iter_mut().zip(bytes) {
        *to = *from;
    }
    u64::from_le_bytes(le)
}

/// Bytes that are summed up together.
const BLOCK: usize = 32;

/// A checksum of which not all is there yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sum([u64; 4]);

impl Sum {
    /// Nothing but `head`.
    fn new(head: &[u8; 16]) -> Self {
        let mut lanes = PRIMES;
        lanes[0] ^= word(&head[..8]);
        lanes[1] ^= word(&head[8..]);
        Self(lanes)
    }

    #[inline]
    fn block(&mut self, words: [u64; 4]) {
        for ((lane, prime), word) in self.0.iter_mut().zip(PRIMES).zip(words) {
            *lane = (*lane ^ word).wrapping_mul(prime).rotate_left(31);
        }
    }

    /// All: `rest` is what came behind whole blocks, `len` the length of everything, in bytes.
    fn end(self, rest: &[u8], len: usize) -> u64 {
        let mut lanes = self.0;
        for (bytes, lane) in rest.chunks(8).zip(&mut lanes) {
            *lane = (*lane ^ word(bytes)).wrapping_mul(PRIMES[0]).rotate_left(29);
        }
        let mut sum = (len as u64).wrapping_mul(PRIMES[2]);
        for lane in lanes {
            sum = (sum ^ lane).wrapping_mul(PRIMES[1]);
            sum ^= sum >> 32;
        }
        sum
    }

    /// The [`checksum`] of `head` followed by what `ram` holds.
    pub(crate) fn of_ram(head: &[u8; 16], ram: &VolatileSlice<'_, impl BitmapSlice>) -> u64 {
        let (mut sum, count) = (Self::new(head), ram.len() / BLOCK);
        // Word by word, and each but once: without another copy.
        if let Ok(blocks) = ram.get_array_ref::<[u64; 4]>(0, count) {
            for n in 0..count {
                sum.block(blocks.load(n).map(u64::from_le));
            }
        }
        let mut rest = [0; BLOCK];
        let left = ram.offset(count * BLOCK).map_or(0, |left| left.copy_to(&mut rest[..]));
        sum.end(rest.get(..left).unwrap_or_default(), ram.len())
    }
}

fn words(block: &[u8; BLOCK]) -> [u64; 4] {
    let (words, _) = block.as_chunks::<8>();
    let mut all = [0; 4];
    for (to, bytes) in all.iter_mut().zip(words) {
        *to = u64::from_le_bytes(*bytes);
    }
    all
}

/// The checksum of `head` followed by `data`.
pub fn checksum(head: &[u8; 16], data: &[u8]) -> u64 {
    let mut sum = Sum::new(head);
    let (blocks, rest) = data.as_chunks::<BLOCK>();
    blocks.iter().for_each(|block| sum.block(words(block)));
    sum.end(rest, data.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_counts() {
        let mut data: Vec<u8> = (0..200u8).collect();
        let whole = checksum(&[7; 16], &data);
        for i in 0..data.len() {
            for bit in 0..8 {
                data[i] ^= 1 << bit;
                assert_ne!(checksum(&[7; 16], &data), whole, "byte {i} bit {bit}");
                data[i] ^= 1 << bit;
            }
        }
        for i in 0..16 {
            let mut head = [7; 16];
            head[i] ^= 1;
            assert_ne!(checksum(&head, &data), whole, "head byte {i}");
        }
        assert_ne!(checksum(&[7; 16], &data[..199]), whole);
        data.push(0);
        assert_ne!(checksum(&[7; 16], &data), whole, "a zero at the end");
    }

    #[test]
    fn ram_is_summed_up_as_anything_else() {
        for len in [0, 5, 32, 4095, 4096, 4097, 10_000] {
            let mut data: Vec<u8> = (0..len).map(|n: u32| n.wrapping_mul(7) as u8).collect();
            let sum = checksum(&[7; 16], &data);
            assert_eq!(Sum::of_ram(&[7; 16], &VolatileSlice::from(&mut data[..])), sum, "{len}");
        }
    }
}
