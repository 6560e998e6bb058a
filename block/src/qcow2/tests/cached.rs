//! What of the tables is in memory: how often a file is read for a read of the disk.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// A file that counts what is read of it.
#[derive(Debug)]
struct Counting {
    below: Arc<dyn BlockNode>,
    reads: AtomicU64,
}

impl BlockNode for Counting {
    fn driver(&self) -> &'static str {
        "file"
    }
    fn size(&self) -> u64 {
        self.below.size()
    }
    fn is_readonly(&self) -> bool {
        false
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.below.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.below.write_at(offset, buf)
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.below.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.below.write_zeroes(offset, len, unmap)
    }
    fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        self.below.status(offset, len)
    }
    fn truncate(&self, size: u64, how: Preallocation) -> io::Result<()> {
        self.below.truncate(size, how)
    }
}

const SIZE: u64 = 1 << 40;

/// Reads 4 KiB at each place; how often the file is read for that.
fn reads(image: &Qcow2, file: &Counting, places: impl Iterator<Item = u64>) -> u64 {
    let before = file.reads.load(Ordering::Relaxed);
    let mut buf = [0; 4096];
    for place in places {
        image.read_at(place, &mut buf).expect("read");
    }
    file.reads.load(Ordering::Relaxed) - before
}

/// Random reads all over an image of 1 TiB read the file once each, when its tables are warm: all of them where they fit the cache's
/// usual size, those of the places in use otherwise.
#[test]
fn a_warm_read_of_a_terabyte_is_one_read_of_the_file() {
    let whole = CreateOptions {
        cluster_size: 2 << 20,
        preallocation: Preallocation::Metadata,
        ..CreateOptions::new(SIZE)
    };
    for options in [whole, CreateOptions::new(SIZE)] {
        let bed = Bed::new(options);
        let scattered: Vec<u64> = {
            let mut rng = Rng(7);
            (0..1500).map(|_| rng.below(SIZE / 4096) * 4096).collect()
        };
        let image = bed.create();
        let everywhere = bed.options.preallocation == Preallocation::Metadata;
        for place in scattered.iter().filter(|_| !everywhere) {
            image.write_at(*place, &[1; 4096]).expect("write");
        }
        drop(image);
        let file = Arc::new(Counting { below: file(&bed.path(), false), reads: AtomicU64::new(0) });
        let below = Arc::clone(&file) as Arc<dyn BlockNode>;
        let image = Qcow2::open(below, None, None, &OpenOptions::default()).expect("open");
        // A slice of a table of the former is for 1 GiB.
        let cold = match everywhere {
            true => reads(&image, &file, (0..SIZE).step_by(1 << 30)),
            false => reads(&image, &file, scattered.iter().copied()),
        };
        assert!(cold > 1024, "{cold} reads, and nothing was in memory");
        assert_eq!(reads(&image, &file, scattered.iter().copied()), scattered.len() as u64);
    }
}
