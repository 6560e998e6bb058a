//! Bit tests, scans, counts, BMI, CRC32.

use holdfast_tcg_ir::{Cond, RmwKind, Val};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{Addr, STATUS, Size, Translator};
use crate::flags::Kind;

impl Translator<'_> {
    pub(super) fn bits(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        match insn.mnemonic() {
            Bt | Bts | Btr | Btc => self.bit_test(insn),
            Bsf | Bsr => self.bit_scan(insn),
            Tzcnt | Lzcnt | Popcnt => self.bit_count(insn),
            Andn => {
                let size = self.op_size(insn, 0);
                let a = self.read_op(insn, 1, size);
                let b = self.read_op(insn, 2, size);
                let d = self.b.andn(b, a);
                self.write_reg(insn.op0_register(), d);
                self.set_logic(size, d);
            }
            Blsr | Blsi | Blsmsk => self.lowest_bit(insn),
            Bextr => self.bextr(insn),
            Bzhi => self.bzhi(insn),
            Pdep | Pext => {
                let size = self.op_size(insn, 0);
                let a = self.read_op(insn, 1, size);
                let mask = self.read_op(insn, 2, size);
                let (a, mask) = (self.to64(size, a), self.to64(size, mask));
                let id = if insn.mnemonic() == Pdep { self.ids.int.pdep } else { self.ids.int.pext };
                let v = self.b.call(id, &[a, mask]);
                let v = self.narrow(size, v);
                self.write_reg(insn.op0_register(), v);
            }
            Crc32 => {
                let size = self.op_size(insn, 1);
                let data = self.read_op(insn, 1, size);
                let data = self.to64(size, data);
                let crc = self.gpr(insn.op0_register().number());
                let log2 = self.b.iconst(size as i64);
                let v = self.b.call(self.ids.int.crc32, &[crc, data, log2]);
                self.set_gpr(insn.op0_register().number(), v);
            }
            _ => return false,
        }
        true
    }

    /// The bit number in operand 1, as `I64`: sign-extended for a register, masked for an immediate.
    fn bit_number(&mut self, insn: &Instruction, size: Size) -> Val {
        if insn.op_kind(1) == OpKind::Register {
            let n = self.read_reg(insn.op_register(1));
            self.to64_signed(size, n)
        } else {
            self.b.iconst(i64::from(u32::from(insn.immediate8()) & (size.bits() - 1)))
        }
    }

    /// `v` with bit `mask` changed as the instruction does.
    fn change_bit(&mut self, insn: &Instruction, v: Val, mask: Val) -> Val {
        match insn.mnemonic() {
            Mnemonic::Bts => self.b.or(v, mask),
            Mnemonic::Btr => self.b.andn(v, mask),
            _ => self.b.xor(v, mask),
        }
    }

    fn bit_test(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let number = self.bit_number(insn, size);
        let low = self.b.andi(number, i64::from(size.bits()) - 1);
        let n = self.narrow(size, low);
        let plain = insn.mnemonic() == Mnemonic::Bt;
        let old = if insn.op_kind(0) == OpKind::Register {
            let r = insn.op_register(0);
            let old = self.read_reg(r);
            if !plain {
                let one = self.imm(size, 1);
                let mask = self.b.shl(one, n);
                let new = self.change_bit(insn, old, mask);
                self.write_reg(r, new);
            }
            old
        } else {
            let at = self.bit_address(insn, size, number);
            let one = self.imm(size, 1);
            if insn.has_lock_prefix() && !plain {
                let mask = self.b.shl(one, n);
                let (kind, operand) = match insn.mnemonic() {
                    Mnemonic::Bts => (RmwKind::Or, mask),
                    Mnemonic::Btr => (RmwKind::And, self.b.not(mask)),
                    _ => (RmwKind::Xor, mask),
                };
                let (mem, at) = self.atomic_at(size, at);
                self.b.atomic_rmw(kind, mem, at, operand)
            } else {
                let old = if plain { self.load(size, at) } else { self.load_for_update(size, at) };
                if !plain {
                    let mask = self.b.shl(one, n);
                    let new = self.change_bit(insn, old, mask);
                    self.store(size, at, new);
                }
                old
            }
        };
        if self.live & STATUS != 0 {
            let bit = self.b.shru(old, n);
            let bit = if size == Size::B8 { bit } else { self.b.zext(bit) };
            self.set_carry(bit, false);
        }
    }

    /// The address of the word that has bit `number` of a memory operand.
    fn bit_address(&mut self, insn: &Instruction, size: Size, number: Val) -> Addr {
        let write = insn.mnemonic() != Mnemonic::Bt;
        if insn.op_kind(1) != OpKind::Register {
            return self.address(insn, size.bytes(), write);
        }
        let words = self.b.shrsi(number, i64::from(size.bits().trailing_zeros()));
        let bytes = self.b.shli(words, size as i64);
        let offset = self.offset(insn);
        let sum = self.b.add(offset, bytes);
        let sum = match self.address_bits(insn) {
            64 => sum,
            32 => self.wrap32(sum),
            _ => self.b.andi(sum, 0xffff),
        };
        let s = super::operand::segment(insn.memory_segment());
        self.linear(s, Addr { base: sum, disp: 0 }, size.bytes(), write)
    }

    fn bit_scan(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let v = self.read_op(insn, 1, size);
        let v = self.zero_extended(size, v);
        let found = if insn.mnemonic() == Mnemonic::Bsf {
            self.b.ctz(v)
        } else {
            let zeroes = self.b.clz(v);
            self.b.xori(zeroes, if size == Size::B8 { 63 } else { 31 })
        };
        // Zero leaves the whole destination as it is.
        let r = insn.op0_register();
        let old = self.gpr(r.number());
        let found = if size == Size::B8 { found } else { self.b.zext(found) };
        let found = if size == Size::B2 {
            let high = self.b.andi(old, !0xffff);
            self.b.or(high, found)
        } else {
            found
        };
        let new = self.b.select(v, found, old);
        self.set_gpr(r.number(), new);
        self.set_logic(size, v);
    }

    fn bit_count(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let v = self.read_op(insn, 1, size);
        let v = self.zero_extended(size, v);
        let count = match (insn.mnemonic(), size) {
            (Mnemonic::Popcnt, _) => self.b.popcnt(v),
            (Mnemonic::Tzcnt, Size::B2) => {
                let stop = self.b.ori(v, 0x1_0000);
                self.b.ctz(stop)
            }
            (Mnemonic::Tzcnt, _) => self.b.ctz(v),
            (_, Size::B2) => {
                let zeroes = self.b.clz(v);
                self.b.subi(zeroes, 16)
            }
            _ => self.b.clz(v),
        };
        self.write_reg(insn.op0_register(), count);
        if self.live & STATUS == 0 {
            return;
        }
        let zero = self.imm(size, 0);
        let none = self.b.setcond(Cond::Eq, v, zero);
        let flags = if insn.mnemonic() == Mnemonic::Popcnt {
            self.b.shli(none, 6)
        } else {
            // CF for a zero operand, ZF for a zero result.
            let first = self.b.setcond(Cond::Eq, count, zero);
            let first = self.b.shli(first, 6);
            self.b.or(none, first)
        };
        self.set_flags(flags);
    }

    fn lowest_bit(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let v = self.read_op(insn, 1, size);
        let zero = self.imm(size, 0);
        let (d, carry) = match insn.mnemonic() {
            Mnemonic::Blsr => {
                let less = self.b.subi(v, 1);
                (self.b.and(v, less), Cond::Eq)
            }
            Mnemonic::Blsmsk => {
                let less = self.b.subi(v, 1);
                (self.b.xor(v, less), Cond::Eq)
            }
            _ => {
                let negative = self.b.neg(v);
                (self.b.and(v, negative), Cond::Ne)
            }
        };
        self.write_reg(insn.op0_register(), d);
        if self.live & STATUS != 0 {
            let c = self.b.setcond(carry, v, zero);
            let c = self.narrow(size, c);
            self.set_cc(Kind::Carry, size, d, c);
        }
    }

    fn bextr(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let v = self.read_op(insn, 1, size);
        let v = self.to64(size, v);
        let control = self.read_reg(insn.op_register(2));
        let control = if size == Size::B8 { control } else { self.b.zext(control) };
        let start = self.b.andi(control, 0xff);
        let len = self.b.shrui(control, 8);
        let len = self.b.andi(len, 0xff);
        let limit = self.b.iconst(64);
        let zero = self.b.iconst(0);
        // Starts and lengths of 64 and more.
        let shifted = self.b.shru(v, start);
        let shifted = self.b.movcond(Cond::LtU, (start, limit), shifted, zero);
        let ones = self.b.iconst(-1);
        let mask = self.b.shl(ones, len);
        let cut = self.b.andn(shifted, mask);
        let d = self.b.movcond(Cond::LtU, (len, limit), cut, shifted);
        let d = self.narrow(size, d);
        self.write_reg(insn.op0_register(), d);
        self.set_logic(size, d);
    }

    fn bzhi(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let v = self.read_op(insn, 1, size);
        let v64 = self.to64(size, v);
        let n = self.read_reg(insn.op_register(2));
        let n = if size == Size::B8 { n } else { self.b.zext(n) };
        let n = self.b.andi(n, 0xff);
        let ones = self.b.iconst(-1);
        let mask = self.b.shl(ones, n);
        let cut = self.b.andn(v64, mask);
        let limit = self.b.iconst(i64::from(size.bits()));
        let d = self.b.movcond(Cond::LtU, (n, limit), cut, v64);
        let d = self.narrow(size, d);
        self.write_reg(insn.op0_register(), d);
        if self.live & STATUS != 0 {
            let carry = self.b.setcond(Cond::GeU, n, limit);
            let carry = self.narrow(size, carry);
            self.set_cc(Kind::Carry, size, d, carry);
        }
    }
}
