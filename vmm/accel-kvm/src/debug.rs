//! Guest debugging: single step, breakpoints.
//!
//! The first four breakpoints take the debug registers; the rest are INT3 instructions in guest RAM. Going on
//! from a breakpoint first steps over the instruction under it.

use holdfast_accel::{AccelError, DebugControl};
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_debug_exit_arch, kvm_guest_debug,
};
use vm_memory::{Bytes, GuestAddress};

use crate::vcpu::KvmVcpu;
use crate::{host, io_error, unsupported};

/// Debug registers that hold addresses.
const HARDWARE: usize = 4;
/// INT3.
const INT3: u8 = 0xcc;
/// The breakpoint exception.
const BP: u32 = 3;

#[derive(Debug, Clone, Copy)]
struct Patch {
    gva: u64,
    gpa: u64,
    original: u8,
    written: bool,
}

/// What the debugger wants and where the vCPU stands.
#[derive(Debug, Default)]
pub struct Debug {
    control: DebugControl,
    patches: Vec<Patch>,
    /// The linear pc of the last stop, until the vCPU runs again.
    stopped_at: Option<u64>,
    /// Stepping over the instruction under a breakpoint.
    stepping_over: bool,
    /// KVM has been told something other than "no debugging".
    active: bool,
}

impl Debug {
    /// The vCPU is somewhere else now.
    pub fn forget_stop(&mut self) {
        self.stopped_at = None;
    }
}

impl KvmVcpu {
    fn write_patches(&mut self, on: bool) -> Result<(), AccelError> {
        for patch in self.debug.patches.iter_mut().filter(|p| p.written != on) {
            let byte = if on { INT3 } else { patch.original };
            let at = GuestAddress(patch.gpa);
            self.vm
                .memory
                .write_obj(byte, at)
                .map_err(|e| host("cannot write a breakpoint", std::io::Error::other(e.to_string())))?;
            patch.written = on;
        }
        Ok(())
    }

    /// Takes over what a debugger wants.
    pub(crate) fn change_debug(&mut self, control: &DebugControl) -> Result<(), AccelError> {
        self.write_patches(false)?;
        self.debug.patches.clear();
        for &gva in control.breakpoints.iter().skip(HARDWARE) {
            let t =
                self.fd.translate_gva(gva).map_err(|e| host("cannot translate an address", io_error(e)))?;
            let unmapped = || unsupported(format!("a breakpoint at {gva:#x}, where no RAM is mapped,"));
            if t.valid == 0 {
                return Err(unmapped());
            }
            let gpa = t.physical_address;
            let original = self.vm.memory.read_obj(GuestAddress(gpa)).map_err(|_| unmapped())?;
            self.debug.patches.push(Patch { gva, gpa, original, written: false });
        }
        self.debug.control = control.clone();
        self.debug.stepping_over = false;
        self.apply_debug(0)
    }

    /// Tells KVM. `extra` are further control bits.
    fn apply_debug(&mut self, extra: u32) -> Result<(), AccelError> {
        let wanted = &self.debug.control;
        let over = self.debug.stepping_over;
        let mut debug = kvm_guest_debug { control: extra, ..Default::default() };
        if wanted.single_step || over {
            debug.control |= KVM_GUESTDBG_SINGLESTEP;
        }
        if over && !wanted.single_step {
            debug.control |= KVM_GUESTDBG_BLOCKIRQ;
        }
        if !over && !wanted.breakpoints.is_empty() {
            debug.control |= KVM_GUESTDBG_USE_HW_BP;
            // Local enable bits, and the one that reads as 1 (SDM volume 3, 18.2.4).
            let mut dr7 = 0x400;
            for (n, &gva) in wanted.breakpoints.iter().take(HARDWARE).enumerate() {
                debug.arch.debugreg[n] = gva;
                dr7 |= 1 << (2 * n);
            }
            debug.arch.debugreg[7] = dr7;
        }
        let patched = !over && !self.debug.patches.is_empty();
        if patched {
            debug.control |= KVM_GUESTDBG_USE_SW_BP;
        }
        let on = debug.control != 0;
        if on {
            debug.control |= KVM_GUESTDBG_ENABLE;
        }
        self.write_patches(patched)?;
        if on || self.debug.active {
            let mut done = self.fd.set_guest_debug(&debug);
            if done.is_err() && debug.control & KVM_GUESTDBG_BLOCKIRQ != 0 {
                debug.control &= !KVM_GUESTDBG_BLOCKIRQ;
                done = self.fd.set_guest_debug(&debug);
            }
            done.map_err(|e| host("cannot set up guest debugging", io_error(e)))?;
        }
        self.debug.active = on;
        Ok(())
    }

    fn linear_pc(&self) -> Result<u64, AccelError> {
        let regs = self.fd.get_regs().map_err(|e| host("cannot read registers", io_error(e)))?;
        let sregs = self.fd.get_sregs().map_err(|e| host("cannot read registers", io_error(e)))?;
        Ok(sregs.cs.base.wrapping_add(regs.rip))
    }

    /// Called when a run begins: steps over the breakpoint at which the last one ended.
    pub(crate) fn begin_debug(&mut self) -> Result<(), AccelError> {
        let Some(pc) = self.debug.stopped_at.take() else { return Ok(()) };
        if self.debug.control.breakpoints.contains(&pc) && self.linear_pc()? == pc {
            self.debug.stepping_over = true;
            self.apply_debug(0)?;
        }
        Ok(())
    }

    /// Called on a debug exit. `Some`: the debugger's business, at this linear pc.
    pub(crate) fn debug_exit(&mut self, info: &kvm_debug_exit_arch) -> Result<Option<u64>, AccelError> {
        let pc = info.pc;
        if std::mem::take(&mut self.debug.stepping_over) {
            self.apply_debug(0)?;
            if !self.debug.control.single_step && !self.debug.control.breakpoints.contains(&pc) {
                return Ok(None);
            }
        } else if info.exception == BP && !self.debug.patches.iter().any(|p| p.gva == pc) {
            // The guest's own INT3.
            self.apply_debug(KVM_GUESTDBG_INJECT_BP)?;
            return Ok(None);
        }
        self.debug.stopped_at = Some(pc);
        Ok(Some(pc))
    }
}
