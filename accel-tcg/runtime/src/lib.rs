//! Translated vCPUs: TLB, code cache, dispatch, chaining, self-modifying code.

mod cache;
mod code;
mod cpu;
mod env;
mod epoch;
mod guest;
mod phys;
mod shared;
mod vcpu;

pub use code::CodeReader;
pub use cpu::{Cpu, HelperResult, Leave};
#[doc(hidden)]
pub use cpu::{enter_faulting, enter_plain};
pub use env::EnvBox;
pub use guest::{
    Access, AccessKind, Fault, Flush, Guest, GuestSpec, Mode, TranslateRequest, Translated, Translation,
};
/// The translator's intermediate representation, for guests.
pub use holdfast_tcg_ir as ir;
pub use phys::{HostRef, Io, PhysMemory, RamBlock};
pub use shared::{VcpuShared, request};
pub use vcpu::Stop;
