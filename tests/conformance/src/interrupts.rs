//! Interrupts by every way there is: local APIC, IOAPIC, 8259, 8254, messages, processors, NMI.

use holdfast_accel::{Accelerator, IrqChip};
use iced_x86::code_asm::*;

use crate::asm::{self, DATA, GSI, IOAPIC, LAPIC, LINT1, MSI, Program, STOP, Step, long_mode, real_mode};
use crate::rig::{Needs, Rig};
use crate::{Case, Failure};

pub const CASES: &[Case] = &[
    Case { name: "APIC timer", run: timer, expected: "shot tick tick tick end\n" },
    Case { name: "task priority", run: priority, expected: "held 53 43 end\n" },
    Case { name: "IOAPIC level", run: level, expected: "1 00004000 2 00000000 end\n" },
    Case { name: "IOAPIC edge", run: edge, expected: "irq irq irq end\n" },
    Case { name: "8259 pair in real mode", run: pic, expected: "raised irq5 irq5 10 then 6 end\n" },
    Case { name: "8259 in long mode, from HLT", run: pic_long, expected: "shadow not yet irq3 irq3 end\n" },
    Case { name: "8254 through the 8259", run: pit_pic, expected: "tick tick tick end\n" },
    Case { name: "8254 through the IOAPIC", run: pit_ioapic, expected: "tick tick tick end\n" },
    Case {
        name: "message-signalled interrupts",
        run: msi,
        expected: "43 43 clear pending 43 clear 43 44 end\n",
    },
    Case { name: "two vCPUs", run: smp, expected: "ap1 ipi reply sum 00004e20 end\n" },
    Case { name: "NMI", run: nmi, expected: "1 nested 2 3 masked host 4 end\n" },
];

const ONE: Needs = Needs { vcpus: 1 };

/// A handler that prints `text`, counts in [`DATA`] and acknowledges at the local APIC.
pub fn counting(p: &mut Program, vector: u8, text: &str) -> Step {
    let mut label = p.a.create_label();
    p.a.set_label(&mut label)?;
    p.a.push(rax)?;
    p.print(text)?;
    count(p)?;
    p.a.pop(rax)?;
    p.eoi()?;
    p.a.iretq()?;
    p.gate(vector, label);
    Ok(())
}

/// Adds one to the counter.
pub fn count(p: &mut Program) -> Step {
    p.a.mov(rax, DATA)?;
    p.a.inc(dword_ptr(rax))
}

/// Sleeps until the counter has reached `n`. Interrupts are off afterwards.
pub fn wait_for(p: &mut Program, n: u32) -> Step {
    let (mut again, mut done) = (p.a.create_label(), p.a.create_label());
    p.a.set_label(&mut again)?;
    p.a.cli()?;
    p.a.mov(rax, DATA)?;
    p.a.mov(eax, dword_ptr(rax))?;
    p.a.cmp(eax, n)?;
    p.a.jae(done)?;
    p.a.sti()?;
    p.a.hlt()?;
    p.a.jmp(again)?;
    p.a.set_label(&mut done)
}

fn end(p: &mut Program) -> Step {
    p.print("end\n")?;
    p.done()
}

fn timer(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let mut begin = p.a.create_label();
        p.a.jmp(begin)?;
        counting(p, 0x40, "shot ")?;
        counting(p, 0x41, "tick ")?;
        p.a.set_label(&mut begin)?;
        p.mask_pics()?;
        p.enable_lapic()?;
        p.poke(LAPIC + 0x3e0, 0xb)?;
        p.poke(LAPIC + 0x320, 0x40)?;
        p.poke(LAPIC + 0x380, 1_000_000)?;
        wait_for(p, 1)?;
        // Periodic.
        p.poke(LAPIC + 0x320, 0x2_0041)?;
        p.poke(LAPIC + 0x380, 20_000_000)?;
        wait_for(p, 4)?;
        p.poke(LAPIC + 0x320, 0x1_0000)?;
        end(p)
    })?;
    Rig::new(accel, irqchip, &image, ONE)?.finish()
}

