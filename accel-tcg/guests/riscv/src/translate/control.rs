//! Branches, jumps, environment calls.

use holdfast_tcg_ir::{Cond, JumpHint};

use super::Translator;
use crate::decode::{B, I, Insn};
use crate::trap::cause;

/// Registers that hold return addresses (unprivileged specification, table 3).
fn is_link(r: u32) -> bool {
    r == 1 || r == 5
}

impl Translator<'_> {
    /// Translates transfers of control; false if `insn` is something else.
    pub(super) fn control(&mut self, insn: Insn) -> bool {
        match insn {
            Insn::Beq(b) => self.cond_branch(b, Cond::Eq),
            Insn::Bne(b) => self.cond_branch(b, Cond::Ne),
            Insn::Blt(b) => self.cond_branch(b, Cond::LtS),
            Insn::Bge(b) => self.cond_branch(b, Cond::GeS),
            Insn::Bltu(b) => self.cond_branch(b, Cond::LtU),
            Insn::Bgeu(b) => self.cond_branch(b, Cond::GeU),
            Insn::Jal(j) => {
                let target = self.pc.wrapping_add_signed(i64::from(j.imm));
                let link = self.b.iconst(self.next as i64);
                self.set_x(j.rd, link);
                match self.label_of(target) {
                    Some(label) if j.rd == 0 => self.b.br(label),
                    _ => self.goto(target),
                }
            }
            Insn::Jalr(i) => self.jalr(i),
            Insn::Ecall(_) => self.raise(cause::ECALL + self.key.privilege(), 0),
            Insn::Ebreak(_) => self.raise(cause::BREAKPOINT, self.pc),
            _ => return false,
        }
        true
    }

    fn cond_branch(&mut self, b: B, cc: Cond) {
        let (x, y) = (self.x(b.rs1), self.x(b.rs2));
        let target = self.pc.wrapping_add_signed(i64::from(b.imm));
        self.branch(cc, x, y, target);
    }

    fn jalr(&mut self, i: I) {
        let base = self.x(i.rs1);
        let target = self.b.addi(base, i64::from(i.imm));
        let target = self.b.andi(target, !1);
        let link = self.b.iconst(self.next as i64);
        self.set_x(i.rd, link);
        if let Some(target) = self.b.as_const(target) {
            return self.goto(target);
        }
        let hint = if is_link(i.rd) {
            JumpHint::Call
        } else if is_link(i.rs1) {
            JumpHint::Return
        } else {
            JumpHint::Jump
        };
        self.goto_val(target, hint);
    }
}
