//! Register accesses, by memory and by MSR.

use super::regs::{SVR_ENABLED, State, VERSION, base, error, lvt, mode, reg};
use super::{After, Lapic, Message, Shorthand};

/// How registers are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Memory,
    Msr,
}

impl State {
    fn read(&self, register: u32, now: u64) -> Option<u32> {
        Some(match register {
            reg::ID if self.x2apic() => self.x2id,
            reg::ID => u32::from(self.id) << 24,
            reg::VERSION => VERSION,
            reg::TPR => self.tpr,
            reg::PPR => self.ppr(),
            reg::LDR => {
                if self.x2apic() {
                    self.x2_ldr()
                } else {
                    self.ldr
                }
            }
            reg::APR | reg::EOI | reg::DFR if self.x2apic() => return None,
            reg::APR | reg::EOI => 0,
            reg::DFR => self.dfr,
            reg::SVR => self.svr,
            reg::ISR..0x18 => Self::words(&self.isr, register, reg::ISR),
            reg::TMR..0x20 => Self::words(&self.tmr, register, reg::TMR),
            reg::IRR..0x28 => Self::words(&self.irr, register, reg::IRR),
            reg::ESR => self.esr,
            reg::ICR => self.icr as u32,
            reg::ICR_HIGH if !self.x2apic() => (self.icr >> 32) as u32,
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                self.lvt.get((register - reg::LVT_TIMER) as usize).copied().unwrap_or(0)
            }
            reg::INITIAL_COUNT => self.initial,
            reg::CURRENT_COUNT => self.current_count(now),
            reg::DIVIDE => self.divide,
            _ => return None,
        })
    }

    /// Writes a register; `None` if that is not allowed.
    fn write(&mut self, register: u32, value: u64, now: u64, by: By) -> Option<After> {
        let low = value as u32;
        let mut after = After::default();
        match register {
            reg::ID if by == By::Memory => self.id = (low >> 24) as u8,
            reg::TPR if by == By::Memory || value >> 8 == 0 => self.tpr = low & 0xff,
            reg::EOI if by == By::Memory || value == 0 => after.eoi = self.end_of_interrupt(),
            reg::LDR if by == By::Memory => self.ldr = low & 0xff00_0000,
            reg::DFR if by == By::Memory => self.dfr = low | 0x0fff_ffff,
            reg::SVR => {
                self.svr = low & 0x3ff;
                if self.svr & SVR_ENABLED == 0 {
                    for entry in &mut self.lvt {
                        *entry |= lvt::MASKED;
                    }
                }
            }
            reg::ESR if by == By::Memory || value == 0 => self.esr = std::mem::take(&mut self.errors),
            reg::ICR if by == By::Msr => {
                self.icr = value & !(1 << 12);
                after.send = self.send();
            }
            reg::ICR => {
                self.icr = self.icr & !0xffff_ffff | u64::from(low & !(1 << 12));
                after.send = self.send();
            }
            reg::ICR_HIGH if by == By::Memory => self.icr = self.icr & 0xffff_ffff | u64::from(low) << 32,
            reg::LVT_TIMER..=reg::LVT_ERROR => self.write_lvt((register - reg::LVT_TIMER) as usize, low, now),
            reg::INITIAL_COUNT => {
                if self.timer_mode() != 2 {
                    self.initial = low;
                    self.started = now;
                    self.fired = false;
                }
            }
            reg::DIVIDE => {
                // The count goes on from where it is at the new speed.
                let left = self.current_count(now);
                self.divide = low & 0xb;
                let passed = u64::from(self.initial.saturating_sub(left)) * self.tick();
                self.started = now.saturating_sub(passed);
            }
            reg::SELF_IPI if by == By::Msr && value >> 8 == 0 => {
                let m = Message {
                    destination: 0,
                    logical: false,
                    mode: mode::FIXED,
                    vector: low as u8,
                    level: false,
                    assert: true,
                    short: false,
                };
                after.send = Some((m, Shorthand::Itself));
            }
            _ => return None,
        }
        Some(after)
    }

    fn write_lvt(&mut self, n: usize, value: u32, now: u64) {
        let Some(writable) = lvt::WRITABLE.get(n) else { return };
        let was_deadline = self.timer_mode() == 2;
        let left = self.current_count(now);
        let mut new = value & writable;
        if self.svr & SVR_ENABLED == 0 {
            new |= lvt::MASKED;
        }
        if let Some(entry) = self.lvt.get_mut(n) {
            *entry = new;
        }
        if n == lvt::TIMER && was_deadline != (self.timer_mode() == 2) {
            // The timer is disarmed by a change between TSC-deadline mode and the others.
            self.initial = 0;
            self.deadline = (0, 0);
        } else if n == lvt::TIMER && self.initial != 0 {
            // The count goes on from where it is; one that has ended stays there.
            self.fired |= left == 0;
            self.started = now.saturating_sub(u64::from(self.initial.saturating_sub(left)) * self.tick());
        }
    }

    /// The interrupt that the interrupt command register describes.
    fn send(&mut self) -> Option<(Message, Shorthand)> {
        let icr = self.icr as u32;
        let vector = icr as u8;
        let mode = icr >> 8 & 7;
        let shorthand = match icr >> 18 & 3 {
            0 => Shorthand::None,
            1 => Shorthand::Itself,
            2 => Shorthand::All,
            _ => Shorthand::Others,
        };
        if matches!(mode, mode::FIXED | mode::LOWEST) && vector < 16 {
            self.note(error::SEND_VECTOR);
            return None;
        }
        let level = icr >> 15 & 1 != 0;
        let assert = icr >> 14 & 1 != 0;
        if mode == mode::INIT && level && !assert {
            return None; // "INIT level de-assert" does nothing on processors of this century
        }
        let x2 = self.x2apic();
        let destination = if x2 { (self.icr >> 32) as u32 } else { (self.icr >> 56) as u32 };
        let message = Message {
            destination,
            logical: icr >> 11 & 1 != 0,
            mode,
            vector,
            level: false,
            assert: true,
            short: !x2,
        };
        Some((message, shorthand))
    }
}

