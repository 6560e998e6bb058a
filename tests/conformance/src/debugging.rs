//! What a debugger does: single step, breakpoints, addresses.

use holdfast_accel::{Accelerator, DebugControl, IrqChip, WatchKind, Watchpoint};
use iced_x86::code_asm::*;

use crate::asm::{DATA, ECHO_MMIO, STOP, directory_entry, long_mode};
use crate::rig::{Needs, Rig, Stop};
use crate::{Case, Failure};

pub const CASES: &[Case] = &[
    Case { name: "single step", run: step, expected: "1 6 8 6 8 a c e end\n" },
    Case { name: "breakpoints", run: breakpoints, expected: "6 6 6 c free end\n" },
    Case { name: "address translation", run: translate, expected: "23456 none 3456 end\n" },
];

/// What an interpreting KVM gets wrong: it gives the guest the debugger's INT3, and watches no data.
pub const SOFTWARE: &[Case] = &[
    Case { name: "breakpoints by INT3, in ring 3", run: software, expected: "2 5 back end\n" },
    Case { name: "watchpoints", run: watchpoints, expected: "3 f 3 7 f end\n" },
];

const ONE: Needs = Needs { vcpus: 1 };

fn debugged(rig: &mut Rig) -> Result<u64, Failure> {
    match rig.run()? {
        Stop::Debug(pc) => Ok(pc),
        other => {
            Err(Failure::Rig(format!("a debug exit was due, but {other:?} came after {:?}", rig.output())))
        }
    }
}

/// Known lengths: nop 1, mov ecx 5, dec 2, jne 2, mov eax, ebx 2, xor 2.
fn subject() -> Result<crate::asm::Image, Failure> {
    Ok(long_mode(|p| {
        let mut again = p.a.create_label();
        p.out_byte(STOP, 0)?;
        p.a.nop()?;
        p.a.mov(ecx, 2)?;
        p.a.set_label(&mut again)?;
        p.a.dec(ecx)?;
        p.a.jne(again)?;
        p.a.mov(eax, ebx)?;
        p.a.xor(edx, edx)?;
        p.a.xor(eax, eax)?;
        p.a.nop()?;
        p.print("end\n")?;
        p.done()
    })?)
}

fn step(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let mut rig = Rig::new(accel, irqchip, &subject()?, ONE)?;
    rig.until_asked()?;
    let base = rig.state()?.rip;
    rig.vcpu.set_debug(&DebugControl {
        single_step: true,
        breakpoints: Vec::new(),
        ..DebugControl::default()
    })?;
    for _ in 0..8 {
        let pc = debugged(&mut rig)?;
        let rip = rig.state()?.rip;
        if rip != pc {
            return Err(Failure::Rig(format!("stopped at {pc:#x} with RIP {rip:#x}")));
        }
        rig.shared.print(&format!("{:x} ", pc.wrapping_sub(base)));
    }
    rig.vcpu.set_debug(&DebugControl::default())?;
    rig.finish()
}

fn breakpoints(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let mut rig = Rig::new(accel, irqchip, &subject()?, ONE)?;
    rig.until_asked()?;
    let base = rig.state()?.rip;
    let at = |offsets: &[u64]| DebugControl {
        single_step: false,
        breakpoints: offsets.iter().map(|o| base + o).collect(),
        ..DebugControl::default()
    };
    rig.vcpu.set_debug(&at(&[6, 0xc]))?;
    for _ in 0..2 {
        let pc = debugged(&mut rig)?;
        rig.shared.print(&format!("{:x} ", pc.wrapping_sub(base)));
    }
    // Once more round the loop, by the debugger's hand. The state is replaced, so the breakpoint under the pc
    // counts again.
    let mut state = rig.state()?;
    state.gpr[1] = 2;
    rig.vcpu.set_state(&holdfast_arch::CpuState::X86_64(Box::new(state)))?;
    let pc = debugged(&mut rig)?;
    rig.shared.print(&format!("{:x} ", pc.wrapping_sub(base)));
    rig.vcpu.set_debug(&at(&[0xc]))?;
    let pc = debugged(&mut rig)?;
    rig.shared.print(&format!("{:x} ", pc.wrapping_sub(base)));
    rig.vcpu.set_debug(&DebugControl::default())?;
    rig.shared.print("free ");
    rig.finish()
}

