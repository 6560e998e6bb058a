//! MMX: each instruction runs on the host's own MMX registers, between loading and storing the guest's.

use holdfast_tcg_ir::{Cond, Slot, Type};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::vec::{Blob, available, mmx_operand, op};
use super::{Size, Translator};
use crate::fpu::x87::what;
use crate::key::Key;
use crate::state::slot;
use crate::system::regs::vector;

/// Where the operands of the instruction are kept: memory of 8 or 16 bytes, and a general register.
const MEMORY: usize = 4;
const GENERAL: usize = 6;

impl Translator<'_> {
    /// MMX instructions.
    pub(super) fn mmx(&mut self, insn: &Instruction) -> bool {
        let emms = insn.mnemonic() == Mnemonic::Emms;
        if !emms && !mmx_operand(insn) || !available(insn.code()) {
            return false;
        }
        if self.key.contains(Key::EM) {
            self.raise(vector::UD, None);
            return true;
        }
        if self.key.contains(Key::TS) {
            self.raise(vector::NM, None);
            return true;
        }
        self.sync();
        let code = self.b.iconst(if emms { what::EMMS } else { what::WAIT } as i64);
        let zero = self.b.iconst(0);
        if emms {
            self.b.call(self.ids.fpu.x87_control, &[code, zero, zero]);
            return true;
        }
        // A pending x87 exception comes first.
        if !from_memory(insn) {
            let status = self.b.get(slot::X87_STATUS);
            let pending = self.b.andi(status, 0x80);
            self.raise_if((Cond::Ne, pending, zero), vector::MF, None);
        }
        if matches!(insn.mnemonic(), Mnemonic::Maskmovq) {
            return self.maskmovq(insn);
        }
        let fp = is_conversion(insn.mnemonic());
        self.mmx_run(insn, fp)
    }

    fn maskmovq(&mut self, insn: &Instruction) -> bool {
        self.enter_mmx(); // even if the store faults
        let at = self.mask_move_address(insn);
        let data = self.b.get(slot::mmx(insn.op1_register().number()));
        let mask = self.b.get(slot::mmx(insn.op2_register().number()));
        if self.key.contains(Key::ALIGN) {
            let low = self.b.andi(at, 7);
            let zero = self.b.iconst(0);
            self.raise_if((Cond::Ne, low, zero), vector::AC, Some(0));
        }
        self.b.call(self.ids.fpu.maskmovq, &[at, data, mask]);
        true
    }

    /// The x87 stack becomes MMX registers.
    fn enter_mmx(&mut self) {
        let zero = self.b.iconst(0);
        self.b.set(slot::X87_TOP, zero);
        let all = self.b.iconst(0xff);
        self.b.set(slot::X87_VALID, all);
    }

    fn mmx_run(&mut self, insn: &Instruction, fp: bool) -> bool {
        let mut run = *insn;
        run.set_segment_prefix(Register::None);
        let mut blob = Blob::default();
        let mut store = None;
        let mut to_memory = None;
        for n in 0..insn.op_count() {
            match insn.op_kind(n) {
                OpKind::Register => {
                    let r = insn.op_register(n);
                    let Some((host, slot)) = self.mmx_operand_in(&mut blob, r, n) else { return false };
                    run.set_op_register(n, host);
                    if n == 0 {
                        store = Some((r, host, slot));
                    }
                }
                OpKind::Memory => {
                    let size = insn.memory_size().size() as u32;
                    let memory = slot::scratch64(MEMORY);
                    let address = Blob::memory(memory);
                    run.set_memory_base(Register::RBP);
                    run.set_memory_index(Register::None);
                    run.set_memory_displacement64(address.displacement as u64);
                    run.set_memory_displ_size(1);
                    if n == 0 {
                        to_memory = Some(size);
                    } else {
                        self.mmx_memory_in(insn, size);
                    }
                }
                _ => {}
            }
        }
        blob.push(Ok(run));
        let mut writes: Vec<Slot> = Vec::new();
        if let Some((_, host, slot)) = store
            && writes_first(insn)
        {
            let code = if host.is_mm() {
                Code::Movq_mmm64_mm
            } else if host.is_xmm() {
                Code::Movups_xmmm128_xmm
            } else {
                Code::Mov_rm64_r64
            };
            let host = if host.is_gpr() { Register::RAX } else { host };
            blob.push(Instruction::with2(code, Blob::memory(slot), host));
            writes.push(slot);
        }
        if to_memory.is_some() {
            writes.push(slot::scratch64(MEMORY));
        }
        blob.push(Ok(Instruction::with(Code::Emms)));
        let Some(code) = blob.finish() else { return false };
        if fp {
            // Before any exception of the conversion.
            self.enter_unless_memory(insn);
        }
        self.convert(fp, &code, &writes);
        self.mmx_out(insn, store, to_memory);
        true
    }

    /// Conversions from memory leave the stack alone.
    fn enter_unless_memory(&mut self, insn: &Instruction) {
        if !from_memory(insn) {
            self.enter_mmx();
        }
    }

    /// Runs the code. With unmasked SIMD exceptions it runs on copies first, so that its results are there only if none
    /// is raised.
    fn convert(&mut self, fp: bool, code: &[u8], writes: &[Slot]) {
        if fp && self.key.contains(Key::SIMD_TRAPS) {
            let old: Vec<_> = writes.iter().map(|s| (*s, self.b.get(*s))).collect();
            self.trapping(true, |t| {
                t.b.host(code, writes);
                old.iter().for_each(|(s, v)| t.b.set(*s, *v));
            });
        }
        self.b.host(code, writes);
    }

    /// After the instruction: results that go elsewhere, and the state of the stack.
    fn mmx_out(
        &mut self,
        insn: &Instruction,
        store: Option<(Register, Register, Slot)>,
        to_memory: Option<u32>,
    ) {
        if let Some(size) = to_memory {
            let size = Size::of(size as usize);
            let value = self.b.get(slot::scratch64(MEMORY));
            let value = self.narrow(size, value);
            let at = self.address(insn, size.bytes(), true);
            self.store(size, at, value);
        }
        self.enter_unless_memory(insn);
        if let Some((r, _, slot)) = store
            && writes_first(insn)
        {
            if r.is_mm() {
                let ones = self.b.iconst(0xffff);
                self.b.set(slot::x87_exponent(r.number()), ones);
            } else if r.is_gpr() {
                let value = self.b.get(slot);
                let size = Size::of(r.size());
                let value = self.narrow(size, value);
                self.write_reg(r, value);
            } else {
                // An XMM register: in place.
                debug_assert!(r.is_xmm());
            }
        }
    }

    /// Loads a register operand in the code; gives the host's register and where the guest's is.
    fn mmx_operand_in(&mut self, blob: &mut Blob, r: Register, n: u32) -> Option<(Register, Slot)> {
        if r.is_mm() {
            let host = if n == 0 { Register::MM0 } else { Register::MM1 };
            let slot = slot::mmx(r.number());
            blob.push(Instruction::with2(Code::Movq_mm_mmm64, host, Blob::memory(slot)));
            Some((host, slot))
        } else if r.is_xmm() {
            let host = if n == 0 { Register::XMM0 } else { Register::XMM1 };
            let slot = slot::xmm(r.number());
            blob.load(host, slot);
            Some((host, slot))
        } else if r.is_gpr() {
            let value = self.gpr(r.number());
            let slot = slot::scratch64(GENERAL);
            self.b.set(slot, value);
            let (code, host) = (Code::Mov_r64_rm64, Register::RAX);
            blob.push(Instruction::with2(code, host, Blob::memory(slot)));
            Some((if r.size() == 8 { Register::RAX } else { Register::EAX }, slot))
        } else {
            None
        }
    }

    fn mmx_memory_in(&mut self, insn: &Instruction, size: u32) {
        if size == 16 {
            // Conversions from XMM, which want alignment.
            let at = self.address(insn, 16, false);
            let value = self.vload(at, 16, true)[0];
            let low = self.b.vec(op::MOVQ_OUT, false, Type::I64, &[value]);
            let high = self.v2(op::HIGH_HIGH, value, value);
            let high = self.b.vec(op::MOVQ_OUT, false, Type::I64, &[high]);
            self.b.set(slot::scratch64(MEMORY), low);
            self.b.set(slot::scratch64(MEMORY + 1), high);
            return;
        }
        let size = Size::of(size as usize);
        let at = self.address(insn, size.bytes(), false);
        let value = self.load(size, at);
        let value = self.to64(size, value);
        self.b.set(slot::scratch64(MEMORY), value);
    }
}

/// Conversions from memory, which have nothing to do with MMX registers.
fn from_memory(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Cvtpi2pd | Mnemonic::Cvtpi2ps) && insn.op1_kind() == OpKind::Memory
}

/// Whether operand 0 is written: in MMX all but those on memory do.
fn writes_first(insn: &Instruction) -> bool {
    insn.op0_kind() == OpKind::Register
}

fn is_conversion(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Cvtpi2ps | Cvtpi2pd | Cvtps2pi | Cvttps2pi | Cvtpd2pi | Cvttpd2pi)
}
