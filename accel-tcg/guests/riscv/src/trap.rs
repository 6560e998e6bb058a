//! Exceptions, interrupts and the way back (privileged specification, sections 3.1.6 to 3.3 and 10.1).

use crate::hart::{Hart, irq, mstatus, privilege};

/// Exception numbers (`mcause`).
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod cause {
    pub const FETCH_MISALIGNED: u64 = 0;
    pub const FETCH_ACCESS: u64 = 1;
    pub const ILLEGAL: u64 = 2;
    pub const BREAKPOINT: u64 = 3;
    pub const LOAD_MISALIGNED: u64 = 4;
    pub const LOAD_ACCESS: u64 = 5;
    pub const STORE_MISALIGNED: u64 = 6;
    pub const STORE_ACCESS: u64 = 7;
    /// `ecall` from U-mode; from S-mode and M-mode the privilege is added.
    pub const ECALL: u64 = 8;
    pub const FETCH_PAGE: u64 = 12;
    pub const LOAD_PAGE: u64 = 13;
    pub const STORE_PAGE: u64 = 15;
}

/// Set in `mcause` for interrupts.
pub const INTERRUPT: u64 = 1 << 63;

/// Interrupts by falling priority.
const PRIORITY: [u32; 6] = [11, 3, 7, 9, 1, 5];

fn handler(tvec: u64, cause: u64) -> u64 {
    let base = tvec & !3;
    if tvec & 1 != 0 && cause & INTERRUPT != 0 { base.wrapping_add(4 * (cause & !INTERRUPT)) } else { base }
}

/// Takes the trap `cause` (an exception, or an interrupt with [`INTERRUPT`]) at `pc` with `tval`: the
/// handler's address.
pub fn enter(hart: &mut Hart, pc: u64, cause: u64, tval: u64) -> u64 {
    let delegated = if cause & INTERRUPT != 0 { hart.mideleg } else { hart.medeleg };
    let to_s =
        hart.privilege != privilege::M && delegated.checked_shr((cause & 63) as u32).unwrap_or(0) & 1 != 0;
    let status = hart.mstatus;
    if to_s {
        hart.scause = cause;
        hart.sepc = pc;
        hart.stval = tval;
        let mut new = status & !(mstatus::SPIE | mstatus::SIE | mstatus::SPP);
        if status & mstatus::SIE != 0 {
            new |= mstatus::SPIE;
        }
        if hart.privilege == privilege::S {
            new |= mstatus::SPP;
        }
        hart.mstatus = new;
        hart.privilege = privilege::S;
        handler(hart.stvec, cause)
    } else {
        hart.mcause = cause;
        hart.mepc = pc;
        hart.mtval = tval;
        let mut new = status & !(mstatus::MPIE | mstatus::MIE | mstatus::MPP);
        if status & mstatus::MIE != 0 {
            new |= mstatus::MPIE;
        }
        hart.mstatus = new | hart.privilege << mstatus::MPP_SHIFT;
        hart.privilege = privilege::M;
        handler(hart.mtvec, cause)
    }
}

/// The most urgent of the `pending` interrupts that is enabled now, as a cause.
pub fn next_interrupt(hart: &Hart, pending: u64) -> Option<u64> {
    let ready = pending & hart.mie;
    let machine = hart.privilege < privilege::M || hart.mstatus & mstatus::MIE != 0;
    let supervisor =
        hart.privilege < privilege::S || hart.privilege == privilege::S && hart.mstatus & mstatus::SIE != 0;
    let for_m = if machine { ready & !hart.mideleg } else { 0 };
    let for_s = if supervisor { ready & hart.mideleg } else { 0 };
    let ready = if for_m != 0 { for_m } else { for_s };
    PRIORITY.into_iter().find(|i| ready >> i & 1 != 0).map(|i| INTERRUPT | u64::from(i))
}

/// MRET from M-mode: where execution goes on.
pub fn mret(hart: &mut Hart) -> u64 {
    let status = hart.mstatus;
    let to = (status & mstatus::MPP) >> mstatus::MPP_SHIFT;
    let mut new = status & !(mstatus::MIE | mstatus::MPP) | mstatus::MPIE;
    if status & mstatus::MPIE != 0 {
        new |= mstatus::MIE;
    }
    if to != privilege::M {
        new &= !mstatus::MPRV;
    }
    hart.mstatus = new;
    hart.privilege = to;
    hart.mepc
}

