//! Images of every format that is written, used by several at once: queues, with and without a hand lent, and calls; writes of
//! neighbours that share clusters, zeroes, discards and flushes, while somebody makes the disk longer and shorter, or snapshots.
//! Each has pieces of the disk of its own, and knows what has to be in them.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use holdfast_threads::{PlainSpawner, Spawner};

use crate::detect::DetectZeroes;
use crate::foreign;
use crate::options::Driver;
use crate::qcow2::{self, Qcow2};
use crate::queue::NodeBackend;
use crate::raw::{LockRange, RawImage, RawOptions};
use crate::{BlockBackend as _, BlockError, BlockNode, IoVec, Op, Preallocation, Request, luks, vmdk};

const SIZE: u64 = (5 << 20) + 512;
const PASSWORD: &[u8] = b"at once";

/// A small generator of pseudo-random numbers.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n.max(1)
    }
}

#[derive(Debug, Clone)]
enum Format {
    Raw,
    Luks,
    Qcow2(Box<qcow2::CreateOptions>),
    Foreign(Driver, foreign::CreateOptions),
}

/// What is tried.
#[derive(Debug, Clone)]
struct Case {
    format: Format,
    io_uring: bool,
    detect: bool,
    /// Its file takes whole blocks of 4096 bytes only.
    blocks: bool,
    /// It is full of compressed clusters at first.
    packed: bool,
}

impl Case {
    fn new(format: Format) -> Self {
        Self { format, io_uring: false, detect: false, blocks: false, packed: false }
    }

    fn file(&self, path: &Path, create: bool) -> Arc<dyn BlockNode> {
        let io_uring = self.io_uring;
        let options =
            RawOptions { create, io_uring, lock: LockRange::None, no_flush: true, ..RawOptions::new(path) };
        let file = match self.blocks {
            true => RawImage::demanding(options),
            false => RawImage::open(options, PlainSpawner::shared()),
        };
        file.expect("file")
    }

    fn node(&self, dir: &Path, create: bool) -> Arc<dyn BlockNode> {
        let path = dir.join("image");
        let file = self.file(&path, create);
        let node: Arc<dyn BlockNode> = match &self.format {
            Format::Raw => {
                if create {
                    file.truncate(SIZE, Preallocation::Off).expect("size");
                }
                file
            }
            Format::Luks if create => {
                let options = luks::CreateOptions { iter_time: 1, ..luks::CreateOptions::default() };
                luks::create(file, &options, (SIZE, Preallocation::Off), PASSWORD).expect("volume")
            }
            Format::Luks => luks::Luks::open(file, None, Some(PASSWORD), false).expect("volume"),
            Format::Qcow2(options) => self.qcow2(file, dir, options, create),
            Format::Foreign(driver, options) if create => {
                let none: vmdk::NewExtent<'_> = &mut |_| Err(BlockError::Option("no".into()));
                foreign::create(*driver, (file, "image"), SIZE, options, none).expect("image")
            }
            Format::Foreign(Driver::Vdi, _) => crate::vdi::open(file, false).expect("image"),
            Format::Foreign(Driver::Vpc, _) => crate::vpc::open(file, false).expect("image"),
            Format::Foreign(Driver::Vhdx, _) => {
                crate::vhdx::open(file, crate::vhdx::Access::Write).expect("image")
            }
            Format::Foreign(..) => {
                let none: vmdk::OpenExtent<'_> = &mut |_| Err(BlockError::Option("no".into()));
                vmdk::open(file, vmdk::Access::Write, none).expect("image")
            }
        };
        if self.detect { DetectZeroes::new(node, true) } else { node }
    }

