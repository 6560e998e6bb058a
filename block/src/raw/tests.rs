//! Both engines against a plain model of the disk.

use std::io::Write;
use std::os::unix::fs::MetadataExt;

use holdfast_threads::PlainSpawner;
use proptest::prelude::*;

use super::*;
use crate::node::is_zero;
use crate::{Completion, IoVec, Op, Request};

fn image(len: usize) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("temporary file");
    let bytes: Vec<u8> = (0..len).map(|i| (i / 512) as u8 ^ (i as u8)).collect();
    file.write_all(&bytes).expect("written");
    file
}

fn options(file: &tempfile::NamedTempFile, io_uring: bool) -> RawOptions {
    RawOptions { io_uring, ..RawOptions::new(file.path()) }
}

fn vector(buf: &mut [u8]) -> IoVec {
    // SAFETY: the tests reap all completions before their buffers go away.
    unsafe { IoVec::new(buf.as_mut_ptr(), buf.len()) }
}

fn run_all(queue: &mut dyn BlockQueue, requests: Vec<Request>) -> Vec<Completion> {
    let mut out = Vec::new();
    for request in requests {
        queue.submit(request);
    }
    queue.kick();
    while queue.in_flight() != 0 {
        queue.wait();
        queue.reap(&mut out);
    }
    out.sort_by_key(|c| c.id);
    out
}

fn request(op: Op, offset: u64, len: u64, buffers: Vec<IoVec>) -> Request {
    Request { id: 7, op, offset, len, buffers }
}

fn ok(queue: &mut dyn BlockQueue, r: Request) {
    let done = run_all(queue, vec![r]);
    assert_eq!(done.len(), 1);
    assert_eq!(done[0].id, 7);
    assert!(done[0].result.is_ok(), "{done:?}");
}

fn error(queue: &mut dyn BlockQueue, r: Request) -> i32 {
    let done = run_all(queue, vec![r]);
    done[0].result.as_ref().expect_err("must fail").raw_os_error().expect("an errno")
}

fn engines() -> Vec<bool> {
    if uring::available() { vec![true, false] } else { vec![false] }
}

#[test]
fn data_goes_through_several_buffers() {
    for uring in engines() {
        let file = image(64 * 1024);
        let disk = RawImage::open(options(&file, uring), PlainSpawner::shared()).expect("opens");
        assert_eq!(disk.engine(), if uring { "io_uring" } else { "threads" });
        assert_eq!(disk.geometry().sectors(), 128);
        let mut queue = disk.queue(4).expect("a queue");
        let (mut a, mut b) = (vec![1; 700], vec![2; 324]);
        let both = vec![vector(&mut a), vector(&mut b)];
        ok(&mut *queue, request(Op::Write, 1024, 0, both.clone()));
        ok(&mut *queue, request(Op::Flush, 0, 0, vec![]));
        a.fill(0);
        b.fill(0);
        ok(&mut *queue, request(Op::Read, 1024, 0, both));
        assert!(a.iter().all(|x| *x == 1) && b.iter().all(|x| *x == 2));
        let on_disk = std::fs::read(file.path()).expect("reads");
        assert_eq!(on_disk[1024..1724], a);
    }
}

#[test]
fn more_requests_than_slots_all_complete() {
    for uring in engines() {
        let file = image(64 * 1024);
        let disk = RawImage::open(options(&file, uring), PlainSpawner::shared()).expect("opens");
        let mut queue = disk.queue(2).expect("a queue");
        let mut buffers: Vec<Vec<u8>> = (0..100).map(|_| vec![0; 512]).collect();
        let requests = buffers.iter_mut().enumerate().map(|(i, b)| Request {
            id: i as u64,
            op: Op::Read,
            offset: 512 * i as u64,
            len: 0,
            buffers: vec![vector(b)],
        });
        let requests: Vec<_> = requests.collect();
        let done = run_all(&mut *queue, requests);
        assert_eq!(done.iter().map(|c| c.id).collect::<Vec<_>>(), (0..100).collect::<Vec<_>>());
        assert!(done.iter().all(|c| c.result.is_ok()));
        for (i, b) in buffers.iter().enumerate() {
            assert_eq!(b[3], i as u8 ^ 3, "buffer {i}");
        }
    }
}

#[test]
fn ranges_outside_and_writes_to_readonly_are_refused() {
    for uring in engines() {
        let file = image(4096);
        let disk = RawImage::open(options(&file, uring), PlainSpawner::shared()).expect("opens");
        let mut queue = disk.queue(4).expect("a queue");
        let mut buf = vec![0; 512];
        let v = || vec![];
        assert_eq!(error(&mut *queue, request(Op::Read, 4096, 0, vec![vector(&mut buf)])), libc::EINVAL);
        assert_eq!(error(&mut *queue, request(Op::Write, u64::MAX, 0, vec![vector(&mut buf)])), libc::EINVAL);
        assert_eq!(error(&mut *queue, request(Op::Discard, 512, 4096, v())), libc::EINVAL);
        assert_eq!(file.path().metadata().expect("there").len(), 4096, "nothing grows the image");
        let readonly = RawOptions { readonly: true, ..options(&file, uring) };
        let disk = RawImage::open(readonly, PlainSpawner::shared());
        assert!(disk.is_err(), "the queue keeps the image open, and the image its lock");
    }
}

