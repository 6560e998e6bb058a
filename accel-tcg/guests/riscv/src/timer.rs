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

/// Sets the deadline at which `stimecmp` is reached, if it is on and still to come.
pub(crate) fn arm(cpu: &mut Cpu<'_>) {
    let now = cpu.now();
    let hart = cpu.state::<Hart>();
    let deadline = if hart.stimecmp_on() { hart.when(hart.stimecmp).filter(|at| *at > now) } else { None };
    cpu.set_deadline(deadline);
}