/// Known lengths: mov 3, nop 1, mov 3, mov 4, lock inc 4.
fn watchpoints(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        p.a.mov(r8, DATA + 0x100)?;
        p.out_byte(STOP, 0)?;
        p.a.mov(qword_ptr(r8), rax)?;
        p.a.nop()?;
        p.a.mov(rcx, qword_ptr(r8))?;
        p.a.mov(qword_ptr(r8 + 0x10), rax)?;
        p.a.lock().inc(dword_ptr(r8))?;
        p.print("end\n")?;
        p.done()
    })?;
    let mut rig = Rig::new(accel, irqchip, &image, ONE)?;
    rig.until_asked()?;
    let start = rig.state()?;
    for kind in [WatchKind::Write, WatchKind::Access] {
        rig.vcpu.set_state(&holdfast_arch::CpuState::X86_64(Box::new(start.clone())))?;
        let watch = Watchpoint { address: DATA + 0x100, len: 8, kind };
        rig.vcpu.set_debug(&DebugControl { watchpoints: vec![watch], ..DebugControl::default() })?;
        for _ in 0..if kind == WatchKind::Write { 2 } else { 3 } {
            let pc = match rig.run()? {
                Stop::Watch(pc, hit) if hit == watch => pc,
                other => return Err(Failure::Rig(format!("{watch:x?} was to be hit, but {other:x?} came"))),
            };
            rig.shared.print(&format!("{:x} ", pc.wrapping_sub(start.rip)));
        }
    }
    rig.vcpu.set_debug(&DebugControl::default())?;
    rig.finish()
}

/// More breakpoints than there are debug registers.
fn software(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let (mut begin, mut user, mut back) = (p.a.create_label(), p.a.create_label(), p.a.create_label());
        p.a.jmp(begin)?;
        p.a.set_label(&mut back)?;
        p.print("back end\n")?;
        p.done()?;
        p.gate(6, back);
        p.a.set_label(&mut begin)?;
        p.a.lea(r15, ptr(user))?;
        p.out_byte(STOP, 0)?;
        p.to_ring3(user)?;
        p.a.set_label(&mut user)?;
        for _ in 0..8 {
            p.a.nop()?;
        }
        p.a.ud2()
    })?;
    let mut rig = Rig::new(accel, irqchip, &image, ONE)?;
    rig.until_asked()?;
    let user = rig.state()?.gpr[15];
    // The first four are never reached.
    let offsets = [0x800, 0x801, 0x802, 0x803, 2, 5];
    let breakpoints = offsets.iter().map(|o| user + o).collect();
    rig.vcpu.set_debug(&DebugControl { single_step: false, breakpoints, ..DebugControl::default() })?;
    for _ in 0..2 {
        let pc = debugged(&mut rig)?;
        rig.shared.print(&format!("{:x} ", pc.wrapping_sub(user)));
    }
    rig.vcpu.set_debug(&DebugControl::default())?;
    rig.finish()
}

fn translate(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        // The page of the echo device shows RAM from 0 on, the next nothing.
        p.a.mov(r8, directory_entry(ECHO_MMIO))?;
        p.a.mov(rax, 0x83u64)?;
        p.a.mov(qword_ptr(r8), rax)?;
        p.a.xor(eax, eax)?;
        p.a.mov(qword_ptr(r8 + 8), rax)?;
        p.a.mov(rax, cr3)?;
        p.a.mov(cr3, rax)?;
        p.out_byte(STOP, 0)?;
        p.print("end\n")?;
        p.done()
    })?;
    let mut rig = Rig::new(accel, irqchip, &image, ONE)?;
    rig.until_asked()?;
    for gva in [DATA + 0x3456, ECHO_MMIO + 0x20_0000, ECHO_MMIO + 0x3456] {
        let text = match rig.vcpu.translate(gva)? {
            Some(gpa) => format!("{gpa:x} "),
            None => "none ".into(),
        };
        rig.shared.print(&text);
    }
    rig.finish()
}
