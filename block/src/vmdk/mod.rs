//! VMware's VMDK images ("Virtual Disk Format" 5.0): flat, sparse and stream-optimised extents, alone or with a descriptor.
//! Stream-optimised ones are written as they are made, and read after that.

mod create;
mod sparse;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use create::{NewExtent, create};

use crate::facts::{ImageInfoSpecific, VmdkExtentInfo, VmdkInfo};
use crate::mapped::{Map, Mapped, Place, Run, bad, read_part};
use crate::{BlockError, BlockNode};
use sparse::Sparse;

/// Longest descriptor, in bytes.
const MAX_DESCRIPTOR: u64 = 1 << 20;
/// Most extents.
const MAX_EXTENTS: usize = 4096;

#[derive(Debug)]
enum Kind {
    /// Bytes of a file from an offset on.
    Flat(Arc<dyn BlockNode>, u64),
    Sparse(Box<Sparse>),
    Zero,
}

#[derive(Debug)]
struct Extent {
    start: u64,
    len: u64,
    kind: Kind,
}

#[derive(Debug)]
struct Vmdk {
    /// Where the descriptor is.
    file: Arc<dyn BlockNode>,
    size: u64,
    extents: Vec<Extent>,
    /// The descriptor, and where it starts in the file.
    descriptor: (String, u64),
    /// It has been told that the contents change.
    begun: AtomicBool,
}

/// What an image is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading and writing.
    Write,
    /// Writing what is new: compressed extents take data once.
    Fill,
}

/// Opens another file of the image by its name in the descriptor.
pub type OpenExtent<'a> = &'a mut dyn FnMut(&str) -> Result<Arc<dyn BlockNode>, BlockError>;

/// Opens an image.
///
/// # Errors
/// [`BlockError::Format`], [`BlockError::Unsupported`] with what is wrong or not known; those of `extent`.
pub fn open(
    file: Arc<dyn BlockNode>,
    access: Access,
    extent: OpenExtent<'_>,
) -> Result<Arc<dyn BlockNode>, BlockError> {
    let mut descriptor = (String::new(), 0);
    let magic = read_part(&*file, 0, 512.min(file.size()), "Could not read the VMDK header")?;
    let extents = if magic.starts_with(b"KDMV") {
        let sparse = Sparse::open(Arc::clone(&file))?;
        if let Some(found) = sparse.descriptor()? {
            refuse_parent(&found.0)?;
            descriptor = found;
        }
        vec![Extent { start: 0, len: sparse.size(), kind: Kind::Sparse(Box::new(sparse)) }]
    } else if magic.starts_with(b"# Disk DescriptorFile") {
        let bytes =
            read_part(&*file, 0, file.size().min(MAX_DESCRIPTOR), "Could not read the VMDK descriptor")?;
        descriptor.0 = String::from_utf8_lossy(&bytes).into_owned();
        described(&descriptor.0, extent)?
    } else if magic.starts_with(b"COWD") {
        return Err(BlockError::Unsupported(
            "VMDK images of ESX (COWD) are not supported by this version".into(),
        ));
    } else {
        return bad("Image not in VMDK format");
    };
    let size = extents.last().map_or(0, |e| e.start + e.len);
    for extent in extents.iter().filter(|_| access != Access::Read) {
        if let Kind::Sparse(sparse) = &extent.kind {
            if access == Access::Write && sparse.is_compressed() {
                return Err(BlockError::Unsupported(
                    "streamOptimized VMDK images are written once, when they are made".into(),
                ));
            }
            sparse.prepare_to_write()?;
        }
    }
    let begun = AtomicBool::new(access == Access::Fill);
    let map = Vmdk { file: Arc::clone(&file), size, extents, descriptor, begun };
    Ok(Mapped::new(file, map, access == Access::Read))
}

/// The value of a line of a descriptor.
fn line<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|l| l.trim().strip_prefix(key)?.strip_prefix('='))
        .map(|v| v.trim().trim_matches('"'))
}

fn refuse_parent(text: &str) -> Result<(), BlockError> {
    match line(text, "parentCID") {
        None => Ok(()),
        Some(cid) if cid.eq_ignore_ascii_case("ffffffff") => Ok(()),
        Some(_) => Err(BlockError::Unsupported(
            "VMDK images that build on another one are not supported by this version".into(),
        )),
    }
}

