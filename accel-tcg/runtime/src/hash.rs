//! A quick hasher for keys that are numbers the guest cannot choose freely enough to hurt anyone else.

use std::hash::{BuildHasherDefault, Hasher};

/// Multiplies and folds.
#[derive(Debug, Default, Clone, Copy)]
pub struct Fold(u64);

/// Mixes one word into a hash: all bits of the result depend on all bits of both.
#[inline]
pub const fn mix(hash: u64, word: u64) -> u64 {
    // The halves of a full product fold every bit into every other; the constants are wyhash's.
    let product = (hash ^ 0xa076_1d64_78bd_642f) as u128 * (word ^ 0xe703_7ed1_a0b4_28db) as u128;
    product as u64 ^ (product >> 64) as u64
}

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = mix(self.0, u64::from(*b));
        }
    }
    fn write_u32(&mut self, n: u32) {
        self.0 = mix(self.0, u64::from(n));
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = mix(self.0, n);
    }
}

/// A map with [`Fold`].
pub type Map<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<Fold>>;

#[cfg(test)]
mod tests {
    use super::mix;

    #[test]
    fn words_that_differ_alike_do_not_collide() {
        // A kernel's code: physical and virtual addresses have a constant difference.
        let code = (0..4096_u64).map(|n| mix(mix(0, 0x4010_0000 + n), 0x7fff_ffff_c000_0000 + n));
        let buckets: std::collections::HashSet<u64> = code.map(|h| h >> 48).collect();
        assert!(buckets.len() > 3800, "{}", buckets.len());
    }
}
