//! What translation has and a virtual machine of KVM has otherwise or not: x87 errors as interrupt 13, MONITOR and MWAIT,
//! limits of code segments to the byte, virtual-8086 mode with its extensions.

use holdfast_accel::{Accelerator, IrqChip};
use iced_x86::code_asm::*;

use crate::asm::{self, CODE, DATA, Program, Step, long_mode, protected_mode};
use crate::rig::{Needs, Rig};
use crate::{Case, Failure};

/// Guests for translation only.
pub const CASES: &[Case] = &[
    Case {
        name: "x87 errors by interrupt 13",
        run: fpu_errors,
        expected: "wait irq 84 behind ignored 84 cleared irq 84 end\n",
    },
    Case {
        name: "MONITOR and MWAIT",
        run: monitor,
        expected: "line 40 store late masked irq after gp 00 gp 00 off 00000000 ud 00 ring3 ud 00 end\n",
    },
    Case { name: "no MONITOR", run: no_monitor, expected: "00000000 ud 00 ud 00 end\n" },
    Case {
        name: "near branches beyond the limit of CS",
        run: limits,
        expected: "jmp gp 00000000 00000000 00000000 call gp 00000000 00000000 00000000 \
                   ret gp 00000000 00000000 00000000 loop gp 00000000 00000000 00000000 00000005 \
                   jcc gp 00000000 00000000 00000000 past gp 00000000 00000002 00000000 \
                   across gp 00000000 00000000 00000000 not taken at the limit end\n",
    },
    Case {
        name: "near branches to addresses that are not canonical",
        run: canonical,
        expected: "jmp gp 00 00 00 mem gp 00 00 00 call gp 00 00 00 ret gp 00 00 00 retn gp 00 00 00 end\n",
    },
    Case {
        name: "virtual interrupts in virtual-8086 mode",
        run: vme,
        expected: "gp 00000000 00000001 3202 3002 3002 3202 3202 gp 00000000 00000010 gp 00000000 00000000 end\n",
    },
    Case {
        name: "bounds",
        run: bounds,
        expected: "00020000 fffdfff0 00000000 in br 00 00020000 fffdfff0 00000001 br 00 reset 00000000 00000000 00000000 \
                   kept 00020000 fffdfff0 00000000 found 00020000 fffdfff0 00000000 other 00000000 00000000 00000000 \
                   br 00 00000000 00000000 00100002 gp 00 off end\n",
    },
    Case {
        name: "instruction breakpoints behind MOV SS",
        run: breakpoint_behind_mov_ss,
        expected: "00 end\n01 end\n",
    },
    Case {
        name: "protected-mode virtual interrupts",
        run: pvi,
        expected: "gp 00000000 00080000 00000000 00080000 gp 00000000 00100000 end\n",
    },
];

const ONE: Needs = Needs { vcpus: 1 };

fn end(p: &mut Program) -> Step {
    p.print("end\n")?;
    p.done()
}

fn one(accel: &dyn Accelerator, irqchip: IrqChip, image: &asm::Image) -> Result<String, Failure> {
    Rig::new(accel, irqchip, image, ONE)?.finish()
}

/// Leaves a division by zero pending.
fn divide(p: &mut Program) -> Step {
    p.a.fld1()?;
    p.a.fldz()?;
    p.a.fdivp(st1, st0)
}

/// Writes the low byte of the x87 status word.
fn print_status(p: &mut Program) -> Step {
    p.a.fnstsw(ax)?;
    p.print_al()
}

