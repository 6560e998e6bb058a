//! Calls of helpers.

use super::Cx;
use crate::CodegenError;
use crate::asm::{Mem, Reg};
use holdfast_tcg_ir::env::offset;
use holdfast_tcg_ir::{Effects, HelperId, Inst, Type, Val};

/// Registers of the first arguments behind the environment.
const ARG_REGS: [Reg; 3] = [Reg::RSI, Reg::RDX, Reg::RCX];

/// An argument of a call.
#[derive(Clone, Copy)]
pub(crate) enum Arg {
    /// A value.
    Val(Val),
    /// A constant.
    Imm(u64),
}

impl Cx<'_> {
    pub(crate) fn call(&mut self, i: &Inst) {
        let Some(h) = self.helpers.get(HelperId(i.a)).copied() else {
            self.error = Some(CodegenError::UnknownHelper(i.a));
            return;
        };
        let mut args = [Arg::Imm(0); 5];
        let vals = self.r.call_args(i);
        if vals.len() != usize::from(h.args) || vals.len() > args.len() {
            self.error = Some(CodegenError::UnknownHelper(i.a));
            return;
        }
        for (a, v) in args.iter_mut().zip(vals) {
            *a = Arg::Val(*v);
        }
        if h.effects.intersects(Effects::MAY_FAULT | Effects::NEEDS_PC) {
            let t = self.temp();
            self.store_pc(self.pc, t);
            self.st.al.locked = 0;
        }
        let n = vals.len();
        self.call_fn(h.func.addr(), h.effects, &args[..n]);
        self.result(h.ret);
    }

    /// Defines the current value from rax.
    pub(crate) fn result(&mut self, ty: Type) {
        match ty {
            Type::Void | Type::V128 => {}
            Type::F32 | Type::F64 => {
                let d = self.xtemp();
                self.st.asm.mov_to_xmm(ty == Type::F64, d, Reg::RAX);
                self.xdefine(d);
            }
            Type::I32 => {
                self.st.asm.mov(false, Reg::RAX, Reg::RAX);
                self.define(Reg::RAX);
            }
            Type::I64 => self.define(Reg::RAX),
        }
    }

    /// Calls a function with the effects; everything that lives on survives. The result is in rax.
    pub(crate) fn call_fn(&mut self, addr: u64, effects: Effects, args: &[Arg]) {
        let writes = effects.contains(Effects::WRITES_SLOTS);
        self.save_across_call(writes);
        // Arguments four and five go through memory; rax is free for them once no other argument needs it.
        for (n, a) in args.iter().enumerate().skip(3) {
            let m = Mem::env(offset::SCRATCH + 8 * (n as i32 - 3));
            let r = match *a {
                Arg::Val(v) => self.arg_gpr(v),
                Arg::Imm(c) => {
                    let t = self.temp();
                    self.st.asm.mov_imm(t, c);
                    t
                }
            };
            self.st.asm.store(3, m, r);
            self.st.al.locked = 0;
        }
        self.arg_moves(args);
        self.st.asm.mov_imm(Reg::RAX, addr);
        let at = self.st.asm.call();
        self.reach_stub(at, self.stubs.call(effects));
        self.forget_after_call(writes);
    }

    fn arg_gpr(&mut self, v: Val) -> Reg {
        if self.root_ty(v).in_vector() {
            let t = self.temp();
            self.copy_to(t, v);
            t
        } else {
            self.gpr(v)
        }
    }

    fn arg_moves(&mut self, args: &[Arg]) {
        // A source in another argument's register goes to memory first, so the moves cannot overwrite it.
        for (n, a) in args.iter().enumerate().take(3) {
            if let Arg::Val(v) = *a
                && let Some(r) = self.reg_of(v)
                && ARG_REGS.iter().enumerate().any(|(m, t)| m != n && *t == r)
            {
                self.move_to_memory(v);
            }
        }
        for (n, a) in args.iter().enumerate().take(3) {
            match *a {
                Arg::Val(v) => self.copy_to(ARG_REGS[n], v),
                Arg::Imm(c) => self.st.asm.mov_imm(ARG_REGS[n], c),
            }
        }
    }
}
