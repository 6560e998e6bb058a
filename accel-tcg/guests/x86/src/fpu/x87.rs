//! x87 instructions (SDM volume 1, chapter 8).

use holdfast_tcg_ir::env::exit;
use holdfast_tcg_runtime::{Cpu, HelperResult, Leave};

use super::probe;
use super::x87_env;
use super::x87_native::{Image, execute};
use crate::apic;
use crate::state::{X86, X87};
use crate::system::fault;
use crate::system::regs::{cr0, vector};

/// Exception summary: an unmasked exception is pending.
pub(super) const ES: u64 = 1 << 7;
/// Busy: the same.
pub(super) const BUSY: u64 = 1 << 15;

impl X87 {
    /// ES and B follow from the flags and the masks.
    pub(super) fn summarise(&mut self) {
        let pending = self.status & !self.control & 0x3f != 0;
        self.status = self.status & !(ES | BUSY) & 0xffff | if pending { ES | BUSY } else { 0 };
    }

    /// The status word as it is stored.
    pub(super) fn status_word(&self) -> u16 {
        (self.status & !0x3800 | (self.top & 7) << 11) as u16
    }

    /// Takes a status word.
    pub(super) fn set_status_word(&mut self, word: u16) {
        self.status = u64::from(word) & !0x3800;
        self.top = u64::from(word) >> 11 & 7;
    }

    /// As after FNINIT.
    pub(super) fn initialise(&mut self) {
        (self.control, self.status, self.top, self.valid) = (0x37f, 0, 0, 0);
        (self.ip, self.dp, self.opcode) = (0, 0, 0);
    }

    /// The tag word with two bits for each register.
    pub(super) fn tag_word(&self) -> u16 {
        let mut tags = 0;
        for n in 0..8 {
            let r = &self.r[n];
            let exponent = r.sign_exponent & 0x7fff;
            let tag = if self.valid >> n & 1 == 0 {
                3
            } else if exponent == 0 && r.significand == 0 {
                1
            } else if exponent == 0 || exponent == 0x7fff || r.significand >> 63 == 0 {
                2
            } else {
                0
            };
            tags |= tag << (2 * n);
        }
        tags
    }

    /// Takes a tag word: registers are empty or not.
    pub(super) fn set_tag_word(&mut self, tags: u16) {
        self.valid = (0..8).filter(|n| tags >> (2 * n) & 3 != 3).fold(0, |v, n| v | 1 << n);
    }

    /// ST(n).
    pub(super) fn stack_register(&mut self, n: usize) -> &mut crate::state::X87Register {
        let top = self.top as usize;
        &mut self.r[(top + n) & 7]
    }

    fn image(&mut self) -> Image {
        let mut image = Image {
            env: [
                self.control as u32 & 0xffff | 0xffff_0000,
                u32::from(self.status_word()) | 0xffff_0000,
                u32::from(self.tag_word()) | 0xffff_0000,
                0,
                0,
                0,
                0,
            ],
            registers: [0; 80],
            pad: [0; 4],
            operand: [0; 16],
        };
        for (n, to) in image.registers.chunks_exact_mut(10).enumerate() {
            let r = *self.stack_register(n);
            let (low, high) = to.split_at_mut(8);
            low.copy_from_slice(&r.significand.to_le_bytes());
            high.copy_from_slice(&(r.sign_exponent as u16).to_le_bytes());
        }
        image
    }

    fn take_image(&mut self, image: &Image) {
        self.set_status_word(image.env[1] as u16);
        self.set_tag_word(image.env[2] as u16);
        for (n, from) in image.registers.chunks_exact(10).enumerate() {
            let (low, high) = from.split_at(8);
            let r = self.stack_register(n);
            r.significand = low.try_into().map_or(0, u64::from_le_bytes);
            r.sign_exponent = high.try_into().map_or(0, |b| u64::from(u16::from_le_bytes(b)));
        }
    }
}

