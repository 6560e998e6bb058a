//! One vCPU and its run loop.

use std::os::fd::RawFd;
use std::sync::Arc;

use holdfast_accel::{AccelError, DebugControl, Exit, IrqChip, Kicker, SystemEvent, Vcpu};
use holdfast_arch::CpuState;
use holdfast_arch::x86_64::{CpuidEntry, State};
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_EXIT_DIRTY_RING_FULL, KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_cpuid_entry2, kvm_debug_exit_arch,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::debug::Debug;
use crate::kick::VcpuHandle;
use crate::sys::{self, ImmediateExit, PortIo};
use crate::vm::KvmVm;
use crate::{NAME, host, io_error, unsupported};

/// Offset of LVT LINT1 in the local APIC's page (SDM volume 3, table 11-1).
const LVT_LINT1: usize = 0x360;

/// A vCPU in KVM.
pub struct KvmVcpu {
    pub(crate) fd: VcpuFd,
    pub(crate) vm: Arc<KvmVm>,
    pub(crate) index: u32,
    pub(crate) debug: Debug,
    /// What the guest is shown.
    pub(crate) cpuid: Vec<CpuidEntry>,
    handle: Arc<VcpuHandle>,
    run_size: usize,
    /// An access was served, and KVM finishes the instruction only when it is entered again.
    unfinished: bool,
    /// The state after power-on, for resets.
    power_on: Option<Box<State>>,
    /// An interrupt was given to KVM at this (rip, rsp), with no full entry since.
    injected: Option<(u8, u64, u64)>,
    /// An interrupt that KVM was given and has not delivered: part of the state.
    pub(crate) undelivered: Option<u8>,
}

impl std::fmt::Debug for KvmVcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmVcpu")
            .field("index", &self.index)
            .field("handle", &self.handle)
            .finish_non_exhaustive()
    }
}

/// What the run loop does after an exit.
enum Next {
    /// Enter again.
    Enter,
    /// Enter again to finish an instruction.
    Finish,
    /// Serve the port access that `kvm_run` describes.
    Port,
    /// Look at a debug exit.
    Debug(kvm_debug_exit_arch),
    /// Explain an internal error.
    Internal,
    /// Collect the dirty rings.
    RingFull,
    /// Return to the caller.
    Return(Exit),
    /// The guest cannot go on.
    Fail(String),
}

