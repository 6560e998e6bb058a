//! Multiplication and division.

use super::Cx;
use crate::asm::{Alu, Cc, Reg, Shift};
use holdfast_tcg_ir::{Inst, Op, Type, Val};

impl Cx<'_> {
    pub(crate) fn multiply(&mut self, i: &Inst) {
        let w = i.ty == Type::I64;
        let (a, b) = (Val(i.a), Val(i.b));
        match i.op {
            Op::Mul => self.mul_low(a, b, w),
            _ if !w => self.mul_high32(i),
            _ => self.mul_high64(i),
        }
    }

    fn mul_low(&mut self, a: Val, b: Val, w: bool) {
        let bytes = if w { 8 } else { 4 };
        if let Some(imm) = self.imm32(b, w) {
            let s = self.rm(a, bytes);
            let d = self.dest(Some(a));
            self.st.asm.imul_imm(w, d, s, imm);
            return self.define(d);
        }
        if self.lives_on(a) {
            self.gpr(a);
        }
        let s = self.rm(b, bytes);
        let d = self.dest(Some(a));
        if s == d.into() && self.reg_of(a) != Some(d) {
            // The result goes where b is: multiply the other way round.
            let s = self.rm(a, bytes);
            self.st.asm.imul(w, d, s);
        } else {
            self.copy_to(d, a);
            self.st.asm.imul(w, d, s);
        }
        self.define(d);
    }

    /// High half of a 32-bit product, through a 64-bit one.
    fn mul_high32(&mut self, i: &Inst) {
        let (sa, sb) = match i.op {
            Op::MulHS => (true, true),
            Op::MulHSU => (true, false),
            _ => (false, false),
        };
        let (d, t) = (self.temp(), self.temp());
        for (r, v, signed) in [(d, i.a, sa), (t, i.b, sb)] {
            let s = self.rm(Val(v), 4);
            if signed {
                self.st.asm.movsx(2, true, r, s);
            } else {
                self.st.asm.movzx(2, r, s);
            }
        }
        self.st.asm.imul(true, d, t);
        self.st.asm.shift_imm(Shift::Shr, true, d, 32);
        self.define(d);
    }

    fn mul_high64(&mut self, i: &Inst) {
        self.take(Reg::RAX);
        self.take(Reg::RDX);
        let (a, b) = (Val(i.a), Val(i.b));
        let rb = self.gpr(b);
        self.copy_to(Reg::RAX, a);
        if i.op == Op::MulHSU {
            // signed * unsigned = unsigned * unsigned - (a < 0 ? b << 64 : 0)
            let t = self.temp();
            self.st.asm.mov(true, t, Reg::RAX);
            self.st.asm.shift_imm(Shift::Sar, true, t, 63);
            self.st.asm.alu(Alu::And, true, t, rb);
            self.st.asm.group3(4, true, rb);
            self.st.asm.alu(Alu::Sub, true, Reg::RDX, t);
        } else {
            self.st.asm.group3(if i.op == Op::MulHS { 5 } else { 4 }, true, rb);
        }
        self.define(Reg::RDX);
    }

    /// Division, total: what divide instructions trap on is tested before.
    pub(crate) fn divide(&mut self, i: &Inst) {
        let w = i.ty == Type::I64;
        let signed = matches!(i.op, Op::DivS | Op::RemS);
        let quotient = matches!(i.op, Op::DivS | Op::DivU);
        let (a, b) = (Val(i.a), Val(i.b));
        let known = self.konst(b).map(|c| if w { c } else { c as i32 as i64 as u64 });
        self.take(Reg::RAX);
        self.take(Reg::RDX);
        let rb = self.gpr(b);
        self.copy_to(Reg::RAX, a);
        let asm = &mut self.st.asm;
        let mut zero = None;
        let mut minus_one = None;
        if known.is_none_or(|c| c == 0) {
            asm.test(w, rb, rb);
            zero = Some(asm.jcc_short(Cc::E));
        }
        if signed && known.is_none_or(|c| c == u64::MAX) {
            asm.alu_imm(Alu::Cmp, w, rb, -1);
            minus_one = Some(asm.jcc_short(Cc::E));
        }
        if signed {
            asm.cqo(w);
            asm.group3(7, w, rb);
        } else {
            asm.alu(Alu::Xor, false, Reg::RDX, Reg::RDX);
            asm.group3(6, w, rb);
        }
        let mut ends = [None; 2];
        if let Some(at) = minus_one {
            ends[0] = Some(asm.jmp_short());
            asm.patch_short(at);
            if quotient {
                asm.group3(3, w, Reg::RAX);
            } else {
                asm.alu(Alu::Xor, false, Reg::RDX, Reg::RDX);
            }
        }
        if let Some(at) = zero {
            ends[1] = Some(asm.jmp_short());
            asm.patch_short(at);
            if quotient {
                asm.mov_imm(Reg::RAX, if w { u64::MAX } else { 0xffff_ffff });
            } else {
                asm.mov(w, Reg::RDX, Reg::RAX);
            }
        }
        for at in ends.into_iter().flatten() {
            asm.patch_short(at);
        }
        self.define(if quotient { Reg::RAX } else { Reg::RDX });
    }
}
