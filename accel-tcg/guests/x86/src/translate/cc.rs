//! The status flags while translating: which operation set them last, and conditions on them.

use holdfast_tcg_ir::{Cond, Type, Val};

use super::{STATUS, Size, Translator};
use crate::flags::{Kind, inc, rflags, rot};
use crate::state::slot;

/// An operation whose operands are at hand. Operands have the size's type; upper bits beyond the size are garbage.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Record {
    pub kind: Kind,
    pub size: Size,
    pub dst: Val,
    pub src: Val,
    /// Carry-in (`I64`) of ADC and SBB.
    pub aux: Option<Val>,
    /// First operand of [`Kind::Sub`].
    pub lhs: Option<Val>,
}

/// INC or DEC later than the record.
#[derive(Debug, Clone, Copy)]
struct Step {
    dec: bool,
    size: Size,
    dst: Val,
}

/// A rotation or carry change later than the record.
#[derive(Debug, Clone, Copy)]
struct Turn {
    /// One of [`rot`]'s kinds.
    kind: u64,
    size: Size,
    value: Val,
}

/// What is known of the status flags.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cc {
    /// The base; `None` if it is only in the slots.
    record: Option<Record>,
    step: Option<Step>,
    turn: Option<Turn>,
    /// OF is that of `turn`.
    turn_of: bool,
    /// The slots say the same.
    saved: bool,
}

impl Default for Cc {
    /// What the slots say.
    fn default() -> Self {
        Self { record: None, step: None, turn: None, turn_of: false, saved: true }
    }
}

/// A condition as a comparison.
pub(crate) type Test = (Cond, Val, Val);