fn fpu_errors(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let (mut begin, mut handler) = (p.a.create_label(), p.a.create_label());
        let mut keep = p.a.create_label();
        p.a.jmp(begin)?;
        // R15: whether the error is to be cleared.
        p.a.set_label(&mut handler)?;
        p.print("irq ")?;
        print_status(p)?;
        p.out_byte(0xf0, 0)?;
        p.a.test(r15, r15)?;
        p.a.je(keep)?;
        p.a.fnclex()?;
        p.a.set_label(&mut keep)?;
        p.out_byte(0xa0, 0x20)?;
        p.out_byte(0x20, 0x20)?;
        p.a.iretq()?;
        p.gate(0x2d, handler);

        p.a.set_label(&mut begin)?;
        p.init_pics(0x20, 1 << 13 | 1 << 2)?;
        // All exceptions but that of a division by zero are masked.
        p.a.fninit()?;
        p.a.mov(r8, DATA)?;
        p.a.mov(word_ptr(r8), 0x37b)?;
        p.a.fldcw(word_ptr(r8))?;
        // The processor waits before FWAIT until it takes the interrupt.
        p.a.xor(r15d, r15d)?;
        divide(p)?;
        p.print("wait ")?;
        p.a.sti()?;
        p.a.wait()?;
        p.print("behind ")?;
        // The error is still there, and ignored.
        p.a.wait()?;
        p.a.fld1()?;
        p.print("ignored ")?;
        print_status(p)?;
        p.a.fnclex()?;
        p.a.wait()?;
        p.print("cleared ")?;
        // The next one is reported again.
        p.a.mov(r15, 1u64)?;
        divide(p)?;
        p.a.wait()?;
        p.a.wait()?;
        end(p)
    })?;
    one(accel, irqchip, &image)
}

/// A handler for `vector` that writes `text` and AL = the error code or 0, and goes on at R15 with the stack pointer in R13.
fn skip(p: &mut Program, vector: u8, text: &str, code: bool) -> Step {
    let mut label = p.a.create_label();
    p.a.set_label(&mut label)?;
    p.print(text)?;
    p.a.xor(eax, eax)?;
    if code {
        p.a.pop(rax)?;
    }
    p.print_al()?;
    p.a.mov(qword_ptr(rsp), r15)?;
    p.a.mov(qword_ptr(rsp + 8), i32::from(asm::CS64))?;
    p.a.mov(qword_ptr(rsp + 24), r13)?;
    p.a.mov(qword_ptr(rsp + 32), i32::from(asm::DS))?;
    p.a.iretq()?;
    p.gate(vector, label);
    Ok(())
}

/// Runs `body`, which faults, and goes on behind it.
fn faults(p: &mut Program, body: impl FnOnce(&mut Program) -> Step) -> Step {
    let mut behind = p.a.create_label();
    p.a.lea(r15, ptr(behind))?;
    p.a.mov(r13, rsp)?;
    body(p)?;
    p.print("no fault ")?;
    p.a.set_label(&mut behind)?;
    p.a.nop()
}

/// MONITOR of the data, and MWAIT with `ecx`.
fn wait(p: &mut Program, ecx_value: u32, between: impl FnOnce(&mut Program) -> Step) -> Step {
    p.a.mov(rax, DATA)?;
    p.a.xor(ecx, ecx)?;
    p.a.xor(edx, edx)?;
    p.a.monitor()?;
    between(p)?;
    p.a.mov(ecx, ecx_value)?;
    p.a.xor(eax, eax)?;
    p.a.mwait()
}

