//! The entropy device, and what every device owes to hostile rings.

use proptest::prelude::*;

use super::config::RngConfig;
use crate::device::feature;
use crate::queue::MAX_CHAIN;
use crate::testing::{
    DATA, Desc, INDIRECT, NEXT, RAM, RAM_SIZE, Rig, WRITE, context, eventually, mischief, run_wild,
};

fn rig() -> Rig {
    let context = context();
    let device = super::build("__rng", &RngConfig::default(), &context).expect("builds");
    let mut rig = Rig::new(context, device);
    rig.start(feature::INDIRECT_DESC);
    rig
}

#[test]
fn bytes_are_random_and_interrupts_come() {
    let mut rig = rig();
    assert_eq!((rig.read32(0), rig.read32(4), rig.read32(8)), (0x7472_6976, 2, 4));
    assert_eq!(rig.request(0, &[(DATA, 64, WRITE), (DATA + 0x1000, 36, WRITE)]), 100);
    assert_ne!(rig.peek(DATA, 64), [0; 64]);
    assert_ne!(rig.peek(DATA + 0x1000, 36), [0; 36]);
    eventually("interrupt", || rig.read32(0x60) == 1);
    rig.write32(0x64, 1);
    assert_eq!(rig.read32(0x60), 0);
    assert!(!rig.line.level.load(std::sync::atomic::Ordering::SeqCst));
    assert_eq!(rig.device.counters()["bytes"], 100);
    assert_eq!(rig.request(0, &[(DATA, 2 << 20, WRITE)]), 64 << 10, "the host's work is bounded");
}

#[test]
fn indirect_chains_work() {
    let mut rig = rig();
    let table = DATA + 0x10_0000;
    rig.rings[0].put_desc(table, (DATA, 16, WRITE | NEXT), 2);
    rig.rings[0].put_desc(table + 32, (DATA + 16, 16, WRITE), 0);
    assert_eq!(rig.request(0, &[(table, 48, INDIRECT)]), 32);
}

