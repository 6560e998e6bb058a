//! What the tests of x86 semantics share: random cases, the host's processor, our own, and how they are compared.
#![allow(dead_code, reason = "each test uses its part")]

pub mod campaign;
pub mod case;
pub mod compare;
pub mod emit;
pub mod generate;
pub mod guest;
pub mod host;
pub mod random;
pub mod templates;
