//! The header and its extensions (qcow2 specification, "Header").

use crate::BlockError;

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;
/// Largest L1 table in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Length of a version 3 header as it is written.
pub const V3_LENGTH: u32 = 112;

/// Incompatible feature bits: who does not know one cannot open the image.
pub mod incompatible {
    /// Refcounts may be stale.
    pub const DIRTY: u64 = 1;
    /// Structures are damaged: no writing before a repair.
    pub const CORRUPT: u64 = 2;
    /// Guest clusters are in a file of their own.
    pub const DATA_FILE: u64 = 4;
    /// The compression type field is not zero.
    pub const COMPRESSION: u64 = 8;
    /// L2 entries have 128 bits, with subclusters.
    pub const EXTENDED_L2: u64 = 16;
    /// All that this program knows.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}
/// Compatible feature bit: refcount updates may be postponed.
pub const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear feature bit: the bitmaps extension is consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear feature bit: the external data file is a raw image.
pub const AUTOCLEAR_RAW: u64 = 2;

mod extension {
    pub(super) const END: u32 = 0;
    pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(super) const FEATURES: u32 = 0x6803_f857;
    pub(super) const BITMAPS: u32 = 0x2385_2875;
    pub(super) const CRYPTO: u32 = 0x0537_be77;
    pub(super) const DATA_FILE: u32 = 0x4441_5441;
}

const FEATURE_NAMES: &[(u8, u8, &str)] = &[
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

impl Compression {
    /// The name that options use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// The bitmaps extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Bitmaps in the directory.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_size: u64,
    /// Where it is.
    pub directory_offset: u64,
}

/// A parsed header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Name of the backing file.
    pub backing_file: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// Cluster size is 2 to this.
    pub cluster_bits: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Where it is.
    pub l1_offset: u64,
    /// Where the refcount table is.
    pub reftable_offset: u64,
    /// Its clusters.
    pub reftable_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where their table is.
    pub snapshots_offset: u64,
    /// See [`incompatible`].
    pub incompatible: u64,
    /// See [`LAZY_REFCOUNTS`].
    pub compatible: u64,
    /// See [`AUTOCLEAR_BITMAPS`].
    pub autoclear: u64,
    /// Refcounts have 2 to this bits.
    pub refcount_order: u32,
    /// Of compressed clusters.
    pub compression: Compression,
    /// The bitmaps extension.
    pub bitmaps: Option<BitmapsExtension>,
    /// LUKS header of an encrypted image: offset and length.
    pub crypto: Option<(u64, u64)>,
    /// Extensions that are not known, kept as they are.
    pub unknown: Vec<(u32, Vec<u8>)>,
    /// Names of features from the image.
    pub feature_names: Vec<(u8, u8, String)>,
}

/// Big-endian fields out of a buffer; what is not there is 0.
pub(super) fn be32(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|s| s.try_into().ok()).map_or(0, u32::from_be_bytes)
}

pub(super) fn be64(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|s| s.try_into().ok()).map_or(0, u64::from_be_bytes)
}

pub(super) fn be16(b: &[u8], at: usize) -> u16 {
    b.get(at..at + 2).and_then(|s| s.try_into().ok()).map_or(0, u16::from_be_bytes)
}

fn bad(text: impl Into<String>) -> BlockError {
    BlockError::Format(text.into())
}

impl Header {
    /// Cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Where the LUKS header of an encrypted image is.
    ///
    /// # Errors
    /// [`BlockError::Format`] if the image does not say it.
    pub fn crypto_offset(&self) -> Result<u64, BlockError> {
        match self.crypto {
            Some((offset, len))
                if offset.is_multiple_of(self.cluster_size())
                    && offset.checked_add(len).is_some_and(|end| end <= i64::MAX as u64) =>
            {
                Ok(offset)
            }
            Some((offset, _)) => Err(bad(format!(
                "Encryption header offset '{offset}' is not a multiple of cluster size or too large"
            ))),
            None => {
                Err(bad("CRYPTO header extension not found: the image says that it is encrypted by LUKS"))
            }
        }
    }

