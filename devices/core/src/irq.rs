//! Interrupt lines and messages.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// Takes the level of numbered input pins: an interrupt controller, or a vCPU's own pins.
pub trait IrqSink: Send + Sync + Debug {
    /// Sets input `pin` to `level`. Setting it to the level that it has changes nothing.
    fn set_level(&self, pin: u32, level: bool);
}

/// One wire into an interrupt controller.
#[derive(Debug, Clone)]
pub struct IrqLine {
    sink: Arc<dyn IrqSink>,
    pin: u32,
}

impl IrqLine {
    /// The wire into input `pin` of `sink`.
    pub fn new(sink: Arc<dyn IrqSink>, pin: u32) -> Self {
        Self { sink, pin }
    }

    /// A wire that ends nowhere.
    pub fn unconnected() -> Self {
        #[derive(Debug)]
        struct Nowhere;
        impl IrqSink for Nowhere {
            fn set_level(&self, _pin: u32, _level: bool) {}
        }
        Self::new(Arc::new(Nowhere), 0)
    }

    /// Drives the wire.
    pub fn set(&self, level: bool) {
        self.sink.set_level(self.pin, level);
    }

    /// Raises and lowers the wire, for an edge-triggered input.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// The input that the wire goes to.
    pub fn pin(&self) -> u32 {
        self.pin
    }
}

/// The interrupt pins of the vCPUs, offered by the accelerator. What a pin number means is the
/// guest architecture's business (RISC-V: the bit number in `mip`; x86: 0 = LINT0, 1 = LINT1/NMI).
pub trait CpuLines: Send + Sync + Debug {
    /// Sets `pin` of `vcpu`. Unknown vCPUs are ignored.
    fn set_cpu_pin(&self, vcpu: u32, pin: u32, level: bool);
}

/// The source of 8259-style external interrupts (`INTR` and `INTA`).
pub trait ExtInt: Send + Sync + Debug {
    /// True while `INTR` is raised.
    fn pending(&self) -> bool;
    /// The interrupt acknowledge cycle: the vector to take.
    fn acknowledge(&self) -> u8;
}

/// Where processors report x87 errors that they do not take as exceptions (CR0.NE clear): the pins `FERR#` and `IGNNE#`
/// (SDM volume 1, section 8.7.2).
pub trait FpuErrors: Send + Sync + Debug {
    /// A processor drives `FERR#`. True if `IGNNE#` is asserted: the processor goes on despite the error.
    fn set_ferr(&self, level: bool) -> bool;
}

/// A message-signalled interrupt as the device writes it. Little-endian data, PCI 3.0 section 6.8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct MsiMessage {
    /// Address that is written.
    pub address: u64,
    /// The 32 bits written.
    pub data: u32,
    /// The requester: PCI bus/device/function.
    pub device: u32,
}

/// Where message-signalled interrupts go.
pub trait MsiController: Send + Sync + Debug {
    /// Delivers one message.
    ///
    /// # Errors
    /// The accelerator's error if it could not be delivered.
    fn send(&self, message: MsiMessage) -> io::Result<()>;

    /// A vector that can be triggered often, and from an eventfd where the accelerator has irqfds.
    ///
    /// # Errors
    /// The accelerator's error if no route is left.
    fn vector(self: Arc<Self>) -> io::Result<Box<dyn MsiVector>>;
}

/// One message-signalled interrupt of a device.
pub trait MsiVector: Send + Sync + Debug {
    /// Sets the message, or masks the vector with `None`. A trigger while masked is kept and
    /// delivered once when a message is set.
    ///
    /// # Errors
    /// The accelerator's error if the route cannot be set.
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()>;

    /// Delivers the interrupt.
    ///
    /// # Errors
    /// The accelerator's error.
    fn trigger(&self) -> io::Result<()>;

    /// An eventfd that triggers the vector when written, if the accelerator has that.
    fn eventfd(&self) -> Option<&EventFd>;

    /// True if a trigger waits for the vector to be unmasked (the pending bit).
    fn pending(&self) -> bool;
}
