//! Shifts and rotations.

use holdfast_tcg_ir::{Op, Type, Val};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{STATUS, Size, Translator};
use crate::flags::Kind;
use crate::state::slot;

/// A shift's result, and what it was before the last bit.
struct Shifted {
    kind: Kind,
    result: Val,
    before: Val,
}

impl Translator<'_> {
    pub(super) fn shift(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        match insn.mnemonic() {
            Shl | Sal | Shr | Sar => self.plain_shift(insn),
            Rol | Ror => self.rotate(insn),
            Rcl | Rcr => {
                let size = self.op_size(insn, 0);
                let count = self.count64(insn, 1, size);
                self.rotate_helper(insn, size, count);
            }
            Shld | Shrd => self.double_shift(insn),
            Shlx | Shrx | Sarx => {
                let size = self.op_size(insn, 0);
                let a = self.read_op(insn, 1, size);
                let n = self.read_reg(insn.op_register(2));
                let op = match insn.mnemonic() {
                    Shlx => Op::Shl,
                    Shrx => Op::ShrU,
                    _ => Op::ShrS,
                };
                let v = self.b.binary(op, a, n);
                self.write_reg(insn.op_register(0), v);
            }
            Rorx => {
                let size = self.op_size(insn, 0);
                let a = self.read_op(insn, 1, size);
                let v = self.b.rotri(a, i64::from(u32::from(insn.immediate8()) & (size.bits() - 1)));
                self.write_reg(insn.op_register(0), v);
            }
            _ => return false,
        }
        true
    }

    /// A constant count in operand `n`, masked; `None` for CL.
    fn constant_count(&self, insn: &Instruction, n: u32, size: Size) -> Option<u32> {
        if insn.op_kind(n) == OpKind::Register {
            debug_assert_eq!(insn.op_register(n), Register::CL);
            return None;
        }
        Some(insn.try_immediate(n).unwrap_or(0) as u32 & if size == Size::B8 { 63 } else { 31 })
    }

    /// The masked count in operand `n` as `I64`.
    fn count64(&mut self, insn: &Instruction, n: u32, size: Size) -> Val {
        match self.constant_count(insn, n, size) {
            Some(count) => self.b.iconst(i64::from(count)),
            None => {
                let cl = self.gpr(1);
                self.b.andi(cl, if size == Size::B8 { 63 } else { 31 })
            }
        }
    }

    fn plain_shift(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let (op, kind) = match insn.mnemonic() {
            Mnemonic::Shr => (Op::ShrU, Kind::Shr),
            Mnemonic::Sar => (Op::ShrS, Kind::Shr),
            _ => (Op::Shl, Kind::Shl),
        };
        let prepared = |t: &mut Self, a: Val| match op {
            Op::ShrU => t.zero_extended(size, a),
            Op::ShrS => t.sign_extended(size, a),
            _ => a,
        };
        match self.constant_count(insn, 1, size) {
            Some(0) => self.modify(insn, size, |_, a| a),
            Some(n) => self.modify(insn, size, |t, a| {
                let a = prepared(t, a);
                let result = t.b.binary_imm(op, a, i64::from(n));
                if t.live & STATUS != 0 {
                    let before = t.b.binary_imm(op, a, i64::from(n) - 1);
                    t.set_cc(kind, size, result, before);
                }
                result
            }),
            None => {
                let count = self.count64(insn, 1, size);
                let mut shifted = None;
                let n = self.narrow(size, count);
                self.modify(insn, size, |t, a| {
                    let a = prepared(t, a);
                    let result = t.b.binary(op, a, n);
                    let less = t.b.subi(n, 1);
                    let before = t.b.binary(op, a, less);
                    shifted = Some(Shifted { kind, result, before });
                    result
                });
                if let Some(s) = shifted {
                    self.set_counted(size, &s, count);
                }
            }
        }
    }

    /// The flags of a shift by `count` (`I64`), which leaves them if it is 0.
    fn set_counted(&mut self, size: Size, s: &Shifted, count: Val) {
        if self.live & STATUS == 0 {
            return;
        }
        self.sync();
        let op = self.b.iconst(s.kind.op(size as u32) as i64);
        let values = [(slot::CC_OP, op), (slot::CC_DST, s.result), (slot::CC_SRC, s.before)];
        for (slot, new) in values {
            let new = if self.b.ty(new) == Type::I32 { self.b.zext(new) } else { new };
            let old = self.b.get(slot);
            let v = self.b.select(count, new, old);
            self.b.set(slot, v);
        }
        self.cc = super::Cc::default();
    }

    fn rotate(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let right = insn.mnemonic() == Mnemonic::Ror;
        match self.constant_count(insn, 1, size) {
            Some(0) => self.modify(insn, size, |_, a| a),
            Some(n) => self.modify(insn, size, |t, a| {
                let n = t.imm(size, u64::from(n));
                let d = t.rotated(right, size, a, n);
                t.set_turn(right, size, d);
                d
            }),
            None if self.live & STATUS == 0 => {
                let count = self.count64(insn, 1, size);
                let n = self.narrow(size, count);
                self.modify(insn, size, |t, a| t.rotated(right, size, a, n));
            }
            None => {
                let count = self.count64(insn, 1, size);
                self.rotate_helper(insn, size, count);
            }
        }
    }

    /// `a` rotated by `n` modulo its size.
    fn rotated(&mut self, right: bool, size: Size, a: Val, n: Val) -> Val {
        let op = if right { Op::RotR } else { Op::RotL };
        let wide = match size {
            Size::B1 => {
                let byte = self.zero_extended(size, a);
                self.b.muli(byte, 0x0101_0101)
            }
            Size::B2 => {
                let word = self.zero_extended(size, a);
                let high = self.b.shli(word, 16);
                self.b.or(high, word)
            }
            _ => a,
        };
        self.b.binary(op, wide, n)
    }

    /// Rotations through carry, and those by CL whose flags matter.
    fn rotate_helper(&mut self, insn: &Instruction, size: Size, count: Val) {
        let kind = match insn.mnemonic() {
            Mnemonic::Rol => 0,
            Mnemonic::Ror => 1,
            Mnemonic::Rcl => 2,
            _ => 3,
        };
        self.sync();
        let how = self.b.iconst(kind | (size as i64) << 4);
        let (id, flags_id) = (self.ids.int.rotate, self.ids.int.rotate_flags);
        let mut before = None;
        self.modify(insn, size, |t, a| {
            let a = t.to64(size, a);
            before = Some(a);
            let v = t.b.call(id, &[how, a, count]);
            t.narrow(size, v)
        });
        if let Some(a) = before {
            let flags = self.b.call(flags_id, &[how, a, count]);
            self.set_flags(flags);
        }
    }

    fn double_shift(&mut self, insn: &Instruction) {
        let size = self.op_size(insn, 0);
        let left = insn.mnemonic() == Mnemonic::Shld;
        let other = self.read_reg(insn.op_register(1));
        let kind = if left { Kind::Shl } else { Kind::Shr };
        if let Some(n) = self.constant_count(insn, 2, size) {
            if n == 0 {
                return self.modify(insn, size, |_, a| a);
            }
            return self.modify(insn, size, |t, a| {
                let n = t.imm(size, u64::from(n));
                let result = t.double_shifted(left, size, (a, other), n);
                if t.live & STATUS != 0 {
                    let less = t.b.subi(n, 1);
                    let before = t.double_shifted(left, size, (a, other), less);
                    t.set_cc(kind, size, result, before);
                }
                result
            });
        }
        let count = self.count64(insn, 2, size);
        let n = self.narrow(size, count);
        let mut shifted = None;
        self.modify(insn, size, |t, a| {
            let result = t.double_shifted(left, size, (a, other), n);
            let less = t.b.subi(n, 1);
            let before = t.double_shifted(left, size, (a, other), less);
            shifted = Some(Shifted { kind, result, before });
            result
        });
        if let Some(s) = shifted {
            self.set_counted(size, &s, count);
        }
    }

    /// SHLD and SHRD by `n`, which may be 0.
    fn double_shifted(&mut self, left: bool, size: Size, (a, other): (Val, Val), n: Val) -> Val {
        if size == Size::B2 {
            // Both in 32 bits; beyond 16 the bits of the first come again.
            let (a, other) = (self.zero_extended(size, a), self.zero_extended(size, other));
            let (high, low) = if left { (a, other) } else { (other, a) };
            let high = self.b.shli(high, 16);
            let both = self.b.or(high, low);
            let both64 = self.b.zext(both);
            let again = self.b.zext(a);
            let n = self.b.zext(n);
            return if left {
                let wide = self.b.shli(both64, 16);
                let wide = self.b.or(wide, again);
                let v = self.b.shl(wide, n);
                let v = self.b.shrui(v, 32);
                self.b.trunc(v)
            } else {
                let again = self.b.shli(again, 32);
                let wide = self.b.or(both64, again);
                let v = self.b.shru(wide, n);
                self.b.trunc(v)
            };
        }
        // The other's part is shifted in two steps, for n may be 0.
        let rest = self.b.xori(n, i64::from(size.bits()) - 1);
        if left {
            let high = self.b.shl(a, n);
            let low = self.b.shrui(other, 1);
            let low = self.b.shru(low, rest);
            self.b.or(high, low)
        } else {
            let low = self.b.shru(a, n);
            let high = self.b.shli(other, 1);
            let high = self.b.shl(high, rest);
            self.b.or(high, low)
        }
    }
}
