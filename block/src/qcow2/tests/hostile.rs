//! Images made to do harm.

use super::*;

fn patched(change: impl FnOnce(&mut Vec<u8>)) -> (tempfile::TempDir, PathBuf) {
    let bed = Bed::new(CreateOptions { cluster_size: 4096, ..CreateOptions::new(1 << 20) });
    let image = bed.create();
    image.write_at(0, &[7; 8192]).expect("write");
    drop(image);
    let mut bytes = std::fs::read(bed.path()).expect("image");
    change(&mut bytes);
    std::fs::write(bed.path(), bytes).expect("image");
    let path = bed.path();
    (bed.dir, path)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn open(path: &Path) -> Result<Arc<Qcow2>, BlockError> {
    Qcow2::open(file(path, false), None, None, &OpenOptions::default())
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let cases: &[(usize, Vec<u8>, &str)] = &[
        (20, 8u32.to_be_bytes().to_vec(), "cluster size"),
        (20, 63u32.to_be_bytes().to_vec(), "cluster size"),
        (24, (1u64 << 63).to_be_bytes().to_vec(), "big"),
        (24, (1u64 << 62).to_be_bytes().to_vec(), "big"),
        (36, u32::MAX.to_be_bytes().to_vec(), "L1"),
        (36, 0u32.to_be_bytes().to_vec(), "L1"),
        (40, 5u64.to_be_bytes().to_vec(), "L1"),
        (40, (u64::MAX - 4095).to_be_bytes().to_vec(), "L1"),
        (48, 77u64.to_be_bytes().to_vec(), "eference count"),
        (56, u32::MAX.to_be_bytes().to_vec(), "reference count"),
        (60, 100_000u32.to_be_bytes().to_vec(), "napshot"),
        (72, (1u64 << 40).to_be_bytes().to_vec(), "feature"),
        (96, 7u32.to_be_bytes().to_vec(), "width"),
        (100, 90u32.to_be_bytes().to_vec(), "too short"),
        (100, 5000u32.to_be_bytes().to_vec(), "exceeds"),
        (32, 1u32.to_be_bytes().to_vec(), "AES"),
        (32, 2u32.to_be_bytes().to_vec(), "key-secret"),
        (8, 5000u64.to_be_bytes().to_vec(), "backing"),
    ];
    for (at, value, words) in cases {
        let (_dir, path) = patched(|b| put(b, *at, value));
        let error = open(&path).expect_err(words).to_string();
        assert!(error.contains(words), "at {at}: {error}");
    }
}

#[test]
fn tables_that_point_nowhere_are_errors() {
    // The L1 table is cluster 3, the first L2 table cluster 4 and data from 5 on.
    for (at, entry) in [(3 * 4096, COPIED_AND | 0x1200), (3 * 4096, COPIED_AND | 0x4000_0000_1000_0000)] {
        let (_dir, path) = patched(|b| put(b, at, &entry.to_be_bytes()));
        let image = open(&path).expect("open");
        image.read_at(0, &mut [0; 512]).expect_err("a table that is nowhere");
        image.write_at(0, &[1; 512]).expect_err("no more writes");
        assert!(image.corrupt().is_some());
    }
    let (_dir, path) = patched(|b| {
        let l2 = u64::from_be_bytes(b[3 * 4096..3 * 4096 + 8].try_into().expect("entry")) & geometry::OFFSET;
        put(b, l2 as usize, &(COPIED_AND | 0x1200).to_be_bytes());
    });
    let image = open(&path).expect("open");
    image.read_at(0, &mut [0; 512]).expect_err("a cluster that is not aligned");
    drop(image);
    // It was marked: nobody writes to it before it is repaired.
    let error = open(&path).expect_err("corrupt").to_string();
    assert!(error.contains("corrupt"), "{error}");
}

const COPIED_AND: u64 = geometry::COPIED;

#[test]
fn metadata_is_not_given_out_as_data() {
    // All refcounts are zero: the first allocation would hand out the refcount table itself.
    let (_dir, path) = patched(|b| b[2 * 4096..3 * 4096].fill(0));
    let image = open(&path).expect("open");
    image.write_at(500_000, &[1; 512]).expect_err("overlap");
    assert!(image.corrupt().is_some());
    let report = Qcow2::open(
        file(&path, false),
        None,
        None,
        &OpenOptions { for_check: true, ..OpenOptions::default() },
    );
    let image = report.expect("open to check");
    let report = image.check(check::Fix::All).expect("repair");
    assert_eq!(report.corruptions, 0, "{:?}", report.messages);
    drop(image);
    let mut data = [0; 8192];
    open(&path).expect("repaired").read_at(0, &mut data).expect("read");
    assert!(data.iter().all(|b| *b == 7));
    let out = qemu_img(&["check", text(&path)]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

#[test]
fn a_lost_refcount_table_is_rebuilt() {
    let (_dir, path) = patched(|b| put(b, 4096, &0x7777_0000u64.to_be_bytes()));
    let options = OpenOptions { for_check: true, ..OpenOptions::default() };
    let image = Qcow2::open(file(&path, false), None, None, &options).expect("open");
    image.check(check::Fix::All).expect("repair");
    drop(image);
    let out = qemu_img(&["check", text(&path)]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

#[test]
fn compressed_garbage_is_an_error() {
    let (_dir, path) = patched(|b| {
        let l2 = u64::from_be_bytes(b[3 * 4096..3 * 4096 + 8].try_into().expect("entry")) & geometry::OFFSET;
        put(b, l2 as usize, &(geometry::COMPRESSED | 0x5000).to_be_bytes());
    });
    let image = open(&path).expect("open");
    image.read_at(0, &mut [0; 512]).expect_err("no deflate stream");
}

#[test]
fn a_cluster_that_inflates_to_megabytes_is_one_cluster() {
    let (_dir, path) = patched(|b| {
        let mut bomb = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        std::io::Write::write_all(&mut bomb, &vec![0; 2 << 20]).expect("memory");
        let bomb = bomb.finish().expect("memory");
        assert!(bomb.len() < 4096);
        let at = b.len() as u64;
        b.extend(&bomb);
        b.resize(at as usize + 4096, 0);
        let l2 = u64::from_be_bytes(b[3 * 4096..3 * 4096 + 8].try_into().expect("entry")) & geometry::OFFSET;
        // Clusters of 4 KiB: the number of further sectors is from bit 58 on.
        put(b, l2 as usize, &(geometry::COMPRESSED | 7 << 58 | at).to_be_bytes());
    });
    let image = open(&path).expect("open");
    let mut both = [1; 8192];
    image.read_at(0, &mut both).expect("a cluster of it, and the next");
    assert!(both[..4096].iter().all(|b| *b == 0) && both[4096..].iter().all(|b| *b == 7));
}

/// Uses an image in every way; nothing it contains may do more than make calls fail.
fn use_up(image: &Qcow2, rng: &mut Rng) {
    let size = image.size();
    for _ in 0..12 {
        let offset = rng.below(size);
        let len = (rng.below(9000) + 1).min(size - offset);
        let _ = image.read_at(offset, &mut vec![0; len as usize]);
        let _ = image.status(offset, len);
        let _ = match rng.below(5) {
            0 => image.discard(offset, len),
            1 => image.write_zeroes(offset, len, true),
            2 => image.flush(),
            _ => image.write_at(offset, &vec![9; len as usize]),
        };
    }
    let _ = image.create_snapshot("new", 0);
    let _ = image.apply_snapshot("one");
    let _ = image.delete_snapshot("one");
    let _ = image.snapshot_view("new").map(|view| view.read_at(0, &mut [0; 512]));
    let _ = image.add_bitmap("bits", 512, true);
    let _ = image.truncate(size + 4096, Preallocation::Off);
    let _ = image.truncate(1 << 16, Preallocation::Metadata);
    let _ = image.close();
}

#[test]
fn altered_images_only_make_calls_fail() {
    for (n, (cluster_size, extended_l2)) in [(512, false), (16384, true)].into_iter().enumerate() {
        let tape = Arc::new(super::crash::Tape::default());
        let options = CreateOptions { cluster_size, extended_l2, ..CreateOptions::new(256 << 10) };
        let image = create(Arc::clone(&tape) as Arc<dyn BlockNode>, None, &options, None).expect("image");
        image.write_at(3000, &[7; 30_000]).expect("write");
        image.write_compressed(4 * cluster_size, &vec![5; cluster_size as usize]).expect("compressed");
        image.create_snapshot("one", 0).expect("snapshot");
        image.add_bitmap("old", 4096, true).expect("bitmap");
        image.write_at(0, &[8; 5000]).expect("write");
        drop(image);
        let good = tape.data.lock().clone();
        let mut rng = Rng(n as u64 + 21);
        for _ in 0..50 {
            let mut bytes = good.clone();
            for _ in 0..=rng.below(4) {
                // Where tables are, more often than not.
                let most = if rng.below(3) == 0 { bytes.len() as u64 } else { 12 * cluster_size };
                let at = rng.below(most) as usize;
                match rng.below(4) {
                    0 => bytes[at] = rng.next() as u8,
                    1 => bytes[at] ^= 1 << rng.below(8),
                    _ => {
                        // A table's entry.
                        let at = at & !7;
                        let to =
                            rng.below(40) * cluster_size + if rng.below(4) == 0 { rng.below(512) } else { 0 };
                        let flags = rng.next() & (geometry::COPIED | geometry::COMPRESSED);
                        put(&mut bytes, at.min(good.len() - 8), &(to | flags).to_be_bytes());
                    }
                }
            }
            for readonly in [true, false] {
                let disk = Arc::new(super::crash::Tape::default());
                disk.data.lock().clone_from(&bytes);
                let open = OpenOptions { readonly, for_check: rng.below(2) == 0, ..OpenOptions::default() };
                let Ok(image) = Qcow2::open(disk, None, None, &open) else { continue };
                if image.size() > 1 << 30 {
                    continue;
                }
                let _ = image.check(check::Fix::None);
                use_up(&image, &mut rng);
                let _ = image.check(if readonly { check::Fix::None } else { check::Fix::All });
            }
        }
    }
}
