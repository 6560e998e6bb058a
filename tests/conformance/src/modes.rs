//! Processor modes: what each can do, and the ways between them.

use holdfast_accel::{Accelerator, IrqChip};
use iced_x86::code_asm::*;

use crate::asm::{self, ECHO_MMIO, long_mode, protected_mode, real_mode};
use crate::rig::{Needs, Rig};
use crate::{Case, Failure};

pub const CASES: &[Case] = &[
    Case { name: "real mode", run: real, expected: "real: seg 1234 int 21 sub 6 done\n" },
    Case {
        name: "protected mode",
        run: protected,
        expected: "32: esp ok ud 18 div 18 gp 0000fff8 18 0001f000 end\n",
    },
    Case {
        name: "long mode",
        run: long,
        expected: "64: r15 89abcdef page 0e 00000002 d0401000 ok ring3 back 0000002b \n",
    },
    Case { name: "cpuid and msrs", run: cpuid, expected: "apic 00 efer 00000500 base fee00900 \n" },
];

fn one(accel: &dyn Accelerator, irqchip: IrqChip, image: &asm::Image) -> Result<String, Failure> {
    Rig::new(accel, irqchip, image, Needs { vcpus: 1 })?.finish()
}

fn real(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = real_mode(|p| {
        let (mut handler, mut sub, mut begin) = (p.a.create_label(), p.a.create_label(), p.a.create_label());
        p.a.jmp(begin)?;
        // Software interrupt: writes its number, which AH holds.
        p.a.set_label(&mut handler)?;
        p.print("int ")?;
        p.a.mov(al, ah)?;
        p.a.out(i32::from(asm::HEX as u8), al)?;
        p.a.iret()?;
        // Subroutine: AL = CL * 2.
        p.a.set_label(&mut sub)?;
        p.a.mov(al, cl)?;
        p.a.add(al, cl)?;
        p.a.ret()?;

        p.a.set_label(&mut begin)?;
        p.print("real: seg ")?;
        // Linear 0x12350 through two different segments.
        p.a.mov(ax, 0x1000)?;
        p.a.mov(ds, ax)?;
        p.a.mov(word_ptr(0x2350), 0x1234)?;
        p.a.mov(ax, 0x1235)?;
        p.a.mov(es, ax)?;
        p.a.mov(ax, word_ptr(0x0000).es())?;
        p.a.xor(bx, bx)?;
        p.a.mov(ds, bx)?;
        p.a.out(i32::from(asm::HEX as u8), ax)?;
        p.a.mov(ah, 0x21)?;
        p.a.int(0x21)?;
        p.print("sub ")?;
        p.a.mov(cl, 3)?;
        p.a.call(sub)?;
        p.a.add(al, 0x30)?;
        p.a.out(i32::from(asm::OUT as u8), al)?;
        p.print(" ")?;
        p.print("done\n")?;
        p.done()?;
        Ok(vec![(0x21, handler)])
    })?;
    one(accel, irqchip, &image)
}

