//! Pending interrupts and the comparator's deadline.

use holdfast_tcg_runtime::Cpu;

use crate::hart::Hart;

/// `mip` now.
pub(crate) fn pending(cpu: &mut Cpu<'_>) -> u64 {
    let (pins, now) = (cpu.pins(), cpu.now());
    let hart = cpu.state::<Hart>();
    let ticks = if hart.stimecmp_on() { hart.ticks(now) } else { 0 };
    hart.pending(pins, ticks)
}

/// The time, for the guest to see. Once it sees that `stimecmp` has been reached the interrupt is there, even if the alarm is late.
pub(crate) fn now(cpu: &mut Cpu<'_>) -> u64 {
    let now = cpu.now();
    let hart = cpu.state::<Hart>();
    if hart.stimecmp_on() && hart.ticks(now) >= hart.stimecmp {
        hart.timer_due = 1;
    }
    now
}

/// `mip` without a look at the clock. What has become due since [`arm`] has raised the alarm that was set then.
pub(crate) fn pending_lately(cpu: &mut Cpu<'_>) -> u64 {
    let pins = cpu.pins();
    cpu.state::<Hart>().pending_lately(pins)
}

/// Sets the deadline at which `stimecmp` is reached, if it is on and still to come.
pub(crate) fn arm(cpu: &mut Cpu<'_>) {
    let now = cpu.now();
    let hart = cpu.state::<Hart>();
    let at = if hart.stimecmp_on() { hart.when(hart.stimecmp) } else { None };
    let deadline = at.filter(|at| *at > now);
    hart.timer_due = u64::from(at.is_some() && deadline.is_none());
    cpu.set_deadline(deadline);
}
