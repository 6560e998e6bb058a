//! Building nodes from options.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use holdfast_objects::Objects;
use holdfast_threads::Spawner;
use parking_lot::Mutex;

use crate::detect;
use crate::format::{PROBE, RawFormat, probe};
use crate::http::{self, Http};
use crate::luks::{Luks, Volume};
use crate::nbd::{self, Address, ClientOptions, Nbd, TlsClient};
use crate::nodes::{NamedNode, Nodes};
use crate::options::{Aio, BlockdevOptions, DetectZeroes, DiscardMode, Driver, Locking, NodeRef};
use crate::qcow2::{self, Qcow2};
use crate::raw::{LockRange, RawImage, RawOptions};
use crate::throttle::Throttle;
use crate::{BlockError, BlockNode, vdi, vhdx, vmdk, vpc};

/// Longest chain of backing files.
const MAX_CHAIN: usize = 200;

/// Whether an image's own words decide which other files are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Backing and data files that images name are opened.
    Follow,
    /// An image that names a file is refused.
    Refuse,
    /// Images are opened as if they named no backing file.
    Ignore,
}

/// What all nodes of an image have in common.
#[derive(Debug, Clone)]
pub struct Opener {
    /// Starts threads.
    pub spawner: Arc<dyn Spawner>,
    /// Secrets that options name.
    pub objects: Arc<Objects>,
    /// The topmost node is to be written.
    pub writable: bool,
    /// Others may write it meanwhile.
    pub share: bool,
    /// What is locked of the topmost image's file; files below are locked as QEMU does it.
    pub lock: LockRange,
    /// Which other files may be opened.
    pub backing: Backing,
    /// Bypass the page cache unless options say otherwise.
    pub direct: bool,
    /// Ignore flushes unless options say otherwise.
    pub no_flush: bool,
    /// Discards give space back unless options say otherwise.
    pub discard: bool,
    /// Use io_uring if the host has it.
    pub io_uring: bool,
    /// Name for threads.
    pub name: String,
    /// Only headers and tables matter.
    pub metadata_only: bool,
    /// It is to be checked.
    pub for_check: bool,
    /// It is a running VM's: no calls beyond those that move data once it is open.
    pub for_vm: bool,
    /// Where nodes get their names, and are found by them; without it there are none.
    pub nodes: Option<Arc<Nodes>>,
}

impl Opener {
    /// For reading, as tools do.
    pub fn reading(spawner: Arc<dyn Spawner>) -> Self {
        Self {
            spawner,
            objects: Arc::default(),
            writable: false,
            share: false,
            lock: LockRange::Qemu,
            backing: Backing::Follow,
            direct: false,
            no_flush: false,
            discard: true,
            io_uring: true,
            name: "block".to_owned(),
            metadata_only: false,
            for_check: false,
            for_vm: false,
            nodes: None,
        }
    }

    /// For reading and writing.
    pub fn writing(spawner: Arc<dyn Spawner>) -> Self {
        Self { writable: true, ..Self::reading(spawner) }
    }

    /// Images are another process's when they are opened.
    fn inactive(&self) -> bool {
        self.nodes.as_ref().is_some_and(|nodes| nodes.opens_inactive())
    }

    fn below(&self) -> Self {
        Self {
            writable: false,
            metadata_only: false,
            for_check: false,
            lock: LockRange::Qemu,
            ..self.clone()
        }
    }

    /// Opens an image by its file name, of a format that is found out if it is not given.
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn open_file(&self, name: &str, driver: Option<Driver>) -> Result<Arc<dyn BlockNode>, BlockError> {
        self.open(&named(name, driver)?)
    }

    /// Opens a node.
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn open(&self, options: &BlockdevOptions) -> Result<Arc<dyn BlockNode>, BlockError> {
        self.node(options, &mut Vec::new())
    }

    /// Opens a node with a name of its own, which is kept in the table of names until it is taken out there.
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn open_named(&self, options: &BlockdevOptions) -> Result<Arc<NamedNode>, BlockError> {
        let nodes = self.nodes.as_ref().ok_or_else(no_names)?;
        let node = self.open(options)?.as_named().ok_or_else(no_names)?;
        nodes.keep(Arc::clone(&node));
        Ok(node)
    }

