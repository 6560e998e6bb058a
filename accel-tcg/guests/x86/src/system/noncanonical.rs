//! Which exception an access outside the canonical addresses raises: #SS if it is by the stack segment, else #GP.
//!
//! Translated code does not say which segment an access is by; a fault is rare enough to decode its instruction again.

use holdfast_tcg_runtime::{Cpu, Fault, PhysMemory};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use super::fault::{self, NON_CANONICAL};
use super::mmu;
use super::stack::RSP;
use crate::state::X86;

/// How far from RSP an instruction may push or pop.
const REACH: u64 = 0x1_0000;

/// #SS in place of #GP if `fault` is of an access by the stack segment. If it is of a fetch by a near branch, the branch is
/// taken back: it is the one that faults.
pub(crate) fn refine(cpu: &mut Cpu<'_>, fault: &Fault) -> Fault {
    if fault.aux & NON_CANONICAL == 0 {
        return *fault;
    }
    let pc = cpu.pc();
    if fault.value == pc && !cpu.state::<X86>().canonical(pc) {
        undo_branch(cpu, pc);
        return fault::gp(0);
    }
    let by_stack = decode(cpu, pc).is_some_and(|insn| by_stack(cpu.state(), &insn, fault.value));
    if by_stack { fault::ss(0) } else { fault::gp(0) }
}

/// The byte at `va`, if there is RAM.
fn byte(s: &X86, phys: &PhysMemory, va: u64) -> Option<u8> {
    let gpa = mmu::probe(s, phys, va)?;
    Some((phys.read_u64(gpa & !7)? >> (8 * (gpa & 7))) as u8)
}

/// The eight bytes at `va`, of any alignment.
fn word(s: &X86, phys: &PhysMemory, va: u64) -> Option<u64> {
    (0..8).rev().try_fold(0, |word, n| Some(word << 8 | u64::from(byte(s, phys, va.wrapping_add(n))?)))
}

/// Takes back the near branch that went to `target`, if one did: registers are those before it. (Direct branches are checked
/// where they are translated.) What CALL has stored stays.
fn undo_branch(cpu: &mut Cpu<'_>, target: u64) {
    let from = cpu.branch_pc();
    let Some(insn) = decode(cpu, from) else { return };
    let phys = cpu.phys();
    let s = cpu.state::<X86>();
    let rsp = s.gpr[RSP];
    let old = match insn.code() {
        Code::Retnq | Code::Retnq_imm16 => {
            let dropped = if insn.op_count() == 1 { u64::from(insn.immediate16()) } else { 0 };
            Some(rsp.wrapping_sub(8 + dropped))
        }
        Code::Call_rm64 => (word(s, &phys, rsp) == Some(insn.next_ip())).then(|| rsp.wrapping_add(8)),
        Code::Jmp_rm64 => {
            let register = insn.op0_kind() == OpKind::Register;
            let same = || s.gpr.get(insn.op0_register().number()) == Some(&target);
            (!register || same()).then_some(rsp)
        }
        _ => None,
    };
    if let Some(old) = old {
        s.gpr[RSP] = old;
        cpu.set_pc(from);
    }
}

/// The instruction at `pc`; 64-bit code, for no other has such addresses.
fn decode(cpu: &mut Cpu<'_>, pc: u64) -> Option<Instruction> {
    let phys = cpu.phys();
    let s = cpu.state::<X86>();
    let mut bytes = [0u8; 15];
    let mut len = 0;
    for to in &mut bytes {
        let Some(found) = byte(s, &phys, pc.wrapping_add(len)) else { break };
        *to = found;
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
