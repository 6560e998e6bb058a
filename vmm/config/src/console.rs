//! Serial port and x86 debug console. The virtio console is configured by its own device.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use holdfast_virtio::console::config::ConsoleMode;

/// The first serial port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SerialConfig {
    /// Output file for mode File; the pseudo-terminal of mode Pty once the VM has booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// UNIX socket for mode Socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Where the bytes go.
    #[schemars(extend("x-positional" = true))]
    pub mode: ConsoleMode,
}

impl Default for SerialConfig {
    fn default() -> Self {
        Self { file: None, socket: None, mode: ConsoleMode::Null }
    }
}

/// A named port of the virtio console: a stream of bytes that guests find as `/dev/virtio-ports/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConsolePortConfig {
    /// Its name in the guest, for example `org.qemu.guest_agent.0`.
    pub name: String,
    /// Output file for mode File; the pseudo-terminal of mode Pty once the VM has booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// UNIX socket for mode Socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Where the bytes go: Null, Pty, File or Socket.
    pub mode: ConsoleMode,
}

/// Default I/O port of the x86 debug console.
pub(crate) const DEBUG_CONSOLE_PORT: u16 = 0xe9;

/// The x86 debug console: bytes written to an I/O port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DebugConsoleConfig {
    /// Output file for mode File; the pseudo-terminal of mode Pty once the VM has booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Where the bytes go: Off, Pty, Tty or File.
    #[schemars(extend("x-positional" = true))]
    pub mode: ConsoleMode,
    /// I/O port.
    #[serde(default = "default_iobase", skip_serializing_if = "Option::is_none")]
    pub iobase: Option<u16>,
}

// The field is optional in Cloud Hypervisor's JSON, hence an Option with a default inside.
#[expect(clippy::unnecessary_wraps)]
fn default_iobase() -> Option<u16> {
    Some(DEBUG_CONSOLE_PORT)
}

impl Default for DebugConsoleConfig {
    fn default() -> Self {
        Self { file: None, mode: ConsoleMode::Off, iobase: Some(DEBUG_CONSOLE_PORT) }
    }
}
