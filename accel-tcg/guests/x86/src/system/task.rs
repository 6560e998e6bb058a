//! Task switches (SDM volume 3, chapter 7).

use holdfast_tcg_runtime::{Cpu, Fault};

use super::deliver::Event;
use super::fault::{gp, np, ss, ts};
use super::mmu;
use super::mode::attr;
use super::regs::{cr0, cr4, dr};
use super::segment::{
    Descriptor, fetch, lookup, null, real, selector_code, set_accessed, sys_load, sys_store, system,
};
use super::stack::Stack;
use crate::flags::{self, rflags};
use crate::state::{SegmentRegister, X86, seg};

/// Why a task is switched to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    Jump,
    /// CALL, interrupts, exceptions: the new task is nested.
    Nest,
    Return,
}

/// JMP or CALL to a TSS or task gate.
///
/// # Errors
/// The fault.
pub(crate) fn far_transfer(
    cpu: &mut Cpu<'_>,
    d: &Descriptor,
    selector: u16,
    next: u64,
    call: bool,
) -> Result<u64, Fault> {
    let code = selector_code(selector);
    let s = cpu.state::<X86>();
    if s.long() || d.dpl() < s.cpl || u64::from(selector & 3) > d.dpl() {
        return Err(gp(code));
    }
    let reason = if call { Reason::Nest } else { Reason::Jump };
    match d.kind() {
        system::TASK => {
            if !d.present() {
                return Err(np(code));
            }
            switch(cpu, d.gate_selector(), reason, next, 0)
        }
        system::TSS | system::TSS16 => switch(cpu, selector, reason, next, 0),
        _ => Err(gp(code)),
    }
}

/// Delivers an event through a task gate.
///
/// # Errors
/// The fault.
pub(crate) fn through_gate(cpu: &mut Cpu<'_>, event: &Event, selector: u16) -> Result<(), Fault> {
    let ext = event.ext();
    let pc = switch(cpu, selector, Reason::Nest, event.ip, ext)?;
    cpu.set_pc(pc);
    if let Some(code) = event.code {
        let s = cpu.state::<X86>();
        let size = if matches!(s.tr.attributes & 15, system::TSS_BUSY) { 4 } else { 2 };
        let mut stack = Stack::current(s, size);
        stack.push(cpu, u64::from(code))?;
        stack.commit(cpu.state());
    }
    Ok(())
}

/// IRET with NT set.
///
/// # Errors
/// The fault.
pub(crate) fn back(cpu: &mut Cpu<'_>) -> Result<u64, Fault> {
    let base = cpu.state::<X86>().tr.base;
    let link = sys_load(cpu, base, 2)? as u16;
    // What is saved of this task is that it goes on behind the IRET.
    let pc = cpu.pc();
    let ip = cpu.state::<X86>().ip_of(pc).wrapping_add(1);
    switch(cpu, link, Reason::Return, ip, 0)
}

