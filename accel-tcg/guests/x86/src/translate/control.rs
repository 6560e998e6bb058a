//! Near jumps, calls, returns and loops.

use holdfast_tcg_ir::{Cond, JumpHint, Val};
use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::cc::Test;
use super::stack::RSP;
use super::{Size, Translator};
use crate::key::{CodeSize, Key};
use crate::state::{seg, slot};
use crate::system::regs::vector;

/// The linear address that a relative jump of whole RIP or EIP goes to. `None` if it depends on the base of CS or is to be
/// checked, or for other instructions.
pub(super) fn target(insn: &Instruction, key: Key) -> Option<u64> {
    match insn.op0_kind() {
        OpKind::NearBranch64 => {
            let to = insn.near_branch64();
            ((to as i64) << 16 >> 16 == to as i64).then_some(to)
        }
        OpKind::NearBranch32 if key.contains(Key::CS_FLAT) && !key.contains(Key::CS_LIMIT) => {
            Some(u64::from(insn.near_branch32()))
        }
        _ => None,
    }
}

/// Whether a MOV or POP sets a register that the key is made of.
pub(super) fn sets_system_register(insn: &Instruction) -> bool {
    let r = if insn.op0_kind() == OpKind::Register { insn.op0_register() } else { Register::None };
    r.is_segment_register() || r.is_cr() || r.is_dr()
}

