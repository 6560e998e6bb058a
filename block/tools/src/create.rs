//! `create`, and making target images for other commands.

use std::path::Path;
use std::sync::Arc;

use holdfast_block::graph::{Opener, beside};
use holdfast_block::node::Preallocation;
use holdfast_block::options::{Driver, split_pairs};
use holdfast_block::qcow2::header::Compression;
use holdfast_block::qcow2::{self, CreateOptions};
use holdfast_block::raw::{LockRange, RawImage, RawOptions};
use holdfast_block::{BlockError, BlockNode};
use holdfast_block::{foreign, luks};
use holdfast_threads::PlainSpawner;

use crate::common::{ImgError, Result, Source, failed, password, print, refused, size_argument};

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the new image
    #[arg(short, long, default_value = "raw")]
    format: String,
    /// Format-specific options; `-o help` lists them
    #[arg(short, long = "options")]
    options: Vec<String>,
    /// The backing file
    #[arg(short, long)]
    backing: Option<String>,
    /// The backing file's format
    #[arg(short = 'F', long)]
    backing_format: Option<String>,
    /// Do not open the backing file
    #[arg(short = 'u', long = "backing-unsafe")]
    unsafe_backing: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// The image
    filename: Option<String>,
    /// Size of the disk; the backing file's if absent
    size: Option<String>,
}

const QCOW2_HELP: &str = "Supported qcow2 options:
  backing_file=<str>     - File name of a base image
  backing_fmt=<str>      - Image format of the base image
  cluster_size=<size>    - qcow2 cluster size
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  compression_type=<str> - Compression method used for image cluster compression
  data_file=<str>        - File name of an external data file
  data_file_raw=<bool (on/off)> - The external data file must stay valid as a raw image
  encrypt.cipher-alg=<str> - Name of encryption cipher algorithm
  encrypt.cipher-mode=<str> - Name of encryption cipher mode
  encrypt.format=<str>   - Encrypt the image, format choices: 'luks'
  encrypt.hash-alg=<str> - Name of encryption hash algorithm
  encrypt.iter-time=<num> - Time to spend in PBKDF in milliseconds
  encrypt.ivgen-alg=<str> - Name of IV generator algorithm
  encrypt.ivgen-hash-alg=<str> - Name of IV generator hash algorithm
  encrypt.key-secret=<str> - ID of the secret that is the LUKS passphrase
  extended_l2=<bool (on/off)> - Extended L2 tables
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  preallocation=<str>    - Preallocation mode (allowed values: off, metadata, falloc, full)
  refcount_bits=<num>    - Width of a reference count entry in bits
  size=<size>            - Virtual disk size
";
const LUKS_HELP: &str = "Supported luks options:
  cipher-alg=<str>       - Name of encryption cipher algorithm
  cipher-mode=<str>      - Name of encryption cipher mode
  detached-header=<bool (on/off)> - The file is to have the header alone
  hash-alg=<str>         - Name of encryption hash algorithm
  iter-time=<num>        - Time to spend in PBKDF in milliseconds
  ivgen-alg=<str>        - Name of IV generator algorithm
  ivgen-hash-alg=<str>   - Name of IV generator hash algorithm
  key-secret=<str>       - ID of the secret that provides the keyslot passphrase
  preallocation=<str>    - Preallocation mode (allowed values: off, falloc, full)
  size=<size>            - Virtual disk size
";
const RAW_HELP: &str = "Supported raw options:
  preallocation=<str>    - Preallocation mode (allowed values: off, falloc, full)
  size=<size>            - Virtual disk size
";

/// What a new image is to be.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) driver: Driver,
    pub(crate) options: CreateOptions,
    /// What other programs' formats take.
    foreign: foreign::CreateOptions,
    /// The size as options give it.
    pub(crate) size: Option<u64>,
    /// The version as options give it.
    compat: Option<String>,
    /// Options of encryption, without `encrypt.`, as they are given.
    encrypt: Vec<(String, String)>,
    /// The header has a file of its own.
    detached: bool,
}

