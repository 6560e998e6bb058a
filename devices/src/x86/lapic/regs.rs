//! Registers of a local APIC and the rules that need nothing else (SDM volume 3, chapter 11).

/// Register numbers: offsets in the page divided by 16, and x2APIC MSRs less 0x800.
#[allow(missing_docs, reason = "the names are the SDM's")]
pub(super) mod reg {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const APR: u32 = 0x09;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const ICR: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_ERROR: u32 = 0x37;
    pub const INITIAL_COUNT: u32 = 0x38;
    pub const CURRENT_COUNT: u32 = 0x39;
    pub const DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

/// Indexes of the local vector table.
pub(super) mod lvt {
    pub const TIMER: usize = 0;
    pub const LINT0: usize = 3;
    pub const LINT1: usize = 4;
    pub const ERROR: usize = 5;
    pub const MASKED: u32 = 1 << 16;
    /// Bits that can be written, by index: timer, thermal, performance, LINT0, LINT1, error.
    pub const WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
}

/// Delivery modes.
#[allow(missing_docs, reason = "the names are the SDM's")]
pub(super) mod mode {
    pub const FIXED: u32 = 0;
    pub const LOWEST: u32 = 1;
    pub const NMI: u32 = 4;
    pub const INIT: u32 = 5;
    pub const STARTUP: u32 = 6;
    pub const EXTINT: u32 = 7;
}

/// Bits of the error status register.
pub(super) mod error {
    pub const SEND_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_VECTOR: u32 = 1 << 6;
    pub const REGISTER: u32 = 1 << 7;
}

/// Bits of IA32_APIC_BASE.
pub(super) mod base {
    pub const BSP: u64 = 1 << 8;
    pub const X2APIC: u64 = 1 << 10;
    pub const ENABLED: u64 = 1 << 11;
    /// Where the registers are.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// SVR: software enable.
pub(super) const SVR_ENABLED: u32 = 1 << 8;
/// Version 0x14 with six LVT entries.
pub(super) const VERSION: u32 = 0x0005_0014;

/// 256 bits, one a vector.
pub(super) type Vectors = [u32; 8];

/// The highest vector that is set.
pub(super) fn highest(v: &Vectors) -> Option<u8> {
    v.iter()
        .enumerate()
        .rev()
        .find(|(_, w)| **w != 0)
        .map(|(n, w)| (n as u8) * 32 + (31 - w.leading_zeros()) as u8)
}

pub(super) fn set(v: &mut Vectors, vector: u8, on: bool) {
    if let Some(word) = v.get_mut(usize::from(vector) / 32) {
        let bit = 1 << (vector % 32);
        *word = if on { *word | bit } else { *word & !bit };
    }
}

pub(super) fn get(v: &Vectors, vector: u8) -> bool {
    v.get(usize::from(vector) / 32).is_some_and(|w| w >> (vector % 32) & 1 != 0)
}

/// What INIT, SIPI and NMI left for the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LapicSignals {
    /// INIT was received.
    pub init: bool,
    /// NMIs that were received, up to two: while one is served, another waits.
    pub nmi: u8,
    /// A start-up IPI with this vector was received.
    pub sipi: Option<u8>,
}

impl LapicSignals {
    /// Notes an NMI.
    pub(super) fn add_nmi(&mut self) {
        self.nmi = (self.nmi + 1).min(2);
    }

    /// True if there is any.
    pub fn any(self) -> bool {
        self.init || self.nmi != 0 || self.sipi.is_some()
    }
}

/// Everything that a local APIC remembers.
#[derive(Debug, Clone)]
pub(super) struct State {
    /// The (x2)APIC id that the processor was made with.
    pub x2id: u32,
    /// The id in xAPIC mode.
    pub id: u8,
    pub base: u64,
    pub tpr: u32,
    pub ldr: u32,
    pub dfr: u32,
    pub svr: u32,
    pub isr: Vectors,
    pub tmr: Vectors,
    pub irr: Vectors,
    pub esr: u32,
    /// Errors since ESR was last written.
    pub errors: u32,
    pub icr: u64,
    pub lvt: [u32; 6],
    pub initial: u32,
    pub divide: u32,
    /// Guest-virtual time at which the count-down began.
    pub started: u64,
    /// When the timer fires next.
    pub due: Option<u64>,
    /// A one-shot count-down ended: the count stays 0, in periodic mode too, until it is written.
    pub fired: bool,
    /// IA32_TSC_DEADLINE and when it is due.
    pub deadline: (u64, u64),
    pub signals: LapicSignals,
    /// Levels of LINT0 and LINT1.
    pub pins: [bool; 2],
}

impl State {
    /// As after power-up.
    pub fn new(x2id: u32, bsp: bool) -> Self {
        let flag = if bsp { base::BSP } else { 0 };
        Self::initial(x2id, 0xfee0_0000 | base::ENABLED | flag, [false; 2])
    }

