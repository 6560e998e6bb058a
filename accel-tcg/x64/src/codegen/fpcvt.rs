//! Conversions between floats and integers.

use super::Cx;
use super::cold::Cold;
use crate::asm::{Alu, Cc, Reg, Rm, Shift, Xmm};
use crate::soft::Request;
use holdfast_tcg_ir::{Inst, Round, Type, Val};

impl Cx<'_> {
    pub(crate) fn fp_cvt_ff(&mut self, i: &Inst, double: bool) {
        // Widening is exact whatever the mode.
        if !double && i.fp().round() != Round::Dynamic {
            return self.soft(i);
        }
        let s = self.xrm(Val(i.a));
        let d = self.xtemp();
        if s != Rm::from(d) {
            self.st.asm.sse(0, 0x57, d, d);
        }
        self.st.asm.sse(if double { 0xf3 } else { 0xf2 }, 0x5a, d, s);
        self.canonicalise(i, d, double);
        self.xdefine(d);
    }

    pub(crate) fn fp_to_signed(&mut self, i: &Inst) {
        let truncate = match i.fp().round() {
            Round::Zero => true,
            Round::Dynamic => false,
            _ => return self.soft(i),
        };
        let double = self.r.ty(Val(i.a)) == Type::F64;
        let w = i.ty == Type::I64;
        let x = self.xmm(Val(i.a));
        let d = self.dest(None);
        self.st.asm.cvt_to_int((double, truncate, w), d, x);
        // The minimum is what the host gives for everything out of range, besides itself.
        self.st.asm.alu_imm(Alu::Cmp, w, d, 1);
        let from = self.st.asm.jcc(Cc::O);
        let back = self.st.asm.pos();
        self.st.cold.push(Cold::CvtSigned { from, back, d, x, double, w });
        self.define(d);
    }

    /// Cold part of a conversion to signed: `d` holds the minimum; NaNs and positive numbers give the maximum. The flag
    /// is raised already.
    pub(crate) fn cold_cvt_signed(&mut self, d: Reg, x: Xmm, double: bool, w: bool) {
        let asm = &mut self.st.asm;
        asm.sse(if double { 0x66 } else { 0 }, 0x2e, x, x);
        let nan = asm.jcc_short(Cc::P);
        let t = super::alloc::XT0;
        // Sign of x: compare with zero raises nothing for numbers.
        asm.sse(0, 0x57, t, t);
        asm.sse(if double { 0x66 } else { 0 }, 0x2e, x, t);
        let negative = asm.jcc_short(Cc::B);
        asm.patch_short(nan);
        asm.mov_imm(d, if w { i64::MAX as u64 } else { i32::MAX as u64 });
        asm.patch_short(negative);
    }

    pub(crate) fn fp_to_unsigned(&mut self, i: &Inst) {
        let truncate = match i.fp().round() {
            Round::Zero => true,
            Round::Dynamic => false,
            _ => return self.soft(i),
        };
        // Inline for what is in [0, 2^63), or [0, 2^32) when truncating to 32 bits (rounding could leave the range).
        // The range is tested on the bits, because the host would raise other flags; softfp decides the rest.
        let double = self.r.ty(Val(i.a)) == Type::F64;
        let wide = i.ty == Type::I64;
        if !wide && !truncate {
            return self.soft(i);
        }
        let bound = match (wide, double) {
            (true, true) => 2f64.powi(63).to_bits(),
            (true, false) => u64::from(2f32.powi(63).to_bits()),
            (false, true) => 2f64.powi(32).to_bits(),
            (false, false) => u64::from(2f32.powi(32).to_bits()),
        };
        let x = self.xmm(Val(i.a));
        let d = self.temp();
        self.st.asm.mov_from_xmm(double, d, x);
        let limit = self.temp();
        self.st.asm.mov_imm(limit, bound);
        // Unsigned: negative numbers and NaNs are above too.
        self.st.asm.alu(Alu::Cmp, double, d, limit);
        let from = self.st.asm.jcc(Cc::Ae);
        self.st.asm.cvt_to_int((double, truncate, true), d, x);
        let back = self.st.asm.pos();
        let request = Request { op: i.op, mode: i.fp(), wide_in: double, wide_out: wide }.pack();
        self.st.cold.push(Cold::Soft { from, back, d, x, double, request: request as u32 });
        self.define(d);
    }

    pub(crate) fn fp_from_signed(&mut self, i: &Inst, double: bool) {
        let w = self.r.ty(Val(i.a)) == Type::I64;
        let exact = double && !w;
        if !exact && i.fp().round() != Round::Dynamic {
            return self.soft(i);
        }
        let r = self.gpr(Val(i.a));
        let d = self.xtemp();
        self.st.asm.sse(0, 0x57, d, d);
        self.st.asm.cvt_from_int(double, w, d, r);
        self.xdefine(d);
    }

    pub(crate) fn fp_from_unsigned(&mut self, i: &Inst, double: bool) {
        let w = self.r.ty(Val(i.a)) == Type::I64;
        if (w || !double) && i.fp().round() != Round::Dynamic {
            return self.soft(i);
        }
        if !w {
            let s = self.rm(Val(i.a), 4);
            let t = self.temp();
            self.st.asm.movzx(2, t, s);
            let d = self.xtemp();
            self.st.asm.sse(0, 0x57, d, d);
            self.st.asm.cvt_from_int(double, true, d, t);
            return self.xdefine(d);
        }
        let r = self.gpr(Val(i.a));
        let (t, u) = (self.temp(), self.temp());
        let d = self.xtemp();
        let asm = &mut self.st.asm;
        asm.sse(0, 0x57, d, d);
        asm.test(true, r, r);
        let big = asm.jcc_short(Cc::S);
        asm.cvt_from_int(double, true, d, r);
        let end = asm.jmp_short();
        asm.patch_short(big);
        // Halve with the lost bit kept sticky, convert, double: rounds once.
        asm.mov(true, t, r);
        asm.mov(false, u, r);
        asm.shift_imm(Shift::Shr, true, t, 1);
        asm.alu_imm(Alu::And, false, u, 1);
        asm.alu(Alu::Or, true, t, u);
        asm.cvt_from_int(double, true, d, t);
        asm.sse(if double { 0xf2 } else { 0xf3 }, 0x58, d, d);
        asm.patch_short(end);
        self.xdefine(d);
    }
}