/// The exception that is pending, if it is to be raised now. Without CR0.NE it is reported to the chipset: unless that
/// asserts IGNNE#, the processor stands before the instruction until it takes an interrupt (SDM volume 1, 8.7.2).
fn pending(cpu: &mut Cpu<'_>) -> Result<(), Leave> {
    let s = cpu.state::<X86>();
    if s.x87.status & ES == 0 {
        return Ok(());
    }
    if s.cr0 & cr0::NE != 0 {
        return Err(fault::plain(vector::MF).into());
    }
    if apic::of(cpu).is_none_or(|apic| apic.set_ferr(true)) {
        return Ok(());
    }
    // Nothing has been done: there is nothing to trap behind.
    cpu.state::<X86>().debug_pending = 0;
    cpu.set_halted(true);
    Err(Leave::Exit(exit::HALT))
}

/// Takes back what [`pending`] reported, if no exception is pending any more. `was`: whether one was.
pub(super) fn settle(cpu: &mut Cpu<'_>, was: bool) {
    let s = cpu.state::<X86>();
    if was
        && s.x87.status & ES == 0
        && s.cr0 & cr0::NE == 0
        && let Some(apic) = apic::of(cpu)
    {
        apic.set_ferr(false);
    }
}

/// Whether an unmasked exception is pending.
pub(super) fn summary(s: &X86) -> bool {
    s.x87.status & ES != 0
}

/// Bytes of the memory operand of `D8 + first /reg`, and whether it is stored.
fn operand(first: u8, reg: u8) -> (u8, bool) {
    let store = match first & 7 {
        1 => matches!(reg, 2 | 3),
        3 => matches!(reg, 1..=3 | 7),
        5 => matches!(reg, 1..=3),
        7 => matches!(reg, 1..=3 | 6 | 7),
        _ => false,
    };
    let size = match (first & 7, reg) {
        (3, 5 | 7) | (7, 4 | 6) => 10,
        (4 | 5, _) | (7, 5 | 7) => 8,
        (6 | 7, _) => 2,
        _ => 4,
    };
    (size, store)
}

