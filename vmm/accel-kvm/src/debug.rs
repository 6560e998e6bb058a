//! Guest debugging: single step, breakpoints, watchpoints.
//!
//! Watchpoints take debug registers, and the first breakpoints those that are left; the rest are INT3 instructions in
//! guest RAM, which are there only while the vCPU runs. Going on from a breakpoint first steps over the instruction
//! under it.

use std::collections::BTreeMap;

use holdfast_accel::{AccelError, DebugControl, Exit, WatchKind, Watchpoint};
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_debug_exit_arch, kvm_guest_debug,
};
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};

use crate::vcpu::KvmVcpu;
use crate::{host, io_error, unsupported};

/// Debug registers that hold addresses.
const HARDWARE: usize = 4;
/// INT3.
const INT3: u8 = 0xcc;
/// The debug exception.
const DB: u32 = 1;
/// The breakpoint exception.
const BP: u32 = 3;

/// The INT3 instructions of all vCPUs, by guest-physical address: the byte under each, and how many vCPUs want it.
#[derive(Debug, Default)]
pub(crate) struct Patches(Mutex<BTreeMap<u64, (u8, u32)>>);

/// A breakpoint of this vCPU that is an INT3.
#[derive(Debug, Clone, Copy)]
struct Patch {
    gva: u64,
    gpa: u64,
    written: bool,
}

/// A piece of a watchpoint that a debug register can hold: address and length, a power of two up to 8.
#[derive(Debug, Clone, Copy)]
struct Piece {
    address: u64,
    len: u64,
    whole: Watchpoint,
}

/// Cuts watchpoints into what debug registers can hold.
fn pieces(watchpoints: &[Watchpoint]) -> Result<Vec<Piece>, AccelError> {
    let mut all = Vec::new();
    for whole in watchpoints {
        let (mut address, mut left) = (whole.address, whole.len.max(1));
        while left > 0 {
            if all.len() == HARDWARE {
                return Err(unsupported(format!(
                    "a watchpoint on {} bytes at {:#x}: the processor has {HARDWARE} debug registers, and this",
                    whole.len, whole.address
                )));
            }
            let mut len = 8;
            while !address.is_multiple_of(len) || len > left {
                len /= 2;
            }
            all.push(Piece { address, len, whole: *whole });
            address = address.wrapping_add(len);
            left -= len;
        }
    }
    Ok(all)
}

/// What the debugger wants and where the vCPU stands.
#[derive(Debug, Default)]
pub struct Debug {
    control: DebugControl,
    /// In the first debug registers.
    pieces: Vec<Piece>,
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

    /// Breakpoints that have debug registers.
    fn in_registers(&self) -> impl Iterator<Item = u64> {
        self.control.breakpoints.iter().copied().take(HARDWARE.saturating_sub(self.pieces.len()))
    }

    /// DR0 to DR3 and DR7 (SDM volume 3, 18.2.4); `breaks`: with breakpoints.
    fn registers(&self, breaks: bool) -> Option<[u64; 8]> {
        let mut dr = [0; 8];
        // The bit that reads as 1.
        dr[7] = 0x400;
        let watched = self.pieces.iter().map(|p| {
            let kind = if p.whole.kind == WatchKind::Write { 1 } else { 3 };
            let len = match p.len {
                1 => 0,
                2 => 1,
                8 => 2,
                _ => 3,
            };
            (p.address, len << 2 | kind)
        });
        let broken = self.in_registers().filter(|_| breaks).map(|gva| (gva, 0));
        for (n, (address, how)) in watched.chain(broken).enumerate().take(HARDWARE) {
            dr[n] = address;
            dr[7] |= 1 << (2 * n) | how << (16 + 4 * n);
        }
        (dr[7] != 0x400).then_some(dr)
    }
}

impl KvmVcpu {
    /// Puts the INT3s of this vCPU into RAM, or takes them out.
    fn write_patches(&mut self, on: bool) -> Result<(), AccelError> {
        let failed = |e: vm_memory::GuestMemoryError| {
            host("cannot write a breakpoint", std::io::Error::other(e.to_string()))
        };
        for patch in self.debug.patches.iter_mut().filter(|p| p.written != on) {
            let at = GuestAddress(patch.gpa);
            let mut all = self.vm.patches.0.lock();
            if on {
                match all.get_mut(&patch.gpa) {
                    Some((_, users)) => *users += 1,
                    None => {
                        let original = self.vm.memory.read_obj(at).map_err(failed)?;
                        self.vm.memory.write_obj(INT3, at).map_err(failed)?;
                        all.insert(patch.gpa, (original, 1));
                    }
                }
            } else if let Some((original, users)) = all.get_mut(&patch.gpa) {
                *users -= 1;
                if *users == 0 {
                    // What the guest wrote over it stays.
                    if self.vm.memory.read_obj::<u8>(at).map_err(failed)? == INT3 {
                        self.vm.memory.write_obj(*original, at).map_err(failed)?;
                    }
                    all.remove(&patch.gpa);
                }
            }
            patch.written = on;
        }
        Ok(())
    }

