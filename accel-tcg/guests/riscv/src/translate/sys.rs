//! CSR instructions and the privileged ones.

use holdfast_tcg_ir::{Cond, HelperId, JumpHint, Slot, Val, env::exit};

use super::{MSTATUS, Translator};
use crate::csr::{SSTATUS_MASK, addr};
use crate::decode::{Csr, Insn};
use crate::hart::{Hart, mstatus, privilege};
use crate::helpers::kind;

/// What a CSR instruction does: the kind of change and its operand, register or immediate.
#[derive(Debug, Clone, Copy)]
struct Access {
    csr: Csr,
    kind: u64,
    immediate: bool,
}

fn csr_access(insn: Insn) -> Option<Access> {
    let (csr, kind, immediate) = match insn {
        Insn::Csrrw(c) => (c, kind::WRITE, false),
        Insn::Csrrs(c) => (c, kind::SET, false),
        Insn::Csrrc(c) => (c, kind::CLEAR, false),
        Insn::Csrrwi(c) => (c, kind::WRITE, true),
        Insn::Csrrsi(c) => (c, kind::SET, true),
        Insn::Csrrci(c) => (c, kind::CLEAR, true),
        _ => return None,
    };
    // Setting or clearing by x0 or 0 is no write at all.
    let kind = if kind != kind::WRITE && csr.rs1 == 0 { kind::NONE } else { kind };
    Some(Access { csr, kind, immediate })
}

/// Registers that are nothing but storage: slot and the bits that can be written.
fn storage(csr: u32) -> Option<(Slot, u64)> {
    macro_rules! at {
        ($field:ident) => {
            Slot::i64(std::mem::offset_of!(Hart, $field))
        };
    }
    Some(match csr {
        addr::SSCRATCH => (at!(sscratch), u64::MAX),
        addr::SEPC => (at!(sepc), !1),
        addr::SCAUSE => (at!(scause), u64::MAX),
        addr::STVAL => (at!(stval), u64::MAX),
        addr::MSCRATCH => (at!(mscratch), u64::MAX),
        addr::MEPC => (at!(mepc), !1),
        addr::MCAUSE => (at!(mcause), u64::MAX),
        addr::MTVAL => (at!(mtval), u64::MAX),
        _ => return None,
    })
}

/// Clears SIE and nothing else: changes no mode and enables nothing.
fn masks_interrupts(a: &Access) -> bool {
    a.csr.csr == addr::SSTATUS && a.kind == kind::CLEAR && a.immediate && u64::from(a.csr.rs1) == mstatus::SIE
}

/// True for CSR instructions that may change what the rest of the region depends on.
pub(super) fn ends_region(insn: Insn) -> bool {
    csr_access(insn)
        .is_some_and(|a| a.kind != kind::NONE && storage(a.csr.csr).is_none() && !masks_interrupts(&a))
}