impl KvmVcpu {
    /// Makes vCPU `index` of `vm` with its CPUID `table`.
    pub(crate) fn new(
        vm: Arc<KvmVm>,
        index: u32,
        apic_id: u32,
        table: &[CpuidEntry],
    ) -> Result<Self, AccelError> {
        let mut fd = vm
            .fd
            .create_vcpu(u64::from(apic_id))
            .map_err(|e| host(format!("cannot create vCPU {index}"), io_error(e)))?;
        let entry = |e: &CpuidEntry| kvm_cpuid_entry2 {
            function: e.function,
            index: e.index,
            flags: if e.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: e.regs[0],
            ebx: e.regs[1],
            ecx: e.regs[2],
            edx: e.regs[3],
            ..Default::default()
        };
        let entries: Vec<kvm_cpuid_entry2> = table.iter().map(entry).collect();
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|_| unsupported("a CPUID table of more than 256 entries"))?;
        fd.set_cpuid2(&cpuid).map_err(|e| host("cannot set CPUID", io_error(e)))?;
        let handle = Arc::new(VcpuHandle::new(ImmediateExit::of(&mut fd)));
        let run_size = vm.fd.run_size();
        let mut vcpu = Self {
            fd,
            vm,
            index,
            debug: Debug::default(),
            cpuid: table.to_vec(),
            handle,
            run_size,
            unfinished: false,
            power_on: None,
            injected: None,
            undelivered: None,
        };
        let mut power_on = vcpu.read_state()?;
        // The time-stamp counter goes on over a reset; so do what KVM derives from it.
        for msr in [crate::state::MSR_TSC, crate::state::MSR_TSC_ADJUST, crate::state::MSR_TSC_DEADLINE] {
            power_on.msrs.remove(&msr);
        }
        vcpu.power_on = Some(Box::new(power_on));
        Ok(vcpu)
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        sys::raw(&self.fd)
    }

    pub(crate) fn handle(&self) -> Arc<VcpuHandle> {
        Arc::clone(&self.handle)
    }

    pub(crate) fn guest_error(&self, reason: String) -> AccelError {
        AccelError::Guest { accel: NAME, vcpu: self.index, reason }
    }

    /// Hands over what waits for this vCPU in user space: an NMI, an interrupt of the PIC.
    fn before_entry(&mut self) -> Result<(), AccelError> {
        if self.handle.take_nmi() && self.lint1_is_nmi()? {
            self.fd.nmi().map_err(|e| host("cannot inject an NMI", io_error(e)))?;
        }
        if self.index != 0 || self.vm.irqchip != IrqChip::Split {
            return Ok(());
        }
        let Some(pic) = self.vm.ext_int.get() else { return Ok(()) };
        let mut window = false;
        if pic.pending() {
            if self.fd.get_kvm_run().ready_for_interrupt_injection != 0 && self.injected.is_none() {
                let vector = pic.acknowledge();
                let regs = self.fd.get_regs().map_err(|e| host("cannot read registers", io_error(e)))?;
                sys::interrupt(&self.fd, vector).map_err(|e| host("cannot inject an interrupt", e))?;
                self.injected = Some((vector, regs.rip, regs.rsp));
                window = pic.pending();
            } else {
                window = true;
            }
        }
        self.fd.get_kvm_run().request_interrupt_window = u8::from(window);
        Ok(())
    }

    /// Whether the guest has set up LINT1 to deliver NMIs (SDM volume 3, 11.5.1).
    fn lint1_is_nmi(&self) -> Result<bool, AccelError> {
        let lapic = self.fd.get_lapic().map_err(|e| host("cannot read the local APIC", io_error(e)))?;
        let lvt: Vec<u8> = lapic.regs[LVT_LINT1..LVT_LINT1 + 4].iter().map(|b| *b as u8).collect();
        let lvt = lvt.iter().rev().fold(0u32, |v, b| v << 8 | u32::from(*b));
        Ok(lvt & 1 << 16 == 0 && lvt >> 8 & 7 == 4)
    }

    /// Enters the guest once.
    fn enter(&mut self) -> Result<Next, AccelError> {
        let who = Some(self.index);
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                self.unfinished = false;
                self.handle.set_immediate_exit(0);
                self.note_injection()?;
                return Ok(Next::Enter);
            }
            Err(e) => return Err(host(format!("cannot run vCPU {}", self.index), io_error(e))),
        };
        self.injected = None;
        self.unfinished = false;
        Ok(match exit {
            VcpuExit::MmioRead(address, data) => {
                self.vm.mmio.read(who, address, data);
                Next::Finish
            }
            VcpuExit::MmioWrite(address, data) => {
                self.vm.mmio.write(who, address, data);
                Next::Finish
            }
            VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => Next::Port,
            VcpuExit::IoapicEoi(vector) => {
                if let Some(receiver) = self.vm.eoi.get() {
                    receiver(vector);
                }
                Next::Enter
            }
            VcpuExit::IrqWindowOpen | VcpuExit::Intr | VcpuExit::SetTpr | VcpuExit::Nmi => Next::Enter,
            VcpuExit::Debug(info) => Next::Debug(info),
            VcpuExit::Shutdown => Next::Return(Exit::Shutdown),
            VcpuExit::SystemEvent(kind, _) => match kind {
                KVM_SYSTEM_EVENT_SHUTDOWN => Next::Return(Exit::SystemEvent(SystemEvent::Shutdown)),
                KVM_SYSTEM_EVENT_RESET => Next::Return(Exit::SystemEvent(SystemEvent::Reset)),
                KVM_SYSTEM_EVENT_CRASH => Next::Return(Exit::SystemEvent(SystemEvent::Panic)),
                other => Next::Fail(format!("KVM reports system event {other}, which is not known")),
            },
            VcpuExit::InternalError => Next::Internal,
            VcpuExit::FailEntry(reason, cpu) => {
                Next::Fail(format!("host CPU {cpu} refused to enter the guest, hardware reason {reason:#x}"))
            }
            VcpuExit::MemoryFault { gpa, size, .. } => {
                Next::Fail(format!("the host cannot provide memory at {gpa:#x}, {size} bytes"))
            }
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => Next::RingFull,
            VcpuExit::Hlt => Next::Return(Exit::HaltedForever),
            other => Next::Fail(format!("KVM exit {other:?} is not known; use `--accel tcg`")),
        })
    }

    /// After an entry that was interrupted at once: has the injected interrupt been taken?
    fn note_injection(&mut self) -> Result<(), AccelError> {
        self.undelivered = None;
        if let Some((vector, rip, rsp)) = self.injected.take() {
            let regs = self.fd.get_regs().map_err(|e| host("cannot read registers", io_error(e)))?;
            if (regs.rip, regs.rsp) == (rip, rsp) {
                self.undelivered = Some(vector);
                self.injected = Some((vector, rip, rsp));
            }
        }
        Ok(())
    }

    /// Serves a port access, item by item for string instructions.
    fn serve_port(&mut self) -> Result<(), AccelError> {
        let io = PortIo::of(&mut self.fd);
        let index = self.index;
        let Some(data) = io.data(&mut self.fd, self.run_size) else {
            return Err(
                self.guest_error(format!("KVM describes an impossible access to port {:#x}", io.port))
            );
        };
        for item in data.chunks_mut(io.size) {
            if io.input {
                self.vm.pio.read(Some(index), u64::from(io.port), item);
            } else {
                self.vm.pio.write(Some(index), u64::from(io.port), item);
            }
        }
        Ok(())
    }

    /// Says on what KVM stopped.
    fn explain_internal_error(&mut self) -> AccelError {
        let (suberror, mut bytes) = sys::internal_error(&mut self.fd);
        let (rip, linear, cpl) = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => (regs.rip, sregs.cs.base.wrapping_add(regs.rip), sregs.cs.selector & 3),
            _ => (0, 0, 0),
        };
        if bytes.is_empty() {
            bytes = self.read_virtual(linear, 15);
        }
        let bytes: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let at = format!("at rip {rip:#x} (linear {linear:#x}, ring {cpl}), bytes {}", bytes.join(" "));
        let what = match suberror {
            1 => "KVM cannot emulate the instruction",
            2 => "KVM met an exception while it emulated one, with the instruction",
            3 => "KVM could not deliver an event to the guest",
            4 => "the processor left the guest for a reason that KVM does not know",
            _ => "KVM failed internally",
        };
        self.guest_error(format!(
            "{what} {at}; run this guest with `--accel tcg`, or on a host whose KVM has hardware virtualization"
        ))
    }

    /// Collects the EOI broadcasts that KVM holds back until the next entry: they are part of no state.
    ///
    /// An entry with a signal pending handles KVM's requests and runs no guest code. `immediate_exit` would
    /// return before them.
    fn flush_eois(&mut self) -> Result<(), AccelError> {
        /// More EOIs than one vCPU can have unreported.
        const MOST: usize = 8;
        if self.vm.irqchip != IrqChip::Split || self.unfinished {
            return Ok(());
        }
        for _ in 0..MOST {
            let handle = self.handle();
            let exit = handle.undisturbed(|| {
                sys::run_with_signal_pending(&mut self.fd, crate::kick_signal(), |fd| match fd.run() {
                    Ok(VcpuExit::IoapicEoi(vector)) => Some(vector),
                    _ => None,
                })
            });
            match exit.map_err(|e| host("cannot collect EOIs", e))? {
                Some(vector) => {
                    if let Some(receiver) = self.vm.eoi.get() {
                        receiver(vector);
                    }
                }
                None => break,
            }
        }
        Ok(())
    }

    /// Up to `len` bytes at a guest-virtual address, within its page.
    fn read_virtual(&self, gva: u64, len: u64) -> Vec<u8> {
        use vm_memory::{Bytes, GuestAddress};
        let len = len.min(0x1000 - gva % 0x1000);
        let mut bytes = vec![0; len as usize];
        match self.fd.translate_gva(gva) {
            Ok(t) if t.valid != 0 => {
                let n = self.vm.memory.read(&mut bytes, GuestAddress(t.physical_address)).unwrap_or(0);
                bytes.truncate(n);
                bytes
            }
            _ => Vec::new(),
        }
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<Exit, AccelError> {
        self.handle.adopt_thread().map_err(|e| host("cannot unblock the kick signal", e))?;
        self.begin_debug()?;
        let exit = self.run_guest();
        self.end_debug()?;
        exit
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        self.handle()
    }

    fn state(&mut self) -> Result<CpuState, AccelError> {
        self.flush_eois()?;
        Ok(CpuState::X86_64(Box::new(self.read_state()?)))
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), AccelError> {
        let CpuState::X86_64(state) = state else {
            return Err(AccelError::State { accel: NAME, reason: "it is of another architecture".into() });
        };
        self.forget_entry();
        self.write_state(state)
    }

    fn reset(&mut self) -> Result<(), AccelError> {
        self.forget_entry();
        let Some(state) = self.power_on.clone() else { return Ok(()) };
        self.write_state(&state)
    }

    fn inject_nmi(&mut self) -> Result<(), AccelError> {
        self.fd.nmi().map_err(|e| host("cannot inject an NMI", io_error(e)))
    }

    fn set_debug(&mut self, control: &DebugControl) -> Result<(), AccelError> {
        self.change_debug(control)
    }

    fn rearm_breakpoint(&mut self) {
        self.debug.forget_stop();
    }

    fn translate(&mut self, gva: u64) -> Result<Option<u64>, AccelError> {
        let t = self.fd.translate_gva(gva).map_err(|e| host("cannot translate an address", io_error(e)))?;
        Ok((t.valid != 0).then_some(t.physical_address))
    }
}