    /// Takes over what a debugger wants.
    pub(crate) fn change_debug(&mut self, control: &DebugControl) -> Result<(), AccelError> {
        if !control.watchpoints.is_empty() && !crate::sys::hardware_virtualization() {
            return Err(unsupported(
                "a watchpoint, which a KVM that interprets ignores (in gdb, `set can-use-hw-watchpoints 0`),",
            ));
        }
        let pieces = pieces(&control.watchpoints)?;
        let mut patches = Vec::new();
        for &gva in control.breakpoints.iter().skip(HARDWARE - pieces.len()) {
            let t =
                self.fd.translate_gva(gva).map_err(|e| host("cannot translate an address", io_error(e)))?;
            let gpa = t.physical_address;
            if t.valid == 0 || self.vm.memory.read_obj::<u8>(GuestAddress(gpa)).is_err() {
                return Err(unsupported(format!("a breakpoint at {gva:#x}, where no RAM is mapped,")));
            }
            patches.push(Patch { gva, gpa, written: false });
        }
        self.write_patches(false)?;
        self.debug.patches = patches;
        self.debug.pieces = pieces;
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
        if over && !wanted.single_step || wanted.single_step && wanted.hold_interrupts {
            debug.control |= KVM_GUESTDBG_BLOCKIRQ;
        }
        if let Some(registers) = self.debug.registers(!over) {
            debug.control |= KVM_GUESTDBG_USE_HW_BP;
            debug.arch.debugreg = registers;
        }
        if !over && !self.debug.patches.is_empty() {
            debug.control |= KVM_GUESTDBG_USE_SW_BP;
        }
        let on = debug.control != 0;
        if on {
            debug.control |= KVM_GUESTDBG_ENABLE;
        }
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
        if let Some(pc) = self.debug.stopped_at.take()
            && self.debug.control.breakpoints.contains(&pc)
            && self.linear_pc()? == pc
        {
            self.debug.stepping_over = true;
            self.apply_debug(0)?;
        }
        self.write_patches(!self.debug.stepping_over)
    }

    /// Called when a run ends: nobody but the vCPU sees INT3s.
    pub(crate) fn end_debug(&mut self) -> Result<(), AccelError> {
        self.write_patches(false)
    }

    /// Called on a debug exit. `Some`: the debugger's business.
    pub(crate) fn debug_exit(&mut self, info: &kvm_debug_exit_arch) -> Result<Option<Exit>, AccelError> {
        let pc = info.pc;
        let hits = if info.exception == DB { info.dr6 & 0xf } else { 0 };
        let watched = self.debug.pieces.iter().enumerate().find(|(n, _)| hits >> n & 1 != 0);
        let watched = watched.map(|(_, piece)| piece.whole);
        if std::mem::take(&mut self.debug.stepping_over) {
            self.apply_debug(0)?;
            let wanted = &self.debug.control;
            if watched.is_none() && !wanted.single_step && !wanted.breakpoints.contains(&pc) {
                self.write_patches(true)?;
                return Ok(None);
            }
        } else if info.exception == BP && !self.debug.patches.iter().any(|p| p.gva == pc) {
            // The guest's own INT3.
            self.apply_debug(KVM_GUESTDBG_INJECT_BP)?;
            return Ok(None);
        }
        if let Some(watched) = watched {
            return Ok(Some(Exit::Watch(pc, watched)));
        }
        self.debug.stopped_at = Some(pc);
        Ok(Some(Exit::Debug(pc)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(address: u64, len: u64) -> Watchpoint {
        Watchpoint { address, len, kind: WatchKind::Write }
    }

    #[test]
    fn watchpoints_are_cut_to_what_debug_registers_hold() {
        let cut = |w: &[Watchpoint]| {
            pieces(w).map(|all| all.iter().map(|p| (p.address, p.len)).collect::<Vec<_>>())
        };
        assert_eq!(cut(&[watch(0x1000, 8)]).expect("fits"), [(0x1000, 8)]);
        assert_eq!(cut(&[watch(0x1003, 6)]).expect("fits"), [(0x1003, 1), (0x1004, 4), (0x1008, 1)]);
        assert_eq!(cut(&[watch(u64::MAX, 1)]).expect("fits"), [(u64::MAX, 1)]);
        let text = cut(&[watch(0x1000, 33)]).expect_err("too long").to_string();
        assert!(text.contains("33 bytes at 0x1000") && text.contains("4 debug registers"), "{text}");
    }
}
