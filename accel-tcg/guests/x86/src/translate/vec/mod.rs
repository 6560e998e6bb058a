//! SSE to SSE4.2, AES, PCLMULQDQ, SHA, AVX, AVX2, FMA and F16C: by the host's own instructions. AVX-512: see [`evex`].
//!
//! A 256-bit register is two values of 128 bits, its halves; what works lane by lane is done twice. The tables of
//! `iced-x86` give opcodes and operands, so most instructions need nothing of their own here.

mod evex;
mod evex_code;
mod evex_memory;
mod host;
mod misc;
mod moves;
mod table;
mod wide;

use holdfast_tcg_ir::{MemOp, Type, Val, VecEncoding, VecForm, VecInsn};
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::{Addr, Size, Translator};
use crate::key::Key;
use crate::state::slot;
use crate::system::regs::vector;
pub(super) use host::Blob;
pub(super) use moves::Crossing;
pub(super) use table::available;
use table::{Entry, Kind, lane_imm, raw, template};

/// Opcodes that are used in place of others.
pub(super) mod op {
    use super::{VecForm, VecInsn, raw};
    use holdfast_tcg_ir::VecEncoding;

    /// `movd x, r32` or, with W, `movq x, r64`.
    pub const MOVD: VecInsn = raw(VecForm::Unary, 1, 1, 0x6e);
    /// The other way.
    pub const MOVD_OUT: VecInsn = raw(VecForm::Extract, 1, 1, 0x7e);
    /// `movq r64, x`.
    pub const MOVQ_OUT: VecInsn = VecInsn { w: true, ..MOVD_OUT };
    /// `a.low, b.low`
    pub const LOW_LOW: VecInsn = raw(VecForm::Binary, 1, 1, 0x6c);
    /// `a.high, b.high`
    pub const HIGH_HIGH: VecInsn = raw(VecForm::Binary, 1, 1, 0x6d);
    /// `b.low, a.high`: movsd.
    pub const MERGE64: VecInsn = raw(VecForm::Merge, 3, 1, 0x10);
    /// `shufpd`
    pub const SHUFPD: VecInsn = raw(VecForm::Binary, 1, 1, 0xc6);
    /// `psrldq`
    pub const SHIFT_DOWN: VecInsn = VecInsn { ext: 3, ..raw(VecForm::ShiftImm, 1, 1, 0x73) };
    /// `pshufd`
    pub const PSHUFD: VecInsn = raw(VecForm::Unary, 1, 1, 0x70);
    /// VEX `blendvps`, `blendvpd`, `pblendvb`
    pub const fn blendv(opcode: u8) -> VecInsn {
        VecInsn { encoding: VecEncoding::Vex, ..raw(VecForm::Is4, 1, 3, opcode) }
    }
}

/// Whether the instruction of that name (VEX forms without their `v`) has code of its own.
fn special(name: &str) -> bool {
    moves::NAMES.contains(&name) || wide::NAMES.contains(&name) || host::NAMES.contains(&name)
}

/// A vector instruction at hand.
#[derive(Clone, Copy)]
pub(super) struct Vector<'a> {
    insn: &'a Instruction,
    m: Mnemonic,
    vex: bool,
    /// It works on 256 bits.
    wide: bool,
    entry: Entry,
}

impl Vector<'_> {
    /// Name, without the `v` of VEX forms.
    fn name(&self) -> &'static str {
        self.entry.name
    }

    fn imm(&self) -> Option<u8> {
        let last = self.insn.op_count().checked_sub(1)?;
        (self.insn.op_kind(last) == OpKind::Immediate8).then(|| self.insn.immediate8())
    }
}

