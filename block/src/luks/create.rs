//! New volumes.

use std::sync::Arc;

use zeroize::Zeroizing;

use super::Luks;
use super::header::{Header, MATERIAL, SLOTS, STRIPES, Slot, material_sectors};
use super::keys::{Volume, iterations, random};
use crate::crypto::{Algorithm, CipherSpec, Hash, IvGenerator, Mode, SECTOR, SectorCipher};
use crate::node::Preallocation;
use crate::{BlockError, BlockNode};

/// How to make a volume.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// The block cipher, with the bytes of its key.
    pub cipher: (Algorithm, usize),
    /// The mode.
    pub mode: Mode,
    /// Name of the IV generator.
    pub ivgen: String,
    /// Hash of `essiv`.
    pub ivgen_hash: Option<Hash>,
    /// The hash of passwords.
    pub hash: Hash,
    /// How long a password is to be worked on, in milliseconds.
    pub iter_time: u64,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            cipher: (Algorithm::Aes, 32),
            mode: Mode::Xts,
            ivgen: "plain64".to_owned(),
            ivgen_hash: None,
            hash: Hash::Sha256,
            iter_time: 2000,
        }
    }
}

/// A volume's header that was made.
#[derive(Debug)]
pub struct Created {
    /// The header.
    pub header: Header,
    /// The cipher of the data, with its key.
    pub cipher: SectorCipher,
}

fn bad<T>(text: String) -> Result<T, BlockError> {
    Err(BlockError::Option(text))
}

impl CreateOptions {
    /// The cipher.
    ///
    /// # Errors
    /// [`BlockError::Option`] with what does not fit.
    pub fn spec(&self) -> Result<CipherSpec, BlockError> {
        let iv = match self.ivgen.as_str() {
            _ if self.mode == Mode::Ecb => None,
            "plain" => Some(IvGenerator::Plain),
            "plain64" => Some(IvGenerator::Plain64),
            "essiv" => Some(IvGenerator::Essiv(self.ivgen_hash.unwrap_or(Hash::Sha256))),
            other => return bad(format!("Invalid parameter '{other}' for ivgen-alg")),
        };
        let spec = CipherSpec { algorithm: self.cipher.0, key: self.cipher.1, mode: self.mode, iv };
        spec.check().map_err(BlockError::Option)?;
        Ok(spec)
    }

    /// Takes an option; false if there is none of that name.
    ///
    /// # Errors
    /// [`BlockError::Option`] if it does not take the value.
    pub fn set(&mut self, key: &str, value: &str) -> Result<bool, BlockError> {
        let refuse = || BlockError::Option(format!("Invalid parameter '{value}' for {key}"));
        match key {
            "cipher-alg" => {
                let (name, bits) = value.rsplit_once('-').ok_or_else(refuse)?;
                let algorithm = Algorithm::ALL.into_iter().find(|a| a.name() == name).ok_or_else(refuse)?;
                let bytes = bits.parse::<usize>().map_err(|_| refuse())? / 8;
                if !algorithm.key_sizes().contains(&bytes) {
                    return Err(refuse());
                }
                self.cipher = (algorithm, bytes);
            }
            "cipher-mode" => {
                self.mode = Mode::ALL.into_iter().find(|m| m.name() == value).ok_or_else(refuse)?;
            }
            "ivgen-alg" if ["plain", "plain64", "essiv"].contains(&value) => self.ivgen = value.to_owned(),
            "ivgen-alg" => return Err(refuse()),
            "ivgen-hash-alg" => self.ivgen_hash = Some(Hash::from_name(value).ok_or_else(refuse)?),
            "hash-alg" => self.hash = Hash::from_name(value).ok_or_else(refuse)?,
            "iter-time" => {
                self.iter_time = value.parse().ok().filter(|t| *t != 0).ok_or_else(refuse)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Bytes of header and key material: where the data starts.
    ///
    /// # Errors
    /// As [`CreateOptions::spec`].
    pub fn payload(&self) -> Result<u64, BlockError> {
        let spec = self.spec()?;
        Ok(MATERIAL + SLOTS as u64 * slot_bytes(spec.key_bytes()))
    }
}

fn slot_bytes(key_bytes: usize) -> u64 {
    (material_sectors(key_bytes, STRIPES) * SECTOR as u64).next_multiple_of(MATERIAL)
}

fn uuid() -> Result<String, BlockError> {
    let mut b = [0u8; 16];
    random(&mut b)?;
    // Version 4, variant 1 of RFC 9562.
    let mut value = u128::from_be_bytes(b);
    value = value & !(0xf << 76) | 4 << 76;
    value = value & !(3 << 62) | 2 << 62;
    let hex = format!("{value:032x}");
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    Ok([part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-"))
}

/// Writes a header with one key slot to `node` from `base` on. `detached` headers say that the data starts at 0.
///
/// # Errors
/// [`BlockError`]: options that do not fit; the host's.
pub fn format(
    volume: &Volume<'_>,
    options: &CreateOptions,
    password: &[u8],
    detached: bool,
) -> Result<Created, BlockError> {
    let spec = options.spec()?;
    let payload = options.payload()?;
    let step = slot_bytes(spec.key_bytes()) / SECTOR as u64;
    let mut slots =
        [Slot { active: false, iterations: 0, salt: [0; 32], offset: 0, stripes: STRIPES }; SLOTS];
    for (n, slot) in slots.iter_mut().enumerate() {
        slot.offset = (MATERIAL / SECTOR as u64 + n as u64 * step) as u32;
    }
    let mut header = Header {
        cipher: spec,
        hash: options.hash,
        payload: if detached { 0 } else { (payload / SECTOR as u64) as u32 },
        digest: [0; 20],
        digest_salt: [0; 32],
        digest_iterations: 0,
        uuid: uuid()?,
        slots,
    };
    let mut master = Zeroizing::new(vec![0; spec.key_bytes()]);
    random(&mut master)?;
    random(&mut header.digest_salt)?;
    header.digest_iterations = iterations(&header, header.digest.len(), (options.iter_time / 8).max(1))?;
    let (salt, count) = (header.digest_salt, header.digest_iterations);
    header.hash.pbkdf2(&master, &salt, count, &mut header.digest);
    volume.fill_slot(&mut header, 0, (&master, password), options.iter_time)?;
    // What is between is zero, and the file reaches as far as the slots do.
    let last = volume.base + payload - 1;
    if volume.node.size() <= last {
        volume.node.write_at(last, &[0]).map_err(|source| BlockError::Host {
            path: volume.node.path().unwrap_or_default(),
            what: "Unable to write LUKS header",
            source,
        })?;
    }
    volume.store(&header)?;
    let cipher = SectorCipher::new(spec, &master).map_err(BlockError::Option)?;
    Ok(Created { header, cipher })
}

/// Makes a volume of `size` bytes in an empty file and opens it.
///
/// # Errors
/// As [`format()`].
pub fn create(
    file: Arc<dyn BlockNode>,
    options: &CreateOptions,
    (size, preallocation): (u64, Preallocation),
    password: &[u8],
) -> Result<Arc<Luks>, BlockError> {
    let end = options.payload()?.checked_add(size).filter(|e| *e <= i64::MAX as u64);
    let Some(end) = end else { return bad("Image size is too large".into()) };
    file.truncate(end, preallocation).map_err(|source| BlockError::Host {
        path: file.path().unwrap_or_default(),
        what: "Could not resize file",
        source,
    })?;
    format(&Volume { node: &*file, base: 0 }, options, password, false)?;
    Luks::open(file, None, Some(password), false)
}
