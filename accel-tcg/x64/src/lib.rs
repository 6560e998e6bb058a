//! x86-64 code generation for the translator's IR.
//!
//! [`link`] says how the runtime patches direct jumps. To come, for who codes against it:
//! ```text
//! Translator::new(spec: GuestSpec, helpers: HelperTable, slow: SlowPaths) -> Result<Translator, CodegenError>
//! Translator::stubs(&mut self, out: &mut [u8], exec: u64) -> Result<Stubs, CodegenError>
//!     // once per code cache; `out` is writable memory that executes at address `exec`
//! Stubs { len: usize, ... }; Stubs::enter(&self) -> unsafe extern "C" fn(env: *mut u8, code: u64) -> u64 /* exit code */
//! Translator::compile(&mut self, stubs: &Stubs, region: &mut Region, at: Target { out: &mut [u8], exec: u64, region_id: u32 })
//!     -> Result<Compiled<'_>, CodegenError>
//! Compiled { len: usize /* multiple of 16 */, links: &[LinkSite], insns: &[(code offset: u32, guest pc: u64)] }
//! ```
//!
//! **Registers.** rbp environment, r15 generation tag, rsp the frame that the entry stub made, pins in rbx, r12, r13,
//! r14, r8, r9, r10, r11 (in the order of [`holdfast_tcg_ir::GuestSpec::pins`]), temporaries rax, rcx, rdx, rsi, rdi and
//! all of xmm0 to xmm15. MXCSR is the guest's.
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod link;

pub use link::{LinkKind, LinkSite};

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
}
