//! The translator's typed intermediate representation.
//!
//! A guest front end decodes one region of guest code and describes it with a [`Builder`]; the result is a
//! [`Region`]: a flat list of 16-byte [`Inst`]s. The x86-64 back end and the interpreter both take it.
//!
//! **Values.** Every instruction that yields something defines the [`Val`] named by its own index. A value lives
//! from its definition to the end of its *extended basic block*: the next [`Op::Label`] or unconditional
//! terminator. Conditional branches do not end it. State that crosses labels goes through [`Slot`]s.
//!
//! **Types.** [`Type::I32`] values have 32 defined bits, whatever register holds them; `trunc`, `sext` and `zext`
//! move between widths. Comparison results are `I64`, 0 or 1. `F32`/`F64` are raw IEEE bits.
//!
//! **Faults.** Memory accesses and helpers that may fault leave the region early. They belong to the guest
//! instruction named by the last [`Op::InsnStart`]; its pc is what the fault reports, so slots must be
//! architecturally exact there: do the access first, set the slots after.
//!
//! **Polling.** The back end polls [`env::EnvHeader::exit_request`] at labels that are the target of a backward
//! branch, at `goto_pc` to a lower or equal pc, and at `goto_reg`. Front ends do nothing for it, but a backward
//! label must have been made by [`Builder::label_at`], so that the exit knows its guest pc.
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod builder;
mod combine;
pub mod env;
mod fold;
pub mod helper;
pub mod interp;
pub mod op;
mod print;
pub mod region;
mod traits;
pub mod types;
pub mod vec;
pub mod verify;

pub use builder::Builder;
pub use helper::{Effects, Helper, HelperId, HelperTable};
pub use op::{Cond, FenceKind, FpCond, FpMode, Inst, MemOp, NanPolicy, Op, RmwKind, Round};
pub use region::{GuestSpec, JumpHint, Label, Region};
pub use types::{Slot, Type, Val};
pub use vec::{HostCode, VecEncoding, VecForm, VecInsn};
pub use verify::{VerifyError, verify};
