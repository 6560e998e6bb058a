//! Single ports of a PC: POST codes, port 0x92, the reset control register.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use holdfast_device::{
    Access, BuildContext, BuildError, BusDevice, Device, DeviceState, StateError, SystemEvent, SystemSink,
};

use super::attach;

/// Port 0x80: takes POST codes; guests also write it to pass about a microsecond.
#[derive(Debug, Default)]
pub struct PostPort {
    code: AtomicU8,
}

impl PostPort {
    /// Builds the port.
    ///
    /// # Errors
    /// [`BuildError::Bus`] if the port is taken.
    pub fn build(context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        let port = Arc::new(Self::default());
        attach(&context.pio, "post", 0x80, 1, Arc::clone(&port) as Arc<dyn BusDevice>)?;
        Ok(port)
    }

    /// The last code written.
    pub fn code(&self) -> u8 {
        self.code.load(Ordering::Relaxed)
    }
}

impl BusDevice for PostPort {
    fn read(&self, _access: Access, data: &mut [u8]) {
        data.fill(self.code());
    }

    fn write(&self, _access: Access, data: &[u8]) {
        if let Some(code) = data.first() {
            self.code.store(*code, Ordering::Relaxed);
        }
    }
}

impl Device for PostPort {
    fn id(&self) -> &str {
        "post"
    }

    fn reset(&self) {
        self.code.store(0, Ordering::Relaxed);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new("post", 1, &self.code())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        self.code.store(state.parse("post", 1)?, Ordering::Relaxed);
        Ok(())
    }
}

/// Port 0x92: fast reset and the second A20 gate, which like the first can be read back and masks
/// nothing.
#[derive(Debug)]
pub struct SystemControlA {
    value: AtomicU8,
    system: Arc<dyn SystemSink>,
}

impl SystemControlA {
    /// Builds the port.
    ///
    /// # Errors
    /// [`BuildError::Bus`] if the port is taken.
    pub fn build(context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        let port = Arc::new(Self { value: AtomicU8::new(2), system: Arc::clone(&context.system) });
        attach(&context.pio, "port92", 0x92, 1, Arc::clone(&port) as Arc<dyn BusDevice>)?;
        Ok(port)
    }
}

impl BusDevice for SystemControlA {
    fn read(&self, _access: Access, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(first) = data.first_mut() {
            *first = self.value.load(Ordering::Relaxed);
        }
    }

    fn write(&self, _access: Access, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let old = self.value.swap(value & 0x03, Ordering::Relaxed);
        if value & !old & 1 != 0 {
            self.system.request(SystemEvent::Reset);
        }
    }
}

impl Device for SystemControlA {
    fn id(&self) -> &str {
        "port92"
    }

    fn reset(&self) {
        self.value.store(2, Ordering::Relaxed);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new("port92", 1, &self.value.load(Ordering::Relaxed))
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let value: u8 = state.parse("port92", 1)?;
        self.value.store(value & 3, Ordering::Relaxed);
        Ok(())
    }
}

/// The reset control register at port 0xcf9 (ICH9 data sheet section 13.7.5). Not attached to the
/// port bus by itself: it lies within PCI's configuration ports.
#[derive(Debug)]
pub struct ResetControl {
    value: AtomicU8,
    system: Arc<dyn SystemSink>,
}

impl ResetControl {
    /// Builds the register.
    pub fn new(context: &BuildContext) -> Arc<Self> {
        Arc::new(Self { value: AtomicU8::new(0), system: Arc::clone(&context.system) })
    }
}

impl BusDevice for ResetControl {
    fn read(&self, _access: Access, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(first) = data.first_mut() {
            *first = self.value.load(Ordering::Relaxed);
        }
    }

    fn write(&self, _access: Access, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        // Bit 2 starts the reset as it rises; bits 1 and 3 say how hard, which is all the same here.
        let old = self.value.swap(value & 0x0a, Ordering::Relaxed);
        if value & !old & 4 != 0 {
            self.system.request(SystemEvent::Reset);
        }
    }
}

impl Device for ResetControl {
    fn id(&self) -> &str {
        "reset-control"
    }

    fn reset(&self) {
        self.value.store(0, Ordering::Relaxed);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new("reset-control", 1, &self.value.load(Ordering::Relaxed))
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let value: u8 = state.parse("reset-control", 1)?;
        self.value.store(value & 0x0a, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{access, context, hostile, inb, outb};
    use super::*;

    #[test]
    fn post_codes_are_kept() {
        let (c, _) = context();
        let post = PostPort::build(&c).expect("build");
        outb(&c.pio, 0x80, 0x5a);
        assert_eq!((inb(&c.pio, 0x80), post.code()), (0x5a, 0x5a));
        hostile(&*post, 0x80, 1);
    }

    #[test]
    fn port_92_resets_on_the_rising_edge_of_bit_0() {
        let (c, requests) = context();
        let port = SystemControlA::build(&c).expect("build");
        assert_eq!(inb(&c.pio, 0x92), 2);
        outb(&c.pio, 0x92, 0);
        assert_eq!(inb(&c.pio, 0x92), 0);
        assert!(requests.take().is_empty());
        outb(&c.pio, 0x92, 3);
        outb(&c.pio, 0x92, 3);
        assert_eq!(requests.take(), [SystemEvent::Reset]);
        let state = port.save().expect("saves");
        port.reset();
        port.restore(&state).expect("restores");
        assert_eq!(inb(&c.pio, 0x92), 3);
        hostile(&*port, 0x92, 1);
    }

    #[test]
    fn the_reset_register_resets_with_bit_2() {
        let (c, requests) = context();
        let register = ResetControl::new(&c);
        register.write(access(0xcf9, 0), &[2]);
        assert!(requests.take().is_empty());
        register.write(access(0xcf9, 0), &[6]);
        assert_eq!(requests.take(), [SystemEvent::Reset]);
        register.write(access(0xcf9, 0), &[6]);
        assert_eq!(requests.take(), [SystemEvent::Reset], "bit 2 does not stay");
        hostile(&*register, 0xcf9, 1);
    }
}
