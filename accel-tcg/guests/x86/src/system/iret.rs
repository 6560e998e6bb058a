//! IRET (SDM volume 2, IRET/IRETD/IRETQ).

use holdfast_tcg_runtime::{Cpu, Fault};

use super::deliver::enter_code;
use super::fault::{gp, np, ss};
use super::mode::attr;
use super::regs::cr0;
use super::segment::{Descriptor, drop_inner, fetch, lookup, real, selector_code, set_accessed};
use super::stack::{RSP, Stack};
use super::task;
use crate::flags::{self, rflags};
use crate::state::{SegmentRegister, X86, seg};

/// IRET with operands of `size` bytes: the linear address to go on at.
///
/// # Errors
/// The fault.
pub(crate) fn iret(cpu: &mut Cpu<'_>, size: u8) -> Result<u64, Fault> {
    let s = cpu.state::<X86>();
    let result = if s.cr0 & cr0::PE == 0 {
        iret_real(cpu, size)
    } else if s.vm86() {
        if s.iopl() < 3 && !(s.virtual_if() && size == 2) {
            return Err(gp(0));
        }
        iret_real(cpu, size)
    } else if s.flags & rflags::NT != 0 {
        if s.long() {
            return Err(gp(0));
        }
        task::back(cpu)
    } else {
        iret_protected(cpu, size)
    };
    if result.is_ok() {
        let s = cpu.state::<X86>();
        s.nmi_masked = 0;
        super::mode::changed(cpu);
    }
    result
}

/// Flags that IRET and POPF of `size` bytes at the current privilege may change.
pub(crate) fn changeable(s: &X86, size: u8) -> u64 {
    let mut mask = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        mask |= rflags::RF | rflags::AC | rflags::ID;
    }
    let protected = s.cr0 & cr0::PE != 0;
    if !protected || s.cpl == 0 {
        mask |= rflags::IOPL;
    }
    if !protected || s.cpl <= s.iopl() {
        mask |= rflags::IF;
    }
    mask
}

fn set_flags(s: &mut X86, value: u64, mask: u64) {
    let old = flags::read(s);
    flags::write(s, old & !mask | value & mask);
}

/// POPF and IRET of 16 bits in virtual-8086 mode under CR4.VME with IOPL below 3: IF is VIF.
pub(crate) fn set_virtual_flags(s: &mut X86, new: u64) {
    let shown = if new & rflags::IF != 0 { rflags::VIF } else { 0 };
    let mask = rflags::STATUS | rflags::DF | rflags::NT | rflags::TF;
    set_flags(s, new & mask | shown, mask | rflags::VIF);
}

fn iret_real(cpu: &mut Cpu<'_>, size: u8) -> Result<u64, Fault> {
    let size = size.min(4);
    let mut stack = Stack::current(cpu.state(), size);
    let ip = stack.pop(cpu)?;
    let cs = stack.pop(cpu)? as u16;
    let new = stack.pop(cpu)?;
    let s = cpu.state::<X86>();
    if ip > s.seg[seg::CS].limit {
        return Err(gp(0));
    }
    let virtual_if = s.vm86() && s.iopl() < 3;
    if virtual_if && (new & rflags::TF != 0 || new & rflags::IF != 0 && s.flags & rflags::VIP != 0) {
        return Err(gp(0));
    }
    let mut mask = changeable(s, size);
    if s.vm86() {
        mask = mask & !rflags::IOPL | rflags::IF;
    }
    stack.commit(s);
    s.seg[seg::CS] = real(&s.seg[seg::CS], cs, s.vm86());
    if virtual_if {
        set_virtual_flags(s, new);
    } else {
        set_flags(s, new, mask);
    }
    Ok(s.pc_of(ip))
}

/// Checks the CS that a return goes to.
pub(crate) fn return_target(cpu: &mut Cpu<'_>, selector: u16) -> Result<Descriptor, Fault> {
    let code = selector_code(selector);
    if selector & !3 == 0 {
        return Err(gp(0));
    }
    let mut d = fetch(cpu, selector)?;
    let s = cpu.state::<X86>();
    let (cpl, long) = (s.cpl, s.long());
    let rpl = u64::from(selector & 3);
    let level_fits = if d.is_conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
    let both = attr::L | attr::DB;
    if !d.is_code() || rpl < cpl || !level_fits || long && d.attributes() & both == both {
        return Err(gp(code));
    }
    if !d.present() {
        return Err(np(code));
    }
    set_accessed(cpu, &mut d)?;
    Ok(d)
}

