//! The accelerator traits.
//!
//! An [`Accelerator`] makes a [`Vm`], which makes [`Vcpu`]s. Machines, devices and the control plane
//! are written against these and nothing else; the conformance suite runs on every implementation.
//! CPU state crosses accelerators in `holdfast-arch`'s own structs.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use holdfast_arch::{Arch, CpuModel, CpuState};
use holdfast_clock::{Timers, VmClock};
pub use holdfast_device::SystemEvent;
use holdfast_device::{Bus, CpuLines, ExtInt, MsiController};
use holdfast_memory::GuestMemory;

/// Why an accelerator cannot serve, or what it failed at.
#[derive(Debug, thiserror::Error)]
pub enum AccelError {
    /// It cannot be used on this host or for this guest; `remedy` says what to do.
    #[error("{accel}: {reason}; {remedy}")]
    Unavailable {
        /// The accelerator's name.
        accel: &'static str,
        /// What is missing.
        reason: String,
        /// What the user can do about it.
        remedy: String,
    },
    /// The host refused an operation.
    #[error("{accel}: {what}")]
    Host {
        /// The accelerator's name.
        accel: &'static str,
        /// The operation.
        what: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The guest did something that the accelerator cannot do.
    #[error("{accel}: vCPU {vcpu} stopped: {reason}")]
    Guest {
        /// The accelerator's name.
        accel: &'static str,
        /// The vCPU.
        vcpu: u32,
        /// What happened, with the guest's program counter and what to do about it.
        reason: String,
    },
    /// The request makes no sense for this accelerator or guest.
    #[error("{accel}: {what} is not supported")]
    Unsupported {
        /// The accelerator's name.
        accel: &'static str,
        /// What was asked.
        what: String,
    },
    /// A CPU state cannot be taken over.
    #[error("{accel}: vCPU state cannot be restored: {reason}")]
    State {
        /// The accelerator's name.
        accel: &'static str,
        /// What does not fit.
        reason: String,
    },
}

/// Where the x86 interrupt controllers live (`kernel_irqchip=`). Other guests ignore it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IrqChip {
    /// Local APIC with the accelerator, IOAPIC, PIC and PIT in user space.
    #[default]
    Split,
    /// All with the accelerator.
    On,
    /// All in user space.
    Off,
}

/// What a VM is made from.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// The guest's architecture.
    pub arch: Arch,
    /// Guest RAM.
    pub memory: GuestMemory,
    /// The memory bus.
    pub mmio: Arc<Bus>,
    /// The port bus.
    pub pio: Arc<Bus>,
    /// Guest-virtual time.
    pub clock: Arc<VmClock>,
    /// Alarms on guest-virtual time (translated CPUs' own timers).
    pub timers: Arc<Timers>,
    /// Number of vCPUs that will be made.
    pub vcpus: u32,
    /// Where the x86 interrupt controllers live.
    pub irqchip: IrqChip,
    /// Bytes of host memory for translated code; 0 for the default. Translation only.
    pub code_cache: usize,
    /// Guest-physical base of the four-page hole some accelerators need on x86 (TSS, identity map).
    pub x86_tss_base: Option<u64>,
}

/// A way to run guests.
pub trait Accelerator: Send + Sync + Debug {
    /// `kvm` or `tcg`.
    fn name(&self) -> &'static str;

    /// Checks that a guest of `arch` can be run here.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`].
    fn probe(&self, arch: Arch) -> Result<(), AccelError>;

    /// Checks that guests of `arch` run about as fast as the host does, so that `--accel auto` should
    /// prefer this accelerator.
    ///
    /// # Errors
    /// Why they do not, for the log. An accelerator that interprets or translates always has a reason.
    fn check_speed(&self, _arch: Arch) -> Result<(), String> {
        Err(format!("{} translates", self.name()))
    }

    /// True if [`Accelerator::check_speed`] finds nothing.
    fn at_speed(&self, arch: Arch) -> bool {
        self.check_speed(arch).is_ok()
    }

    /// Makes a VM with all of `spec.memory` mapped.
    ///
    /// # Errors
    /// [`AccelError`].
    fn create_vm(&self, spec: VmSpec) -> Result<Arc<dyn Vm>, AccelError>;
}

/// A read-only or otherwise special window of host memory that the guest sees (ROM, flash in array
/// mode). RAM is mapped when the VM is made.
#[derive(Debug, Clone)]
pub struct RomWindow {
    /// Guest-physical start, page aligned.
    pub gpa: u64,
    /// The bytes, a region of its own; writes by vCPUs go to the memory bus.
    pub region: Arc<holdfast_memory::GuestRegion>,
}

/// What is logged of translated code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CodeLog {
    /// Guest instructions.
    pub guest: bool,
    /// The intermediate representation.
    pub ir: bool,
    /// Host instructions.
    pub host: bool,
    /// Exceptions and interrupts.
    pub interrupts: bool,
    /// First and last guest-virtual address of what is logged.
    pub filter: Option<(u64, u64)>,
    /// Bytes after which the log ends.
    pub limit: u64,
}