    /// Opens the node of these options that is to have a name already; those below get theirs.
    ///
    /// # Errors
    /// [`BlockError`].
    pub(crate) fn open_bare(&self, options: &BlockdevOptions) -> Result<Arc<dyn BlockNode>, BlockError> {
        self.bare_node(options, &mut Vec::new())
    }

    /// Opens a disk's node, which is called `name` unless its options name it, and the nodes below.
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn open_as(&self, name: &str, options: &BlockdevOptions) -> Result<Arc<NamedNode>, BlockError> {
        let nodes = self.nodes.as_ref().ok_or_else(no_names)?;
        let bare = self.bare_node(options, &mut Vec::new())?;
        nodes.name(options, Some(name), bare)
    }

    /// The format `driver` over a file that is open.
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn open_over(&self, file: Arc<RawImage>, driver: Driver) -> Result<Arc<dyn BlockNode>, BlockError> {
        let options = BlockdevOptions { driver: Some(driver), ..BlockdevOptions::default() };
        let mut chain = vec![file.identity()];
        self.format_node(&options, file, &mut chain)
    }

    fn node(
        &self,
        options: &BlockdevOptions,
        chain: &mut Vec<(u64, u64)>,
    ) -> Result<Arc<dyn BlockNode>, BlockError> {
        self.named(options, self.bare_node(options, chain)?)
    }

    /// Gives a node its name, where there are names.
    fn named(
        &self,
        options: &BlockdevOptions,
        node: Arc<dyn BlockNode>,
    ) -> Result<Arc<dyn BlockNode>, BlockError> {
        match &self.nodes {
            Some(nodes) => Ok(nodes.name(options, None, node)?),
            None if options.node_name.is_some() => Err(no_names()),
            None => Ok(node),
        }
    }

    /// The node that options refer to or describe.
    fn referred(
        &self,
        node: &NodeRef,
        chain: &mut Vec<(u64, u64)>,
    ) -> Result<Arc<dyn BlockNode>, BlockError> {
        match (node, &self.nodes) {
            (NodeRef::Node(options), _) => self.node(&as_file(options), chain),
            (NodeRef::Name(name), Some(nodes)) => Ok(nodes.find(name)?),
            (NodeRef::Name(name), None) => {
                Err(BlockError::Option(format!("Cannot find device='' nor node-name='{name}'")))
            }
            (NodeRef::None, _) => Err(BlockError::Option("a node is needed, not null".into())),
        }
    }

    fn bare_node(
        &self,
        options: &BlockdevOptions,
        chain: &mut Vec<(u64, u64)>,
    ) -> Result<Arc<dyn BlockNode>, BlockError> {
        Ok(looked_at(options, self.driver_node(options, chain)?))
    }

    fn driver_node(
        &self,
        options: &BlockdevOptions,
        chain: &mut Vec<(u64, u64)>,
    ) -> Result<Arc<dyn BlockNode>, BlockError> {
        let readonly = options.read_only.unwrap_or(!self.writable);
        let opener = Self {
            writable: self.writable && !readonly,
            share: options.force_share.unwrap_or(self.share),
            discard: options.discard.map_or(self.discard, |d| d == DiscardMode::Unmap),
            direct: options.cache.and_then(|c| c.direct).unwrap_or(self.direct),
            no_flush: options.cache.and_then(|c| c.no_flush).unwrap_or(self.no_flush),
            ..self.clone()
        };
        if let Some(driver) = options.driver.filter(|d| !d.is_format()) {
            options.check(driver)?;
            return opener.protocol_node(options, chain);
        }
        let below = match (&options.file, &options.filename) {
            (Some(NodeRef::Node(file)), None) => (**file).clone(),
            (None, Some(name)) => {
                BlockdevOptions { filename: Some(name.clone()), ..BlockdevOptions::default() }
            }
            (Some(name @ NodeRef::Name(_)), None) => {
                let file = opener.referred(name, chain)?;
                opener.above_read_only(&*file)?;
                return opener.format_node(options, file, chain);
            }
            _ => return Err(BlockError::Option("A block device must be specified for \"file\"".into())),
        };
        if below.driver.is_some_and(Driver::is_format) {
            let file = opener.node(&below, chain)?;
            return opener.format_node(options, file, chain);
        }
        let file = looked_at(&below, opener.protocol_node(&below, chain)?);
        let file = opener.named(&below, file)?;
        opener.format_node(options, file, chain)
    }

