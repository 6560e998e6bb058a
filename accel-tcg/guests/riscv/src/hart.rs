//! The state of a hart, laid out for translated code.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Privilege modes, as the specification encodes them.
pub mod privilege {
    /// User.
    pub const U: u64 = 0;
    /// Supervisor.
    pub const S: u64 = 1;
    /// Machine.
    pub const M: u64 = 3;
}

/// Bits of `mstatus` (privileged specification, section 3.1.6).
pub mod mstatus {
    /// Supervisor interrupts enabled.
    pub const SIE: u64 = 1 << 1;
    /// Machine interrupts enabled.
    pub const MIE: u64 = 1 << 3;
    /// SIE before the trap.
    pub const SPIE: u64 = 1 << 5;
    /// MIE before the trap.
    pub const MPIE: u64 = 1 << 7;
    /// Privilege before the trap into S-mode.
    pub const SPP: u64 = 1 << 8;
    /// Privilege before the trap into M-mode, two bits.
    pub const MPP: u64 = 3 << 11;
    /// Position of MPP.
    pub const MPP_SHIFT: u32 = 11;
    /// State of the floating-point unit, two bits: off, initial, clean, dirty.
    pub const FS: u64 = 3 << 13;
    /// Loads and stores are made with the privilege in MPP.
    pub const MPRV: u64 = 1 << 17;
    /// S-mode may access U-mode pages.
    pub const SUM: u64 = 1 << 18;
    /// Loads may read executable pages.
    pub const MXR: u64 = 1 << 19;
    /// `satp` and `sfence.vma` trap in S-mode.
    pub const TVM: u64 = 1 << 20;
    /// WFI traps below M-mode.
    pub const TW: u64 = 1 << 21;
    /// SRET traps in S-mode.
    pub const TSR: u64 = 1 << 22;
    /// UXL and SXL: both 64-bit, read-only.
    pub const XL: u64 = 2 << 32 | 2 << 34;
    /// UXL.
    pub const UXL: u64 = 3 << 32;
    /// Some unit is dirty; computed when read.
    pub const SD: u64 = 1 << 63;
}

/// Bits of `mip` and `mie`; also the numbers of interrupts and of a vCPU's pins.
pub mod irq {
    /// Supervisor software.
    pub const SSI: u64 = 1 << 1;
    /// Machine software.
    pub const MSI: u64 = 1 << 3;
    /// Supervisor timer.
    pub const STI: u64 = 1 << 5;
    /// Machine timer.
    pub const MTI: u64 = 1 << 7;
    /// Supervisor external.
    pub const SEI: u64 = 1 << 9;
    /// Machine external.
    pub const MEI: u64 = 1 << 11;
    /// All of them.
    pub const ALL: u64 = SSI | MSI | STI | MTI | SEI | MEI;
    /// Those of S-mode.
    pub const SUPERVISOR: u64 = SSI | STI | SEI;
    /// Those that come in by pins.
    pub const PINS: u64 = MSI | MTI | SEI | MEI;
}

/// Bit of `menvcfg`: `stimecmp` is enabled for S-mode.
pub const MENVCFG_STCE: u64 = 1 << 63;

/// Most PMP entries that the specification allows.
pub const MAX_PMP: usize = 64;

/// No reservation is held: no aligned address with a size bit looks like this.
pub const NO_RESERVATION: u64 = u64::MAX;

