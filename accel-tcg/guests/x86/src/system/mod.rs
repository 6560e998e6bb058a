//! What only privileged software sees: modes, paging, protection, interrupts, system registers.

pub(crate) mod control;
pub(crate) mod cpuid;
pub(crate) mod deliver;
pub(crate) mod events;
pub(crate) mod far;
pub(crate) mod fault;
pub(crate) mod helpers;
pub(crate) mod hypercall;
pub(crate) mod iret;
pub(crate) mod mmu;
pub(crate) mod mode;
pub(crate) mod monitor;
pub(crate) mod mpx;
pub(crate) mod msr;
pub(crate) mod noncanonical;
pub(crate) mod ports;
pub mod regs;
pub(crate) mod reset;
pub(crate) mod segment;
pub(crate) mod stack;
pub(crate) mod syscall;
pub(crate) mod task;
pub(crate) mod transfer;
pub(crate) mod tsc;
pub(crate) mod xsave;
