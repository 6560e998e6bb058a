//! Model-specific registers (SDM volume 4; APM volume 2, appendix A).

use holdfast_tcg_runtime::{Cpu, Fault, Flush};

use super::control::privileged;
use super::cpuid;
use super::fault::gp;
use super::regs::{cr0, cr4, efer, msr};
use super::tsc;
use crate::apic;
use crate::state::{MC_BANKS, X86, seg};

/// Registers of AMD processors that are there and do nothing.
const AMD_IGNORED: [u32; 14] = [
    0xc001_0010, // SYSCFG
    0xc001_0015, // HWCR
    0xc001_001a, // TOP_MEM
    0xc001_001d, // TOP_MEM2
    0xc001_001f, // NB_CFG
    0xc001_0020, // PATCH_LOADER
    0xc001_0055, // interrupt pending messages
    0xc001_0112, // SMM base
    0xc001_0140, // OSVW_ID_LENGTH
    0xc001_0141, // OSVW_STATUS
    0xc001_1020, // LS_CFG
    0xc001_1022, // DC_CFG
    0xc001_1029, // DE_CFG
    0xc001_102a, // BU_CFG2
];

/// CPUID features that MSRs depend on: IBRS and IBPB, STIBP, SSBD, L1D_FLUSH, PKS; AMD's IBPB, IBRS, STIBP, SSBD.
const SPEC_CTRL_FEATURES: [(u32, u32, usize, u32); 6] = [
    (7, 0, 3, 26),
    (7, 0, 3, 27),
    (7, 0, 3, 31),
    (0x8000_0008, 0, 1, 14),
    (0x8000_0008, 0, 1, 15),
    (0x8000_0008, 0, 1, 24),
];
const PRED_CMD_FEATURES: [(u32, u32, usize, u32); 2] = [(7, 0, 3, 26), (0x8000_0008, 0, 1, 12)];
const FLUSH_CMD_FEATURES: [(u32, u32, usize, u32); 1] = [(7, 0, 3, 28)];
const PKS_FEATURES: [(u32, u32, usize, u32); 1] = [(7, 0, 2, 31)];
const MPX_FEATURES: [(u32, u32, usize, u32); 1] = [(7, 0, 1, 14)];
const XSS_FEATURES: [(u32, u32, usize, u32); 1] = [(0xd, 1, 0, 3)];

/// IA32_APIC_BASE: x2APIC mode, and the feature that it needs.
const X2APIC_MODE: u64 = 1 << 10;
const X2APIC_FEATURE: (u32, u32, usize, u32) = (1, 0, 2, 21);

/// Whether the processor has MSR `number`, as far as that depends on its model.
fn there(s: &X86, number: u32) -> bool {
    let any = |features: &[(u32, u32, usize, u32)]| features.iter().any(|f| cpuid::has(s, *f));
    match number {
        msr::SPEC_CTRL => any(&SPEC_CTRL_FEATURES),
        msr::PRED_CMD => any(&PRED_CMD_FEATURES),
        msr::FLUSH_CMD => any(&FLUSH_CMD_FEATURES),
        msr::PKRS => any(&PKS_FEATURES),
        msr::XSS => any(&XSS_FEATURES),
        msr::BNDCFGS => any(&MPX_FEATURES),
        _ => true,
    }
}

/// A register of a machine-check bank, and which of the four it is.
fn machine_check(s: &mut X86, number: u32) -> Option<(&mut u64, usize)> {
    let n = number.checked_sub(msr::MC0_CTL)? as usize;
    Some((s.machine_check.get_mut(n / 4)?.get_mut(n % 4)?, n % 4))
}

