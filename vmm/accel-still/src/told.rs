//! What devices tell their VM.

use std::io;
use std::sync::Arc;

use holdfast_device::{CpuLines, IrqSink, MsiController, MsiMessage, MsiVector, SystemEvent, SystemSink};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

/// The ends of all lines and messages: remembers them in their order, or forgets.
#[derive(Debug, Default)]
pub struct Told {
    /// A guest that runs for ever would fill the memory.
    forgets: bool,
    pins: Mutex<Vec<(u32, u32, bool)>>,
    levels: Mutex<Vec<(u32, bool)>>,
    messages: Mutex<Vec<MsiMessage>>,
    events: Mutex<Vec<SystemEvent>>,
    routes: Mutex<Vec<usize>>,
}

impl Told {
    /// Remembers nothing.
    pub fn forgetful() -> Self {
        Self { forgets: true, ..Self::default() }
    }

    fn note<T>(&self, list: &Mutex<Vec<T>>, what: T) {
        if !self.forgets {
            list.lock().push(what);
        }
    }

    /// The interrupt pins of vCPUs: (vCPU, pin, level).
    pub fn pins(&self) -> Vec<(u32, u32, bool)> {
        self.pins.lock().clone()
    }

    /// The level that a vCPU's pin was last set to.
    pub fn pin(&self, vcpu: u32, pin: u32) -> Option<bool> {
        self.pins.lock().iter().rev().find(|told| (told.0, told.1) == (vcpu, pin)).map(|told| told.2)
    }

    /// Inputs of the kernel's interrupt controllers: (pin, level).
    pub fn levels(&self) -> Vec<(u32, bool)> {
        self.levels.lock().clone()
    }

    /// Message-signalled interrupts.
    pub fn messages(&self) -> Vec<MsiMessage> {
        self.messages.lock().clone()
    }

    /// Resets, power-offs and the like.
    pub fn events(&self) -> Vec<SystemEvent> {
        self.events.lock().clone()
    }

    /// How many pins of the IOAPIC were routed at each change.
    pub fn routes(&self) -> Vec<usize> {
        self.routes.lock().clone()
    }

    pub(crate) fn routed(&self, pins: usize) {
        self.note(&self.routes, pins);
    }
}

impl CpuLines for Told {
    fn set_cpu_pin(&self, vcpu: u32, pin: u32, level: bool) {
        self.note(&self.pins, (vcpu, pin, level));
    }
}

impl IrqSink for Told {
    fn set_level(&self, pin: u32, level: bool) {
        self.note(&self.levels, (pin, level));
    }
}

impl SystemSink for Told {
    fn request(&self, event: SystemEvent) {
        self.note(&self.events, event);
    }
}

impl MsiController for Told {
    fn send(&self, message: MsiMessage) -> io::Result<()> {
        self.note(&self.messages, message);
        Ok(())
    }
    fn vector(self: Arc<Self>) -> io::Result<Box<dyn MsiVector>> {
        Ok(Box::new(Vector { told: self, state: Mutex::default() }))
    }
}

/// A vector that keeps what is triggered while it is masked.
#[derive(Debug)]
struct Vector {
    told: Arc<Told>,
    /// The message, unless masked, and what waits.
    state: Mutex<(Option<MsiMessage>, bool)>,
}

impl MsiVector for Vector {
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut state = self.state.lock();
        let waited = std::mem::take(&mut state.1);
        state.0 = message;
        match message {
            Some(message) if waited => self.told.send(message),
            None => {
                state.1 = waited;
                Ok(())
            }
            Some(_) => Ok(()),
        }
    }
    fn trigger(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        match state.0 {
            Some(message) => self.told.send(message),
            None => {
                state.1 = true;
                Ok(())
            }
        }
    }
    fn eventfd(&self) -> Option<&EventFd> {
        None
    }
    fn pending(&self) -> bool {
        self.state.lock().1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_triggered_while_masked_is_sent_once_afterwards() {
        let told = Arc::new(Told::default());
        let vector = Arc::clone(&told).vector().expect("a vector");
        let message = MsiMessage { address: 0xfee0_0000, data: 0x31, ..MsiMessage::default() };
        vector.trigger().expect("kept");
        vector.trigger().expect("kept");
        assert!(vector.pending() && told.messages().is_empty());
        vector.set(Some(message)).expect("unmasked");
        assert!(!vector.pending());
        vector.trigger().expect("sent");
        assert_eq!(told.messages(), [message, message]);
    }

    #[test]
    fn the_forgetful_remember_nothing() {
        let told = Told::forgetful();
        told.set_cpu_pin(0, 9, true);
        told.request(SystemEvent::Reset);
        assert!(told.pin(0, 9).is_none() && told.events().is_empty());
        let told = Told::default();
        told.set_cpu_pin(0, 9, true);
        told.set_cpu_pin(0, 9, false);
        assert_eq!(told.pin(0, 9), Some(false));
    }
}