fn monitor(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let (mut begin, mut irq, mut user) = (p.a.create_label(), p.a.create_label(), p.a.create_label());
        p.a.jmp(begin)?;
        skip(p, 6, "ud ", false)?;
        skip(p, 13, "gp ", true)?;
        p.a.set_label(&mut irq)?;
        p.print("irq ")?;
        p.eoi()?;
        p.a.iretq()?;
        p.gate(0x40, irq);

        p.a.set_label(&mut begin)?;
        p.mask_pics()?;
        p.enable_lapic()?;
        p.print("line ")?;
        p.a.mov(eax, 5)?;
        p.a.cpuid()?;
        p.print_al()?;
        // A store between the two ends the wait, and so does time.
        wait(p, 0, |p| {
            p.a.mov(rbx, DATA)?;
            p.a.inc(dword_ptr(rbx))
        })?;
        p.print("store ")?;
        wait(p, 0, |_| Ok(()))?;
        p.print("late ")?;
        // An interrupt for itself, masked: it ends the wait, and is taken only when it is let in.
        p.poke(asm::LAPIC + 0x300, 0x4_4040)?;
        wait(p, 1, |_| Ok(()))?;
        p.print("masked ")?;
        p.a.sti()?;
        p.a.nop()?;
        p.a.nop()?;
        p.a.cli()?;
        p.print("after ")?;
        faults(p, |p| wait(p, 2, |_| Ok(())))?;
        faults(p, |p| {
            p.a.mov(ecx, 1)?;
            p.a.monitor()
        })?;
        // IA32_MISC_ENABLE takes the feature away.
        p.print("off ")?;
        p.a.mov(ecx, 0x1a0)?;
        p.a.rdmsr()?;
        p.a.and(eax, !(1 << 18))?;
        p.a.wrmsr()?;
        p.a.mov(eax, 1)?;
        p.a.cpuid()?;
        p.a.mov(eax, ecx)?;
        p.a.and(eax, 1 << 3)?;
        p.print_eax()?;
        faults(p, |p| p.a.mwait())?;
        p.a.mov(ecx, 0x1a0)?;
        p.a.rdmsr()?;
        p.a.or(eax, 1 << 18)?;
        p.a.wrmsr()?;
        p.print("ring3 ")?;
        faults(p, |p| {
            p.to_ring3(user)?;
            p.a.set_label(&mut user)?;
            p.a.xor(ecx, ecx)?;
            p.a.monitor()
        })?;
        end(p)
    })?;
    let model = "max,vendor=GenuineIntel";
    Rig::of_model(accel, irqchip, &image, model)?.finish()
}

/// A processor that does not offer the instructions has none.
fn no_monitor(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let mut begin = p.a.create_label();
        p.a.jmp(begin)?;
        skip(p, 6, "ud ", false)?;
        p.a.set_label(&mut begin)?;
        p.a.mov(eax, 1)?;
        p.a.cpuid()?;
        p.a.mov(eax, ecx)?;
        p.a.and(eax, 1 << 3)?;
        p.print_eax()?;
        faults(p, |p| {
            p.a.mov(rax, DATA)?;
            p.a.xor(ecx, ecx)?;
            p.a.monitor()
        })?;
        faults(p, |p| p.a.mwait())?;
        end(p)
    })?;
    one(accel, irqchip, &image)
}

/// The spare descriptor of the test's tables.
const SPARE: u32 = 0x2020;
/// Its selector.
const SPARE_CS: u32 = 0x20;

/// Sets `to` to an address from which 32-bit code goes on at `label`.
fn way_to(p: &mut Program, to: AsmRegister32, label: CodeLabel) -> Step {
    let mut get = p.a.create_label();
    p.a.call(get)?;
    p.a.jmp(label)?;
    p.a.set_label(&mut get)?;
    p.a.pop(to)
}

/// Sets ESI to the address of the next instruction, and EBX to the stack pointer.
fn here(p: &mut Program) -> Step {
    let mut here = p.a.create_label();
    p.a.mov(ebx, esp)?;
    p.a.call(here)?;
    p.a.set_label(&mut here)?;
    // POP has one byte, ADD three.
    p.a.pop(esi)?;
    p.a.add(esi, 4)
}

/// Goes on in 32-bit code in the spare segment.
fn into_spare(p: &mut Program) -> Step {
    let mut inside = p.a.create_label();
    way_to(p, eax, inside)?;
    p.a.push(SPARE_CS as i32)?;
    p.a.push(eax)?;
    p.a.retf()?;
    p.a.set_label(&mut inside)?;
    p.a.nop()
}

/// Runs `body` in the spare segment; it faults where ESI says, with the stack pointer in EBX, and it goes on behind it.
fn beyond(p: &mut Program, text: &str, body: impl FnOnce(&mut Program) -> Step) -> Step {
    let mut behind = p.a.create_label();
    p.print(text)?;
    into_spare(p)?;
    way_to(p, edi, behind)?;
    body(p)?;
    p.print("no fault ")?;
    p.a.set_label(&mut behind)?;
    p.a.nop()
}

