//! Ciphers on sectors of 512 bytes: a block cipher, a mode, and where initialisation vectors come from.

use std::fmt;

use aes::{Aes128, Aes192, Aes256};
use cast5::Cast5;
use cbc::cipher::array::Array;
use cbc::cipher::consts::U16;
use cbc::cipher::{
    Block, BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt, BlockSizeUser,
    InnerIvInit, KeyInit, StreamCipher, StreamCipherCoreWrapper,
};
use ctr::flavors::{Ctr64BE, Ctr128BE};
use serpent::Serpent;
use twofish::Twofish;
use xts_mode::Xts128;

use super::{Hash, SECTOR};

/// A block cipher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// AES.
    Aes,
    /// Serpent.
    Serpent,
    /// Twofish.
    Twofish,
    /// CAST-128: blocks of 64 bits.
    Cast5,
}

impl Algorithm {
    /// All that there are.
    pub const ALL: [Self; 4] = [Self::Aes, Self::Serpent, Self::Twofish, Self::Cast5];

    /// The name in headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes => "aes",
            Self::Serpent => "serpent",
            Self::Twofish => "twofish",
            Self::Cast5 => "cast5",
        }
    }

    /// Bytes of keys that it takes.
    pub fn key_sizes(self) -> &'static [usize] {
        if self == Self::Cast5 { &[16] } else { &[16, 24, 32] }
    }

    /// Bytes of a block.
    pub fn block(self) -> usize {
        if self == Self::Cast5 { 8 } else { 16 }
    }
}

/// A mode of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Each block by itself.
    Ecb,
    /// Cipher block chaining.
    Cbc,
    /// XEX with a tweaked codebook (IEEE 1619): two keys, blocks of 128 bits.
    Xts,
    /// Counter.
    Ctr,
}

impl Mode {
    /// All that there are.
    pub const ALL: [Self; 4] = [Self::Ecb, Self::Cbc, Self::Xts, Self::Ctr];

    /// The name in headers and options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ecb => "ecb",
            Self::Cbc => "cbc",
            Self::Xts => "xts",
            Self::Ctr => "ctr",
        }
    }
}

/// Where initialisation vectors come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IvGenerator {
    /// The sector's number in 32 bits.
    Plain,
    /// The sector's number in 64 bits.
    Plain64,
    /// The sector's number, encrypted with the hash of the key.
    Essiv(Hash),
}

impl IvGenerator {
    /// The name in options, without the hash.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Essiv(_) => "essiv",
        }
    }
}

/// All that is to know of a cipher but its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CipherSpec {
    /// The block cipher.
    pub algorithm: Algorithm,
    /// Bytes of its key; XTS has two of them.
    pub key: usize,
    /// The mode.
    pub mode: Mode,
    /// The initialisation vectors; `None` with ECB only.
    pub iv: Option<IvGenerator>,
}

impl CipherSpec {
    /// Bytes of the key in all.
    pub fn key_bytes(&self) -> usize {
        if self.mode == Mode::Xts { 2 * self.key } else { self.key }
    }

    /// The mode as LUKS headers have it, such as `cbc-essiv:sha256`.
    pub fn mode_text(&self) -> String {
        match self.iv {
            None => self.mode.name().to_owned(),
            Some(IvGenerator::Essiv(hash)) => format!("{}-essiv:{}", self.mode.name(), hash.name()),
            Some(iv) => format!("{}-{}", self.mode.name(), iv.name()),
        }
    }

    /// The cipher of a LUKS header.
    ///
    /// # Errors
    /// What of it is not known or does not fit.
    pub fn parse(algorithm: &str, mode: &str, key_bytes: usize) -> Result<Self, String> {
        let found = Algorithm::ALL.into_iter().find(|a| a.name() == algorithm);
        let cipher = found.ok_or_else(|| format!("Algorithm '{algorithm}' is not supported"))?;
        let (name, iv) = mode.split_once('-').map_or((mode, None), |(m, iv)| (m, Some(iv)));
        let found = Mode::ALL.into_iter().find(|m| m.name() == name);
        let mode = found.ok_or_else(|| format!("Algorithm mode '{name}' is not supported"))?;
        let iv = match iv {
            None if mode == Mode::Ecb => None,
            None => return Err(format!("the cipher mode '{name}' needs an IV generator")),
            Some("plain") => Some(IvGenerator::Plain),
            Some("plain64") => Some(IvGenerator::Plain64),
            Some(other) => match other.strip_prefix("essiv:").map(Hash::from_name) {
                Some(Some(hash)) => Some(IvGenerator::Essiv(hash)),
                Some(None) => return Err(format!("the hash of the IV generator '{other}' is not supported")),
                None => return Err(format!("IV generator '{other}' is not supported")),
            },
        };
        let key = if mode == Mode::Xts { key_bytes / 2 } else { key_bytes };
        let spec = Self { algorithm: cipher, key, mode, iv };
        if spec.key_bytes() != key_bytes {
            return Err(format!("XTS cipher key length should be a multiple of 2, not {key_bytes}"));
        }
        spec.check().map(|()| spec)
    }

