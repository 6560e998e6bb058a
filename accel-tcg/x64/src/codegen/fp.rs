//! Floating-point arithmetic on the host's unit, with softfp for what it cannot do.

use super::Cx;
use super::call::Arg;
use super::cold::Cold;
use crate::CodegenError;
use crate::asm::{Alu, Cc, Mem, Reg, Rm, Shift, Xmm};
use crate::soft::{Request, soft_fp};
use crate::stubs::Const;
use holdfast_tcg_ir::{Effects, FpCond, Inst, NanPolicy, Op, Round, Slot, Type, Val};

impl Cx<'_> {
    pub(crate) fn float(&mut self, i: &Inst) {
        let double = i.ty == Type::F64;
        match i.op {
            // Rounding that is not the guest's current mode: the host would need two loads of MXCSR and a store.
            Op::FAdd | Op::FSub | Op::FMul | Op::FDiv | Op::FSqrt | Op::FMulAdd
                if i.fp().round() != Round::Dynamic =>
            {
                self.soft(i);
            }
            Op::FAdd => self.fp_binary(i, 0x58, true),
            Op::FMul => self.fp_binary(i, 0x59, true),
            Op::FSub => self.fp_binary(i, 0x5c, false),
            Op::FDiv => self.fp_binary(i, 0x5e, false),
            Op::FSqrt => self.fp_sqrt(i, double),
            Op::FMulAdd if self.features.fma && i.fp().nan() == NanPolicy::Canonical => {
                self.fp_fma(i, double)
            }
            Op::FMin | Op::FMax => self.fp_min_max(i, double),
            Op::FSgnj | Op::FSgnjn | Op::FSgnjx => self.fp_sign(i, double),
            Op::FCmp => self.fp_compare(i),
            Op::FMoveToInt => self.fp_to_bits(i),
            Op::FMoveFromInt => self.fp_from_bits(i, double),
            Op::FUnbox => self.fp_unbox(i),
            Op::FBox => self.fp_box(i),
            Op::FCvtFF => self.fp_cvt_ff(i, double),
            Op::FCvtToS => self.fp_to_signed(i),
            Op::FCvtToU => self.fp_to_unsigned(i),
            Op::FCvtFromS => self.fp_from_signed(i, double),
            Op::FCvtFromU => self.fp_from_unsigned(i, double),
            Op::FMulAdd | Op::FClass => self.soft(i),
            _ => self.error = Some(CodegenError::Unsupported(i.op)),
        }
    }

    /// Leaves the instruction to softfp.
    pub(crate) fn soft(&mut self, i: &Inst) {
        let wide_in = self.r.ty(Val(i.a)).bytes() == 8;
        let request = Request { op: i.op, mode: i.fp(), wide_in, wide_out: i.ty.bytes() == 8 };
        let mut args = [Arg::Imm(0); 4];
        for (n, v) in i.uses().enumerate() {
            args[n] = Arg::Val(v);
        }
        args[3] = Arg::Imm(request.pack());
        self.call_fn(soft_fp as *const () as usize as u64, Effects::USES_FP, &args);
        self.result(i.ty);
    }

    /// Replaces a NaN in `d` by the canonical one, when the instruction asks for it.
    pub(crate) fn canonicalise(&mut self, i: &Inst, d: Xmm, double: bool) {
        if i.fp().nan() == NanPolicy::Canonical {
            // Quiet, and all NaN results are quiet: raises nothing.
            self.st.asm.sse(if double { 0x66 } else { 0 }, 0x2e, d, d);
            let from = self.st.asm.jcc(Cc::P);
            let back = self.st.asm.pos();
            self.st.cold.push(Cold::Nan { from, back, x: d, double });
        }
    }

    fn prefix(double: bool) -> u8 {
        if double { 0xf2 } else { 0xf3 }
    }

    fn fp_binary(&mut self, i: &Inst, op: u8, commutes: bool) {
        let double = i.ty == Type::F64;
        let (mut a, mut b) = (Val(i.a), Val(i.b));
        // With the canonical NaN the order does not matter.
        if commutes && i.fp().nan() == NanPolicy::Canonical && self.lives_on(a) && !self.lives_on(b) {
            (a, b) = (b, a);
        }
        self.xmm(a);
        let s = self.xrm(b);
        let d = self.xdest(Some(a));
        let d = if s == Rm::from(d) && self.st.an.root(a) != self.st.an.root(b) { self.xtemp() } else { d };
        self.copy_to_xmm(d, a);
        self.st.asm.sse(Self::prefix(double), op, d, s);
        self.canonicalise(i, d, double);
        self.xdefine(d);
    }

    fn fp_sqrt(&mut self, i: &Inst, double: bool) {
        let s = self.xrm(Val(i.a));
        let d = self.xdest(Some(Val(i.a)));
        if s != Rm::from(d) {
            // No dependency on what the register held before.
            self.st.asm.sse(0, 0x57, d, d);
        }
        self.st.asm.sse(Self::prefix(double), 0x51, d, s);
        self.canonicalise(i, d, double);
        self.xdefine(d);
    }

    fn fp_fma(&mut self, i: &Inst, double: bool) {
        let (a, b) = (self.xmm(Val(i.a)), self.xmm(Val(i.b)));
        self.xmm(Val(i.c));
        let d = self.xdest(Some(Val(i.c)));
        let d = if d == a || d == b { self.xtemp() } else { d };
        self.copy_to_xmm(d, Val(i.c));
        let op = match (i.fp().neg_product(), i.fp().neg_addend()) {
            (false, false) => 0xb9,
            (false, true) => 0xbb,
            (true, false) => 0xbd,
            (true, true) => 0xbf,
        };
        self.st.asm.fma231(op, double, d, a, b);
        self.st.asm.sse(if double { 0x66 } else { 0 }, 0x2e, d, d);
        let from = self.st.asm.jcc(Cc::P);
        let back = self.st.asm.pos();
        self.st.cold.push(Cold::NanFma { from, back, x: d, factors: (a, b), double });
        self.xdefine(d);
    }

    fn fp_min_max(&mut self, i: &Inst, double: bool) {
        if i.fp().nan() != NanPolicy::Canonical {
            self.error = Some(CodegenError::Unsupported(i.op));
            return;
        }
        let (a, b) = (self.xmm(Val(i.a)), self.xmm(Val(i.b)));
        let d = self.xtemp();
        let p66 = if double { 0x66 } else { 0 };
        // Equal operands (zeroes of either sign among them) are or-ed for the minimum and and-ed for the maximum;
        // otherwise the instruction is right when neither is a NaN. The comparison raises what must be raised.
        let asm = &mut self.st.asm;
        asm.movaps(d, a);
        asm.sse(p66, 0x2e, a, b);
        let special = asm.jcc(Cc::E);
        asm.sse(Self::prefix(double), if i.op == Op::FMin { 0x5d } else { 0x5f }, d, b);
        let back = asm.pos();
        self.st.cold.push(Cold::MinMax {
            from: special,
            back,
            x: d,
            ab: (a, b),
            max: i.op == Op::FMax,
            double,
        });
        self.xdefine(d);
    }

    fn fp_sign(&mut self, i: &Inst, double: bool) {
        let (sign, abs) = if double { (Const::Sign64, Const::Abs64) } else { (Const::Sign32, Const::Abs32) };
        let (sign, abs) = (self.pool(sign), self.pool(abs));
        let same = self.st.an.root(Val(i.a)) == self.st.an.root(Val(i.b));
        self.xmm(Val(i.a));
        if same && i.op != Op::FSgnj {
            let d = self.xdest(Some(Val(i.a)));
            self.copy_to_xmm(d, Val(i.a));
            if i.op == Op::FSgnjn {
                self.st.asm.sse(0, 0x57, d, sign);
            } else {
                self.st.asm.sse(0, 0x54, d, abs);
            }
            return self.xdefine(d);
        }
        let b = self.xmm(Val(i.b));
        let t = super::alloc::XT0;
        self.st.asm.movaps(t, b);
        // andnps complements its destination.
        self.st.asm.sse(0, if i.op == Op::FSgnjn { 0x55 } else { 0x54 }, t, sign);
        let d = self.xdest(Some(Val(i.a)));
        self.copy_to_xmm(d, Val(i.a));
        if i.op == Op::FSgnjx {
            self.st.asm.sse(0, 0x57, d, t);
        } else {
            self.st.asm.sse(0, 0x54, d, abs);
            self.st.asm.sse(0, 0x56, d, t);
        }
        self.xdefine(d);
    }

    fn fp_compare(&mut self, i: &Inst) {
        let double = self.r.ty(Val(i.a)) == Type::F64;
        let p66 = if double { 0x66 } else { 0 };
        if i.fp_cond() == FpCond::Eq {
            let a = self.xmm(Val(i.a));
            let s = self.xrm(Val(i.b));
            let d = self.temp();
            let t = self.temp();
            let asm = &mut self.st.asm;
            asm.sse(p66, 0x2e, a, s);
            asm.setcc(Cc::Np, t);
            asm.setcc(Cc::E, d);
            asm.alu(Alu::And, false, d, t);
            asm.movzx(0, d, d);
            return self.define(d);
        }
        // a < b is b > a: "above" is false when unordered.
        let b = self.xmm(Val(i.b));
        let s = self.xrm(Val(i.a));
        self.st.asm.sse(p66, 0x2f, b, s);
        let d = self.dest(None);
        self.st.asm.setcc(if i.fp_cond() == FpCond::Lt { Cc::A } else { Cc::Ae }, d);
        self.st.asm.movzx(0, d, d);
        self.define(d);
    }

    fn fp_to_bits(&mut self, i: &Inst) {
        let d = self.dest(None);
        self.copy_to(d, Val(i.a));
        self.define(d);
    }

    fn fp_from_bits(&mut self, i: &Inst, double: bool) {
        let s = self.rm(Val(i.a), i.ty.bytes());
        let d = self.xtemp();
        self.st.asm.mov_to_xmm(double, d, s);
        self.xdefine(d);
    }

    fn fp_unbox(&mut self, i: &Inst) {
        let a = Val(i.a);
        let d;
        if let Some(m) = self.home_only(a) {
            d = self.xtemp();
            self.st.asm.fload(false, d, m);
            self.st.asm.alu_imm(Alu::Cmp, false, Mem { disp: m.disp + 4, ..m }, -1);
        } else {
            let x = self.xmm(a);
            let t = self.temp();
            self.st.asm.mov_from_xmm(true, t, x);
            d = self.xdest(Some(a));
            self.st.asm.movaps(d, x);
            self.st.asm.shift_imm(Shift::Shr, true, t, 32);
            self.st.asm.alu_imm(Alu::Cmp, false, t, -1);
        }
        let from = self.st.asm.jcc(Cc::Ne);
        let back = self.st.asm.pos();
        self.st.cold.push(Cold::Nan { from, back, x: d, double: false });
        self.xdefine(d);
    }

    fn fp_box(&mut self, i: &Inst) {
        // Straight to memory when the next thing is to set a slot.
        if let Some((slot, at)) = self.next_set_slot() {
            let x = self.xmm(Val(i.a));
            let m = Mem::env(slot as i32);
            let slot = Slot::new(slot, i.ty);
            self.claim_slot(slot);
            self.st.asm.fstore(false, m, x);
            self.st.asm.store_imm(2, Mem { disp: m.disp + 4, ..m }, -1);
            self.settle_slot(slot);
            self.st.an.kill(at);
            return;
        }
        let ones = self.pool(Const::Box);
        let d = self.xdest(Some(Val(i.a)));
        self.copy_to_xmm(d, Val(i.a));
        self.st.asm.sse(0, 0x56, d, ones);
        self.xdefine(d);
    }

    /// The unpinned slot that the next instruction sets to the current value, and that instruction.
    fn next_set_slot(&self) -> Option<(u32, u32)> {
        let mut at = self.at + 1;
        while self.st.an.is_dead(at) || self.r.insts.get(at as usize).is_some_and(|i| i.op == Op::Const) {
            at += 1;
        }
        let i = self.r.insts.get(at as usize)?;
        let fits = i.op == Op::SetSlot && i.b == self.at && self.pin_of(i.a).is_none();
        fits.then_some((i.a, at))
    }

    /// Stores a float to an unpinned slot.
    pub(crate) fn set_float_slot(&mut self, i: &Inst, v: Val, m: Mem) {
        if let Some(bits) = self.konst(v) {
            let wide = i.ty == Type::F64;
            let imm = if wide { i32::try_from(bits as i64).ok() } else { Some(bits as i32) };
            if let Some(imm) = imm {
                return self.st.asm.store_imm(if wide { 3 } else { 2 }, m, imm);
            }
        }
        let x = self.xmm(v);
        self.st.asm.fstore(i.ty == Type::F64, m, x);
    }

    pub(crate) fn select_float(&mut self, i: &Inst) {
        let (t, f) = (Val(i.b), Val(i.c));
        let x = self.xmm(t);
        self.xmm(f);
        let d = self.xdest(Some(f));
        let d = if d == x { self.xtemp() } else { d };
        let cc = self.compare_cond(i);
        self.copy_to_xmm(d, f);
        let over = self.st.asm.jcc_short(cc.inverse());
        self.st.asm.movaps(d, x);
        self.st.asm.patch_short(over);
        self.xdefine(d);
    }

    /// Cold part of a fused multiply-add with a NaN result: the host does not raise invalid for infinity times zero when
    /// the addend is a quiet NaN. The product alone raises it; what else it raises is dropped.
    pub(crate) fn cold_nan_fma(&mut self, x: Xmm, (a, b): (Xmm, Xmm), double: bool) {
        let t = super::alloc::XT0;
        let (m, m2) = (Mem::base(Reg::RSP, 0), Mem::base(Reg::RSP, 4));
        let nan = self.pool(if double { Const::Nan64 } else { Const::Nan32 });
        let asm = &mut self.st.asm;
        asm.push(Reg::RAX);
        asm.push(Reg::RAX);
        asm.stmxcsr(m);
        asm.movaps(t, a);
        asm.sse(Self::prefix(double), 0x59, t, b);
        asm.stmxcsr(m2);
        asm.mov(false, Reg::RAX, m2);
        asm.alu_imm(Alu::And, false, Reg::RAX, 1);
        asm.alu_store(Alu::Or, false, m, Reg::RAX);
        asm.ldmxcsr(m);
        asm.pop(Reg::RAX);
        asm.pop(Reg::RAX);
        asm.fload(double, x, nan);
    }

    /// Cold part of minimum and maximum: operands equal or unordered. `x` holds `a`.
    pub(crate) fn cold_min_max(&mut self, x: Xmm, (a, b): (Xmm, Xmm), max: bool, double: bool) {
        let p66 = if double { 0x66 } else { 0 };
        let nan = self.pool(if double { Const::Nan64 } else { Const::Nan32 });
        let asm = &mut self.st.asm;
        // Unordered sets the parity flag besides the zero flag.
        let unordered = asm.jcc_short(Cc::P);
        asm.sse(0, if max { 0x54 } else { 0x56 }, x, b);
        let end1 = asm.jmp_short();
        asm.patch_short(unordered);
        // Quiet comparisons with themselves find the NaNs; signalling ones have raised invalid already.
        asm.sse(p66, 0x2e, a, a);
        let a_number = asm.jcc_short(Cc::Np);
        asm.movaps(x, b);
        asm.sse(p66, 0x2e, b, b);
        let b_number = asm.jcc_short(Cc::Np);
        asm.fload(double, x, nan);
        asm.patch_short(a_number);
        asm.patch_short(b_number);
        asm.patch_short(end1);
    }
}