impl Translator<'_> {
    pub(super) fn control(&mut self, insn: &Instruction) -> bool {
        self.reset_bounds(insn);
        match insn.flow_control() {
            FlowControl::ConditionalBranch => self.conditional_jump(insn),
            FlowControl::UnconditionalBranch | FlowControl::IndirectBranch => self.near_jump(insn),
            FlowControl::Call | FlowControl::IndirectCall => self.near_call(insn),
            FlowControl::Return => self.near_return(insn),
            _ => false,
        }
    }

    /// Raises #GP if a near branch must not go to `ip` (`I64`), which has `size`. In 64-bit code that is of relative branches
    /// and where they are not chained: others fault when the target is fetched, and are taken back then.
    fn check_target(&mut self, ip: Val, size: Size, relative: bool) {
        if self.long() {
            if relative || self.no_chain {
                self.sync();
                self.b.call(self.ids.sys.check_rip, &[ip]);
            }
        } else if self.limited(size) {
            let limit = self.b.get(slot::seg_limit(seg::CS));
            self.raise_if((Cond::GtU, ip, limit), vector::GP, Some(0));
        }
    }

    /// Whether the limit of CS counts for near branches of `size`.
    fn limited(&self, size: Size) -> bool {
        self.key.contains(if size == Size::B2 { Key::CS_SHORT } else { Key::CS_LIMIT })
    }

    /// Where a relative jump goes, as linear address, which is checked.
    fn relative(&mut self, insn: &Instruction) -> Val {
        let (ip, size) = self.relative_ip(insn);
        self.check_target(ip, size, true);
        self.pc_of(ip)
    }

    /// RIP or EIP of where a relative jump goes (`I64`), and its size.
    fn relative_ip(&mut self, insn: &Instruction) -> (Val, Size) {
        let bits = match insn.op0_kind() {
            OpKind::NearBranch16 => 16,
            OpKind::NearBranch32 => 32,
            _ => 64,
        };
        let displacement = match bits {
            16 => i64::from(insn.near_branch16().wrapping_sub(self.next as u16) as i16),
            32 => i64::from(insn.near_branch32().wrapping_sub(self.next as u32) as i32),
            _ => insn.near_branch64().wrapping_sub(self.next) as i64,
        };
        let next = self.next;
        let ip = self.ip_of(next);
        let ip = self.b.addi(ip, displacement);
        match bits {
            16 => (self.b.andi(ip, 0xffff), Size::B2),
            32 => (self.wrap32(ip), Size::B4),
            _ => (ip, Size::B8),
        }
    }

    fn jump_relative(&mut self, insn: &Instruction) {
        match target(insn, self.key) {
            Some(to) => self.jump(to),
            None => {
                let to = self.relative(insn);
                self.goto_val(to, JumpHint::Jump);
            }
        }
    }

    /// A relative jump if `test`.
    fn jump_if(&mut self, insn: &Instruction, test: Test) {
        if let Some(to) = target(insn, self.key) {
            return self.branch(test, to);
        }
        self.sync();
        let (cc, a, b) = test;
        match self.b.known_cond(cc, a, b) {
            Some(true) => self.jump_relative(insn),
            Some(false) => {}
            None => {
                let taken = self.b.label();
                let after = self.b.label_at(self.next);
                self.b.brcond(cc, a, b, taken);
                self.b.br(after);
                self.b.bind(taken);
                self.cc = super::Cc::default();
                self.jump_relative(insn);
                self.b.bind(after);
                self.cc = super::Cc::default();
            }
        }
    }

    fn conditional_jump(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        let test = match insn.mnemonic() {
            Jcxz | Jecxz | Jrcxz => {
                let bits = match insn.mnemonic() {
                    Jcxz => 16,
                    Jecxz => 32,
                    _ => 64,
                };
                self.count_test(Cond::Eq, bits)
            }
            Loop | Loope | Loopne => {
                self.check_loop(insn);
                self.loop_test(insn)
            }
            _ => {
                let code = insn.condition_code() as u8;
                if code == 0 {
                    return false; // XBEGIN
                }
                self.condition(code - 1)
            }
        };
        self.jump_if(insn, test);
        true
    }

    /// (E/R)CX compared with 0.
    fn count_test(&mut self, cc: Cond, bits: u32) -> Test {
        let count = self.gpr(1);
        let count = match bits {
            16 => self.b.andi(count, 0xffff),
            32 => self.wrap32(count),
            _ => count,
        };
        (cc, count, self.b.iconst(0))
    }

    /// LOOPE and LOOPNE: what of their condition is of the flags, as 0 or 1.
    fn loop_flag(&mut self, insn: &Instruction) -> Option<Val> {
        let flag = match insn.mnemonic() {
            Mnemonic::Loope => Some(self.condition(4)),
            Mnemonic::Loopne => Some(self.condition(5)),
            _ => None,
        };
        flag.map(|(cc, a, b)| self.b.setcond(cc, a, b))
    }

    /// Where the limit of CS counts, raises its fault before LOOP changes the count.
    fn check_loop(&mut self, insn: &Instruction) {
        let size = if insn.op0_kind() == OpKind::NearBranch16 { Size::B2 } else { Size::B4 };
        if self.long() || !self.limited(size) {
            return;
        }
        let (ip, _) = self.relative_ip(insn);
        let flag = self.loop_flag(insn);
        let mask = Size::of(loop_bits(insn) as usize / 8).mask();
        let count = self.gpr(1);
        let count = self.b.subi(count, 1);
        let count = self.b.andi(count, mask as i64);
        let zero = self.b.iconst(0);
        let more = self.b.setcond(Cond::Ne, count, zero);
        let taken = flag.map_or(more, |flag| self.b.and(more, flag));
        let limit = self.b.get(slot::seg_limit(seg::CS));
        let beyond = self.b.setcond(Cond::GtU, ip, limit);
        let bad = self.b.and(beyond, taken);
        let none = self.b.constant(self.b.ty(bad), 0);
        self.raise_if((Cond::Ne, bad, none), vector::GP, Some(0));
    }

    fn loop_test(&mut self, insn: &Instruction) -> Test {
        let bits = loop_bits(insn);
        let size = Size::of(bits as usize / 8);
        // The condition first: it is of the flags, which the count does not change.
        let flag = self.loop_flag(insn);
        let count = self.gpr_low(1, size);
        let count = self.b.subi(count, 1);
        self.set_gpr_low(1, size, count);
        let (cc, a, b) = self.count_test(Cond::Ne, bits);
        match flag {
            None => (cc, a, b),
            Some(flag) => {
                let more = self.b.setcond(cc, a, b);
                let both = self.b.and(more, flag);
                (Cond::Ne, both, self.b.iconst(0))
            }
        }
    }

    /// Size of the instruction pointer that a near indirect branch loads.
    fn branch_size(&self, insn: &Instruction) -> Size {
        match self.op_size(insn, 0) {
            Size::B1 => Size::B4,
            s => s,
        }
    }

    fn near_jump(&mut self, insn: &Instruction) -> bool {
        match insn.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                if insn.mnemonic() != Mnemonic::Jmp {
                    return false;
                }
                self.jump_relative(insn);
                true
            }
            OpKind::Register | OpKind::Memory if insn.is_jmp_near_indirect() => {
                let size = self.branch_size(insn);
                let ip = self.read_op(insn, 0, size);
                let ip = self.to64(size, ip);
                self.check_target(ip, size, false);
                let to = self.pc_of(ip);
                self.goto_val(to, JumpHint::Jump);
                true
            }
            _ => false,
        }
    }

    fn near_call(&mut self, insn: &Instruction) -> bool {
        let relative = match insn.op0_kind() {
            OpKind::NearBranch16 => Some(Size::B2),
            OpKind::NearBranch32 => Some(Size::B4),
            OpKind::NearBranch64 => Some(Size::B8),
            _ => None,
        };
        if let Some(size) = relative {
            let to = match target(insn, self.key) {
                Some(_) => None,
                None => Some(self.relative(insn)),
            };
            let next = self.next;
            let back = self.ip_of(next);
            let back = self.narrow(size, back);
            self.push(size, back);
            match (to, target(insn, self.key)) {
                (Some(to), _) => self.goto_val(to, JumpHint::Call),
                (None, Some(to)) => self.goto_there(to),
                (None, None) => {}
            }
            return true;
        }
        if !insn.is_call_near_indirect() {
            return false;
        }
        let size = self.branch_size(insn);
        let ip = self.read_op(insn, 0, size);
        let ip = self.to64(size, ip);
        self.check_target(ip, size, false);
        let next = self.next;
        let back = self.ip_of(next);
        let back = self.narrow(size, back);
        self.push(size, back);
        let to = self.pc_of(ip);
        self.goto_val(to, JumpHint::Call);
        true
    }

    fn near_return(&mut self, insn: &Instruction) -> bool {
        use iced_x86::Code::*;
        let size = match insn.code() {
            Retnw | Retnw_imm16 => Size::B2,
            Retnd | Retnd_imm16 => Size::B4,
            Retnq | Retnq_imm16 => Size::B8,
            _ => return false,
        };
        let extra = if insn.op_count() == 1 { insn.immediate16() } else { 0 };
        let sp = self.gpr(RSP);
        let at = self.stack_at(sp, 0, size, false);
        let ip = self.load(size, at);
        let ip = self.to64(size, ip);
        self.check_target(ip, size, false);
        self.move_sp(sp, i64::from(size.bytes()) + i64::from(extra));
        let to = self.pc_of(ip);
        self.goto_val(to, JumpHint::Return);
        true
    }

    /// Whether this is 64-bit code.
    pub(super) fn long(&self) -> bool {
        self.size == CodeSize::Bits64
    }
}

/// Bits of the count of LOOP, LOOPE or LOOPNE.
fn loop_bits(insn: &Instruction) -> u32 {
    use iced_x86::Code::*;
    match insn.code() {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
        | Loopne_rel8_32_CX => 16,
        Loop_rel8_16_ECX | Loop_rel8_32_ECX | Loop_rel8_64_ECX | Loope_rel8_16_ECX | Loope_rel8_32_ECX
        | Loope_rel8_64_ECX | Loopne_rel8_16_ECX | Loopne_rel8_32_ECX | Loopne_rel8_64_ECX => 32,
        _ => 64,
    }
}