/// Interrupts below the task priority wait; the higher of two comes first.
fn priority(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let mut begin = p.a.create_label();
        p.a.jmp(begin)?;
        counting(p, 0x43, "43 ")?;
        counting(p, 0x53, "53 ")?;
        p.a.set_label(&mut begin)?;
        p.mask_pics()?;
        p.enable_lapic()?;
        p.a.mov(rax, 6u64)?;
        p.a.mov(cr8, rax)?;
        // To itself.
        p.poke(LAPIC + 0x300, 0x4_4043)?;
        p.poke(LAPIC + 0x300, 0x4_4053)?;
        p.a.sti()?;
        p.a.nop()?;
        p.print("held ")?;
        p.a.xor(eax, eax)?;
        p.a.mov(cr8, rax)?;
        wait_for(p, 2)?;
        end(p)
    })?;
    Rig::new(accel, irqchip, &image, ONE)?.finish()
}

/// Writes the remote IRR bit of pin 20.
fn remote_irr(p: &mut Program) -> Step {
    p.poke(IOAPIC, 0x10 + 2 * 20)?;
    p.peek(eax, IOAPIC + 0x10)?;
    p.a.and(eax, 0x4000)?;
    p.print_eax()
}

/// Raises a level-triggered interrupt and keeps the line up: the first delivery does `first`, the second lowers the
/// line. Some KVMs report the EOI at delivery: then one more comes after that, and is no fault.
pub(crate) fn level_interrupt(p: &mut Program, first: impl FnOnce(&mut Program) -> Step) -> Step {
    let (mut begin, mut handler) = (p.a.create_label(), p.a.create_label());
    let (mut second, mut out) = (p.a.create_label(), p.a.create_label());
    p.a.jmp(begin)?;
    p.a.set_label(&mut handler)?;
    p.a.push(rax)?;
    p.a.push(r8)?;
    count(p)?;
    p.a.cmp(dword_ptr(rax), 1)?;
    p.a.jne(second)?;
    first(p)?;
    p.a.jmp(out)?;
    p.a.set_label(&mut second)?;
    p.a.cmp(dword_ptr(rax), 2)?;
    p.a.jne(out)?;
    p.print("2 ")?;
    p.out_byte(GSI, 20)?;
    p.a.set_label(&mut out)?;
    p.a.pop(r8)?;
    p.a.pop(rax)?;
    p.eoi()?;
    p.a.iretq()?;
    p.gate(0x48, handler);

    p.a.set_label(&mut begin)?;
    p.mask_pics()?;
    p.enable_lapic()?;
    p.ioapic(0x10 + 2 * 20 + 1, 0)?;
    p.ioapic(0x10 + 2 * 20, 0x8048)?;
    p.out_byte(GSI, 0x80 | 20)?;
    wait_for(p, 2)
}

fn level(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        // The line stays up: after the EOI it comes again.
        level_interrupt(p, |p| {
            p.print("1 ")?;
            remote_irr(p)
        })?;
        // One more may be on its way. It must end, with the line down.
        let mut again = p.a.create_label();
        p.a.sti()?;
        p.a.set_label(&mut again)?;
        p.poke(IOAPIC, 0x10 + 2 * 20)?;
        p.peek(eax, IOAPIC + 0x10)?;
        p.a.test(eax, 0x4000)?;
        p.a.jne(again)?;
        p.a.cli()?;
        remote_irr(p)?;
        end(p)
    })?;
    Rig::new(accel, irqchip, &image, ONE)?.finish()
}

