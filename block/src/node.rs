//! What every node of the storage graph can do.
//!
//! A [`BlockNode`] is positional and blocking; formats are built from it, and the tools use it as it is. A VM's disks take
//! their requests through [`crate::queue`], which sends whatever a node can [`BlockNode::plan`] straight to the image file's
//! ring and runs the rest on threads.

use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ranges::RangeGuard;
use crate::raw::RawImage;
use crate::{BlockError, Op};

/// How much of a new or grown image is allocated at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The format's tables, but no data.
    Metadata,
    /// Everything, without writing it.
    Falloc,
    /// Everything, by writing it.
    Full,
}

impl Preallocation {
    /// The name that options use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }

    /// The mode of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Off, Self::Metadata, Self::Falloc, Self::Full].into_iter().find(|p| p.name() == name)
    }
}

/// What is known of the start of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes that it holds for, at least 1 unless the range lies past the end.
    pub len: u64,
    /// This node decides the contents; otherwise its backing node does.
    pub allocated: bool,
    /// There are bytes that may be other than zero.
    pub data: bool,
    /// It reads as zeroes.
    pub zero: bool,
    /// It is compressed.
    pub compressed: bool,
    /// Where in the node's file the bytes are.
    pub offset: Option<u64>,
}

/// A request that needs no more than its file's queue.
#[derive(Debug)]
pub enum Plan {
    /// The same request at another offset of the image file. The guard is held until it is done.
    File(u64, RangeGuard),
    /// A read of zeroes.
    Zeroes,
    /// The file's own flush is enough.
    Flush,
}

/// A node of the storage graph.
///
/// Offsets and lengths are in bytes. Whether a range lies within the node is the caller's to check, except where a
/// method says so.
pub trait BlockNode: Send + Sync + Debug {
    /// Name of the driver, as in `driver=`.
    fn driver(&self) -> &'static str;

    /// Size of the disk in bytes.
    fn size(&self) -> u64;

    /// True if it cannot be written.
    fn is_readonly(&self) -> bool;

    /// Fills `buf` with what is at `offset`. What is past the end reads as zeroes.
    ///
    /// # Errors
    /// The host's, or one that says which part of the image cannot be used.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// As [`BlockNode::read_at`]; `EROFS` if the node cannot be written.
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()>;

    /// Makes all writes that have returned durable.
    ///
    /// # Errors
    /// The host's.
    fn flush(&self) -> io::Result<()>;

    /// Says that the contents of a range are not needed. It may keep them or read as zeroes afterwards.
    ///
    /// # Errors
    /// As [`BlockNode::write_at`].
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes a range read as zeroes, giving its space back if `unmap`.
    ///
    /// # Errors
    /// As [`BlockNode::write_at`].
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// What is known of the longest range at `offset` of at most `len` bytes that is of one kind.
    ///
    /// # Errors
    /// As [`BlockNode::read_at`].
    fn status(&self, offset: u64, len: u64) -> io::Result<Extent>;

    /// Changes the size.
    ///
    /// # Errors
    /// As [`BlockNode::write_at`], and `Unsupported` with what is not possible.
    fn truncate(&self, size: u64, preallocation: Preallocation) -> io::Result<()>;

    /// The node that holds its bytes.
    fn file(&self) -> Option<Arc<dyn BlockNode>> {
        None
    }

    /// The node that says what this one does not.
    fn backing(&self) -> Option<Arc<dyn BlockNode>> {
        None
    }

    /// The file that is at the bottom, by its name.
    fn path(&self) -> Option<PathBuf> {
        self.file().and_then(|f| f.path())
    }

    /// True if its bytes come over the network.
    fn is_remote(&self) -> bool {
        self.file().is_some_and(|f| f.is_remote()) || self.backing().is_some_and(|b| b.is_remote())
    }

    /// True if bytes that were never written, past what was its end before it grew, read as zeroes. They do not where a file's
    /// holes are decrypted.
    fn grows_by_zeroes(&self) -> bool {
        self.file().is_none_or(|f| f.grows_by_zeroes())
    }

    /// Bytes that it takes on the host.
    fn disk_usage(&self) -> u64 {
        self.file().map_or(0, |f| f.disk_usage())
    }

    /// How a request can be done by the queue of [`BlockNode::data_file`] alone, if it can.
    fn plan(&self, _op: Op, _offset: u64, _len: u64) -> Option<Plan> {
        None
    }

    /// The file that [`BlockNode::plan`] is about.
    fn data_file(&self) -> Option<Arc<RawImage>> {
        None
    }

    /// The file that is this disk, byte for byte, so that its queue alone will do.
    fn whole_file(self: Arc<Self>) -> Option<Arc<RawImage>> {
        None
    }

