//! x87 instructions: by helpers that run them on the host's unit.

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register};

use super::{Size, Translator};
use crate::fpu::area::kind;
use crate::fpu::x87::what;
use crate::key::{CodeSize, Key};
use crate::system::regs::vector;

impl Translator<'_> {
    /// x87 instructions, and those that save and restore the units' state.
    pub(super) fn x87(&mut self, insn: &Instruction) -> bool {
        if let Some(kind) = area_kind(insn.code()) {
            return self.save_area(insn, kind);
        }
        if insn.mnemonic() == Mnemonic::Wait {
            if self.key.contains(Key::MP | Key::TS) {
                self.raise(vector::NM, None);
            } else {
                self.x87_control(insn, what::WAIT);
            }
            return true;
        }
        let info = insn.code().op_code();
        // D8 to DF, alone or with a second byte.
        let first = if info.op_code_len() == 2 { info.op_code() >> 8 } else { info.op_code() };
        let is_x87 = info.table() == iced_x86::OpCodeTableKind::Normal && (0xd8..=0xdf).contains(&first);
        if !is_x87 || info.encoding() != iced_x86::EncodingKind::Legacy {
            return false;
        }
        if self.key.intersects(Key::EM | Key::TS) {
            self.raise(vector::NM, None);
            return true;
        }
        if let Some(what) = control(insn.code()) {
            self.x87_control(insn, what);
            return true;
        }
        self.x87_run(insn, first as u8);
        true
    }

    fn x87_run(&mut self, insn: &Instruction, first: u8) {
        let info = insn.code().op_code();
        let memory = (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory);
        let second = if info.op_code_len() == 2 {
            let st = (0..insn.op_count())
                .find(|n| info.op_kinds().get(*n as usize) == Some(&OpCodeOperandKind::sti_opcode))
                .map_or(0, |n| insn.op_register(n).number() as u32);
            (info.op_code() & 0xff) + st
        } else {
            (info.group_index().max(0) as u32) << 3
        };
        let (mut va, mut offset) = (self.b.iconst(0), self.b.iconst(0));
        if memory {
            if self.size != CodeSize::Bits64 && !self.flat_operand(insn) {
                // A pending exception comes before one of the segment.
                self.sync();
                let args = [self.b.iconst(what::WAIT as i64), va, offset];
                self.b.call(self.ids.fpu.x87_control, &args);
            }
            let bytes = insn.memory_size().size() as u32;
            let store = matches!(insn.op0_kind(), OpKind::Memory) && stores(insn.mnemonic());
            offset = self.offset(insn);
            let at = self.address(insn, bytes, store);
            va = self.whole(at);
        }
        let conditional = is_cmov(insn.mnemonic());
        let compare = is_comi(insn.mnemonic());
        let flags = if conditional { self.flags() } else { self.b.iconst(0) };
        self.sync();
        let what = self.b.iconst(i64::from(first) << 8 | i64::from(second));
        let flags = self.b.call(self.ids.fpu.x87, &[what, va, offset, flags]);
        if compare {
            self.set_flags(flags);
        }
    }

    /// Whether the memory operand is in a segment that is not checked.
    fn flat_operand(&self, insn: &Instruction) -> bool {
        let checked = matches!(insn.segment_prefix(), Register::CS | Register::FS | Register::GS);
        self.key.contains(Key::DATA_FLAT) && !checked
    }

    fn x87_control(&mut self, insn: &Instruction, what: u64) {
        let mut va = self.b.iconst(0);
        let short = insn.memory_size().size();
        let short = matches!(short, 14 | 94);
        if (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory) {
            let store =
                matches!(what, what::STORE_CONTROL | what::STORE_STATUS | what::STORE_ENV | what::SAVE);
            let at = self.address(insn, insn.memory_size().size() as u32, store);
            va = self.whole(at);
        }
        self.sync();
        let code = self.b.iconst((what | if short { what::SHORT } else { 0 }) as i64);
        let zero = self.b.iconst(0);
        let result = self.b.call(self.ids.fpu.x87_control, &[code, va, zero]);
        if what == what::STATUS {
            let low = self.b.trunc(result);
            self.set_gpr_low(0, Size::B2, low);
        }
    }

    fn save_area(&mut self, insn: &Instruction, kind: u64) -> bool {
        let xsave = kind & 0xff > kind::FXRSTOR;
        // CR4.OSXSAVE is not in the key: the helper asks.
        if !xsave && self.key.contains(Key::EM) {
            self.raise(vector::NM, None);
            return true;
        }
        if self.key.contains(Key::TS) {
            self.raise(vector::NM, None);
            return true;
        }
        if matches!(kind & 0xff, kind::XSAVES | kind::XRSTORS) && self.key.cpl() != 0 {
            self.raise(vector::GP, Some(0));
            return true;
        }
        let store = !matches!(kind & 0xff, kind::FXRSTOR | kind::XRSTOR | kind::XRSTORS);
        let at = self.address(insn, if xsave { 576 } else { 512 }, store);
        let va = self.whole(at);
        self.sync();
        let long = if self.size == CodeSize::Bits64 { kind::LONG } else { 0 };
        let code = self.b.iconst((kind | long) as i64);
        self.b.call(self.ids.fpu.area, &[code, va]);
        true
    }
}

