//! Descriptors and segment registers (SDM volume 3, chapters 3 and 5).

use holdfast_tcg_runtime::{Cpu, Fault};

use super::fault::{gp, np, ss};
use super::mode::attr;
use crate::key::idx;
use crate::state::{SegmentRegister, X86, seg};

/// Descriptor types of system segments (attributes bits 0 to 3).
#[allow(missing_docs, reason = "the names are the SDM's")]
pub(crate) mod system {
    pub const TSS16: u64 = 1;
    pub const LDT: u64 = 2;
    pub const TSS16_BUSY: u64 = 3;
    pub const CALL16: u64 = 4;
    pub const TASK: u64 = 5;
    pub const INTERRUPT16: u64 = 6;
    pub const TRAP16: u64 = 7;
    pub const TSS: u64 = 9;
    pub const TSS_BUSY: u64 = 11;
    pub const CALL: u64 = 12;
    pub const INTERRUPT: u64 = 14;
    pub const TRAP: u64 = 15;
}

/// A descriptor as it lies in its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// Linear address of it.
    pub at: u64,
    /// The first 8 bytes.
    pub raw: u64,
    /// The 8 bytes behind them, of system descriptors in long mode.
    pub upper: u64,
}

impl Descriptor {
    fn high(&self) -> u64 {
        self.raw >> 32
    }

    /// As [`SegmentRegister::attributes`].
    pub fn attributes(&self) -> u64 {
        self.high() >> 8 & 0xf0ff
    }

    /// The type, without S.
    pub fn kind(&self) -> u64 {
        self.high() >> 8 & 15
    }

    /// Code or data.
    pub fn is_segment(&self) -> bool {
        self.attributes() & attr::S != 0
    }

    /// Code.
    pub fn is_code(&self) -> bool {
        self.attributes() & (attr::S | attr::CODE) == attr::S | attr::CODE
    }

    /// Data that can be written.
    pub fn is_writable(&self) -> bool {
        self.attributes() & (attr::S | attr::CODE | attr::WRITABLE) == attr::S | attr::WRITABLE
    }

    /// Conforming code.
    pub fn is_conforming(&self) -> bool {
        self.is_code() && self.attributes() & attr::DOWN != 0
    }

    /// DPL.
    pub fn dpl(&self) -> u64 {
        self.attributes() >> attr::DPL_SHIFT & 3
    }

    /// Present.
    pub fn present(&self) -> bool {
        self.attributes() & attr::P != 0
    }

    /// Base address.
    pub fn base(&self) -> u64 {
        let low = self.raw >> 16 & 0xff_ffff | (self.raw >> 56) << 24;
        low | (self.upper & 0xffff_ffff) << 32
    }

    /// Limit in bytes.
    pub fn limit(&self) -> u64 {
        let limit = self.raw & 0xffff | self.high() & 0xf_0000;
        if self.attributes() & attr::G != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// Offset of a gate.
    pub fn gate_offset(&self) -> u64 {
        self.raw & 0xffff | (self.raw >> 48) << 16 | (self.upper & 0xffff_ffff) << 32
    }

    /// Selector of a gate.
    pub fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }

    /// A segment register that was loaded with it.
    pub fn register(&self, selector: u16) -> SegmentRegister {
        SegmentRegister {
            base: self.base(),
            limit: self.limit(),
            selector: u64::from(selector),
            attributes: self.attributes(),
        }
    }
}