    /// Says what does not fit together.
    ///
    /// # Errors
    /// In words.
    pub fn check(&self) -> Result<(), String> {
        let name = self.algorithm.name();
        if !self.algorithm.key_sizes().contains(&self.key) {
            return Err(format!("Algorithm '{name}' with key size {} bytes not supported", self.key));
        }
        if self.mode == Mode::Xts && self.algorithm.block() != 16 {
            return Err(format!("Unsupported cipher mode xts: blocks of {name} are too short"));
        }
        if let Some(IvGenerator::Essiv(hash)) = self.iv
            && !self.algorithm.key_sizes().contains(&hash.digest_len())
        {
            return Err(format!("No {name} cipher with key size {} available for essiv", hash.digest_len()));
        }
        Ok(())
    }
}

/// One mode with one block cipher.
trait Engine: Send + Sync {
    /// Encrypts or decrypts whole blocks.
    fn run(&self, encrypt: bool, iv: &[u8; 16], data: &mut [u8]);
}

struct Ecb<C>(C);

impl<C> Engine for Ecb<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync,
{
    fn run(&self, encrypt: bool, _iv: &[u8; 16], data: &mut [u8]) {
        let (blocks, _) = Block::<C>::slice_as_chunks_mut(data);
        if encrypt { self.0.encrypt_blocks(blocks) } else { self.0.decrypt_blocks(blocks) }
    }
}

struct Cbc<C>(C);

impl<C> Engine for Cbc<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + Clone + Send + Sync,
{
    fn run(&self, encrypt: bool, iv: &[u8; 16], data: &mut [u8]) {
        let Some(Ok(iv)) = iv.get(..C::block_size()).map(Block::<C>::try_from) else { return };
        let (blocks, _) = Block::<C>::slice_as_chunks_mut(data);
        if encrypt {
            cbc::Encryptor::inner_iv_init(self.0.clone(), &iv).encrypt_blocks(blocks);
        } else {
            cbc::Decryptor::inner_iv_init(self.0.clone(), &iv).decrypt_blocks(blocks);
        }
    }
}

struct Xts<C>(Xts128<C>)
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16>;

impl<C> Engine for Xts<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + Send + Sync,
{
    fn run(&self, encrypt: bool, iv: &[u8; 16], data: &mut [u8]) {
        if encrypt {
            self.0.encrypt_sector(data, Array(*iv))
        } else {
            self.0.decrypt_sector(data, Array(*iv))
        }
    }
}

/// Counter mode with blocks of 128 bits.
struct Counter16<C>(C);

impl<C> Engine for Counter16<C>
where
    C: BlockCipherEncrypt + BlockSizeUser<BlockSize = U16> + Clone + Send + Sync,
{
    fn run(&self, _encrypt: bool, iv: &[u8; 16], data: &mut [u8]) {
        let core = ctr::CtrCore::<C, Ctr128BE>::inner_iv_init(self.0.clone(), &Array(*iv));
        StreamCipherCoreWrapper::from_core(core).apply_keystream(data);
    }
}

/// Counter mode with blocks of 64 bits.
struct Counter8(Cast5);

impl Engine for Counter8 {
    fn run(&self, _encrypt: bool, iv: &[u8; 16], data: &mut [u8]) {
        let Some(Ok(iv)) = iv.get(..8).map(Block::<Cast5>::try_from) else { return };
        let core = ctr::CtrCore::<Cast5, Ctr64BE>::inner_iv_init(self.0.clone(), &iv);
        StreamCipherCoreWrapper::from_core(core).apply_keystream(data);
    }
}

