//! Control and status registers: who may touch them, what they read, and what a write does.

use crate::hart::{Hart, MENVCFG_STCE, irq, mstatus, privilege};
use crate::pmp;

/// CSR addresses.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod addr {
    pub const FFLAGS: u32 = 0x001;
    pub const FRM: u32 = 0x002;
    pub const FCSR: u32 = 0x003;
    pub const SSTATUS: u32 = 0x100;
    pub const SIE: u32 = 0x104;
    pub const STVEC: u32 = 0x105;
    pub const SCOUNTEREN: u32 = 0x106;
    pub const SENVCFG: u32 = 0x10a;
    pub const SSCRATCH: u32 = 0x140;
    pub const SEPC: u32 = 0x141;
    pub const SCAUSE: u32 = 0x142;
    pub const STVAL: u32 = 0x143;
    pub const SIP: u32 = 0x144;
    pub const STIMECMP: u32 = 0x14d;
    pub const SATP: u32 = 0x180;
    pub const MSTATUS: u32 = 0x300;
    pub const MISA: u32 = 0x301;
    pub const MEDELEG: u32 = 0x302;
    pub const MIDELEG: u32 = 0x303;
    pub const MIE: u32 = 0x304;
    pub const MTVEC: u32 = 0x305;
    pub const MCOUNTEREN: u32 = 0x306;
    pub const MENVCFG: u32 = 0x30a;
    pub const MCOUNTINHIBIT: u32 = 0x320;
    pub const MHPMEVENT3: u32 = 0x323;
    pub const MHPMEVENT31: u32 = 0x33f;
    pub const MSCRATCH: u32 = 0x340;
    pub const MEPC: u32 = 0x341;
    pub const MCAUSE: u32 = 0x342;
    pub const MTVAL: u32 = 0x343;
    pub const MIP: u32 = 0x344;
    pub const PMPCFG0: u32 = 0x3a0;
    pub const PMPCFG15: u32 = 0x3af;
    pub const PMPADDR0: u32 = 0x3b0;
    pub const PMPADDR63: u32 = 0x3ef;
    pub const MCYCLE: u32 = 0xb00;
    pub const MINSTRET: u32 = 0xb02;
    pub const MHPMCOUNTER3: u32 = 0xb03;
    pub const MHPMCOUNTER31: u32 = 0xb1f;
    pub const CYCLE: u32 = 0xc00;
    pub const TIME: u32 = 0xc01;
    pub const INSTRET: u32 = 0xc02;
    pub const HPMCOUNTER31: u32 = 0xc1f;
    pub const MVENDORID: u32 = 0xf11;
    pub const MARCHID: u32 = 0xf12;
    pub const MIMPID: u32 = 0xf13;
    pub const MHARTID: u32 = 0xf14;
    pub const MCONFIGPTR: u32 = 0xf15;
}

/// The parts of `mstatus` that `sstatus` shows: SIE, SPIE, SPP, FS, SUM, MXR, UXL.
pub const SSTATUS_MASK: u64 =
    mstatus::SIE | mstatus::SPIE | mstatus::SPP | mstatus::FS | mstatus::SUM | mstatus::MXR | mstatus::UXL;

const SSTATUS_WRITABLE: u64 = SSTATUS_MASK & !mstatus::UXL;

const MSTATUS_WRITABLE: u64 = SSTATUS_WRITABLE
    | mstatus::MIE
    | mstatus::MPIE
    | mstatus::MPP
    | mstatus::MPRV
    | mstatus::TVM
    | mstatus::TW
    | mstatus::TSR;

/// Exceptions that can be delegated: all that exist but `ecall` from M-mode.
const MEDELEG_WRITABLE: u64 = 0xb3ff;

/// FIOM: bit 0 of `menvcfg` and `senvcfg`.
const ENVCFG_FIOM: u64 = 1;

/// CY, TM and IR of `mcounteren` and `scounteren`; the other counters read as zero and stay denied.
const COUNTEREN: u64 = 7;

bitflags::bitflags! {
    /// What a CSR write changed beyond the register itself.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Effect: u32 {
        /// The modes that translated code depends on.
        const MODE = 1;
        /// Translations in the TLB.
        const FLUSH = 2;
        /// Which interrupts are pending and enabled.
        const INTERRUPT = 4;
        /// When the timer is due.
        const TIMER = 8;
        /// The floating-point rounding mode or flags: [`Context::fflags`] and `frm` are to be loaded.
        const FP = 16;
    }
}