fn limits(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    const OUTSIDE: u32 = CODE as u32 + 0x1_0000;
    let image = protected_mode(|p| {
        let (mut begin, mut handler) = (p.a.create_label(), p.a.create_label());
        p.a.jmp(begin)?;
        // Writes the error code, EIP - ESI and ESP - EBX, and goes on at EDI.
        p.a.set_label(&mut handler)?;
        p.print("gp ")?;
        p.a.pop(eax)?;
        p.print_eax()?;
        p.a.pop(eax)?;
        p.a.sub(eax, esi)?;
        p.print_eax()?;
        p.a.add(esp, 8)?;
        p.a.mov(eax, esp)?;
        p.a.sub(eax, ebx)?;
        p.print_eax()?;
        p.a.jmp(edi)?;
        p.gate(13, handler);

        p.a.set_label(&mut begin)?;
        // Code from 0 to OUTSIDE - 1.
        p.a.mov(dword_ptr(SPARE), 0xffff)?;
        p.a.mov(dword_ptr(SPARE + 4), 0x0040_9b00u32 | (OUTSIDE - 1) & 0xf_0000)?;
        beyond(p, "jmp ", |p| {
            p.a.mov(edx, OUTSIDE)?;
            here(p)?;
            p.a.jmp(edx)
        })?;
        beyond(p, "call ", |p| {
            here(p)?;
            p.a.call(u64::from(OUTSIDE) + 0x1234)
        })?;
        beyond(p, "ret ", |p| {
            p.a.push(OUTSIDE as i32)?;
            here(p)?;
            p.a.ret_1(8)
        })?;
        beyond(p, "loop ", |p| {
            here(p)?;
            p.a.mov(ecx, 5)?;
            // The last 2 bytes of the segment and what the branch can reach behind them.
            p.a.mov(word_ptr(OUTSIDE - 2), 0x10e2)?;
            p.a.mov(esi, OUTSIDE - 2)?;
            p.a.mov(edx, esi)?;
            p.a.jmp(edx)
        })?;
        p.a.mov(eax, ecx)?;
        p.print_eax()?;
        beyond(p, "jcc ", |p| {
            here(p)?;
            // ADD leaves no ZF behind.
            p.a.jne(u64::from(OUTSIDE) + 0x10_0000)
        })?;
        // Two no-operations to the end of the segment, and on; then an instruction across the end.
        beyond(p, "past ", |p| {
            here(p)?;
            p.a.mov(esi, OUTSIDE - 2)?;
            p.a.mov(word_ptr(OUTSIDE - 2), 0x9090)?;
            p.a.jmp(esi)
        })?;
        beyond(p, "across ", |p| {
            here(p)?;
            p.a.mov(esi, OUTSIDE - 1)?;
            p.a.mov(word_ptr(OUTSIDE - 1), 0xb0)?;
            p.a.jmp(esi)
        })?;
        into_spare(p)?;
        p.a.test(esp, esp)?;
        p.a.je(u64::from(OUTSIDE))?;
        p.print("not taken ")?;
        // To the last byte of the segment: a RET.
        p.a.mov(byte_ptr(OUTSIDE - 1), 0xc3)?;
        p.a.mov(edx, OUTSIDE - 1)?;
        p.a.call(edx)?;
        p.print("at the limit ")?;
        end(p)
    })?;
    one(accel, irqchip, &image)
}

