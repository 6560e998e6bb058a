//! What encrypted images are made of: ciphers on sectors, hashes, keys from passwords, and a node that decrypts.

mod cipher;
mod hash;
mod node;

pub use cipher::{Algorithm, CipherSpec, IvGenerator, Mode, SectorCipher};
pub use hash::Hash;
pub use node::CryptFile;
pub(crate) use node::window;

/// Ciphers work on sectors of this many bytes.
pub const SECTOR: usize = 512;
