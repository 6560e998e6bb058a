//! The processor's state to and from [`State`], which every accelerator has.

use std::collections::BTreeMap;
use std::fmt::Write;

use holdfast_arch::x86_64::{CpuidEntry, Events, MpState, Segment, State, Table, cpuid as tables};
use holdfast_tcg_runtime::{Cpu, Flush};

use super::events::mp;
use super::mode::attr;
use super::regs::{cr4, efer, msr};
use super::{mmu, msr as registers, tsc, xsave};
use crate::apic::{self, ApicState};
use crate::flags;
use crate::state::{CpuidLeaf, MC_BANKS, SegmentRegister, X86};

/// MSRs that go into a state, apart from the APIC's and the TSC.
const MSRS: [u32; 20] = [
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::FMASK,
    msr::KERNEL_GS_BASE,
    msr::FS_BASE,
    msr::GS_BASE,
    msr::TSC_AUX,
    msr::PAT,
    msr::MISC_ENABLE,
    msr::SPEC_CTRL,
    msr::FEATURE_CONTROL,
    msr::MTRR_DEF_TYPE,
    msr::XSS,
    msr::PKRS,
    msr::BNDCFGS,
    msr::TSC_ADJUST,
];

/// MTRRs and machine-check banks.
fn mtrrs() -> impl Iterator<Item = u32> {
    let banks = msr::MC0_CTL..msr::MC0_CTL + 4 * MC_BANKS as u32;
    (0x200..0x210).chain([msr::MTRR_FIX64K, 0x258, 0x259]).chain(0x268..0x270).chain(banks)
}

fn segment(s: &SegmentRegister) -> Segment {
    Segment {
        selector: s.selector as u16,
        base: s.base,
        limit: s.limit as u32,
        attributes: s.attributes as u16,
        unusable: s.attributes & attr::P == 0,
    }
}

fn register(s: &Segment) -> SegmentRegister {
    let attributes = if s.unusable { 0 } else { u64::from(s.attributes & 0xf0ff) };
    SegmentRegister { base: s.base, limit: u64::from(s.limit), selector: u64::from(s.selector), attributes }
}

fn table(t: [u64; 2]) -> Table {
    Table { base: t[0], limit: t[1] as u16 }
}

/// A leaf in the common form.
fn shown(leaf: &CpuidLeaf) -> CpuidEntry {
    let CpuidLeaf { function, index, indexed, regs, .. } = *leaf;
    CpuidEntry { function, index, indexed: indexed != 0, regs }
}

/// The state.
pub(crate) fn export(cpu: &mut Cpu<'_>) -> State {
    let (pc, halted) = (cpu.pc(), cpu.halted());
    let apic = apic::of(cpu).map(|a| a.save()).unwrap_or_default();
    let cr8 = apic::of(cpu).map_or(0, |a| a.cr8());
    let mut msrs: BTreeMap<u32, u64> =
        MSRS.into_iter().chain(mtrrs()).filter_map(|n| Some((n, registers::get(cpu, n)?))).collect();
    msrs.insert(msr::TSC, tsc::now(cpu));
    msrs.insert(msr::TSC_DEADLINE, apic.tsc_deadline);
    let xsave = xsave::export(cpu);
    let s = cpu.state::<X86>();
    let events = Events {
        nmi_pending: s.nmi_pending != 0,
        nmi_masked: s.nmi_masked != 0,
        shadow: s.shadow as u8,
        ..Events::default()
    };
    State {
        gpr: s.gpr,
        rip: s.ip_of(pc),
        rflags: flags::read(s),
        segments: s.seg.each_ref().map(segment),
        tr: segment(&s.tr),
        ldt: segment(&s.ldt),
        gdt: table(s.gdt),
        idt: table(s.idt),
        cr: [s.cr0, s.cr2, s.cr3, s.cr4, u64::from(cr8)],
        efer: s.efer,
        apic_base: apic.base,
        dr: s.dr,
        xcr0: s.xcr0,
        xsave,
        msrs,
        lapic: apic.registers,
        events,
        mp_state: match s.mp_state {
            mp::UNINITIALIZED => MpState::Uninitialized,
            mp::INIT_RECEIVED => MpState::InitReceived,
            // MWAIT may end at any time.
            _ if halted && s.mwait == 0 => MpState::Halted,
            _ => MpState::Runnable,
        },
        tsc_khz: s.tsc_khz as u32,
        cpuid: s.cpuid.iter().take(s.cpuid_count as usize).map(shown).collect(),
    }
}

