//! A quick hasher for keys that are numbers the guest cannot choose freely enough to hurt anyone else.

use std::hash::{BuildHasherDefault, Hasher};

/// Multiplies and folds.
#[derive(Debug, Default, Clone, Copy)]
pub struct Fold(u64);

/// Mixes one word into a hash.
#[inline]
pub const fn mix(hash: u64, word: u64) -> u64 {
    (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_right(23)
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
