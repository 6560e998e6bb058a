//! Zba, Zbb, Zbs.

use holdfast_tcg_ir::{Op, Val};

use super::Translator;
use crate::decode::{Insn, R, Shift, Unary};

impl Translator<'_> {
    /// Translates bit manipulation; false if `insn` is something else.
    pub(super) fn bits(&mut self, insn: Insn) -> bool {
        match insn {
            Insn::AddUw(r) => self.shadd_uw(r, 0),
            Insn::Sh1add(r) => self.shadd(r, 1),
            Insn::Sh2add(r) => self.shadd(r, 2),
            Insn::Sh3add(r) => self.shadd(r, 3),
            Insn::Sh1addUw(r) => self.shadd_uw(r, 1),
            Insn::Sh2addUw(r) => self.shadd_uw(r, 2),
            Insn::Sh3addUw(r) => self.shadd_uw(r, 3),
            Insn::SlliUw(s) => {
                let a = self.w(s.rs1);
                let a = self.b.zext(a);
                let v = self.b.shli(a, i64::from(s.shamt));
                self.set_x(s.rd, v);
            }
            Insn::Andn(r) => self.op(r, Op::Andn),
            Insn::Min(r) => self.op(r, Op::MinS),
            Insn::Minu(r) => self.op(r, Op::MinU),
            Insn::Max(r) => self.op(r, Op::MaxS),
            Insn::Maxu(r) => self.op(r, Op::MaxU),
            Insn::Rol(r) => self.op(r, Op::RotL),
            Insn::Ror(r) => self.op(r, Op::RotR),
            Insn::Rolw(r) => self.op_w(r, Op::RotL),
            Insn::Rorw(r) => self.op_w(r, Op::RotR),
            Insn::Rori(s) => self.shift_imm(s, Op::RotR),
            Insn::Roriw(s) => self.shift_imm_w(s, Op::RotR),
            Insn::Orn(r) => {
                let (a, b) = self.xs(r);
                let v = self.b.orn(a, b);
                self.set_x(r.rd, v);
            }
            Insn::Xnor(r) => {
                let (a, b) = self.xs(r);
                let v = self.b.xnor(a, b);
                self.set_x(r.rd, v);
            }
            _ => return self.bits_unary(insn) || self.single_bit(insn),
        }
        true
    }

    fn bits_unary(&mut self, insn: Insn) -> bool {
        match insn {
            Insn::Clz(u) => self.unary(u, Op::Clz),
            Insn::Ctz(u) => self.unary(u, Op::Ctz),
            Insn::Cpop(u) => self.unary(u, Op::Popcnt),
            Insn::Clzw(u) => self.count_w(u, Op::Clz),
            Insn::Ctzw(u) => self.count_w(u, Op::Ctz),
            Insn::Cpopw(u) => self.count_w(u, Op::Popcnt),
            Insn::SextB(u) => self.unary(u, Op::Ext8S),
            Insn::SextH(u) => self.unary(u, Op::Ext16S),
            Insn::ZextH(u) => self.unary(u, Op::Ext16U),
            Insn::Rev8(u) => self.unary(u, Op::Bswap),
            Insn::OrcB(u) => {
                let a = self.x(u.rs1);
                let v = self.b.orc_b(a);
                self.set_x(u.rd, v);
            }
            _ => return false,
        }
        true
    }

    fn unary(&mut self, u: Unary, op: Op) {
        if u.rd != 0 {
            let a = self.x(u.rs1);
            let v = self.b.unary(op, a);
            self.set_x(u.rd, v);
        }
    }

    fn count_w(&mut self, u: Unary, op: Op) {
        let a = self.w(u.rs1);
        let n = self.b.unary(op, a);
        let v = self.b.zext(n);
        self.set_x(u.rd, v);
    }

    fn shadd(&mut self, r: R, n: i64) {
        let (a, b) = self.xs(r);
        let v = self.b.shadd(a, n, b);
        self.set_x(r.rd, v);
    }

    fn shadd_uw(&mut self, r: R, n: i64) {
        let a = self.w(r.rs1);
        let a = self.b.zext(a);
        let b = self.x(r.rs2);
        let v = self.b.shadd(a, n, b);
        self.set_x(r.rd, v);
    }

    fn single_bit(&mut self, insn: Insn) -> bool {
        let (rd, rs1, index) = match insn {
            Insn::Bclr(r) | Insn::Bext(r) | Insn::Binv(r) | Insn::Bset(r) => (r.rd, r.rs1, self.x(r.rs2)),
            Insn::Bclri(s) | Insn::Bexti(s) | Insn::Binvi(s) | Insn::Bseti(s) => self.immediate(s),
            _ => return false,
        };
        let a = self.x(rs1);
        let v = if matches!(insn, Insn::Bext(_) | Insn::Bexti(_)) {
            let v = self.b.shru(a, index);
            self.b.andi(v, 1)
        } else {
            let one = self.b.iconst(1);
            let bit = self.b.shl(one, index);
            match insn {
                Insn::Bclr(_) | Insn::Bclri(_) => self.b.andn(a, bit),
                Insn::Binv(_) | Insn::Binvi(_) => self.b.xor(a, bit),
                _ => self.b.or(a, bit),
            }
        };
        self.set_x(rd, v);
        true
    }

    fn immediate(&mut self, s: Shift) -> (u32, u32, Val) {
        (s.rd, s.rs1, self.b.iconst(i64::from(s.shamt)))
    }
}
