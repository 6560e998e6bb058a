//! What runs as code of its own: implicit operands, several results.

use holdfast_tcg_ir::{Slot, Type};
use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Mnemonic, OpKind, Register};

use super::{Vector, op};
use crate::state::slot;
use crate::translate::{Size, Translator};

pub(super) const NAMES: &[&str] = &[
    "pcmpistri",
    "pcmpistrm",
    "pcmpestri",
    "pcmpestrm",
    "pcmpestri64",
    "pcmpestrm64",
    "sha256rnds2",
    "permd",
    "permps",
    "blendvps",
    "blendvpd",
    "pblendvb",
];

/// Host code being put together. What goes in is in `slot::scratch` and `slot::scratch64`.
#[derive(Default)]
pub(in crate::translate) struct Blob {
    code: Vec<u8>,
    failed: bool,
}

impl Blob {
    /// Appends an instruction.
    pub fn push(&mut self, insn: Result<Instruction, iced_x86::IcedError>) {
        let mut encoder = Encoder::new(64);
        match insn.and_then(|i| encoder.encode(&i, 0)) {
            Ok(_) => self.code.extend(encoder.take_buffer()),
            Err(_) => self.failed = true,
        }
    }

    /// `[rbp + slot]`
    pub fn memory(slot: Slot) -> MemoryOperand {
        MemoryOperand::with_base_displ(Register::RBP, i64::from(slot.offset))
    }

    /// `movups x, [slot]`
    pub fn load(&mut self, x: Register, slot: Slot) {
        self.push(Instruction::with2(Code::Movups_xmm_xmmm128, x, Self::memory(slot)));
    }

    /// `movups [slot], x`
    pub fn store(&mut self, slot: Slot, x: Register) {
        self.push(Instruction::with2(Code::Movups_xmmm128_xmm, Self::memory(slot), x));
    }

    /// The code, unless something could not be encoded.
    pub fn finish(self) -> Option<Vec<u8>> {
        (!self.failed).then_some(self.code)
    }
}