/// What of a KVM's paravirtual features a guest can have switched on by an MSR's bit 0 (Linux,
/// Documentation/virt/kvm/x86/msr.rst).
const PARAVIRTUAL: [(u32, &str); 5] = [
    (0x12, "clock"),
    (0x4b56_4d01, "clock"),
    (0x4b56_4d02, "asynchronous page faults"),
    (0x4b56_4d03, "steal time"),
    (0x4b56_4d04, "end of interrupt"),
];

fn check(s: &X86, state: &State) -> Result<(), String> {
    let used = PARAVIRTUAL.iter().find(|(n, _)| state.msrs.get(n).is_some_and(|v| v & 1 != 0));
    if let Some((number, what)) = used {
        return Err(format!(
            "the guest uses KVM's paravirtual {what} (MSR {number:#x}), which translation does not have; boot Linux with \
             `nopv` to be able to move it"
        ));
    }
    let [_, _, _, new_cr4, _] = state.cr;
    if new_cr4 & !s.cr4_bits != 0 {
        return Err(format!("CR4 bits {:#x} that this processor has not", new_cr4 & !s.cr4_bits));
    }
    let lacking = state.efer & !(s.efer_bits | efer::LMA);
    if lacking != 0 {
        return Err(format!("EFER bits {lacking:#x} that this processor has not"));
    }
    if state.xcr0 & !s.xcr0_bits != 0 {
        return Err(format!("XCR0 bits {:#x} that this processor has not", state.xcr0 & !s.xcr0_bits));
    }
    let ours: Vec<_> = s.cpuid.iter().take(s.cpuid_count as usize).map(shown).collect();
    tables::same_xsave_layout(&state.cpuid, &ours, state.xcr0).map_err(|e| e.to_string())
}

/// Replaces the state.
///
/// # Errors
/// A text that says what does not fit.
pub(crate) fn import(cpu: &mut Cpu<'_>, state: &State) -> Result<(), String> {
    check(cpu.state(), state)?;
    xsave::import(cpu, &state.xsave)?;
    let phys = cpu.phys();
    let s = cpu.state::<X86>();
    s.gpr = state.gpr;
    flags::write(s, state.rflags);
    for (to, from) in s.seg.iter_mut().zip(&state.segments) {
        *to = register(from);
    }
    s.tr = register(&state.tr);
    s.ldt = register(&state.ldt);
    s.gdt = [state.gdt.base, u64::from(state.gdt.limit)];
    s.idt = [state.idt.base, u64::from(state.idt.limit)];
    let [cr0, cr2, cr3, new_cr4, cr8] = state.cr;
    (s.cr0, s.cr2, s.cr3, s.cr4, s.efer) = (cr0, cr2, cr3, new_cr4, state.efer);
    s.xcr0 = state.xcr0 | 1;
    s.dr = state.dr;
    // CPL is SS.DPL wherever SS is usable (SDM volume 3, section 25.4.1).
    let ss = &state.segments[2];
    s.cpl = match (s.protected(), s.vm86()) {
        (_, true) => 3,
        (false, _) => 0,
        _ if ss.unusable => u64::from(ss.selector & 3),
        _ => u64::from(ss.attributes >> 5 & 3),
    };
    if s.cr4 & cr4::PAE != 0 && !s.long() {
        s.pdpte = mmu::load_pdptes(s, &phys, cr3).unwrap_or_default();
    }
    s.shadow = u64::from(state.events.shadow & 3);
    s.nmi_pending = u64::from(state.events.nmi_pending);
    s.nmi_masked = u64::from(state.events.nmi_masked);
    s.debug_pending = 0;
    (s.monitor, s.mwait) = (0, 0);
    s.tsc_khz = if state.tsc_khz == 0 { tsc::KHZ } else { u64::from(state.tsc_khz) };
    s.mp_state = match state.mp_state {
        MpState::Runnable => mp::RUNNABLE,
        MpState::Uninitialized => mp::UNINITIALIZED,
        MpState::InitReceived => mp::INIT_RECEIVED,
        MpState::Halted => mp::HALTED,
    };
    let pc = s.pc_of(state.rip);
    cpu.set_pc(pc);
    cpu.set_halted(state.mp_state != MpState::Runnable);
    import_msrs(cpu, state);
    import_apic(cpu, state, cr8)?;
    resume_delivery(cpu, state);
    cpu.flush(Flush::All);
    super::mode::changed(cpu);
    cpu.request_exit();
    Ok(())
}

