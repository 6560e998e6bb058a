//! Translated vCPUs: TLB, code cache, dispatch, chaining, self-modifying code.

mod code;
mod cpu;
mod env;
mod guest;
mod phys;
mod shared;
mod vcpu;

pub use code::CodeReader;
pub use cpu::Cpu;
pub use env::EnvBox;
pub use guest::{
    Access, AccessKind, Fault, Flush, Guest, GuestSpec, Mode, TranslateRequest, Translated, Translation,
};
pub use phys::{HostRef, Io, PhysMemory, RamBlock};
pub use shared::{VcpuShared, request};
pub use vcpu::Stop;
