//! Errors of operations, with what the codecs need to know of them.

use std::error::Error;
use std::fmt;

/// What kind of failure it is: chooses the HTTP status and the QMP class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// There is no VM. HTTP 404.
    NotCreated,
    /// There is a VM, but no such device in it. HTTP 404, QMP `DeviceNotFound`.
    DeviceNotFound,
    /// There is no such block job. HTTP 404, QMP `DeviceNotActive`.
    NotActive,
    /// The identifier or path is in use. HTTP 409.
    Conflict,
    /// An earlier request of this kind is still under way. HTTP 429.
    Busy,
    /// The request itself is wrong. HTTP 400.
    Invalid,
    /// The feature is not there. HTTP 500.
    Unsupported,
    /// Anything else: the wrong state, the host said no. HTTP 500.
    Failed,
}

impl ErrorKind {
    /// The HTTP status that says it.
    pub fn http_status(self) -> u16 {
        match self {
            Self::NotCreated | Self::DeviceNotFound | Self::NotActive => 404,
            Self::Conflict => 409,
            Self::Busy => 429,
            Self::Invalid => 400,
            Self::Unsupported | Self::Failed => 500,
        }
    }

    /// The QMP error class that says it.
    pub fn qmp_class(self) -> &'static str {
        match self {
            Self::DeviceNotFound => "DeviceNotFound",
            Self::NotActive => "DeviceNotActive",
            _ => "GenericError",
        }
    }
}

/// An operation that failed.
#[derive(Debug)]
pub struct ControlError {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl ControlError {
    /// A failure without a deeper cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// A failure because of `source`.
    pub fn caused(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self { kind, message: message.into(), source: Some(source.into()) }
    }

    /// [`ErrorKind::Failed`] because of `source`.
    pub fn failed(message: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::caused(ErrorKind::Failed, message, source)
    }

    /// There is no VM.
    pub fn not_created() -> Self {
        Self::new(ErrorKind::NotCreated, "VM is not created")
    }

    /// There is a VM and it does not run.
    pub fn not_running() -> Self {
        Self::new(ErrorKind::Failed, "VM is not running")
    }

    /// `what` is not there.
    pub fn unsupported(what: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Unsupported, format!("{what} is not supported by this version"))
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The messages of the whole chain, outermost first.
    pub fn chain(&self) -> Vec<String> {
        let outermost: &dyn Error = self;
        std::iter::successors(Some(outermost), |error| (*error).source()).map(ToString::to_string).collect()
    }

    /// The whole chain in one line.
    pub fn describe(&self) -> String {
        self.chain().join(": ")
    }
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for ControlError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}

impl From<holdfast_config::ConfigError> for ControlError {
    fn from(error: holdfast_config::ConfigError) -> Self {
        Self::caused(ErrorKind::Invalid, "The configuration is not valid", error)
    }
}