/// MSRs; those that are not there are the other accelerator's own.
fn import_msrs(cpu: &mut Cpu<'_>, state: &State) {
    if let Some(value) = state.msrs.get(&msr::TSC) {
        tsc::set(cpu, *value);
    }
    if let Some(value) = state.msrs.get(&msr::TSC_ADJUST) {
        cpu.state::<X86>().tsc_adjust = *value;
    }
    for (&number, &value) in &state.msrs {
        if (MSRS.contains(&number) || mtrrs().any(|n| n == number)) && number != msr::TSC_ADJUST {
            // FS and GS bases are in the segments too, and are the same.
            registers::set(cpu, number, value);
        }
    }
}

fn import_apic(cpu: &mut Cpu<'_>, state: &State, cr8: u64) -> Result<(), String> {
    let Some(apic) = apic::of(cpu) else { return Ok(()) };
    let tsc_deadline = state.msrs.get(&msr::TSC_DEADLINE).copied().unwrap_or(0);
    if !state.lapic.is_empty() {
        let at = tsc::when(cpu, tsc_deadline);
        let all = ApicState { base: state.apic_base, registers: state.lapic.clone(), tsc_deadline };
        apic.load(&all, at)?;
    }
    apic.set_cr8((cr8 & 15) as u8);
    Ok(())
}

/// Delivers what the other accelerator was about to.
fn resume_delivery(cpu: &mut Cpu<'_>, state: &State) {
    if let Some((vector, code)) = state.events.exception {
        let fault = match code {
            Some(code) => super::fault::coded(vector, code),
            None => super::fault::plain(vector),
        };
        let fault = holdfast_tcg_runtime::Fault { value: state.cr[1], ..fault };
        super::deliver::raise(cpu, &fault);
    } else if let Some((vector, false)) = state.events.interrupt {
        super::deliver::interrupt(cpu, vector);
    }
}

/// Register dump.
pub(crate) fn describe(state: &State) -> String {
    const NAMES: [&str; 16] = [
        "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
        "R14", "R15",
    ];
    let mut out = String::new();
    for (n, (name, value)) in NAMES.iter().zip(state.gpr).enumerate() {
        let _ = write!(out, "{name:<3}={value:016x}{}", if n % 4 == 3 { '\n' } else { ' ' });
    }
    let _ = writeln!(out, "RIP={:016x} RFL={:08x} EFER={:x}", state.rip, state.rflags, state.efer);
    for (name, s) in ["ES", "CS", "SS", "DS", "FS", "GS"].iter().zip(&state.segments) {
        let _ =
            writeln!(out, "{name} ={:04x} {:016x} {:08x} {:04x}", s.selector, s.base, s.limit, s.attributes);
    }
    for (name, s) in [("LDT", &state.ldt), ("TR ", &state.tr)] {
        let _ =
            writeln!(out, "{name}={:04x} {:016x} {:08x} {:04x}", s.selector, s.base, s.limit, s.attributes);
    }
    let _ = writeln!(
        out,
        "GDT={:016x} {:04x} IDT={:016x} {:04x}",
        state.gdt.base, state.gdt.limit, state.idt.base, state.idt.limit
    );
    let [cr0, cr2, cr3, cr4, cr8] = state.cr;
    let _ = writeln!(out, "CR0={cr0:08x} CR2={cr2:016x} CR3={cr3:016x} CR4={cr4:08x} CR8={cr8:x}");
    out
}
