//! The disk, driven through its rings.

use std::io::Write;
use std::sync::Arc;

use holdfast_block::graph::Opener;
use holdfast_block::qcow2::{self, CreateOptions};
use holdfast_block::raw::{RawImage, RawOptions};
use holdfast_block::{BlockBackend, BlockError, BlockQueue, Completion, Geometry, Request};
use holdfast_threads::PlainSpawner;
use parking_lot::Mutex;
use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config::DiskConfig;
use super::policy::{Action, DiskEvents, IoFailure, OnError};
use super::{MAX_RANGES, bit};
use crate::config::VirtQueueAffinity;
use crate::device::feature;
use crate::testing::{DATA, Desc, Rig, WRITE, context, eventually, mischief, run_wild};

const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUF: u64 = DATA + 0x1000;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn image(sectors: usize) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("file");
    let bytes: Vec<u8> = (0..sectors * 512).map(|i| (i / 512) as u8).collect();
    file.write_all(&bytes).expect("written");
    file
}

fn config(file: &tempfile::NamedTempFile) -> DiskConfig {
    DiskConfig { path: Some(file.path().to_owned()), ..DiskConfig::default() }
}

fn rig_with(config: &DiskConfig, features: u64) -> Rig {
    let context = context();
    let device = super::build("_disk0", config, &context).expect("builds");
    let mut rig = Rig::new(context, device);
    rig.start(features);
    rig
}

/// A request with `data` between header and status; returns status and used length.
fn request(rig: &mut Rig, queue: u16, (kind, sector): (u32, u64), data: &[Desc]) -> (u8, u32) {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    rig.poke(HEADER, &header);
    rig.poke(STATUS, &[0xee]);
    let mut descs = vec![(HEADER, 16, 0)];
    descs.extend(data);
    descs.push((STATUS, 1, WRITE));
    let len = rig.request(queue, &descs);
    (rig.peek(STATUS, 1)[0], len)
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut out = sector.to_le_bytes().to_vec();
    out.extend(sectors.to_le_bytes());
    out.extend(flags.to_le_bytes());
    out
}

#[test]
fn data_is_read_written_flushed_zeroed_and_discarded() {
    for disable_io_uring in [false, true] {
        let file = image(64);
        let config = DiskConfig { disable_io_uring, ..config(&file) };
        let all = bit::FLUSH | bit::DISCARD | bit::WRITE_ZEROES | feature::EVENT_IDX;
        let mut rig = rig_with(&config, all);
        let data = [(BUF, 512, WRITE), (BUF + 0x1000, 1024, WRITE)];
        assert_eq!(request(&mut rig, 0, (IN, 5), &data), (0, 512 + 1024 + 1));
        assert_eq!(rig.peek(BUF, 512), [5; 512]);
        assert_eq!(rig.peek(BUF + 0x1000 + 512, 512), [7; 512]);
        rig.poke(BUF, &[0xaa; 1024]);
        assert_eq!(request(&mut rig, 0, (OUT, 10), &[(BUF, 1024, 0)]), (0, 1));
        assert_eq!(request(&mut rig, 0, (FLUSH, 0), &[]), (0, 1));
        let mut ranges = range(20, 4, 0);
        ranges.extend(range(30, 2, 0));
        rig.poke(BUF, &ranges);
        assert_eq!(request(&mut rig, 0, (DISCARD, 0), &[(BUF, 32, 0)]), (0, 1));
        rig.poke(BUF, &range(40, 3, 1));
        assert_eq!(request(&mut rig, 0, (WRITE_ZEROES, 0), &[(BUF, 16, 0)]), (0, 1));
        let disk = std::fs::read(file.path()).expect("reads");
        assert_eq!(disk[10 * 512..12 * 512], [0xaa; 1024]);
        for sector in (20..24).chain(30..32).chain(40..43) {
            assert_eq!(disk[sector * 512..sector * 512 + 512], [0; 512], "sector {sector}");
        }
        assert_eq!(disk[24 * 512], 24);
        let counters = rig.device.counters();
        assert_eq!((counters["read_bytes"], counters["read_ops"]), (1536, 1));
        // Zeroes that are written are written.
        assert_eq!((counters["write_bytes"], counters["write_ops"], counters["flush_ops"]), (2560, 2, 1));
    }
}

