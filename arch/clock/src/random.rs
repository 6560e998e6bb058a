//! Randomness for devices.

use std::fmt::Debug;

/// The source of randomness refused.
#[derive(Debug, thiserror::Error)]
#[error("no random bytes from the host")]
pub struct RandomError(#[source] pub std::io::Error);

/// Where a VM's random bytes come from; replaced under record and replay.
pub trait RandomSource: Send + Sync + Debug {
    /// Fills `buf`.
    ///
    /// # Errors
    /// [`RandomError`] if the host gives none.
    fn fill(&self, buf: &mut [u8]) -> Result<(), RandomError>;
}

/// The host kernel's random number generator.
#[derive(Debug, Default, Clone, Copy)]
pub struct HostRandom;

impl RandomSource for HostRandom {
    fn fill(&self, buf: &mut [u8]) -> Result<(), RandomError> {
        getrandom::fill(buf).map_err(|e| RandomError(e.into()))
    }
}
