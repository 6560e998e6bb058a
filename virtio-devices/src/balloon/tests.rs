//! The balloon, driven through its rings.

use std::sync::Arc;

use proptest::prelude::*;

use super::config::BalloonConfig;
use super::{Balloon, bit};
use crate::device::feature::INDIRECT_DESC;
use crate::testing::{DATA, RAM, Rig, WRITE, context, eventually, mischief, run_wild};

const PAGES: u64 = RAM + 0x60_0000;

fn rig(features: u64) -> (Rig, Arc<Balloon>) {
    let context = context();
    let config = BalloonConfig {
        size: 8 << 20,
        deflate_on_oom: true,
        free_page_reporting: true,
        ..BalloonConfig::default()
    };
    let balloon = super::build("__balloon", &config, &context).expect("builds");
    let mut rig = Rig::new(context, Arc::clone(&balloon) as Arc<dyn crate::VirtioDevice>);
    rig.start(features);
    (rig, balloon)
}

fn pfns(pages: &[u64]) -> Vec<u8> {
    pages.iter().flat_map(|p| ((p >> 12) as u32).to_le_bytes()).collect()
}

#[test]
fn inflated_pages_go_back_to_the_host() {
    let (mut rig, balloon) = rig(bit::STATS_VQ | bit::DEFLATE_ON_OOM);
    assert_ne!(rig.offered() & bit::DEFLATE_ON_OOM, 0);
    assert_eq!(rig.config(0, 4), (2048u32).to_le_bytes(), "8 MiB are asked for at boot");
    rig.poke(PAGES, &[5; 0x6000]);
    let numbers = pfns(&[PAGES, PAGES + 0x1000, PAGES + 0x4000, PAGES + 0x3000]);
    rig.poke(DATA, &numbers);
    assert_eq!(rig.request(0, &[(DATA, 8, 0), (DATA + 8, 8, 0)]), 0);
    let first = |n: u64| rig.peek(PAGES + n * 0x1000, 1)[0];
    assert_eq!([first(0), first(1), first(2), first(3), first(4), first(5)], [0, 0, 5, 0, 0, 5]);
    rig.write_config(4, &4u32.to_le_bytes());
    assert_eq!(balloon.actual(), 4 << 12);
    rig.request(1, &[(DATA, 16, 0)]);
    let counters = rig.device.counters();
    assert_eq!((counters["inflated_pages"], counters["deflated_pages"]), (4, 4));
    assert_eq!(counters["actual_bytes"], 4 << 12);
    balloon.resize(3 << 20);
    assert_eq!(rig.config(0, 4), (768u32).to_le_bytes());
    eventually("config interrupt", || rig.read32(0x60) & 2 != 0);
}

#[test]
fn page_numbers_outside_ram_do_nothing() {
    let (mut rig, _) = rig(0);
    rig.poke(DATA, &pfns(&[0, 0xffff_ffff_f000, RAM - 0x1000, 0x5000_0000]));
    rig.poke(DATA + 16, &[0xff; 3]);
    assert_eq!(rig.request(0, &[(DATA, 19, 0)]), 0);
    assert_eq!(rig.status(), 15);
}

#[test]
fn reported_pages_go_back_to_the_host() {
    for (features, queue) in [(bit::STATS_VQ | bit::REPORTING, 3), (bit::REPORTING, 2)] {
        let (mut rig, _) = rig(features);
        rig.poke(PAGES, &[5; 0x4000]);
        rig.request(queue, &[(PAGES, 0x1000, WRITE), (PAGES + 0x2000, 0x1fff, WRITE)]);
        let first = |n: u64| rig.peek(PAGES + n * 0x1000, 1)[0];
        assert_eq!([first(0), first(1), first(2), first(3)], [0, 5, 0, 5]);
        assert_eq!(rig.device.counters()["reported_bytes"], 0x2000);
    }
}

fn statistic(tag: u16, value: u64) -> Vec<u8> {
    let mut out = tag.to_le_bytes().to_vec();
    out.extend(value.to_le_bytes());
    out
}

#[test]
fn statistics_are_kept_asked_for_and_survive_a_pause() {
    let (mut rig, balloon) = rig(bit::STATS_VQ);
    let mut report = statistic(4, 1234);
    report.extend(statistic(5, 99));
    report.extend(statistic(999, 1));
    rig.poke(DATA, &report);
    let head = rig.rings[2].chain(&[(DATA, 30, 0)]);
    rig.rings[2].publish(head);
    rig.kick(2);
    eventually("read", || balloon.shared.statistics.lock().get("total_memory") == Some(&99));
    assert_eq!(rig.rings[2].used_index(), 0, "kept until it is wanted");
    rig.device.pause();
    rig.device.resume();
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert_eq!(rig.rings[2].used_index(), 0);
    let now = balloon.statistics();
    assert_eq!((now["free_memory"], now.len()), (1234, 2));
    assert_eq!(rig.rings[2].wait_used(), (head, 0), "a new report is asked for");
    rig.device.pause();
    let state = rig.device.save().expect("saves");
    let (copy, other) = self::rig(0);
    copy.device.reset();
    other.resize(0);
    copy.device.restore(&state).expect("restores");
    assert_eq!(other.target(), 8 << 20);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn any_driver_can_be_outlived(what in mischief()) {
        let (mut rig, balloon) = rig(0);
        run_wild(&mut rig, bit::STATS_VQ | bit::REPORTING | INDIRECT_DESC, &what);
        balloon.statistics();
        rig.poke(PAGES, &[5; 0x1000]);
        rig.poke(DATA, &pfns(&[PAGES]));
        rig.request(0, &[(DATA, 4, 0)]);
        prop_assert_eq!(rig.peek(PAGES, 1), [0]);
    }
}