/// True if what is read of `csr`, or what a write does to it, is a matter of [`Context::now`].
pub fn depends_on_time(csr: u32) -> bool {
    matches!(
        csr,
        addr::SIP | addr::MIP | addr::MCYCLE | addr::CYCLE | addr::MINSTRET | addr::INSTRET | addr::TIME
    )
}

/// What a CSR access needs beside the hart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Context {
    /// Guest time in nanoseconds, for those CSRs that [`depends_on_time`] names.
    pub now: u64,
    /// Levels of the pins.
    pub pins: u64,
    /// Accrued floating-point exceptions, as in `fflags`.
    pub fflags: u64,
}

/// The access is an illegal instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Illegal;

/// What an instruction does to a CSR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Reads only.
    None,
    /// Replaces it.
    Write(u64),
    /// Sets bits.
    Set(u64),
    /// Clears bits.
    Clear(u64),
}

impl Change {
    fn apply(self, old: u64) -> Option<u64> {
        match self {
            Self::None => None,
            Self::Write(v) => Some(v),
            Self::Set(v) => Some(old | v),
            Self::Clear(v) => Some(old & !v),
        }
    }
}

/// Reads CSR `csr` and changes it: its old value, and what else changed.
///
/// # Errors
/// [`Illegal`] if it does not exist or may not be accessed so.
pub fn access(hart: &mut Hart, cx: &mut Context, csr: u32, change: Change) -> Result<(u64, Effect), Illegal> {
    permitted(hart, csr, change != Change::None)?;
    let old = read(hart, cx, csr)?;
    // SEIP reads as the pin or the software bit, but only the latter takes part in set and clear.
    let base = if csr == addr::MIP { old & !irq::SEI | hart.mip & irq::SEI } else { old };
    match change.apply(base) {
        None => Ok((old, Effect::empty())),
        Some(value) => Ok((old, write(hart, cx, csr, value)?)),
    }
}

fn permitted(hart: &Hart, csr: u32, write: bool) -> Result<(), Illegal> {
    let needs = u64::from(csr >> 8 & 3);
    if hart.privilege < needs || write && csr >> 10 == 3 {
        return Err(Illegal);
    }
    let ok = match csr {
        addr::FFLAGS..=addr::FCSR => hart.fp_enabled(),
        addr::SATP => !(hart.privilege == privilege::S && hart.mstatus & mstatus::TVM != 0),
        addr::STIMECMP => {
            hart.sstc != 0
                && (hart.privilege == privilege::M
                    || hart.stimecmp_on() && counter_enabled(hart, addr::TIME - addr::CYCLE))
        }
        addr::CYCLE..=addr::HPMCOUNTER31 => counter_enabled(hart, csr - addr::CYCLE),
        _ => true,
    };
    if ok { Ok(()) } else { Err(Illegal) }
}

fn counter_enabled(hart: &Hart, counter: u32) -> bool {
    let bit = 1 << counter;
    match hart.privilege {
        privilege::M => true,
        privilege::S => hart.mcounteren & bit != 0,
        _ => hart.mcounteren & hart.scounteren & bit != 0,
    }
}

fn with_sd(status: u64) -> u64 {
    if status & mstatus::FS == mstatus::FS { status | mstatus::SD } else { status }
}

/// The value of a CSR, without any check of privilege.
///
/// # Errors
/// [`Illegal`] if there is none of this number.
pub fn read(hart: &Hart, cx: &Context, csr: u32) -> Result<u64, Illegal> {
    Ok(match csr {
        addr::FFLAGS => cx.fflags,
        addr::FRM => hart.frm,
        addr::FCSR => hart.frm << 5 | cx.fflags,
        addr::SSTATUS => with_sd(hart.mstatus & SSTATUS_MASK),
        addr::SIE => hart.mie & hart.mideleg,
        addr::STVEC => hart.stvec,
        addr::SCOUNTEREN => hart.scounteren,
        addr::SENVCFG => hart.senvcfg,
        addr::SSCRATCH => hart.sscratch,
        addr::SEPC => hart.sepc,
        addr::SCAUSE => hart.scause,
        addr::STVAL => hart.stval,
        addr::SIP => hart.pending(cx.pins, hart.ticks(cx.now)) & hart.mideleg,
        addr::STIMECMP => hart.stimecmp,
        addr::SATP => hart.satp,
        addr::MSTATUS => with_sd(hart.mstatus),
        addr::MISA => hart.misa,
        addr::MEDELEG => hart.medeleg,
        addr::MIDELEG => hart.mideleg,
        addr::MIE => hart.mie,
        addr::MTVEC => hart.mtvec,
        addr::MCOUNTEREN => hart.mcounteren,
        addr::MENVCFG => hart.menvcfg,
        addr::MCOUNTINHIBIT | addr::MHPMEVENT3..=addr::MHPMEVENT31 => 0,
        addr::MSCRATCH => hart.mscratch,
        addr::MEPC => hart.mepc,
        addr::MCAUSE => hart.mcause,
        addr::MTVAL => hart.mtval,
        addr::MIP => hart.pending(cx.pins, hart.ticks(cx.now)),
        addr::PMPCFG0..=addr::PMPCFG15 if csr & 1 == 0 => pmp::read_cfg(hart, (csr - addr::PMPCFG0) as usize),
        addr::PMPADDR0..=addr::PMPADDR63 => {
            hart.pmpaddr.get((csr - addr::PMPADDR0) as usize).copied().unwrap_or(0)
        }
        addr::MCYCLE | addr::CYCLE => cx.now.wrapping_add(hart.mcycle_offset),
        addr::MINSTRET | addr::INSTRET => cx.now.wrapping_add(hart.minstret_offset),
        addr::TIME => hart.ticks(cx.now),
        addr::MHPMCOUNTER3..=addr::MHPMCOUNTER31 => 0,
        _ if (addr::CYCLE + 3..=addr::HPMCOUNTER31).contains(&csr) => 0,
        addr::MVENDORID | addr::MARCHID | addr::MIMPID | addr::MCONFIGPTR => 0,
        addr::MHARTID => hart.hartid,
        _ => return Err(Illegal),
    })
}