    /// Looks at the size of the file below again, where that is the size of the disk.
    ///
    /// # Errors
    /// The host's.
    fn refresh_size(&self) -> io::Result<()> {
        Ok(())
    }

    /// Gives this node up for another process: what is only in memory goes to the disk, nothing is written any more, and locks
    /// are let go of. Nobody has a request under way. A node that is only read has nothing to give up.
    ///
    /// # Errors
    /// The host's; then it may be given up in part, which [`BlockNode::activate`] undoes.
    fn inactivate(&self) -> io::Result<()> {
        Ok(())
    }

    /// Says whether [`BlockNode::inactivate`] can work at all: asked before a VM begins to move.
    ///
    /// # Errors
    /// `Unsupported` with what stands in the way.
    fn can_inactivate(&self) -> io::Result<()> {
        Ok(())
    }

    /// Takes it again, or for the first time: locks it and reads anew what another process may have changed. The nodes below
    /// have been taken. Does nothing if it is not given up.
    ///
    /// # Errors
    /// [`BlockError`] if somebody else has it, or what it has become cannot be used.
    fn activate(&self) -> Result<(), BlockError> {
        Ok(())
    }

    /// Gives requests up that wait for a server, which fail then. Later ones are tried as ever.
    fn cancel_in_flight(&self) {
        self.file().iter().for_each(|f| f.cancel_in_flight());
    }

    /// Stores a unit of [`BlockNode::compressed_unit`] bytes (the disk's last one may be shorter) compressed, where there is nothing yet.
    ///
    /// # Errors
    /// As [`BlockNode::write_at`]; `Unsupported` if the format does not compress so.
    fn write_compressed(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "Compression not supported for this file format"))
    }

    /// Size in bytes of the units that an image takes which can only be written compressed.
    fn compressed_unit(&self) -> Option<u64> {
        None
    }

    /// Size in bytes of the units in which a format that is not qcow2 gives out space.
    fn cluster_size(&self) -> Option<u64> {
        None
    }

    /// What a format that is neither qcow2 nor LUKS says of an image: `format-specific`.
    fn format_specific(&self) -> Option<crate::facts::ImageInfoSpecific> {
        None
    }

    /// Faults that a check of an image that is not qcow2 finds, one text for each; `None` if the format has no check.
    fn faults(&self) -> Option<io::Result<Vec<String>>> {
        None
    }

    /// The qcow2 image, if it is one.
    fn as_qcow2(&self) -> Option<&crate::qcow2::Qcow2> {
        None
    }

    /// The LUKS volume, if it is one.
    fn as_luks(&self) -> Option<&crate::luks::Luks> {
        None
    }

    /// The node with its name, if it has one.
    fn as_named(self: Arc<Self>) -> Option<Arc<crate::nodes::NamedNode>> {
        None
    }

    /// The open file, if the node is one.
    fn as_file(self: Arc<Self>) -> Option<Arc<RawImage>> {
        None
    }
}

/// True if all bytes are zero.
pub fn is_zero(buf: &[u8]) -> bool {
    // SAFETY: any bytes are valid `u128`s.
    let (head, words, tail) = unsafe { buf.align_to::<u128>() };
    head.iter().all(|b| *b == 0)
        && words.chunks(16).all(|c| c.iter().fold(0, |a, w| a | w) == 0)
        && tail.iter().all(|b| *b == 0)
}

/// A path shown in messages.
pub(crate) fn shown(node: &dyn BlockNode) -> String {
    node.path().as_deref().map(Path::display).map(|d| d.to_string()).unwrap_or_default()
}

/// What a write to a node gets that was given up, or not taken yet.
pub(crate) fn inactive_error() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, "the node is inactive: its image is another process's")
}

pub(crate) fn os_error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// What a node knows of a range whose contents come from a backing chain too.
///
/// # Errors
/// As [`BlockNode::status`].
pub fn status_above(node: &dyn BlockNode, offset: u64, len: u64) -> io::Result<(Extent, usize)> {
    let first = node.status(offset, len)?;
    if first.allocated {
        return Ok((first, 0));
    }
    let mut len = first.len;
    let mut depth = 1;
    let mut next = node.backing();
    while let Some(below) = next {
        let size = below.size();
        if offset >= size {
            // Past the end of a short backing file: zeroes, and this file is the one that says so.
            return Ok((
                Extent { len, allocated: true, data: false, zero: true, compressed: false, offset: None },
                depth,
            ));
        }
        let extent = below.status(offset, len.min(size - offset))?;
        len = extent.len;
        if extent.allocated {
            return Ok((extent, depth));
        }
        next = below.backing();
        depth += 1;
    }
    Ok((
        Extent { len, allocated: false, data: false, zero: true, compressed: false, offset: None },
        depth - 1,
    ))
}
