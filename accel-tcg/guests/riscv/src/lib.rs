//! The RISC-V guest: decoder, semantics, privileged architecture.