fn canonical(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    const NOWHERE: u64 = 0x8000_1234_5678_9abc;
    /// Runs `body`, which faults at the label it gets.
    fn try_one(p: &mut Program, text: &str, body: impl FnOnce(&mut Program, &mut CodeLabel) -> Step) -> Step {
        let (mut at, mut behind) = (p.a.create_label(), p.a.create_label());
        p.print(text)?;
        p.a.lea(r14, ptr(at))?;
        p.a.lea(r15, ptr(behind))?;
        p.a.mov(r12, NOWHERE)?;
        p.a.mov(r13, rsp)?;
        body(p, &mut at)?;
        p.print("no fault ")?;
        p.a.set_label(&mut behind)?;
        p.a.mov(rsp, r13)
    }
    let image = long_mode(|p| {
        let (mut begin, mut handler) = (p.a.create_label(), p.a.create_label());
        p.a.jmp(begin)?;
        // Writes the error code, RIP - R14 and RSP - R13, a byte each, and goes on at R15.
        p.a.set_label(&mut handler)?;
        p.print("gp ")?;
        p.a.pop(rax)?;
        p.print_al()?;
        p.a.pop(rax)?;
        p.a.sub(rax, r14)?;
        p.print_al()?;
        p.a.mov(rax, qword_ptr(rsp + 16))?;
        p.a.sub(rax, r13)?;
        p.print_al()?;
        p.a.jmp(r15)?;
        p.gate(13, handler);

        p.a.set_label(&mut begin)?;
        try_one(p, "jmp ", |p, at| {
            p.a.set_label(at)?;
            p.a.jmp(r12)
        })?;
        try_one(p, "mem ", |p, at| {
            p.a.push(r12)?;
            p.a.mov(r13, rsp)?;
            p.a.set_label(at)?;
            p.a.jmp(qword_ptr(rsp))
        })?;
        try_one(p, "call ", |p, at| {
            p.a.set_label(at)?;
            p.a.call(r12)
        })?;
        try_one(p, "ret ", |p, at| {
            p.a.push(r12)?;
            p.a.mov(r13, rsp)?;
            p.a.set_label(at)?;
            p.a.ret()
        })?;
        try_one(p, "retn ", |p, at| {
            p.a.push(r12)?;
            p.a.mov(r13, rsp)?;
            p.a.set_label(at)?;
            p.a.ret_1(0x18)
        })?;
        end(p)
    })?;
    one(accel, irqchip, &image)
}

/// Where virtual-8086 code leaves what it finds.
const FOUND: u32 = 0x8000;
/// Segment of its code.
const V86_CS: u32 = DATA as u32 >> 4;

/// Where parts of it are: the handler of INT 21h, STI, INT 22h.
const INT21: u32 = 0x100;
const STI: u32 = 0x200;
const INT22: u32 = 0x300;

/// Enters virtual-8086 mode at `offset` with `flags`, IOPL 0.
fn enter_v86(p: &mut Program, offset: u32, flags: u32) -> Step {
    // GS, FS, DS, ES, SS, ESP.
    for value in [0, 0, 0, 0, 0x3000, 0x1000] {
        p.a.push(value)?;
    }
    p.a.push((flags | 0x2_0002) as i32)?;
    p.a.push(V86_CS as i32)?;
    p.a.push(offset as i32)?;
    p.a.iretd()
}

/// A TSS whose redirection bitmap leaves INT 21h to the program and INT 22h to the system, with a ring 0 stack.
fn v86_tss(p: &mut Program) -> Step {
    const TSS: u32 = 0x2100;
    p.a.mov(dword_ptr(TSS + 4), asm::STACK as u32 - 0x400)?;
    p.a.mov(dword_ptr(TSS + 8), u32::from(asm::DS))?;
    p.a.mov(word_ptr(TSS + 0x66), 0x68)?;
    p.a.mov(dword_ptr(TSS + 0x48 + 4), 1 << 2)?;
    p.a.mov(eax, 0x38)?;
    p.a.ltr(ax)
}

