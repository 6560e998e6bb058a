//! Small guests that every accelerator must run alike.
//!
//! A [`Case`] is a guest of a few dozen instructions, what the host does with it on the way, and the text that
//! must come out. Cases know the accelerator traits and the platform devices, and no accelerator: each
//! accelerator's tests run [`cases`] with every interrupt-controller placement it has.
//!
//! Guests keep to instructions that even a software KVM has in ring 0: integer code, string and port I/O, system
//! registers, interrupts.

pub mod asm;
mod bad;
mod debugging;
mod exact;
mod interrupts;
mod memory;
mod modes;
mod rig;
mod state;

use std::time::Duration;

use holdfast_accel::{AccelError, Accelerator, Exit, IrqChip};

pub use rig::Rig;

/// How long a case may take before it counts as hung.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Why a case failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The accelerator reported an error.
    #[error("the accelerator failed")]
    Accel(#[from] AccelError),
    /// The guest's code does not assemble.
    #[error("the guest does not assemble")]
    Assemble(#[from] iced_x86::IcedError),
    /// A device or the host did.
    #[error("the rig failed: {0}")]
    Rig(String),
    /// A run ended in a way that the case does not expect.
    #[error("unexpected exit {exit:?} after output {output:?}")]
    Exit {
        /// The exit.
        exit: Exit,
        /// What the guest had written.
        output: String,
    },
    /// The guest did not get on.
    #[error("no progress within the limit, after output {0:?}")]
    Hung(String),
    /// The guest's output is wrong.
    #[error("wrote {found:?} instead of {expected:?}")]
    Output {
        /// What it should have written.
        expected: String,
        /// What it wrote.
        found: String,
    },
}

/// One guest.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// Builds the guest, runs it and returns what it wrote.
    run: fn(&dyn Accelerator, IrqChip) -> Result<String, Failure>,
    /// What it must write.
    expected: &'static str,
}

impl Case {
    /// Runs the guest on `accel` with the interrupt controllers at `irqchip`.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn check(&self, accel: &dyn Accelerator, irqchip: IrqChip) -> Result<(), Failure> {
        let found = (self.run)(accel, irqchip)?;
        if found == self.expected {
            return Ok(());
        }
        Err(Failure::Output { expected: self.expected.into(), found })
    }
}

/// All guests for x86-64.
pub fn cases() -> Vec<Case> {
    [modes::CASES, memory::CASES, interrupts::CASES, debugging::CASES, state::CASES].concat()
}

/// Guests that need what an accelerator running at the host's speed has, and an interpreting KVM does not.
pub fn hardware_cases() -> Vec<Case> {
    [debugging::SOFTWARE, bad::CASES].concat()
}

/// Guests of what translation has and KVM does otherwise.
pub fn translation_cases() -> Vec<Case> {
    exact::CASES.to_vec()
}