impl Translator<'_> {
    pub(super) fn vec_host(&mut self, v: &Vector<'_>) -> bool {
        match v.m {
            Mnemonic::Sha256rnds2 => self.sha256rnds2(v),
            Mnemonic::Vpermd | Mnemonic::Vpermps => self.permute_words(v),
            Mnemonic::Blendvps | Mnemonic::Blendvpd | Mnemonic::Pblendvb => self.legacy_blend(v),
            Mnemonic::Vblendvps | Mnemonic::Vblendvpd | Mnemonic::Vpblendvb => self.generic(v),
            _ => self.compare_strings(v),
        }
    }

    /// Runs the instruction on XMM1 (and result), XMM2 and the implicit XMM0.
    fn with_xmm0(&mut self, v: &Vector<'_>) -> bool {
        let source = self.voperand(v, 1)[0];
        self.b.set(slot::scratch(0), source);
        let dest = slot::xmm(v.insn.op0_register().number());
        let mut blob = Blob::default();
        blob.load(Register::XMM0, slot::xmm(0));
        blob.load(Register::XMM1, dest);
        blob.load(Register::XMM2, slot::scratch(0));
        blob.push(Instruction::with2(v.insn.code(), Register::XMM1, Register::XMM2));
        blob.store(dest, Register::XMM1);
        let Some(code) = blob.finish() else { return false };
        self.b.host(&code, &[dest]);
        true
    }

    fn sha256rnds2(&mut self, v: &Vector<'_>) -> bool {
        self.with_xmm0(v)
    }

    /// `blendvps x, x/m, <xmm0>`
    fn legacy_blend(&mut self, v: &Vector<'_>) -> bool {
        if !crate::fpu::host().avx {
            return self.with_xmm0(v);
        }
        let opcode = match v.m {
            Mnemonic::Blendvps => 0x4a,
            Mnemonic::Blendvpd => 0x4b,
            _ => 0x4c,
        };
        let a = self.vreg(v.insn.op0_register())[0];
        let b = self.voperand(v, 1)[0];
        let mask = self.b.get(slot::xmm(0));
        let r = self.b.vec(op::blendv(opcode), false, Type::V128, &[a, b, mask]);
        self.set_result(v, [r, r]);
        true
    }

    /// `vpermd`, `vpermps`: on the host's 256-bit registers.
    fn permute_words(&mut self, v: &Vector<'_>) -> bool {
        let [low, high] = self.voperand(v, 2);
        self.b.set(slot::scratch(0), low);
        self.b.set(slot::scratch(1), high);
        let dest = v.insn.op0_register().number();
        let index = slot::xmm(v.insn.op1_register().number());
        let (code, y0) = (v.insn.code(), Register::YMM0);
        let mut blob = Blob::default();
        blob.push(Instruction::with2(Code::VEX_Vmovups_ymm_ymmm256, y0, Blob::memory(index)));
        blob.push(Instruction::with3(code, y0, y0, Blob::memory(slot::scratch(0))));
        blob.push(Instruction::with2(Code::VEX_Vmovups_ymmm256_ymm, Blob::memory(slot::xmm(dest)), y0));
        blob.push(Ok(Instruction::with(Code::VEX_Vzeroupper)));
        let Some(code) = blob.finish() else { return false };
        self.b.host(&code, &[slot::xmm(dest), slot::ymm_high(dest)]);
        true
    }

    /// `pcmpistri` and its kin.
    fn compare_strings(&mut self, v: &Vector<'_>) -> bool {
        let name = v.name();
        let (explicit, index) = (name.contains("estr"), name.ends_with('i') || name.ends_with("i64"));
        let a = self.vreg(v.insn.op0_register())[0];
        let b = if v.insn.op1_kind() == OpKind::Register {
            self.vreg(v.insn.op1_register())[0]
        } else {
            // Of any alignment.
            let at = self.vaddr(v.insn, 16, (false, false));
            self.vload(at, 16, false)[0]
        };
        self.b.set(slot::scratch(0), a);
        self.b.set(slot::scratch(1), b);
        let wide = name.ends_with("64");
        let mut blob = Blob::default();
        if explicit {
            for n in [0, 2] {
                let mut length = self.gpr(n);
                if !wide {
                    let low = self.b.trunc(length);
                    length = self.b.sext(low);
                }
                self.b.set(slot::scratch64(4 + n / 2), length);
                let r = if n == 0 { Register::RAX } else { Register::RDX };
                let m = Blob::memory(slot::scratch64(4 + n / 2));
                blob.push(Instruction::with2(Code::Mov_r64_rm64, r, m));
            }
        }
        let code = match (explicit, index) {
            (false, true) => Code::Pcmpistri_xmm_xmmm128_imm8,
            (false, false) => Code::Pcmpistrm_xmm_xmmm128_imm8,
            (true, true) => Code::Pcmpestri64_xmm_xmmm128_imm8,
            (true, false) => Code::Pcmpestrm64_xmm_xmmm128_imm8,
        };
        blob.load(Register::XMM1, slot::scratch(0));
        blob.load(Register::XMM2, slot::scratch(1));
        let imm = u32::from(v.insn.immediate8());
        blob.push(Instruction::with3(code, Register::XMM1, Register::XMM2, imm));
        self.string_flags(&mut blob);
        let (flags, ecx) = (slot::scratch64(6), slot::scratch64(7));
        let r = Code::Mov_rm64_r64;
        blob.push(Instruction::with2(r, Blob::memory(ecx), Register::RCX));
        let xmm0 = slot::xmm(0);
        if !index {
            blob.store(xmm0, Register::XMM0);
        }
        let Some(code) = blob.finish() else { return false };
        if index {
            self.b.host(&code, &[flags, ecx]);
            let n = self.b.get(ecx);
            let n = self.b.trunc(n);
            self.set_gpr_low(1, Size::B4, n);
        } else {
            self.b.host(&code, &[flags, ecx, xmm0]);
            if v.vex {
                self.zero_high(0);
            }
        }
        let flags = self.b.get(flags);
        self.set_flags(flags);
        true
    }

    /// Stores the status flags of the comparison to the slot for them.
    fn string_flags(&mut self, blob: &mut Blob) {
        let m = Blob::memory(slot::scratch64(6));
        // AH: SF, ZF, AF, PF, CF; AL: OF.
        blob.push(Instruction::with1(Code::Seto_rm8, Register::AL));
        blob.push(Ok(Instruction::with(Code::Lahf)));
        blob.push(Instruction::with2(Code::Movzx_r32_rm8, Register::EDX, Register::AL));
        blob.push(Instruction::with2(Code::Shl_rm32_imm8, Register::EDX, 11));
        blob.push(Instruction::with2(Code::Movzx_r32_rm8, Register::EAX, Register::AH));
        blob.push(Instruction::with2(Code::And_rm32_imm32, Register::EAX, 0xd5));
        blob.push(Instruction::with2(Code::Or_r32_rm32, Register::EAX, Register::EDX));
        blob.push(Instruction::with2(Code::Mov_rm64_r64, m, Register::RAX));
    }
}
