//! VMware's VMDK images ("Virtual Disk Format" 5.0), for reading: flat, sparse and stream-optimised extents, alone or with a
//! descriptor.

mod sparse;

use std::io;
use std::sync::Arc;

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
    size: u64,
    extents: Vec<Extent>,
}

/// Opens another file of the image by its name in the descriptor.
pub type OpenExtent<'a> = &'a mut dyn FnMut(&str) -> Result<Arc<dyn BlockNode>, BlockError>;

/// Opens an image.
///
/// # Errors
/// [`BlockError::Format`], [`BlockError::Unsupported`] with what is wrong or not known; those of `extent`.
pub fn open(file: Arc<dyn BlockNode>, extent: OpenExtent<'_>) -> Result<Arc<dyn BlockNode>, BlockError> {
    let magic = read_part(&*file, 0, 512.min(file.size()), "Could not read the VMDK header")?;
    let extents = if magic.starts_with(b"KDMV") {
        let sparse = Sparse::open(Arc::clone(&file))?;
        if let Some(text) = sparse.descriptor()? {
            refuse_parent(&text)?;
        }
        vec![Extent { start: 0, len: sparse.size(), kind: Kind::Sparse(Box::new(sparse)) }]
    } else if magic.starts_with(b"# Disk DescriptorFile") {
        let bytes =
            read_part(&*file, 0, file.size().min(MAX_DESCRIPTOR), "Could not read the VMDK descriptor")?;
        described(&String::from_utf8_lossy(&bytes), extent)?
    } else if magic.starts_with(b"COWD") {
        return Err(BlockError::Unsupported(
            "VMDK images of ESX (COWD) are not supported by this version".into(),
        ));
    } else {
        return bad("Image not in VMDK format");
    };
    let size = extents.last().map_or(0, |e| e.start + e.len);
    Ok(Mapped::new(file, Vmdk { size, extents }))
}

fn refuse_parent(text: &str) -> Result<(), BlockError> {
    let parent = text.lines().find_map(|l| l.trim().strip_prefix("parentCID=")).map(str::trim);
    match parent {
        None => Ok(()),
        Some(cid) if cid.eq_ignore_ascii_case("ffffffff") => Ok(()),
        Some(_) => Err(BlockError::Unsupported(
            "VMDK images that build on another one are not supported by this version".into(),
        )),
    }
}

/// The extents of a descriptor: `ACCESS SECTORS TYPE "FILE" OFFSET`.
fn described(text: &str, open: OpenExtent<'_>) -> Result<Vec<Extent>, BlockError> {
    refuse_parent(text)?;
    let mut out: Vec<Extent> = Vec::new();
    let lines = text.lines().map(str::trim);
    for line in lines.filter(|l| ["RW ", "RDONLY ", "NOACCESS "].iter().any(|a| l.starts_with(a))) {
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
}