impl Translator<'_> {
    /// Translates system instructions; false if `insn` is something else.
    pub(super) fn sys(&mut self, insn: Insn) -> bool {
        if let Some(access) = csr_access(insn) {
            self.csr(access);
            return true;
        }
        match insn {
            Insn::Mret(_) => self.trap_return(self.ids.mret),
            Insn::Sret(_) => self.trap_return(self.ids.sret),
            Insn::Wfi(_) => {
                let raw = self.b.iconst(i64::from(self.raw));
                self.b.call(self.ids.wfi, &[raw]);
                self.b.exit(exit::RESUME, self.next);
            }
            Insn::SfenceVma(v) => {
                let counts = u64::from(v.rs1 != 0) | u64::from(v.rs2 != 0) << 1;
                let raw = self.b.iconst(i64::from(self.raw));
                let args = [self.x(v.rs1), self.x(v.rs2), self.b.iconst(counts as i64), raw];
                self.b.call(self.ids.sfence_vma, &args);
                self.goto_lookup(self.next);
            }
            // Stores have invalidated what was translated from the bytes they changed; what is left is to
            // fetch what follows anew.
            Insn::FenceI(_) => self.goto_lookup(self.next),
            _ => return false,
        }
        true
    }

    fn trap_return(&mut self, helper: HelperId) {
        let raw = self.b.iconst(i64::from(self.raw));
        let pc = self.b.call(helper, &[raw]);
        self.goto_val(pc, JumpHint::Jump);
    }

    fn allowed(&self, csr: u32) -> bool {
        self.key.privilege() >= u64::from(csr >> 8 & 3)
    }

    fn csr(&mut self, a: Access) {
        let number = a.csr.csr;
        if !self.allowed(number) {
            return self.illegal();
        }
        if let Some((slot, writable)) = storage(number) {
            return self.csr_storage(a, slot, writable);
        }
        if masks_interrupts(&a) {
            return self.csr_mask_interrupts(a.csr.rd);
        }
        if number == addr::SSTATUS {
            return self.csr_sstatus(a);
        }
        let fp = matches!(number, addr::FFLAGS..=addr::FCSR);
        let raw = self.b.iconst(i64::from(self.raw));
        let csr = self.b.iconst(i64::from(number));
        if a.kind == kind::NONE && !fp {
            let v = self.b.call(self.ids.csr_read, &[csr, raw]);
            return self.set_x(a.csr.rd, v);
        }
        let operand = self.csr_operand(a);
        let how = self.b.iconst(a.kind as i64);
        let id = if fp { self.ids.csr_fp } else { self.ids.csr };
        let old = self.b.call(id, &[csr, how, operand, raw]);
        self.set_x(a.csr.rd, old);
        if a.kind != kind::NONE {
            self.goto_lookup(self.next);
        }
    }

    fn csr_operand(&mut self, a: Access) -> Val {
        if a.immediate { self.b.iconst(i64::from(a.csr.rs1)) } else { self.x(a.csr.rs1) }
    }

    fn csr_storage(&mut self, a: Access, slot: Slot, writable: u64) {
        let old = self.b.get(slot);
        let operand = self.csr_operand(a);
        let new = match a.kind {
            kind::WRITE => operand,
            kind::SET => self.b.or(old, operand),
            kind::CLEAR => self.b.andn(old, operand),
            _ => return self.set_x(a.csr.rd, old),
        };
        let new = self.b.andi(new, writable as i64);
        self.b.set(slot, new);
        self.set_x(a.csr.rd, old);
    }

    /// `sstatus`, which is there for S-mode and up whatever the hart's state.
    fn csr_sstatus(&mut self, a: Access) {
        let operand = self.csr_operand(a);
        if a.csr.rd != 0 {
            let old = self.sstatus();
            self.set_x(a.csr.rd, old);
        }
        let none = self.b.iconst(0);
        let (clear, set) = match a.kind {
            kind::SET => (none, operand),
            kind::CLEAR => (operand, none),
            kind::WRITE => (self.b.iconst(-1), operand),
            _ => return,
        };
        self.b.call(self.ids.sstatus, &[clear, set]);
        self.goto_lookup(self.next);
    }

    /// `csrrci rd, sstatus, SIE`: how kernels mask interrupts.
    fn csr_mask_interrupts(&mut self, rd: u32) {
        if rd != 0 {
            let v = self.sstatus();
            self.set_x(rd, v);
        }
        let status = self.b.get(MSTATUS);
        let status = self.b.andi(status, !(mstatus::SIE as i64));
        self.b.set(MSTATUS, status);
    }

    /// The value of `sstatus`. Only for S-mode and up.
    fn sstatus(&mut self) -> Val {
        debug_assert!(self.key.privilege() >= privilege::S);
        let status = self.b.get(MSTATUS);
        let visible = self.b.andi(status, SSTATUS_MASK as i64);
        // SD: both bits of FS are set.
        let fs = self.b.andi(status, mstatus::FS as i64);
        let all = self.b.iconst(mstatus::FS as i64);
        let dirty = self.b.setcond(Cond::Eq, fs, all);
        let sd = self.b.shli(dirty, 63);
        self.b.or(visible, sd)
    }
}
