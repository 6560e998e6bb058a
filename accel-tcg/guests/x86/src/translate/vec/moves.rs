//! Moves, and what goes between vector and general registers.

use holdfast_tcg_ir::{Cond, Label, Type, Val, VecForm, VecInsn};
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::{Vector, op, raw, template};
use crate::state::slot;
use crate::translate::{Addr, Size, Translator};

pub(super) const NAMES: &[&str] = &[
    "movss",
    "movsd",
    "movq",
    "movd",
    "movlps",
    "movlpd",
    "movhps",
    "movhpd",
    "movhlps",
    "movlhps",
    "movddup",
    "pextrb",
    "pextrw",
    "pextrd",
    "pextrq",
    "extractps",
    "pinsrb",
    "pinsrw",
    "pinsrd",
    "pinsrq",
    "cvtsi2ss",
    "cvtsi2sd",
    "cvtss2si",
    "cvttss2si",
    "cvtsd2si",
    "cvttsd2si",
    "movmskps",
    "movmskpd",
    "pmovmskb",
    "comiss",
    "comisd",
    "ucomiss",
    "ucomisd",
    "ptest",
    "testps",
    "testpd",
    "maskmovdqu",
    "maskmovps",
    "maskmovpd",
    "pmaskmovd",
    "pmaskmovq",
    "zeroupper",
    "zeroall",
];

/// A store of 32 or 64 bytes that crosses a page, out of line: nothing may be stored if either page faults.
pub(in crate::translate) struct Crossing {
    pub label: Label,
    insn: Instruction,
    pc: u64,
}

/// Vector instructions that may have no vector register as an operand.
pub(super) fn vectorless(m: Mnemonic) -> bool {
    use Mnemonic::*;
    let to_int = matches!(
        m,
        Cvtss2si | Cvttss2si | Cvtsd2si | Cvttsd2si | Vcvtss2si | Vcvttss2si | Vcvtsd2si | Vcvttsd2si
    );
    to_int || matches!(m, Vzeroupper | Vzeroall)
}