#[test]
fn event_idx_withholds_interrupts() {
    let context = context();
    let device = super::build("__rng", &RngConfig::default(), &context).expect("builds");
    let mut rig = Rig::new(context, device);
    rig.start(feature::EVENT_IDX);
    rig.rings[0].set_used_event(1);
    rig.request(0, &[(DATA, 8, WRITE)]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(rig.read32(0x60), 0, "wanted only after the second");
    rig.request(0, &[(DATA, 8, WRITE)]);
    eventually("interrupt", || rig.read32(0x60) == 1);
}

#[test]
fn hostile_chains_break_the_device_and_nothing_else() {
    let mut rig = rig();
    let end = RAM + RAM_SIZE as u64;
    let table = DATA + 0x10_0000;
    let bad: &[(&str, &[Desc])] = &[
        ("outside RAM", &[(0x1000, 16, WRITE)]),
        ("across the end of RAM", &[(end - 8, 16, WRITE)]),
        ("wrapping address", &[(u64::MAX - 4, 16, WRITE)]),
        ("huge length", &[(DATA, u32::MAX, WRITE)]),
        ("zero length", &[(DATA, 0, WRITE)]),
        ("readable after writable", &[(DATA, 16, WRITE), (DATA, 16, 0)]),
        ("indirect table of odd size", &[(table, 17, INDIRECT)]),
        ("empty indirect table", &[(table, 0, INDIRECT)]),
        ("indirect table outside RAM", &[(end, 16, INDIRECT)]),
        ("indirect with next", &[(table, 16, INDIRECT), (DATA, 16, WRITE)]),
        ("more than 4 GiB", &[(RAM, RAM_SIZE as u32, WRITE); 1]),
    ];
    for (why, descs) in &bad[..bad.len() - 1] {
        let ring = &mut rig.rings[0];
        let head = ring.chain(descs);
        ring.publish(head);
        rig.kick(0);
        rig.expect_broken(why);
        rig.start(feature::INDIRECT_DESC);
    }
    assert_eq!(rig.request(0, bad[bad.len() - 1].1), 64 << 10, "all of RAM is fine");
}

#[test]
fn loops_and_tables_within_tables_are_found() {
    let mut rig = rig();
    // A descriptor that names itself.
    rig.rings[0].put_desc(rig.rings[0].desc_at(3), (DATA, 1, WRITE | NEXT), 3);
    rig.rings[0].publish(3);
    rig.kick(0);
    rig.expect_broken("a loop");

    rig.start(feature::INDIRECT_DESC);
    // A loop within an indirect table that is larger than any chain may be.
    let table = DATA + 0x10_0000;
    let entries = MAX_CHAIN as u64 + 10;
    for n in 0..entries {
        rig.rings[0].put_desc(table + 16 * n, (DATA, 1, WRITE | NEXT), ((n + 1) % entries) as u16);
    }
    let head = rig.rings[0].chain(&[(table, 16 * entries as u32, INDIRECT)]);
    rig.rings[0].publish(head);
    rig.kick(0);
    rig.expect_broken("a long loop");

    rig.start(feature::INDIRECT_DESC);
    rig.rings[0].put_desc(table, (table, 16, INDIRECT), 0);
    let head = rig.rings[0].chain(&[(table, 16, INDIRECT)]);
    rig.rings[0].publish(head);
    rig.kick(0);
    rig.expect_broken("a table in a table");

    rig.start(feature::INDIRECT_DESC);
    rig.rings[0].put_desc(rig.rings[0].desc_at(0), (DATA, 1, WRITE | NEXT), 16);
    rig.rings[0].publish(0);
    rig.kick(0);
    rig.expect_broken("next outside the table");

    rig.start(feature::INDIRECT_DESC);
    rig.rings[0].publish(0xffff);
    rig.kick(0);
    rig.expect_broken("head outside the table");

    rig.start(feature::INDIRECT_DESC);
    rig.rings[0].set_avail(17);
    rig.kick(0);
    rig.expect_broken("more available than there is room");

    rig.start(0);
    assert_eq!(rig.request(0, &[(DATA, 8, WRITE)]), 8, "it works again");
}

#[test]
fn rings_that_are_not_in_ram_are_refused() {
    let mut rig = rig();
    rig.write32(0x70, 0);
    for (register, value) in [(0x80, 0x1000u32), (0x90, 0x8000_0001), (0xa0, 0xffff_fff0)] {
        rig.start_with(|rig| rig.write32(register, value));
        rig.expect_broken("bad ring");
    }
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let rig = rig();
    rig.write32(0x70, 0);
    rig.write32(0x70, 3);
    rig.write32(0x24, 0);
    rig.write32(0x20, 1 << 5);
    rig.write32(0x24, 1);
    rig.write32(0x20, 1);
    rig.write32(0x70, 11);
    assert_eq!(rig.status(), 3);
    // Neither without VERSION_1.
    rig.write32(0x70, 0);
    rig.write32(0x70, 3);
    rig.write32(0x70, 11);
    assert_eq!(rig.status(), 3);
}

#[test]
fn a_source_that_is_no_source_is_refused() {
    let file = tempfile::NamedTempFile::new().expect("file");
    let config = RngConfig { src: file.path().to_owned(), ..RngConfig::default() };
    let error = super::build("__rng", &config, &context()).expect_err("refused");
    assert!(error.to_string().contains(&file.path().display().to_string()), "{error}");
}

#[test]
fn state_survives_with_requests_waiting() {
    let mut rig = rig();
    rig.request(0, &[(DATA, 8, WRITE)]);
    rig.device.pause();
    let head = rig.rings[0].chain(&[(DATA, 24, WRITE)]);
    rig.rings[0].publish(head);
    let state = rig.device.save().expect("saves");
    let old = rig.context.memory.clone();

    let mut context = context();
    context.memory = old;
    let device = super::build("__rng", &RngConfig::default(), &context).expect("builds");
    let mut copy = Rig::new(context, device);
    std::mem::swap(&mut copy.rings, &mut rig.rings);
    copy.device.restore(&state).expect("restores");
    assert_eq!(copy.status(), 15);
    copy.device.resume();
    assert_eq!(copy.rings[0].wait_used(), (head, 24), "what waited is served");
    assert_eq!(copy.request(0, &[(DATA, 5, WRITE)]), 5);
    assert!(copy.device.save().is_err(), "a running device is not saved");
}

#[test]
fn a_fifo_is_waited_for() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("fifo");
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).expect("no zero");
    // SAFETY: `name` is a C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let context = context();
    let config = RngConfig { src: path.clone(), ..RngConfig::default() };
    let device = super::build("__rng", &config, &context).expect("builds");
    let mut rig = Rig::new(context, device);
    rig.start(0);
    let head = rig.rings[0].chain(&[(DATA, 4, WRITE)]);
    rig.rings[0].publish(head);
    rig.kick(0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(rig.rings[0].used_index(), 0);
    std::fs::write(&path, b"abcd").expect("written");
    assert_eq!(rig.rings[0].wait_used(), (head, 4));
    assert_eq!(rig.peek(DATA, 4), b"abcd");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn any_driver_can_be_outlived(what in mischief()) {
        let mut rig = rig();
        run_wild(&mut rig, feature::INDIRECT_DESC | feature::EVENT_IDX, &what);
        prop_assert_eq!(rig.request(0, &[(DATA, 8, WRITE)]), 8);
    }
}
