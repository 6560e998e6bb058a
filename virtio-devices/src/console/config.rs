//! `--console` and `ConsoleConfig`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{Checker, FieldError};

/// Where a console's or serial port's bytes go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConsoleMode {
    /// There is no such device.
    #[default]
    #[serde(alias = "off")]
    Off,
    /// To a new pseudo-terminal.
    #[serde(alias = "pty")]
    Pty,
    /// To the terminal that Holdfast was started from.
    #[serde(alias = "tty")]
    Tty,
    /// To a file.
    #[serde(alias = "file")]
    File,
    /// To whoever connects to a UNIX socket.
    #[serde(alias = "socket")]
    Socket,
    /// Nowhere.
    #[serde(alias = "null")]
    Null,
}

/// A virtio console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConsoleConfig {
    /// Where its bytes go.
    #[schemars(extend("x-positional" = true))]
    pub mode: ConsoleMode,
    /// The file of mode `File`; in answers also the pseudo-terminal of mode `Pty`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The UNIX socket of mode `Socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Name of the device, unique in the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Behind the virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// PCI device number on the root bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self {
            mode: ConsoleMode::Tty,
            file: None,
            socket: None,
            id: None,
            iommu: false,
            pci_segment: 0,
            pci_device_id: None,
        }
    }
}

impl ConsoleConfig {
    /// All fields that cannot be used.
    pub fn validate(&self) -> Vec<FieldError> {
        let mut check = Checker::default();
        check.pci(self.iommu, self.pci_segment, self.pci_device_id);
        check.unsupported(self.mode == ConsoleMode::Socket, "mode");
        check.refuse(
            self.mode == ConsoleMode::File && self.file.is_none(),
            "file",
            "is missing: mode File needs a path",
        );
        check.0
    }
}
