//! Images against QEMU's own `qemu-img` (`$QEMU_IMG`, or the one in the path), and against crashes.

mod cached;
mod crash;
mod handover;
mod hostile;
mod oracle;
mod snapshots;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use holdfast_threads::PlainSpawner;

use super::header::Compression;
use super::*;
use crate::raw::{LockRange, RawOptions};

/// A small generator of pseudo-random numbers.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

pub(super) fn qemu_img(args: &[&str]) -> Output {
    let program = std::env::var_os("QEMU_IMG").unwrap_or_else(|| "qemu-img".into());
    Command::new(&program).args(args).output().expect("qemu-img (Debian: qemu-utils) is needed for this test")
}

pub(super) fn qemu_ok(args: &[&str]) -> String {
    let out = qemu_img(args);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "qemu-img {args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

pub(super) fn file(path: &Path, create: bool) -> Arc<dyn BlockNode> {
    let options = RawOptions { create, lock: LockRange::None, no_flush: true, ..RawOptions::new(path) };
    RawImage::open(options, PlainSpawner::shared()).expect("file")
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A directory with an image of `options`.
pub(super) struct Bed {
    pub(super) dir: tempfile::TempDir,
    pub(super) options: CreateOptions,
}

impl Bed {
    pub(super) fn new(mut options: CreateOptions) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        // Other tools look for relative names where they are started.
        options.data_file = options.data_file.map(|name| text(&dir.path().join(name)).to_owned());
        Self { dir, options }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("image.qcow2")
    }

    pub(super) fn data(&self, create: bool) -> Option<Arc<dyn BlockNode>> {
        self.options.data_file.as_ref().map(|name| file(&self.dir.path().join(name), create))
    }

    pub(super) fn backing(&self) -> Option<Arc<dyn BlockNode>> {
        let name = self.options.backing_file.as_ref()?;
        let raw = file(&self.dir.path().join(name), false);
        Some(crate::format::RawFormat::new(raw, 0, None, true).expect("raw"))
    }

    pub(super) fn create(&self) -> Arc<Qcow2> {
        let image = create(file(&self.path(), true), self.data(true), &self.options, None).expect("create");
        image.set_backing(self.backing());
        image
    }

    pub(super) fn open(&self) -> Arc<Qcow2> {
        Qcow2::open(file(&self.path(), false), self.data(false), self.backing(), &OpenOptions::default())
            .expect("open")
    }

    pub(super) fn assert_clean(&self) {
        let out = qemu_img(&["check", text(&self.path())]);
        assert!(
            out.status.success(),
            "{:?}: {}{}",
            self.options,
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
    }

    pub(super) fn assert_equal(&self, model: &[u8]) {
        let raw = self.dir.path().join("model.raw");
        std::fs::write(&raw, model).expect("model");
        let out = qemu_img(&["compare", "-F", "raw", text(&self.path()), text(&raw)]);
        assert!(out.status.success(), "{:?}: {}", self.options, String::from_utf8_lossy(&out.stdout));
    }
}

pub(super) fn contents(node: &dyn BlockNode) -> Vec<u8> {
    let mut out = vec![0; node.size() as usize];
    node.read_at(0, &mut out).expect("read");
    out
}

/// The combinations of options that tests go through.
pub(super) fn matrix() -> Vec<CreateOptions> {
    let base = || CreateOptions::new(6 << 20);
    let mut out = vec![
        base(),
        CreateOptions { version: 2, ..base() },
        CreateOptions { lazy_refcounts: true, ..base() },
    ];
    for cluster_size in [512, 4096, 1 << 20, 2 << 20] {
        out.push(CreateOptions { cluster_size, ..base() });
    }
    for refcount_bits in [1, 2, 4, 8, 32, 64] {
        out.push(CreateOptions { refcount_bits, cluster_size: 4096, ..base() });
    }
    for cluster_size in [16384, 65536] {
        out.push(CreateOptions { extended_l2: true, cluster_size, ..base() });
    }
    out.push(CreateOptions { compression: Compression::Zstd, ..base() });
    for data_file_raw in [false, true] {
        out.push(CreateOptions { data_file: Some("data".into()), data_file_raw, ..base() });
    }
    for extended_l2 in [false, true] {
        let backing_file = Some("base.raw".to_owned());
        out.push(CreateOptions { backing_file, backing_format: Some("raw".into()), extended_l2, ..base() });
    }
    let backing_file = Some("base.raw".to_owned());
    out.push(CreateOptions { version: 2, backing_file, backing_format: Some("raw".into()), ..base() });
    out
}

/// Random writes, zeroes and discards on an image and on a model of it.
pub(super) fn scribble(image: &Qcow2, model: &mut [u8], rng: &mut Rng, count: usize) {
    let size = model.len() as u64;
    for _ in 0..count {
        let most = if rng.below(4) == 0 { 1 << 20 } else { 20_000 };
        let offset = rng.below(size);
        let len = (rng.below(most) + 1).min(size - offset);
        let range = offset as usize..(offset + len) as usize;
        match rng.below(8) {
            0 | 1 => {
                image.write_zeroes(offset, len, rng.below(2) == 0).expect("zero");
                model[range].fill(0);
            }
            2 => {
                image.discard(offset, len).expect("discard");
                // What is discarded is one of two things; it is made known again.
                image.read_at(offset, &mut model[range]).expect("read");
            }
            3 => image.flush().expect("flush"),
            _ => {
                let byte = rng.next() as u8;
                let data: Vec<u8> = (0..len).map(|i| byte.wrapping_add((i / 511) as u8)).collect();
                image.write_at(offset, &data).expect("write");
                model[range].copy_from_slice(&data);
            }
        }
    }
}

/// Neighbours that share clusters, each written by another thread while the file grows.
#[test]
fn writers_at_once_lose_nothing() {
    const PART: usize = 12 << 10;
    let options = [
        CreateOptions::new(3 << 20),
        CreateOptions { extended_l2: true, ..CreateOptions::new(3 << 20) },
        CreateOptions { cluster_size: 1 << 20, ..CreateOptions::new(3 << 20) },
        CreateOptions { data_file: Some("data".into()), ..CreateOptions::new(3 << 20) },
    ];
    for round in 0..40 {
        let bed = Bed::new(options[round % options.len()].clone());
        let image = bed.create();
        let count = (3 << 20) / PART;
        std::thread::scope(|scope| {
            for n in 0..8 {
                let image = &image;
                scope.spawn(move || {
                    for part in (n..count).step_by(8) {
                        image.write_at((part * PART) as u64, &[part as u8 | 1; PART]).expect("write");
                    }
                });
            }
        });
        let mut model = vec![0; 3 << 20];
        for (part, bytes) in model.chunks_mut(PART).take(count).enumerate() {
            bytes.fill(part as u8 | 1);
        }
        assert!(contents(&*image) == model, "round {round}: {:?}", bed.options);
        drop(image);
        bed.assert_clean();
    }
}

/// What lies around the first data of a cluster is zeroes, in a file whose holes are not.
#[test]
fn around_data_that_is_encrypted_there_are_zeroes() {
    let encrypt = Some(crate::luks::CreateOptions { iter_time: 1, ..Default::default() });
    let options = CreateOptions { encrypt, ..CreateOptions::new(1 << 20) };
    let bed = Bed::new(options);
    let image = create(file(&bed.path(), true), None, &bed.options, Some(b"p")).expect("create");
    let mut model = vec![0; 1 << 20];
    for at in [40 << 10, 200 << 10, 1000 << 10] {
        image.write_at(at, &[5; 512]).expect("write");
        model[at as usize..at as usize + 512].fill(5);
    }
    assert!(contents(&*image) == model);
}

/// A compressed cluster may come to where another one was that is as long.
#[test]
fn a_compressed_cluster_is_not_taken_for_the_one_before_it() {
    let bed = Bed::new(CreateOptions::new(1 << 20));
    let image = bed.create();
    for byte in 1..4 {
        image.write_compressed(0, &[byte; 65536]).expect("packed");
        assert!(contents(&*image)[..65536].iter().all(|b| *b == byte), "{byte}");
        image.discard(0, 65536).expect("discard");
        image.flush().expect("flush");
    }
}
