//! Power fails at every write: what was flushed is there, and the image is sound.

use std::io;

use parking_lot::Mutex;

use super::*;
use crate::node::Extent;

/// What reached a disk, in order.
#[derive(Debug, Clone)]
pub(super) enum Event {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Size(u64),
    Flush,
    /// The test has seen the flush return; the model at that time.
    Mark(usize),
}

/// A file in memory that remembers how it came about.
#[derive(Debug, Default)]
pub(super) struct Tape {
    pub(super) data: Mutex<Vec<u8>>,
    events: Mutex<Vec<Event>>,
}

fn apply(data: &mut Vec<u8>, event: &Event) {
    let mut fill = |offset: u64, bytes: &[u8]| {
        let end = offset as usize + bytes.len();
        if data.len() < end {
            data.resize(end, 0);
        }
        data[offset as usize..end].copy_from_slice(bytes);
    };
    match event {
        Event::Write(offset, bytes) => fill(*offset, bytes),
        Event::Zero(offset, len) => fill(*offset, &vec![0; *len as usize]),
        Event::Size(size) => data.resize(*size as usize, 0),
        Event::Flush | Event::Mark(_) => {}
    }
}

impl Tape {
    /// The disk is full at 8 MiB.
    fn fits(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= 8 << 20);
        end.map(drop).ok_or_else(|| os_error(libc::ENOSPC))
    }

    fn push(&self, event: Event) {
        apply(&mut self.data.lock(), &event);
        self.events.lock().push(event);
    }
}

impl BlockNode for Tape {
    fn driver(&self) -> &'static str {
        "file"
    }
    fn size(&self) -> u64 {
        self.data.lock().len() as u64
    }
    fn is_readonly(&self) -> bool {
        false
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let data = self.data.lock();
        for (n, to) in buf.iter_mut().enumerate() {
            *to = data.get((offset as usize).saturating_add(n)).copied().unwrap_or(0);
        }
        Ok(())
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.fits(offset, buf.len() as u64)?;
        self.push(Event::Write(offset, buf.to_vec()));
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.push(Event::Flush);
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let there = self.size().saturating_sub(offset);
        if there != 0 {
            self.push(Event::Zero(offset, len.min(there)));
        }
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.fits(offset, len)?;
        self.push(Event::Zero(offset, len));
        Ok(())
    }
    fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        Ok(Extent { len, allocated: true, data: true, zero: false, compressed: false, offset: Some(offset) })
    }
    fn truncate(&self, size: u64, _preallocation: Preallocation) -> io::Result<()> {
        self.fits(size, 0)?;
        self.push(Event::Size(size));
        Ok(())
    }
}

/// The disk after a crash at event `at`: all before the last flush, and some of what came since.
fn after_crash(events: &[Event], at: usize, rng: &mut Rng) -> Vec<u8> {
    let flushed = events[..at].iter().rposition(|e| matches!(e, Event::Flush)).unwrap_or(0);
    let mut data = Vec::new();
    for (n, event) in events[..at].iter().enumerate() {
        if n > flushed && rng.below(2) == 0 {
            continue;
        }
        match event {
            // Sectors are written whole; a write of many is not.
            Event::Write(offset, bytes) if n > flushed && bytes.len() > 512 && rng.below(2) == 0 => {
                for (i, sector) in bytes.chunks(512).enumerate() {
                    if rng.below(2) == 0 {
                        apply(&mut data, &Event::Write(offset + i as u64 * 512, sector.to_vec()));
                    }
                }
            }
            event => apply(&mut data, event),
        }
    }
    data
}

/// Sectors that have the same value from a flush to the end of the run must have it after any crash behind that flush.
struct History {
    models: Vec<Vec<u8>>,
    /// Sectors written since each model.
    touched: Vec<Vec<bool>>,
}

const SIZE: u64 = 128 << 10;

fn run(options: &CreateOptions, seed: u64, snapshots: bool) -> (Arc<Tape>, History) {
    let tape = Arc::new(Tape::default());
    let image = create(Arc::clone(&tape) as Arc<dyn BlockNode>, None, options, None).expect("create");
    let sectors = (SIZE / 512) as usize;
    let mut history = History { models: vec![vec![0; SIZE as usize]], touched: vec![vec![false; sectors]] };
    let mut model = vec![0; SIZE as usize];
    let mut rng = Rng(seed);
    tape.push(Event::Mark(0));
    for step in 0..50u64 {
        let offset = rng.below(SIZE / 512) * 512;
        let len = ((rng.below(24) + 1) * 512).min(SIZE - offset);
        let range = offset as usize..(offset + len) as usize;
        for touched in &mut history.touched {
            touched[(offset / 512) as usize..((offset + len) / 512) as usize].fill(true);
        }
        match rng.below(6) {
            0 => image.discard(offset, len).expect("discard"),
            1 => image.write_zeroes(offset, len, true).expect("zeroes"),
            _ => image.write_at(offset, &vec![(step + 1) as u8; len as usize]).expect("write"),
        }
        image.read_at(offset, &mut model[range]).expect("read");
        if snapshots && step % 20 == 10 {
            image.create_snapshot(&format!("s{step}"), 0).expect("snapshot");
        }
        if snapshots && step == 45 {
            image.delete_snapshot("s10").expect("delete");
        }
        if snapshots && step == 35 {
            image.apply_snapshot("s30").expect("apply");
            image.read_at(0, &mut model).expect("read");
            for touched in &mut history.touched {
                touched.fill(true);
            }
        }
        if rng.below(4) == 0 {
            image.flush().expect("flush");
            history.models.push(model.clone());
            history.touched.push(vec![false; sectors]);
            tape.push(Event::Mark(history.models.len() - 1));
        }
    }
    drop(image);
    (tape, history)
}