    /// True if L2 entries have 128 bits.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    /// True if guest clusters are in a file of their own.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// Reads the header from the first bytes of an image: its first cluster, or 2 MiB.
    ///
    /// # Errors
    /// [`BlockError::Format`], [`BlockError::Unsupported`] with what is wrong or not known.
    pub fn parse(b: &[u8]) -> Result<Self, BlockError> {
        if b.len() < 72 || be32(b, 0) != MAGIC {
            return Err(bad("Image is not in qcow2 format"));
        }
        let version = be32(b, 4);
        if !(2..=3).contains(&version) {
            return Err(BlockError::Unsupported(format!("Unsupported qcow2 version {version}")));
        }
        let cluster_bits = be32(b, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(bad(format!("Unsupported cluster size: 2^{cluster_bits}")));
        }
        let v3 = version == 3;
        let length = if v3 { u64::from(be32(b, 100)) } else { 72 };
        if v3 && length < 104 {
            return Err(bad("qcow2 header too short"));
        }
        if length > 1 << cluster_bits {
            return Err(bad("qcow2 header exceeds cluster size"));
        }
        let field = |at| if v3 { be64(b, at) } else { 0 };
        let mut header = Self {
            version,
            backing_file: None,
            backing_format: None,
            data_file: None,
            cluster_bits,
            size: be64(b, 24),
            crypt_method: be32(b, 32),
            l1_size: be32(b, 36),
            l1_offset: be64(b, 40),
            reftable_offset: be64(b, 48),
            reftable_clusters: be32(b, 56),
            snapshots: be32(b, 60),
            snapshots_offset: be64(b, 64),
            incompatible: field(72),
            compatible: field(80),
            autoclear: field(88),
            refcount_order: if v3 { be32(b, 96) } else { 4 },
            compression: Compression::Zlib,
            bitmaps: None,
            crypto: None,
            unknown: Vec::new(),
            feature_names: Vec::new(),
        };
        header.parse_extensions(b, length)?;
        header.parse_features(b, length)?;
        header.parse_backing(b, length)?;
        header.check_tables()?;
        Ok(header)
    }

