//! Guests that do what no guest should: the answer is the processor's, and the VMM goes on.

use holdfast_accel::{Accelerator, Exit, IrqChip};
use iced_x86::code_asm::*;

use crate::asm::{self, Program, Step, long_mode, protected_mode};
use crate::rig::{Needs, Rig};
use crate::{Case, Failure};

/// Guests that an interpreting KVM may stop at.
pub const CASES: &[Case] = &[
    Case {
        name: "undefined opcodes",
        run: undefined,
        expected: "06@00 06@01 06@02 06@03 06@04 06@05 06@06 06@07 end\n",
    },
    Case { name: "instructions of 15 and more bytes", run: lengths, expected: "15 ok 0d@00 0d@01 end\n" },
    Case {
        name: "ports and memory where nothing is",
        run: nothing,
        expected: "ff ffff ffffffff ffffffff end\n",
    },
    Case { name: "page tables outside of RAM", run: page_tables, expected: "0e d0400000 ok end\n" },
    Case { name: "a triple fault", run: triple, expected: "shutdown" },
    Case { name: "code written and run in a loop", run: storm, expected: "00060000 end\n" },
];

fn one(accel: &dyn Accelerator, irqchip: IrqChip, image: &asm::Image) -> Result<String, Failure> {
    Rig::new(accel, irqchip, image, Needs { vcpus: 1 })?.finish()
}

/// A handler for `vector` that writes it with the number in R15, drops its frame (and error code), and goes on at R14.
fn report(p: &mut Program, vector: u8, error_code: bool) -> Step {
    let mut label = p.a.create_label();
    p.a.set_label(&mut label)?;
    p.a.mov(al, i32::from(vector))?;
    p.a.mov(dx, i32::from(asm::HEX))?;
    p.a.out(dx, al)?;
    p.a.add(rsp, if error_code { 8 } else { 0 })?;
    p.a.mov(qword_ptr(rsp), r14)?;
    p.a.iretq()?;
    p.gate(vector, label);
    Ok(())
}

/// Runs each of `codes` and goes on behind it when it has faulted.
fn try_all(p: &mut Program, codes: &[&[u8]]) -> Step {
    for (n, code) in codes.iter().enumerate() {
        let mut behind = p.a.create_label();
        p.a.lea(r14, ptr(behind))?;
        p.a.db(code)?;
        p.a.nop()?;
        p.a.set_label(&mut behind)?;
        p.a.nop()?;
        p.print("@")?;
        p.a.mov(al, n as i32)?;
        p.print_al()?;
    }
    Ok(())
}

/// What two prints of `xx ` and `@` give: `xx @nn ` becomes `xx@nn `.
fn tidy(text: &str) -> String {
    text.replace(" @", "@")
}

fn undefined(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let mut begin = p.a.create_label();
        p.a.jmp(begin)?;
        report(p, 6, false)?;
        p.a.set_label(&mut begin)?;
        // UD2, UD1, UD0, PUSH ES in 64-bit mode, LEA of a register, LOCK where there is none, an unused row of 0F, MOV to CS.
        let codes: [&[u8]; 8] = [
            &[0x0f, 0x0b],
            &[0x0f, 0xb9, 0xc0],
            &[0x0f, 0xff, 0xc0],
            &[0x06],
            &[0x8d, 0xc0],
            &[0xf0, 0x90],
            &[0x0f, 0x24, 0xc0],
            &[0x8e, 0xc8],
        ];
        try_all(p, &codes)?;
        p.print("end\n")?;
        p.done()
    })?;
    one(accel, irqchip, &image).map(|text| tidy(&text))
}

fn lengths(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let mut begin = p.a.create_label();
        p.a.jmp(begin)?;
        report(p, 13, true)?;
        p.a.set_label(&mut begin)?;
        let nop = |len: usize| [vec![0x66; len - 1], vec![0x90]].concat();
        p.a.db(&nop(15))?;
        p.print("15 ok ")?;
        try_all(p, &[&nop(16), &nop(40)])?;
        p.print("end\n")?;
        p.done()
    })?;
    one(accel, irqchip, &image).map(|text| tidy(&text))
}

