//! The translator, as the rest of Holdfast sees it: which guests there are, and the runtime that runs them.

use holdfast_arch::Arch;

pub use holdfast_tcg_runtime::{
    CodePlace, Cpu, Engine, Guest, Io, LogOptions, RuntimeError, Stop, TcgVcpu, TcgVm, TraceLog, VcpuShared,
    VmParts, WatchKind, Watchpoint, request,
};

/// What x86 guests ask of the local APICs that they are given.
pub mod x86 {
    pub use holdfast_guest_x86::apic::{ApicHandle, ApicState, LocalApic, Signals};
}

/// There is no translator for this architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there is no translator for {0} guests")]
pub struct NoGuest(pub Arch);

/// The guest architecture `arch`.
///
/// # Errors
/// [`NoGuest`] if it cannot be translated.
pub fn guest(arch: Arch) -> Result<&'static dyn Guest, NoGuest> {
    match arch {
        Arch::Riscv64 => Ok(holdfast_guest_riscv::RiscvGuest::get()),
        Arch::X86_64 => Ok(holdfast_guest_x86::X86Guest::get()),
    }
}
