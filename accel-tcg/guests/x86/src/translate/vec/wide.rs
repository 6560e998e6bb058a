//! What moves data between the halves of 256-bit registers, and gathers.

use holdfast_tcg_ir::{Type, Val, VecForm, VecInsn};
use iced_x86::{Mnemonic, OpKind, Register};

use super::{Vector, op, template};
use crate::key::CodeSize;
use crate::state::slot;
use crate::translate::{Addr, Size, Translator};

pub(super) const NAMES: &[&str] = &[
    "broadcastss",
    "broadcastsd",
    "broadcastf128",
    "broadcasti128",
    "pbroadcastb",
    "pbroadcastw",
    "pbroadcastd",
    "pbroadcastq",
    "pmovsxbw",
    "pmovsxbd",
    "pmovsxbq",
    "pmovsxwd",
    "pmovsxwq",
    "pmovsxdq",
    "pmovzxbw",
    "pmovzxbd",
    "pmovzxbq",
    "pmovzxwd",
    "pmovzxwq",
    "pmovzxdq",
    "cvtdq2pd",
    "cvtps2pd",
    "cvtph2ps",
    "cvtpd2dq",
    "cvttpd2dq",
    "cvtpd2ps",
    "cvtps2ph",
    "extractf128",
    "extracti128",
    "insertf128",
    "inserti128",
    "perm2f128",
    "perm2i128",
    "permq",
    "permpd",
    "gatherdps",
    "gatherdpd",
    "gatherqps",
    "gatherqpd",
    "pgatherdd",
    "pgatherdq",
    "pgatherqd",
    "pgatherqq",
];

