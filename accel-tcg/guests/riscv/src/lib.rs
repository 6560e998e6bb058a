//! The RISC-V guest: decoder, semantics, privileged architecture.

pub mod csr;
pub mod decode;
pub mod fcsr;
mod guest;
pub mod hart;
mod helpers;
pub mod isa;
pub mod key;
pub mod mmu;
pub mod pmp;
mod state;
mod timer;
mod translate;
pub mod trap;

pub use guest::RiscvGuest;
