//! New images, and how large they will be.

use std::io;
use std::sync::Arc;

use super::geometry::{Layout, set_refcount};
use super::header::{AUTOCLEAR_RAW, Compression, Header, LAZY_REFCOUNTS, MAX_L1_BYTES, incompatible};
use super::{OpenOptions, Qcow2};
use crate::luks::{self, Volume};
use crate::node::Preallocation;
use crate::{BlockError, BlockNode};

/// How to make an image.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Size of the disk in bytes.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Bits of a refcount.
    pub refcount_bits: u64,
    /// L2 entries of 128 bits.
    pub extended_l2: bool,
    /// The compatible feature bit.
    pub lazy_refcounts: bool,
    /// Of compressed clusters.
    pub compression: Compression,
    /// Name of the backing file.
    pub backing_file: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// The data file is a raw image by itself.
    pub data_file_raw: bool,
    /// Contents are encrypted by LUKS.
    pub encrypt: Option<luks::CreateOptions>,
    /// What is allocated at once.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// The usual image of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            compression: Compression::Zlib,
            backing_file: None,
            backing_format: None,
            data_file: None,
            data_file_raw: false,
            encrypt: None,
            preallocation: Preallocation::Off,
        }
    }

    fn v3_only(&self) -> Result<(), BlockError> {
        let bad = |text: &str| Err(BlockError::Option(text.into()));
        if self.version >= 3 {
            return Ok(());
        }
        if self.refcount_bits != 16 {
            return bad(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
            );
        }
        if self.lazy_refcounts {
            return bad(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            );
        }
        if self.data_file.is_some() {
            return bad(
                "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            );
        }
        if self.extended_l2 {
            return bad(
                "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            );
        }
        if self.compression != Compression::Zlib {
            return bad(
                "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            );
        }
        Ok(())
    }

    fn check(&self) -> Result<(), BlockError> {
        let bad = |text: &str| Err(BlockError::Option(text.into()));
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return bad("Cluster size must be a power of two between 512 and 2048k");
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return bad("Refcount width must be a power of two and may not exceed 64 bits");
        }
        self.v3_only()?;
        if self.extended_l2 && self.cluster_size < 16384 {
            return bad("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes");
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return bad("Backing file and data-file-raw cannot be used at the same time");
        }
        if self.data_file_raw && self.data_file.is_none() {
            return bad("data-file-raw requires data-file");
        }
        if self.backing_file.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return bad(
                "Backing file and preallocation can only be used at the same time if extended_l2 is enabled",
            );
        }
        if self.data_file_raw && self.encrypt.is_some() {
            return bad("data-file-raw and encryption cannot be used at the same time");
        }
        if self.size > i64::MAX as u64 - self.cluster_size {
            return bad("Image size is too large");
        }
        Ok(())
    }

    fn header(&self) -> Result<Header, BlockError> {
        self.check()?;
        let mut features = 0;
        let flag = |on: bool, bit: u64| if on { bit } else { 0 };
        features |= flag(self.data_file.is_some(), incompatible::DATA_FILE);
        features |= flag(self.compression == Compression::Zstd, incompatible::COMPRESSION);
        features |= flag(self.extended_l2, incompatible::EXTENDED_L2);
        let cluster_bits = self.cluster_size.trailing_zeros();
        let mut header = Header {
            version: self.version,
            backing_file: self.backing_file.clone(),
            backing_format: self.backing_format.clone(),
            data_file: self.data_file.clone(),
            cluster_bits,
            size: self.size,
            crypt_method: 0,
            l1_size: 0,
            l1_offset: 3 << cluster_bits,
            reftable_offset: 1 << cluster_bits,
            reftable_clusters: 1,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: features,
            compatible: flag(self.lazy_refcounts, LAZY_REFCOUNTS),
            autoclear: flag(self.data_file_raw, AUTOCLEAR_RAW),
            refcount_order: self.refcount_bits.trailing_zeros(),
            compression: self.compression,
            bitmaps: None,
            crypto: None,
            unknown: Vec::new(),
            feature_names: Vec::new(),
        };
        let l1 = header.l1_needed(self.size);
        if l1 * 8 > MAX_L1_BYTES {
            return Err(BlockError::Option(
                "Image is too big for its cluster size: the L1 table would be too large".into(),
            ));
        }
        header.l1_size = l1 as u32;
        Ok(header)
    }
}