fn vme(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let mut image = protected_mode(|p| {
        let (mut begin, mut handler) = (p.a.create_label(), p.a.create_label());
        let mut behind = [p.a.create_label(), p.a.create_label(), p.a.create_label()];
        p.a.jmp(begin)?;
        // Writes the error code and VIF and VIP, and goes on at EDI with the stack in EBX.
        p.a.set_label(&mut handler)?;
        p.print("gp ")?;
        p.a.pop(eax)?;
        p.print_eax()?;
        p.a.mov(eax, dword_ptr(esp + 8))?;
        p.a.shr(eax, 19)?;
        p.a.and(eax, 3)?;
        p.a.test(eax, 2)?;
        let mut plain = p.a.create_label();
        p.a.je(plain)?;
        // VIP shows as 10.
        p.a.mov(eax, 0x10)?;
        p.a.set_label(&mut plain)?;
        p.print_eax()?;
        p.a.mov(ecx, i32::from(asm::DS))?;
        p.a.mov(ds, ecx)?;
        p.a.mov(esp, ebx)?;
        p.a.jmp(edi)?;
        p.gate(13, handler);

        p.a.set_label(&mut begin)?;
        v86_tss(p)?;
        p.a.mov(eax, cr4)?;
        p.a.or(eax, 1)?;
        p.a.mov(cr4, eax)?;
        // The program's vector 21h.
        p.a.mov(dword_ptr(0x84), V86_CS << 16 | INT21)?;
        p.a.mov(dword_ptr(FOUND + 4), 0)?;
        p.a.mov(ebx, esp)?;
        let starts = [(0, 0u32), (STI, 1 << 20), (INT22, 0)];
        for (n, (start, flags)) in starts.into_iter().enumerate() {
            way_to(p, edi, behind[n])?;
            enter_v86(p, start, flags)?;
            p.a.set_label(&mut behind[n])?;
            p.a.nop()?;
            for at in (FOUND..FOUND + 10).step_by(2).filter(|_| n == 0) {
                p.a.mov(ax, word_ptr(at))?;
                p.a.out(i32::from(asm::HEX as u8), ax)?;
            }
        }
        end(p)
    })?;
    let program: [(u32, &[u8]); 4] = [
        (
            0,
            &[
                0xfb, 0x9c, 0x58, 0xa3, 0x00, 0x80, // sti; pushf; pop ax; mov [8000], ax
                0xfa, 0x9c, 0x58, 0xa3, 0x02, 0x80, // cli; ...
                0xcd, 0x21, // int 21h
                0x9c, 0x58, 0x0d, 0x00, 0x02, 0x50, 0x9d, // pushf; pop ax; or ax, 200; push ax; popf
                0x9c, 0x58, 0xa3, 0x06, 0x80, // pushf; ...
                0xcd, 0x21, // int 21h with IF, which IRET brings back
                0x9c, 0x58, 0xa3, 0x08, 0x80, // pushf; ...
                0xf4, // hlt
            ],
        ),
        (
            INT21,
            &[
                0x89, 0xe5, 0x8b, 0x46, 0x04, // mov bp, sp; mov ax, [bp+4]
                0x83, 0x3e, 0x04, 0x80, 0x00, 0x75, 0x03, // cmp word [8004], 0; jne +3
                0xa3, 0x04, 0x80, // mov [8004], ax
                0x9c, 0x58, 0xf6, 0xc4, 0x02, 0x74, 0x01, 0xf4, // pushf; pop ax; test ah, 2; je +1; hlt
                0xcf, // iret
            ],
        ),
        (STI, &[0xfb, 0xf4]),
        (INT22, &[0xcd, 0x22, 0xf4]),
    ];
    image.0.extend(program.map(|(at, code)| (u64::from(V86_CS << 4 | at), code.to_vec())));
    one(accel, irqchip, &image)
}