    /// Refuses to write through a node that cannot be written.
    fn above_read_only(&self, file: &dyn BlockNode) -> Result<(), BlockError> {
        if self.writable && file.is_readonly() {
            return Err(BlockError::Option("Block node is read-only".into()));
        }
        Ok(())
    }

    /// A node that lies over no other.
    fn protocol_node(
        &self,
        options: &BlockdevOptions,
        chain: &mut Vec<(u64, u64)>,
    ) -> Result<Arc<dyn BlockNode>, BlockError> {
        if options.driver == Some(Driver::Nbd) {
            return self.nbd(options).map(|n| -> Arc<dyn BlockNode> { n });
        }
        let web = options.driver.filter(|d| d.is_web()).or_else(|| match options.driver {
            None => options.filename.as_deref().and_then(http::scheme),
            Some(_) => None,
        });
        if let Some(driver) = web {
            let named = BlockdevOptions { filename: None, ..options.clone() };
            let named = BlockdevOptions { url: options.url.clone().or(options.filename.clone()), ..named };
            let options = if options.driver.is_none() { &named } else { options };
            options.check(driver)?;
            let writable = self.writable && options.auto_read_only != Some(true);
            return Http::open(driver, options, &self.objects, writable).map(|n| -> Arc<dyn BlockNode> { n });
        }
        if let (None, Some(name)) = (options.driver, &options.filename)
            && let Some((address, export)) = nbd::parse_uri(name)?
        {
            let options = BlockdevOptions { filename: None, ..options.clone() };
            options.check(Driver::Nbd)?;
            return self.nbd_at(&options, address, export).map(|n| -> Arc<dyn BlockNode> { n });
        }
        self.file_node(options, chain).map(|f| -> Arc<dyn BlockNode> { f })
    }

    fn nbd(&self, options: &BlockdevOptions) -> Result<Arc<Nbd>, BlockError> {
        options.check(Driver::Nbd)?;
        self.nbd_at(options, options.address()?, options.export.clone().unwrap_or_default())
    }

    fn nbd_at(
        &self,
        options: &BlockdevOptions,
        address: Address,
        export: String,
    ) -> Result<Arc<Nbd>, BlockError> {
        let tls = match &options.tls_creds {
            None if options.tls_hostname.is_some() => {
                return Err(BlockError::Option("tls-hostname not supported without tls-creds".into()));
            }
            None => None,
            Some(id) => {
                let config = self.objects.tls(id).and_then(|t| t.client());
                let config = config.map_err(|e| BlockError::Option(e.to_string()))?;
                let hostname = match (&options.tls_hostname, &address) {
                    (Some(name), _) | (None, Address::Tcp(name, _)) => name.clone(),
                    (None, Address::Unix(_)) => {
                        return Err(BlockError::Option(
                            "TLS over UNIX sockets needs tls-hostname: the name in the server's certificate"
                                .into(),
                        ));
                    }
                };
                Some(TlsClient { config, hostname })
            }
        };
        Nbd::open(ClientOptions {
            address,
            export,
            tls,
            context: options.x_dirty_bitmap.clone(),
            reconnect_delay: options.reconnect_delay.unwrap_or(0),
            open_timeout: options.open_timeout.unwrap_or(0),
            readonly: options.read_only.unwrap_or(!self.writable),
        })
    }