/// A VM as an accelerator holds it.
pub trait Vm: Send + Sync + Debug {
    /// The accelerator's name.
    fn accel(&self) -> &'static str;

    /// Makes vCPU `index`. Called once per index, on any thread; the vCPU then lives on one thread.
    ///
    /// # Errors
    /// [`AccelError`].
    fn create_vcpu(&self, index: u32, model: &CpuModel) -> Result<Box<dyn Vcpu>, AccelError>;

    /// Maps ROM: reads and fetches come from it, writes go to the memory bus.
    ///
    /// # Errors
    /// [`AccelError`].
    fn map_rom(&self, rom: &RomWindow) -> Result<(), AccelError>;

    /// Unmaps the ROM window that starts at `gpa`.
    ///
    /// # Errors
    /// [`AccelError`].
    fn unmap_rom(&self, gpa: u64) -> Result<(), AccelError>;

    /// Shows memory of a device at `gpa`, a page's: vCPUs read it and fetch from it, and write it if it is `writable`;
    /// if not, writes go to the memory bus. What they write is not in the dirty log, and code that others change in it
    /// may have been translated before.
    ///
    /// # Errors
    /// [`AccelError`].
    fn map_shared(
        &self,
        gpa: u64,
        region: &Arc<holdfast_memory::GuestRegion>,
        writable: bool,
    ) -> Result<(), AccelError>;

    /// Hides what is shown at `gpa`. May be called by threads that vCPUs wait for: those that are about to use it may
    /// do so a last time.
    ///
    /// # Errors
    /// [`AccelError`].
    fn unmap_shared(&self, gpa: u64) -> Result<(), AccelError>;

    /// The vCPUs' interrupt pins.
    fn cpu_lines(&self) -> Arc<dyn CpuLines>;

    /// Where message-signalled interrupts go, if the accelerator takes them (x86).
    fn msi(&self) -> Option<Arc<dyn MsiController>>;

    /// The accelerator's interrupt controller inputs, if it has one in the kernel (`IrqChip::On`).
    fn kernel_irq_sink(&self) -> Option<Arc<dyn holdfast_device::IrqSink>>;

    /// The accelerator's own ioeventfds: (memory bus, port bus).
    fn io_events(&self) -> Option<(Arc<dyn holdfast_device::IoEvents>, Arc<dyn holdfast_device::IoEvents>)>;

    /// Connects the source of external interrupts (the 8259 pair) to the boot vCPU.
    fn connect_ext_int(&self, source: Arc<dyn ExtInt>);

    /// Connects what takes x87 errors of processors with CR0.NE clear. Accelerators that make exceptions of them in any
    /// case do without.
    fn connect_fpu_errors(&self, _sink: Arc<dyn holdfast_device::FpuErrors>) {}

    /// Connects the receiver of EOI broadcasts (the IOAPIC): called with the vector.
    fn connect_eoi(&self, receiver: Arc<dyn Fn(u8) + Send + Sync>);

    /// Tells which message each of the 24 pins of the user-space IOAPIC sends now (`None`: masked), in
    /// pin order. Accelerators that hold the local APICs derive from it which vectors need an EOI
    /// broadcast: those of level-triggered messages (bit 15 of the data). Called with the IOAPIC
    /// locked, so it must not call back into it.
    fn ioapic_routes_changed(&self, _routes: &[Option<holdfast_device::MsiMessage>; 24]) {}

    /// Starts logging writes by vCPUs to RAM.
    ///
    /// # Errors
    /// [`AccelError`].
    fn start_dirty_log(&self) -> Result<(), AccelError>;

    /// Merges the vCPUs' writes since the last call into the RAM's own [`holdfast_memory::RamTracker`] bits.
    ///
    /// # Errors
    /// [`AccelError`].
    fn sync_dirty_log(&self) -> Result<(), AccelError>;

    /// Stops logging.
    ///
    /// # Errors
    /// [`AccelError`].
    fn stop_dirty_log(&self) -> Result<(), AccelError>;

    /// State that belongs to no vCPU (kernel interrupt controllers, kernel clock), for snapshots.
    ///
    /// # Errors
    /// [`AccelError`].
    fn save(&self) -> Result<serde_json::Value, AccelError>;

    /// Takes over what [`Vm::save`] gave. Parts of another accelerator are ignored when they have no
    /// guest-visible meaning here.
    ///
    /// # Errors
    /// [`AccelError`].
    fn restore(&self, state: &serde_json::Value) -> Result<(), AccelError>;

    /// Lists translated code for `perf` in `/tmp/perf-PID.map` from now on.
    ///
    /// # Errors
    /// [`AccelError`] if nothing is translated, or the file cannot be made.
    fn start_perf_map(&self) -> Result<(), AccelError> {
        Err(AccelError::Unsupported {
            accel: self.accel(),
            what: "a perf map (only `--accel tcg` translates)".into(),
        })
    }

    /// Writes what is translated from now on to `file`.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if nothing is translated.
    fn start_code_log(&self, _file: std::fs::File, _what: &CodeLog) -> Result<(), AccelError> {
        Err(AccelError::Unsupported {
            accel: self.accel(),
            what: "a log of translations (only `--accel tcg` translates)".into(),
        })
    }

