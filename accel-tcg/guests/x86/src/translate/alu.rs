//! Addition, subtraction, logic, comparison.

use holdfast_tcg_ir::{Op, Val};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::cc::Record;
use super::{LIVE_CF, Size, Translator};
use crate::flags::Kind;

impl Translator<'_> {
    pub(super) fn alu(&mut self, insn: &Instruction) -> bool {
        let mnemonic = insn.mnemonic();
        if insn.has_lock_prefix() {
            return self.locked(insn);
        }
        match mnemonic {
            Mnemonic::Add | Mnemonic::Sub | Mnemonic::And | Mnemonic::Or | Mnemonic::Xor => {
                let size = self.op_size(insn, 0);
                let zeroes = matches!(mnemonic, Mnemonic::Sub | Mnemonic::Xor)
                    && insn.op_kind(1) == OpKind::Register
                    && insn.op_kind(0) == OpKind::Register
                    && insn.op_register(0) == insn.op_register(1);
                if zeroes {
                    let zero = self.imm(size, 0);
                    self.write_reg(insn.op_register(0), zero);
                    self.set_logic(size, zero);
                    return true;
                }
                let b = self.read_second(insn, size);
                self.modify(insn, size, |t, a| t.binary(mnemonic, size, a, b));
            }
            Mnemonic::Adc | Mnemonic::Sbb => {
                let size = self.op_size(insn, 0);
                let b = self.read_second(insn, size);
                let carry = self.carry();
                let add = mnemonic == Mnemonic::Adc;
                self.modify(insn, size, |t, a| t.with_carry(add, size, (a, b), carry));
            }
            Mnemonic::Cmp => {
                let size = self.op_size(insn, 0);
                let a = self.read_op(insn, 0, size);
                let b = self.read_op(insn, 1, size);
                self.set_cc(Kind::Cmp, size, a, b);
            }
            Mnemonic::Test => {
                let size = self.op_size(insn, 0);
                let a = self.read_op(insn, 0, size);
                let b = self.read_op(insn, 1, size);
                let d = self.b.and(a, b);
                self.set_logic(size, d);
            }
            Mnemonic::Inc | Mnemonic::Dec => {
                let size = self.op_size(insn, 0);
                let dec = mnemonic == Mnemonic::Dec;
                self.modify(insn, size, |t, a| t.step(dec, size, a));
            }
            Mnemonic::Neg => {
                let size = self.op_size(insn, 0);
                self.modify(insn, size, |t, a| t.negate(size, a));
            }
            Mnemonic::Not => {
                let size = self.op_size(insn, 0);
                self.modify(insn, size, |t, a| t.b.not(a));
            }
            Mnemonic::Adcx | Mnemonic::Adox => self.adx(insn),
            Mnemonic::Aaa | Mnemonic::Aas | Mnemonic::Aad | Mnemonic::Aam | Mnemonic::Daa | Mnemonic::Das => {
                self.decimal(insn);
            }
            _ => return false,
        }
        true
    }

    /// The second operand, read before the first is modified.
    fn read_second(&mut self, insn: &Instruction, size: Size) -> Val {
        self.read_op(insn, 1, size)
    }

    /// `a op b`, with its flags.
    pub(super) fn binary(&mut self, mnemonic: Mnemonic, size: Size, a: Val, b: Val) -> Val {
        match mnemonic {
            Mnemonic::Add => {
                let d = self.b.add(a, b);
                self.set_cc(Kind::Add, size, d, b);
                d
            }
            Mnemonic::Sub => {
                let d = self.b.sub(a, b);
                self.set_record(Record { kind: Kind::Sub, size, dst: d, src: b, aux: None, lhs: Some(a) });
                d
            }
            _ => {
                let op = match mnemonic {
                    Mnemonic::And => Op::And,
                    Mnemonic::Or => Op::Or,
                    _ => Op::Xor,
                };
                let d = self.b.binary(op, a, b);
                self.set_logic(size, d);
                d
            }
        }
    }

    /// ADC and SBB; `carry` is an `I64`.
    pub(super) fn with_carry(&mut self, add: bool, size: Size, (a, b): (Val, Val), carry: Val) -> Val {
        let c = self.narrow(size, carry);
        let (kind, d) = if add {
            let d = self.b.add(a, b);
            (Kind::Adc, self.b.add(d, c))
        } else {
            let d = self.b.sub(a, b);
            (Kind::Sbb, self.b.sub(d, c))
        };
        self.set_record(Record { kind, size, dst: d, src: b, aux: Some(carry), lhs: Some(a) });
        d
    }

    pub(super) fn step(&mut self, dec: bool, size: Size, a: Val) -> Val {
        let d = self.b.addi(a, if dec { -1 } else { 1 });
        if self.live & LIVE_CF != 0 {
            self.set_step(dec, size, d);
        } else if dec {
            // CF does not matter: the same as SUB and ADD.
            let one = self.imm(size, 1);
            self.set_record(Record { kind: Kind::Sub, size, dst: d, src: one, aux: None, lhs: Some(a) });
        } else {
            let one = self.imm(size, 1);
            self.set_cc(Kind::Add, size, d, one);
        }
        d
    }

    pub(super) fn negate(&mut self, size: Size, a: Val) -> Val {
        let zero = self.imm(size, 0);
        let d = self.b.neg(a);
        self.set_record(Record { kind: Kind::Sub, size, dst: d, src: a, aux: None, lhs: Some(zero) });
        d
    }

    fn adx(&mut self, insn: &Instruction) {
        use crate::flags::rflags;
        let size = self.op_size(insn, 0);
        let b = self.read_op(insn, 1, size);
        let r = insn.op_register(0);
        let a = self.read_reg(r);
        let flags = self.flags();
        let position = if insn.mnemonic() == Mnemonic::Adcx { 0 } else { 11 };
        let carry = self.b.shrui(flags, position);
        let carry = self.b.andi(carry, 1);
        let c = self.narrow(size, carry);
        let sum = self.b.add(a, b);
        let first = self.b.setcond(holdfast_tcg_ir::Cond::LtU, sum, a);
        let d = self.b.add(sum, c);
        let second = self.b.setcond(holdfast_tcg_ir::Cond::LtU, d, c);
        let out = self.b.or(first, second);
        self.write_reg(r, d);
        let out = self.b.shli(out, position);
        let mask = if position == 0 { rflags::CF } else { rflags::OF };
        let others = self.b.andi(flags, !(mask as i64));
        let flags = self.b.or(others, out);
        self.set_flags(flags);
    }

    /// The decimal adjustments: a helper does AX and the flags.
    fn decimal(&mut self, insn: &Instruction) {
        let what = match insn.mnemonic() {
            Mnemonic::Aaa => 0,
            Mnemonic::Aas => 1,
            Mnemonic::Daa => 2,
            Mnemonic::Das => 3,
            Mnemonic::Aam => 4,
            _ => 5,
        };
        let what = self.b.iconst(what);
        let base = self.b.iconst(i64::from(insn.immediate8()));
        self.call_system(self.ids.int.decimal, &[what, base]);
    }
}
