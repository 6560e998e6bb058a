//! Far jumps, calls and returns (SDM volume 2; volume 3, section 5.8).

use holdfast_tcg_runtime::{Cpu, Fault};

use super::deliver::{enter_code, inner_stack, tss_stack, tss64};
use super::fault::{gp, np, ss};
use super::iret::{inside, return_stack, return_target, set_sp};
use super::mode::attr;
use super::segment::{Descriptor, drop_inner, fetch, real, selector_code, set_accessed, system};
use super::stack::{RSP, Stack};
use super::task;
use crate::state::{SegmentRegister, X86, seg};

/// The target of a far transfer, and the operand size in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    /// Selector.
    pub selector: u16,
    /// Offset.
    pub offset: u64,
    /// Operand size: 2, 4 or 8.
    pub size: u8,
}

/// JMP far: the linear address to go on at. `next` is the IP behind the instruction.
///
/// # Errors
/// The fault.
pub(crate) fn jump(cpu: &mut Cpu<'_>, target: Target, next: u64) -> Result<u64, Fault> {
    if !cpu.state::<X86>().protected() {
        return real_transfer(cpu, target);
    }
    let mut d = first_lookup(cpu, target.selector)?;
    if d.is_segment() {
        let level = check_code(cpu, &d, target.selector, false)?;
        set_accessed(cpu, &mut d)?;
        return enter(cpu, &d, target, level);
    }
    match d.kind() {
        system::CALL | system::CALL16 => {
            let (mut code, to) = through_gate(cpu, &d, target.selector)?;
            let level = check_code(cpu, &code, to.selector, true)?;
            set_accessed(cpu, &mut code)?;
            enter(cpu, &code, to, level)
        }
        _ => task::far_transfer(cpu, &d, target.selector, next, false),
    }
}

fn first_lookup(cpu: &mut Cpu<'_>, selector: u16) -> Result<Descriptor, Fault> {
    if selector & !3 == 0 {
        return Err(gp(0));
    }
    fetch(cpu, selector)
}

fn real_transfer(cpu: &mut Cpu<'_>, target: Target) -> Result<u64, Fault> {
    let s = cpu.state::<X86>();
    if target.offset > s.seg[seg::CS].limit {
        return Err(gp(0));
    }
    s.seg[seg::CS] = real(&s.seg[seg::CS], target.selector, s.vm86());
    let pc = s.pc_of(target.offset);
    super::mode::changed(cpu);
    Ok(pc)
}

/// Checks a code segment for a transfer without change of privilege; gives the level (CPL, unless through a gate).
fn check_code(cpu: &mut Cpu<'_>, d: &Descriptor, selector: u16, gate: bool) -> Result<u64, Fault> {
    let code = selector_code(selector);
    let s = cpu.state::<X86>();
    let both = attr::L | attr::DB;
    if !d.is_code() || s.long() && d.attributes() & both == both {
        return Err(gp(code));
    }
    let level_fits = if d.is_conforming() {
        d.dpl() <= s.cpl
    } else {
        d.dpl() == s.cpl && (gate || u64::from(selector & 3) <= s.cpl)
    };
    if !level_fits {
        return Err(gp(code));
    }
    if !d.present() {
        return Err(np(code));
    }
    Ok(s.cpl)
}

fn enter(cpu: &mut Cpu<'_>, d: &Descriptor, target: Target, level: u64) -> Result<u64, Fault> {
    let s = cpu.state::<X86>();
    if !inside(s, d, target.offset) {
        return Err(gp(0));
    }
    enter_code(s, d, target.selector, level);
    let pc = s.pc_of(target.offset);
    super::mode::changed(cpu);
    Ok(pc)
}

/// Checks a call gate and reads where it leads.
fn through_gate(cpu: &mut Cpu<'_>, gate: &Descriptor, selector: u16) -> Result<(Descriptor, Target), Fault> {
    let code = selector_code(selector);
    let s = cpu.state::<X86>();
    let (cpl, long) = (s.cpl, s.long());
    if gate.dpl() < cpl || u64::from(selector & 3) > gate.dpl() || long && gate.kind() != system::CALL {
        return Err(gp(code));
    }
    if !gate.present() {
        return Err(np(code));
    }
    let inner = gate.gate_selector();
    let d = first_lookup(cpu, inner)?;
    if !d.is_code() || d.dpl() > cpl || long && d.attributes() & (attr::L | attr::DB) != attr::L {
        return Err(gp(selector_code(inner)));
    }
    if !d.present() {
        return Err(np(selector_code(inner)));
    }
    let size = match gate.kind() {
        system::CALL16 => 2,
        _ if long => 8,
        _ => 4,
    };
    let offset = if size == 2 { gate.gate_offset() & 0xffff } else { gate.gate_offset() };
    Ok((d, Target { selector: inner, offset, size }))
}