fn engine16<C>(mode: Mode, key: &[u8]) -> Option<Box<dyn Engine>>
where
    C: BlockCipherEncrypt
        + BlockCipherDecrypt
        + BlockSizeUser<BlockSize = U16>
        + KeyInit
        + Clone
        + Send
        + Sync
        + 'static,
{
    let new = |key: &[u8]| C::new_from_slice(key).ok();
    Some(match mode {
        Mode::Ecb => Box::new(Ecb(new(key)?)),
        Mode::Cbc => Box::new(Cbc(new(key)?)),
        Mode::Ctr => Box::new(Counter16(new(key)?)),
        Mode::Xts => {
            let (data, tweak) = key.split_at(key.len() / 2);
            Box::new(Xts(Xts128::new(new(data)?, new(tweak)?)))
        }
    })
}

fn engine(algorithm: Algorithm, size: usize, mode: Mode, key: &[u8]) -> Option<Box<dyn Engine>> {
    match (algorithm, size) {
        (Algorithm::Aes, 16) => engine16::<Aes128>(mode, key),
        (Algorithm::Aes, 24) => engine16::<Aes192>(mode, key),
        (Algorithm::Aes, _) => engine16::<Aes256>(mode, key),
        (Algorithm::Serpent, _) => engine16::<Serpent>(mode, key),
        (Algorithm::Twofish, _) => engine16::<Twofish>(mode, key),
        (Algorithm::Cast5, _) => {
            let cipher = Cast5::new_from_slice(key).ok()?;
            match mode {
                Mode::Ecb => Some(Box::new(Ecb(cipher))),
                Mode::Cbc => Some(Box::new(Cbc(cipher))),
                Mode::Ctr => Some(Box::new(Counter8(cipher))),
                Mode::Xts => None,
            }
        }
    }
}

/// A cipher with its key.
pub struct SectorCipher {
    spec: CipherSpec,
    engine: Box<dyn Engine>,
    /// Encrypts sector numbers.
    essiv: Option<Box<dyn Engine>>,
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SectorCipher").field("spec", &self.spec).finish_non_exhaustive()
    }
}

impl SectorCipher {
    /// The cipher with `key`.
    ///
    /// # Errors
    /// As [`CipherSpec::check`], or if the key is of another length.
    pub fn new(spec: CipherSpec, key: &[u8]) -> Result<Self, String> {
        spec.check()?;
        let wrong = || format!("the key of {} has {} bytes", spec.algorithm.name(), key.len());
        if key.len() != spec.key_bytes() {
            return Err(wrong());
        }
        let engine = engine(spec.algorithm, spec.key, spec.mode, key).ok_or_else(wrong)?;
        let essiv = match spec.iv {
            Some(IvGenerator::Essiv(hash)) => {
                let salt = hash.digest(&[key]);
                Some(self::engine(spec.algorithm, hash.digest_len(), Mode::Ecb, &salt).ok_or_else(wrong)?)
            }
            _ => None,
        };
        Ok(Self { spec, engine, essiv })
    }

    fn iv(&self, sector: u64) -> [u8; 16] {
        let mut iv = [0; 16];
        let number = if self.spec.iv == Some(IvGenerator::Plain) { sector & 0xffff_ffff } else { sector };
        iv.iter_mut().zip(number.to_le_bytes()).for_each(|(i, b)| *i = b);
        if let Some(essiv) = &self.essiv {
            let block = self.spec.algorithm.block();
            essiv.run(true, &[0; 16], iv.get_mut(..block).unwrap_or_default());
        }
        iv
    }

    fn run(&self, encrypt: bool, mut sector: u64, data: &mut [u8]) {
        for part in data.chunks_exact_mut(SECTOR) {
            self.engine.run(encrypt, &self.iv(sector), part);
            sector = sector.wrapping_add(1);
        }
    }

    /// Encrypts whole sectors, of which the first has this number.
    pub fn encrypt(&self, sector: u64, data: &mut [u8]) {
        self.run(true, sector, data);
    }

    /// Decrypts whole sectors, of which the first has this number.
    pub fn decrypt(&self, sector: u64, data: &mut [u8]) {
        self.run(false, sector, data);
    }
}