impl Translator<'_> {
    /// A move of a whole register.
    pub(super) fn whole_move(&mut self, v: &Vector<'_>) -> bool {
        let bytes = if v.wide { 32 } else { 16 };
        let aligned = !matches!(
            v.m,
            Mnemonic::Movups
                | Mnemonic::Movupd
                | Mnemonic::Movdqu
                | Mnemonic::Lddqu
                | Mnemonic::Vmovups
                | Mnemonic::Vmovupd
                | Mnemonic::Vmovdqu
                | Mnemonic::Vlddqu
        );
        if v.insn.op0_kind() == OpKind::Memory {
            let value = self.vreg(v.insn.op1_register());
            self.store_whole(v, value, (bytes, aligned));
        } else if v.insn.op1_kind() == OpKind::Memory {
            let at = self.vaddr(v.insn, bytes, (false, aligned));
            let value = self.vload(at, bytes, aligned && bytes == 16);
            self.set_result(v, value);
        } else {
            let value = self.vreg(v.insn.op1_register());
            self.set_result(v, value);
        }
        true
    }

    pub(super) fn store_whole(&mut self, v: &Vector<'_>, value: [Val; 2], (bytes, aligned): (u32, bool)) {
        let at = self.vaddr(v.insn, bytes, (true, aligned));
        let mem = self.vmem(4, aligned && bytes == 16);
        if bytes == 32 {
            if !aligned && !self.stays_on_page(v.insn, at, 32) {
                return;
            }
            let (base, disp) = match at.disp.checked_add(16) {
                Some(_) => (at.base, at.disp),
                None => (self.whole(at), 0),
            };
            self.b.store(mem, base, disp, value[0]);
            self.b.store(mem, base, disp + 16, value[1]);
        } else {
            self.b.store(mem, at.base, at.disp, value[0]);
        }
    }

    /// Goes out of line if `bytes` at `at`, where `insn` stores, cross a page. False if they are known to: then they have been stored.
    pub(super) fn stays_on_page(&mut self, insn: &Instruction, at: Addr, bytes: u32) -> bool {
        self.sync();
        let va = self.whole(at);
        let offset = self.b.andi(va, 0xfff);
        let last = self.b.iconst(0x1000 - i64::from(bytes));
        match self.b.known_cond(Cond::GtU, offset, last) {
            Some(false) => {}
            Some(true) => {
                self.store_across(insn);
                return false;
            }
            None => {
                let label = self.b.label();
                self.b.brcond(Cond::GtU, offset, last, label);
                self.crossing.push(Crossing { label, insn: *insn, pc: self.pc });
            }
        }
        true
    }

    /// The store that a branch of [`Translator::stays_on_page`] goes to.
    pub(in crate::translate) fn cross(&mut self, store: &Crossing) {
        self.pc = store.pc;
        self.b.insn(store.pc, store.insn.len() as u32);
        self.store_across(&store.insn);
        self.goto(store.pc.wrapping_add(store.insn.len() as u64));
    }

    /// Stores across a page, all or nothing.
    fn store_across(&mut self, insn: &Instruction) {
        if insn.code().encoding() == EncodingKind::EVEX {
            return self.evex_store_crossing(insn);
        }
        let at = self.address(insn, 32, true);
        let va = self.whole(at);
        let register = self.b.iconst(insn.op1_register().number() as i64);
        self.b.call(self.ids.fpu.store_wide, &[va, register]);
    }

    /// Stores the low `1 << log2` (4 or 8) bytes to the memory operand.
    fn store_low(&mut self, v: &Vector<'_>, log2: u16, value: Val) {
        let at = self.address(v.insn, 1 << log2, true);
        self.b.store(self.vmem(log2, false), at.base, at.disp, value);
    }

    fn load_low(&mut self, v: &Vector<'_>, log2: u16) -> Val {
        let at = self.address(v.insn, 1 << log2, false);
        self.b.load(Type::V128, self.vmem(log2, false), at.base, at.disp)
    }

    /// Sets register operand 0 to 128 bits.
    fn set_low(&mut self, v: &Vector<'_>, value: Val) {
        self.set_result(v, [value, value]);
    }

    pub(super) fn vec_moves(&mut self, v: &Vector<'_>) -> bool {
        match v.name() {
            "movss" => self.scalar_move(v, 2),
            "movsd" => self.scalar_move(v, 3),
            "movq" | "movd" => self.movq(v),
            "movlps" | "movlpd" => self.half_move(v, false),
            "movhps" | "movhpd" => self.half_move(v, true),
            "movhlps" => {
                let (a, b) = self.two(v);
                let r = self.v2(op::HIGH_HIGH, b, a);
                self.set_low(v, r);
                true
            }
            "movlhps" => {
                let (a, b) = self.two(v);
                let r = self.v2(op::LOW_LOW, a, b);
                self.set_low(v, r);
                true
            }
            "movddup" => self.movddup(v),
            "pextrb" => self.extract(v, Size::B1),
            "pextrw" => self.extract(v, Size::B2),
            "pextrd" | "extractps" => self.extract(v, Size::B4),
            "pextrq" => self.extract(v, Size::B8),
            "pinsrb" => self.insert(v, Size::B1),
            "pinsrw" => self.insert(v, Size::B2),
            "pinsrd" => self.insert(v, Size::B4),
            "pinsrq" => self.insert(v, Size::B8),
            "cvtsi2ss" | "cvtsi2sd" => self.convert_from_int(v),
            "cvtss2si" | "cvttss2si" | "cvtsd2si" | "cvttsd2si" => self.convert_to_int(v),
            "movmskps" => self.mask_bits(v, 4),
            "movmskpd" => self.mask_bits(v, 2),
            "pmovmskb" => self.mask_bits(v, 16),
            "comiss" | "comisd" | "ucomiss" | "ucomisd" | "ptest" | "testps" | "testpd" => self.compare(v),
            "zeroupper" => {
                (0..self.vector_count()).for_each(|n| self.zero_high(n));
                true
            }
            "zeroall" => {
                for n in 0..self.vector_count() {
                    let zero = self.zero();
                    self.b.set(slot::xmm(n), zero);
                    self.zero_high(n);
                }
                true
            }
            "maskmovdqu" | "maskmovps" | "maskmovpd" | "pmaskmovd" | "pmaskmovq" => self.mask_move(v),
            _ => false,
        }
    }

    /// Vector registers of the mode.
    pub(super) fn vector_count(&self) -> usize {
        if self.size == crate::key::CodeSize::Bits64 { 16 } else { 8 }
    }

    /// The sources of a two-operand instruction: the destination is the first of the legacy form's.
    fn two(&mut self, v: &Vector<'_>) -> (Val, Val) {
        let first = u32::from(v.vex);
        (self.voperand(v, first)[0], self.voperand(v, first + 1)[0])
    }

    /// `movss`, `movsd`
    fn scalar_move(&mut self, v: &Vector<'_>, log2: u16) -> bool {
        if v.insn.op0_kind() == OpKind::Memory {
            let value = self.vreg(v.insn.op1_register())[0];
            self.store_low(v, log2, value);
        } else if v.insn.op_count() == 2 && v.insn.op1_kind() == OpKind::Memory {
            let value = self.load_low(v, log2);
            self.set_low(v, value);
        } else {
            let (a, b) = self.two(v);
            let t = raw(VecForm::Merge, if log2 == 2 { 2 } else { 3 }, 1, 0x10);
            let r = self.v2(t, a, b);
            self.set_low(v, r);
        }
        true
    }

    /// `movq` and `movd` in all directions but MMX.
    fn movq(&mut self, v: &Vector<'_>) -> bool {
        let is_vector = |n: u32| v.insn.op_kind(n) == OpKind::Register && v.insn.op_register(n).is_xmm();
        let wide = v.m == Mnemonic::Movq || v.m == Mnemonic::Vmovq;
        let log2 = if wide { 3 } else { 2 };
        let memory = |n: u32| v.insn.op_kind(n) == OpKind::Memory;
        if is_vector(0) && is_vector(1) {
            let value = self.vreg(v.insn.op1_register())[0];
            let value = self.b.vec(raw(VecForm::Unary, 2, 1, 0x7e), false, Type::V128, &[value]);
            self.set_low(v, value);
        } else if memory(0) {
            let value = self.vreg(v.insn.op1_register())[0];
            self.store_low(v, log2, value);
        } else if memory(1) {
            let value = self.load_low(v, log2);
            self.set_low(v, value);
        } else if is_vector(0) {
            let i = self.read_reg(v.insn.op1_register());
            let value = self.b.vec(VecInsn { w: wide, ..op::MOVD }, false, Type::V128, &[i]);
            self.set_low(v, value);
        } else {
            let value = self.vreg(v.insn.op1_register())[0];
            let ty = if wide { Type::I64 } else { Type::I32 };
            let i = self.b.vec(VecInsn { w: wide, ..op::MOVD_OUT }, false, ty, &[value]);
            self.write_reg(v.insn.op0_register(), i);
        }
        true
    }

    /// `movlps`, `movhps` and the like, from and to memory.
    fn half_move(&mut self, v: &Vector<'_>, high: bool) -> bool {
        if v.insn.op0_kind() == OpKind::Memory {
            let mut value = self.vreg(v.insn.op1_register())[0];
            if high {
                value = self.v2(op::HIGH_HIGH, value, value);
            }
            self.store_low(v, 3, value);
        } else {
            let (a, b) = self.two(v);
            let r = if high { self.v2(op::LOW_LOW, a, b) } else { self.v2(op::MERGE64, a, b) };
            self.set_low(v, r);
        }
        true
    }

    fn movddup(&mut self, v: &Vector<'_>) -> bool {
        let [low, high] = self.voperand(v, 1);
        let low = self.v2(op::LOW_LOW, low, low);
        let high = if v.wide { self.v2(op::LOW_LOW, high, high) } else { low };
        self.set_result(v, [low, high]);
        true
    }

    fn extract(&mut self, v: &Vector<'_>, size: Size) -> bool {
        let value = self.vreg(v.insn.op1_register())[0];
        let imm = Some(v.insn.immediate8());
        let wide = size == Size::B8;
        // pextrw has an older form that takes its operands the other way.
        let opcode = match size {
            Size::B1 => raw(VecForm::Extract, 1, 3, 0x14),
            Size::B2 => raw(VecForm::Unary, 1, 1, 0xc5),
            Size::B4 | Size::B8 => raw(VecForm::Extract, 1, 3, 0x16),
        };
        let ty = if wide { Type::I64 } else { Type::I32 };
        let i = self.b.vec(VecInsn { imm, w: wide, ..opcode }, false, ty, &[value]);
        if v.insn.op0_kind() == OpKind::Memory {
            let at = self.address(v.insn, size.bytes(), true);
            self.store(size, at, i);
        } else {
            self.set_gpr_low(v.insn.op0_register().number(), if wide { Size::B8 } else { Size::B4 }, i);
        }
        true
    }

    fn insert(&mut self, v: &Vector<'_>, size: Size) -> bool {
        let first = u32::from(v.vex);
        let a = self.vreg(v.insn.op_register(first))[0];
        let b = if v.insn.op_kind(first + 1) == OpKind::Register {
            let n = v.insn.op_register(first + 1).number();
            self.gpr_low(n, if size == Size::B8 { Size::B8 } else { Size::B4 })
        } else {
            let at = self.address(v.insn, size.bytes(), false);
            self.load(size, at)
        };
        let t = match size {
            Size::B1 => raw(VecForm::Binary, 1, 3, 0x20),
            Size::B2 => raw(VecForm::Binary, 1, 1, 0xc4),
            Size::B4 | Size::B8 => raw(VecForm::Binary, 1, 3, 0x22),
        };
        let t = VecInsn { imm: Some(v.insn.immediate8()), w: size == Size::B8, ..t };
        let r = self.v2(t, a, b);
        self.set_low(v, r);
        true
    }

    fn convert_from_int(&mut self, v: &Vector<'_>) -> bool {
        let first = u32::from(v.vex);
        let a = self.vreg(v.insn.op_register(first))[0];
        let size = self.op_size(v.insn, first + 1);
        let i = self.read_op(v.insn, first + 1, size);
        let t = VecInsn { w: size == Size::B8, ..template(v.insn, VecForm::Binary) };
        let r = self.trapping(true, |s| s.b.vec(t, true, Type::V128, &[a, i]));
        self.set_low(v, r);
        true
    }

    fn convert_to_int(&mut self, v: &Vector<'_>) -> bool {
        let a = self.voperand(v, 1)[0];
        let size = self.op_size(v.insn, 0);
        let t = VecInsn { w: size == Size::B8, ..template(v.insn, VecForm::Unary) };
        let i = self.trapping(true, |s| s.b.vec(t, true, size.ty(), &[a]));
        self.write_reg(v.insn.op0_register(), i);
        true
    }

    /// `movmskps` and the like: `lanes` bits for each half.
    fn mask_bits(&mut self, v: &Vector<'_>, lanes: i64) -> bool {
        let [low, high] = self.vreg(v.insn.op1_register());
        let t = template(v.insn, VecForm::Unary);
        let mut bits = self.b.vec(t, false, Type::I32, &[low]);
        if v.insn.op1_register().is_ymm() {
            let more = self.b.vec(t, false, Type::I32, &[high]);
            let more = self.b.shli(more, lanes);
            bits = self.b.or(bits, more);
        }
        self.set_gpr_low(v.insn.op0_register().number(), Size::B4, bits);
        true
    }

    /// Comparisons that give flags.
    fn compare(&mut self, v: &Vector<'_>) -> bool {
        let (a, b) = (self.voperand(v, 0), self.voperand(v, 1));
        let t = template(v.insn, VecForm::Flags);
        let fp = v.entry.fp;
        let flags = self.trapping(fp, |s| {
            let flags = s.b.vec(t, fp, Type::I64, &[a[0], b[0]]);
            if !v.wide {
                return flags;
            }
            // ZF and CF say that all elements are so.
            let high = s.b.vec(t, fp, Type::I64, &[a[1], b[1]]);
            s.b.and(flags, high)
        });
        self.set_flags(flags);
        true
    }

    /// Loads and stores under a mask, element by element.
    fn mask_move(&mut self, v: &Vector<'_>) -> bool {
        let wide_element = matches!(v.m, Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq);
        self.sync();
        if matches!(v.m, Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu) {
            let at = self.mask_move_address(v.insn);
            let how = self
                .b
                .iconst(v.insn.op1_register().number() as i64 | (v.insn.op2_register().number() as i64) << 8);
            self.b.call(self.ids.fpu.maskmovdqu, &[at, how]);
            return true;
        }
        let store = v.insn.op0_kind() == OpKind::Memory;
        // Segments are checked, and addresses wrap, element by element.
        let segment = crate::translate::operand::segment(v.insn.memory_segment());
        let address = self.address_bits(v.insn) / 32;
        let at = self.offset(v.insn);
        let (data, mask) = if store {
            (v.insn.op2_register(), v.insn.op1_register())
        } else {
            (v.insn.op0_register(), v.insn.op1_register())
        };
        let how = self.b.iconst(
            data.number() as i64
                | (mask.number() as i64) << 8
                | i64::from(wide_element) << 16
                | i64::from(v.wide) << 17
                | (segment as i64) << 20
                | i64::from(address) << 24,
        );
        if store {
            self.b.call(self.ids.fpu.mask_store, &[at, how]);
        } else {
            self.b.call(self.ids.fpu.mask_load, &[at, how]);
        }
        true
    }

    /// Linear address of DS:rDI (the segment may be overridden).
    pub(in crate::translate) fn mask_move_address(&mut self, insn: &Instruction) -> Val {
        let kind = insn.op0_kind();
        let di = self.gpr(Register::RDI.number());
        let offset = match kind {
            OpKind::MemorySegRDI => di,
            OpKind::MemorySegEDI => self.wrap32(di),
            _ => self.b.andi(di, 0xffff),
        };
        let s = crate::translate::operand::segment(insn.memory_segment());
        let at = self.linear(s, Addr { base: offset, disp: 0 }, 16, true);
        self.whole(at)
    }
}
