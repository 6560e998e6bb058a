//! Logs that crashes leave behind, made by hand.

use std::sync::Arc;

use holdfast_threads::PlainSpawner;

use super::header::{Header, seal};
use super::log::Log;
use super::{Access, open};
use crate::foreign::{CreateOptions, create};
use crate::mapped::{le64, put};
use crate::options::Driver;
use crate::raw::{LockRange, RawImage, RawOptions};
use crate::{BlockError, BlockNode, Preallocation};

const SIZE: u64 = 64 << 20;
const GUID: u128 = 0x1234_5678;

struct Bed(tempfile::TempDir);

impl Bed {
    /// An image with one block of data.
    fn new() -> Self {
        let bed = Self(tempfile::tempdir().expect("directory"));
        let file = bed.raw(true);
        let none: crate::vmdk::NewExtent<'_> = &mut |_| Err(BlockError::Option("no".into()));
        let options = CreateOptions { block_size: 1 << 20, ..CreateOptions::default() };
        let node = create(Driver::Vhdx, (file, "x"), SIZE, &options, none).expect("image");
        node.write_at(5 << 20, &[7; 4096]).expect("write");
        bed
    }

    fn raw(&self, create: bool) -> Arc<RawImage> {
        let options =
            RawOptions { create, lock: LockRange::None, ..RawOptions::new(self.0.path().join("x")) };
        RawImage::open(options, PlainSpawner::shared()).expect("file")
    }

    fn bat(&self) -> u64 {
        let file = self.raw(false);
        let regions = super::regions(&*file).expect("regions");
        regions.iter().find(|(id, ..)| *id == super::BAT).expect("table").1
    }

    /// Writes entries into the log, and into the headers that it counts.
    fn dirty(&self, write: impl FnOnce(&RawImage, &mut Log)) {
        let file = self.raw(false);
        let mut header = Header::read(&*file).expect("header");
        write(&file, &mut Log::new(header.log, GUID));
        header.log_guid = GUID;
        header.store(&*file).expect("header");
    }

    fn page(&self, at: u64) -> Vec<u8> {
        let mut page = vec![0; 4096];
        BlockNode::read_at(&*self.raw(false), at, &mut page).expect("page");
        page
    }

    fn byte(&self, offset: u64) -> u8 {
        let node = open(self.raw(false), Access::Read).expect("clean image");
        let mut byte = [0];
        node.read_at(offset, &mut byte).expect("read");
        byte[0]
    }
}

/// The table's first page with block 9 where block 5 is, and block 5 nowhere.
fn moved(bed: &Bed) -> Vec<u8> {
    let mut page = bed.page(bed.bat());
    let place = le64(&page, 5 * 8);
    put(&mut page, 5 * 8, &0u64.to_le_bytes());
    put(&mut page, 9 * 8, &place.to_le_bytes());
    page
}

#[test]
fn a_log_is_replayed_when_it_is_opened_for_writing_and_refused_otherwise() {
    let bed = Bed::new();
    assert_eq!((bed.byte(5 << 20), bed.byte(9 << 20)), (7, 0));
    let (page, at) = (moved(&bed), bed.bat());
    bed.dirty(|file, log| {
        // Two that count, since the newer one names itself as the oldest; the older one is not looked at.
        log.append(file, &[(at, vec![0; 4096])]).expect("entry");
        log.append(file, &[(at, page.clone())]).expect("entry");
    });
    let refused = open(bed.raw(false), Access::Read).expect_err("a log").to_string();
    assert!(refused.contains("contains a log that needs to be replayed"), "{refused}");
    drop(open(bed.raw(false), Access::Write).expect("replayed"));
    assert_eq!((bed.byte(5 << 20), bed.byte(9 << 20)), (0, 7));
}

#[test]
fn a_sequence_goes_round_the_end_of_the_log() {
    let bed = Bed::new();
    let (page, at) = (moved(&bed), bed.bat());
    bed.dirty(|file, log| {
        let far = file.size() - 4096;
        let filler: Vec<(u64, Vec<u8>)> = (0..100).map(|_| (far, vec![0; 4096])).collect();
        for _ in 0..2 {
            log.append(file, &filler).expect("entry");
        }
        // Of 101 sectors each; this one crosses sector 256.
        let mut pages = filler;
        pages[60] = (at, page.clone());
        log.append(file, &pages).expect("entry");
    });
    drop(open(bed.raw(false), Access::Write).expect("replayed"));
    assert_eq!((bed.byte(5 << 20), bed.byte(9 << 20)), (0, 7));
}

