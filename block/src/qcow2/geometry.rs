//! How an image's tables are laid out, and what their entries mean.

use super::header::Header;

/// Entry bit: the refcount is exactly one, so the cluster can be written in place.
pub const COPIED: u64 = 1 << 63;
/// L2 entry bit: the cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// L2 entry bit (version 3, not with extended entries): the cluster reads as zeroes.
pub const ZERO: u64 = 1;
/// The offset in L1 entries and in L2 entries of clusters that are not compressed.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Reserved bits of L1 entries.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Reserved bits of L2 entries.
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Reserved bits of refcount table entries.
pub const REFTABLE_RESERVED: u64 = 0x1ff;

/// The layout of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Cluster size is 2 to this.
    pub cluster_bits: u32,
    /// L2 entries have 16 bytes instead of 8.
    pub extended: bool,
    /// Refcounts have 2 to this bits.
    pub refcount_order: u32,
    /// 2 or 3.
    pub version: u32,
    /// Guest clusters are in a file of their own.
    pub data_file: bool,
}

/// An L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// The first 64 bits.
    pub l2: u64,
    /// Subclusters with extended entries: allocated in the low half, zero in the high half.
    pub bitmap: u64,
}

/// What an L2 entry says of a subcluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: the backing file decides.
    Unallocated,
    /// It reads as zeroes.
    Zero,
    /// It is in the image.
    Data,
    /// The whole cluster is in the image, compressed.
    Compressed,
    /// The entry contradicts itself.
    Invalid,
}

impl Layout {
    /// The layout that a header describes.
    pub fn of(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            extended: header.extended_l2(),
            refcount_order: header.refcount_order,
            version: header.version,
            data_file: header.has_data_file(),
        }
    }

    /// Cluster size in bytes.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Subclusters in a cluster.
    pub fn subclusters(&self) -> u64 {
        if self.extended { 32 } else { 1 }
    }

    /// Subcluster size in bytes.
    pub fn subcluster(&self) -> u64 {
        self.cluster() / self.subclusters()
    }

    /// Bytes of an L2 entry.
    pub fn entry(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster() / self.entry()
    }

    /// Guest bytes that an L2 table covers.
    pub fn l2_coverage(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Refcounts in a refcount block.
    pub fn refblock_entries(&self) -> u64 {
        (self.cluster() * 8) >> self.refcount_order
    }

    /// The largest refcount.
    pub fn refcount_max(&self) -> u64 {
        match self.refcount_order {
            6 => u64::MAX,
            order => (1 << (1 << order)) - 1,
        }
    }

    /// Rounds down to a cluster.
    pub fn align(&self, offset: u64) -> u64 {
        offset & !(self.cluster() - 1)
    }

    /// Bits of an entry that point to a compressed cluster: offset and number of sectors.
    fn compressed_bits(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// Where a compressed cluster starts, and how many bytes (an upper bound) it takes.
    pub fn compressed_range(&self, l2: u64) -> (u64, u64) {
        let shift = self.compressed_bits();
        let offset = l2 & ((1 << shift) - 1);
        let sectors = (l2 >> shift & ((1 << (self.cluster_bits - 8)) - 1)) + 1;
        (offset, sectors * 512 - offset % 512)
    }

    /// The entry of a compressed cluster; `None` if the offset does not fit.
    pub fn compressed_entry(&self, offset: u64, len: u64) -> Option<u64> {
        let shift = self.compressed_bits();
        let sectors = (offset + len - 1) / 512 - offset / 512;
        (offset < 1 << shift).then_some(COMPRESSED | sectors << shift | offset)
    }

    /// What an entry says of subcluster `n`.
    pub fn kind(&self, entry: Entry, n: u64) -> Kind {
        if entry.l2 & COMPRESSED != 0 {
            return if self.data_file || (self.extended && entry.bitmap != 0) {
                Kind::Invalid
            } else {
                Kind::Compressed
            };
        }
        // In an external data file cluster 0 is a place like any other; COPIED says that it is used.
        let has_offset = entry.l2 & OFFSET != 0 || (self.data_file && entry.l2 & COPIED != 0);
        if !self.extended {
            return match (entry.l2 & ZERO != 0 && self.version >= 3, has_offset) {
                (true, _) => Kind::Zero,
                (false, true) => Kind::Data,
                (false, false) => Kind::Unallocated,
            };
        }
        let allocated = entry.bitmap >> n & 1 != 0;
        let zero = entry.bitmap >> (n + 32) & 1 != 0;
        match (allocated, zero) {
            (true, true) => Kind::Invalid,
            (_, true) => Kind::Zero,
            (true, _) if has_offset => Kind::Data,
            (true, _) => Kind::Invalid,
            _ => Kind::Unallocated,
        }
    }

    /// Where the entry's cluster is, if it has one that is not compressed.
    pub fn host(&self, entry: Entry) -> Option<u64> {
        let some = entry.l2 & COMPRESSED == 0
            && (entry.l2 & OFFSET != 0 || (self.data_file && entry.l2 & COPIED != 0));
        some.then_some(entry.l2 & OFFSET)
    }
}

/// A refcount out of a block or slice.
pub(super) fn get_refcount(block: &[u8], order: u32, n: usize) -> u64 {
    let byte = |at: usize| u64::from(block.get(at).copied().unwrap_or(0));
    match order {
        0..=2 => {
            let bits = 1 << order;
            let per = 8 >> order;
            byte(n / per) >> (n % per * bits) & ((1 << bits) - 1)
        }
        _ => {
            let bytes = 1 << (order - 3);
            (0..bytes).fold(0, |v, i| v << 8 | byte(n * bytes + i))
        }
    }
}

/// Puts a refcount into a block or slice.
pub(super) fn set_refcount(block: &mut [u8], order: u32, n: usize, value: u64) {
    match order {
        0..=2 => {
            let bits = 1 << order;
            let per = 8 >> order;
            let mask = ((1u32 << bits) - 1) as u8;
            if let Some(b) = block.get_mut(n / per) {
                let shift = n % per * bits;
                *b = *b & !(mask << shift) | (value as u8 & mask) << shift;
            }
        }
        _ => {
            let bytes = 1 << (order - 3);
            let from = value.to_be_bytes();
            if let Some(to) = block.get_mut(n * bytes..(n + 1) * bytes) {
                to.copy_from_slice(from.get(8 - bytes..).unwrap_or(&from));
            }
        }
    }
}
