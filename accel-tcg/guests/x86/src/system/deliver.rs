//! Delivery of exceptions and interrupts (SDM volume 3, chapter 6).

use holdfast_tcg_runtime::{Cpu, Fault};

use super::fault::{self, gp, np, ss, ts};
use super::mode::attr;
use super::noncanonical;
use super::regs::{cr0, cr4, dr, vector};
use super::segment::{Descriptor, fetch, real, selector_code, set_accessed, sys_load, system};
use super::stack::{RSP, Stack};
use super::task;
use crate::flags::{self, rflags};
use crate::state::{SegmentRegister, X86, seg};

/// Where an event comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The processor found a fault.
    Exception,
    /// INT3, INTO: the gate's DPL counts.
    Software,
    /// INT n: IOPL and, under CR4.VME, the redirection bitmap too in virtual-8086 mode.
    Number,
    /// INT1, and hardware interrupts: errors on the way are marked external.
    External,
}

/// An exception or interrupt to deliver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Event {
    /// Its vector.
    pub vector: u8,
    /// Error code, where protected mode pushes one.
    pub code: Option<u32>,
    /// Where it comes from.
    pub source: Source,
    /// IP to return to, relative to CS.
    pub ip: u64,
    /// RF in the pushed flags.
    pub resume: bool,
}

impl Event {
    fn is_software(&self) -> bool {
        matches!(self.source, Source::Software | Source::Number)
    }

    /// The EXT bit of error codes on the way.
    pub(crate) fn ext(&self) -> u32 {
        u32::from(!self.is_software())
    }

    /// The error code that names the event's gate.
    fn gate_code(&self) -> u32 {
        u32::from(self.vector) * 8 + 2 + self.ext()
    }
}

/// How two exceptions combine (SDM volume 3, table 6-5).
enum Combined {
    /// The second is delivered on its own.
    Serial,
    Double,
    Shutdown,
}

fn combine(first: Option<u8>, second: u8) -> Combined {
    let contributory = |v: u8| matches!(v, vector::DE | vector::TS..=vector::GP);
    match first {
        Some(vector::DF) => Combined::Shutdown,
        Some(f) if contributory(f) && contributory(second) => Combined::Double,
        Some(vector::PF) if contributory(second) || second == vector::PF => Combined::Double,
        _ => Combined::Serial,
    }
}

/// Delivers a fault at the current pc.
pub(crate) fn raise(cpu: &mut Cpu<'_>, fault: &Fault) {
    let fault = noncanonical::refine(cpu, fault);
    let pc = cpu.pc();
    let ip = cpu.state::<X86>().ip_of(pc);
    let event = note(cpu, &fault, ip);
    deliver_or_escalate(cpu, event);
}

/// Delivers an interrupt that the processor accepted between instructions.
pub(crate) fn interrupt(cpu: &mut Cpu<'_>, vector: u8) {
    let pc = cpu.pc();
    let ip = cpu.state::<X86>().ip_of(pc);
    let event = Event { vector, code: None, source: Source::External, ip, resume: false };
    deliver_or_escalate(cpu, event);
}

/// Delivers INT n and the like, returning to `ip`.
///
/// # Errors
/// The fault on the way: it is one of the instruction.
pub(crate) fn software(cpu: &mut Cpu<'_>, vector: u8, ip: u64, source: Source) -> Result<(), Fault> {
    deliver(cpu, &Event { vector, code: None, source, ip, resume: false })
}

/// The event of a fault, with what the fault leaves in registers.
fn note(cpu: &mut Cpu<'_>, fault: &Fault, ip: u64) -> Event {
    let s = cpu.state::<X86>();
    let vector = fault.cause as u8;
    // What the instruction would have ended with does not come about.
    s.debug_pending = 0;
    if vector == vector::PF {
        s.cr2 = fault.value;
    }
    let mut resume = !matches!(vector, vector::BP | vector::OF);
    if vector == vector::DB {
        // The value holds the new bits of DR6; breakpoints of data and single step are traps.
        s.dr[dr::DR6] = s.dr[dr::DR6] & !0xf | fault.value & !dr::DR6_FIXED | dr::DR6_FIXED;
        s.dr[dr::DR7] &= !dr::DR7_GD;
        resume = fault.aux & fault::RESUME != 0;
    }
    Event { vector, code: fault::code(fault), source: Source::Exception, ip, resume }
}

