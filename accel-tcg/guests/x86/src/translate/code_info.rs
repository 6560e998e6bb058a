//! What is asked of every instruction that is decoded and follows from its code, as a table: the decoder's own tables are many,
//! and to ask them one after the other costs more than decoding.

use std::sync::LazyLock;

use iced_x86::{Code, FlowControl, Instruction, Mnemonic};

use super::STATUS;

/// How an instruction passes control on, as far as its code says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum CodeFlow {
    Next,
    Conditional,
    Unconditional,
    Away,
}

/// The part of the translator that is the first to take an instruction, in the order in which they are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Part {
    Moves,
    Alu,
    Control,
    Stack,
    Shift,
}

/// What the operands of a code's instructions are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Operands {
    /// General registers, immediates and relative targets.
    Plain,
    /// The same, and the first is a general register or memory.
    FirstMayBeMemory,
    /// The same of the second.
    SecondMayBeMemory,
    /// Others.
    Others,
}

impl Operands {
    fn new(code: Code) -> Self {
        use iced_x86::OpCodeOperandKind::*;
        let code = code.op_code();
        let mut operands = Self::Plain;
        for n in 0..code.op_count() {
            operands = match code.op_kind(n) {
                r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem if n == 0 => Self::FirstMayBeMemory,
                r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem if n == 1 => Self::SecondMayBeMemory,
                r8_reg | r8_opcode | r16_reg | r16_rm | r16_opcode | r32_reg | r32_rm | r32_opcode
                | r32_vvvv | r64_reg | r64_rm | r64_opcode | r64_vvvv | al | cl | ax | dx | eax | rax
                | imm8 | imm8_const_1 | imm8sex16 | imm8sex32 | imm8sex64 | imm16 | imm32 | imm32sex64
                | imm64 | br16_1 | br32_1 | br64_1 | br16_2 | br32_4 | br64_4 => operands,
                _ => return Self::Others,
            };
        }
        operands
    }
}

/// What a code says of its instructions.
#[derive(Debug, Clone, Copy)]
pub(super) struct CodeInfo {
    /// The status flags that it reads, and those that it sets or leaves undefined; void if they vary.
    read: u8,
    changed: u8,
    pub flow: CodeFlow,
    pub part: Part,
    /// The flags depend on operands or prefixes.
    varies: bool,
    /// The region ends behind it, whatever its operands are.
    pub ends: bool,
    /// The region ends behind it if its destination is a register of the system.
    pub ends_by_register: bool,
    /// It does not fault by its operands, not even one in memory.
    pub harmless: bool,
    /// It faults by its operands only.
    pub plain: bool,
    /// What they are.
    pub operands: Operands,
}

static TABLE: LazyLock<Box<[CodeInfo]>> = LazyLock::new(|| Code::values().map(CodeInfo::new).collect());

/// The table, by code.
pub(super) fn table() -> &'static [CodeInfo] {
    &TABLE
}

impl CodeInfo {
    fn new(code: Code) -> Self {
        let mut insn = Instruction::default();
        insn.set_code(code);
        let mnemonic = code.mnemonic();
        let flow = match code.flow_control() {
            FlowControl::Next => CodeFlow::Next,
            FlowControl::ConditionalBranch => CodeFlow::Conditional,
            FlowControl::UnconditionalBranch => CodeFlow::Unconditional,
            _ => CodeFlow::Away,
        };
        let conditional = code.condition_code() != iced_x86::ConditionCode::None; // Jcc, SETcc, CMOVcc
        Self {
            read: (insn.rflags_read() & STATUS) as u8,
            changed: (insn.rflags_modified() & STATUS) as u8,
            flow,
            part: part(mnemonic, flow),
            varies: code.is_string_instruction() || is_shift(mnemonic),
            ends: flow == CodeFlow::Next && ends_region(mnemonic),
            ends_by_register: matches!(mnemonic, Mnemonic::Mov | Mnemonic::Pop),
            harmless: matches!(mnemonic, Mnemonic::Lea | Mnemonic::Nop),
            plain: conditional || is_plain(mnemonic),
            operands: Operands::new(code),
        }
    }

    /// The status flags that `insn` reads, and those that it sets or leaves undefined, whatever happens.
    pub fn flags(&self, insn: &Instruction) -> (u32, u32) {
        if !self.varies {
            return (self.read.into(), self.changed.into());
        }
        let changed = insn.rflags_modified() & STATUS;
        (insn.rflags_read() & STATUS, if changed != 0 && counted(insn) { 0 } else { changed })
    }
}