/// What a TSS holds.
#[derive(Debug, Clone, Copy, Default)]
struct Tss {
    cr3: u64,
    eip: u64,
    eflags: u64,
    gpr: [u64; 8],
    /// ES CS SS DS FS GS.
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

fn read(cpu: &mut Cpu<'_>, base: u64, wide: bool) -> Result<Tss, Fault> {
    let mut t = Tss::default();
    if wide {
        t.cr3 = sys_load(cpu, base + 0x1c, 4)?;
        t.eip = sys_load(cpu, base + 0x20, 4)?;
        t.eflags = sys_load(cpu, base + 0x24, 4)?;
        for (at, r) in (0x28..).step_by(4).zip(&mut t.gpr) {
            *r = sys_load(cpu, base + at, 4)?;
        }
        for (at, r) in (0x48..).step_by(4).zip(&mut t.selectors) {
            *r = sys_load(cpu, base + at, 2)? as u16;
        }
        t.ldt = sys_load(cpu, base + 0x60, 2)? as u16;
        t.trap = sys_load(cpu, base + 0x64, 2)? & 1 != 0;
    } else {
        t.eip = sys_load(cpu, base + 0x0e, 2)?;
        t.eflags = sys_load(cpu, base + 0x10, 2)?;
        for (at, r) in (0x12..).step_by(2).zip(&mut t.gpr) {
            *r = sys_load(cpu, base + at, 2)? | 0xffff_0000;
        }
        for (at, r) in (0x22..).step_by(2).zip(t.selectors.iter_mut().take(4)) {
            *r = sys_load(cpu, base + at, 2)? as u16;
        }
        t.ldt = sys_load(cpu, base + 0x2a, 2)? as u16;
    }
    Ok(t)
}

/// Saves the dynamic part of the old task's state.
fn save(cpu: &mut Cpu<'_>, base: u64, wide: bool, (ip, eflags): (u64, u64)) -> Result<(), Fault> {
    let s = cpu.state::<X86>();
    let (gpr, segs) = (s.gpr, s.seg);
    let size = if wide { 4 } else { 2 };
    let (at_ip, at_gpr, at_seg) = if wide { (0x20, 0x28, 0x48) } else { (0x0e, 0x12, 0x22) };
    sys_store(cpu, base + at_ip, size, ip)?;
    sys_store(cpu, base + at_ip + u64::from(size), size, eflags)?;
    for (n, r) in (0..).zip(gpr.iter().take(8)) {
        sys_store(cpu, base + at_gpr + n * u64::from(size), size, *r)?;
    }
    let count = if wide { 6 } else { 4 };
    for (n, r) in (0..).zip(segs.iter().take(count)) {
        sys_store(cpu, base + at_seg + n * u64::from(size), 2, r.selector)?;
    }
    Ok(())
}

fn set_busy(cpu: &mut Cpu<'_>, at: u64, busy: bool) -> Result<(), Fault> {
    let byte = sys_load(cpu, at.wrapping_add(5), 1)?;
    sys_store(cpu, at.wrapping_add(5), 1, if busy { byte | 2 } else { byte & !2 })
}

fn new_task(cpu: &mut Cpu<'_>, selector: u16, reason: Reason, ext: u32) -> Result<Descriptor, Fault> {
    let code = selector_code(selector) | ext;
    let back = reason == Reason::Return;
    let wrong = if back { ts(code) } else { gp(code) };
    if selector & 4 != 0 || selector & !3 == 0 {
        return Err(wrong);
    }
    let Some(d) = lookup(cpu, selector)? else { return Err(wrong) };
    let fits = !d.is_segment()
        && if back {
            matches!(d.kind(), system::TSS_BUSY | system::TSS16_BUSY)
        } else {
            matches!(d.kind(), system::TSS | system::TSS16)
        };
    if !fits {
        return Err(wrong);
    }
    if !d.present() {
        return Err(np(code));
    }
    let wide = d.kind() & 8 != 0;
    if d.limit() < if wide { 0x67 } else { 0x2b } {
        return Err(ts(code));
    }
    Ok(d)
}

/// Switches to the task of TSS `selector`; `ip` is where the old one goes on. Gives the linear pc.
fn switch(cpu: &mut Cpu<'_>, selector: u16, reason: Reason, ip: u64, ext: u32) -> Result<u64, Fault> {
    let d = new_task(cpu, selector, reason, ext)?;
    let wide = d.kind() & 8 != 0;
    let s = cpu.state::<X86>();
    let old = s.tr;
    let old_wide = old.attributes & 8 != 0;
    let mut eflags = flags::read(s);
    if reason == Reason::Return {
        eflags &= !rflags::NT;
    }
    let new = read(cpu, d.base(), wide)?;
    save(cpu, old.base, old_wide, (ip, eflags))?;
    if reason != Reason::Nest {
        let at = cpu.state::<X86>().gdt[0].wrapping_add(old.selector & !7);
        set_busy(cpu, at, false)?;
    }
    if reason == Reason::Nest {
        sys_store(cpu, d.base(), 2, old.selector)?;
    }
    if reason != Reason::Return {
        set_busy(cpu, d.at, true)?;
    }
    let mut tr = d.register(selector);
    tr.attributes |= 2;
    let phys = cpu.phys();
    let s = cpu.state::<X86>();
    s.tr = tr;
    s.cr0 |= cr0::TS;
    if wide && s.cr0 & cr0::PG != 0 {
        s.cr3 = new.cr3;
        if s.cr4 & cr4::PAE != 0
            && let Some(pdptes) = mmu::load_pdptes(s, &phys, new.cr3)
        {
            s.pdpte = pdptes;
        }
    }
    take_over(s, &new, reason);
    cpu.flush(holdfast_tcg_runtime::Flush::All);
    super::mode::changed(cpu);
    load_segments(cpu, &new, ext)?;
    super::mode::changed(cpu);
    let s = cpu.state::<X86>();
    s.dr[dr::DR7] &= !0x155;
    if new.trap {
        s.debug_pending |= dr::DR6_BT;
    }
    if new.eip > s.seg[seg::CS].limit {
        return Err(gp(ext));
    }
    Ok(s.pc_of(new.eip))
}

fn take_over(s: &mut X86, new: &Tss, reason: Reason) {
    let nested = if reason == Reason::Nest { rflags::NT } else { 0 };
    flags::write(s, new.eflags & 0x3f_7fd7 | nested);
    for (r, value) in s.gpr.iter_mut().zip(new.gpr) {
        *r = value & 0xffff_ffff;
    }
    for (r, selector) in s.seg.iter_mut().zip(new.selectors) {
        *r = null(selector, r);
    }
    s.ldt = SegmentRegister { selector: u64::from(new.ldt), ..SegmentRegister::default() };
    s.cpl = u64::from(new.selectors[seg::CS] & 3);
}

fn load_segments(cpu: &mut Cpu<'_>, new: &Tss, ext: u32) -> Result<(), Fault> {
    let s = cpu.state::<X86>();
    if s.vm86() {
        s.cpl = 3;
        for (r, selector) in s.seg.iter_mut().zip(new.selectors) {
            *r = real(r, selector, true);
        }
        return Ok(());
    }
    if new.ldt & !3 != 0 {
        let code = selector_code(new.ldt) | ext;
        let d = fetch(cpu, new.ldt).map_err(|_| ts(code))?;
        if new.ldt & 4 != 0 || d.is_segment() || d.kind() != system::LDT || !d.present() {
            return Err(ts(code));
        }
        cpu.state::<X86>().ldt = d.register(new.ldt);
    }
    for r in [seg::CS, seg::SS, seg::DS, seg::ES, seg::FS, seg::GS] {
        load_segment(cpu, r, new.selectors[r], ext)?;
    }
    Ok(())
}

fn load_segment(cpu: &mut Cpu<'_>, r: usize, selector: u16, ext: u32) -> Result<(), Fault> {
    let code = selector_code(selector) | ext;
    let required = matches!(r, seg::CS | seg::SS);
    if selector & !3 == 0 {
        return if required { Err(ts(code)) } else { Ok(()) };
    }
    let Some(mut d) = lookup(cpu, selector)? else { return Err(ts(code)) };
    let (rpl, dpl) = (u64::from(selector & 3), d.dpl());
    let cpl = cpu.state::<X86>().cpl;
    let fits = match r {
        seg::CS => d.is_code() && if d.is_conforming() { dpl <= rpl } else { dpl == rpl },
        seg::SS => d.is_writable() && rpl == cpl && dpl == cpl,
        _ => {
            let readable = d.is_segment() && (!d.is_code() || d.attributes() & attr::WRITABLE != 0);
            readable && (d.is_conforming() || rpl <= dpl && cpl <= dpl)
        }
    };
    if !fits {
        return Err(ts(code));
    }
    if !d.present() {
        return Err(if r == seg::SS { ss(code) } else { np(code) });
    }
    set_accessed(cpu, &mut d)?;
    cpu.state::<X86>().seg[r] = d.register(selector);
    Ok(())
}
