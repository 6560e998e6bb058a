//! The header on the disk (LUKS1 On-Disk Format Specification 1.2.3).

use crate::BlockError;
use crate::crypto::{CipherSpec, Hash, SECTOR};

/// `LUKS\xba\xbe`.
pub const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
/// Bytes of the header without key material.
pub const LENGTH: usize = 592;
/// Key slots.
pub const SLOTS: usize = 8;
/// Stripes over which a key is split.
pub const STRIPES: u32 = 4000;
/// Where the first slot's key material is, in bytes: also its alignment.
pub const MATERIAL: u64 = 4096;
/// Most iterations of a slot or of the master key's digest that are carried out for an image: minutes of work.
const MAX_ITERATIONS: u32 = 500_000_000;

const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;

/// A key slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// There is a password for it.
    pub active: bool,
    /// Iterations of PBKDF2 for its password.
    pub iterations: u32,
    /// Salt of the password.
    pub salt: [u8; 32],
    /// Where its key material is, in sectors from the header's start.
    pub offset: u32,
    /// Stripes of the split key.
    pub stripes: u32,
}

/// A parsed header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The cipher of the data and of the key material.
    pub cipher: CipherSpec,
    /// The hash of PBKDF2 and of the splitter.
    pub hash: Hash,
    /// Where the data starts, in sectors.
    pub payload: u32,
    /// What PBKDF2 makes of the master key.
    pub digest: [u8; 20],
    /// Its salt.
    pub digest_salt: [u8; 32],
    /// Its iterations.
    pub digest_iterations: u32,
    /// Name of the volume.
    pub uuid: String,
    /// The key slots.
    pub slots: [Slot; SLOTS],
}

fn bad(text: impl Into<String>) -> BlockError {
    BlockError::Format(text.into())
}

fn field<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    b.get(at..at + N).and_then(|s| s.try_into().ok()).unwrap_or([0; N])
}

fn be32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(field(b, at))
}

/// Text that ends with a zero.
fn text(b: &[u8], at: usize, len: usize, what: &str) -> Result<String, BlockError> {
    let bytes = b.get(at..at + len).unwrap_or_default();
    let end = bytes.iter().position(|c| *c == 0);
    let end = end.ok_or_else(|| bad(format!("LUKS header {what} is not NUL terminated")))?;
    let text = std::str::from_utf8(bytes.get(..end).unwrap_or_default());
    let text = text.ok().filter(|t| t.chars().all(|c| !c.is_control()));
    text.map(str::to_owned).ok_or_else(|| bad(format!("LUKS header {what} is not text")))
}

/// Sectors that a split key of `key_bytes` takes.
pub fn material_sectors(key_bytes: usize, stripes: u32) -> u64 {
    (key_bytes as u64 * u64::from(stripes)).div_ceil(SECTOR as u64)
}

impl Header {
    /// Reads a header from the first [`LENGTH`] bytes.
    ///
    /// # Errors
    /// [`BlockError::Format`], [`BlockError::Unsupported`] with what is wrong or not known.
    pub fn parse(b: &[u8]) -> Result<Self, BlockError> {
        if b.len() < LENGTH || !b.starts_with(MAGIC) {
            return Err(bad("Volume is not in LUKS format"));
        }
        let version = u16::from_be_bytes(field(b, 6));
        if version != 1 {
            return Err(BlockError::Unsupported(format!("LUKS version {version} is not supported")));
        }
        let key_bytes = be32(b, 108) as usize;
        if !(1..=64).contains(&key_bytes) {
            return Err(bad(format!("LUKS master key of {key_bytes} bytes is not possible")));
        }
        let (name, mode) = (text(b, 8, 32, "cipher name")?, text(b, 40, 32, "cipher mode")?);
        let cipher = CipherSpec::parse(&name, &mode, key_bytes).map_err(BlockError::Unsupported)?;
        let hash = text(b, 72, 32, "hash spec")?;
        let hash = Hash::from_name(&hash)
            .ok_or_else(|| BlockError::Unsupported(format!("Hash algorithm '{hash}' is not supported")))?;
        let mut slots = [Slot { active: false, iterations: 0, salt: [0; 32], offset: 0, stripes: 0 }; SLOTS];
        for (n, slot) in slots.iter_mut().enumerate() {
            *slot = Self::slot(b.get(208 + n * 48..).unwrap_or_default(), n)?;
        }
        let header = Self {
            cipher,
            hash,
            payload: be32(b, 104),
            digest: field(b, 112),
            digest_salt: field(b, 132),
            digest_iterations: be32(b, 164),
            uuid: text(b, 168, 40, "uuid")?,
            slots,
        };
        header.check().map(|()| header)
    }