/// Names of the files that an image consists of besides its own, as its descriptor has them.
///
/// # Errors
/// [`BlockError::Host`] if it cannot be read.
pub fn extent_files(file: &dyn BlockNode) -> Result<Vec<String>, BlockError> {
    let bytes = read_part(file, 0, file.size().min(MAX_DESCRIPTOR), "Could not read the VMDK descriptor")?;
    if !bytes.starts_with(b"# Disk DescriptorFile") {
        return Ok(Vec::new());
    }
    let text = String::from_utf8_lossy(&bytes);
    let names = extent_lines(&text).filter_map(|l| Some(l.split_once('"')?.1.split_once('"')?.0.to_owned()));
    Ok(names.take(MAX_EXTENTS).collect())
}

fn extent_lines(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().map(str::trim);
    lines.filter(|l| ["RW ", "RDONLY ", "NOACCESS "].iter().any(|a| l.starts_with(a)))
}

/// The extents of a descriptor: `ACCESS SECTORS TYPE "FILE" OFFSET`.
fn described(text: &str, open: OpenExtent<'_>) -> Result<Vec<Extent>, BlockError> {
    refuse_parent(text)?;
    let mut out: Vec<Extent> = Vec::new();
    for line in extent_lines(text) {
        let wrong = || BlockError::Format(format!("Invalid extent line: {line}"));
        let (head, tail) = line.split_once('"').unwrap_or((line, ""));
        let mut head = head.split_whitespace();
        let (_, sectors, kind) = (head.next(), head.next(), head.next().ok_or_else(wrong)?);
        let sectors: u64 =
            sectors.and_then(|s| s.parse().ok()).filter(|n| *n <= 1 << 42).ok_or_else(wrong)?;
        let (name, rest) = tail.split_once('"').unwrap_or(("", ""));
        let len = sectors * 512;
        let kind = match kind {
            "ZERO" => Kind::Zero,
            "FLAT" => {
                let offset: u64 = rest.trim().parse().ok().filter(|n| *n <= 1 << 42).ok_or_else(wrong)?;
                Kind::Flat(open(name)?, offset * 512)
            }
            "SPARSE" => {
                let sparse = Sparse::open(open(name)?)?;
                if sparse.size() < len {
                    return bad(format!("the VMDK extent '{name}' is smaller than the descriptor says"));
                }
                Kind::Sparse(Box::new(sparse))
            }
            other => {
                return Err(BlockError::Unsupported(format!(
                    "VMDK extents of the type '{other}' are not supported"
                )));
            }
        };
        let start = out.last().map_or(0, |e| e.start + e.len);
        if out.len() == MAX_EXTENTS || start.checked_add(len).is_none_or(|e| e > i64::MAX as u64) {
            return bad("VMDK descriptor with too many or too large extents");
        }
        out.push(Extent { start, len, kind });
    }
    if out.is_empty() { bad("VMDK descriptor without extents") } else { Ok(out) }
}

impl Map for Vmdk {
    fn driver(&self) -> &'static str {
        "vmdk"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn locate(&self, offset: u64) -> io::Result<Run> {
        let n = self.extents.partition_point(|e| e.start <= offset).saturating_sub(1);
        let Some(extent) = self.extents.get(n) else { return Ok(Run { place: Place::Zero, len: 1 }) };
        let within = offset - extent.start;
        let rest = extent.len.saturating_sub(within);
        let run = match &extent.kind {
            Kind::Zero => Run { place: Place::Zero, len: rest },
            Kind::Flat(file, at) => Run { place: Place::Data(Arc::clone(file), at + within), len: rest },
            Kind::Sparse(sparse) => {
                let mut run = sparse.locate(within)?;
                // Which extent it is of has to be told again.
                if let Place::Packed { unit, .. } = &mut run.place {
                    *unit |= (n as u64) << 48;
                }
                run
            }
        };
        Ok(Run { len: run.len.min(rest), ..run })
    }

    fn unpack(&self, unit: u64) -> io::Result<Arc<Vec<u8>>> {
        match self.extents.get((unit >> 48) as usize).map(|e| &e.kind) {
            Some(Kind::Sparse(sparse)) => sparse.unpack(unit & ((1 << 48) - 1)),
            _ => Err(io::Error::from_raw_os_error(libc::EIO)),
        }
    }