fn edge(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let mut begin = p.a.create_label();
        p.a.jmp(begin)?;
        counting(p, 0x49, "irq ")?;
        p.a.set_label(&mut begin)?;
        p.mask_pics()?;
        p.enable_lapic()?;
        p.ioapic(0x10 + 2 * 21 + 1, 0)?;
        p.ioapic(0x10 + 2 * 21, 0x49)?;
        for n in 1..=3 {
            p.out_byte(GSI, 0x80 | 21)?;
            p.out_byte(GSI, 21)?;
            wait_for(p, n)?;
        }
        end(p)
    })?;
    Rig::new(accel, irqchip, &image, ONE)?.finish()
}

/// Where the real-mode guest counts.
const COUNT: u32 = 0x800;

/// A real-mode handler of the 8259s: prints, lowers the line, counts, acknowledges.
fn pic_handler(p: &mut Program, text: &str, gsi: u8) -> Result<CodeLabel, iced_x86::IcedError> {
    let mut label = p.a.create_label();
    p.a.set_label(&mut label)?;
    p.a.push(ax)?;
    p.print(text)?;
    p.out_byte(GSI, gsi)?;
    p.a.inc(byte_ptr(COUNT))?;
    if gsi >= 8 {
        p.out_byte(0xa0, 0x20)?;
    }
    p.out_byte(0x20, 0x20)?;
    p.a.pop(ax)?;
    p.a.iret()?;
    Ok(label)
}

/// Waits, with interrupts on, until `n` have come.
fn real_wait(p: &mut Program, n: i32) -> Step {
    let mut again = p.a.create_label();
    p.a.sti()?;
    p.a.set_label(&mut again)?;
    p.a.cmp(byte_ptr(COUNT), n)?;
    p.a.jb(again)?;
    p.a.cli()
}

fn pic(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = real_mode(|p| {
        let mut begin = p.a.create_label();
        p.a.jmp(begin)?;
        let five = pic_handler(p, "irq5 ", 5)?;
        let ten = pic_handler(p, "10 then ", 10)?;
        let other = pic_handler(p, "6 ", 6)?;
        p.a.set_label(&mut begin)?;
        p.init_pics(0x20, 1 << 2 | 1 << 5 | 1 << 6 | 1 << 10)?;
        // While interrupts are off, and while they are on.
        p.out_byte(GSI, 0x80 | 5)?;
        p.print("raised ")?;
        real_wait(p, 1)?;
        p.a.sti()?;
        p.out_byte(GSI, 0x80 | 5)?;
        real_wait(p, 2)?;
        // The slave's inputs come before the master's 3 to 7.
        p.out_byte(GSI, 0x80 | 6)?;
        p.out_byte(GSI, 0x80 | 10)?;
        real_wait(p, 4)?;
        end(p)?;
        Ok(vec![(0x25, five), (0x26, other), (0x2a, ten)])
    })?;
    Rig::new(accel, irqchip, &image, ONE)?.finish()
}

/// An interrupt of the 8259s in long mode, counted.
fn pic_counting(p: &mut Program, vector: u8, text: &str, gsi: Option<u8>) -> Step {
    let mut label = p.a.create_label();
    p.a.set_label(&mut label)?;
    p.a.push(rax)?;
    p.print(text)?;
    count(p)?;
    if let Some(gsi) = gsi {
        p.out_byte(GSI, gsi)?;
    }
    p.out_byte(0x20, 0x20)?;
    p.a.pop(rax)?;
    p.a.iretq()?;
    p.gate(vector, label);
    Ok(())
}

fn pic_long(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let mut begin = p.a.create_label();
        p.a.jmp(begin)?;
        pic_counting(p, 0x23, "irq3 ", Some(3))?;
        counting(p, 0x43, "")?;
        p.a.set_label(&mut begin)?;
        p.init_pics(0x20, 1 << 3)?;
        p.enable_lapic()?;
        // STI holds interrupts off for one more instruction, here CLI.
        p.out_byte(GSI, 0x80 | 3)?;
        p.print("shadow ")?;
        p.a.sti()?;
        p.a.cli()?;
        p.print("not yet ")?;
        wait_for(p, 1)?;
        // From another interrupt's HLT: the timer of the local APIC raises the line in a while.
        p.out_byte(GSI, 0x80 | 3)?;
        wait_for(p, 2)?;
        end(p)
    })?;
    Rig::new(accel, irqchip, &image, ONE)?.finish()
}

