//! RV64I arithmetic and M.

use holdfast_tcg_ir::{Cond, Op, Val};

use super::Translator;
use crate::decode::{I, Insn, R, Shift};

impl Translator<'_> {
    /// Translates integer arithmetic; false if `insn` is something else.
    pub(super) fn int(&mut self, insn: Insn) -> bool {
        match insn {
            Insn::Lui(u) => {
                let v = self.b.iconst(i64::from(u.imm));
                self.set_x(u.rd, v);
            }
            Insn::Auipc(u) => {
                let v = self.b.iconst(self.pc.wrapping_add_signed(i64::from(u.imm)) as i64);
                self.set_x(u.rd, v);
            }
            Insn::Addi(i) => self.op_imm(i, Op::Add),
            Insn::Xori(i) => self.op_imm(i, Op::Xor),
            Insn::Ori(i) => self.op_imm(i, Op::Or),
            Insn::Andi(i) => self.op_imm(i, Op::And),
            Insn::Slti(i) => self.set_if_imm(i, Cond::LtS),
            Insn::Sltiu(i) => self.set_if_imm(i, Cond::LtU),
            Insn::Addiw(i) => {
                let a = self.w(i.rs1);
                let v = self.b.addi(a, i64::from(i.imm));
                self.set_w(i.rd, v);
            }
            Insn::Slli(s) => self.shift_imm(s, Op::Shl),
            Insn::Srli(s) => self.shift_imm(s, Op::ShrU),
            Insn::Srai(s) => self.shift_imm(s, Op::ShrS),
            Insn::Slliw(s) => self.shift_imm_w(s, Op::Shl),
            Insn::Srliw(s) => self.shift_imm_w(s, Op::ShrU),
            Insn::Sraiw(s) => self.shift_imm_w(s, Op::ShrS),
            Insn::Slt(r) => self.set_if(r, Cond::LtS),
            Insn::Sltu(r) => self.set_if(r, Cond::LtU),
            _ => return self.int_r(insn),
        }
        true
    }

    /// Those with two register operands.
    fn int_r(&mut self, insn: Insn) -> bool {
        match insn {
            Insn::Add(r) => self.op(r, Op::Add),
            Insn::Sub(r) => self.op(r, Op::Sub),
            Insn::Xor(r) => self.op(r, Op::Xor),
            Insn::Or(r) => self.op(r, Op::Or),
            Insn::And(r) => self.op(r, Op::And),
            Insn::Sll(r) => self.op(r, Op::Shl),
            Insn::Srl(r) => self.op(r, Op::ShrU),
            Insn::Sra(r) => self.op(r, Op::ShrS),
            Insn::Mul(r) => self.op(r, Op::Mul),
            Insn::Mulh(r) => self.op(r, Op::MulHS),
            Insn::Mulhsu(r) => self.op(r, Op::MulHSU),
            Insn::Mulhu(r) => self.op(r, Op::MulHU),
            Insn::Div(r) => self.op(r, Op::DivS),
            Insn::Divu(r) => self.op(r, Op::DivU),
            Insn::Rem(r) => self.op(r, Op::RemS),
            Insn::Remu(r) => self.op(r, Op::RemU),
            Insn::Addw(r) => self.op_w(r, Op::Add),
            Insn::Subw(r) => self.op_w(r, Op::Sub),
            Insn::Sllw(r) => self.op_w(r, Op::Shl),
            Insn::Srlw(r) => self.op_w(r, Op::ShrU),
            Insn::Sraw(r) => self.op_w(r, Op::ShrS),
            Insn::Mulw(r) => self.op_w(r, Op::Mul),
            Insn::Divw(r) => self.op_w(r, Op::DivS),
            Insn::Divuw(r) => self.op_w(r, Op::DivU),
            Insn::Remw(r) => self.op_w(r, Op::RemS),
            Insn::Remuw(r) => self.op_w(r, Op::RemU),
            _ => return false,
        }
        true
    }

    /// Both operands.
    pub(super) fn xs(&mut self, r: R) -> (Val, Val) {
        (self.x(r.rs1), self.x(r.rs2))
    }

    /// `rd = rs1 op rs2`
    pub(super) fn op(&mut self, r: R, op: Op) {
        if r.rd != 0 {
            let (a, b) = self.xs(r);
            let v = self.b.binary(op, a, b);
            self.set_x(r.rd, v);
        }
    }

    /// `rd = sext(rs1[31:0] op rs2[31:0])`
    pub(super) fn op_w(&mut self, r: R, op: Op) {
        if r.rd != 0 {
            let (a, b) = (self.w(r.rs1), self.w(r.rs2));
            let v = self.b.binary(op, a, b);
            self.set_w(r.rd, v);
        }
    }

    fn op_imm(&mut self, i: I, op: Op) {
        if i.rd != 0 {
            let a = self.x(i.rs1);
            let v = self.b.binary_imm(op, a, i64::from(i.imm));
            self.set_x(i.rd, v);
        }
    }

    fn set_if(&mut self, r: R, cc: Cond) {
        let (a, b) = self.xs(r);
        let v = self.b.setcond(cc, a, b);
        self.set_x(r.rd, v);
    }

    fn set_if_imm(&mut self, i: I, cc: Cond) {
        let a = self.x(i.rs1);
        let b = self.b.iconst(i64::from(i.imm));
        let v = self.b.setcond(cc, a, b);
        self.set_x(i.rd, v);
    }

    /// `rd = rs1 op shamt`
    pub(super) fn shift_imm(&mut self, s: Shift, op: Op) {
        if s.rd != 0 {
            let a = self.x(s.rs1);
            let v = self.b.binary_imm(op, a, i64::from(s.shamt));
            self.set_x(s.rd, v);
        }
    }

    /// `rd = sext(rs1[31:0] op shamt)`
    pub(super) fn shift_imm_w(&mut self, s: Shift, op: Op) {
        if s.rd != 0 {
            let a = self.w(s.rs1);
            let v = self.b.binary_imm(op, a, i64::from(s.shamt));
            self.set_w(s.rd, v);
        }
    }
}
