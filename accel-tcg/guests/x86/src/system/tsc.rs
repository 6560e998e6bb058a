//! The time-stamp counter: guest-virtual time at the processor's frequency.

use holdfast_tcg_runtime::{Cpu, Fault};

use super::fault::gp;
use super::regs::cr4;
use crate::apic;
use crate::state::X86;

/// The frequency unless a state says otherwise, in kHz: a tick is a nanosecond.
pub(crate) const KHZ: u64 = 1_000_000;

/// Ticks in `ns` nanoseconds.
fn ticks(khz: u64, ns: u64) -> u64 {
    if khz == KHZ { ns } else { (u128::from(ns) * u128::from(khz) / 1_000_000) as u64 }
}

/// IA32_TIME_STAMP_COUNTER.
pub(crate) fn now(cpu: &mut Cpu<'_>) -> u64 {
    let ns = cpu.now();
    let s = cpu.state::<X86>();
    ticks(s.tsc_khz, ns).wrapping_add(s.tsc_offset)
}

/// Guest-virtual time at which the counter reaches `value`; now, if it is past that.
pub(crate) fn when(cpu: &mut Cpu<'_>, value: u64) -> u64 {
    let ns = cpu.now();
    let left = value.wrapping_sub(now(cpu)) as i64;
    let khz = cpu.state::<X86>().tsc_khz.max(1);
    let Ok(left) = u128::try_from(left) else { return ns };
    let ns_left = (left * 1_000_000).div_ceil(u128::from(khz));
    ns.saturating_add(u64::try_from(ns_left).unwrap_or(u64::MAX))
}

fn moved(cpu: &mut Cpu<'_>, by: u64) {
    let s = cpu.state::<X86>();
    s.tsc_offset = s.tsc_offset.wrapping_add(by);
    s.tsc_adjust = s.tsc_adjust.wrapping_add(by);
    let Some(apic) = apic::of(cpu) else { return };
    let deadline = apic.tsc_deadline();
    if deadline != 0 {
        let at = when(cpu, deadline);
        apic.set_tsc_deadline(deadline, at);
    }
}

/// Writes the counter; IA32_TSC_ADJUST changes alike (SDM volume 3, section 17.17.3).
pub(crate) fn set(cpu: &mut Cpu<'_>, value: u64) {
    let by = value.wrapping_sub(now(cpu));
    moved(cpu, by);
}

/// Writes IA32_TSC_ADJUST; the counter changes alike.
pub(crate) fn adjust(cpu: &mut Cpu<'_>, value: u64) {
    let by = value.wrapping_sub(cpu.state::<X86>().tsc_adjust);
    moved(cpu, by);
}

/// RDTSC and RDTSCP.
pub(crate) fn read(cpu: &mut Cpu<'_>) -> Result<u64, Fault> {
    let s = cpu.state::<X86>();
    if s.cr4 & cr4::TSD != 0 && s.cpl > 0 {
        return Err(gp(0));
    }
    Ok(now(cpu))
}