/// Starts channel 0 with a period of about 10 ms.
fn start_pit(p: &mut Program) -> Step {
    p.out_byte(0x43, 0x34)?;
    p.out_byte(0x40, 0x9c)?;
    p.out_byte(0x40, 0x2e)
}

fn pit_pic(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let mut begin = p.a.create_label();
        p.a.jmp(begin)?;
        pic_counting(p, 0x20, "tick ", None)?;
        p.a.set_label(&mut begin)?;
        p.init_pics(0x20, 1)?;
        start_pit(p)?;
        wait_for(p, 3)?;
        end(p)
    })?;
    Rig::new(accel, irqchip, &image, ONE)?.finish()
}

fn pit_ioapic(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let mut begin = p.a.create_label();
        p.a.jmp(begin)?;
        counting(p, 0x4a, "tick ")?;
        p.a.set_label(&mut begin)?;
        p.mask_pics()?;
        p.enable_lapic()?;
        p.ioapic(0x10 + 2 * 2 + 1, 0)?;
        p.ioapic(0x10 + 2 * 2, 0x4a)?;
        start_pit(p)?;
        wait_for(p, 3)?;
        end(p)
    })?;
    Rig::new(accel, irqchip, &image, ONE)?.finish()
}

fn msi(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let mut begin = p.a.create_label();
        p.a.jmp(begin)?;
        counting(p, 0x43, "43 ")?;
        counting(p, 0x44, "44 ")?;
        p.a.set_label(&mut begin)?;
        p.mask_pics()?;
        p.enable_lapic()?;
        let command = |p: &mut Program, value: u32| p.out_long(MSI + 8, value);
        p.out_long(MSI, 0xfee0_0000)?;
        p.out_long(MSI + 4, 0x43)?;
        command(p, 1)?;
        command(p, 2)?;
        wait_for(p, 1)?;
        // By eventfd, where there is one.
        command(p, 3)?;
        wait_for(p, 2)?;
        // Masked: kept, however often, and delivered once.
        command(p, 0)?;
        command(p, 4)?;
        command(p, 3)?;
        command(p, 2)?;
        command(p, 4)?;
        command(p, 1)?;
        wait_for(p, 3)?;
        command(p, 4)?;
        command(p, 2)?;
        wait_for(p, 4)?;
        // A message without a vector of its own.
        p.out_long(MSI + 4, 0x44)?;
        command(p, 5)?;
        wait_for(p, 5)?;
        end(p)
    })?;
    Rig::new(accel, irqchip, &image, ONE)?.finish()
}

/// Adds 10000 to a shared number, one by one.
fn add_up(p: &mut Program) -> Step {
    let mut again = p.a.create_label();
    p.a.mov(r9, DATA + 0x80)?;
    p.a.mov(ecx, 10_000)?;
    p.a.set_label(&mut again)?;
    p.a.lock().inc(dword_ptr(r9))?;
    p.a.dec(ecx)?;
    p.a.jne(again)
}

/// Spins until the doubleword at `at` is `value`.
fn spin(p: &mut Program, at: u64, value: u32) -> Step {
    let mut again = p.a.create_label();
    p.a.mov(r9, at)?;
    p.a.set_label(&mut again)?;
    p.a.pause()?;
    p.a.cmp(dword_ptr(r9), value)?;
    p.a.jne(again)
}

/// Sends an inter-processor interrupt.
fn ipi(p: &mut Program, target: u32, command: u32) -> Step {
    p.poke(LAPIC + 0x310, target << 24)?;
    p.poke(LAPIC + 0x300, command)
}

