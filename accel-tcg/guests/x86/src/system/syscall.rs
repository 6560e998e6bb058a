//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS (SDM volume 2; volume 3, section 5.8.7).

use holdfast_tcg_runtime::{Cpu, Fault};

use super::fault::{gp, ud};
use super::regs::{cr0, efer};
use crate::flags::{self, rflags};
use crate::state::{SegmentRegister, X86, seg};

const RCX: usize = 1;
const RDX: usize = 2;
const RSP: usize = 4;
const R11: usize = 11;

/// Attributes of a flat data segment, without DPL.
const DATA: u64 = 0xc093;
/// Of flat 32-bit code.
const CODE32: u64 = 0xc09b;
/// Of 64-bit code.
const CODE64: u64 = 0xa09b;

fn flat(selector: u64, attributes: u64, dpl: u64) -> SegmentRegister {
    SegmentRegister {
        base: 0,
        limit: 0xffff_ffff,
        selector: selector & 0xffff,
        attributes: attributes | dpl << 5,
    }
}

fn set_segments(s: &mut X86, cs: u64, ss: u64, code: u64, level: u64) {
    s.seg[seg::CS] = flat(cs, code, level);
    s.seg[seg::SS] = flat(ss, DATA, level);
    s.cpl = level;
}

/// SYSCALL, with `next` the IP behind it: the linear address to go on at.
///
/// # Errors
/// #UD
pub(crate) fn syscall(cpu: &mut Cpu<'_>, next: u64) -> Result<u64, Fault> {
    let s = cpu.state::<X86>();
    if s.efer & efer::SCE == 0 || !s.protected() {
        return Err(ud());
    }
    let selector = s.star >> 32 & 0xfffc;
    let flags = flags::read(s);
    let pc = if s.long() {
        let to = if s.code64() { s.lstar } else { s.cstar };
        s.gpr[RCX] = next;
        s.gpr[R11] = flags & !rflags::RF;
        flags::write(s, flags & !(s.fmask | rflags::RF));
        set_segments(s, selector, selector + 8, CODE64, 0);
        to
    } else {
        s.gpr[RCX] = next & 0xffff_ffff;
        flags::write(s, flags & !(rflags::IF | rflags::RF | rflags::VM));
        set_segments(s, selector, selector + 8, CODE32, 0);
        s.star & 0xffff_ffff
    };
    super::mode::changed(cpu);
    Ok(pc)
}

/// SYSRET with operands of `size` bytes.
///
/// # Errors
/// #UD, #GP
pub(crate) fn sysret(cpu: &mut Cpu<'_>, size: u8) -> Result<u64, Fault> {
    let s = cpu.state::<X86>();
    if s.efer & efer::SCE == 0 || !s.protected() {
        return Err(ud());
    }
    if s.cpl != 0 {
        return Err(gp(0));
    }
    let base = s.star >> 48;
    let rcx = s.gpr[RCX];
    let pc = if s.long() {
        if size == 8 && !s.canonical(rcx) {
            return Err(gp(0));
        }
        let new = s.gpr[R11] & 0x3c_7fd7;
        flags::write(s, new);
        if size == 8 {
            set_segments(s, (base + 16) | 3, (base + 8) | 3, CODE64, 3);
            rcx
        } else {
            set_segments(s, base | 3, (base + 8) | 3, CODE32, 3);
            rcx & 0xffff_ffff
        }
    } else {
        s.flags |= rflags::IF;
        set_segments(s, base | 3, (base + 8) | 3, CODE32, 3);
        rcx & 0xffff_ffff
    };
    super::mode::changed(cpu);
    Ok(pc)
}

/// SYSENTER
///
/// # Errors
/// #GP
pub(crate) fn sysenter(cpu: &mut Cpu<'_>) -> Result<u64, Fault> {
    let s = cpu.state::<X86>();
    let cs = s.sysenter[0] & 0xfffc;
    if s.cr0 & cr0::PE == 0 || cs == 0 {
        return Err(gp(0));
    }
    s.flags &= !(rflags::VM | rflags::IF | rflags::RF);
    let long = s.long();
    set_segments(s, cs, cs + 8, if long { CODE64 } else { CODE32 }, 0);
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    s.gpr[RSP] = s.sysenter[1] & mask;
    let pc = s.sysenter[2] & mask;
    super::mode::changed(cpu);
    Ok(pc)
}

/// SYSEXIT with operands of `size` bytes.
///
/// # Errors
/// #GP
pub(crate) fn sysexit(cpu: &mut Cpu<'_>, size: u8) -> Result<u64, Fault> {
    let s = cpu.state::<X86>();
    let base = s.sysenter[0] & 0xfffc;
    if s.cr0 & cr0::PE == 0 || s.cpl != 0 || base == 0 {
        return Err(gp(0));
    }
    let (rip, rsp) = (s.gpr[RDX], s.gpr[RCX]);
    if size == 8 && !(s.canonical(rip) && s.canonical(rsp)) {
        return Err(gp(0));
    }
    let mask = if size == 8 { u64::MAX } else { 0xffff_ffff };
    if size == 8 {
        set_segments(s, (base + 32) | 3, (base + 40) | 3, CODE64, 3);
    } else {
        set_segments(s, (base + 16) | 3, (base + 24) | 3, CODE32, 3);
    }
    s.gpr[RSP] = rsp & mask;
    super::mode::changed(cpu);
    Ok(rip & mask)
}

/// SWAPGS
///
/// # Errors
/// #UD, #GP
pub(crate) fn swapgs(cpu: &mut Cpu<'_>) -> Result<(), Fault> {
    let s = cpu.state::<X86>();
    if !s.code64() {
        return Err(ud());
    }
    if s.cpl != 0 {
        return Err(gp(0));
    }
    std::mem::swap(&mut s.seg[seg::GS].base, &mut s.kernel_gs_base);
    Ok(())
}
