//! What a debugger is told.

use std::fmt;

use holdfast_accel::Watchpoint;
use holdfast_arch::Arch;

/// Why a vCPU stopped for its debugger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebugWhy {
    /// It is about to execute the instruction at this guest-virtual address, which has a breakpoint.
    Breakpoint(u64),
    /// It did one instruction.
    Step,
    /// The last instruction hit this.
    Watch(Watchpoint),
    /// Somebody paused the VM, or the guest panicked.
    Paused,
}

/// What happens to a VM that is debugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebugEvent {
    /// All vCPUs stand, because of this one.
    Stopped {
        /// The vCPU.
        vcpu: u32,
        /// Why.
        why: DebugWhy,
    },
    /// The guest is off, with this exit status, and the debugger is detached.
    Ended(u8),
}

/// Hears of [`DebugEvent`]s on the manager's thread. It must not block.
pub struct DebugListener(Box<dyn Fn(DebugEvent) + Send>);

impl DebugListener {
    /// Calls `listener`.
    pub fn new(listener: impl Fn(DebugEvent) + Send + 'static) -> Self {
        Self(Box::new(listener))
    }

    /// Tells it.
    pub fn tell(&self, event: DebugEvent) {
        (self.0)(event);
    }
}

impl fmt::Debug for DebugListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DebugListener")
    }
}

/// A VM that a debugger is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DebugTarget {
    /// The guest's architecture.
    pub arch: Arch,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// Whether breakpoints cost debug registers or the like, of which there may not be enough.
    pub scarce: bool,
}

/// A piece of guest memory to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryWrite {
    /// First address.
    pub address: u64,
    /// What to write.
    pub data: Vec<u8>,
    /// The vCPU whose virtual addresses are meant; `None` for guest-physical ones.
    pub vcpu: Option<u32>,
}
