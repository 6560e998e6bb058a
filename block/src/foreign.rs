//! Making images of other programs' formats.

use std::io;
use std::sync::Arc;

use crate::node::Preallocation;
use crate::options::{Driver, parse_size};
use crate::{BlockError, BlockNode, vdi, vhdx, vmdk, vpc};

/// Kinds of VMDK images (`subformat`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VmdkKind {
    /// One sparse file.
    #[default]
    MonolithicSparse,
    /// A descriptor and one flat file.
    MonolithicFlat,
    /// A descriptor and sparse files of at most 2 GiB.
    TwoGbMaxExtentSparse,
    /// A descriptor and flat files of at most 2 GiB.
    TwoGbMaxExtentFlat,
    /// One compressed file.
    StreamOptimized,
}

impl VmdkKind {
    const ALL: [Self; 5] = [
        Self::MonolithicSparse,
        Self::MonolithicFlat,
        Self::TwoGbMaxExtentSparse,
        Self::TwoGbMaxExtentFlat,
        Self::StreamOptimized,
    ];

    /// The name in options and descriptors.
    pub fn name(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::MonolithicFlat => "monolithicFlat",
            Self::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Self::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
            Self::StreamOptimized => "streamOptimized",
        }
    }

    /// True if extents have no tables.
    pub fn is_flat(self) -> bool {
        matches!(self, Self::MonolithicFlat | Self::TwoGbMaxExtentFlat)
    }

    /// True if extents are of 2 GiB at most.
    pub fn is_split(self) -> bool {
        matches!(self, Self::TwoGbMaxExtentSparse | Self::TwoGbMaxExtentFlat)
    }

    /// True if the descriptor is within the only file.
    pub fn is_one_file(self) -> bool {
        matches!(self, Self::MonolithicSparse | Self::StreamOptimized)
    }
}

/// How to make an image. Each format takes its own of these.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// VDI `static`, VHD and VHDX `subformat=fixed`: all blocks have their place at once.
    pub fixed: bool,
    /// How much of a fixed image is allocated on the host.
    pub preallocation: Preallocation,
    /// VHD: the disk has the size that was asked for, and not that of a geometry.
    pub force_size: bool,
    /// VHDX: bytes of the log.
    pub log_size: u64,
    /// VHDX: bytes of a block; 0 for what suits the size.
    pub block_size: u64,
    /// VHDX: blocks without data are of the state ZERO and not NOT_PRESENT.
    pub block_state_zero: bool,
    /// VMDK: the kind.
    pub vmdk: VmdkKind,
    /// VMDK: the adapter that the descriptor names.
    pub adapter: String,
    /// VMDK: the descriptor is of hardware version 6.
    pub compat6: bool,
    /// VMDK: the hardware version.
    pub hwversion: Option<String>,
    /// VMDK: the version of the guest's tools.
    pub toolsversion: Option<String>,
    /// VMDK: grains of zeroes take no space.
    pub zeroed_grain: bool,
    /// What was given, for messages, in order.
    pub(crate) given: Vec<(String, String)>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            fixed: false,
            preallocation: Preallocation::Off,
            force_size: false,
            log_size: 1 << 20,
            block_size: 0,
            block_state_zero: true,
            vmdk: VmdkKind::default(),
            adapter: "ide".to_owned(),
            compat6: false,
            hwversion: None,
            toolsversion: None,
            zeroed_grain: false,
            given: Vec::new(),
        }
    }
}

const VDI_HELP: &str = "Supported vdi options:
  preallocation=<str>    - Preallocation mode (allowed values: off, metadata)
  size=<size>            - Virtual disk size
  static=<bool (on/off)> - VDI static (pre-allocated) image
";
const VPC_HELP: &str = "Supported vpc options:
  force_size=<bool (on/off)> - Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based calculation
  size=<size>            - Virtual disk size
  subformat=<str>        - Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed}