impl Translator<'_> {
    // ---- recording ----

    /// The instruction set all status flags (or leaves those that it does not set undefined).
    pub(super) fn set_cc(&mut self, kind: Kind, size: Size, dst: Val, src: Val) {
        self.set_record(Record { kind, size, dst, src, aux: None, lhs: None });
    }

    /// The same with all of the record.
    pub(super) fn set_record(&mut self, record: Record) {
        if self.live & STATUS == 0 {
            // Nobody reads them: what the slots say is as good.
            self.cc = Cc::default();
            return;
        }
        self.cc = Cc { record: Some(record), step: None, turn: None, turn_of: false, saved: false };
    }

    /// AND, OR, XOR, TEST.
    pub(super) fn set_logic(&mut self, size: Size, dst: Val) {
        self.set_cc(Kind::Logic, size, dst, dst);
    }

    /// The status flags are those in `flags` (`I64`).
    pub(super) fn set_flags(&mut self, flags: Val) {
        self.set_cc(Kind::Flags, Size::B8, flags, flags);
    }

    /// INC or DEC with result `dst`.
    pub(super) fn set_step(&mut self, dec: bool, size: Size, dst: Val) {
        if self.live & STATUS == 0 {
            return;
        }
        self.cc.step = Some(Step { dec, size, dst });
        self.cc.turn_of = false;
        self.cc.saved = false;
        // A turn that is only in the slots loses its OF when this is written there.
    }

    /// ROL or ROR (by a count that is not 0) with result `value`.
    pub(super) fn set_turn(&mut self, right: bool, size: Size, value: Val) {
        if self.live & STATUS == 0 {
            return;
        }
        let kind = if right { rot::ROR } else { rot::ROL };
        self.cc.turn = Some(Turn { kind, size, value });
        self.cc.turn_of = true;
        self.cc.saved = false;
    }

    /// CF becomes bit 0 of `value` (`I64`). `defined`: OF has to stay; otherwise it is undefined.
    pub(super) fn set_carry(&mut self, value: Val, defined: bool) {
        if self.live & STATUS == 0 {
            return;
        }
        let in_slots = self.cc.record.is_none() && self.cc.turn.is_none();
        if defined && (in_slots || self.cc.turn_of) {
            let flags = self.flags();
            let others = self.b.andi(flags, !(rflags::CF as i64));
            let carry = self.b.andi(value, 1);
            let flags = self.b.or(others, carry);
            return self.set_flags(flags);
        }
        self.cc.turn = Some(Turn { kind: rot::CARRY, size: Size::B1, value });
        self.cc.turn_of = false;
        self.cc.saved = false;
    }

    /// The `I64` whose low bits `v` is; what is above does not matter.
    fn wide(&mut self, v: Val) -> Val {
        if self.b.ty(v) == Type::I64 {
            return v;
        }
        let d = *self.b.region().def(v);
        if d.op == holdfast_tcg_ir::Op::Trunc { Val(d.a) } else { self.b.zext(v) }
    }

    /// Puts what is known into the slots.
    pub(super) fn sync(&mut self) {
        if self.cc.saved {
            return;
        }
        let cc = self.cc;
        let mut op = 0;
        let mut clear = 0;
        if let Some(s) = cc.step {
            op |= if s.dec { inc::DEC } else { inc::INC } | (s.size as u64) << inc::SIZE_SHIFT;
            clear |= inc::MASK | rot::OF;
            let v = self.wide(s.dst);
            self.b.set(slot::CC_INC, v);
        }
        if let Some(t) = cc.turn {
            op |= t.kind | (t.size as u64) << rot::SIZE_SHIFT;
            op |= if cc.turn_of { rot::OF } else { 0 };
            clear |= rot::MASK;
            let v = self.wide(t.value);
            self.b.set(slot::CC_ROT, v);
        }
        let op = match cc.record {
            Some(r) => {
                // A logic operation has but its result.
                if r.kind != Kind::Logic {
                    let v = self.wide(r.src);
                    self.b.set(slot::CC_SRC, v);
                }
                if r.kind != Kind::Flags {
                    let v = self.wide(r.dst);
                    self.b.set(slot::CC_DST, v);
                }
                if let Some(aux) = r.aux {
                    self.b.set(slot::CC_AUX, aux);
                }
                self.b.iconst((r.kind.op(r.size as u32) | op) as i64)
            }
            None => {
                let old = self.b.get(slot::CC_OP);
                let old = self.b.andi(old, !(clear as i64));
                self.b.ori(old, op as i64)
            }
        };
        self.b.set(slot::CC_OP, op);
        self.cc.saved = true;
    }

    // ---- reading ----

    /// All status flags in their places, `I64`.
    pub(super) fn flags(&mut self) -> Val {
        if let Some(r) = self.cc.record
            && r.kind == Kind::Flags
            && self.cc.step.is_none()
            && self.cc.turn.is_none()
        {
            return r.src;
        }
        self.sync();
        let v = self.b.call(self.ids.int.status, &[]);
        // The slots go on to say the same in their way.
        let record = Record { kind: Kind::Flags, size: Size::B8, dst: v, src: v, aux: None, lhs: None };
        self.cc = Cc { record: Some(record), step: None, turn: None, turn_of: false, saved: true };
        v
    }

    /// Condition `code` (as in the opcodes: 0 is O, 1 NO, ...) as a comparison.
    pub(super) fn condition(&mut self, code: u8) -> Test {
        let (cc, a, b) = match self.positive(code >> 1 & 7) {
            Some(test) => test,
            None if self.cc.record.is_none() => {
                self.sync();
                let code = self.b.iconst(i64::from(code & !1));
                let v = self.b.call(self.ids.int.holds, &[code]);
                self.non_zero(v)
            }
            None => {
                let flags = self.flags();
                self.flags_test(code >> 1 & 7, flags)
            }
        };
        if code & 1 != 0 { (cc.inverse(), a, b) } else { (cc, a, b) }
    }

    /// CF as `I64` 0 or 1.
    pub(super) fn carry(&mut self) -> Val {
        let (cc, a, b) = self.condition(2);
        self.b.setcond(cc, a, b)
    }

    fn non_zero(&mut self, v: Val) -> Test {
        let zero = self.b.constant(self.b.ty(v), 0);
        (Cond::Ne, v, zero)
    }

    fn never(&mut self) -> Test {
        let zero = self.b.iconst(0);
        (Cond::Ne, zero, zero)
    }

    /// The even condition `n` if it follows from known operands without much ado.
    fn positive(&mut self, n: u8) -> Option<Test> {
        match (n, self.cc.turn, self.cc.step) {
            (1, Some(t), _) => Some(self.turn_carry(t)),
            (0, Some(_), _) if self.cc.turn_of => None,
            (3, Some(_), _) | (3, _, Some(_)) => None,
            // OF could be the slots' rotation's, and is this one's.
            (0 | 2 | 4..=7, turn, Some(s))
                if turn.is_none() || !self.cc.turn_of || matches!(n, 2 | 4 | 5) =>
            {
                self.step_condition(n, s)
            }
            (6 | 7, Some(_), _) if self.cc.turn_of => None,
            _ => {
                let record = self.cc.record?;
                self.record_condition(n, record)
            }
        }
    }

    fn turn_carry(&mut self, t: Turn) -> Test {
        let top = if t.kind == rot::ROR { 8u32.wrapping_shl(t.size as u32) - 1 } else { 0 };
        let bit = self.b.shrui(t.value, i64::from(top));
        let bit = self.b.andi(bit, 1);
        self.non_zero(bit)
    }

    fn step_condition(&mut self, n: u8, s: Step) -> Option<Test> {
        match n {
            2 | 4 | 5 => Some(self.result_test(n, s.size, s.dst)),
            // OF: the result is the least (INC) or the greatest (DEC) signed number.
            0 => {
                let sign = 1u64 << ((8u32 << s.size as u32) - 1);
                let u = self.zero_extended(s.size, s.dst);
                let c = self.b.constant(self.b.ty(u), if s.dec { sign - 1 } else { sign });
                Some((Cond::Eq, u, c))
            }
            // After DEC: what was is less than, or at most, 1.
            6 | 7 if s.dec => {
                let was = self.b.addi(s.dst, 1);
                let was = self.sign_extended(s.size, was);
                let one = self.b.constant(self.b.ty(was), 1);
                Some((if n == 6 { Cond::LtS } else { Cond::LeS }, was, one))
            }
            _ => None,
        }
    }

    /// ZF, SF and PF of a result.
    fn result_test(&mut self, n: u8, size: Size, dst: Val) -> Test {
        match n {
            2 => {
                let u = self.zero_extended(size, dst);
                let zero = self.b.constant(self.b.ty(u), 0);
                (Cond::Eq, u, zero)
            }
            4 => {
                let s = self.sign_extended(size, dst);
                let zero = self.b.constant(self.b.ty(s), 0);
                (Cond::LtS, s, zero)
            }
            _ => {
                let low = self.b.andi(dst, 0xff);
                let ones = self.b.popcnt(low);
                let odd = self.b.andi(ones, 1);
                let zero = self.b.constant(self.b.ty(odd), 0);
                (Cond::Eq, odd, zero)
            }
        }
    }

    fn record_condition(&mut self, n: u8, r: Record) -> Option<Test> {
        match r.kind {
            Kind::Flags => return Some(self.flags_test(n, r.src)),
            Kind::Cmp => return self.compare_condition(n, r.size, r.dst, r.src),
            Kind::Sub => {
                if let Some(lhs) = r.lhs
                    && !matches!(n, 2 | 4 | 5)
                {
                    return self.compare_condition(n, r.size, lhs, r.src);
                }
            }
            _ => {}
        }
        if matches!(n, 2 | 4 | 5) {
            return Some(self.result_test(n, r.size, r.dst));
        }
        match (r.kind, n) {
            (Kind::Logic, 0 | 1) => Some(self.never()),
            (Kind::Logic, 3) => Some(self.result_test(2, r.size, r.dst)),
            (Kind::Logic, 6) => Some(self.result_test(4, r.size, r.dst)),
            (Kind::Logic, _) => {
                let s = self.sign_extended(r.size, r.dst);
                let zero = self.b.constant(self.b.ty(s), 0);
                Some((Cond::LeS, s, zero))
            }
            (Kind::Add, 1) => {
                let (d, s) = (self.zero_extended(r.size, r.dst), self.zero_extended(r.size, r.src));
                Some((Cond::LtU, d, s))
            }
            (Kind::Adc | Kind::Sbb, 1) => self.carried(r),
            (Kind::Shl, 1) => Some(self.result_test(4, r.size, r.src)),
            (Kind::Shr | Kind::Mul | Kind::Carry, 1) | (Kind::Mul, 0) => {
                let bit = self.b.andi(r.src, 1);
                Some(self.non_zero(bit))
            }
            (Kind::Carry, 0) => Some(self.never()),
            _ => None,
        }
    }

    /// CF after ADC or SBB.
    fn carried(&mut self, r: Record) -> Option<Test> {
        let aux = r.aux?;
        let src = self.zero_extended(r.size, r.src);
        let left = match r.kind {
            Kind::Adc => self.zero_extended(r.size, r.dst),
            _ => self.zero_extended(r.size, r.lhs?),
        };
        let below = self.b.setcond(Cond::LtU, left, src);
        let equal = self.b.setcond(Cond::Eq, left, src);
        let equal = self.b.and(equal, aux);
        let v = self.b.or(below, equal);
        Some(self.non_zero(v))
    }

    /// A condition after comparing `a` with `b`.
    fn compare_condition(&mut self, n: u8, size: Size, a: Val, b: Val) -> Option<Test> {
        let cc = match n {
            1 => Cond::LtU,
            2 => Cond::Eq,
            3 => Cond::LeU,
            6 => Cond::LtS,
            7 => Cond::LeS,
            4 | 5 => {
                let d = self.b.sub(a, b);
                return Some(self.result_test(n, size, d));
            }
            _ => return None,
        };
        let (a, b) = if matches!(cc, Cond::LtS | Cond::LeS) {
            (self.sign_extended(size, a), self.sign_extended(size, b))
        } else {
            (self.zero_extended(size, a), self.zero_extended(size, b))
        };
        Some((cc, a, b))
    }

    /// The even condition `n` of flags in their places.
    fn flags_test(&mut self, n: u8, flags: Val) -> Test {
        let mask = match n {
            0 => rflags::OF,
            1 => rflags::CF,
            2 => rflags::ZF,
            3 => rflags::CF | rflags::ZF,
            4 => rflags::SF,
            5 => rflags::PF,
            _ => 0,
        };
        let v = if mask != 0 {
            self.b.andi(flags, mask as i64)
        } else {
            // SF is bit 7, OF bit 11, ZF bit 6.
            let of = self.b.shrui(flags, 4);
            let less = self.b.xor(flags, of);
            if n == 6 {
                self.b.andi(less, rflags::SF as i64)
            } else {
                let less = self.b.andi(less, rflags::SF as i64);
                let zero = self.b.andi(flags, rflags::ZF as i64);
                self.b.or(less, zero)
            }
        };
        self.non_zero(v)
    }
}
