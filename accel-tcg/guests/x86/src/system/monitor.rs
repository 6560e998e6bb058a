//! MONITOR and MWAIT (SDM volume 3, section 9.10.4).
//!
//! A monitored line is not watched: MWAIT sleeps for a while, looks whether the line has changed, and if it has not, sleeps a
//! little longer the next time. That it may end without a cause is in its definition, so that is all that a guest sees of it.

use holdfast_tcg_ir::env::exit;
use holdfast_tcg_runtime::{Cpu, Fault, HelperResult, Leave, PhysMemory};

use super::fault::{gp, ud};
use super::{cpuid, events, mmu};
use crate::apic;
use crate::state::X86;

/// CPUID: MONITOR.
const MONITOR: (u32, u32, usize, u32) = (1, 0, 2, 3);
/// IA32_MISC_ENABLE of Intel's processors: MONITOR is enabled.
pub(crate) const ENABLE: u64 = 1 << 18;
/// Bytes of a line.
pub(crate) const LINE: u64 = 64;
/// How long MWAIT sleeps at first and at most, in nanoseconds.
const SLEEP: (u64, u64) = (20_000, 500_000);

/// Bits of [`X86::monitor`] and [`X86::mwait`], beside the guest-physical address of a line.
mod bits {
    /// A line is monitored.
    pub const ARMED: u64 = 1;
    /// An interrupt ends MWAIT even if it is masked.
    pub const BREAK: u64 = 2;
}

/// Whether the processor shows the feature.
pub(crate) fn offered(s: &X86) -> bool {
    cpuid::has(s, MONITOR) && (!cpuid::is_intel(s) || s.misc_enable & ENABLE != 0)
}

fn allowed(s: &X86, extensions: u64) -> Result<(), Fault> {
    if s.cpl != 0 || !offered(s) {
        return Err(ud());
    }
    if s.gpr[1] & 0xffff_ffff & !extensions != 0 { Err(gp(0)) } else { Ok(()) }
}

/// All that the line holds, in one word.
fn sum(phys: &PhysMemory, line: u64) -> Option<u64> {
    (0..LINE / 8).try_fold(0_u64, |sum, n| {
        let word = phys.read_u64(line + 8 * n)?;
        Some((sum.rotate_left(7) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    })
}

/// MONITOR: (linear address, MMU index).
pub(crate) fn monitor(cpu: &mut Cpu<'_>, [va, idx, ..]: [u64; 5]) -> HelperResult {
    allowed(cpu.state(), 0)?;
    cpu.load(va, 1, idx as u8)?;
    let phys = cpu.phys();
    let s = cpu.state::<X86>();
    s.monitor = 0;
    // What is no RAM cannot be monitored (only write-back memory can): MWAIT will not wait.
    if let Some(line) = mmu::probe(s, &phys, va).map(|gpa| gpa & !(LINE - 1))
        && let Some(sum) = sum(&phys, line)
    {
        (s.monitor, s.monitor_sum) = (line | bits::ARMED, sum);
    }
    Ok(0)
}

/// MWAIT: (linear address behind it).
pub(crate) fn mwait(cpu: &mut Cpu<'_>, [next, ..]: [u64; 5]) -> HelperResult {
    allowed(cpu.state(), 1)?;
    let phys = cpu.phys();
    let now = cpu.now();
    cpu.set_pc(next);
    let s = cpu.state::<X86>();
    let armed = std::mem::take(&mut s.monitor);
    let extension = if s.gpr[1] & 1 != 0 { bits::BREAK } else { 0 };
    let same = armed != 0 && sum(&phys, armed & !(LINE - 1)) == Some(s.monitor_sum);
    if !same || s.debug_pending != 0 {
        s.mwait_sleep = 0;
        cpu.spins();
        return Err(Leave::Exit(exit::RESUME));
    }
    s.mwait = armed | extension;
    s.mwait_sleep = s.mwait_sleep.clamp(SLEEP.0, SLEEP.1);
    s.mwait_until = now.saturating_add(s.mwait_sleep);
    if events::wakes(cpu) {
        return Err(Leave::Exit(exit::RESUME));
    }
    let until = cpu.state::<X86>().mwait_until;
    cpu.set_deadline(Some(until));
    cpu.set_halted(true);
    Err(Leave::Exit(exit::HALT))
}

/// Whether the MWAIT at hand ends by something else than an interrupt that is taken.
pub(crate) fn ends(cpu: &mut Cpu<'_>) -> bool {
    let waiting = cpu.state::<X86>().mwait;
    if waiting == 0 {
        return false;
    }
    let (phys, now) = (cpu.phys(), cpu.now());
    let masked = waiting & bits::BREAK != 0 && apic::of(cpu).is_some_and(|a| a.has_interrupt());
    let s = cpu.state::<X86>();
    let changed = sum(&phys, waiting & !(LINE - 1)) != Some(s.monitor_sum);
    let late = now >= s.mwait_until;
    if masked || changed || late {
        s.mwait = 0;
        s.mwait_sleep = if late && !changed { s.mwait_sleep.saturating_mul(2) } else { 0 };
    }
    masked || changed || late
}
