//! Which exception an access outside the canonical addresses raises: #SS if it is by the stack segment, else #GP.
//!
//! Translated code does not say which segment an access is by; a fault is rare enough to decode its instruction again.

use holdfast_tcg_runtime::{Cpu, Fault};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use super::fault::{self, NON_CANONICAL};
use super::mmu;
use super::stack::RSP;
use crate::state::X86;

/// How far from RSP an instruction may push or pop.
const REACH: u64 = 0x1_0000;

/// #SS in place of #GP if `fault` is of an access by the stack segment.
pub(crate) fn refine(cpu: &mut Cpu<'_>, fault: &Fault) -> Fault {
    if fault.aux & NON_CANONICAL == 0 {
        return *fault;
    }
    let by_stack = decode(cpu).is_some_and(|insn| by_stack(cpu.state(), &insn, fault.value));
    if by_stack { fault::ss(0) } else { fault::gp(0) }
}

/// The instruction at the pc; 64-bit code, for no other has such addresses.
fn decode(cpu: &mut Cpu<'_>) -> Option<Instruction> {
    let (pc, phys) = (cpu.pc(), cpu.phys());
    let s = cpu.state::<X86>();
    let mut bytes = [0u8; 15];
    let mut len = 0;
    for byte in &mut bytes {
        let Some(gpa) = mmu::probe(s, &phys, pc.wrapping_add(len)) else { break };
        let Some(word) = phys.read_u64(gpa & !7) else { break };
        *byte = (word >> (8 * (gpa & 7))) as u8;
        len += 1;
    }
    let insn = Decoder::with_ip(64, bytes.get(..len as usize)?, pc, DecoderOptions::NONE).decode();
    (!insn.is_invalid()).then_some(insn)
}

/// Whether `insn` accessed `va` by the stack segment.
fn by_stack(s: &X86, insn: &Instruction, va: u64) -> bool {
    if matches!(insn.mnemonic(), Mnemonic::Leave | Mnemonic::Enter) {
        return true;
    }
    let near = va.wrapping_sub(s.gpr[RSP]).wrapping_add(REACH) < 2 * REACH;
    if insn.is_stack_instruction() && near {
        return true;
    }
    let memory = (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory);
    // An override that names SS is ignored in 64-bit mode, as are those of CS, DS and ES.
    let base = insn.memory_base().full_register();
    let other = matches!(insn.segment_prefix(), Register::FS | Register::GS);
    memory && matches!(base, Register::RSP | Register::RBP) && !other
}