    fn slot(b: &[u8], n: usize) -> Result<Slot, BlockError> {
        let active = match be32(b, 0) {
            ACTIVE => true,
            INACTIVE => false,
            _ => return Err(bad(format!("Keyslot {n} state (active/disable) is corrupted"))),
        };
        let (iterations, stripes) = (be32(b, 4), be32(b, 44));
        if stripes != STRIPES {
            return Err(bad(format!("Keyslot {n} is corrupted (stripes {stripes} != {STRIPES})")));
        }
        if active && iterations == 0 {
            return Err(bad(format!("Keyslot {n} iteration count is zero")));
        }
        if active && iterations > MAX_ITERATIONS {
            return Err(bad(format!("Keyslot {n} asks for {iterations} iterations, which is too much work")));
        }
        Ok(Slot { active, iterations, salt: field(b, 8), offset: be32(b, 40), stripes })
    }

    /// Bytes of a slot's key material, in whole sectors.
    pub fn material(&self) -> u64 {
        material_sectors(self.cipher.key_bytes(), STRIPES) * SECTOR as u64
    }

    fn check(&self) -> Result<(), BlockError> {
        if self.digest_iterations == 0 || self.digest_iterations > MAX_ITERATIONS {
            return Err(bad(format!(
                "LUKS key iteration count of {} is not possible",
                self.digest_iterations
            )));
        }
        let sectors = material_sectors(self.cipher.key_bytes(), STRIPES);
        for (n, slot) in self.slots.iter().enumerate() {
            let start = u64::from(slot.offset);
            if start * (SECTOR as u64) < LENGTH as u64 {
                return Err(bad(format!("Keyslot {n} is overlapping with the LUKS header")));
            }
            // A payload at 0 is that of a header in a file of its own.
            if self.payload != 0 && start + sectors > u64::from(self.payload) {
                return Err(bad(format!("Keyslot {n} is overlapping with the encrypted payload")));
            }
            let others = self.slots.iter().enumerate().skip(n + 1);
            for (m, other) in others {
                let theirs = u64::from(other.offset);
                if start < theirs + sectors && theirs < start + sectors {
                    return Err(bad(format!("Keyslots {n} and {m} are overlapping in the header")));
                }
            }
        }
        Ok(())
    }

    /// The header as it is on the disk.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(LENGTH);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&1u16.to_be_bytes());
        let mut padded = |text: &str, len: usize| {
            let end = out.len() + len;
            out.extend(text.bytes().take(len - 1));
            out.resize(end, 0);
        };
        padded(self.cipher.algorithm.name(), 32);
        padded(&self.cipher.mode_text(), 32);
        padded(self.hash.name(), 32);
        out.extend_from_slice(&self.payload.to_be_bytes());
        out.extend_from_slice(&(self.cipher.key_bytes() as u32).to_be_bytes());
        out.extend_from_slice(&self.digest);
        out.extend_from_slice(&self.digest_salt);
        out.extend_from_slice(&self.digest_iterations.to_be_bytes());
        let end = out.len() + 40;
        out.extend(self.uuid.bytes().take(39));
        out.resize(end, 0);
        for slot in &self.slots {
            out.extend_from_slice(&if slot.active { ACTIVE } else { INACTIVE }.to_be_bytes());
            out.extend_from_slice(&slot.iterations.to_be_bytes());
            out.extend_from_slice(&slot.salt);
            out.extend_from_slice(&slot.offset.to_be_bytes());
            out.extend_from_slice(&slot.stripes.to_be_bytes());
        }
        out
    }
}