#[test]
fn readonly_images_refuse_writes() {
    for uring in engines() {
        let file = image(4096);
        let readonly = RawOptions { readonly: true, ..options(&file, uring) };
        let disk = RawImage::open(readonly, PlainSpawner::shared()).expect("opens");
        assert!(disk.is_readonly() && !disk.geometry().can_discard);
        let mut queue = disk.queue(4).expect("a queue");
        let mut buf = vec![0; 512];
        for op in [Op::Write, Op::Discard, Op::WriteZeroes { unmap: true }] {
            let r = request(op, 0, 512, vec![vector(&mut buf)]);
            assert_eq!(error(&mut *queue, r), libc::EROFS);
        }
        ok(&mut *queue, request(Op::Read, 0, 0, vec![vector(&mut buf)]));
        assert_eq!(buf[5], 5);
    }
}

#[test]
fn zeroed_and_discarded_ranges_read_as_zeroes_and_are_given_back() {
    for uring in engines() {
        let len = 4 << 20;
        let file = image(len);
        let disk = RawImage::open(options(&file, uring), PlainSpawner::shared()).expect("opens");
        let mut queue = disk.queue(4).expect("a queue");
        file.as_file().sync_all().expect("synced");
        let before = file.path().metadata().expect("there").blocks();
        ok(&mut *queue, request(Op::WriteZeroes { unmap: false }, 512, 1 << 20, vec![]));
        ok(&mut *queue, request(Op::Discard, 2 << 20, 1 << 20, vec![]));
        let now = std::fs::read(file.path()).expect("reads");
        assert_eq!(now.len(), len);
        assert!(now[512..512 + (1 << 20)].iter().all(|b| *b == 0));
        assert!(now[2 << 20..3 << 20].iter().all(|b| *b == 0));
        assert_eq!(now[(3 << 20) + 1], 1);
        file.as_file().sync_all().expect("synced");
        assert!(file.path().metadata().expect("there").blocks() < before);
    }
}

#[test]
fn a_second_user_is_refused_by_name() {
    let file = image(4096);
    let open = |readonly, lock| {
        let o = RawOptions { readonly, lock, ..options(&file, true) };
        RawImage::open(o, PlainSpawner::shared())
    };
    let reader = open(true, LockRange::Bytes).expect("opens");
    let second = open(true, LockRange::Full).expect("readers share");
    let refused = open(false, LockRange::Bytes).expect_err("a writer does not");
    let name = file.path().display().to_string();
    assert!(refused.to_string().contains(&name), "{refused}");
    assert!(refused.to_string().contains("for reading"), "{refused}");
    drop((reader, second));
    let writer = open(false, LockRange::Full).expect("free again");
    let refused = open(true, LockRange::Bytes).expect_err("in use");
    assert!(refused.to_string().contains("for writing"), "{refused}");
    drop(writer);
}

#[test]
fn a_resized_image_is_noticed() {
    let file = image(4096);
    let disk = RawImage::open(options(&file, true), PlainSpawner::shared()).expect("opens");
    assert!(!disk.refresh().expect("stat"));
    file.as_file().set_len(8192).expect("grows");
    assert!(disk.refresh().expect("stat"));
    assert_eq!(disk.geometry().size, 8192);
}

#[test]
fn a_shrunken_image_gives_errors_not_old_data() {
    for uring in engines() {
        let file = image(8192);
        let disk = RawImage::open(options(&file, uring), PlainSpawner::shared()).expect("opens");
        let mut queue = disk.queue(4).expect("a queue");
        file.as_file().set_len(4096).expect("shrinks");
        let mut buf = vec![0; 512];
        assert_eq!(error(&mut *queue, request(Op::Read, 4096, 0, vec![vector(&mut buf)])), libc::EIO);
    }
}

#[test]
fn what_is_no_image_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let gone = RawImage::open(RawOptions::new(dir.path().join("gone")), PlainSpawner::shared());
    assert!(matches!(gone, Err(BlockError::Open { .. })));
    let folder = RawOptions { readonly: true, ..RawOptions::new(dir.path()) };
    assert!(matches!(RawImage::open(folder, PlainSpawner::shared()), Err(BlockError::Kind { .. })));
}

fn demanding(file: &tempfile::NamedTempFile, io_uring: bool) -> Arc<RawImage> {
    RawImage::demanding(options(file, io_uring)).expect("opens")
}