    fn qcow2(
        &self,
        file: Arc<dyn BlockNode>,
        dir: &Path,
        options: &qcow2::CreateOptions,
        create: bool,
    ) -> Arc<Qcow2> {
        let options = qcow2::CreateOptions {
            data_file: options.data_file.as_ref().map(|name| dir.join(name).display().to_string()),
            ..options.clone()
        };
        let data = options.data_file.as_ref().map(|name| self.file(Path::new(name), create));
        let backing = options.backing_file.as_ref().map(|name| {
            let path = dir.join(name);
            if create {
                let bytes: Vec<u8> = (0..SIZE / 2).map(|at| (at / 512) as u8 | 1).collect();
                std::fs::write(&path, bytes).expect("base");
            }
            self.file(&path, false)
        });
        if create {
            let password = options.encrypt.is_some().then_some(PASSWORD);
            let image = qcow2::create(file, data, &options, password).expect("image");
            image.set_backing(backing);
            for at in (0..SIZE).step_by(options.cluster_size as usize).filter(|_| self.packed) {
                let len = options.cluster_size.min(SIZE - at) as usize;
                image.write_compressed(at, &vec![(at >> 12) as u8 | 1; len]).expect("packed");
            }
            return image;
        }
        let key = options.encrypt.is_some().then(|| {
            let header = qcow2::read_header(&*file).expect("header");
            let volume = luks::Volume { node: &*file, base: header.crypto_offset().expect("place") };
            let luks = volume.header().expect("header of the volume");
            let master = volume.unlock(&luks, PASSWORD).expect("password");
            qcow2::Key::new(luks.cipher, master).expect("key")
        });
        let options = qcow2::OpenOptions { key, ..qcow2::OpenOptions::default() };
        Qcow2::open(file, data, backing, &options).expect("image")
    }

    /// What QEMU calls it, if it is to look at it.
    fn qemu(&self) -> Option<&'static str> {
        match &self.format {
            Format::Raw | Format::Luks => None,
            Format::Qcow2(options) if options.encrypt.is_some() => None,
            Format::Qcow2(_) => Some("qcow2"),
            Format::Foreign(driver, _) => Some(driver.name()),
        }
    }
}

/// A piece of the disk and what is in it.
struct Piece {
    start: u64,
    data: Vec<u8>,
}

impl Piece {
    /// A part of it, in units of so many bytes.
    fn part(&self, rng: &mut Rng, unit: u64) -> Range<usize> {
        let len = self.data.len() as u64 / unit;
        let from = rng.below(len);
        let to = from + 1 + rng.below(len - from);
        (from * unit) as usize..(to * unit) as usize
    }
}

fn operation(rng: &mut Rng) -> Op {
    match rng.below(16) {
        0..=7 => Op::Write,
        8 | 9 => Op::WriteZeroes { unmap: rng.below(2) == 0 },
        10 | 11 => Op::Discard,
        12 => Op::Flush,
        _ => Op::Read,
    }
}

/// Bytes to write, now and then zeroes.
fn bytes(rng: &mut Rng, len: usize) -> Vec<u8> {
    let byte = rng.below(8) as u8 * 31;
    (0..len).map(|at| byte.wrapping_mul((at / 512) as u8 | 1)).collect()
}

fn by_calls(node: &dyn BlockNode, pieces: &mut [Piece], mut rng: Rng) {
    for _ in 0..150 {
        let which = rng.below(pieces.len() as u64) as usize;
        let piece = &mut pieces[which];
        let part = piece.part(&mut rng, 1);
        let (at, len) = (piece.start + part.start as u64, part.len() as u64);
        match operation(&mut rng) {
            Op::Write => {
                let data = bytes(&mut rng, part.len());
                node.write_at(at, &data).expect("write");
                piece.data[part].copy_from_slice(&data);
            }
            Op::WriteZeroes { unmap } => {
                node.write_zeroes(at, len, unmap).expect("zeroes");
                piece.data[part].fill(0);
            }
            Op::Discard => {
                node.discard(at, len).expect("discard");
                node.read_at(at, &mut piece.data[part]).expect("read");
            }
            Op::Flush => node.flush().expect("flush"),
            Op::Read => {
                let mut found = vec![0; part.len()];
                node.read_at(at, &mut found).expect("read");
                assert!(found == piece.data[part], "bytes at {at} are not what was written");
            }
        }
    }
}

/// A request under way: which piece, which part of it, its bytes.
struct Flight(usize, Range<usize>, Op, Vec<u8>);