impl Translator<'_> {
    /// Vector instructions.
    pub(super) fn vec(&mut self, insn: &Instruction) -> bool {
        let code = insn.code();
        if !table::available(code) {
            return false;
        }
        let Some(entry) = table::get(code) else { return false };
        if mmx_operand(insn) {
            return false;
        }
        let vex = code.encoding() == EncodingKind::VEX;
        let vector = (0..insn.op_count())
            .any(|n| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_vector_register());
        let m = insn.mnemonic();
        if !vector && !moves::vectorless(m) {
            return false;
        }
        let wide =
            (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_ymm());
        let v = Vector { insn, m, vex, wide, entry };
        if !self.vec_allowed(vex) {
            return true;
        }
        let done = match entry.kind {
            Kind::Move => self.whole_move(&v),
            Kind::Special => {
                let name = v.name();
                if host::NAMES.contains(&name) {
                    self.vec_host(&v)
                } else if wide::NAMES.contains(&name) {
                    self.vec_wide(&v)
                } else {
                    self.vec_moves(&v)
                }
            }
            Kind::Generic | Kind::Unary => self.generic(&v),
        };
        if done && vex && self.key.contains(Key::AVX512) {
            self.clear_written(insn);
        }
        done
    }

    /// Zeroes what a VEX instruction zeroes of AVX-512's registers: those that it writes, from bit 256 on.
    fn clear_written(&mut self, insn: &Instruction) {
        use Mnemonic::*;
        match insn.mnemonic() {
            Vzeroupper | Vzeroall => {
                (0..self.vector_count()).for_each(|n| self.clear_above(Register::YMM0 + n as u32));
            }
            Vpcmpistrm | Vpcmpestrm | Vpcmpestrm64 => self.clear_above(Register::XMM0),
            Vpcmpistri | Vpcmpestri | Vpcmpestri64 | Vptest | Vtestps | Vtestpd | Vcomiss | Vcomisd
            | Vucomiss | Vucomisd => {}
            _ if insn.op0_kind() != OpKind::Register => {}
            _ => {
                self.clear_above(insn.op0_register());
                if insn.memory_index().is_vector_register() {
                    self.clear_above(insn.op2_register()); // a gather's mask
                }
            }
        }
    }

    /// Raises #UD or #NM if vector instructions are not enabled; false then.
    pub(super) fn vec_allowed(&mut self, vex: bool) -> bool {
        let enabled = if vex {
            self.key.contains(Key::AVX | Key::PROTECTED)
        } else {
            !self.key.contains(Key::EM) && self.key.contains(Key::OSFXSR)
        };
        self.allowed(enabled)
    }

    /// Raises #UD if what the instruction needs is not `enabled`, or #NM; false then.
    fn allowed(&mut self, enabled: bool) -> bool {
        if !enabled {
            self.raise(vector::UD, None);
        } else if self.key.contains(Key::TS) {
            self.raise(vector::NM, None);
        } else {
            return true;
        }
        false
    }

    // ---- operands ----

    pub(super) fn zero(&mut self) -> Val {
        self.b.constant(Type::V128, 0)
    }

    /// Both halves of a vector register; those of an XMM register are the same value.
    pub(super) fn vreg(&mut self, r: Register) -> [Val; 2] {
        let n = r.number();
        let low = self.b.get(slot::xmm(n));
        if r.is_ymm() { [low, self.b.get(slot::ymm_high(n))] } else { [low, low] }
    }

    /// How vectors are accessed: `1 << log2` bytes.
    pub(super) fn vmem(&self, log2: u16, aligned: bool) -> MemOp {
        let mem = MemOp(log2).mmu(self.key.mmu_idx());
        let checked = log2 < 4 && self.key.contains(Key::ALIGN);
        if aligned || checked { mem.aligned() } else { mem }
    }

    /// Loads a memory operand of `bytes` as a vector: both halves, the same when there is one.
    pub(super) fn vload(&mut self, at: Addr, bytes: u32, aligned: bool) -> [Val; 2] {
        let one = |t: &mut Self, log2, disp| t.b.load(Type::V128, t.vmem(log2, aligned), at.base, disp);
        let v = match bytes {
            1 | 2 => {
                let i = self.load(Size::of(bytes as usize), at);
                self.b.vec(op::MOVD, false, Type::V128, &[i])
            }
            4 => one(self, 2, at.disp),
            8 => one(self, 3, at.disp),
            16 => one(self, 4, at.disp),
            _ => {
                let (base, disp) = match at.disp.checked_add(16) {
                    Some(d) => (at.base, d),
                    None => (self.whole(at), 16),
                };
                let low = one(self, 4, at.disp);
                let high = self.b.load(Type::V128, self.vmem(4, false), base, disp);
                return [low, high];
            }
        };
        [v, v]
    }

    /// Address of the memory operand. Those of 32 bytes that have to be aligned are checked here.
    pub(super) fn vaddr(&mut self, insn: &Instruction, bytes: u32, (write, aligned): (bool, bool)) -> Addr {
        let at = self.address(insn, bytes, write);
        // Those that the accesses themselves do not check.
        let vector = match (aligned, bytes) {
            (true, 32) => vector::GP,
            (false, 16 | 32) if self.key.contains(Key::ALIGN) => vector::AC,
            _ => return at,
        };
        let va = self.whole(at);
        // Alignment checks are of 16 bytes, those of instructions that want 32 are of 32.
        let low = self.b.andi(va, if aligned { 31 } else { 15 });
        let zero = self.b.iconst(0);
        self.raise_if((holdfast_tcg_ir::Cond::Ne, low, zero), vector, Some(0));
        at
    }

    /// Operand `n`, a vector register or memory.
    pub(super) fn voperand(&mut self, v: &Vector<'_>, n: u32) -> [Val; 2] {
        if v.insn.op_kind(n) == OpKind::Register {
            return self.vreg(v.insn.op_register(n));
        }
        let bytes = v.insn.memory_size().size() as u32;
        // Legacy instructions want operands of 16 bytes aligned; those that do not are moves and string comparisons.
        // (SHA's are not checked by AMD's processors.)
        let aligned =
            !v.vex && bytes == 16 && template(v.insn, VecForm::Unary).encoding != VecEncoding::Legacy;
        let at = self.vaddr(v.insn, bytes, (false, aligned));
        self.vload(at, bytes, aligned)
    }

    /// Sets a vector register as a legacy or VEX instruction does.
    pub(super) fn set_vreg(&mut self, v: &Vector<'_>, r: Register, [low, high]: [Val; 2]) {
        let n = r.number();
        self.b.set(slot::xmm(n), low);
        if v.vex {
            if r.is_ymm() {
                self.b.set(slot::ymm_high(n), high);
            } else {
                self.zero_high(n);
            }
        }
    }

    /// Zeroes the upper half of register `n`.
    pub(super) fn zero_high(&mut self, n: usize) {
        let slot = slot::ymm_high(n);
        let is_zero = self.b.known(slot).is_some_and(|v| self.b.as_const(v) == Some(0));
        if !is_zero {
            let zero = self.zero();
            self.b.set(slot, zero);
        }
    }

    /// Sets operand 0, a vector register.
    pub(super) fn set_result(&mut self, v: &Vector<'_>, value: [Val; 2]) {
        self.set_vreg(v, v.insn.op0_register(), value);
    }

    // ---- floating-point exceptions ----

    /// Runs `f`, which computes what may raise SIMD exceptions and sets nothing but scratch slots.
    pub(super) fn trapping<R>(&mut self, fp: bool, f: impl FnMut(&mut Self) -> R) -> R {
        self.trapping_twice(fp, f, |_, _| {})
    }

    /// The same; `second` is told what the second run has given.
    pub(super) fn trapping_twice<R>(
        &mut self,
        fp: bool,
        mut f: impl FnMut(&mut Self) -> R,
        second: impl FnOnce(&mut Self, R),
    ) -> R {
        if !fp || !self.key.contains(Key::SIMD_TRAPS) {
            return f(self);
        }
        self.sync();
        self.b.call(self.ids.fpu.simd_begin, &[]);
        let r = f(self);
        // Once more, for underflow: see `fpu::simd`.
        self.b.call(self.ids.fpu.simd_again, &[]);
        let again = f(self);
        second(self, again);
        self.b.call(self.ids.fpu.simd_check, &[]);
        r
    }

    /// Looks at `lanes` of what the second run of a conversion to half precision has left in `place`, see `fpu::simd`.
    pub(super) fn tiny_halves(&mut self, place: i64, lanes: Val) {
        let place = self.b.iconst(place);
        self.b.call(self.ids.fpu.simd_halves, &[place, lanes]);
    }

    // ---- instructions as they are ----

    /// The immediate of the low or high half.
    fn with_imm(v: &Vector<'_>, t: VecInsn, high: bool) -> VecInsn {
        let compare = matches!(v.m, Mnemonic::Cmpps | Mnemonic::Cmppd | Mnemonic::Cmpss | Mnemonic::Cmpsd);
        // Legacy comparisons have fewer predicates than the VEX forms that may run in their place.
        let bits = if compare { 7 } else { 0xff };
        VecInsn { imm: v.imm().map(|i| lane_imm(v.m, i & bits, high)), ..t }
    }

    fn generic(&mut self, v: &Vector<'_>) -> bool {
        let mut regs = v.insn.op_count();
        if v.imm().is_some() {
            regs -= 1;
        }
        let is_group = v.insn.code().op_code().is_group();
        let fma = v.m != Mnemonic::Vfmaddps && is_fma(v.insn);
        let (form, first) = match (v.vex, regs) {
            (_, _) if is_group => (VecForm::ShiftImm, u32::from(v.vex)),
            (true, 3) if fma => (VecForm::Ternary, 0),
            (true, 4) => (VecForm::Is4, 1),
            (true, 3) => (VecForm::Binary, 1),
            (true, 2) => (VecForm::Unary, 1),
            (false, 2) if v.entry.kind == Kind::Unary => (VecForm::Unary, 1),
            (false, 2) => (VecForm::Binary, 0),
            _ => return false,
        };
        let count = match form {
            VecForm::Unary | VecForm::ShiftImm => 1,
            VecForm::Binary => 2,
            _ => 3,
        };
        let t = template(v.insn, form);
        if v.m == Mnemonic::Insertps || v.m == Mnemonic::Vinsertps {
            return self.insertps(v, t);
        }
        if self.zeroing(v, form) {
            let zero = self.zero();
            self.set_result(v, [zero, zero]);
            return true;
        }
        let mut args = [[Val(0); 2]; 3];
        for n in 0..count {
            args[n as usize] = self.voperand(v, first + n);
        }
        let n = count as usize;
        let value = self.trapping(v.entry.fp, |s| {
            let low_insn = Self::with_imm(v, t, false);
            let low = args.map(|a| a[0]);
            let low = s.b.vec(low_insn, v.entry.fp, Type::V128, low.get(..n).unwrap_or(&low));
            if !v.wide {
                return [low, low];
            }
            let high_insn = Self::with_imm(v, t, true);
            let high = args.map(|a| a[1]);
            [low, s.b.vec(high_insn, v.entry.fp, Type::V128, high.get(..n).unwrap_or(&high))]
        });
        self.set_result(v, value);
        true
    }

    /// `xor x, x` and the like.
    fn zeroing(&self, v: &Vector<'_>, form: VecForm) -> bool {
        let exclusive = matches!(
            v.m,
            Mnemonic::Pxor
                | Mnemonic::Xorps
                | Mnemonic::Xorpd
                | Mnemonic::Vpxor
                | Mnemonic::Vxorps
                | Mnemonic::Vxorpd
        );
        let (a, b) = if v.vex { (1, 2) } else { (0, 1) };
        exclusive
            && form == VecForm::Binary
            && v.insn.op_kind(b) == OpKind::Register
            && v.insn.op_register(a) == v.insn.op_register(b)
    }

    /// `insertps`: a memory operand is one element, whatever the immediate says.
    fn insertps(&mut self, v: &Vector<'_>, t: VecInsn) -> bool {
        let first = u32::from(v.vex);
        let (a, b) = (self.voperand(v, first)[0], self.voperand(v, first + 1)[0]);
        let mut imm = v.insn.immediate8();
        if v.insn.op_kind(first + 1) == OpKind::Memory {
            imm &= 0x3f;
        }
        // On registers: with memory it is another instruction.
        let t = VecInsn { form: VecForm::Merge, imm: Some(imm), ..t };
        let r = self.b.vec(t, false, Type::V128, &[a, b]);
        self.set_result(v, [r, r]);
        true
    }

    /// `binary(a, b)` of an instruction without floating-point exceptions.
    pub(super) fn v2(&mut self, t: VecInsn, a: Val, b: Val) -> Val {
        self.b.vec(t, false, Type::V128, &[a, b])
    }

    /// `unary(a)` likewise, with an immediate.
    pub(super) fn v1_imm(&mut self, t: VecInsn, a: Val, imm: u8) -> Val {
        self.b.vec(VecInsn { imm: Some(imm), ..t }, false, Type::V128, &[a])
    }
}

fn is_fma(insn: &Instruction) -> bool {
    insn.code().cpuid_features().contains(&iced_x86::CpuidFeature::FMA)
}

/// Whether an operand is an MMX register, or memory in place of one.
pub(super) fn mmx_operand(insn: &Instruction) -> bool {
    if matches!(insn.mnemonic(), Mnemonic::Cvtpi2ps | Mnemonic::Cvtpi2pd) {
        return true;
    }
    (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_mm())
}