impl KvmVcpu {
    /// Runs until something needs the caller.
    fn run_guest(&mut self) -> Result<Exit, AccelError> {
        loop {
            if self.handle.is_kicked() {
                if !self.unfinished {
                    self.handle.set_immediate_exit(0);
                    if self.handle.take_kick() {
                        return Ok(Exit::Kicked);
                    }
                }
                self.handle.set_immediate_exit(1);
            } else {
                self.before_entry()?;
            }
            match self.enter()? {
                Next::Enter => {}
                Next::Finish => self.unfinished = true,
                Next::Port => {
                    self.serve_port()?;
                    self.unfinished = true;
                }
                Next::Debug(info) => {
                    if let Some(exit) = self.debug_exit(&info)? {
                        return Ok(exit);
                    }
                }
                Next::Internal => return Err(self.explain_internal_error()),
                Next::RingFull => self.vm.collect_rings()?,
                Next::Return(exit) => return Ok(exit),
                Next::Fail(reason) => return Err(self.guest_error(reason)),
            }
        }
    }

    /// The state is about to be replaced: nothing of the last entry counts any more.
    fn forget_entry(&mut self) {
        self.unfinished = false;
        self.injected = None;
        self.undelivered = None;
        self.debug.forget_stop();
        let run = self.fd.get_kvm_run();
        run.ready_for_interrupt_injection = 0;
        run.request_interrupt_window = 0;
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.vm.lines.handles.write().remove(&self.index);
        self.handle.retire();
    }
}