";
const VHDX_HELP: &str = "Supported vhdx options:
  block_size=<size>      - Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.
  block_state_zero=<bool (on/off)> - Blocks without data are of the state ZERO, which is the default, or NOT_PRESENT
  log_size=<size>        - Log size; min 1MB.
  size=<size>            - Virtual disk size; max of 64TB.
  subformat=<str>        - VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.
";
const VMDK_HELP: &str = "Supported vmdk options:
  adapter_type=<str>     - Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX
  compat6=<bool (on/off)> - VMDK version 6 image
  hwversion=<str>        - VMDK hardware version
  size=<size>            - Virtual disk size
  subformat=<str>        - VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized}
  toolsversion=<str>     - VMware guest tools version
  zeroed_grain=<bool (on/off)> - Enable efficient zero writes using the zeroed-grain GTE feature
";

/// True if the format is one of those that are made here.
pub fn is_foreign(driver: Driver) -> bool {
    matches!(driver, Driver::Vdi | Driver::Vhdx | Driver::Vmdk | Driver::Vpc)
}

/// The help for options of a format that is made here.
pub fn help(driver: Driver) -> Option<&'static str> {
    match driver {
        Driver::Vdi => Some(VDI_HELP),
        Driver::Vpc => Some(VPC_HELP),
        Driver::Vhdx => Some(VHDX_HELP),
        Driver::Vmdk => Some(VMDK_HELP),
        _ => None,
    }
}

fn bad<T>(text: impl Into<String>) -> Result<T, BlockError> {
    Err(BlockError::Option(text.into()))
}

fn on_off(key: &str, value: &str) -> Result<bool, BlockError> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => bad(format!("Parameter '{key}' expects 'on' or 'off'")),
    }
}

impl CreateOptions {
    /// Takes an option by QEMU's name.
    ///
    /// # Errors
    /// [`BlockError::Option`] that names it.
    pub fn set(&mut self, driver: Driver, key: &str, value: &str) -> Result<(), BlockError> {
        let wrong = || bad(format!("Parameter '{key}' does not accept value '{value}'"));
        let number =
            || parse_size(value).map_or_else(|| bad(format!("Parameter '{key}' expects a size")), Ok);
        match (driver, key) {
            (Driver::Vdi, "static") => self.fixed = on_off(key, value)?,
            (Driver::Vdi, "preallocation") => match value {
                "off" => self.fixed = false,
                "metadata" => self.fixed = true,
                _ => {
                    return bad(format!(
                        "Preallocation mode '{value}' is not supported for the format 'vdi'"
                    ));
                }
            },
            (Driver::Vpc | Driver::Vhdx, "subformat") => match value {
                "dynamic" => self.fixed = false,
                "fixed" => self.fixed = true,
                _ => return wrong(),
            },
            (Driver::Vpc, "force_size") => self.force_size = on_off(key, value)?,
            (Driver::Vhdx, "log_size") => self.log_size = number()?,
            (Driver::Vhdx, "block_size") => self.block_size = number()?,
            (Driver::Vhdx, "block_state_zero") => self.block_state_zero = on_off(key, value)?,
            (Driver::Vmdk, "subformat") => {
                let kind = VmdkKind::ALL.into_iter().find(|k| k.name().eq_ignore_ascii_case(value));
                self.vmdk =
                    kind.ok_or_else(|| BlockError::Option(format!("invalid parameter value: {value}")))?;
            }
            (Driver::Vmdk, "adapter_type") => {
                let known = ["ide", "lsilogic", "buslogic", "legacyESX"];
                let known = known.into_iter().find(|k| k.eq_ignore_ascii_case(value));
                self.adapter = match known {
                    Some(known) => known.to_owned(),
                    None => return bad(format!("invalid parameter value: {value}")),
                };
            }
            (Driver::Vmdk, "compat6") => self.compat6 = on_off(key, value)?,
            (Driver::Vmdk, "zeroed_grain") => self.zeroed_grain = on_off(key, value)?,
            (Driver::Vmdk, "hwversion" | "toolsversion") => {
                if value.is_empty() || !value.chars().all(|c| c.is_ascii_alphanumeric() || c == '.') {
                    return wrong();
                }
                let place = if key == "hwversion" { &mut self.hwversion } else { &mut self.toolsversion };
                *place = Some(value.to_owned());
            }
            _ => return bad(format!("Invalid parameter '{key}'")),
        }
        self.given.retain(|(k, _)| k != key);
        self.given.push((key.to_owned(), value.to_owned()));
        Ok(())
    }

