//! Vector instructions and runs of host code.

use super::Cx;
use crate::CodegenError;
use crate::asm::{Reg, Rm};
use holdfast_tcg_ir::{Inst, Slot, Type, Val, VecEncoding, VecForm, VecInsn};

/// The flags that comparisons define: CF, PF, AF, ZF, SF as `lahf` gives them, without its constant bit.
const STATUS: i32 = 0xd5;

impl Cx<'_> {
    pub(crate) fn vec(&mut self, i: &Inst) {
        let Some(&v) = self.r.vec(i) else {
            self.error = Some(CodegenError::Unsupported(i.op));
            return;
        };
        let vex = match v.encoding {
            VecEncoding::Legacy => false,
            VecEncoding::Vex => true,
            VecEncoding::Either => self.features.avx,
        };
        if vex && !self.features.avx {
            self.error = Some(CodegenError::Unsupported(i.op));
            return;
        }
        let (a, b, c) = (Val(i.a), Val(i.b), Val(i.c));
        match v.form {
            VecForm::Unary => self.vec_unary(i, &v, vex),
            VecForm::Binary => self.vec_binary(&v, vex, a, b),
            VecForm::Merge => {
                self.xmm(b);
                self.vec_binary(&v, vex, a, b);
            }
            VecForm::Ternary => {
                let x = self.xmm(b);
                let y = self.xrm(c);
                let d = self.xdest(Some(a));
                // Taken over from a, which dies, or fresh.
                self.copy_to_xmm(d, a);
                self.st.asm.vector(&v, true, (d.0, x.0), y, v.imm);
                self.xdefine(d);
            }
            VecForm::Is4 => {
                let (x, m) = (self.xmm(a), self.xmm(c));
                let y = self.xrm(b);
                let d = self.xdest(Some(a));
                self.st.asm.vector(&v, true, (d.0, x.0), y, Some(m.0 << 4));
                self.xdefine(d);
            }
            VecForm::ShiftImm => {
                let x = self.xmm(a);
                let d = self.xdest(Some(a));
                if vex {
                    self.st.asm.vector(&v, true, (v.ext, d.0), x.into(), v.imm);
                } else {
                    self.st.asm.movaps(d, x);
                    self.st.asm.vector(&v, false, (v.ext, 0), d.into(), v.imm);
                }
                self.xdefine(d);
            }
            VecForm::Extract => {
                let x = self.xmm(a);
                if i.ty == Type::V128 {
                    let d = self.xdest(Some(a));
                    self.st.asm.vector(&v, vex, (x.0, 0), d.into(), v.imm);
                    return self.xdefine(d);
                }
                let d = self.dest(None);
                self.st.asm.vector(&v, vex, (x.0, 0), d.into(), v.imm);
                self.define(d);
            }
            VecForm::Flags => {
                self.take(Reg::RAX);
                let x = self.xmm(a);
                let y = self.xrm(b);
                self.st.asm.vector(&v, vex, (x.0, 0), y, v.imm);
                self.st.asm.flags_to_rax(STATUS);
                self.define(Reg::RAX);
            }
        }
    }

    /// A vector operand, or an integer one.
    fn vec_rm(&mut self, v: Val) -> Rm {
        let ty = self.root_ty(v);
        if ty.in_vector() { self.xrm(v) } else { self.gpr(v).into() }
    }

    fn vec_unary(&mut self, i: &Inst, v: &VecInsn, vex: bool) {
        let a = Val(i.a);
        if i.ty == Type::V128 {
            let s = self.vec_rm(a);
            let d = self.xdest(Some(a));
            self.st.asm.vector(v, vex, (d.0, 0), s, v.imm);
            self.xdefine(d);
        } else {
            // Some of these have no memory operand.
            let s = self.xmm(a);
            let d = self.dest(None);
            self.st.asm.vector(v, vex, (d.0, 0), s.into(), v.imm);
            self.define(d);
        }
    }

    fn vec_binary(&mut self, v: &VecInsn, vex: bool, a: Val, b: Val) {
        let x = self.xmm(a);
        let s = self.vec_rm(b);
        let d = self.xdest(Some(a));
        if vex {
            self.st.asm.vector(v, true, (d.0, x.0), s, v.imm);
        } else {
            self.st.asm.movaps(d, x);
            self.st.asm.vector(v, false, (d.0, 0), s, v.imm);
        }
        self.xdefine(d);
    }

    /// Host code: like a call that keeps the pins.
    pub(crate) fn host(&mut self, i: &Inst) {
        let r = self.r;
        let Some((code, info)) = r.host(i) else {
            self.error = Some(CodegenError::Unsupported(i.op));
            return;
        };
        let written = |cx: &mut Self, f: fn(&mut Self, Slot)| {
            for slot in info.writes.iter().flatten() {
                if cx.pin_of(slot.offset).is_some() {
                    cx.error = Some(CodegenError::Unsupported(i.op));
                }
                f(cx, *slot);
            }
        };
        written(self, Self::claim_slot);
        self.save_across_call(false);
        self.st.asm.raw(code);
        self.forget_after_call(false);
        written(self, Self::forget_home);
    }
}