impl Lapic {
    pub(super) fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let now = self.now();
        let mut s = self.state.lock();
        if !s.on() || s.x2apic() {
            data.fill(0xff);
            return;
        }
        let value = match s.read((offset >> 4) as u32, now) {
            Some(value) => value,
            None => {
                s.note(error::REGISTER);
                0
            }
        };
        drop(s);
        crate::x86::read_reg(u64::from(value), offset & 15, data);
    }

    pub(super) fn mmio_write(&self, offset: u64, data: &[u8]) {
        // Registers are 32 bits at multiples of 16; other accesses are undefined (SDM 11.4.1) and do nothing.
        let Some(bytes) = data.first_chunk::<4>().filter(|_| offset & 15 == 0) else { return };
        let value = u64::from(u32::from_le_bytes(*bytes));
        let register = (offset >> 4) as u32;
        let now = self.now();
        let after = self.change(|s| {
            if !s.on() || s.x2apic() {
                return After::default();
            }
            s.write(register, value, now, By::Memory).unwrap_or_else(|| {
                s.note(error::REGISTER);
                After::default()
            })
        });
        self.written(register, &after);
    }

    fn written(&self, register: u32, after: &After) {
        if matches!(register, reg::LVT_TIMER | reg::INITIAL_COUNT | reg::DIVIDE) {
            self.arm();
        }
        self.finish(after);
    }

    /// Reads x2APIC MSR 0x800 + `register`; `None` if it is not there or not in x2APIC mode.
    pub fn read_msr(&self, register: u32) -> Option<u64> {
        let now = self.now();
        let s = self.state.lock();
        if !s.x2apic() {
            return None;
        }
        if register == reg::ICR {
            return Some(s.icr);
        }
        s.read(register, now).map(u64::from)
    }

    /// Writes x2APIC MSR 0x800 + `register`; false if that is not allowed.
    pub fn write_msr(&self, register: u32, value: u64) -> bool {
        let now = self.now();
        let wide = register == reg::ICR;
        if !wide && value >> 32 != 0 {
            return false;
        }
        let after = self.change(|s| if s.x2apic() { s.write(register, value, now, By::Msr) } else { None });
        match after {
            Some(after) => {
                self.written(register, &after);
                true
            }
            None => false,
        }
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.state.lock().base
    }

    /// Writes IA32_APIC_BASE; false if the transition is not allowed or a reserved bit is set. `bits` is the width of
    /// physical addresses.
    pub fn set_base(&self, value: u64, bits: u64) -> bool {
        let flags = base::BSP | base::X2APIC | base::ENABLED;
        let address = base::ADDRESS & ((1 << bits.clamp(32, 52)) - 1);
        if value & !flags & !address != 0 {
            return false;
        }
        let allowed = self.change(|s| {
            let (was_on, was_x2) = (s.on(), s.x2apic());
            let (on, x2) = (value & base::ENABLED != 0, value & base::X2APIC != 0);
            let allowed = match (on, x2) {
                (false, true) => false,
                (true, false) => !was_x2,
                (true, true) => was_on,
                (false, false) => true,
            };
            if !allowed {
                return false;
            }
            s.base = value;
            if was_on && !on {
                s.clear();
                s.svr = 0xff;
            }
            if s.x2apic() && !was_x2 {
                s.icr &= 0xffff_ffff;
                s.ldr = s.x2_ldr();
            }
            true
        });
        if allowed && let Some(bus) = self.bus.upgrade() {
            bus.moved(value & base::ADDRESS);
        }
        allowed
    }
}