#[test]
fn misaligned_reads_bounce_and_misaligned_writes_are_refused() {
    for uring in engines() {
        let file = image(3 << 20);
        let disk = demanding(&file, uring);
        assert_eq!(disk.geometry().logical_block, 4096);
        let mut queue = disk.queue(4).expect("a queue");
        let mut buf = vec![0; 2 * CHUNK_AND_A_BIT];
        let model = std::fs::read(file.path()).expect("reads");
        let (a, b) = buf[1..].split_at_mut(777);
        let n = 512 * 5 + 777;
        let r = request(Op::Read, 512, 0, vec![vector(a), vector(&mut b[..n - 777])]);
        ok(&mut *queue, r);
        assert_eq!(buf[1..1 + n], model[512..512 + n]);
        let long = &mut buf[3..3 + CHUNK_AND_A_BIT];
        ok(&mut *queue, request(Op::Read, 1024, 0, vec![vector(long)]));
        assert_eq!(*long, model[1024..1024 + CHUNK_AND_A_BIT]);
        long.fill(9);
        let r = request(Op::Write, 8192, 0, vec![vector(&mut long[..(1 << 20) + 4096])]);
        ok(&mut *queue, r);
        let now = std::fs::read(file.path()).expect("reads");
        assert!(now[8192..8192 + (1 << 20) + 4096].iter().all(|b| *b == 9));
        assert_eq!(now[..8192], model[..8192]);
        let r = request(Op::Write, 512, 0, vec![vector(&mut buf[..512])]);
        assert_eq!(error(&mut *queue, r), libc::EINVAL);
    }
}

const CHUNK_AND_A_BIT: usize = (1 << 20) + 512 * 3 + 4096;

#[test]
fn direct_images_work_with_any_buffer() {
    for uring in engines() {
        let file = image(1 << 20);
        let direct = RawOptions { direct: true, ..options(&file, uring) };
        // Not every file system has direct I/O.
        let Ok(disk) = RawImage::open(direct, PlainSpawner::shared()) else { continue };
        let model = std::fs::read(file.path()).expect("reads");
        let block = disk.geometry().logical_block as usize;
        let mut queue = disk.queue(4).expect("a queue");
        let mut buf = vec![0; 64 * 1024 + 1];
        let odd = &mut buf[1..];
        ok(&mut *queue, request(Op::Read, block as u64, 0, vec![vector(odd)]));
        assert_eq!(*odd, model[block..block + 64 * 1024]);
        odd.fill(3);
        ok(&mut *queue, request(Op::Write, 0, 0, vec![vector(odd)]));
        ok(&mut *queue, request(Op::Flush, 0, 0, vec![]));
        assert_eq!(std::fs::read(file.path()).expect("reads")[..64 * 1024], *odd);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn any_sequence_equals_the_model(
        ops in prop::collection::vec((0..5u8, 0..64u64, 1..20u64, any::<u8>()), 1..20),
        uring in any::<bool>(), demand in any::<bool>(),
    ) {
        let file = image(64 * 512);
        let mut model = std::fs::read(file.path()).expect("reads");
        let uring = uring && uring::available();
        let disk = if demand {
            demanding(&file, uring)
        } else {
            RawImage::open(options(&file, uring), PlainSpawner::shared()).expect("opens")
        };
        let mut queue = disk.queue(3).expect("a queue");
        for (kind, sector, sectors, byte) in ops {
            let (offset, len) = (sector * 512, (sectors * 512) as usize);
            let op = match kind { 0 => Op::Read, 1 => Op::Write, 2 => Op::Flush, 3 => Op::Discard,
                _ => Op::WriteZeroes { unmap: byte & 1 != 0 } };
            let mut buf = vec![byte; len];
            let (a, b) = buf.split_at_mut(len / 3);
            let r = request(op, offset, len as u64, vec![vector(a), vector(b)]);
            let result = &run_all(&mut *queue, vec![r])[0].result;
            let at = offset as usize;
            let misaligned = demand && op == Op::Write && !(at | len).is_multiple_of(4096);
            prop_assert_eq!(result.is_ok(), op == Op::Flush || (at + len <= model.len() && !misaligned));
            if result.is_err() { continue }
            match op {
                Op::Read => prop_assert_eq!(&buf, &model[at..at + len]),
                Op::Write => model[at..at + len].copy_from_slice(&buf),
                Op::Flush => {}
                Op::Discard | Op::WriteZeroes { .. } => model[at..at + len].fill(0),
            }
        }
        prop_assert_eq!(std::fs::read(file.path()).expect("reads"), model);
    }
}

/// What goes past the end of a file makes it longer, never shorter: not even while others write further behind.
#[test]
fn who_makes_a_file_longer_cuts_nothing_off() {
    use crate::BlockNode as _;
    const PART: u64 = 8192;
    for round in 0..200 {
        let file = image(0);
        let disk = RawImage::open(options(&file, false), PlainSpawner::shared()).expect("opens");
        std::thread::scope(|scope| {
            for n in 0..4 {
                let disk = &disk;
                scope.spawn(move || {
                    for part in (n..32).step_by(4) {
                        disk.write_zeroes(part * PART + PART / 2, PART / 2, true).expect("zeroes");
                        disk.write_at(part * PART, &[1; PART as usize / 2]).expect("data");
                    }
                });
            }
        });
        let found = std::fs::read(file.path()).expect("reads");
        assert_eq!(found.len() as u64, 32 * PART, "round {round}");
        for (part, bytes) in found.chunks(PART as usize).enumerate() {
            let (data, zeroes) = bytes.split_at(PART as usize / 2);
            assert!(data.iter().all(|b| *b == 1) && is_zero(zeroes), "round {round}, part {part}");
        }
    }
}
