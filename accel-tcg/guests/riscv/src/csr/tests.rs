use super::*;
use crate::hart::reset_state;

fn go(hart: &mut Hart, csr: u32, change: Change) -> Result<(u64, Effect), Illegal> {
    access(hart, &mut Context { now: 5_000, pins: irq::MTI, fflags: 3 }, csr, change)
}

fn get(hart: &mut Hart, csr: u32) -> u64 {
    go(hart, csr, Change::None).expect("readable").0
}

#[test]
fn privilege_and_read_only_are_kept() {
    let mut hart = reset_state();
    assert_eq!(
        go(&mut hart, addr::MHARTID, Change::Set(0)),
        Err(Illegal),
        "even a set of nothing is a write"
    );
    assert_eq!(get(&mut hart, addr::MHARTID), 0);
    assert_eq!(get(&mut hart, addr::MISA) >> 62, 2);
    assert_eq!(go(&mut hart, 0x7a0, Change::None), Err(Illegal));
    assert_eq!(go(&mut hart, addr::FCSR, Change::None), Err(Illegal), "FS is off");
    hart.privilege = privilege::S;
    assert_eq!(go(&mut hart, addr::MSTATUS, Change::None), Err(Illegal));
    assert!(go(&mut hart, addr::SATP, Change::None).is_ok());
    hart.mstatus |= mstatus::TVM;
    assert_eq!(go(&mut hart, addr::SATP, Change::None), Err(Illegal));
    assert_eq!(go(&mut hart, addr::TIME, Change::None), Err(Illegal));
    hart.mcounteren = 2;
    assert_eq!(get(&mut hart, addr::TIME), 50);
    hart.privilege = privilege::U;
    assert_eq!(go(&mut hart, addr::TIME, Change::None), Err(Illegal));
    hart.scounteren = 2;
    assert_eq!(get(&mut hart, addr::TIME), 50);
    assert_eq!(go(&mut hart, addr::SSTATUS, Change::None), Err(Illegal));
}

#[test]
fn status_fields_take_what_they_can() {
    let mut hart = reset_state();
    let (_, effect) = go(&mut hart, addr::MSTATUS, Change::Write(u64::MAX)).expect("written");
    assert_eq!(effect, Effect::MODE | Effect::FLUSH | Effect::INTERRUPT);
    let all = get(&mut hart, addr::MSTATUS);
    assert_eq!(all, MSTATUS_WRITABLE | mstatus::XL | mstatus::SD);
    assert_eq!(get(&mut hart, addr::SSTATUS), SSTATUS_MASK & all | mstatus::SD);
    go(&mut hart, addr::MSTATUS, Change::Write(2 << 11)).expect("written");
    assert_eq!(get(&mut hart, addr::MSTATUS), mstatus::MPP | mstatus::XL, "MPP cannot be 2");
    assert_eq!(go(&mut hart, addr::SSTATUS, Change::Set(mstatus::SUM)).map(|r| r.1), Ok(Effect::MODE));
    assert_eq!(
        go(&mut hart, addr::SSTATUS, Change::Clear(mstatus::SUM | mstatus::MPP)).map(|r| r.0 & 7 << 17),
        Ok(mstatus::SUM)
    );
    assert_eq!(get(&mut hart, addr::MSTATUS) & mstatus::MPP, mstatus::MPP);
}

/// The short way of translated code beside the one that all CSRs go, for all that `sstatus` and its operand may hold, a
/// pseudo-random choice of it.
#[test]
fn the_short_way_to_sstatus_leads_to_the_same_place() {
    let mut state = 1_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    for _ in 0..20_000 {
        let mut long = reset_state();
        long.privilege = if random() & 1 == 0 { privilege::S } else { privilege::M };
        long.mstatus = mstatus::XL;
        let before = random() & random();
        write_status(&mut long, before, MSTATUS_WRITABLE);
        let mut short = reset_state();
        (short.privilege, short.mstatus) = (long.privilege, long.mstatus);
        let operand = random() & random();
        let (change, clear, set) = match random() % 3 {
            0 => (Change::Set(operand), 0, operand),
            1 => (Change::Clear(operand), operand, 0),
            _ => (Change::Write(operand), u64::MAX, operand),
        };
        let (_, effect) = go(&mut long, addr::SSTATUS, change).expect("there");
        assert_eq!(change_sstatus(&mut short, clear, set), effect, "{change:?} of {before:#x}");
        assert_eq!(short.mstatus, long.mstatus, "{change:?} of {before:#x}");
    }
}

#[test]
fn sum_changes_the_mode_by_what_the_key_says() {
    let mut hart = reset_state();
    hart.privilege = privilege::S;
    for others in [0, mstatus::SIE, mstatus::FS, mstatus::MXR | mstatus::SPP, mstatus::MPRV | mstatus::MPP] {
        hart.mstatus = others;
        let off = crate::key::mode(&hart);
        hart.mstatus |= mstatus::SUM;
        let on = crate::key::mode(&hart);
        assert_eq!((on.key ^ off.key, on.fetch_idx, on.space), (crate::key::SUM, off.fetch_idx, off.space));
    }
}