impl Translator<'_> {
    pub(super) fn vec_wide(&mut self, v: &Vector<'_>) -> bool {
        let name = v.name();
        match name {
            "broadcastss" | "pbroadcastd" => {
                let a = self.voperand(v, 1)[0];
                let r = self.v1_imm(op::PSHUFD, a, 0);
                self.set_result(v, [r, r]);
                true
            }
            "broadcastsd" | "pbroadcastq" => {
                let a = self.voperand(v, 1)[0];
                let r = self.v2(op::LOW_LOW, a, a);
                self.set_result(v, [r, r]);
                true
            }
            "broadcastf128" | "broadcasti128" => {
                let value = self.voperand(v, 1);
                self.set_result(v, value);
                true
            }
            "pbroadcastb" | "pbroadcastw" => {
                let a = self.voperand(v, 1)[0];
                let r = self.b.vec(template(v.insn, VecForm::Unary), false, Type::V128, &[a]);
                self.set_result(v, [r, r]);
                true
            }
            "cvtpd2dq" | "cvttpd2dq" | "cvtpd2ps" => self.narrowing(v),
            "cvtps2ph" => self.convert_to_half(v),
            "extractf128" | "extracti128" => self.extract_half(v),
            "insertf128" | "inserti128" => {
                let mut value = self.voperand(v, 1);
                value[usize::from(v.insn.immediate8() & 1)] = self.voperand(v, 2)[0];
                self.set_result(v, value);
                true
            }
            "perm2f128" | "perm2i128" => self.permute_halves(v),
            "permq" | "permpd" => self.permute_quads(v),
            _ if name.contains("gather") => self.gather(v),
            _ => self.widening(v),
        }
    }

    /// Elements get larger: the upper half of the result comes from further up in the source.
    fn widening(&mut self, v: &Vector<'_>) -> bool {
        let a = self.voperand(v, 1)[0];
        let t = template(v.insn, VecForm::Unary);
        let fp = v.entry.fp;
        let down = match v.m {
            Mnemonic::Vpmovsxbd | Mnemonic::Vpmovsxwq | Mnemonic::Vpmovzxbd | Mnemonic::Vpmovzxwq => 4,
            Mnemonic::Vpmovsxbq | Mnemonic::Vpmovzxbq => 2,
            _ => 8,
        };
        let value = self.trapping(fp, |s| {
            let low = s.b.vec(t, fp, Type::V128, &[a]);
            if !v.wide {
                return [low, low];
            }
            let upper = s.v1_imm(op::SHIFT_DOWN, a, down);
            [low, s.b.vec(t, fp, Type::V128, &[upper])]
        });
        self.set_result(v, value);
        true
    }

    /// `cvtpd2ps`, `cvtpd2dq`, `cvttpd2dq`: two elements of each half.
    fn narrowing(&mut self, v: &Vector<'_>) -> bool {
        let a = self.voperand(v, 1);
        let source_wide = v.insn.op1_register().is_ymm() || v.insn.memory_size().size() == 32;
        let t = template(v.insn, VecForm::Unary);
        let r = self.trapping(true, |s| {
            let low = s.b.vec(t, true, Type::V128, &[a[0]]);
            if !source_wide {
                return low;
            }
            let high = s.b.vec(t, true, Type::V128, &[a[1]]);
            s.v2(op::LOW_LOW, low, high)
        });
        self.set_result(v, [r, r]);
        true
    }

    /// `vcvtps2ph`
    fn convert_to_half(&mut self, v: &Vector<'_>) -> bool {
        let a = self.vreg(v.insn.op1_register());
        let wide = v.insn.op1_register().is_ymm();
        let t = VecInsn { imm: Some(v.insn.immediate8()), ..template(v.insn, VecForm::Extract) };
        if v.insn.op0_kind() == OpKind::Memory {
            // A store that faults leaves the sticky flags.
            let at = self.vaddr(v.insn, if wide { 16 } else { 8 }, (true, false));
            self.load_for_update(Size::B8, at);
            if wide {
                self.load_for_update(Size::B8, Addr { disp: at.disp + 8, ..at });
            }
        }
        let convert = |s: &mut Self| {
            let low = s.b.vec(t, true, Type::V128, &[a[0]]);
            if !wide {
                return low;
            }
            let high = s.b.vec(t, true, Type::V128, &[a[1]]);
            s.v2(op::LOW_LOW, low, high)
        };
        let r = self.trapping_twice(true, convert, |s, again| {
            s.b.set(slot::scratch(4), again);
            let lanes = s.b.iconst(if wide { 0xff } else { 0xf });
            s.tiny_halves(0, lanes);
        });
        if v.insn.op0_kind() == OpKind::Memory {
            let (bytes, log2) = if wide { (16, 4) } else { (8, 3) };
            let at = self.vaddr(v.insn, bytes, (true, false));
            self.b.store(self.vmem(log2, false), at.base, at.disp, r);
        } else {
            self.set_result(v, [r, r]);
        }
        true
    }

    fn extract_half(&mut self, v: &Vector<'_>) -> bool {
        let value = self.vreg(v.insn.op1_register())[usize::from(v.insn.immediate8() & 1)];
        if v.insn.op0_kind() == OpKind::Memory {
            let at = self.vaddr(v.insn, 16, (true, false));
            self.b.store(self.vmem(4, false), at.base, at.disp, value);
        } else {
            self.set_result(v, [value, value]);
        }
        true
    }

    /// `vperm2f128`
    fn permute_halves(&mut self, v: &Vector<'_>) -> bool {
        let (a, b) = (self.voperand(v, 1), self.voperand(v, 2));
        let imm = v.insn.immediate8();
        let zero = self.zero();
        let pick = |n: u8| if n & 8 != 0 { zero } else { [a[0], a[1], b[0], b[1]][usize::from(n & 3)] };
        self.set_result(v, [pick(imm), pick(imm >> 4)]);
        true
    }

    /// `vpermq`, `vpermpd`
    fn permute_quads(&mut self, v: &Vector<'_>) -> bool {
        let a = self.voperand(v, 1);
        let imm = v.insn.immediate8();
        let pair = |s: &mut Self, n: u8| {
            let (x, y) = (n & 3, n >> 2 & 3);
            let t = VecInsn { imm: Some(x & 1 | (y & 1) << 1), ..op::SHUFPD };
            s.v2(t, a[usize::from(x >> 1)], a[usize::from(y >> 1)])
        };
        let low = pair(self, imm);
        let high = pair(self, imm >> 4);
        self.set_result(v, [low, high]);
        true
    }

    /// Gathers: by a helper, which clears the mask element by element, so that a fault can be restarted.
    fn gather(&mut self, v: &Vector<'_>) -> bool {
        let (dest, mask) = (v.insn.op0_register(), v.insn.op2_register());
        let index = v.insn.memory_index();
        let numbers = [dest.number(), index.number(), mask.number()];
        let same = numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2];
        if same {
            return false;
        }
        self.sync();
        // Without the index: see `Translator::effective`.
        let at = self.address(v.insn, 8, false);
        let at: Val = self.whole(at);
        let name = v.name();
        let wide_index = name.contains("gatherq");
        let wide_element = v.m == Mnemonic::Vpgatherdq
            || v.m == Mnemonic::Vpgatherqq
            || v.m == Mnemonic::Vgatherdpd
            || v.m == Mnemonic::Vgatherqpd;
        let bytes = if dest.is_ymm() || index.is_ymm() { 32 } else { 16 };
        let (es, is) = (if wide_element { 8 } else { 4 }, if wide_index { 8 } else { 4 });
        let count = bytes / es.max(is);
        let base = v.insn.memory_base();
        let narrow = self.size != CodeSize::Bits64
            || if base == Register::None { v.insn.memory_displ_size() == 4 } else { base.size() == 4 };
        let how = self.b.iconst(
            numbers[0] as i64
                | (numbers[1] as i64) << 4
                | (numbers[2] as i64) << 8
                | i64::from(wide_index) << 12
                | i64::from(wide_element) << 13
                | i64::from(v.insn.memory_index_scale().trailing_zeros()) << 14
                | i64::from(narrow) << 16
                | i64::from(count) << 17,
        );
        self.b.call(self.ids.fpu.gather, &[at, how]);
        true
    }
}