    fn begin(&self) -> io::Result<()> {
        if self.begun.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        // Who builds on this image knows it by this number.
        let (text, start) = &self.descriptor;
        let Some(old) = line(text, "CID").filter(|c| c.len() == 8) else { return Ok(()) };
        let at = text
            .find(&format!("CID={old}"))
            .filter(|at| *at == 0 || text.as_bytes().get(at - 1) == Some(&b'\n'));
        let Some(at) = at else { return Ok(()) };
        let new = u32::from_le_bytes(crate::foreign::random().map_err(io::Error::other)?);
        self.file.write_at(start + at as u64 + 4, format!("{new:08x}").as_bytes())
    }

    fn allocate(&self, offset: u64) -> io::Result<()> {
        match self.sparse_at(offset) {
            Some((sparse, within)) => sparse.allocate(within),
            None => Err(io::Error::from_raw_os_error(libc::EROFS)),
        }
    }

    fn forget(&self, offset: u64) -> io::Result<bool> {
        self.sparse_at(offset).map_or(Ok(false), |(sparse, within)| sparse.forget(within))
    }

    fn pack(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self.sparse_at(offset) {
            Some((sparse, within)) if sparse.is_compressed() => sparse.pack(within, data),
            _ => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "Compression not supported for this VMDK subformat",
            )),
        }
    }

    fn packed_unit(&self) -> Option<u64> {
        self.extents.iter().find_map(|e| match &e.kind {
            Kind::Sparse(sparse) if sparse.is_compressed() => Some(sparse.grain()),
            _ => None,
        })
    }

    fn unit(&self) -> Option<u64> {
        self.extents.iter().find_map(|e| match &e.kind {
            Kind::Sparse(sparse) => Some(sparse.grain()),
            _ => None,
        })
    }

    fn flush(&self, file: &dyn BlockNode) -> io::Result<()> {
        file.flush()?;
        self.extents.iter().try_for_each(|extent| match &extent.kind {
            Kind::Flat(file, _) => file.flush(),
            Kind::Sparse(sparse) => sparse.file().flush(),
            Kind::Zero => Ok(()),
        })
    }

    fn specific(&self) -> Option<ImageInfoSpecific> {
        let text = &self.descriptor.0;
        let number = |key| line(text, key).and_then(|v| u32::from_str_radix(v, 16).ok());
        let alone = matches!(self.extents.as_slice(), [Extent { kind: Kind::Sparse(s), .. }] if Arc::ptr_eq(s.file(), &self.file));
        let extent = |extent: &Extent| {
            let (file, format, sparse) = match &extent.kind {
                Kind::Flat(file, _) => (Some(file), "FLAT", None),
                Kind::Sparse(s) => (Some(s.file()), if alone { "" } else { "SPARSE" }, Some(s)),
                Kind::Zero => (None, "ZERO", None),
            };
            VmdkExtentInfo {
                compressed: sparse.is_some_and(|s| s.is_compressed()).then_some(true),
                virtual_size: extent.len,
                filename: file.map(|f| crate::node::shown(&**f)).unwrap_or_default(),
                cluster_size: sparse.map(|s| s.grain()),
                format: format.to_owned(),
            }
        };
        Some(ImageInfoSpecific::Vmdk(VmdkInfo {
            cid: number("CID").unwrap_or(0),
            parent_cid: number("parentCID").unwrap_or(u32::MAX),
            create_type: line(text, "createType").unwrap_or_default().to_owned(),
            extents: self.extents.iter().map(extent).collect(),
        }))
    }

    fn check(&self) -> Option<io::Result<Vec<String>>> {
        let mut faults = Vec::new();
        for extent in &self.extents {
            if let Kind::Sparse(sparse) = &extent.kind
                && let Err(error) = sparse.faults(&mut faults)
            {
                return Some(Err(error));
            }
        }
        Some(Ok(faults))
    }
}

impl Vmdk {
    /// The sparse extent that holds `offset`, and where in it that is.
    fn sparse_at(&self, offset: u64) -> Option<(&Sparse, u64)> {
        let n = self.extents.partition_point(|e| e.start <= offset).saturating_sub(1);
        match self.extents.get(n)? {
            Extent { start, kind: Kind::Sparse(sparse), .. } => Some((sparse, offset - start)),
            _ => None,
        }
    }
}