/// SRET from S-mode or M-mode: where execution goes on.
pub fn sret(hart: &mut Hart) -> u64 {
    let status = hart.mstatus;
    let mut new = status & !(mstatus::SIE | mstatus::SPP | mstatus::MPRV) | mstatus::SPIE;
    if status & mstatus::SPIE != 0 {
        new |= mstatus::SIE;
    }
    hart.mstatus = new;
    hart.privilege = if status & mstatus::SPP != 0 { privilege::S } else { privilege::U };
    hart.sepc
}

/// WFI may be executed; else it is an illegal instruction. It is allowed in U-mode without a limit
/// only where S-mode is not implemented, so here it always traps there.
pub fn wfi_allowed(hart: &Hart) -> bool {
    match hart.privilege {
        privilege::M => true,
        privilege::S => hart.mstatus & mstatus::TW == 0,
        _ => false,
    }
}

/// A hart in WFI goes on: some interrupt is pending and enabled in `mie`, whatever the global enables.
pub fn wakes(hart: &Hart, pending: u64) -> bool {
    pending & hart.mie & irq::ALL != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hart::reset_state;

    #[test]
    fn exceptions_go_where_they_are_delegated_and_come_back() {
        let mut hart = reset_state();
        hart.mtvec = 0x1000;
        hart.stvec = 0x2001;
        hart.medeleg = 1 << cause::LOAD_PAGE;
        hart.privilege = privilege::U;
        hart.mstatus |= mstatus::SIE | mstatus::MPRV;
        assert_eq!(enter(&mut hart, 0x50, cause::LOAD_PAGE, 0x77), 0x2000);
        assert_eq!((hart.sepc, hart.scause, hart.stval, hart.privilege), (0x50, 13, 0x77, privilege::S));
        assert_eq!(hart.mstatus & (mstatus::SIE | mstatus::SPIE | mstatus::SPP), mstatus::SPIE);
        assert_eq!(enter(&mut hart, 0x2000, cause::ILLEGAL, 0), 0x1000, "not delegated");
        assert_eq!((hart.privilege, hart.mstatus & mstatus::MPP), (privilege::M, 1 << 11));
        assert_eq!(enter(&mut hart, 0x1000, cause::LOAD_PAGE, 0), 0x1000, "never from M-mode downwards");
        assert_eq!(hart.mstatus & mstatus::MPP, mstatus::MPP);
        assert_eq!(mret(&mut hart), 0x1000);
        assert_eq!((hart.privilege, hart.mstatus & mstatus::MPP), (privilege::M, 0));
        assert_ne!(hart.mstatus & mstatus::MPRV, 0, "kept by a return to M-mode");
        assert_eq!(mret(&mut hart), 0x1000);
        assert_eq!((hart.privilege, hart.mstatus & mstatus::MPRV), (privilege::U, 0));
        assert_eq!(sret(&mut hart), 0x50);
        assert_ne!(hart.mstatus & mstatus::SIE, 0);
    }

    #[test]
    fn interrupts_by_priority_delegation_and_enables() {
        let mut hart = reset_state();
        hart.mie = irq::ALL;
        hart.mtvec = 0x1001;
        assert_eq!(next_interrupt(&hart, irq::ALL), None, "MIE is off in M-mode");
        hart.mstatus |= mstatus::MIE;
        assert_eq!(next_interrupt(&hart, irq::ALL), Some(INTERRUPT | 11));
        assert_eq!(next_interrupt(&hart, irq::MTI | irq::MSI | irq::SEI), Some(INTERRUPT | 3));
        assert_eq!(next_interrupt(&hart, irq::STI | irq::SSI | irq::SEI), Some(INTERRUPT | 9));
        hart.mideleg = irq::SUPERVISOR;
        assert_eq!(next_interrupt(&hart, irq::SUPERVISOR), None, "delegated ones never interrupt M-mode");
        hart.privilege = privilege::S;
        hart.mstatus &= !mstatus::MIE;
        assert_eq!(next_interrupt(&hart, irq::SUPERVISOR), None);
        assert_eq!(next_interrupt(&hart, irq::SUPERVISOR | irq::MTI), Some(INTERRUPT | 7));
        hart.privilege = privilege::U;
        assert_eq!(next_interrupt(&hart, irq::STI | irq::SSI), Some(INTERRUPT | 1));
        assert_eq!(enter(&mut hart, 4, INTERRUPT | 7, 0), 0x1000 + 28, "vectored");
        assert_eq!(hart.mcause, INTERRUPT | 7);
        assert!(wakes(&hart, irq::SSI));
        hart.mie = 0;
        assert!(!wakes(&hart, irq::ALL));
    }
}
