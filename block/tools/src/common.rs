//! What commands share: opening images, errors, progress, numbers.

use std::io::{self, IsTerminal as _, Write};
use std::sync::{Arc, OnceLock};

use clap::ValueEnum;
use holdfast_block::graph::Opener;
use holdfast_block::options::{BlockdevOptions, DetectZeroes, Driver, parse_size};
use holdfast_block::qcow2::{self, CreateOptions, Qcow2};
use holdfast_block::raw::{RawImage, RawOptions};
use holdfast_block::{BlockError, BlockNode};
use holdfast_objects::throttle::Limits;
use holdfast_objects::{Objects, ThrottleGroup};
use holdfast_threads::PlainSpawner;
use serde_json::Value;

/// A command that could not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum ImgError {
    /// An image cannot be opened or made.
    #[error("{what} '{name}': {}", explain(source))]
    Image {
        /// What was tried.
        what: &'static str,
        /// The image as it was named.
        name: String,
        /// Why not.
        source: BlockError,
    },
    /// Reading or writing failed.
    #[error("{what}: {}", errno(source))]
    Io {
        /// What was tried.
        what: String,
        /// What the host said.
        source: io::Error,
    },
    /// It cannot be done.
    #[error("{0}")]
    Refused(String),
    /// It cannot be done, and there is an exit status that says so.
    #[error("{text}")]
    Status {
        /// Why.
        text: String,
        /// The status.
        status: u8,
    },
}

impl ImgError {
    /// The exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::Status { status, .. } => *status,
            _ => 1,
        }
    }
}

pub(crate) type Result<T> = std::result::Result<T, ImgError>;

pub(crate) fn refused<T>(text: impl Into<String>) -> Result<T> {
    Err(ImgError::Refused(text.into()))
}

/// The objects of the command line.
static OBJECTS: OnceLock<Arc<Objects>> = OnceLock::new();

/// The objects that `--object` made.
pub(crate) fn objects() -> Arc<Objects> {
    Arc::clone(OBJECTS.get_or_init(Arc::default))
}

/// Makes the objects of the command line.
pub(crate) fn make_objects(texts: &[String]) -> Result<()> {
    let objects = objects();
    texts.iter().try_for_each(|t| objects.add_text(t)).map_err(|e| ImgError::Refused(e.to_string()))
}

/// The password that a secret is.
pub(crate) fn password(id: &str) -> Result<Arc<holdfast_objects::Secret>> {
    objects().password(id).map_err(|e| ImgError::Refused(e.to_string()))
}

/// Makes an error of the host's one of a command.
pub(crate) fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> ImgError {
    let what = what.into();
    move |source| ImgError::Io { what, source }
}

/// The system's words for an error, without its number.
pub(crate) fn errno(error: &io::Error) -> String {
    let text = error.to_string();
    match error.raw_os_error() {
        Some(code) => text.strip_suffix(&format!(" (os error {code})")).map(str::to_owned).unwrap_or(text),
        None => text,
    }
}

/// An error with its causes on one line.
pub(crate) fn explain(error: &BlockError) -> String {
    match error {
        BlockError::Open { path, source } => {
            format!("Could not open '{}': {}", path.display(), errno(source))
        }
        BlockError::Host { path, what, source } => format!("{}: {what}: {}", path.display(), errno(source)),
        other => other.to_string(),
    }
}

/// The shape of a command's output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

/// How the source image is named and opened.
#[derive(Debug, Clone, Default)]
pub(crate) struct Source<'a> {
    pub(crate) name: &'a str,
    pub(crate) format: Option<&'a str>,
    pub(crate) image_opts: bool,
    pub(crate) share: bool,
    pub(crate) cache: Option<&'a str>,
    pub(crate) detect_zeroes: Option<DetectZeroes>,
}

impl<'a> Source<'a> {
    pub(crate) fn new(name: &'a str, format: Option<&'a str>) -> Self {
        Self { name, format, ..Self::default() }
    }

    /// What opens it.
    pub(crate) fn opener(&self, writable: bool) -> Result<Opener> {
        let mut opener = Opener {
            writable,
            share: self.share,
            objects: objects(),
            ..Opener::reading(PlainSpawner::shared())
        };
        (opener.direct, opener.no_flush) = cache_mode(self.cache.unwrap_or("writeback"))?;
        Ok(opener)
    }

