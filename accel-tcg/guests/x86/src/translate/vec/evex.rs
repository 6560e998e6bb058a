//! AVX-512: an instruction with an EVEX prefix runs as it is, on registers of the host that are loaded from the state
//! and stored back. Its memory operand is copied next to them first, or from there afterwards, so that all faults are the
//! guest's own; under a mask [`crate::fpu`] copies the elements that the mask leaves on.

use holdfast_tcg_ir::{Cond, Type, Val};
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::evex_code::{HostRun, compares};
use super::evex_memory::{Elements, aligned};
use super::table;
use crate::key::{CodeSize, Key};
use crate::state::slot;
use crate::system::regs::vector;
use crate::translate::{Addr, Size, Translator};

impl Translator<'_> {
    /// Instructions with an EVEX prefix.
    pub(in crate::translate) fn evex(&mut self, insn: &Instruction) -> bool {
        if insn.code().encoding() != EncodingKind::EVEX || !table::available_evex(insn.code()) {
            return false;
        }
        if !self.avx512_allowed() {
            return true;
        }
        if insn.memory_index().is_vector_register() {
            return self.evex_gather(insn);
        }
        if insn.op_mask() == Register::None && is_move(insn.mnemonic()) {
            self.evex_move(insn);
            return true;
        }
        self.evex_run(insn)
    }

    /// Raises #UD or #NM if AVX-512 is not enabled; false then.
    pub(in crate::translate) fn avx512_allowed(&mut self) -> bool {
        self.allowed(self.key.contains(Key::AVX512 | Key::PROTECTED))
    }

    /// Zeroes 16 bytes of vector register `n`.
    pub(super) fn zero_quarter(&mut self, n: usize, quarter: usize) {
        let slot = slot::vector(n, quarter);
        let is_zero = self.b.known(slot).is_some_and(|v| self.b.as_const(v) == Some(0));
        if !is_zero {
            let zero = self.zero();
            self.b.set(slot, zero);
        }
    }

    /// Instructions with a VEX prefix that have written vector register `r` have zeroed it from bit 256 on.
    pub(super) fn clear_above(&mut self, r: Register) {
        if self.key.contains(Key::AVX512) && r.is_vector_register() && !self.b.terminated() {
            self.zero_quarter(r.number(), 2);
            self.zero_quarter(r.number(), 3);
        }
    }

    // ---- moves of whole registers ----

    fn evex_move(&mut self, insn: &Instruction) {
        let store = insn.op0_kind() == OpKind::Memory;
        let r = if store { insn.op1_register() } else { insn.op0_register() };
        let quarters = r.size() / 16;
        if store {
            for q in 0..quarters {
                let v = self.b.get(slot::vector(r.number(), q));
                self.b.set(slot::evex_memory(q), v);
            }
            self.evex_store_wide(insn, quarters);
            return;
        }
        let mut values = [Val(0); 4];
        if insn.op1_kind() == OpKind::Memory {
            values = self.evex_load_wide(insn, quarters);
        } else {
            let from = insn.op1_register().number();
            for (q, v) in values.iter_mut().enumerate().take(quarters) {
                *v = self.b.get(slot::vector(from, q));
            }
        }
        for (q, v) in values.into_iter().enumerate() {
            if q < quarters {
                self.b.set(slot::vector(r.number(), q), v);
            } else {
                self.zero_quarter(r.number(), q);
            }
        }
    }

    /// Loads 16, 32 or 64 bytes.
    fn evex_load_wide(&mut self, insn: &Instruction, quarters: usize) -> [Val; 4] {
        let at = self.evex_address(insn, 16 * quarters as u32, false);
        let mut values = [Val(0); 4];
        for (q, v) in values.iter_mut().enumerate().take(quarters) {
            *v = self.b.load(Type::V128, self.vmem(4, false), at.base, at.disp + 16 * q as i32);
        }
        values
    }

    /// Stores what [`slot::evex_memory`] has, 16 to 64 bytes; nothing, if any page faults.
    fn evex_store_wide(&mut self, insn: &Instruction, quarters: usize) {
        let bytes = 16 * quarters as u32;
        let at = self.evex_address(insn, bytes, true);
        if quarters > 1 && !aligned(insn.mnemonic()) && !self.stays_on_page(insn, at, bytes) {
            return;
        }
        for q in 0..quarters {
            let v = self.b.get(slot::evex_memory(q));
            self.b.store(self.vmem(4, false), at.base, at.disp + 16 * q as i32, v);
        }
    }

    /// Stores all of [`slot::evex_memory`], across a page.
    pub(super) fn evex_store_crossing(&mut self, insn: &Instruction) {
        let elements = Elements::of(insn).all();
        let all = self.b.iconst(-1);
        self.evex_copy(insn, elements, all, true);
    }

    /// The address of a memory operand, with what alignment it needs.
    pub(super) fn evex_address(&mut self, insn: &Instruction, bytes: u32, write: bool) -> Addr {
        let at = self.address(insn, bytes, write);
        let (mask, vector) = if aligned(insn.mnemonic()) {
            (bytes - 1, vector::GP)
        } else if self.key.contains(Key::ALIGN) && bytes >= 16 {
            (15, vector::AC)
        } else {
            // So that there is room for the displacement of the last 16 bytes.
            return match at.disp.checked_add(48) {
                Some(_) => at,
                None => Addr { base: self.whole(at), disp: 0 },
            };
        };
        let va = self.whole(at);
        let low = self.b.andi(va, i64::from(mask));
        let zero = self.b.iconst(0);
        self.raise_if((Cond::Ne, low, zero), vector, Some(0));
        Addr { base: va, disp: 0 }
    }

    // ---- everything else ----

    fn evex_run(&mut self, insn: &Instruction) -> bool {
        let Some(HostRun { code, writes }) = HostRun::new(insn, false) else { return false };
        self.evex_inputs(insn);
        if insn.op0_kind() == OpKind::Memory && insn.mnemonic() == Mnemonic::Vcvtps2ph {
            // A store that faults leaves the sticky flags.
            self.evex_probe(insn);
        }
        if self.key.contains(Key::SIMD_TRAPS) && !suppresses(insn) {
            // Only to raise what it raises: its result is put aside.
            let Some(HostRun { code, writes }) = HostRun::new(insn, true) else { return false };
            let run = |t: &mut Self| t.b.host(&code, &writes);
            self.trapping_twice(true, run, |t, ()| {
                if insn.mnemonic() == Mnemonic::Vcvtps2ph {
                    t.evex_tiny_halves(insn);
                }
            });
        }
        self.b.host(&code, &writes);
        self.evex_finish(insn);
        true
    }

    /// What [`Self::tiny_halves`] needs to know of a conversion whose result was put aside.
    fn evex_tiny_halves(&mut self, insn: &Instruction) {
        let lanes = (1 << (insn.op1_register().size() / 4)) - 1;
        let lanes = match insn.op_mask() {
            Register::None => self.b.iconst(lanes),
            k => {
                let mask = self.b.get(slot::opmask(k.number()));
                self.b.andi(mask, lanes)
            }
        };
        let place = match (insn.op0_kind(), insn.memory_size().size()) {
            (OpKind::Memory, 16..) => 2,
            (OpKind::Memory, _) => 3,
            _ => 1,
        };
        self.tiny_halves(place, lanes);
    }

    /// Puts what the instruction reads, but vector and opmask registers, to where the host's instruction has it.
    fn evex_inputs(&mut self, insn: &Instruction) {
        for n in 1..insn.op_count() {
            let r = insn.op_register(n);
            match insn.op_kind(n) {
                OpKind::Memory => self.evex_load(insn),
                OpKind::Register if r.is_gpr() => {
                    let v = self.gpr(self.whole_register(r));
                    self.b.set(slot::evex_small(0), v);
                }
                _ => {}
            }
        }
    }

    /// Takes over what the instruction has given.
    fn evex_finish(&mut self, insn: &Instruction) {
        if compares(insn.mnemonic()) {
            let flags = self.b.get(slot::evex_small(1));
            return self.set_flags(flags);
        }
        if insn.op0_kind() == OpKind::Memory {
            return self.evex_store(insn);
        }
        let r = insn.op0_register();
        if r.is_vector_register() {
            (r.size() / 16..4).for_each(|q| self.zero_quarter(r.number(), q));
        } else if r.is_gpr() {
            let v = self.b.get(slot::evex_small(1));
            let v = if r.size() == 8 { v } else { self.b.trunc(v) };
            self.write_reg(r, v);
        }
    }

    // ---- memory operands ----

    /// Loads the memory operand to where the host's instruction has it.
    fn evex_load(&mut self, insn: &Instruction) {
        let elements = Elements::of(insn);
        if !elements.is_all() {
            let mask = self.b.get(slot::opmask(insn.op_mask().number()));
            self.sync();
            self.evex_copy(insn, elements, mask, false);
            return;
        }
        let bytes = insn.memory_size().size();
        if bytes >= 16 {
            let values = self.evex_load_wide(insn, bytes / 16);
            for (q, v) in values.into_iter().enumerate().take(bytes / 16) {
                self.b.set(slot::evex_memory(q), v);
            }
        } else {
            let size = Size::of(bytes);
            let at = self.address(insn, size.bytes(), false);
            let v = self.load(size, at);
            let v = self.to64(size, v);
            self.b.set(slot::evex_small(0), v);
        }
    }

    /// Stores the memory operand from where the host's instruction has put it.
    fn evex_store(&mut self, insn: &Instruction) {
        let elements = Elements::of(insn);
        if !elements.is_all() {
            let mask = self.b.get(slot::opmask(insn.op_mask().number()));
            self.sync();
            self.evex_copy(insn, elements, mask, true);
            return;
        }
        let bytes = insn.memory_size().size();
        if bytes >= 16 {
            return self.evex_store_wide(insn, bytes / 16);
        }
        let size = Size::of(bytes);
        let v = self.b.get(slot::evex_small(1));
        let v = self.narrow(size, v);
        let at = self.address(insn, size.bytes(), true);
        self.store(size, at, v);
    }

    /// Raises the fault that storing will raise.
    fn evex_probe(&mut self, insn: &Instruction) {
        let elements = Elements::of(insn).probed();
        let mask = match insn.op_mask() {
            Register::None => self.b.iconst(-1),
            k => self.b.get(slot::opmask(k.number())),
        };
        self.sync();
        self.evex_copy(insn, elements, mask, true);
    }

    /// Copies elements by a helper.
    fn evex_copy(&mut self, insn: &Instruction, elements: Elements, mask: Val, store: bool) {
        let segment = crate::translate::operand::segment(insn.memory_segment());
        let address = self.address_bits(insn) / 32;
        let checked = self.key.contains(Key::ALIGN);
        let offset = self.offset(insn);
        let how = self.b.iconst(
            elements.bits() | (segment as i64) << 20 | i64::from(address) << 24 | i64::from(checked) << 27,
        );
        let id = if store { self.ids.fpu.evex_store } else { self.ids.fpu.evex_load };
        self.b.call(id, &[offset, how, mask]);
    }

    /// Gathers and scatters: by a helper, which clears the mask element by element, so that a fault can be restarted.
    fn evex_gather(&mut self, insn: &Instruction) -> bool {
        let scatter = insn.op0_kind() == OpKind::Memory;
        let data = if scatter { insn.op1_register() } else { insn.op0_register() };
        let index = insn.memory_index();
        if !data.is_vector_register() {
            return false;
        }
        self.sync();
        let at = self.offset(insn); // without the index
        let name = format!("{:?}", insn.mnemonic()).to_lowercase();
        let wide_element = name.ends_with("pd") || name.ends_with('q');
        let wide_index = name.contains("terq") || name.contains("herq");
        let (es, is) = (if wide_element { 8 } else { 4 }, if wide_index { 8 } else { 4 });
        // Both registers have as many elements, one of them perhaps in half of it.
        let count = (data.size() / es).min(index.size() / is);
        let base = insn.memory_base();
        let narrow = self.size != CodeSize::Bits64
            || if base == Register::None { insn.memory_displ_size() == 4 } else { base.size() == 4 };
        let how = self.b.iconst(
            data.number() as i64
                | (index.number() as i64) << 5
                | (insn.op_mask().number() as i64) << 10
                | i64::from(wide_index) << 13
                | i64::from(wide_element) << 14
                | i64::from(insn.memory_index_scale().trailing_zeros()) << 15
                | i64::from(narrow) << 17
                | (count as i64) << 18
                | i64::from(scatter) << 23
                | (crate::translate::operand::segment(insn.memory_segment()) as i64) << 24
                | (data.size().max(index.size()) as i64 / 16) << 27,
        );
        self.b.call(self.ids.fpu.evex_gather, &[at, how]);
        true
    }
}

/// Moves of whole registers.
fn is_move(m: Mnemonic) -> bool {
    use Mnemonic::*;
    aligned(m) || matches!(m, Vmovups | Vmovupd | Vmovdqu8 | Vmovdqu16 | Vmovdqu32 | Vmovdqu64)
}

/// It raises no SIMD exceptions, whatever MXCSR says.
fn suppresses(insn: &Instruction) -> bool {
    insn.suppress_all_exceptions() || insn.rounding_control() != iced_x86::RoundingControl::None
}
