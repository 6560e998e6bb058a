//! What translated code calls for system instructions.

use holdfast_clock::{HostRandom, RandomSource};
use holdfast_tcg_ir::env::exit;
use holdfast_tcg_ir::{Effects, HelperId, HelperTable, Type};
use holdfast_tcg_runtime::{Cpu, Fault, HelperResult, Leave, faulting_helper};

use super::deliver::{self, Source};
use super::far::{self, Target};
use super::fault::{gp, ud};
use super::mode::step;
use super::regs::{cr4, dr};
use super::{control, cpuid, events, hypercall, iret, monitor, mpx, msr, ports, segment, syscall, tsc};
use crate::flags::{self, rflags};
use crate::key::Key;
use crate::state::{X86, seg};

/// Reads and writes registers, faults, flushes, changes modes.
const ALL: Effects = Effects::ALL;
/// Touches no general register.
const SYSTEM: Effects = Effects::MAY_FLUSH;

macro_rules! helpers {
    ($($(#[$doc:meta])* $id:ident = $wrapper:ident($function:path): $ret:ident, $args:literal, $effects:expr;)*) => {
        /// The helpers' names in the IR.
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct Ids {
            $($(#[$doc])* pub $id: HelperId,)*
        }

        $(faulting_helper!($wrapper, $function);)*

        /// Adds the helpers to the table.
        pub(crate) fn register(t: &mut HelperTable) -> Ids {
            Ids { $($id: t.faulting(stringify!($id), $wrapper, Type::$ret, $args, $effects),)* }
        }
    };
}

helpers! {
    /// At the start of a region under TF, breakpoints or the interrupt shadow.
    begin = begin_helper(begin): Void, 0, SYSTEM;
    /// (number): value.
    read_cr = read_cr_helper(read_cr): I64, 1, SYSTEM;
    /// (number, value)
    write_cr = write_cr_helper(write_cr): Void, 2, SYSTEM;
    /// (number): value.
    read_dr = read_dr_helper(read_dr): I64, 1, SYSTEM;
    /// (number, value)
    write_dr = write_dr_helper(write_dr): Void, 2, SYSTEM;
    /// (value)
    lmsw = lmsw_helper(lmsw): Void, 1, SYSTEM;
    clts = clts_helper(clts): Void, 0, SYSTEM;
    /// (linear address)
    invlpg = invlpg_helper(invlpg): Void, 1, SYSTEM;
    /// (type, linear address of the descriptor, MMU index)
    invpcid = invpcid_helper(invpcid): Void, 3, SYSTEM;
    rdmsr = rdmsr_helper(rdmsr): Void, 0, ALL;
    wrmsr = wrmsr_helper(wrmsr): Void, 0, ALL;
    /// (whether it is RDTSCP)
    rdtsc = rdtsc_helper(rdtsc): Void, 1, ALL;
    rdpmc = rdpmc_helper(rdpmc): Void, 0, SYSTEM;
    cpuid = cpuid_helper(cpuid_insn): Void, 0, ALL;
    /// (segment register, selector)
    load_seg = load_seg_helper(load_seg): Void, 2, SYSTEM;
    /// (selector)
    lldt = lldt_helper(lldt): Void, 1, SYSTEM;
    /// (selector)
    ltr = ltr_helper(ltr): Void, 1, SYSTEM;
    /// (selector, old destination): new destination; sets ZF.
    lar = lar_helper(lar): I64, 2, SYSTEM;
    /// (selector, old destination): new destination; sets ZF.
    lsl = lsl_helper(lsl): I64, 2, SYSTEM;
    /// (selector, whether VERW); sets ZF.
    verify = verify_helper(verify): Void, 2, SYSTEM;
    /// (0 GDT, 1 IDT; linear address; size of the base; MMU index)
    load_table = load_table_helper(load_table): Void, 4, SYSTEM;
    /// (0 GDT, 1 IDT; linear address; size of the base; MMU index)
    store_table = store_table_helper(store_table): Void, 4, SYSTEM;
    /// (operand size): linear address to go on at.
    iret = iret_helper(iret_insn): I64, 1, ALL;
    /// (selector, offset, operand size, next IP): linear address.
    far_jump = far_jump_helper(far_jump): I64, 4, ALL;
    /// (selector, offset, operand size, next IP): linear address.
    far_call = far_call_helper(far_call): I64, 4, ALL;
    /// (operand size, bytes to drop): linear address.
    far_ret = far_ret_helper(far_ret): I64, 2, ALL;
    /// (vector, next IP, [`int`]): linear address.
    interrupt = interrupt_helper(interrupt): I64, 3, ALL;
    /// (next IP): linear address.
    syscall = syscall_helper(syscall_insn): I64, 1, ALL;
    /// (operand size): linear address.
    sysret = sysret_helper(sysret): I64, 1, ALL;
    sysenter = sysenter_helper(sysenter): I64, 0, ALL;
    /// (operand size): linear address.
    sysexit = sysexit_helper(sysexit): I64, 1, ALL;
    swapgs = swapgs_helper(swapgs): Void, 0, SYSTEM;
    /// (segment register): base.
    read_base = read_base_helper(read_base): I64, 1, SYSTEM;
    /// (segment register, base)
    write_base = write_base_helper(write_base): Void, 2, SYSTEM;
    /// (linear address behind it)
    hlt = hlt_helper(hlt): Void, 1, SYSTEM;
    /// (1 if another instruction of the region follows)
    sti = sti_helper(sti): Void, 2, SYSTEM;
    /// (value, operand size)
    popf = popf_helper(popf): Void, 3, SYSTEM;
    /// (port, size): value.
    port_in = port_in_helper(port_in): I64, 2, SYSTEM;
    /// (port, size, value)
    port_out = port_out_helper(port_out): Void, 3, SYSTEM;
    /// INS: see [`Strings`].
    ins = ins_helper(ins): Void, 1, ALL;
    /// OUTS: see [`Strings`].
    outs = outs_helper(outs): Void, 1, ALL;
    /// Random bits; sets CF.
    random = random_helper(random): I64, 0, SYSTEM;
    xgetbv = xgetbv_helper(xgetbv): Void, 0, ALL;
    xsetbv = xsetbv_helper(xsetbv): Void, 0, ALL;
    vmcall = vmcall_helper(vmcall): Void, 0, ALL;
    rdpkru = rdpkru_helper(rdpkru): Void, 0, ALL;
    wrpkru = wrpkru_helper(wrpkru): Void, 0, ALL;
    /// (1 for STAC)
    set_ac = set_ac_helper(set_ac): Void, 1, SYSTEM;
    /// The guest spins.
    pause = pause_helper(pause): Void, 0, Effects::empty();
    /// Has the instruction run alone.
    alone = alone_helper(alone): Void, 0, SYSTEM;
    /// See [`mpx::run`].
    mpx = mpx_helper(mpx::run): Void, 3, ALL;
    /// (RIP to go to): fails if it is not canonical.
    check_rip = check_rip_helper(check_rip): Void, 1, SYSTEM;
    /// (linear address, MMU index)
    monitor = monitor_helper(monitor::monitor): Void, 2, ALL;
    /// (linear address behind it)
    mwait = mwait_helper(monitor::mwait): Void, 1, ALL;
    /// Fails below privilege level 0.
    privileged = privileged_helper(privileged): Void, 0, SYSTEM;
}

/// CPUID: INVPCID.
const INVPCID: (u32, u32, usize, u32) = (7, 0, 1, 10);
const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RSI: usize = 6;
const RDI: usize = 7;

fn state<'a>(cpu: &'a mut Cpu<'_>) -> &'a mut X86 {
    cpu.state::<X86>()
}

/// EDX:EAX
fn edx_eax(s: &X86) -> u64 {
    s.gpr[RDX] << 32 | s.gpr[RAX] & 0xffff_ffff
}

fn set_edx_eax(s: &mut X86, value: u64) {
    s.gpr[RAX] = value & 0xffff_ffff;
    s.gpr[RDX] = value >> 32;
}

fn begin(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    events::begin(cpu)?;
    Ok(0)
}

fn read_cr(cpu: &mut Cpu<'_>, [n, ..]: [u64; 5]) -> HelperResult {
    Ok(control::read(cpu, n)?)
}

fn write_cr(cpu: &mut Cpu<'_>, [n, value, ..]: [u64; 5]) -> HelperResult {
    control::write(cpu, n, value)?;
    Ok(0)
}

fn read_dr(cpu: &mut Cpu<'_>, [n, ..]: [u64; 5]) -> HelperResult {
    Ok(control::read_dr(cpu, n)?)
}

fn write_dr(cpu: &mut Cpu<'_>, [n, value, ..]: [u64; 5]) -> HelperResult {
    control::write_dr(cpu, n, value)?;
    Ok(0)
}

fn lmsw(cpu: &mut Cpu<'_>, [value, ..]: [u64; 5]) -> HelperResult {
    control::lmsw(cpu, value)?;
    Ok(0)
}

fn clts(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    control::clts(cpu)?;
    Ok(0)
}

fn invlpg(cpu: &mut Cpu<'_>, [va, ..]: [u64; 5]) -> HelperResult {
    control::invlpg(cpu, va)?;
    Ok(0)
}

fn invpcid(cpu: &mut Cpu<'_>, [kind, at, idx, ..]: [u64; 5]) -> HelperResult {
    if !cpuid::has(state(cpu), INVPCID) {
        return Err(ud().into());
    }
    control::privileged(cpu)?;
    let low = cpu.load(at, 8, idx as u8)?;
    let high = cpu.load(at.wrapping_add(8), 8, idx as u8)?;
    control::invpcid(cpu, kind, low, high)?;
    Ok(0)
}

fn rdmsr(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    let number = state(cpu).gpr[RCX] as u32;
    let value = msr::read(cpu, number)?;
    set_edx_eax(state(cpu), value);
    Ok(0)
}

fn wrmsr(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    let s = state(cpu);
    let (number, value) = (s.gpr[RCX] as u32, edx_eax(s));
    msr::write(cpu, number, value)?;
    Ok(0)
}

fn rdtsc(cpu: &mut Cpu<'_>, [p, ..]: [u64; 5]) -> HelperResult {
    let value = tsc::read(cpu)?;
    let s = state(cpu);
    set_edx_eax(s, value);
    if p & 1 != 0 {
        s.gpr[RCX] = s.tsc_aux & 0xffff_ffff;
    }
    Ok(0)
}

/// There are no performance counters.
fn rdpmc(_: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    Err(gp(0).into())
}

fn cpuid_insn(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    cpuid::cpuid(cpu)?;
    Ok(0)
}

fn load_seg(cpu: &mut Cpu<'_>, [register, selector, ..]: [u64; 5]) -> HelperResult {
    let register = register as usize;
    segment::load(cpu, register, selector as u16)?;
    if register == seg::SS {
        state(cpu).shadow = 2;
    }
    super::mode::changed(cpu);
    Ok(0)
}

/// Protected mode, not virtual-8086 mode: where LLDT and the like are.
fn protected(cpu: &mut Cpu<'_>) -> Result<(), Fault> {
    if state(cpu).protected() { Ok(()) } else { Err(ud()) }
}

fn lldt(cpu: &mut Cpu<'_>, [selector, ..]: [u64; 5]) -> HelperResult {
    protected(cpu)?;
    control::privileged(cpu)?;
    segment::lldt(cpu, selector as u16)?;
    Ok(0)
}

fn ltr(cpu: &mut Cpu<'_>, [selector, ..]: [u64; 5]) -> HelperResult {
    protected(cpu)?;
    control::privileged(cpu)?;
    segment::ltr(cpu, selector as u16)?;
    Ok(0)
}

fn set_zf(cpu: &mut Cpu<'_>, on: bool) {
    let s = state(cpu);
    let old = flags::status(s) & !rflags::ZF;
    flags::set_status(s, old | if on { rflags::ZF } else { 0 });
}

fn lar(cpu: &mut Cpu<'_>, [selector, old, ..]: [u64; 5]) -> HelperResult {
    protected(cpu)?;
    let found = segment::lar(cpu, selector as u16)?;
    set_zf(cpu, found.is_some());
    Ok(found.unwrap_or(old))
}

fn lsl(cpu: &mut Cpu<'_>, [selector, old, ..]: [u64; 5]) -> HelperResult {
    protected(cpu)?;
    let found = segment::lsl(cpu, selector as u16)?;
    set_zf(cpu, found.is_some());
    Ok(found.unwrap_or(old))
}

fn verify(cpu: &mut Cpu<'_>, [selector, write, ..]: [u64; 5]) -> HelperResult {
    protected(cpu)?;
    let ok = segment::verify(cpu, selector as u16, write & 1 != 0)?;
    set_zf(cpu, ok);
    Ok(0)
}

fn load_table(cpu: &mut Cpu<'_>, [which, at, size, idx, _]: [u64; 5]) -> HelperResult {
    control::privileged(cpu)?;
    let limit = cpu.load(at, 2, idx as u8)?;
    let width = if size == 8 { 8 } else { 4 };
    let base = cpu.load(at.wrapping_add(2), width, idx as u8)?;
    let base = if size == 2 { base & 0xff_ffff } else { base };
    let s = state(cpu);
    if size == 8 && !s.canonical_base(base) {
        return Err(gp(0).into());
    }
    if which & 1 != 0 {
        s.idt = [base, limit]
    } else {
        s.gdt = [base, limit]
    }
    Ok(0)
}

fn store_table(cpu: &mut Cpu<'_>, [which, at, size, idx, _]: [u64; 5]) -> HelperResult {
    let s = state(cpu);
    let [base, limit] = if which & 1 != 0 { s.idt } else { s.gdt };
    let width = if size == 8 { 8 } else { 4 };
    cpu.store(at, 2, idx as u8, limit)?;
    cpu.store(at.wrapping_add(2), width, idx as u8, base)?;
    Ok(0)
}

fn iret_insn(cpu: &mut Cpu<'_>, [size, ..]: [u64; 5]) -> HelperResult {
    let pc = iret::iret(cpu, size as u8)?;
    // RF holds for one instruction, and only breakpoints ask for it: where there are none, none clears it.
    if !step(state(cpu)) {
        state(cpu).flags &= !rflags::RF;
    }
    control::interrupts_enabled(cpu);
    if state(cpu).nmi_pending != 0 {
        cpu.request_exit();
    }
    Ok(pc)
}

fn target([selector, offset, size, ..]: [u64; 5]) -> Target {
    Target { selector: selector as u16, offset, size: size as u8 }
}

fn far_jump(cpu: &mut Cpu<'_>, args: [u64; 5]) -> HelperResult {
    Ok(far::jump(cpu, target(args), args[3])?)
}

fn far_call(cpu: &mut Cpu<'_>, args: [u64; 5]) -> HelperResult {
    Ok(far::call(cpu, target(args), args[3])?)
}

fn far_ret(cpu: &mut Cpu<'_>, [size, extra, ..]: [u64; 5]) -> HelperResult {
    Ok(far::ret(cpu, size as u8, extra)?)
}

/// Which instruction a software interrupt is of.
pub(crate) mod int {
    /// INT3, INTO.
    pub const TRAP: u64 = 0;
    /// INT1.
    pub const INT1: u64 = 1;
    /// INT n.
    pub const NUMBER: u64 = 2;
}

fn interrupt(cpu: &mut Cpu<'_>, [vector, next, kind, ..]: [u64; 5]) -> HelperResult {
    let source = match kind {
        int::INT1 => {
            // INT1 is a debug exception itself: what is pending behind MOV SS, and the step over it, are lost.
            state(cpu).debug_pending = 0;
            Source::External
        }
        int::NUMBER => Source::Number,
        _ => Source::Software,
    };
    deliver::software(cpu, vector as u8, next, source)?;
    super::mode::changed(cpu);
    Ok(cpu.pc())
}

fn syscall_insn(cpu: &mut Cpu<'_>, [next, ..]: [u64; 5]) -> HelperResult {
    let pc = syscall::syscall(cpu, next)?;
    step_behind(cpu);
    Ok(pc)
}

fn sysret(cpu: &mut Cpu<'_>, [size, ..]: [u64; 5]) -> HelperResult {
    let pc = syscall::sysret(cpu, size as u8)?;
    step_behind(cpu);
    control::interrupts_enabled(cpu);
    Ok(pc)
}

/// SYSCALL and SYSRET trap for TF as it is behind them, not before.
fn step_behind(cpu: &mut Cpu<'_>) {
    let s = state(cpu);
    s.debug_pending &= !dr::DR6_BS;
    if s.flags & rflags::TF != 0 {
        s.debug_pending |= dr::DR6_BS;
        cpu.request_exit();
    }
}

fn sysenter(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    Ok(syscall::sysenter(cpu)?)
}

fn sysexit(cpu: &mut Cpu<'_>, [size, ..]: [u64; 5]) -> HelperResult {
    Ok(syscall::sysexit(cpu, size as u8)?)
}

fn swapgs(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    syscall::swapgs(cpu)?;
    Ok(0)
}

fn base_register<'a>(cpu: &'a mut Cpu<'_>, register: u64) -> Result<&'a mut u64, Fault> {
    let s = state(cpu);
    if s.cr4 & cr4::FSGSBASE == 0 {
        return Err(ud());
    }
    s.seg.get_mut(register as usize).map(|r| &mut r.base).ok_or_else(ud)
}

fn read_base(cpu: &mut Cpu<'_>, [register, ..]: [u64; 5]) -> HelperResult {
    Ok(*base_register(cpu, register)?)
}

fn write_base(cpu: &mut Cpu<'_>, [register, base, ..]: [u64; 5]) -> HelperResult {
    let canonical = state(cpu).canonical(base);
    let place = base_register(cpu, register)?;
    if !canonical {
        return Err(gp(0).into());
    }
    *place = base;
    Ok(0)
}

fn hlt(cpu: &mut Cpu<'_>, [next, ..]: [u64; 5]) -> HelperResult {
    control::privileged(cpu)?;
    cpu.set_pc(next);
    // An instruction that single-steps HLT traps behind it.
    if state(cpu).debug_pending != 0 {
        return Err(Leave::Exit(exit::RESUME));
    }
    cpu.set_halted(true);
    Err(Leave::Exit(exit::HALT))
}

/// STI takes effect behind the next instruction.
fn sti(cpu: &mut Cpu<'_>, [followed, next, ..]: [u64; 5]) -> HelperResult {
    let s = state(cpu);
    let was = s.flags & rflags::IF != 0;
    s.flags |= rflags::IF;
    if !was {
        if followed & 1 == 0 {
            s.shadow = 1;
            super::mode::changed(cpu);
        }
        if events::deliverable(cpu) {
            // What waits comes behind the next instruction, whatever that does to IF.
            state(cpu).shadow = 1;
            return leave(cpu, next);
        }
    }
    Ok(0)
}

/// Goes on at `next` once the events that wait were looked at.
fn leave(cpu: &mut Cpu<'_>, next: u64) -> HelperResult {
    cpu.set_pc(next);
    super::mode::changed(cpu);
    cpu.request_exit();
    Err(Leave::Exit(exit::RESUME))
}

fn popf(cpu: &mut Cpu<'_>, [value, size, next, ..]: [u64; 5]) -> HelperResult {
    let s = state(cpu);
    if s.vm86() && s.iopl() < 3 {
        // Translated code has made sure that this can be had.
        iret::set_virtual_flags(s, value);
        return Ok(0);
    }
    let mut mask = iret::changeable(s, size as u8) & !rflags::RF;
    if s.vm86() {
        mask = mask & !rflags::IOPL | rflags::IF;
    }
    let old = flags::read(s);
    let cleared = if size > 2 { rflags::RF } else { 0 };
    flags::write(s, old & !(mask | cleared) | value & mask);
    if (old ^ flags::read(s)) & !(rflags::STATUS | rflags::IF | rflags::DF) != 0 {
        super::mode::changed(cpu);
    }
    if events::deliverable(cpu) {
        return leave(cpu, next);
    }
    Ok(0)
}

fn port_in(cpu: &mut Cpu<'_>, [port, size, ..]: [u64; 5]) -> HelperResult {
    Ok(ports::read(cpu, port as u16, size as u8)?)
}

fn port_out(cpu: &mut Cpu<'_>, [port, size, value, ..]: [u64; 5]) -> HelperResult {
    ports::write(cpu, port as u16, size as u8, value)?;
    Ok(0)
}

/// INS or OUTS, packed in one argument.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strings {
    /// Bytes of an item.
    pub size: u8,
    /// Bytes of an address: 2, 4, 8.
    pub address: u8,
    /// Segment of OUTS.
    pub segment: u8,
    /// REP.
    pub repeat: bool,
    /// MMU index.
    pub idx: u8,
}

impl Strings {
    /// Into one argument.
    pub fn pack(self) -> i64 {
        i64::from(self.size)
            | i64::from(self.address) << 8
            | i64::from(self.segment) << 16
            | i64::from(self.repeat) << 24
            | i64::from(self.idx) << 32
    }

    fn unpack(v: u64) -> Self {
        Self {
            size: v as u8,
            address: (v >> 8) as u8,
            segment: (v >> 16) as u8,
            repeat: v >> 24 & 1 != 0,
            idx: (v >> 32) as u8,
        }
    }

    fn mask(self) -> u64 {
        match self.address {
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        }
    }

    fn count(self, s: &X86) -> u64 {
        if self.repeat { s.gpr[RCX] & self.mask() } else { 1 }
    }

    fn put(self, register: &mut u64, value: u64) {
        *register = match self.address {
            2 => *register & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// Linear address of the item that `register` points to.
    fn linear(self, s: &X86, register: usize, segment: usize) -> u64 {
        let offset = s.gpr[register] & self.mask();
        let base = s.seg.get(segment).map_or(0, |r| r.base);
        let base = if s.code64() && !matches!(segment, seg::FS | seg::GS) { 0 } else { base };
        let va = base.wrapping_add(offset);
        if s.code64() { va } else { va & 0xffff_ffff }
    }

    /// Goes on to the next item.
    fn step(self, s: &mut X86, register: usize) {
        let size = u64::from(self.size);
        let by = if s.flags & rflags::DF != 0 { size.wrapping_neg() } else { size };
        let next = s.gpr[register].wrapping_add(by);
        self.put(&mut s.gpr[register], next);
        if self.repeat {
            let left = s.gpr[RCX].wrapping_sub(1);
            self.put(&mut s.gpr[RCX], left);
        }
    }
}

/// Items of a repeated port instruction before the vCPU looks for interrupts again.
const ITEMS: u64 = 1024;

fn strings(
    cpu: &mut Cpu<'_>,
    packed: u64,
    register: usize,
    mut item: impl FnMut(&mut Cpu<'_>, u64, u16, Strings) -> Result<(), Fault>,
) -> HelperResult {
    let how = Strings::unpack(packed);
    let segment = if register == RDI { seg::ES } else { usize::from(how.segment) };
    for _ in 0..ITEMS {
        let s = state(cpu);
        if how.count(s) == 0 {
            return Ok(0);
        }
        let (at, port) = (how.linear(s, register, segment), s.gpr[RDX] as u16);
        ports::allowed(cpu, port, how.size)?;
        item(cpu, at, port, how)?;
        how.step(state(cpu), register);
        if !how.repeat {
            return Ok(0);
        }
    }
    if how.count(state(cpu)) == 0 { Ok(0) } else { Err(Leave::Exit(exit::RESUME)) }
}

fn ins(cpu: &mut Cpu<'_>, [packed, ..]: [u64; 5]) -> HelperResult {
    strings(cpu, packed, RDI, |cpu, at, port, how| {
        // What is read from a device is gone: the memory has to be writable before.
        cpu.host_range(at, 1, holdfast_tcg_runtime::AccessKind::Write, how.idx)?;
        let value = ports::read(cpu, port, how.size)?;
        cpu.store(at, how.size, how.idx, value)
    })
}

fn outs(cpu: &mut Cpu<'_>, [packed, ..]: [u64; 5]) -> HelperResult {
    strings(cpu, packed, RSI, |cpu, at, port, how| {
        let value = cpu.load(at, how.size, how.idx)?;
        ports::write(cpu, port, how.size, value)
    })
}

/// RDRAND and RDSEED.
fn random(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    let mut bytes = [0; 8];
    let there = HostRandom.fill(&mut bytes).is_ok();
    flags::set_status(state(cpu), if there { rflags::CF } else { 0 });
    Ok(u64::from_le_bytes(bytes))
}

fn xgetbv(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    let register = state(cpu).gpr[RCX];
    let value = control::xgetbv(cpu, register)?;
    set_edx_eax(state(cpu), value);
    Ok(0)
}

fn xsetbv(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    let s = state(cpu);
    let (register, value) = (s.gpr[RCX], edx_eax(s));
    control::xsetbv(cpu, register, value)?;
    Ok(0)
}

fn pkru_usable(cpu: &mut Cpu<'_>) -> Result<(), Fault> {
    let s = state(cpu);
    if s.cr4 & cr4::PKE == 0 {
        return Err(ud());
    }
    if s.gpr[RCX] & 0xffff_ffff != 0 { Err(gp(0)) } else { Ok(()) }
}

fn vmcall(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    hypercall::call(cpu);
    Ok(0)
}

fn rdpkru(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    pkru_usable(cpu)?;
    let s = state(cpu);
    let value = s.pkru;
    set_edx_eax(s, value);
    Ok(0)
}

fn wrpkru(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    pkru_usable(cpu)?;
    let s = state(cpu);
    if s.gpr[RDX] & 0xffff_ffff != 0 {
        return Err(gp(0).into());
    }
    let value = s.gpr[RAX] as u32;
    control::set_pkru(cpu, value);
    Ok(0)
}

fn set_ac(cpu: &mut Cpu<'_>, [on, ..]: [u64; 5]) -> HelperResult {
    let s = state(cpu);
    if s.cpl != 0 || s.cr4_bits & cr4::SMAP == 0 {
        return Err(ud().into());
    }
    let before = s.data_idx();
    s.flags = s.flags & !rflags::AC | if on & 1 != 0 { rflags::AC } else { 0 };
    // Kernels do this around each access to user memory, and at CPL 0 nothing else of the mode depends on AC.
    let changed = Key::of_mmu_idx(before ^ s.data_idx());
    cpu.change_mode(changed.bits());
    Ok(0)
}

fn alone(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    cpu.run_alone();
    Err(Leave::Exit(exit::POLL))
}

fn check_rip(cpu: &mut Cpu<'_>, [rip, ..]: [u64; 5]) -> HelperResult {
    if state(cpu).canonical(rip) { Ok(0) } else { Err(gp(0).into()) }
}

fn privileged(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    control::privileged(cpu)?;
    Ok(0)
}

fn pause(cpu: &mut Cpu<'_>, _: [u64; 5]) -> HelperResult {
    cpu.spins();
    Ok(0)
}
