//! The registers as the 1 KiB page of SDM table 11-1, in which states carry them.

use super::Lapic;
use super::regs::{State, VERSION, Vectors, reg};

const PAGE: usize = 0x400;

/// A local APIC's state.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LapicState {
    /// IA32_APIC_BASE.
    pub base: u64,
    /// The page of registers.
    pub registers: Vec<u8>,
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
}

fn put(page: &mut [u8], register: u32, value: u32) {
    let at = register as usize * 16;
    if let Some(place) = page.get_mut(at..at + 4) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

fn take(page: &[u8], register: u32) -> u32 {
    let at = register as usize * 16;
    page.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn put_vectors(page: &mut [u8], first: u32, v: &Vectors) {
    for (n, word) in (first..).zip(v) {
        put(page, n, *word);
    }
}

fn take_vectors(page: &[u8], first: u32) -> Vectors {
    let mut v = [0; 8];
    for (n, word) in (first..).zip(&mut v) {
        *word = take(page, n);
    }
    v
}

impl Lapic {
    /// The state.
    pub fn save(&self) -> LapicState {
        let now = self.now();
        let s = self.state.lock();
        let mut page = vec![0; PAGE];
        let id = if s.x2apic() { s.x2id } else { u32::from(s.id) << 24 };
        let ldr = if s.x2apic() { s.x2_ldr() } else { s.ldr };
        let plain = [
            (reg::ID, id),
            (reg::VERSION, VERSION),
            (reg::TPR, s.tpr),
            (reg::PPR, s.ppr()),
            (reg::LDR, ldr),
            (reg::DFR, s.dfr),
            (reg::SVR, s.svr),
            (reg::ESR, s.esr),
            (reg::ICR, s.icr as u32),
            (reg::ICR_HIGH, (s.icr >> 32) as u32),
            (reg::INITIAL_COUNT, s.initial),
            (reg::CURRENT_COUNT, s.current_count(now)),
            (reg::DIVIDE, s.divide),
        ];
        for (register, value) in plain {
            put(&mut page, register, value);
        }
        for (register, value) in (reg::LVT_TIMER..).zip(s.lvt) {
            put(&mut page, register, value);
        }
        put_vectors(&mut page, reg::ISR, &s.isr);
        put_vectors(&mut page, reg::TMR, &s.tmr);
        put_vectors(&mut page, reg::IRR, &s.irr);
        let tsc_deadline = if s.timer_mode() == 2 { s.deadline.0 } else { 0 };
        LapicState { base: s.base, registers: page, tsc_deadline }
    }

    /// Replaces the state; IA32_TSC_DEADLINE is due at `deadline_at`.
    ///
    /// # Errors
    /// A text that says what does not fit.
    pub fn load(&self, state: &LapicState, deadline_at: u64) -> Result<(), String> {
        let page = &state.registers;
        if page.len() < PAGE {
            return Err(format!("a local APIC of {} bytes", page.len()));
        }
        let now = self.now();
        self.change(|s| {
            *s = State {
                base: state.base,
                id: (take(page, reg::ID) >> 24) as u8,
                tpr: take(page, reg::TPR) & 0xff,
                ldr: take(page, reg::LDR),
                dfr: take(page, reg::DFR),
                svr: take(page, reg::SVR) & 0x3ff,
                isr: take_vectors(page, reg::ISR),
                tmr: take_vectors(page, reg::TMR),
                irr: take_vectors(page, reg::IRR),
                esr: take(page, reg::ESR),
                icr: u64::from(take(page, reg::ICR)) | u64::from(take(page, reg::ICR_HIGH)) << 32,
                initial: take(page, reg::INITIAL_COUNT),
                divide: take(page, reg::DIVIDE) & 0xb,
                deadline: (state.tsc_deadline, deadline_at),
                pins: s.pins,
                ..State::new(s.x2id, self.index == 0)
            };
            if s.x2apic() {
                s.id = s.x2id as u8;
            }
            for (register, entry) in (reg::LVT_TIMER..).zip(&mut s.lvt) {
                *entry = take(page, register);
            }
            let left = take(page, reg::CURRENT_COUNT);
            if s.timer_mode() == 0 && left == 0 {
                s.fired = true;
            }
            s.started = now.saturating_sub(u64::from(s.initial.saturating_sub(left)) * s.tick());
        });
        if let Some(bus) = self.bus.upgrade() {
            bus.moved(self.page());
        }
        self.arm();
        Ok(())
    }
}