/// Checks the SS that a return to privilege `level` goes to; `to64`: to 64-bit mode.
pub(crate) fn return_stack(
    cpu: &mut Cpu<'_>,
    selector: u16,
    level: u64,
    to64: bool,
) -> Result<SegmentRegister, Fault> {
    let code = selector_code(selector);
    if selector & !3 == 0 {
        if to64 && level < 3 && u64::from(selector & 3) == level {
            return Ok(SegmentRegister { selector: u64::from(selector), ..SegmentRegister::default() });
        }
        return Err(gp(0));
    }
    let Some(mut d) = lookup(cpu, selector)? else { return Err(gp(code)) };
    if u64::from(selector & 3) != level || d.dpl() != level || !d.is_writable() {
        return Err(gp(code));
    }
    if !d.present() {
        return Err(ss(code));
    }
    set_accessed(cpu, &mut d)?;
    Ok(d.register(selector))
}

/// True if `ip` lies in the segment of `target`.
pub(crate) fn inside(s: &X86, target: &Descriptor, ip: u64) -> bool {
    if s.long() && target.attributes() & attr::L != 0 { s.canonical(ip) } else { ip <= target.limit() }
}

fn iret_protected(cpu: &mut Cpu<'_>, size: u8) -> Result<u64, Fault> {
    let mut stack = Stack::current(cpu.state(), size);
    let ip = stack.pop(cpu)?;
    let cs = stack.pop(cpu)? as u16;
    let new = stack.pop(cpu)?;
    let s = cpu.state::<X86>();
    let (cpl, code64, long) = (s.cpl, s.code64(), s.long());
    if size == 4 && new & rflags::VM != 0 && cpl == 0 && !long {
        return iret_to_vm86(cpu, stack, ip, cs, new);
    }
    let target = return_target(cpu, cs)?;
    let level = u64::from(cs & 3);
    let to64 = long && target.attributes() & attr::L != 0;
    let mut mask = changeable(cpu.state(), size);
    if size > 2 && cpl == 0 {
        mask |= rflags::VIF | rflags::VIP;
    }
    if level > cpl || code64 {
        let sp = stack.pop(cpu)?;
        let ss_selector = stack.pop(cpu)? as u16;
        let new_ss = return_stack(cpu, ss_selector, level, to64)?;
        let s = cpu.state::<X86>();
        if !inside(s, &target, ip) {
            return Err(gp(0));
        }
        enter_code(s, &target, cs, level);
        s.seg[seg::SS] = new_ss;
        set_sp(s, sp, size);
        if level > cpl {
            drop_inner(s);
        }
    } else {
        let s = cpu.state::<X86>();
        if !inside(s, &target, ip) {
            return Err(gp(0));
        }
        enter_code(s, &target, cs, level);
        stack.commit(s);
    }
    let s = cpu.state::<X86>();
    set_flags(s, new, mask);
    Ok(s.pc_of(ip))
}

/// The stack pointer that a return popped.
pub(crate) fn set_sp(s: &mut X86, sp: u64, size: u8) {
    let big = s.seg[seg::SS].attributes & attr::DB != 0;
    s.gpr[RSP] = match (s.code64(), size) {
        (true, _) => sp,
        (false, _) if big => sp & 0xffff_ffff,
        _ => s.gpr[RSP] & !0xffff | sp & 0xffff,
    };
}

fn iret_to_vm86(cpu: &mut Cpu<'_>, mut stack: Stack, ip: u64, cs: u16, new: u64) -> Result<u64, Fault> {
    let sp = stack.pop(cpu)?;
    let mut selectors = [0; 5];
    for s in &mut selectors {
        *s = stack.pop(cpu)? as u16;
    }
    let s = cpu.state::<X86>();
    flags::write(s, new & 0x3f_7fd7);
    s.cpl = 3;
    let [ss, es, ds, fs, gs] = selectors;
    let all = [(seg::CS, cs), (seg::SS, ss), (seg::ES, es), (seg::DS, ds), (seg::FS, fs), (seg::GS, gs)];
    for (r, selector) in all {
        s.seg[r] = real(&s.seg[r], selector, true);
    }
    s.gpr[RSP] = sp & 0xffff_ffff;
    let pc = s.pc_of(ip & 0xffff);
    if s.virtual_if() && s.flags & (rflags::VIF | rflags::VIP) == rflags::VIF | rflags::VIP {
        // An interrupt is pending that the program takes: the fault is one of its first instruction.
        s.nmi_masked = 0;
        cpu.set_pc(pc);
        return Err(gp(0));
    }
    Ok(pc)
}