    fn file_node(
        &self,
        options: &BlockdevOptions,
        chain: &mut Vec<(u64, u64)>,
    ) -> Result<Arc<RawImage>, BlockError> {
        options.check(options.driver.unwrap_or(Driver::File))?;
        let name = options.filename.as_deref();
        let name =
            name.ok_or_else(|| BlockError::Option("The 'file' block driver requires a file name".into()))?;
        let path = plain_path(name)?;
        let lock = match options.locking {
            Some(Locking::Off) => LockRange::None,
            _ if self.share => LockRange::None,
            _ => self.lock,
        };
        let raw = RawOptions {
            readonly: options.read_only.unwrap_or(!self.writable),
            direct: options.cache.and_then(|c| c.direct).unwrap_or(self.direct),
            sparse: options.discard.map_or(self.discard, |d| d == DiscardMode::Unmap),
            io_uring: self.io_uring && options.aio != Some(Aio::Threads),
            no_flush: options.cache.and_then(|c| c.no_flush).unwrap_or(self.no_flush),
            lock,
            inactive: self.inactive(),
            name: self.name.clone(),
            ..RawOptions::new(path)
        };
        let image = match RawImage::open(raw.clone(), Arc::clone(&self.spawner)) {
            Err(BlockError::Open { source, .. })
                if options.auto_read_only == Some(true)
                    && !raw.readonly
                    && matches!(source.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) =>
            {
                RawImage::open(RawOptions { readonly: true, ..raw }, Arc::clone(&self.spawner))?
            }
            opened => opened?,
        };
        let id = image.identity();
        if chain.contains(&id) || chain.len() >= MAX_CHAIN {
            return Err(BlockError::Format(format!(
                "backing files of '{name}' refer to each other in a circle, or are too many"
            )));
        }
        chain.push(id);
        // What is another process's still is locked before it is written.
        let ours = self.writable && !self.inactive();
        if ours && !BlockNode::is_readonly(&*image) && lock != LockRange::None {
            // Locks of this process do not stand against each other where they have one file description.
            claim(id, image.path(), &image)?;
        }
        Ok(image)
    }

    fn format_node(
        &self,
        options: &BlockdevOptions,
        file: Arc<dyn BlockNode>,
        chain: &mut Vec<(u64, u64)>,
    ) -> Result<Arc<dyn BlockNode>, BlockError> {
        let driver = match options.driver {
            Some(driver) => driver,
            None => self.probe(&*file)?,
        };
        options.check(driver)?;
        if self.writable && self.inactive() && crate::foreign::is_foreign(driver) {
            return Err(BlockError::Unsupported(format!(
                "images of the format '{}' that are written do not migrate",
                driver.name()
            )));
        }
        match driver {
            Driver::Throttle => {
                let id = options.throttle_group.as_deref();
                let id =
                    id.ok_or_else(|| BlockError::Option("Parameter 'throttle-group' is missing".into()))?;
                let group = self.objects.throttle(id).map_err(|e| BlockError::Option(e.to_string()))?;
                Ok(Throttle::new(file, group))
            }
            Driver::Vdi => vdi::open(file, !self.writable),
            Driver::Vpc => vpc::open(file, !self.writable),
            Driver::Vhdx => {
                let access = if self.writable { vhdx::Access::Write } else { vhdx::Access::Read };
                vhdx::open(file, access)
            }
            Driver::Vmdk => self.vmdk(file, chain),
            Driver::Qcow2 => self.qcow2(options, file, chain).map(|n| -> Arc<dyn BlockNode> { n }),
            Driver::Luks => self.luks(options, file, chain).map(|n| -> Arc<dyn BlockNode> { n }),
            _ => {
                let offset = options.offset.unwrap_or(0);
                RawFormat::new(file, offset, options.size, !self.writable)
                    .map(|n| -> Arc<dyn BlockNode> { n })
            }
        }
    }

