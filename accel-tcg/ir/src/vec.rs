//! Vector instructions: templates of host instructions, and runs of host code.
//!
//! Guests of the host's own family have the host's vector instructions. [`crate::Op::Vec`] carries one of them as a
//! template, whose operands are values; whatever does not fit a template is [`crate::Op::Host`], a short run of host code
//! that works on the environment.

use crate::types::Slot;

/// Which operands of a template are where in the encoding. The values are called a, b and c.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum VecForm {
    /// `result = op(a)`: reg is the result, r/m is a.
    Unary,
    /// `result = op(a, b)`: a is the legacy encoding's destination or VEX.vvvv, b is r/m.
    Binary,
    /// The same for instructions that do something else, or do not exist, with memory in place of b: `movss`, `movsd`.
    Merge,
    /// `result = op(a, b, c)`: a is the destination (reg), b VEX.vvvv, c r/m. VEX only.
    Ternary,
    /// `result = op(a, b, c)`: a is VEX.vvvv, b r/m, c the register in the immediate's upper half. VEX only.
    Is4,
    /// `result = op(a)` by an immediate, with `/n` in reg.
    ShiftImm,
    /// `result = op(a)`: reg is a, r/m is the result, mostly a general register.
    Extract,
    /// The status flags, in their places in RFLAGS, that comparing a (reg) and b (r/m) gives. OF is 0.
    Flags,
}

/// Which encodings an instruction has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum VecEncoding {
    /// Legacy SSE and VEX.128, with one opcode.
    Either,
    /// Legacy only.
    Legacy,
    /// VEX.128 only.
    Vex,
}

/// A host instruction on 128-bit registers, operands left open.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct VecInsn {
    /// Where the operands go.
    pub form: VecForm,
    /// Its encodings.
    pub encoding: VecEncoding,
    /// Mandatory prefix: 0 none, 1 66, 2 F3, 3 F2.
    pub pp: u8,
    /// Opcode map: 1 0F, 2 0F38, 3 0F3A.
    pub map: u8,
    /// Opcode byte.
    pub opcode: u8,
    /// REX.W or VEX.W.
    pub w: bool,
    /// `/n` of [`VecForm::ShiftImm`].
    pub ext: u8,
    /// Immediate byte.
    pub imm: Option<u8>,
}

/// Code of an [`crate::Op::Host`]. It is entered with the environment pointer in rbp and the guest's MXCSR, and falls out
/// at its end. It may use rax, rcx, rdx, rsi, rdi, xmm0 to xmm15 and the flags, leaves the upper halves of vector registers
/// zero and the x87 unit as it was (or empty), and is position-independent. It reads and writes slots in memory: never
/// pinned ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostCode {
    /// Where its bytes begin in [`crate::Region::host_bytes`].
    pub at: u32,
    /// How many there are.
    pub len: u32,
    /// The slots that it writes; the first `count` count.
    pub writes: [Option<Slot>; HostCode::MAX_WRITES],
}

impl HostCode {
    /// Most slots that one may write.
    pub const MAX_WRITES: usize = 6;
}
