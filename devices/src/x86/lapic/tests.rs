use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use holdfast_threads::PlainSpawner;

use super::super::testing::access;
use super::*;

/// Register offsets.
const ID: u64 = 0x20;
const TPR: u64 = 0x80;
const PPR: u64 = 0xa0;
const EOI: u64 = 0xb0;
const LDR: u64 = 0xd0;
const DFR: u64 = 0xe0;
const SVR: u64 = 0xf0;
const ISR: u64 = 0x100;
const TMR: u64 = 0x180;
const IRR: u64 = 0x200;
const ESR: u64 = 0x280;
const ICR: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LVT_LINT0: u64 = 0x350;
const LVT_LINT1: u64 = 0x360;
const LVT_ERROR: u64 = 0x370;
const INITIAL: u64 = 0x380;
const CURRENT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;

/// IA32_APIC_BASE with the APIC enabled, in x2APIC mode.
const ENABLED: u64 = 0xfee0_0800;
const X2: u64 = 0xfee0_0c00;

struct Rig {
    bus: Arc<LapicBus>,
    timers: Arc<Timers>,
    /// A bit for each vCPU that was woken.
    woken: Arc<AtomicU32>,
    ended: Arc<Mutex<Vec<u8>>>,
}

/// APICs with ids 0, 1, ..., software-enabled with spurious vector 0xff.
fn rig(count: u32) -> Rig {
    let clock = holdfast_clock::VmClock::stopped_at(0);
    let timers = Timers::start(clock, &PlainSpawner).expect("thread");
    let woken = Arc::new(AtomicU32::new(0));
    let wake = Arc::clone(&woken);
    let waker: Waker = Arc::new(move |n| {
        wake.fetch_or(1 << n, Ordering::SeqCst);
    });
    let bus = LapicBus::new(&(0..count).collect::<Vec<_>>(), &timers, waker);
    let ended = Arc::new(Mutex::new(Vec::new()));
    let ends = Arc::clone(&ended);
    assert!(bus.connect_eoi(Arc::new(move |vector| ends.lock().push(vector))));
    let rig = Rig { bus, timers, woken, ended };
    (0..count).for_each(|n| rig.put(n, SVR, 0x1ff));
    rig
}

impl Rig {
    fn access(&self, vcpu: u32, at: u64) -> Access {
        Access { vcpu: Some(vcpu), ..access(LAPIC_BASE + at, at) }
    }

    fn get(&self, vcpu: u32, at: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.read(self.access(vcpu, at), &mut data);
        u32::from_le_bytes(data)
    }

    fn put(&self, vcpu: u32, at: u64, value: u32) {
        self.bus.write(self.access(vcpu, at), &value.to_le_bytes());
    }

    fn apic(&self, n: u32) -> &Arc<Lapic> {
        self.bus.apic(n).expect("there")
    }

    fn woken(&self) -> u32 {
        self.woken.swap(0, Ordering::SeqCst)
    }

    fn message(&self, address: u64, data: u32) {
        self.bus.send(MsiMessage { address, data, device: 0 }).expect("sent");
    }

