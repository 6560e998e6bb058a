//! The VM as gdb sees it: threads are vCPUs, memory is what they map.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::marker::PhantomData;

use gdbstub::arch::Arch;
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind as Kind,
};
use gdbstub::target::ext::extended_mode::{Args, AttachKind, ExtendedMode, ExtendedModeOps, ShouldTerminate};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError};
use holdfast_accel::{DebugControl, WatchKind, Watchpoint};
use holdfast_arch::CpuState;

use super::Mailbox;
use super::session::stop_reason;
use crate::control::{
    ControlHandle, DebugEvent, DebugRun, DebugSet, DebugTarget, DebugWhy, GetCpuState, MemoryRead,
    MemoryWrite, ReadMemory, SetCpuState, WriteMemory,
};

/// The thread that vCPU `index` is to gdb.
pub(super) fn tid(index: u32) -> Tid {
    Tid::MIN.saturating_add(index as usize)
}

fn index(tid: Tid) -> usize {
    tid.get() - 1
}

/// The registers of an architecture, in the order of its target description.
pub(super) trait Registers: Sized + 'static {
    /// The target description (gdb manual, appendix G).
    fn description() -> &'static str;
    /// Reads them all: each byte, or `None` for what is not there.
    fn read(state: &CpuState) -> Option<Vec<Option<u8>>>;
    /// Writes those that `bytes`, in the same layout, changes. `None` if there are too few.
    fn write(state: &mut CpuState, bytes: &[u8]) -> Option<()>;
}

/// gdbstub's view of an architecture.
#[derive(Debug)]
pub(super) struct GdbArch<R>(PhantomData<R>);

/// The bytes of a `g` packet.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Bytes(Vec<Option<u8>>);

impl gdbstub::arch::Registers for Bytes {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        0 // nobody asks
    }

    fn gdb_serialize(&self, write_byte: impl FnMut(Option<u8>)) {
        self.0.iter().copied().for_each(write_byte);
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.0 = bytes.iter().copied().map(Some).collect();
        Ok(())
    }
}

impl<R: Registers> Arch for GdbArch<R> {
    type Usize = u64;
    type Registers = Bytes;
    type BreakpointKind = usize;
    type RegId = ();

    fn target_description_xml() -> Option<&'static str> {
        Some(R::description())
    }
}

/// What a vCPU does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Continue,
    Step,
}

/// The VM.
pub(super) struct VmTarget<R> {
    handle: ControlHandle,
    mailbox: Mailbox,
    vm: DebugTarget,
    software: Vec<u64>,
    hardware: Vec<u64>,
    watchpoints: Vec<Watchpoint>,
    actions: BTreeMap<usize, Action>,
    /// vCPUs without an action stand.
    locked: bool,
    registers: PhantomData<R>,
}

type Outcome<T> = Result<T, TargetError<Infallible>>;

impl<R> VmTarget<R> {
    pub(super) fn new(handle: ControlHandle, mailbox: Mailbox, vm: DebugTarget) -> Self {
        Self {
            handle,
            mailbox,
            vm,
            software: Vec::new(),
            hardware: Vec::new(),
            watchpoints: Vec::new(),
            actions: BTreeMap::new(),
            locked: false,
            registers: PhantomData,
        }
    }

    /// What gdb is told of `event`.
    pub(super) fn reason(&self, event: DebugEvent) -> MultiThreadStopReason<u64> {
        stop_reason(event, &self.hardware)
    }

    fn control(&self, action: Action) -> DebugControl {
        DebugControl {
            single_step: action == Action::Step,
            hold_interrupts: action == Action::Step,
            breakpoints: self.hardware.iter().chain(&self.software).copied().collect(),
            watchpoints: self.watchpoints.clone(),
        }
    }

    /// Whether there is room for what was just asked for; where there is plenty, nobody is asked before the guest runs.
    fn fits(&self) -> bool {
        if !self.vm.scarce {
            return true;
        }
        let controls = (0..self.vm.vcpus).map(|_| Some(self.control(Action::Continue))).collect();
        match self.handle.call(DebugSet(controls)) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!("{}", error.describe());
                false
            }
        }
    }

    fn state(&self, tid: Tid) -> Outcome<CpuState> {
        self.handle.call(GetCpuState(index(tid) as u32)).map_err(|error| {
            tracing::debug!("{}", error.describe());
            TargetError::NonFatal
        })
    }

    fn read(&self, address: u64, len: usize, tid: Tid) -> Option<Vec<u8>> {
        let read = MemoryRead { address, len, vcpu: Some(index(tid) as u32) };
        self.handle.call(ReadMemory(read)).ok()
    }
}

impl<R: Registers> Target for VmTarget<R> {
    type Arch = GdbArch<R>;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_extended_mode(&mut self) -> Option<ExtendedModeOps<'_, Self>> {
        Some(self)
    }

    // The guest's code has breakpoint instructions only if it put them there.
    fn guard_rail_implicit_sw_breakpoints(&self) -> bool {
        true
    }
}

impl<R: Registers> MultiThreadBase for VmTarget<R> {
    fn read_registers(&mut self, regs: &mut Bytes, tid: Tid) -> Outcome<()> {
        regs.0 = R::read(&self.state(tid)?).ok_or(TargetError::NonFatal)?;
        Ok(())
    }