    fn parse_features(&mut self, b: &[u8], length: u64) -> Result<(), BlockError> {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            let named = |bit: u8| {
                let name = self.feature_names.iter().find(|(kind, n, _)| *kind == 0 && *n == bit);
                name.map_or_else(
                    || format!("Unknown incompatible feature: {:x}", 1u64 << bit),
                    |(_, _, s)| s.clone(),
                )
            };
            let names: Vec<String> = (0..64).filter(|bit| unknown >> bit & 1 != 0).map(named).collect();
            return Err(BlockError::Unsupported(format!(
                "Unsupported qcow2 feature(s): {}",
                names.join(", ")
            )));
        }
        let kind = if length > 104 { b.get(104).copied().unwrap_or(0) } else { 0 };
        self.compression = match kind {
            0 => Compression::Zlib,
            1 => Compression::Zstd,
            other => {
                return Err(BlockError::Unsupported(format!("qcow2: unknown compression type: {other}")));
            }
        };
        if (kind != 0) != (self.incompatible & incompatible::COMPRESSION != 0) {
            let text = if kind == 0 {
                "qcow2: Compression type incompatible feature bit must not be set"
            } else {
                "qcow2: Compression type incompatible feature bit must be set"
            };
            return Err(bad(text));
        }
        if self.refcount_order > 6 {
            return Err(bad("Reference count entry width too large; may not exceed 64 bits"));
        }
        if self.extended_l2() && self.cluster_bits < 14 {
            return Err(bad(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ));
        }
        Ok(())
    }

    fn parse_extensions(&mut self, b: &[u8], length: u64) -> Result<(), BlockError> {
        let backing = be64(b, 8);
        // Without a backing file name the extensions end with the cluster.
        let end = if backing != 0 { backing } else { self.cluster_size() };
        let end = end.min(self.cluster_size()).min(b.len() as u64);
        let mut at = length;
        while at + 8 <= end {
            let kind = be32(b, at as usize);
            let len = u64::from(be32(b, at as usize + 4));
            at += 8;
            if kind == extension::END {
                break;
            }
            if len > end - at {
                return Err(bad(format!("Header extension too large: {len} bytes at offset {at}")));
            }
            let data = b.get(at as usize..(at + len) as usize).unwrap_or_default();
            self.extension(kind, data)?;
            at = (at + len).next_multiple_of(8);
        }
        Ok(())
    }

    fn extension(&mut self, kind: u32, data: &[u8]) -> Result<(), BlockError> {
        let text = || String::from_utf8_lossy(data).into_owned();
        match kind {
            extension::BACKING_FORMAT => {
                if data.len() > 15 {
                    return Err(bad(format!(
                        "ERROR: ext_backing_format: len={} too large (>=16)",
                        data.len()
                    )));
                }
                self.backing_format = Some(text());
            }
            extension::DATA_FILE => self.data_file = Some(text()),
            extension::FEATURES => {
                for entry in data.chunks_exact(48) {
                    let name = entry.get(2..).unwrap_or_default();
                    let end = name.iter().position(|c| *c == 0).unwrap_or(name.len());
                    let name = String::from_utf8_lossy(name.get(..end).unwrap_or_default()).into_owned();
                    let at = |n: usize| entry.get(n).copied().unwrap_or(0);
                    self.feature_names.push((at(0), at(1), name));
                }
            }
            extension::BITMAPS => {
                if data.len() != 24 {
                    return Err(bad(format!("bitmaps_ext: Invalid extension length: {} bytes", data.len())));
                }
                self.bitmaps = Some(BitmapsExtension {
                    count: be32(data, 0),
                    directory_size: be64(data, 8),
                    directory_offset: be64(data, 16),
                });
            }
            extension::CRYPTO if data.len() == 16 => self.crypto = Some((be64(data, 0), be64(data, 8))),
            _ => self.unknown.push((kind, data.to_vec())),
        }
        Ok(())
    }

    fn parse_backing(&mut self, b: &[u8], length: u64) -> Result<(), BlockError> {
        let (offset, len) = (be64(b, 8), u64::from(be32(b, 16)));
        if offset == 0 {
            return Ok(());
        }
        if offset > self.cluster_size() || offset < length {
            return Err(bad("Invalid backing file offset"));
        }
        if len > 1023 || len > self.cluster_size() - offset {
            return Err(bad("Backing file name too long"));
        }
        let name = b.get(offset as usize..(offset + len) as usize);
        let name = name.ok_or_else(|| bad("Could not read backing file name"))?;
        if len != 0 {
            self.backing_file = Some(String::from_utf8_lossy(name).into_owned());
        }
        Ok(())
    }

    fn check_tables(&self) -> Result<(), BlockError> {
        let cluster = self.cluster_size();
        let table = |offset: u64, bytes: u64, what: &str| {
            let end = offset.checked_add(bytes).filter(|e| *e <= i64::MAX as u64);
            if end.is_none() || !offset.is_multiple_of(cluster) {
                return Err(bad(format!("{what} offset invalid")));
            }
            Ok(())
        };
        let reftable = u64::from(self.reftable_clusters) << self.cluster_bits;
        if reftable > MAX_REFTABLE_BYTES.max(cluster) {
            return Err(bad("Image does not have a valid reference count table: it is too large"));
        }
        if self.reftable_clusters == 0 {
            return Err(bad("Image does not contain a reference count table"));
        }
        table(self.reftable_offset, reftable, "Reference count table")?;
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(bad("Snapshot table too large"));
        }
        table(self.snapshots_offset, u64::from(self.snapshots) * 40, "Snapshot table")?;
        let l1 = u64::from(self.l1_size) * 8;
        if l1 > MAX_L1_BYTES {
            return Err(bad("Active L1 table too large"));
        }
        table(self.l1_offset, l1, "Active L1 table")?;
        if self.size > i64::MAX as u64 {
            return Err(bad("Image is too big: its size does not fit 63 bits"));
        }
        let needed = self.l1_needed(self.size);
        if needed > MAX_L1_BYTES / 8 {
            return Err(bad("Image is too big"));
        }
        if u64::from(self.l1_size) < needed {
            return Err(bad("L1 table is too small"));
        }
        Ok(())
    }

    /// Entries of an L1 table for a disk of `size` bytes.
    pub fn l1_needed(&self, size: u64) -> u64 {
        let entry_bits = if self.extended_l2() { 4 } else { 3 };
        size.div_ceil(1 << (2 * self.cluster_bits - entry_bits))
    }

    fn put_extension(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(8), 0);
    }

    fn extensions(&self, out: &mut Vec<u8>) {
        if let (Some(format), true) = (&self.backing_format, self.backing_file.is_some()) {
            Self::put_extension(out, extension::BACKING_FORMAT, format.as_bytes());
        }
        if let (Some(name), true) = (&self.data_file, self.has_data_file()) {
            Self::put_extension(out, extension::DATA_FILE, name.as_bytes());
        }
        if let Some((offset, len)) = self.crypto {
            let mut data = offset.to_be_bytes().to_vec();
            data.extend_from_slice(&len.to_be_bytes());
            Self::put_extension(out, extension::CRYPTO, &data);
        }
        // The names alone would fill the smallest clusters.
        if self.version >= 3 && self.cluster_size() > 512 {
            let mut data = Vec::new();
            for (kind, bit, name) in FEATURE_NAMES {
                data.extend_from_slice(&[*kind, *bit]);
                data.extend_from_slice(name.as_bytes());
                data.resize(data.len().next_multiple_of(48), 0);
            }
            Self::put_extension(out, extension::FEATURES, &data);
        }
        if let Some(b) = self.bitmaps {
            let mut data = b.count.to_be_bytes().to_vec();
            data.extend_from_slice(&[0; 4]);
            data.extend_from_slice(&b.directory_size.to_be_bytes());
            data.extend_from_slice(&b.directory_offset.to_be_bytes());
            Self::put_extension(out, extension::BITMAPS, &data);
        }
        for (kind, data) in &self.unknown {
            Self::put_extension(out, *kind, data);
        }
        Self::put_extension(out, extension::END, &[]);
    }

    /// The header as the image's first bytes, at most a cluster.
    ///
    /// # Errors
    /// [`BlockError::Format`] if it does not fit.
    pub fn to_bytes(&self) -> Result<Vec<u8>, BlockError> {
        let mut out = Vec::with_capacity(1024);
        out.extend_from_slice(&MAGIC.to_be_bytes());
        out.extend_from_slice(&self.version.to_be_bytes());
        out.extend_from_slice(&[0; 12]);
        out.extend_from_slice(&self.cluster_bits.to_be_bytes());
        out.extend_from_slice(&self.size.to_be_bytes());
        out.extend_from_slice(&self.crypt_method.to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&self.l1_offset.to_be_bytes());
        out.extend_from_slice(&self.reftable_offset.to_be_bytes());
        out.extend_from_slice(&self.reftable_clusters.to_be_bytes());
        out.extend_from_slice(&self.snapshots.to_be_bytes());
        out.extend_from_slice(&self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            out.extend_from_slice(&self.incompatible.to_be_bytes());
            out.extend_from_slice(&self.compatible.to_be_bytes());
            out.extend_from_slice(&self.autoclear.to_be_bytes());
            out.extend_from_slice(&self.refcount_order.to_be_bytes());
            out.extend_from_slice(&V3_LENGTH.to_be_bytes());
            out.extend_from_slice(&[u8::from(self.compression == Compression::Zstd), 0, 0, 0, 0, 0, 0, 0]);
        }
        self.extensions(&mut out);
        if let Some(name) = &self.backing_file {
            let (offset, len) = (out.len() as u64, name.len() as u32);
            if let Some(place) = out.get_mut(8..20) {
                let mut field = offset.to_be_bytes().to_vec();
                field.extend_from_slice(&len.to_be_bytes());
                place.copy_from_slice(&field);
            }
            out.extend_from_slice(name.as_bytes());
        }
        if out.len() as u64 > self.cluster_size() {
            return Err(bad("the header does not fit a cluster: the backing file's name is too long"));
        }
        Ok(out)
    }
}
