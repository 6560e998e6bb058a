//! The debug console (Bochs's port 0xe9, SeaBIOS's and OVMF's 0x402) and the debug exit port.

use std::fmt;
use std::sync::Arc;

use holdfast_device::{
    Access, BuildContext, BuildError, BusDevice, Device, DeviceState, StateError, SystemEvent, SystemSink,
};

use super::attach;
use crate::chardev::CharBackend;

const CONSOLE: &str = "debugcon";
const EXIT: &str = "isa-debug-exit";

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

/// A port that ends the whole process: writing `v` exits with status `v * 2 + 1`, never zero.
#[derive(Debug)]
pub struct DebugExit {
    system: Arc<dyn SystemSink>,
}

impl DebugExit {
    /// Length of the window in bytes.
    pub const LEN: u64 = 4;

    /// Builds the port.
    ///
    /// # Errors
    /// [`BuildError::Bus`] if the port is taken.
    pub fn build(port: u16, context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        let exit = Arc::new(Self { system: Arc::clone(&context.system) });
        attach(&context.pio, EXIT, port.into(), Self::LEN, Arc::clone(&exit) as Arc<dyn BusDevice>)?;
        Ok(exit)
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _access: Access, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _access: Access, data: &[u8]) {
        if let Some(value) = data.first() {
            self.system.request(SystemEvent::Exit(value << 1 | 1));
        }
    }
}

impl Device for DebugExit {
    fn id(&self) -> &str {
        EXIT
    }

    fn reset(&self) {}

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(EXIT, 1, &())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        state.parse(EXIT, 1)
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

    #[test]
    fn the_exit_port_exits() {
        let (c, requests) = context();
        let exit = DebugExit::build(0xf4, &c).expect("build");
        outb(&c.pio, 0xf4, 0x10);
        assert_eq!(requests.take(), [SystemEvent::Exit(0x21)]);
        assert!(DebugExit::build(0xf4, &c).is_err(), "the port is taken");
        hostile(&*exit, 0xf4, 4);
    }
}
