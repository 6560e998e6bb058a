//! Translated vCPUs: TLB, code cache, dispatch, chaining, self-modifying code.
//!
//! A [`TcgVm`] holds what the vCPUs of a VM share: guest memory, translations, code cache. A [`TcgVcpu`] runs
//! one vCPU on its own thread. The instruction set is a [`Guest`]; what is not RAM is an [`Io`].

mod cache;
mod code;
mod cpu;
mod debug;
mod engine;
mod env;
mod epoch;
mod fpenv;
mod futex;
mod guest;
mod hash;
mod info;
mod large;
mod log;
mod perf;
mod phys;
mod recent;
mod regions;
mod shared;
mod slow;
mod table;
mod tlb;
mod translate;
mod unshare;
mod vcpu;
mod vm;
mod wait;

pub use code::CodeReader;
pub use cpu::{Cpu, HelperResult, Leave};
#[doc(hidden)]
pub use cpu::{enter_faulting, enter_plain};
pub use debug::{WatchKind, Watchpoint};
pub use env::EnvBox;
pub use guest::{
    Access, AccessKind, Fault, Flush, Guest, GuestSpec, Mode, TranslateRequest, Translated, Translation,
};
/// The translator's intermediate representation, for guests.
pub use holdfast_tcg_ir as ir;
pub use log::{LogOptions, TraceLog};
pub use phys::{HostRef, Io, PhysMemory, RamBlock};
pub use recent::CodePlace;
pub use shared::{VcpuShared, request};
pub use vcpu::{Stop, TcgVcpu};
pub use vm::{Engine, RuntimeError, TcgVm, VmParts};
