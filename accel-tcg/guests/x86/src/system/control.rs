//! Control and debug registers (SDM volume 3, sections 2.5 and 17.2).

use holdfast_tcg_runtime::{Cpu, Fault, Flush};

use super::fault::{gp, ud};
use super::mode::{attr, space};
use super::regs::{cr0, cr4, dr, efer, vector};
use super::{cpuid, events, mmu, mpx};
use crate::apic;
use crate::fpu::area;
use crate::state::{X86, seg};

/// CPUID: XGETBV takes 1 in ECX.
const XGETBV1: (u32, u32, usize, u32) = (0xd, 1, 0, 2);

/// Fails below privilege level 0.
pub(crate) fn privileged(cpu: &mut Cpu<'_>) -> Result<(), Fault> {
    if cpu.state::<X86>().cpl == 0 { Ok(()) } else { Err(gp(0)) }
}

/// MOV from CR `n`.
pub(crate) fn read(cpu: &mut Cpu<'_>, n: u64) -> Result<u64, Fault> {
    privileged(cpu)?;
    let s = cpu.state::<X86>();
    Ok(match n {
        0 => s.cr0,
        2 => s.cr2,
        3 => s.cr3,
        4 => s.cr4,
        8 => apic::of(cpu).map_or(0, |a| u64::from(a.cr8())),
        _ => return Err(ud()),
    })
}

/// MOV to CR `n`.
pub(crate) fn write(cpu: &mut Cpu<'_>, n: u64, value: u64) -> Result<(), Fault> {
    privileged(cpu)?;
    match n {
        0 => write_cr0(cpu, value),
        2 => {
            cpu.state::<X86>().cr2 = value;
            Ok(())
        }
        3 => write_cr3(cpu, value),
        4 => write_cr4(cpu, value),
        8 => {
            if value > 15 {
                return Err(gp(0));
            }
            if let Some(apic) = apic::of(cpu) {
                apic.set_cr8(value as u8);
            }
            Ok(())
        }
        _ => Err(ud()),
    }
}

fn reload_pdptes(cpu: &mut Cpu<'_>, cr0: u64, cr3: u64, cr4: u64) -> Result<(), Fault> {
    let phys = cpu.phys();
    let s = cpu.state::<X86>();
    if cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && !s.long() && s.efer & efer::LME == 0 {
        s.pdpte = mmu::load_pdptes(s, &phys, cr3).ok_or(gp(0))?;
    }
    Ok(())
}

/// MOV to CR0.
pub(crate) fn write_cr0(cpu: &mut Cpu<'_>, value: u64) -> Result<(), Fault> {
    let s = cpu.state::<X86>();
    let old = s.cr0;
    let new = value & cr0::ALL | cr0::ET;
    let on = new & !old;
    let inconsistent = new & cr0::PG != 0 && new & cr0::PE == 0 || new & cr0::NW != 0 && new & cr0::CD == 0;
    if value >> 32 != 0 || inconsistent {
        return Err(gp(0));
    }
    if on & cr0::PG != 0 && s.efer & efer::LME != 0 {
        if s.cr4 & cr4::PAE == 0 || s.seg[seg::CS].attributes & attr::L != 0 {
            return Err(gp(0));
        }
    } else if old & !new & cr0::PG != 0 && (s.code64() || s.cr4 & cr4::PCIDE != 0) {
        return Err(gp(0));
    }
    let (cr3, cr4) = (s.cr3, s.cr4);
    if on & cr0::PG != 0 {
        reload_pdptes(cpu, new, cr3, cr4)?;
    }
    let s = cpu.state::<X86>();
    s.cr0 = new;
    if on & cr0::PG != 0 && s.efer & efer::LME != 0 {
        s.efer |= efer::LMA;
    }
    if new & cr0::PG == 0 {
        s.efer &= !efer::LMA;
    }
    if (old ^ new) & cr0::PE != 0 {
        s.cpl = 0;
    }
    if (old ^ new) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
        cpu.flush(Flush::All);
    }
    super::mode::changed(cpu);
    Ok(())
}

