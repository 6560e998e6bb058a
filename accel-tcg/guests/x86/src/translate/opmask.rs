//! Opmask instructions: on 64-bit values. What is above an instruction's width is zero in its result.

use holdfast_tcg_ir::{Cond, Val};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{Size, Translator};
use crate::flags::rflags;
use crate::state::slot;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Move,
    And,
    AndNot,
    Or,
    Xor,
    Xnor,
    Not,
    Add,
    Unpack,
    ShiftLeft,
    ShiftRight,
    OrTest,
    Test,
}

/// What an instruction does, and on how many bits of its result.
fn kind(m: Mnemonic) -> Option<(Kind, Size)> {
    use Kind::*;
    use Mnemonic as M;
    use Size::{B1, B2, B4, B8};
    Some(match m {
        M::Kmovb => (Move, B1),
        M::Kmovw => (Move, B2),
        M::Kmovd => (Move, B4),
        M::Kmovq => (Move, B8),
        M::Kandb => (And, B1),
        M::Kandw => (And, B2),
        M::Kandd => (And, B4),
        M::Kandq => (And, B8),
        M::Kandnb => (AndNot, B1),
        M::Kandnw => (AndNot, B2),
        M::Kandnd => (AndNot, B4),
        M::Kandnq => (AndNot, B8),
        M::Korb => (Or, B1),
        M::Korw => (Or, B2),
        M::Kord => (Or, B4),
        M::Korq => (Or, B8),
        M::Kxorb => (Xor, B1),
        M::Kxorw => (Xor, B2),
        M::Kxord => (Xor, B4),
        M::Kxorq => (Xor, B8),
        M::Kxnorb => (Xnor, B1),
        M::Kxnorw => (Xnor, B2),
        M::Kxnord => (Xnor, B4),
        M::Kxnorq => (Xnor, B8),
        M::Knotb => (Not, B1),
        M::Knotw => (Not, B2),
        M::Knotd => (Not, B4),
        M::Knotq => (Not, B8),
        M::Kaddb => (Add, B1),
        M::Kaddw => (Add, B2),
        M::Kaddd => (Add, B4),
        M::Kaddq => (Add, B8),
        M::Kunpckbw => (Unpack, B1),
        M::Kunpckwd => (Unpack, B2),
        M::Kunpckdq => (Unpack, B4),
        M::Kshiftlb => (ShiftLeft, B1),
        M::Kshiftlw => (ShiftLeft, B2),
        M::Kshiftld => (ShiftLeft, B4),
        M::Kshiftlq => (ShiftLeft, B8),
        M::Kshiftrb => (ShiftRight, B1),
        M::Kshiftrw => (ShiftRight, B2),
        M::Kshiftrd => (ShiftRight, B4),
        M::Kshiftrq => (ShiftRight, B8),
        M::Kortestb => (OrTest, B1),
        M::Kortestw => (OrTest, B2),
        M::Kortestd => (OrTest, B4),
        M::Kortestq => (OrTest, B8),
        M::Ktestb => (Test, B1),
        M::Ktestw => (Test, B2),
        M::Ktestd => (Test, B4),
        M::Ktestq => (Test, B8),
        _ => return None,
    })
}

impl Translator<'_> {
    /// Instructions on opmask registers alone.
    pub(super) fn opmask(&mut self, insn: &Instruction) -> bool {
        let Some((kind, size)) = kind(insn.mnemonic()) else { return false };
        if !self.avx512_allowed() {
            return true;
        }
        match kind {
            Kind::Move => self.opmask_move(insn, size),
            Kind::OrTest | Kind::Test => self.opmask_test(insn, kind, size),
            _ => {
                let value = self.opmask_value(insn, kind, size);
                self.b.set(slot::opmask(insn.op0_register().number()), value);
            }
        }
        true
    }

    /// The low `size` of an opmask register operand.
    fn opmask_operand(&mut self, insn: &Instruction, n: u32, size: Size) -> Val {
        let v = self.b.get(slot::opmask(insn.op_register(n).number()));
        self.opmask_low(v, size)
    }

    fn opmask_low(&mut self, v: Val, size: Size) -> Val {
        if size == Size::B8 { v } else { self.b.andi(v, size.mask() as i64) }
    }

    fn opmask_move(&mut self, insn: &Instruction, size: Size) {
        let is_opmask = |n: u32| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_k();
        if !is_opmask(0) {
            let v = self.opmask_operand(insn, 1, size);
            if insn.op0_kind() == OpKind::Memory {
                let at = self.address(insn, size.bytes(), true);
                let v = self.narrow(size, v);
                self.store(size, at, v);
            } else {
                let to = if size == Size::B8 { Size::B8 } else { Size::B4 };
                let v = self.narrow(to, v);
                self.write_reg(insn.op0_register(), v);
            }
            return;
        }
        let v = if is_opmask(1) {
            self.opmask_operand(insn, 1, size)
        } else if insn.op1_kind() == OpKind::Memory {
            let at = self.address(insn, size.bytes(), false);
            let v = self.load(size, at);
            self.to64(size, v)
        } else {
            let v = self.gpr(insn.op1_register().number());
            self.opmask_low(v, size)
        };
        self.b.set(slot::opmask(insn.op0_register().number()), v);
    }

    fn opmask_value(&mut self, insn: &Instruction, kind: Kind, size: Size) -> Val {
        let a = self.opmask_operand(insn, 1, size);
        let all = size.mask() as i64;
        if matches!(kind, Kind::ShiftLeft | Kind::ShiftRight) {
            let count = insn.immediate8();
            if u32::from(count) >= size.bits() {
                return self.b.iconst(0);
            }
            let left = kind == Kind::ShiftLeft;
            let v = if left { self.b.shli(a, count.into()) } else { self.b.shrui(a, count.into()) };
            return self.opmask_low(v, size);
        }
        if kind == Kind::Not {
            return self.b.xori(a, all);
        }
        let b = self.opmask_operand(insn, 2, size);
        match kind {
            Kind::And => self.b.and(a, b),
            Kind::AndNot => {
                let a = self.b.xori(a, all);
                self.b.and(a, b)
            }
            Kind::Or => self.b.or(a, b),
            Kind::Xor => self.b.xor(a, b),
            Kind::Add => {
                let v = self.b.add(a, b);
                self.opmask_low(v, size)
            }
            Kind::Unpack => {
                let a = self.b.shli(a, size.bits().into());
                self.b.or(a, b)
            }
            _ => {
                let v = self.b.xor(a, b);
                self.b.xori(v, all)
            }
        }
    }

    /// `kortest`: ZF if all are clear, CF if all are set. `ktest`: ZF of AND, CF of AND with the first inverted.
    fn opmask_test(&mut self, insn: &Instruction, kind: Kind, size: Size) {
        let (a, b) = (self.opmask_operand(insn, 0, size), self.opmask_operand(insn, 1, size));
        let all = size.mask() as i64;
        let (for_zf, for_cf) = if kind == Kind::OrTest {
            let v = self.b.or(a, b);
            (v, self.b.xori(v, all))
        } else {
            let not = self.b.xori(a, all);
            (self.b.and(a, b), self.b.and(not, b))
        };
        let zero = self.b.iconst(0);
        let zf = self.b.setcond(Cond::Eq, for_zf, zero);
        let cf = self.b.setcond(Cond::Eq, for_cf, zero);
        let zf = self.b.shli(zf, i64::from(rflags::ZF.trailing_zeros()));
        let flags = self.b.or(zf, cf);
        self.set_flags(flags);
    }
}
