//! Versioned, self-describing device state.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// One device's section of a snapshot or migration stream.
///
/// Unknown fields in `data` are ignored and missing ones take their defaults, so a device adds an
/// optional field without a new version. `version` changes only when an old reader would go wrong.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceState {
    /// The kind of device, for example `virtio-blk`.
    pub kind: String,
    /// The version of the layout of `data`, from 1.
    pub version: u32,
    /// The state itself.
    pub data: serde_json::Value,
}

/// A state that could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The section belongs to another kind of device.
    #[error("section is of kind `{found}`, this device is a `{expected}`")]
    Kind {
        /// What this device is.
        expected: &'static str,
        /// What the section says.
        found: String,
    },
    /// The section was written by a newer version.
    #[error("`{kind}` state version {found} is newer than {supported}, the newest known")]
    Version {
        /// The device's kind.
        kind: &'static str,
        /// The section's version.
        found: u32,
        /// The newest that can be read.
        supported: u32,
    },
    /// The section does not parse.
    #[error("`{kind}` state does not parse")]
    Parse {
        /// The device's kind.
        kind: &'static str,
        /// What was wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The section parses but makes no sense for this device.
    #[error("`{kind}` state is invalid: {reason}")]
    Invalid {
        /// The device's kind.
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl DeviceState {
    /// Wraps `data` as version `version` of `kind`.
    ///
    /// # Errors
    /// [`StateError::Parse`] if `data` cannot be represented.
    pub fn new(kind: &'static str, version: u32, data: &impl Serialize) -> Result<Self, StateError> {
        let data = serde_json::to_value(data).map_err(|source| StateError::Parse { kind, source })?;
        Ok(Self { kind: kind.to_owned(), version, data })
    }

    /// Unwraps the state of a device of `kind` that can read up to version `newest`.
    ///
    /// # Errors
    /// [`StateError`] if kind or version differ or the data does not parse.
    pub fn parse<T: DeserializeOwned>(&self, kind: &'static str, newest: u32) -> Result<T, StateError> {
        if self.kind != kind {
            return Err(StateError::Kind { expected: kind, found: self.kind.clone() });
        }
        if self.version > newest {
            return Err(StateError::Version { kind, found: self.version, supported: newest });
        }
        T::deserialize(&self.data).map_err(|source| StateError::Parse { kind, source })
    }
}