fn smp(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let (flag, finished) = (DATA + 0x100, DATA + 0x180);
    let image = long_mode(|p| {
        let (mut begin, mut other, mut delay) = (p.a.create_label(), p.a.create_label(), p.a.create_label());
        let mut on_ipi = p.a.create_label();
        p.a.test(edi, edi)?;
        p.a.jne(other)?;
        p.a.jmp(begin)?;
        counting(p, 0x51, "reply ")?;
        p.a.set_label(&mut on_ipi)?;
        p.print("ipi ")?;
        p.eoi()?;
        ipi(p, 0, 0x4051)?;
        p.a.iretq()?;
        p.gate(0x50, on_ipi);

        p.a.set_label(&mut other)?;
        p.enable_lapic()?;
        p.print("ap1 ")?;
        p.a.mov(r9, flag)?;
        p.a.mov(dword_ptr(r9), 1)?;
        // Interrupts stay on: not every KVM takes one between HLT and a CLI behind it.
        p.a.sti()?;
        spin(p, flag, 2)?;
        p.a.cli()?;
        add_up(p)?;
        p.a.mov(r9, finished)?;
        p.a.mov(dword_ptr(r9), 1)?;
        p.halt()?;

        p.a.set_label(&mut begin)?;
        p.mask_pics()?;
        p.enable_lapic()?;
        ipi(p, 1, 0x4500)?;
        p.a.mov(ecx, 5000)?;
        p.a.set_label(&mut delay)?;
        p.a.dec(ecx)?;
        p.a.jne(delay)?;
        ipi(p, 1, 0x4601)?;
        ipi(p, 1, 0x4601)?;
        spin(p, flag, 1)?;
        ipi(p, 1, 0x4050)?;
        wait_for(p, 1)?;
        p.a.mov(r9, flag)?;
        p.a.mov(dword_ptr(r9), 2)?;
        add_up(p)?;
        spin(p, finished, 1)?;
        p.print("sum ")?;
        p.peek(eax, DATA + 0x80)?;
        p.print_eax()?;
        end(p)
    })?;
    Rig::new(accel, irqchip, &image, Needs { vcpus: 2 })?.finish()
}

fn nmi(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let (mut begin, mut handler) = (p.a.create_label(), p.a.create_label());
        let mut quiet = p.a.create_label();
        p.a.jmp(begin)?;
        p.a.set_label(&mut handler)?;
        p.a.push(rax)?;
        count(p)?;
        p.a.mov(eax, dword_ptr(rax))?;
        p.a.cmp(eax, 1)?;
        p.a.push(rax)?;
        p.a.add(al, 0x30)?;
        p.a.out(i32::from(asm::OUT as u8), al)?;
        p.print(" ")?;
        p.a.pop(rax)?;
        p.a.cmp(eax, 1)?;
        p.a.jne(quiet)?;
        // Another while the first is handled: it waits for IRET.
        p.out_byte(LINT1, 0)?;
        p.out_byte(LINT1, 1)?;
        p.print("nested ")?;
        p.a.set_label(&mut quiet)?;
        p.a.pop(rax)?;
        p.a.iretq()?;
        p.gate(2, handler);

        p.a.set_label(&mut begin)?;
        p.mask_pics()?;
        p.enable_lapic()?;
        p.poke(LAPIC + 0x360, 0x400)?;
        p.out_byte(LINT1, 1)?;
        p.a.nop()?;
        p.out_byte(LINT1, 0)?;
        p.out_byte(LINT1, 1)?;
        p.a.nop()?;
        // Masked at the local APIC.
        p.poke(LAPIC + 0x360, 0x1_0400)?;
        p.out_byte(LINT1, 0)?;
        p.out_byte(LINT1, 1)?;
        p.print("masked ")?;
        // By the host, which needs no pin.
        p.out_byte(STOP, 0)?;
        p.a.nop()?;
        end(p)
    })?;
    let mut rig = Rig::new(accel, irqchip, &image, ONE)?;
    rig.until_asked()?;
    rig.shared.print("host ");
    rig.vcpu.inject_nmi()?;
    rig.finish()
}
