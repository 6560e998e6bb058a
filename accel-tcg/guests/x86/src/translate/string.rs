//! String instructions. Single ones are done in line; a helper does the repeated ones in runs.

use holdfast_tcg_ir::Val;
use iced_x86::{Code, Instruction, OpKind};

use super::{Addr, Size, Translator};
use crate::flags::Kind;
use crate::helpers::string::{How, What};
use crate::key::Key;
use crate::state::{seg, slot};

const RAX: usize = 0;
const RSI: usize = 6;
const RDI: usize = 7;

/// What a string instruction does, with which size.
fn what(code: Code) -> Option<(What, Size)> {
    use Code::*;
    Some(match code {
        Movsb_m8_m8 => (What::Movs, Size::B1),
        Movsw_m16_m16 => (What::Movs, Size::B2),
        Movsd_m32_m32 => (What::Movs, Size::B4),
        Movsq_m64_m64 => (What::Movs, Size::B8),
        Stosb_m8_AL => (What::Stos, Size::B1),
        Stosw_m16_AX => (What::Stos, Size::B2),
        Stosd_m32_EAX => (What::Stos, Size::B4),
        Stosq_m64_RAX => (What::Stos, Size::B8),
        Lodsb_AL_m8 => (What::Lods, Size::B1),
        Lodsw_AX_m16 => (What::Lods, Size::B2),
        Lodsd_EAX_m32 => (What::Lods, Size::B4),
        Lodsq_RAX_m64 => (What::Lods, Size::B8),
        Cmpsb_m8_m8 => (What::Cmps, Size::B1),
        Cmpsw_m16_m16 => (What::Cmps, Size::B2),
        Cmpsd_m32_m32 => (What::Cmps, Size::B4),
        Cmpsq_m64_m64 => (What::Cmps, Size::B8),
        Scasb_AL_m8 => (What::Scas, Size::B1),
        Scasw_AX_m16 => (What::Scas, Size::B2),
        Scasd_EAX_m32 => (What::Scas, Size::B4),
        Scasq_RAX_m64 => (What::Scas, Size::B8),
        _ => return None,
    })
}

impl Translator<'_> {
    pub(super) fn string(&mut self, insn: &Instruction) -> bool {
        let Some((what, size)) = what(insn.code()) else { return false };
        let address = string_address_size(insn);
        if insn.has_rep_prefix() || insn.has_repne_prefix() {
            let how = How {
                what,
                log2: size as u8,
                address_log2: address as u8,
                segment: super::operand::segment(insn.memory_segment()) as u8,
                until_equal: insn.has_repne_prefix(),
                mmu_idx: self.key.mmu_idx(),
                single: self.key.contains(Key::STEP),
                align: self.key.contains(Key::ALIGN),
            };
            let how = self.b.iconst(how.pack() as i64);
            let next = self.b.iconst(self.next as i64);
            self.call_system(self.ids.int.string, &[how, next]);
            return true;
        }
        let source = super::operand::segment(insn.memory_segment());
        match what {
            What::Movs => {
                let from = self.string_at(RSI, source, address, size, false);
                let v = self.load(size, from);
                let to = self.string_at(RDI, seg::ES, address, size, true);
                self.store(size, to, v);
                self.advance(&[RSI, RDI], address, size);
            }
            What::Stos => {
                let v = self.gpr_low(RAX, size);
                let to = self.string_at(RDI, seg::ES, address, size, true);
                self.store(size, to, v);
                self.advance(&[RDI], address, size);
            }
            What::Lods => {
                let from = self.string_at(RSI, source, address, size, false);
                let v = self.load(size, from);
                self.set_gpr_low(RAX, size, v);
                self.advance(&[RSI], address, size);
            }
            What::Cmps => {
                // Processors read what RDI points to first.
                let second = self.string_at(RDI, seg::ES, address, size, false);
                let b = self.load(size, second);
                let first = self.string_at(RSI, source, address, size, false);
                let a = self.load(size, first);
                self.set_cc(Kind::Cmp, size, a, b);
                self.advance(&[RSI, RDI], address, size);
            }
            What::Scas => {
                let a = self.gpr_low(RAX, size);
                let at = self.string_at(RDI, seg::ES, address, size, false);
                let b = self.load(size, at);
                self.set_cc(Kind::Cmp, size, a, b);
                self.advance(&[RDI], address, size);
            }
        }
        true
    }

    /// The linear address of the element at a register.
    fn string_at(&mut self, r: usize, segment: usize, address: Size, size: Size, write: bool) -> Addr {
        let v = self.gpr_low(r, address);
        let offset = self.to64(address, v);
        self.linear(segment, Addr { base: offset, disp: 0 }, size.bytes(), write)
    }

    /// Moves the registers to the next element in the direction of DF.
    fn advance(&mut self, registers: &[usize], address: Size, size: Size) {
        let flags = self.b.get(slot::FLAGS);
        // DF is bit 10: twice the size is taken off again if it is set.
        let df = self.b.shrui(flags, 10);
        let df = self.b.andi(df, 1);
        let back = self.b.shli(df, size as i64 + 1);
        let step: Val = self.b.iconst(i64::from(size.bytes()));
        let step = self.b.sub(step, back);
        for &r in registers {
            let v = self.gpr(r);
            let v = self.b.add(v, step);
            let v = self.narrow(address, v);
            self.set_gpr_low(r, address, v);
        }
    }
}

/// Size of the registers that address the elements.
fn string_address_size(insn: &Instruction) -> Size {
    for n in 0..insn.op_count() {
        match insn.op_kind(n) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => return Size::B2,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => return Size::B4,
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => return Size::B8,
            _ => {}
        }
    }
    Size::B8
}
