//! Multiplication and division.

use holdfast_tcg_ir::{Cond, Op, Val};
use iced_x86::{Instruction, Mnemonic};

use super::{STATUS, Size, Translator};
use crate::flags::Kind;
use crate::system::regs::vector;

const RAX: usize = 0;
const RDX: usize = 2;

impl Translator<'_> {
    pub(super) fn muldiv(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        match insn.mnemonic() {
            Mul => self.multiply(insn, false),
            Imul if insn.op_count() == 1 => self.multiply(insn, true),
            Imul => self.imul(insn),
            Mulx => self.mulx(insn),
            Div => self.divide(insn, false),
            Idiv => self.divide(insn, true),
            _ => return false,
        }
        true
    }

    /// IMUL with two or three operands.
    fn imul(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let (first, second) = if insn.op_count() == 2 { (0, 1) } else { (1, 2) };
        let a = self.read_op(insn, first, size);
        let b = self.read_op(insn, second, size);
        if self.live & STATUS == 0 {
            let v = self.b.mul(a, b);
            return self.write_reg(insn.op0_register(), v);
        }
        let (low, overflow) = if size == Size::B8 {
            let low = self.b.mul(a, b);
            let high = self.b.mulhs(a, b);
            let sign = self.b.shrsi(low, 63);
            (low, self.b.setcond(Cond::Ne, high, sign))
        } else {
            let (a, b) = (self.to64_signed(size, a), self.to64_signed(size, b));
            let product = self.b.mul(a, b);
            let low = self.b.trunc(product);
            let back = self.to64_signed(size, low);
            (low, self.b.setcond(Cond::Ne, product, back))
        };
        self.write_reg(insn.op0_register(), low);
        let overflow = self.narrow(size, overflow);
        self.set_cc(Kind::Mul, size, low, overflow);
    }

    /// MUL and IMUL with one operand.
    fn multiply(&mut self, insn: &Instruction, signed: bool) {
        let size = self.op_size(insn, 0);
        let a = self.gpr_low(RAX, size);
        let b = self.read_op(insn, 0, size);
        if size == Size::B8 {
            let low = self.b.mul(a, b);
            let high = if signed { self.b.mulhs(a, b) } else { self.b.mulhu(a, b) };
            self.set_gpr(RAX, low);
            self.set_gpr(RDX, high);
            if self.live & STATUS != 0 {
                let fill = if signed { self.b.shrsi(low, 63) } else { self.b.iconst(0) };
                let overflow = self.b.setcond(Cond::Ne, high, fill);
                self.set_cc(Kind::Mul, size, low, overflow);
            }
            return;
        }
        let (a, b) = if signed {
            (self.to64_signed(size, a), self.to64_signed(size, b))
        } else {
            (self.to64(size, a), self.to64(size, b))
        };
        let product = self.b.mul(a, b);
        let low = self.b.trunc(product);
        if size == Size::B1 {
            self.set_gpr_low(RAX, Size::B2, low);
        } else {
            let high = self.b.shrui(product, i64::from(size.bits()));
            let high = self.b.trunc(high);
            self.set_gpr_low(RAX, size, low);
            self.set_gpr_low(RDX, size, high);
        }
        if self.live & STATUS != 0 {
            let back = if signed { self.to64_signed(size, low) } else { self.to64(size, low) };
            let overflow = self.b.setcond(Cond::Ne, product, back);
            let overflow = self.b.trunc(overflow);
            self.set_cc(Kind::Mul, size, low, overflow);
        }
    }

    fn mulx(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let a = self.gpr_low(RDX, size);
        let b = self.read_op(insn, 2, size);
        let (high, low) = if size == Size::B8 {
            (self.b.mulhu(a, b), self.b.mul(a, b))
        } else {
            let (a, b) = (self.b.zext(a), self.b.zext(b));
            let product = self.b.mul(a, b);
            let high = self.b.shrui(product, 32);
            (self.b.trunc(high), self.b.trunc(product))
        };
        // When both go to one register, it is the high half that stays.
        self.write_reg(insn.op_register(1), low);
        self.write_reg(insn.op0_register(), high);
    }

    fn divide(&mut self, insn: &Instruction, signed: bool) {
        let size = self.op_size(insn, 0);
        let divisor = self.read_op(insn, 0, size);
        match size {
            Size::B1 | Size::B2 => self.divide_small(size, divisor, signed),
            Size::B4 => self.divide32(divisor, signed),
            Size::B8 => self.divide64(divisor, signed),
        }
    }

    /// In 32 bits, AX or DX:AX by 8 or 16 bits.
    fn divide_small(&mut self, size: Size, divisor: Val, signed: bool) {
        let dividend = if size == Size::B1 {
            let ax = self.gpr_low(RAX, Size::B2);
            if signed { self.sign_extended(Size::B2, ax) } else { self.zero_extended(Size::B2, ax) }
        } else {
            let low = self.gpr_low(RAX, size);
            let low = self.zero_extended(size, low);
            let high = self.gpr_low(RDX, size);
            let high = self.b.shli(high, 16);
            self.b.or(high, low)
        };
        let divisor =
            if signed { self.sign_extended(size, divisor) } else { self.zero_extended(size, divisor) };
        // The least dividend by -1 would overflow 32 bits too: 64 are enough for everything.
        let (n, d) = if signed {
            (self.b.sext(dividend), self.b.sext(divisor))
        } else {
            (self.b.zext(dividend), self.b.zext(divisor))
        };
        let (q, r) = self.checked(size, (n, d), signed);
        if size == Size::B1 {
            let q = self.zero_extended(size, q);
            let r = self.b.shli(r, 8);
            let ax = self.b.or(q, r);
            self.set_gpr_low(RAX, Size::B2, ax);
        } else {
            self.set_gpr_low(RAX, size, q);
            self.set_gpr_low(RDX, size, r);
        }
    }

    fn divide32(&mut self, divisor: Val, signed: bool) {
        let high = self.gpr(RDX);
        if !signed && self.b.as_const(high).is_some_and(|h| h as u32 == 0) {
            let zero = self.imm(Size::B4, 0);
            self.raise_if((Cond::Eq, divisor, zero), vector::DE, None);
            let n = self.gpr_low(RAX, Size::B4);
            let (q, r) = (self.b.divu(n, divisor), self.b.remu(n, divisor));
            self.set_gpr_low(RAX, Size::B4, q);
            return self.set_gpr_low(RDX, Size::B4, r);
        }
        let low = self.gpr_low(RAX, Size::B4);
        let low = self.b.zext(low);
        let high = self.b.shli(high, 32);
        let n = self.b.or(high, low);
        let d = if signed { self.b.sext(divisor) } else { self.b.zext(divisor) };
        let (q, r) = self.checked(Size::B4, (n, d), signed);
        self.set_gpr_low(RAX, Size::B4, q);
        self.set_gpr_low(RDX, Size::B4, r);
    }

    /// A 64-bit division whose quotient has to fit `size`, smaller than that. Quotient and remainder in its type.
    fn checked(&mut self, size: Size, (n, d): (Val, Val), signed: bool) -> (Val, Val) {
        let zero = self.b.iconst(0);
        self.raise_if((Cond::Eq, d, zero), vector::DE, None);
        let (q, r) = if signed {
            (self.b.divs(n, d), self.b.rems(n, d))
        } else {
            (self.b.divu(n, d), self.b.remu(n, d))
        };
        let low = self.b.trunc(q);
        let back = if signed { self.to64_signed(size, low) } else { self.to64(size, low) };
        self.raise_if((Cond::Ne, q, back), vector::DE, None);
        (low, self.b.trunc(r))
    }

    fn divide64(&mut self, divisor: Val, signed: bool) {
        let (high, low) = (self.gpr(RDX), self.gpr(RAX));
        let simple = if signed { self.is_sign_of(high, low) } else { self.b.as_const(high) == Some(0) };
        let (q, r) = if simple {
            let zero = self.b.iconst(0);
            self.raise_if((Cond::Eq, divisor, zero), vector::DE, None);
            if signed {
                // Only the least number by -1 overflows: then, and for no other, both are as here.
                let (q, r) = (self.b.divs(low, divisor), self.b.rems(low, divisor));
                let minus = self.b.addi(divisor, 1);
                let least = self.b.xori(low, i64::MIN);
                let either = self.b.or(minus, least);
                self.raise_if((Cond::Eq, either, zero), vector::DE, None);
                (q, r)
            } else {
                (self.b.divu(low, divisor), self.b.remu(low, divisor))
            }
        } else {
            let id = if signed { self.ids.int.idiv64 } else { self.ids.int.div64 };
            let q = self.b.call(id, &[high, low, divisor]);
            let product = self.b.mul(q, divisor);
            (q, self.b.sub(low, product))
        };
        self.set_gpr(RAX, q);
        self.set_gpr(RDX, r);
    }

    /// Whether `high` is known to be the sign of `low` in all bits.
    fn is_sign_of(&self, high: Val, low: Val) -> bool {
        let d = *self.b.region().def(high);
        d.op == Op::ShrS && d.a == low.0 && self.b.as_const(Val(d.b)) == Some(63)
    }
}
