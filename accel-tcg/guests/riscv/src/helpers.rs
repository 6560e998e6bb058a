//! What translated code calls: system instructions, CSRs, and faults that are known at translation time.

use holdfast_tcg_ir::{Effects, HelperId, HelperTable, Type};
use holdfast_tcg_runtime::{Cpu, Fault, Flush, HelperResult, faulting_helper, plain_helper};

use crate::csr::{self, Change, Context, Effect};
use crate::hart::{Hart, mstatus, privilege};
use crate::key::{self, space};
use crate::trap::{self, cause};
use crate::{fcsr, timer};

/// The helpers' names in the IR.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ids {
    /// (cause, tval): raises an exception.
    pub raise: HelperId,
    /// (csr, kind, operand, instruction): old value. Kinds are of [`kind`].
    pub csr: HelperId,
    /// The same for `fflags`, `frm`, `fcsr`.
    pub csr_fp: HelperId,
    /// `sstatus`: (bits to clear, bits to set).
    pub sstatus: HelperId,
    /// Reads a CSR: (csr, instruction).
    pub csr_read: HelperId,
    /// (instruction): the pc to go on at.
    pub mret: HelperId,
    /// (instruction): the pc to go on at.
    pub sret: HelperId,
    /// (instruction)
    pub wfi: HelperId,
    /// (address, asid, which of them count, instruction)
    pub sfence_vma: HelperId,
    /// The hart spins.
    pub pause: HelperId,
}

/// How a CSR instruction changes its CSR.
pub(crate) mod kind {
    pub const NONE: u64 = 0;
    pub const WRITE: u64 = 1;
    pub const SET: u64 = 2;
    pub const CLEAR: u64 = 3;
}

/// Builds the table.
pub(crate) fn table() -> (HelperTable, Ids) {
    let mut t = HelperTable::new();
    let system = Effects::MAY_FLUSH;
    let ids = Ids {
        raise: t.faulting("raise", raise_helper, Type::Void, 2, Effects::empty()),
        csr: t.faulting("csr", csr_helper, Type::I64, 4, system),
        csr_fp: t.faulting("csr_fp", csr_fp_helper, Type::I64, 4, system | Effects::USES_FP),
        sstatus: t.plain("sstatus", sstatus_helper, Type::Void, 2, system),
        csr_read: t.faulting("csr_read", csr_read_helper, Type::I64, 2, Effects::empty()),
        mret: t.faulting("mret", mret_helper, Type::I64, 1, system),
        sret: t.faulting("sret", sret_helper, Type::I64, 1, system),
        wfi: t.faulting("wfi", wfi_helper, Type::Void, 1, system),
        sfence_vma: t.faulting("sfence_vma", sfence_vma_helper, Type::Void, 4, system),
        pause: t.plain("pause", pause_helper, Type::Void, 0, Effects::empty()),
    };
    (t, ids)
}

faulting_helper!(raise_helper, raise);
faulting_helper!(csr_helper, csr_change);
faulting_helper!(csr_fp_helper, csr_change);
plain_helper!(sstatus_helper, sstatus_change);
faulting_helper!(csr_read_helper, csr_read);
faulting_helper!(mret_helper, mret);
faulting_helper!(sret_helper, sret);
plain_helper!(pause_helper, pause);
faulting_helper!(wfi_helper, wfi);
faulting_helper!(sfence_vma_helper, sfence_vma);

fn illegal(insn: u64) -> Fault {
    Fault { cause: cause::ILLEGAL, value: insn & 0xffff_ffff, aux: 0 }
}

fn raise(_: &mut Cpu<'_>, [cause, value, ..]: [u64; 5]) -> HelperResult {
    Err(Fault { cause, value, aux: 0 }.into())
}

pub(crate) fn context(cpu: &mut Cpu<'_>) -> Context {
    Context { now: cpu.now(), pins: cpu.pins(), fflags: fcsr::fflags(cpu.mxcsr()) }
}

/// The context of an access to one CSR: the clock is read if it depends on it.
fn context_of(cpu: &mut Cpu<'_>, number: u32) -> Context {
    let now = if csr::depends_on_time(number) { timer::now(cpu) } else { 0 };
    Context { now, pins: cpu.pins(), fflags: fcsr::fflags(cpu.mxcsr()) }
}

/// Does what a CSR write asks of the rest of the vCPU.
pub(crate) fn apply(cpu: &mut Cpu<'_>, cx: &Context, effect: Effect) {
    if effect.contains(Effect::FP) {
        let frm = cpu.state::<Hart>().frm;
        cpu.set_mxcsr(fcsr::to_mxcsr(frm, cx.fflags));
    }
    if effect.contains(Effect::TIMER) {
        timer::arm(cpu);
    }
    apply_status(cpu, effect);
}