    fn options(&self) -> std::result::Result<BlockdevOptions, BlockError> {
        let mut options = if self.image_opts {
            BlockdevOptions::from_pairs(self.name)?
        } else {
            let driver = self.format.map(Driver::from_name).transpose()?;
            holdfast_block::graph::named(self.name, driver)?
        };
        options.detect_zeroes = options.detect_zeroes.or(self.detect_zeroes);
        Ok(options)
    }

    pub(crate) fn open_with(&self, opener: &Opener) -> Result<Arc<dyn BlockNode>> {
        if self.image_opts && self.format.is_some() {
            return refused("--image-opts and --format are mutually exclusive");
        }
        let opened = self.options().and_then(|o| opener.open(&o));
        let node = opened.map_err(|source| ImgError::Image {
            what: "Could not open",
            name: self.name.to_owned(),
            source,
        })?;
        if opener.writable && self.format.is_none() && !self.image_opts && node.driver() == "raw" {
            eprintln!("WARNING: Image format was not specified for '{}' and probing guessed raw.", self.name);
            eprintln!(
                "         Automatically detecting the format is dangerous for raw images: give it with -f."
            );
        }
        Ok(node)
    }

    pub(crate) fn open(&self, writable: bool) -> Result<Arc<dyn BlockNode>> {
        self.open_with(&self.opener(writable)?)
    }
}

/// The qcow2 image that a node is.
pub(crate) fn qcow2<'a>(node: &'a Arc<dyn BlockNode>, what: &str) -> Result<&'a Qcow2> {
    match node.as_qcow2() {
        Some(image) => Ok(image),
        None => refused(format!("{what} is not supported by the format '{}'", node.driver())),
    }
}

/// Direct and no-flush of a cache mode's name.
pub(crate) fn cache_mode(name: &str) -> Result<(bool, bool)> {
    match name {
        "none" | "off" => Ok((true, false)),
        "writeback" => Ok((false, false)),
        "writethrough" | "directsync" => {
            refused(format!("the cache mode '{name}' is not supported by this version"))
        }
        "unsafe" => Ok((false, true)),
        other => refused(format!("Invalid cache option: {other}")),
    }
}

/// A temporary qcow2 image over `below`, which takes the writes. Its file has no name any more and goes with the node.
pub(crate) fn overlay(below: Arc<dyn BlockNode>, readonly: bool) -> Result<Arc<dyn BlockNode>> {
    if readonly {
        // Nobody writes: there is nothing to be kept apart.
        return Ok(below);
    }
    let directory = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), std::path::PathBuf::from);
    let path = directory.join(format!("vl.{}.{}", std::process::id(), holdfast_clock::host_monotonic()));
    let fail = || failed(format!("cannot make a temporary file in {}", directory.display()));
    std::fs::OpenOptions::new().write(true).create_new(true).open(&path).map_err(fail())?;
    let options = RawOptions { no_flush: true, ..RawOptions::new(&path) };
    let file = RawImage::open(options, PlainSpawner::shared());
    let gone = std::fs::remove_file(&path);
    let wrong = |source| ImgError::Image {
        what: "Could not create a temporary overlay in",
        name: directory.display().to_string(),
        source,
    };
    let file = file.map_err(wrong)?;
    gone.map_err(fail())?;
    let options = CreateOptions::new(below.size().next_multiple_of(512));
    let image = qcow2::create(file, None, &options, None).map_err(wrong)?;
    image.set_backing(Some(below));
    Ok(image)
}

/// Looks at an `aio` mode; true for io_uring. `wrong` says what there is to say of a mode that does not exist.
pub(crate) fn check_aio(
    mode: Option<&str>,
    cache: &str,
    wrong: fn(&str) -> String,
    name: &str,
) -> Result<Option<bool>> {
    match mode {
        None => Ok(None),
        Some("threads") => Ok(Some(false)),
        Some("io_uring") => Ok(Some(true)),
        Some("native") if !matches!(cache, "none" | "off" | "directsync") => refused(format!(
            "Could not open '{name}': aio=native was specified, but it requires cache.direct=on, which was not specified."
        )),
        Some("native") => refused("aio=native was specified, but is not supported in this build."),
        Some(other) => refused(wrong(other)),
    }
}

