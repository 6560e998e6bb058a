//! Hashes and what is built from them: PBKDF2, and LUKS's anti-forensic splitter.

use hmac::Hmac;
use hmac::digest::Digest;
use sha1::Sha1;
use sha2::{Sha256, Sha512};
use zeroize::Zeroizing;

/// A hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Hash {
    /// All that there are.
    pub const ALL: [Self; 3] = [Self::Sha1, Self::Sha256, Self::Sha512];

    /// The name in headers and options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// The hash of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|h| h.name() == name)
    }

    /// Bytes of a digest.
    pub fn digest_len(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    /// The digest of all parts, one after the other.
    pub fn digest(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        fn of<D: Digest>(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
            let mut hash = D::new();
            parts.iter().for_each(|p| hash.update(p));
            Zeroizing::new(hash.finalize().to_vec())
        }
        match self {
            Self::Sha1 => of::<Sha1>(parts),
            Self::Sha256 => of::<Sha256>(parts),
            Self::Sha512 => of::<Sha512>(parts),
        }
    }

    /// Fills `out` with what PBKDF2 (RFC 8018) makes of a password.
    pub fn pbkdf2(self, password: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        // HMAC takes keys of any length: there is nothing to fail.
        let _ = match self {
            Self::Sha1 => pbkdf2::pbkdf2::<Hmac<Sha1>>(password, salt, iterations, out),
            Self::Sha256 => pbkdf2::pbkdf2::<Hmac<Sha256>>(password, salt, iterations, out),
            Self::Sha512 => pbkdf2::pbkdf2::<Hmac<Sha512>>(password, salt, iterations, out),
        };
    }

    /// The iterations of [`Hash::pbkdf2`] that take this machine `milliseconds` for a key of `len` bytes.
    pub fn calibrate(self, len: usize, milliseconds: u64) -> u64 {
        let mut out = Zeroizing::new(vec![0; len]);
        let mut iterations = 1u32 << 10;
        loop {
            let before = holdfast_clock::thread_cpu_time();
            self.pbkdf2(b"password", b"salt", iterations, &mut out);
            let took = holdfast_clock::thread_cpu_time().saturating_sub(before).max(1);
            // Long enough to tell, or long enough in all.
            if took >= 20_000_000 || iterations >= 1 << 26 {
                let scaled = u128::from(iterations) * u128::from(milliseconds) * 1_000_000 / u128::from(took);
                return u64::try_from(scaled).unwrap_or(u64::MAX);
            }
            iterations *= 2;
        }
    }

    /// Diffuses a block: each digest-sized part is replaced by the digest of its number and itself.
    fn diffuse(self, block: &mut [u8]) {
        for (n, part) in block.chunks_mut(self.digest_len()).enumerate() {
            let digest = self.digest(&[&(n as u32).to_be_bytes(), part]);
            part.iter_mut().zip(digest.iter()).for_each(|(p, d)| *p = *d);
        }
    }

    fn mix(self, state: &mut [u8], stripe: &[u8]) {
        state.iter_mut().zip(stripe).for_each(|(s, b)| *s ^= b);
    }

    /// Joins a key that was split into stripes of `len` bytes (LUKS1 specification, "AFmerge").
    pub fn merge(self, stripes: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
        let mut key = Zeroizing::new(vec![0; len]);
        let count = stripes.len() / len.max(1);
        for (n, stripe) in stripes.chunks_exact(len.max(1)).enumerate() {
            self.mix(&mut key, stripe);
            if n + 1 < count {
                self.diffuse(&mut key);
            }
        }
        key
    }

    /// Splits a key over `out`, whose length is a multiple of the key's and which is filled with random bytes (LUKS1
    /// specification, "AFsplit").
    pub fn split(self, key: &[u8], out: &mut [u8]) {
        let len = key.len().max(1);
        let last = out.len().saturating_sub(len);
        let mut state = Zeroizing::new(vec![0; len]);
        let (random, end) = out.split_at_mut(last);
        for stripe in random.chunks_exact(len) {
            self.mix(&mut state, stripe);
            self.diffuse(&mut state);
        }
        end.iter_mut().zip(key).zip(state.iter()).for_each(|((o, k), s)| *o = k ^ s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_key_is_the_same_when_merged() {
        for hash in Hash::ALL {
            let key: Vec<u8> = (0..48).collect();
            let mut stripes: Vec<u8> = (0..48 * 100).map(|n| (n * 7 % 251) as u8).collect();
            hash.split(&key, &mut stripes);
            assert_eq!(*hash.merge(&stripes, 48), key);
            stripes[5] ^= 1;
            assert_ne!(*hash.merge(&stripes, 48), key);
        }
    }

    #[test]
    fn pbkdf2_is_that_of_rfc_6070() {
        let mut out = [0; 20];
        Hash::Sha1.pbkdf2(b"password", b"salt", 4096, &mut out);
        assert_eq!(out[..6], [0x4b, 0x00, 0x79, 0x01, 0xb7, 0x65]);
    }
}
