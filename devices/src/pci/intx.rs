//! Level-triggered PCI interrupts, several functions to a wire.

use std::collections::HashSet;
use std::sync::Arc;

use holdfast_device::IrqLine;
use parking_lot::Mutex;

/// A wire that is high while any of the functions that share it asserts its pin.
#[derive(Debug)]
pub(super) struct SharedLine {
    line: IrqLine,
    asserted: Mutex<HashSet<(u8, u8)>>,
}

impl SharedLine {
    pub(super) fn new(line: IrqLine) -> Arc<Self> {
        Arc::new(Self { line, asserted: Mutex::default() })
    }

    fn set(&self, source: (u8, u8), level: bool) {
        let mut asserted = self.asserted.lock();
        let was = !asserted.is_empty();
        if level {
            asserted.insert(source);
        } else {
            asserted.remove(&source);
        }
        // The wire is driven under the lock, so that two functions cannot reorder their edges.
        if was == asserted.is_empty() {
            self.line.set(level);
        }
    }
}

/// One function's interrupt pin, swizzled to a wire of the root bus.
#[derive(Debug, Clone)]
pub struct Intx {
    shared: Arc<SharedLine>,
    source: (u8, u8),
}

impl Intx {
    pub(super) fn new(shared: Arc<SharedLine>, devfn: u8, pin: u8) -> Self {
        Self { shared, source: (devfn, pin) }
    }

    /// The value of the Interrupt Pin register: 1 for INTA# to 4 for INTD#.
    pub fn pin(&self) -> u8 {
        self.source.1
    }

    /// Drives the pin. Devices use [`super::PciConfig::set_intx`], which honours Interrupt Disable.
    pub(super) fn set(&self, level: bool) {
        self.shared.set(self.source, level);
    }
}