/// Makes an image in an empty file and opens it.
///
/// # Errors
/// [`BlockError::Option`] with options that cannot be; the host's.
pub fn create(
    file: Arc<dyn BlockNode>,
    data: Option<Arc<dyn BlockNode>>,
    options: &CreateOptions,
    password: Option<&[u8]>,
) -> Result<Arc<Qcow2>, BlockError> {
    let header = options.header()?;
    let target = Arc::clone(&file);
    let fail = |source| BlockError::Host {
        path: target.path().unwrap_or_default(),
        what: "Could not create the image",
        source,
    };
    let layout = Layout::of(&header);
    let cluster = layout.cluster();
    let l1_clusters = (u64::from(header.l1_size) * 8).div_ceil(cluster);
    // The header, the refcount table, its first block; the L1 table is allocated once the image can allocate.
    let mut first = header.clone();
    first.l1_size = 0;
    first.l1_offset = 0;
    first.size = 0;
    first.backing_file = None;
    let mut block = vec![0; cluster as usize];
    for n in 0..3 {
        set_refcount(&mut block, layout.refcount_order, n, 1);
    }
    let mut table = vec![0; cluster as usize];
    if let Some(entry) = table.get_mut(..8) {
        entry.copy_from_slice(&(2 * cluster).to_be_bytes());
    }
    file.write_at(cluster, &table).map_err(fail)?;
    file.write_at(2 * cluster, &block).map_err(fail)?;
    let mut bytes = first.to_bytes()?;
    bytes.resize(cluster as usize, 0);
    file.write_at(0, &bytes).map_err(fail)?;
    let mut image = Qcow2::open(file, data, None, &OpenOptions::default())?;
    if let Some(encrypt) = &options.encrypt {
        add_encryption(&mut image, encrypt, password)?;
    }
    {
        let mut state = image.state.lock();
        let l1 = vec![0; header.l1_size as usize];
        let at = if l1_clusters == 0 { state.allocate_run(1) } else { state.new_l1(&l1) }.map_err(fail)?;
        state.flush_tables().map_err(fail)?;
        state.header.l1_offset = at;
        state.header.l1_size = header.l1_size;
        state.header.size = header.size;
        state.header.backing_file = header.backing_file;
        state.l1 = l1;
        state.write_header().map_err(fail)?;
        state.metadata.clear();
        state.find_metadata();
    }
    image.size.store(options.size, std::sync::atomic::Ordering::Release);
    let all = image.preallocate(0, options.size, options.preallocation);
    all.and_then(|()| image.flush()).map_err(fail)?;
    Ok(image)
}

/// Puts a LUKS header into an image that is empty yet.
fn add_encryption(
    image: &mut Arc<Qcow2>,
    options: &luks::CreateOptions,
    password: Option<&[u8]>,
) -> Result<(), BlockError> {
    let password = password
        .ok_or_else(|| BlockError::Option("Parameter 'encrypt.key-secret' is required for cipher".into()))?;
    let file = Arc::clone(&image.files.file);
    let fail = |source| BlockError::Host {
        path: file.path().unwrap_or_default(),
        what: "Could not create the image",
        source,
    };
    let len = options.payload()?;
    let mut state = image.state.lock();
    let clusters = len.div_ceil(image.layout.cluster());
    let at = state.allocate_run(clusters).map_err(fail)?;
    file.write_zeroes(at, clusters * image.layout.cluster(), false).map_err(fail)?;
    let made = luks::format(&Volume { node: &*file, base: at }, options, password, false)?;
    state.header.crypt_method = 2;
    state.header.crypto = Some((at, len));
    drop(state);
    if let Some(image) = Arc::get_mut(image) {
        image.files.encrypt(made.cipher);
    }
    Ok(())
}

/// Bytes that an image takes with `allocated` bytes of data of a disk of `size` bytes, when it is made of whole clusters: as other
/// tools calculate it.
pub fn measure(options: &CreateOptions, allocated: u64) -> io::Result<u64> {
    let header = options.header().map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e.to_string()))?;
    let layout = Layout::of(&header);
    let cluster = layout.cluster();
    let aligned = options.size.next_multiple_of(cluster);
    // Header cluster, L2 tables, L1 table.
    let mut meta = cluster;
    let entries = (aligned / cluster).next_multiple_of(cluster / layout.entry());
    meta += entries * layout.entry();
    let tables = (entries * layout.entry()) / cluster;
    meta += (tables * 8).next_multiple_of(cluster);
    if let Some(encrypt) = &options.encrypt {
        let len =
            encrypt.payload().map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e.to_string()))?;
        meta += len.next_multiple_of(cluster);
    }
    meta += refcount_bytes((meta + aligned) / cluster, &layout);
    Ok(meta + allocated)
}

/// Bytes of a refcount table and its blocks that count `clusters` clusters and themselves.
fn refcount_bytes(clusters: u64, layout: &Layout) -> u64 {
    let cluster = layout.cluster();
    let per_table = cluster / 8;
    let per_block = layout.refblock_entries();
    let (mut table, mut blocks, mut n) = (0u64, 0u64, 0u64);
    loop {
        let last = n;
        blocks = (clusters + table + blocks).div_ceil(per_block);
        table = blocks.div_ceil(per_table);
        n = clusters + blocks + table;
        if n == last {
            return (blocks + table) * cluster;
        }
    }
}
