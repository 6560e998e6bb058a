use std::sync::Arc;

use holdfast_threads::PlainSpawner;

use super::header::{Header, LENGTH};
use super::*;
use crate::crypto::{Algorithm, Mode};
use crate::raw::{LockRange, RawImage, RawOptions};

fn file(path: &std::path::Path) -> Arc<dyn BlockNode> {
    let options = RawOptions {
        create: !path.exists(),
        lock: LockRange::None,
        io_uring: false,
        ..RawOptions::new(path)
    };
    RawImage::open(options, PlainSpawner::shared()).expect("file")
}

fn quick() -> CreateOptions {
    CreateOptions { iter_time: 1, ..CreateOptions::default() }
}

fn change<'a>(activate: bool) -> SlotChange<'a> {
    SlotChange { activate, iter_time: 1, ..SlotChange::default() }
}

#[test]
fn data_is_what_was_written_through_any_slot() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("a");
    let size = 1 << 20;
    let options = CreateOptions { cipher: (Algorithm::Aes, 16), mode: Mode::Cbc, ..quick() };
    let luks = create(file(&path), &options, (size, Preallocation::Off), b"one").expect("created");
    assert_eq!(luks.size(), size);
    // Parts of sectors too.
    luks.write_at(1000, &[7; 3000]).expect("written");
    luks.write_zeroes(1500, 100, true).expect("zeroed");
    assert!(luks.write_at(size - 1, &[0; 2]).is_err());
    luks.change_slots(&SlotChange { new: Some(b"two"), ..change(true) }).expect("added");
    assert!(luks.change_slots(&SlotChange { slot: Some(0), new: Some(b"x"), ..change(true) }).is_err());
    assert!(luks.change_slots(&SlotChange { slot: Some(0), old: Some(b"two"), ..change(false) }).is_err());
    luks.change_slots(&SlotChange { old: Some(b"one"), ..change(false) }).expect("erased");
    assert!(luks.change_slots(&SlotChange { slot: Some(1), ..change(false) }).is_err(), "the last one");
    assert!(luks.change_slots(&SlotChange { old: Some(b"two"), ..change(false) }).is_err(), "the last one");
    drop(luks);
    assert!(Luks::open(file(&path), None, Some(b"one"), true).is_err());
    let luks = Luks::open(file(&path), None, Some(b"two"), true).expect("open");
    let mut buf = [0; 4096];
    luks.read_at(0, &mut buf).expect("read");
    assert!(buf[1000..1500].iter().chain(&buf[1600..4000]).all(|b| *b == 7));
    assert!(buf[1500..1600].iter().all(|b| *b == 0));
    assert!(luks.write_at(0, &[1]).is_err(), "read-only");
    assert!(format!("{luks:?}").contains("master: Secret(…)"), "keys are not shown");
}

#[test]
fn damaged_headers_are_refused() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("a");
    drop(create(file(&path), &quick(), (4096, Preallocation::Off), b"one").expect("created"));
    let image = std::fs::read(&path).expect("image");
    let good = &image[..LENGTH];
    assert_eq!(Header::parse(good).expect("header").to_bytes(), good);
    let with = |at: usize, bytes: &[u8]| {
        let mut b = good.to_vec();
        b[at..at + bytes.len()].copy_from_slice(bytes);
        Header::parse(&b).map(|_| ()).expect_err("refused").to_string()
    };
    assert!(Header::parse(&good[..LENGTH - 1]).is_err());
    assert!(with(6, &[0, 2]).contains("version 2"));
    assert!(with(8, b"des3").contains("des3"));
    assert!(with(40, b"lrw-benbi\0").contains("lrw"));
    assert!(with(40, &[b'x'; 32]).contains("NUL"));
    assert!(with(72, b"md5\0").contains("md5"));
    assert!(with(108, &[0xff; 4]).contains("master key"));
    assert!(with(108, &63u32.to_be_bytes()).contains("multiple of 2"));
    assert!(with(164, &[0; 4]).contains("iteration"));
    assert!(with(208, &[1; 4]).contains("state"));
    assert!(with(212, &[0; 4]).contains("iteration count is zero"));
    assert!(with(212, &[0xff; 4]).contains("too much work"));
    assert!(with(208 + 40, &[0; 4]).contains("overlapping with the LUKS header"));
    assert!(with(208 + 40, &[0xff; 4]).contains("overlapping with the encrypted payload"));
    assert!(with(208 + 48 + 40, &8u32.to_be_bytes()).contains("overlapping in the header"));
    assert!(with(208 + 44, &[0; 4]).contains("stripes"));
}