/// What a write of `sstatus` may ask for.
fn apply_status(cpu: &mut Cpu<'_>, effect: Effect) {
    if effect.contains(Effect::FLUSH) {
        cpu.flush(Flush::All);
    }
    if effect.contains(Effect::MODE) {
        mode_changed(cpu);
    }
    if effect.contains(Effect::INTERRUPT) {
        look_for_interrupts(cpu);
    }
}

fn mode_changed(cpu: &mut Cpu<'_>) {
    let mode = key::mode(cpu.state());
    cpu.set_mode(mode);
}

/// Leaves translated code soon if there is an interrupt to take now.
fn look_for_interrupts(cpu: &mut Cpu<'_>) {
    let pending = timer::pending_lately(cpu);
    if trap::next_interrupt(cpu.state(), pending).is_some() {
        cpu.request_exit();
    }
}

fn csr_change(cpu: &mut Cpu<'_>, [number, kind, operand, insn, _]: [u64; 5]) -> HelperResult {
    let change = match kind {
        kind::WRITE => Change::Write(operand),
        kind::SET => Change::Set(operand),
        kind::CLEAR => Change::Clear(operand),
        _ => Change::None,
    };
    let mut cx = context_of(cpu, number as u32);
    let (old, effect) =
        csr::access(cpu.state(), &mut cx, number as u32, change).map_err(|_| illegal(insn))?;
    apply(cpu, &cx, effect);
    Ok(old)
}

/// What kernels do around each access to user memory (SUM) and each lock (SIE).
fn sstatus_change(cpu: &mut Cpu<'_>, [clear, set, ..]: [u64; 5]) -> u64 {
    let hart = cpu.state::<Hart>();
    let old = hart.mstatus;
    let effect = csr::change_sstatus(hart, clear, set);
    if old ^ hart.mstatus == mstatus::SUM && hart.privilege == privilege::S {
        cpu.change_mode(key::SUM);
    } else if !effect.is_empty() {
        apply_status(cpu, effect);
    }
    0
}

fn csr_read(cpu: &mut Cpu<'_>, [number, insn, ..]: [u64; 5]) -> HelperResult {
    let mut cx = context_of(cpu, number as u32);
    let read = csr::access(cpu.state(), &mut cx, number as u32, Change::None);
    Ok(read.map_err(|_| illegal(insn))?.0)
}

fn mret(cpu: &mut Cpu<'_>, [insn, ..]: [u64; 5]) -> HelperResult {
    let hart = cpu.state::<Hart>();
    if hart.privilege != privilege::M {
        return Err(illegal(insn).into());
    }
    let pc = trap::mret(hart);
    mode_changed(cpu);
    look_for_interrupts(cpu);
    Ok(pc)
}

fn sret(cpu: &mut Cpu<'_>, [insn, ..]: [u64; 5]) -> HelperResult {
    let hart = cpu.state::<Hart>();
    let trapped = hart.privilege == privilege::S && hart.mstatus & mstatus::TSR != 0;
    if hart.privilege == privilege::U || trapped {
        return Err(illegal(insn).into());
    }
    let pc = trap::sret(hart);
    mode_changed(cpu);
    look_for_interrupts(cpu);
    Ok(pc)
}

/// `pause` (Zihintpause): a hint that Linux uses in every spin loop, whether the extension is named or not.
fn pause(cpu: &mut Cpu<'_>, _: [u64; 5]) -> u64 {
    cpu.spins();
    0
}

fn wfi(cpu: &mut Cpu<'_>, [insn, ..]: [u64; 5]) -> HelperResult {
    if !trap::wfi_allowed(cpu.state()) {
        return Err(illegal(insn).into());
    }
    let pending = timer::pending(cpu);
    if !trap::wakes(cpu.state(), pending) {
        cpu.set_halted(true);
    }
    Ok(0)
}

fn sfence_vma(cpu: &mut Cpu<'_>, [gva, asid, counts, insn, _]: [u64; 5]) -> HelperResult {
    let hart = cpu.state::<Hart>();
    let trapped = hart.privilege == privilege::S && hart.mstatus & mstatus::TVM != 0;
    if hart.privilege == privilege::U || trapped {
        return Err(illegal(insn).into());
    }
    // The address space is named by MODE and ASID, so one of another MODE is not touched: it cannot be
    // reached before `satp` is written with that MODE, after which software has to fence again.
    let target = space(hart.satp) & !0xffff | asid & 0xffff;
    cpu.flush(match counts & 3 {
        0 => Flush::All,
        1 => Flush::Page(gva),
        2 => Flush::Space(target),
        _ => Flush::PageInSpace(gva, target),
    });
    Ok(0)
}
