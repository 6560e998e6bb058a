//! The test finisher (`sifive,test1`): one register by which a guest powers off, reboots or fails. Device
//! trees name it as the `syscon` of `syscon-poweroff` and `syscon-reboot`.

use std::sync::Arc;

use holdfast_device::{Access, BusDevice, Device, DeviceState, StateError, SystemEvent, SystemSink};

/// Written to power off.
pub const PASS: u32 = 0x5555;
/// Written to reboot.
pub const RESET: u32 = 0x7777;
/// Written, with an exit status in the upper half, to end the process with that status.
pub const FAIL: u32 = 0x3333;

/// The finisher.
#[derive(Debug)]
pub struct Syscon {
    system: Arc<dyn SystemSink>,
}

impl Syscon {
    /// A finisher that passes requests on to `system`.
    pub fn new(system: Arc<dyn SystemSink>) -> Arc<Self> {
        Arc::new(Self { system })
    }
}

impl BusDevice for Syscon {
    fn read(&self, _access: Access, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, access: Access, data: &[u8]) {
        let value = match (access.offset, data) {
            (0, &[a, b]) => u32::from(u16::from_le_bytes([a, b])),
            (0, &[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]),
            _ => return,
        };
        let event = match value & 0xffff {
            PASS => SystemEvent::Shutdown,
            RESET => SystemEvent::Reset,
            // A failure never looks like success, whatever its status is cut down to.
            FAIL => SystemEvent::Exit(u8::try_from(value >> 16).ok().filter(|&s| s != 0).unwrap_or(1)),
            _ => return,
        };
        self.system.request(event);
    }
}

const KIND: &str = "syscon";

impl Device for Syscon {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {}

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(KIND, 1, &serde_json::json!({}))
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        state.parse::<serde_json::Value>(KIND, 1).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    #[derive(Debug, Default)]
    struct Sink(Mutex<Vec<SystemEvent>>);
    impl SystemSink for Sink {
        fn request(&self, event: SystemEvent) {
            self.0.lock().push(event);
        }
    }

    #[test]
    fn only_the_known_values_at_the_register_do_something() {
        let sink = Arc::new(Sink::default());
        let syscon = Syscon::new(Arc::clone(&sink) as Arc<dyn SystemSink>);
        let write = |offset, data: &[u8]| {
            syscon.write(Access { offset, address: offset, vcpu: Some(0) }, data);
        };
        for (offset, data) in [(4, &PASS.to_le_bytes()[..]), (0, &[0x55]), (0, &[0; 8]), (0, &[1, 2, 3, 4])] {
            write(offset, data);
        }
        assert!(sink.0.lock().is_empty());
        write(0, &PASS.to_le_bytes());
        write(0, &RESET.to_le_bytes());
        write(0, &(FAIL | 7 << 16).to_le_bytes());
        write(0, &(FAIL | 0x100 << 16).to_le_bytes());
        write(0, &(FAIL as u16).to_le_bytes());
        let exit = SystemEvent::Exit;
        let expected = [SystemEvent::Shutdown, SystemEvent::Reset, exit(7), exit(1), exit(1)];
        assert_eq!(*sink.0.lock(), expected);
        let state = syscon.save().expect("state");
        syscon.restore(&state).expect("own state");
    }
}