fn nothing(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        p.a.mov(dx, 0x9990)?;
        p.a.mov(eax, 0)?;
        p.a.out(dx, eax)?;
        p.a.in_(al, dx)?;
        p.print_al()?;
        p.a.in_(ax, dx)?;
        p.a.out(i32::from(asm::HEX as u8), ax)?;
        p.a.in_(eax, dx)?;
        p.print_eax()?;
        p.a.mov(r8, 0xc000_0000u64)?;
        p.a.mov(dword_ptr(r8), 0x1234_5678)?;
        p.a.mov(eax, dword_ptr(r8))?;
        p.print_eax()?;
        p.print("end\n")?;
        p.done()
    })?;
    one(accel, irqchip, &image)
}

fn page_tables(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let at = asm::ECHO_MMIO + 0x40_0000;
    let image = long_mode(|p| {
        let (mut begin, mut fault) = (p.a.create_label(), p.a.create_label());
        p.a.jmp(begin)?;
        p.a.set_label(&mut fault)?;
        p.a.mov(al, 14)?;
        p.print_al()?;
        // Whether the entry that is not there reads as absent or with reserved bits is not told.
        p.a.add(rsp, 8)?;
        p.a.mov(rax, cr2)?;
        p.print_eax()?;
        p.a.mov(r8, asm::directory_entry(at))?;
        p.a.mov(rax, 0x87u64)?;
        p.a.mov(qword_ptr(r8), rax)?;
        p.a.iretq()?;
        p.gate(14, fault);
        p.a.set_label(&mut begin)?;
        // A page table at 512 GiB.
        p.a.mov(r8, asm::directory_entry(at))?;
        p.a.mov(rax, 0x80_0000_0007u64)?;
        p.a.mov(qword_ptr(r8), rax)?;
        p.a.mov(r9, at)?;
        p.a.invlpg(byte_ptr(r9))?;
        p.a.mov(eax, dword_ptr(r9))?;
        p.print("ok end\n")?;
        p.done()
    })?;
    one(accel, irqchip, &image)
}

fn triple(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = protected_mode(|p| {
        // An empty IDT: no exception can be delivered.
        p.a.mov(dword_ptr(asm::DATA), 0)?;
        p.a.mov(dword_ptr(asm::DATA + 4), 0)?;
        p.a.lidt(ptr(asm::DATA))?;
        p.a.ud2()?;
        p.done()
    })?;
    match Rig::new(accel, irqchip, &image, Needs { vcpus: 1 })?.finish() {
        Err(Failure::Exit { exit: Exit::Shutdown, .. }) => Ok("shutdown".into()),
        other => other,
    }
}

/// Writes a function, calls it, and goes on 64 bytes further, around a megabyte again and again. The functions add 1 or 2
/// by turns, so each round has to see what the last store made of them.
fn storm(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    const FIRST: u64 = 0x8_0000;
    const BYTES: u64 = 0x10_0000;
    const ROUNDS: i32 = 16;
    let image = long_mode(|p| {
        let (mut round, mut next) = (p.a.create_label(), p.a.create_label());
        p.a.xor(ebx, ebx)?;
        p.a.mov(ebp, ROUNDS)?;
        p.a.set_label(&mut round)?;
        p.a.mov(rdi, FIRST)?;
        p.a.set_label(&mut next)?;
        // add ebx, 1 + (round & 1); ret
        p.a.mov(eax, ebp)?;
        p.a.and(eax, 1)?;
        p.a.inc(eax)?;
        p.a.shl(eax, 16)?;
        p.a.or(eax, 0xc300_c383u32 as i32)?;
        p.a.mov(dword_ptr(rdi), eax)?;
        p.a.call(rdi)?;
        p.a.add(rdi, 64)?;
        p.a.cmp(rdi, (FIRST + BYTES) as i32)?;
        p.a.jb(next)?;
        p.a.dec(ebp)?;
        p.a.jnz(round)?;
        p.a.mov(eax, ebx)?;
        p.print_eax()?;
        p.print("end\n")?;
        p.done()
    })?;
    one(accel, irqchip, &image)
}