fn deliver_or_escalate(cpu: &mut Cpu<'_>, first: Event) {
    let mut event = first;
    let mut vector = (event.source == Source::Exception).then_some(event.vector);
    while let Err(second) = deliver(cpu, &event) {
        match combine(vector, second.cause as u8) {
            Combined::Shutdown => {
                cpu.shut_down();
                return;
            }
            Combined::Double => {
                let double = fault::coded(vector::DF, 0);
                // CR2 is that of the second fault.
                if second.cause == u64::from(vector::PF) {
                    cpu.state::<X86>().cr2 = second.value;
                }
                event = note(cpu, &double, event.ip);
            }
            Combined::Serial => event = note(cpu, &second, event.ip),
        }
        vector = Some(event.vector);
    }
    super::mode::changed(cpu);
}

/// Delivers an event.
fn deliver(cpu: &mut Cpu<'_>, event: &Event) -> Result<(), Fault> {
    let s = cpu.state::<X86>();
    s.shadow = 0;
    if s.cr0 & cr0::PE == 0 {
        return deliver_real(cpu, event);
    }
    if s.vm86() && event.source == Source::Number {
        if s.cr4 & cr4::VME != 0 && redirected(cpu, event.vector)? {
            return deliver_redirected(cpu, event);
        }
        if cpu.state::<X86>().iopl() < 3 {
            return Err(gp(0));
        }
    }
    let s = cpu.state::<X86>();
    if s.long() { deliver_long(cpu, event) } else { deliver_protected(cpu, event) }
}

fn deliver_real(cpu: &mut Cpu<'_>, event: &Event) -> Result<(), Fault> {
    let s = cpu.state::<X86>();
    let at = u64::from(event.vector) * 4;
    if at + 3 > s.idt[1] {
        return Err(gp(event.gate_code()));
    }
    let base = s.idt[0];
    let (flags, cs) = (flags::read(s), s.seg[seg::CS].selector);
    let entry = sys_load(cpu, base + at, 4)?;
    let mut stack = Stack::current(cpu.state(), 2);
    for value in [flags, cs, event.ip] {
        stack.push(cpu, value & 0xffff)?;
    }
    let s = cpu.state::<X86>();
    stack.commit(s);
    s.flags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
    s.seg[seg::CS] = real(&s.seg[seg::CS], (entry >> 16) as u16, false);
    let pc = s.pc_of(entry & 0xffff);
    cpu.set_pc(pc);
    Ok(())
}

/// Whether the TSS has INT `vector` of virtual-8086 mode go to the program's own handlers: the bit is clear in the 32
/// bytes below the I/O permission bitmap (SDM volume 3, section 21.3.3).
fn redirected(cpu: &mut Cpu<'_>, vector: u8) -> Result<bool, Fault> {
    let tr = cpu.state::<X86>().tr;
    let wide = matches!(tr.attributes & 15, system::TSS | system::TSS_BUSY);
    if !wide || tr.limit < 0x67 {
        return Ok(false);
    }
    let map = sys_load(cpu, tr.base.wrapping_add(0x66), 2)?;
    let Some(at) = map.checked_sub(32).map(|start| start + u64::from(vector) / 8) else { return Ok(false) };
    if at > tr.limit {
        return Ok(false);
    }
    let bits = sys_load(cpu, tr.base.wrapping_add(at), 1)?;
    Ok(bits >> (vector & 7) & 1 == 0)
}

/// INT n of virtual-8086 mode by the vectors at linear address 0, as real mode has it.
fn deliver_redirected(cpu: &mut Cpu<'_>, event: &Event) -> Result<(), Fault> {
    let entry = sys_load(cpu, u64::from(event.vector) * 4, 4)?;
    let s = cpu.state::<X86>();
    let (mut shown, cs, cleared) = (flags::read(s), s.seg[seg::CS].selector, s.iopl() == 3);
    let interrupts = if cleared { rflags::IF } else { rflags::VIF };
    if !cleared {
        let virtual_if = if shown & rflags::VIF != 0 { rflags::IF } else { 0 };
        shown = shown & !rflags::IF | virtual_if | rflags::IOPL;
    }
    let mut stack = Stack::current(s, 2);
    for value in [shown, cs, event.ip] {
        stack.push(cpu, value & 0xffff)?;
    }
    let s = cpu.state::<X86>();
    stack.commit(s);
    s.flags &= !(interrupts | rflags::TF | rflags::RF);
    s.seg[seg::CS] = real(&s.seg[seg::CS], (entry >> 16) as u16, true);
    let pc = s.pc_of(entry & 0xffff);
    cpu.set_pc(pc);
    Ok(())
}

