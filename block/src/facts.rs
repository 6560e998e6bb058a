//! What images say of themselves, with QEMU's names and types (`ImageInfo` of its `block-core.json`): for `info` and for monitors.
//! Members stand in the order in which QEMU's `info` prints them for people.

use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;

use crate::crypto::IvGenerator;
use crate::graph::beside;
use crate::luks::header::Header;
use crate::node::BlockNode;
use crate::qcow2::Qcow2;
use crate::qcow2::header::{AUTOCLEAR_RAW, LAZY_REFCOUNTS, incompatible};
use crate::qcow2::snapshot::Snapshot;

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Its unique id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of the VM's state.
    pub vm_state_size: u64,
    /// When it was made: seconds since 1970.
    pub date_sec: u64,
    /// And nanoseconds.
    pub date_nsec: u64,
    /// How long the VM had run: seconds.
    pub vm_clock_sec: u64,
    /// And nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instructions that the VM had executed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
}

impl From<&Snapshot> for SnapshotInfo {
    fn from(s: &Snapshot) -> Self {
        Self {
            id: s.id.clone(),
            name: s.name.clone(),
            vm_state_size: s.vm_state_size,
            date_sec: s.date_sec.into(),
            date_nsec: s.date_nsec.into(),
            vm_clock_sec: s.vm_clock_nsec / 1_000_000_000,
            vm_clock_nsec: s.vm_clock_nsec % 1_000_000_000,
            icount: Some(s.icount).filter(|n| *n != u64::MAX),
        }
    }
}

/// A key slot of a LUKS header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct LuksSlot {
    /// It opens the volume.
    pub active: bool,
    /// Rounds of the key derivation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iters: Option<u64>,
    /// Where the key is, in bytes.
    pub key_offset: u64,
    /// Stripes of the split key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stripes: Option<u64>,
}

/// What there is to say of a LUKS header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct LuksInfo {
    /// How initialisation vectors are made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ivgen_alg: Option<String>,
    /// The hash that takes part in that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ivgen_hash_alg: Option<String>,
    /// The header is in a file of its own.
    pub detached_header: bool,
    /// The hash of key derivation.
    pub hash_alg: String,
    /// Cipher and bits of its key.
    pub cipher_alg: String,
    /// The volume's name.
    pub uuid: String,
    /// Its mode.
    pub cipher_mode: String,
    /// All key slots.
    pub slots: Vec<LuksSlot>,
    /// Where the encrypted disk starts, in bytes.
    pub payload_offset: u64,
    /// Rounds of the master key's digest.
    pub master_key_iters: u64,
}

impl LuksInfo {
    /// Of a header, which has a file of its own if `detached`.
    pub fn of(header: &Header, detached: bool) -> Self {
        let spec = &header.cipher;
        let slot = |s: &crate::luks::header::Slot| LuksSlot {
            active: s.active,
            iters: s.active.then_some(s.iterations.into()),
            stripes: s.active.then_some(s.stripes.into()),
            key_offset: u64::from(s.offset) * 512,
        };
        Self {
            cipher_alg: format!("{}-{}", spec.algorithm.name(), spec.key * 8),
            cipher_mode: spec.mode.name().to_owned(),
            ivgen_alg: spec.iv.map(|iv| iv.name().to_owned()),
            ivgen_hash_alg: match spec.iv {
                Some(IvGenerator::Essiv(hash)) => Some(hash.name().to_owned()),
                _ => None,
            },
            hash_alg: header.hash.name().to_owned(),
            detached_header: detached,
            payload_offset: u64::from(header.payload) * 512,
            master_key_iters: header.digest_iterations.into(),
            uuid: header.uuid.clone(),
            slots: header.slots.iter().map(slot).collect(),
        }
    }
}

/// How a qcow2 image is encrypted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Qcow2Encryption {
    /// `aes` or `luks`.
    pub format: String,
    /// What its LUKS header says.
    #[serde(flatten)]
    pub luks: Option<LuksInfo>,
}

/// A persistent bitmap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Qcow2BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes of the disk for a bit.
    pub granularity: u64,
    /// `in-use`, `auto`.
    pub flags: Vec<String>,
}

/// What there is to say of a qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Info {
    /// `0.10` (version 2) or `1.1` (version 3).
    pub compat: String,
    /// Name of the external data file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// The data file is a raw image by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file_raw: Option<bool>,
    /// How compressed clusters are.
    pub compression_type: String,
    /// Refcount updates are postponed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// Its bitmaps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bitmaps: Option<Vec<Qcow2BitmapInfo>>,
    /// Width of refcounts.
    pub refcount_bits: u64,
    /// How it is encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encrypt: Option<Qcow2Encryption>,
    /// It is marked as damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<bool>,
    /// L2 entries have subclusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
}

