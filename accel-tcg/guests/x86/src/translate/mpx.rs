//! MPX. Where it is off its instructions decode as no-operations, which is what they are.

use holdfast_tcg_ir::Val;
use iced_x86::{Instruction, OpKind, Register};

use super::operand::segment;
use super::{Addr, Size, Translator};
use crate::key::Key;
use crate::state::slot;
use crate::system::mpx::what;
use crate::system::regs::vector;

impl Translator<'_> {
    /// Translates MPX instructions; false if `insn` is something else.
    pub(super) fn mpx(&mut self, insn: &Instruction) -> bool {
        use iced_x86::Code::*;
        let code = insn.code();
        let memory = (0..insn.op_count()).find(|n| insn.op_kind(*n) == OpKind::Memory);
        let kind = match code {
            Bndmk_bnd_m32 | Bndmk_bnd_m64 => what::MAKE,
            Bndcl_bnd_rm32 | Bndcl_bnd_rm64 => what::LOWER,
            Bndcu_bnd_rm32 | Bndcu_bnd_rm64 => what::UPPER,
            Bndcn_bnd_rm32 | Bndcn_bnd_rm64 => what::NOT,
            Bndldx_bnd_mib => what::LOAD,
            Bndstx_mib_bnd => what::STORE,
            Bndmov_bnd_bndm64 | Bndmov_bnd_bndm128 | Bndmov_bndm64_bnd | Bndmov_bndm128_bnd => {
                if self.short_address(insn, memory) {
                    self.raise(vector::UD, None);
                } else {
                    self.move_bounds(insn);
                }
                return true;
            }
            _ => return false,
        };
        let relative = matches!(insn.memory_base(), Register::RIP | Register::EIP);
        let by_parts = matches!(kind, what::MAKE | what::LOAD | what::STORE);
        if self.short_address(insn, memory) || memory.is_some() && relative && by_parts {
            self.raise(vector::UD, None);
            return true;
        }
        let bound = if kind == what::STORE { insn.op_register(1) } else { insn.op_register(0) };
        let zero = self.b.iconst(0);
        let (a, b) = match (kind, memory) {
            (what::MAKE, _) => (self.address_part(insn.memory_base()), self.offset(insn)),
            (what::LOAD | what::STORE, _) => {
                let at = match insn.memory_base() {
                    Register::None => zero,
                    base => {
                        let base = self.address_part(base);
                        let at = self.b.addi(base, insn.memory_displacement64() as i64);
                        if self.long() { at } else { self.wrap32(at) }
                    }
                };
                let at = self.linear(segment(insn.memory_segment()), Addr { base: at, disp: 0 }, 1, false);
                (self.whole(at), self.address_part(insn.memory_index()))
            }
            (_, Some(_)) => (self.offset(insn), zero),
            _ => {
                let v = self.read_reg(insn.op_register(1));
                let size = if self.long() { Size::B8 } else { Size::B4 };
                (self.to64(size, v), zero)
            }
        };
        let long = if self.long() { what::LONG } else { 0 };
        let how = self.b.iconst((kind | long | bound.number() as u64 & 3) as i64);
        self.call_system(self.ids.sys.mpx, &[how, a, b]);
        true
    }

    /// 16-bit addresses are undefined.
    fn short_address(&self, insn: &Instruction, memory: Option<u32>) -> bool {
        let bits = if memory.is_some() { self.address_bits(insn) } else { 64 };
        bits == 16 || memory.is_some() && self.size == crate::key::CodeSize::Bits16 && bits != 32
    }

    /// A register of an address, or 0.
    fn address_part(&mut self, register: Register) -> Val {
        match register {
            Register::None => self.b.iconst(0),
            r => {
                let v = self.gpr(r.number());
                if self.long() { v } else { self.wrap32(v) }
            }
        }
    }

    fn move_bounds(&mut self, insn: &Instruction) {
        let size = if self.long() { Size::B8 } else { Size::B4 };
        let (to, from) = (insn.op_register(0), insn.op_register(1));
        let half = size.bytes() as i32;
        if insn.op0_kind() == OpKind::Memory {
            let at = self.address(insn, 2 * size.bytes(), true);
            let upper_at = Addr { base: at.base, disp: at.disp + half };
            // Both halves can be written, or neither is.
            self.load_for_update(size, upper_at);
            for (part, at) in [(0, at), (1, upper_at)] {
                let v = self.b.get(slot::bnd(from.number(), part));
                let v = self.narrow(size, v);
                self.store(size, at, v);
            }
            return;
        }
        let values = if insn.op1_kind() == OpKind::Memory {
            let at = self.address(insn, 2 * size.bytes(), false);
            let lower = self.load(size, at);
            let upper = self.load(size, Addr { base: at.base, disp: at.disp + half });
            [self.to64(size, lower), self.to64(size, upper)]
        } else {
            [0, 1].map(|part| self.b.get(slot::bnd(from.number(), part)))
        };
        for (part, v) in values.into_iter().enumerate() {
            self.b.set(slot::bnd(to.number(), part), v);
        }
    }

    /// Near branches reset the bounds unless they have the BND prefix (F2). Short jumps (EB) do not.
    pub(super) fn reset_bounds(&mut self, insn: &Instruction) {
        let resets = self.key.contains(Key::RESET_BOUNDS) && !insn.has_repne_prefix();
        if !resets
            || !is_near(insn)
            || insn.is_jmp_short()
            || insn.is_loop()
            || insn.is_loopcc()
            || insn.is_jcx_short()
        {
            return;
        }
        let zero = self.b.iconst(0);
        for n in 0..4 {
            self.b.set(slot::bnd(n, 0), zero);
            self.b.set(slot::bnd(n, 1), zero);
        }
    }
}

/// Near jumps, calls and returns, conditional ones included.
fn is_near(insn: &Instruction) -> bool {
    use iced_x86::Code::*;
    let returns = matches!(insn.code(), Retnw | Retnd | Retnq | Retnw_imm16 | Retnd_imm16 | Retnq_imm16);
    let direct =
        matches!(insn.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    returns || direct || insn.is_jmp_near_indirect() || insn.is_call_near_indirect()
}