fn survive(options: &CreateOptions, seed: u64, snapshots: bool) {
    let (tape, history) = run(options, seed, snapshots);
    let events = tape.events.lock().clone();
    let start = events.iter().position(|e| matches!(e, Event::Mark(_))).expect("a mark");
    let mut rng = Rng(seed + 100);
    let mut at = start + 1;
    while at <= events.len() {
        let data = after_crash(&events, at, &mut rng);
        let disk = Arc::new(Tape { data: Mutex::new(data), events: Mutex::default() });
        let open = OpenOptions { readonly: true, ..OpenOptions::default() };
        let image = Qcow2::open(disk, None, None, &open).expect("open after a crash");
        let report = image.check(check::Fix::None).expect("check");
        assert_eq!(report.corruptions, 0, "{options:?} crash at {at}: {:?}", report.messages);
        let mark = events[..at]
            .iter()
            .rev()
            .find_map(|e| if let Event::Mark(n) = e { Some(*n) } else { None })
            .expect("mark");
        let now = contents(&*image);
        for sector in (0..history.touched[mark].len()).filter(|s| !history.touched[mark][*s]) {
            let range = sector * 512..(sector + 1) * 512;
            assert_eq!(
                now[range.clone()],
                history.models[mark][range],
                "{options:?} crash at {at}: sector {sector} was flushed"
            );
        }
        at += 1 + rng.below(4) as usize;
    }
}

#[test]
fn flushed_data_survives_a_crash_anywhere() {
    for seed in 1..2 {
        for options in [
            CreateOptions { cluster_size: 4096, ..CreateOptions::new(SIZE) },
            CreateOptions { cluster_size: 512, refcount_bits: 64, ..CreateOptions::new(SIZE) },
            CreateOptions { cluster_size: 16384, extended_l2: true, ..CreateOptions::new(SIZE) },
            CreateOptions { cluster_size: 4096, version: 2, ..CreateOptions::new(SIZE) },
        ] {
            survive(&options, seed, false);
        }
    }
}

#[test]
fn snapshots_survive_a_crash_anywhere() {
    for cluster_size in [4096, 512] {
        survive(&CreateOptions { cluster_size, ..CreateOptions::new(SIZE) }, 7, true);
    }
}

#[test]
fn write_errors_lose_nothing_else() {
    // A device that fails every n-th write: what was acknowledged stays readable, and the image stays sound.
    #[derive(Debug)]
    struct Failing {
        tape: Tape,
        countdown: Mutex<u64>,
    }
    impl Failing {
        fn fails(&self) -> bool {
            let mut left = self.countdown.lock();
            *left -= 1;
            if *left == 0 {
                *left = 13;
                return true;
            }
            false
        }
    }
    impl BlockNode for Failing {
        fn driver(&self) -> &'static str {
            "file"
        }
        fn size(&self) -> u64 {
            self.tape.size()
        }
        fn is_readonly(&self) -> bool {
            false
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            self.tape.read_at(offset, buf)
        }
        fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
            if self.fails() { Err(os_error(libc::ENOSPC)) } else { self.tape.write_at(offset, buf) }
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
        fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
            self.tape.discard(offset, len)
        }
        fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
            if self.fails() {
                Err(os_error(libc::ENOSPC))
            } else {
                self.tape.write_zeroes(offset, len, unmap)
            }
        }
        fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
            self.tape.status(offset, len)
        }
        fn truncate(&self, size: u64, how: Preallocation) -> io::Result<()> {
            self.tape.truncate(size, how)
        }
    }
    let disk = Arc::new(Failing { tape: Tape::default(), countdown: Mutex::new(u64::MAX) });
    let options = CreateOptions { cluster_size: 512, ..CreateOptions::new(SIZE) };
    let image = create(Arc::clone(&disk) as Arc<dyn BlockNode>, None, &options, None).expect("create");
    *disk.countdown.lock() = 20;
    let mut rng = Rng(4);
    let mut known: Vec<Option<u8>> = vec![Some(0); (SIZE / 512) as usize];
    let mut failures = 0;
    for step in 0..400u64 {
        let at = rng.below(SIZE / 512);
        let count = (rng.below(8) + 1).min(SIZE / 512 - at);
        let byte = step as u8;
        let result = image.write_at(at * 512, &vec![byte; count as usize * 512]);
        failures += u64::from(result.is_err());
        known[at as usize..(at + count) as usize].fill(result.is_ok().then_some(byte));
    }
    assert!(failures > 5, "only {failures} failures");
    *disk.countdown.lock() = u64::MAX;
    image.flush().expect("flush");
    let now = contents(&*image);
    for (n, sector) in now.chunks(512).enumerate() {
        if let Some(byte) = known[n] {
            assert!(sector.iter().all(|b| *b == byte), "sector {n}");
        }
    }
    let report = image.check(check::Fix::None).expect("check");
    assert_eq!(report.corruptions, 0, "{:?}", report.messages);
}