    /// INIT: all but what the processor is and how it is wired starts anew.
    pub fn clear(&mut self) {
        *self = Self::initial(self.x2id, self.base, self.pins);
    }

    fn initial(x2id: u32, base: u64, pins: [bool; 2]) -> Self {
        let mut s = Self {
            x2id,
            id: x2id as u8,
            base,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [lvt::MASKED; 6],
            initial: 0,
            divide: 0,
            started: 0,
            due: None,
            fired: false,
            deadline: (0, 0),
            signals: LapicSignals::default(),
            pins,
        };
        // Virtual wire mode, as firmware leaves it: a PC's timer works before anyone looks at the APIC.
        if base & base::BSP != 0
            && let Some(entry) = s.lvt.get_mut(lvt::LINT0)
        {
            *entry = mode::EXTINT << 8;
        }
        if s.x2apic() {
            s.ldr = s.x2_ldr();
        }
        s
    }

    pub fn x2apic(&self) -> bool {
        self.base & (base::X2APIC | base::ENABLED) == base::X2APIC | base::ENABLED
    }

    pub fn on(&self) -> bool {
        self.base & base::ENABLED != 0
    }

    /// Globally and by software enabled: takes vectored interrupts.
    pub fn takes_vectors(&self) -> bool {
        self.on() && self.svr & SVR_ENABLED != 0
    }

    /// The logical id of x2APIC mode (SDM 11.12.10.2).
    pub fn x2_ldr(&self) -> u32 {
        (self.x2id & 0xffff_fff0) << 12 | 1 << (self.x2id & 15)
    }

    /// The processor priority (SDM 11.8.3.1).
    pub fn ppr(&self) -> u32 {
        let serving = highest(&self.isr).map_or(0, |v| u32::from(v) & 0xf0);
        if self.tpr & 0xf0 >= serving { self.tpr & 0xff } else { serving }
    }

    /// The interrupt that the processor would get.
    pub fn deliverable(&self) -> Option<u8> {
        if !self.on() {
            return None;
        }
        highest(&self.irr).filter(|v| u32::from(*v) & 0xf0 > self.ppr() & 0xf0)
    }

    /// True if LINT0 passes the 8259s' interrupts on.
    pub fn passes_ext_int(&self) -> bool {
        let entry = self.lvt[lvt::LINT0];
        !self.on() || entry & lvt::MASKED == 0 && entry >> 8 & 7 == mode::EXTINT
    }

    /// Nanoseconds of a tick of the timer.
    pub fn tick(&self) -> u64 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        1 << ((code + 1) & 7)
    }

    /// 0 one-shot, 1 periodic, 2 TSC deadline.
    pub fn timer_mode(&self) -> u32 {
        self.lvt[lvt::TIMER] >> 17 & 3
    }

    /// The current count at `now`.
    pub fn current_count(&self, now: u64) -> u32 {
        if self.initial == 0 || self.timer_mode() == 2 {
            return 0;
        }
        let passed = now.saturating_sub(self.started) / self.tick();
        let initial = u64::from(self.initial);
        match self.timer_mode() {
            _ if self.fired => 0,
            1 => (initial - passed % initial) as u32,
            _ => initial.saturating_sub(passed) as u32,
        }
    }

    /// When the timer fires next, after `now`; `None` if it does not.
    pub fn expiry(&self, now: u64) -> Option<u64> {
        match self.timer_mode() {
            2 => (self.deadline.0 != 0).then_some(self.deadline.1),
            kind => {
                if self.initial == 0 || self.fired {
                    return None;
                }
                let period = u64::from(self.initial).saturating_mul(self.tick());
                let first = self.started.saturating_add(period);
                if kind == 1 && first <= now {
                    let rounds = (now - self.started) / period + 1;
                    return Some(self.started.saturating_add(rounds.saturating_mul(period)));
                }
                Some(first)
            }
        }
    }
}