    /// Moves time on and waits until the timer's thread has acted on it.
    fn time(&self, now: u64, done: impl Fn() -> bool) {
        self.timers.clock().set(now);
        self.timers.clock().resume();
        self.timers.clock_changed();
        let end = Instant::now() + Duration::from_secs(60);
        while !done() {
            assert!(Instant::now() < end, "the timer does not fire");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn fixed_interrupts_nest_by_priority() {
    let r = rig(1);
    r.message(0xfee0_0000, 0x31);
    assert_eq!(r.woken(), 1);
    r.message(0xfee0_0000, 0x45);
    r.message(0xfee0_0000, 0x38);
    let apic = r.apic(0);
    assert_eq!(apic.acknowledge(), Some(0x45));
    assert_eq!((r.get(0, ISR + 0x20), r.get(0, PPR)), (1 << 5, 0x40));
    assert!(!apic.has_interrupt(), "lower classes wait");
    r.message(0xfee0_0000, 0x4f);
    assert!(!apic.has_interrupt(), "the same class waits, too");
    r.message(0xfee0_0000, 0x51);
    assert_eq!(apic.acknowledge(), Some(0x51));
    r.put(0, EOI, 0);
    assert_eq!(apic.acknowledge(), None);
    r.put(0, EOI, 0);
    assert_eq!(apic.acknowledge(), Some(0x4f));
    r.put(0, EOI, 0);
    assert_eq!(apic.acknowledge(), Some(0x38));
    r.put(0, EOI, 0);
    assert_eq!(apic.acknowledge(), Some(0x31));
    r.put(0, EOI, 0);
    assert_eq!((r.get(0, ISR + 0x10), r.get(0, IRR + 0x10), r.get(0, PPR)), (0, 0, 0));
}

#[test]
fn the_task_priority_holds_interrupts_back() {
    let r = rig(1);
    r.put(0, TPR, 0x4f);
    r.message(0xfee0_0000, 0x4f);
    assert!(!r.apic(0).has_interrupt());
    assert_eq!((r.get(0, PPR), r.apic(0).cr8()), (0x4f, 4));
    assert_eq!(r.woken(), 0);
    r.apic(0).set_cr8(3);
    assert_eq!((r.woken(), r.get(0, TPR)), (1, 0x30));
    assert_eq!(r.apic(0).acknowledge(), Some(0x4f));
}

#[test]
fn only_level_triggered_interrupts_report_their_end() {
    let r = rig(1);
    r.message(0xfee0_0000, 0x8060);
    assert_eq!(r.get(0, TMR + 0x30), 1);
    r.message(0xfee0_0000, 0x61);
    assert_eq!(r.apic(0).acknowledge(), Some(0x61));
    r.put(0, EOI, 0);
    assert!(r.ended.lock().is_empty());
    assert_eq!(r.apic(0).acknowledge(), Some(0x60));
    r.put(0, EOI, 0);
    assert_eq!(*r.ended.lock(), [0x60]);
}

#[test]
fn destinations_are_physical_logical_and_everyone() {
    let r = rig(4);
    let hit = |address| {
        r.woken();
        r.message(address, 0x40);
        let woken = r.woken();
        for n in 0..4 {
            while r.apic(n).acknowledge().is_some() {
                r.put(n, EOI, 0);
            }
        }
        woken
    };
    assert_eq!(hit(0xfee0_2000), 0b0100);
    assert_eq!(hit(0xfeef_f000), 0b1111);
    assert_eq!(hit(0xfee0_9000), 0);
    // Flat: a bit each.
    (0..4).for_each(|n| r.put(n, LDR, 1 << (24 + n)));
    assert_eq!(hit(0xfee0_a004), 0b1010);
    // Clusters of two.
    for n in 0..4 {
        r.put(n, DFR, 0x0fff_ffff);
        r.put(n, LDR, (n / 2) << 28 | 1 << (24 + n % 2));
    }
    assert_eq!(hit(0xfee0_3004), 0b0011);
    assert_eq!(hit(0xfee1_2004), 0b1000);
    assert_eq!(hit(0xfeef_1004), 0b0101, "the first of every cluster");
    assert!(r.bus.send(MsiMessage { address: 0xfec0_0000, data: 0, device: 0 }).is_err());
}

#[test]
fn the_lowest_priority_gets_it_and_equals_take_turns() {
    let r = rig(3);
    r.put(0, TPR, 0x20);
    for _ in 0..8 {
        r.message(0xfeef_f000, 0x0140);
    }
    assert!(!r.apic(0).has_interrupt());
    assert!(r.apic(1).has_interrupt() && r.apic(2).has_interrupt());
    // One that is switched off does not take part.
    r.put(1, SVR, 0xff);
    r.apic(2).acknowledge();
    r.message(0xfeef_f000, 0x0141);
    assert!(r.get(0, IRR + 0x20) & 2 != 0, "0x20 is lower than 0x40 in service");
}

#[test]
fn interprocessor_interrupts_have_shorthands() {
    let r = rig(3);
    let pending = || (0..3).filter(|n| r.apic(*n).acknowledge().is_some()).collect::<Vec<_>>();
    r.put(0, ICR_HIGH, 2 << 24);
    r.put(0, ICR, 0x4031);
    assert_eq!(pending(), [2]);
    r.put(0, ICR, 0x4_4041);
    assert_eq!(pending(), [0]);
    r.put(1, ICR, 0x8_4051);
    assert_eq!(pending(), [0, 1, 2]);
    r.put(1, ICR, 0xc_4061);
    assert_eq!(pending(), [0, 2]);
    assert_eq!(r.get(0, ICR) & 1 << 12, 0, "never busy");
}

#[test]
fn hypercalls_send_to_one_id() {
    let r = rig(3);
    assert!(r.apic(0).send_ipi(2, 0x0_4035 & 0x7ff) && !r.apic(0).send_ipi(3, 0x35));
    assert_eq!(r.apic(2).acknowledge(), Some(0x35));
    assert!(r.apic(0).send_ipi(1, 0x400));
    assert_eq!(r.apic(1).take_signals().nmi, 1);
}

#[test]
fn init_startup_and_nmi_are_signals() {
    let r = rig(2);
    r.put(0, ICR_HIGH, 1 << 24);
    r.put(0, ICR, 0x0000_c500);
    assert_eq!(r.woken(), 2);
    assert!(r.apic(1).has_signal());
    r.put(0, ICR, 0x0000_8500); // the de-assertion does nothing
    r.put(0, ICR, 0x0000_4608);
    let signals = r.apic(1).take_signals();
    assert_eq!((signals.init, signals.sipi, signals.nmi), (true, Some(8), 0));
    assert!(!r.apic(1).has_signal());
    r.put(0, ICR, 0x0000_4400);
    r.apic(0).raise_nmi();
    assert_eq!((r.apic(0).take_signals().nmi, r.apic(1).take_signals().nmi), (1, 1));
    (0..3).for_each(|_| r.apic(0).raise_nmi());
    assert_eq!(r.apic(0).take_signals().nmi, 2, "one served, one that waits");
    // INIT clears all but the base.
    r.put(1, TPR, 0x10);
    r.apic(1).reset(true);
    assert_eq!((r.get(1, TPR), r.get(1, SVR), r.get(1, LVT_LINT0)), (0, 0xff, 0x1_0000));
}

#[test]
fn errors_are_latched_until_the_status_register_is_written() {
    let r = rig(1);
    r.put(0, LVT_ERROR, 0x55);
    r.put(0, ICR, 0x4_4003);
    assert_eq!(r.get(0, ESR), 0);
    assert_eq!(r.apic(0).acknowledge(), Some(0x55));
    r.put(0, EOI, 0);
    r.put(0, ESR, 0);
    assert_eq!(r.get(0, ESR), 1 << 5, "an illegal vector was sent");
    r.message(0xfee0_0000, 0x0f);
    r.get(0, 0x40);
    r.put(0, ESR, 0);
    assert_eq!(r.get(0, ESR), 1 << 6 | 1 << 7, "one was received; a register is not there");
    r.put(0, ESR, 0);
    assert_eq!(r.get(0, ESR), 0);
}

#[test]
fn pins_follow_their_entries() {
    #[derive(Debug)]
    struct Pic;
    impl ExtInt for Pic {
        fn pending(&self) -> bool {
            true
        }
        fn acknowledge(&self) -> u8 {
            0x08
        }
    }
    let r = rig(2);
    assert!(r.bus.connect_ext_int(Arc::new(Pic)));
    r.bus.set_pin(0, 0, true);
    assert!(!r.apic(0).has_interrupt() || r.apic(0).acknowledge() == Some(8));
    r.put(0, LVT_LINT0, 0x700);
    assert_eq!(r.apic(0).acknowledge(), Some(0x08), "ExtINT comes from the 8259s");
    r.put(0, LVT_LINT0, 0x1_0700);
    assert!(!r.apic(0).has_interrupt(), "masked");
    r.put(1, LVT_LINT1, 0x400);
    r.bus.set_pin(1, 1, true);
    assert_eq!(r.apic(1).take_signals().nmi, 1);
    r.bus.set_pin(1, 1, true);
    assert_eq!(r.apic(1).take_signals().nmi, 0, "NMI is an edge");
    r.put(1, LVT_LINT0, 0x77);
    r.bus.set_pin(1, 0, true);
    assert_eq!(r.apic(1).acknowledge(), Some(0x77));
    r.bus.set_pin(9, 0, true);
    r.bus.set_pin(0, 9, true);
}

#[test]
fn software_disable_masks_the_table_and_takes_no_vectors() {
    let r = rig(1);
    r.put(0, LVT_TIMER, 0x40);
    r.put(0, SVR, 0xff);
    assert_eq!(r.get(0, LVT_TIMER), 0x1_0040);
    r.put(0, LVT_TIMER, 0x41);
    assert_eq!(r.get(0, LVT_TIMER), 0x1_0041, "they cannot be unmasked either");
    r.message(0xfee0_0000, 0x50);
    assert!(!r.apic(0).has_interrupt());
    r.message(0xfee0_0000, 0x400);
    assert_eq!(r.apic(0).take_signals().nmi, 1, "NMI needs no enable");
}

#[test]
fn the_timer_counts_down_once() {
    let r = rig(1);
    r.put(0, DIVIDE, 0b1011); // by 1
    r.put(0, LVT_TIMER, 0x40);
    r.timers.clock().set(1_000_000_000);
    r.put(0, INITIAL, 1_000_000);
    assert_eq!(r.get(0, CURRENT), 1_000_000);
    r.timers.clock().set(1_000_400_000);
    assert_eq!(r.get(0, CURRENT), 600_000);
    r.put(0, DIVIDE, 0b0000); // by 2, going on from where it is
    assert_eq!(r.get(0, CURRENT), 600_000);
    r.timers.clock().set(1_000_500_000);
    assert_eq!(r.get(0, CURRENT), 550_000);
    r.time(1_001_600_000, || r.apic(0).has_interrupt());
    assert_eq!((r.apic(0).acknowledge(), r.get(0, CURRENT)), (Some(0x40), 0));
    r.put(0, INITIAL, 0);
    assert_eq!(r.get(0, CURRENT), 0);
}

#[test]
fn a_periodic_timer_begins_again() {
    let r = rig(1);
    r.put(0, DIVIDE, 0b1011);
    r.put(0, LVT_TIMER, 0x2_0041);
    r.put(0, INITIAL, 50_000_000);
    r.timers.clock().set(120_000_000);
    assert_eq!(r.get(0, CURRENT), 30_000_000);
    for n in 0..3u64 {
        r.time(150_000_000 + n * 50_000_000, || r.apic(0).has_interrupt());
        assert_eq!(r.apic(0).acknowledge(), Some(0x41));
        r.put(0, EOI, 0);
    }
    assert_ne!(r.get(0, CURRENT), 0);
}

#[test]
fn the_tsc_deadline_fires_and_is_cleared() {
    let r = rig(1);
    let apic = r.apic(0);
    apic.set_tsc_deadline(77, 1000);
    assert_eq!(apic.tsc_deadline(), 0, "another mode: writes are ignored");
    r.put(0, LVT_TIMER, 0x4_0042);
    r.put(0, INITIAL, 5);
    assert_eq!((r.get(0, INITIAL), r.get(0, CURRENT)), (0, 0));
    apic.set_tsc_deadline(77, 1000);
    assert_eq!(apic.tsc_deadline(), 77);
    r.time(2000, || apic.has_interrupt());
    assert_eq!((apic.acknowledge(), apic.tsc_deadline()), (Some(0x42), 0));
    apic.set_tsc_deadline(99, u64::MAX);
    r.put(0, LVT_TIMER, 0x42);
    assert_eq!(apic.tsc_deadline(), 0, "a change of mode disarms it");
}

#[test]
fn modes_change_in_the_allowed_order_only() {
    let r = rig(2);
    let apic = r.apic(1);
    assert!(!apic.set_base(0xfee0_0400, 40), "x2APIC without enable");
    assert!(!apic.set_base(0x100_fee0_0800, 40) && !apic.set_base(0xfee0_0801, 40), "reserved bits");
    assert!(apic.set_base(X2, 40));
    assert!(!apic.set_base(ENABLED, 40), "not back without going off");
    assert_eq!(r.get(1, ID), u32::MAX, "no registers in memory");
    assert_eq!((apic.read_msr(2), apic.read_msr(0xd)), (Some(1), Some(2)));
    assert!(apic.set_base(0xfee0_0000, 40));
    assert!(!apic.set_base(X2, 40), "not at once from off");
    assert_eq!((apic.read_msr(2), apic.write_msr(8, 0)), (None, false));
    assert!(apic.set_base(ENABLED, 40));
    assert_eq!(r.get(1, ID), 1 << 24);
}

#[test]
fn registers_move() {
    const THERE: u64 = 0xfed4_0000;
    let r = rig(2);
    let mmio = Bus::new("memory");
    r.bus.connect_memory(&mmio).expect("free");
    let read = |vcpu, at| {
        let mut data = [0; 4];
        mmio.read(Some(vcpu), at, &mut data);
        u32::from_le_bytes(data)
    };
    assert!(r.apic(1).set_base(THERE | 0x800, 40));
    assert_eq!((read(1, THERE + ID), read(0, THERE + ID)), (1 << 24, u32::MAX));
    assert_eq!((read(1, LAPIC_BASE + ID), read(0, LAPIC_BASE + ID)), (u32::MAX, 0));
    assert!(r.apic(1).set_base(ENABLED, 40));
    assert_eq!((read(1, LAPIC_BASE + ID), mmio.windows().len()), (1 << 24, 1));
}

#[test]
fn the_count_stays_zero_when_a_one_shot_has_ended() {
    let r = rig(1);
    r.put(0, DIVIDE, 0b1011);
    r.put(0, LVT_TIMER, 0x1_0040);
    r.put(0, INITIAL, 1000);
    r.timers.clock().set(5000);
    r.put(0, LVT_TIMER, 0x3_0040);
    assert_eq!(r.get(0, CURRENT), 0);
    r.timers.clock().set(5500);
    assert_eq!(r.get(0, CURRENT), 0);
    r.put(0, INITIAL, 1000);
    r.timers.clock().set(5800);
    assert_eq!(r.get(0, CURRENT), 700);
    r.put(0, LVT_TIMER, 0x1_0040);
    assert_eq!(r.get(0, CURRENT), 700, "it goes on from where it is");
}

#[test]
fn a_deadline_that_is_past_fires_at_once() {
    let r = rig(1);
    r.timers.clock().set(5000);
    r.put(0, LVT_TIMER, 0x4_0042);
    r.apic(0).set_tsc_deadline(9, 4000);
    assert_eq!((r.apic(0).acknowledge(), r.apic(0).tsc_deadline()), (Some(0x42), 0));
}

#[test]
fn x2apic_registers_check_what_is_written() {
    let r = rig(2);
    for n in 0..2 {
        assert!(r.apic(n).set_base(X2, 40));
        assert!(r.apic(n).write_msr(0xf, 0x1ff));
    }
    let apic = r.apic(0);
    for (register, value) in
        [(0xb, 1), (8, 0x100), (0x28, 1), (2, 0), (0xd, 0), (0xe, 0), (0x31, 0), (0x39, 1)]
    {
        assert!(!apic.write_msr(register, value), "{register:#x} {value:#x}");
    }
    assert!(!apic.write_msr(0xf, 1 << 32));
    assert!(apic.read_msr(0xe).is_none() && apic.read_msr(0x31).is_none());
    // To vCPU 1 by its id, by its logical id, to everyone.
    for destination in [1u64, 2, 0xffff_ffff] {
        let logical = if destination == 2 { 1 << 11 } else { 0 };
        assert!(apic.write_msr(0x30, destination << 32 | logical | 0x4033));
        assert_eq!(r.apic(1).acknowledge(), Some(0x33));
        assert!(r.apic(1).write_msr(0xb, 0));
        assert_eq!(apic.acknowledge().is_some(), destination == 0xffff_ffff);
        assert!(apic.write_msr(0xb, 0));
    }
    assert!(apic.write_msr(0x3f, 0x44));
    assert_eq!(apic.acknowledge(), Some(0x44), "self-IPI");
    // 32-bit destinations in messages.
    r.message(0xfee0_1000, 0x45);
    assert_eq!(r.apic(1).acknowledge(), Some(0x45));
}

#[test]
fn states_come_back() {
    let r = rig(2);
    r.put(1, TPR, 0x20);
    r.message(0xfee0_1000, 0x8035);
    r.message(0xfee0_1000, 0x46);
    assert_eq!(r.apic(1).acknowledge(), Some(0x46));
    r.put(1, LVT_TIMER, 0x2_0050);
    r.put(1, INITIAL, 1000);
    let saved = r.apic(1).save();
    let other = rig(2);
    other.apic(1).load(&saved, 0).expect("loads");
    assert_eq!(other.apic(1).save(), saved);
    other.put(1, EOI, 0);
    assert_eq!(other.apic(1).acknowledge(), Some(0x35));
    other.put(1, EOI, 0);
    assert_eq!(*other.ended.lock(), [0x35]);
    assert!(other.apic(1).load(&LapicState::default(), 0).is_err());
}

#[test]
fn message_vectors_wait_for_their_message() {
    let r = rig(1);
    let vector = Arc::clone(&r.bus).vector().expect("vector");
    vector.trigger().expect("noted");
    assert!(vector.pending() && !r.apic(0).has_interrupt());
    vector.set(Some(MsiMessage { address: 0xfee0_0000, data: 0x39, device: 0 })).expect("set");
    assert!(!vector.pending());
    assert_eq!(r.apic(0).acknowledge(), Some(0x39));
}

#[test]
fn hostile_accesses() {
    let r = rig(2);
    for at in (0..LAPIC_LEN).step_by(4) {
        for value in [0u32, 1, 0xff, 0x1_0000, 0x4_4000, u32::MAX] {
            r.put(1, at, value);
            r.get(1, at);
        }
        r.bus.write(r.access(0, at), &[1]);
        r.bus.read(r.access(0, at), &mut [0; 8]);
    }
    r.bus.read(Access { vcpu: Some(7), ..access(0, 0) }, &mut [0; 4]);
    for n in 0..2 {
        let _ = r.apic(n).set_base(X2, 40);
        for register in 0..0x100 {
            for value in [0u64, 1, 0xff, 0x4_4000, u64::MAX] {
                let _ = r.apic(n).write_msr(register, value);
                let _ = r.apic(n).read_msr(register);
            }
        }
    }
}