/// An x87 instruction that computes or moves: (opcode bytes, linear address, offset, status flags).
pub(super) fn run(cpu: &mut Cpu<'_>, [what, va, offset, flags, _]: [u64; 5]) -> HelperResult {
    let (first, second) = ((what >> 8) as u8, what as u8);
    let memory = second < 0xc0;
    let (size, store) = operand(first, second >> 3 & 7);
    let pc = cpu.pc();
    pending(cpu)?;
    let s = cpu.state::<X86>();
    // What was pending without CR0.NE must not trap here.
    let (idx, ip) = (s.data_idx(), s.ip_of(pc));
    let old = s.x87.status & 0x3f;
    let mut image = s.x87.image();
    if s.x87.status & ES != 0 {
        image.env[1] &= !(0x3f | (ES | BUSY) as u32);
    }
    let masks = s.x87.control;
    if memory {
        super::check_alignment(s, va, u64::from(size).min(8))?;
    }
    if memory && store {
        probe(cpu, va, u64::from(size))?;
    } else if memory {
        for (n, to) in image.operand.chunks_exact_mut(8).enumerate() {
            let left = usize::from(size).saturating_sub(8 * n).min(8) as u8;
            if left > 0 {
                let value = cpu.load(va.wrapping_add(8 * n as u64), left, idx)?;
                to.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    let flags = execute(&mut image, (first, second), flags);
    // An unmasked exception other than loss of precision keeps a result from being stored.
    let new = u64::from(image.env[1]) & !masks & 0x1f;
    if memory && store && new & !old == 0 {
        for n in 0..u64::from(size).div_ceil(8) {
            let left = (u64::from(size) - 8 * n).min(8) as u8;
            let at = 8 * n as usize;
            let bytes = image.operand.get(at..at + 8).and_then(|b| b.try_into().ok()).unwrap_or([0; 8]);
            cpu.store(va.wrapping_add(8 * n), left, idx, u64::from_le_bytes(bytes))?;
        }
    }
    let x = &mut cpu.state::<X86>().x87;
    x.take_image(&image);
    x.status |= old;
    x.summarise();
    (x.ip, x.opcode) = (ip, u64::from(first & 7) << 8 | u64::from(second));
    if memory {
        x.dp = offset;
    }
    Ok(flags)
}

/// Control instructions, by what [`crate::translate`] calls them.
pub(crate) mod what {
    pub const WAIT: u64 = 0;
    pub const INIT: u64 = 1;
    pub const CLEAR: u64 = 2;
    pub const LOAD_CONTROL: u64 = 3;
    pub const STORE_CONTROL: u64 = 4;
    pub const STORE_STATUS: u64 = 5;
    /// To AX.
    pub const STATUS: u64 = 6;
    pub const LOAD_ENV: u64 = 7;
    pub const STORE_ENV: u64 = 8;
    pub const RESTORE: u64 = 9;
    pub const SAVE: u64 = 10;
    pub const EMMS: u64 = 11;
    pub const NOTHING: u64 = 12;
    /// Flag: the 16-bit format of environments.
    pub const SHORT: u64 = 1 << 8;
}

/// A control instruction: (what, linear address).
pub(super) fn control(cpu: &mut Cpu<'_>, args: [u64; 5]) -> HelperResult {
    let was = summary(cpu.state());
    let result = control_insn(cpu, args)?;
    settle(cpu, was);
    Ok(result)
}

fn control_insn(cpu: &mut Cpu<'_>, [what, va, ..]: [u64; 5]) -> HelperResult {
    let s = cpu.state::<X86>();
    let idx = s.data_idx();
    let short = what & what::SHORT != 0;
    let kind = what & 0xff;
    if matches!(kind, what::WAIT | what::LOAD_CONTROL | what::LOAD_ENV | what::RESTORE | what::EMMS) {
        pending(cpu)?;
    }
    match kind {
        what::LOAD_CONTROL | what::STORE_CONTROL | what::STORE_STATUS => {
            super::check_alignment(cpu.state(), va, 2)?;
        }
        what::LOAD_ENV | what::STORE_ENV | what::RESTORE | what::SAVE => {
            super::check_alignment(cpu.state(), va, if short { 2 } else { 4 })?;
        }
        _ => {}
    }
    match kind {
        what::INIT => cpu.state::<X86>().x87.initialise(),
        what::CLEAR => cpu.state::<X86>().x87.status &= 0x7f00,
        what::LOAD_CONTROL => {
            let word = cpu.load(va, 2, idx)?;
            let x = &mut cpu.state::<X86>().x87;
            // Bit 6 is always set; the rest of the reserved bits is zero.
            x.control = word & 0x1f3f | 0x40;
            x.summarise();
        }
        what::STORE_CONTROL => {
            let word = cpu.state::<X86>().x87.control;
            cpu.store(va, 2, idx, word)?;
        }
        what::STORE_STATUS => {
            let word = cpu.state::<X86>().x87.status_word();
            cpu.store(va, 2, idx, u64::from(word))?;
        }
        what::STATUS => return Ok(u64::from(cpu.state::<X86>().x87.status_word())),
        what::LOAD_ENV => x87_env::load(cpu, va, short)?,
        what::STORE_ENV => {
            x87_env::store(cpu, va, short)?;
            let x = &mut cpu.state::<X86>().x87;
            x.control |= 0x3f;
            x.summarise();
        }
        what::RESTORE => x87_env::restore(cpu, va, short)?,
        what::SAVE => x87_env::save(cpu, va, short)?,
        what::EMMS => {
            let x = &mut cpu.state::<X86>().x87;
            (x.valid, x.top) = (0, 0);
        }
        _ => {}
    }
    Ok(0)
}
