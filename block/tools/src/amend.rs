//! `amend`.

use std::sync::Arc;

use holdfast_block::BlockNode;
use holdfast_block::graph::Backing;
use holdfast_block::luks::SlotChange;
use holdfast_block::node::Preallocation;
use holdfast_block::options::{Driver, split_pairs};

use crate::common::{ImgError, Progress, Result, Source, errno, explain, password, print, qcow2, refused};
use crate::create::options_help;

/// Arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the image; found out if absent
    #[arg(short, long)]
    format: Option<String>,
    /// The options to change; `-o help` lists them
    #[arg(short, required = true)]
    options: Vec<String>,
    /// Cache mode
    #[arg(short = 't', long)]
    cache: Option<String>,
    /// Show how far it is: there is nothing that takes long
    #[arg(short, long)]
    progress: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// The last password may be taken away, one that is in use replaced
    #[arg(long)]
    force: bool,
    /// The image is given by options
    #[arg(long)]
    image_opts: bool,
    /// The image
    filename: String,
}

const LUKS_HELP: &str = "Amend options for 'luks':
  iter-time=<num>        - Time to spend in PBKDF in milliseconds
  keyslot=<num>          - Select a single keyslot to modify explicitly
  new-secret=<str>       - New secret to set in the matching keyslots. Empty string to erase
  old-secret=<str>       - Select all keyslots that match this password
  state=<str>            - Select new state of affected keyslots (active/inactive)
";
const QCOW2_HELP: &str = "Amend options for 'qcow2':
  backing_file=<str>     - File name of a base image
  backing_fmt=<str>      - Image format of the base image
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  data_file_raw=<bool (on/off)> - The external data file must stay valid as a raw image
  encrypt.iter-time=<num> - Time to spend in PBKDF in milliseconds
  encrypt.keyslot=<num>  - Select a single keyslot to modify explicitly
  encrypt.new-secret=<str> - New secret to set in the matching keyslots. Empty string to erase
  encrypt.old-secret=<str> - Select all keyslots that match this password
  encrypt.state=<str>    - Select new state of affected keyslots (active/inactive)
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  size=<size>            - Virtual disk size
";

/// A change of key slots.
#[derive(Debug, Default)]
struct Slots {
    activate: Option<bool>,
    slot: Option<usize>,
    old: Option<String>,
    new: Option<String>,
    iter_time: Option<u64>,
    /// There are no other options.
    all: bool,
}

impl Slots {
    fn set(&mut self, key: &str, value: String) -> Result<()> {
        let bad = |value: &str| ImgError::Refused(format!("Invalid parameter '{value}' for {key}"));
        match key {
            "state" => {
                self.activate = Some(match value.as_str() {
                    "active" => true,
                    "inactive" => false,
                    other => return Err(bad(other)),
                });
            }
            "keyslot" => self.slot = Some(value.parse().map_err(|_| bad(&value))?),
            "iter-time" => self.iter_time = Some(value.parse().map_err(|_| bad(&value))?),
            "old-secret" => self.old = Some(value),
            "new-secret" => self.new = Some(value).filter(|v| !v.is_empty()),
            _ => return refused(format!("Invalid parameter '{key}'")),
        }
        Ok(())
    }

    fn apply(&self, node: &Arc<dyn BlockNode>, force: bool) -> Result<()> {
        let secret = |id: &Option<String>| id.as_deref().map(password).transpose();
        let (old, new) = (secret(&self.old)?, secret(&self.new)?);
        let Some(activate) = self.activate else { return refused("Parameter 'state' is missing") };
        if self.iter_time.is_some() && !activate {
            return refused("'iter-time' must not be given when erasing keyslots");
        }
        let change = SlotChange {
            activate,
            slot: self.slot,
            old: old.as_ref().map(|s| s.bytes()),
            new: new.as_ref().map(|s| s.bytes()),
            iter_time: self.iter_time.unwrap_or(2000),
            force,
        };
        let done = match (node.as_luks(), node.as_qcow2()) {
            (Some(luks), _) => luks.change_slots(&change),
            (None, Some(image)) => image.change_slots(&change),
            _ => return refused(format!("the format '{}' has no key slots", node.driver())),
        };
        done.map_err(|e| ImgError::Refused(format!("Error while amending options: {}", explain(&e))))
    }
}

