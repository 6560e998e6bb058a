use super::*;
use crate::hart::reset_state;
use holdfast_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 0x8000_0000;
const TABLES: [u64; 5] = [RAM, RAM + 0x1000, RAM + 0x2000, RAM + 0x3000, RAM + 0x4000];
const ALL: u64 = pte::V | pte::R | pte::W | pte::X;

struct Machine {
    mem: GuestMemory,
    phys: PhysMemory,
    hart: Box<Hart>,
}

impl Machine {
    /// `satp` in `mode`, PMP open, tables chained for address 0 down to the last level.
    fn new(mode: u64) -> Self {
        let mem = GuestMemory::from_ranges(&[(GuestAddress(RAM), 0x10_0000)]).expect("RAM");
        let phys = PhysMemory::new(&mem);
        let mut hart = reset_state();
        pmp::write_addr(&mut hart, 0, u64::MAX);
        pmp::write_cfg(&mut hart, 0, u64::from(pmp::cfg::NAPOT | RWX));
        hart.satp = mode << 60 | RAM >> 12;
        let this = Self { mem, phys, hart };
        for pair in TABLES.windows(2) {
            this.set(pair[0], pair[1] >> 2 | pte::V);
        }
        this
    }

    fn set(&self, at: u64, entry: u64) {
        self.mem.write_obj(entry, GuestAddress(at)).expect("write");
    }

    fn pmp(&mut self, entry: usize, byte: u8) {
        let others = pmp::read_cfg(&self.hart, 0) & !(0xff << (8 * entry));
        pmp::write_cfg(&mut self.hart, 0, others | u64::from(byte) << (8 * entry));
    }

    fn get(&self, at: u64) -> u64 {
        self.mem.read_obj(GuestAddress(at)).expect("read")
    }

    fn go(&self, gva: u64, kind: AccessKind, mmu_idx: u8) -> Result<Translation, u64> {
        translate(&self.hart, &self.phys, &Access { gva, size: 8, kind, mmu_idx }).map_err(|f| {
            assert_eq!(f.value, gva);
            f.cause
        })
    }
}

use AccessKind::{Fetch, Read, Write};

#[test]
fn every_mode_walks_all_its_levels() {
    for (mode, last) in [(8, 2), (9, 3), (10, 4)] {
        let m = Machine::new(mode);
        m.set(TABLES[last] + 8, 0x8005_5000 >> 2 | ALL);
        let t = m.go(0x1008, Read, idx::S).expect("mapped");
        assert_eq!((t.gpa, t.page_bits, t.read, t.write, t.fetch), (0x8005_5008, 12, true, false, true));
        assert!(t.cacheable);
        assert_eq!(m.get(TABLES[last] + 8) & (pte::A | pte::D), pte::A);
        assert!(m.go(0x1008, Write, idx::S).is_ok_and(|t| t.write));
        assert_eq!(m.get(TABLES[last] + 8) & (pte::A | pte::D), pte::A | pte::D);
        assert!(m.go(0x1008, Read, idx::S).is_ok_and(|t| t.write), "dirty already");
        let beyond = 1u64 << (12 + 9 * (last + 1) - 1);
        assert_eq!(m.go(beyond, Read, idx::S), Err(13), "not canonical");
        assert_eq!(m.go(0x2000, Fetch, idx::S), Err(12));
        assert_eq!(m.go(0x2000, Write, idx::S), Err(15));
        assert_eq!(probe(&m.hart, &m.phys, 0x1010), Some(0x1010), "M-mode is not translated");
        let mut hart = m.hart.clone();
        hart.privilege = privilege::U;
        assert_eq!(probe(&hart, &m.phys, 0x1010), Some(0x8005_5010));
        assert_eq!(probe(&hart, &m.phys, 0x3010), None);
    }
}

#[test]
fn superpages_are_aligned() {
    let m = Machine::new(8);
    m.set(TABLES[1] + 8, 0x8000_0000 >> 2 | ALL);
    assert!(m.go(0x20_1234, Read, idx::S).is_ok_and(|t| t.gpa == 0x8000_1234 && t.page_bits == 21));
    m.set(TABLES[1] + 8, 0x8000_1000 >> 2 | ALL);
    assert_eq!(m.go(0x20_1234, Read, idx::S), Err(13));
    m.set(TABLES[0] + 16, 0x8000_0000 >> 2 | ALL);
    assert!(m.go(0x8000_1234, Fetch, idx::S).is_ok_and(|t| t.gpa == 0x8000_1234 && t.page_bits == 30));
}

