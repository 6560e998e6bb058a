//! x86-64 code generation for the translator's IR.
//!
//! * [`asm`] is the emitter: one function per instruction form, no allocation.
//! * [`stubs`] are the routines that all translated code shares, generated once per code cache.
//! * [`Translator`] turns a [`holdfast_tcg_ir::Region`] into code, one pass backward and one forward.
//! * [`link`] says how the runtime patches direct jumps.
//!
//! **Registers.** rbp environment, r15 generation tag, rsp the frame that the entry stub made, pins in rbx, r12, r13,
//! r14, r8, r9, r10, r11 (in the order of [`holdfast_tcg_ir::GuestSpec::pins`]), temporaries rax, rcx, rdx, rsi, rdi and
//! all of xmm0 to xmm15. MXCSR is the guest's.
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod asm;
mod codegen;
mod features;
pub mod link;
mod listing;
mod native;
mod soft;
pub mod stubs;

pub use codegen::{Compiled, Target, Translator};
pub use features::HostFeatures;
pub use native::NativeRunner;

pub use link::{LinkKind, LinkSite};
pub use stubs::{Enter, Stubs};

/// Why code could not be generated.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodegenError {
    /// The buffer is too small; nothing was written.
    #[error("the code buffer has {have} bytes and {need} are needed")]
    BufferFull {
        /// Bytes needed.
        need: usize,
        /// Bytes there.
        have: usize,
    },
    /// The shared stubs are farther than 2 GiB from the code.
    #[error("the code at {0:#x} is out of reach of the shared stubs")]
    OutOfReach(u64),
    /// The region needs more than the back end can hold; translate less at once.
    #[error("the region is too long: {0} instructions")]
    TooLong(usize),
    /// The guest's pinned slots do not fit this back end.
    #[error("pinned slot {0} is not a distinct 64-bit integer slot")]
    BadPin(usize),
    /// The region calls a helper that the table does not have, or with wrong arguments.
    #[error("the region calls unknown helper {0}")]
    UnknownHelper(u32),
    /// The back end does not have the instruction in this form.
    #[error("the back end does not support {0:?} in this form")]
    Unsupported(holdfast_tcg_ir::Op),
}
