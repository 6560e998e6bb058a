//! The RISC-V guest: decoder, semantics, privileged architecture.

pub mod csr;
pub mod decode;
pub mod hart;
pub mod isa;
pub mod mmu;
pub mod pmp;
pub mod trap;