    /// Finds out the format of a file.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] for a format that is recognised but cannot be read; the host's.
    pub fn probe(&self, file: &dyn BlockNode) -> Result<Driver, BlockError> {
        let mut first = [0; PROBE];
        let read = file.read_at(0, &mut first);
        read.map_err(|source| BlockError::Host {
            path: file.path().unwrap_or_default(),
            what: "Could not read image for determining its format",
            source,
        })?;
        let driver = probe(&first)?;
        if driver == Driver::Raw && self.writable {
            tracing::warn!(
                path = crate::node::shown(file),
                "the image's format was not given and it looks raw: a guest can make it look like another format; give the format"
            );
        }
        Ok(driver)
    }

    fn vmdk(
        &self,
        file: Arc<dyn BlockNode>,
        chain: &mut Vec<(u64, u64)>,
    ) -> Result<Arc<dyn BlockNode>, BlockError> {
        let directory = file.path().and_then(|p| p.parent().map(Path::to_owned)).unwrap_or_default();
        let access = if self.writable { vmdk::Access::Write } else { vmdk::Access::Read };
        vmdk::open(file, access, &mut |name| {
            self.refuse_reference("extent", name)?;
            let options =
                BlockdevOptions { filename: Some(beside(&directory, name)), ..BlockdevOptions::default() };
            self.node(&as_file(&options), chain)
        })
    }

    fn luks(
        &self,
        options: &BlockdevOptions,
        file: Arc<dyn BlockNode>,
        chain: &mut Vec<(u64, u64)>,
    ) -> Result<Arc<Luks>, BlockError> {
        let header = options.header.as_ref().map(|node| self.referred(node, chain)).transpose()?;
        let password = match &options.key_secret {
            Some(id) => Some(self.objects.password(id).map_err(|e| BlockError::Option(e.to_string()))?),
            None if self.metadata_only => None,
            None => return Err(BlockError::Option("Parameter 'key-secret' is required for cipher".into())),
        };
        Luks::open(file, header, password.as_ref().map(|p| p.bytes()), !self.writable)
    }

    /// The cipher of a qcow2 image, if it is encrypted.
    fn qcow2_cipher(
        &self,
        options: &BlockdevOptions,
        header: &qcow2::header::Header,
        file: &dyn BlockNode,
    ) -> Result<Option<qcow2::Key>, BlockError> {
        let encrypt = options.encrypt.as_ref();
        let is = match header.crypt_method {
            2 => "luks",
            1 if self.for_vm => {
                return Err(BlockError::Unsupported(
                    "Use of AES-CBC encrypted qcow2 images is no longer supported in system emulators\nYou can use 'qemu-img convert' to convert your image to an alternative supported format, such as unencrypted qcow2, or raw with the LUKS format instead."
                        .into(),
                ));
            }
            1 => "aes",
            0 if encrypt.is_some() => {
                return Err(BlockError::Option(
                    "No encryption in image header, but options specified format".into(),
                ));
            }
            // What is said of others is said by the image.
            _ => return Ok(None),
        };
        if let Some(format) = encrypt.and_then(|e| e.format.as_deref()).filter(|f| *f != is) {
            return Err(BlockError::Option(format!(
                "Header reported '{is}' encryption format but options specify '{format}'"
            )));
        }
        let Some(id) = encrypt.and_then(|e| e.key_secret.as_deref()) else {
            if self.metadata_only {
                return Ok(None);
            }
            return Err(BlockError::Option("Parameter 'encrypt.key-secret' is required for cipher".into()));
        };
        let password = self.objects.password(id).map_err(|e| BlockError::Option(e.to_string()))?;
        if header.crypt_method == 1 {
            return Ok(Some(qcow2::Key::legacy(password.bytes())));
        }
        let volume = Volume { node: file, base: header.crypto_offset()? };
        let luks = volume.header()?;
        let master = volume.unlock(&luks, password.bytes())?;
        qcow2::Key::new(luks.cipher, master).map(Some)
    }