#[test]
fn errors_are_answered_with_their_status() {
    let file = image(8);
    let mut rig = rig_with(&config(&file), bit::FLUSH | bit::DISCARD | bit::WRITE_ZEROES);
    let sector = [(BUF, 512, WRITE)];
    assert_eq!(request(&mut rig, 0, (IN, 8), &sector).0, 1, "past the end");
    assert_eq!(request(&mut rig, 0, (IN, u64::MAX), &sector).0, 1, "overflow");
    assert_eq!(request(&mut rig, 0, (IN, 0), &[(BUF, 100, WRITE)]).0, 1, "half a sector");
    assert_eq!(request(&mut rig, 0, (OUT, 7), &[(BUF, 1024, 0)]).0, 1, "past the end");
    assert_eq!(request(&mut rig, 0, (99, 0), &[]).0, 2, "unknown type");
    rig.poke(BUF, &range(0, 1, 1));
    assert_eq!(request(&mut rig, 0, (DISCARD, 0), &[(BUF, 16, 0)]).0, 2, "unmap on a discard");
    rig.poke(BUF, &range(0, 1, 6));
    assert_eq!(request(&mut rig, 0, (WRITE_ZEROES, 0), &[(BUF, 16, 0)]).0, 2, "unknown flags");
    rig.poke(BUF, &range(u64::MAX, u32::MAX, 0));
    assert_eq!(request(&mut rig, 0, (WRITE_ZEROES, 0), &[(BUF, 16, 0)]).0, 1, "outside");
    assert_eq!(request(&mut rig, 0, (DISCARD, 0), &[(BUF, 15, 0)]).0, 1, "half a range");
    assert_eq!(request(&mut rig, 0, (DISCARD, 0), &[]).0, 1, "no range");
    assert_eq!(request(&mut rig, 0, (DISCARD, 0), &[(BUF, 16 * (MAX_RANGES + 1), 0)]).0, 1, "too many");
    assert_eq!(rig.status(), 15, "none of it breaks the device");
    file.as_file().set_len(512).expect("shrinks");
    assert_eq!(request(&mut rig, 0, (IN, 4), &sector).0, 1, "the host's error");
    assert!(rig.device.counters()["errors"] >= 10);
}

#[test]
fn requests_without_header_or_status_break_the_device() {
    let file = image(8);
    let mut rig = rig_with(&config(&file), 0);
    let bad: &[(&str, &[Desc])] = &[
        ("short header", &[(HEADER, 15, 0), (STATUS, 1, WRITE)]),
        ("no header", &[(STATUS, 1, WRITE)]),
        ("no status", &[(HEADER, 16, 0)]),
    ];
    for (why, descs) in bad {
        let head = rig.rings[0].chain(descs);
        rig.rings[0].publish(head);
        rig.kick(0);
        rig.expect_broken(why);
        rig.start(0);
    }
    assert_eq!(request(&mut rig, 0, (IN, 1), &[(BUF, 512, WRITE)]).0, 0);
}

#[test]
fn descriptors_given_twice_are_found_before_they_pile_up() {
    let file = image(8);
    let mut rig = rig_with(&config(&file), 0);
    let mut header = OUT.to_le_bytes().to_vec();
    header.extend([0; 12]);
    rig.poke(HEADER, &header);
    let head = rig.rings[0].chain(&[(HEADER, 16, 0), (BUF, 512, 0), (STATUS, 1, WRITE)]);
    // The same chain in every slot, and then all of them once more.
    for _ in 0..16 {
        rig.rings[0].publish(head);
    }
    rig.kick(0);
    for _ in 0..16 {
        assert_eq!(rig.rings[0].wait_used().0, head);
    }
    assert_eq!(rig.status(), 15);
}