/// A limit of the bytes written in a second; none for 0.
pub(crate) fn rate_limit(text: Option<&str>) -> Result<Option<Arc<ThrottleGroup>>> {
    let Some(text) = text else { return Ok(None) };
    let invalid = || ImgError::Refused(format!("Invalid rate limit specified: '{text}'."));
    let average = parse_size(text).filter(|n| *n <= i64::MAX as u64).ok_or_else(invalid)?;
    let mut limits = Limits::default();
    limits.set("bps-write", average);
    limits.check().map_err(|e| ImgError::Refused(e.to_string()))?;
    Ok((average != 0).then(|| ThrottleGroup::new(limits)))
}

/// A size argument.
pub(crate) fn size_argument(text: &str, what: &str) -> Result<u64> {
    match parse_size(text) {
        Some(n) if n <= i64::MAX as u64 => Ok(n),
        Some(_) => refused(format!("{what} '{text}' is too large: it must be less than 8 EiB")),
        None => refused(format!(
            "Invalid {what} specified: '{text}'. You may use k, M, G, T, P or E suffixes for kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        )),
    }
}

/// `%0.3g` of C.
fn three_digits(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let digits = value.abs().log10().floor() as i32;
    if digits >= 3 {
        let mantissa = format!("{:.2}", value / 10f64.powi(digits));
        let mantissa = mantissa.trim_end_matches('0').trim_end_matches('.');
        return format!("{mantissa}e+{digits:02}");
    }
    let text = format!("{value:.*}", (2 - digits).max(0) as usize);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A number of bytes for people: three digits and a binary unit.
pub(crate) fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    // The next unit from 1000 on, so that there are never four digits.
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", three_digits(value), UNITS.get(unit).unwrap_or(&"B"))
}

/// Prints JSON as other tools do: four columns deep.
pub(crate) fn print_json(value: &Value) -> Result<()> {
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    serde::Serialize::serialize(value, &mut serializer).map_err(|e| ImgError::Refused(e.to_string()))?;
    out.push(b'\n');
    print_bytes(&out)
}

/// Writes to standard output. A reader that has seen enough is no error.
pub(crate) fn print_bytes(bytes: &[u8]) -> Result<()> {
    match io::stdout().write_all(bytes) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(failed("cannot write to standard output")(e)),
        _ => Ok(()),
    }
}

pub(crate) fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

/// How long work takes, in nanoseconds, before a person who did not ask is told how far it is.
const PATIENCE: u64 = 1_000_000_000;

/// Who is told how far work is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    /// Nobody.
    No,
    /// Who asked for it, on standard output.
    Asked,
    /// Who sits at the terminal that standard error is, from this time of the host's clock on.
    Watching(u64),
}

/// How far long work is.
#[derive(Debug)]
pub(crate) struct Progress {
    told: Told,
    total: u64,
    done: u64,
    shown: u64,
}

impl Progress {
    /// Work on `total` bytes by a command with `-p` and `-q`, or without.
    pub(crate) fn new((asked, quiet): (bool, bool), total: u64) -> Self {
        let told = match (quiet, asked) {
            (true, _) => Told::No,
            (false, true) => Told::Asked,
            (false, false) if io::stderr().is_terminal() => {
                Told::Watching(holdfast_clock::host_monotonic().saturating_add(PATIENCE))
            }
            (false, false) => Told::No,
        };
        let mut progress = Self { told, total, done: 0, shown: u64::MAX };
        progress.add(0);
        progress
    }

    pub(crate) fn add(&mut self, bytes: u64) {
        self.done += bytes;
        match self.told {
            Told::No => return,
            Told::Watching(from) if holdfast_clock::host_monotonic() < from => return,
            _ => {}
        }
        let part = if self.total == 0 {
            10_000
        } else {
            (u128::from(self.done) * 10_000 / u128::from(self.total)) as u64
        };
        if self.shown == u64::MAX || part / 10 != self.shown / 10 {
            self.shown = part;
            let text = format!("    ({}.{:02}/100%)\r", part / 100, part % 100);
            // It is no less done if nobody can be told.
            let _ = match self.told {
                Told::Asked => write!(io::stdout(), "{text}").and_then(|()| io::stdout().flush()),
                _ => write!(io::stderr(), "{text}"),
            };
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        match self.told {
            Told::Asked => println!(),
            // What comes next begins on an empty line.
            Told::Watching(_) if self.shown != u64::MAX => eprint!("{:20}\r", ""),
            _ => {}
        }
    }
}
