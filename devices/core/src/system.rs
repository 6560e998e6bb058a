//! What a guest asks of its machine.

use std::fmt::Debug;

/// A request of the guest, made through a device (syscon, ACPI PM, debug exit) or its CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SystemEvent {
    /// Power off.
    Shutdown,
    /// Reboot.
    Reset,
    /// The guest has panicked.
    Panic,
    /// A debug-exit device asks for this exit status of the whole process.
    Exit(u8),
}

/// What a guest's driver does with its device as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceEvent {
    /// It has started to use it.
    Activated,
    /// It has reset it.
    Reset,
    /// It has let go of it: the device may be taken out.
    Ejected,
}

/// Takes guests' requests. It returns at once; the VM acts on its own thread.
pub trait SystemSink: Send + Sync + Debug {
    /// The guest asks for `event`.
    fn request(&self, event: SystemEvent);

    /// The driver of device `id` has done `event`, for whoever watches the VM.
    fn device_event(&self, id: &str, event: DeviceEvent) {
        let _ = (id, event);
    }
}
