//! The RISC-V guest: decoder, semantics, privileged architecture.

pub mod decode;