fn pvi(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = protected_mode(|p| {
        let (mut begin, mut handler, mut user) = (p.a.create_label(), p.a.create_label(), p.a.create_label());
        let mut behind = [p.a.create_label(), p.a.create_label()];
        p.a.jmp(begin)?;
        // Writes the error code and VIF and VIP, and goes on at EDI with the stack in EBX.
        p.a.set_label(&mut handler)?;
        p.print("gp ")?;
        p.a.pop(eax)?;
        p.print_eax()?;
        p.a.mov(eax, dword_ptr(esp + 8))?;
        p.a.and(eax, 3 << 19)?;
        p.print_eax()?;
        p.a.mov(eax, i32::from(asm::DS))?;
        p.a.mov(ds, eax)?;
        p.a.mov(esp, ebx)?;
        p.a.jmp(edi)?;
        p.gate(13, handler);

        // In ring 3 the ports are out of reach: what is found is in memory.
        p.a.set_label(&mut user)?;
        p.a.cli()?;
        p.a.pushfd()?;
        p.a.pop(dword_ptr(FOUND))?;
        p.a.sti()?;
        p.a.pushfd()?;
        p.a.pop(dword_ptr(FOUND + 4))?;
        p.a.hlt()?;

        p.a.set_label(&mut begin)?;
        v86_tss(p)?;
        p.a.mov(eax, cr4)?;
        p.a.or(eax, 2)?;
        p.a.mov(cr4, eax)?;
        // 32-bit code for ring 3.
        p.a.mov(dword_ptr(SPARE), 0xffff)?;
        p.a.mov(dword_ptr(SPARE + 4), 0x00cf_fb00)?;
        p.a.mov(ebx, esp)?;
        for (n, flags) in [0, 1 << 20].into_iter().enumerate() {
            way_to(p, edi, behind[n])?;
            // Data for ring 3, which IRET would clear otherwise.
            p.a.mov(eax, 0x33)?;
            p.a.mov(ds, eax)?;
            p.a.push(0x33)?;
            p.a.push(0x3_1000)?;
            p.a.push(flags | 2)?;
            p.a.push(SPARE_CS as i32 | 3)?;
            way_to(p, eax, user)?;
            p.a.push(eax)?;
            p.a.iretd()?;
            p.a.set_label(&mut behind[n])?;
            p.a.nop()?;
            for at in [FOUND, FOUND + 4].into_iter().filter(|_| n == 0) {
                p.a.mov(eax, dword_ptr(at))?;
                p.a.and(eax, 3 << 19)?;
                p.print_eax()?;
            }
        }
        end(p)
    })?;
    one(accel, irqchip, &image)
}

/// IA32_BNDCFGS.
const BNDCFGS: u32 = 0xd90;
/// Bound directory and bound table, and an area for XSAVE.
const DIRECTORY: u64 = 0x10_0000;
const TABLE: u64 = 0x11_0000;
const AREA: u64 = 0x2_8000;

fn write_bndcfgs(p: &mut Program, value: u64) -> Step {
    p.a.mov(ecx, BNDCFGS)?;
    p.a.mov(eax, value as u32)?;
    p.a.xor(edx, edx)?;
    p.a.wrmsr()
}

/// Writes both bounds of BND0, and BNDSTATUS, 32 bits each, by what XSAVE finds; all are zero in their initial state.
fn print_bounds(p: &mut Program) -> Step {
    p.a.mov(r8, AREA)?;
    p.a.mov(dword_ptr(r8 + 512), 0)?;
    p.a.mov(eax, 0x18)?;
    p.a.xor(edx, edx)?;
    p.a.xsave(ptr(r8))?;
    for (at, component) in [(960, 8), (968, 8), (1032, 16)] {
        let mut there = p.a.create_label();
        p.a.mov(eax, dword_ptr(r8 + at))?;
        p.a.test(dword_ptr(r8 + 512), component)?;
        p.a.jne(there)?;
        p.a.xor(eax, eax)?;
        p.a.set_label(&mut there)?;
        p.print_eax()?;
    }
    Ok(())
}

