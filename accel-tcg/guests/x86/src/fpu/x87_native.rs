//! The x87 instructions themselves, executed by the host's unit on a copy of the guest's registers.
//!
//! The guest's control word is in force, so results, flags and condition codes are exact, unmasked exceptions among them:
//! the unit only notes those, and raises them at its next waiting instruction, which here never comes: the state is taken
//! out by FNSAVE, which does not wait and leaves the unit as the host wants it.

use std::arch::{asm, global_asm};

// One routine of four bytes for every second byte of the opcodes D8 to DF: first C0 to FF (registers) for each, then the
// eight memory forms with the operand at [rax].
global_asm!(
    ".p2align 4",
    // Rust may put what refers to them into another object file.
    ".globl holdfast_x87_registers",
    ".hidden holdfast_x87_registers",
    ".globl holdfast_x87_memory",
    ".hidden holdfast_x87_memory",
    "holdfast_x87_registers:",
    ".set holdfast_x87_a, 0xd8",
    ".rept 8",
    ".set holdfast_x87_b, 0xc0",
    ".rept 64",
    ".byte holdfast_x87_a, holdfast_x87_b, 0xc3, 0xcc",
    ".set holdfast_x87_b, holdfast_x87_b + 1",
    ".endr",
    ".set holdfast_x87_a, holdfast_x87_a + 1",
    ".endr",
    "holdfast_x87_memory:",
    ".set holdfast_x87_a, 0xd8",
    ".rept 8",
    ".set holdfast_x87_b, 0",
    ".rept 8",
    ".byte holdfast_x87_a, holdfast_x87_b, 0xc3, 0xcc",
    ".set holdfast_x87_b, holdfast_x87_b + 8",
    ".endr",
    ".set holdfast_x87_a, holdfast_x87_a + 1",
    ".endr",
);

unsafe extern "C" {
    static holdfast_x87_registers: u8;
    static holdfast_x87_memory: u8;
}

/// What FNSAVE stores in 32-bit protected format, and room for a memory operand.
#[repr(C, align(16))]
pub(super) struct Image {
    /// Control, status and tag words, each in four bytes, then pointers.
    pub env: [u32; 7],
    /// ST(0) to ST(7), 80 bits each.
    pub registers: [u8; 80],
    pub pad: [u8; 4],
    /// Memory operand.
    pub operand: [u8; 16],
}

/// Executes `D8 + first`, with second byte `second` if that is a register form (C0 and up), else with its reg field and the
/// memory operand in the image. `flags` are the status flags before; gives those after.
pub(super) fn execute(image: &mut Image, (first, second): (u8, u8), flags: u64) -> u64 {
    let first = usize::from(first & 7);
    let routine = if second >= 0xc0 {
        (&raw const holdfast_x87_registers).wrapping_add((first * 64 + usize::from(second & 63)) * 4)
    } else {
        (&raw const holdfast_x87_memory).wrapping_add((first * 8 + usize::from(second >> 3 & 7)) * 4)
    };
    let mut flags = flags & 0x8d5 | 0x202;
    // SAFETY: the routine is one instruction and a return. Instructions on registers touch the x87 unit, the flags and AX;
    // those on memory access at most 10 bytes at rax (the callers keep those with larger operands away). The image is
    // loaded before, without pending exceptions, and stored after, which leaves an initialised unit.
    unsafe {
        asm!(
            "frstor [{image}]",
            "push {flags}",
            "popfq",
            "call {routine}",
            "pushfq",
            "pop {flags}",
            "fnsave [{image}]",
            image = in(reg) std::ptr::from_mut(image),
            flags = inout(reg) flags,
            routine = in(reg) routine,
            inout("rax") image.operand.as_mut_ptr() => _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    flags & 0x8d5
}