/// Reads the gate of an event; `wide`: of 16 bytes.
fn gate(cpu: &mut Cpu<'_>, event: &Event, wide: bool) -> Result<Descriptor, Fault> {
    let size = if wide { 16 } else { 8 };
    let s = cpu.state::<X86>();
    let (base, limit, cpl) = (s.idt[0], s.idt[1], s.cpl);
    let offset = u64::from(event.vector) * size;
    if offset + size - 1 > limit {
        return Err(gp(event.gate_code()));
    }
    let at = base.wrapping_add(offset);
    let raw = sys_load(cpu, at, 8)?;
    let upper = if wide { sys_load(cpu, at.wrapping_add(8), 8)? } else { 0 };
    let gate = Descriptor { at, raw, upper };
    let known = !gate.is_segment()
        && match gate.kind() {
            system::INTERRUPT | system::TRAP => true,
            system::TASK | system::INTERRUPT16 | system::TRAP16 => !wide,
            _ => false,
        };
    if !known || event.is_software() && gate.dpl() < cpl {
        return Err(gp(event.gate_code()));
    }
    if !gate.present() {
        return Err(np(event.gate_code()));
    }
    Ok(gate)
}

/// The code segment a gate leads to.
fn gate_target(cpu: &mut Cpu<'_>, event: &Event, gate: &Descriptor) -> Result<Descriptor, Fault> {
    let selector = gate.gate_selector();
    let ext = event.ext();
    if selector & !3 == 0 {
        return Err(gp(ext));
    }
    let with_ext = |f: Fault| {
        if fault::code(&f).is_some() && f.cause == u64::from(vector::GP) {
            Fault { aux: f.aux | u64::from(ext), ..f }
        } else {
            f
        }
    };
    let code = selector_code(selector) | ext;
    let mut d = fetch(cpu, selector).map_err(with_ext)?;
    let s = cpu.state::<X86>();
    let (cpl, long) = (s.cpl, s.long());
    let size = d.attributes() & (attr::L | attr::DB);
    if !d.is_code() || d.dpl() > cpl || long && size != attr::L {
        return Err(gp(code));
    }
    if !d.present() {
        return Err(np(code));
    }
    set_accessed(cpu, &mut d)?;
    Ok(d)
}

/// The stack of privilege level `level` in the TSS: SS selector and ESP.
pub(crate) fn tss_stack(cpu: &mut Cpu<'_>, level: u64, ext: u32) -> Result<(u16, u64), Fault> {
    let tr = cpu.state::<X86>().tr;
    let wide = matches!(tr.attributes & 15, system::TSS | system::TSS_BUSY);
    let (offset, size) = if wide { (4 + level * 8, 4) } else { (2 + level * 4, 2) };
    if offset + 2 * size - 1 > tr.limit {
        return Err(ts(selector_code(tr.selector as u16) | ext));
    }
    let at = tr.base.wrapping_add(offset);
    let sp = sys_load(cpu, at, size as u8)?;
    let selector = sys_load(cpu, at.wrapping_add(size), 2)?;
    Ok((selector as u16, sp))
}

/// Checks the SS of an inner privilege level, as the TSS has it.
pub(crate) fn inner_stack(
    cpu: &mut Cpu<'_>,
    selector: u16,
    level: u64,
    ext: u32,
) -> Result<SegmentRegister, Fault> {
    let code = selector_code(selector) | ext;
    if selector & !3 == 0 {
        return Err(ts(ext));
    }
    let Some(mut d) = super::segment::lookup(cpu, selector)? else { return Err(ts(code)) };
    if u64::from(selector & 3) != level || d.dpl() != level || !d.is_writable() {
        return Err(ts(code));
    }
    if !d.present() {
        return Err(ss(code));
    }
    set_accessed(cpu, &mut d)?;
    Ok(d.register(selector))
}

/// Flags to clear on entry through `gate`.
fn entry_flags(gate: &Descriptor) -> u64 {
    let masked = if gate.kind() & 1 == 0 { rflags::IF } else { 0 };
    masked | rflags::TF | rflags::NT | rflags::RF | rflags::VM
}

fn pushed_flags(s: &X86, event: &Event) -> u64 {
    flags::read(s) | if event.resume { rflags::RF } else { 0 }
}