/// The kind of a state-saving instruction.
fn area_kind(code: Code) -> Option<u64> {
    Some(match code {
        Code::Fxsave_m512byte => kind::FXSAVE,
        Code::Fxsave64_m512byte => kind::FXSAVE | kind::WIDE,
        Code::Fxrstor_m512byte => kind::FXRSTOR,
        Code::Fxrstor64_m512byte => kind::FXRSTOR | kind::WIDE,
        Code::Xsave_mem => kind::XSAVE,
        Code::Xsave64_mem => kind::XSAVE | kind::WIDE,
        Code::Xsaveopt_mem => kind::XSAVEOPT,
        Code::Xsaveopt64_mem => kind::XSAVEOPT | kind::WIDE,
        Code::Xsavec_mem => kind::XSAVEC,
        Code::Xsavec64_mem => kind::XSAVEC | kind::WIDE,
        Code::Xsaves_mem => kind::XSAVES,
        Code::Xsaves64_mem => kind::XSAVES | kind::WIDE,
        Code::Xrstor_mem => kind::XRSTOR,
        Code::Xrstor64_mem => kind::XRSTOR | kind::WIDE,
        Code::Xrstors_mem => kind::XRSTORS,
        Code::Xrstors64_mem => kind::XRSTORS | kind::WIDE,
        _ => return None,
    })
}

/// What a control instruction does.
fn control(code: Code) -> Option<u64> {
    Some(match code {
        Code::Fninit | Code::Finit => what::INIT,
        Code::Fnclex | Code::Fclex => what::CLEAR,
        Code::Fldcw_m2byte => what::LOAD_CONTROL,
        Code::Fnstcw_m2byte | Code::Fstcw_m2byte => what::STORE_CONTROL,
        Code::Fnstsw_m2byte | Code::Fstsw_m2byte => what::STORE_STATUS,
        Code::Fnstsw_AX | Code::Fstsw_AX => what::STATUS,
        Code::Fldenv_m14byte | Code::Fldenv_m28byte => what::LOAD_ENV,
        Code::Fnstenv_m14byte | Code::Fnstenv_m28byte => what::STORE_ENV,
        Code::Frstor_m94byte | Code::Frstor_m108byte => what::RESTORE,
        Code::Fnsave_m94byte | Code::Fnsave_m108byte => what::SAVE,
        // Of the 8087 and 80287: no operations since.
        Code::Fneni | Code::Fndisi | Code::Fnsetpm => what::NOTHING,
        _ => return None,
    })
}

fn stores(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Fst | Fstp | Fist | Fistp | Fisttp | Fbstp)
}

fn is_cmov(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Fcmovb | Fcmove | Fcmovbe | Fcmovu | Fcmovnb | Fcmovne | Fcmovnbe | Fcmovnu)
}

fn is_comi(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Fcomi | Fcomip | Fucomi | Fucomip)
}
