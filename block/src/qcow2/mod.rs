//! qcow2 images, versions 2 and 3.
//!
//! [`Qcow2`] is a [`BlockNode`] over the node that holds the image. `state` keeps the tables in memory and brings them to the disk
//! in an order that survives a crash anywhere; `read`, `write` and `zero` move data; `check` compares refcounts with
//! references.

mod amend;
pub mod bitmap;
mod cache;
pub mod check;
mod compress;
mod create;
mod geometry;
mod handover;
pub mod header;
mod read;
mod refcount;
mod resize;
mod shadow;
pub mod snapshot;
mod state;
#[cfg(test)]
mod tests;
mod write;
mod zero;

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};
use zeroize::Zeroizing;

use crate::crypto::{CipherSpec, SectorCipher};
use crate::luks::{SlotChange, Volume};
use crate::node::{Extent, Plan, Preallocation, os_error};
use crate::ranges::Ranges;
use crate::raw::RawImage;
use crate::{BlockError, BlockNode, Op};
pub use create::{CreateOptions, create, measure};
use geometry::{Kind, Layout, OFFSET, REFTABLE_RESERVED};
use header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW, Compression, Header, be64, incompatible};
use state::{Files, State};

/// Bytes of L2 tables that are kept in memory unless told otherwise.
const L2_CACHE: u64 = 24 << 20;
/// Bytes of refcount blocks that are kept in memory unless told otherwise.
const REFCOUNT_CACHE: u64 = 2 << 20;
/// Bytes of an image that may hold a header.
const HEADER_WINDOW: usize = 2 << 20;

/// Most bytes of a LUKS header within an image that are guarded against allocations.
const MAX_CRYPTO: u64 = 64 << 20;

/// How to open an image.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// It is not written.
    pub readonly: bool,
    /// Another process still has it: nothing but the header is read, and nothing written, until it is activated.
    pub inactive: bool,
    /// Only the header and tables are of interest: data need not be readable, and bits that forbid writing do not matter.
    pub metadata_only: bool,
    /// It is opened to be checked: the dirty and corrupt bits do not matter.
    pub for_check: bool,
    /// Discards free clusters.
    pub discard: bool,
    /// Freed clusters are discarded in the file too.
    pub pass_discard: bool,
    /// Bytes of L2 tables in memory.
    pub l2_cache: u64,
    /// Bytes of refcount blocks in memory.
    pub refcount_cache: u64,
    /// What opens the contents of an encrypted image.
    pub key: Option<Key>,
    /// Find out whether clusters were allocated ahead of their use, for block status.
    pub guess_preallocation: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            readonly: false,
            inactive: false,
            metadata_only: false,
            for_check: false,
            discard: true,
            pass_discard: true,
            l2_cache: L2_CACHE,
            refcount_cache: REFCOUNT_CACHE,
            key: None,
            guess_preallocation: true,
        }
    }
}

/// The cipher of an encrypted image and its key, which is overwritten when it is let go.
#[derive(Clone)]
pub struct Key {
    spec: CipherSpec,
    master: Zeroizing<Vec<u8>>,
    /// Of the method that was there before LUKS.
    legacy: bool,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("spec", &self.spec).finish_non_exhaustive()
    }
}

impl Key {
    /// A cipher with its key.
    ///
    /// # Errors
    /// [`BlockError::Format`] if they do not fit.
    pub fn new(spec: CipherSpec, master: Zeroizing<Vec<u8>>) -> Result<Self, BlockError> {
        SectorCipher::new(spec, &master).map_err(BlockError::Format)?;
        Ok(Self { spec, master, legacy: false })
    }

    /// The key of a legacy image (encryption method 1): AES-128 in CBC mode, whose key is the password, cut or filled up with
    /// zeroes, and whose initialisation vectors are the guest's sectors. That is weak, which is why it is not used any more.
    pub fn legacy(password: &[u8]) -> Self {
        let mut master = Zeroizing::new(password.iter().take(16).copied().collect::<Vec<u8>>());
        master.resize(16, 0);
        let spec = CipherSpec {
            algorithm: crate::crypto::Algorithm::Aes,
            key: 16,
            mode: crate::crypto::Mode::Cbc,
            iv: Some(crate::crypto::IvGenerator::Plain64),
        };
        Self { spec, master, legacy: true }
    }

