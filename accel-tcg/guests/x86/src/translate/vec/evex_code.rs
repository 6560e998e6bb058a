//! The host's code for an instruction with an EVEX prefix: it works on register 0 and up, loaded from the state, and on memory
//! in the state.

use holdfast_tcg_ir::Slot;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::Blob;
use crate::state::slot;

/// Where the host has the instruction's mask, its opmask result and its opmask source.
const MASK: Register = Register::K1;
const RESULT: Register = Register::K2;
const SOURCE: Register = Register::K3;

/// Code, and what it writes.
pub(super) struct HostRun {
    pub code: Vec<u8>,
    pub writes: Vec<Slot>,
}

/// Code under way.
struct Draft {
    blob: Blob,
    writes: Vec<Slot>,
    /// Registers are left as they are: results go to where nobody looks.
    aside: bool,
}

impl HostRun {
    /// The code for `insn`, whose operands in memory and general registers are in `slot::evex_memory` and
    /// `slot::evex_small(0)`. What it gives for these goes to `slot::evex_memory` or `slot::evex_small(1)`, and so do
    /// flags. If `aside`, nothing else is written.
    pub fn new(insn: &Instruction, aside: bool) -> Option<Self> {
        let mut draft = Draft { blob: Blob::default(), writes: Vec::new(), aside };
        let host = draft.sources(insn);
        draft.blob.push(Ok(host));
        draft.results(insn);
        draft.blob.push(Ok(Instruction::with(Code::VEX_Vzeroupper)));
        Some(Self { code: draft.blob.finish()?, writes: draft.writes })
    }
}

impl Draft {
    /// Loads what `insn` reads; the instruction with the host's operands.
    fn sources(&mut self, insn: &Instruction) -> Instruction {
        let mut host = *insn;
        if insn.op_mask() != Register::None {
            host.set_op_mask(MASK);
            self.blob.load_opmask(MASK, slot::opmask(insn.op_mask().number()));
        }
        for n in 0..insn.op_count() {
            match insn.op_kind(n) {
                OpKind::Register => {
                    let r = self.register(insn.op_register(n), n);
                    host.set_op_register(n, r);
                }
                OpKind::Memory => {
                    let slot = memory_slot(insn, n == 0);
                    host.set_memory_base(Register::RBP);
                    host.set_memory_index(Register::None);
                    host.set_memory_index_scale(1);
                    host.set_memory_displacement64(u64::from(slot.offset));
                    host.set_memory_displ_size(1);
                    host.set_segment_prefix(Register::None);
                }
                _ => {}
            }
        }
        host
    }

    /// The host's register for operand `n`, loaded from the guest's `r`.
    fn register(&mut self, r: Register, n: u32) -> Register {
        if r.is_vector_register() {
            // The destination too: it may be a source, and a mask may leave some of it.
            self.blob.load_vector(n, r);
            let first = match r.size() {
                16 => Register::XMM0,
                32 => Register::YMM0,
                _ => Register::ZMM0,
            };
            return first + n;
        }
        let load = n > 0;
        if r.is_k() {
            let host = if load { SOURCE } else { RESULT };
            if load {
                self.blob.load_opmask(host, slot::opmask(r.number()));
            }
            return host;
        }
        if load {
            let m = Blob::memory(slot::evex_small(0));
            self.blob.push(Instruction::with2(Code::Mov_r64_rm64, Register::RAX, m));
        }
        if r.size() == 8 { Register::RAX } else { Register::EAX }
    }

    fn results(&mut self, insn: &Instruction) {
        let small = slot::evex_small(1);
        let m = Blob::memory(small);
        if compares(insn.mnemonic()) {
            self.blob.push(Ok(Instruction::with(Code::Lahf)));
            self.blob.push(Instruction::with2(Code::Movzx_r32_rm8, Register::EAX, Register::AH));
            self.blob.push(Instruction::with2(Code::And_rm32_imm32, Register::EAX, 0xd5));
            self.blob.push(Instruction::with2(Code::Mov_rm64_r64, m, Register::RAX));
            return self.writes.push(small);
        }
        if insn.op0_kind() == OpKind::Memory {
            return match insn.memory_size().size() / 16 {
                0 => self.writes.push(small),
                quarters => self.writes.extend((0..quarters).map(slot::evex_memory)),
            };
        }
        let r = insn.op0_register();
        if r.is_vector_register() {
            let at = |q: usize| if self.aside { slot::evex_result(q) } else { slot::vector(r.number(), q) };
            self.writes.extend((0..r.size() / 16).map(at));
            if self.aside {
                self.blob.store_result(r);
            } else {
                self.blob.store_vector(r);
            }
        } else if r.is_k() {
            let to = if self.aside { small } else { slot::opmask(r.number()) };
            self.blob.store_opmask(to, RESULT);
            self.writes.push(to);
        } else {
            self.blob.push(Instruction::with2(Code::Mov_rm64_r64, m, Register::RAX));
            self.writes.push(small);
        }
    }
}