#[test]
fn interrupts_pend_from_pins_software_and_the_comparator() {
    let mut hart = reset_state();
    assert_eq!(get(&mut hart, addr::MIP), irq::MTI);
    go(&mut hart, addr::MIP, Change::Write(u64::MAX)).expect("written");
    assert_eq!(get(&mut hart, addr::MIP), irq::SUPERVISOR | irq::MTI);
    go(&mut hart, addr::MIDELEG, Change::Write(u64::MAX)).expect("written");
    assert_eq!(get(&mut hart, addr::MIDELEG), irq::SUPERVISOR);
    go(&mut hart, addr::SIP, Change::Write(0)).expect("written");
    assert_eq!(get(&mut hart, addr::SIP), irq::STI | irq::SEI, "only SSIP is the supervisor's");
    let effect = go(&mut hart, addr::MENVCFG, Change::Write(u64::MAX)).expect("written").1;
    assert!(effect.contains(Effect::TIMER));
    assert_eq!(get(&mut hart, addr::SIP), irq::SEI, "stimecmp has not come");
    hart.privilege = privilege::S;
    assert_eq!(go(&mut hart, addr::STIMECMP, Change::Write(50)), Err(Illegal), "mcounteren.TM is 0");
    hart.mcounteren = 2;
    go(&mut hart, addr::STIMECMP, Change::Write(50)).expect("written");
    assert_eq!(get(&mut hart, addr::SIP), irq::SEI | irq::STI);
    assert_eq!(hart.when(50), Some(5_000));
    // The pin shows in SEIP but does not stick through a read-modify-write.
    let mut cx = Context { pins: irq::SEI, ..Context::default() };
    hart.privilege = privilege::M;
    hart.mip = 0;
    let (old, _) = access(&mut hart, &mut cx, addr::MIP, Change::Set(irq::SSI)).expect("written");
    assert_eq!((old & irq::SEI, hart.mip), (irq::SEI, irq::SSI));
}

#[test]
fn satp_ignores_modes_it_does_not_have() {
    let mut hart = reset_state();
    hart.max_satp_mode = 8;
    let first = go(&mut hart, addr::SATP, Change::Write(8 << 60 | 3 << 44 | 6)).map(|r| r.1);
    assert_eq!(first, Ok(Effect::MODE | Effect::FLUSH), "bare before");
    let second = go(&mut hart, addr::SATP, Change::Write(8 << 60 | 3 << 44 | 5)).map(|r| r.1);
    assert_eq!(second, Ok(Effect::MODE));
    assert_eq!(go(&mut hart, addr::SATP, Change::Write(9 << 60 | 7)).map(|r| r.1), Ok(Effect::empty()));
    assert_eq!(get(&mut hart, addr::SATP), 8 << 60 | 3 << 44 | 5);
}

#[test]
fn floating_point_state_becomes_dirty() {
    let mut hart = reset_state();
    hart.mstatus |= 1 << 13;
    let mut cx = Context { fflags: 1, ..Context::default() };
    let (old, effect) = access(&mut hart, &mut cx, addr::FCSR, Change::Write(0x7ff)).expect("written");
    assert_eq!((old, cx.fflags, hart.frm), (1, 0x1f, 7));
    assert!(effect.contains(Effect::FP | Effect::MODE));
    assert_eq!(hart.mstatus & mstatus::FS, mstatus::FS);
    assert_eq!(access(&mut hart, &mut cx, addr::FRM, Change::None).map(|r| r.0), Ok(7));
}

#[test]
fn vectors_counters_and_pmp() {
    let mut hart = reset_state();
    go(&mut hart, addr::MTVEC, Change::Write(0x8000_0001)).expect("written");
    go(&mut hart, addr::MTVEC, Change::Write(0x9000_0002)).expect("written");
    assert_eq!(get(&mut hart, addr::MTVEC), 0x8000_0001);
    go(&mut hart, addr::MEPC, Change::Write(0x1003)).expect("written");
    assert_eq!(get(&mut hart, addr::MEPC), 0x1002);
    go(&mut hart, addr::MCYCLE, Change::Write(7)).expect("written");
    assert_eq!(get(&mut hart, addr::CYCLE), 7);
    assert_eq!(go(&mut hart, addr::PMPCFG0 + 1, Change::None), Err(Illegal), "odd ones are of RV32");
    assert_eq!(go(&mut hart, addr::PMPADDR63, Change::Write(1)).map(|r| r.1), Ok(Effect::FLUSH));
    assert_eq!(get(&mut hart, addr::PMPADDR63), 0);
    go(&mut hart, addr::MEDELEG, Change::Write(u64::MAX)).expect("written");
    assert_eq!(get(&mut hart, addr::MEDELEG), 0xb3ff);
    for csr in saved() {
        hart.mstatus |= mstatus::FS;
        assert!(go(&mut hart, csr, Change::None).is_ok(), "{csr:#x}");
    }
}
