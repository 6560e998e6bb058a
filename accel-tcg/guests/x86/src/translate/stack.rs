//! PUSH, POP, ENTER, LEAVE, and the flags on the stack.

use holdfast_tcg_ir::{Cond, Val};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{Addr, Size, Translator};
use crate::flags::rflags;
use crate::key::Key;
use crate::state::{seg, slot};
use crate::system::regs::vector;

pub(super) const RSP: usize = 4;
const RBP: usize = 5;

impl Translator<'_> {
    /// Size of the stack pointer.
    fn stack_size(&self) -> Size {
        if self.long() {
            Size::B8
        } else if self.key.contains(Key::STACK32) {
            Size::B4
        } else {
            Size::B2
        }
    }

    /// `offset` (`I64`) within the stack: wrapped to the stack pointer's size.
    fn stack_offset(&mut self, offset: Val) -> Val {
        match self.stack_size() {
            Size::B8 => offset,
            Size::B4 => self.wrap32(offset),
            _ => self.b.andi(offset, 0xffff),
        }
    }

    /// The linear address of `size` bytes at `sp + disp`.
    pub(super) fn stack_at(&mut self, sp: Val, disp: i64, size: Size, write: bool) -> Addr {
        let at = if self.long() {
            Addr { base: sp, disp: disp as i32 }
        } else {
            let offset = self.b.addi(sp, disp);
            Addr { base: self.stack_offset(offset), disp: 0 }
        };
        self.linear(seg::SS, at, size.bytes(), write)
    }

    /// Sets the stack pointer to `sp + change`.
    pub(super) fn move_sp(&mut self, sp: Val, change: i64) {
        let new = self.b.addi(sp, change);
        let size = self.stack_size();
        let new = self.narrow(size, new);
        self.set_gpr_low(RSP, size, new);
    }

    /// Pushes a value of `size`'s type.
    pub(super) fn push(&mut self, size: Size, v: Val) {
        let sp = self.gpr(RSP);
        let at = self.stack_at(sp, -i64::from(size.bytes()), size, true);
        self.store(size, at, v);
        self.move_sp(sp, -i64::from(size.bytes()));
    }

    /// Pops a value, and drops `extra` bytes behind it.
    pub(super) fn pop(&mut self, size: Size, extra: i64) -> Val {
        let sp = self.gpr(RSP);
        let at = self.stack_at(sp, 0, size, false);
        let v = self.load(size, at);
        self.move_sp(sp, i64::from(size.bytes()) + extra);
        v
    }

    pub(super) fn stack(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        match insn.mnemonic() {
            Push => return self.push_op(insn),
            Pop => return self.pop_op(insn),
            Leave => self.leave_frame(insn),
            Enter => self.enter(insn),
            Pusha | Pushad => self.push_all(if insn.mnemonic() == Pusha { Size::B2 } else { Size::B4 }),
            Popa | Popad => self.pop_all(if insn.mnemonic() == Popa { Size::B2 } else { Size::B4 }),
            Pushf | Pushfd | Pushfq => self.push_flags(flags_size(insn)),
            Popf | Popfd | Popfq => self.pop_flags(flags_size(insn)),
            Bound => self.bound(insn),
            Arpl => self.arpl(insn),
            _ => return false,
        }
        true
    }

    /// Size of a PUSH or POP.
    pub(super) fn item_size(insn: &Instruction) -> Size {
        Size::of(insn.stack_pointer_increment().unsigned_abs() as usize)
    }

    fn push_op(&mut self, insn: &Instruction) -> bool {
        let size = Self::item_size(insn);
        let v = match insn.op0_kind() {
            OpKind::Register if insn.op0_register().is_segment_register() => {
                let s = super::operand::segment(insn.op0_register());
                let v = self.b.get(slot::seg_selector(s));
                self.narrow(size, v)
            }
            OpKind::Register | OpKind::Memory => self.read_op(insn, 0, size),
            _ => {
                let v = insn.try_immediate(0).unwrap_or(0);
                self.imm(size, v)
            }
        };
        self.push(size, v);
        true
    }

    fn pop_op(&mut self, insn: &Instruction) -> bool {
        let size = Self::item_size(insn);
        if insn.op0_kind() == OpKind::Register {
            let r = insn.op0_register();
            if !r.is_gpr() {
                return false;
            }
            let v = self.pop(size, 0);
            self.write_reg(r, v);
            return true;
        }
        // The address is computed with the stack pointer behind the pop; a fault of the store undoes that.
        let sp = self.gpr(RSP);
        let from = self.stack_at(sp, 0, size, false);
        let v = self.load(size, from);
        let uses_sp = insn.memory_base().full_register() == Register::RSP;
        let at =
            if uses_sp { self.pop_address(insn, sp, size) } else { self.address(insn, size.bytes(), true) };
        self.store(size, at, v);
        self.move_sp(sp, i64::from(size.bytes()));
        true
    }

    /// The address of a POP's destination relative to the stack pointer, which counts as moved.
    fn pop_address(&mut self, insn: &Instruction, sp: Val, size: Size) -> Addr {
        let offset = self.offset(insn);
        let offset = self.b.addi(offset, i64::from(size.bytes()));
        let offset = match self.address_bits(insn) {
            64 => offset,
            _ => self.wrap32(offset),
        };
        debug_assert_eq!(self.b.ty(sp), holdfast_tcg_ir::Type::I64);
        let s = super::operand::segment(insn.memory_segment());
        self.linear(s, Addr { base: offset, disp: 0 }, size.bytes(), true)
    }

    fn leave_frame(&mut self, insn: &Instruction) {
        let size = Self::leave_size(insn);
        let bp = self.gpr(RBP);
        let at = self.stack_at(bp, 0, size, false);
        let v = self.load(size, at);
        self.move_sp(bp, i64::from(size.bytes()));
        self.set_gpr_low(RBP, size, v);
    }

    fn leave_size(insn: &Instruction) -> Size {
        match insn.code() {
            iced_x86::Code::Leavew => Size::B2,
            iced_x86::Code::Leaved => Size::B4,
            _ => Size::B8,
        }
    }

    fn enter(&mut self, insn: &Instruction) {
        let size = match insn.code() {
            iced_x86::Code::Enterw_imm16_imm8 => Size::B2,
            iced_x86::Code::Enterd_imm16_imm8 => Size::B4,
            _ => Size::B8,
        };
        let (frame, level) = (i64::from(insn.immediate16()), insn.immediate8_2nd() & 31);
        let sp = self.gpr(RSP);
        let bp = self.gpr(RBP);
        let n = i64::from(size.bytes());
        let v = self.narrow(size, bp);
        let at = self.stack_at(sp, -n, size, true);
        self.store(size, at, v);
        let new_bp = self.b.addi(sp, -n);
        for i in 1..level {
            // The frame pointers of the enclosing levels.
            let from = self.stack_at(bp, -n * i64::from(i), size, false);
            let v = self.load(size, from);
            let to = self.stack_at(sp, -n * i64::from(i + 1), size, true);
            self.store(size, to, v);
        }
        let mut used = n;
        if level > 0 {
            used += n * i64::from(level);
            let to = self.stack_at(sp, -used, size, true);
            let v = self.stack_offset(new_bp);
            let v = self.narrow(size, v);
            self.store(size, to, v);
        }
        // A page below that cannot be written faults before anything changes.
        let last = self.stack_at(sp, -used - frame, size, true);
        let probe = self.load_for_update(size, last);
        let _ = probe;
        self.move_sp(sp, -used - frame);
        let new_bp = self.narrow(size, new_bp);
        self.set_gpr_low(RBP, size, new_bp);
    }

    fn push_all(&mut self, size: Size) {
        let sp = self.gpr(RSP);
        let n = i64::from(size.bytes());
        for r in 0..8 {
            let v = self.gpr_low(r, size);
            let at = self.stack_at(sp, -n * (r as i64 + 1), size, true);
            self.store(size, at, v);
        }
        self.move_sp(sp, -8 * n);
    }

    fn pop_all(&mut self, size: Size) {
        let sp = self.gpr(RSP);
        let n = i64::from(size.bytes());
        let mut values = Vec::with_capacity(8);
        for r in (0..8).rev() {
            let at = self.stack_at(sp, n * (7 - r as i64), size, false);
            values.push((r, self.load(size, at)));
        }
        for (r, v) in values {
            if r != RSP {
                self.set_gpr_low(r, size, v);
            }
        }
        self.move_sp(sp, 8 * n);
    }

    /// In virtual-8086 mode PUSHF and POPF need IOPL 3, unless they are of 16 bits and CR4.VME is set.
    fn vm86_denied(&mut self) -> bool {
        if self.key.contains(Key::VM86) && !self.key.contains(Key::IOPL_OK) {
            self.raise(vector::GP, Some(0));
            return true;
        }
        false
    }

    fn push_flags(&mut self, size: Size) {
        let virtual_if = size == Size::B2 && self.key.contains(Key::VM86 | Key::VIRTUAL_IF);
        if !virtual_if && self.vm86_denied() {
            return;
        }
        let status = self.flags();
        let others = self.b.get(slot::FLAGS);
        // VM and RF are stored as zero.
        let others = self.b.andi(others, !((rflags::VM | rflags::RF) as i64));
        let mut v = self.b.or(others, status);
        if virtual_if {
            // VIF in the place of IF, and IOPL 3.
            let shown = self.b.shrui(others, i64::from((rflags::VIF / rflags::IF).trailing_zeros()));
            let shown = self.b.andi(shown, rflags::IF as i64);
            let shown = self.b.ori(shown, rflags::IOPL as i64);
            v = self.b.andi(v, !(rflags::IF as i64));
            v = self.b.or(v, shown);
        }
        let v = self.narrow(size, v);
        self.push(size, v);
    }

    fn pop_flags(&mut self, size: Size) {
        let virtual_if = size == Size::B2 && self.key.contains(Key::VM86 | Key::VIRTUAL_IF);
        if !virtual_if && self.vm86_denied() {
            return;
        }
        let sp = self.gpr(RSP);
        let at = self.stack_at(sp, 0, size, false);
        let v = self.load(size, at);
        let v = self.to64(size, v);
        if virtual_if {
            self.check_virtual_flags(v);
        }
        self.move_sp(sp, i64::from(size.bytes()));
        let bytes = self.b.iconst(i64::from(size.bytes()));
        let next = self.next;
        let after = self.b.iconst(next as i64);
        self.call_system(self.ids.sys.popf, &[v, bytes, after]);
        self.goto_lookup(next);
    }

    /// #GP if `new` (`I64`), to be popped into FLAGS under CR4.VME, has TF, or IF while an interrupt is pending.
    fn check_virtual_flags(&mut self, new: Val) {
        let zero = self.b.iconst(0);
        let trap = self.b.andi(new, rflags::TF as i64);
        self.raise_if((Cond::Ne, trap, zero), vector::GP, Some(0));
        let flags = self.b.get(slot::FLAGS);
        let pending = self.b.shrui(flags, i64::from((rflags::VIP / rflags::IF).trailing_zeros()));
        let both = self.b.and(pending, new);
        let both = self.b.andi(both, rflags::IF as i64);
        self.raise_if((Cond::Ne, both, zero), vector::GP, Some(0));
    }

    fn bound(&mut self, insn: &Instruction) {
        let size = self.op_size_register(insn);
        let at = self.address(insn, 2 * size.bytes(), false);
        let low = self.load_signed(size, size, at);
        let high_at = Addr { base: at.base, disp: at.disp + size.bytes() as i32 };
        let high = self.load_signed(size, size, high_at);
        let index = self.read_reg(insn.op0_register());
        let index = self.sign_extended(size, index);
        self.raise_if((Cond::LtS, index, low), vector::BR, None);
        self.raise_if((Cond::GtS, index, high), vector::BR, None);
    }

    /// Raises the RPL of a selector to another's.
    fn arpl(&mut self, insn: &Instruction) {
        if !self.key.contains(Key::PROTECTED) {
            return self.raise(vector::UD, None);
        }
        let b = self.read_op(insn, 1, Size::B2);
        let rpl = self.b.andi(b, 3);
        let memory = insn.op0_kind() == OpKind::Memory;
        let at = memory.then(|| self.address(insn, 2, false));
        let n = if memory { 0 } else { insn.op0_register().number() };
        let a = match at {
            Some(at) => self.load(Size::B2, at),
            None => self.gpr_low(n, Size::B2),
        };
        let old = self.b.andi(a, 3);
        // Memory is written, and its segment has to be writable, only when it changes.
        let (keep, end) = (self.b.label(), self.b.label());
        self.b.brcond(Cond::GeU, old, rpl, keep);
        let others = self.b.andi(a, !3);
        let new = self.b.or(others, rpl);
        if memory {
            let at = self.address(insn, 2, true);
            self.store(Size::B2, at, new);
        } else {
            self.set_gpr_low(n, Size::B2, new);
        }
        for (zero, label) in [(1, keep), (0, end)] {
            let zf = self.b.iconst(zero);
            self.live |= super::STATUS;
            self.set_zero_flag(zf);
            self.sync();
            if zero == 1 {
                self.b.br(end);
            }
            self.b.bind(label);
            self.cc = super::Cc::default();
        }
    }

    fn op_size_register(&self, insn: &Instruction) -> Size {
        Size::of(insn.op0_register().size())
    }
}

fn flags_size(insn: &Instruction) -> Size {
    match insn.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Popf => Size::B2,
        Mnemonic::Pushfd | Mnemonic::Popfd => Size::B4,
        _ => Size::B8,
    }
}