/// The selector in an error code.
pub(crate) fn selector_code(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

/// A load by the processor itself, as supervisor.
pub(crate) fn sys_load(cpu: &mut Cpu<'_>, at: u64, size: u8) -> Result<u64, Fault> {
    let at = if cpu.state::<X86>().long() { at } else { at & 0xffff_ffff };
    cpu.load(at, size, idx::SYSTEM)
}

/// A store by the processor itself, as supervisor.
pub(crate) fn sys_store(cpu: &mut Cpu<'_>, at: u64, size: u8, value: u64) -> Result<(), Fault> {
    let at = if cpu.state::<X86>().long() { at } else { at & 0xffff_ffff };
    cpu.store(at, size, idx::SYSTEM, value)
}

/// Reads the descriptor of `selector`; `Ok(None)` if it lies outside its table.
pub(crate) fn lookup(cpu: &mut Cpu<'_>, selector: u16) -> Result<Option<Descriptor>, Fault> {
    let s = cpu.state::<X86>();
    let (base, limit) = if selector & 4 != 0 {
        if s.ldt.attributes & attr::P == 0 {
            return Ok(None);
        }
        (s.ldt.base, s.ldt.limit)
    } else {
        (s.gdt[0], s.gdt[1])
    };
    let long = s.long();
    let offset = u64::from(selector & !7);
    if offset + 7 > limit {
        return Ok(None);
    }
    let at = base.wrapping_add(offset);
    let raw = sys_load(cpu, at, 8)?;
    let mut descriptor = Descriptor { at, raw, upper: 0 };
    let wide = long
        && !descriptor.is_segment()
        && matches!(descriptor.kind(), system::LDT | system::TSS | system::TSS_BUSY | system::CALL);
    if wide {
        if offset + 15 > limit {
            return Ok(None);
        }
        descriptor.upper = sys_load(cpu, at.wrapping_add(8), 8)?;
    }
    Ok(Some(descriptor))
}

/// As [`lookup`], with #GP(selector) outside the table.
pub(crate) fn fetch(cpu: &mut Cpu<'_>, selector: u16) -> Result<Descriptor, Fault> {
    lookup(cpu, selector)?.ok_or(gp(selector_code(selector)))
}

/// Sets the accessed bit in the table.
pub(crate) fn set_accessed(cpu: &mut Cpu<'_>, d: &mut Descriptor) -> Result<(), Fault> {
    if d.raw >> 40 & attr::ACCESSED == 0 {
        d.raw |= attr::ACCESSED << 40;
        sys_store(cpu, d.at.wrapping_add(5), 1, d.raw >> 40 & 0xff)?;
    }
    Ok(())
}

/// What real and virtual-8086 mode make of a selector.
pub(crate) fn real(old: &SegmentRegister, selector: u16, vm86: bool) -> SegmentRegister {
    let base = u64::from(selector) << 4;
    if vm86 {
        return SegmentRegister { base, limit: 0xffff, selector: u64::from(selector), attributes: 0xf3 };
    }
    SegmentRegister { base, selector: u64::from(selector), ..*old }
}

/// An unusable register with this selector.
pub(crate) fn null(selector: u16, old: &SegmentRegister) -> SegmentRegister {
    SegmentRegister { base: old.base, limit: old.limit, selector: u64::from(selector), attributes: 0 }
}

/// MOV and POP to a segment register other than CS, LDS and the like.
pub(crate) fn load(cpu: &mut Cpu<'_>, register: usize, selector: u16) -> Result<(), Fault> {
    let s = cpu.state::<X86>();
    let Some(old) = s.seg.get(register).copied() else { return Ok(()) };
    let new = if !s.protected() {
        real(&old, selector, s.vm86())
    } else if register == seg::SS {
        let cpl = s.cpl;
        stack(cpu, selector, cpl)?
    } else {
        data(cpu, selector, &old)?
    };
    if let Some(place) = cpu.state::<X86>().seg.get_mut(register) {
        *place = new;
    }
    Ok(())
}

/// Checks `selector` for SS at privilege level `cpl`.
fn stack(cpu: &mut Cpu<'_>, selector: u16, cpl: u64) -> Result<SegmentRegister, Fault> {
    let code = selector_code(selector);
    let s = cpu.state::<X86>();
    if selector & !3 == 0 {
        // A null SS is fine in 64-bit mode below privilege level 3.
        if s.code64() && cpl < 3 && u64::from(selector & 3) == cpl {
            let old = s.seg[seg::SS];
            return Ok(null(selector, &old));
        }
        return Err(gp(0));
    }
    let mut d = fetch(cpu, selector)?;
    if !d.is_writable() || u64::from(selector & 3) != cpl || d.dpl() != cpl {
        return Err(gp(code));
    }
    if !d.present() {
        return Err(ss(code));
    }
    set_accessed(cpu, &mut d)?;
    Ok(d.register(selector))
}

/// Checks `selector` for DS, ES, FS and GS.
fn data(cpu: &mut Cpu<'_>, selector: u16, old: &SegmentRegister) -> Result<SegmentRegister, Fault> {
    if selector & !3 == 0 {
        let s = cpu.state::<X86>();
        let base = if s.long() { 0 } else { old.base };
        return Ok(SegmentRegister { base, ..null(selector, old) });
    }
    let code = selector_code(selector);
    let mut d = fetch(cpu, selector)?;
    let cpl = cpu.state::<X86>().cpl;
    let readable = d.is_segment() && (!d.is_code() || d.attributes() & attr::WRITABLE != 0);
    if !readable {
        return Err(gp(code));
    }
    if !d.is_conforming() && (u64::from(selector & 3) > d.dpl() || cpl > d.dpl()) {
        return Err(gp(code));
    }
    if !d.present() {
        return Err(np(code));
    }
    set_accessed(cpu, &mut d)?;
    Ok(d.register(selector))
}

/// Behind a change to an outer level: data segments that are not accessible there become null.
pub(crate) fn drop_inner(s: &mut X86) {
    let cpl = s.cpl;
    for r in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let Some(sr) = s.seg.get_mut(r) else { continue };
        let a = sr.attributes;
        let dpl = a >> attr::DPL_SHIFT & 3;
        let conforming = a & (attr::CODE | attr::DOWN) == attr::CODE | attr::DOWN;
        if a & attr::P != 0 && dpl < cpl && !conforming {
            sr.attributes = 0;
            sr.selector = 0;
        } else if a & attr::P == 0 && sr.selector & !3 == 0 {
            sr.selector = 0;
        }
    }
}

