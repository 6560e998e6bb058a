//! x87 environments and states in memory: FLDENV, FNSTENV, FRSTOR, FNSAVE (SDM volume 1, 8.1.10).

use holdfast_tcg_runtime::{AccessKind, Cpu, Fault};

use super::{probe, touch};

use crate::state::{X86, seg};

/// Words of an environment.
const WORDS: usize = 7;

fn word_size(short: bool) -> u8 {
    if short { 2 } else { 4 }
}

/// Bytes of an environment.
fn env_len(short: bool) -> u64 {
    WORDS as u64 * u64::from(word_size(short))
}

/// The environment's words in the format of the mode.
fn words(s: &X86, short: bool) -> [u64; WORDS] {
    let x = &s.x87;
    let (control, status, tags) = (x.control, u64::from(x.status_word()), u64::from(x.tag_word()));
    if s.protected() {
        // Selectors of the pointers are not kept: they are zero, as CPUID says.
        let high = if short { 0 } else { 0xffff_0000 };
        let opcode = if short { 0 } else { x.opcode << 16 };
        let words = [control | high, status | high, tags | high, x.ip, opcode, x.dp, high];
        return words;
    }
    let linear = |offset: u64, s: u64| s.wrapping_add(offset);
    let (ip, dp) = (linear(x.ip, s.seg[seg::CS].base), linear(x.dp, s.seg[seg::DS].base));
    if short {
        let upper = |p: u64| p >> 4 & 0xf000;
        [control, status, tags, ip, upper(ip) | x.opcode, dp, upper(dp)]
    } else {
        let upper = |p: u64| (p >> 16 & 0xffff) << 12;
        let high = 0xffff_0000;
        [
            control | high,
            status | high,
            tags | high,
            ip & 0xffff | high,
            upper(ip) | x.opcode,
            dp & 0xffff | high,
            upper(dp),
        ]
    }
}

/// FNSTENV without the masking that follows.
pub(super) fn store(cpu: &mut Cpu<'_>, va: u64, short: bool) -> Result<(), Fault> {
    probe(cpu, va, env_len(short))?;
    let s = cpu.state::<X86>();
    let (idx, size) = (s.data_idx(), word_size(short));
    let words = words(s, short);
    for (n, word) in words.into_iter().enumerate() {
        cpu.store(va.wrapping_add(n as u64 * u64::from(size)), size, idx, word)?;
    }
    Ok(())
}

/// FLDENV
pub(super) fn load(cpu: &mut Cpu<'_>, va: u64, short: bool) -> Result<(), Fault> {
    readable(cpu, va, env_len(short), short)?;
    let words = read_words(cpu, va, short)?;
    set_words(cpu.state(), &words, short);
    Ok(())
}

/// Processors look at the first word and the last byte of what they are about to load.
fn readable(cpu: &mut Cpu<'_>, va: u64, len: u64, short: bool) -> Result<(), Fault> {
    let idx = cpu.state::<X86>().data_idx();
    cpu.load(va, word_size(short), idx)?;
    touch(cpu, va.wrapping_add(len - 1), AccessKind::Read)
}

fn read_words(cpu: &mut Cpu<'_>, va: u64, short: bool) -> Result<[u64; WORDS], Fault> {
    let (idx, size) = (cpu.state::<X86>().data_idx(), word_size(short));
    let mut words = [0; WORDS];
    for (n, word) in words.iter_mut().enumerate() {
        *word = cpu.load(va.wrapping_add(n as u64 * u64::from(size)), size, idx)?;
    }
    Ok(words)
}

fn set_words(s: &mut X86, words: &[u64; WORDS], short: bool) {
    let protected = s.protected();
    let bases = (s.seg[seg::CS].base, s.seg[seg::DS].base);
    let x = &mut s.x87;
    x.control = words[0] & 0x1f3f | 0x40;
    x.set_status_word(words[1] as u16);
    x.set_tag_word(words[2] as u16);
    if protected {
        (x.ip, x.dp) = (words[3], words[5]);
        if !short {
            x.opcode = words[4] >> 16 & 0x7ff;
        }
    } else {
        let shift = if short { 4 } else { 0 };
        let join = |low: u64, high: u64| {
            if short {
                low & 0xffff | (high & 0xf000) << shift
            } else {
                low & 0xffff | (high & 0x0fff_f000) << 4
            }
        };
        x.ip = join(words[3], words[4]).wrapping_sub(bases.0);
        x.dp = join(words[5], words[6]).wrapping_sub(bases.1);
        x.opcode = words[4] & 0x7ff;
    }
    x.summarise();
}

/// FNSAVE
pub(super) fn save(cpu: &mut Cpu<'_>, va: u64, short: bool) -> Result<(), Fault> {
    let at = env_len(short);
    probe(cpu, va, at + 80)?;
    store(cpu, va, short)?;
    let idx = cpu.state::<X86>().data_idx();
    for n in 0..8 {
        let r = *cpu.state::<X86>().x87.stack_register(n);
        let to = va.wrapping_add(at + 10 * n as u64);
        cpu.store(to, 8, idx, r.significand)?;
        cpu.store(to.wrapping_add(8), 2, idx, r.sign_exponent)?;
    }
    cpu.state::<X86>().x87.initialise();
    Ok(())
}

/// FRSTOR
pub(super) fn restore(cpu: &mut Cpu<'_>, va: u64, short: bool) -> Result<(), Fault> {
    let idx = cpu.state::<X86>().data_idx();
    let at = env_len(short);
    readable(cpu, va, at + 80, short)?;
    let words = read_words(cpu, va, short)?;
    let mut registers = [(0, 0); 8];
    for (n, r) in registers.iter_mut().enumerate() {
        let from = va.wrapping_add(at + 10 * n as u64);
        *r = (cpu.load(from, 8, idx)?, cpu.load(from.wrapping_add(8), 2, idx)?);
    }
    set_words(cpu.state(), &words, short);
    let x = &mut cpu.state::<X86>().x87;
    for (n, (significand, sign_exponent)) in registers.into_iter().enumerate() {
        let r = x.stack_register(n);
        (r.significand, r.sign_exponent) = (significand, sign_exponent);
    }
    Ok(())
}