#[test]
fn user_pages_and_mxr() {
    let mut m = Machine::new(8);
    m.set(TABLES[2], 0x8005_5000 >> 2 | ALL | pte::U);
    m.set(TABLES[2] + 8, 0x8005_5000 >> 2 | pte::V | pte::X);
    assert!(m.go(0, Fetch, idx::U).is_ok());
    assert_eq!(m.go(0, Read, idx::S), Err(13));
    assert!(m.go(0, Read, idx::S_SUM).is_ok_and(|t| !t.fetch));
    assert_eq!(m.go(0, Fetch, idx::S), Err(12));
    assert_eq!(m.go(0x1000, Fetch, idx::U), Err(12));
    assert_eq!(m.go(0x1000, Read, idx::S), Err(13));
    m.hart.mstatus |= mstatus::MXR;
    assert!(m.go(0x1000, Read, idx::S).is_ok());
    assert_eq!(m.go(0x1000, Write, idx::S), Err(15));
}

#[test]
fn reserved_encodings_fault() {
    let m = Machine::new(8);
    for bad in [
        pte::V | pte::W,
        pte::V | pte::W | pte::X,
        ALL & !pte::V,
        ALL | 1 << 63,
        ALL | 1 << 61,
        ALL | 1 << 54,
    ] {
        m.set(TABLES[2], 0x8005_5000 >> 2 | bad);
        assert_eq!(m.go(0, Read, idx::S), Err(13), "{bad:#x}");
    }
    m.set(TABLES[2], 0x8005_5000 >> 2 | pte::V);
    assert_eq!(m.go(0, Read, idx::S), Err(13), "a pointer at the last level");
    m.set(TABLES[1], TABLES[2] >> 2 | pte::V | pte::A);
    m.set(TABLES[2], 0x8005_5000 >> 2 | ALL);
    assert_eq!(m.go(0, Read, idx::S), Err(13), "A in a pointer");
}

#[test]
fn what_is_not_memory_or_protected_is_an_access_fault() {
    let mut m = Machine::new(8);
    m.set(TABLES[2], 0x8005_5000 >> 2 | ALL);
    m.set(TABLES[1] + 8, 0x4000_0000 >> 2 | pte::V);
    assert_eq!(m.go(0x20_0000, Write, idx::S), Err(7), "a table outside RAM");
    // The tables become read-only: the accessed bit cannot be set.
    m.pmp(1, pmp::cfg::NAPOT | RWX);
    pmp::write_addr(&mut m.hart, 1, u64::MAX >> 10);
    m.pmp(0, pmp::cfg::NAPOT | pmp::cfg::R);
    pmp::write_addr(&mut m.hart, 0, RAM >> 2 | 0xfff); // 32 KiB
    assert_eq!(m.go(0, Read, idx::S), Err(5));
    m.set(TABLES[2], 0x8005_5000 >> 2 | ALL | pte::A);
    assert!(m.go(0, Read, idx::S).is_ok());
    assert_eq!(m.go(0, Write, idx::S), Err(7));
    // And unreadable: the walk itself fails, as the access that it is for.
    m.pmp(0, pmp::cfg::NAPOT);
    assert_eq!(m.go(0, Fetch, idx::S), Err(1));
    assert!(m.go(RAM, Write, idx::M).is_ok(), "not locked: M-mode passes");
}

#[test]
fn protection_finer_than_a_page_is_not_cached() {
    let mut m = Machine::new(0);
    m.hart.satp = 0;
    m.pmp(1, pmp::cfg::NAPOT | RWX);
    pmp::write_addr(&mut m.hart, 1, u64::MAX >> 10);
    m.pmp(0, pmp::cfg::NA4);
    pmp::write_addr(&mut m.hart, 0, (RAM + 0x800) >> 2);
    let t = m.go(RAM, Write, idx::U).expect("allowed");
    assert!(t.write && !t.cacheable && t.gpa == RAM);
    assert_eq!(m.go(RAM + 0x800, Write, idx::U), Err(7));
    assert!(m.go(RAM + 0x1000, Write, idx::U).is_ok_and(|t| t.cacheable));
}