    fn write_registers(&mut self, regs: &Bytes, tid: Tid) -> Outcome<()> {
        let mut state = self.state(tid)?;
        let bytes: Vec<u8> = regs.0.iter().map(|b| b.unwrap_or(0)).collect();
        R::write(&mut state, &bytes).ok_or(TargetError::NonFatal)?;
        self.handle.call(SetCpuState(index(tid) as u32, state)).map_err(|error| {
            tracing::warn!("the debugger's registers are not taken: {}", error.describe());
            TargetError::NonFatal
        })
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> Outcome<usize> {
        const PAGE: usize = 4096;
        let room = PAGE - start as usize % PAGE;
        // What follows the first page may not be mapped.
        let read = self.read(start, data.len(), tid).or_else(|| self.read(start, data.len().min(room), tid));
        let read = read.ok_or(TargetError::NonFatal)?;
        for (to, from) in data.iter_mut().zip(&read) {
            *to = *from;
        }
        Ok(read.len())
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> Outcome<()> {
        let write = MemoryWrite { address: start, data: data.to_vec(), vcpu: Some(index(tid) as u32) };
        self.handle.call(WriteMemory(write)).map_err(|_| TargetError::NonFatal)
    }

    fn list_active_threads(&mut self, register: &mut dyn FnMut(Tid)) -> Result<(), Infallible> {
        (0..self.vm.vcpus).map(tid).for_each(register);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl<R: Registers> MultiThreadResume for VmTarget<R> {
    fn resume(&mut self) -> Result<(), Infallible> {
        let action = |index: usize| match self.actions.get(&index) {
            Some(action) => Some(*action),
            None => (!self.locked).then_some(Action::Continue),
        };
        let controls: Vec<_> =
            (0..self.vm.vcpus as usize).map(|index| action(index).map(|a| self.control(a))).collect();
        self.mailbox.clear();
        if let Err(error) = self.handle.call(DebugRun(controls)) {
            tracing::warn!("the guest does not go on: {}", error.describe());
            let vcpu = self.actions.keys().next().map_or(0, |index| *index as u32);
            self.mailbox.put(DebugEvent::Stopped { vcpu, why: DebugWhy::Paused });
        }
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Infallible> {
        self.actions.clear();
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Infallible> {
        self.actions.insert(index(tid), Action::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl<R: Registers> MultiThreadSingleStep for VmTarget<R> {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Infallible> {
        self.actions.insert(index(tid), Action::Step);
        Ok(())
    }
}

impl<R: Registers> MultiThreadSchedulerLocking for VmTarget<R> {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Infallible> {
        self.locked = true;
        Ok(())
    }
}

impl<R: Registers> Breakpoints for VmTarget<R> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl<R: Registers> SwBreakpoint for VmTarget<R> {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> Outcome<bool> {
        self.software.push(address);
        let fits = self.fits();
        if !fits {
            self.software.pop();
        }
        Ok(fits)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> Outcome<bool> {
        Ok(remove(&mut self.software, &address))
    }
}

impl<R: Registers> HwBreakpoint for VmTarget<R> {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> Outcome<bool> {
        self.hardware.push(address);
        let fits = self.fits();
        if !fits {
            self.hardware.pop();
        }
        Ok(fits)
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> Outcome<bool> {
        Ok(remove(&mut self.hardware, &address))
    }
}

fn watchpoint(address: u64, len: u64, kind: Kind) -> Watchpoint {
    let kind = match kind {
        Kind::Read => WatchKind::Read,
        Kind::Write => WatchKind::Write,
        Kind::ReadWrite => WatchKind::Access,
    };
    Watchpoint { address, len, kind }
}

impl<R: Registers> HwWatchpoint for VmTarget<R> {
    fn add_hw_watchpoint(&mut self, address: u64, len: u64, kind: Kind) -> Outcome<bool> {
        self.watchpoints.push(watchpoint(address, len, kind));
        let fits = len > 0 && self.fits();
        if !fits {
            self.watchpoints.pop();
        }
        Ok(fits)
    }

    fn remove_hw_watchpoint(&mut self, address: u64, len: u64, kind: Kind) -> Outcome<bool> {
        Ok(remove(&mut self.watchpoints, &watchpoint(address, len, kind)))
    }
}

/// Removes one `what`; false if there is none.
fn remove<T: PartialEq>(from: &mut Vec<T>, what: &T) -> bool {
    let at = from.iter().position(|other| other == what);
    at.map(|at| from.remove(at)).is_some()
}

impl<R: Registers> ThreadExtraInfo for VmTarget<R> {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, Infallible> {
        let waits = match self.handle.call(GetCpuState(index(tid) as u32)) {
            Ok(CpuState::X86_64(state)) => state.mp_state != holdfast_arch::x86_64::MpState::Runnable,
            Ok(CpuState::Riscv64(state)) => state.waiting,
            Err(_) => false,
        };
        let text = format!("vCPU {} [{}]", index(tid), if waits { "halted" } else { "running" });
        let len = text.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        Ok(len)
    }
}

/// Only so that gdb knows that it attached to something that was there before: it detaches at its end, then, and does
/// not kill.
impl<R: Registers> ExtendedMode for VmTarget<R> {
    fn run(&mut self, _filename: Option<&[u8]>, _args: Args<'_, '_>) -> Outcome<gdbstub::common::Pid> {
        Err(TargetError::NonFatal)
    }

    fn attach(&mut self, _pid: gdbstub::common::Pid) -> Outcome<()> {
        Err(TargetError::NonFatal)
    }

    fn query_if_attached(&mut self, _pid: gdbstub::common::Pid) -> Outcome<AttachKind> {
        Ok(AttachKind::Attach)
    }

    fn kill(&mut self, _pid: Option<gdbstub::common::Pid>) -> Outcome<ShouldTerminate> {
        Ok(ShouldTerminate::Yes)
    }

    fn restart(&mut self) -> Result<(), Infallible> {
        tracing::warn!("the debugger asks to start the guest anew; use the VM's reset");
        Ok(())
    }
}
