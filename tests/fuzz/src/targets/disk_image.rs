//! Disk images of every format: opened, read, asked for their holes and, where they can be, written and checked.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use holdfast_block::node::{Extent, Preallocation};
use holdfast_block::qcow2::check::Fix;
use holdfast_block::qcow2::{OpenOptions, Qcow2};
use holdfast_block::foreign as foreign_image;
use holdfast_block::options::Driver;
use holdfast_block::{BlockError, BlockNode, luks, vdi, vhdx, vmdk, vpc};

/// Longest file that an image may become, in bytes.
const MAX: usize = 8 << 20;

/// A file in memory.
#[derive(Debug, Default)]
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn bytes(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockNode for Memory {
    fn driver(&self) -> &'static str {
        "file"
    }

    fn size(&self) -> u64 {
        self.bytes().len() as u64
    }

    fn is_readonly(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes();
        buf.fill(0);
        let from = bytes.get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or_default();
        buf.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut bytes = self.bytes();
        let end = offset.checked_add(buf.len() as u64).filter(|e| *e <= MAX as u64);
        let end = end.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))? as usize;
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes.get_mut(offset as usize..end).unwrap_or_default().copy_from_slice(buf);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        if len > MAX as u64 {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.write_at(offset, &vec![0; len as usize])
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        let len = len.min(self.size().saturating_sub(offset));
        Ok(Extent { len, allocated: true, data: true, zero: false, compressed: false, offset: Some(offset) })
    }

    fn truncate(&self, size: u64, _preallocation: Preallocation) -> io::Result<()> {
        if size > MAX as u64 {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.bytes().resize(size as usize, 0);
        Ok(())
    }
}

fn look(node: &dyn BlockNode) {
    let size = node.size();
    let mut buf = [0; 1024];
    for at in [0, 65_536, size / 2, size.saturating_sub(1024)] {
        if at.checked_add(1024).is_some_and(|end| end <= size) {
            // What cannot be read is an error; that is all that is asked.
            let _ = node.read_at(at, &mut buf);
        }
    }
    let mut at = 0;
    for _ in 0..64 {
        match node.status(at, size.saturating_sub(at)) {
            Ok(extent) if extent.len != 0 => at += extent.len,
            _ => break,
        }
    }
}

fn use_qcow2(file: Arc<dyn BlockNode>) {
    let Ok(image) = Qcow2::open(Arc::clone(&file), None, None, &OpenOptions::default()) else {
        return;
    };
    look(&*image);
    let size = image.size();
    for at in [0, size / 2] {
        if at.checked_add(4096).is_some_and(|end| end <= size) {
            let _ = image.write_at(at, &[7; 4096]);
            let _ = image.write_zeroes(at, 2048, true);
            let _ = image.discard(at, 4096);
        }
    }
    let _ = image.create_snapshot("s", 0);
    drop(image);
    let options = OpenOptions { for_check: true, ..OpenOptions::default() };
    if let Ok(image) = Qcow2::open(file, None, None, &options) {
        let _ = image.check(Fix::All);
    }
}

/// Opens another program's format.
fn foreign(kind: u8, file: &Arc<dyn BlockNode>, write: bool) -> Result<Arc<dyn BlockNode>, BlockError> {
    let file = Arc::clone(file);
    match kind {
        2 => vdi::open(file, !write),
        3 => vpc::open(file, !write),
        4 => vhdx::open(file, if write { vhdx::Access::Write } else { vhdx::Access::Read }),
        _ => {
            let access = if write { vmdk::Access::Write } else { vmdk::Access::Read };
            vmdk::open(file, access, &mut |_| Ok(Arc::new(Memory::default())))
        }
    }
}

/// Uses it as it is, and then to write it.
fn use_foreign(kind: u8, file: &Arc<dyn BlockNode>) {
    for write in [false, true] {
        if let Ok(node) = foreign(kind, file, write) {
            look(&*node);
            scribble(&*node);
            let _ = node.faults();
        }
    }
}

/// CRC-32C of a VHDX structure, whose own field is the second word.
fn seal(b: &mut [u8]) {
    b[4..8].fill(0);
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    };
    let sum = !b.iter().fold(!0, step);
    b[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// A whole image of a format, with bytes changed here and there: place (four bytes, little-endian), length, bytes. What
/// VHDX has checksums of gets the right ones.
fn patched(data: &[u8]) {
    let Some((format, mut patches)) = data.split_first() else { return };
    let (kind, driver) =
        [(2, Driver::Vdi), (3, Driver::Vpc), (4, Driver::Vhdx), (5, Driver::Vmdk)][usize::from(format % 4)];
    let memory = Arc::new(Memory::default());
    let mut options = foreign_image::CreateOptions::default();
    // What has no such option has small blocks, or one size.
    let _ = options.set(driver, "block_size", "1M");
    let file: Arc<dyn BlockNode> = Arc::clone(&memory) as _;
    let made = foreign_image::create(driver, (Arc::clone(&file), "x"), 4 << 20, &options, &mut |_| {
        Err(BlockError::Option("there is one file".into()))
    });
    let node = made.expect("an image");
    let _ = node.write_at(0, &[7; 512]);
    let _ = node.flush();
    drop(node);
    let mut bytes = memory.bytes().clone();
    while let Some((head, rest)) = patches.split_at_checked(5) {
        let at = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize % bytes.len();
        let len = usize::from(head[4]).min(rest.len()).min(bytes.len() - at);
        bytes[at..at + len].copy_from_slice(&rest[..len]);
        patches = &rest[len..];
    }
    if driver == Driver::Vhdx {
        [64 << 10, 128 << 10].into_iter().for_each(|at: usize| seal(&mut bytes[at..at + 4096]));
        seal(&mut bytes[192 << 10..256 << 10]);
        let log = 1 << 20;
        let len = u32::from_le_bytes([bytes[log + 8], bytes[log + 9], bytes[log + 10], bytes[log + 11]]) as usize;
        if (8..=64 << 10).contains(&len) {
            seal(&mut bytes[log..log + len]);
        }
    }
    use_foreign(kind, &(Arc::new(Memory(Mutex::new(bytes))) as Arc<dyn BlockNode>));
}

/// Writes data and zeroes; what was written reads the same.
fn scribble(node: &dyn BlockNode) {
    let size = node.size();
    for at in [0, size / 2 / 512 * 512] {
        if at.checked_add(4096).is_some_and(|end| end <= size) {
            let mut buf = [0; 4096];
            if node.write_at(at, &[7; 4096]).is_ok() && node.read_at(at, &mut buf).is_ok() {
                assert!(!node.is_readonly() && buf == [7; 4096], "what was written at {at}");
            }
            let _ = node.write_zeroes(at, 2048, true);
        }
    }
    let _ = node.flush();
}

/// The target: which format, then the file.
pub fn run(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else { return };
    let file: Arc<dyn BlockNode> = Arc::new(Memory(Mutex::new(bytes.to_vec())));
    let opened = match kind % 7 {
        6 => return patched(bytes),
        0 => return use_qcow2(file),
        1 => {
            if let Ok(header) = luks::header::Header::parse(bytes) {
                // What was understood is written as it was, but for what is behind the ends of texts.
                let again = luks::header::Header::parse(&header.to_bytes()).expect("what was written");
                assert_eq!(again, header);
            }
            luks::Luks::open(file, None, None, true).map(|n| -> Arc<dyn BlockNode> { n })
        }
        kind => return use_foreign(kind, &file),
    };
    if let Ok(node) = opened {
        look(&*node);
    }
}
