//! x86 guests: 16-, 32- and 64-bit code in real, protected, compatibility and long mode.
//!
//! Sources: Intel SDM (December 2023) and AMD APM (rev. 3.36). Instructions are decoded by `iced-x86`.
//! `translate` turns them into IR, `system` holds what only privileged software sees, `fpu` the x87 and vector state.

pub mod apic;
pub mod flags;
pub mod fpu;
mod guest;
mod helpers;
pub mod key;
pub mod state;
pub mod system;
mod translate;

pub use guest::X86Guest;