/// MSRs of [`X86`] that hold nothing but a value; the bits that have to be zero.
fn plain(s: &mut X86, number: u32) -> Option<(&mut u64, u64)> {
    Some(match number {
        msr::STAR => (&mut s.star, 0),
        msr::FMASK => (&mut s.fmask, !0xffff_ffff),
        msr::SYSENTER_CS => (&mut s.sysenter[0], 0),
        msr::MISC_ENABLE => (&mut s.misc_enable, 0),
        msr::TSC_AUX => (&mut s.tsc_aux, !0xffff_ffff),
        msr::SPEC_CTRL => (&mut s.spec_ctrl, !0x487),
        msr::FEATURE_CONTROL => (&mut s.feature_control, 0),
        msr::MTRR_DEF_TYPE => (&mut s.mtrr_def_type, !0xcff),
        msr::XSS => (&mut s.xss, u64::MAX),
        msr::PKRS => (&mut s.pkrs, !0xffff_ffff),
        _ => return mtrr(s, number),
    })
}

fn mtrr(s: &mut X86, number: u32) -> Option<(&mut u64, u64)> {
    let fixed = match number {
        0x250 => 0,
        0x258 | 0x259 => number as usize - 0x258 + 1,
        0x268..=0x26f => number as usize - 0x268 + 3,
        0x200..=0x20f => {
            let n = number as usize - 0x200;
            let high = !((1_u64 << s.phys_bits.clamp(32, 52)) - 1);
            let zero = high | if n & 1 == 0 { 0xf00 } else { 0x7ff };
            return s.mtrr_variable.get_mut(n / 2)?.get_mut(n & 1).map(|v| (v, zero));
        }
        _ => return None,
    };
    s.mtrr_fixed.get_mut(fixed).map(|v| (v, 0))
}

/// MSRs that hold an address, which has to be canonical.
fn address(s: &mut X86, number: u32) -> Option<&mut u64> {
    Some(match number {
        msr::LSTAR => &mut s.lstar,
        msr::CSTAR => &mut s.cstar,
        msr::KERNEL_GS_BASE => &mut s.kernel_gs_base,
        msr::FS_BASE => &mut s.seg[seg::FS].base,
        msr::GS_BASE => &mut s.seg[seg::GS].base,
        msr::SYSENTER_ESP => &mut s.sysenter[1],
        msr::SYSENTER_EIP => &mut s.sysenter[2],
        _ => return None,
    })
}

/// MSRs of constant value; writes to them are ignored if the second is true.
fn constant(number: u32) -> Option<(u64, bool)> {
    Some(match number {
        msr::MTRR_CAP => (0x508, false),
        msr::MCG_CAP => (MC_BANKS as u64, false),
        msr::MCG_STATUS | msr::PLATFORM_ID | msr::DEBUGCTL => (0, true),
        msr::BIOS_SIGN_ID => (1 << 32, true),
        msr::ARCH_CAPABILITIES => (super::cpuid::IMMUNE, false),
        // RAPL, temperatures, the bus frequency: nothing.
        0x34 | 0xcd | 0xce | 0x140 | 0x198 | 0x199 | 0x19a..=0x19d => (0, true),
        // Performance counters of the K7: there, and counting nothing.
        0xc001_0000..=0xc001_0007 => (0, true),
        0x8000_0000..=0xffff_ffff if AMD_IGNORED.contains(&number) => (0, true),
        _ => return None,
    })
}

/// Reads MSR `number`, which is allowed.
pub(crate) fn get(cpu: &mut Cpu<'_>, number: u32) -> Option<u64> {
    match number {
        msr::TSC => return Some(tsc::now(cpu)),
        msr::TSC_ADJUST => return Some(cpu.state::<X86>().tsc_adjust),
        msr::EFER => return Some(cpu.state::<X86>().efer),
        msr::PAT => return Some(cpu.state::<X86>().pat),
        msr::BNDCFGS if there(cpu.state(), number) => return Some(cpu.state::<X86>().bndcfgs),
        msr::APIC_BASE => return apic::of(cpu).map(|a| a.base()),
        msr::TSC_DEADLINE => return apic::of(cpu).map(|a| a.tsc_deadline()),
        msr::X2APIC..=0x8ff => return apic::of(cpu)?.read_msr(number - msr::X2APIC),
        _ => {}
    }
    let s = cpu.state::<X86>();
    if !there(s, number) {
        return None;
    }
    if let Some(value) = address(s, number) {
        return Some(*value);
    }
    if let Some((value, _)) = machine_check(s, number) {
        return Some(*value);
    }
    if let Some((value, _)) = plain(s, number) {
        return Some(*value);
    }
    constant(number).map(|(value, _)| value)
}