/// Comparisons that give flags.
pub(super) fn compares(m: Mnemonic) -> bool {
    matches!(m, Mnemonic::Vcomiss | Mnemonic::Vcomisd | Mnemonic::Vucomiss | Mnemonic::Vucomisd)
}

/// Where a memory operand is for the host's instruction.
fn memory_slot(insn: &Instruction, store: bool) -> Slot {
    if insn.memory_size().size() >= 16 { slot::evex_memory(0) } else { slot::evex_small(usize::from(store)) }
}

impl Blob {
    fn load_opmask(&mut self, k: Register, slot: Slot) {
        self.push(Instruction::with2(Code::VEX_Kmovq_kr_km64, k, Self::memory(slot)));
    }

    fn store_opmask(&mut self, slot: Slot, k: Register) {
        self.push(Instruction::with2(Code::VEX_Kmovq_m64_kr, Self::memory(slot), k));
    }

    /// Loads the guest's vector register `r` to the host's register `n`.
    fn load_vector(&mut self, n: u32, r: Register) {
        let at = |q: usize| Self::memory(slot::vector(r.number(), q));
        let (x, y, z) = (Register::XMM0 + n, Register::YMM0 + n, Register::ZMM0 + n);
        if r.is_xmm() {
            self.push(Instruction::with2(Code::VEX_Vmovups_xmm_xmmm128, x, at(0)));
        } else if r.is_ymm() {
            self.push(Instruction::with2(Code::VEX_Vmovups_ymm_ymmm256, y, at(0)));
        } else if r.number() >= 16 {
            self.push(Instruction::with2(Code::EVEX_Vmovups_zmm_k1z_zmmm512, z, at(0)));
        } else {
            self.push(Instruction::with2(Code::VEX_Vmovups_ymm_ymmm256, y, at(0)));
            self.push(Instruction::with4(Code::EVEX_Vinsertf64x4_zmm_k1z_zmm_ymmm256_imm8, z, z, at(2), 1));
        }
    }

    /// Stores as much of the host's register 0 as the guest's `r` has, to it.
    fn store_vector(&mut self, r: Register) {
        let at = |q: usize| Self::memory(slot::vector(r.number(), q));
        if r.is_xmm() {
            self.push(Instruction::with2(Code::VEX_Vmovups_xmmm128_xmm, at(0), Register::XMM0));
        } else if r.is_ymm() {
            self.push(Instruction::with2(Code::VEX_Vmovups_ymmm256_ymm, at(0), Register::YMM0));
        } else if r.number() >= 16 {
            self.push(Instruction::with2(Code::EVEX_Vmovups_zmmm512_k1z_zmm, at(0), Register::ZMM0));
        } else {
            self.push(Instruction::with2(Code::VEX_Vmovups_ymmm256_ymm, at(0), Register::YMM0));
            let code = Code::EVEX_Vextractf64x4_ymmm256_k1z_zmm_imm8;
            self.push(Instruction::with3(code, at(2), Register::ZMM0, 1));
        }
    }

    /// Stores the host's register 0, as large as `r`, aside.
    fn store_result(&mut self, r: Register) {
        let to = Self::memory(slot::evex_result(0));
        let (code, from) = if r.is_xmm() {
            (Code::VEX_Vmovups_xmmm128_xmm, Register::XMM0)
        } else if r.is_ymm() {
            (Code::VEX_Vmovups_ymmm256_ymm, Register::YMM0)
        } else {
            (Code::EVEX_Vmovups_zmmm512_k1z_zmm, Register::ZMM0)
        };
        self.push(Instruction::with2(code, to, from));
    }
}
