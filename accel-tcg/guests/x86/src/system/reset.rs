//! Reset and INIT (SDM volume 3, table 9-1).

use holdfast_arch::x86_64::{CpuTopology, CpuidEntry, CpuidModel, cpuid as tables};
use holdfast_tcg_runtime::{Cpu, Flush};

use super::events::mp;
use super::regs::{cr0, cr4, dr, efer};
use super::{cpuid, monitor, tsc};
use crate::apic;
use crate::flags::{self, rflags};
use crate::state::{CPUID_LEAVES, CpuidLeaf, SegmentRegister, X86, seg};

/// Takes over the model, and the state as it is after power-up.
///
/// # Errors
/// A text that names what of the model is not supported.
pub(crate) fn power_up(cpu: &mut Cpu<'_>, model: &CpuidModel) -> Result<(), String> {
    let index = cpu.index();
    let topology = model.topology.unwrap_or_else(|| CpuTopology::flat(index.saturating_add(1)));
    let apic_id = topology.apic_id(index);
    let mut table = cpuid::table(model).map_err(|e| e.to_string())?;
    tables::place(&mut table, topology, apic_id);
    *cpu.state::<X86>() = zerocopy::FromZeros::new_zeroed();
    install(cpu.state(), &table)?;
    let s = cpu.state::<X86>();
    s.apic_id = u64::from(apic_id);
    s.cr0 = cr0::CD | cr0::NW;
    s.pat = 0x0007_0406_0007_0406;
    s.misc_enable = 1 | monitor::ENABLE;
    s.xcr0 = 1;
    s.tsc_khz = tsc::KHZ;
    // Firmware locks it, and without virtualization there is nothing else in it.
    s.feature_control = 1;
    s.x87.control = 0x40;
    crate::fpu::set_mxcsr(cpu, 0x1f80);
    if let Some(apic) = apic::of(cpu) {
        apic.reset(false);
    }
    init(cpu);
    let waits = index != 0;
    cpu.state::<X86>().mp_state = if waits { mp::UNINITIALIZED } else { mp::RUNNABLE };
    cpu.set_halted(waits);
    Ok(())
}

fn leaf(table: &[CpuidEntry], function: u32) -> [u32; 4] {
    table.iter().find(|e| e.function == function).map_or([0; 4], |e| e.regs)
}

/// Puts a CPUID table into the state, with what follows from it.
fn install(s: &mut X86, table: &[CpuidEntry]) -> Result<(), String> {
    if table.len() > CPUID_LEAVES {
        return Err(format!("more than {CPUID_LEAVES} CPUID leaves"));
    }
    for (place, e) in s.cpuid.iter_mut().zip(table) {
        let indexed = u32::from(e.indexed);
        *place = CpuidLeaf { function: e.function, index: e.index, indexed, pad: 0, regs: e.regs };
    }
    s.cpuid_count = table.len() as u64;
    let [_, _, ecx1, edx1] = leaf(table, 1);
    let [_, ebx7, ecx7, _] = leaf(table, 7);
    let [_, _, _, edx_ext] = leaf(table, 0x8000_0001);
    let on = |word: u32, bit: u32, value: u64| if word >> bit & 1 != 0 { value } else { 0 };
    s.cr4_bits = cr4::BASE
        | on(edx1, 1, cr4::VME | cr4::PVI)
        | on(ecx1, 17, cr4::PCIDE)
        | on(ecx1, 26, cr4::OSXSAVE)
        | on(ebx7, 0, cr4::FSGSBASE)
        | on(ebx7, 7, cr4::SMEP)
        | on(ebx7, 20, cr4::SMAP)
        | on(ecx7, 2, cr4::UMIP)
        | on(ecx7, 3, cr4::PKE)
        | on(ecx7, 16, cr4::LA57)
        | on(ecx7, 31, cr4::PKS);
    s.efer_bits = on(edx_ext, 11, efer::SCE)
        | on(edx_ext, 20, efer::NXE)
        | on(edx_ext, 25, efer::FFXSR)
        | on(edx_ext, 29, efer::LME)
        | on(leaf(table, 0x8000_0021)[0], 8, efer::AUTOIBRS);
    let xsave = table.iter().find(|e| e.function == 0xd && e.index == 0);
    let offered = xsave.map_or(0, |e| u64::from(e.regs[3]) << 32 | u64::from(e.regs[0]));
    // x87 and SSE state are there even where XSAVE is not.
    s.xcr0_bits = 3 | offered;
    let width = leaf(table, 0x8000_0008)[0] & 0xff;
    s.phys_bits = if width == 0 { 36 } else { u64::from(width.clamp(32, 52)) };
    Ok(())
}

/// What INIT does.
pub(crate) fn init(cpu: &mut Cpu<'_>) {
    let version = cpuid::signature(cpu.state());
    let s = cpu.state::<X86>();
    s.gpr = [0; 16];
    s.gpr[2] = u64::from(version);
    flags::write(s, rflags::FIXED);
    let data = SegmentRegister { base: 0, limit: 0xffff, selector: 0, attributes: 0x93 };
    s.seg = [data; 6];
    s.seg[seg::CS] = SegmentRegister { base: 0xffff_0000, limit: 0xffff, selector: 0xf000, attributes: 0x9b };
    s.ldt = SegmentRegister { attributes: 0x82, ..data };
    s.tr = SegmentRegister { attributes: 0x8b, ..data };
    s.gdt = [0, 0xffff];
    s.idt = [0, 0xffff];
    s.cr0 = s.cr0 & (cr0::CD | cr0::NW) | cr0::ET;
    s.cr2 = 0;
    s.cr3 = 0;
    s.cr4 = 0;
    s.efer = 0;
    s.pkru = 0;
    s.pkrs = 0;
    s.dr = [0, 0, 0, 0, dr::DR6_FIXED, dr::DR7_FIXED];
    s.cpl = 0;
    s.shadow = 0;
    s.nmi_pending = 0;
    s.nmi_masked = 0;
    s.debug_pending = 0;
    s.sysenter = [0; 3];
    s.mp_state = mp::RUNNABLE;
    (s.monitor, s.mwait) = (0, 0);
    cpu.set_pc(0xffff_fff0);
    cpu.set_halted(false);
    cpu.flush(Flush::All);
    super::mode::changed(cpu);
}