/// LLDT
pub(crate) fn lldt(cpu: &mut Cpu<'_>, selector: u16) -> Result<(), Fault> {
    if selector & !3 == 0 {
        let s = cpu.state::<X86>();
        s.ldt = SegmentRegister { selector: u64::from(selector), ..SegmentRegister::default() };
        return Ok(());
    }
    let code = selector_code(selector);
    if selector & 4 != 0 {
        return Err(gp(code));
    }
    let d = fetch(cpu, selector)?;
    if d.is_segment() || d.kind() != system::LDT {
        return Err(gp(code));
    }
    if !d.present() {
        return Err(np(code));
    }
    let s = cpu.state::<X86>();
    if s.long() && !s.canonical_base(d.base()) {
        return Err(gp(code));
    }
    s.ldt = d.register(selector);
    Ok(())
}

/// LTR
pub(crate) fn ltr(cpu: &mut Cpu<'_>, selector: u16) -> Result<(), Fault> {
    let code = selector_code(selector);
    if selector & !3 == 0 {
        return Err(gp(0));
    }
    if selector & 4 != 0 {
        return Err(gp(code));
    }
    let mut d = fetch(cpu, selector)?;
    let long = cpu.state::<X86>().long();
    let fits = !d.is_segment() && (d.kind() == system::TSS || d.kind() == system::TSS16 && !long);
    if !fits {
        return Err(gp(code));
    }
    if !d.present() {
        return Err(np(code));
    }
    let s = cpu.state::<X86>();
    if s.long() && !s.canonical_base(d.base()) {
        return Err(gp(code));
    }
    d.raw |= 2 << 40;
    sys_store(cpu, d.at.wrapping_add(5), 1, d.raw >> 40 & 0xff)?;
    cpu.state::<X86>().tr = d.register(selector);
    Ok(())
}

/// True if LAR, LSL, VERR and VERW may tell of `d` at this privilege.
fn visible(cpu: &mut Cpu<'_>, selector: u16, d: &Descriptor) -> bool {
    let cpl = cpu.state::<X86>().cpl;
    d.is_conforming() || (cpl <= d.dpl() && u64::from(selector & 3) <= d.dpl())
}

/// LAR: the access rights, `None` to clear ZF.
pub(crate) fn lar(cpu: &mut Cpu<'_>, selector: u16) -> Result<Option<u64>, Fault> {
    let Some(d) = describable(cpu, selector)? else { return Ok(None) };
    let long = cpu.state::<X86>().long();
    let known = d.is_segment()
        || match d.kind() {
            system::LDT | system::TSS | system::TSS_BUSY | system::CALL => true,
            system::TSS16 | system::TSS16_BUSY | system::CALL16 | system::TASK => !long,
            _ => false,
        };
    Ok((known && visible(cpu, selector, &d)).then_some(d.raw >> 32 & 0x00ff_ff00))
}

/// LSL: the limit, `None` to clear ZF.
pub(crate) fn lsl(cpu: &mut Cpu<'_>, selector: u16) -> Result<Option<u64>, Fault> {
    let Some(d) = describable(cpu, selector)? else { return Ok(None) };
    let long = cpu.state::<X86>().long();
    let known = d.is_segment()
        || match d.kind() {
            system::LDT | system::TSS | system::TSS_BUSY => true,
            system::TSS16 | system::TSS16_BUSY => !long,
            _ => false,
        };
    Ok((known && visible(cpu, selector, &d)).then_some(d.limit()))
}

/// VERR or VERW: what ZF becomes.
pub(crate) fn verify(cpu: &mut Cpu<'_>, selector: u16, write: bool) -> Result<bool, Fault> {
    let Some(d) = describable(cpu, selector)? else { return Ok(false) };
    let fits = if write {
        d.is_writable()
    } else {
        d.is_segment() && (!d.is_code() || d.attributes() & attr::WRITABLE != 0)
    };
    Ok(fits && visible(cpu, selector, &d))
}

fn describable(cpu: &mut Cpu<'_>, selector: u16) -> Result<Option<Descriptor>, Fault> {
    if selector & !3 == 0 { Ok(None) } else { lookup(cpu, selector) }
}