/// Writes MSR `number`; `None` (#GP) if it is not there or cannot hold `value`.
pub(crate) fn set(cpu: &mut Cpu<'_>, number: u32, value: u64) -> Option<()> {
    if !there(cpu.state(), number) {
        return None;
    }
    match number {
        msr::TSC => {
            tsc::set(cpu, value);
            return Some(());
        }
        msr::TSC_ADJUST => {
            tsc::adjust(cpu, value);
            return Some(());
        }
        msr::EFER => return set_efer(cpu, value),
        msr::PAT => {
            let valid = value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7));
            return valid.then(|| cpu.state::<X86>().pat = value);
        }
        msr::APIC_BASE => {
            let s = cpu.state::<X86>();
            let bits = s.phys_bits;
            if value & X2APIC_MODE != 0 && !cpuid::has(s, X2APIC_FEATURE) {
                return None;
            }
            return apic::of(cpu)?.set_base(value, bits).then_some(());
        }
        msr::TSC_DEADLINE => {
            let at = tsc::when(cpu, value);
            apic::of(cpu)?.set_tsc_deadline(value, at);
            return Some(());
        }
        msr::X2APIC..=0x8ff => return apic::of(cpu)?.write_msr(number - msr::X2APIC, value).then_some(()),
        msr::PRED_CMD | msr::FLUSH_CMD | msr::BIOS_UPDT_TRIG => return Some(()),
        msr::PKRS => return set_pkrs(cpu, value),
        msr::BNDCFGS => {
            let s = cpu.state::<X86>();
            if !s.bound_config_fits(value) {
                return None;
            }
            s.bndcfgs = value;
            super::mode::changed(cpu);
            return Some(());
        }
        _ => {}
    }
    let s = cpu.state::<X86>();
    let canonical = s.canonical_base(value);
    if let Some(place) = address(s, number) {
        return canonical.then(|| *place = value);
    }
    if let Some((place, which)) = machine_check(s, number) {
        // Controls are switched all at once; a status can only be cleared (SDM volume 3, section 16.3.2).
        let fits = match which {
            0 => value == 0 || value == u64::MAX,
            1 => value == 0,
            _ => true,
        };
        return fits.then(|| *place = value);
    }
    if let Some((place, zero)) = plain(s, number) {
        return (value & zero == 0).then(|| *place = value);
    }
    constant(number).filter(|(_, ignored)| *ignored).map(|_| ())
}

fn set_pkrs(cpu: &mut Cpu<'_>, value: u64) -> Option<()> {
    let s = cpu.state::<X86>();
    if value >> 32 != 0 {
        return None;
    }
    if s.pkrs != value {
        s.pkrs = value;
        if s.cr4 & cr4::PKS != 0 {
            cpu.flush(Flush::All);
        }
    }
    Some(())
}

fn set_efer(cpu: &mut Cpu<'_>, value: u64) -> Option<()> {
    let s = cpu.state::<X86>();
    let allowed = s.efer_bits | efer::LMA;
    let changed = s.efer ^ value;
    if value & !allowed != 0 || changed & efer::LME != 0 && s.cr0 & cr0::PG != 0 {
        return None;
    }
    s.efer = value & !efer::LMA | s.efer & efer::LMA;
    if changed & efer::NXE != 0 {
        cpu.flush(Flush::All);
    }
    super::mode::changed(cpu);
    Some(())
}

/// RDMSR
pub(crate) fn read(cpu: &mut Cpu<'_>, number: u32) -> Result<u64, Fault> {
    privileged(cpu)?;
    get(cpu, number).ok_or(gp(0))
}

/// WRMSR
pub(crate) fn write(cpu: &mut Cpu<'_>, number: u32, value: u64) -> Result<(), Fault> {
    privileged(cpu)?;
    set(cpu, number, value).ok_or(gp(0))
}