/// CALL far, with `next` the IP to return to.
///
/// # Errors
/// The fault.
pub(crate) fn call(cpu: &mut Cpu<'_>, target: Target, next: u64) -> Result<u64, Fault> {
    let s = cpu.state::<X86>();
    let cs = s.seg[seg::CS].selector;
    if !s.protected() {
        let mut stack = Stack::current(s, target.size);
        stack.push(cpu, cs)?;
        stack.push(cpu, next)?;
        let pc = real_transfer(cpu, target)?;
        stack.commit(cpu.state());
        return Ok(pc);
    }
    let mut d = first_lookup(cpu, target.selector)?;
    if d.is_segment() {
        let level = check_code(cpu, &d, target.selector, false)?;
        let mut stack = Stack::current(cpu.state(), target.size);
        stack.push(cpu, cs)?;
        stack.push(cpu, next)?;
        set_accessed(cpu, &mut d)?;
        let pc = enter(cpu, &d, target, level)?;
        stack.commit(cpu.state());
        return Ok(pc);
    }
    if !matches!(d.kind(), system::CALL | system::CALL16) {
        return task::far_transfer(cpu, &d, target.selector, next, true);
    }
    let (mut code, to) = through_gate(cpu, &d, target.selector)?;
    set_accessed(cpu, &mut code)?;
    let cpl = cpu.state::<X86>().cpl;
    if code.is_conforming() || code.dpl() == cpl {
        let mut stack = Stack::current(cpu.state(), to.size);
        stack.push(cpu, cs)?;
        stack.push(cpu, next)?;
        let pc = enter(cpu, &code, to, cpl)?;
        stack.commit(cpu.state());
        return Ok(pc);
    }
    call_inward(cpu, &d, &code, to, next)
}

/// CALL through a gate to an inner privilege level.
fn call_inward(
    cpu: &mut Cpu<'_>,
    gate: &Descriptor,
    code: &Descriptor,
    to: Target,
    next: u64,
) -> Result<u64, Fault> {
    let level = code.dpl();
    let s = cpu.state::<X86>();
    let (old, old_sp) = (s.seg, s.gpr[RSP]);
    let (mut stack, new_ss) = if to.size == 8 {
        let rsp = tss64(cpu, 4 + level * 8, 0)?;
        if !cpu.state::<X86>().canonical(rsp) {
            return Err(ss(0));
        }
        (Stack::flat(rsp), SegmentRegister { selector: level, ..SegmentRegister::default() })
    } else {
        let (selector, sp) = tss_stack(cpu, level, 0)?;
        let new_ss = inner_stack(cpu, selector, level, 0)?;
        (Stack::at(cpu.state(), &new_ss, sp, to.size), new_ss)
    };
    let from = Stack::current(cpu.state(), to.size);
    stack.push(cpu, old[seg::SS].selector)?;
    stack.push(cpu, old_sp)?;
    if to.size != 8 {
        let count = gate.raw >> 32 & 31;
        for n in (0..count).rev() {
            let parameter = from.peek(cpu, n * u64::from(to.size))?;
            stack.push(cpu, parameter)?;
        }
    }
    stack.push(cpu, old[seg::CS].selector)?;
    stack.push(cpu, next)?;
    if !inside(cpu.state(), code, to.offset) {
        return Err(gp(0));
    }
    let s = cpu.state::<X86>();
    s.seg[seg::SS] = new_ss;
    stack.commit(s);
    enter(cpu, code, to, level)
}

/// RET far with operands of `size` bytes, dropping `extra` bytes of parameters.
///
/// # Errors
/// The fault.
pub(crate) fn ret(cpu: &mut Cpu<'_>, size: u8, extra: u64) -> Result<u64, Fault> {
    let s = cpu.state::<X86>();
    let mut stack = Stack::current(s, size);
    if !s.protected() {
        let ip = stack.pop(cpu)?;
        let cs = stack.pop(cpu)? as u16;
        stack.skip(extra);
        let pc = real_transfer(cpu, Target { selector: cs, offset: ip, size })?;
        stack.commit(cpu.state());
        return Ok(pc);
    }
    let ip = stack.pop(cpu)?;
    let cs = stack.pop(cpu)? as u16;
    let target = return_target(cpu, cs)?;
    let s = cpu.state::<X86>();
    if !inside(s, &target, ip) {
        return Err(gp(0));
    }
    let (cpl, long) = (s.cpl, s.long());
    let level = u64::from(cs & 3);
    stack.skip(extra);
    if level == cpl {
        let s = cpu.state::<X86>();
        enter_code(s, &target, cs, level);
        stack.commit(s);
    } else {
        let sp = stack.pop(cpu)?;
        let ss_selector = stack.pop(cpu)? as u16;
        let to64 = long && target.attributes() & attr::L != 0;
        let new_ss = return_stack(cpu, ss_selector, level, to64)?;
        let s = cpu.state::<X86>();
        enter_code(s, &target, cs, level);
        s.seg[seg::SS] = new_ss;
        set_sp(s, sp.wrapping_add(extra), size);
        drop_inner(s);
    }
    let pc = cpu.state::<X86>().pc_of(ip);
    super::mode::changed(cpu);
    Ok(pc)
}
