//! Accesses to devices and RAM: every width, the dirty log, ioeventfds, code that changes itself.

use holdfast_accel::{Accelerator, IrqChip};
use holdfast_device::IoEvents;
use holdfast_memory::tracker_at;
use iced_x86::code_asm::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::asm::{self, DATA, ECHO, ECHO_MMIO, STOP, long_mode};
use crate::rig::{Needs, Rig};
use crate::{Case, Failure};

pub const CASES: &[Case] = &[
    Case {
        name: "port I/O of every width",
        run: pio,
        expected: "r1@1 a1 r2@2 a3a2 r4@4 a7a6a5a4 w1@8=11 w2@a=3322 w4@c=77665544 \
                   r2@10 r2@10 b1b0b1b0 w1@20=5a w1@20=5b w1@20=5c r1@3f df ff miss\n",
    },
    Case {
        name: "memory I/O of every width",
        run: mmio,
        expected: "r1@1 a1 r2@2 a3a2 r4@4 a7a6a5a4 r8@8 afaeadac abaaa9a8 w1@10=11 w2@12=3322 w4@14=77665544 \
                   w8@18=ffeeddccbbaa9988 r1@21 000000c1 r1@f ffffffaf r4@40 w4@40=e3e2e1e1 \
                   w4@80=04030201 w4@84=08070605 ffffffff miss\n",
    },
    Case { name: "dirty log", run: dirty, expected: "first: 21 22 24 28 none: second: 30 after\n" },
    Case { name: "ioeventfds", run: ioevents, expected: "w2@0=0002 w4@10=00000001 2 1 3\n" },
    Case { name: "code that changes itself", run: smc, expected: "abcdefgh\n" },
];

const ONE: Needs = Needs { vcpus: 1 };

fn pio(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let at = |p: &mut asm::Program, n: u16| p.a.mov(edx, u32::from(ECHO + n));
        at(p, 1)?;
        p.a.in_(al, dx)?;
        p.print_al()?;
        at(p, 2)?;
        p.a.in_(ax, dx)?;
        p.a.out(i32::from(asm::HEX as u8), ax)?;
        at(p, 4)?;
        p.a.in_(eax, dx)?;
        p.print_eax()?;
        at(p, 8)?;
        p.a.mov(eax, 0x11)?;
        p.a.out(dx, al)?;
        at(p, 10)?;
        p.a.mov(eax, 0x3322)?;
        p.a.out(dx, ax)?;
        at(p, 12)?;
        p.a.mov(eax, 0x7766_5544u32)?;
        p.a.out(dx, eax)?;
        // String input: two words.
        at(p, 0x10)?;
        p.a.mov(rdi, DATA)?;
        p.a.mov(ecx, 2)?;
        p.a.cld()?;
        p.a.rep().insw()?;
        p.a.mov(r8, DATA)?;
        p.a.mov(eax, dword_ptr(r8))?;
        p.print_eax()?;
        // String output: three bytes.
        p.a.mov(dword_ptr(r8), 0x005c_5b5a)?;
        at(p, 0x20)?;
        p.a.mov(rsi, DATA)?;
        p.a.mov(ecx, 3)?;
        p.a.rep().outsb()?;
        at(p, 0x3f)?;
        p.a.in_(al, dx)?;
        p.print_al()?;
        // Nothing is there.
        p.a.mov(edx, 0x7f0)?;
        p.a.out(dx, eax)?;
        p.a.in_(al, dx)?;
        p.print_al()?;
        p.print("miss\n")?;
        p.done()
    })?;
    Rig::new(accel, irqchip, &image, ONE)?.finish()
}

fn mmio(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        p.a.mov(r8, ECHO_MMIO)?;
        p.a.mov(al, byte_ptr(r8 + 1))?;
        p.print_al()?;
        p.a.mov(ax, word_ptr(r8 + 2))?;
        p.a.out(i32::from(asm::HEX as u8), ax)?;
        p.a.mov(eax, dword_ptr(r8 + 4))?;
        p.print_eax()?;
        p.a.mov(rax, qword_ptr(r8 + 8))?;
        p.a.mov(rbx, rax)?;
        p.a.shr(rax, 32)?;
        p.print_eax()?;
        p.a.mov(eax, ebx)?;
        p.print_eax()?;
        p.a.mov(byte_ptr(r8 + 0x10), 0x11)?;
        p.a.mov(word_ptr(r8 + 0x12), 0x3322)?;
        p.a.mov(dword_ptr(r8 + 0x14), 0x7766_5544)?;
        p.a.mov(rax, 0xffee_ddcc_bbaa_9988u64)?;
        p.a.mov(qword_ptr(r8 + 0x18), rax)?;
        // Zero and sign extension.
        p.a.movzx(eax, byte_ptr(r8 + 0x21))?;
        p.print_eax()?;
        p.a.movsx(eax, byte_ptr(r8 + 0xf))?;
        p.print_eax()?;
        // Read, modify, write.
        p.a.add(dword_ptr(r8 + 0x40), 1)?;
        // From RAM, by string.
        p.a.mov(rsi, DATA)?;
        p.a.mov(rax, 0x0807_0605_0403_0201u64)?;
        p.a.mov(qword_ptr(rsi), rax)?;
        p.a.mov(rdi, ECHO_MMIO + 0x80)?;
        p.a.mov(ecx, 2)?;
        p.a.cld()?;
        p.a.rep().movsd()?;
        // Nothing is there.
        p.a.mov(r8, ECHO_MMIO + 0x1000)?;
        p.a.mov(dword_ptr(r8), 1)?;
        p.a.mov(eax, dword_ptr(r8))?;
        p.print_eax()?;
        p.print("miss\n")?;
        p.done()
    })?;
    Rig::new(accel, irqchip, &image, ONE)?.finish()
}