fn write_cr3(cpu: &mut Cpu<'_>, value: u64) -> Result<(), Fault> {
    let s = cpu.state::<X86>();
    let pcid = s.cr4 & cr4::PCIDE != 0;
    let keep = pcid && value >> 63 != 0;
    let value = if pcid { value & !(1 << 63) } else { value };
    if s.long() && value >> s.phys_bits.min(63) != 0 {
        return Err(gp(0));
    }
    let value = if s.long() { value } else { value & 0xffff_ffff };
    let (cr0, cr4) = (s.cr0, s.cr4);
    reload_pdptes(cpu, cr0, value, cr4)?;
    let s = cpu.state::<X86>();
    s.cr3 = value;
    let to = space(s);
    if !keep {
        cpu.flush(Flush::Space(to));
    }
    super::mode::changed(cpu);
    Ok(())
}

fn write_cr4(cpu: &mut Cpu<'_>, value: u64) -> Result<(), Fault> {
    let s = cpu.state::<X86>();
    let old = s.cr4;
    if value & !s.cr4_bits != 0 {
        return Err(gp(0));
    }
    let changed = old ^ value;
    if s.long() && (value & cr4::PAE == 0 || changed & cr4::LA57 != 0) {
        return Err(gp(0));
    }
    if changed & value & cr4::PCIDE != 0 && (!s.long() || s.cr3 & 0xfff != 0) {
        return Err(gp(0));
    }
    let (cr0, cr3) = (s.cr0, s.cr3);
    if changed & (cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP) != 0 {
        reload_pdptes(cpu, cr0, cr3, value)?;
    }
    cpu.state::<X86>().cr4 = value;
    if changed & cr4::PAGING != 0 {
        cpu.flush(Flush::All);
    }
    super::mode::changed(cpu);
    Ok(())
}

/// LMSW
pub(crate) fn lmsw(cpu: &mut Cpu<'_>, value: u64) -> Result<(), Fault> {
    privileged(cpu)?;
    let old = cpu.state::<X86>().cr0;
    // PE can be set, but not cleared.
    let low = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    write_cr0(cpu, old & !(low & !cr0::PE) | value & low)
}

/// CLTS
pub(crate) fn clts(cpu: &mut Cpu<'_>) -> Result<(), Fault> {
    privileged(cpu)?;
    cpu.state::<X86>().cr0 &= !cr0::TS;
    super::mode::changed(cpu);
    Ok(())
}

/// The place of DR `n` in the state, with the checks that reads and writes share.
fn debug_register(cpu: &mut Cpu<'_>, n: u64) -> Result<usize, Fault> {
    let s = cpu.state::<X86>();
    if matches!(n, 4 | 5) && s.cr4 & cr4::DE != 0 || n > 7 {
        return Err(ud());
    }
    privileged(cpu)?;
    let s = cpu.state::<X86>();
    if s.dr[dr::DR7] & dr::DR7_GD != 0 {
        return Err(Fault { cause: u64::from(vector::DB), value: dr::DR6_BD, aux: 0 });
    }
    Ok(match n {
        0..=3 => n as usize,
        4 | 6 => dr::DR6,
        _ => dr::DR7,
    })
}

/// MOV from DR `n`.
pub(crate) fn read_dr(cpu: &mut Cpu<'_>, n: u64) -> Result<u64, Fault> {
    let at = debug_register(cpu, n)?;
    Ok(cpu.state::<X86>().dr[at])
}

/// MOV to DR `n`.
pub(crate) fn write_dr(cpu: &mut Cpu<'_>, n: u64, value: u64) -> Result<(), Fault> {
    let at = debug_register(cpu, n)?;
    if at >= dr::DR6 && value >> 32 != 0 {
        return Err(gp(0));
    }
    let s = cpu.state::<X86>();
    s.dr[at] = match at {
        dr::DR6 => value & 0x1_e00f | dr::DR6_FIXED,
        dr::DR7 => value & 0xffff_2bff | dr::DR7_FIXED,
        _ => value,
    };
    // Pages with breakpoints are not cached.
    cpu.flush(Flush::All);
    super::mode::changed(cpu);
    Ok(())
}

