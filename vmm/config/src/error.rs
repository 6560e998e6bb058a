//! What is wrong with a configuration.

use std::fmt;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The field, as a path: `cpus.max_vcpus`, `disks[1].id`.
    pub field: String,
    /// What is wrong with its value and what would be right.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.field, self.reason)
    }
}

/// Everything that is wrong, in the order of the fields.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// Notes that `field` is wrong because of `reason`.
    pub fn add(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.0.push(Problem { field: field.into(), reason: reason.into() });
    }

    /// `Ok` if nothing was noted.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with everything that was noted.
    pub fn into_result(self) -> Result<(), ConfigError> {
        if self.0.is_empty() { Ok(()) } else { Err(ConfigError::Invalid(self)) }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is not JSON.
    #[error("not valid JSON")]
    NotJson {
        /// What the parser says, with line and column.
        #[source]
        source: serde_json::Error,
    },
    /// A field has the wrong type.
    #[error("`{field}` cannot be read")]
    Syntax {
        /// The field, as a path; `.` for the whole.
        field: String,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// It can be read and says what cannot be.
    #[error("{0}")]
    Invalid(Problems),
}
