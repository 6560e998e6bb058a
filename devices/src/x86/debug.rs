//! The debug console (Bochs's port 0xe9, SeaBIOS's and OVMF's 0x402).

use std::fmt;
use std::sync::Arc;

use holdfast_device::{Access, BuildContext, BuildError, BusDevice, Device, DeviceState, StateError};

use super::attach;
use crate::chardev::CharBackend;

const CONSOLE: &str = "debugcon";

/// A port that passes bytes to a character back end and says that it is there by reading as 0xe9.
pub struct DebugConsole {
    backend: Option<Arc<dyn CharBackend>>,
}

impl fmt::Debug for DebugConsole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DebugConsole").field("backend", &self.backend.as_ref().map(|b| b.label())).finish()
    }
}

impl DebugConsole {
    /// Builds the console at `port`; without a back end its output is dropped.
    ///
    /// # Errors
    /// [`BuildError::Bus`] if the port is taken.
    pub fn build(
        port: u16,
        backend: Option<Arc<dyn CharBackend>>,
        context: &BuildContext,
    ) -> Result<Arc<Self>, BuildError> {
        let console = Arc::new(Self { backend });
        attach(&context.pio, CONSOLE, port.into(), 1, Arc::clone(&console) as Arc<dyn BusDevice>)?;
        Ok(console)
    }
}

impl BusDevice for DebugConsole {
    fn read(&self, _access: Access, data: &mut [u8]) {
        data.fill(0xe9);
    }

    fn write(&self, _access: Access, data: &[u8]) {
        if let Some(backend) = &self.backend {
            backend.send(data);
        }
    }
}

impl Device for DebugConsole {
    fn id(&self) -> &str {
        CONSOLE
    }

    fn reset(&self) {}

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(CONSOLE, 1, &())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        state.parse(CONSOLE, 1)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::testing::{context, hostile, inb, outb};
    use super::*;
    use crate::chardev::CharReceiver;
    use parking_lot::Mutex;

    #[derive(Debug, Default)]
    struct Tape(Mutex<Vec<u8>>);
    impl CharBackend for Tape {
        fn send(&self, data: &[u8]) {
            self.0.lock().extend_from_slice(data);
        }
        fn connect(&self, _receiver: Arc<dyn CharReceiver>) {}
        fn receiver_ready(&self) {}
        fn label(&self) -> String {
            "tape".into()
        }
    }

    #[test]
    fn the_console_passes_bytes_on() {
        let (c, _) = context();
        let tape = Arc::new(Tape::default());
        let backend = Arc::clone(&tape) as Arc<dyn CharBackend>;
        let console = DebugConsole::build(0x402, Some(backend), &c).expect("build");
        assert_eq!(inb(&c.pio, 0x402), 0xe9);
        b"hi".iter().for_each(|b| outb(&c.pio, 0x402, *b));
        assert_eq!(*tape.0.lock(), b"hi");
        let state = console.save().expect("saves");
        console.restore(&state).expect("restores");
        hostile(&*console, 0x402, 1);
    }
}