fn by_queue(backend: &Arc<NodeBackend>, assist: bool, pieces: &mut [Piece], mut rng: Rng) {
    let mut queue = Arc::clone(backend).queue(8).expect("queue");
    if assist {
        queue.assist().expect("assist");
    }
    let unit = u64::from(backend.geometry().logical_block);
    let mut flights: HashMap<u64, Flight> = HashMap::new();
    let mut done = Vec::new();
    let mut next = 0;
    while next < 200 || !flights.is_empty() {
        while next < 200 && flights.len() < 8 {
            let which = rng.below(pieces.len() as u64) as usize;
            if flights.values().any(|flight| flight.0 == which) {
                break;
            }
            let (op, piece) = (operation(&mut rng), &pieces[which]);
            let part = piece.part(&mut rng, unit);
            let mut data = bytes(&mut rng, part.len());
            // SAFETY: the vector's bytes stay where they are until the completion was reaped.
            let buffer = unsafe { IoVec::new(data.as_mut_ptr(), data.len()) };
            let buffers = if matches!(op, Op::Read | Op::Write) { vec![buffer] } else { Vec::new() };
            let (offset, len) = (piece.start + part.start as u64, part.len() as u64);
            flights.insert(next, Flight(which, part, op, data));
            queue.submit(Request { id: next, op, offset, len, buffers });
            next += 1;
        }
        queue.kick_and_wait();
        queue.reap(&mut done);
        for completion in done.drain(..) {
            let Flight(which, part, op, data) = flights.remove(&completion.id).expect("it is under way");
            completion.result.unwrap_or_else(|e| panic!("{op:?}: {e}"));
            let piece = &mut pieces[which];
            let at = piece.start + part.start as u64;
            match op {
                Op::Write => piece.data[part].copy_from_slice(&data),
                Op::WriteZeroes { .. } => piece.data[part].fill(0),
                Op::Discard => backend.node().read_at(at, &mut piece.data[part]).expect("read"),
                Op::Flush => {}
                Op::Read => assert!(data == piece.data[part], "bytes at {at} are not what was written"),
            }
        }
    }
}

/// Somebody else's commands, until the others are done.
fn disturb(node: &dyn BlockNode, case: &Case, stop: &AtomicBool, mut rng: Rng) {
    let resizable = !matches!(case.format, Format::Foreign(..)) && !case.packed;
    let snapshots = matches!(&case.format, Format::Qcow2(options) if options.data_file.is_none());
    let image = node.as_qcow2().filter(|_| snapshots);
    while !stop.load(Ordering::Acquire) {
        match (rng.below(4), image) {
            (0, Some(image)) => {
                image.create_snapshot("s", 1).expect("snapshot");
                image.delete_snapshot("s").expect("deleted");
            }
            (0 | 1, _) if resizable => {
                node.truncate(SIZE + (rng.below(9) << 18), Preallocation::Off).expect("longer");
                node.truncate(SIZE, Preallocation::Off).expect("shorter");
            }
            (2, _) => node.status(rng.below(SIZE), 1 << 20).map(drop).expect("status"),
            (3, _) => node.refresh_size().expect("size"),
            _ => node.flush().expect("flush"),
        }
        std::thread::yield_now();
    }
}

fn contents(node: &dyn BlockNode) -> Vec<u8> {
    let mut out = vec![0; SIZE as usize];
    node.read_at(0, &mut out).expect("read");
    out
}

/// Cuts the disk into pieces for five users, the first two of whom use whole blocks.
fn cut(model: &[u8], block: usize, rng: &mut Rng) -> Vec<Vec<Piece>> {
    let mut users: Vec<Vec<Piece>> = (0..5).map(|_| Vec::new()).collect();
    let mut at = 0;
    while at < model.len() {
        let len = ((1 + rng.below(30_000 / block as u64)) as usize * block).min(model.len() - at);
        let user = if len.is_multiple_of(block) { rng.below(5) } else { 2 };
        users[user as usize].push(Piece { start: at as u64, data: model[at..at + len].to_vec() });
        at += len;
    }
    users
}