    fn cipher(&self) -> Result<SectorCipher, BlockError> {
        SectorCipher::new(self.spec, &self.master).map_err(BlockError::Format)
    }
}

/// An open qcow2 image.
#[derive(Debug)]
pub struct Qcow2 {
    files: Files,
    key: Option<Key>,
    backing: RwLock<Option<Arc<dyn BlockNode>>>,
    layout: Layout,
    compression: Compression,
    data_file_raw: bool,
    discards: bool,
    size: AtomicU64,
    state: Mutex<State>,
    ranges: Arc<Ranges>,
    /// The compressed cluster that was read last, by its entry.
    decompressed: Mutex<(u64, Vec<u8>)>,
    /// What the heuristic says of clusters allocated ahead of their use.
    preallocated: OnceLock<bool>,
    options: OpenOptions,
    /// It is another process's for the time being. As the tables' own flag, for who does not have their lock.
    inactive: AtomicBool,
}

/// Reads and checks the header of an image.
///
/// # Errors
/// [`BlockError::Format`], [`BlockError::Unsupported`], [`BlockError::Host`].
pub fn read_header(file: &dyn BlockNode) -> Result<Header, BlockError> {
    let mut bytes = vec![0; HEADER_WINDOW.min(file.size() as usize)];
    file.read_at(0, &mut bytes).map_err(|e| host_error(file, "Could not read qcow2 header", e))?;
    Header::parse(&bytes)
}

fn host_error(file: &dyn BlockNode, what: &'static str, source: io::Error) -> BlockError {
    BlockError::Host { path: file.path().unwrap_or_default(), what, source }
}

fn read_table(file: &dyn BlockNode, offset: u64, entries: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; entries as usize * 8];
    file.read_at(offset, &mut bytes)?;
    Ok(bytes.chunks_exact(8).map(|e| be64(e, 0)).collect())
}

impl Qcow2 {
    /// Opens an image. Its backing and data files are opened by the caller, who reads their names with [`read_header`].
    ///
    /// # Errors
    /// [`BlockError`] with what is wrong with the image, or what of it is not supported.
    pub fn open(
        file: Arc<dyn BlockNode>,
        data: Option<Arc<dyn BlockNode>>,
        backing: Option<Arc<dyn BlockNode>>,
        options: &OpenOptions,
    ) -> Result<Arc<Self>, BlockError> {
        let header = read_header(&*file)?;
        let writable = !options.readonly;
        if !options.metadata_only {
            refuse_encryption(&header, options)?;
            if header.has_data_file() && data.is_none() {
                return Err(BlockError::Format("'data-file' is required for this image".into()));
            }
            if !header.has_data_file() && data.is_some() {
                return Err(BlockError::Format(
                    "'data-file' can only be set for images with an external data file".into(),
                ));
            }
        }
        let for_use = writable && !options.for_check && !options.inactive;
        if for_use && header.incompatible & incompatible::CORRUPT != 0 {
            return Err(BlockError::Format("qcow2: Image is corrupt; cannot be opened read/write".into()));
        }
        let repair = for_use && header.incompatible & incompatible::DIRTY != 0;
        let mut files = Files { file, data, crypt: None, legacy: None };
        if let Some(key) = &options.key {
            match key.legacy {
                true => files.legacy = Some(Arc::new(key.cipher()?)),
                false => files.encrypt(key.cipher()?),
            }
        }
        let image = Self::with_header(header, files, backing, options)?;
        if repair {
            image.repair_dirty()?;
        }
        if writable && !options.inactive {
            let started = image.state.lock().start_writing();
            started.map_err(|e| host_error(&*image.files.file, "Could not update qcow2 header", e))?;
        }
        Ok(image)
    }