impl Qcow2Info {
    /// Of an image.
    pub fn of(image: &Qcow2) -> Self {
        let header = image.header();
        let new = header.version >= 3;
        let bitmaps: Vec<_> = image.bitmaps().iter().map(bitmap).collect();
        Self {
            compat: if new { "1.1" } else { "0.10" }.to_owned(),
            data_file: header.data_file.clone().filter(|_| header.has_data_file()),
            data_file_raw: header.has_data_file().then_some(header.autoclear & AUTOCLEAR_RAW != 0),
            extended_l2: new.then_some(header.extended_l2()),
            lazy_refcounts: new.then_some(header.compatible & LAZY_REFCOUNTS != 0),
            corrupt: new.then_some(header.incompatible & incompatible::CORRUPT != 0),
            refcount_bits: 1 << header.refcount_order,
            encrypt: match header.crypt_method {
                1 => Some(Qcow2Encryption { format: "aes".to_owned(), luks: None }),
                2 => {
                    let luks = image.luks_header().ok().flatten().map(|h| LuksInfo::of(&h, false));
                    Some(Qcow2Encryption { format: "luks".to_owned(), luks })
                }
                _ => None,
            },
            bitmaps: Some(bitmaps).filter(|b| !b.is_empty()),
            compression_type: header.compression.name().to_owned(),
        }
    }
}

fn bitmap(b: &crate::qcow2::bitmap::Bitmap) -> Qcow2BitmapInfo {
    Qcow2BitmapInfo {
        name: b.name.clone(),
        granularity: 1 << b.granularity_bits,
        flags: Qcow2::bitmap_flags(b).into_iter().map(str::to_owned).collect(),
    }
}

/// What there is to say of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct FileInfo {}

/// A part of a VMDK image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct VmdkExtentInfo {
    /// Its grains are compressed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compressed: Option<bool>,
    /// Bytes of the disk that are in it.
    pub virtual_size: u64,
    /// Its file.
    pub filename: String,
    /// Bytes of a grain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// `FLAT`, `SPARSE`, `ZERO`, or nothing if the image is this one part.
    pub format: String,
}

/// What there is to say of a VMDK image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct VmdkInfo {
    /// Its content id.
    pub cid: u32,
    /// That of the image below.
    pub parent_cid: u32,
    /// Its kind.
    pub create_type: String,
    /// Its parts.
    pub extents: Vec<VmdkExtentInfo>,
}

/// What only images of one format have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
pub enum ImageInfoSpecific {
    /// qcow2.
    Qcow2(Qcow2Info),
    /// LUKS.
    Luks(LuksInfo),
    /// VMDK.
    Vmdk(VmdkInfo),
    /// A file.
    File(FileInfo),
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// Its name.
    pub filename: String,
    /// Its driver.
    pub format: String,
    /// It was not closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_flag: Option<bool>,
    /// Bytes that it takes on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// Bytes of a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// It is encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<bool>,
    /// The backing file, as the image calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// And where that is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// And of what format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// Internal snapshots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshots: Option<Vec<SnapshotInfo>>,
    /// The image below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_image: Option<Box<ImageInfo>>,
    /// What only images of its format have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<ImageInfoSpecific>,
}

impl ImageInfo {
    /// Of a node that is called `filename`; what is below it is left out.
    pub fn of(filename: &str, node: &dyn BlockNode) -> Self {
        let mut info = Self {
            filename: filename.to_owned(),
            format: node.driver().to_owned(),
            dirty_flag: Some(false),
            actual_size: Some(node.disk_usage()),
            virtual_size: node.size(),
            cluster_size: node.cluster_size(),
            encrypted: None,
            backing_filename: None,
            full_backing_filename: None,
            backing_filename_format: None,
            snapshots: None,
            backing_image: None,
            format_specific: None,
        };
        if let Some(image) = node.as_qcow2() {
            info.of_qcow2(image, node);
        } else if let Some(luks) = node.as_luks() {
            if let Ok(header) = luks.header() {
                info.encrypted = Some(true);
                info.format_specific =
                    Some(ImageInfoSpecific::Luks(LuksInfo::of(&header, luks.is_detached())));
            }
        } else if node.driver() == "file" {
            info.format_specific = Some(ImageInfoSpecific::File(FileInfo {}));
        } else {
            info.format_specific = node.format_specific();
        }
        info
    }

    fn of_qcow2(&mut self, image: &Qcow2, node: &dyn BlockNode) {
        let header = image.header();
        let snapshots: Vec<_> = image.snapshots().iter().map(SnapshotInfo::from).collect();
        self.snapshots = Some(snapshots).filter(|s| !s.is_empty());
        self.dirty_flag = Some(header.incompatible & incompatible::DIRTY != 0);
        self.cluster_size = Some(header.cluster_size());
        self.encrypted = (header.crypt_method != 0).then_some(true);
        self.format_specific = Some(ImageInfoSpecific::Qcow2(Qcow2Info::of(image)));
        if let Some(name) = header.backing_file {
            let directory =
                node.path().as_deref().and_then(Path::parent).map(Path::to_owned).unwrap_or_default();
            self.full_backing_filename = Some(beside(&directory, &name));
            self.backing_filename = Some(name);
            self.backing_filename_format = header.backing_format;
        }
    }
}
