//! Integer arithmetic, shifts, comparisons and selections.

use super::Cx;
use crate::asm::{Alu, Cc, Mem, Reg, Rm, Shift};
use holdfast_tcg_ir::{Cond, Inst, Op, Type, Val};

/// The host condition of `cc` after a comparison.
pub(crate) fn host_cc(cc: Cond) -> Cc {
    match cc {
        Cond::Eq => Cc::E,
        Cond::Ne => Cc::Ne,
        Cond::LtS => Cc::L,
        Cond::GeS => Cc::Ge,
        Cond::LtU => Cc::B,
        Cond::GeU => Cc::Ae,
        Cond::LeS => Cc::Le,
        Cond::GtS => Cc::G,
        Cond::LeU => Cc::Be,
        Cond::GtU => Cc::A,
    }
}

impl Cx<'_> {
    /// Whether `r` holds one of `vals`.
    fn holds(&self, r: Reg, vals: &[Val]) -> bool {
        vals.iter().any(|v| self.reg_of(*v) == Some(r))
    }

    /// A result register that holds none of `vals`, which are still to be read after it is written.
    pub(crate) fn dest_avoiding(&mut self, reuse: Option<Val>, vals: &[Val]) -> Reg {
        let d = self.dest(reuse);
        if self.holds(d, vals) { self.temp() } else { d }
    }

    pub(crate) fn alu(&mut self, i: &Inst) {
        let w = i.ty == Type::I64;
        let (a, b) = (Val(i.a), Val(i.b));
        match i.op {
            Op::Add => return self.add(i, w),
            Op::Sub => {
                if let Some(n) = self.imm32(b, w).and_then(i32::checked_neg) {
                    return self.add_imm(a, n, w);
                }
            }
            Op::And => {
                if let Some(log2) = self.konst(b).and_then(|c| zext_mask(c, w)) {
                    return self.extend(a, log2, None, w);
                }
            }
            Op::Andn => return self.andn(a, b, w),
            _ => {}
        }
        let op = match i.op {
            Op::Sub => Alu::Sub,
            Op::And => Alu::And,
            Op::Or => Alu::Or,
            _ => Alu::Xor,
        };
        if op == Alu::Xor && self.imm32(b, w) == Some(-1) {
            let d = self.dest(Some(a));
            self.copy_to(d, a);
            self.st.asm.group3(2, w, d);
            return self.define(d);
        }
        self.alu_general(op, (a, b), w);
    }

    /// `d = a op b` for any classic operation.
    fn alu_general(&mut self, op: Alu, (a, b): (Val, Val), w: bool) {
        if let Some(imm) = self.imm32(b, w) {
            let d = self.cached_dest(a);
            self.copy_to(d, a);
            self.st.asm.alu_imm(op, w, d, imm);
            return self.define(d);
        }
        // The operand that the result register already holds goes first, where order does not matter.
        let swap = op != Alu::Sub && self.prefer_swap(a, b);
        let (a, b) = if swap { (b, a) } else { (a, b) };
        let bytes = if w { 8 } else { 4 };
        if self.lives_on(a) {
            self.gpr(a);
        } else if let Some(r) = self.reg_of(a) {
            self.st.al.locked |= 1 << r.0;
        }
        let s = self.rm(b, bytes);
        let mut d = self.dest(Some(a));
        if s == Rm::from(d) && self.reg_of(a) != Some(d) {
            if op != Alu::Sub {
                // The result goes where b is: the other way round.
                let s = self.rm(a, bytes);
                self.st.asm.alu(op, w, d, s);
                return self.define(d);
            }
            d = self.temp();
        }
        self.copy_to(d, a);
        self.st.asm.alu(op, w, d, s);
        self.define(d);
    }

    /// Destination for `d = f(a)`; keeps `a` cached in a register when it is used again.
    fn cached_dest(&mut self, a: Val) -> Reg {
        if self.lives_on(a) {
            self.gpr(a);
        } else if let Some(r) = self.reg_of(a) {
            self.st.al.locked |= 1 << r.0;
        }
        self.dest(Some(a))
    }

    fn prefer_swap(&self, a: Val, b: Val) -> bool {
        if self.konst(a).is_some() {
            return true;
        }
        let dying_temp = |v: Val| !self.lives_on(v) && self.reg_of(v).is_some();
        self.home_only(a).is_some() && !self.lives_on(a) && dying_temp(b) || !dying_temp(a) && dying_temp(b)
    }

    fn add_imm(&mut self, a: Val, n: i32, w: bool) {
        if self.reg_of(a).is_none() {
            let d = self.cached_dest(a);
            self.copy_to(d, a);
            self.st.asm.alu_imm(Alu::Add, w, d, n);
            return self.define(d);
        }
        let ra = self.gpr(a);
        let d = self.dest(Some(a));
        if d == ra {
            self.st.asm.alu_imm(Alu::Add, w, d, n);
        } else {
            self.st.asm.lea(w, d, Mem::base(ra, n));
        }
        self.define(d);
    }

    fn add(&mut self, i: &Inst, w: bool) {
        let (a, b) = (Val(i.a), Val(i.b));
        if let Some(n) = self.imm32(b, w) {
            return self.add_imm(a, n, w);
        }
        if self.st.an.shift_fused(self.at) {
            let sh = *self.r.def(b);
            let n = self.konst(Val(sh.b)).unwrap_or(0) as u8;
            let (ra, rs) = (self.gpr(a), self.gpr(Val(sh.a)));
            let d = self.dest(Some(a));
            self.st.asm.lea(w, d, Mem::index(ra, rs, n & 3, 0));
            return self.define(d);
        }
        // Three operands when both are in registers and neither is to be overwritten.
        let (ra, rb) = (self.reg_of(a), self.reg_of(b));
        if let (Some(ra), Some(rb)) = (ra, rb) {
            self.st.al.locked |= 1 << ra.0 | 1 << rb.0;
            let d = self.dest(Some(a));
            if d == ra {
                self.st.asm.alu(Alu::Add, w, d, rb);
            } else if d == rb {
                self.st.asm.alu(Alu::Add, w, d, ra);
            } else {
                self.st.asm.lea(w, d, Mem::index(ra, rb, 0, 0));
            }
            return self.define(d);
        }
        self.alu_general(Alu::Add, (a, b), w);
    }

    fn andn(&mut self, a: Val, b: Val, w: bool) {
        if let Some(c) = self.konst(b) {
            let inv = if w { !c } else { !c & 0xffff_ffff };
            let imm = if w { i32::try_from(inv as i64).ok() } else { Some(inv as i32) };
            if let Some(imm) = imm {
                let d = self.cached_dest(a);
                self.copy_to(d, a);
                self.st.asm.alu_imm(Alu::And, w, d, imm);
                return self.define(d);
            }
        }
        if self.features.bmi1 {
            let rb = self.gpr(b);
            let ra = self.rm(a, if w { 8 } else { 4 });
            let d = self.dest(Some(b));
            self.st.asm.andn(w, d, rb, ra);
            return self.define(d);
        }
        let ra = self.gpr(a);
        let t = self.temp();
        self.copy_to(t, b);
        self.st.asm.group3(2, w, t);
        self.st.asm.alu(Alu::And, w, t, ra);
        self.define(t);
    }

    pub(crate) fn shift(&mut self, i: &Inst) {
        let w = i.ty == Type::I64;
        let op = match i.op {
            Op::Shl => Shift::Shl,
            Op::ShrU => Shift::Shr,
            Op::ShrS => Shift::Sar,
            Op::RotL => Shift::Rol,
            _ => Shift::Ror,
        };
        let (a, b) = (Val(i.a), Val(i.b));
        if let Some(n) = self.konst(b) {
            let (bits, bytes) = if w { (64, 8) } else { (32, 4) };
            let n = n as u8 & (bits - 1);
            if self.features.bmi2 && matches!(op, Shift::Rol | Shift::Ror) {
                if self.lives_on(a) {
                    self.gpr(a);
                }
                let s = self.rm(a, bytes);
                let d = self.dest(Some(a));
                let right = if op == Shift::Rol { (bits - n) & (bits - 1) } else { n };
                self.st.asm.rorx(w, d, s, right);
                return self.define(d);
            }
            let d = self.cached_dest(a);
            self.copy_to(d, a);
            self.st.asm.shift_imm(op, w, d, n);
            return self.define(d);
        }
        if self.features.bmi2 && !matches!(op, Shift::Rol | Shift::Ror) {
            let n = self.gpr(b);
            let s = self.rm(a, if w { 8 } else { 4 });
            let d = self.dest(Some(a));
            self.st.asm.shiftx(op, w, d, s, n);
            return self.define(d);
        }
        self.take(Reg::RCX);
        let d = self.temp();
        self.copy_to(d, a);
        self.copy_to(Reg::RCX, b);
        self.st.asm.shift_cl(op, w, d);
        self.define(d);
    }

    /// Zero- or sign-extends (`to64` when signed) the low `1 << log2` bytes.
    fn extend(&mut self, a: Val, log2: u32, signed_to: Option<bool>, _w: bool) {
        if self.lives_on(a) {
            self.gpr(a);
        }
        let s = self.rm(a, 4);
        let d = self.dest(Some(a));
        match signed_to {
            Some(to64) => self.st.asm.movsx(log2, to64, d, s),
            None => self.st.asm.movzx(log2, d, s),
        }
        self.define(d);
    }

    pub(crate) fn int_unary(&mut self, i: &Inst) {
        let w = i.ty == Type::I64;
        let a = Val(i.a);
        match i.op {
            Op::Ext8S => self.extend(a, 0, Some(w), w),
            Op::Ext16S => self.extend(a, 1, Some(w), w),
            Op::SExt => self.extend(a, 2, Some(true), w),
            Op::Ext8U => self.extend(a, 0, None, w),
            Op::Ext16U => self.extend(a, 1, None, w),
            Op::ZExt => self.extend(a, 2, None, w),
            Op::Neg | Op::Not => {
                let d = self.cached_dest(a);
                self.copy_to(d, a);
                self.st.asm.group3(if i.op == Op::Neg { 3 } else { 2 }, w, d);
                self.define(d);
            }
            Op::Bswap => {
                let d = self.cached_dest(a);
                self.copy_to(d, a);
                self.st.asm.bswap(w, d);
                self.define(d);
            }
            _ => self.count(i, w),
        }
    }

    fn count(&mut self, i: &Inst, w: bool) {
        let s = self.rm(Val(i.a), if w { 8 } else { 4 });
        let bits = if w { 64 } else { 32 };
        match i.op {
            Op::Clz if self.features.lzcnt => {
                let d = self.dest(None);
                self.st.asm.lzcnt(w, d, s);
                self.define(d);
            }
            Op::Ctz if self.features.bmi1 => {
                let d = self.dest(None);
                self.st.asm.tzcnt(w, d, s);
                self.define(d);
            }
            Op::Popcnt if self.features.popcnt => {
                let d = self.dest(None);
                self.st.asm.popcnt(w, d, s);
                self.define(d);
            }
            Op::Clz => {
                // bsr leaves its destination alone (in practice) for 0; 2 * bits - 1 becomes `bits` by the xor.
                let (d, t) = (self.temp(), self.temp());
                self.st.asm.mov_imm(t, 2 * bits - 1);
                self.st.asm.bsr(w, d, s);
                self.st.asm.cmov(Cc::E, w, d, t);
                self.st.asm.alu_imm(Alu::Xor, w, d, bits as i32 - 1);
                self.define(d);
            }
            Op::Ctz => {
                let (d, t) = (self.temp(), self.temp());
                self.st.asm.mov_imm(t, bits);
                self.st.asm.bsf(w, d, s);
                self.st.asm.cmov(Cc::E, w, d, t);
                self.define(d);
            }
            _ => self.popcnt_baseline(s, w),
        }
    }

    /// Population count without the instruction: the classic sums in parallel, on 64 bits.
    fn popcnt_baseline(&mut self, s: Rm, w: bool) {
        let (d, t, m) = (self.temp(), self.temp(), self.temp());
        let a = &mut self.st.asm;
        a.mov(w, d, s);
        for (shift, mask) in
            [(1u8, 0x5555_5555_5555_5555u64), (2, 0x3333_3333_3333_3333), (4, 0x0f0f_0f0f_0f0f_0f0f)]
        {
            a.mov_imm(m, mask);
            a.mov(true, t, d);
            a.shift_imm(Shift::Shr, true, t, shift);
            a.alu(Alu::And, true, t, m);
            a.alu(Alu::And, true, d, m);
            a.alu(Alu::Add, true, d, t);
        }
        a.mov_imm(m, 0x0101_0101_0101_0101);
        a.imul(true, d, m);
        a.shift_imm(Shift::Shr, true, d, 56);
        self.define(d);
    }

    // ---- conditions ----

    /// Emits the comparison for `a cc b` and returns the host condition.
    pub(crate) fn compare(&mut self, cc: Cond, a: Val, b: Val) -> Cc {
        let w = self.r.ty(a) == Type::I64;
        if let Some(imm) = self.imm32(b, w) {
            if let Some(r) = self.reg_of(a) {
                self.st.al.locked |= 1 << r.0;
                if imm == 0 {
                    self.st.asm.test(w, r, r);
                } else {
                    self.st.asm.alu_imm(Alu::Cmp, w, r, imm);
                }
            } else {
                let s = self.rm(a, if w { 8 } else { 4 });
                self.st.asm.alu_imm(Alu::Cmp, w, s, imm);
            }
            return host_cc(cc);
        }
        let ra = self.gpr(a);
        let s = self.rm(b, if w { 8 } else { 4 });
        self.st.asm.alu(Alu::Cmp, w, ra, s);
        host_cc(cc)
    }

    /// The condition of a fused `Select` or `BrCond`.
    pub(crate) fn compare_cond(&mut self, i: &Inst) -> Cc {
        let fused = self.st.an.cond_fused(self.at);
        match i.op {
            Op::Select if fused => {
                let c = *self.r.def(Val(i.a));
                self.compare(c.cond(), Val(c.a), Val(c.b))
            }
            Op::Select => {
                let w = self.r.ty(Val(i.a)) == Type::I64;
                let r = self.gpr(Val(i.a));
                self.st.asm.test(w, r, r);
                Cc::Ne
            }
            _ if fused => {
                let c = *self.r.def(Val(i.a));
                let cc = self.compare(c.cond(), Val(c.a), Val(c.b));
                if i.cond() == Cond::Eq { cc.inverse() } else { cc }
            }
            _ => self.compare(i.cond(), Val(i.a), Val(i.b)),
        }
    }

    pub(crate) fn set_cond(&mut self, i: &Inst) {
        let cc = self.compare(i.cond(), Val(i.a), Val(i.b));
        let d = self.dest(None);
        self.st.asm.setcc(cc, d);
        self.st.asm.movzx(0, d, d);
        self.define(d);
    }

    pub(crate) fn select(&mut self, i: &Inst) {
        if i.ty.in_vector() {
            return self.select_float(i);
        }
        let w = i.ty == Type::I64;
        let (t, f) = (Val(i.b), Val(i.c));
        // Memory and register operands first: nothing between the comparison and the move may change the flags
        // (moves, spills and constant loads do not).
        let cc = self.compare_cond(i);
        let s = self.gpr(t);
        let d = self.dest(Some(f));
        let (cc, first, second) =
            if d == s && self.reg_of(f) != Some(d) { (cc.inverse(), t, f) } else { (cc, f, t) };
        let s = self.gpr(second);
        self.copy_to(d, first);
        self.st.asm.cmov(cc, w, d, s);
        self.define(d);
    }

    pub(crate) fn min_max(&mut self, i: &Inst) {
        let w = i.ty == Type::I64;
        let cc = match i.op {
            Op::MinS => Cc::G,
            Op::MaxS => Cc::L,
            Op::MinU => Cc::A,
            _ => Cc::B,
        };
        let (ra, rb) = (self.gpr(Val(i.a)), self.gpr(Val(i.b)));
        self.st.asm.alu(Alu::Cmp, w, ra, rb);
        let d = self.dest_avoiding(Some(Val(i.a)), &[Val(i.b)]);
        if d != ra {
            self.st.asm.mov(w, d, ra);
        }
        // `cmov` of 32 bits zeroes the upper half in both cases.
        self.st.asm.cmov(cc, w, d, rb);
        self.define(d);
    }
}

/// Log2 of the bytes that an `and` with `c` keeps, when a zero extension does the same.
fn zext_mask(c: u64, w: bool) -> Option<u32> {
    match c {
        0xff => Some(0),
        0xffff => Some(1),
        0xffff_ffff if w => Some(2),
        _ => None,
    }
}