    fn with_header(
        header: Header,
        files: Files,
        backing: Option<Arc<dyn BlockNode>>,
        options: &OpenOptions,
    ) -> Result<Arc<Self>, BlockError> {
        let layout = Layout::of(&header);
        let key = options.key.clone();
        let size = AtomicU64::new(header.size);
        let (compression, data_file_raw) = (header.compression, header.autoclear & AUTOCLEAR_RAW != 0);
        let state = State::load(header, &files, options)?;
        Ok(Arc::new(Self {
            backing: RwLock::new(backing),
            layout,
            compression,
            data_file_raw,
            discards: options.discard,
            size,
            state: Mutex::new(state),
            ranges: Arc::default(),
            decompressed: Mutex::default(),
            preallocated: if options.guess_preallocation { OnceLock::new() } else { OnceLock::from(false) },
            inactive: AtomicBool::new(options.inactive && !options.readonly),
            options: options.clone(),
            key,
            files,
        }))
    }

    /// Changes the key slots of an encrypted image.
    ///
    /// # Errors
    /// As [`Volume::change`]; [`BlockError::Option`] if the image is not encrypted by LUKS.
    pub fn change_slots(&self, change: &SlotChange<'_>) -> Result<(), BlockError> {
        let header = self.header();
        let Some(key) = self.key.as_ref().filter(|_| header.crypt_method == 2) else {
            return Err(BlockError::Option("Can't amend encryption options - encryption not present".into()));
        };
        let volume = Volume { node: &*self.files.file, base: header.crypto_offset()? };
        volume.change(&key.master, change)
    }

    /// The LUKS header of an encrypted image.
    ///
    /// # Errors
    /// As [`Volume::header`].
    pub fn luks_header(&self) -> Result<Option<crate::luks::header::Header>, BlockError> {
        let header = self.header();
        if header.crypt_method != 2 {
            return Ok(None);
        }
        Volume { node: &*self.files.file, base: header.crypto_offset()? }.header().map(Some)
    }

    /// The header as it is now.
    pub fn header(&self) -> Header {
        self.state.lock().header.clone()
    }

    /// Why the image is not written any more, if so.
    pub fn corrupt(&self) -> Option<String> {
        self.state.lock().corrupt.clone()
    }

    /// Lets a node hear of damage.
    pub(crate) fn watch(&self, watch: Arc<crate::nodes::NodeWatch>) {
        self.state.lock().watch = Some(watch);
    }

    /// Replaces the backing node.
    pub fn set_backing(&self, backing: Option<Arc<dyn BlockNode>>) {
        *self.backing.write() = backing;
    }

    /// The data file's node.
    pub fn external_data(&self) -> Option<Arc<dyn BlockNode>> {
        self.files.data.clone()
    }

    /// Sets the name and format of the backing file in the header.
    ///
    /// # Errors
    /// If it does not fit, or the host's.
    pub fn set_backing_name(&self, name: Option<String>, format: Option<String>) -> io::Result<()> {
        let mut state = self.state.lock();
        state.check_writable()?;
        let old = state.header.clone();
        state.header.backing_file = name;
        state.header.backing_format = format;
        if let Err(error) = state.header.to_bytes() {
            state.header = old;
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error.to_string()));
        }
        state.flush()?;
        state.write_header()?;
        state.flush()
    }

    /// Makes everything unallocated, as after creation. Snapshots stay.
    ///
    /// # Errors
    /// As a write.
    pub fn make_empty(&self) -> io::Result<()> {
        let _all = self.ranges.lock(0, u64::MAX, true);
        self.drop_range(0, self.size_now().next_multiple_of(self.layout.cluster()), zero::Drop::Forget)?;
        self.state.lock().flush()
    }

    fn size_now(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn check_range(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.inactive.load(Ordering::Acquire) {
            return Err(crate::node::inactive_error());
        }
        let end = offset.checked_add(len).ok_or_else(|| os_error(libc::EINVAL))?;
        if end > self.size_now() { Err(os_error(libc::EIO)) } else { Ok(()) }
    }

    /// The bytes `offset` to `offset + len` are about to change.
    fn note_write(&self, offset: u64, len: u64) -> io::Result<()> {
        self.state.lock().note_write(offset, len)
    }

    /// Writes everything that is only in memory, bitmaps included. The image can be used on.
    ///
    /// # Errors
    /// The host's.
    pub fn close(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.readonly || state.inactive {
            return Ok(());
        }
        state.store_bitmaps()?;
        state.flush()
    }

    fn repair_dirty(&self) -> Result<(), BlockError> {
        let report = self
            .check(check::Fix::All)
            .map_err(|e| host_error(&*self.files.file, "Could not repair dirty image", e))?;
        if report.corruptions != 0 || report.check_errors != 0 {
            return Err(BlockError::Format("Could not repair dirty image: it is corrupt; check it".into()));
        }
        Ok(())
    }
}