fn bounds(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let (mut begin, mut ret) = (p.a.create_label(), p.a.create_label());
        p.a.jmp(begin)?;
        skip(p, 5, "br ", false)?;
        skip(p, 13, "gp ", true)?;
        // Returns with the prefix, so that only the call counts.
        p.a.set_label(&mut ret)?;
        p.a.bnd().ret()?;
        p.a.set_label(&mut begin)?;
        p.a.mov(rax, cr4)?;
        p.a.or(rax, 1 << 18)?;
        p.a.mov(cr4, rax)?;
        p.a.xor(ecx, ecx)?;
        p.a.xor(edx, edx)?;
        p.a.mov(eax, 0x1b)?;
        p.a.xsetbv()?;
        // On, branches do not reset bounds.
        write_bndcfgs(p, DIRECTORY | 3)?;
        p.a.mov(rbx, DATA)?;
        p.a.bndmk(bnd0, qword_ptr(rbx + 15))?;
        print_bounds(p)?;
        p.a.bndcl(bnd0, qword_ptr(rbx))?;
        p.a.bndcu(bnd0, qword_ptr(rbx + 15))?;
        p.print("in ")?;
        faults(p, |p| p.a.bndcu(bnd0, qword_ptr(rbx + 16)))?;
        print_bounds(p)?;
        faults(p, |p| p.a.bndcl(bnd0, qword_ptr(rbx - 1)))?;
        // Now they do.
        p.a.bndmov(xmmword_ptr(AREA as u32 - 16), bnd0)?;
        write_bndcfgs(p, DIRECTORY | 1)?;
        p.a.call(ret)?;
        write_bndcfgs(p, DIRECTORY | 3)?;
        p.print("reset ")?;
        p.a.mov(r8, AREA)?;
        p.a.mov(qword_ptr(r8 + 1032), 0)?;
        p.a.mov(qword_ptr(r8 + 1024), 0)?;
        p.a.mov(eax, 0x10)?;
        p.a.mov(qword_ptr(r8 + 512), 0)?;
        p.a.xor(edx, edx)?;
        p.a.xrstor(ptr(r8))?;
        print_bounds(p)?;
        p.a.bndmov(bnd0, xmmword_ptr(AREA as u32 - 16))?;
        write_bndcfgs(p, DIRECTORY | 1)?;
        p.a.bnd().call(ret)?;
        write_bndcfgs(p, DIRECTORY | 3)?;
        p.print("kept ")?;
        print_bounds(p)?;
        // With the pointer 0x1234, by the tables and back.
        p.a.mov(r9, DIRECTORY)?;
        p.a.mov(r10, TABLE | 1)?;
        p.a.mov(qword_ptr(r9), r10)?;
        p.a.mov(rbx, DATA)?;
        p.a.mov(ebp, 0x1234)?;
        p.a.bndstx(ptr(rbx + rbp), bnd0)?;
        p.a.bndmk(bnd0, qword_ptr(rbp))?;
        p.a.bndldx(bnd0, ptr(rbx + rbp))?;
        p.print("found ")?;
        print_bounds(p)?;
        p.a.inc(ebp)?;
        p.a.bndldx(bnd0, ptr(rbx + rbp))?;
        p.print("other ")?;
        print_bounds(p)?;
        p.a.mov(qword_ptr(r9), 0)?;
        faults(p, |p| p.a.bndldx(bnd0, ptr(rbx + rbp)))?;
        print_bounds(p)?;
        faults(p, |p| write_bndcfgs(p, 5))?;
        // Off, there are none.
        write_bndcfgs(p, 0)?;
        p.a.bndldx(bnd0, ptr(rbx + rbp))?;
        p.print("off ")?;
        end(p)
    })?;
    Rig::of_model(accel, irqchip, &image, "max")?.finish()
}

/// Intel's processors suppress them, AMD's do not.
fn breakpoint_behind_mov_ss(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let (mut begin, mut handler, mut at) = (p.a.create_label(), p.a.create_label(), p.a.create_label());
        p.a.jmp(begin)?;
        p.a.set_label(&mut handler)?;
        p.a.inc(ebx)?;
        // RF: not again.
        p.a.or(dword_ptr(rsp + 16), 1 << 16)?;
        p.a.iretq()?;
        p.gate(1, handler);
        p.a.set_label(&mut begin)?;
        p.a.xor(ebx, ebx)?;
        p.a.lea(rax, ptr(at))?;
        p.a.mov(dr0, rax)?;
        p.a.mov(eax, 0x402)?;
        p.a.mov(dr7, rax)?;
        p.a.mov(ecx, ss)?;
        p.a.mov(ss, ecx)?;
        p.a.set_label(&mut at)?;
        p.a.nop()?;
        p.a.mov(al, bl)?;
        p.print_al()?;
        end(p)
    })?;
    let mut out = String::new();
    for vendor in ["GenuineIntel", "AuthenticAMD"] {
        let model = format!("max,vendor={vendor}");
        out += &Rig::of_model(accel, irqchip, &image, &model)?.finish()?;
    }
    Ok(out)
}
