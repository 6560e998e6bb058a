//! A guest that is saved in the middle and goes on in another machine.

use std::time::Duration;

use holdfast_accel::{Accelerator, IrqChip};
use holdfast_device::MsiMessage;
use iced_x86::code_asm::*;

use crate::asm::{DATA, GSI, LAPIC, Program, STOP, Step, long_mode};
use crate::interrupts::{count, counting, level_interrupt, wait_for};
use crate::rig::{Needs, Rig};
use crate::{Case, Failure};

pub const CASES: &[Case] = &[
    Case {
        name: "save and restore: registers and timer",
        run: registers,
        expected: "saved 89abcdef 00000006 deadbeef 00001234 00000003 end\n",
    },
    Case { name: "save and restore: pending interrupts", run: pending, expected: "43 irq5 end\n" },
    Case { name: "save and restore: level interrupt in service", run: in_service, expected: "1 2 end\n" },
    Case { name: "save and restore: halted", run: halted, expected: "sleep woken end\n" },
    Case { name: "reset", run: reset, expected: "once once " },
];

const ONE: Needs = Needs { vcpus: 1 };

/// Replaces the machine by a new one with the same state.
fn swap(rig: &mut Rig, accel: &dyn Accelerator, irqchip: IrqChip) -> Result<(), Failure> {
    let saved = rig.save()?;
    *rig = Rig::restore(accel, irqchip, &saved)?;
    Ok(())
}

fn end(p: &mut Program) -> Step {
    p.print("end\n")?;
    p.done()
}

fn registers(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    /// IA32_KERNEL_GS_BASE.
    const KERNEL_GS_BASE: u32 = 0xc000_0102;
    let image = long_mode(|p| {
        let mut begin = p.a.create_label();
        p.a.jmp(begin)?;
        counting(p, 0x41, "")?;
        p.a.set_label(&mut begin)?;
        p.mask_pics()?;
        p.enable_lapic()?;
        p.poke(LAPIC + 0x3e0, 0xb)?;
        p.poke(LAPIC + 0x320, 0x2_0041)?;
        p.poke(LAPIC + 0x380, 20_000_000)?;
        wait_for(p, 1)?;
        p.a.mov(ecx, KERNEL_GS_BASE)?;
        p.a.mov(eax, 0xdead_beefu32)?;
        p.a.xor(edx, edx)?;
        p.a.wrmsr()?;
        p.a.mov(rax, 0x1234u64)?;
        p.a.mov(dr0, rax)?;
        p.a.mov(rax, 3u64)?;
        p.a.mov(cr8, rax)?;
        p.a.mov(r15, 0x0123_4567_89ab_cdefu64)?;
        p.a.mov(r14, 6u64)?;
        p.out_byte(STOP, 0)?;
        p.print("saved ")?;
        p.a.mov(rax, r15)?;
        p.print_eax()?;
        p.a.mov(rax, r14)?;
        p.print_eax()?;
        p.a.mov(ecx, KERNEL_GS_BASE)?;
        p.a.rdmsr()?;
        p.print_eax()?;
        p.a.mov(rax, dr0)?;
        p.print_eax()?;
        p.a.mov(rax, cr8)?;
        p.print_eax()?;
        // The timer still ticks.
        p.a.mov(rax, DATA)?;
        p.a.mov(dword_ptr(rax), 0)?;
        wait_for(p, 2)?;
        end(p)
    })?;
    let mut rig = Rig::new(accel, irqchip, &image, ONE)?;
    rig.until_asked()?;
    swap(&mut rig, accel, irqchip)?;
    rig.finish()
}

/// One interrupt waits at the local APIC, one at the 8259.
fn pending(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let (mut begin, mut irq5) = (p.a.create_label(), p.a.create_label());
        p.a.jmp(begin)?;
        counting(p, 0x43, "43 ")?;
        p.a.set_label(&mut irq5)?;
        p.a.push(rax)?;
        p.print("irq5 ")?;
        p.out_byte(GSI, 5)?;
        p.out_byte(0x20, 0x20)?;
        count(p)?;
        p.a.pop(rax)?;
        p.a.iretq()?;
        p.gate(0x25, irq5);
        p.a.set_label(&mut begin)?;
        p.init_pics(0x20, 1 << 5)?;
        p.enable_lapic()?;
        p.poke(LAPIC + 0x300, 0x4_4043)?;
        p.out_byte(STOP, 0)?;
        wait_for(p, 1)?;
        p.out_byte(GSI, 0x80 | 5)?;
        p.out_byte(STOP, 0)?;
        wait_for(p, 2)?;
        end(p)
    })?;
    let mut rig = Rig::new(accel, irqchip, &image, ONE)?;
    for _ in 0..2 {
        rig.until_asked()?;
        swap(&mut rig, accel, irqchip)?;
    }
    rig.finish()
}

/// Saved between a level interrupt's delivery and its EOI, with the line up.
fn in_service(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        level_interrupt(p, |p| {
            p.out_byte(STOP, 0)?;
            p.print("1 ")
        })?;
        end(p)
    })?;
    let mut rig = Rig::new(accel, irqchip, &image, ONE)?;
    rig.until_asked()?;
    swap(&mut rig, accel, irqchip)?;
    rig.finish()
}

/// Saved while it sleeps in HLT; a message wakes it in the new machine.
fn halted(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let mut begin = p.a.create_label();
        p.a.jmp(begin)?;
        counting(p, 0x43, "woken ")?;
        p.a.set_label(&mut begin)?;
        p.mask_pics()?;
        p.enable_lapic()?;
        p.print("sleep ")?;
        wait_for(p, 1)?;
        end(p)
    })?;
    let mut rig = Rig::new(accel, irqchip, &image, ONE)?;
    rig.ask_after(Duration::from_millis(200))?;
    rig.until_asked()?;
    swap(&mut rig, accel, irqchip)?;
    let msi = rig.vm.msi().ok_or_else(|| Failure::Rig("the accelerator takes no MSIs".into()))?;
    msi.send(MsiMessage { address: 0xfee0_0000, data: 0x43, device: 0 })
        .map_err(|e| Failure::Rig(e.to_string()))?;
    rig.finish()
}

/// After a reset the same image runs again from the start.
fn reset(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        p.enable_lapic()?;
        p.print("once ")?;
        p.a.mov(rax, 5u64)?;
        p.a.mov(cr8, rax)?;
        p.out_byte(STOP, 0)?;
        p.done()
    })?;
    let mut rig = Rig::new(accel, irqchip, &image, ONE)?;
    rig.until_asked()?;
    rig.vcpu.reset()?;
    let state = rig.state()?;
    if (state.rip, state.cr[4], state.efer) != (0xfff0, 0, 0) {
        return Err(Failure::Rig(format!("reset left RIP {:#x}, CR8 {}", state.rip, state.cr[4])));
    }
    rig.start_at_entry()?;
    rig.until_asked()?;
    Ok(rig.output())
}