/// All of a hart that is architectural, apart from the pc and the floating-point flags and rounding
/// mode that live in the generic header.
#[repr(C)]
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Hart {
    /// Integer registers; `x[0]` is always 0.
    pub x: [u64; 32],
    /// Floating-point registers, NaN-boxed.
    pub f: [u64; 32],
    /// Address of the reservation that LR made, plus 1 if it is of 4 bytes; or [`NO_RESERVATION`].
    pub res_addr: u64,
    /// The value that LR loaded, sign-extended.
    pub res_value: u64,
    /// `mstatus` without SD. FS is updated by translated code.
    pub mstatus: u64,
    /// `sscratch`.
    pub sscratch: u64,
    /// `stvec`.
    pub stvec: u64,
    /// `sepc`.
    pub sepc: u64,
    /// `scause`.
    pub scause: u64,
    /// `stval`.
    pub stval: u64,
    /// `mscratch`.
    pub mscratch: u64,
    /// `mtvec`.
    pub mtvec: u64,
    /// `mepc`.
    pub mepc: u64,
    /// `mcause`.
    pub mcause: u64,
    /// `mtval`.
    pub mtval: u64,
    /// `satp`.
    pub satp: u64,
    /// `medeleg`.
    pub medeleg: u64,
    /// `mideleg`.
    pub mideleg: u64,
    /// `mie`.
    pub mie: u64,
    /// The bits of `mip` that software sets: SSIP, SEIP, and STIP while `stimecmp` is off.
    pub mip: u64,
    /// `menvcfg`.
    pub menvcfg: u64,
    /// `senvcfg`.
    pub senvcfg: u64,
    /// `mcounteren`.
    pub mcounteren: u64,
    /// `scounteren`.
    pub scounteren: u64,
    /// `stimecmp`.
    pub stimecmp: u64,
    /// Added to the clock to give `mcycle`.
    pub mcycle_offset: u64,
    /// Added to the clock to give `minstret`.
    pub minstret_offset: u64,
    /// `frm`.
    pub frm: u64,
    /// Current privilege.
    pub privilege: u64,
    /// `mhartid`.
    pub hartid: u64,
    /// `misa`.
    pub misa: u64,
    /// Number of PMP entries.
    pub pmp_entries: u64,
    /// Entries from this one on are off.
    pub pmp_active: u64,
    /// Largest supported MODE of `satp`: 8, 9 or 10.
    pub max_satp_mode: u64,
    /// Ticks of `time` per second.
    pub timebase_hz: u64,
    /// 1 if Sstc is there.
    pub sstc: u64,
    /// 1 if `stimecmp` drives STIP, and had been reached when that was looked at last. While it is 0 and `stimecmp` is on, an
    /// alarm is set for the time at which it will be reached, if ever.
    pub timer_due: u64,
    /// First byte and last byte of an area in which the first PMP entry that matches allows everything: [`crate::pmp`] computes
    /// it. Empty if the last byte lies before the first.
    pub pmp_open: [u64; 2],
    /// `pmpaddr0` to `pmpaddr63`.
    pub pmpaddr: [u64; MAX_PMP],
    /// The configuration byte of each entry.
    pub pmpcfg: [u8; MAX_PMP],
}

impl Hart {
    /// Nanoseconds of guest time to ticks of `time`.
    pub fn ticks(&self, now: u64) -> u64 {
        // What is usual: a tick is a whole number of nanoseconds.
        match 1_000_000_000_u64.checked_div(self.timebase_hz) {
            Some(tick) if tick.checked_mul(self.timebase_hz) == Some(1_000_000_000) => now / tick,
            _ => (u128::from(now) * u128::from(self.timebase_hz) / 1_000_000_000) as u64,
        }
    }

    /// The first nanosecond at which `time` is at least `ticks`; `None` if that is never.
    pub fn when(&self, ticks: u64) -> Option<u64> {
        let hz = u128::from(self.timebase_hz.max(1));
        u64::try_from((u128::from(ticks) * 1_000_000_000).div_ceil(hz)).ok()
    }

    /// `stimecmp` drives STIP.
    pub fn stimecmp_on(&self) -> bool {
        self.menvcfg & MENVCFG_STCE != 0
    }

    /// `mip`, given the levels of the pins and the time in ticks.
    pub fn pending(&self, pins: u64, ticks: u64) -> u64 {
        self.pending_if(pins, ticks >= self.stimecmp)
    }

    /// `mip`, given the levels of the pins, as of when [`Hart::timer_due`] was set.
    pub fn pending_lately(&self, pins: u64) -> u64 {
        self.pending_if(pins, self.timer_due != 0)
    }

    fn pending_if(&self, pins: u64, due: bool) -> u64 {
        let mut mip = self.mip | pins & irq::PINS;
        if self.stimecmp_on() {
            mip &= !irq::STI;
            if due {
                mip |= irq::STI;
            }
        }
        mip
    }

    /// The privilege that loads and stores are made with.
    pub fn data_privilege(&self) -> u64 {
        if self.privilege == privilege::M && self.mstatus & mstatus::MPRV != 0 {
            (self.mstatus & mstatus::MPP) >> mstatus::MPP_SHIFT
        } else {
            self.privilege
        }
    }

    /// True unless FS is off.
    pub fn fp_enabled(&self) -> bool {
        self.mstatus & mstatus::FS != 0
    }

    /// Something in the floating-point state was written.
    pub fn fp_dirty(&mut self) {
        self.mstatus |= mstatus::FS;
    }
}

/// A hart's state as it is after reset, for tests and [`crate::RiscvGuest`].
pub fn reset_state() -> Box<Hart> {
    let mut hart = zero();
    hart.res_addr = NO_RESERVATION;
    hart.mstatus = mstatus::XL;
    hart.privilege = privilege::M;
    hart.misa = crate::isa::MISA;
    hart.max_satp_mode = 10;
    hart.pmp_entries = 16;
    hart.timebase_hz = 10_000_000;
    hart.sstc = 1;
    hart.stimecmp = u64::MAX;
    hart.pmp_open = [1, 0];
    hart
}

fn zero() -> Box<Hart> {
    Box::new(<Hart as zerocopy::FromZeros>::new_zeroed())
}