/// Options of encryption, in the order in which they are shown.
const ENCRYPT_OPTIONS: [&str; 8] = [
    "format",
    "key-secret",
    "cipher-alg",
    "cipher-mode",
    "ivgen-alg",
    "ivgen-hash-alg",
    "hash-alg",
    "iter-time",
];

fn on_off(key: &str, value: &str) -> Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => refused(format!("Parameter '{key}' expects 'on' or 'off'")),
    }
}

/// The help text if options ask for it.
pub(crate) fn options_help(driver: Driver, options: &[String]) -> Option<&'static str> {
    let asked =
        options.iter().flat_map(|o| split_pairs(o)).any(|(k, v)| v.is_none() && (k == "help" || k == "?"));
    asked.then_some(match driver {
        Driver::Qcow2 => QCOW2_HELP,
        Driver::Luks => LUKS_HELP,
        other => foreign::help(other).unwrap_or(RAW_HELP),
    })
}

/// Formats that images can be made of.
pub(crate) fn target_driver(name: &str) -> Result<Driver> {
    match Driver::from_name(name) {
        Ok(driver) if driver.is_format() && driver != Driver::Throttle => Ok(driver),
        _ => refused(format!("Unknown file format '{name}'")),
    }
}

impl Target {
    pub(crate) fn new(driver: Driver) -> Self {
        Self {
            driver,
            options: CreateOptions::new(0),
            foreign: foreign::CreateOptions::default(),
            size: None,
            compat: None,
            encrypt: Vec::new(),
            detached: false,
        }
    }

    /// Takes options as `-o` gives them.
    pub(crate) fn apply(&mut self, options: &[String]) -> Result<()> {
        for (key, value) in options.iter().flat_map(|o| split_pairs(o)) {
            let Some(value) = value else { return refused(format!("Expected '=' after parameter '{key}'")) };
            if key != "size" && foreign::is_foreign(self.driver) {
                self.foreign.set(self.driver, &key, &value).map_err(|e| ImgError::Refused(e.to_string()))?;
                continue;
            }
            if self.common(&key, &value)? {
                continue;
            }
            if self.driver == Driver::Luks {
                match key.as_str() {
                    "detached-header" => self.detached = on_off(&key, &value)?,
                    "format" => return refused("Invalid parameter 'format'"),
                    _ => self.encryption(&key, &value)?,
                }
                continue;
            }
            if self.driver != Driver::Qcow2 {
                return refused(format!("Invalid parameter '{key}'"));
            }
            self.qcow2(&key, &value)?;
        }
        Ok(())
    }

