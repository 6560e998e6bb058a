//! `detect-zeroes`: writes of nothing but zeroes are stored as zeroes.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::facts::ImageInfoSpecific;
use crate::node::{Extent, Plan, Preallocation, is_zero};
use crate::raw::RawImage;
use crate::{BlockError, BlockNode, Op};

/// The node below, with writes looked at.
#[derive(Debug)]
pub(crate) struct DetectZeroes {
    below: Arc<dyn BlockNode>,
    unmap: bool,
}

impl DetectZeroes {
    /// `below`, to which zeroes come as such; they give their space back if `unmap`.
    pub(crate) fn new(below: Arc<dyn BlockNode>, unmap: bool) -> Arc<Self> {
        Arc::new(Self { below, unmap })
    }
}

impl BlockNode for DetectZeroes {
    fn driver(&self) -> &'static str {
        self.below.driver()
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn is_readonly(&self) -> bool {
        self.below.is_readonly()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.below.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        if is_zero(buf) {
            return self.below.write_zeroes(offset, buf.len() as u64, self.unmap);
        }
        self.below.write_at(offset, buf)
    }

    fn flush(&self) -> io::Result<()> {
        self.below.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.below.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.below.write_zeroes(offset, len, unmap)
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        self.below.status(offset, len)
    }

    fn truncate(&self, size: u64, preallocation: Preallocation) -> io::Result<()> {
        self.below.truncate(size, preallocation)
    }

    fn file(&self) -> Option<Arc<dyn BlockNode>> {
        self.below.file()
    }

    fn is_remote(&self) -> bool {
        self.below.is_remote()
    }

    fn backing(&self) -> Option<Arc<dyn BlockNode>> {
        self.below.backing()
    }

    fn path(&self) -> Option<PathBuf> {
        self.below.path()
    }

    fn grows_by_zeroes(&self) -> bool {
        self.below.grows_by_zeroes()
    }

    fn disk_usage(&self) -> u64 {
        self.below.disk_usage()
    }

    fn plan(&self, op: Op, offset: u64, len: u64) -> Option<Plan> {
        // What is written has to be looked at.
        if op == Op::Write { None } else { self.below.plan(op, offset, len) }
    }

    fn data_file(&self) -> Option<Arc<RawImage>> {
        self.below.data_file()
    }

    fn refresh_size(&self) -> io::Result<()> {
        self.below.refresh_size()
    }

    fn inactivate(&self) -> io::Result<()> {
        self.below.inactivate()
    }

    fn activate(&self) -> Result<(), BlockError> {
        self.below.activate()
    }

    fn write_compressed(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.below.write_compressed(offset, data)
    }

    fn compressed_unit(&self) -> Option<u64> {
        self.below.compressed_unit()
    }

    fn cluster_size(&self) -> Option<u64> {
        self.below.cluster_size()
    }

    fn format_specific(&self) -> Option<ImageInfoSpecific> {
        self.below.format_specific()
    }

    fn faults(&self) -> Option<io::Result<Vec<String>>> {
        self.below.faults()
    }

    fn as_qcow2(&self) -> Option<&crate::qcow2::Qcow2> {
        self.below.as_qcow2()
    }

    fn as_luks(&self) -> Option<&crate::luks::Luks> {
        self.below.as_luks()
    }
}