fn protected(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = protected_mode(|p| {
        let mut begin = p.a.create_label();
        let mut next = [p.a.create_label(), p.a.create_label(), p.a.create_label()];
        p.a.jmp(begin)?;
        // Handlers drop their frame and go on at a known place: not every KVM emulates IRET in this mode.
        for (n, (vector, text, code)) in
            [(6, "ud ", false), (0, "div ", false), (13, "gp ", true)].into_iter().enumerate()
        {
            let mut label = p.a.create_label();
            p.a.set_label(&mut label)?;
            p.print(text)?;
            if code {
                p.a.pop(eax)?;
                p.print_eax()?;
            }
            // CS under the return address.
            p.a.mov(eax, dword_ptr(esp + 4))?;
            p.print_al()?;
            p.a.add(esp, 12)?;
            p.a.jmp(next[n])?;
            p.gate(vector, label);
        }

        p.a.set_label(&mut begin)?;
        p.print("32: ")?;
        let mut bad = p.a.create_label();
        p.a.mov(eax, esp)?;
        p.a.push(eax)?;
        p.a.pop(ebx)?;
        p.a.cmp(eax, ebx)?;
        p.a.jne(bad)?;
        p.print("esp ok ")?;
        p.a.set_label(&mut bad)?;
        p.a.ud2()?;
        p.a.set_label(&mut next[0])?;
        p.a.xor(ecx, ecx)?;
        p.a.mov(eax, 1)?;
        p.a.xor(edx, edx)?;
        p.a.div(ecx)?;
        p.a.set_label(&mut next[1])?;
        // A selector beyond the table.
        p.a.mov(eax, 0xfff8)?;
        p.a.mov(ds, eax)?;
        p.a.set_label(&mut next[2])?;
        p.a.mov(eax, esp)?;
        p.print_eax()?;
        p.print("end\n")?;
        p.done()
    })?;
    one(accel, irqchip, &image)
}

fn long(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let unmapped = ECHO_MMIO + 0x40_0000;
    let image = long_mode(|p| {
        let (mut begin, mut fault) = (p.a.create_label(), p.a.create_label());
        let (mut user, mut syscall) = (p.a.create_label(), p.a.create_label());
        p.a.jmp(begin)?;
        // Page fault: error code, address, then the page is made present again.
        p.a.set_label(&mut fault)?;
        p.print("page ")?;
        p.a.mov(al, 14)?;
        p.print_al()?;
        p.a.pop(rax)?;
        p.print_eax()?;
        p.a.mov(rax, cr2)?;
        p.print_eax()?;
        p.a.mov(r8, asm::directory_entry(unmapped))?;
        p.a.mov(rax, 0x87u64)?;
        p.a.mov(qword_ptr(r8), rax)?;
        p.a.iretq()?;
        p.gate(14, fault);
        // From ring 3: what CS was there.
        p.a.set_label(&mut syscall)?;
        p.print("back ")?;
        p.a.mov(eax, dword_ptr(rsp + 8))?;
        p.a.out(i32::from(asm::HEX as u8), eax)?;
        p.out_byte(asm::OUT, b'\n')?;
        p.done()?;
        p.gate(6, syscall);

        p.a.set_label(&mut begin)?;
        p.print("64: r15 ")?;
        p.a.mov(r15, 0x0123_4567_89ab_cdefu64)?;
        p.a.mov(rax, r15)?;
        p.a.shr(rax, 32)?;
        p.a.cmp(eax, 0x0123_4567)?;
        p.a.mov(rax, r15)?;
        p.print_eax()?;
        p.a.mov(r8, asm::directory_entry(unmapped))?;
        p.a.mov(rax, 0u64)?;
        p.a.mov(qword_ptr(r8), rax)?;
        p.a.mov(r9, unmapped + 0x1000)?;
        p.a.invlpg(byte_ptr(r9))?;
        // Becomes page frame 0 in the handler: this lands in RAM at 0x1000.
        p.a.mov(dword_ptr(r9), 0x90)?;
        p.print("ok ")?;
        p.print("ring3 ")?;
        p.to_ring3(user)?;
        p.a.set_label(&mut user)?;
        p.a.ud2()
    })?;
    one(accel, irqchip, &image)
}

fn cpuid(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        p.print("apic ")?;
        p.a.mov(eax, edi)?;
        p.print_al()?;
        p.print("efer ")?;
        p.a.mov(ecx, 0xc000_0080u32)?;
        p.a.rdmsr()?;
        // LME and LMA; a software KVM may set other bits.
        p.a.and(eax, 0x500)?;
        p.print_eax()?;
        p.print("base ")?;
        p.a.mov(ecx, 0x1b)?;
        p.a.rdmsr()?;
        p.print_eax()?;
        p.print("\n")?;
        p.done()
    })?;
    one(accel, irqchip, &image)
}