    fn common(&mut self, key: &str, value: &str) -> Result<bool> {
        match key {
            "size" => self.size = Some(size_argument(value, "image size")?),
            "preallocation" => {
                let how = Preallocation::from_name(value);
                let how = how.filter(|h| self.driver == Driver::Qcow2 || *h != Preallocation::Metadata);
                self.options.preallocation = how.ok_or_else(|| {
                    ImgError::Refused(format!("Invalid parameter '{value}' for preallocation"))
                })?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn qcow2(&mut self, key: &str, value: &str) -> Result<()> {
        let o = &mut self.options;
        match key {
            "backing_file" => o.backing_file = Some(value.to_owned()),
            "backing_fmt" => o.backing_format = Some(value.to_owned()),
            "cluster_size" => o.cluster_size = size_argument(value, "cluster size")?,
            "compat" => {
                o.version = match value {
                    "v2" | "0.10" => 2,
                    "v3" | "1.1" => 3,
                    other => return refused(format!("Invalid parameter '{other}' for compat")),
                };
                self.compat = Some(value.to_owned());
            }
            "compression_type" => {
                o.compression = match value {
                    "zlib" => Compression::Zlib,
                    "zstd" => Compression::Zstd,
                    other => return refused(format!("Invalid parameter '{other}' for compression_type")),
                }
            }
            "data_file" => o.data_file = Some(value.to_owned()),
            "data_file_raw" => o.data_file_raw = on_off(key, value)?,
            "extended_l2" => o.extended_l2 = on_off(key, value)?,
            "lazy_refcounts" => o.lazy_refcounts = on_off(key, value)?,
            "refcount_bits" => {
                let bits = value.parse().ok();
                o.refcount_bits =
                    bits.ok_or_else(|| ImgError::Refused(format!("Parameter '{key}' expects a number")))?;
            }
            "encryption" if value == "off" => {}
            "encryption" => {
                return refused(
                    "'encryption' means the format 'aes', which is not made any more: use encrypt.format=luks",
                );
            }
            _ if key.starts_with("encrypt.") => {
                self.encryption(key.strip_prefix("encrypt.").unwrap_or(key), value)?;
            }
            _ => return refused(format!("Invalid parameter '{key}'")),
        }
        Ok(())
    }

    /// Takes an option of encryption.
    fn encryption(&mut self, key: &str, value: &str) -> Result<()> {
        if !ENCRYPT_OPTIONS.contains(&key) {
            return refused(format!("Invalid parameter '{key}'"));
        }
        self.encrypt.retain(|(k, _)| k != key);
        self.encrypt.push((key.to_owned(), value.to_owned()));
        Ok(())
    }

    fn encrypt_option(&self, key: &str) -> Option<&str> {
        self.encrypt.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// How contents are to be encrypted, if they are.
    fn luks(&self) -> Result<Option<luks::CreateOptions>> {
        if self.encrypt.is_empty() && self.driver != Driver::Luks {
            return Ok(None);
        }
        match (self.driver, self.encrypt_option("format")) {
            (Driver::Qcow2, Some("luks")) | (Driver::Luks, _) => {}
            (_, Some("aes")) => {
                return refused(
                    "images encrypted in the format 'aes' are not made any more: use encrypt.format=luks",
                );
            }
            (_, Some(other)) => return refused(format!("Unknown encryption format {other}")),
            (_, None) => return refused("Parameter 'encrypt.format' is missing"),
        }
        let mut options = luks::CreateOptions::default();
        for (key, value) in &self.encrypt {
            if key != "format" && key != "key-secret" {
                options.set(key, value).map_err(|e| ImgError::Refused(e.to_string()))?;
            }
        }
        Ok(Some(options))
    }

    /// Bytes before the data of a LUKS volume.
    pub(crate) fn luks_payload(&self) -> Result<u64> {
        let options = self.luks()?.unwrap_or_default();
        options.payload().map_err(|e| ImgError::Refused(e.to_string()))
    }

    /// Puts what is known of encryption into the options of qcow2 images.
    pub(crate) fn settle(&mut self) -> Result<()> {
        if self.driver == Driver::Qcow2 {
            self.options.encrypt = self.luks()?;
        }
        Ok(())
    }

    /// True if what was never written of the image, `node`, does not read as zeroes.
    pub(crate) fn starts_as_noise(&self, node: &Arc<dyn BlockNode>) -> bool {
        let ahead = self.options.preallocation != Preallocation::Off || self.foreign.fixed;
        let data = node.as_qcow2().and_then(|image| image.external_data());
        self.driver == Driver::Luks
            || (ahead && !self.encrypt.is_empty())
            || ((ahead || self.driver == Driver::Raw) && on_device(node))
            || data.is_some_and(|data| on_device(&data))
    }

    /// The options that open the image that was made.
    pub(crate) fn key_secret(&self) -> Option<&str> {
        self.encrypt_option("key-secret")
    }

    fn password(&self) -> Result<Option<Arc<holdfast_objects::Secret>>> {
        let prefix = if self.driver == Driver::Luks { "" } else { "encrypt." };
        match self.key_secret() {
            Some(id) => password(id).map(Some),
            None if self.driver == Driver::Luks || !self.encrypt.is_empty() => {
                refused(format!("Parameter '{prefix}key-secret' is required for cipher"))
            }
            None => Ok(None),
        }
    }

    fn make_luks(&self, file: Arc<dyn BlockNode>) -> std::result::Result<Arc<dyn BlockNode>, MakeError> {
        let options = self.luks()?.unwrap_or_default();
        let password = self.password()?;
        let password = password.as_ref().map(|p| p.bytes()).unwrap_or_default();
        if self.detached {
            luks::format(&luks::Volume { node: &*file, base: 0 }, &options, password, true)?;
            return Ok(file);
        }
        let how = (self.options.size, self.options.preallocation);
        Ok(luks::create(file, &options, how, password)?)
    }

    fn make_foreign(
        &self,
        file: Arc<dyn BlockNode>,
        name: &str,
        no_flush: bool,
    ) -> Result<Arc<dyn BlockNode>> {
        let path = Path::new(name.strip_prefix("file:").unwrap_or(name));
        let directory = path.parent().map(Path::to_owned).unwrap_or_default();
        let short = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut failed = None;
        let made =
            foreign::create(self.driver, (file, &short), self.options.size, &self.foreign, &mut |part| {
                new_file(&beside(&directory, part), no_flush).map_err(|e| {
                    let text = e.to_string();
                    failed = Some(e);
                    BlockError::Option(text)
                })
            });
        match (made, failed) {
            (_, Some(error)) => Err(error),
            (Ok(node), None) => Ok(node),
            (Err(BlockError::Option(text)), None) => refused(format!("{name}: {text}")),
            (Err(source), None) => {
                Err(ImgError::Image { what: "error while creating", name: name.to_owned(), source })
            }
        }
    }

    /// Makes the image and opens it for writing.
    pub(crate) fn make(&self, name: &str, no_flush: bool) -> Result<Arc<dyn BlockNode>> {
        let fail = |source| ImgError::Image { what: "error while creating", name: name.to_owned(), source };
        let password = self.password()?;
        let file = new_file(name, no_flush)?;
        if self.driver == Driver::Luks {
            return self.make_luks(file).map_err(|e| match e {
                MakeError::Image(source) => fail(source),
                MakeError::Img(error) => error,
            });
        }
        if foreign::is_foreign(self.driver) {
            return self.make_foreign(file, name, no_flush);
        }
        if self.driver != Driver::Qcow2 {
            let size = self.options.size;
            file.truncate(size, self.options.preallocation)
                .map_err(failed(format!("{name}: cannot be made {size} bytes long")))?;
            let raw = holdfast_block::format::RawFormat::new(file, 0, None, false).map_err(fail)?;
            return Ok(raw);
        }
        let data: Option<Arc<dyn BlockNode>> = match &self.options.data_file {
            Some(data) => {
                let data = new_file(data, no_flush)?;
                let how = self.options.preallocation;
                let how = if how == Preallocation::Metadata { Preallocation::Off } else { how };
                data.truncate(self.options.size, how).map_err(failed("the data file cannot be made"))?;
                Some(data)
            }
            None => None,
        };
        let image =
            qcow2::create(file, data, &self.options, password.as_ref().map(|p| p.bytes())).map_err(fail)?;
        Ok(image)
    }
}

/// True if a node's bytes are a block device's, which has what was there before.
fn on_device(node: &Arc<dyn BlockNode>) -> bool {
    let mut bottom = Arc::clone(node);
    while let Some(below) = bottom.file() {
        bottom = below;
    }
    bottom.driver() == Driver::HostDevice.name()
}

/// Why an image cannot be made.
enum MakeError {
    Image(BlockError),
    Img(ImgError),
}

impl From<BlockError> for MakeError {
    fn from(error: BlockError) -> Self {
        Self::Image(error)
    }
}

impl From<ImgError> for MakeError {
    fn from(error: ImgError) -> Self {
        Self::Img(error)
    }
}

fn new_file(name: &str, no_flush: bool) -> Result<Arc<dyn BlockNode>> {
    let path = name.strip_prefix("file:").unwrap_or(name);
    let options = RawOptions { create: true, no_flush, lock: LockRange::Qemu, ..RawOptions::new(path) };
    let opened = RawImage::open(options, PlainSpawner::shared());
    let file = opened.map_err(|source| ImgError::Image {
        what: "Could not create",
        name: name.to_owned(),
        source,
    })?;
    Ok(file)
}

/// Finds out the size from the backing file and checks that it can be opened.
pub(crate) fn check_backing(target: &mut Target, name: &str, open: bool) -> Result<()> {
    let Some(backing) = target.options.backing_file.clone() else { return Ok(()) };
    let Some(format) = target.options.backing_format.clone() else {
        return refused(format!("{name}: Backing file specified without backing format"));
    };
    if Driver::from_name(&format).is_err() {
        return refused(format!("{name}: Unknown backing file format '{format}'"));
    }
    if !open {
        return Ok(());
    }
    let directory = Path::new(name).parent().map(Path::to_owned).unwrap_or_default();
    let place = beside(&directory, &backing);
    let same =
        std::fs::canonicalize(&place).ok().zip(std::fs::canonicalize(name).ok()).is_some_and(|(a, b)| a == b);
    if same {
        return refused(format!(
            "{name}: Error: Trying to create an image with the same filename as the backing file"
        ));
    }
    let opener =
        Opener { share: true, objects: crate::common::objects(), ..Opener::reading(PlainSpawner::shared()) };
    let node = Source::new(&place, Some(&format)).open_with(&opener)?;
    if target.size.is_none() {
        target.size = Some(node.size());
    }
    Ok(())
}

fn formatting(name: &str, target: &Target) -> String {
    let o = &target.options;
    let onoff = |b: bool| if b { "on" } else { "off" };
    let mut text = format!("Formatting '{name}', fmt={}", target.driver.name());
    let encryption = |prefix: &str| -> String {
        let given = ENCRYPT_OPTIONS.iter().filter_map(|k| target.encrypt_option(k).map(|v| (k, v)));
        given.map(|(k, v)| format!(" {prefix}{k}={v}")).collect()
    };
    if target.driver != Driver::Qcow2 {
        text += &format!(" size={}", o.size);
        text += &target.foreign.shown(target.driver);
        text += &encryption("");
        if target.detached {
            text += " detached-header=on";
        }
        if o.preallocation != Preallocation::Off {
            text += &format!(" preallocation={}", o.preallocation.name());
        }
        return text + "\n";
    }
    text += &encryption("encrypt.");
    text += &format!(" cluster_size={} extended_l2={}", o.cluster_size, onoff(o.extended_l2));
    if o.preallocation != Preallocation::Off {
        text += &format!(" preallocation={}", o.preallocation.name());
    }
    text += &format!(" compression_type={} size={}", o.compression.name(), o.size);
    if let Some(backing) = &o.backing_file {
        text += &format!(" backing_file={backing}");
        text += &o.backing_format.as_ref().map(|f| format!(" backing_fmt={f}")).unwrap_or_default();
    }
    if let Some(data) = &o.data_file {
        text += &format!(" data_file={data} data_file_raw={}", onoff(o.data_file_raw));
    }
    text += &target.compat.as_ref().map(|c| format!(" compat={c}")).unwrap_or_default();
    text + &format!(" lazy_refcounts={} refcount_bits={}\n", onoff(o.lazy_refcounts), o.refcount_bits)
}

/// `create`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let driver = target_driver(&args.format)?;
    if let Some(help) = options_help(driver, &args.options) {
        print(help)?;
        return Ok(0);
    }
    let Some(name) = &args.filename else { return refused("Expecting image file name") };
    let named = |e: ImgError| ImgError::Refused(format!("{name}: {e}"));
    let mut target = Target::new(driver);
    target.apply(&args.options).map_err(named)?;
    if args.backing.is_some() && driver != Driver::Qcow2 {
        return refused(format!("{name}: Backing file not supported for file format '{}'", driver.name()));
    }
    target.options.backing_file = args.backing.clone().or(target.options.backing_file);
    target.options.backing_format = args.backing_format.clone().or(target.options.backing_format);
    if let Some(size) = &args.size {
        target.size = Some(size_argument(size, "image size")?);
    }
    check_backing(&mut target, name, !args.unsafe_backing)?;
    target.settle().map_err(named)?;
    if target.detached && target.size.is_none() {
        target.size = Some(0);
    }
    let Some(size) = target.size else {
        return refused(format!("{name}: Image creation needs a size parameter"));
    };
    target.options.size = size.next_multiple_of(512);
    if !args.quiet {
        print(&formatting(name, &target))?;
    }
    target.make(name, false)?;
    Ok(0)
}
