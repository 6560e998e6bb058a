//! F and D.

use holdfast_tcg_ir::{FpCond, FpMode, Op, Round, Type, Val};

use super::{Translator, f_slot};
use crate::decode::{Fp1, Fp2, Fp3, Insn, R, Unary};

use Type::{F32, F64, I32, I64};

/// What has no rounding still carries the NaN rule.
const EXACT: FpMode = FpMode::canonical(Round::NearestEven);

impl Translator<'_> {
    /// Translates floating point; false if `insn` is something else.
    pub(super) fn fp(&mut self, insn: Insn) -> bool {
        if !self.key.fp_on() {
            return false;
        }
        match insn {
            Insn::FaddS(r) => self.fp2(r, F32, Op::FAdd),
            Insn::FsubS(r) => self.fp2(r, F32, Op::FSub),
            Insn::FmulS(r) => self.fp2(r, F32, Op::FMul),
            Insn::FdivS(r) => self.fp2(r, F32, Op::FDiv),
            Insn::FsqrtS(r) => self.sqrt(r, F32),
            Insn::FaddD(r) => self.fp2(r, F64, Op::FAdd),
            Insn::FsubD(r) => self.fp2(r, F64, Op::FSub),
            Insn::FmulD(r) => self.fp2(r, F64, Op::FMul),
            Insn::FdivD(r) => self.fp2(r, F64, Op::FDiv),
            Insn::FsqrtD(r) => self.sqrt(r, F64),
            Insn::FmaddS(r) => self.fma(r, F32, false, false),
            Insn::FmsubS(r) => self.fma(r, F32, false, true),
            Insn::FnmsubS(r) => self.fma(r, F32, true, false),
            Insn::FnmaddS(r) => self.fma(r, F32, true, true),
            Insn::FmaddD(r) => self.fma(r, F64, false, false),
            Insn::FmsubD(r) => self.fma(r, F64, false, true),
            Insn::FnmsubD(r) => self.fma(r, F64, true, false),
            Insn::FnmaddD(r) => self.fma(r, F64, true, true),
            _ => return self.fp_exact(insn) || self.fp_move(insn) || self.fp_convert(insn),
        }
        true
    }

    /// A floating-point register as `ty`.
    fn f(&mut self, r: u32, ty: Type) -> Val {
        let v = self.b.get(f_slot(r));
        if ty == F32 { self.b.funbox(v) } else { v }
    }

    fn set_f(&mut self, r: u32, v: Val) {
        let v = if self.b.ty(v) == F32 { self.b.fbox(v) } else { v };
        self.b.set(f_slot(r), v);
        self.mark_fp();
    }

    /// The mode of an instruction with `rm`, or an illegal instruction.
    fn mode(&mut self, rm: u32) -> Option<FpMode> {
        let round = self.key.round(rm);
        if round.is_none() {
            self.illegal();
        }
        round.map(FpMode::canonical)
    }

    fn fp2(&mut self, r: Fp2, ty: Type, op: Op) {
        let Some(mode) = self.mode(r.rm) else { return };
        let (a, b) = (self.f(r.rs1, ty), self.f(r.rs2, ty));
        let v = self.b.fbinary(op, mode, a, b);
        self.set_f(r.rd, v);
    }

    fn sqrt(&mut self, r: Fp1, ty: Type) {
        let Some(mode) = self.mode(r.rm) else { return };
        let a = self.f(r.rs1, ty);
        let v = self.b.fsqrt(mode, a);
        self.set_f(r.rd, v);
    }

    fn fma(&mut self, r: Fp3, ty: Type, negate_product: bool, negate_addend: bool) {
        let Some(mode) = self.mode(r.rm) else { return };
        let mode = mode.negate_product(negate_product).negate_addend(negate_addend);
        let (a, b, c) = (self.f(r.rs1, ty), self.f(r.rs2, ty), self.f(r.rs3, ty));
        let v = self.b.fmuladd(mode, a, b, c);
        self.set_f(r.rd, v);
    }

    /// What does not round.
    fn fp_exact(&mut self, insn: Insn) -> bool {
        match insn {
            Insn::FsgnjS(r) => self.sign(r, F32, Op::FSgnj),
            Insn::FsgnjnS(r) => self.sign(r, F32, Op::FSgnjn),
            Insn::FsgnjxS(r) => self.sign(r, F32, Op::FSgnjx),
            Insn::FsgnjD(r) => self.sign(r, F64, Op::FSgnj),
            Insn::FsgnjnD(r) => self.sign(r, F64, Op::FSgnjn),
            Insn::FsgnjxD(r) => self.sign(r, F64, Op::FSgnjx),
            Insn::FminS(r) => self.min_max(r, F32, Op::FMin),
            Insn::FmaxS(r) => self.min_max(r, F32, Op::FMax),
            Insn::FminD(r) => self.min_max(r, F64, Op::FMin),
            Insn::FmaxD(r) => self.min_max(r, F64, Op::FMax),
            Insn::FeqS(r) => self.compare(r, F32, FpCond::Eq),
            Insn::FltS(r) => self.compare(r, F32, FpCond::Lt),
            Insn::FleS(r) => self.compare(r, F32, FpCond::Le),
            Insn::FeqD(r) => self.compare(r, F64, FpCond::Eq),
            Insn::FltD(r) => self.compare(r, F64, FpCond::Lt),
            Insn::FleD(r) => self.compare(r, F64, FpCond::Le),
            Insn::FclassS(u) => self.class(u, F32),
            Insn::FclassD(u) => self.class(u, F64),
            _ => return false,
        }
        true
    }

    fn sign(&mut self, r: R, ty: Type, op: Op) {
        let (a, b) = (self.f(r.rs1, ty), self.f(r.rs2, ty));
        let v = self.b.fsgn(op, a, b);
        self.set_f(r.rd, v);
    }

    fn min_max(&mut self, r: R, ty: Type, op: Op) {
        let (a, b) = (self.f(r.rs1, ty), self.f(r.rs2, ty));
        let v = self.b.fbinary(op, EXACT, a, b);
        self.set_f(r.rd, v);
    }

    fn compare(&mut self, r: R, ty: Type, cc: FpCond) {
        let (a, b) = (self.f(r.rs1, ty), self.f(r.rs2, ty));
        let v = self.b.fcmp(cc, a, b);
        self.set_x(r.rd, v);
        self.mark_fp(); // fflags
    }

    fn class(&mut self, u: Unary, ty: Type) {
        let a = self.f(u.rs1, ty);
        let v = self.b.fclass(a);
        self.set_x(u.rd, v);
    }

    fn fp_move(&mut self, insn: Insn) -> bool {
        match insn {
            Insn::FmvXW(u) => {
                let v = self.b.get(f_slot(u.rs1));
                let bits = self.b.fbits(v);
                let low = self.b.trunc(bits);
                self.set_w(u.rd, low);
            }
            Insn::FmvWX(u) => {
                let low = self.w(u.rs1);
                let v = self.b.ffrom_bits(low);
                self.set_f(u.rd, v);
            }
            Insn::FmvXD(u) => {
                let v = self.b.get(f_slot(u.rs1));
                let bits = self.b.fbits(v);
                self.set_x(u.rd, bits);
            }
            Insn::FmvDX(u) => {
                let bits = self.x(u.rs1);
                let v = self.b.ffrom_bits(bits);
                self.set_f(u.rd, v);
            }
            _ => return false,
        }
        true
    }

    fn fp_convert(&mut self, insn: Insn) -> bool {
        match insn {
            Insn::FcvtSD(r) => self.resize(r, F64, F32),
            Insn::FcvtDS(r) => self.resize(r, F32, F64),
            Insn::FcvtWS(r) => self.float_to_int(r, F32, Op::FCvtToS, I32),
            Insn::FcvtWuS(r) => self.float_to_int(r, F32, Op::FCvtToU, I32),
            Insn::FcvtLS(r) => self.float_to_int(r, F32, Op::FCvtToS, I64),
            Insn::FcvtLuS(r) => self.float_to_int(r, F32, Op::FCvtToU, I64),
            Insn::FcvtWD(r) => self.float_to_int(r, F64, Op::FCvtToS, I32),
            Insn::FcvtWuD(r) => self.float_to_int(r, F64, Op::FCvtToU, I32),
            Insn::FcvtLD(r) => self.float_to_int(r, F64, Op::FCvtToS, I64),
            Insn::FcvtLuD(r) => self.float_to_int(r, F64, Op::FCvtToU, I64),
            Insn::FcvtSW(r) => self.int_to_float(r, I32, Op::FCvtFromS, F32),
            Insn::FcvtSWu(r) => self.int_to_float(r, I32, Op::FCvtFromU, F32),
            Insn::FcvtSL(r) => self.int_to_float(r, I64, Op::FCvtFromS, F32),
            Insn::FcvtSLu(r) => self.int_to_float(r, I64, Op::FCvtFromU, F32),
            Insn::FcvtDW(r) => self.int_to_float(r, I32, Op::FCvtFromS, F64),
            Insn::FcvtDWu(r) => self.int_to_float(r, I32, Op::FCvtFromU, F64),
            Insn::FcvtDL(r) => self.int_to_float(r, I64, Op::FCvtFromS, F64),
            Insn::FcvtDLu(r) => self.int_to_float(r, I64, Op::FCvtFromU, F64),
            _ => return false,
        }
        true
    }

    fn resize(&mut self, r: Fp1, from: Type, to: Type) {
        let Some(mode) = self.mode(r.rm) else { return };
        let a = self.f(r.rs1, from);
        let v = self.b.fcvt(Op::FCvtFF, mode, to, a);
        self.set_f(r.rd, v);
    }

    fn float_to_int(&mut self, r: Fp1, from: Type, op: Op, to: Type) {
        let Some(mode) = self.mode(r.rm) else { return };
        let a = self.f(r.rs1, from);
        let v = self.b.fcvt(op, mode, to, a);
        if to == I32 {
            self.set_w(r.rd, v)
        } else {
            self.set_x(r.rd, v)
        }
        self.mark_fp(); // fflags
    }

    fn int_to_float(&mut self, r: Fp1, from: Type, op: Op, to: Type) {
        let Some(mode) = self.mode(r.rm) else { return };
        let a = if from == I32 { self.w(r.rs1) } else { self.x(r.rs1) };
        let v = self.b.fcvt(op, mode, to, a);
        self.set_f(r.rd, v);
    }
}