    /// Checks that [`Vcpu::set_debug`] works.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`] says what the host lacks.
    fn can_debug(&self) -> Result<(), AccelError> {
        Ok(())
    }

    /// Notes from now on which guest code runs, for [`Vm::running_code`]; nothing where none is translated.
    fn note_running_code(&self) {}

    /// The code that has run since [`Vm::note_running_code`] and what it jumps to, the likeliest to run next first: `most`
    /// places at most, none where nothing is translated.
    fn running_code(&self, _most: usize) -> Vec<CodePlace> {
        Vec::new()
    }

    /// Text for `info jit`; `None` if nothing is translated.
    fn jit_info(&self) -> Option<String> {
        None
    }
}

/// Why a vCPU stopped running guest code. Memory and port I/O are served on the way, on the VM's
/// buses, and never end a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// [`Kicker::kick`] was called.
    Kicked,
    /// The vCPU waits for an interrupt with everything masked, and never will run again.
    HaltedForever,
    /// The guest shut itself down by a fault (triple fault).
    Shutdown,
    /// The guest asked the accelerator for a system reset or power-off (PSCI, SBI in the kernel).
    SystemEvent(SystemEvent),
    /// A breakpoint, watchpoint or single step; guest-virtual program counter.
    Debug(u64),
    /// A watchpoint: the guest-virtual program counter behind the access, and what was watched.
    Watch(u64, Watchpoint),
}

/// Interrupts a run from another thread.
pub trait Kicker: Send + Sync + Debug {
    /// Makes the current or, if none is under way, the next [`Vcpu::run`] return [`Exit::Kicked`].
    fn kick(&self);
}

/// Accesses that a watchpoint stops at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchKind {
    /// Loads. An accelerator that cannot tell stops at stores as well.
    Read,
    /// Stores.
    Write,
    /// Both.
    Access,
}

/// A range of guest-virtual memory whose accesses stop the vCPU, behind the instruction that made them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watchpoint {
    /// First byte.
    pub address: u64,
    /// Bytes, at least 1.
    pub len: u64,
    /// Which accesses.
    pub kind: WatchKind,
}

/// A place in guest code at which a translation begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CodePlace {
    /// Guest-physical address.
    pub gpa: u64,
    /// Guest-virtual address.
    pub pc: u64,
    /// The modes under which it runs, as the translator encodes them.
    pub mode: u32,
}

/// What a debugger wants of a vCPU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DebugControl {
    /// Stop after one instruction.
    pub single_step: bool,
    /// Take no interrupts while single-stepping, where the accelerator can do that.
    pub hold_interrupts: bool,
    /// Guest-virtual addresses at which to stop before execution. Where debug registers are scarce, the first get
    /// them.
    pub breakpoints: Vec<u64>,
    /// Memory to watch.
    pub watchpoints: Vec<Watchpoint>,
}

/// One virtual CPU. It lives on one thread; other threads use its [`Kicker`].
pub trait Vcpu: Send + Debug {
    /// Runs guest code until something needs the caller. A vCPU that waits for an interrupt sleeps
    /// in here.
    ///
    /// # Errors
    /// [`AccelError::Guest`] if the accelerator cannot go on, with what to do about it.
    fn run(&mut self) -> Result<Exit, AccelError>;

    /// The way to interrupt it.
    fn kicker(&self) -> Arc<dyn Kicker>;

    /// The architectural state. The vCPU must not be running.
    ///
    /// # Errors
    /// [`AccelError`].
    fn state(&mut self) -> Result<CpuState, AccelError>;

    /// Replaces the architectural state.
    ///
    /// # Errors
    /// [`AccelError::State`] if it does not fit this vCPU.
    fn set_state(&mut self, state: &CpuState) -> Result<(), AccelError>;

    /// Back to the architecture's reset state.
    ///
    /// # Errors
    /// [`AccelError`].
    fn reset(&mut self) -> Result<(), AccelError>;

    /// Delivers a non-maskable interrupt (x86: NMI).
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] where the guest has none.
    fn inject_nmi(&mut self) -> Result<(), AccelError>;

    /// Sets breakpoints, watchpoints and single step.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] names what there is no room for.
    fn set_debug(&mut self, control: &DebugControl) -> Result<(), AccelError>;

    /// The breakpoint at which the last run ended was reported to nobody: the next run stops there again.
    fn rearm_breakpoint(&mut self) {}

    /// Translates the code at `places` before it runs, for as long as `go_on` says so. The vCPU must not be running; its
    /// state does not matter. Places that make no sense are passed over, and all are where nothing is translated.
    fn translate_ahead(&mut self, _places: &[CodePlace], _go_on: &dyn Fn() -> bool) {}

    /// Guest-virtual to guest-physical, as the vCPU would translate a read now.
    ///
    /// # Errors
    /// [`AccelError`] if the state cannot be read; `Ok(None)` if nothing is mapped.
    fn translate(&mut self, gva: u64) -> Result<Option<u64>, AccelError>;
}