/// The change of key slots that options ask for.
fn slot_options(args: &Args, driver: &str) -> Result<Option<Slots>> {
    let prefix = if driver == "luks" { "" } else { "encrypt." };
    let mut slots = Slots { all: true, ..Slots::default() };
    let mut any = driver == "luks";
    for (key, value) in args.options.iter().flat_map(|o| split_pairs(o)) {
        match (key.strip_prefix(prefix), value) {
            (Some(key), Some(value)) => {
                slots.set(key, value)?;
                any = true;
            }
            (Some(_), None) => return refused(format!("Expected '=' after parameter '{key}'")),
            (None, _) => slots.all = false,
        }
    }
    Ok(any.then_some(slots))
}

/// `amend`.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let format = args.format.as_deref().and_then(|f| Driver::from_name(f).ok()).unwrap_or(Driver::Qcow2);
    if options_help(format, &args.options).is_some() {
        print(if format == Driver::Luks { LUKS_HELP } else { QCOW2_HELP })?;
        return Ok(0);
    }
    let source = Source {
        image_opts: args.image_opts,
        cache: args.cache.as_deref(),
        ..Source::new(&args.filename, args.format.as_deref())
    };
    let mut opener = source.opener(true)?;
    opener.backing = Backing::Ignore;
    let node = source.open_with(&opener)?;
    let slots = slot_options(args, node.driver())?;
    if let Some(slots) = &slots {
        slots.apply(&node, args.force)?;
        if slots.all {
            return Ok(0);
        }
    }
    let image = qcow2(&node, "Format driver option amendment")?;
    let mut header = image.header();
    let mut size = None;
    let (mut backing, mut downgrade) = (false, false);
    let fail = |e: std::io::Error| ImgError::Refused(format!("Error while amending options: {}", errno(&e)));
    for (key, value) in args.options.iter().flat_map(|o| split_pairs(o)) {
        let Some(value) = value else { return refused(format!("Expected '=' after parameter '{key}'")) };
        let on = matches!(value.as_str(), "on" | "yes" | "true" | "y");
        match key.as_str() {
            "size" => size = Some(crate::common::size_argument(&value, "image size")?),
            "compat" => match (value.as_str(), header.version) {
                ("0.10" | "v2", 2) => {}
                ("1.1" | "v3", _) => image.upgrade().map_err(fail)?,
                // Last, since what version 2 does not have may be taken away by other options.
                ("0.10" | "v2", _) => downgrade = true,
                _ => return refused(format!("Unknown compatibility level {value}")),
            },
            "lazy_refcounts" => image.set_lazy_refcounts(on).map_err(fail)?,
            "data_file_raw" => image.set_data_file_raw(on).map_err(fail)?,
            "backing_file" => {
                header.backing_file = Some(value).filter(|v| !v.is_empty());
                backing = true;
            }
            "backing_fmt" => {
                header.backing_format = Some(value).filter(|v| !v.is_empty());
                backing = true;
            }
            _ if slots.is_some() && key.starts_with("encrypt.") => {}
            "cluster_size" | "preallocation" | "compression_type" | "extended_l2" | "refcount_bits"
            | "data_file" => {
                return refused(format!(
                    "Cannot amend '{key}': it is not supported to change it in an existing image"
                ));
            }
            _ => return refused(format!("Invalid parameter '{key}'")),
        }
    }
    if backing {
        image.set_backing_name(header.backing_file, header.backing_format).map_err(fail)?;
    }
    if let Some(size) = size {
        node.truncate(size.next_multiple_of(512), Preallocation::Off).map_err(fail)?;
    }
    if downgrade {
        image.downgrade().map_err(fail)?;
    }
    image.close().map_err(fail)?;
    if args.progress && !args.quiet {
        drop(Progress::new((true, false), 0));
    }
    Ok(0)
}