fn refuse_encryption(header: &Header, options: &OpenOptions) -> Result<(), BlockError> {
    match header.crypt_method {
        0 => Ok(()),
        1 if !options.readonly => Err(BlockError::Unsupported(
            "AES-CBC encrypted qcow2 images are weak, and are opened for reading only, to be converted: use 'img convert' with encrypt.format=luks or none"
                .into(),
        )),
        1 if options.key.is_some() => Ok(()),
        1 => Err(BlockError::Option("Parameter 'encrypt.key-secret' is required for cipher".into())),
        2 if options.key.is_some() => Ok(()),
        2 => Err(BlockError::Option("Parameter 'encrypt.key-secret' is required for cipher".into())),
        other => Err(BlockError::Format(format!("Unsupported encryption method {other}"))),
    }
}

impl State {
    /// The tables as they are on the disk; none of an image that is another process's.
    fn load(header: Header, files: &Files, options: &OpenOptions) -> Result<Self, BlockError> {
        let layout = Layout::of(&header);
        let fail = |what| {
            let file = Arc::clone(&files.file);
            move |e| host_error(&*file, what, e)
        };
        let inactive = options.inactive && !options.readonly;
        let mut state = State {
            files: files.clone(),
            layout,
            l1: Vec::new(),
            l1_dirty: BTreeSet::new(),
            reftable: Vec::new(),
            reftable_dirty: BTreeSet::new(),
            l2: cache::TableCache::new(layout.cluster(), options.l2_cache),
            refblocks: cache::TableCache::new(layout.cluster(), options.refcount_cache),
            first_free: 0,
            free_byte: 0,
            freed: Vec::new(),
            snapshots: Vec::new(),
            snapshot_table_size: 0,
            metadata: HashSet::new(),
            discard_freed: options.pass_discard,
            corrupt: None,
            watch: None,
            readonly: options.readonly,
            inactive,
            bitmaps: bitmap::Bitmaps::default(),
            scratch: Vec::new(),
            header,
        };
        if inactive {
            return Ok(state);
        }
        let header = &state.header;
        let reftable_entries = u64::from(header.reftable_clusters) * layout.cluster() / 8;
        state.l1 = read_table(&*files.file, header.l1_offset, u64::from(header.l1_size))
            .map_err(fail("Could not read L1 table"))?;
        state.reftable = read_table(&*files.file, header.reftable_offset, reftable_entries)
            .map_err(fail("Could not read refcount table"))?;
        (state.snapshots, state.snapshot_table_size) = snapshot::read(&*files.file, header)?;
        state.bitmaps = bitmap::Bitmaps::read(&*files.file, header)?;
        if !options.readonly {
            state.find_metadata();
        }
        Ok(state)
    }

    /// Where metadata is, so that no allocation overwrites it.
    fn find_metadata(&mut self) {
        let bits = self.layout.cluster_bits;
        let mut add = |offset: u64, bytes: u64| {
            let last = (offset + bytes).div_ceil(1 << bits);
            self.metadata.extend((offset >> bits)..last);
        };
        add(0, 1);
        add(self.header.l1_offset, self.l1.len() as u64 * 8);
        add(self.header.reftable_offset, self.reftable.len() as u64 * 8);
        if let Some((offset, len)) = self.header.crypto {
            add(offset, len.min(MAX_CRYPTO));
        }
        if self.snapshot_table_size != 0 {
            add(self.header.snapshots_offset, self.snapshot_table_size);
        }
        for snapshot in &self.snapshots {
            add(snapshot.l1_offset, u64::from(snapshot.l1_size) * 8);
        }
        let blocks = self.reftable.iter().map(|e| e & !REFTABLE_RESERVED);
        let tables = self.l1.iter().map(|e| e & OFFSET);
        for offset in blocks.chain(tables).filter(|o| *o != 0 && *o <= OFFSET) {
            self.metadata.insert(offset >> bits);
        }
    }

