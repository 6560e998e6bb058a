//! LUKS version 1: encrypted disks as cryptsetup and dm-crypt have them.

mod create;
pub mod header;
mod keys;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_objects::Secret;
use zeroize::Zeroizing;

use crate::crypto::{CryptFile, SECTOR, SectorCipher};
use crate::node::{Extent, Preallocation, os_error};
use crate::{BlockError, BlockNode};
pub use create::{CreateOptions, Created, create, format};
use header::Header;
pub(crate) use keys::random;
pub use keys::{SlotChange, Volume};

/// An open LUKS volume.
#[derive(Debug)]
pub struct Luks {
    /// The decrypted payload; none if only the header is of interest.
    data: Option<Arc<CryptFile>>,
    file: Arc<dyn BlockNode>,
    /// The header's node, where it is detached.
    detached: Option<Arc<dyn BlockNode>>,
    payload: u64,
    size: AtomicU64,
    readonly: bool,
    master: Secret,
}

impl Luks {
    /// Opens a volume in `file`, whose header may be in a node of its own. Without a password only the header can be looked at.
    ///
    /// # Errors
    /// [`BlockError`]: damaged or unknown headers, a password that opens nothing, the host's.
    pub fn open(
        file: Arc<dyn BlockNode>,
        detached: Option<Arc<dyn BlockNode>>,
        password: Option<&[u8]>,
        readonly: bool,
    ) -> Result<Arc<Self>, BlockError> {
        let node = detached.as_ref().unwrap_or(&file);
        let volume = Volume { node: &**node, base: 0 };
        let header = volume.header()?;
        let payload = if detached.is_some() { 0 } else { u64::from(header.payload) * SECTOR as u64 };
        let mut master = Zeroizing::default();
        let mut data = None;
        if let Some(password) = password {
            if payload == 0 && detached.is_none() {
                return Err(BlockError::Option(
                    "the volume's header is detached from its data: 'header' names the header's file".into(),
                ));
            }
            master = volume.unlock(&header, password)?;
            let cipher = SectorCipher::new(header.cipher, &master).map_err(BlockError::Format)?;
            data = Some(CryptFile::new(Arc::clone(&file), payload, cipher));
        }
        let size = AtomicU64::new(size_of(&*file, payload));
        Ok(Arc::new(Self { data, file, detached, payload, size, readonly, master: Secret::new(master) }))
    }

    /// The header's place.
    pub fn volume(&self) -> Volume<'_> {
        Volume { node: &**self.detached.as_ref().unwrap_or(&self.file), base: 0 }
    }

    /// True if its header is in a file of its own.
    pub fn is_detached(&self) -> bool {
        self.detached.is_some()
    }

    /// The header as it is on the disk.
    ///
    /// # Errors
    /// As [`Volume::header`].
    pub fn header(&self) -> Result<Header, BlockError> {
        self.volume().header()
    }

    /// Changes key slots.
    ///
    /// # Errors
    /// As [`Volume::change`].
    pub fn change_slots(&self, change: &SlotChange<'_>) -> Result<(), BlockError> {
        self.volume().change(self.master.bytes(), change)
    }

    fn data(&self) -> io::Result<&CryptFile> {
        self.data.as_deref().ok_or_else(|| os_error(libc::EACCES))
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<&CryptFile> {
        let end = offset.checked_add(len).ok_or_else(|| os_error(libc::EINVAL))?;
        if end > self.size() { Err(os_error(libc::EIO)) } else { self.data() }
    }

    fn writable(&self, offset: u64, len: u64) -> io::Result<&CryptFile> {
        if self.readonly { Err(os_error(libc::EROFS)) } else { self.check(offset, len) }
    }
}

/// Whole sectors of the payload.
fn size_of(file: &dyn BlockNode, payload: u64) -> u64 {
    let bytes = file.size().saturating_sub(payload);
    bytes - bytes % SECTOR as u64
}

impl BlockNode for Luks {
    fn driver(&self) -> &'static str {
        "luks"
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn is_readonly(&self) -> bool {
        self.readonly
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.writable(offset, buf.len() as u64)?.write_at(offset, buf)
    }

    fn flush(&self) -> io::Result<()> {
        if self.readonly { Ok(()) } else { self.file.flush() }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.writable(offset, len)?.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.writable(offset, len)?.write_zeroes(offset, len, unmap)
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        let len = len.min(self.size().saturating_sub(offset));
        Ok(Extent { len, allocated: true, data: true, zero: false, compressed: false, offset: None })
    }

    fn truncate(&self, size: u64, preallocation: Preallocation) -> io::Result<()> {
        if self.readonly {
            return Err(os_error(libc::EROFS));
        }
        let end = size.checked_add(self.payload).ok_or_else(|| os_error(libc::EFBIG))?;
        self.file.truncate(end, preallocation)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn file(&self) -> Option<Arc<dyn BlockNode>> {
        Some(Arc::clone(&self.file))
    }

    fn grows_by_zeroes(&self) -> bool {
        false
    }

    fn refresh_size(&self) -> io::Result<()> {
        self.file.refresh_size()?;
        self.size.store(size_of(&*self.file, self.payload), Ordering::Release);
        Ok(())
    }

    fn as_luks(&self) -> Option<&Luks> {
        Some(self)
    }
}