    fn qcow2(
        &self,
        options: &BlockdevOptions,
        file: Arc<dyn BlockNode>,
        chain: &mut Vec<(u64, u64)>,
    ) -> Result<Arc<Qcow2>, BlockError> {
        let header = qcow2::read_header(&*file)?;
        let directory = file.path().and_then(|p| p.parent().map(Path::to_owned)).unwrap_or_default();
        let data = match &options.data_file {
            Some(node) => Some(self.referred(node, chain)?),
            None => match &header.data_file {
                Some(name) if header.has_data_file() && !self.metadata_only => {
                    self.refuse_reference("data file", name)?;
                    // Relative to the working directory: that is how all tools take it.
                    let node = BlockdevOptions { filename: Some(name.clone()), ..BlockdevOptions::default() };
                    Some(self.node(&as_file(&node), chain)?)
                }
                _ => None,
            },
        };
        let backing = match &options.backing {
            Some(NodeRef::Node(node)) => Some(self.below().node(node, chain)?),
            Some(NodeRef::None) => None,
            Some(NodeRef::Name(name)) if name.is_empty() => None,
            Some(name @ NodeRef::Name(_)) => Some(self.referred(name, chain)?),
            None => self.named_backing(&header, &directory, chain)?,
        };
        let open = qcow2::OpenOptions {
            key: self.qcow2_cipher(options, &header, &*file)?,
            readonly: !self.writable,
            inactive: self.inactive(),
            metadata_only: self.metadata_only,
            for_check: self.for_check,
            guess_preallocation: !self.for_vm,
            discard: self.discard,
            pass_discard: options.pass_discard_request.unwrap_or(self.discard),
            l2_cache: options.l2_cache_size.unwrap_or(qcow2::OpenOptions::default().l2_cache),
            refcount_cache: options
                .refcount_cache_size
                .unwrap_or(qcow2::OpenOptions::default().refcount_cache),
        };
        Qcow2::open(file, data, backing, &open)
    }

    fn named_backing(
        &self,
        header: &qcow2::header::Header,
        directory: &Path,
        chain: &mut Vec<(u64, u64)>,
    ) -> Result<Option<Arc<dyn BlockNode>>, BlockError> {
        let Some(name) = header.backing_file.as_deref().filter(|_| self.backing != Backing::Ignore) else {
            return Ok(None);
        };
        self.refuse_reference("backing file", name)?;
        let driver = header.backing_format.as_deref().map(Driver::from_name).transpose()?;
        let options = named(&beside(directory, name), driver)?;
        let opened = self.below().node(&options, chain);
        opened.map(Some).map_err(|e| match e {
            BlockError::Open { path, source } => {
                BlockError::Host { path, what: "Could not open backing file", source }
            }
            other => other,
        })
    }

    fn refuse_reference(&self, what: &str, name: &str) -> Result<(), BlockError> {
        if self.backing == Backing::Refuse {
            return Err(BlockError::Unsupported(format!(
                "the image refers to the {what} '{name}', and it is not allowed to open other files (a disk's backing_files=on allows it; a node's options name them)"
            )));
        }
        Ok(())
    }
}

/// A node whose writes are looked at for zeroes, if its options say so.
fn looked_at(options: &BlockdevOptions, node: Arc<dyn BlockNode>) -> Arc<dyn BlockNode> {
    match options.detect_zeroes {
        None | Some(DetectZeroes::Off) => node,
        Some(how) => detect::DetectZeroes::new(node, how == DetectZeroes::Unmap),
    }
}

fn no_names() -> BlockError {
    BlockError::Option("'node-name' is not supported here: there is no graph of named nodes".into())
}

/// A node that is a file unless its options say otherwise.
fn as_file(options: &BlockdevOptions) -> BlockdevOptions {
    let is_remote = |n: &str| http::scheme(n).is_some() || matches!(nbd::parse_uri(n), Ok(Some(_)));
    let remote = options.filename.as_deref().is_some_and(is_remote);
    let driver = if remote { None } else { options.driver.or(Some(Driver::File)) };
    BlockdevOptions { driver, ..options.clone() }
}

/// The options that a file name stands for.
///
/// # Errors
/// [`BlockError::Option`] if they cannot be read.
pub fn named(name: &str, driver: Option<Driver>) -> Result<BlockdevOptions, BlockError> {
    if let Some(json) = name.strip_prefix("json:") {
        let mut options = BlockdevOptions::from_json(json)?;
        options.driver = options.driver.or(driver);
        return Ok(options);
    }
    Ok(BlockdevOptions::of_file(name, driver))
}