fn dirty(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        // What comes before the log starts does not count.
        p.a.mov(r8, DATA)?;
        p.a.mov(byte_ptr(r8), 1)?;
        p.out_byte(STOP, 0)?;
        // A byte, a read, the last word of one page into the next, a whole page by string.
        p.a.mov(byte_ptr(r8 + 0x1000), 1)?;
        p.a.mov(al, byte_ptr(r8 + 0x3000))?;
        p.a.mov(byte_ptr(r8 + 0x2fff), 1)?;
        p.a.mov(rdi, DATA + 0x4000)?;
        p.a.mov(ecx, 0x1000)?;
        p.a.cld()?;
        p.a.rep().stosb()?;
        p.a.lock().inc(dword_ptr(r8 + 0x8000))?;
        p.out_byte(STOP, 0)?;
        p.out_byte(STOP, 0)?;
        p.a.mov(rax, DATA + 0x1_0000)?;
        p.a.mov(dword_ptr(rax), 5)?;
        p.out_byte(STOP, 0)?;
        p.a.mov(byte_ptr(r8 + 0x5000), 1)?;
        p.print("after\n")?;
        p.done()
    })?;
    let mut rig = Rig::new(accel, irqchip, &image, ONE)?;
    let (tracker, _) = tracker_at(&rig.memory, 0).ok_or_else(|| Failure::Rig("no RAM at 0".into()))?;
    rig.until_asked()?;
    tracker.start_log();
    rig.vm.start_dirty_log()?;
    for round in ["first: ", "none: ", "second: "] {
        rig.until_asked()?;
        rig.vm.sync_dirty_log()?;
        rig.shared.print(round);
        for (at, word) in (0u64..).zip(tracker.take_dirty()) {
            for bit in (0..64).filter(|bit| word >> bit & 1 != 0) {
                rig.shared.print(&format!("{:x} ", at * 64 + bit));
            }
        }
    }
    rig.vm.stop_dirty_log()?;
    tracker.stop_log();
    rig.finish()
}

fn ioevents(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        p.a.mov(r8, ECHO_MMIO)?;
        p.a.mov(edx, u32::from(ECHO))?;
        // Matches twice, then not by value.
        p.a.mov(eax, 1)?;
        p.a.out(dx, ax)?;
        p.a.out(dx, ax)?;
        p.a.mov(eax, 2)?;
        p.a.out(dx, ax)?;
        // Matches by width, then not.
        p.a.mov(word_ptr(r8 + 0x10), 9)?;
        p.a.mov(dword_ptr(r8 + 0x10), 1)?;
        // Any width.
        p.a.mov(byte_ptr(r8 + 0x20), 1)?;
        p.a.mov(word_ptr(r8 + 0x20), 1)?;
        p.a.mov(dword_ptr(r8 + 0x20), 1)?;
        p.out_byte(STOP, 0)?;
        p.print("\n")?;
        p.done()
    })?;
    let mut rig = Rig::new(accel, irqchip, &image, ONE)?;
    let fd = || EventFd::new(EFD_NONBLOCK).map_err(|e| Failure::Rig(e.to_string()));
    let fds = [fd()?, fd()?, fd()?];
    let failed = |e: std::io::Error| Failure::Rig(e.to_string());
    rig.pio.register(&fds[0], ECHO.into(), 2, Some(1)).map_err(failed)?;
    rig.mmio.register(&fds[1], ECHO_MMIO + 0x10, 2, None).map_err(failed)?;
    rig.mmio.register(&fds[2], ECHO_MMIO + 0x20, 0, None).map_err(failed)?;
    rig.until_asked()?;
    let counts: Vec<String> = fds.iter().map(|fd| fd.read().unwrap_or(0).to_string()).collect();
    rig.shared.print(&counts.join(" "));
    rig.finish()
}

/// A loop rewrites the immediate of the instruction that prints.
fn smc(accel: &dyn Accelerator, irqchip: IrqChip) -> Result<String, Failure> {
    let image = long_mode(|p| {
        let mut again = p.a.create_label();
        p.a.mov(ecx, 8)?;
        p.a.set_label(&mut again)?;
        p.a.mov(al, i32::from(b'a'))?;
        p.a.out(i32::from(asm::OUT as u8), al)?;
        p.a.lea(r9, ptr(again))?;
        p.a.inc(byte_ptr(r9 + 1))?;
        p.a.dec(ecx)?;
        p.a.jne(again)?;
        p.print("\n")?;
        p.done()
    })?;
    Rig::new(accel, irqchip, &image, ONE)?.finish()
}
