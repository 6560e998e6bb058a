//! FXSAVE, FXRSTOR, XSAVE and its kin (SDM volume 1, chapters 10.5 and 13).

use holdfast_tcg_runtime::{AccessKind, Cpu, Fault, HelperResult};

use super::{check_alignment, probe, simd, touch, x87};
use crate::state::{X86, X87};
use crate::system::fault::{gp, non_canonical, ud};
use crate::system::regs::cr4;
use crate::system::{control, cpuid};

/// The legacy region, up to the XMM registers' end.
const LEGACY: usize = 416;
/// Where the header is, and the extended region.
const HEADER: u64 = 512;
const EXTENDED: u64 = 576;
/// MXCSR_MASK.
const MXCSR_MASK: u32 = 0xffff;
/// MXCSR after reset.
const MXCSR_INIT: u32 = 0x1f80;

/// Components.
const X87_BIT: u64 = 1;
const SSE_BIT: u64 = 2;
const AVX_BIT: u64 = 4;
const BNDREGS_BIT: u64 = 1 << 3;
const BNDCSR_BIT: u64 = 1 << 4;
const OPMASK_BIT: u64 = 1 << 5;
const ZMM_HIGH_BIT: u64 = 1 << 6;
const ZMM_UPPER_BIT: u64 = 1 << 7;
const PKRU_BIT: u64 = 1 << 9;
/// AVX-512's components.
pub(crate) const AVX512_ONLY: u64 = OPMASK_BIT | ZMM_HIGH_BIT | ZMM_UPPER_BIT;
/// All that XCR0 has to have for its instructions.
pub(crate) const AVX512: u64 = SSE_BIT | AVX_BIT | AVX512_ONLY;
/// Those of the extended region: bit, offset in the standard format, bytes.
const COMPONENTS: [(u64, u64, u64); 7] = [
    (AVX_BIT, 576, 256),
    (BNDREGS_BIT, 960, 64),
    (BNDCSR_BIT, 1024, 64),
    (OPMASK_BIT, 1088, 64),
    (ZMM_HIGH_BIT, 1152, 512),
    (ZMM_UPPER_BIT, 1664, 1024),
    (PKRU_BIT, 2688, 8),
];
/// XCOMP_BV: the format is compacted.
const COMPACT: u64 = 1 << 63;

/// What is done, by what [`crate::translate`] calls it.
pub(crate) mod kind {
    pub const FXSAVE: u64 = 0;
    pub const FXRSTOR: u64 = 1;
    pub const XSAVE: u64 = 2;
    pub const XSAVEOPT: u64 = 3;
    pub const XSAVEC: u64 = 4;
    pub const XSAVES: u64 = 5;
    pub const XRSTOR: u64 = 6;
    pub const XRSTORS: u64 = 7;
    /// Flag: 64-bit pointers (REX.W).
    pub const WIDE: u64 = 1 << 8;
    /// Flag: 64-bit mode.
    pub const LONG: u64 = 1 << 9;
}

/// One of these instructions: (kind, linear address).
pub(super) fn run(cpu: &mut Cpu<'_>, [what, va, ..]: [u64; 5]) -> HelperResult {
    let wide = what & kind::WIDE != 0;
    let registers = if what & kind::LONG != 0 { 16 } else { 8 };
    let form = Form { wide, registers };
    let what = what & 0xff;
    if what > kind::FXRSTOR && cpu.state::<X86>().cr4 & cr4::OSXSAVE == 0 {
        return Err(ud().into());
    }
    let form_bit = match what {
        kind::XSAVEOPT => Some(0),
        kind::XSAVEC => Some(1),
        kind::XSAVES | kind::XRSTORS => Some(3),
        _ => None,
    };
    if form_bit.is_some_and(|bit| !cpuid::has(cpu.state(), (0xd, 1, 0, bit))) {
        return Err(ud().into());
    }
    let fixed = what <= kind::FXRSTOR;
    check_address(cpu.state(), va, if fixed { (16, 512) } else { (64, EXTENDED) })?;
    if fixed {
        // Processors look at the last byte first.
        let access = if what == kind::FXSAVE { AccessKind::Write } else { AccessKind::Read };
        touch(cpu, va.wrapping_add(511), access)?;
        touch(cpu, va, access)?;
    }
    let was = x87::summary(cpu.state());
    match what {
        kind::FXSAVE => fxsave(cpu, va, form)?,
        kind::FXRSTOR => fxrstor(cpu, va, form)?,
        kind::XRSTOR | kind::XRSTORS => xrstor(cpu, va, form, what == kind::XRSTORS)?,
        _ => xsave(cpu, va, form, what)?,
    }
    x87::settle(cpu, was);
    Ok(0)
}