    /// What has to be changed in the header before anything else is.
    fn start_writing(&mut self) -> io::Result<()> {
        let known = AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW;
        if self.header.autoclear & !known != 0 {
            self.header.autoclear &= known;
            self.write_header()?;
        }
        Ok(())
    }
}

impl BlockNode for Qcow2 {
    fn driver(&self) -> &'static str {
        "qcow2"
    }

    fn size(&self) -> u64 {
        self.size_now()
    }

    fn is_readonly(&self) -> bool {
        self.state.lock().readonly
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        self.check_range(offset, buf.len() as u64)?;
        let cluster = self.layout.cluster();
        let end = (offset + buf.len() as u64).next_multiple_of(cluster);
        let _shared = self.ranges.lock(self.layout.align(offset), end, false);
        self.read_unlocked(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        self.write_range(offset, buf)
    }

    fn flush(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.readonly || state.inactive { Ok(()) } else { state.flush() }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_range(offset, len)?;
        self.state.lock().check_writable()?;
        self.discard_range(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check_range(offset, len)?;
        self.state.lock().check_writable()?;
        if len == 0 { Ok(()) } else { self.zero_range(offset, len, unmap) }
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        self.check_range(offset, 0)?;
        self.status_of(offset, len)
    }

    fn inactivate(&self) -> io::Result<()> {
        self.give_up()
    }

    fn activate(&self) -> Result<(), BlockError> {
        self.take()
    }

    fn truncate(&self, size: u64, preallocation: Preallocation) -> io::Result<()> {
        self.resize(size, preallocation)
    }

    fn file(&self) -> Option<Arc<dyn BlockNode>> {
        Some(Arc::clone(&self.files.file))
    }

    fn backing(&self) -> Option<Arc<dyn BlockNode>> {
        self.backing_node()
    }

    fn plan(&self, op: Op, offset: u64, len: u64) -> Option<Plan> {
        let mut state = self.state.try_lock()?;
        if op == Op::Flush {
            return (state.is_clean() && self.files.data.is_none()).then_some(Plan::Flush);
        }
        if !matches!(op, Op::Read | Op::Write) || len == 0 || self.files.legacy.is_some() {
            return None;
        }
        self.check_range(offset, len).ok()?;
        if op == Op::Write && (state.check_writable().is_err() || !state.bitmaps.is_empty()) {
            return None;
        }
        if !state.is_cached(offset) {
            return None;
        }
        let run = state.map(offset, len).ok()?;
        drop(state);
        if run.len < len {
            return None;
        }
        let nothing_below = || self.backing.read().is_none();
        match (op, run.kind, run.host) {
            (Op::Read, Kind::Zero, _) => Some(Plan::Zeroes),
            (Op::Read, Kind::Unallocated, _) if nothing_below() => Some(Plan::Zeroes),
            (_, Kind::Data, Some(host)) if op == Op::Read || run.owned => {
                if host.checked_add(len)? > self.files.guest().size() {
                    return None;
                }
                let end = (offset + len).next_multiple_of(self.layout.cluster());
                let guard = self.ranges.try_lock(self.layout.align(offset), end, false)?;
                // Only now nobody can change the mapping: it has to be the same still.
                let again = self.state.try_lock()?.map(offset, len).ok()?;
                let same = again.kind == run.kind
                    && again.host == run.host
                    && again.owned == run.owned
                    && again.len == run.len;
                same.then_some(Plan::File(host, guard))
            }
            _ => None,
        }
    }

    fn data_file(&self) -> Option<Arc<RawImage>> {
        Arc::clone(self.files.guest()).as_file()
    }

    fn as_qcow2(&self) -> Option<&Qcow2> {
        Some(self)
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            let path = crate::node::shown(&*self.files.file);
            tracing::error!(path, %error, "the image's tables cannot be written as it is closed");
        }
    }
}