#[test]
fn readonly_disks_say_so_and_refuse_writes() {
    let file = image(8);
    let readonly = DiskConfig { readonly: true, ..config(&file) };
    let mut rig = rig_with(&readonly, bit::RO);
    let offered = rig.offered();
    assert_eq!(offered & (bit::RO | bit::DISCARD | bit::WRITE_ZEROES), bit::RO);
    assert_eq!(request(&mut rig, 0, (OUT, 0), &[(BUF, 512, 0)]).0, 1);
    assert_eq!(request(&mut rig, 0, (IN, 3), &[(BUF, 512, WRITE)]).0, 0);
    assert_eq!(rig.peek(BUF, 2), [3, 3]);
}

#[test]
fn the_config_space_describes_the_disk() {
    let file = image(64);
    let many = DiskConfig { num_queues: 3, serial: Some("disk-7".to_owned()), ..config(&file) };
    let mut rig = rig_with(&many, bit::MQ);
    assert_eq!(rig.config(0, 8), 64u64.to_le_bytes());
    assert_eq!(rig.config(12, 4), 126u32.to_le_bytes());
    assert_eq!(rig.config(20, 4), 512u32.to_le_bytes());
    assert_eq!(rig.config(24, 1), [3], "eight logical blocks in a physical one");
    assert_eq!(rig.config(34, 2), 3u16.to_le_bytes());
    assert_eq!(rig.config(0x80, 8), [0; 8]);
    assert_ne!(rig.offered() & bit::MQ, 0);
    for queue in 0..3 {
        let data = [(BUF, 8, WRITE), (BUF + 8, 12, WRITE)];
        assert_eq!(request(&mut rig, queue, (GET_ID, 0), &data), (0, 21));
        assert_eq!(rig.peek(BUF, 20), *b"disk-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    }
    assert_eq!(rig.config(32, 1), [1]);
    rig.write_config(32, &[0]);
    assert_eq!(rig.config(32, 1), [0], "write-through");
    assert_eq!(request(&mut rig, 1, (OUT, 0), &[(BUF, 512, 0)]), (0, 1));
}

#[test]
fn the_driver_hears_of_a_new_size() {
    let file = image(8);
    let context = context();
    let disk = super::build("_disk0", &config(&file), &context).expect("builds");
    let mut rig = Rig::new(context, Arc::clone(&disk) as Arc<dyn crate::VirtioDevice>);
    rig.start(0);
    file.as_file().set_len(16 * 512).expect("grows");
    let generation = rig.read32(0xfc);
    assert!(disk.refresh_size().expect("asked"));
    assert_ne!(rig.read32(0xfc), generation);
    assert_eq!(rig.read32(0x60) & 2, 2);
    assert_eq!(rig.config(0, 8), 16u64.to_le_bytes());
    assert_eq!(request(&mut rig, 0, (OUT, 15), &[(BUF, 512, 0)]).0, 0);
}

#[test]
fn a_paused_disk_is_saved_and_goes_on_elsewhere() {
    let file = image(64);
    let mut rig = rig_with(&config(&file), bit::FLUSH);
    rig.poke(BUF, &[0x77; 512]);
    assert_eq!(request(&mut rig, 0, (OUT, 2), &[(BUF, 512, 0)]).0, 0);
    rig.write_config(32, &[0]);
    assert!(rig.device.save().is_err());
    rig.device.pause();
    let state = rig.device.save().expect("saves");
    let memory = rig.context.memory.clone();
    let rings = std::mem::take(&mut rig.rings);
    drop(rig);

    let mut fresh = context();
    fresh.memory = memory;
    let device = super::build("_disk0", &config(&file), &fresh).expect("the lock is free again");
    let mut copy = Rig::new(fresh, device);
    copy.rings = rings;
    copy.device.restore(&state).expect("restores");
    copy.device.resume();
    assert_eq!(copy.config(32, 1), [0]);
    assert_eq!(request(&mut copy, 0, (IN, 2), &[(BUF + 512, 512, WRITE)]), (0, 513));
    assert_eq!(copy.peek(BUF + 512, 512), [0x77; 512]);
    copy.device.pause();
    copy.device.resume();
    assert_eq!(request(&mut copy, 0, (FLUSH, 0), &[]).0, 0);

    let other = DiskConfig { queue_size: 64, readonly: true, ..config(&file) };
    let mut rig = {
        drop(copy);
        rig_with(&other, 0)
    };
    rig.device.reset();
    let error = rig.device.restore(&state).expect_err("another shape");
    assert!(error.to_string().contains("queues"), "{error}");
    assert_eq!(request_after_reset(&mut rig), 0);
}

fn request_after_reset(rig: &mut Rig) -> u8 {
    rig.start(0);
    request(rig, 0, (IN, 0), &[(BUF, 512, WRITE)]).0
}

#[test]
fn reads_mark_pages_dirty_for_migration() {
    let file = image(64);
    let mut rig = rig_with(&config(&file), 0);
    let (tracker, offset) = holdfast_memory::tracker_at(&rig.context.memory, BUF).expect("in RAM");
    let page = offset / 4096;
    tracker.start_log();
    assert_eq!(request(&mut rig, 0, (IN, 0), &[(BUF + 4000, 512, WRITE)]).0, 0);
    assert!(tracker.is_dirty(page) && tracker.is_dirty(page + 1) && !tracker.is_dirty(page + 2));
}

#[test]
fn many_requests_at_once_all_complete() {
    let file = image(64);
    let mut rig = rig_with(&config(&file), feature::EVENT_IDX);
    for round in 0..50u64 {
        let mut heads = Vec::new();
        for n in 0..5u64 {
            let at = DATA + 0x10_0000 + n * 0x1000;
            let mut header = IN.to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(((round + n) % 64).to_le_bytes());
            rig.poke(at, &header);
            heads.push(rig.rings[0].chain(&[(at, 16, 0), (at + 512, 512, WRITE), (at + 1024, 1, WRITE)]));
        }
        for head in &heads {
            rig.rings[0].publish(*head);
        }
        rig.kick(0);
        for _ in &heads {
            let (head, len) = rig.rings[0].wait_used();
            assert!(heads.contains(&head) && len == 513);
        }
        for n in 0..5u64 {
            let at = DATA + 0x10_0000 + n * 0x1000;
            assert_eq!(rig.peek(at + 512, 1)[0], ((round + n) % 64) as u8);
        }
    }
    eventually("interrupt", || rig.read32(0x60) == 1);
}

#[test]
fn a_disk_in_use_or_missing_is_refused_by_name() {
    let file = image(8);
    let _rig = rig_with(&config(&file), 0);
    let error = super::build("_disk1", &config(&file), &context()).expect_err("in use").to_string();
    assert!(error.contains("_disk1") && error.contains(&file.path().display().to_string()), "{error}");
    let gone = DiskConfig { path: Some("/nonexistent/disk".into()), ..DiskConfig::default() };
    let error = super::build("_disk1", &gone, &context()).expect_err("missing").to_string();
    assert!(error.contains("/nonexistent/disk") && error.contains("No such file"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn any_driver_can_be_outlived(what in mischief(), disable_io_uring in any::<bool>()) {
        let file = image(8);
        let config = DiskConfig { num_queues: 2, disable_io_uring, ..config(&file) };
        let mut rig = rig_with(&config, 0);
        run_wild(&mut rig, bit::MQ | feature::INDIRECT_DESC, &what);
        prop_assert_eq!(request(&mut rig, 1, (IN, 3), &[(BUF, 512, WRITE)]), (0, 513));
        prop_assert_eq!(file.path().metadata().expect("there").len(), 8 * 512);
    }
}

/// A disk that answers when it is told to.
#[derive(Debug, Default)]
struct Slow {
    waiting: Mutex<Vec<u64>>,
    released: Mutex<Vec<u64>>,
    event: std::sync::OnceLock<EventFd>,
}

impl Slow {
    fn event(&self) -> &EventFd {
        self.event.get_or_init(|| EventFd::new(EFD_NONBLOCK).expect("eventfd"))
    }
    fn release(&self) {
        self.released.lock().append(&mut self.waiting.lock());
        self.event().write(1).expect("signalled");
    }
}

impl BlockBackend for Slow {
    fn geometry(&self) -> Geometry {
        Geometry { size: 1 << 20, logical_block: 512, physical_block: 512, can_discard: false }
    }
    fn is_readonly(&self) -> bool {
        false
    }
    fn queue(self: Arc<Self>, _depth: u16) -> Result<Box<dyn BlockQueue>, BlockError> {
        Ok(Box::new(SlowQueue(self, 0)))
    }
    fn refresh(&self) -> Result<bool, BlockError> {
        Ok(false)
    }
    fn engine(&self) -> &'static str {
        "slow"
    }
}

#[derive(Debug)]
struct SlowQueue(Arc<Slow>, usize);

impl BlockQueue for SlowQueue {
    fn submit(&mut self, request: Request) {
        self.1 += 1;
        self.0.waiting.lock().push(request.id);
    }
    fn kick(&mut self) {}
    fn reap(&mut self, out: &mut Vec<Completion>) {
        let _ = self.0.event().read();
        let done = std::mem::take(&mut *self.0.released.lock());
        self.1 -= done.len();
        let failed = || Err(std::io::Error::from_raw_os_error(libc::EIO));
        // Odd requests fail.
        out.extend(
            done.into_iter().map(|id| Completion { id, result: if id & 1 == 0 { Ok(()) } else { failed() } }),
        );
    }
    fn in_flight(&self) -> usize {
        self.1
    }
    fn event(&self) -> &EventFd {
        self.0.event()
    }
}

#[test]
fn a_pause_waits_for_requests_under_way_and_errors_are_reported() {
    let context = context();
    let slow = Arc::new(Slow::default());
    let backend = Arc::clone(&slow) as Arc<dyn BlockBackend>;
    let disk = super::Blk::new("_disk0", &DiskConfig::default(), backend, &context).expect("builds");
    let mut rig = Rig::new(context, disk);
    rig.start(bit::FLUSH);
    rig.poke(HEADER, &[0; 16]);
    for n in 0..2u64 {
        let status = STATUS + n;
        let head = rig.rings[0].chain(&[(HEADER, 16, 0), (BUF + n * 512, 512, WRITE), (status, 1, WRITE)]);
        rig.rings[0].publish(head);
    }
    rig.poke(STATUS, &[0xee, 0xee]);
    rig.kick(0);
    eventually("submitted", || slow.waiting.lock().len() == 2);
    let device = Arc::clone(&rig.device);
    let pausing = std::thread::spawn(move || device.pause());
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert!(!pausing.is_finished(), "two requests are under way");
    assert_eq!(rig.rings[0].used_index(), 0);
    slow.release();
    pausing.join().expect("paused");
    assert_eq!(rig.rings[0].used_index(), 2);
    assert_eq!(rig.peek(STATUS, 2), [0, 1], "the second one failed");
    let state = rig.device.save().expect("saves");
    assert_eq!(state.data["registers"]["queues"][0]["next_used"], 2);
    assert_eq!(rig.device.counters()["errors"], 1);
}

/// An image with `options`, in a directory of its own.
fn qcow2(dir: &std::path::Path, options: &CreateOptions) -> DiskConfig {
    let path = dir.join("disk.qcow2");
    let raw = RawOptions { create: true, ..RawOptions::new(&path) };
    let file = RawImage::open(raw, PlainSpawner::shared()).expect("file");
    drop(qcow2::create(file, None, options, None).expect("image"));
    DiskConfig {
        path: Some(path),
        image_type: Some(super::config::ImageType::Qcow2),
        ..DiskConfig::default()
    }
}

#[test]
fn a_qcow2_disk_keeps_what_is_written() {
    let dir = tempfile::tempdir().expect("directory");
    let mut disk = qcow2(dir.path(), &CreateOptions::new(16 << 20));
    for (no_uring, image_type) in [(false, Some(super::config::ImageType::Qcow2)), (true, None)] {
        disk.disable_io_uring = no_uring;
        disk.image_type = image_type;
        let mut rig = rig_with(&disk, bit::FLUSH | bit::DISCARD | bit::WRITE_ZEROES | feature::VERSION_1);
        for sector in [0, 1, 200, 20_000] {
            rig.poke(BUF, &[sector as u8 + 1; 1024]);
            assert_eq!(request(&mut rig, 0, (OUT, sector), &[(BUF, 1024, 0)]).0, 0);
            // Once more, in place.
            rig.poke(BUF, &[sector as u8 + 2; 1024]);
            assert_eq!(request(&mut rig, 0, (OUT, sector), &[(BUF, 1024, 0)]).0, 0);
        }
        assert_eq!(request(&mut rig, 0, (FLUSH, 0), &[]).0, 0);
        for sector in [200u64, 20_000, 0] {
            rig.poke(BUF, &[0; 512]);
            assert_eq!(request(&mut rig, 0, (IN, sector), &[(BUF, 512, WRITE)]), (0, 513));
            assert_eq!(rig.peek(BUF, 512), vec![sector as u8 + 2; 512], "sector {sector}");
        }
        let segment = range(128, 128, 0);
        rig.poke(BUF, &segment);
        assert_eq!(request(&mut rig, 0, (WRITE_ZEROES, 0), &[(BUF, 16, 0)]).0, 0);
        assert_eq!(request(&mut rig, 0, (IN, 200), &[(BUF, 512, WRITE)]).0, 0);
        assert_eq!(rig.peek(BUF, 512), vec![0; 512]);
        // Past the end.
        assert_eq!(request(&mut rig, 0, (IN, 32_768), &[(BUF, 512, WRITE)]).0, 1);
    }
    let reading = Opener::reading(PlainSpawner::shared());
    let node =
        reading.open_file(disk.path.as_deref().expect("path").to_str().expect("UTF-8"), None).expect("opens");
    let report = node.as_qcow2().expect("qcow2").check(qcow2::check::Fix::None).expect("checks");
    assert_eq!(report.messages, Vec::<String>::new());
}

#[test]
fn backing_files_are_opened_only_if_that_is_allowed() {
    let dir = tempfile::tempdir().expect("directory");
    std::fs::write(dir.path().join("base"), [7; 1 << 16]).expect("base");
    let options = CreateOptions {
        backing_file: Some("base".to_owned()),
        backing_format: Some("raw".to_owned()),
        ..CreateOptions::new(1 << 20)
    };
    let mut disk = qcow2(dir.path(), &options);
    let error = super::build("_disk0", &disk, &context()).expect_err("refused").to_string();
    assert!(error.contains("backing_files=on"), "{error}");
    disk.backing_files = true;
    let mut rig = rig_with(&disk, feature::VERSION_1);
    assert_eq!(request(&mut rig, 0, (IN, 3), &[(BUF, 512, WRITE)]), (0, 513));
    assert_eq!(rig.peek(BUF, 512), vec![7; 512]);
    assert_eq!(request(&mut rig, 0, (IN, 1000), &[(BUF, 512, WRITE)]), (0, 513));
    assert_eq!(rig.peek(BUF, 512), vec![0; 512]);
}

/// Fails requests until it is mended.
#[derive(Debug, Default)]
struct Full {
    mended: std::sync::atomic::AtomicBool,
    wrote: Arc<Mutex<Vec<u64>>>,
}

#[derive(Debug)]
struct FullQueue(EventFd, Vec<Completion>, Arc<Full>);

impl BlockBackend for Full {
    fn geometry(&self) -> Geometry {
        Geometry { size: 1 << 20, logical_block: 512, physical_block: 512, can_discard: false }
    }
    fn is_readonly(&self) -> bool {
        false
    }
    fn queue(self: Arc<Self>, _: u16) -> Result<Box<dyn BlockQueue>, BlockError> {
        Ok(Box::new(FullQueue(EventFd::new(EFD_NONBLOCK).expect("eventfd"), Vec::new(), self)))
    }
    fn refresh(&self) -> Result<bool, BlockError> {
        Ok(false)
    }
    fn engine(&self) -> &'static str {
        "none"
    }
}

impl BlockQueue for FullQueue {
    fn submit(&mut self, request: Request) {
        let full = !self.2.mended.load(std::sync::atomic::Ordering::SeqCst);
        let error = || std::io::Error::from_raw_os_error(libc::ENOSPC);
        if !full {
            self.2.wrote.lock().push(request.offset);
        }
        self.1.push(Completion { id: request.id, result: if full { Err(error()) } else { Ok(()) } });
    }
    fn kick(&mut self) {
        self.0.write(1).expect("written");
    }
    fn reap(&mut self, out: &mut Vec<Completion>) {
        let _ = self.0.read();
        out.append(&mut self.1);
    }
    fn in_flight(&self) -> usize {
        self.1.len()
    }
    fn event(&self) -> &EventFd {
        &self.0
    }
}

#[derive(Debug, Default)]
struct Heard(Mutex<Vec<IoFailure>>);

impl DiskEvents for Heard {
    fn io_error(&self, failure: IoFailure) {
        self.0.lock().push(failure);
    }
}

fn full_disk(config: &DiskConfig) -> (Rig, Arc<Full>, Arc<Heard>) {
    let context = context();
    let (full, heard) = (Arc::new(Full::default()), Arc::new(Heard::default()));
    let parts = super::DiskParts {
        backend: Arc::clone(&full) as Arc<dyn BlockBackend>,
        node: "n0".to_owned(),
        events: Some(Arc::clone(&heard) as Arc<dyn DiskEvents>),
    };
    let disk = super::Blk::of("_disk0", config, parts, &context).expect("builds");
    let mut rig = Rig::new(context, disk);
    rig.start(bit::FLUSH);
    (rig, full, heard)
}

#[test]
fn requests_that_a_full_host_fails_wait_for_the_vm_to_go_on() {
    let (mut rig, full, heard) = full_disk(&DiskConfig::default());
    for n in 0..2u64 {
        let mut header = OUT.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend((7 - n).to_le_bytes());
        rig.poke(HEADER + n * 16, &header);
        let descs = [(HEADER + n * 16, 16, 0), (BUF, 512, 0), (STATUS + n, 1, WRITE)];
        let head = rig.rings[0].chain(&descs);
        rig.rings[0].publish(head);
    }
    rig.poke(STATUS, &[0xee, 0xee]);
    rig.kick(0);
    eventually("both fail", || heard.0.lock().len() == 2);
    let failure = heard.0.lock()[0].clone();
    assert_eq!((failure.write, failure.action, failure.nospace), (true, Action::Stop, true));
    assert_eq!((failure.id.as_str(), failure.node.as_str()), ("_disk0", "n0"));
    rig.device.pause();
    assert_eq!((rig.rings[0].used_index(), rig.peek(STATUS, 2)), (0, vec![0xee, 0xee]));
    // They are part of the saved state.
    let state = rig.device.save().expect("saves");
    assert_eq!(state.data["device"]["stalled"].as_array().expect("a list").len(), 2);
    // Once more in vain, then there is room.
    rig.device.resume();
    eventually("both fail again", || heard.0.lock().len() == 4);
    rig.device.pause();
    full.mended.store(true, std::sync::atomic::Ordering::SeqCst);
    rig.device.resume();
    eventually("both are done", || rig.rings[0].used_index() == 2);
    assert_eq!(rig.peek(STATUS, 2), [0, 0]);
    let mut wrote = full.wrote.lock().clone();
    wrote.sort_unstable();
    assert_eq!(wrote, [6 * 512, 7 * 512]);
}

#[test]
fn failures_are_reported_or_ignored_as_asked() {
    let report = DiskConfig { werror: Some(OnError::Report), ..DiskConfig::default() };
    let (mut rig, _, heard) = full_disk(&report);
    assert_eq!(request(&mut rig, 0, (OUT, 0), &[(BUF, 512, 0)]).0, 1);
    assert_eq!(heard.0.lock()[0].action, Action::Report);
    let ignore = DiskConfig { werror: Some(OnError::Ignore), rerror: Some(OnError::Enospc), ..report };
    let (mut rig, _, heard) = full_disk(&ignore);
    assert_eq!(request(&mut rig, 0, (OUT, 0), &[(BUF, 512, 0)]).0, 0);
    assert_eq!(heard.0.lock()[0].action, Action::Ignore);
}

/// Host CPUs on which the task of `status` may run, as the kernel writes them; its name.
fn cpus_of(status: &str) -> (&str, &str) {
    let field = |key| status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default().trim();
    (field("Cpus_allowed_list:"), field("Name:"))
}

#[test]
fn queues_are_worked_on_where_they_are_told() {
    let file = image(8);
    let on = |queue_index, cpu| VirtQueueAffinity { queue_index, host_cpus: vec![cpu] };
    let with = |all| DiskConfig { num_queues: 2, queue_affinity: Some(all), ..config(&file) };
    let errors = with(vec![on(2, 0), on(1, 0), on(1, 0)]).validate();
    assert_eq!(errors.iter().filter(|e| e.field == "queue_affinity").count(), 2, "{errors:?}");
    let here = std::fs::read_to_string("/proc/thread-self/status").expect("this thread");
    let allowed = cpus_of(&here).0;
    let first = allowed.split([',', '-']).next().and_then(|cpu| cpu.parse().ok()).expect("a CPU");
    // A name of its own: other tests have disks too.
    let disk = super::build("pinned", &with(vec![on(1, first)]), &context()).expect("builds");
    let cpus_of_thread = |name: &str| {
        let tasks = std::fs::read_dir("/proc/self/task").expect("threads").flatten();
        let mut found = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok());
        found.find(|status| cpus_of(status).1 == name).map(|status| cpus_of(&status).0.to_owned())
    };
    // A thread takes its name when it first runs.
    eventually("two threads", || {
        cpus_of_thread("pinned_q0").is_some() && cpus_of_thread("pinned_q1").is_some()
    });
    assert_eq!(cpus_of_thread("pinned_q1"), Some(first.to_string()));
    assert_eq!(cpus_of_thread("pinned_q0").as_deref(), Some(allowed));
    drop(disk);
    super::build("pinned", &with(vec![on(0, 1 << 20)]), &context()).expect_err("no host has that many CPUs");
}

#[test]
fn writes_are_noted_twice_and_wait_while_the_medium_is_changed() {
    let context = context();
    let (first, second) = (Arc::new(Slow::default()), Arc::new(Slow::default()));
    let backend = Arc::clone(&first) as Arc<dyn BlockBackend>;
    let disk = super::Blk::new("_disk0", &DiskConfig::default(), backend, &context).expect("builds");
    let mut rig = Rig::new(context, disk.clone());
    rig.start(bit::FLUSH);
    let write = |rig: &mut Rig| {
        let header = [OUT.to_le_bytes().to_vec(), vec![0; 12]].concat();
        rig.poke(HEADER, &header);
        rig.poke(STATUS, &[0xee]);
        let head = rig.rings[0].chain(&[(HEADER, 16, 0), (BUF, 512, 0), (STATUS, 1, WRITE)]);
        rig.rings[0].publish(head);
        rig.kick(0);
    };
    let log = Arc::new(super::log::WriteLog::new(1 << 20));
    disk.log_writes(&log, true);
    write(&mut rig);
    eventually("submitted", || first.waiting.lock().len() == 1);
    let noted = [(0, super::log::UNIT)];
    assert_eq!(log.take(), noted, "it has begun");
    assert!(log.take().is_empty());
    first.release();
    eventually("done", || rig.rings[0].used_index() == 1);
    assert_eq!(log.take(), noted, "it is done");
    disk.log_writes(&log, false);
    // What comes now waits in the ring.
    disk.hold_back(true);
    rig.device.pause();
    rig.device.resume();
    write(&mut rig);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(first.waiting.lock().is_empty(), "it is held back");
    rig.device.pause();
    disk.change_medium(Arc::clone(&second) as Arc<dyn BlockBackend>, "n1".to_owned()).expect("changed");
    disk.hold_back(false);
    rig.device.resume();
    eventually("submitted elsewhere", || second.waiting.lock().len() == 1);
    second.release();
    eventually("done there", || rig.rings[0].used_index() == 2);
    assert_eq!((rig.peek(STATUS, 1)[0], disk.node().as_str()), (0, "n1"));
    assert!(log.take().is_empty(), "nobody wants to know");
}