/// Shifts and rotations by CL, and repeated comparisons: a count of 0 leaves the flags.
fn counted(insn: &Instruction) -> bool {
    use iced_x86::{OpKind, Register};
    if insn.is_string_instruction() {
        return insn.has_rep_prefix() || insn.has_repne_prefix();
    }
    (1..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && insn.op_register(n) == Register::CL)
}

fn is_shift(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd)
}

/// No part before it knows the mnemonic.
fn part(mnemonic: Mnemonic, flow: CodeFlow) -> Part {
    use Mnemonic::*;
    match mnemonic {
        Add | Sub | And | Or | Xor | Cmp | Test | Inc | Dec | Adc | Sbb | Neg | Not => Part::Alu,
        Push | Pop | Leave => Part::Stack,
        _ if is_shift(mnemonic) => Part::Shift,
        _ if flow != CodeFlow::Next => Part::Control,
        _ => Part::Moves,
    }
}

/// Whether the region ends behind the instruction because it may change what the key is made of. (Those that do not
/// go on at the next instruction end it anyway.)
fn ends_region(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Popf | Popfd
            | Popfq
            | Clac
            | Stac
            | Clts
            | Lmsw
            | Invlpg
            | Invpcid
            | Wrmsr
            | Xsetbv
            | Wrpkru
            | Hlt
            | Mwait
            | Monitor
            | Lds
            | Les
            | Lfs
            | Lgs
            | Lss
            | Xrstors
            | Xrstors64
            | Fxrstor
            | Fxrstor64
            | Xrstor
            | Xrstor64
            | Ldmxcsr
            | Vldmxcsr
            | Insb
            | Insw
            | Insd
            | Outsb
            | Outsw
            | Outsd
            | In
            | Out
            | Cpuid
            | Serialize
    )
}

/// Instructions that fault by memory operands only.
fn is_plain(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Mov | Add
            | Adc
            | And
            | Cmp
            | Dec
            | Inc
            | Neg
            | Not
            | Or
            | Sbb
            | Sub
            | Test
            | Xor
            | Shl
            | Shr
            | Sar
            | Rol
            | Ror
            | Shld
            | Shrd
            | Imul
            | Mul
            | Movzx
            | Movsx
            | Movsxd
            | Cbw
            | Cwde
            | Cdqe
            | Cwd
            | Cdq
            | Cqo
            | Bt
            | Bts
            | Btr
            | Btc
            | Bsf
            | Bsr
            | Tzcnt
            | Lzcnt
            | Popcnt
            | Bswap
            | Xchg
            | Xadd
            | Cmpxchg
            | Clc
            | Stc
            | Cmc
            | Cld
            | Std
            | Lahf
            | Sahf
            | Jmp
            | Andn
            | Bextr
            | Blsi
            | Blsmsk
            | Blsr
            | Bzhi
            | Mulx
            | Pdep
            | Pext
            | Rorx
            | Sarx
            | Shlx
            | Shrx
            | Endbr64
            | Endbr32
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_the_decoder_says_of_every_immediate() {
        for code in Code::values() {
            let info = table()[code as usize];
            let mut insn = Instruction::default();
            insn.set_code(code);
            for n in 0..=u8::MAX {
                insn.set_immediate8(n);
                let (read, changed) = info.flags(&insn);
                assert_eq!(read, insn.rflags_read() & STATUS, "{code:?} {n}");
                assert!(changed == insn.rflags_modified() & STATUS || changed == 0, "{code:?} {n}");
            }
        }
    }

    #[test]
    fn flags_that_a_count_may_leave_are_not_said_to_change() {
        let insn = |bytes: &[u8]| iced_x86::Decoder::new(64, bytes, 0).decode();
        let changed = |bytes: &[u8]| {
            let insn = insn(bytes);
            table()[insn.code() as usize].flags(&insn).1
        };
        assert_eq!(changed(&[0xd3, 0xe0]), 0, "shl eax, cl");
        assert_eq!(changed(&[0xc1, 0xe0, 0x20]), 0, "shl eax, 32");
        assert_ne!(changed(&[0xc1, 0xe0, 0x01]), 0, "shl eax, 1");
        assert_eq!(changed(&[0x0f, 0xa5, 0xc8]), 0, "shld eax, ecx, cl");
        assert_eq!(changed(&[0xf3, 0xa6]), 0, "repe cmpsb");
        assert_eq!(changed(&[0xa6]), STATUS, "cmpsb");
        assert_eq!(changed(&[0x00, 0xc8]), STATUS, "add al, cl");
    }
}