/// A path out of a file name, which may have a protocol before it.
fn plain_path(name: &str) -> Result<PathBuf, BlockError> {
    if let Some(path) = name.strip_prefix("file:") {
        return Ok(PathBuf::from(path));
    }
    match name.split_once(':') {
        // A colon behind a slash is part of the path.
        Some((protocol, _))
            if !protocol.is_empty()
                && protocol.chars().all(|c| c.is_ascii_alphanumeric() || "+-_".contains(c)) =>
        {
            Err(BlockError::Unsupported(format!("Unknown protocol '{protocol}'")))
        }
        _ => Ok(PathBuf::from(name)),
    }
}

/// A name that an image in `directory` refers to.
pub fn beside(directory: &Path, name: &str) -> String {
    let protocol = name.starts_with("json:") || plain_path(name).is_err();
    let name = if protocol { name } else { name.strip_prefix("file:").unwrap_or(name) };
    if protocol || Path::new(name).is_absolute() || directory.as_os_str().is_empty() {
        return name.to_owned();
    }
    directory.join(name).display().to_string()
}

/// Files that an image's chain refers to, and whether they are written with it: for a sandbox that has to know them before
/// they are opened. Nothing is locked.
///
/// # Errors
/// [`BlockError`] for what cannot be opened or read.
pub fn referenced_files(path: &Path, spawner: &Arc<dyn Spawner>) -> Result<Vec<(PathBuf, bool)>, BlockError> {
    let mut out = Vec::new();
    let mut next = Some((path.to_owned(), None));
    while let Some((path, driver)) = next.take() {
        if out.len() > MAX_CHAIN {
            return Err(BlockError::Format("too many backing files, or a circle of them".into()));
        }
        let options =
            RawOptions { readonly: true, lock: LockRange::None, io_uring: false, ..RawOptions::new(&path) };
        let file = RawImage::open(options, Arc::clone(spawner))?;
        let mut first = [0; PROBE];
        let read = BlockNode::read_at(&*file, 0, &mut first);
        read.map_err(|source| BlockError::Host {
            path: path.clone(),
            what: "Could not read its header",
            source,
        })?;
        let kind = match driver {
            Some(driver) => driver,
            None => probe(&first)?,
        };
        if kind == Driver::Vmdk {
            let directory = path.parent().map(Path::to_owned).unwrap_or_default();
            let top = out.is_empty();
            for name in vmdk::extent_files(&*file)? {
                out.push((plain_path(&beside(&directory, &name))?, top));
            }
        }
        if kind != Driver::Qcow2 {
            break;
        }
        let header = qcow2::read_header(&*file)?;
        let directory = path.parent().map(Path::to_owned).unwrap_or_default();
        if let Some(name) = header.data_file.as_ref().filter(|_| header.has_data_file()) {
            out.push((plain_path(name)?, out.is_empty()));
        }
        if let Some(name) = &header.backing_file {
            let below = plain_path(&beside(&directory, name))?;
            out.push((below.clone(), false));
            next = Some((below, header.backing_format.as_deref().map(Driver::from_name).transpose()?));
        }
    }
    Ok(out)
}

/// Images that this process has open for writing.
static WRITERS: Mutex<Option<Writers>> = Mutex::new(None);
/// By device and inode.
type Writers = HashMap<(u64, u64), Weak<RawImage>>;

fn claim(id: (u64, u64), path: &Path, image: &Arc<RawImage>) -> Result<(), BlockError> {
    let mut table = WRITERS.lock();
    let writers = table.get_or_insert_with(HashMap::new);
    writers.retain(|_, w| w.strong_count() != 0);
    if let Some(holder) = writers.get(&id).and_then(Weak::upgrade) {
        let holder = holder.name().to_owned();
        return Err(BlockError::Held { path: path.to_owned(), holder });
    }
    writers.insert(id, Arc::downgrade(image));
    Ok(())
}