    /// What `create` says of the options, behind the size.
    pub fn shown(&self, driver: Driver) -> String {
        let given = |key: &str| self.given.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
        // In the order of the formats' lists of options, with the defaults that QEMU shows.
        let keys: &[(&str, Option<&str>)] = match driver {
            Driver::Vdi => &[("static", Some("off")), ("preallocation", None)],
            Driver::Vpc => &[("subformat", None), ("force_size", None)],
            Driver::Vhdx => &[
                ("log_size", Some("1048576")),
                ("block_size", Some("0")),
                ("subformat", None),
                ("block_state_zero", None),
            ],
            Driver::Vmdk => &[
                ("adapter_type", None),
                ("compat6", Some("off")),
                ("hwversion", Some("undefined")),
                ("toolsversion", None),
                ("subformat", None),
                ("zeroed_grain", None),
            ],
            _ => &[],
        };
        let mut out = String::new();
        for (key, default) in keys {
            let value = given(key).map(|v| match *key {
                "log_size" | "block_size" => parse_size(&v).unwrap_or(0).to_string(),
                _ => v,
            });
            if let Some(value) = value.or_else(|| default.map(str::to_owned)) {
                out += &format!(" {key}={value}");
            }
        }
        out
    }
}

/// Makes an image of a disk of `size` bytes in the empty file called `name`, and opens it for writing. `extent` makes other
/// files of the image by their names beside it.
///
/// # Errors
/// [`BlockError::Option`] for what the format cannot do; the host's.
pub fn create(
    driver: Driver,
    (file, name): (Arc<dyn BlockNode>, &str),
    size: u64,
    options: &CreateOptions,
    extent: vmdk::NewExtent<'_>,
) -> Result<Arc<dyn BlockNode>, BlockError> {
    match driver {
        Driver::Vdi => {
            vdi::create(&file, size, options)?;
            vdi::open(file, false)
        }
        Driver::Vpc => {
            vpc::create(&file, size, options)?;
            vpc::open(file, false)
        }
        Driver::Vhdx => {
            vhdx::create(&file, size, options)?;
            vhdx::open(file, vhdx::Access::Write)
        }
        Driver::Vmdk => vmdk::create(file, name, size, options, extent),
        other => bad(format!("images of the format '{}' are not made here", other.name())),
    }
}

pub(crate) fn host(file: &dyn BlockNode, what: &'static str) -> impl FnOnce(io::Error) -> BlockError {
    let path = file.path().unwrap_or_default();
    move |source| BlockError::Host { path, what, source }
}

/// Writes a part of a new image.
pub(crate) fn write(file: &dyn BlockNode, at: u64, bytes: &[u8]) -> Result<(), BlockError> {
    file.write_at(at, bytes).map_err(host(file, "could not write the new image"))
}

/// Makes a new image's file at least `size` bytes long.
pub(crate) fn grow(file: &dyn BlockNode, size: u64, how: Preallocation) -> Result<(), BlockError> {
    if file.size() >= size {
        return Ok(());
    }
    file.truncate(size, how).map_err(host(file, "could not make the new image long enough"))
}

/// Bytes that nobody can guess, for identifiers.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], BlockError> {
    let mut bytes = [0; N];
    crate::luks::random(&mut bytes)?;
    Ok(bytes)
}
