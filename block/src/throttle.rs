//! A node that lets requests through at the rates of a group.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use holdfast_objects::ThrottleGroup;

use crate::BlockNode;
use crate::node::{Extent, Preallocation};

/// The node below, at the rates of a group. Requests wait on the thread that makes them.
#[derive(Debug)]
pub struct Throttle {
    below: Arc<dyn BlockNode>,
    group: Arc<ThrottleGroup>,
}

impl Throttle {
    /// `below`, throttled.
    pub fn new(below: Arc<dyn BlockNode>, group: Arc<ThrottleGroup>) -> Arc<Self> {
        Arc::new(Self { below, group })
    }
}

impl BlockNode for Throttle {
    fn driver(&self) -> &'static str {
        "throttle"
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn is_readonly(&self) -> bool {
        self.below.is_readonly()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.group.pass(false, buf.len() as u64);
        self.below.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.group.pass(true, buf.len() as u64);
        self.below.write_at(offset, buf)
    }

    fn flush(&self) -> io::Result<()> {
        self.below.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.group.pass(true, len);
        self.below.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.group.pass(true, len);
        self.below.write_zeroes(offset, len, unmap)
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        self.below.status(offset, len)
    }

    fn truncate(&self, size: u64, preallocation: Preallocation) -> io::Result<()> {
        self.below.truncate(size, preallocation)
    }

    fn file(&self) -> Option<Arc<dyn BlockNode>> {
        Some(Arc::clone(&self.below))
    }

    fn path(&self) -> Option<PathBuf> {
        self.below.path()
    }

    fn refresh_size(&self) -> io::Result<()> {
        self.below.refresh_size()
    }
}
