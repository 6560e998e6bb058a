//! Instructions with LOCK, and those that exchange with memory.

use holdfast_tcg_ir::{Cond, RmwKind, Val};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::cc::Record;
use super::{Addr, Size, Translator};
use crate::flags::{Kind, rflags};
use crate::system::regs::vector;

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;

impl Translator<'_> {
    pub(super) fn atomic(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        match insn.mnemonic() {
            Xadd => self.xadd(insn),
            Cmpxchg => self.cmpxchg(insn),
            Cmpxchg8b => self.cmpxchg8b(insn),
            Cmpxchg16b => self.cmpxchg16b(insn),
            _ => return false,
        }
        true
    }

    /// Arithmetic on memory with LOCK.
    pub(super) fn locked(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        let mnemonic = insn.mnemonic();
        if !matches!(mnemonic, Add | Sub | And | Or | Xor | Inc | Dec | Not | Neg | Adc | Sbb) {
            return false; // BTS and the like, XCHG, XADD, CMPXCHG: each does it itself
        }
        let size = self.op_size(insn, 0);
        let b = match mnemonic {
            Inc | Dec => self.imm(size, 1),
            Not => self.imm(size, u64::MAX),
            Neg => self.imm(size, 0),
            _ => self.read_op(insn, 1, size),
        };
        let at = self.address(insn, size.bytes(), true);
        let (mem, addr) = self.atomic_at(size, at);
        let (kind, operand) = match mnemonic {
            Add | Inc => (RmwKind::Add, b),
            Sub | Dec => (RmwKind::Add, self.b.neg(b)),
            And => (RmwKind::And, b),
            Or => (RmwKind::Or, b),
            Xor | Not => (RmwKind::Xor, b),
            _ => {
                self.locked_by_cas(insn, size, at, b);
                return true;
            }
        };
        let old = self.b.atomic_rmw(kind, mem, addr, operand);
        match mnemonic {
            Inc | Dec => {
                self.step(mnemonic == Dec, size, old);
            }
            Not => {}
            _ => {
                self.binary(mnemonic, size, old, b);
            }
        }
        true
    }

    /// NEG, ADC and SBB: tried until nobody was faster.
    fn locked_by_cas(&mut self, insn: &Instruction, size: Size, at: Addr, b: Val) {
        let (mem, addr) = self.atomic_at(size, at);
        let before = self.cc;
        let carry = if insn.mnemonic() == Mnemonic::Neg { None } else { Some(self.carry()) };
        let old = self.load_for_update(size, at);
        let new = match carry {
            None => self.negate(size, old),
            Some(carry) => self.with_carry(insn.mnemonic() == Mnemonic::Adc, size, (old, b), carry),
        };
        let after = self.cc;
        self.cc = before;
        let was = self.b.atomic_cas(mem, addr, old, new);
        self.again_if(size, was, old);
        self.cc = after;
    }

    /// Runs the instruction again if `was` is not `expected`; nothing may have changed yet.
    fn again_if(&mut self, size: Size, was: Val, expected: Val) {
        let expected = self.zero_extended(size, expected);
        let again = self.b.label();
        self.b.brcond(Cond::Ne, was, expected, again);
        let pc = self.pc;
        self.leaving.push((again, pc));
    }

    fn xadd(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let r = insn.op_register(1);
        let b = self.read_reg(r);
        let old = if insn.op_kind(0) == OpKind::Register {
            let d = insn.op_register(0);
            let a = self.read_reg(d);
            let sum = self.b.add(a, b);
            // The destination last: it is what stays if both are one register.
            self.write_reg(r, a);
            self.write_reg(d, sum);
            self.set_cc(Kind::Add, size, sum, b);
            return;
        } else if insn.has_lock_prefix() {
            let at = self.address(insn, size.bytes(), true);
            let (mem, at) = self.atomic_at(size, at);
            self.b.atomic_rmw(RmwKind::Add, mem, at, b)
        } else {
            let at = self.address(insn, size.bytes(), true);
            let a = self.load_for_update(size, at);
            let sum = self.b.add(a, b);
            self.store(size, at, sum);
            a
        };
        self.write_reg(r, old);
        self.binary(Mnemonic::Add, size, old, b);
    }

    fn cmpxchg(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let expected = self.gpr_low(RAX, size);
        let expected = self.zero_extended(size, expected);
        let new = self.read_reg(insn.op_register(1));
        let old = if insn.op_kind(0) == OpKind::Register {
            let r = insn.op_register(0);
            let old = self.read_reg(r);
            let old = self.zero_extended(size, old);
            // Nothing of the destination is written when the comparison fails, its upper half neither.
            let n = self.whole_register(r);
            let before = self.gpr(n);
            self.write_reg(r, new);
            let after = self.gpr(n);
            let v = self.b.movcond(Cond::Eq, (old, expected), after, before);
            self.set_gpr(n, v);
            old
        } else {
            let at = self.address(insn, size.bytes(), true);
            let (mem, at) = self.atomic_at(size, at);
            self.b.atomic_cas(mem, at, expected, new)
        };
        // RAX is written only when the comparison fails: its upper half stays otherwise.
        let before = self.gpr(RAX);
        let loaded = match size {
            Size::B8 => old,
            Size::B4 => self.b.zext(old),
            _ => {
                let high = self.b.andi(before, !(size.mask() as i64));
                let low = self.b.zext(old);
                self.b.or(high, low)
            }
        };
        let v = self.b.movcond(Cond::Eq, (old, expected), before, loaded);
        self.set_gpr(RAX, v);
        let d = self.b.sub(expected, old);
        self.set_record(Record { kind: Kind::Sub, size, dst: d, src: old, aux: None, lhs: Some(expected) });
    }

    /// ZF becomes `equal` (`I64` 0 or 1), the others stay.
    pub(super) fn set_zero_flag(&mut self, equal: Val) {
        let flags = self.flags();
        let flags = self.b.andi(flags, !(rflags::ZF as i64));
        let equal = self.b.shli(equal, 6);
        let flags = self.b.or(flags, equal);
        self.set_flags(flags);
    }

    fn cmpxchg8b(&mut self, insn: &Instruction) {
        let at = self.address(insn, 8, true);
        let (mem, at) = self.atomic_at(Size::B8, at);
        let mut pair = |high: usize, low: usize| {
            let high = self.gpr(high);
            let high = self.b.shli(high, 32);
            let low = self.gpr(low);
            let low = self.wrap32(low);
            self.b.or(high, low)
        };
        let (expected, new) = (pair(RDX, RAX), pair(RCX, RBX));
        let old = self.b.atomic_cas(mem, at, expected, new);
        let low = self.wrap32(old);
        let high = self.b.shrui(old, 32);
        let (rax, rdx) = (self.gpr(RAX), self.gpr(RDX));
        let rax = self.b.movcond(Cond::Eq, (old, expected), rax, low);
        let rdx = self.b.movcond(Cond::Eq, (old, expected), rdx, high);
        let equal = self.b.setcond(Cond::Eq, old, expected);
        self.set_gpr(RAX, rax);
        self.set_gpr(RDX, rdx);
        self.set_zero_flag(equal);
    }

    fn cmpxchg16b(&mut self, insn: &Instruction) {
        let at = self.address(insn, 16, true);
        let addr = self.whole(at);
        let low = self.b.andi(addr, 15);
        let zero = self.b.iconst(0);
        self.raise_if((Cond::Ne, low, zero), vector::GP, Some(0));
        let idx = self.b.iconst(i64::from(self.key.mmu_idx()));
        let equal = self.call_system(self.ids.int.cmpxchg16b, &[addr, idx]);
        self.set_zero_flag(equal);
    }
}