/// That all of an area is canonical comes before its alignment, and that before page faults. Where alignment is checked,
/// #AC is raised in place of #GP, as AMD's processors do (Intel's may).
fn check_address(s: &X86, va: u64, (align, len): (u64, u64)) -> Result<(), Fault> {
    if s.code64() {
        for at in [va, va.wrapping_add(len - 1)] {
            if !s.canonical(at) {
                return Err(non_canonical(at));
            }
        }
    }
    check_alignment(s, va, align)?;
    if va.is_multiple_of(align) { Ok(()) } else { Err(gp(0)) }
}

/// How the legacy region is laid out.
#[derive(Clone, Copy)]
struct Form {
    wide: bool,
    registers: usize,
}

fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = area.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn word(area: &[u8], at: usize) -> u64 {
    area.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn write(cpu: &mut Cpu<'_>, va: u64, data: &[u8]) -> Result<(), Fault> {
    let idx = cpu.state::<X86>().data_idx();
    for (n, c) in data.chunks_exact(8).enumerate() {
        cpu.store(va.wrapping_add(8 * n as u64), 8, idx, word(c, 0))?;
    }
    Ok(())
}

fn read(cpu: &mut Cpu<'_>, va: u64, data: &mut [u8]) -> Result<(), Fault> {
    let idx = cpu.state::<X86>().data_idx();
    for (n, c) in data.chunks_exact_mut(8).enumerate() {
        let v = cpu.load(va.wrapping_add(8 * n as u64), 8, idx)?;
        c.copy_from_slice(&v.to_le_bytes());
    }
    Ok(())
}

// ---- the legacy region ----

fn x87_out(x: &mut X87, area: &mut [u8], wide: bool) {
    put(area, 0, &(x.control as u16).to_le_bytes());
    put(area, 2, &x.status_word().to_le_bytes());
    put(area, 4, &[x.valid as u8, 0]);
    put(area, 6, &(x.opcode as u16).to_le_bytes());
    let (ip, dp) = if wide { (x.ip, x.dp) } else { (x.ip & 0xffff_ffff, x.dp & 0xffff_ffff) };
    put(area, 8, &ip.to_le_bytes());
    put(area, 16, &dp.to_le_bytes());
    for n in 0..8 {
        let r = *x.stack_register(n);
        put(area, 32 + 16 * n, &r.significand.to_le_bytes());
        put(area, 40 + 16 * n, &r.sign_exponent.to_le_bytes());
    }
}

fn x87_in(x: &mut X87, area: &[u8], wide: bool) {
    x.control = word(area, 0) & 0x1f3f | 0x40;
    x.set_status_word((word(area, 0) >> 16) as u16);
    x.valid = word(area, 0) >> 32 & 0xff;
    x.opcode = word(area, 0) >> 48 & 0x7ff;
    let mask = if wide { u64::MAX } else { 0xffff_ffff };
    (x.ip, x.dp) = (word(area, 8) & mask, word(area, 16) & mask);
    for n in 0..8 {
        let r = x.stack_register(n);
        r.significand = word(area, 32 + 16 * n);
        r.sign_exponent = word(area, 40 + 16 * n) & 0xffff;
    }
    x.summarise();
}

fn xmm_out(s: &X86, area: &mut [u8], registers: usize) {
    for (n, r) in s.ymm.iter().take(registers).enumerate() {
        put(area, 160 + 16 * n, &r[0].to_le_bytes());
        put(area, 168 + 16 * n, &r[1].to_le_bytes());
    }
}

fn xmm_in(s: &mut X86, area: &[u8], registers: usize) {
    for (n, r) in s.ymm.iter_mut().take(registers).enumerate() {
        (r[0], r[1]) = (word(area, 160 + 16 * n), word(area, 168 + 16 * n));
    }
}

fn mxcsr_out(cpu: &mut Cpu<'_>, area: &mut [u8]) {
    let mxcsr = simd::mxcsr(cpu);
    put(area, 24, &mxcsr.to_le_bytes());
    put(area, 28, &MXCSR_MASK.to_le_bytes());
}

fn fxsave(cpu: &mut Cpu<'_>, va: u64, form: Form) -> Result<(), Fault> {
    let mut area = [0; LEGACY];
    mxcsr_out(cpu, &mut area);
    let s = cpu.state::<X86>();
    x87_out(&mut s.x87, &mut area, form.wide);
    xmm_out(s, &mut area, form.registers);
    let len = 160 + 16 * form.registers;
    write(cpu, va, area.get(..len).unwrap_or(&[]))
}

fn set_mxcsr(cpu: &mut Cpu<'_>, value: u32) -> Result<(), Fault> {
    if value & !MXCSR_MASK != 0 {
        return Err(gp(0));
    }
    simd::set_mxcsr(cpu, value);
    Ok(())
}

fn fxrstor(cpu: &mut Cpu<'_>, va: u64, form: Form) -> Result<(), Fault> {
    let mut area = [0; LEGACY];
    read(cpu, va, &mut area)?;
    set_mxcsr(cpu, word(&area, 24) as u32)?;
    let s = cpu.state::<X86>();
    x87_in(&mut s.x87, &area, form.wide);
    xmm_in(s, &area, form.registers);
    cpu.mode_changed();
    Ok(())
}

// ---- XSAVE ----

/// Components that are not in their initial configuration.
pub(crate) fn in_use(cpu: &mut Cpu<'_>, long: bool) -> u64 {
    let s = cpu.state::<X86>();
    let registers = if long { 16 } else { 8 };
    let x = &s.x87;
    let initial = x.control == 0x37f
        && x.status == 0
        && x.top == 0
        && x.valid == 0
        && x.ip == 0
        && x.dp == 0
        && x.opcode == 0
        && x.r.iter().all(|r| r.significand == 0 && r.sign_exponent == 0);
    let regs = || s.ymm.iter().take(registers);
    let mut bits = if initial { 0 } else { X87_BIT };
    if regs().any(|r| r[0] | r[1] != 0) {
        bits |= SSE_BIT;
    }
    if regs().any(|r| r[2] | r[3] != 0) {
        bits |= AVX_BIT;
    }
    if s.opmask != [0; 8] {
        bits |= OPMASK_BIT;
    }
    if s.zmm_high.iter().take(registers).any(|r| *r != [0; 4]) {
        bits |= ZMM_HIGH_BIT;
    }
    // Outside 64-bit mode there are no registers 16 to 31, but what they hold is not lost.
    if long && s.zmm_upper != [[0; 8]; 16] {
        bits |= ZMM_UPPER_BIT;
    }
    if s.bnd != [[0; 2]; 4] {
        bits |= BNDREGS_BIT;
    }
    if s.bnd_user != [0; 2] {
        bits |= BNDCSR_BIT;
    }
    if s.pkru != 0 {
        bits |= PKRU_BIT;
    }
    bits
}

/// EDX:EAX restricted to what is enabled.
fn requested(s: &X86, supervisor: bool) -> u64 {
    let mask = s.gpr[0] & 0xffff_ffff | s.gpr[2] << 32;
    mask & (s.xcr0 | if supervisor { s.xss } else { 0 })
}

/// Where extended components are: (bit, offset, bytes). `layout` is XCOMP_BV for the compacted format.
fn places(layout: Option<u64>) -> [(u64, u64, u64); COMPONENTS.len()] {
    let mut list = COMPONENTS;
    if let Some(bits) = layout {
        let mut at = EXTENDED;
        for (bit, offset, len) in &mut list {
            *offset = at;
            if bits & *bit != 0 {
                at += *len;
            }
        }
    }
    list
}

fn component_out(s: &X86, bit: u64, registers: usize) -> Vec<u8> {
    let bytes = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let first = |all: &[[u64; 4]; 16]| bytes(all.get(..registers).unwrap_or(all).as_flattened());
    match bit {
        AVX_BIT => {
            s.ymm.iter().take(registers).flat_map(|r| [r[2], r[3]]).flat_map(u64::to_le_bytes).collect()
        }
        BNDREGS_BIT => bytes(s.bnd.as_flattened()),
        BNDCSR_BIT => bytes(&s.bnd_user),
        OPMASK_BIT => bytes(&s.opmask),
        ZMM_HIGH_BIT => first(&s.zmm_high),
        ZMM_UPPER_BIT if registers == 16 => bytes(s.zmm_upper.as_flattened()),
        ZMM_UPPER_BIT => Vec::new(),
        _ => bytes(&[s.pkru]),
    }
}

fn xsave(cpu: &mut Cpu<'_>, va: u64, form: Form, what: u64) -> Result<(), Fault> {
    let compact = matches!(what, kind::XSAVEC | kind::XSAVES);
    let rfbm = requested(cpu.state(), what == kind::XSAVES);
    let mut used = in_use(cpu, form.registers == 16);
    let mxcsr_used = simd::mxcsr(cpu) != MXCSR_INIT;
    if compact && mxcsr_used {
        used |= SSE_BIT;
    }
    // Without an optimisation all that is asked for is written, in its initial configuration or not.
    let written = if what == kind::XSAVE { rfbm } else { rfbm & used };
    let layout = compact.then_some(rfbm);
    let places = places(layout);
    let end = places.iter().filter(|p| rfbm & p.0 != 0).map(|p| p.1 + p.2).max().unwrap_or(EXTENDED);
    probe(cpu, va, end)?;
    let mut area = [0; LEGACY];
    let s = cpu.state::<X86>();
    let registers = form.registers;
    if written & X87_BIT != 0 {
        x87_out(&mut s.x87, &mut area, form.wide);
        write(cpu, va, area.get(..24).unwrap_or(&[]))?;
        write(cpu, va.wrapping_add(32), area.get(32..160).unwrap_or(&[]))?;
    }
    let with_mxcsr = if compact { written & SSE_BIT != 0 } else { rfbm & (SSE_BIT | AVX_BIT) != 0 };
    if with_mxcsr {
        mxcsr_out(cpu, &mut area);
        write(cpu, va.wrapping_add(24), area.get(24..32).unwrap_or(&[]))?;
    }
    if written & SSE_BIT != 0 {
        xmm_out(cpu.state(), &mut area, registers);
        write(cpu, va.wrapping_add(160), area.get(160..160 + 16 * registers).unwrap_or(&[]))?;
    }
    for (bit, offset, _) in places.into_iter().filter(|p| written & p.0 != 0) {
        let bytes = component_out(cpu.state(), bit, registers);
        write(cpu, va.wrapping_add(offset), &bytes)?;
    }
    let idx = cpu.state::<X86>().data_idx();
    let header = va.wrapping_add(HEADER);
    if compact {
        cpu.store(header, 8, idx, rfbm & used)?;
        cpu.store(header.wrapping_add(8), 8, idx, rfbm | COMPACT)
    } else {
        let old = cpu.load(header, 8, idx)?;
        cpu.store(header, 8, idx, old & !rfbm | rfbm & used)
    }
}

/// The header's three words, checked.
fn header(cpu: &mut Cpu<'_>, va: u64, supervisor: bool) -> Result<(u64, Option<u64>), Fault> {
    let mut bytes = [0; 64];
    read(cpu, va.wrapping_add(HEADER), &mut bytes)?;
    let (present, layout) = (word(&bytes, 0), word(&bytes, 8));
    let s = cpu.state::<X86>();
    let enabled = s.xcr0 | if supervisor { s.xss } else { 0 };
    let compact = layout & COMPACT != 0;
    let reserved = bytes.get(16..).is_some_and(|b| b.iter().any(|b| *b != 0));
    let bad = if compact {
        layout & !COMPACT & !enabled != 0 || present & !layout != 0 || reserved
    } else {
        supervisor || layout != 0 || present & !enabled != 0 || word(&bytes, 16) != 0
    };
    if bad { Err(gp(0)) } else { Ok((present, compact.then_some(layout))) }
}

fn words_in(to: &mut [u64], bytes: &[u8]) {
    for (n, to) in to.iter_mut().enumerate() {
        *to = word(bytes, 8 * n);
    }
}

fn xrstor(cpu: &mut Cpu<'_>, va: u64, form: Form, supervisor: bool) -> Result<(), Fault> {
    let rfbm = requested(cpu.state(), supervisor);
    let (present, layout) = header(cpu, va, supervisor)?;
    let mut area = [0; LEGACY];
    read(cpu, va, &mut area)?;
    let mut parts = Vec::new();
    for (bit, offset, len) in places(layout) {
        let mut bytes = vec![0; len as usize];
        if rfbm & present & bit != 0 {
            read(cpu, va.wrapping_add(offset), &mut bytes)?;
        }
        parts.push((bit, bytes));
    }
    if layout.is_some() {
        if rfbm & SSE_BIT != 0 {
            set_mxcsr(cpu, if present & SSE_BIT != 0 { word(&area, 24) as u32 } else { MXCSR_INIT })?;
        }
    } else if rfbm & (SSE_BIT | AVX_BIT) != 0 {
        set_mxcsr(cpu, word(&area, 24) as u32)?;
    }
    let s = cpu.state::<X86>();
    let config = parts.iter().find(|p| p.0 == BNDCSR_BIT && rfbm & p.0 != 0).map(|p| word(&p.1, 0));
    if config.is_some_and(|config| !s.bound_config_fits(config)) {
        return Err(gp(0));
    }
    if rfbm & X87_BIT != 0 {
        if present & X87_BIT != 0 {
            x87_in(&mut s.x87, &area, form.wide);
        } else {
            s.x87 = X87 { control: 0x37f, ..X87::default() };
        }
    }
    if rfbm & SSE_BIT != 0 {
        if present & SSE_BIT == 0 {
            area.fill(0);
        }
        xmm_in(s, &area, form.registers);
    }
    let mut pkru = None;
    for (bit, bytes) in parts.into_iter().filter(|p| rfbm & p.0 != 0) {
        match bit {
            AVX_BIT => {
                for (n, r) in s.ymm.iter_mut().take(form.registers).enumerate() {
                    (r[2], r[3]) = (word(&bytes, 16 * n), word(&bytes, 16 * n + 8));
                }
            }
            BNDREGS_BIT => {
                for (n, bound) in s.bnd.iter_mut().enumerate() {
                    *bound = [word(&bytes, 16 * n), word(&bytes, 16 * n + 8)];
                }
            }
            BNDCSR_BIT => s.bnd_user = [word(&bytes, 0), word(&bytes, 8)],
            OPMASK_BIT => words_in(&mut s.opmask, &bytes),
            ZMM_HIGH_BIT => {
                let registers = s.zmm_high.iter_mut().take(form.registers);
                registers.zip(bytes.chunks_exact(32)).for_each(|(r, b)| words_in(r, b));
            }
            ZMM_UPPER_BIT if form.registers == 16 => words_in(s.zmm_upper.as_flattened_mut(), &bytes),
            ZMM_UPPER_BIT => {}
            _ => pkru = Some(word(&bytes, 0) as u32),
        }
    }
    if let Some(pkru) = pkru {
        control::set_pkru(cpu, pkru);
    }
    cpu.mode_changed();
    Ok(())
}

/// Sizes of the XSAVE area as CPUID shows them: in the standard format for XCR0, compacted for XCR0 and IA32_XSS.
pub(crate) fn sizes(xcr0: u64, xss: u64) -> (u32, u32) {
    let standard = COMPONENTS.iter().filter(|c| xcr0 & c.0 != 0).map(|c| c.1 + c.2).max();
    let compact: u64 = COMPONENTS.iter().filter(|c| (xcr0 | xss) & c.0 != 0).map(|c| c.2).sum();
    (standard.unwrap_or(EXTENDED) as u32, (EXTENDED + compact) as u32)
}

/// The leaves of CPUID that say where components are: number, bytes, offset.
pub(crate) fn component_leaves() -> impl Iterator<Item = (u32, u32, u32)> {
    COMPONENTS.iter().map(|(bit, at, len)| (bit.trailing_zeros(), *len as u32, *at as u32))
}