/// INVLPG
pub(crate) fn invlpg(cpu: &mut Cpu<'_>, va: u64) -> Result<(), Fault> {
    privileged(cpu)?;
    cpu.flush(Flush::Page(va));
    Ok(())
}

/// INVPCID with the descriptor (low, high).
pub(crate) fn invpcid(cpu: &mut Cpu<'_>, kind: u64, low: u64, va: u64) -> Result<(), Fault> {
    privileged(cpu)?;
    let s = cpu.state::<X86>();
    let pcid = low & 0xfff;
    let used = s.cr4 & cr4::PCIDE != 0;
    if kind > 3 || kind < 2 && (low >> 12 != 0 || pcid != 0 && !used) || kind == 0 && !s.canonical_base(va) {
        return Err(gp(0));
    }
    let named = if used { 1 << 52 | pcid } else { space(s) };
    cpu.flush(match kind {
        0 => Flush::PageInSpace(va, named),
        1 => Flush::Space(named),
        _ => Flush::All,
    });
    Ok(())
}

/// WRPKRU's effect.
pub(crate) fn set_pkru(cpu: &mut Cpu<'_>, value: u32) {
    let s = cpu.state::<X86>();
    if s.pkru != u64::from(value) {
        s.pkru = u64::from(value);
        if s.cr4 & cr4::PKE != 0 {
            cpu.flush(Flush::All);
        }
    }
}

/// XSETBV
pub(crate) fn xsetbv(cpu: &mut Cpu<'_>, register: u64, value: u64) -> Result<(), Fault> {
    if cpu.state::<X86>().cr4 & cr4::OSXSAVE == 0 {
        return Err(ud());
    }
    privileged(cpu)?;
    let s = cpu.state::<X86>();
    if register & 0xffff_ffff != 0 || !valid_xcr0(s, value) {
        return Err(gp(0));
    }
    s.xcr0 = value;
    super::mode::changed(cpu);
    Ok(())
}

/// True if XCR0 may have this value.
pub(crate) fn valid_xcr0(s: &X86, value: u64) -> bool {
    let bounds = value & mpx::XCR0;
    let wide = value & area::AVX512_ONLY;
    value & 1 != 0
        && value & !s.xcr0_bits == 0
        && (value & 4 == 0 || value & 2 != 0)
        && (bounds == 0 || bounds == mpx::XCR0)
        && (wide == 0 || value & area::AVX512 == area::AVX512)
}

/// XGETBV
pub(crate) fn xgetbv(cpu: &mut Cpu<'_>, register: u64) -> Result<u64, Fault> {
    let s = cpu.state::<X86>();
    if s.cr4 & cr4::OSXSAVE == 0 {
        return Err(ud());
    }
    match register & 0xffff_ffff {
        0 => Ok(s.xcr0),
        1 if cpuid::has(s, XGETBV1) => Ok(cpu.state::<X86>().xcr0 & area::in_use(cpu, true)),
        _ => Err(gp(0)),
    }
}

/// Makes the vCPU look for interrupts if one can be taken.
pub(crate) fn interrupts_enabled(cpu: &mut Cpu<'_>) {
    if events::deliverable(cpu) {
        cpu.request_exit();
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;

    /// SDM volume 1, section 13.3: what goes together in XCR0.
    #[test]
    fn components_of_xcr0_come_with_those_that_they_extend() {
        let mut s = X86::new_zeroed();
        s.xcr0_bits = 0xff;
        for value in [1, 3, 7, 0x1f, 0xe7, 0xff] {
            assert!(valid_xcr0(&s, value), "{value:#x}");
        }
        for value in [0, 2, 5, 0xb, 0x27, 0x67, 0xc7, 0xe1, 0xe3, 0x207] {
            assert!(!valid_xcr0(&s, value), "{value:#x}");
        }
        s.xcr0_bits = 7;
        assert!(!valid_xcr0(&s, 0xe7), "a model without AVX-512");
    }
}