#[test]
fn entries_that_are_torn_or_of_another_log_do_not_count() {
    let bed = Bed::new();
    let (page, at) = (moved(&bed), bed.bat());
    for damage in [8u64, 40, 64, 4096, 8191] {
        bed.dirty(|file, log| {
            log.append(file, &[(at, page.clone())]).expect("entry");
            BlockNode::write_at(file, (1 << 20) + damage, &[0xee]).expect("damage");
        });
        // Nothing counts, so there is nothing to do: reading is fine.
        assert_eq!((bed.byte(5 << 20), bed.byte(9 << 20)), (7, 0), "{damage}");
    }
    drop(open(bed.raw(false), Access::Write).expect("nothing to do"));
    assert_eq!(bed.byte(5 << 20), 7);
}

#[test]
fn hostile_logs_are_refused() {
    let bed = Bed::new();
    let at = bed.bat();
    // Bytes of the entry, from 64 on its descriptor, and what is put there.
    let cases: [(usize, u64, &str); 5] = [
        (64 + 16, 1 << 60, "impossible place"),
        (64 + 16, 77, "impossible place"),
        (64 + 24, 99, "another entry"),
        (64, 0, "unknown kind"),
        (48, 1 << 50, "truncated"),
    ];
    for (place, value, text) in cases {
        bed.dirty(|file, log| {
            log.append(file, &[(at, vec![1; 4096])]).expect("entry");
            let mut entry = vec![0; 8192];
            BlockNode::read_at(file, 1 << 20, &mut entry).expect("entry");
            put(&mut entry, place, &value.to_le_bytes());
            seal(&mut entry);
            BlockNode::write_at(file, 1 << 20, &entry).expect("entry");
        });
        let refused = open(bed.raw(false), Access::Write).expect_err(text);
        let mut all = refused.to_string();
        if let BlockError::Host { source, .. } = &refused {
            all += &source.to_string();
        }
        assert!(all.contains(text), "{all}");
        assert_eq!(bed.page(at)[..8], 2u64.to_le_bytes(), "nothing was written");
    }
}

#[test]
fn a_crash_before_the_table_is_written_in_place_loses_nothing_that_was_flushed() {
    let bed = Bed::new();
    let at = bed.bat();
    let before = bed.page(at);
    let node = open(bed.raw(false), Access::Write).expect("image");
    node.write_at(20 << 20, &[9; 512]).expect("write");
    node.flush().expect("flush");
    // As if the write in place had been lost, and the program killed.
    BlockNode::write_at(&*bed.raw(false), at, &before).expect("old table");
    std::mem::forget(node);
    assert!(open(bed.raw(false), Access::Read).is_err());
    drop(open(bed.raw(false), Access::Write).expect("replayed"));
    assert_eq!((bed.byte(5 << 20), bed.byte(20 << 20)), (7, 9));
}

#[test]
fn a_file_that_is_too_short_is_grown_by_the_log() {
    let bed = Bed::new();
    let (page, at) = (bed.page(bed.bat()), bed.bat());
    let file = bed.raw(false);
    let size = file.size();
    BlockNode::truncate(&*file, size + (3 << 20), Preallocation::Off).expect("grow");
    bed.dirty(|file, log| {
        log.append(file, &[(at, page.clone())]).expect("entry");
        // It says that the file was flushed when it was shorter.
        let mut entry = vec![0; 8192];
        BlockNode::read_at(file, 1 << 20, &mut entry).expect("entry");
        put(&mut entry, 48, &size.to_le_bytes());
        seal(&mut entry);
        BlockNode::write_at(file, 1 << 20, &entry).expect("entry");
    });
    BlockNode::truncate(&*file, size, Preallocation::Off).expect("shrink");
    drop(open(bed.raw(false), Access::Write).expect("replayed"));
    assert_eq!(bed.raw(false).size(), size + (3 << 20));
    assert_eq!(bed.byte(5 << 20), 7);
}