fn deliver_protected(cpu: &mut Cpu<'_>, event: &Event) -> Result<(), Fault> {
    let gate = gate(cpu, event, false)?;
    if gate.kind() == system::TASK {
        return task::through_gate(cpu, event, gate.gate_selector());
    }
    let target = gate_target(cpu, event, &gate)?;
    let s = cpu.state::<X86>();
    let (cpl, vm86, old) = (s.cpl, s.vm86(), s.seg);
    let eflags = pushed_flags(s, event);
    let esp = s.gpr[RSP];
    let inner = !target.is_conforming() && target.dpl() < cpl;
    let selector = gate.gate_selector();
    if vm86 && (target.is_conforming() || target.dpl() != 0) {
        return Err(gp(selector_code(selector) | event.ext()));
    }
    let size = if gate.kind() >= system::INTERRUPT { 4 } else { 2 };
    let offset = gate.gate_offset() & if size == 4 { 0xffff_ffff } else { 0xffff };
    if offset > target.limit() {
        return Err(gp(event.ext()));
    }
    let mut items: Vec<u64> = Vec::with_capacity(10);
    let (mut stack, new_ss, level) = if inner {
        let level = target.dpl();
        let (ss_selector, sp) = tss_stack(cpu, level, event.ext())?;
        let new_ss = inner_stack(cpu, ss_selector, level, event.ext())?;
        if vm86 {
            items.extend([seg::GS, seg::FS, seg::DS, seg::ES].map(|r| old[r].selector));
        }
        items.extend([old[seg::SS].selector, esp]);
        (Stack::at(cpu.state(), &new_ss, sp, size), Some(new_ss), level)
    } else {
        (Stack::current(cpu.state(), size), None, cpl)
    };
    items.extend([eflags, old[seg::CS].selector, event.ip]);
    items.extend(event.code.map(u64::from));
    for item in items {
        stack.push(cpu, item)?;
    }
    let s = cpu.state::<X86>();
    if let Some(new_ss) = new_ss {
        s.seg[seg::SS] = new_ss;
        if vm86 {
            for r in [seg::ES, seg::DS, seg::FS, seg::GS] {
                s.seg[r] = SegmentRegister::default();
            }
        }
    }
    s.flags &= !entry_flags(&gate);
    stack.commit(s);
    enter_code(s, &target, selector, level);
    let pc = s.pc_of(offset);
    cpu.set_pc(pc);
    Ok(())
}

/// CS from a descriptor, at privilege `level`.
pub(crate) fn enter_code(s: &mut X86, target: &Descriptor, selector: u16, level: u64) {
    s.seg[seg::CS] = target.register(selector & !3 | level as u16);
    s.cpl = level;
}

fn deliver_long(cpu: &mut Cpu<'_>, event: &Event) -> Result<(), Fault> {
    let gate = gate(cpu, event, true)?;
    let target = gate_target(cpu, event, &gate)?;
    let s = cpu.state::<X86>();
    let (cpl, old) = (s.cpl, s.seg);
    let rflags = pushed_flags(s, event);
    let old_rsp = s.gpr[RSP];
    let ist = gate.raw >> 32 & 7;
    let inner = !target.is_conforming() && target.dpl() < cpl;
    let level = if inner { target.dpl() } else { cpl };
    let rsp = if ist != 0 {
        tss64(cpu, 36 + (ist - 1) * 8, event.ext())?
    } else if inner {
        tss64(cpu, 4 + level * 8, event.ext())?
    } else {
        old_rsp
    };
    let s = cpu.state::<X86>();
    if !s.canonical(rsp) {
        return Err(ss(event.ext()));
    }
    let offset = gate.gate_offset();
    if !s.canonical(offset) {
        return Err(gp(event.ext()));
    }
    let mut stack = Stack::flat(rsp & !15);
    for item in [old[seg::SS].selector, old_rsp, rflags, old[seg::CS].selector, event.ip] {
        stack.push(cpu, item)?;
    }
    if let Some(code) = event.code {
        stack.push(cpu, u64::from(code))?;
    }
    let s = cpu.state::<X86>();
    if inner {
        s.seg[seg::SS] = SegmentRegister { selector: level, ..SegmentRegister::default() };
    }
    s.flags &= !entry_flags(&gate);
    stack.commit(s);
    enter_code(s, &target, gate.gate_selector(), level);
    cpu.set_pc(offset);
    Ok(())
}

/// A stack pointer in the 64-bit TSS.
pub(crate) fn tss64(cpu: &mut Cpu<'_>, offset: u64, ext: u32) -> Result<u64, Fault> {
    let tr = cpu.state::<X86>().tr;
    if offset + 7 > tr.limit {
        return Err(ts(selector_code(tr.selector as u16) | ext));
    }
    sys_load(cpu, tr.base.wrapping_add(offset), 8)
}