/// Gives a CSR a value as far as it can have it (WARL), without any check of privilege.
///
/// # Errors
/// [`Illegal`] if there is none of this number that can be written.
pub fn write(hart: &mut Hart, cx: &mut Context, csr: u32, value: u64) -> Result<Effect, Illegal> {
    let plain = Effect::empty();
    let effect = match csr {
        addr::FFLAGS..=addr::FCSR => return Ok(write_fp(hart, cx, csr, value)),
        addr::SSTATUS => return Ok(write_status(hart, value, SSTATUS_WRITABLE)),
        addr::MSTATUS => return Ok(write_status(hart, value, MSTATUS_WRITABLE)),
        addr::SIE => {
            hart.mie = hart.mie & !hart.mideleg | value & hart.mideleg & irq::ALL;
            Effect::INTERRUPT
        }
        addr::STVEC => {
            hart.stvec = tvec(value, hart.stvec);
            plain
        }
        addr::SCOUNTEREN => set(&mut hart.scounteren, value & COUNTEREN),
        addr::SENVCFG => set(&mut hart.senvcfg, value & ENVCFG_FIOM),
        addr::SSCRATCH => set(&mut hart.sscratch, value),
        addr::SEPC => set(&mut hart.sepc, value & !1),
        addr::SCAUSE => set(&mut hart.scause, value),
        addr::STVAL => set(&mut hart.stval, value),
        addr::SIP => {
            let writable = irq::SSI & hart.mideleg;
            hart.mip = hart.mip & !writable | value & writable;
            Effect::INTERRUPT
        }
        addr::STIMECMP => set(&mut hart.stimecmp, value) | Effect::TIMER | Effect::INTERRUPT,
        addr::SATP => return Ok(write_satp(hart, value)),
        addr::MISA | addr::MCOUNTINHIBIT | addr::MHPMEVENT3..=addr::MHPMEVENT31 => plain,
        addr::MHPMCOUNTER3..=addr::MHPMCOUNTER31 => plain,
        addr::MEDELEG => set(&mut hart.medeleg, value & MEDELEG_WRITABLE),
        addr::MIDELEG => set(&mut hart.mideleg, value & irq::SUPERVISOR) | Effect::INTERRUPT,
        addr::MIE => set(&mut hart.mie, value & irq::ALL) | Effect::INTERRUPT,
        addr::MTVEC => {
            hart.mtvec = tvec(value, hart.mtvec);
            plain
        }
        addr::MCOUNTEREN => set(&mut hart.mcounteren, value & COUNTEREN),
        addr::MENVCFG => {
            let stce = if hart.sstc != 0 { MENVCFG_STCE } else { 0 };
            set(&mut hart.menvcfg, value & (stce | ENVCFG_FIOM)) | Effect::TIMER | Effect::INTERRUPT
        }
        addr::MSCRATCH => set(&mut hart.mscratch, value),
        addr::MEPC => set(&mut hart.mepc, value & !1),
        addr::MCAUSE => set(&mut hart.mcause, value),
        addr::MTVAL => set(&mut hart.mtval, value),
        addr::MIP => {
            let stip = if hart.stimecmp_on() { 0 } else { irq::STI };
            let writable = irq::SSI | irq::SEI | stip;
            hart.mip = hart.mip & !writable | value & writable;
            Effect::INTERRUPT
        }
        addr::PMPCFG0..=addr::PMPCFG15 if csr & 1 == 0 => {
            pmp::write_cfg(hart, (csr - addr::PMPCFG0) as usize, value);
            Effect::FLUSH
        }
        addr::PMPADDR0..=addr::PMPADDR63 => {
            pmp::write_addr(hart, (csr - addr::PMPADDR0) as usize, value);
            Effect::FLUSH
        }
        addr::MCYCLE => set(&mut hart.mcycle_offset, value.wrapping_sub(cx.now)),
        addr::MINSTRET => set(&mut hart.minstret_offset, value.wrapping_sub(cx.now)),
        _ => return Err(Illegal),
    };
    Ok(effect)
}

