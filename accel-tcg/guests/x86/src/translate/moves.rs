//! Moves, extensions, exchanges, conditional moves and sets.

use holdfast_tcg_ir::RmwKind;
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{Size, Translator};
use crate::flags::rflags;
use crate::state::slot;

impl Translator<'_> {
    pub(super) fn moves(&mut self, insn: &Instruction) -> bool {
        match insn.mnemonic() {
            Mnemonic::Mov => return self.mov(insn),
            Mnemonic::Lea => {
                let size = self.op_size(insn, 0);
                let v = self.offset(insn);
                let v = self.narrow(size, v);
                self.write_reg(insn.op_register(0), v);
            }
            Mnemonic::Movzx => {
                let (from, to) = (self.op_size(insn, 1), self.op_size(insn, 0));
                let v = self.read_op(insn, 1, from);
                let v = self.zero_extended(from, v);
                let v = if to == Size::B8 { self.b.zext(v) } else { v };
                self.write_reg(insn.op_register(0), v);
            }
            Mnemonic::Movsx | Mnemonic::Movsxd => self.movsx(insn),
            Mnemonic::Xchg => self.xchg(insn),
            Mnemonic::Nop | Mnemonic::Endbr64 | Mnemonic::Endbr32 => {}
            Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetch
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetchwt1
            | Mnemonic::Reservednop => {}
            _ => return self.conditional(insn) || self.accumulator(insn),
        }
        true
    }

    /// Those that work on RAX or on flags.
    fn accumulator(&mut self, insn: &Instruction) -> bool {
        match insn.mnemonic() {
            Mnemonic::Cbw | Mnemonic::Cwde | Mnemonic::Cdqe => {
                let (from, to) = match insn.mnemonic() {
                    Mnemonic::Cbw => (Size::B1, Size::B2),
                    Mnemonic::Cwde => (Size::B2, Size::B4),
                    _ => (Size::B4, Size::B8),
                };
                let v = self.gpr_low(0, from);
                let v = self.sign_extended(from, v);
                let v = if to == Size::B8 { self.b.sext(v) } else { v };
                self.set_gpr_low(0, to, v);
            }
            Mnemonic::Cwd | Mnemonic::Cdq | Mnemonic::Cqo => {
                let size = match insn.mnemonic() {
                    Mnemonic::Cwd => Size::B2,
                    Mnemonic::Cdq => Size::B4,
                    _ => Size::B8,
                };
                let v = self.gpr_low(0, size);
                let v = self.sign_extended(size, v);
                let v = self.b.shrsi(v, if size == Size::B8 { 63 } else { 31 });
                self.set_gpr_low(2, size, v);
            }
            Mnemonic::Lahf => {
                let flags = self.flags();
                let low = self.b.andi(flags, 0xd5);
                let low = self.b.ori(low, rflags::FIXED as i64);
                let low = self.b.shli(low, 8);
                let old = self.gpr(0);
                let old = self.b.andi(old, !0xff00);
                let v = self.b.or(old, low);
                self.set_gpr(0, v);
            }
            Mnemonic::Sahf => {
                let flags = self.flags();
                let of = self.b.andi(flags, rflags::OF as i64);
                let ah = self.gpr(0);
                let ah = self.b.shrui(ah, 8);
                let ah = self.b.andi(ah, 0xd5);
                let flags = self.b.or(of, ah);
                self.set_flags(flags);
            }
            Mnemonic::Movbe => self.movbe(insn),
            Mnemonic::Bswap => {
                let r = insn.op_register(0);
                let v = self.read_reg(r);
                let v = if r.size() == 2 { self.imm(Size::B2, 0) } else { self.b.bswap(v) };
                self.write_reg(r, v);
            }
            Mnemonic::Cld | Mnemonic::Std => {
                let flags = self.b.get(slot::FLAGS);
                let flags = if insn.mnemonic() == Mnemonic::Cld {
                    self.b.andi(flags, !(rflags::DF as i64))
                } else {
                    self.b.ori(flags, rflags::DF as i64)
                };
                self.b.set(slot::FLAGS, flags);
            }
            Mnemonic::Clc | Mnemonic::Stc => {
                let v = self.b.iconst(i64::from(insn.mnemonic() == Mnemonic::Stc));
                self.set_carry(v, true);
            }
            Mnemonic::Cmc => {
                let v = self.carry();
                let v = self.b.xori(v, 1);
                self.set_carry(v, true);
            }
            Mnemonic::Salc => {
                let carry = self.carry();
                let v = self.b.neg(carry);
                let v = self.b.trunc(v);
                self.set_gpr_low(0, Size::B1, v);
            }
            Mnemonic::Xlatb => self.xlat(insn),
            _ => return false,
        }
        true
    }

    /// SETcc and CMOVcc.
    fn conditional(&mut self, insn: &Instruction) -> bool {
        let cc = insn.condition_code() as u8;
        if cc == 0 {
            return false;
        }
        if insn.is_jcc_short_or_near() || insn.op_count() == 0 {
            return false;
        }
        if insn.op_count() == 1 {
            if self.op_size(insn, 0) != Size::B1
                || !matches!(insn.op_kind(0), OpKind::Register | OpKind::Memory)
            {
                return false; // LOOPcc
            }
            let (cond, a, b) = self.condition(cc - 1);
            let v = self.b.setcond(cond, a, b);
            let v = self.b.trunc(v);
            self.write_op(insn, 0, Size::B1, v);
            return true;
        }
        let size = self.op_size(insn, 0);
        let source = self.read_op(insn, 1, size);
        let (cond, a, b) = self.condition(cc - 1);
        let old = self.read_reg(insn.op_register(0));
        let v = self.b.movcond(cond, (a, b), source, old);
        self.write_reg(insn.op_register(0), v);
        true
    }

    /// MOV between general registers, memory and immediates; false for segment, control and debug registers.
    fn mov(&mut self, insn: &Instruction) -> bool {
        for n in 0..2 {
            if insn.op_kind(n) == OpKind::Register && !insn.op_register(n).is_gpr() {
                return false;
            }
        }
        let size = self.op_size(insn, 0);
        let v = self.read_op(insn, 1, size);
        self.write_op(insn, 0, size, v);
        true
    }

    fn movsx(&mut self, insn: &Instruction) {
        let (from, to) = (self.op_size(insn, 1), self.op_size(insn, 0));
        let v = if insn.op_kind(1) == OpKind::Memory {
            let at = self.address(insn, from.bytes(), false);
            self.load_signed(from, to, at)
        } else {
            let v = self.read_reg(insn.op_register(1));
            let v = self.sign_extended(from, v);
            if to == Size::B8 { self.b.sext(v) } else { v }
        };
        self.write_reg(insn.op_register(0), v);
    }

    fn xchg(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        // The memory operand may be either.
        let (m, r) = if insn.op_kind(1) == OpKind::Memory { (1, 0) } else { (0, 1) };
        let v = self.read_reg(insn.op_register(r));
        if insn.op_kind(m) == OpKind::Memory {
            let at = self.address(insn, size.bytes(), true);
            let (mem, at) = self.atomic_at(size, at);
            let old = self.b.atomic_rmw(RmwKind::Swap, mem, at, v);
            return self.write_reg(insn.op_register(r), old);
        }
        let other = self.read_reg(insn.op_register(m));
        self.write_reg(insn.op_register(m), v);
        self.write_reg(insn.op_register(r), other);
    }

    fn movbe(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let v = self.read_op(insn, 1, size);
        let v = self.b.bswap(v);
        let v = if size == Size::B2 { self.b.shrui(v, 16) } else { v };
        self.write_op(insn, 0, size, v);
    }

    fn xlat(&mut self, insn: &Instruction) {
        // The operand is [seg:rBX + AL]: iced gives the base, and AL as index.
        let base = self.gpr(3);
        let al = self.gpr(0);
        let al = self.b.andi(al, 0xff);
        let sum = self.b.add(base, al);
        let offset = match insn.memory_base().size() {
            8 => sum,
            4 => self.wrap32(sum),
            _ => self.b.andi(sum, 0xffff),
        };
        let s = super::operand::segment(insn.memory_segment());
        let at = self.linear(s, super::Addr { base: offset, disp: 0 }, 1, false);
        let v = self.load(Size::B1, at);
        self.set_gpr_low(0, Size::B1, v);
    }
}