fn check_by_qemu(dir: &Path, format: &str, model: &[u8]) {
    let qemu_img = std::env::var_os("QEMU_IMG").unwrap_or_else(|| "qemu-img".into());
    std::fs::write(dir.join("model"), model).expect("model");
    let checks: [&[&str]; 2] = [
        &["check", "-q", "-f", format, "image"],
        &["compare", "-q", "-f", format, "-F", "raw", "image", "model"],
    ];
    // QEMU does not check these.
    let from = usize::from(matches!(format, "vpc"));
    for args in &checks[from..] {
        let out = Command::new(&qemu_img).args(*args).current_dir(dir).output();
        let out = out.expect("qemu-img (Debian: qemu-utils) is needed for this test");
        assert!(
            out.status.success(),
            "{args:?}: {}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
    }
}

fn exercise(case: &Case, seed: u64) {
    let dir = tempfile::tempdir().expect("directory");
    let node = case.node(dir.path(), true);
    assert!(node.size() >= SIZE);
    let mut model = contents(&*node);
    let mut users = cut(&model, if case.blocks { 4096 } else { 512 }, &mut Rng(seed));
    let spawner: Arc<dyn Spawner> = PlainSpawner::shared();
    let backend = NodeBackend::new(Arc::clone(&node), "at-once", &spawner, true);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = users
            .iter_mut()
            .enumerate()
            .map(|(n, pieces)| {
                let (node, backend, rng) = (&node, &backend, Rng(seed ^ (n as u64 + 1) << 40));
                scope.spawn(move || match n {
                    0 | 1 => by_queue(backend, n == 0, pieces, rng),
                    _ => by_calls(&**node, pieces, rng),
                })
            })
            .collect();
        let other = scope.spawn(|| disturb(&*node, case, &stop, Rng(seed ^ 0xabcd_0000)));
        let ended: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        stop.store(true, Ordering::Release);
        other.join().expect("no other failed");
        assert!(ended.iter().all(Result::is_ok), "seed {seed}: {case:?}");
    });
    for piece in users.iter().flatten() {
        model[piece.start as usize..][..piece.data.len()].copy_from_slice(&piece.data);
    }
    let same = |found: Vec<u8>, what: &str| {
        let at = found.iter().zip(&model).position(|(a, b)| a != b);
        assert!(at.is_none(), "seed {seed}, {what}: byte {at:?} differs: {case:?}");
    };
    same(contents(&*node), "open");
    drop((backend, node));
    same(contents(&*case.node(dir.path(), false)), "opened again");
    if let Some(format) = case.qemu() {
        // What lies behind a disk that is rounded up is zeroes.
        check_by_qemu(dir.path(), format, &model);
    }
}

fn run(cases: &[Case]) {
    let rounds = std::env::var("HOLDFAST_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    for round in 0..rounds {
        for (n, case) in cases.iter().enumerate() {
            for io_uring in [false, true] {
                let number: u64 = round * 1000 + n as u64 * 2 + u64::from(io_uring) + 1;
                let seed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                exercise(&Case { io_uring, ..case.clone() }, seed);
            }
        }
    }
}

#[test]
fn raw_disks_and_volumes() {
    let raw = || Case::new(Format::Raw);
    run(&[
        raw(),
        Case { detect: true, ..raw() },
        Case { blocks: true, ..raw() },
        Case::new(Format::Luks),
        Case { blocks: true, ..Case::new(Format::Luks) },
    ]);
}

#[test]
fn foreign_images() {
    let block_size = 1 << 20;
    let options = foreign::CreateOptions { block_size, force_size: true, ..Default::default() };
    let formats = [Driver::Vdi, Driver::Vhdx, Driver::Vpc, Driver::Vmdk];
    let mut cases: Vec<Case> =
        formats.iter().map(|driver| Case::new(Format::Foreign(*driver, options.clone()))).collect();
    let zeroed = foreign::CreateOptions { zeroed_grain: true, ..options.clone() };
    cases.push(Case { detect: true, ..Case::new(Format::Foreign(Driver::Vmdk, zeroed)) });
    let vpc = Format::Foreign(Driver::Vpc, options);
    cases.push(Case { blocks: true, ..Case::new(vpc) });
    run(&cases);
}

fn qcow2_case(change: impl FnOnce(&mut qcow2::CreateOptions)) -> Case {
    let mut options = qcow2::CreateOptions::new(SIZE);
    change(&mut options);
    Case::new(Format::Qcow2(Box::new(options)))
}

#[test]
fn qcow2_images() {
    run(&[
        qcow2_case(|_| ()),
        qcow2_case(|o| o.cluster_size = 4096),
        qcow2_case(|o| o.extended_l2 = true),
        Case { detect: true, ..qcow2_case(|o| o.cluster_size = 1 << 20) },
        Case { blocks: true, ..qcow2_case(|o| o.cluster_size = 512) },
        Case { packed: true, ..qcow2_case(|o| o.cluster_size = 16384) },
    ]);
}

#[test]
fn qcow2_images_of_several_files() {
    let base = |o: &mut qcow2::CreateOptions| {
        o.backing_file = Some("base".into());
        o.backing_format = Some("raw".into());
    };
    run(&[
        qcow2_case(base),
        qcow2_case(|o| {
            base(o);
            o.extended_l2 = true;
        }),
        qcow2_case(|o| o.data_file = Some("data".into())),
        qcow2_case(|o| {
            o.data_file = Some("data".into());
            o.data_file_raw = true;
        }),
        qcow2_case(|o| o.encrypt = Some(luks::CreateOptions { iter_time: 1, ..Default::default() })),
    ]);
}