fn set(register: &mut u64, value: u64) -> Effect {
    *register = value;
    Effect::empty()
}

/// Direct and vectored are the only modes; others leave the register as it is.
fn tvec(value: u64, old: u64) -> u64 {
    if value & 2 == 0 { value } else { old }
}

fn write_fp(hart: &mut Hart, cx: &mut Context, csr: u32, value: u64) -> Effect {
    match csr {
        addr::FFLAGS => cx.fflags = value & 0x1f,
        addr::FRM => hart.frm = value & 7,
        _ => {
            cx.fflags = value & 0x1f;
            hart.frm = value >> 5 & 7;
        }
    }
    hart.fp_dirty();
    Effect::FP | Effect::MODE
}

/// Clears and sets bits of `sstatus`, those of `set` last.
#[inline]
pub fn change_sstatus(hart: &mut Hart, clear: u64, set: u64) -> Effect {
    write_status(hart, hart.mstatus & !clear | set, SSTATUS_WRITABLE)
}

#[inline]
fn write_status(hart: &mut Hart, value: u64, writable: u64) -> Effect {
    let old = hart.mstatus;
    let mut new = old & !writable | value & writable;
    if (new & mstatus::MPP) >> mstatus::MPP_SHIFT == 2 {
        new = new & !mstatus::MPP | old & mstatus::MPP; // no such privilege: WARL keeps the old one
    }
    hart.mstatus = new;
    let changed = old ^ new;
    let mut effect = Effect::empty();
    if changed & (mstatus::FS | mstatus::SUM | mstatus::MXR | mstatus::MPRV | mstatus::MPP) != 0 {
        effect |= Effect::MODE;
    }
    if changed & mstatus::MXR != 0 {
        effect |= Effect::FLUSH;
    }
    if new & !old & (mstatus::SIE | mstatus::MIE) != 0 {
        effect |= Effect::INTERRUPT;
    }
    effect
}

/// `satp`: a write with an unsupported MODE has no effect at all (section 10.1.11).
fn write_satp(hart: &mut Hart, value: u64) -> Effect {
    let mode = value >> 60;
    if mode != 0 && !(8..=hart.max_satp_mode).contains(&mode) {
        return Effect::empty();
    }
    let value = if mode == 0 { 0 } else { value };
    if value == hart.satp {
        return Effect::empty();
    }
    // Another MODE is another way to translate: global mappings do not live on in it.
    let flush = if (hart.satp ^ value) >> 60 != 0 { Effect::FLUSH } else { Effect::empty() };
    hart.satp = value;
    Effect::MODE | flush
}

/// The numbers of all CSRs that make up a saved state: what they hold cannot be had from others.
pub fn saved() -> impl Iterator<Item = u32> {
    const PLAIN: &[u32] = &[
        addr::STVEC,
        addr::SCOUNTEREN,
        addr::SENVCFG,
        addr::SSCRATCH,
        addr::SEPC,
        addr::SCAUSE,
        addr::STVAL,
        addr::STIMECMP,
        addr::SATP,
        addr::MSTATUS,
        addr::MISA,
        addr::MEDELEG,
        addr::MIDELEG,
        addr::MIE,
        addr::MTVEC,
        addr::MCOUNTEREN,
        addr::MENVCFG,
        addr::MSCRATCH,
        addr::MEPC,
        addr::MCAUSE,
        addr::MTVAL,
        addr::MIP,
        addr::MCYCLE,
        addr::MINSTRET,
        addr::FCSR,
    ];
    // Addresses before configurations: a lock takes hold with the latter.
    let pmp = (addr::PMPADDR0..=addr::PMPADDR63).chain((addr::PMPCFG0..=addr::PMPCFG15).step_by(2));
    PLAIN.iter().copied().chain(pmp)
}

#[cfg(test)]
mod tests;
