//! The local APIC as its processor sees it (SDM volume 3, chapter 11).
//!
//! The APIC itself is a device that other processors, the IOAPIC and PCI devices send messages to. This is what the
//! processor asks of it. The runtime hands it to each vCPU as an opaque controller: an [`ApicHandle`].

use std::fmt::Debug;
use std::sync::Arc;

use holdfast_tcg_runtime::Cpu;

/// What a vCPU's controller has to be ([`holdfast_tcg_runtime::VmParts::controllers`]).
#[derive(Debug, Clone)]
pub struct ApicHandle(pub Arc<dyn LocalApic>);

/// Signals that are no vectored interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Signals {
    /// INIT was received.
    pub init: bool,
    /// Non-maskable interrupts that were received, up to two.
    pub nmi: u8,
    /// A start-up IPI with this vector was received.
    pub sipi: Option<u8>,
}

/// The state that goes into a [`holdfast_arch::x86_64::State`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ApicState {
    /// IA32_APIC_BASE.
    pub base: u64,
    /// The registers: the 1 KiB page of SDM table 11-1, 32 bits every 16 bytes.
    pub registers: Vec<u8>,
    /// IA32_TSC_DEADLINE; 0 if none is set.
    pub tsc_deadline: u64,
}

/// A local APIC. All methods are called on its vCPU's thread. The APIC makes the vCPU look
/// ([`holdfast_tcg_runtime::TcgVm::interrupt`]) whenever the answer of [`LocalApic::has_interrupt`] or
/// [`LocalApic::has_signal`] may have become true.
pub trait LocalApic: Send + Sync + Debug {
    /// The (x2)APIC id.
    fn id(&self) -> u32;
    /// True if [`LocalApic::acknowledge`] would give a vector: one above the processor priority, or one of the 8259s.
    fn has_interrupt(&self) -> bool;
    /// Takes the most urgent interrupt into service and gives its vector. `None` if there is none any more.
    fn acknowledge(&self) -> Option<u8>;
    /// True if there is a signal to take.
    fn has_signal(&self) -> bool;
    /// Takes the signals. A SIPI that is not taken while the processor waits for one is lost, as the architecture has it.
    fn take_signals(&self) -> Signals;
    /// Puts an NMI back, or makes one from outside (the control plane).
    fn raise_nmi(&self);
    /// CR8: bits 4 to 7 of the task priority.
    fn cr8(&self) -> u8;
    /// Sets CR8; makes the vCPU look if that lets an interrupt through.
    fn set_cr8(&self, value: u8);
    /// IA32_APIC_BASE.
    fn base(&self) -> u64;
    /// Writes IA32_APIC_BASE; false (#GP) if the transition or an address is not allowed.
    /// `bits` is the width of physical addresses.
    fn set_base(&self, value: u64, bits: u64) -> bool;
    /// Reads x2APIC MSR 0x800 + `register`; `None` (#GP) if it is not there or not in x2APIC mode.
    fn read_msr(&self, register: u32) -> Option<u64>;
    /// Writes x2APIC MSR 0x800 + `register`; false (#GP) if that is not allowed.
    fn write_msr(&self, register: u32, value: u64) -> bool;
    /// IA32_TSC_DEADLINE.
    fn tsc_deadline(&self) -> u64;
    /// Writes IA32_TSC_DEADLINE, which is due at `at` (guest-virtual nanoseconds).
    fn set_tsc_deadline(&self, value: u64, at: u64);
    /// After reset (`init` false) or INIT (true: the id and the base are kept).
    fn reset(&self, init: bool);
    /// Sends an interrupt of the vector and delivery mode in `icr` (the low bits of the interrupt command) to the APIC
    /// with `id`; false if there is none.
    fn send_ipi(&self, id: u32, icr: u32) -> bool;
    /// Drives `FERR#`: an x87 error that is not taken as an exception is pending. True if `IGNNE#` is asserted, or nothing
    /// takes such errors: the processor goes on.
    fn set_ferr(&self, level: bool) -> bool;
    /// The state.
    fn save(&self) -> ApicState;
    /// Replaces the state. `deadline_at`: as in [`LocalApic::set_tsc_deadline`].
    ///
    /// # Errors
    /// A text that says what does not fit.
    fn load(&self, state: &ApicState, deadline_at: u64) -> Result<(), String>;
}

/// The vCPU's local APIC, if it has one.
pub fn of(cpu: &Cpu<'_>) -> Option<Arc<dyn LocalApic>> {
    handle(cpu).map(Arc::clone)
}

/// True if [`LocalApic::has_interrupt`]. Kernels that unmask interrupts ask, all the time.
pub(crate) fn has_interrupt(cpu: &Cpu<'_>) -> bool {
    handle(cpu).is_some_and(|apic| apic.has_interrupt())
}

fn handle<'a>(cpu: &'a Cpu<'_>) -> Option<&'a Arc<dyn LocalApic>> {
    Some(&cpu.controller()?.downcast_ref::<ApicHandle>()?.0)
}
